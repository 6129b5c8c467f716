#!/usr/bin/env bash
# What skiplane.sbatch runs on each node of its job: bash infra/slurm/node.sh FOLDER HEAD:PORT COMMAND...
# Ray is started everywhere, the command on the first node.
set -euo pipefail
folder=$1 address=$2
shift 2
[[ -r "$RAY_AUTH_TOKEN_PATH" ]] ||
    { echo "error: $RAY_AUTH_TOKEN_PATH is not seen on $(hostname); set SKIPLANE_HOME to a folder that all nodes share" >&2 && exit 2; }
(umask 077 && mkdir -p "$RAY_TMPDIR")
[[ -O "$RAY_TMPDIR" && ! -L "$RAY_TMPDIR" && "$(stat --format=%a "$RAY_TMPDIR")" == 700 ]] ||
    { echo "error: $RAY_TMPDIR on $(hostname) is not this user's own folder of mode 700, and others could change the job's code there; remove it, and look who made it" >&2 && exit 2; }
# The ports of infra/start.sh: a node is this job's alone.
ray=(ray symmetric-run --address "$address" --min-nodes "$SLURM_JOB_NUM_NODES"
    --log-color=false --num-cpus="$SLURM_CPUS_ON_NODE" --object-store-memory=500000000
    --dashboard-host=127.0.0.1 --dashboard-port=8265
    --node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 --dashboard-agent-grpc-port=6383
    --dashboard-agent-listen-port=52365 --metrics-export-port=8080 --min-worker-port=10002 --max-worker-port=10999)
if ((SLURM_PROCID == 0)); then
    # Ray gives up a start after 30 s, which cannot be set: three times, before the job's place in the queue is given up.
    for _ in 1 2 3; do
        [[ -e "$folder/code" ]] || "${ray[@]}" -- bash infra/slurm/driver.sh "$folder" "$address" "$@" || true
    done
else
    while true; do # a node whose Ray has ended comes back, and the run may take it up; this task ends with the first node's
        "${ray[@]}" -- true || true
        sleep 5
    done
fi
