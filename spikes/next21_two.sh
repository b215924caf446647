# Two cards (or four): start-up of 1b_mosa, cold, warm, warm, 300 s; needs .spike/data (see start.sh). Then the rest of the GPU tests of kernels and decoding on one of them, 240 s.
. .spike/lib.sh
(export OUT=$D; bash .spike/start.sh); say start
tests 0 kernels 230 -n 8 tests/gpu/test_triton.py tests/gpu/test_decode.py tests/gpu/test_thresholds.py
