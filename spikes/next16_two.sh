# Two cards, 300 s; carry .whl .spike. Tests of compiled layers on two cards by NCCL (main), then what a rank computes (fake_rank.py), MoSA and dense at once.
. .spike/lib.sh
tests 0,1 two 150 tests/gpu/test_acceleration.py -k two_cards
. .spike/fakes.sh
(one 0 mosa) & (one 1 dense $d) & wait
