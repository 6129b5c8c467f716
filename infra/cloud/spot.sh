#!/usr/bin/env bash
# Runs a worker until its cloud takes the machine back, and tells it to end then: `ray start --block` takes SIGTERM, says that
# this node drains, and the driver saves a checkpoint and goes on without it.
#   infra/cloud/spot.sh aws|gcp DRAIN_SECONDS infra/start.sh worker HOST:6379 --block
# DRAIN_SECONDS: below the notice, which is 120 at Amazon and 30 at Google. A node that is empty sooner ends sooner.
set -euo pipefail
metadata=http://169.254.169.254
cloud=${1:-}
[[ "$cloud" =~ ^(aws|gcp)$ && "${2:-}" =~ ^[0-9]+$ && $# -gt 2 ]] || {
    echo "error: '$*' is not what spot.sh takes; it is infra/cloud/spot.sh aws|gcp DRAIN_SECONDS COMMAND..." >&2
    exit 2
}
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=$2
shift 2

ask() { # PATH, options of curl
    curl --silent --fail --max-time 2 "$metadata/$1" "${@:2}"
}

taken() {
    local token
    case "$cloud" in
    aws) # there is nothing at that path until the notice
        token=$(ask latest/api/token --request PUT --header 'X-aws-ec2-metadata-token-ttl-seconds: 60') &&
            ask latest/meta-data/spot/instance-action --header "X-aws-ec2-metadata-token: $token" >/dev/null
        ;;
    gcp) [[ "$(ask computeMetadata/v1/instance/preempted --header 'Metadata-Flavor: Google')" == TRUE ]] ;;
    esac
}

"$@" &
node=$!
trap 'kill -TERM "$node"' TERM INT
while kill -0 "$node" 2>/dev/null; do
    if taken; then
        echo "this machine is taken back: the node drains" >&2
        kill -TERM "$node"
        break
    fi
    sleep 1
done
code=0
while wait "$node" || code=$?; kill -0 "$node" 2>/dev/null; do code=0; done # again where a signal cut it short
exit "$code"
