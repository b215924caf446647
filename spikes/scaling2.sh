# Two cards: cells of docs/scaling.md that two can have; carry the results (.spike/sweeps) to go on. `first`: 170 s; `rest`: 570 s. DRY=--dry-run checks it.
[ "$DRY" ] || [ "$(type -t say)" ] || . .spike/lib.sh; D=${D:-/tmp/results}; mkdir -p $D/sweeps; [ -d .spike/sweeps ] && cp -rn .spike/sweeps/. $D/sweeps/
m() { # NAME SECONDS OVERRIDES-AND-LAYOUTS...
  name=$1; limit=$2; shift 2; left=$((LIMIT - SECONDS)); [ $left -lt $limit ] && limit=$left; [ $limit -lt 25 ] && return; echo "== $name"
  timeout -s INT -k 8 $limit python3 -m megatron_mosa sweep "$@" --random-tokens --processes ${P:-1,2} --output $D/sweeps/$name $DRY > $D/sweep_$name.txt 2>&1; grep -E "^\| |tp=" $D/sweep_$name.txt | tail -${TAIL:-14} | cut -c1-150; [ "$DRY" ] || say $name; }
b="train.global_batch_size=64 train.recompute=none data.vocab_size=32000"
t="mosa.selection=threshold mosa.threshold_warmup_steps=1 mosa.load_feedback=0.1 mosa.capacity_factor=1.25"
d="mosa.num_heads=0 model.num_dense_heads=8"
main="--layout tp=1,zero=1,micro=4 --layout tp=2,sp=true,zero=1,micro=8,processes=2 --layout tp=1,zero=3,micro=4,processes=2 --layout tp=1,zero=2,micro=4,processes=2"
c="train.global_batch_size=16 data.vocab_size=32000 model.num_query_groups=4"
one="configs/scale/1b_mosa.yaml $b"
m 1b_mosa 220 $one $main
m 1b_dense 200 $one $d $main
P=2 m 7b_mosa 200 configs/scale/7b_mosa.yaml $c --memory 100 --layout tp=2,sp=true,zero=1,micro=2 --layout tp=1,zero=3,micro=1
m 1b_threshold 120 $one $t --layout tp=1,zero=1,micro=4,processes=1 --layout tp=2,sp=true,zero=1,micro=8,processes=2
m 1b_16k 120 $one train.global_batch_size=16 data.sequence_length=16384 --layout tp=1,zero=1,micro=1 --layout tp=2,sp=true,zero=1,micro=2,processes=2
m 1b_mosa 60 $one $main --layout tp=2,sp=false,zero=1,micro=8,processes=2
