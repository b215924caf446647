# Two cards, 590 s. First what needs a quiet host (110 s): the layer called without a graph, prompts of this tree and of main
# before, then Gluon's hang (40 s); then all of tests/gpu with its log, memcheck. Needs nothing but .whl and .spike.
. .spike/lib.sh
CUDA_VISIBLE_DEVICES=0 timeout 70 python3 .spike/layer_time.py $D/layer.json dense > $D/layer.txt 2>&1; say "layer rc $?"; cat $D/layer.txt
CUDA_VISIBLE_DEVICES=0 TRITON_CACHE_DIR=/tmp/triton timeout 60 python3 .spike/decode2_bench.py now $D/prompts.json prompt > $D/prompts.txt 2>&1; say "prompts rc $?"; grep -h "'kind'\|HOST\|span" $D/prompts.txt | cut -c1-180
(CUDA_VISIBLE_DEVICES=1 timeout 60 python3 .spike/gluon_qkv.py 5 > $D/gluon.txt 2>&1 & p=$!; sleep 32; timeout 20 cuda-gdb -p $p -batch -ex "info cuda kernels" -ex "info cuda warps" -ex "x/6i \$pc" > $D/gluon_gdb.txt 2>&1; wait; say gluon; tail -25 $D/gluon.txt | cut -c1-160; tail -30 $D/gluon_gdb.txt | cut -c1-160) &
(tests 0,1 two 430 -n 5 tests/gpu/test_acceleration.py) &
(tests 0,1 sweep 430 --timeout 420 tests/gpu/test_sweep.py) &
(tests 0 kernels 430 -n 4 tests/gpu/test_kernels.py tests/gpu/test_triton.py tests/gpu/test_thresholds.py) &
(tests 1 rest 430 -n 4 tests/gpu/test_decode.py tests/gpu/test_training.py tests/gpu/test_runs.py tests/gpu/test_transformers.py tests/gpu/test_hybrid_model.py tests/gpu/test_readme.py tests/gpu/test_apex.py; CUDA_VISIBLE_DEVICES=1 timeout 150 compute-sanitizer --tool memcheck --error-exitcode 1 python3 -m tests.gpu.memcheck > $D/memcheck.txt 2>&1; say "memcheck rc $?"; tail -3 $D/memcheck.txt) &
wait
