#!/usr/bin/env bash
# Makes MLflow's user for runs, once its server is up; their password reaches it by its standard input.
#   infra/kubernetes/mlflow-user.sh [FOLDER]      of secrets.sh
set -euo pipefail
folder=${1:-${SKIPLANE_HOME:-$HOME/.skiplane}/kubernetes}
# shellcheck source=/dev/null
source "$folder/mlflow_user.env"
# shellcheck disable=SC2016 # the pod's own variables
kubectl --namespace skiplane exec --stdin deployment/mlflow -- bash -ec '
    source /run/secrets/mlflow/mlflow.env
    export MLFLOW_TRACKING_USERNAME=admin MLFLOW_TRACKING_PASSWORD=$MLFLOW_AUTH_ADMIN_PASSWORD
    exec python -c "import sys; from mlflow.server import get_app_client as client; client(\"basic-auth\", \"http://127.0.0.1:5000\").create_user(*sys.stdin.read().split())"
' <<<"$MLFLOW_TRACKING_USERNAME $MLFLOW_TRACKING_PASSWORD"
