#!/usr/bin/env bash
# Usage: NNODES=n MASTER_ADDR=HOST launch/torchrun/multi_node.sh CONFIG [section.key=value ...]
#   on every node at the same time;
# or srun --ntasks-per-node=1 launch/torchrun/multi_node.sh CONFIG [section.key=value ...]
#   in a Slurm job, which tells both.
# Pretrains under torchrun on several nodes, which meet at MASTER_ADDR:MASTER_PORT (c10d rendezvous; one of the nodes,
# default port 29500): one process for each visible GPU, or one on a CPU; NPROC=n in the environment overrides that.
# MAX_RESTARTS=n has torchrun start all processes again after a failure, up to n times.
#
# torchrun kills its processes 30 s after it got a SIGTERM (pytorch issue 119856), less than a large checkpoint needs.
# Under Slurm prefer launch/slurm/pretrain.sbatch, which has no process between Slurm and the ranks.
set -euo pipefail

usage() {
    echo "usage: NNODES=n MASTER_ADDR=HOST [MASTER_PORT=p] [NPROC=n] $0 CONFIG [section.key=value ...]" >&2
    exit 2
}

if (($# < 1)) || [[ $1 == -* || $1 == *=* ]]; then usage; fi
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
nproc=${NPROC:-$(python -c 'import torch; print(max(torch.cuda.device_count(), 1))')}
for number in "NNODES=$NNODES" "NPROC=$nproc" "MASTER_PORT=${MASTER_PORT:=29500}"; do
    if ! [[ $number =~ =[1-9][0-9]*$ ]]; then
        echo "error: $number: it must be a positive number" >&2
        exit 2
    fi
done

# A mistake in the configuration ends here, with one line and exit code 2, before processes are started.
python "$root/pretrain_mosa.py" "$@" --check-only --world-size "$((NNODES * nproc))"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) > nproc ? $(nproc) / nproc : 1))}
exec python -m torch.distributed.run --nnodes "$NNODES" --nproc-per-node "$nproc" --max-restarts "${MAX_RESTARTS:-0}" \
    --rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id "$id" "$root/pretrain_mosa.py" "$@"
