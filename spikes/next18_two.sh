# Two cards, twice: 560 s, then 400 s; carry .whl .spike, with branch copies in .spike/branch_tree. Which gradients are wrong with copies (copies_check.py), then what next17_two.sh left:
# copies, MoSA and dense; main and dense are in .spike/sweeps18 (kept).
. .spike/lib.sh
mkdir -p $D/sweeps; cp -r .spike/sweeps18/* $D/sweeps/ 2>/dev/null
[ -f $D/copies_check.txt ] || { (cd .spike/branch_tree && PYTHONPATH=$R/site:$PWD timeout -k 5 130 torchrun --standalone --nproc-per-node 2 $R/.spike/copies_check.py > $D/copies_check.txt 2>&1); say "copies check rc $?"; grep -E "^\[|Error" $D/copies_check.txt | cut -c1-220 | head -60
 (cd .spike/branch_tree && TORCH_SYMMMEM_IMPLICIT_POOL=0 PYTHONPATH=$R/site:$PWD timeout -k 5 60 torchrun --standalone --nproc-per-node 2 $R/.spike/copies_check.py > $D/copies_pool.txt 2>&1); say "copies check without a pool rc $?"; grep -E "^\[|Error" $D/copies_pool.txt | cut -c1-220 | head -20; }
b="configs/scale/1b_mosa.yaml train.global_batch_size=64 train.recompute=none data.vocab_size=32000"
d="mosa.num_heads=0 model.num_dense_heads=8"
one="--layout tp=1,zero=1,micro=4,processes=1"
two="--layout tp=2,sp=true,zero=1,micro=16,processes=2 --layout tp=2,sp=true,zero=1,micro=8,processes=2"
m() { # NAME SECONDS TREE COPIES OVERRIDES-AND-LAYOUTS...
  name=$1; limit=$2; tree=$3; copies=$4; shift 4; left=$((${LIMIT:-560} - SECONDS)); [ $left -lt $limit ] && limit=$left; [ $limit -lt 30 ] && return; echo "== $name"
  (cd $tree && PYTHONPATH=$R/site:$PWD MOSA_COPIES=$copies timeout -s INT -k 8 $limit python3 -m megatron_mosa sweep "$@" --random-tokens --processes 1,2 --output $D/sweeps/$name > $D/sweep_$name.txt 2>&1); grep -E "tokens/s|failed" $D/sweep_$name.txt | cut -c1-150; say $name; }
m copies 200 .spike/branch_tree 1 $b $one $two
m dense_copies 230 .spike/branch_tree 1 $b $d $one $two
m main 200 . 0 $b $one $two
m dense 200 . 0 $b $d $one $two
