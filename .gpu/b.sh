S=$SECONDS; . .gpu/env.sh
half() { export CUDA_VISIBLE_DEVICES=$1; taskset -cp $2 $BASHPID >/dev/null; }
a() { half 0 0-15; timeout 50 compute-sanitizer --tool memcheck python3 .gpu/check.py > $L/memcheck.log 2>&1; say memcheck $?; }
b() { half 1 16-23; timeout 50 compute-sanitizer --tool racecheck --racecheck-report analysis python3 .gpu/check.py > $L/racecheck.log 2>&1; say racecheck $?; }
c() { half 1 24-31; timeout 45 python3 -m pytest -q -p no:cacheprovider tests/test_kernels_hopper.py tests/test_kernels_hopper_backward.py -k "real_shapes or backend or bits or lse or below or parts" > $L/tests.log 2>&1; say tests $?; }
d() { half 0 0-7; timeout 30 python3 .gpu/check.py > $L/check.log 2>&1; say check $?; }
d & a & b & c & wait; tail -n 6 $L/memcheck.log $L/racecheck.log $L/tests.log $L/check.log; mkdir -p $OUT; tar czf $OUT/r.tgz -C /tmp logs
