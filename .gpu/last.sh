S=$SECONDS; . .gpu/env.sh
half() { export CUDA_VISIBLE_DEVICES=$1; taskset -cp $2 $BASHPID >/dev/null; }
one() { half 0 0-15; f 15 470; lab 09 80; lab 11 80; lab 12 80; f 00 60; lab 00 50; }
two() { half 1 16-31; lab 16 300; lab 10 170; lab 13 100; lab 04 90; lab 14 90; }
one & two & wait; pack; tail -qn 1 $L/f15.log $L/f00.log $L/l*.log; say end
