# Two cards, 300 s, warm: the tests of compiled layers on two cards, by NCCL and by copies.
. .spike/lib.sh
tests 0,1 two 115 tests/gpu/test_acceleration.py tests/gpu/test_ordering.py -k "two_cards or pair"
(export MOSA_COPIES=1; tests 0,1 copies 115 tests/gpu/test_acceleration.py -k "two_cards")
