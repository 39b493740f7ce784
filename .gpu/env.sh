# Sourced by each call. At most 8 files come back from $OUT: pack puts all into one. Each function writes to $L and packs.
for part in kit peers; do
  if [ ! -e /tmp/$part.done ] && ls /tmp/half/$part.* >/dev/null 2>&1; then
    if [ $part = peers ] && [ ! -e /tmp/half/peers.ab ]; then continue; fi
    mkdir -p /tmp/site && cat /tmp/half/$part.* | xz -dc -T0 | tar xf - -C /tmp/site && touch /tmp/$part.done
  fi
done
export PYTHONPATH=/tmp/site:/tmp/site/nvidia_cutlass_dsl/dsl_packages:$PWD LD_LIBRARY_PATH=/tmp/site/nvidia/cuda_runtime/lib:$LD_LIBRARY_PATH
export JUPYTER_PATH=/tmp/jupyter/share/jupyter FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1 FLASH_ATTENTION_CUTE_DSL_CACHE_DIR=/tmp/fa4 PYTHONUNBUFFERED=1
[ -d /tmp/jupyter ] || python3 -m ipykernel install --prefix /tmp/jupyter --name python3 >/dev/null 2>&1
L=/tmp/logs; K=/tmp/keep; mkdir -p $L $K
M=siglip_lib/classroom/measured
# executed at full: logs/fullNN.ipynb; the matrix and later calls take them from keep, under their names
pack() { ( flock 9; for x in $L/full*.ipynb; do [ -e $x ] && { n=${x##*/full}; t=$(ls notebooks/${n%.ipynb}_*.ipynb); cp -p $x $K/${t##*/}; }; done; mkdir -p $K/measured; cp -p $M/*.json $K/measured/; tar czf $OUT/.r.tgz -C /tmp logs keep/measured && mv $OUT/.r.tgz $OUT/r.tgz ) 9>/tmp/lock; }
say() { echo "$((SECONDS-S))s $*"; }
f() { n=$1; timeout ${2:-200} python3 .gpu/store2.py $L/full$n.ipynb notebooks/${n}_*.ipynb > $L/f$n.log 2>&1; say full $n rc $?; pack; }
lab() { n=$1; SIGLIP_SIZE=lab SIGLIP_GPU_GIB=6 timeout ${2:-150} python3 .gpu/store2.py $L/lab$n.ipynb notebooks/${n}_*.ipynb > $L/l$n.log 2>&1; say lab $n rc $?; pack; }
nb() { s=$SECONDS; n=$1; SIGLIP_GPU_GIB=6 timeout 280 python3 -m pytest -q -p no:cacheprovider --nbval --nbval-current-env --nbval-sanitize-with=tests/nbval_sanitize.cfg --nbval-cell-timeout=300 notebooks/${n}_*.ipynb > $L/n$n.log 2>&1; echo "nbval6 $n rc $? $((SECONDS-s)) s $(tail -1 $L/n$n.log)"; }
export -f nb; export L
# use: one() { export CUDA_VISIBLE_DEVICES=0; taskset -cp 0-15 $BASHPID >/dev/null; f 10 300; lab 10; }; two() {...16-31...}; one & two & wait
