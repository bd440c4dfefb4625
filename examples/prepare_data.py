"""Chat data with task names -> the {train,valid}.jsonl of a training run.

    python prepare_data.py instructions-train.jsonl instructions-valid.jsonl data

Each input line is ``{"messages": [...], "task": "math"}``. The first lines of each task are kept,
in turns, so that any beginning of the file holds all tasks. ``--train-skip-per-task`` leaves out
lines that an earlier run has seen.
"""

import argparse
import itertools
import json
from pathlib import Path


def balanced(lines: list[str], per_task: int, skip: int = 0) -> list[str]:
    """The first ``per_task`` lines of each task after ``skip``, one task after another."""
    by_task: dict[str, list[str]] = {}
    for number, line in enumerate(lines, 1):
        try:
            by_task.setdefault(json.loads(line)["task"], []).append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"prepare_data.py: line {number} is no JSON with a task.") from error
    turns = itertools.zip_longest(
        *(rows[skip : skip + per_task] for _, rows in sorted(by_task.items()))
    )
    return [line for turn in turns for line in turn if line is not None]


def main() -> None:
    """Write the two files."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("train", type=Path)
    parser.add_argument("valid", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train-per-task", type=int, default=320)
    parser.add_argument("--train-skip-per-task", type=int, default=0)
    parser.add_argument("--valid-per-task", type=int, default=10)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    parts = (
        ("train", args.train_per_task, args.train_skip_per_task),
        ("valid", args.valid_per_task, 0),
    )
    for split, per_task, skip in parts:
        # Of bytes, since str.splitlines knows ends of lines that JSON allows in a string.
        try:
            lines = [line.decode() for line in getattr(args, split).read_bytes().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise SystemExit(f"prepare_data.py: {error}") from error
        rows = balanced(lines, per_task, skip)
        (args.output / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
        print(f"{args.output / split}.jsonl: {len(rows)} examples")


if __name__ == "__main__":
    main()
