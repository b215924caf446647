# Two cards, 420 s, caches of the calls before: main against branch launch (.spike/launch_tree: launches without hooks, tables of
# angles outside graphs): prompts and shape 1 on a quiet host, whole steps; graphs' tests on the branch; all kernels of a step by name.
. .spike/lib.sh
tree() { if [ $1 = main ]; then echo $R; else echo $R/.spike/$1_tree; fi; }
for t in main launch; do
  CUDA_VISIBLE_DEVICES=0 PYTHONPATH=$R/site:$(tree $t) timeout 35 python3 .spike/decode2_bench.py $t $D/prompts_$t.json prompt > $D/prompts_$t.txt 2>&1; say "prompts $t rc $?"; grep -h "'kind'\|HOST" $D/prompts_$t.txt | cut -c1-170
  CUDA_VISIBLE_DEVICES=0 PYTHONPATH=$R/site:$(tree $t) timeout 45 python3 .spike/layer_time.py $D/layer_$t.json dense 2 1 > $D/layer_$t.txt 2>&1; say "layer $t rc $?"; cat $D/layer_$t.txt
done
sed -i 's/\[:25\]/[:400]/' .spike/launch_tree/megatron_mosa/tools/bench/profile.py
both() { card=$1; shift; for t in main launch; do (cd $(tree $t); CUDA_VISIBLE_DEVICES=$card PYTHONPATH=$R/site:$(tree $t) timeout 150 python3 -m benchmarks.step "$@" --acceleration auto --out $D/step_${t}_$card.json > $D/step_${t}_$card.txt 2>&1; say "step $t $card rc $?"; cut -c1-180 $D/step_${t}_$card.txt); done; }
(both 0 1b_mosa tiny_equal_flops) & (both 1 1b_twin tiny_dense) & wait
(cd .spike/launch_tree; export PYTHONPATH=$R/site:$R/.spike/launch_tree; CUDA_VISIBLE_DEVICES=0,1 timeout 110 python3 -m pytest -p no:cacheprovider -q --tb=short --timeout 100 -n 4 tests/gpu/test_acceleration.py -k "steps_by_graphs or two_cards and llama" > $D/tests_launch.txt 2>&1; say "tests rc $?"; tail -5 $D/tests_launch.txt)
tests 0,1 pairs 110 -n 4 tests/gpu/test_transformers.py tests/gpu/test_decode.py -k "test_transformers or another_device"
