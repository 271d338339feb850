#!/bin/bash
# What happens to a job when its training ends: the decisions of pretrain.sbatch, as functions.
#
#   begin       refuse what must not start; remember how the run stood before
#   finish RC   decide after srun has ended: end the job, requeue it, or leave it to SLURM
#
# Decided by RUN/state.json, which training owns, and by SLURM's own word about the job. Exit codes
# decide nothing: under --kill-on-bad-exit they depend on which rank ends first.
# Kept in RUN/slurm: restarts.jsonl (a line a decision), bad-nodes (a line a failure of a node),
# crashes (the committed step at the last crash, and how many crashes it has seen).

: "${MAX_RESTARTS:=50}"               # starts after the first, for whatever reason
: "${MAX_CRASHES_WITHOUT_PROGRESS:=3}" # crashes and hangs without a new commit between them
: "${RETRY_SECONDS:=600}"             # a controller may be away for so long before the job is lost
RESTART=${SLURM_RESTART_COUNT:-0}     # SLURM does not set it at the first start
EXIT_STOPPED=75 EXIT_HANG=86 EXIT_DIVERGED=87 EXIT_CORRUPT=88
BOOKS=$RUN/slurm
# shellcheck source=slurm/nodes.sh
. "$(dirname "${BASH_SOURCE[0]}")/nodes.sh"

say() { printf '%(%FT%T)T [pretrain, start %s] %s\n' -1 "$RESTART" "$*"; }

json_text() { # a JSON string of any one line
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//[[:cntrl:]]/ }"
}

record() { # DECISION REASON
    say "$1: $2"
    {
        printf '{"unix_seconds": %(%s)T, "job_id": "%s", "restart_count": %d, ' -1 "$SLURM_JOB_ID" "$RESTART"
        printf '"step": %d, "status": "%s", ' "$(state_step)" "$(state_word status)"
        printf '"job_state": "%s", "decision": "%s", ' "${JOB_STATE:-RUNNING}" "$1"
        printf '"reason": %s, "nodes": "%s"}\n' "$(json_text "$2")" "$SLURM_JOB_NODELIST"
    } >>"$BOOKS/restarts.jsonl"
}

# --- state.json: one key a line, replaced by rename ---

state_word() { # KEY: its text, without JSON's escapes of quotes
    sed -n "s/^ *\"$1\": \"\(.*\)\",\{0,1\}\$/\1/p" "$RUN/state.json" 2>/dev/null | sed 's/\\\(["\\]\)/\1/g'
}

state_step() {
    local step
    step=$(sed -n 's/^ *"step": \([0-9]*\).*/\1/p' "$RUN/state.json" 2>/dev/null)
    echo "${step:-0}"
}

state_identity() { stat --format='%i %.9Y' "$RUN/state.json" 2>/dev/null || echo none; }

# --- SLURM's word ---

field() { # NAME LINE: the value of NAME=value
    local rest=" $2"
    rest=${rest#* "$1"=}
    echo "${rest%% *}"
}

ask_slurm() { # sets JOB_STATE, JOB_REASON, ...; a controller that is away is waited for
    local answer deadline=$((SECONDS + RETRY_SECONDS))
    until answer=$(timeout 20 scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null) && [ -n "$answer" ]; do
        if [ "$SECONDS" -ge "$deadline" ]; then
            say "scontrol has not answered for $RETRY_SECONDS s"
            JOB_STATE=UNKNOWN JOB_REASON='' JOB_EXCLUDED='' JOB_PREEMPTED=None
            return
        fi
        sleep 2
    done
    JOB_STATE=$(field JobState "$answer") JOB_REASON=$(field Reason "$answer")
    JOB_EXCLUDED=$(field ExcNodeList "$answer") JOB_PREEMPTED=$(field PreemptTime "$answer")
}

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
    until answer=$(timeout 20 scontrol requeue "$SLURM_JOB_ID" 2>&1); do
        case $answer in *disabled* | *denied*) end_job "$1" "$2; SLURM does not requeue: $answer" ;; esac
        ask_slurm
        case $JOB_STATE in RUNNING | UNKNOWN) ;; *) break ;; esac # the answer was lost, or a scancel
        if [ "$SECONDS" -ge "$deadline" ]; then end_job "$1" "$2; scontrol requeue fails"; fi
        sleep 2
    done
    exclude_bad_nodes
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
    local last node
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
    if [[ $last == *"\"job_id\": \"$SLURM_JOB_ID\""*'"decision": "start"'* ]]; then
        # No last word of its shell: its host, the first node, went away with it.
        node=${last##*\"nodes\": \"}
        note_bad_node "$(scontrol show hostnames "${node%%\"*}" | head -n 1)" "its start ended without a word"
    fi
    give_back_bad_nodes "$last"
    record start "on $SLURM_JOB_NODELIST"
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
    ask_slurm
    STATUS=$(state_word status) REASON=$(state_word reason)
    if [ "$(state_identity)" = "$BEFORE" ]; then STATUS=silent; fi # the word of an earlier start
    FIRST_NODE=$(first_node_of "$BOOKS/srun.err")
    case $JOB_STATE/$JOB_REASON in
        RUNNING/*) decide "$1" ;; # its own end, a crash, USR1, or preemption's time of grace
        COMPLETING/TimeLimit | TIMEOUT/*)
            if [ "$STATUS" = 'done' ] || [ "$STATUS" = stopped ]; then decide "$1"; fi
            crashed "$EXIT_STOPPED" "the time limit came before the commit after USR1 was done" ;;
        UNKNOWN/*) end_job "$EXIT_STOPPED" "SLURM does not say whether the job was cancelled" ;;
        *) leave_it_to_slurm ;;
    esac
}

leave_it_to_slurm() { # scancel, scontrol requeue, preemption past its grace, a dead node
    if grep -q '^srun: error: Node failure on' "$BOOKS/srun.err"; then
        note_bad_node "$FIRST_NODE" "SLURM says that it failed"
        exclude_bad_nodes
    fi
    record "left to SLURM" "the job is $JOB_STATE; training: $STATUS"
    exit 1
}

decide() { # RC: by training's word; the job is this shell's to end
    local node
    case $STATUS in
        'done') end_job 0 "the run is done" ;;
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
                end_job 2 "training refuses its command line, configuration or data"
            fi
            note_crash "$1" "training ended before it had begun" ;;
        *) note_crash "$1" "training crashed" ;;
    esac
}

show_log() { # TASK: what it said last
    local log
    log=$(printf '%s/rank-%05d.log' "$BOOKS" "$1")
    echo "== the end of $log"
    tail -n 25 "$log"
}

note_crash() { # RC WHAT
    local code=$1 task
    task=$(sed -n 's/^srun: error: [^:]*: tasks\{0,1\} \([0-9]*\).*/\1/p' "$BOOKS/srun.err" | head -n 1)
    if [ -n "$task" ]; then show_log "$task"; fi
    if [ "$code" = 0 ]; then code=1; fi # a job that is not done never ends with 0
    if [ -n "$FIRST_NODE" ]; then note_bad_node "$FIRST_NODE" "$2 (srun's code $1)"; fi
    crashed "$code" "$2${FIRST_NODE:+, first on $FIRST_NODE} (srun's code $1)"
}
