#!/bin/sh
# Runs a command with secrets in its environment: a file in /run/secrets whose name is a variable's, in capitals, becomes
# that variable. Other secrets stay files. Plain sh, because images that are not ours start by it too.
set -eu

for file in /run/secrets/*; do
    name=${file##*/}
    case "$name" in
    '*' | [0-9]* | *[!A-Z0-9_]*) continue ;;
    esac
    if [ ! -r "$file" ]; then
        echo "error: $file cannot be read by user $(id -u); SKIPLANE_UID in .env must be the owner of the files in secrets/" >&2
        exit 2
    fi
    export "$name=$(cat "$file")"
done
exec "$@"
