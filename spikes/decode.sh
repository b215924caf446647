# One card: prompts and steps of 64 sequences, before (.spike/decode_main = main) and after (.spike/decode_tree = prompt3).
. .spike/lib.sh; export CUDA_VISIBLE_DEVICES=0
b() { PYTHONPATH=$R/site:$R/.spike/$1 TRITON_CACHE_DIR=/tmp/triton timeout $2 python3 .spike/decode2_bench.py $3 $D/$4.json $5 > $D/$4.txt 2>&1; say "$4 rc $?"; grep -h "'kind'" $D/$4.txt | cut -c1-220; }
(cd .spike/decode_tree; PYTHONPATH=$R/site:$R/.spike/decode_tree timeout 150 python3 -m pytest -p no:cacheprovider -q --tb=short tests/gpu/test_decode.py > $D/tests_decode.txt 2>&1; say "decode tests rc $?"; tail -4 $D/tests_decode.txt)
b decode_main 75 main prompts_main prompt; b decode_tree 75 new prompts_new prompt; b decode_tree 60 new batch_new batch; b decode_main 60 main batch_main batch
