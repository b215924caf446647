# One card, 280 s; carry .whl .spike. Thresholds: kernels of the layer by expert choice and by thresholds, main (halves without rows skipped) against
# ragged_tree (not skipped), attention with other tiles at the right numbers of rows.
. .spike/lib.sh
K=$R/.spike/ragged_tree
for t in $R $K; do for n in 1,2,3 5 4,6; do (PYTHONPATH=$R/site:$t timeout 130 python3 .spike/warm.py $n threshold > $D/warm_$(basename $t)_$n.txt 2>&1; say "warm $(basename $t) $n rc $?") & done; done
wait
layer() { PYTHONPATH=$R/site:$2 timeout 75 python3 .spike/layer_time.py $D/layer_$1.json $3 > $D/layer_$1.txt 2>&1; say "layer $1 rc $?"; cut -c1-250 $D/layer_$1.txt; }
layer ragged $K "threshold 1 4 5 6"; layer main $R "threshold check 1 2 3 4 5 6"; layer ragged2 $K "threshold 1 4 5 6"
timeout 60 python3 .spike/layer_profile.py $D/profile.json 1,2,3,4,5,6 > $D/profile.txt 2>&1; say "profile rc $?"; cat $D/profile.txt | cut -c1-200
timeout 110 python3 .spike/attn_thresholds.py $D/attn_thresholds.json 1,2,3,4,5,6 > $D/attn_thresholds.txt 2>&1; say "attn thresholds rc $?"; grep -v Error $D/attn_thresholds.txt | cut -c1-330
say end
