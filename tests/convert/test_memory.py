"""A conversion's peak memory does not grow with the checkpoint: 3 GB, made up on the spot."""

import re
import subprocess
import sys

import pytest

ALLOWED_MB = 300


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["", "-q", "--dtype float16"])
@pytest.mark.parametrize("suffix", [".safetensors", pytest.param(".pt", marks=pytest.mark.torch)])
def test_peak_memory_is_bounded_by_the_largest_tensor(suffix, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "mlx_ifp.convert.benchmark", "--size", "3", "-n", "1",
         "--suffix", suffix, f"--convert-args={arguments}"],
        capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    largest = int(re.search(r"largest tensor +(\d+)", done.stdout)[1])
    peak, estimate = re.search(r"memory +(\d+) MB, .* ([\d,]+) MB", done.stdout).groups()
    assert int(peak) < largest + ALLOWED_MB
    assert int(peak) < int(estimate.replace(",", ""))
