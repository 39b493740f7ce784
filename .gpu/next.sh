# The next holds on two H200s, each at most 600 s: bash .gpu/next.sh 1|2|3. Before 1: make_kit.sh, python3 .gpu/clear.py 0 1 (outputs cleared
# in the tree that is sent: 64 MiB in all; restore with git checkout after), carry [".kit",".gpu"] with peers.aa in .gpu. Before 2: move peers.aa
# away, carry ["build",".gpu"]. Issue 1 and 2 in one message block. Results: logs/fullNN.ipynb, labNN.ipynb, with measured figures in their metadata;
# merge outputs, execution counts and figures by cell id (all sources must be equal), then .gpu/rows.py. One r.tgz comes back.
# Then the matrix: bash .gpu/matrix.sh 6 6 12 22 (its head says how), with the merged notebooks; full last.
S=$SECONDS; . .gpu/env.sh; P="python3 -m siglip_lib.launch"; T="tools/speed_many_gpus.py loss bandwidth --json $M"
[ $1 = 1 ] && cp -rp notebooks /tmp/nbcopy; cp -p $K/*.ipynb notebooks/ 2>/dev/null; cp $K/measured/*.json $M/ 2>/dev/null
half() { export CUDA_VISIBLE_DEVICES=$1; taskset -cp $2 $BASHPID >/dev/null; }
case $1 in
1) one() { half 0 0-15; timeout 90 python3 -m pytest -q -rs -p no:cacheprovider tests/test_kernels_hopper.py tests/test_kernels_hopper_backward.py -k "launch or backend or bits or lse or below or parts" > $L/tests.log 2>&1; say tests $?
     f 15 450; }
   two() { half 1 16-31; f 10 330; f 11 200; };;
2) one() { half 0 0-15; f 08 260; f 13 190; }; two() { half 1 16-31; f 04 260; lab 04 90; };
   after() { f 14 150; };;
3) one() { half 0 0-15; lab 10 200; lab 15 120; lab 08 120; }; two() { half 1 16-31; timeout 250 python3 tools/speed_of_tower.py --quick > $L/speed.log 2>&1; say speed $?; pack; lab 11 90; lab 13 110; lab 14 110; }
   after() { CUDA_VISIBLE_DEVICES=0 f 00 60; lab 00 50; };;
esac
one & two & wait; [ $1 != 1 ] && after; pack; say end
