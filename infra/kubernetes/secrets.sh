#!/usr/bin/env bash
# Makes the secrets, each once, as files of mode 0600 outside of the repository, and gives them to Kubernetes from there:
# none of them is ever on a command line or in a YAML.
#   infra/kubernetes/secrets.sh [FOLDER]      default: ~/.skiplane/kubernetes
set -euo pipefail
umask 077
folder=${1:-${SKIPLANE_HOME:-$HOME/.skiplane}/kubernetes}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

new() { # 64 hexadecimal digits, without a newline: Kubernetes would hand it on
    od --address-radix=n --read-bytes=32 --format=x1 /dev/urandom | tr -d ' \n'
}

give() { # SECRET, what `kubectl create secret generic` takes it from
    kubectl --namespace skiplane get secret "$1" --output name >/dev/null 2>&1 ||
        kubectl --namespace skiplane create secret generic "$@"
}

mkdir -p "$folder" && cd "$folder"
[[ -s ray_token ]] || new >ray_token
[[ -s postgres_password ]] || new >postgres_password
[[ -s mlflow_password ]] || new >mlflow_password
[[ -s mlflow.env ]] || cat >mlflow.env <<END
MLFLOW_FLASK_SERVER_SECRET_KEY=$(new)
MLFLOW_AUTH_ADMIN_PASSWORD=$(new)
PGPASSWORD=$(<postgres_password)
END
[[ -s mlflow_user.env ]] || cat >mlflow_user.env <<END
MLFLOW_TRACKING_USERNAME=skiplane
MLFLOW_TRACKING_PASSWORD=$(<mlflow_password)
END

kubectl apply --filename "$here/base/namespace.yaml"
give ray-token --from-file=auth_token=ray_token
give postgres --from-file=password=postgres_password
give mlflow --from-file=mlflow.env
give mlflow-user --from-env-file=mlflow_user.env
echo "the secrets are in $folder; RAY_AUTH_TOKEN_PATH=$folder/ray_token is the cluster's token"
