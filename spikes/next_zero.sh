# ZeRO-1, 2 and 3 of 1b_mosa before (.spike/main_tree) and after (.spike/zero_tree), on all cards of this machine.
# bash .spike/next_zero.sh, after `. .spike/install.sh` (done here if there is no site/). DEADLINE: seconds (290).
# PARTS chooses and orders the parts; the default order is by value. All output: $OUT/zero_*.txt, *.json, a trace.
ROOT=$PWD; begin=$SECONDS; deadline=${DEADLINE:-290}
[ -d site ] || . .spike/install.sh
export PATH=$ROOT/bin:$PATH PYTHONWARNINGS=ignore OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1
cards=${CARDS:-$(nvidia-smi -L | wc -l)}
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > $OUT/zero_card.txt
port=29500
part() { # NAME TREE RANKS SECONDS CASE...
  name=$1; tree=$2; ranks=$3; seconds=$4; shift 4
  left=$((deadline - (SECONDS - begin))); [ $left -lt 40 ] && { echo "no time for $name"; return 0; }
  [ $seconds -gt $left ] && seconds=$left
  port=$((port + 1)); at=$SECONDS
  PYTHONPATH=$ROOT/site:$ROOT/.spike/$tree timeout -k 5 $seconds python3 -m torch.distributed.run --nproc-per-node $ranks \
    --master-port $port .spike/zero_run.py $OUT/zero_$name "$@" > $OUT/zero_$name.txt 2>&1
  rc=$?; echo "$name: rc $rc, $((SECONDS - at)) s"; [ $rc -eq 0 ] || grep -h "FAILED\|Error" $OUT/zero_$name.txt | cut -c1-200 | tail -3
  return $rc
}
for p in ${PARTS:-after3 before3 after2 before one nccl after16 before16}; do case $p in
  # fails in a capture: the same without graphs says what is wrong and how far that goes
  after3) part after3 zero_tree $cards 130 zero=3,micro=4,trace || part eager3 zero_tree $cards 80 zero=3,micro=4,eager ;;
  eager3) part eager3 zero_tree $cards 80 zero=3,micro=4,eager ;;
  after2) part after2 zero_tree $cards 90 zero=2,micro=4 zero=1,micro=4 ;;
  before3) part before3 main_tree $cards 80 zero=3,micro=4 ;;
  before) part before main_tree $cards 90 zero=1,micro=4 zero=2,micro=4 ;;
  one) CUDA_VISIBLE_DEVICES=0 part one zero_tree 1 60 zero=1,micro=4 ;;
  nccl) [ $((SECONDS - begin)) -gt $((deadline - 35)) ] || timeout -k 5 40 env PYTHONPATH=$ROOT/site python3 -m torch.distributed.run --nproc-per-node $cards --master-port 29600 .spike/zero_nccl.py > $OUT/zero_nccl.txt 2>&1; grep MB $OUT/zero_nccl.txt | cut -c1-600 || tail -2 $OUT/zero_nccl.txt ;;
  after16) part after16 zero_tree $cards 110 zero=2,micro=16 zero=3,micro=16 ;;
  before16) part before16 main_tree $cards 110 zero=2,micro=16 zero=3,micro=16 ;;
esac; done
python3 .spike/zero_table.py $OUT 2>&1 | tee $OUT/zero_table.txt | cut -c1-230
