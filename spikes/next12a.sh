# One card, 170 s; carry .whl .spike: what changed in names after the last GPU run: memcheck (one new case, k = 80), Gluon's tests, attention of 40 and 80; then layers with thresholds.
. .spike/lib.sh
export CUDA_VISIBLE_DEVICES=0
for n in 3 4,6; do (timeout 130 python3 .spike/warm.py $n threshold dense > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & done
(timeout 200 compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.memcheck > $D/memcheck.txt 2>&1; say "memcheck rc $?"; tail -3 $D/memcheck.txt) &
tests 0 hopper 180 -n 6 tests/gpu/test_hopper.py tests/gpu/test_triton.py -k "hopper or (test_output_and_gradients and (40 or 80))"
wait
timeout 60 python3 .spike/layer_time.py $D/layer.json threshold dense 3 4 6 > $D/layer.txt 2>&1; say "layer rc $?"; cut -c1-330 $D/layer.txt
say end
