"""Plots: the command as a user runs it, and the images it leaves."""

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.commands import plot
from mlx_ifp.commands.plot.overlap_maps import (
    default_layers,
    overlap_figure,
    read_prompts,
    select_all,
)
from mlx_ifp.commands.plot.training_curves import curves_figure, read_log, read_logs

from ...conftest import run_command


def train_line(iteration: int, loss: float = 2.0) -> dict:
    return {"iteration": iteration, "train_loss": loss, "learning_rate": 3e-4, "peak_memory": 1.0}


def val_line(iteration: int, **numbers) -> dict:
    return {
        "iteration": iteration,
        "val_loss": 2.5 - iteration / 100,
        "val_time": 1.0,
        "dense_loss": 1.7,
        "val_kl": 0.4,
        "overlap_within": 0.93,
        "overlap_between": 0.9 - iteration / 200,
        "dead_channels": 0.05,
        "tasks": {"math": {"loss": 2.0, "dense_loss": 1.7, "kl": 0.4}},
    } | numbers


def write_log(run: Path, lines: list, tail: str = "") -> Path:
    run.mkdir(parents=True, exist_ok=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (run / "log.jsonl").write_text(text + tail)
    return run


def a_run(run: Path, shift: float = 0.0) -> Path:
    lines = [{"warm_start_iteration": 5, "warm_start_loss": 0.2}, val_line(0)]
    for i in range(5, 41, 5):
        lines.append(train_line(i, 3 - i / 20 + shift))
        lines += [val_line(i)] if i % 10 == 0 else []
    return write_log(run, lines)


def check_image(path: Path, width: int, height: int) -> np.ndarray:
    """A PNG of this size that is not blank: uint8 [height, width, 4]."""
    image = (matplotlib.image.imread(path) * 255).astype(np.uint8)
    assert image.shape == (height, width, 4)
    # A pixel as one number: rows of four are slow to compare.
    assert len(np.unique(image.view(np.uint32))) > 50
    return image


def has_color(image: np.ndarray, color: tuple[int, int, int]) -> bool:
    return bool((np.abs(image[..., :3].astype(int) - color).max(axis=-1) <= 2).any())


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


# -- curves


def test_the_command_draws_a_run(tmp_path):
    run, output = a_run(tmp_path / "qwen3"), tmp_path / "curves.png"
    done = run_command("plot", run, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{output}: 1 run, up to iteration 40\n"
    image = check_image(output, 1800, 1155)
    assert has_color(image, (255, 127, 14))  # the validation loss
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "qwen3"]


def test_the_command_overlays_runs_and_replaces_the_image(tmp_path):
    # A directory, a file, and names that matplotlib could take for mathematics.
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "$b_$", 1) / "log.jsonl"]
    output = tmp_path / "curves.png"
    output.write_text("old")
    done = run_command("plot", *runs, "--output", output)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    image = check_image(output, 1800, 1155)
    assert has_color(image, (31, 119, 180)) and has_color(image, (255, 127, 14))
    (legend,) = curves_figure(read_logs(runs)).legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", r"\$b_\$"]


def test_the_dense_loss_is_dashed(tmp_path):
    axes = curves_figure([read_log(a_run(tmp_path))]).axes[0]
    train, val, dense = axes.lines
    assert [line.get_linestyle() for line in axes.lines] == ["-", "-", "--"]
    assert train.get_xdata().tolist() == [5, 10, 15, 20, 25, 30, 35, 40]
    assert val.get_ydata().tolist() == pytest.approx([2.5, 2.4, 2.3, 2.2, 2.1])
    assert dense.get_ydata().tolist() == [1.7] * 5


def test_runs_of_one_name_are_told_apart(tmp_path):
    runs = [a_run(tmp_path / "x" / "run"), a_run(tmp_path / "y" / "run"), a_run(tmp_path / "z")]
    assert [log.label for log in read_logs(runs)] == [str(runs[0]), str(runs[1]), "z"]


def test_what_a_log_does_not_have_is_not_drawn(tmp_path):
    train_only = read_log(write_log(tmp_path / "a", [train_line(10)]))
    assert titles(curves_figure([train_only])) == ["loss a token"]
    nothing = {"val_kl": None, "overlap_within": None, "overlap_between": None}
    log = read_log(write_log(tmp_path / "b", [val_line(0, **nothing)]))
    assert titles(curves_figure([log])) == ["loss a token", "share of dead channels"]
    one_task = read_log(write_log(tmp_path / "c", [val_line(0, overlap_between=None)]))
    overlap = curves_figure([one_task]).axes[2]
    assert [text.get_text() for text in overlap.get_legend().get_texts()] == ["within tasks"]


