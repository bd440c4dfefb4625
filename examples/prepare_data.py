"""Chat data with task names becomes the {train,valid}.jsonl of a training run.

    python prepare_data.py instructions-train.jsonl instructions-valid.jsonl data

Each input line is ``{"messages": [...], "task": "math"}``. The first lines of each task are kept.
Tasks take turns, so that any beginning of the file has all tasks. ``--train-skip-per-task`` leaves
out lines that an earlier run has seen.
"""

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

from mlx_ifp.cli.dispatch import script
from mlx_ifp.errors import IFPError
from mlx_ifp.files.jsonl import read_jsonl


def balanced(path: Path, per_task: int, skip: int = 0) -> list[str]:
    """The first ``per_task`` rows of each task after ``skip``, in turns, as lines of JSON."""
    by_task: dict[str, list[str]] = {}

    def keep(row: dict[str, Any], _: int) -> None:
        if not isinstance(row.get("task"), str):
            raise IFPError("there is no task, a string.")
        by_task.setdefault(row["task"], []).append(json.dumps(row, ensure_ascii=False))

    read_jsonl(path, keep)
    turns = itertools.zip_longest(
        *(rows[skip : skip + per_task] for _, rows in sorted(by_task.items()))
    )
    return [line for turn in turns for line in turn if line is not None]


@script
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
        rows = balanced(getattr(args, split), per_task, skip)
        (args.output / f"{split}.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        print(f"{args.output / split}.jsonl: {len(rows)} examples")


if __name__ == "__main__":
    main()
