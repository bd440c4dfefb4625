#!/usr/bin/env bash
# What elastic k costs at its ends: three runs from one start on the same batches, then KL to the
# dense model at four k. A run or an evaluation that is there is left as it is, so this can be
# stopped and called again.
#
#   bash elastic.sh smollm2 OUT [ITERS]
set -eu
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
dense=$(realpath "$1") out=$2 iters=${3:-60}
rows=$here/../default_model/conversations.jsonl.gz
mkdir -p "$out" && cd "$out"
[ -f held-out.jsonl ] || {
    zcat "$rows" | sed -n 1,4000p > train.jsonl
    zcat "$rows" | tail -n 20000 | awk 'NR % 800 == 1' | head -n 24 > held-out.jsonl
}
train() {
    "$python" "$here/train.py" --teacher "$dense" --data train.jsonl --max-length 256 \
        --distill-weight 1 --dtype float32 --save-dtype float32 "$@"
}
# The predictor at the beginning, the same for all: the channels that are most active on average.
[ -d start ] || train --model "$dense" --output start --predictor-layers 4 --keep 512 1536 \
    --warm-start-iters 1 --warm-start-examples 48 --batch-tokens 256 \
    --iters 1 --learning-rate 0 --predictor-learning-rate 0
run() {
    [ -d "$1" ] || train --model start --output "$@" --batch-tokens 512 --iters "$iters" \
        --learning-rate 2e-4 --warmup-iters 10 --steps-per-report 5
}
run elastic --keep 512 1536
run fixed-512 --keep 512
run fixed-1152 --keep 1152
for name in start elastic fixed-512 fixed-1152; do
    [ -f $name.json ] || "$python" "$here/evaluate.py" --dense "$dense" --model $name \
        --data held-out.jsonl --keep 512 768 1152 1536 --output $name.json > /dev/null
done
"$python" - <<'PYTHON'
import json

for name in ("start", "elastic", "fixed-512", "fixed-1152"):
    reports = json.load(open(f"{name}.json"))["runs"]["prompt"].values()
    cells = (f"{r['val_kl']:.2f}, {r['agreement']:.0%}" for r in reports)
    print(f"| {name} | {' | '.join(cells)} |")
PYTHON
