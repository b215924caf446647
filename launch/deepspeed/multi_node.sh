#!/usr/bin/env bash
# Usage: HOSTFILE=FILE launch/deepspeed/multi_node.sh CONFIG [section.key=value ...]
#   once, on the first node: DeepSpeed's launcher reaches the others by pdsh over ssh without a password;
# or HOSTFILE=FILE NODE_RANK=n launch/deepspeed/multi_node.sh CONFIG [section.key=value ...]
#   on every node, n = 0, 1, ... in the order of the file; this needs no ssh.
# See hostfile.example for the format of the file. The processes rendezvous at MASTER_ADDR (default: the first host) and
# MASTER_PORT (default 29500). Under Slurm use launch/slurm/pretrain.sbatch instead.
set -euo pipefail

usage() {
    echo "usage: HOSTFILE=FILE [NODE_RANK=n] [MASTER_ADDR=HOST] [MASTER_PORT=p] $0 CONFIG [section.key=value ...]" >&2
    exit 2
}

if (($# < 1)) || [[ $1 == -* || $1 =~ ^[a-z_.]+= || -z ${HOSTFILE:-} ]]; then usage; fi
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
if [[ -z ${VIRTUAL_ENV:-} && -x $root/.venv/bin/python ]]; then export PATH=$root/.venv/bin:$PATH; fi

if ! [[ -r $HOSTFILE ]]; then
    echo "error: HOSTFILE=$HOSTFILE cannot be read; see launch/deepspeed/hostfile.example for its format" >&2
    exit 2
fi
hosts=$(sed -nE 's/^([^#[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)[[:space:]]*$/\1 \2/p' "$HOSTFILE")
if [[ -z $hosts || $(grep -cvE '^[[:space:]]*(#|$)' "$HOSTFILE") != "$(wc -l <<<"$hosts")" ]]; then
    echo "error: HOSTFILE=$HOSTFILE must consist of lines 'HOST slots=N', at least one, and comments" >&2
    exit 2
fi
nodes=$(wc -l <<<"$hosts")
world_size=$(awk '{ sum += $2 } END { print sum }' <<<"$hosts")
read -r first _ <<<"$hosts"

arguments=(--hostfile "$HOSTFILE" --master_addr "${MASTER_ADDR:-$first}" --master_port "${MASTER_PORT:-29500}")
if [[ -n ${NODE_RANK:-} ]]; then
    # bash would read 08 as octal, and wrap around at 64 bits
    if ! [[ $NODE_RANK =~ ^(0|[1-9][0-9]{0,8})$ ]] || ((NODE_RANK >= nodes)); then
        echo "error: NODE_RANK must be 0 to $((nodes - 1)), the position of this node in $HOSTFILE, got $NODE_RANK" >&2
        exit 2
    fi
    arguments+=(--no_ssh --node_rank "$NODE_RANK")
elif ((nodes > 1)) && ! command -v pdsh >/dev/null; then
    echo "error: pdsh is not on PATH; install it, or start this script on every node with NODE_RANK=0, 1, ..." >&2
    exit 2
else
    arguments+=(--launcher pdsh)
fi

# Report a mistake in the configuration here, in one line with exit code 2, before any process starts.
python "$root/pretrain_mosa.py" "$@" --check-only --world-size "$world_size"

exec python -m deepspeed.launcher.runner "${arguments[@]}" "$root/pretrain_mosa.py" "$@"
