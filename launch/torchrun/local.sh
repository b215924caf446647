#!/usr/bin/env bash
# Usage: launch/torchrun/local.sh CONFIG [section.key=value ...]
# Pretrains on this machine, with one process per visible GPU or two on the CPU. The number of GPUs is rounded down to a
# power of two, by which batch sizes divide; NPROC=n in the environment overrides it. An odd number of processes turns
# tensor parallelism off unless an override sets it.
set -euo pipefail

if (($# < 1)) || [[ $1 == -* || $1 == *=* ]]; then
    echo "usage: [NPROC=n] $0 CONFIG [section.key=value ...]" >&2
    exit 2
fi
config=$1
shift

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then
    PATH=$root/.venv/bin:$PATH # on PATH also for ninja, which torch needs to compile extensions
    export PATH
fi

trap 'exit 130' INT # Ctrl-C during a check; with signals 2 and 13 Python ends without a traceback, too
gpus=$(python -c 'import signal; signal.signal(2, signal.SIG_DFL); signal.signal(13, signal.SIG_DFL); import torch; print(torch.cuda.device_count())')
usable=1
while ((usable * 2 <= gpus)); do usable=$((usable * 2)); done
nproc=${NPROC:-$((gpus > 0 ? usable : 2))}
if ! [[ $nproc =~ ^[1-9][0-9]*$ ]]; then
    echo "error: NPROC must be a positive number of processes, got $nproc" >&2
    exit 2
fi

cores=$(nproc)
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > nproc ? cores / nproc : 1))}"

overrides=("$@") # the user's overrides come last, so that they win
if ((nproc % 2 == 1)); then
    overrides=(parallel.tensor_model_parallel_size=1 "$@")
fi

if ((gpus > 0)); then where="$gpus visible GPU(s)"; else where="CPU (gloo)"; fi
echo "local.sh: $nproc process(es) on $where, $OMP_NUM_THREADS thread(s) each: $config ${overrides[*]}"

# Report a mistake in the configuration here, in one line with exit code 2, before any process starts.
python "$root/pretrain_mosa.py" "$config" "${overrides[@]}" --check-only --world-size "$nproc"

exec python -m megatron_mosa.cluster.torchrun --standalone --nproc-per-node "$nproc" \
    "$root/pretrain_mosa.py" "$config" "${overrides[@]}"
