#!/usr/bin/env bash
# Usage: launch/slurm/install.sh
# Installs Slurm and munge for tests/slurm, on Debian or Ubuntu as root; starts no daemons. Does nothing if they are
# already installed.
set -euo pipefail

missing=''
for program in munged slurmctld slurmd sbatch srun; do
    if ! PATH=$PATH:/usr/sbin command -v "$program" >/dev/null; then missing+=" $program"; fi
done
if [[ -z $missing ]]; then
    exit 0
elif ! command -v apt-get >/dev/null || ! grep -qiE '^(ID|ID_LIKE)=.*(debian|ubuntu)' /etc/os-release; then
    echo "error: missing:$missing; install Slurm and munge yourself: this script supports only Debian and Ubuntu" >&2
    exit 2
elif ((EUID != 0)); then
    echo "error: missing:$missing; run as root: apt-get install --no-install-recommends slurm-wlm munge" >&2
    exit 2
fi
apt-get update -q
# The packages would start daemons without a configuration; tests/slurm starts its own.
policy=/usr/sbin/policy-rc.d
if [[ ! -e $policy ]]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
DEBIAN_FRONTEND=noninteractive apt-get install -qy --no-install-recommends slurm-wlm munge
