# One card, quiet, about 280 s; carry .whl .spike: new sizes of tests/gpu/test_triton, ways to cut chunks, profile of thresholds.
. .spike/lib.sh
export CUDA_VISIBLE_DEVICES=0
for n in 1,2,3 5 4,6; do (timeout 130 python3 .spike/warm.py $n threshold > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & done
tests 0 sizes 120 -n 6 tests/gpu/test_triton.py -k "test_output_and_gradients and (40 or 80)"
wait
timeout 200 python3 .spike/layer_variants.py $D/variants.json 6,4,5,2,1 > $D/variants.txt 2>&1; say "variants rc $?"; cat $D/variants.txt | cut -c1-200
timeout 60 python3 .spike/layer_profile.py $D/profile.json 4,6 > $D/profile.txt 2>&1; say "profile rc $?"; cut -c1-200 $D/profile.txt
say end
