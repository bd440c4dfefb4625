#!/usr/bin/env bash
# The default model from nothing but its source, in one command with a time limit:
#
#   bash default_model.sh --minutes 8 [--gguf FILE | --model DIR] [--prompts FILE]
#       [--valid-prompts FILE] [--output DIR] [--tiny]
#
# Everything is written to --output (default: default_model in the current directory). Then it is
# joined and cut into DIR/parts/part-00, part-01, ... of at most 15 MiB, to be carried over a narrow
# line. Join them with: cat part-* | tar xz
set -u
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
output=default_model
args=()
while [ $# -gt 0 ]; do
    case $1 in
        --output) output=${2:?"default_model.sh: --output needs a directory"}; shift 2 ;;
        --output=*) output=${1#*=}; shift ;;
        *) args+=("$1"); shift ;;
    esac
done

"$python" "$here/default_model.py" --output "$output" ${args[@]+"${args[@]}"}
status=$?
# Without results there is nothing to carry home.
[ -f "$output/timing.json" ] || exit $status

mkdir "$output/parts"
tar -C "$output" --exclude ./parts -cz . | split -b 15M -d - "$output/parts/part-"
count=$(ls "$output/parts" | wc -l)
echo "$output: $(du -sm "$output/parts" | cut -f1) MiB in $count parts of at most 15 MiB"
exit $status
