# Every notebook under nbval at caps of 6, 12 and 22 GiB and at full: bash .gpu/matrix.sh AT_ONCE CAP... Carry .kit and .gpu (peers: see next.sh).
# First 6 at once: bash .gpu/matrix.sh 6 6 12 22 full, as often as it takes; then what neighbours spoilt, alone: 1 6 12 22 full.
# NB="04 13" limits the notebooks. Afterwards copy matrix.txt, which comes back, to .gpu/: else a new machine begins anew.
S=$SECONDS; . .gpu/env.sh
cp -p $K/*.ipynb notebooks/ 2>/dev/null; cp $K/measured/*.json $M/ 2>/dev/null; cp -n .gpu/matrix.txt $K/ 2>/dev/null
[ -e $K/units.ok ] || { timeout 90 python3 -m pytest -q -p no:cacheprovider tests/test_measure.py tests/test_sizes.py > $L/m_units.log 2>&1 && touch $K/units.ok; say units $?; }
python3 .gpu/matrix.py $K $L $((${LIMIT:-575} - SECONDS + S)) "$@"; say end
