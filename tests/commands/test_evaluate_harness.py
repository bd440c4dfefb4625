"""mlx_ifp.evaluate --tasks: lm-evaluation-harness on sub-networks."""

import json
import os
import re
import runpy
import subprocess
import sys
from functools import partial
from pathlib import Path

import lm_eval
import mlx.core as mx
import pytest
import yaml
from mlx_lm.evaluate import MLXLM
from mlx_lm.models.cache import make_prompt_cache

from mlx_ifp import load
from mlx_ifp.commands.evaluate import main
from mlx_ifp.evaluation.harness import IFPLM

CHOICES = [
    {"question": "What is a river?", "choices": ["water", "a stone"], "answer": 0},
    {"question": "What is a hill?", "choices": ["a lake of fire", "land"], "answer": 1},
    {"question": "What is the sea?", "choices": ["salt water", "bread"], "answer": 0},
]
TEXTS = [
    {"question": "Name a river.", "answer": "the Seine"},
    {"question": "Name a hill.", "answer": "Montmartre"},
]
COMMON = {"dataset_path": "json", "test_split": "test", "fewshot_split": "test",
          "doc_to_text": "{{question}}", "metadata": {"version": 1}}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two tasks of our own, and caches."""
    folder = tmp_path_factory.mktemp("harness")
    own = folder / "tasks"
    own.mkdir()
    tasks = {
        "choose": (CHOICES, {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}",
                             "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}]}),
        "write": (TEXTS, {"output_type": "generate_until", "doc_to_target": "{{answer}}",
                          "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6},
                          "metric_list": [{"metric": "exact_match"}]}),
        "empty": (None, {"output_type": "generate_until", "doc_to_target": "{{answer}}"}),
    }  # fmt: skip
    for name, (rows, config) in tasks.items():
        data = folder / f"{name}.jsonl"
        if rows is not None:
            data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        files = {"dataset_kwargs": {"data_files": {"test": str(data)}}}
        (own / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | COMMON | config | files))
    return folder


@pytest.fixture
def run(tiny_checkpoint, folder, tmp_path, monkeypatch, capsys):
    """Run the command: its exit code, the files of results by name, stdout and stderr."""
    monkeypatch.setenv("HF_HOME", str(folder / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def run(*args):
        argv = ["mlx_ifp.evaluate", "--model", tiny_checkpoint, "--cache-dir", tmp_path / "cache"]
        argv += ["--include-path", folder / "tasks", "--output-dir", tmp_path / "out", *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        results = {p.name: json.loads(p.read_text()) for p in (tmp_path / "out").glob("*")}
        return code, results, said.out, said.err

    return run


@pytest.fixture
def recorded(monkeypatch):
    """What a kind of LM is asked, and what it answers: (request, answer) in their order."""

    def record(kind):
        answers = []
        for name in ("loglikelihood", "generate_until"):
            own = getattr(kind, name)

            def run(self, requests, own=own):
                found = own(self, requests)
                answers.extend(zip(requests, found, strict=True))
                return found

            monkeypatch.setattr(kind, name, run)
        return answers

    return record


def test_the_dense_model_has_the_results_of_mlx_lm(run, dense_llama, folder, recorded):
    from lm_eval.tasks import TaskManager

    ours = recorded(IFPLM)
    code, results, out, err = run(
        "--tasks", "choose", "write", "--num-shots", 1, "--select-by", "dense"
    )
    assert code == 0, err
    theirs = recorded(MLXLM)
    wanted = lm_eval.simple_evaluate(
        model=MLXLM(str(dense_llama)), tasks=["choose", "write"], num_fewshot=1, random_seed=123,
        numpy_random_seed=123, torch_random_seed=None, fewshot_random_seed=123,
        apply_chat_template=True, fewshot_as_multiturn=False,
        task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
    )["results"]  # fmt: skip
    (found,) = results.values()
    for task in ("choose", "write"):
        assert found[task] == json.loads(json.dumps(wanted[task]))
    assert [(request.args, answer) for request, answer in ours] == [
        (request.args, answer) for request, answer in theirs
    ]
    assert re.search(r"choose +acc +\d\.\d{4}", out)


def by_hand(model, request, network, densely):
    """The answer to a request: the dense model or the network reads, and the network answers."""
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(request.args[0], add_special_tokens=False)
    reader, cache = model.dense() if densely else network, make_prompt_cache(network)
    logits = [reader(mx.array([tokens]), cache=cache)[0, -1]]
    if request.request_type == "generate_until":
        answer = []
        while len(answer) < 6:
            answer.append(logits[-1].argmax().item())
            if answer[-1] in tokenizer.eos_token_ids:
                answer.pop()
                break
            logits.append(network(mx.array([answer[-1:]]), cache=cache)[0, -1])
        return tokenizer.decode(answer).partition("\n")[0]
    whole = tokenizer.encode("".join(request.args), add_special_tokens=False)
    total, greedy = 0.0, True
    for token in whole[len(tokens) :]:
        logprobs = logits[-1] - mx.logsumexp(logits[-1])
        total += logprobs[token].item()
        greedy &= logprobs.argmax().item() == token
        logits.append(network(mx.array([[token]]), cache=cache)[0, -1])
    return total, greedy


@pytest.mark.parametrize("prefill", ["dense", "pruned"])
def test_a_sub_network_has_the_results_of_a_loop_by_hand(run, tiny_checkpoint, recorded, prefill):
    ours = recorded(IFPLM)
    code, _, _, err = run("--tasks", "choose", "write", "--num-shots", 1, "--keep", 32,
                          "--prefill", prefill)  # fmt: skip
    assert code == 0, err
    model, _ = load(tiny_checkpoint)
    assert len(ours) == 8
    for request, answer in ours:
        # The question alone selects, without the shot before it.
        question = request.doc["question"]
        assert len(request.args[0]) > 2 * len(question)
        network = model.subnetwork(model.select(question, keep=32))
        expected = by_hand(model, request, network, prefill == "dense")
        if isinstance(expected, str):
            assert answer == expected
        else:
            assert answer == (pytest.approx(expected[0], abs=5e-5), expected[1])


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "evaluate_tables.py"


def rows_of(table):
    """The names of a Markdown table's rows, whose cells are percentages."""
    lines = table.splitlines()
    assert lines[0] == "| | choose | write |"
    assert all(re.search(r"\| \d+\.\d \| \d+\.\d \|$", line) for line in lines[2:])
    return [line.split("|")[1].strip() for line in lines[2:]]


