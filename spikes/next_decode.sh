# One card, at most 150 s. Needs .spike and .whl; main's tree in .spike/decode_main, the new one in .spike/decode_tree.
root=$PWD; [ -d site ] || . .spike/install.sh
export PYTHONPATH=$root/site PYTHONWARNINGS=ignore PATH=$root/bin:$PATH TRITON_CACHE_DIR=/tmp/triton TRANSFORMERS_VERBOSITY=error
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader > $OUT/decode_log.txt
new=$root/.spike/decode_tree; old=$root/.spike/decode_main
bench() { PYTHONPATH=$root/site:$2 timeout ${4:-45} python3 .spike/decode_bench.py $1 $OUT/decode_$1.json $3 >> $OUT/decode_log_$1.txt 2>&1; }
# All kernels are compiled while the tests run.
(cd $new; PYTHONPATH=$root/site:$new timeout 75 python3 -m pytest -p no:cacheprovider -q -n 6 tests/gpu/test_decode.py > $OUT/decode_tests.txt 2>&1) & tests=$!
bench new $new warm 70 & a=$!
bench main $old warm 70 & b=$!
wait $a $b $tests
tail -4 $OUT/decode_tests.txt
bench main $old ""; bench new $new ""
cat $OUT/decode_log_*.txt >> $OUT/decode_log.txt; rm $OUT/decode_log_*.txt
python3 .spike/decode_table.py $OUT/decode_main.json $OUT/decode_new.json | tee $OUT/decode_table.txt
grep -n -i "error" $OUT/decode_log.txt | head
