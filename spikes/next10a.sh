# One card, quiet, 480 s; carry .whl .spike. New sizes of tests/gpu/test_triton, then make bench, chunks up to 1.75 GiB at shapes 5 and 6 (predicted: shape 6 with
# thresholds -3 ms), layers as called against graphs, steps of equal FLOPs (Tiny, Small).
. .spike/lib.sh
export CUDA_VISIBLE_DEVICES=0
for n in 1,2,3 5 4,6; do (timeout 130 python3 .spike/warm.py $n threshold dense > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & done
tests 0 sizes 120 -n 6 tests/gpu/test_triton.py -k "test_output_and_gradients and (40 or 80)"
wait
timeout 150 python3 -m benchmarks.mosa_layer > $D/bench.txt 2>&1; say "bench rc $?"; tail -15 $D/bench.txt | cut -c1-250; cp benchmarks/results/mosa_layer-*$(date +%Y-%m-%d)* $D/ 2>/dev/null
layer() { script=$1; name=$2; shift 2; timeout 60 python3 .spike/$script.py $D/layer_$name.json $* > $D/layer_$name.txt 2>&1; say "layer $name rc $?"; cut -c1-250 $D/layer_$name.txt; }
layer layer_time main threshold 5 6; layer layer_chunks chunks threshold 5 6; layer layer_time main2 threshold 5 6; layer layer_chunks chunks2 threshold 5 6
timeout 60 python3 .spike/layer_graph.py $D/layer_graph.json 1,2,3,4,5,6 > $D/layer_graph.txt 2>&1; say "layer graph rc $?"; cat $D/layer_graph.txt
steps 0 equal 200 tiny_equal_flops small_equal_flops
say end
