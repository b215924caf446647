# One card, quiet, about 200 s; carry .whl .spike: tiles without rows gather tokens of the head: layers and profile; .spike/before_tree is the tree before.
. .spike/lib.sh
export CUDA_VISIBLE_DEVICES=0
for n in 1,2,3 5 4,6; do (timeout 130 python3 .spike/warm.py $n threshold > $D/warm_$n.txt 2>&1; say "warm $n rc $?") & done; wait
layer() { script=$1; name=$2; shift 2; timeout 80 python3 .spike/$script.py $D/layer_$name.json $* > $D/layer_$name.txt 2>&1; say "layer $name rc $?"; cut -c1-250 $D/layer_$name.txt; }
before() { (cd .spike/before_tree; PYTHONPATH=$R/site:$PWD timeout 80 python3 $R/.spike/$1.py $D/$2 $3 $4 $5 $6 $7 $8 $9 > $D/$2.txt 2>&1; say "before $2 rc $?"; cut -c1-250 $D/$2.txt); }
before layer_time before.json threshold 1 2 3 4 5 6; layer layer_time after threshold 1 2 3 4 5 6
before layer_time before2.json threshold 1 2 3 4; layer layer_time after2 threshold 1 2 3 4 5 6
timeout 60 python3 .spike/layer_profile.py $D/profile.json 1,2,3,4,6 > $D/profile.txt 2>&1; say "profile rc $?"; cut -c1-200 $D/profile.txt
say end
