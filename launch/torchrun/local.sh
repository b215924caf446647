#!/usr/bin/env bash
# Usage: launch/torchrun/local.sh CONFIG [section.key=value ...]
# Pretrains on this machine, with one process per visible GPU or two on the CPU. The number of GPUs is rounded down to a
# power of two, by which batch sizes divide; NPROC=n in the environment overrides it. An odd number of processes turns
# tensor parallelism off unless an override sets it. A single process needs no torchrun and runs without.
set -euo pipefail

if (($# < 1)) || [[ $1 == -* || $1 =~ ^[a-z_.]+= ]]; then
    echo "usage: [NPROC=n] $0 CONFIG [section.key=value ...]" >&2
    exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then
    PATH=$root/.venv/bin:$PATH # on PATH also for ninja, which torch needs to compile extensions
    export PATH
fi

exec python -m megatron_mosa.commands.local "$@"
