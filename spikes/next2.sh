# Second call: all of tests/gpu with its log (kept), memcheck; steps on what is left. x4: three groups side by side; x2: two.
. .spike/lib.sh
four=$([ $(nvidia-smi -L | wc -l) -ge 4 ] && echo 1)
(tests 0,1 two ${1:-420} -n 5 tests/gpu/test_acceleration.py tests/gpu/test_sweep.py) &
if [ "$four" ]; then
  (tests 2 kernels 420 -n 5 tests/gpu/test_kernels.py tests/gpu/test_triton.py tests/gpu/test_thresholds.py; CUDA_VISIBLE_DEVICES=2 timeout 120 compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.memcheck > $D/memcheck.txt 2>&1; say "memcheck rc $?") &
  (tests 3 rest 420 -n 4 tests/gpu/test_decode.py tests/gpu/test_training.py tests/gpu/test_runs.py tests/gpu/test_transformers.py tests/gpu/test_hybrid_model.py tests/gpu/test_readme.py tests/gpu/test_apex.py) &
  wait
else
  wait; tests 0 kernels 200 -n 5 tests/gpu/test_kernels.py tests/gpu/test_triton.py tests/gpu/test_thresholds.py & tests 1 rest 200 -n 4 tests/gpu/test_decode.py tests/gpu/test_training.py tests/gpu/test_runs.py tests/gpu/test_transformers.py tests/gpu/test_hybrid_model.py tests/gpu/test_readme.py & wait
fi
