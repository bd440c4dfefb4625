"""The package's own model, which every command uses if none is named."""

import importlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import mlx_ifp.checkpoint.locate
from mlx_ifp import IFPError, load

from .conftest import run_command

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def default_model(predictor_checkpoint, monkeypatch):
    """A tiny one in the place of the real one."""
    monkeypatch.setattr(mlx_ifp.checkpoint.locate, "DEFAULT_MODEL", predictor_checkpoint)
    return predictor_checkpoint


def run_main(monkeypatch, name, *args):
    """A command in this process, where the default can be replaced."""
    monkeypatch.setattr(sys, "argv", [f"mlx_ifp.{name}", *map(str, args)])
    importlib.import_module(f"mlx_ifp.commands.{name}").main()


def test_load_without_a_name(default_model):
    model, tokenizer = load(cache=False)
    assert model.checkpoint.path == default_model
    assert model.select("Name three rivers.").k == 64
    assert load(None, cache=False)[1].vocab_size == tokenizer.vocab_size


def test_generate(default_model, monkeypatch, capsys):
    run_main(monkeypatch, "generate", "-p", "Hello", "-m", "4")
    without = capsys.readouterr().out
    run_main(monkeypatch, "generate", "--model", default_model, "-p", "Hello", "-m", "4")
    assert without == capsys.readouterr().out != ""


def test_the_other_commands(default_model, monkeypatch, tmp_path):
    file = tmp_path / "prompt.safetensors"
    run_main(monkeypatch, "cache_prompt", "-p", "A text.", "--prompt-cache-file", file)
    assert file.exists()
    run_main(monkeypatch, "export", "--dense", "--save-path", tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").exists()
    benchmark = importlib.import_module("mlx_ifp.commands.benchmark.options")
    assert benchmark.setup_arg_parser().parse_args([]).model is None


def test_one_line_if_it_is_missing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(mlx_ifp.checkpoint.locate, "DEFAULT_MODEL", tmp_path / "default_model")
    with pytest.raises(IFPError, match=r"default_model, the default, is missing. Name one with"):
        load()
    for name, *args in (("generate", "-p", "Hello"), ("export", "--dense")):
        with pytest.raises(SystemExit) as ended:
            run_main(monkeypatch, name, *args)
        error = capsys.readouterr().err
        assert ended.value.code == 1
        assert error.count("\n") == 1 and "is missing. Name one with --model" in error


def test_the_wheel_carries_all_its_files(predictor_checkpoint, tmp_path):
    """By way of the sdist, as the package is published."""
    source = tmp_path / "source"
    for name in ("mlx_ifp", "convert"):
        left_out = shutil.ignore_patterns("default_model", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(predictor_checkpoint, source / "mlx_ifp" / "default_model")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path, source]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if name.startswith("mlx_ifp/default_model/")}
    assert names == {
        f"mlx_ifp/default_model/{file.relative_to(predictor_checkpoint).as_posix()}"
        for file in predictor_checkpoint.rglob("*")
        if file.is_file()
    }


def test_the_real_one_answers(tmp_path):
    prompt = "What is the capital of Japan?"
    done = run_command("generate", "--prompt", prompt, "-m", 8, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Tokyo" in done.stdout
    assert "predictor" in done.stderr and "tokens, dense" in done.stderr


def test_the_real_one_is_small_and_selects_by_the_prompt():
    files = [file for file in mlx_ifp.checkpoint.locate.DEFAULT_MODEL.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 95e6
    model, _ = load(cache=False)
    assert model.checkpoint.ifp.k < model.checkpoint.d_ffn
    code, story, again = (
        model.select(text)
        for text in (
            "Write a Python function that sorts a list.",
            "You are an old pirate. Tell me about the sea.",
            "Write a Python function that reverses a string.",
        )
    )
    assert len({code.digest, story.digest, again.digest}) == 3
    assert code.overlap(again)[0] > code.overlap(story)[0] + 0.05
