"""The task library: named selections, in files and through the commands."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import mlx_ifp.commands.generate as generate_module
from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.cli import dispatch as cli
from mlx_ifp.commands import benchmark as benchmark_module
from mlx_ifp.commands import cache_prompt as cache_prompt_module
from mlx_ifp.commands import export as export_module
from mlx_ifp.commands import manage as manage_module
from mlx_ifp.commands import tasks as tasks_module
from mlx_ifp.convert import convert
from mlx_ifp.device import default_cache_dir
from mlx_ifp.files.atomic import new_file
from mlx_ifp.selection.files import load_selection, save_selection
from mlx_ifp.selection.task_library import Task, TaskLibrary, check_name, read_task, write_task

from ..conftest import make_dense, run_command
from ..helpers import random_selection

TEXT = "You are an expert Python programmer.\nWrite naïve code: ½."


@pytest.fixture(scope="module")
def checkpoint(tiny_checkpoint):
    return open_checkpoint(tiny_checkpoint)


@pytest.fixture
def library(checkpoint):
    return TaskLibrary(checkpoint)


def task_of(checkpoint, name="python", seed=0, **kwargs) -> Task:
    selection = random_selection(3, 160, 64, seed=seed, checkpoint=checkpoint.digest, **kwargs)
    return Task(name, TEXT, "activations", selection)


@pytest.fixture
def run(tiny_checkpoint, monkeypatch, capsys):
    """Run a command in this process; returns exit code, stdout and stderr."""

    def run(module, *args, model=tiny_checkpoint):
        name = module.__name__
        argv = [name, *map(str, args), *(["--model", str(model)] if model else [])]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            module.main()
        except SystemExit as error:
            code = error.code
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return run


def error(result) -> str:
    """The one line that a command ended with."""
    code, out, err = result
    assert code not in (0, None)
    assert out == ""
    (line,) = err.strip().splitlines()
    return line


# -- the library


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
def test_a_task_comes_back_as_it_was(library, checkpoint, soft):
    task = task_of(checkpoint, soft=soft)
    path = library.add(task)
    back = library.load("python")
    assert (back.name, back.text, back.selector) == ("python", TEXT, "activations")
    assert back.selection.digest == task.selection.digest
    # A task's file is a selection's, too.
    assert load_selection(path, checkpoint.digest).digest == task.selection.digest
    assert library.names() == ["python"]
    assert [file.name for file in library.folder.iterdir()] == ["python.safetensors"]


def test_a_name_is_taken_once(library, checkpoint):
    library.add(task_of(checkpoint))
    other = task_of(checkpoint, seed=1)
    with pytest.raises(IFPError, match="'python' already"):
        library.add(other)
    assert library.load("python").selection.digest != other.selection.digest
    library.add(other, force=True)
    assert library.load("python").selection.digest == other.selection.digest
    library.remove("python")
    with pytest.raises(IFPError, match="library is empty"):
        library.load("python")


def test_of_many_that_add_one_name_at_once_one_wins(library, checkpoint):
    # All have passed the first check when they begin to write.
    tasks = [task_of(checkpoint, seed=seed) for seed in range(16)]
    library.check_new("python")

    def write(task):
        try:
            write_task(library.path("python"), task)
        except FileExistsError:
            return None
        return task

    with ThreadPoolExecutor(16) as pool:
        won = [task for task in pool.map(write, tasks) if task is not None]
    assert len(won) == 1
    assert library.load("python").selection.digest == won[0].selection.digest
    assert len(list(library.folder.iterdir())) == 1


def test_of_two_processes_that_add_one_name_at_once_one_wins(tiny_checkpoint, library):
    texts = ("Write code.", "Name rivers.")

    def add(text):
        return run_command("tasks", "add", "one", "--model", tiny_checkpoint, "--task", text)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(texts, pool.map(add, texts), strict=True))
    assert sorted(process.returncode for process in done.values()) == [0, 1]
    (winner,) = [text for text in texts if done[text].returncode == 0]
    (line,) = [process.stderr for process in done.values() if process.returncode == 1]
    assert "There is a task 'one' already" in line and len(line.splitlines()) == 1
    assert library.load("one").text == winner
    assert len(list(library.folder.iterdir())) == 1


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def link(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("os.link", link)
    for expected in (None, FileExistsError):
        try:
            with new_file(tmp_path / "x.txt", overwrite=False) as file:
                file.write_text(str(expected))
            raised = None
        except FileExistsError as error:
            raised = type(error)
        assert raised is expected
    assert [path.name for path in tmp_path.iterdir()] == ["x.txt"]
    assert (tmp_path / "x.txt").read_text() == "None"


@pytest.mark.parametrize("name", ["a", "Python-3.13_x", "0", "x" * 64])
def test_good_names(name):
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "a/b", "../a", "a\\b", "a b", "a\n", "é", "x" * 65, "a\0"]
)
def test_bad_names(library, name):
    with pytest.raises(IFPError, match="letters"):
        library.path(name)


# -- files from elsewhere


def edited(path, tensors=None, **metadata):
    """Change a file as an editor of safetensors would."""
    with safe_open(path, "np") as file:
        old = file.metadata()
    save_file(load_file(path) | (tensors or {}), path, metadata=old | metadata)


def test_export_and_import(checkpoint, library, tmp_path):
    task = task_of(checkpoint, soft=True)
    library.add(task)
    library.export("python", tmp_path / "file")
    with pytest.raises(IFPError, match="already exists"):
        library.export("python", tmp_path / "file")
    library.export("python", tmp_path / "file", force=True)
    elsewhere = TaskLibrary(checkpoint, tmp_path / "other machine")
    assert elsewhere.import_file(tmp_path / "file").name == "python"
    with pytest.raises(IFPError, match="already"):
        elsewhere.import_file(tmp_path / "file")
    elsewhere.import_file(tmp_path / "file", "other")
    for name in ("python", "other"):
        assert elsewhere.load(name).selection.digest == task.selection.digest
        assert elsewhere.load(name).text == TEXT
    # Under its new name it is whole again.
    elsewhere.export("other", tmp_path / "file2")
    assert read_task(tmp_path / "file2", checkpoint).name == "other"


def flip(path):
    tensors = load_file(path)
    mask = np.unpackbits(tensors["mask"], axis=-1)
    kept, left = np.flatnonzero(mask[0])[0], np.flatnonzero(1 - mask[0])[0]
    mask[0, kept], mask[0, left] = 0, 1  # one channel for another: a valid selection
    edited(path, {"mask": np.packbits(mask, axis=-1)})


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-9]), "damaged"),
    "empty": (lambda path: path.write_bytes(b""), "damaged"),
    "garbage": (lambda path: path.write_bytes(b"junk" * 999), "damaged"),
    "bfloat16": (
        lambda path: mx.save_safetensors(
            str(path),
            {"mask": mx.zeros((3, 20), mx.bfloat16)},
            {"format": "mlx_ifp.selection", "version": "1", "d_ffn": "160"},
        ),
        "damaged",
    ),
    "a channel": (flip, "was changed"),
    "text": (lambda path: edited(path, task="Other words."), "was changed"),
    "name": (lambda path: edited(path, name="other"), "was changed"),
    "selector": (lambda path: edited(path, selector="predictor"), "was changed"),
    "checkpoint": (lambda path: edited(path, checkpoint="0" * 64), "was changed"),
}


@pytest.mark.parametrize(("damage", "says"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_or_edited_file_is_refused(library, checkpoint, tmp_path, damage, says):
    library.add(task_of(checkpoint))
    library.export("python", tmp_path / "file.safetensors")
    damage(tmp_path / "file.safetensors")
    with pytest.raises(IFPError, match=says):
        library.import_file(tmp_path / "file.safetensors", "new")
    damage(library.path("python"))
    with pytest.raises(IFPError, match=says):
        library.load("python")
    assert library.names() == ["python"]
    library.remove("python")
    assert library.names() == []


def test_a_plain_selection_is_no_task(library, checkpoint, tmp_path):
    save_selection(tmp_path / "s", task_of(checkpoint).selection)
    with pytest.raises(IFPError, match="without a name; use it with --selection"):
        library.import_file(tmp_path / "s")


def test_a_task_of_another_checkpoint_is_refused(library, checkpoint, tmp_path):
    task = task_of(checkpoint)
    other = replace(task, selection=random_selection(3, 160, 64, checkpoint="other"))
    write_task(tmp_path / "file", other)
    with pytest.raises(IFPError, match="another checkpoint"):
        library.import_file(tmp_path / "file")
    with pytest.raises(IFPError, match="another checkpoint"):
        library.add(other)
    # Put into the library's folder by hand.
    library.check_new("python")
    write_task(library.path("python"), other)
    with pytest.raises(IFPError, match="another checkpoint"):
        library.load("python")


@pytest.mark.parametrize("shape", [(4, 160), (3, 168)])
def test_shapes_are_checked_against_the_checkpoint(library, checkpoint, tmp_path, shape):
    forged = random_selection(*shape, 64, checkpoint=checkpoint.digest)
    write_task(tmp_path / "file", replace(task_of(checkpoint), selection=forged))
    with pytest.raises(IFPError, match="the model has 3 of 160"):
        library.import_file(tmp_path / "file")
    assert library.names() == []


def test_a_name_inside_a_file_is_checked(library, checkpoint, tmp_path):
    write_task(tmp_path / "file", replace(task_of(checkpoint), name="../../up"))
    with pytest.raises(IFPError, match="no name for a task"):
        library.import_file(tmp_path / "file")


# -- the command


def test_add_show_list_rm(run, tiny_checkpoint, tmp_path):
    code, out, _ = run(tasks_module, "add", "python", "--task", TEXT)
    assert code == 0 and "python: k = 64" in out
    (tmp_path / "rivers.txt").write_text("Name three rivers.")
    how = ["--keep", "32", "--selector", "activations"]
    assert run(tasks_module, "add", "rivers", "--task-file", tmp_path / "rivers.txt", *how)[0] == 0
    model, _ = load(tiny_checkpoint, cache=False)
    python, rivers = model.select(TEXT), model.select("Name three rivers.", keep=32)
    assert model.tasks.load("python").selection.digest == python.digest
    assert model.tasks.load("rivers").selection.digest == rivers.digest

    code, out, _ = run(tasks_module, "show", "rivers")
    assert code == 0
    assert "k:           32 of 160" in out and "selector:    activations" in out
    assert "    2     32  0.200" in out and out.endswith("Name three rivers.\n")

    code, out, _ = run(tasks_module, "list")
    assert code == 0
    size = model.tasks.path("python").stat().st_size
    table, overlap = (part.splitlines() for part in out.split("\n\n"))
    assert table[-2].split() == ["1", "python", "activations", "64", "0.400", f"{size:,}"]
    mean = f"{python.overlap(rivers)[0]:.3f}"
    assert overlap[-2].split() == ["1", "python", "1.000", mean]
    assert overlap[-1].split() == ["2", "rivers", mean, "1.000"]

    assert run(tasks_module, "rm", "python") == (0, "Deleted python\n", "")
    assert "'python'" in error(run(tasks_module, "show", "python"))


def test_clearing_the_cache_keeps_the_tasks(run, library):
    run(tasks_module, "add", "python", "--task", TEXT)
    code, out, _ = run(manage_module, "--delete", model=None)
    assert (code, out.split(" from ")[0]) == (0, "Deleted 1 selections")
    assert library.load("python").text == TEXT
    assert library.folder.is_relative_to(default_cache_dir() / "tasks")


def test_add_refuses_before_anything_is_computed(run, monkeypatch, library, checkpoint, tmp_path):
    library.add(task_of(checkpoint))
    monkeypatch.setattr(
        "mlx_ifp.commands.tasks.command.load_model", lambda args: pytest.fail("was loaded")
    )
    assert "'python' already" in error(run(tasks_module, "add", "python", "--task", "x"))
    assert "no name for a task" in error(run(tasks_module, "add", "a/b", "--task", "x"))
    (tmp_path / "file").write_text("no directory")
    args = ("add", "new", "--task", "x", "--cache-dir", tmp_path / "file")
    assert "cannot be made" in error(run(tasks_module, *args))
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "cannot be written" in error(run(tasks_module, "add", "new", "--task", "x"))


def test_bad_input_is_one_line(run, library, checkpoint, tmp_path):
    assert "There are no tasks" in error(run(tasks_module, "list"))
    assert "library is empty" in error(run(tasks_module, "rm", "x"))
    assert "is empty" in error(run(tasks_module, "add", "x", "--task", "  "))
    library.add(task_of(checkpoint))
    library.add(task_of(checkpoint, "geo"))
    for action in (["show", "x"], ["rm", "x"], ["export", "x", tmp_path / "file"]):
        line = error(run(tasks_module, *action))
        assert "no task 'x'" in line and "there are: geo, python" in line
    assert "no such task file" in error(run(tasks_module, "import", tmp_path / "no"))
    (tmp_path / "taken").write_text("mine")
    line = error(run(tasks_module, "export", "geo", tmp_path / "taken"))
    assert "already exists" in line and (tmp_path / "taken").read_text() == "mine"
    assert "no-where" in error(run(tasks_module, "export", "geo", tmp_path / "no-where" / "x"))
    assert list(tmp_path.glob("no*")) == []


def test_list_shows_what_is_damaged_and_the_rest(run, library, checkpoint):
    for i, name in enumerate("abc"):
        library.add(task_of(checkpoint, name, seed=i))
    library.path("b").write_bytes(b"junk")
    code, out, err = run(tasks_module, "list")
    assert code == 1 and "b: " in err and len(err.splitlines()) == 1
    assert "(unusable)" in out
    assert [line.split()[1] for line in out.splitlines()[-2:]] == ["a", "c"]


# -- where a task is used


def test_every_command_takes_a_task_name(run, library, checkpoint, tmp_path, tiny_checkpoint):
    task = task_of(checkpoint)
    library.add(task)
    save_selection(tmp_path / "s", task.selection)
    name, file = ["--task-name", "python"], ["--selection", tmp_path / "s"]

    by_name = run(generate_module, "-p", "Hello", "-m", "8", *name, "--stats", tmp_path / "stats")
    by_file = run(generate_module, "-p", "Hello", "-m", "8", *file)
    assert by_name[:2] == by_file[:2] and by_name[0] == 0
    assert json.loads((tmp_path / "stats").read_text())["selection"]["source"] == "given"

    cache = tmp_path / "kv.safetensors"
    assert run(cache_prompt_module, "-p", "A text.", "--prompt-cache-file", cache, *name)[0] == 0
    assert run(generate_module, "-p", "So?", "-m", "2", "--prompt-cache-file", cache, *file)[0] == 0

    assert run(export_module, "--save-path", tmp_path / "a", *name)[0] == 0
    assert run(export_module, "--save-path", tmp_path / "b", *file)[0] == 0
    weights = [(tmp_path / x / "model.safetensors").read_bytes() for x in "ab"]
    assert weights[0] == weights[1]

    small = ["-p", "8", "-g", "4", "-n", "1", "--json", tmp_path / "figures"]
    assert run(benchmark_module, *small, *name)[0] == 0
    figures = json.loads((tmp_path / "figures").read_text())
    assert figures["task"] == TEXT and figures["network"]["k"] == 64
    (measured,) = figures["lengths"]
    assert any("saved task 'python'" in note for note in measured["notes"])
    first = measured["trials"][0]["rows"]["sub-network, first prompt"]
    assert first["source"] == "given"
    assert first["bytes_read"] > 0


def test_a_task_name_excludes_what_else_selects(run, library, checkpoint, tmp_path):
    library.add(task_of(checkpoint))
    name = ["--task-name", "python"]
    others = ["--task x", "--task-file x", "--selection x", "--task-from user"]
    for other in others:
        code, out, err = run(generate_module, "-p", "x", *name, *other.split())
        assert (code, out) == (2, "") and "not allowed with" in err
    assert "--keep" in error(run(generate_module, "-p", "x", *name, "--keep", "8"))
    assert "--dense and --task-name" in error(run(generate_module, "-p", "x", *name, "--dense"))
    out = ["--save-path", tmp_path / "out"]
    assert "Name one of" in error(run(export_module, *out, *name, "--dense"))
    line = error(run(generate_module, "-p", "x", "--task-name", "no"))
    assert "there are: python" in line


def test_in_python(tiny_checkpoint, library, checkpoint):
    task = task_of(checkpoint)
    library.add(task)
    model, tokenizer = load(tiny_checkpoint, cache=False)
    selection = model.tasks.load("python").selection
    by_name = generate(model, tokenizer, "Hello", selection=selection, max_tokens=8)
    assert by_name == generate(model, tokenizer, "Hello", selection=task.selection, max_tokens=8)
    assert model.selector_runs == 0
    tokens = mx.array([[1, 2, 3]])
    expected = model.subnetwork(task.selection)(tokens)
    assert mx.array_equal(model.prepare(selection=selection).network(tokens), expected)


def test_tasks_belong_to_a_checkpoint(library, checkpoint, tmp_path):
    library.add(task_of(checkpoint))
    dense = make_dense(tmp_path / "dense", seed=1)
    other, _ = load(convert(str(dense), tmp_path / "ifp", keep=64))
    with pytest.raises(IFPError, match="library is empty"):
        other.tasks.load("python")


def test_mlx_ifp_tasks_is_a_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["mlx_ifp", "tasks", "--help"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 0
    assert "usage: mlx_ifp.tasks" in capsys.readouterr().out
