# One card, 505 s: tiles of attention's backward pass (quiet, first), then tests/gpu whole beside memcheck.
. .spike/lib.sh
export CUDA_VISIBLE_DEVICES=0
(cd .spike; PYTHONPATH=$R/site:$R timeout 70 python3 attn_many.py $D/many.json 3,1,2 > $D/many.txt 2>&1); say "many rc $?"; cut -c1-700 $D/many.txt
for n in 1,2,3 5 4,6; do (timeout 130 python3 .spike/warm.py $n threshold dense > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & done
(timeout 420 compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.memcheck > $D/memcheck.txt 2>&1; say "memcheck rc $?"; tail -16 $D/memcheck.txt) &
tests 0 whole 425 -n 7 tests/gpu -k "not two_cards and not pairs and not sweep"
wait
say end
