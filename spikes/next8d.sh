# Two cards, 265 s: card 0: layers of main, kernels (Triton alone, and with Gluon), combine_tree; card 1: tests of kernels_tree, sums with UNROLL 4, a step of Tiny.
. .spike/lib.sh
K=$R/.spike/kernels_tree; C=$R/.spike/combine_tree; G=$R/.spike/gluon_tree
(
  export CUDA_VISIBLE_DEVICES=0
  for t in "$R 1,2,3,4,5,6 dense" "$K 1,2,3,4,5,6" "$C 1,2,3"; do set -- $t; (PYTHONPATH=$R/site:$1 timeout 75 python3 .spike/warm.py $2 $3 > $D/warm_$(basename $1).txt 2>&1; say "warm $1 rc $?") & done; wait
  layer() { PYTHONPATH=$R/site:$2 MOSA_GLUON=$3 timeout 45 python3 .spike/layer_time.py $D/layer_$1.json $4 > $D/layer_$1.txt 2>&1; say "layer $1 rc $?"; cat $D/layer_$1.txt; }
  layer main $R 0 "dense 1 2 3 4 5 6"; layer triton $K 0 "1 2 3 4 5 6"; layer gluon $K 1 "1 2 3 4 5 6"; layer combine $C 0 "1 2 3"; layer main2 $R 0 "1 2 3 5 6"; layer gluon2 $K 1 "1 2 3 5 6"; layer thresholds $K 1 "threshold 1 2 3 4 5 6"
) &
(
  export CUDA_VISIBLE_DEVICES=1
  (cd $K; export PYTHONPATH=$R/site:$K; timeout 170 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 100 -n 7 tests/gpu/test_hopper.py tests/gpu/test_triton.py tests/gpu/test_thresholds.py tests/gpu/test_kernels.py > $D/tests_kernels.txt 2>&1; say "tests kernels rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_kernels.txt | cut -c1-250 | head -30)
  SMALL=1 PYTHONPATH=$R/site:$K timeout 40 python3 .spike/combine_bench.py $D/combine4.json 7,1,2,3,8,4 > $D/sums4.txt 2>&1; say "sums4 rc $?"; cut -c1-260 $D/sums4.txt
  (cd $K; PYTHONPATH=$R/site:$K timeout 100 python3 -m benchmarks.step tiny_equal_flops --acceleration auto --out $D/step_kernels.json > $D/step_kernels.txt 2>&1; say "step kernels rc $?"; cut -c1-180 $D/step_kernels.txt)
) &
wait; say end
