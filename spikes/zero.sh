# ZeRO-3, 2, 1 of 1b_mosa on all cards, one of one card, micro-batches of 16. DEADLINE seconds. PARTS chooses and orders.
ROOT=$PWD; begin=$SECONDS; deadline=${DEADLINE:-190}; tree=${ZERO_TREE:-main_tree}; port=29500
part() { # NAME RANKS SECONDS CASE...
  name=$1; ranks=$2; seconds=$3; shift 3; left=$((deadline - (SECONDS - begin))); [ $left -lt 40 ] && { echo "no time for $name"; return 0; }
  [ $seconds -gt $left ] && seconds=$left; port=$((port + 1)); at=$SECONDS
  PYTHONPATH=$ROOT/site:$ROOT/.spike/$tree timeout -k 5 $seconds python3 -m torch.distributed.run --nproc-per-node $ranks --master-port $port .spike/zero_run.py $OUT/zero_$name "$@" > $OUT/zero_$name.txt 2>&1
  echo "$name: rc $?, $((SECONDS - at)) s"; grep -h " ms (\|FAILED" $OUT/zero_$name.txt | cut -c1-200; }
cards=$(nvidia-smi -L | wc -l)
for p in ${PARTS:-three two one sixteen}; do case $p in
  three) part three $cards 130 zero=3,micro=4 ;;
  two) part two $cards 90 zero=2,micro=4 zero=1,micro=4 ;;
  one) CUDA_VISIBLE_DEVICES=0 part one 1 70 zero=1,micro=4 ;;
  sixteen) part sixteen $cards 110 zero=3,micro=16 zero=2,micro=16 ;;
esac; done
python3 .spike/zero_table.py $OUT 2>&1 | tee $OUT/zero_table.txt | cut -c1-200
