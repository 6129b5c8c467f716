#!/usr/bin/env bash
# What node.sh runs on the first node: bash infra/slurm/driver.sh FOLDER HEAD:PORT COMMAND...
# FOLDER/driver is the command's pid, to send it a signal; FOLDER/code its exit code; FOLDER/stop says that it need not begin.
set -euo pipefail
folder=$1 code=0
export RAY_ADDRESS=$2
shift 2
# Not in the background: there a shell lets its children ignore SIGINT.
(
    echo "$BASHPID" >"$folder/driver"
    [[ ! -e "$folder/stop" ]] || exit 130
    exec "$@"
) || code=$?
echo "$code" >"$folder/code"
