"""The training benchmark as users run it."""

import re
import subprocess
import sys

import pytest


def _run(*args: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "mlx_ifp.commands.benchmark.training", *map(str, args)]
    # It starts two trainings, and other tests run beside it.
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


def test_both_train_and_are_compared(dense_llama):
    result = _run("--model", dense_llama, "--keep", 64, "--tokens", 16, "--batch-size", 2,
                  "--steps", 1, "-n", 2)  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = {}
    for name in ("mlx-lm, full", "mlx_ifp"):
        found = re.search(rf"^{name} +([\d.]+) \(([\d.]+)-([\d.]+)\) +(\d+)$", result.stdout, re.M)
        rows[name] = [float(number) for number in found.groups()]
        median, low, high, _ = rows[name]
        assert 0 < low <= median <= high
    speed = float(re.search(r"tokens/s, mlx_ifp / mlx-lm: +([\d.]+)", result.stdout)[1])
    ours, theirs = rows["mlx_ifp"], rows["mlx-lm, full"]
    assert ours[1] / theirs[2] - 0.01 <= speed <= ours[2] / theirs[1] + 0.01
    assert re.search(r"peak memory, mlx_ifp / mlx-lm: \d+\.\d\d$", result.stdout, re.M)


def test_a_model_that_is_not_there_is_one_line(tmp_path):
    result = _run("--model", tmp_path / "nothing", "-n", 1)
    assert result.returncode == 1
    assert "nothing" in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("keep", "words"), [("100000", "d_ffn"), ("64,64,64", "one number")])
def test_a_wrong_k_is_one_line_before_anything_is_measured(dense_llama, keep, words):
    # A round of so many steps would take longer than the test may.
    result = _run("--model", dense_llama, "--keep", keep, "-n", 1, "--steps", 1_000_000)
    assert result.returncode == 1
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1
