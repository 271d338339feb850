#!/bin/bash
# Nodes that failed: remembered in RUN/slurm/bad-nodes, excluded from a job's next start.
#
#   note_bad_node      one failure; MAX_NODE_FAILURES of them and the node is excluded
#   first_node_of      whom srun's messages name first
#   find_excludable    fills EXCLUDABLE; fails where there are none or too few nodes would be left
#   exclude_bad_nodes  changes the queued job
#   preflight          one check of every node before training, by `deberta doctor --node`

: "${MAX_NODE_FAILURES:=2}" # once is an accident; a node that fails again is broken
: "${NODE_FAILURE_DAYS:=7}" # failures that count
EXCLUDABLE=()

note_bad_node() { # NODE REASON [TIMES]
    for _ in $(seq "${3:-1}"); do
        printf '%s %(%FT%T)T job %s start %s: %s\n' "$1" -1 "$SLURM_JOB_ID" "$RESTART" "$2"
    done >>"$BOOKS/bad-nodes"
    say "node $1 failed: $2"
}

blamed_nodes() { # FILE: every node that srun's messages name, one a line, the first one first
    local names
    sed -n -e 's/^srun: error: Node failure on \([^ ]*\).*/\1/p' \
        -e 's/^srun: error: Task launch for .* failed on node \([^ :]*\).*/\1/p' \
        -e 's/^srun: error: \([^ :]*\): tasks\{0,1\} .*/\1/p' "$1" 2>/dev/null |
        while read -r names; do scontrol show hostnames "$names"; done
}

first_node_of() { blamed_nodes "$1" | head -n 1; } # the others die with it

job_has_node() { scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -qxF "$1"; }

bad_nodes() { # one a line; a node is repaired some day
    if [ ! -e "$BOOKS/bad-nodes" ]; then return; fi
    awk -v since="$(date --date "-$NODE_FAILURE_DAYS days" +%FT%T)" -v most="$MAX_NODE_FAILURES" \
        '$2 >= since { failures[$1]++ } END { for (node in failures) if (failures[node] >= most) print node }' \
        "$BOOKS/bad-nodes" | sort
}

find_excludable() {
    local left
    mapfile -t EXCLUDABLE < <(bad_nodes)
    if [ "${#EXCLUDABLE[@]}" = 0 ]; then return 1; fi
    left=$(timeout 20 sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format=%N | sort -u |
        grep -cvxF -f <(printf '%s\n' "${EXCLUDABLE[@]}"))
    if [ "${left:-0}" -lt "$SLURM_JOB_NUM_NODES" ]; then
        say "${EXCLUDABLE[*]} failed, but without them only ${left:-0} nodes are left: not excluded"
        return 1
    fi
}

exclude_bad_nodes() { # SLURM takes this while the job is queued: also while this shell still ends
    local tries names
    if ! find_excludable; then return; fi
    names=$(IFS=,; echo "${EXCLUDABLE[*]}")
    # What the user excluded stays excluded.
    if [ -n "${JOB_EXCLUDED:-}" ] && [ "$JOB_EXCLUDED" != '(null)' ]; then names+=",$JOB_EXCLUDED"; fi
    for tries in {1..20}; do
        if timeout 20 scontrol update "JobId=$SLURM_JOB_ID" "ExcNodeList=$names"; then
            say "excluded from the next start: $names"
            return
        fi
        sleep "0.$tries"
    done # the next start sees that it has such a node, and gives it back
}

preflight() { # ends the job where training must not start on these nodes
    local node failed code
    say "checking the nodes"
    timeout "${PREFLIGHT_SECONDS:-90}" srun --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --label \
        --kill-on-bad-exit=0 --export=ALL "${CONTAINER_WORDS[@]}" "${PREFLIGHT_WORDS[@]}" \
        >"$BOOKS/preflight.log" 2>"$BOOKS/preflight.err"
    code=$?
    cat "$BOOKS/preflight.log" "$BOOKS/preflight.err"
    if [ "$code" = 0 ]; then return; fi
    # Whom the findings speak of: `2: NODE CHECK: FAIL, ...`; the task that says so may be another's.
    mapfile -t failed < <(sed -n 's/^[0-9]*: \([^ ]*\) [^:]*: FAIL, .*/\1/p' "$BOOKS/preflight.log" |
        sort -u | while read -r node; do if job_has_node "$node"; then echo "$node"; fi; done)
    if [ "${#failed[@]}" = 0 ]; then # the check itself did not work there
        mapfile -t failed < <(blamed_nodes "$BOOKS/preflight.err" | sort -u)
    fi
    if [ "${#failed[@]}" -gt 1 ] && [ $((${#failed[@]} * 2)) -gt "$SLURM_JOB_NUM_NODES" ]; then
        end_job 1 "the check before training fails on most nodes, ${failed[*]}: see $BOOKS/preflight.log"
    fi
    for node in "${failed[@]}"; do # its own word needs no second failure
        note_bad_node "$node" "the check before training" "$MAX_NODE_FAILURES"
    done
    crashed 1 "the check before training failed on ${failed[*]:-no node that srun names}"
}
