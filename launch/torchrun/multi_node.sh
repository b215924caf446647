#!/usr/bin/env bash
# Usage: NNODES=n MASTER_ADDR=HOST launch/torchrun/multi_node.sh CONFIG [section.key=value ...]
#   on every node at the same time;
# or srun --ntasks-per-node=1 launch/torchrun/multi_node.sh CONFIG [section.key=value ...]
#   in a Slurm job, which provides both.
# Pretrains under torchrun on several nodes, with one process per visible GPU, or one per node on CPUs; NPROC=n in the
# environment overrides that. The nodes rendezvous (c10d) at MASTER_ADDR:MASTER_PORT, on one of the nodes, by default at
# port 29500. With MAX_RESTARTS=n torchrun restarts all processes after a failure, up to n times.
#
# torchrun kills its processes 30 s after it receives SIGTERM (pytorch issue 119856), too soon for a large checkpoint.
# Under Slurm prefer launch/slurm/pretrain.sbatch, which has no process between Slurm and the ranks.
set -euo pipefail

usage() {
    echo "usage: NNODES=n MASTER_ADDR=HOST [MASTER_PORT=p] [NPROC=n] $0 CONFIG [section.key=value ...]" >&2
    exit 2
}

if (($# < 1)) || [[ $1 == -* || $1 =~ ^[a-z_.]+= ]]; then usage; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then export PATH=$root/.venv/bin:$PATH; fi

id=mosa
if [[ -n ${SLURM_STEP_NODELIST:-} ]]; then
    NNODES=${NNODES:-$SLURM_STEP_NUM_NODES}
    if [[ -z ${MASTER_ADDR:-} ]]; then read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_STEP_NODELIST"); fi
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
    id=mosa-$SLURM_JOB_ID
fi
if [[ -z ${NNODES:-} || -z ${MASTER_ADDR:-} ]]; then usage; fi
trap 'exit 130' INT # Ctrl-C during a check; with signals 2 and 13 Python ends without a traceback, too
count='import signal; signal.signal(2, signal.SIG_DFL); signal.signal(13, signal.SIG_DFL); import torch; print(max(torch.cuda.device_count(), 1))'
nproc=${NPROC:-$(python -c "$count")}
for number in "NNODES=$NNODES" "NPROC=$nproc" "MASTER_PORT=${MASTER_PORT:=29500}"; do
    if ! [[ $number =~ ^[A-Z_]+=[1-9][0-9]{0,8}$ ]]; then # bash would read 08 as octal, and wrap around at 64 bits
        echo "error: ${number%%=*} must be 1 to 999999999, without leading zeros, got ${number#*=}" >&2
        exit 2
    fi
done
if ((MASTER_PORT > 65535)); then
    echo "error: MASTER_PORT must be at most 65535, got $MASTER_PORT" >&2
    exit 2
fi
if ! [[ ${MAX_RESTARTS:-0} =~ ^[0-9]+$ ]]; then
    echo "error: MAX_RESTARTS must be a number, got $MAX_RESTARTS" >&2
    exit 2
fi
if ! [[ $MASTER_ADDR =~ ^[^[:space:]]+$ ]]; then
    echo "error: MASTER_ADDR must be a name or address, got '$MASTER_ADDR'" >&2
    exit 2
fi

# Report a mistake in the configuration here, in one line with exit code 2, before any process starts.
python "$root/pretrain_mosa.py" "$@" --check-only --world-size "$((NNODES * nproc))"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > nproc ? $(nproc) / nproc : 1))}
exec python -m megatron_mosa.cluster.torchrun --nnodes "$NNODES" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$id" "$root/pretrain_mosa.py" "$@"
