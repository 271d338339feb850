#!/bin/bash
# Process 1 of a host that tests/slurm/hosts.py makes: its name, its mounts, and then its life. When it
# ends, the kernel ends every process of the host.
# Arguments: the host's name, its /etc/hosts.
set -eu
hostname "$1"
mount --bind "$2" /etc/hosts
mount -t tmpfs run /run && mkdir /run/sshd      # pid files and sockets, not the machine's own
mount -t tmpfs shm /dev/shm                     # hosts share no memory
ip link set lo up
echo ready
# The owner holds the other end of the pipe and never writes: this ends with it, however it dies.
# Bash reaps meanwhile what daemons leave behind.
read -r _ || true
