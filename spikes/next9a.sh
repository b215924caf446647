# One card, 420 s; carry .whl .spike. Tree ragged_tree (branch ragged): tests of Gluon's kernels while both trees compile; then layers alone, main against ragged
# twice, dense; then attention of thresholds' rows with other tiles.
. .spike/lib.sh
K=$R/.spike/ragged_tree
for t in $R $K; do for n in 1,2,3 5 4,6; do (PYTHONPATH=$R/site:$t timeout 130 python3 .spike/warm.py $n threshold dense > $D/warm_$(basename $t)_$n.txt 2>&1; say "warm $(basename $t) $n rc $?") & done; done
(cd $K; export PYTHONPATH=$R/site:$K; timeout 140 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 60 -n 8 tests/gpu/test_hopper.py > $D/tests_hopper.txt 2>&1; say "tests hopper rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_hopper.txt | cut -c1-250 | head -30) &
wait
layer() { PYTHONPATH=$R/site:$2 timeout 75 python3 .spike/layer_time.py $D/layer_$1.json $3 > $D/layer_$1.txt 2>&1; say "layer $1 rc $?"; cut -c1-250 $D/layer_$1.txt; }
layer main $R "threshold 1 2 3 4 5 6"; layer ragged $K "threshold check 1 2 3 4 5 6"; layer main2 $R "threshold 1 2 5 6"; layer ragged2 $K "threshold 1 2 5 6"; layer dense $R "dense 1 2 3 4 5 6"
timeout 130 python3 .spike/attn_thresholds.py $D/attn_thresholds.json 1,2,3,5,4,6 > $D/attn_thresholds.txt 2>&1; say "attn thresholds rc $?"; grep -v Error $D/attn_thresholds.txt | cut -c1-330
say end
