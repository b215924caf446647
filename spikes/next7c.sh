# Two cards, 400 s: tests on combine_tree (kernels, thresholds), on main (graphs, steps of two cards), the 12 tests that need two GPUs, sweep.
. .spike/lib.sh
T=$R/.spike/combine_tree
(cd $T; export PYTHONPATH=$R/site:$T CUDA_VISIBLE_DEVICES=0; timeout 170 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 100 -n 4 tests/gpu/test_triton.py tests/gpu/test_kernels.py tests/gpu/test_thresholds.py > $D/tests_combine.txt 2>&1; say "tests combine rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_combine.txt | cut -c1-250 | head -20) &
(tests 1 graphs 170 -n 4 tests/gpu/test_acceleration.py -k "steps_by_graphs or llama or hybrid") & wait
tests 0,1 pairs 110 -n 4 tests/gpu/test_transformers.py tests/gpu/test_decode.py -k "test_transformers or another_device"
tests 0,1 two 100 -n 2 tests/gpu/test_acceleration.py tests/gpu/test_sweep.py -k "two_cards and llama or sweep"
say end
