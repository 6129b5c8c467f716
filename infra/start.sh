#!/usr/bin/env bash
# Starts a Ray node of a cluster that Skiplane trains on, with the token required and every port fixed.
#   infra/start.sh head [--insecure] [options of `ray start`]
#   infra/start.sh worker HOST:6379 [--insecure] [options of `ray start`]
# infra/ray.env and ~/.skiplane/secrets.env (SKIPLANE_SECRETS names another; mode 0600) give what the environment does not.
# What is missing or unsafe is refused, exit code 2. Options come last on ray's line, and there the last one wins: a port
# that is taken may be another.
set -euo pipefail
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
min_token=32 # characters: 128 bits in hexadecimal digits

check_token() {
    local file=${RAY_AUTH_TOKEN_PATH:-} make="umask 077; python -c 'import secrets; print(secrets.token_hex(32))' > FILE" token
    [[ "$RAY_AUTH_MODE" == token ]] ||
        refuse "RAY_AUTH_MODE is '$RAY_AUTH_MODE'; it must be token, or whoever reaches this node runs commands on it (--insecure starts without)"
    [[ -z "${RAY_AUTH_TOKEN:-}" ]] ||
        refuse "RAY_AUTH_TOKEN is set, and every process on this node could read it there; unset it, and name a file of mode 0600 in RAY_AUTH_TOKEN_PATH"
    [[ -n "$file" ]] ||
        refuse "RAY_AUTH_TOKEN_PATH is not set; name the file with the cluster's token, the same on every node ($make)"
    [[ -f "$file" && -r "$file" ]] ||
        refuse "RAY_AUTH_TOKEN_PATH is $file, which cannot be read; copy the cluster's token there, or make one on the head ($make)"
    private RAY_AUTH_TOKEN_PATH "$file"
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

own_folder() { # of this user alone: Ray opens its own below to everybody, with its sockets and the jobs' code
    local folder=${RAY_TMPDIR:-/tmp}/skiplane-$EUID
    mkdir --mode=700 "$folder" 2>/dev/null || true
    [[ -d "$folder" && -O "$folder" && ! -L "$folder" && "$(stat --format=%a "$folder")" == *700 ]] ||
        refuse "$folder is where Ray's sessions would lie, and it is not this user's own folder of mode 700; remove it, and look who made it, or give --temp-dir"
    node+=(--temp-dir="$folder/node")
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

insecure='' dashboard=127.0.0.1 temp='' previous='' options=()
for option in "$@"; do
    case "$option" in
    --insecure) insecure=yes ;;
    --dashboard-host=*) dashboard=${option#*=} ;;
    --temp-dir | --temp-dir=*) temp=given ;;
    esac
    [[ "$previous" != --dashboard-host ]] || dashboard=$option
    [[ "$option" == --insecure ]] || options+=("$option")
    previous=$option
done

command -v ray >/dev/null || refuse "ray is not on PATH; put the folder of this environment's python there first: jobs are started with it too"
if [[ -n "$insecure" ]]; then check_alone "$dashboard"; else check_token; fi
[[ -n "$temp" ]] || own_folder

# Of every node. Ray binds all of them but the dashboard to every interface: which ones need a firewall is in SECURITY.md.
exec ray start "${node[@]}" --node-manager-port=6380 --object-manager-port=6381 --runtime-env-agent-port=6382 \
    --dashboard-agent-grpc-port=6383 --dashboard-agent-listen-port=52365 --metrics-export-port=8080 \
    --min-worker-port=10002 --max-worker-port=10999 "${options[@]}"
