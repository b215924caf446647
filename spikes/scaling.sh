# Four cards: the cells of docs/scaling.md, the most valuable first; repeat the call to go on (results come back in $OUT and
# must lie in .spike/sweeps, carried, for the next call to skip what is done). LIMIT minutes in all. DRY=--dry-run --memory 80 checks it.
[ "$DRY" ] || . .spike/lib.sh; D=${D:-/tmp/results}; mkdir -p $D/sweeps; cp -r .spike/sweeps/. $D/sweeps/ 2>/dev/null
m() { # NAME MINUTES OVERRIDES-AND-LAYOUTS...
  name=$1; minutes=$2; shift 2; echo "== $name"; python3 -m megatron_mosa sweep "$@" --random-tokens --processes ${P:-1,4} --time-limit $minutes --output $D/sweeps/$name $DRY 2>&1 | tail -${TAIL:-14}; [ "$DRY" ] || say $name; }
b="train.global_batch_size=64 train.recompute=none data.vocab_size=32000"
cells="--layout tp=1,zero=1,micro=4 --layout tp=1,zero=2,micro=4 --layout tp=1,zero=3,micro=4 --layout tp=2,sp=true,zero=1,micro=8,processes=4 --layout tp=4,sp=true,zero=1,micro=16,processes=4 --layout tp=4,sp=true,zero=1,micro=32,processes=4 --layout tp=2,sp=true,zero=1,micro=16,processes=4 --layout tp=2,sp=true,zero=3,micro=8,processes=4 --layout tp=4,sp=false,zero=1,micro=8,processes=4 --layout tp=2,sp=false,zero=1,micro=8,processes=4"
m 1b_mosa 7 configs/scale/1b_mosa.yaml $b $cells
m 1b_dense 5 configs/scale/1b_mosa.yaml $b mosa.num_heads=0 model.num_dense_heads=8 $cells
m 1b_threshold 4 configs/scale/1b_mosa.yaml $b mosa.selection=threshold mosa.threshold_warmup_steps=1 mosa.load_feedback=0.1 mosa.capacity_factor=1.25 --layout tp=1,zero=1,micro=4 --layout tp=4,sp=true,zero=1,micro=16,processes=4
P=4 m 1b_16k 3 configs/scale/1b_mosa.yaml $b train.global_batch_size=16 data.sequence_length=16384 --layout tp=4,sp=true,zero=1,micro=4 --layout tp=1,zero=1,micro=1
c="train.global_batch_size=16 data.vocab_size=32000 model.num_query_groups=4"
s="--layout tp=4,sp=true,zero=1,micro=2 --layout tp=1,zero=3,micro=1 --layout tp=2,sp=true,zero=1,micro=1"
P=4 m 7b_mosa 5 configs/scale/7b_mosa.yaml $c $s
P=4 m 7b_dense 5 configs/scale/7b_mosa.yaml $c mosa.num_heads=0 model.num_dense_heads=12 $s
