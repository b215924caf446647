# One card, 420 s: kernels for fewer tiles with heads of 64 and of 7b (predictions/tiles18.txt), the rest of the GPU tests of compiled layers, fake ranks of MoSA.
. .spike/lib.sh
timeout 90 python3 .spike/few_tiles2.py $D/few_tiles2.json > $D/few_tiles2.txt 2>&1; say "few tiles rc $?"; cut -c1-200 $D/few_tiles2.txt
tests 0 one 200 -n 6 tests/gpu/test_acceleration.py -k "not two_cards"
. .spike/fakes.sh
one 0 mosa
