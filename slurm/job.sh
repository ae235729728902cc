# Sourced by train.sbatch and async.sbatch: what their jobs have in common.
#
# A job is one or more parts (a srun step each). When all have ended it is over, or is requeued:
# after a signal (time limit, preemption), and after a rank, a node or a step died. It is not
# requeued after `dsasr stop` or scancel, nor after a user's mistake, nor after RETRIES failures in
# a row without a newer checkpoint. What ends without a recorded signal and unfinished is a failure,
# whatever its exit code. Every requeue is a line of RUN/requeues.jsonl, with its cause.

fail() { echo "error: $*" >&2; exit 2; }

: "${RECIPE:?set RECIPE to a recipe name or YAML file}"
: "${RUN:?set RUN to the run folder, on a file system that all nodes share}"
[[ $RUN != *[%\\]* ]] ||
  fail "RUN=$RUN: Slurm replaces % and \\ in the names of its logs: give another folder"
PYTHON=${PYTHON:-python}
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
DOCTOR=${DOCTOR:-warn}
[[ $DOCTOR == @(off|warn|stop) ]] || fail "DOCTOR=$DOCTOR: give off, warn or stop"
DOCTOR_SECONDS=420  # the longest that it may take; it ends itself before
RESTARTS=${SLURM_RESTART_COUNT:-0}
export DSASR_START=$SLURM_JOB_ID.$RESTARTS
REQUEUES=$RUN/requeues.jsonl
LOGS=$RUN/logs
OWNER=$RUN/job.lock    # the id of the job that RUN belongs to
STOP=$RUN/job.stop     # the id of a job that `dsasr stop` has asked to stop
mkdir -p "$LOGS"

declare -A parts=()    # pid of its `step` → name
declare -A folders=()  # name → where its events.jsonl is
signaled=''            # the signal that this script got: a request to save and stop
failure='' node=''     # the first part that failed, and why; the node that is to blame, if one is

