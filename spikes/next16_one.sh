# One card, 590 s and, warm, 400 s more; carry .whl .spike. GPU tests of the compiled layers (sums in the kernels of products have run in sweeps only), few_tiles, fake ranks.
. .spike/lib.sh
tests 0 one 260 -n 4 tests/gpu/test_acceleration.py tests/gpu/test_triton.py tests/gpu/test_thresholds.py
timeout 70 python3 .spike/few_tiles.py $D/few_tiles.json > $D/few_tiles.txt 2>&1; say "few tiles rc $?"; cut -c1-200 $D/few_tiles.txt
. .spike/fakes.sh
one 0 mosa; one 0 dense $d
