#!/bin/bash
# Runs a launcher (torchrun, deepspeed.launcher.launch) as a task of srun. Both die of SIGUSR1, and
# their ranks with them; SIGTERM gives the ranks 30 s, less than a commit may take. Here both signals
# go to the ranks, which commit and end by themselves, and the launcher after them.
# In the words, @NODE@ stands for the number of this node in the job.
"${@//@NODE@/$SLURM_NODEID}" &
launcher=$!

forward() { # SIGNAL: the launcher's direct children are the ranks; theirs are not
    local stat line parent heard=''
    for _ in {1..60}; do # until there are any; pkill is not in every container
        for stat in /proc/[0-9]*/stat; do
            { read -r line <"$stat"; } 2>/dev/null || continue
            read -r _ parent _ <<<"${line##*) }"
            stat=${stat#/proc/}
            if [ "$parent" = "$launcher" ] && kill "-$1" "${stat%/stat}"; then heard=1; fi
        done
        if [ -n "$heard" ] || ! kill -0 "$launcher" 2>/dev/null; then return; fi
        sleep 1
    done
}
trap 'forward USR1' USR1
trap 'forward TERM' TERM

while :; do # a trapped signal ends `wait` early
    wait "$launcher"
    code=$?
    kill -0 "$launcher" 2>/dev/null || exit "$code"
done
