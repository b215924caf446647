# Four cards, twice 590 s (the second call goes on); carry .whl .spike. Branch sums (in main's history): what kinds of heads contribute summed in kernels of products,
# and collectives by copy engines (MOSA_COPIES=1), against main (.spike/main_tree: git archive main megatron_mosa configs | tar -x -C .spike/main_tree).
. .spike/lib.sh
timeout 90 python3 -m torch.distributed.run --nproc-per-node 4 .spike/copies_bench.py $D/copies.json > $D/copies.txt 2>&1; say "copies rc $?"; grep -v Warn $D/copies.txt | tail -12 | cut -c1-300
b="configs/scale/1b_mosa.yaml train.global_batch_size=64 train.recompute=none data.vocab_size=32000"
d="mosa.num_heads=0 model.num_dense_heads=8"
one="--layout tp=1,zero=1,micro=4,processes=1"
two="--layout tp=4,sp=true,zero=1,micro=16,processes=4 --layout tp=4,sp=true,zero=1,micro=32,processes=4"
m() { # NAME SECONDS TREE COPIES OVERRIDES-AND-LAYOUTS...
  name=$1; limit=$2; tree=$3; copies=$4; shift 4; left=$((${LIMIT:-580} - SECONDS)); [ $left -lt $limit ] && limit=$left; [ $limit -lt 30 ] && return; echo "== $name"
  (cd $tree && PYTHONPATH=$R/site:$PWD MOSA_COPIES=$copies timeout -s INT -k 8 $limit python3 -m megatron_mosa sweep "$@" --random-tokens --processes 1,4 --output $D/sweeps/$name > $D/sweep_$name.txt 2>&1); grep -E "tokens/s|failed" $D/sweep_$name.txt | cut -c1-150; say $name; }
mkdir -p $D/sweeps
m main 230 .spike/main_tree 0 $b $one $two
m sums 200 . 0 $b $one $two
m copies 120 . 1 $b $one $two
m dense 200 . 0 $b $d $one $two
m dense_copies 150 . 1 $b $d $one $two
