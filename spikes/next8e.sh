# Two cards, 400 s. Tree ragged_tree (branch ragged). Card 0: tests of Gluon's kernels, then of Triton's; card 1: layers with thresholds, main against ragged,
# sums at shapes 2 and 3 in the layer (UNROLL 4), expert choice of all shapes beside dense.
. .spike/lib.sh
K=$R/.spike/ragged_tree
(
  export CUDA_VISIBLE_DEVICES=0
  (cd $K; export PYTHONPATH=$R/site:$K; timeout 120 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 60 -n 6 tests/gpu/test_hopper.py > $D/tests_hopper.txt 2>&1; say "tests hopper rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_hopper.txt | cut -c1-250 | head -30
   timeout 170 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 100 -n 6 tests/gpu/test_triton.py tests/gpu/test_thresholds.py > $D/tests_triton.txt 2>&1; say "tests triton rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_triton.txt | cut -c1-250 | head -30)
) &
(
  export CUDA_VISIBLE_DEVICES=1
  for t in $R $K; do (PYTHONPATH=$R/site:$t timeout 80 python3 .spike/warm.py 1,2,3,4,5,6 > $D/warm_$(basename $t).txt 2>&1) & done; wait
  layer() { PYTHONPATH=$R/site:$2 timeout 60 python3 .spike/layer_time.py $D/layer_$1.json $3 > $D/layer_$1.txt 2>&1; say "layer $1 rc $?"; cat $D/layer_$1.txt; }
  layer main $R "threshold 1 2 3 4 5 6"; layer ragged $K "threshold check 1 2 3 4 5 6"; layer main2 $R "threshold 1 2 5 6"; layer ragged2 $K "threshold 1 2 5 6"; layer dense $R "dense 1 2 3 4 5 6"
  timeout 120 python3 .spike/attn_thresholds.py $D/attn_thresholds.json > $D/attn_thresholds.txt 2>&1; say "attn thresholds rc $?"; grep -v Error $D/attn_thresholds.txt | cut -c1-330
) &
wait; say end
