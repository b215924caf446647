# Two cards (each alone, both at once), 420 s; carry .whl .spike. What a rank of TP n computes, its collectives copies on its own card: fake_rank.py.
. .spike/lib.sh
b="configs/scale/1b_mosa.yaml train.global_batch_size=64 train.recompute=none data.vocab_size=32000 parallel.sequence_parallel=true"
d="mosa.num_heads=0 model.num_dense_heads=8"
fake() { # CARD NAME SECONDS RANKS OVERRIDE...
  card=$1; name=$2; limit=$3; ranks=$4; shift 4
  CUDA_VISIBLE_DEVICES=$card timeout -k 5 $limit python3 .spike/fake_rank.py $ranks bench $b parallel.tensor_model_parallel_size=$ranks "$@" --steps 5 --warmup 3 --output $D/fake_$name.json > $D/fake_$name.txt 2>&1; say "fake $name rc $?"; grep -E "^(step|tokens|start|accel|error)" $D/fake_$name.txt | cut -c1-150; tail -1 $D/fake_$name.txt | cut -c1-150; }
one() { # CARD NAME OVERRIDE...
  c=$1; n=$2; shift 2
  fake $c ${n}_tp4_16 180 4 train.micro_batch_size=16 "$@"
  fake $c ${n}_tp4_16_whole 120 4 train.micro_batch_size=16 parallel.tensor_parallel_overlap=false "$@"
  fake $c ${n}_tp2_16_whole 120 2 train.micro_batch_size=16 parallel.tensor_parallel_overlap=false "$@"
  fake $c ${n}_tp2_16 120 2 train.micro_batch_size=16 "$@"
}
(one 0 mosa) & (one 1 dense $d) & wait
