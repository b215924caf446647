# Two cards, 590 s; carry .whl .spike: the two faults that were missing under NCCL, beside them memcheck and Gluon's tests, then cells of two cards.
. .spike/lib.sh
(CUDA_VISIBLE_DEVICES=1 timeout 200 compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.memcheck > $D/memcheck.txt 2>&1; say "memcheck rc $?"; tail -3 $D/memcheck.txt) &
tests 0 hopper 200 -n 5 tests/gpu/test_hopper.py tests/gpu/test_triton.py -k "hopper or (test_output_and_gradients and (40 or 80))" &
timeout 250 python3 -m benchmarks.faults --processes 2 --device cuda --faults twice slow --out $D/faults > $D/faults.txt 2>&1; say "faults rc $?"; cut -c1-260 $D/faults/faults.md; grep -v '^$' $D/faults.txt | tail -4
wait; rm -rf $D/faults/runs/*/checkpoints
LIMIT=580 . .spike/scaling2.sh