def test_a_cut_last_line_is_left_out(tmp_path):
    log = read_log(write_log(tmp_path, [train_line(10), train_line(20)], '{"iteration": 30, "tra'))
    assert log.series("train", "train_loss") == ([10, 20], [2.0, 2.0])


def test_of_repeated_iterations_the_last_counts(tmp_path):
    lines = [train_line(10, 3), train_line(20, 2), val_line(20), train_line(10, 5), val_line(20)]
    lines[-1]["val_loss"] = 7
    log = read_log(write_log(tmp_path, lines))
    assert log.series("train", "train_loss") == ([10, 20], [5.0, 2.0])
    assert log.series("val", "val_loss") == ([20], [7.0])


def test_a_loss_that_is_not_finite_is_a_gap(tmp_path):
    log = read_log(write_log(tmp_path, [train_line(10), train_line(20, float("nan"))]))
    curves_figure([log]).savefig(tmp_path / "gap.png")
    assert np.isnan(log.series("train", "train_loss")[1][1])


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"iteration": 20, "tr\n', "not JSON"),
        ("[1]\n", "must be a JSON object, not list"),
        ({"train_loss": 2.0}, "iteration must be a whole number"),
        ({"iteration": 1.5, "train_loss": 2.0}, "iteration must be a whole number"),
        (train_line(20, "low"), "train_loss must be a number"),
        (val_line(20, dead_channels=True), "dead_channels must be a number"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    run = write_log(tmp_path, [train_line(10), line, train_line(30)])
    with pytest.raises(IFPError, match=f"log.jsonl: line 2: {message}"):
        read_log(run)


def test_logs_that_cannot_be_drawn(tmp_path):
    done = run_command("plot", tmp_path, "--output", tmp_path / "curves.png")
    assert done.returncode == 1
    assert done.stderr == (
        f"mlx_ifp.plot: error: {tmp_path / 'log.jsonl'} does not exist; name the directory of a "
        "training run.\n"
    )
    for lines in ([], [{"warm_start_loss": 0.2}]):
        with pytest.raises(IFPError, match=r"log.jsonl: there is no line yet with train_loss"):
            read_log(write_log(tmp_path, lines))


# -- overlap


def write_prompts(path: Path, rows: list) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def chat(task: str | None, text: str) -> dict:
    row = {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "-"}]}
    return row if task is None else row | {"task": task}


PROMPTS = [
    chat("poems", "Write a poem about the sea."),
    chat("code", "Sort a list of dates."),
    {"prompt": "Reverse a string in Python.", "completion": "-", "task": "code"},
    chat("poems", "Praise the moon in four lines."),
    chat(None, "Hello there"),
]


