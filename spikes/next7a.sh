# Two cards, 560 s: card 0: sums over heads with other tiles, then layers (main against combine_tree with what was fastest), attention backward;
# card 1: Gluon, products in Gluon, then whole steps of Tiny with 276 heads. Meanwhile the Python corpus is built. At once after it: MEASURE=150 bash .arena/arena_gpu.sh python 570
. .spike/lib.sh
(mkdir -p data; python3 .arena/python_corpus.py data/python.jsonl; timeout 200 python3 -m megatron_mosa data build configs/paper/tiny.yaml data.path=data/python "data.sources=[data/python.jsonl]" data.tokenizer_bytes=30000000 data.validation_fraction=0.02 2>&1 | tr '\r' '\n' | tail -2; say corpus) &
C=$R/.spike/combine_tree; export MOSA_COMBINE=$D/combine.json
(
  export CUDA_VISIBLE_DEVICES=0
  PYTHONPATH=$R/site:$R timeout 70 python3 .spike/combine_bench.py $D/sums_main.json > $D/sums_main.txt 2>&1; say "sums main rc $?"; cut -c1-150 $D/sums_main.txt
  MOSA_COMBINE= PYTHONPATH=$R/site:$C timeout 190 python3 .spike/combine_bench.py $D/combine.json > $D/sums.txt 2>&1; say "sums rc $?"; cut -c1-260 $D/sums.txt
  touch $D/ready
  for t in main combine; do
    p=$R; [ $t = combine ] && p=$C
    PYTHONPATH=$R/site:$p timeout 45 python3 .spike/host_profile.py > $D/host_$t.txt 2>&1; say "host $t rc $?"; grep -E "host|called" $D/host_$t.txt
  done
  for t in main combine; do
    p=$R; [ $t = combine ] && p=$C
    PYTHONPATH=$R/site:$p timeout 130 python3 .spike/layer_time.py $D/layer_$t.json dense 1 2 3 5 6 > $D/layer_$t.txt 2>&1; say "layer $t rc $?"; cat $D/layer_$t.txt
  done
  for t in main transposed; do
    p=$R; [ $t = transposed ] && p=$R/.spike/transposed_tree
    (cd $p; PYTHONPATH=$R/site:$p timeout 75 python3 -m benchmarks.tune --shapes 1,2,3,5,6,4 --stages "attention backward" $([ $t = main ] && echo --present || echo --workers 12) > $D/attn_$t.txt 2>&1; say "attn $t rc $?"; grep -v compil $D/attn_$t.txt | cut -c1-250)
  done
) &
(
  export CUDA_VISIBLE_DEVICES=1
  for part in stage_qkv layer5 layer6 stage_dw; do
    PYTHONPATH=$R/site:$R/.spike/gluon_tree MOSA_GLUON=0 timeout 65 python3 -X faulthandler .spike/gluon_bench.py $D/g.json $part > $D/g_$part.txt 2>&1; say "$part rc $?"; cut -c1-330 $D/g_$part.txt | tail -12
  done
  timeout 165 python3 .spike/products_bench.py $D/products.json > $D/products.txt 2>&1; say "products rc $?"; tail -90 $D/products.txt | cut -c1-200
  for i in $(seq 120); do [ -f $D/ready ] && break; sleep 1; done
  for t in main combine; do
    p=$R; [ $t = combine ] && p=$C
    (cd $p; PYTHONPATH=$R/site:$p timeout 140 python3 -m benchmarks.step tiny_equal_flops --acceleration auto --out $D/step_$t.json > $D/step_$t.txt 2>&1; say "step $t rc $?"; cut -c1-180 $D/step_$t.txt)
  done
) &
wait; say end
