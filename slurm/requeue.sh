#!/bin/bash
# What happens to a job when its training ends: the decisions of pretrain.sbatch, as functions.
#
#   begin       refuse what must not start; remember how the run stood before
#   finish RC   decide after srun has ended: end the job, requeue it, or leave it to SLURM
#
# Decided by RUN/state.json, which training owns, and by SLURM's own word about the job. Exit codes
# decide nothing: under --kill-on-bad-exit they depend on which rank ends first.
# Kept in RUN/slurm: restarts.jsonl (books.sh), bad-nodes (nodes.sh), and crashes: the committed step
# at the last crash, and how many crashes it has seen.

: "${MAX_RESTARTS:=50}"               # starts after the first, for whatever reason
: "${MAX_CRASHES_WITHOUT_PROGRESS:=3}" # crashes and hangs without a new commit between them
EXIT_STOPPED=75 EXIT_HANG=86 EXIT_DIVERGED=87 EXIT_CORRUPT=88
SRUN_PID='' HEARD_USR1='' HEARD_TERM='' DECIDED=''
# shellcheck source=slurm/books.sh
. "$(dirname "${BASH_SOURCE[0]}")/books.sh"
# shellcheck source=slurm/nodes.sh
. "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"

# --- the ways to end ---

end_job() { # CODE REASON
    record end "$2"
    exit "$1"
}

requeue_or_end() { # CODE REASON: CODE is the job's where it does not start again
    local answer deadline=$((SECONDS + RETRY_SECONDS))
    if [ -e "$RUN/no-restart" ]; then end_job "$1" "$2; not requeued: $RUN/no-restart exists"; fi
    if [ "$RESTART" -ge "$MAX_RESTARTS" ]; then
        end_job "$1" "$2; not requeued: MAX_RESTARTS=$MAX_RESTARTS restarts were made"
    fi
    record requeue "$2"
    while :; do
        if [ -n "$HEARD_TERM" ] && ! is_ours; then leave_it_to_slurm; fi # a scancel since
        if answer=$(timeout 20 scontrol requeue "$SLURM_JOB_ID" 2>&1); then break; fi
        case $answer in *disabled* | *denied*) end_job "$1" "$2; SLURM does not requeue: $answer" ;; esac
        if ! is_ours && [ "$JOB_STATE" != UNKNOWN ]; then break; fi # its answer was lost
        if [ "$SECONDS" -ge "$deadline" ]; then end_job "$1" "$2; scontrol requeue fails: $answer"; fi
        sleep 2
    done
    exclude_bad_nodes
    # A commit may yet succeed.
    while [ -n "$SRUN_PID" ] && kill -0 "$SRUN_PID" 2>/dev/null; do wait "$SRUN_PID"; done
    exit "$1" # SLURM no longer looks at it: the job is queued
}

crashed() { # CODE REASON
    local step count=0 at=-1
    step=$(state_step)
    if [ -e "$BOOKS/crashes" ]; then read -r at count <"$BOOKS/crashes"; fi
    if [ "$step" -gt "$at" ]; then count=0; fi
    count=$((count + 1))
    echo "$step $count" >"$BOOKS/crashes"
    if [ "$count" -ge "$MAX_CRASHES_WITHOUT_PROGRESS" ]; then
        end_job "$1" "$2; given up: $count times without a new commit"
    fi
    requeue_or_end "$1" "$2"
}

# --- before training ---

begin() {
    local last
    mkdir -p "$BOOKS"
    BEFORE=$(state_identity)
    if [ -e "$RUN/no-restart" ]; then end_job "$EXIT_STOPPED" "not started: $RUN/no-restart exists"; fi
    if [ "$RESTART" = 0 ]; then
        rm -f "$BOOKS/crashes" # of an earlier job: a person has looked at it since
    elif [ "$(state_word status)" = 'done' ]; then
        end_job 0 "the run is done"
    elif [ "$RESTART" -gt "$MAX_RESTARTS" ]; then # SLURM's own requeues count, too
        end_job "$EXIT_STOPPED" "not started: MAX_RESTARTS=$MAX_RESTARTS restarts were made"
    fi
    last=$(tail -n 1 "$BOOKS/restarts.jsonl" 2>/dev/null)
    blame_lost_shell "$last"
    give_back_bad_nodes "$last"
    record start "on $SLURM_JOB_NODELIST"
}

