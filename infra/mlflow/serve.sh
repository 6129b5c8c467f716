#!/usr/bin/env bash
# Starts an MLflow server for a team: PostgreSQL, an object store, a password for everybody. All that it needs is in the
# environment (mlflow.env and secrets), nothing on the command line; what is missing or unsafe is refused, exit code 2.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
    echo "error: $1" >&2
    exit 2
}

require() { # NAME, what to do
    [[ -n "${!1:-}" ]] || refuse "$1 is not set; $2"
}

off() { # NAME, what it would do
    [[ "${!1:-}" == false ]] || refuse "$1 is '${!1:-}'; it must be false, because $2"
}

for name in MLFLOW_HOST MLFLOW_PORT MLFLOW_BACKEND_STORE_URI MLFLOW_ARTIFACTS_DESTINATION MLFLOW_SERVER_ALLOWED_HOSTS; do
    require "$name" "read mlflow.env first (set -a; source mlflow.env; set +a)"
done
off MLFLOW_SERVER_ENABLE_JOB_EXECUTION "jobs run code on this host"
off MLFLOW_ALLOW_PICKLE_DESERIALIZATION "a pickled model runs code when it is loaded"
off MLFLOW_ENABLE_REMOTE_ASSISTANT "the assistant may run commands on this host"
off MLFLOW_ENABLE_AI_GATEWAY "the gateway calls other services with this server's keys"
[[ -z "${MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE:-}" ]] ||
    refuse "MLFLOW_SERVER_DISABLE_SECURITY_MIDDLEWARE is set; unset it, or nobody checks the Host header"
# A pattern of stars, a port and nothing else is any host: *, **, *:5000, *.*
[[ ! ",${MLFLOW_SERVER_ALLOWED_HOSTS//[[:space:]]/}," =~ ,([*?:0-9]*[*?][*?:0-9]*|[.*?]*[*?][.*?]*(:[*?0-9]*)?), ]] ||
    refuse "MLFLOW_SERVER_ALLOWED_HOSTS is '$MLFLOW_SERVER_ALLOWED_HOSTS'; name the hosts that clients use, such as mlflow.example.org"
origins="${MLFLOW_SERVER_CORS_ALLOWED_ORIGINS:-}"
[[ ! ",${origins//[[:space:]]/}," =~ ,\*+, ]] ||
    refuse "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS is '$origins'; name the pages that may ask, such as https://mlflow.example.org, or unset it"

options=()
case "${AUTHENTICATION:-basic}" in
basic)
    require MLFLOW_FLASK_SERVER_SECRET_KEY "put 32 random bytes into secrets.env (python -c 'import secrets; print(secrets.token_hex(32))')"
    export MLFLOW_AUTH_CONFIG_PATH="${MLFLOW_AUTH_CONFIG_PATH:-$here/basic_auth.ini}"
    [[ -r "$MLFLOW_AUTH_CONFIG_PATH" ]] || refuse "MLFLOW_AUTH_CONFIG_PATH is $MLFLOW_AUTH_CONFIG_PATH, which cannot be read"
    options+=(--app-name basic-auth)
    ;;
none)
    [[ "$MLFLOW_HOST" =~ ^(127\.[0-9.]+|localhost|::1)$ ]] ||
        refuse "MLFLOW_HOST is $MLFLOW_HOST and AUTHENTICATION is none; everybody could delete everything: use basic, or 127.0.0.1"
    ;;
*) refuse "AUTHENTICATION is '$AUTHENTICATION'; use basic or none" ;;
esac

unset MLFLOW_TRACKING_URI # a client's: the server would take itself for one
exec "${PYTHON:-python}" -m mlflow server "${options[@]}"
