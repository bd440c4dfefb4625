"""The comparison of examples/reproduction, run as its README says, on a tiny model."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from mlx_ifp import load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.selection.overlap import overlap_summary

from ..conftest import run_command

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "reproduction"


def _script(name: str, *args: object) -> str:
    command = [sys.executable, EXAMPLE / name, *args]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("data")
    for split, n in (("train", 6), ("valid", 3)):
        with open(directory / f"{split}.jsonl", "w") as file:
            for i in range(n):
                for task, question, answer in (
                    ("math", f"What is {i} + 2?", f"It is {i + 2}.\n#### {i + 2}"),
                    ("paraphrase", f"Is tree {i} the same as tree {i + 1}?", "No"),
                ):
                    messages = [{"role": "user", "content": question},
                                {"role": "assistant", "content": answer}]  # fmt: skip
                    file.write(json.dumps({"messages": messages, "task": task}) + "\n")
    return directory


def test_all_arms_are_trained_and_compared(dense_llama, data, tmp_path):
    source, runs, output = tmp_path / "float", tmp_path / "runs", tmp_path / "results.json"
    done = run_command("convert", "--model", dense_llama, "--mlx-path", source, "--no-prior")
    assert done.returncode == 0, done.stderr
    common = ("--data", data, "--runs", runs, "--keep", 64)
    short = ("--iters", 2, "--warm-start-iters", 2)
    _script("run.py", "--model", dense_llama, *common, *short)
    logs = {run.name: (run / "log.jsonl").read_text() for run in runs.glob("*-64-0")}
    assert logs.keys() == {"static-64-0", "prompt-64-0", "task-64-0"}
    trained = {name: json.loads(log.splitlines()[-1])["trained_tokens"]
               for name, log in logs.items()}  # fmt: skip
    assert len(set(trained.values())) == 1
    # What is there is not trained again.
    assert _script("run.py", "--model", dense_llama, *common) == ""

    arguments = ("--model", source, *common, "--output", output, "--per-task", 2, "--math", 1)
    table = _script("evaluate.py", *arguments)
    results = json.loads(output.read_text())
    assert list(results) == ["dense", "random-64", "activations-64", "prompt-64-0", "static-64-0",
                             "task-64-0"]  # fmt: skip
    assert results["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    for name, result in results.items():
        assert f"| {name} | {result['ce']:.3f} | {result['kl']:.3f} |" in table
        assert result["tasks"].keys() == {"math", "paraphrase"}
        assert result["math_problems"] == 1
        if name != "dense":
            assert result["kl"] > 1e-3
    assert results["static-64-0"]["overlap"]["between"] == 1
    assert results["task-64-0"]["overlap"]["within"] == 1
    assert results["prompt-64-0"]["overlap"]["between"] < 1
    # The source formats what selects with the chat template, the trained model does not.
    model, _ = load(runs / "prompt-64-0" / "ifp")
    assert open_checkpoint(source).ifp.text.format != model.checkpoint.ifp.text.format
    rows = [json.loads(line) for line in (data / "valid.jsonl").read_text().splitlines()[:4]]
    selections = [model.select(row["messages"][0]["content"]) for row in rows]
    expected = overlap_summary(selections, [row["task"] for row in rows])
    for name, value in asdict(expected).items():
        assert results["prompt-64-0"]["overlap"][name] == pytest.approx(value), name
    # mlx_ifp.evaluate measures the same.
    figures = tmp_path / "figures.json"
    done = run_command("evaluate", "--model", runs / "prompt-64-0" / "ifp", "--reference", source,
                       "--prompts", data / "valid.jsonl", "--given-answers", "--limit", 2,
                       "--prefill", "pruned", "--speed-tokens", 0, "--json", figures)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (loss,) = json.loads(figures.read_text())
    wanted = results["prompt-64-0"]
    for task, its in loss["tasks"].items():
        for name in ("ce", "kl", "exact", "tokens"):
            assert its[name] == pytest.approx(wanted["tasks"][task][name], rel=1e-6)
    assert loss["kl"] == pytest.approx(wanted["kl"], rel=1e-6)
    assert loss["overlap"]["between"] == pytest.approx(wanted["overlap"]["between"])
    # With any overlap at all enough, the first prompt's sub-network serves the other three.
    _script("evaluate.py", *arguments, "--reuse-overlap", 0.01)
    reused = json.loads(output.read_text())["prompt-64-0, reuse 0.01"]
    assert reused["reused"] == 3
    assert reused["overlap"]["between"] == 1
