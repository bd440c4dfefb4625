"""The paper's Tables 1 and 2 for a model of your own, beside the paper's rows.

    python examples/evaluate_tables.py --model qwen3-ifp --tasks gsm8k arc_easy --limit 100

Each task of lm-evaluation-harness runs per input (the question selects), per task (a description
of the task selects), with one static mask, and dense. Rows that the checkpoint has no scores for
are left out. Flags that this script does not know go to `mlx_ifp.evaluate`. A run that is killed
goes on from its cache.

The paper is Instruction-Following Pruning (Hou et al., ICML 2025, arXiv 2501.02086). Its models,
shots and prompts are others, so its rows show what to expect of the differences between rows, not
of the numbers themselves.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from mlx_ifp import IFPError
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.locate import resolve
from mlx_ifp.cli.dispatch import script

# Table 1, by column: percent of the paper's models of 3B active parameters, and of its dense 9B.
PAPER = {
    "IFPruning 9B -> 3B": {"coding": 42.0, "MATH": 36.7, "GSM8K": 72.0, "MMLU": 65.5, "core": 71.1},
    "Pruning+Distill 3B": {"coding": 37.7, "MATH": 32.7, "GSM8K": 70.0, "MMLU": 62.8, "core": 70.0},
    "dense 3B": {"coding": 34.3, "MATH": 31.8, "GSM8K": 69.3, "MMLU": 61.8, "core": 69.9},
    "dense 9B": {"coding": 44.2, "MATH": 37.3, "GSM8K": 75.4, "MMLU": 67.8, "core": 73.8},
}  # fmt: skip
# Beginnings of names of tasks -> the paper's column, and a description that selects.
KNOWN = {
    "humaneval": ("coding", "Complete Python functions from their descriptions."),
    "mbpp": ("coding", "Write short Python programs that pass given tests."),
    "minerva_math": ("MATH", "Solve competition mathematics problems step by step."),
    "hendrycks_math": ("MATH", "Solve competition mathematics problems step by step."),
    "gsm8k": ("GSM8K", "Solve grade school word problems in mathematics step by step."),
    "mmlu": ("MMLU", "Answer multiple choice questions of many academic subjects."),
    "arc": ("core", "Answer multiple choice questions of school science."),
    "hellaswag": ("core", "Choose the most plausible end of a short everyday story."),
    "piqa": ("core", "Choose how to do everyday physical tasks."),
    "sciq": ("core", "Answer science exam questions."),
    "winogrande": ("core", "Find out whom or what a word in a sentence refers to."),
    "lambada": ("core", "Predict the last word of a passage."),
}
ROWS = {"prompt": "per input", "task": "per task", "static": "static", "dense": "dense"}
# The first of them that a task reports is shown.
METRICS = ("exact_match,strict-match", "exact_match,flexible-extract", "pass@1", "pass_at_1,none",
           "acc_norm,none", "acc,none", "exact_match,none")  # fmt: skip


def known(task: str) -> tuple[str | None, str | None]:
    """The paper's column of a task, and a description of it."""
    for name, (column, text) in KNOWN.items():
        if task.startswith(name):
            return column, text
    return None, None


def score(metrics: dict[str, Any]) -> float | None:
    """What a task is measured by, in percent; None if it reports nothing of that kind."""
    for name in METRICS:
        for metric, value in metrics.items():
            if metric.startswith(name) and isinstance(value, float):
                return 100 * value
    return None


def table(tasks: list[str], runs: list[dict[str, Any]]) -> str:
    """A Markdown table: our rows, then the paper's."""
    lines = ["| | " + " | ".join(tasks) + " |", "| --- " * (1 + len(tasks)) + "|"]

    def line(name: str, values: list[float | None]) -> None:
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")

    for run in runs:
        ks = run["ks"]
        kept = f"{ks[0]}" if len(set(ks)) == 1 else f"{min(ks)}-{max(ks)}"
        by = run["way"].partition(":")[0]
        line(f"{ROWS[by]}, k = {kept}", [score(run["results"].get(task, {})) for task in tasks])
    columns = [known(task)[0] for task in tasks]
    if any(columns):
        for name, values in PAPER.items():
            line(f"paper: {name}", [values.get(column or "") for column in columns])
    return "\n".join(lines)


@script
def main() -> None:
    """Run `mlx_ifp.evaluate`, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="A checkpoint of mlx_ifp")
    parser.add_argument("--tasks", nargs="+", required=True, help="Tasks of lm-evaluation-harness")
    parser.add_argument("--task-texts", help="YAML: descriptions by the names of tasks")
    args, others = parser.parse_known_args()
    texts = {task: text for task in args.tasks if (text := known(task)[1]) is not None}
    if args.task_texts is not None:
        texts |= yaml.safe_load(Path(args.task_texts).read_text(encoding="utf-8"))
    ways = list(ROWS)
    if "static" not in open_checkpoint(resolve(args.model)).selectors:
        ways.remove("static")
    missing = [task for task in args.tasks if task not in texts]
    if missing:
        raise IFPError(f"Describe {', '.join(missing)} in a file, and give it with --task-texts.")
    with tempfile.TemporaryDirectory() as directory:
        described, figures = Path(directory) / "texts.yaml", Path(directory) / "figures.json"
        described.write_text(yaml.safe_dump(texts), encoding="utf-8")
        command = [sys.executable, "-m", "mlx_ifp", "evaluate", "--model", args.model]
        command += ["--tasks", *args.tasks, "--select-by", *ways, "--task-texts", str(described)]
        done = subprocess.run(
            [*command, "--json", str(figures), *others], stdout=subprocess.DEVNULL
        )
        if done.returncode:
            sys.exit(done.returncode)
        print(table(args.tasks, json.loads(figures.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    main()