stop_parts() { ((${#parts[@]} == 0)) || kill -USR1 "${!parts[@]}" 2>/dev/null || true; }
trap 'signaled=SIGUSR1; stop_parts' USR1
trap 'signaled=SIGTERM; stop_parts' TERM

# -- one job at a time -----------------------------------------------------------------------------

# The file is created exclusively. One whose job Slurm does not know any more is void.
take_run() {
  local holder state
  for _ in 1 2 3; do
    if (set -o noclobber; echo "$SLURM_JOB_ID $(hostname) $(date -u +%FT%TZ)" > "$OWNER") 2>/dev/null
    then sleep 1; fi  # another job may have removed the same void file
    read -r holder _ 2>/dev/null < "$OWNER" || continue
    [[ $holder != "$SLURM_JOB_ID" ]] || return 0
    state=$(squeue -h -j "$holder" -o %T 2>&1 | head -n 1) || true
    [[ -z $state || $state == *'Invalid job id'* ]] ||
      fail "$RUN belongs to job $holder ($state): wait for its end" \
        "(sbatch --dependency=afterany:$holder), stop it with \`dsasr stop $RUN\`, or set another RUN"
    rm -f "$OWNER"
  done
  fail "$RUN: another job takes it just now"
}

over() { # EXIT_CODE: the job ends, and RUN is free
  local holder
  if read -r holder _ 2>/dev/null < "$OWNER" && [[ $holder == "$SLURM_JOB_ID" ]]; then
    rm -f "$OWNER" "$STOP"
  fi
  exit "$1"
}

stop_asked() { [[ -f $STOP && $(< "$STOP") == "$SLURM_JOB_ID" ]]; }

job_field() { # NAME [JOB]: a field of Slurm's record; empty: unknown
  scontrol show job "${2:-$SLURM_JOB_ID}" 2>/dev/null | sed -nE "s/.*\b$1=([^ ]*).*/\1/p" | head -n 1
}

# Slurm counts a requeue when it decides on it, before it ends the job's processes.
is_requeued() { local count; count=$(job_field Restarts) && ((${count:-0} > RESTARTS)); }

# While Slurm ends a job's processes it calls the job COMPLETING, whatever the reason.
is_cancelled() {
  [[ $(job_field JobState) == @(COMPLETING|CANCELLED) ]] && ! is_requeued &&
    ! grep -qs 'DUE TO TIME LIMIT' "$LOGS/$DSASR_START-"*-srun.log
}

take_run
if stop_asked; then echo "stopped by dsasr stop"; over 0; fi

# The code and the recipe that a job starts with are those that it goes on with after a requeue.
if ((RESTARTS == 0)) || [[ ! -d $RUN/code ]]; then
  copy=$(mktemp -d "$RUN/.code-XXXXXX.tmp")
  for part in dsasr ds_configs slurm; do
    [[ $SCRIPTS == "$CODE/slurm" || $part == dsasr ]] || continue  # installed: all is in dsasr
    (cd "$CODE" && find "$part" -name __pycache__ -prune -o -type f -print0) |
      tar -C "$CODE" --null -T - -cf - | tar -C "$copy" -xf -
  done
  if [[ -f $RECIPE ]]; then cp "$RECIPE" "$copy/recipe.yaml"; fi
  chmod 755 "$copy"
  rm -rf "$RUN/code"
  mv "$copy" "$RUN/code"
fi
if [[ -f $RUN/code/recipe.yaml ]]; then RECIPE=$RUN/code/recipe.yaml; fi

# -- parts -----------------------------------------------------------------------------------------

# Since 22.05 srun does not take this from sbatch.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
if [[ -n ${NETWORK:-} ]]; then export NCCL_SOCKET_IFNAME=$NETWORK GLOO_SOCKET_IFNAME=$NETWORK; fi

# An image file is run by Apptainer; any other name goes to srun's container plugin (Pyxis).
inside=() container=()
case ${CONTAINER:-} in
  '') ;;
  *.sif) inside=(apptainer exec --nv --bind "${MOUNTS:-$PWD,$RUN}" "$CONTAINER") ;;
  *) container=(--container-image="$CONTAINER" --container-workdir="$PWD"
                --container-mounts="${MOUNTS:-$PWD:$PWD,$RUN:$RUN}") ;;
esac

last_event() { tail -n 1 "$1/events.jsonl" 2>/dev/null || true; }
is_finished() { [[ $(last_event "$1") == *'"event": "finished"'* ]]; }
# In this start: a rank got a signal, or was asked to stop, and all have saved.
is_stopped() { [[ $(last_event "$1") == *'"event": "stopped"'*"\"start\": \"$DSASR_START\""* ]]; }

free_port() { # HOST PORT: the first port from PORT on, in steps of two, that nothing listens on
  local port=$2
  # shellcheck disable=SC2016  # expanded by the inner shell
  while timeout 2 bash -c ': > "/dev/tcp/$0/$1"' "$1" "$port" 2>/dev/null; do port=$((port + 2)); done
  echo "$port"
}

# step LOG COMMAND …: run a command that SIGUSR1 is passed on to, with its exit code. In a shell of
# its own: bash prints the whole command when it was killed, and here nobody reads that.
step() {
  local log=$1 code pid=''
  shift
  trap ':' TERM
  trap '[[ -z $pid ]] || kill -USR1 "$pid"' USR1
  "$@" 2> "$log" &
  pid=$!
  while :; do
    code=0; wait "$pid" || code=$?
    kill -0 "$pid" || exit "$code"
  done
}

# The command of a task: a rank under the names that torch's launchers give it. A task ignores
# SIGUSR1 until train.py listens for it: this script repeats the signal.
# shellcheck disable=SC2016  # the task's own shell expands SLURM_*
task=(bash -c 'trap "" USR1
  RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
  LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) exec "$@"' task)

# examine NAME HOSTLIST PORT SRUN_OPTION KEY=VALUE …: look at a part's nodes before it starts. What
# falls short is printed, and ends the job with DOCTOR=stop. All of it: the log …-doctor.txt.
examine() {
  local name=$1 hosts master port option=$4 code=0 pid told=$LOGS/$DSASR_START-$1-doctor.txt
  [[ $DOCTOR != off ]] || return 0
  mapfile -t hosts < <(scontrol show hostnames "$2")
  master=${MASTER_ADDR:-${hosts[0]}}
  port=$(free_port "$master" "$3")
  shift 4
  # shellcheck disable=SC2086  # words on purpose
  MASTER_ADDR=$master MASTER_PORT=$port timeout -k 10 "$DOCTOR_SECONDS" srun $option \
    --kill-on-bad-exit=1 "${container[@]}" ${SRUN_ARGS:-} "${task[@]}" "${inside[@]}" "$PYTHON" \
    "$RUN/code/dsasr/doctor/rank.py" --recipe "$RECIPE" run="$RUN" "$@" ${OVERRIDES:-} \
    > "$told" 2>&1 &
  pid=$!
  # Not in the foreground, where bash answers no signal: one that comes ends the examination.
  while kill -0 "$pid" 2>/dev/null; do
    if [[ -n $signaled ]]; then kill "$pid" 2>/dev/null || true; fi
    code=0; wait "$pid" || code=$?
  done
  if ((code == 0)) || [[ -n $signaled ]]; then return 0; fi
  echo "doctor: $name: exit code $code ($told)"
  grep -E '^(short|error|failed|doctor): ' "$told" || tail -n 3 "$told"
  if [[ $DOCTOR == stop ]]; then
    echo "error: the machines fall short of the recipe, and DOCTOR=stop (slurm.doctor): not started" >&2
    over 2
  fi
}

# part NAME FOLDER HOSTLIST PORT SRUN_OPTION KEY=VALUE …: start a part in the background.
# One task a GPU, not one launcher a node: Slurm then binds, accounts and signals each rank itself,
# and sees at once when one dies.
part() {
  local name=$1 hosts master port option=$5
  folders[$name]=$2
  mapfile -t hosts < <(scontrol show hostnames "$3")
  master=${MASTER_ADDR:-${hosts[0]}}
  port=$(free_port "$master" "$4")
  shift 5
  # shellcheck disable=SC2086  # words on purpose
  MASTER_ADDR=$master MASTER_PORT=$port step "$LOGS/$DSASR_START-$name-srun.log" srun $option --kill-on-bad-exit=1 \
    --open-mode=append --output="$LOGS/$DSASR_START-$name-node%n.log" \
    "${container[@]}" ${SRUN_ARGS:-} \
    "${task[@]}" "${inside[@]}" "$PYTHON" "$RUN/code/dsasr/train.py" --recipe "$RECIPE" run="$RUN" "$@" \
    ${OVERRIDES:-} 2> /dev/null &
  parts[$!]=$name
}

# Wait for all parts; when one ends before it is finished, the others save and stop too.
attend() {
  local pid code name ticks=0
  while ((${#parts[@]})); do
    for pid in "${!parts[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then continue; fi
      code=0; wait "$pid" || code=$?
      name=${parts[$pid]}
      unset "parts[$pid]"
      judge "$name" "$code"
    done
    # Again and again, but first after 10 s: by then a rank has read the request itself, whose event
    # tells `dsasr stop` from a signal.
    if [[ -n $signaled ]] || stop_asked; then ((++ticks % 20)) || stop_parts; fi
    sleep 0.5 & wait $! || true
  done
}

judge() { # NAME EXIT_CODE: what the end of a part means
  local name=$1 code=$2 folder=${folders[$1]} log=$LOGS/$DSASR_START-$1-srun.log
  echo "$name ended with $code"
  cat "$log" 2>/dev/null || true
  if ((code == 0)) && is_finished "$folder"; then return; fi
  stop_parts
  if ((code == 0)) && is_stopped "$folder"; then return; fi
  # srun itself may have got the signal before it listened
  if [[ -n $signaled ]] && ((code == 0 || code == 138 || code == 143)); then return; fi
  if [[ -n $failure ]]; then return; fi
  failure="$name ended with $code"
  if ((code == 0)); then failure+=' before it was finished'; fi
  blame "$log"
}

lost_nodes() { # LOG_OF_SRUN …
  sed -nE 's/^srun: error: Node failure on ([^ ]+).*/\1/p' "$@" 2>/dev/null | sort -u | paste -sd,
}

blame() { # LOG_OF_SRUN: adds to failure which node or task ended first, and how
  local told
  told=$(lost_nodes "$1")
  if [[ -n $told ]]; then node=$told failure+=": node failure on $told"; return; fi
  told=$(sed -nE 's/^srun: error: ([^ :]+): (tasks? [0-9,-]+: .+)$/\1 \2/p' "$1" 2>/dev/null |
    grep -v 'Terminated$' | head -n 1) || true
  if [[ -z $told ]]; then return; fi
  failure+=": ${told%% *}, ${told#* }"
  # A task that a signal ended may be the node's fault; one that exits is hardly.
  if [[ $told != *'Exited with'* ]]; then node=${told%% *}; fi
}

exception() { # the last one in the logs that is not about the rank that another rank lost
  { grep -hE '^([A-Za-z_]+\.)*[A-Za-z_]*(Error|Exception): ' "$LOGS/$DSASR_START-"*-node*.log 2>/dev/null || true; } |
    { grep -viE 'DistBackendError|DistNetworkError|connection (closed|reset)|gloo' || true; } |
    tail -n 1 | cut -c 1-200
}

# -- requeues --------------------------------------------------------------------------------------

newest_checkpoints() { # the newest one of each branch
  local folder
  for folder in "$RUN"/checkpoints "$RUN"/*/checkpoints; do
    if [[ -d $folder ]]; then find "$folder" -maxdepth 1 -name 'step-*' -printf '%f\n' | sort | tail -n 1; fi
  done | paste -sd ' '
}

note() { # START CAUSE NODE
  printf '{"time": "%s", "job": %d, "start": %d, "cause": "%s", "node": "%s", "checkpoint": "%s"}\n' \
    "$(date -u +%FT%TZ)" "$SLURM_JOB_ID" "$1" "$(tr -d '"\\[:cntrl:]' <<< "$2")" "$3" "$(newest_checkpoints)" >> "$REQUEUES"
}

# What Slurm requeued by itself (a node that died, preemption without grace) left no line behind.
if ((RESTARTS)) && ! grep -qs "\"job\": $SLURM_JOB_ID, \"start\": $((RESTARTS - 1))," "$REQUEUES"; then
  nodes=$(cat "$LOGS/$SLURM_JOB_ID.$((RESTARTS - 1)).nodes" 2>/dev/null || true)
  down=$(sinfo -h -N -n "$nodes" -t down,fail,no_respond -o %N 2>/dev/null | sort -u | paste -sd,) || true
  if [[ -n $nodes && -n $down ]]; then cause="node failure on $down"; else cause='node failure or preemption' down=''; fi
  note $((RESTARTS - 1)) "$cause: requeued by Slurm" "$down"
fi
echo "${SLURM_JOB_NODELIST:-}" > "$LOGS/$DSASR_START.nodes"
echo "job $SLURM_JOB_ID, start $RESTARTS on ${SLURM_JOB_NODELIST:-?}${SLURM_RESTART_COUNT:+, $(tail -n 1 "$REQUEUES")}"

# Keep the requeued job off the nodes that failed twice, where others are left.
exclude_nodes() {
  local bad others job i excluded
  bad=$({ grep -s "\"job\": $SLURM_JOB_ID," "$REQUEUES" || true; } |
    sed -n 's/.*"node": "\([^"]\{1,\}\)".*/\1/p' | tr , '\n' | sort | uniq -d | paste -sd,)
  if [[ -z $bad ]]; then return; fi
  others=$(sinfo -h -N -p "${SLURM_JOB_PARTITION:-}" -t idle,alloc,mix,comp -o %N 2>/dev/null |
    sort -u | grep -cvxF "${bad//,/$'\n'}") || true
  if ((${others:-0} < ${SLURM_JOB_NUM_NODES:-1})); then
    echo "$bad failed twice, but is not excluded: no $SLURM_JOB_NUM_NODES other nodes are up"
    return
  fi
  for ((i = 0; i < ${SLURM_HET_SIZE:-1}; i++)); do
    job=$SLURM_JOB_ID
    if ((${SLURM_HET_SIZE:-1} > 1)); then job+=+$i; fi
    excluded=$(job_field ExcNodeList "$job")
    if [[ -z $excluded || $excluded == '(null)' ]]; then excluded=$bad; else excluded+=,$bad; fi
    if scontrol update jobid="$job" excnodelist="$excluded"; then
      echo "excluded: $bad, which failed twice (scontrol update jobid=$job excnodelist= takes it back)"
    fi
  done
}

# End the job when the runs of all parts are finished or it was stopped, else requeue it.
conclude() {
  local folder finished=1 stopped='' cause mistake failures checkpoint refusal='' reason
  for folder in "${folders[@]}"; do
    is_finished "$folder" || finished=0
    if is_stopped "$folder" && [[ $(last_event "$folder") == *'"cause": "dsasr stop"'* ]]; then stopped=1; fi
  done
  if ((finished)); then echo "finished after $RESTARTS requeues"; over 0; fi
  if [[ -n $stopped ]] || stop_asked; then echo "stopped by dsasr stop: not requeued"; over 0; fi
  if is_cancelled; then echo "cancelled: not requeued; submit again to go on"; over 0; fi
  mistake=$(cat "$LOGS/$DSASR_START-"*.log 2>/dev/null | grep -m 1 '^error: ' || true)
  if [[ -n $failure && -n $mistake ]]; then
    echo "not requeued: $mistake" >&2
    over 2
  fi
  cause=$failure
  if [[ -z $failure ]]; then  # Slurm ends the other nodes' tasks of a job whose node died by SIGTERM
    node=$(lost_nodes "$LOGS/$DSASR_START-"*-srun.log)
    cause=${node:+node failure on $node}
    cause=${cause:-signal}
  fi
  if grep -qs '^watchdog: ' "$LOGS/$DSASR_START-"*.log; then cause="$cause, by the watchdog"; fi
  if [[ -n $failure ]]; then
    reason=$(exception)
    cause+=${reason:+ ($reason)}
  fi
  checkpoint=$(newest_checkpoints)
  note "$RESTARTS" "$cause" "$node"
  if [[ -n $failure ]]; then
    failures=$(tail -n "${RETRIES:-3}" "$REQUEUES" | grep -v '"cause": "signal"' |
      grep -c "\"job\": $SLURM_JOB_ID, .*\"checkpoint\": \"$checkpoint\"" || true)
    if ((failures >= ${RETRIES:-3})); then
      echo "error: $failures failures in a row without a new checkpoint: not requeued ($cause)" >&2
      over 1
    fi
  fi
  trap '' TERM  # which Slurm sends to all that runs here, once it has requeued the job
  # After a node's failure Slurm may have requeued the job before this script could.
  if is_requeued || refusal=$(scontrol requeue "$SLURM_JOB_ID" 2>&1) || is_requeued; then
    echo "requeued ($cause)"
    exclude_nodes
    exit 0
  fi
  echo "error: Slurm refuses to requeue (${refusal//$'\n'/ }): submit again" >&2
  over 1
}
