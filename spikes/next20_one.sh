# One card, 380 s: products of ragged rows with fewer tiles (predictions/cells20.txt), GPU tests of kernels and decoding.
. .spike/lib.sh
timeout 130 python3 .spike/few_ragged.py $D/few_ragged.json > $D/few_ragged.txt 2>&1; say "few ragged rc $?"; cut -c1-200 $D/few_ragged.txt
tests 0 kernels 200 -n 6 tests/gpu/test_triton.py tests/gpu/test_decode.py
