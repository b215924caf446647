# Two cards, 600 s: Gluon kernels on card 0 while the corpus is built (75 s), then paper_tiny on Python source. At once after it, on the same machine: MEASURE=230 bash .arena/arena_gpu.sh python 575
. .spike/lib.sh
(export PYTHONPATH=$R/.spike/gluon_tree:$PYTHONPATH; CUDA_VISIBLE_DEVICES=0 timeout 95 python3 .spike/gluon_bench.py $D/gluon.json > $D/gluon.txt 2>&1; say "gluon rc $?"; cut -c1-170 $D/gluon.txt | tail -60) &
mkdir -p $OUT/python; MEASURE=15 OUT=$OUT/python bash .arena/arena_gpu.sh python ${ARENA:-560}; say arena; wait
