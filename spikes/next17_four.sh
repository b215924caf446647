# Four cards, twice 590 s (the second call goes on); carry .whl .spike. main (this tree) against branch copies in .spike/branch_tree (git archive copies | tar -x -C
# .spike/branch_tree): norms' gradients at once (MOSA_COPIES=0), and collectives by copies too (1). First its tests, whose words must come back.
. .spike/lib.sh
errors() { grep -E "^E  |Error|rank . failed" $D/tests_$1.txt | cut -c1-300 | head -25; }
b="configs/scale/1b_mosa.yaml train.global_batch_size=64 train.recompute=none data.vocab_size=32000"
d="mosa.num_heads=0 model.num_dense_heads=8"
one="--layout tp=1,zero=1,micro=4,processes=1"
two="--layout tp=4,sp=true,zero=1,micro=16,processes=4 --layout tp=4,sp=true,zero=1,micro=32,processes=4"
m() { # NAME SECONDS TREE COPIES OVERRIDES-AND-LAYOUTS...
  name=$1; limit=$2; tree=$3; copies=$4; shift 4; left=$((${LIMIT:-580} - SECONDS)); [ $left -lt $limit ] && limit=$left; [ $limit -lt 30 ] && return; echo "== $name"
  (cd $tree && PYTHONPATH=$R/site:$PWD MOSA_COPIES=$copies timeout -s INT -k 8 $limit python3 -m megatron_mosa sweep "$@" --random-tokens --processes 1,4 --output $D/sweeps/$name > $D/sweep_$name.txt 2>&1); grep -E "tokens/s|failed" $D/sweep_$name.txt | cut -c1-150; say $name; }
mkdir -p $D/sweeps
m main 230 . 0 $b $one $two
m norms 120 .spike/branch_tree 0 $b $one $two
m copies 120 .spike/branch_tree 1 $b $one $two
m dense 200 . 0 $b $d $one $two
m dense_norms 120 .spike/branch_tree 0 $b $d $one $two
m dense_copies 120 .spike/branch_tree 1 $b $d $one $two
