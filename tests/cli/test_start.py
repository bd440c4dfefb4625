"""How commands start: help needs no MLX, and Ctrl-C is one line from the beginning."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mlx_ifp
from mlx_ifp.cli.dispatch import COMMANDS

SCRIPTS = Path(sys.executable).parent
HEAVY = {"mlx", "mlx_lm", "transformers", "numpy", "huggingface_hub", "tokenizers", "matplotlib"}


def imported(*args: str) -> tuple[int, set[str]]:
    """The exit code of a script, and the packages that it imported."""
    script, *rest = args
    done = subprocess.run(
        [sys.executable, "-X", "importtime", SCRIPTS / script, *rest],
        capture_output=True,
        text=True,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "mlx_ifp" in names
    return done.returncode, names


@pytest.mark.parametrize("command", COMMANDS)
def test_help_and_a_wrong_flag_need_no_mlx(command):
    for script in ([f"mlx_ifp.{command}"], ["mlx_ifp", command]):
        code, names = imported(*script, "-h")
        assert code == 0 and not names & HEAVY
    code, names = imported(f"mlx_ifp.{command}", "--no-such-flag")
    assert code == 2 and not names & HEAVY


@pytest.mark.parametrize(("flag", "expected"), [("--help", 0), ("--version", 0), ("dance", 2)])
def test_the_dispatcher_needs_no_mlx(flag, expected):
    code, names = imported("mlx_ifp", flag)
    assert code == expected and not names & HEAVY


def test_the_package_imports_what_is_asked_for():
    code = (
        "import sys, mlx_ifp\n"
        "mlx_ifp.IFPError\n"
        "assert 'mlx' not in sys.modules and 'numpy' not in sys.modules\n"
        "from mlx_ifp import load\n"
        "assert 'mlx' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert set(mlx_ifp.__all__) <= set(dir(mlx_ifp))
    for name in mlx_ifp.__all__:
        assert getattr(mlx_ifp, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mlx_ifp.lode


# Beside the interpreter, where it runs before everything else.
INTERRUPT = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPT_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupt())
"""


@pytest.mark.parametrize(
    ("script", "module"),
    [
        (["mlx_ifp.generate"], "mlx_ifp.choices"),
        (["mlx_ifp", "generate"], "mlx_ifp.choices"),
        (["mlx_ifp.generate"], "mlx.core"),
        (["mlx_ifp", "generate"], "mlx_lm"),
        (["mlx_ifp.generate"], "mlx_ifp.model"),
    ],
)
def test_ctrl_c_while_it_imports_is_one_line(tmp_path, script, module):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT)
    done = subprocess.run(
        [SCRIPTS / script[0], *script[1:], "-p", "Hello"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path), "INTERRUPT_AT": module},
    )
    assert done.returncode == 130
    assert (done.stdout, done.stderr) == ("", "mlx_ifp.generate: interrupted\n")
