#!/bin/bash
# Runs a launcher (torchrun, deepspeed.launcher.launch) as a task of srun. Both die of SIGUSR1, and
# their ranks with them; SIGTERM gives the ranks 30 s, less than a commit may take. Here both signals
# go to the ranks, which commit and end by themselves, and the launcher after them.
# In the words, @NODE@ stands for the number of this node in the job.
"${@//@NODE@/$SLURM_NODEID}" &
launcher=$!

forward() { # SIGNAL: the launcher's direct children are the ranks; theirs are not
    for _ in {1..60}; do # until there are any
        if pkill "-$1" -P "$launcher" || ! kill -0 "$launcher" 2>/dev/null; then return; fi
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
