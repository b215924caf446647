# First call, x4 or x2: ZeRO 1 to 3 on all cards, start-up on all cards (needs .spike/data), then what two cards must prove.
. .spike/lib.sh
mkdir -p .spike/main_tree; cp -r megatron_mosa benchmarks configs tests pyproject.toml .spike/main_tree/
cards=$(nvidia-smi -L | wc -l)
(export OUT=$D; DEADLINE=${1:-190} ZERO_TREE=main_tree bash .spike/zero.sh); say zero
(export OUT=$D; bash .spike/start.sh); say start
