"""mlx_ifp.synthesize as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlx_lm.utils import load_tokenizer

from mlx_ifp.checkpoint.config import TextConfig
from mlx_ifp.commands.synthesize.command import run
from mlx_ifp.commands.synthesize.options import setup_arg_parser
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError
from mlx_ifp.tuner.data import load_examples

SCRIPT = Path(sys.executable).with_name("mlx_ifp.synthesize")


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def synthesize(*args: object) -> None:
    """The command, in this process."""
    run(setup_arg_parser().parse_args([str(arg) for arg in args]))


def test_a_file_is_written_continued_and_trained_on(chat_model, tmp_path, capsys):
    output = tmp_path / "data" / "train.jsonl"
    options = ("--model", chat_model, "--output", output, "--batch-size", 4)
    synthesize(*options, "--count", 6, "--max-answer-tokens", 12)
    assert "6 new rows (6 own)" in capsys.readouterr().out
    first = rows_of(output)
    assert len(first) == 6
    # The process was killed while it wrote the next row.
    with open(output, "a") as file:
        file.write('{"messages": [{"role"')
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Name a river."}\n{"prompt": "Name a river."}\n')
    synthesize(*options, "--count", 8, "--prompts", prompts, "--resume")
    assert "3 new rows (2 own, 1 given)" in capsys.readouterr().out
    rows = rows_of(output)
    assert rows[:6] == first and len(rows) == 9
    asked = [row["messages"][0]["content"] for row in rows]
    assert len(set(asked)) == 9 and "Name a river." in asked
    tokenizer = load_tokenizer(chat_model)
    examples = load_examples(str(output.parent), tokenizer, tokenizer, TextConfig())["train"]
    assert [example.task for example in examples] == [row["task"] for row in rows]


def test_the_whole_llm_of_a_checkpoint_writes(chat_model, tmp_path):
    checkpoint = convert(str(chat_model), tmp_path / "ifp", keep=64)
    files = [tmp_path / "of-model.jsonl", tmp_path / "of-checkpoint.jsonl"]
    for model, file in zip((chat_model, checkpoint), files, strict=True):
        synthesize("--model", model, "--output", file, "--count", 3)
    assert rows_of(files[0]) == rows_of(files[1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--count 2 --output there.jsonl", "already exists; --resume appends"),
        ("--output new.jsonl", "Name --count"),
        ("--output new.jsonl --prompts there.jsonl --tasks t.yaml", "needs --count"),
        ("--output new.jsonl --count 2 --tasks t.yaml", "must map names"),
        ("--output new.jsonl --prompts empty.jsonl", "no message of a user"),
        ("--output texts.jsonl --count 2 --resume --model .", "line 1: this is no row"),
        ("--output new.jsonl --count 2 --top-p 2", "--top-p must be"),
        ("--output new.jsonl --count 2 --model nowhere", "nowhere is not"),
        ("--output nowhere/new.jsonl --count 2 --model nowhere", "nowhere is not"),
    ],
)
def test_what_cannot_be_done_changes_nothing(tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("there.jsonl").write_text('{"prompt": "Hi"}\n')
    Path("texts.jsonl").write_text('{"text": "Hi"}\n')
    Path("empty.jsonl").write_text("")
    Path("t.yaml").write_text("cars: []\n")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(IFPError, match=words):
        synthesize("--model", "nowhere", *options.split())
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before


def test_ctrl_c_keeps_every_row(chat_model, tmp_path):
    output = tmp_path / "train.jsonl"
    process = subprocess.Popen(
        [SCRIPT, "--model", chat_model, "--output", output, "--count", "9999", "--batch-size", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not (output.exists() and output.read_text().count("\n") > 3):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume goes on" in errors and errors.endswith("mlx_ifp.synthesize: interrupted\n")
    assert "Traceback" not in errors
    assert output.read_text().endswith("\n") and len(rows_of(output)) > 3
