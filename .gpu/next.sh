# The next holds on two H200s, each at most 600 s: bash .gpu/next.sh 1|2|3. Before 1: make_kit.sh, python3 .gpu/clear.py 0 1 (outputs cleared
# in the tree that is sent: 64 MiB in all), carry [".kit",".gpu"] with peers.aa in .gpu. Before 2: move peers.aa away, carry ["build",".gpu"].
# Before 3: notebooks back with their outputs, carry [".gpu"]. All in one message block. Results: logs/fullNN.ipynb, labNN.ipynb, with measured
# figures in their metadata; merge outputs, execution counts and figures by cell id (all sources must be equal), then .gpu/rows.py.
S=$SECONDS; . .gpu/env.sh
cp -p $K/*.ipynb notebooks/ 2>/dev/null; cp $K/measured/*.json $M/ 2>/dev/null; cp -n .gpu/matrix.txt $K/ 2>/dev/null
half() { export CUDA_VISIBLE_DEVICES=$1; taskset -cp $2 $BASHPID >/dev/null; }
case $1 in
1) one() { half 0 0-15; timeout 100 python3 -m pytest -q -rs -p no:cacheprovider tests/test_kernels_hopper.py tests/test_kernels_hopper_backward.py -k "launch or backend or bits or lse or below or parts" > $L/tests.log 2>&1; say tests $?
     f 15 450; }
   two() { half 1 16-31; f 10 360; f 11 200; };;
2) one() { half 0 0-15; f 08 200; f 13 200; timeout 190 python3 tools/speed_of_tower.py --quick > $L/speed.log 2>&1; say speed $?; pack; }
   two() { half 1 16-31; f 04 260; f 16 260; timeout 100 bash .gpu/stalls.sh > $L/stalls.log 2>&1; say stalls $?; pack; };;
3) f 14 110
   one() { half 0 0-15; (lab 10 220) & (lab 15 120; lab 11 60; lab 00 50) & wait; }
   two() { half 1 16-31; f 00 60; (lab 08 130; lab 14 90) & (lab 13 110; lab 04 90) & wait; };;
esac
one & two & wait; pack
[ $1 = 3 ] && python3 .gpu/matrix.py $K $L $((${LIMIT:-570} - SECONDS + S)) 6 6 12 22
say end
