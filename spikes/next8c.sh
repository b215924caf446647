# Two cards, 300 s: tests on combine_tree, on main (graphs), novels' missing rates; then the tests that need two GPUs, sweep.
. .spike/lib.sh
T=$R/.spike/combine_tree
(cd $T; export PYTHONPATH=$R/site:$T CUDA_VISIBLE_DEVICES=0; timeout 190 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 100 -n 5 tests/gpu/test_triton.py tests/gpu/test_kernels.py tests/gpu/test_thresholds.py > $D/tests_combine.txt 2>&1; say "tests combine rc $?"; grep -E "^(FAILED|ERROR|E  )|passed|failed" $D/tests_combine.txt | cut -c1-250 | head -20) &
(tests 1 graphs 190 -n 4 tests/gpu/test_acceleration.py -k "steps_by_graphs or llama or hybrid") &
(OUT=/tmp/novels_out NAME=novels MEASURE=60 timeout 185 bash .arena/arena_gpu.sh novels 175 > $D/novels.txt 2>&1; say "novels rc $?"; tail -30 $D/novels.txt | cut -c1-160; cp /tmp/novels_out/state_novels.tar.xz /tmp/novels_out/report_novels.tar.xz $D/) &
wait
(tests 0,1 pairs 110 -n 4 tests/gpu/test_transformers.py tests/gpu/test_decode.py -k "test_transformers or another_device") &
(tests 0,1 two 110 -n 2 tests/gpu/test_acceleration.py tests/gpu/test_sweep.py -k "two_cards and llama or sweep") &
wait; say end