def test_the_command_draws_heat_maps(tmp_path, predictor_checkpoint):
    prompts = write_prompts(tmp_path / "prompts.jsonl", PROMPTS)
    output = tmp_path / "overlap.png"
    done = run_command(
        "plot", "--overlap", "--model", predictor_checkpoint, "--prompts", prompts,
        "--output", output, "--layers", "0,2",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{output}: 5 prompts of 3 tasks, overlap within tasks 0." in done.stdout
    image = check_image(output, 1470, 720)
    assert has_color(image, (253, 231, 37))  # the diagonal, at the top of the scale


def test_the_selections_are_those_of_the_model(tmp_path, predictor_checkpoint):
    rows = read_prompts(write_prompts(tmp_path / "p.jsonl", PROMPTS), 128)
    model, _ = load(predictor_checkpoint)
    selections = select_all(model, rows, "p.jsonl")
    expected = model.select("Reverse a string in Python.")
    assert selections[1].digest == expected.digest


def test_prompts_are_sorted_by_task(tmp_path):
    rows = read_prompts(write_prompts(tmp_path / "p.jsonl", PROMPTS), 128)
    assert [(row.task, row.line) for row in rows] == [
        ("code", 2), ("code", 3), ("poems", 1), ("poems", 4), (None, 5),
    ]  # fmt: skip


def test_of_too_many_prompts_every_task_keeps_as_many(tmp_path):
    rows = [chat("a", f"a {i}") for i in range(10)] + [chat("b", f"b {i}") for i in range(3)]
    path = write_prompts(tmp_path / "p.jsonl", rows)
    assert [row.line for row in read_prompts(path, 4)] == [1, 2, 11, 12]
    assert [row.line for row in read_prompts(path, 8)] == [1, 2, 3, 4, 5, 11, 12, 13]


def test_heat_maps_name_the_tasks_and_part_them():
    matrix = np.full((6, 6, 3), 0.5)
    matrix[:3, :3], matrix[3:, 3:] = 0.8, 0.9
    matrix[range(6), range(6)] = 1
    figure = overlap_figure(matrix, ["$a$"] * 3 + [None] * 3, [0, 2], ["first", "last"])
    first, last = figure.axes[:2]
    assert [axes.get_title() for axes in (first, last)] == ["first", "last"]
    assert [label.get_text() for label in first.get_yticklabels()] == [r"\$a\$", "(no task)"]
    assert first.get_xticks().tolist() == [1, 4]
    assert [line.get_ydata()[0] for line in first.lines[::2]] == [2.5]
    # The colours are for the pairs, not for the diagonal.
    assert first.images[0].get_clim() == pytest.approx((0.5, 0.9))


def test_layers_that_do_not_fill_the_grid(tmp_path):
    matrix = np.random.default_rng(0).uniform(size=(4, 4, 5))
    figure = overlap_figure(matrix, ["a", "a", "b", "b"], range(5), [str(i) for i in range(5)])
    figure.savefig(tmp_path / "five.png")
    assert titles(figure) == ["0", "1", "2", "3", "4", ""]  # the last is the colour bar


def test_selections_that_are_all_alike_look_so():
    figure = overlap_figure(np.ones((3, 3, 1)), [None] * 3, [0], ["layer 0"])
    assert figure.axes[0].images[0].get_clim() == pytest.approx((0.9, 1.0))


def test_default_layers_are_spread():
    assert default_layers(30) == [0, 9, 19, 29]
    assert default_layers(5) == [0, 1, 2, 4]
    assert default_layers(3) == [0, 1, 2]


@pytest.mark.parametrize(
    "row, message",
    [
        ([], "must be a JSON object"),
        ({"text": 3}, "a row has messages"),
        ({"messages": []}, "a row has messages"),
        ({"messages": ["hello"]}, "message 1 must be an object"),
        (
            {"messages": [{"role": "user", "content": ["hello"]}]},
            "part 1 of the content of message 1",
        ),
        ({"prompt": "hello", "task": 3}, "task must be a string"),
    ],
)
def test_a_malformed_prompt_is_named(tmp_path, row, message):
    path = write_prompts(tmp_path / "p.jsonl", [PROMPTS[0], row])
    with pytest.raises(IFPError, match=f"p.jsonl: line 2: {message}"):
        read_prompts(path, 128)


def test_one_prompt_has_no_overlap(tmp_path):
    with pytest.raises(IFPError, match="needs two prompts, here are 1"):
        read_prompts(write_prompts(tmp_path / "p.jsonl", PROMPTS[:1]), 128)
    with pytest.raises(IFPError, match="needs two prompts; --max-prompts"):
        read_prompts(write_prompts(tmp_path / "p.jsonl", PROMPTS), 1)


# -- what is checked first


def fails(monkeypatch, capsys, *args: object) -> str:
    """The one line that the command ends with, run in this process."""
    monkeypatch.setattr(sys, "argv", ["mlx_ifp.plot", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        plot.main()
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_bad_arguments(tmp_path, monkeypatch, capsys, predictor_checkpoint):
    run, png = a_run(tmp_path / "run"), tmp_path / "x.png"
    prompts = write_prompts(tmp_path / "p.jsonl", [*PROMPTS, chat("code", " ")])
    overlap = ("--overlap", "--model", predictor_checkpoint, "--prompts", prompts)
    for args, message in (
        ((run, "--output", tmp_path / "x.pdf"), "must end in .png"),
        ((run, "--output", tmp_path / "no" / "x.png"), f"no directory {tmp_path / 'no'}"),
        (("--output", png), "Give the directories of training runs"),
        ((run, "--overlap", "--output", png), "not both"),
        ((run, "--layers", "0", "--output", png), "are for --overlap"),
        (("--overlap", "--output", png), "--overlap needs --prompts"),
        ((*overlap, "--layers", "1,3", "--output", png), "no layer 3; they are 0 to 2"),
        ((*overlap, "--output", png), "p.jsonl: line 6: The text that selects is empty"),
    ):
        assert message in fails(monkeypatch, capsys, *args)
    assert not png.exists()


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    error = fails(monkeypatch, capsys, a_run(tmp_path), "--output", tmp_path / "x.png")
    assert error == "mlx_ifp.plot: error: Plots need matplotlib: pip install 'mlx_ifp[plot]'\n"


def test_help_has_examples():
    done = run_command("plot", "-h")
    assert done.returncode == 0
    assert "examples:" in done.stdout
    assert run_command("", "plot", "-h").stdout == done.stdout


def test_pyplot_is_not_used(tmp_path):
    curves_figure([read_log(a_run(tmp_path))])
    assert "matplotlib.pyplot" not in sys.modules
