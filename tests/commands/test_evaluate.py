"""mlx_ifp.evaluate on prompts: what each way to select loses, at each k."""

import json
import sys

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ifp import load
from mlx_ifp.commands.evaluate import main
from mlx_ifp.commands.tasks import main as tasks
from mlx_ifp.evaluation import losses as losses_module
from mlx_ifp.evaluation import own_answers as answers_module
from mlx_ifp.llm.prompt import template_tokens
from mlx_ifp.selection.task_library import Task

PROMPTS = [
    {"prompt": "Name three rivers.", "task": "water"},
    {"messages": [{"role": "system", "content": "Be brief."},
                  {"role": "user", "content": "Name a lake."}], "task": "water"},
    {"prompt": "What is 2 + 2?", "completion": "It is 4.", "task": "math"},
    {"prompt": "What is 3 + 4?", "completion": "It is 7.", "task": "math"},
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The caches, which all tests of this file share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def loaded(tiny_checkpoint, folder):
    model, tokenizer = load(tiny_checkpoint, cache_dir=folder)
    model.tasks.add(Task("water", "About water.", "activations", model.select("About water.")))
    return model, tokenizer


@pytest.fixture
def run(tiny_checkpoint, loaded, folder, tmp_path, monkeypatch, capsys):
    """Run the command on rows: its exit code, the figures, stdout and stderr."""

    def run(*args, rows=PROMPTS):
        file, figures = tmp_path / "prompts.jsonl", tmp_path / "figures.json"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        argv = ["mlx_ifp.evaluate", "--model", tiny_checkpoint, "--cache-dir", folder]
        argv += ["--prompts", file, "--json", figures, "-m", 5, "--speed-tokens", 0, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        losses = json.loads(figures.read_text()) if figures.exists() else []
        return code, losses, said.out, said.err

    return run


def logprobs(logits: mx.array) -> mx.array:
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def expected_kl(model, network, prompt, answer, *, dense_prefill):
    """KL and agreement written out: the sum over tokens, by hand."""
    dense = model.dense()
    tokens = [*prompt, *answer[:-1]]
    reference = logprobs(dense(mx.array([tokens]))[0, len(prompt) - 1 :])
    if dense_prefill:
        cache = make_prompt_cache(dense)
        first = dense(mx.array([prompt]), cache=cache)[0, -1:]
        # One token after the other, as in decoding.
        rest = [network(mx.array([[token]]), cache=cache)[0] for token in answer[:-1]]
        own = logprobs(mx.concatenate([first, *rest]))
    else:
        own = logprobs(network(mx.array([tokens]))[0, len(prompt) - 1 :])
    kl = (mx.exp(reference) * (reference - own)).sum().item()
    return kl, (reference.argmax(-1) == own.argmax(-1)).sum().item()


@pytest.mark.parametrize("prefill", ["dense", "pruned"])
def test_figures_are_those_of_a_loop_by_hand(run, loaded, prefill):
    model, tokenizer = loaded
    code, losses, out, _ = run("--prefill", prefill, "--keep", "32", "0.5", "--select-by",
                               "prompt", "dense", "task", "--task", "A list.")  # fmt: skip
    assert code == 0
    assert [(loss["way"], loss["ks"][0]) for loss in losses] == [
        ("prompt", 32), ("prompt", 64), ("dense", 160), ("task", 32), ("task", 64),
    ]  # fmt: skip
    for loss in losses:
        wanted: dict[str, list[float]] = {}
        for row in PROMPTS:
            messages = row.get("messages") or [{"role": "user", "content": row["prompt"]}]
            prompt = template_tokens(tokenizer, messages)
            network = model.dense()
            if loss["way"] != "dense":
                text = "A list." if loss["way"] == "task" else messages[-1]["content"]
                network = model.subnetwork(model.select(text, keep=loss["ks"][0]))
            pruned = loss["way"] == "dense" or prefill == "pruned"
            kl, agree = expected_kl(model, network, prompt, own_answer(model, prompt),
                                    dense_prefill=not pruned)  # fmt: skip
            wanted.setdefault(row["task"], []).append((kl, agree))
        for task, pairs in wanted.items():
            its = loss["tasks"][task]
            assert its["answers"] == len(pairs)
            assert its["kl"] == pytest.approx(sum(p[0] for p in pairs) / its["tokens"], abs=5e-5)
            assert its["agreement"] == sum(p[1] for p in pairs) / its["tokens"]
        if loss["way"] == "dense":
            assert loss["kl"] == 0 and loss["agreement"] == 1 and loss["exact"] == 1
        else:
            assert loss["kl"] > 1e-4
            mean = sum(task["kl"] for task in loss["tasks"].values()) / 2
            assert loss["kl"] == pytest.approx(mean) and f"{mean:.4f}" in out


def own_answer(model, prompt):
    """The dense model's greedy answer, token by token."""
    dense = model.dense()
    cache, answer, tokens = make_prompt_cache(dense), [], prompt
    while len(answer) < 5:
        token = dense(mx.array([tokens]), cache=cache)[0, -1].argmax().item()
        answer.append(token)
        if token in model.tokenizer.eos_token_ids:
            break
        tokens = [token]
    return answer


def test_saved_tasks_static_scores_and_the_smallest_k(run, loaded, tmp_path):
    flags = ("--keep", 32, 64, 96, 128, "--task-name", "water", "--select-by", "prompt")
    code, losses, out, _ = run(*flags, "--max-kl", 0.05, "--plot", tmp_path / "losses.png")
    assert code == 0 and (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    # A saved task without scores has its own k.
    assert [(loss["way"], loss["ks"][0]) for loss in losses] == [
        *(("prompt", k) for k in (32, 64, 96, 128)), ("task water", 64)
    ]  # fmt: skip
    by_k = {loss["ks"][0]: loss for loss in losses[:4]}
    for task in ("water", "math"):
        fits = [k for k, loss in by_k.items() if loss["tasks"][task]["kl"] <= 0.05]
        row = next(line for line in out.splitlines()[::-1] if line.startswith("prompt"))
        column = ["water", "math"].index(task) + 1
        assert row.split()[column] == (str(min(fits)) if fits else "-")
    overlap = losses[-1]["overlap"]
    assert overlap["within"] == overlap["between"] == 1
    assert losses[0]["overlap"]["within"] < 1
    # Bytes of channels grow as k does, and the trunk comes on top.
    assert losses[1]["ffn_bytes"] == 2 * losses[0]["ffn_bytes"]
    trunks = {loss["memory_bytes"] - loss["ffn_bytes"] for loss in losses}
    assert len(trunks) == 1


def test_given_answers_and_the_speed(run, loaded):
    rows = [row for row in PROMPTS if "completion" in row]
    _, losses, _, _ = run("--given-answers", "--select-by", "dense", "--limit", 1, rows=rows)
    assert losses[0]["tasks"]["math"]["answers"] == 1 and losses[0]["kl"] == 0
    assert losses[0]["tokens_per_second"] is None and losses[0]["exact"] == 0
    _, losses, _, _ = run("--select-by", "dense", "--speed-tokens", 2, rows=rows)
    assert losses[0]["tokens_per_second"] > 0 and losses[0]["exact"] == 1


def test_the_sub_networks_of_single_prompts_do_not_stay_in_memory(run, monkeypatch):
    held = []

    class Watched(losses_module.Evaluation):
        def _row(self, *args):
            scores = super()._row(*args)
            held.append(self.model.networks.digests)
            return scores

    monkeypatch.setattr("mlx_ifp.commands.evaluate.command.Evaluation", Watched)
    assert run("--select-by", "prompt", "task", "--task", "Some text.", "--keep", 48, 56)[0] == 0
    # Those of the description and the dense model serve each of them.
    assert [len(digests) for digests in held] == [3, 3, 3, 3] and held[0] == held[3]


def test_a_run_that_was_killed_goes_on(run, monkeypatch):
    rows = [{"prompt": f"What is {i}?"} for i in range(6)]
    own, calls = losses_module.score, []

    def score(*args):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(args)
        return own(*args)

    monkeypatch.setattr(losses_module, "score", score)
    assert run("--keep", 32, 64, rows=rows)[0] == 130
    monkeypatch.setattr(losses_module, "score", lambda *args: calls.append(args) or own(*args))
    monkeypatch.setattr(answers_module, "sample_texts", None)
    code, losses, _, _ = run("--keep", 32, 64, rows=rows)
    assert code == 0 and len(calls) == 12, "nothing is measured or written twice"
    assert run("--keep", 32, 64, rows=rows)[1] == losses and len(calls) == 12


@pytest.mark.parametrize(
    ("flags", "rows", "said"),
    [
        ((), [], "there are no prompts"),
        ((), [{"answer": 1}], "line 1: a row has messages"),
        (("--given-answers",), PROMPTS, "line 1: has no answer; leave out --given-answers"),
        ((), [{"prompt": "word " * 5000}], "line 1: has"),
        (("--select-by", "task"), PROMPTS, "line 3: Nothing describes the task math: give --task"),
        (("--select-by", "static"), PROMPTS, "has no selector 'static'"),
        (("--select-by", "prompt:predictor"), PROMPTS, "has no selector 'predictor'"),
        (("--task-name", "nobody"), PROMPTS, "There is no task 'nobody'"),
        (("--max-kl", "-1"), PROMPTS, "--max-kl must be 0 or more"),
        (("--plot", "x.jpg"), PROMPTS, "the name must end in .png"),
        (("--task-texts", "/nowhere.yaml"), PROMPTS, "/nowhere.yaml cannot be read"),
    ],
    ids=str,
)
def test_what_cannot_be_is_one_line(run, flags, rows, said):
    code, losses, out, err = run(*flags, rows=rows)
    assert (code, losses, out) == (1, [], "")
    assert said in err.splitlines()[-1] and "Traceback" not in err


def test_a_task_is_saved_with_the_smallest_k_that_suffices(
    loaded, tiny_checkpoint, folder, tmp_path, monkeypatch, capsys
):
    model, _ = loaded
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f"{json.dumps(row)}\n" for row in PROMPTS[2:]))

    def add(name, *flags):
        argv = ["mlx_ifp.tasks", "add", name, "--task", "Sums.", "--model", str(tiny_checkpoint)]
        argv += ["--cache-dir", str(folder), "--prompts", str(file), *flags]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            tasks()
        except SystemExit as end:
            assert end.code == 1
        said = capsys.readouterr()
        return said.out, said.err

    # Every number of channels loses something, and 64 is the least that is tried.
    out, _ = add("sums", "--max-kl", "100")
    assert out.startswith("sums: k = 64 (KL ")
    assert model.tasks.load("sums").selection.digest == model.select("Sums.", keep=64).digest
    kl = float(out.split("KL ")[1].split(")")[0])
    out, _ = add("more", "--max-kl", str(kl / 2))
    assert out.startswith("more: k = 128 (KL ") and "more" in model.tasks.names()
    _, err = add("most", "--max-kl", "0")
    assert "above 0: give a larger --max-kl" in err and "most" not in model.tasks.names()
    for flags, said in (((), "go together"), (("--max-kl", "1", "--keep", "64"), "finds k")):
        assert said in add("none", *flags)[1]
