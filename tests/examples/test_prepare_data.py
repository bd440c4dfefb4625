"""``examples/prepare_data.py``, run as a user does."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "prepare_data.py"


def prepare(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, args)], capture_output=True, text=True)


def rows_of(*tasks: str) -> list[dict]:
    return [
        {"messages": [{"role": "user", "content": f"{i}: ü\u2028"}], "task": task}
        for i, task in enumerate(tasks)
    ]


def test_tasks_take_turns(tmp_path):
    rows = rows_of("b", "b", "b", "a", "b", "a")
    file = tmp_path / "all.jsonl"
    file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    counts = ("--train-per-task", 2, "--train-skip-per-task", 1, "--valid-per-task", 1)
    done = prepare(file, file, tmp_path / "data", *counts)
    assert done.returncode == 0, done.stderr
    for split, expected in (("train", [5, 1, 2]), ("valid", [3, 0])):
        lines = (tmp_path / "data" / f"{split}.jsonl").read_bytes().split(b"\n")
        assert [json.loads(line) for line in lines if line] == [rows[i] for i in expected]


def test_a_row_without_a_task_is_named(tmp_path):
    file = tmp_path / "all.jsonl"
    file.write_text('{"task": "a"}\n{"messages": []}\n')
    done = prepare(file, file, tmp_path / "data")
    assert done.returncode == 1
    assert done.stderr == f"prepare_data.py: error: {file}: line 2: there is no task, a string.\n"
