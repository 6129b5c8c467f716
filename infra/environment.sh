#!/usr/bin/env bash
# To be sourced, before anything else: the environment of `ray start`, and how the scripts that need it refuse.
# ray.env beside this file gives what every cluster has, and secrets.env what nobody else may read (keys of buckets, MLflow's
# password: NAME=value lines); what is set already wins over both. secrets.env lies outside of the repository, whose files go
# into images and travel with jobs.
set -euo pipefail

refuse() { # SENTENCE
    echo "error: $1" >&2
    exit 2
}

private() { # WHAT FILE: nobody else may read it
    local mode
    [[ -f "$2" && -r "$2" ]] || refuse "$1 is $2, which cannot be read"
    mode=$(stat --dereference --format=%a "$2")
    (((8#$mode & 8#077) == 0)) || refuse "$1 is $2, of mode $mode, which lets others read what is secret; chmod 600 it, and make it anew if others were here"
}

# As a shell reads them; then again what was set before.
before=$(export -p)
secrets=${SKIPLANE_SECRETS:-~/.skiplane/secrets.env}
set -a
# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/ray.env"
if [[ -n "${SKIPLANE_SECRETS:-}" || -e "$secrets" ]]; then
    private SKIPLANE_SECRETS "$secrets"
    # shellcheck source=/dev/null
    source "$secrets"
fi
set +a
eval "$before"
unset before secrets
