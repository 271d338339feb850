# shellcheck shell=bash
# What tokenizer, prep, export and evaluate share; pretrain has more to decide (requeue.sh).
#
#   begin_job              the site's set-up, and the words of a container
#   words NAME             a variable as an array of words
#   run COMMAND...         a command that starts again with its job after a kill or near the time
#                          limit, MAX_RESTARTS times at most; anything else ends the job with its code

tell() { echo "$(date '+%F %T') ${SLURM_JOB_NAME:-job} ${SLURM_JOB_ID:-}: $*" >&2; }

begin_job() {
    trap 'start_again "the time limit is near"' USR1 # without a trap it would end this shell
    if [[ -n "${DEBERTA_SETUP:-}" ]]; then
        set +u # modules and virtual environments use variables that are not set
        # shellcheck disable=SC1090
        . "$DEBERTA_SETUP"
        set -u
    fi
    read -ra CONTAINER <<<"${DEBERTA_CONTAINER:-}"
    # Options alone are srun's, from pyxis.
    if [[ ${CONTAINER[0]-} == --* ]]; then CONTAINER=(srun --ntasks=1 "${CONTAINER[@]}"); fi
    LAUNCH=()
    tell "start $((${SLURM_RESTART_COUNT:-0} + 1)) on ${SLURM_JOB_NODELIST:-$(hostname)}"
}

# By hand a variable's words are divided at spaces or, where it has line breaks, at those alone;
# `deberta submit` gives arrays, whose words may hold anything.
words() {
    if [[ "$(declare -p "$1" 2>/dev/null)" == "declare -a"* ]]; then return; fi
    case ${!1-} in
        *$'\n'*) mapfile -t "$1" < <(sed '/^$/d' <<<"${!1}") ;;
        *) read -ra "$1" <<<"${!1-}" ;;
    esac
}

# Asked again for a while: a controller that restarts must not decide what becomes of a job.
job_state() {
    local answer
    for _ in 1 2 3 4 5 6; do
        if answer=$(timeout 20 scontrol -o show job "$SLURM_JOB_ID"); then
            grep -o ' JobState=[A-Z_]*' <<<"$answer" | head -n 1 | cut -d= -f2
            return 0 # in a trap, `return` alone is what came before the trap
        fi
        sleep 5
    done
    echo unknown
}

# Only a job that SLURM still wants to run is queued again: neither a cancelled one nor one that SLURM
# requeues itself.
start_again() {
    local state
    state=$(job_state)
    if [[ $state != RUNNING ]]; then
        tell "$1; SLURM says $state and decides what follows"
    elif ((${SLURM_RESTART_COUNT:-0} >= ${MAX_RESTARTS:-3})); then
        tell "$1; not started again after $((SLURM_RESTART_COUNT + 1)) starts (MAX_RESTARTS)"
    else
        tell "$1; queued again"
        for _ in 1 2 3 4 5 6; do # a controller may be away
            if timeout 20 scontrol requeue "$SLURM_JOB_ID"; then
                sleep 600 & # SLURM ends this shell; an exit code before that would be the job's
                wait $! || true
                exit 1
            fi
            sleep 5
        done
        tell "scontrol requeue fails"
    fi
}

run() {
    local rc=0 pid=''
    trap '[[ -z $pid ]] || kill -TERM "$pid" 2>/dev/null || true' TERM
    # In the background, because bash runs a trap only after a command in the foreground has ended.
    "${LAUNCH[@]}" "${CONTAINER[@]}" "$@" &
    pid=$!
    wait "$pid" || rc=$?
    while kill -0 "$pid" 2>/dev/null; do
        rc=0
        wait "$pid" || rc=$?
    done
    trap '' USR1 # what is left takes a moment
    trap - TERM
    ((rc != 0)) || return 0
    # 1: a worker of the preparation died; above 128: a signal, most often because memory ran out.
    if ((rc > 128 || rc == ${RETRIED_EXIT_CODE:-129})); then
        start_again "exit code $rc of $1"
    fi
    tell "FAILED with exit code $rc: $*"
    exit "$rc"
}
