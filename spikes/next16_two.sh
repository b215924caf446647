# Two cards, 590 s and, warm, 590 s more; carry .whl .spike (with .spike/copies_tree: git archive copies | tar -x -C .spike/copies_tree).
# Tests of compiled layers on two cards by NCCL (main) and by copies (the third, llama fp32, failed on Nov 29, its words were lost), then what a rank computes.
. .spike/lib.sh
errors() { grep -E "^E  |Error|rank . failed" $D/tests_$1.txt | cut -c1-300 | head -25; }
tests 0,1 two 200 tests/gpu/test_acceleration.py -k two_cards; errors two
(cd .spike/copies_tree && export MOSA_COPIES=1 PYTHONPATH=$R/site:$PWD TORCH_SHOW_CPP_STACKTRACES=0 && tests 0,1 copies 120 tests/gpu/test_acceleration.py -x -k "two_cards and llama"); errors copies
. .spike/fakes.sh
(one 0 mosa) & (one 1 dense $d) & wait
