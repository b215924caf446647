# Four cards: each its own measurement, then ZeRO on all, then start-up on all.  bash .spike/next_all.sh
. .spike/install.sh; R=$PWD
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > $OUT/card.txt
cp .spike/layer_time.py /tmp/
(cd /tmp; CUDA_VISIBLE_DEVICES=0 PYTHONPATH=$R/site:$R timeout 170 python3 /tmp/layer_time.py $OUT/layer.json check dense threshold > $OUT/layer.txt 2>&1
 [ -f $R/.spike/ragged_spike.py ] && CUDA_VISIBLE_DEVICES=0 PYTHONPATH=$R/site:$R timeout 100 python3 $R/.spike/ragged_spike.py > $OUT/ragged.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=1 timeout 260 python3 -m benchmarks.step 1b_twin 1b_mosa tiny_dense tiny_equal_flops tiny_mosa small_dense small_equal_flops small_mosa --acceleration auto --out $OUT/step.json > $OUT/step.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=2 timeout 200 bash .spike/next_decode.sh > $OUT/decode.txt 2>&1) &
(CUDA_VISIBLE_DEVICES=3 PYTHONPATH=$R/site:$R timeout 150 python3 .spike/gluon_qkv.py 5,2,6 > $OUT/gluon.txt 2>&1; CUDA_VISIBLE_DEVICES=3 timeout 130 python3 .spike/gluon_dw.py 5,2 > $OUT/gluon_dw.txt 2>&1) &
wait
cat $OUT/layer.txt $OUT/ragged.txt; cut -c1-160 $OUT/step.txt; tail -30 $OUT/decode.txt; tail -25 $OUT/gluon.txt $OUT/gluon_dw.txt
tar -C $OUT -cJf $OUT/first.tar.xz --exclude=*.tar.xz .; find $OUT -maxdepth 1 -type f ! -name '*.tar.xz' -delete
DEADLINE=${1:-270} bash .spike/next_zero.sh > $OUT/zero_out.txt 2>&1; tail -40 $OUT/zero_out.txt
bash .spike/start.sh
tar -C $OUT -cJf $OUT/second.tar.xz --exclude=*.tar.xz --exclude='*trace*' .; find $OUT -maxdepth 1 -type f ! -name '*.tar.xz' ! -name '*trace*' -delete
