# One card, quiet, about 200 s: QKV's programs take the next tile when they are free (tree) or every n-th (before_tree).
. .spike/lib.sh
export CUDA_VISIBLE_DEVICES=0
for n in 1,2,3 5 4,6; do (timeout 130 python3 .spike/warm.py $n threshold > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & done
tests 0 hopper 100 -n 4 tests/gpu/test_hopper.py tests/gpu/test_thresholds.py
(cd .spike/before_tree; PYTHONPATH=$R/site:$PWD timeout 130 python3 $R/.spike/warm.py 6 threshold > $D/warmb.txt 2>&1; say "warm b rc $?") & wait
layer() { script=$1; name=$2; shift 2; timeout 80 python3 .spike/$script.py $D/layer_$name.json $* > $D/layer_$name.txt 2>&1; say "layer $name rc $?"; cut -c1-130 $D/layer_$name.txt; }
before() { (cd .spike/before_tree; PYTHONPATH=$R/site:$PWD timeout 80 python3 $R/.spike/$1.py $D/$2 $3 $4 $5 $6 $7 $8 $9 > $D/$2.txt 2>&1; say "before $2 rc $?"; cut -c1-130 $D/$2.txt); }
before layer_time before.json threshold 1 2 3 4 5 6; layer layer_time after threshold 1 2 3 4 5 6
before layer_time before2.json threshold 1 2 3 4 5 6; layer layer_time after2 threshold 1 2 3 4 5 6
timeout 60 python3 .spike/layer_profile.py $D/profile.json 1,3,4,6 > $D/profile.txt 2>&1; say "profile rc $?"; cut -c1-200 $D/profile.txt | grep -v nvjet
(cd .spike/before_tree; PYTHONPATH=$R/site:$PWD timeout 60 python3 $R/.spike/layer_profile.py $D/profileb.json 1,3,4,6 > $D/profileb.txt 2>&1); say "profile before rc $?"; cut -c1-200 $D/profileb.txt | grep "qkv_kernel\|expert\|backw"
say end
