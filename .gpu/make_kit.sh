# Here, once: kit.tar.xz (14 MB: Jupyter, flash-attn 2, xformers) and peers.tar.xz (79 MB: flash-attn 3 and 4). Usage: make_kit.sh SHARED
set -e; shared=$1; rm -rf /tmp/k /tmp/peers /tmp/site /tmp/fa4; mkdir -p /tmp/site /tmp/fa4
$shared/gpu_kit/collect_wheels.sh /tmp/k anywidget psygnal; $shared/gpu_kit/collect_peers.sh /tmp/peers
for w in /tmp/k/*.whl; do unzip -qo $w -d /tmp/site; done
for w in /tmp/peers/fa3/*.whl; do unzip -qo $w -d /tmp/fa4; done
cat /tmp/peers/fa4a/* /tmp/peers/fa4b/* | tar xJf - -C /tmp/fa4
# both packages are called flash_attn: 4 is the folder cute inside it
mkdir /tmp/cute && mv /tmp/fa4/flash_attn/cute /tmp/cute/ && rm -rf /tmp/fa4/flash_attn /tmp/site/flash_attn/cute && mkdir /tmp/fa4/flash_attn && mv /tmp/cute/cute /tmp/fa4/flash_attn/ && rmdir /tmp/cute
rm -rf /tmp/site/debugpy* /tmp/site/coverage* /tmp/site/a1_coverage.pth /tmp/site/widgetsnbextension* /tmp/site/jedi/third_party/django-stubs
for x in kit:site peers:fa4; do tar cf - -C /tmp/${x#*:} . | xz -T2 --x86 --lzma2=preset=6 > /tmp/${x%:*}.tar.xz; done
ls -l /tmp/kit.tar.xz /tmp/peers.tar.xz
# tree 20 MB + carried must stay under 64 MiB a call: first call .kit/kit.tar.xz and .gpu/peers.aa (31.5 MB), second build/peers.ab
mkdir -p .kit .gpu build; cp /tmp/kit.tar.xz .kit/; head -c 31500000 /tmp/peers.tar.xz > .gpu/peers.aa; tail -c +31500001 /tmp/peers.tar.xz > build/peers.ab