def test_the_tables_of_the_paper(run, tmp_path):
    texts, figures = tmp_path / "texts.yaml", tmp_path / "figures.json"
    texts.write_text("choose: Answer questions.\nwrite: Name things.\n")
    code, _, _, err = run("--tasks", "choose", "write", "--select-by", "prompt", "task", "dense",
                          "--task-texts", texts, "--json", figures)  # fmt: skip
    assert code == 0, err
    table = runpy.run_path(str(EXAMPLE))["table"]
    assert rows_of(table(["choose", "write"], json.loads(figures.read_text()))) == [
        "per input, k = 64", "per task, k = 64", "dense, k = 160",
    ]  # fmt: skip
    runs = [{"way": "dense", "ks": [160], "results": {"gsm8k": {"exact_match,strict-match": 0.5}}}]
    assert "| paper: IFPruning 9B -> 3B | 72.0 |" in table(["gsm8k"], runs)
    assert "| dense, k = 160 | 50.0 |" in table(["gsm8k"], runs)


@pytest.mark.slow
def test_the_script_of_the_tables_runs(tiny_checkpoint, folder, tmp_path):
    texts = tmp_path / "texts.yaml"
    texts.write_text("choose: Answer questions.\nwrite: Name things.\n")
    flags = ("--model", tiny_checkpoint, "--task-texts", texts, "--output-dir", tmp_path)
    command = [sys.executable, EXAMPLE, *flags, "--include-path", folder / "tasks", "--tasks"]
    env = os.environ | {"HF_HOME": str(folder / "hf")}
    run = partial(subprocess.run, capture_output=True, text=True, timeout=300, env=env)
    done = run([*map(str, command), "choose", "write"])
    assert done.returncode == 0, done.stderr
    # The checkpoint has no static scores, and the paper did not have these tasks.
    assert rows_of(done.stdout) == ["per input, k = 64", "per task, k = 64", "dense, k = 160"]
    done = run([*map(str, command), "nothing"])
    assert done.returncode == 1 and "Describe nothing in a file" in done.stderr


def test_a_run_that_was_killed_goes_on(run, recorded, monkeypatch):
    flags = ("--tasks", "choose", "--keep", 32)
    own, groups = MLXLM.loglikelihood, []

    def killed(self, requests):
        if len(groups) == 1:
            raise KeyboardInterrupt
        groups.append(requests)
        return own(self, requests)

    monkeypatch.setattr(MLXLM, "loglikelihood", killed)
    assert run(*flags)[0] == 130
    monkeypatch.setattr(MLXLM, "loglikelihood", own)
    asked = recorded(MLXLM)
    code, results, _, _ = run(*flags)
    assert code == 0 and len(results) == 1
    # Each question has two choices, and one question was finished.
    assert len(asked) == 2 * len(CHOICES) - len(groups[0]) == 4
    assert run(*flags)[1] == results and len(asked) == 4


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        # Thousands of files say which tasks there are.
        pytest.param(
            ("--tasks", "choose", "no_such_task"),
            "knows no task no_such_task; lm-eval ls tasks",
            marks=pytest.mark.slow,
        ),
        (("--tasks", "empty"), "The tasks empty cannot be run: "),
        (("--tasks", "choose", "--select-by", "task"), "Nothing describes the task choose: "),
        (("--tasks", "choose", "--select-by", "static"), "has no selector 'static'"),
        (("--tasks", "choose", "--max-kl", "1"), "--max-kl is for --prompts."),
        (("--tasks", "choose", "--task-name", "nobody"), "There is no task 'nobody'"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(run, flags, said):
    code, results, out, err = run(*flags)
    assert code == 1 and results == {} and out == ""
    assert said in err.splitlines()[-1] and "Traceback" not in err


def test_without_the_package_it_says_what_to_install(run, monkeypatch):
    monkeypatch.setattr("mlx_ifp.commands.evaluate.benchmarks.find_spec", lambda name: None)
    _, _, _, err = run("--tasks", "choose")
    assert err == (
        "mlx_ifp.evaluate: error: --tasks needs lm-evaluation-harness: "
        "pip install 'mlx_ifp[evaluate]'\n"
    )
