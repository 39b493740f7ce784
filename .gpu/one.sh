# One GPU: bash .gpu/one.sh A (carry .kit and .gpu with peers.aa), then B (carry build with peers.ab, and .gpu).
S=$SECONDS; . .gpu/env.sh
cp -p $K/*.ipynb notebooks/ 2>/dev/null; cp $K/measured/*.json $M/ 2>/dev/null
left() { echo $((${END:-585} - SECONDS + S)); }
t() { timeout $1 python3 -m pytest -v -rs -p no:cacheprovider tests/test_layers.py tests/test_linear.py tests/test_kernels_residual.py tests/test_kernels_hopper.py tests/test_kernels_hopper_backward.py tests/test_block.py tests/test_attention.py -k "$2" > $L/tests.log 2>&1; say tests $?; pack; }
case $1 in
A) f 10 350; END=430; (lab 15 $(left)) & (lab 11 $(left)) & (t 85 "launch or backend or bits or lse or below or parts or linear or layers or residual or packed or operator or handed or hands") & wait;;
B) f 13 200; (lab 13 $(left)) & wait; f 00 50; [ $((${REST:-280} - SECONDS + S)) -gt 60 ] && { timeout 97 bash .gpu/stalls.sh > $L/stalls.log 2>&1; say stalls $?; };;
esac
pack; say end
