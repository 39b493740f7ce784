# The stall reasons of notebook 16's steps, at most 97 s: bash .gpu/stalls.sh. Carry [".gpu"] (g16/stairs.py takes the kernels from the notebook).
# Results in logs: stalls.txt, stalls_raw.csv, stalls_source.csv.gz, stalls.ncu-rep, stalls_ncu.log. Status 3: no ncu, or its counters are refused.
. .gpu/env.sh
exec timeout -k 2 97 python3 .gpu/g16/stalls.py
