#!/usr/bin/env bash
# Makes what compose.yaml reads and nobody else may: secrets/ (one file each, mode 0600), .env (whose they are) and store/
# (the buckets). Containers run as that user; where root makes them they are user 1000's, so that no container is root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
umask 077

refuse() {
    echo "error: $1" >&2
    exit 2
}

random() { # BYTES, as hexadecimal digits
    od -An -v -N "$1" -t x1 /dev/urandom | tr -d ' \n'
}

for made in secrets .env; do
    [[ ! -e "$made" ]] ||
        refuse "$PWD/$made is there already and is kept: MLflow and PostgreSQL know the passwords of their first start for ever; to begin anew delete the database too (docker compose down --volumes), then secrets/ and .env"
done

uid=$(id -u) gid=$(id -g)
((uid)) || uid=1000 gid=1000
new=$(mktemp -d secrets.XXXXXX)
trap 'rm -rf "$new"' EXIT
for name in ray_token PGPASSWORD MLFLOW_AUTH_ADMIN_PASSWORD MLFLOW_FLASK_SERVER_SECRET_KEY AWS_SECRET_ACCESS_KEY; do
    random 32 >"$new/$name"
done
random 10 >"$new/AWS_ACCESS_KEY_ID"
mkdir -p store
(($(id -u))) || chown -R "$uid:$gid" "$new" store
mv "$new" secrets
printf 'SKIPLANE_UID=%s\nSKIPLANE_GID=%s\n' "$uid" "$gid" >.env
echo "made $PWD/secrets, .env and store; the password of MLflow's user admin is in secrets/MLFLOW_AUTH_ADMIN_PASSWORD"
