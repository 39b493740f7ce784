# The next holds, two GPUs, each at most 600 s: bash .gpu/next.sh 1|2|3|4. Carry .kit and .gpu (with peers.aa, at most 31.5 MB) at 1, build (peers.ab)
# and .gpu at 2; before 2 clear the outputs of 03 and 07 in the tree that is sent (64 MiB in all), and put them back after.
# Three seeds of the captioner (hold of 30 Nov, two at once): alone 72.6 68.5 72.0, never named 0, of four 62.6 51.7 63.8, of 16 by tiles 72.8 68.2 71.5
S=$SECONDS; . .gpu/env.sh; P="python3 -m siglip_lib.launch"; T="tools/speed_many_gpus.py loss bandwidth --json $M"
[ $1 = 1 ] && cp -rp notebooks /tmp/nbcopy; cp -p $K/*.ipynb notebooks/ 2>/dev/null; cp $K/measured/*.json $M/ 2>/dev/null
[ $1 = 2 ] && for n in 03 07; do [ -e $K/${n}_*.ipynb ] || cp -p /tmp/nbcopy/${n}_*.ipynb notebooks/; done
half() { export CUDA_VISIBLE_DEVICES=$1; taskset -cp $2 $BASHPID >/dev/null; }
case $1 in
1) one() { half 0 0-15; f 15 420; f 03 60; }; two() { half 1 16-31; f 06 300; f 07 220; };;
2) $P 1 $T/losses1.json > $L/losses1.log 2>&1; $P gpu $T/losses2.json > $L/losses2.log 2>&1; say losses
   one() { half 0 0-15; f 02 220; f 05 220; }; two() { half 1 16-31; f 08 300; f 04 200; };;
3) f 14 150  # sees both GPUs
   one() { half 0 0-15; for n in 04 10 12 14 16; do lab $n 300; done; }; two() { half 1 16-31; for n in 09 11 13 15 03; do lab $n 300; done; };;
4) one() { half 0 0-15; for n in 03 08 14; do nb $n & done; wait; }; two() { half 1 16-31; for n in 04 10 15 16; do nb $n & done; wait; }; after() { f 00 90; lab 00; };;
esac
one & two & wait; [ $1 = 4 ] && CUDA_VISIBLE_DEVICES=0 after; pack; say end
