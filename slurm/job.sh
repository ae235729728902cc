# Sourced by train.sbatch and async.sbatch: what their jobs have in common.
#
# A job is one or more parts (a srun step each). When all have ended it is over, or is requeued:
# after a signal (time limit, preemption), and after a rank, a node or a step died. It is not
# requeued after a user's mistake, nor after RETRIES failures in a row without a newer checkpoint.
# Every requeue is a line of RUN/requeues.jsonl, with its cause.

: "${RECIPE:?set RECIPE to a recipe name or YAML file}"
: "${RUN:?set RUN to the run folder, on a file system that all nodes share}"
PYTHON=${PYTHON:-python}
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
RESTARTS=${SLURM_RESTART_COUNT:-0}
REQUEUES=$RUN/requeues.jsonl
LOGS=$RUN/logs
mkdir -p "$LOGS"

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

declare -A parts=()    # pid of srun → name
declare -A folders=()  # name → where its events.jsonl is
failure=''

stop_parts() { ((${#parts[@]} == 0)) || kill -USR1 "${!parts[@]}" 2>/dev/null || true; }
trap stop_parts USR1 TERM

is_finished() { [[ -f $1/events.jsonl ]] && tail -n 1 "$1/events.jsonl" | grep -q '"event": "finished"'; }

# part NAME FOLDER HOSTLIST PORT SRUN_OPTION KEY=VALUE …: start a part in the background.
# One task a GPU, not one launcher a node: Slurm then binds, accounts and signals each rank itself,
# and sees at once when one dies.
part() {
  local name=$1 hosts port=$4 option=$5
  folders[$name]=$2
  mapfile -t hosts < <(scontrol show hostnames "$3")
  shift 5
  # shellcheck disable=SC2086,SC2016  # words on purpose; the task's own shell expands SLURM_*
  MASTER_ADDR=${MASTER_ADDR:-${hosts[0]}} MASTER_PORT=$port srun $option --kill-on-bad-exit=1 \
    --open-mode=append --output="$LOGS/$SLURM_JOB_ID.$RESTARTS-$name-node%n.log" \
    "${container[@]}" ${SRUN_ARGS:-} \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS \
      LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)) exec "$@"' task \
    "${inside[@]}" "$PYTHON" "$RUN/code/dsasr/train.py" --recipe "$RECIPE" run="$RUN" "$@" \
    ${OVERRIDES:-} &
  parts[$!]=$name
}

# Wait for all parts; when one ends before it is finished, the others save and stop too.
attend() {
  local pid code name
  while ((${#parts[@]})); do
    for pid in "${!parts[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then continue; fi
      code=0; wait "$pid" || code=$?
      name=${parts[$pid]}
      unset "parts[$pid]"
      echo "$name ended with $code"
      if ((code)) && [[ -z $failure ]]; then failure="$name ended with $code"; fi
      if ((code)) || ! is_finished "${folders[$name]}"; then stop_parts; fi
    done
    sleep 0.5 & wait $! || true
  done
}

newest_checkpoints() { # the newest one of each branch
  local folder
  for folder in "$RUN"/checkpoints "$RUN"/*/checkpoints; do
    if [[ -d $folder ]]; then find "$folder" -maxdepth 1 -name 'step-*' -printf '%f\n' | sort | tail -n 1; fi
  done | paste -sd ' '
}

note() { # cause
  printf '{"time": "%s", "job": %d, "start": %d, "cause": "%s", "checkpoint": "%s"}\n' \
    "$(date -u +%FT%TZ)" "$SLURM_JOB_ID" "$RESTARTS" "$1" "$(newest_checkpoints)" >> "$REQUEUES"
}

# What Slurm requeued by itself (a node that died, preemption without grace) left no line behind.
if ((RESTARTS)) && ! grep -qs "\"job\": $SLURM_JOB_ID, \"start\": $((RESTARTS - 1))," "$REQUEUES"; then
  RESTARTS=$((RESTARTS - 1)) note 'node failure or preemption: requeued by Slurm'
fi
echo "job $SLURM_JOB_ID, start $RESTARTS on ${SLURM_JOB_NODELIST:-?}${SLURM_RESTART_COUNT:+, $(tail -n 1 "$REQUEUES")}"

# End the job when the runs of all parts are finished, else requeue it.
conclude() {
  local folder over=1 cause mistake failures checkpoint
  for folder in "${folders[@]}"; do is_finished "$folder" || over=0; done
  if ((over)); then echo "finished after $RESTARTS requeues"; exit 0; fi
  mistake=$(cat "$LOGS/$SLURM_JOB_ID.$RESTARTS-"*.log 2>/dev/null | grep -m 1 '^error: ' || true)
  if [[ -n $failure && -n $mistake ]]; then
    echo "not requeued: $mistake" >&2
    exit 2
  fi
  cause=${failure:-signal}
  if grep -qs '^watchdog: ' "$LOGS/$SLURM_JOB_ID.$RESTARTS-"*.log; then cause="$cause, by the watchdog"; fi
  checkpoint=$(newest_checkpoints)
  note "$cause"
  if [[ -n $failure ]]; then
    failures=$(tail -n "${RETRIES:-3}" "$REQUEUES" | grep -v '"cause": "signal"' |
      grep -c "\"job\": $SLURM_JOB_ID, .*\"checkpoint\": \"$checkpoint\"" || true)
    if ((failures >= ${RETRIES:-3})); then
      echo "error: $failures failures in a row without a new checkpoint: not requeued" >&2
      exit 1
    fi
  fi
  echo "requeued ($cause)"
  scontrol requeue "$SLURM_JOB_ID" || { echo "error: Slurm refuses to requeue: submit again" >&2; exit 1; }
  sleep 60 & wait $!  # until Slurm ends this script
}
