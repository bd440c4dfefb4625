"""Standard streams that are closed, broken or narrow: no traceback, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_ifp.selection.files import load_selection

from ..conftest import run_command

SCRIPTS = Path(sys.executable).parent


def shell(line: str, **environment: str) -> subprocess.CompletedProcess:
    """Run a line of shell, in which $BIN is where the scripts are."""
    env = os.environ | {"BIN": str(SCRIPTS)} | environment
    return subprocess.run(["/bin/sh", "-c", line], capture_output=True, env=env, timeout=300)


@pytest.fixture
def accented(tiny_checkpoint, tmp_path) -> Path:
    """A checkpoint whose every answer has characters that ASCII lacks."""
    path = shutil.copytree(tiny_checkpoint, tmp_path / "accented")
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    pattern = {"type": "Replace", "pattern": {"Regex": "."}, "content": "é"}
    tokenizer["decoder"] = {"type": "Sequence", "decoders": [tokenizer["decoder"], pattern]}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    return path


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "ascii:surrogateescape"])
def test_a_narrow_stdout_gets_the_answer(accented, tmp_path, encoding):
    stats = tmp_path / "stats.json"
    done = run_command(
        "generate", "--model", accented, "-p", "é", "-m", 4, "--stats", stats,
        "--dense", "--verbose", "F",
        env=os.environ | {"PYTHONIOENCODING": encoding}, encoding="latin-1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert ("é" if encoding == "latin-1" else "?") in done.stdout
    assert json.loads(stats.read_text())["decode"]["tokens"] == 4


def test_a_narrow_stdout_shows_a_task(tiny_checkpoint):
    task = "naïve 🦊"
    assert not run_command(
        "tasks", "add", "t", "--model", tiny_checkpoint, "--task", task
    ).returncode
    shown = run_command(
        "tasks", "show", "t", "--model", tiny_checkpoint,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"}, encoding="latin-1",
    )  # fmt: skip
    assert shown.returncode == 0
    assert shown.stdout.endswith("naïve ?\n")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_streams_may_be_closed(tiny_checkpoint, tmp_path, closed):
    done = shell(
        f"$BIN/mlx_ifp.generate --model {tiny_checkpoint} -p Hi -m 2 "
        f"--stats {tmp_path}/s.json --save-selection {tmp_path}/s.safetensors {closed}"
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["decode"]["tokens"] == 2


def test_errors_need_no_streams(tiny_checkpoint):
    done = shell(f"$BIN/mlx_ifp.generate --model {tiny_checkpoint} -p - <&- >&-")
    assert done.returncode == 1
    assert done.stderr.endswith(
        b"The prompt is empty; give some text with --prompt, or - and stdin.\n"
    )
    done = shell("$BIN/mlx_ifp.generate --model nowhere -p x >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", b"")


@pytest.mark.parametrize("command", ["mlx_ifp --help", "mlx_ifp --version"])
def test_a_full_disk_is_one_line(command):
    done = shell(f"$BIN/{command} > /dev/full")
    assert done.returncode == 1
    assert (
        done.stderr.endswith(b"error: No space left on device\n") and done.stderr.count(b"\n") == 1
    )


def test_a_reader_may_go(tiny_checkpoint):
    done = shell(f"$BIN/mlx_ifp.generate --model {tiny_checkpoint} -p Hi -m 99 --verbose F | true")
    assert done.stderr == b""


def test_a_prompt_of_another_system_is_the_same_prompt(tiny_checkpoint, tmp_path):
    (tmp_path / "a").write_bytes("Où? Là.".encode())
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf" + "Où? Là.\r\n".encode())
    answers = []
    for name in "ab":
        done = shell(
            f"cd {tmp_path} && $BIN/mlx_ifp.generate --model {tiny_checkpoint} -p - -m 8 "
            f"--task-file {name} --verbose F --save-selection {name}.safetensors < {name}",
            PYTHONIOENCODING="ascii",
        )
        assert done.returncode == 0, done.stderr
        answers.append(done.stdout)
    a, b = (load_selection(tmp_path / f"{name}.safetensors") for name in "ab")
    assert answers[0] == answers[1]
    assert a.overlap(b)[0] == 1.0
