"""``examples/gpu_figures.py``: what it says of checks, and all of it, small, on this device."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "gpu_figures.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("gpu_figures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(folder: Path, device: str, check: str, array: list[float] | None, **more) -> None:
    with open(folder / f"{device}.jsonl", "a") as file:
        print(json.dumps({"check": check, "begins": True}), file=file)
        print(json.dumps({"check": check, "seconds": 1, **more}), file=file)
    if array is not None:
        np.savez(folder / f"{device}-{check}.npz", logits=np.array(array))


def test_numbers_are_compared_and_what_is_missing_is_a_failure(script, tmp_path):
    for device, last in (("device", 1.0), ("cpu", 1.0)):
        result(tmp_path, device, "same", [1.0, last], limit=1e-4)
    for device, last in (("device", 1.1), ("cpu", 1.0)):
        result(tmp_path, device, "other", [1.0, last], limit=1e-4)
    result(tmp_path, "device", "nan", [1.0, float("nan")], limit=1e-4)
    result(tmp_path, "cpu", "nan", [1.0, 1.0], limit=1e-4)
    result(tmp_path, "device", "alone", [1.0], limit=1e-4)
    result(tmp_path, "device", "own", None, limit=1e-4, error=1e-3)
    result(tmp_path, "device", "broken", None, failed="ValueError: no")
    names = ["same", "other", "nan", "alone", "own", "broken", "dead", "late"]
    judged = script.judge(tmp_path, names, {"dead": "the process ended (-11)"})
    assert [one["check"] for one in judged if one["ok"]] == ["same"]
    text = script.summary(judged, [])
    for said in ("ValueError: no", "the process ended (-11)", "not begun in time", "CPU's part"):
        assert said in text


@pytest.mark.slow
def test_all_of_it_runs_small(tmp_path):
    where = ("--output", tmp_path / "out", "--work", tmp_path / "work")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--scale", "16", "--quick", "--seconds", "280", *where],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = (tmp_path / "out" / "checks.jsonl").read_text().splitlines()
    assert all(json.loads(line)["ok"] for line in checks)
    lines = [json.loads(line) for line in (tmp_path / "out" / "table.jsonl").open()]
    decoded = [line for line in lines if line["what"] == "decode"]
    assert {(line["prompt_tokens"], line["samples"]) for line in decoded} == {
        (tokens, samples) for tokens in (48, 16) for samples in (1, 4)
    }
    assert len(decoded[-1]["rows"]) == 4
    assert list((tmp_path / "work").iterdir()) == []
