#!/bin/bash
# Debian's packages that the tests on a live SLURM need, where they are missing and may be installed.
set -eu
export PATH=$PATH:/usr/sbin:/sbin
packages="slurmctld slurmd slurm-client munge iproute2 nftables openssh-server pdsh openmpi-bin shellcheck"
missing=""
for program in slurmctld slurmd sbatch munged ip nft sshd pdsh mpirun.openmpi shellcheck; do
    command -v "$program" >/dev/null || missing="$missing $program"
done
if [ -z "$missing" ]; then exit 0; fi
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "not found:$missing; tests that need them skip: as root, apt-get install $packages"
    exit 0
fi
# Debian starts a package's service at once; the tests start what they need, where nobody else sees it.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod +x "$policy"
fi
# shellcheck disable=SC2086  # words
if ! { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages; }; then
    echo "not installed:$missing; tests that need them skip"
fi
