# Two cards, 585 s. First 110 s: compilers (all trees), the Python corpus, products in Gluon (right?). Then card 0: sums over heads, layers,
# attention backward, host, tests of combine; card 1: products, Gluon layers, QKV, steps of Tiny with 276 heads.
. .spike/lib.sh
C=$R/.spike/combine_tree; G=$R/.spike/gluon_tree; X=$R/.spike/transposed_tree; export MOSA_COMBINE=$D/combine.json
(mkdir -p data; export RAYON_NUM_THREADS=10; python3 .arena/python_corpus.py data/python.jsonl; timeout 300 python3 -m megatron_mosa data build configs/paper/tiny.yaml data.path=data/python "data.sources=[data/python.jsonl]" data.tokenizer_bytes=30000000 data.validation_fraction=0.02 2>&1 | tr '\r' '\n' | tail -2; say corpus) &
(
  export CUDA_VISIBLE_DEVICES=0
  (PYTHONPATH=$R/site:$C timeout 110 python3 .spike/combine_bench.py compile > $D/compile_sums.txt 2>&1; say "sums compiled rc $?") & a=$!
  (PYTHONPATH=$R/site:$R timeout 110 python3 .spike/warm.py 1,2,3,5,6 dense > $D/warm_main.txt 2>&1; say "warm main rc $?") & b=$!
  (PYTHONPATH=$R/site:$C timeout 110 python3 .spike/warm.py 1,2,3,5,6 > $D/warm_combine.txt 2>&1; say "warm combine rc $?") & c=$!
  wait $a $b $c
  PYTHONPATH=$R/site:$R timeout 50 python3 .spike/combine_bench.py $D/sums_main.json > $D/sums_main.txt 2>&1; say "sums main rc $?"; cut -c1-150 $D/sums_main.txt
  PYTHONPATH=$R/site:$C MOSA_COMBINE= timeout 110 python3 .spike/combine_bench.py $D/combine.json > $D/sums.txt 2>&1; say "sums rc $?"; cut -c1-260 $D/sums.txt
  touch $D/ready
  for t in main combine; do
    p=$R; [ $t = combine ] && p=$C
    PYTHONPATH=$R/site:$p timeout 80 python3 .spike/layer_time.py $D/layer_$t.json $([ $t = main ] && echo dense) 1 2 3 5 6 > $D/layer_$t.txt 2>&1; say "layer $t rc $?"; cat $D/layer_$t.txt
  done
  for t in main transposed; do
    p=$R; [ $t = transposed ] && p=$X
    (cd $p; PYTHONPATH=$R/site:$p timeout 60 python3 -m benchmarks.tune --shapes 1,2,3,5,6 --stages "attention backward" $([ $t = main ] && echo --present || echo --workers 12) > $D/attn_$t.txt 2>&1; say "attn $t rc $?"; grep -v compil $D/attn_$t.txt | cut -c1-250)
  done
  for t in main combine; do
    p=$R; [ $t = combine ] && p=$C
    PYTHONPATH=$R/site:$p timeout 40 python3 .spike/host_profile.py > $D/host_$t.txt 2>&1; say "host $t rc $?"; grep -E "host|called" $D/host_$t.txt
  done
) &
(
  export CUDA_VISIBLE_DEVICES=1
  (PYTHONPATH=$R/site:$G MOSA_GLUON=0 timeout 110 python3 -X faulthandler .spike/gluon_bench.py $D/g.json warm5 > $D/g_warm5.txt 2>&1) &
  (PYTHONPATH=$R/site:$G MOSA_GLUON=0 timeout 110 python3 -X faulthandler .spike/gluon_bench.py $D/g.json warm6 > $D/g_warm6.txt 2>&1) &
  PRODUCTS_LIMIT=215 PRODUCTS_PART=100 timeout 230 python3 .spike/products_bench.py $D/products.json > $D/products.txt 2>&1; say "products rc $?"; tail -90 $D/products.txt | cut -c1-200
  for part in layer5 layer6 stage_qkv; do
    PYTHONPATH=$R/site:$G MOSA_GLUON=0 timeout 60 python3 -X faulthandler .spike/gluon_bench.py $D/g.json $part > $D/g_$part.txt 2>&1; say "$part rc $?"; cut -c1-330 $D/g_$part.txt | tail -12
  done
  for i in $(seq 60); do [ -f $D/ready ] && break; sleep 1; done
  for t in main combine; do
    p=$R; [ $t = combine ] && p=$C
    (cd $p; PYTHONPATH=$R/site:$p timeout 130 python3 -m benchmarks.step tiny_equal_flops --acceleration auto --out $D/step_$t.json > $D/step_$t.txt 2>&1; say "step $t rc $?"; cut -c1-180 $D/step_$t.txt)
  done
) &
wait; say end
