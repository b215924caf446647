# Start-up of 1b_mosa on all cards: cold, warm, warm; needs .spike/data (mosa data build configs/scale/1b_mosa.yaml data.path=.spike/data data.sources=[8 MB of text] data.validation_fraction=0.1)

export PYTHONPATH=$PWD/site:$PWD PYTHONWARNINGS=ignore PATH=$PWD/bin:$PATH
o="data.path=.spike/data data.sources=['/tmp/novels20.jsonl'] data.validation_fraction=0.1 run.directory=runs/x train.global_batch_size=16 train.steps=4 train.stop_after_step=2 logging.interval=1 optimizer.warmup_steps=1 parallel.sequence_parallel=false validation.num_samples=4 checkpoint.interval=1000"
for n in cold warm1 warm2; do rm -rf runs/x; timeout 150 python3 .spike/stamp.py $OUT/start_$n.txt bash launch/torchrun/local.sh configs/scale/1b_mosa.yaml $o; grep " step 1/" $OUT/start_$n.txt; done