blame_lost_shell() { # LAST: a start without a last word of its shell, which ran on the first node
    local began node answer
    if [[ $1 != *"\"job_id\": \"$SLURM_JOB_ID\""*'"decision": "start"'* ]]; then return; fi
    began=${1#*\"unix_seconds\": } node=${1##*\"nodes\": \"}
    node=$(scontrol show hostnames "${node%%\"*}" | head -n 1)
    answer=$(timeout 20 scontrol -o show node "$node")
    # Preemption past its grace ends a shell without a word, too: only a node that was away is blamed.
    if [[ $(field State "$answer") == *[*]* || $(field State "$answer") == DOWN* ]] ||
        [ "$(date --date "$(field SlurmdStartTime "$answer")" +%s)" -ge "${began%%,*}" ]; then
        note_bad_node "$node" "a start's shell ended without a word"
    fi
}

give_back_bad_nodes() { # LAST: the exclusion came too late where the node was the shell's own
    local node
    if [[ $1 == *'given back'* ]] || ! find_excludable; then return; fi
    for node in "${EXCLUDABLE[@]}"; do
        if job_has_node "$node"; then
            ask_slurm
            requeue_or_end "$EXIT_STOPPED" "given back: node $node failed $MAX_NODE_FAILURES times"
        fi
    done
}

# --- after training ---

finish() { # RC: srun's
    STATUS=$(state_word status) REASON=$(state_word reason)
    if [ "$(state_identity)" = "$BEFORE" ]; then STATUS=silent; fi # the word of an earlier start
    FIRST_NODE=$(first_node_of "$BOOKS/srun.err")
    if is_ours; then decide "$1"; fi
    if [ "$JOB_STATE" = UNKNOWN ]; then
        end_job "$EXIT_STOPPED" "SLURM does not say whether the job was cancelled"
    fi
    leave_it_to_slurm
}

on_term() { # SLURM ends the job; ranks that do not end are killed with this shell, which cannot wait
    HEARD_TERM=1
    if [ -n "$DECIDED" ]; then return; fi
    if is_ours; then
        if [ "$JOB_STATE" = RUNNING ]; then return; fi # somebody has sent it by hand
        crashed "$EXIT_STOPPED" "the time limit came before the commit after USR1 was done"
    fi
    if [ "$JOB_STATE" != UNKNOWN ]; then record "left to SLURM" "the job is $JOB_STATE"; fi
}

leave_it_to_slurm() { # scancel, scontrol requeue, preemption past its grace, a dead node
    if grep -q '^srun: error: Node failure on' "$BOOKS/srun.err"; then
        note_bad_node "$(first_node_of "$BOOKS/srun.err")" "SLURM says that it failed"
        exclude_bad_nodes
    fi
    if [ "$DECIDED" != 'left to SLURM' ]; then record "left to SLURM" "the job is $JOB_STATE"; fi
    exit 1
}

decide() { # RC: by training's word; the job is this shell's to end
    local node task
    case $STATUS in
        'done')
            if [ "$(date +%s)" -ge "$JOB_ENDS" ]; then # SLURM would call it TIMEOUT, and not run what depends
                requeue_or_end 0 "the run is done, past the job's limit: once more for its end"
            fi
            end_job 0 "the run is done" ;;
        stopped)
            case $REASON in
                'a signal'*) # to ranks that waited for others: srun's own, where one of those had died
                    if [ -z "$HEARD_USR1" ] && [ "$JOB_PREEMPTED" = None ]; then
                        note_crash "$1" "training ended before it had begun"
                    fi
                    requeue_or_end "$EXIT_STOPPED" "stopped by $REASON" ;;
                # "request": another rank than the first has heard it.
                SIGTERM | SIGUSR1 | request) requeue_or_end "$EXIT_STOPPED" "stopped by $REASON" ;;
                *'of memory are left'*) crashed "$EXIT_STOPPED" "stopped: $REASON" ;; # it may have grown
                *) end_job "$EXIT_STOPPED" "stopped: $REASON" ;; # a person's file, a disk without room
            esac ;;
        diverged) end_job "$EXIT_DIVERGED" "diverged: $REASON" ;;
        corrupt) end_job "$EXIT_CORRUPT" "corrupt: $REASON" ;;
        hang)
            while read -r node; do # a host's name may be longer than its node's
                if job_has_node "${node%%.*}"; then note_bad_node "${node%%.*}" "$REASON"; fi
            done < <(grep -oP '\(host \K[^ ,)]+' <<<"$REASON" | sort -u)
            crashed "$EXIT_HANG" "$REASON" ;;
        silent)
            # srun's own code may be that of a rank that it has killed for the first one's.
            if [ "$RESTART" = 0 ] && grep -m 1 '^srun: error: .*task' "$BOOKS/srun.err" |
                grep -q 'Exited with exit code 2$'; then
                show_log 0
                # Who left first has said it where rank 0 could not.
                if task=$(first_task) && [ "${task:-0}" != 0 ]; then show_log "$task"; fi
                end_job 2 "training refuses its command line, configuration or data"
            fi
            note_crash "$1" "training ended before it had begun" ;;
        *) note_crash "$1" "training crashed" ;;
    esac
}

first_task() { # that srun says has failed
    sed -n 's/^srun: error: [^:]*: tasks\{0,1\} \([0-9]*\).*/\1/p' "$BOOKS/srun.err" | head -n 1
}

show_log() { # TASK: what it said last
    local log
    log=$(printf '%s/rank-%05d.log' "$BOOKS" "$1")
    echo "== the end of $log"
    tail -n 25 "$log"
}

note_crash() { # RC WHAT
    local code=$1 task
    task=$(first_task)
    if [ -n "$task" ]; then show_log "$task"; fi
    if [ "$code" = 0 ]; then code=1; fi # a job that is not done never ends with 0
    if [ -n "$FIRST_NODE" ]; then note_bad_node "$FIRST_NODE" "$2 (srun's code $1)"; fi
    crashed "$code" "$2${FIRST_NODE:+, first on $FIRST_NODE} (srun's code $1)"
}
