# One card, 560 s: products of ragged rows with fewer tiles (predictions/cells20.txt), fake ranks of MoSA and of dense at TP 4, the rest of the GPU tests of compiled layers.
. .spike/lib.sh
timeout 80 python3 .spike/few_ragged.py $D/few_ragged.json > $D/few_ragged.txt 2>&1; say "few ragged rc $?"; cut -c1-200 $D/few_ragged.txt
. .spike/fakes.sh
fake 0 mosa_tp4_16 150 4 train.micro_batch_size=16
fake 0 dense_tp4_16 120 4 train.micro_batch_size=16 $d
tests 0 one 200 -n 6 tests/gpu/test_acceleration.py -k "not two_cards"
