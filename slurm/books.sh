#!/bin/bash
# shellcheck disable=SC2034  # requeue.sh and nodes.sh read what is set here
# What is known of the run and of the job, and the record of what was decided.
#
#   record                  a line in the job's output and in RUN/slurm/restarts.jsonl: time, job, start,
#                           committed step, training's status, JobState, decision, reason, nodes
#   state_word, state_step  RUN/state.json, which training owns
#   ask_slurm, is_ours      scontrol's word about the job, asked until it answers

: "${RETRY_SECONDS:=600}"         # a controller may be away for so long before the job is lost
RESTART=${SLURM_RESTART_COUNT:-0} # SLURM does not set it at the first start
BOOKS=$RUN/slurm

say() { printf '%(%FT%T)T [pretrain, start %s] %s\n' -1 "$RESTART" "$*"; }

json_text() { # a JSON string of any one line
    local text=${1//\\/\\\\}
    text=${text//\"/\\\"}
    printf '"%s"' "${text//[[:cntrl:]]/ }"
}

record() { # DECISION REASON
    local line
    say "$1: $2"
    if [ "$1" != start ]; then DECIDED=$1; fi
    printf -v line '{"unix_seconds": %(%s)T, "job_id": "%s", "restart_count": %d, "step": %d, "status": "%s", ' \
        -1 "$SLURM_JOB_ID" "$RESTART" "$(state_step)" "$(state_word status)"
    printf -v line '%s"job_state": "%s", "decision": "%s", "reason": %s, "nodes": "%s"}' \
        "$line" "${JOB_STATE:-RUNNING}" "$1" "$(json_text "$2")" "$SLURM_JOB_NODELIST"
    echo "$line" >>"$BOOKS/restarts.jsonl" # at once: others read it meanwhile
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
            JOB_STATE=UNKNOWN JOB_REASON='' JOB_EXCLUDED='' JOB_PREEMPTED=None JOB_ENDS=9999999999
            return
        fi
        sleep 2
    done
    JOB_STATE=$(field JobState "$answer") JOB_REASON=$(field Reason "$answer")
    JOB_EXCLUDED=$(field ExcNodeList "$answer") JOB_PREEMPTED=$(field PreemptTime "$answer")
    JOB_ENDS=$(date --date "$(field EndTime "$answer")" +%s 2>/dev/null || echo 9999999999) # no limit
}

is_ours() { # the job runs, or has run into its limit, which SLURM does not requeue
    ask_slurm
    case $JOB_STATE/$JOB_REASON in RUNNING/* | COMPLETING/TimeLimit | TIMEOUT/*) return 0 ;; esac
    return 1
}
