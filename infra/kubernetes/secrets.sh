#!/usr/bin/env bash
# Makes the secrets, each once, as files of mode 0600 outside of the repository, and gives them to Kubernetes from there:
# none of them is ever on a command line or in a YAML. Where Kubernetes has others than the files it is refused, exit code
# 2: the token that this tells would not be the cluster's.
#   infra/kubernetes/secrets.sh [FOLDER]      default: ~/.skiplane/kubernetes
set -euo pipefail
umask 077
folder=${1:-${SKIPLANE_HOME:-$HOME/.skiplane}/kubernetes}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

refuse() {
    echo "error: $1" >&2
    exit 2
}

new() { # 64 hexadecimal digits, without a newline: Kubernetes would hand it on
    od --address-radix=n --read-bytes=32 --format=x1 /dev/urandom | tr -d ' \n'
}

kept() { # SECRET: what Kubernetes has of it; nothing where there is none
    kubectl --namespace skiplane get secret "$1" --ignore-not-found --output 'jsonpath={.data}' ||
        refuse "kubectl could not tell whether there is a secret $1; its own words are above: the cluster has to answer, and you have to have rights to its secrets"
}

lacks() { # FILE, its SECRET: whether the file has to be made
    local there
    [[ ! -s "$1" ]] || return 1
    there=$(kept "$2") || exit
    [[ -z "$there" ]] ||
        refuse "Kubernetes has the secret $2 and $folder has no $1; copy that folder from whoever made it, or begin anew without the namespace skiplane and all that is in it"
}

give() { # SECRET, what `kubectl create secret generic` takes it from
    local there
    there=$(kept "$1") || exit
    if [[ -z "$there" ]]; then
        kubectl --namespace skiplane create secret generic "$@"
    else
        [[ "$there" == "$(kubectl --namespace skiplane create secret generic "$@" --dry-run=client --output 'jsonpath={.data}')" ]] ||
            refuse "the secret $1 in Kubernetes is not what $folder holds; copy that folder from whoever made it, or, where the files are right, kubectl --namespace skiplane delete secret $1, run this again, and restart what uses it"
    fi
}

mkdir -p "$folder" && cd "$folder"
if lacks ray_token ray-token; then new >ray_token; fi
if lacks postgres_password postgres; then new >postgres_password; fi
if lacks mlflow_password mlflow-user; then new >mlflow_password; fi
if lacks mlflow.env mlflow; then
    cat >mlflow.env <<END
MLFLOW_FLASK_SERVER_SECRET_KEY=$(new)
MLFLOW_AUTH_ADMIN_PASSWORD=$(new)
PGPASSWORD=$(<postgres_password)
END
fi
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
