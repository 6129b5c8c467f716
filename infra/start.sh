#!/usr/bin/env bash
# Starts a Ray node of a cluster that Skiplane trains on, with the token required and every port fixed.
#   infra/start.sh head [--insecure] [options of `ray start`]
#   infra/start.sh worker HOST:6379 [--insecure] [options of `ray start`]
# infra/ray.env gives what the environment does not. What is missing or unsafe is refused, exit code 2. Options come last
# on ray's line, and there the last one wins: a port that is taken may be another.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
min_token=32 # characters: 128 bits in hexadecimal digits

refuse() {
    echo "error: $1" >&2
    exit 2
}

check_token() {
    local file=${RAY_AUTH_TOKEN_PATH:-} make="umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > FILE" mode token
    [[ "$RAY_AUTH_MODE" == token ]] ||
        refuse "RAY_AUTH_MODE is '$RAY_AUTH_MODE'; it must be token, or whoever reaches this node runs commands on it (--insecure starts without)"
    [[ -z "${RAY_AUTH_TOKEN:-}" ]] ||
        refuse "RAY_AUTH_TOKEN is set, and every process on this node could read it there; unset it, and name a file of mode 0600 in RAY_AUTH_TOKEN_PATH"
    [[ -n "$file" ]] ||
        refuse "RAY_AUTH_TOKEN_PATH is not set; name the file with the cluster's token, the same on every node ($make)"
    [[ -f "$file" && -r "$file" ]] ||
        refuse "RAY_AUTH_TOKEN_PATH is $file, which cannot be read; copy the cluster's token there, or make one on the head ($make)"
    mode=$(stat --dereference --format=%a "$file")
    (((8#$mode & 8#077) == 0)) ||
        refuse "RAY_AUTH_TOKEN_PATH is $file, of mode $mode, which lets others read the token; chmod 600 it, and make a new token if others were here"
    token=$(tr -d '[:space:]' <"$file")
    ((${#token} >= min_token)) ||
        refuse "RAY_AUTH_TOKEN_PATH is $file, which holds ${#token} characters; a token has $min_token or more ($make)"
}

check_alone() { # DASHBOARD_HOST: nobody else may reach a dashboard that asks for no token
    [[ "$1" =~ ^(127\.[0-9.]+|localhost|::1)$ ]] ||
        refuse "--dashboard-host is $1 and --insecure is given; everybody who reaches it could run commands: use 127.0.0.1 (and ssh -L), or a token"
    export RAY_AUTH_MODE=disabled
    echo "warning: --insecure: this node asks nobody for a token; whoever reaches its ports runs commands as $(id -un) on every node of the cluster" >&2
}

role=${1:-}
case "$role" in
head) node=(--head --port=6379 --dashboard-host=127.0.0.1 --dashboard-port=8265 --ray-client-server-port=10001) && shift ;;
worker)
    [[ "${2:-}" =~ ^[^[:space:]/-][^[:space:]/]*:[0-9]+$ ]] || refuse "worker needs the head's address, not '${2:-}': infra/start.sh worker HOST:6379"
    node=(--address="$2") && shift 2
    ;;
*) refuse "'$role' is no role; it is infra/start.sh head, or infra/start.sh worker HOST:6379" ;;
esac

insecure='' dashboard=127.0.0.1 previous='' options=()
for option in "$@"; do
    case "$option" in
    --insecure) insecure=yes ;;
    --dashboard-host=*) dashboard=${option#*=} ;;
    esac
    [[ "$previous" != --dashboard-host ]] || dashboard=$option
    [[ "$option" == --insecure ]] || options+=("$option")
    previous=$option
done

command -v ray >/dev/null || refuse "ray is not on PATH; put the folder of this environment's python there first: jobs are started with it too"
# ray.env as a shell reads it; then again what was set before, which wins.
before=$(export -p)
set -a
# shellcheck source=/dev/null
source "$here/ray.env"
set +a
eval "$before"

if [[ -n "$insecure" ]]; then check_alone "$dashboard"; else check_token; fi

# Of every node. Ray binds all of them but the dashboard to every interface: which ones need a firewall is in SECURITY.md.
exec ray start "${node[@]}" --node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
    --dashboard-agent-grpc-port=6383 --dashboard-agent-listen-port=52365 --metrics-export-port=8080 \
    --min-worker-port=10002 --max-worker-port=10999 "${options[@]}"
