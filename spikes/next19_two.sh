# Two cards: cells of docs/scaling.md, by name (done: 7b and 7bdense, recomputed; 7bnone only TP 2; threshold; 16k; check). Next: LIMIT=560 ... 7bnone 7bdnone. The first
# layout of 7b takes 106 to 180 s, the next 120 to 150. `check`: which gradients copies change (found: compiled layers' only). LIMIT seconds in all.
[ "$DRY" ] || . .spike/lib.sh; D=${D:-/tmp/results}; mkdir -p $D/sweeps; LIMIT=${LIMIT:-570}
m() { # NAME SECONDS OVERRIDES-AND-LAYOUTS...
  name=$1; limit=$2; shift 2; left=$((LIMIT - SECONDS)); [ $left -lt $limit ] && limit=$left; [ $limit -lt 25 ] && return; echo "== $name"
  timeout -s INT -k 25 $limit python3 -m megatron_mosa sweep "$@" --random-tokens --processes ${P:-1,2} --output $D/sweeps/$name $DRY > $D/sweep_$name.txt 2>&1; grep -E "tokens/s|failed|too large|tp=" $D/sweep_$name.txt | cut -c1-170 | tail -12; [ "$DRY" ] || { cp $D/sweeps/$name/results.md $D/$name.md; say $name; }; }
b="train.global_batch_size=64 train.recompute=none data.vocab_size=32000"
t="mosa.selection=threshold mosa.threshold_warmup_steps=1 mosa.load_feedback=0.1 mosa.capacity_factor=1.25"
c="train.global_batch_size=16 data.vocab_size=32000 model.num_query_groups=4"
one=configs/scale/1b_mosa.yaml
for part in "$@"; do case $part in
check) (cd .spike/branch_tree && PYTHONPATH=$R/site:$PWD timeout -k 5 130 torchrun --standalone --nproc-per-node 2 $R/.spike/copies_check.py > $D/copies_check.txt 2>&1); say "copies check rc $?"; grep -E "^\[|Error" $D/copies_check.txt | cut -c1-220 | head -60
 (cd .spike/branch_tree && TORCH_SYMMMEM_IMPLICIT_POOL=0 PYTHONPATH=$R/site:$PWD timeout -k 5 60 torchrun --standalone --nproc-per-node 2 $R/.spike/copies_check.py > $D/copies_pool.txt 2>&1); say "copies check without a pool rc $?"; grep -E "^\[|Error" $D/copies_pool.txt | cut -c1-220 | head -20;;
7b) P=2 m 7b_mosa 330 configs/scale/7b_mosa.yaml $c --memory 120 --layout tp=2,sp=true,zero=1,micro=2 --layout tp=1,zero=3,micro=1;;
7bdense) P=2 m 7b_dense 300 configs/scale/7b_mosa.yaml $c --memory 80 mosa.num_heads=0 model.num_dense_heads=12 --layout tp=2,sp=true,zero=1,micro=2 --layout tp=1,zero=3,micro=1;;
7bnone) P=2 m 7b_none 300 configs/scale/7b_mosa.yaml $c --memory 120 --layout tp=2,sp=true,zero=1,micro=2 --layout tp=1,zero=3,micro=1;;
7bdnone) P=2 m 7b_dense_none 300 configs/scale/7b_mosa.yaml $c --memory 80 mosa.num_heads=0 model.num_dense_heads=12 --layout tp=2,sp=true,zero=1,micro=2 --layout tp=1,zero=3,micro=1;;
7bz3) P=2 m 7b_z3 210 configs/scale/7b_mosa.yaml $c --memory 120 --layout tp=1,zero=3,micro=1;;
7bdz3) P=2 m 7b_dense_z3 210 configs/scale/7b_mosa.yaml $c --memory 80 mosa.num_heads=0 model.num_dense_heads=12 --layout tp=1,zero=3,micro=1;;
threshold) m 1b_threshold 200 $one $b $t --layout tp=1,zero=1,micro=4 --layout tp=2,sp=true,zero=1,micro=8,processes=2;;
16k) m 1b_16k 200 $one train.recompute=none data.vocab_size=32000 train.global_batch_size=16 data.sequence_length=16384 --layout tp=1,zero=1,micro=1 --layout tp=2,sp=true,zero=1,micro=2,processes=2;;
esac; done
