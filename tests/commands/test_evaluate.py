"""mlx_ifp.evaluate on prompts: what each way to select loses, at each k."""

import json
import sys

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_ifp import load
from mlx_ifp.commands.evaluate import main
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
