# Third call: make bench on one card; whole steps on the others (cold caches: 100 to 150 s a case).
. .spike/lib.sh
(CUDA_VISIBLE_DEVICES=0 timeout 260 python3 -m benchmarks.mosa_layer > $D/bench.txt 2>&1; say "bench rc $?"; cp benchmarks/results/mosa_layer* $D/; tail -12 $D/bench.txt
 for n in 1 2 3 4 5 6; do CUDA_VISIBLE_DEVICES=0 timeout 60 python3 -m benchmarks.tune --shapes $n --present > $D/stages_$n.txt 2>&1; done; say stages; tail -n 14 $D/stages_*.txt) &
(steps 1 main 400 1b_mosa 1b_twin 1b_threshold) &
if [ $(nvidia-smi -L | wc -l) -ge 4 ]; then (steps 2 tiny 400 tiny_dense tiny_equal_flops tiny_mosa) & (steps 3 small 400 small_dense small_equal_flops small_mosa) & fi
wait
