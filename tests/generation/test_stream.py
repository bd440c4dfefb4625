"""One way to generate: the command and the Python API give the same for the same request."""

import json
import sys

import mlx.core as mx
import pytest

from mlx_ifp import IFPError, generate, load
from mlx_ifp.commands.cache_prompt import main as cache_prompt
from mlx_ifp.commands.generate import main as command
from mlx_ifp.generation.request import Request
from mlx_ifp.generation.stream import Answer

SYSTEM, USER = "You are a poet.", "Name three rivers."
CHAT = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}]
FLAGS = ("--system-prompt", SYSTEM, "-p", USER)
QUANTIZED = {"kv_bits": 8, "kv_group_size": 128, "quantized_kv_start": 0}


@pytest.fixture
def run(tiny_checkpoint, monkeypatch, capsys):
    """Run a command in this process: its exit code, stdout and the last line of stderr."""

    def run(*args, main=command):
        argv = ["mlx_ifp.generate", "--model", tiny_checkpoint, *args]
        monkeypatch.setattr(sys, "argv", [str(arg) for arg in argv])
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        said = capsys.readouterr()
        return code, said.out, said.err.strip().rpartition("\n")[2]

    return run


# Changes what the chat template makes of the same messages.
TEMPLATE = {"chat_template": "{{ messages[-1].content }} and {{ messages[0].content }}"}

REQUESTS = {
    "plain": ((), {}),
    "task": (("--task", "A poet."), {"task": "A poet."}),
    "system": (("--task-from", "system"), {"task_from": "system"}),
    "dense": (("--dense",), {"dense": True}),
    "raw": (("--ignore-chat-template",), {"ignore_chat_template": True}),
    "template": (
        ("--chat-template-config", json.dumps(TEMPLATE)),
        {"chat_template_kwargs": TEMPLATE},
    ),
    "rotating": (("--max-kv-size", 16), {"max_kv_size": 16}),
    "pruned": (("--prefill", "pruned"), {"prefill": "pruned"}),
    "warm": (("--warm-system-prompt",), {"warm": True, "warm_on_disk": True}),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_the_same_request_gives_the_same_tokens(run, tiny_checkpoint, name):
    flags, kwargs = REQUESTS[name]
    code, text, _ = run(*FLAGS, "-m", 8, *flags)
    model, tokenizer = load(tiny_checkpoint)
    assert code == 0
    assert text == generate(model, tokenizer, CHAT, max_tokens=8, **kwargs) + "\n"


def test_the_start_of_a_response_is_continued(run, tiny_checkpoint):
    _, text, _ = run(*FLAGS, "-m", 8, "--prefill-response", "The Seine")
    model, tokenizer = load(tiny_checkpoint)
    chat = [*CHAT, {"role": "assistant", "content": "The Seine"}]
    assert text == generate(model, tokenizer, chat, max_tokens=8) + "\n"


FAILURES = {
    "settings": (
        ("--kv-bits", 8, "--kv-group-size", 128, "--quantized-kv-start", 0),
        QUANTIZED,
        "mlx-lm cannot keep this model's keys and values in 8 bits",
    ),
    "draft": (
        ("--draft-model", "/nowhere/none"),
        {"draft_model": "/nowhere/none"},
        "--draft-model /nowhere/none cannot be loaded: ",
    ),
    "template": (
        ("--chat-template-config", '{"chat_template": "{{ raise_exception(1) }}"}'),
        {"chat_template_kwargs": {"chat_template": "{{ raise_exception(1) }}"}},
        "The chat template does not take these messages: ",
    ),
    "length": (("--task", "word " * 9000), {"task": "word " * 9000}, "The text that selects has"),
    "file": (
        ("--prompt-cache-file", "/nowhere/none.safetensors"),
        {"prompt_cache_file": "/nowhere/none.safetensors"},
        "/nowhere/none.safetensors is not a prompt cache: ",
    ),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_same_request_fails_with_the_same_line(run, tiny_checkpoint, name):
    flags, kwargs, begins = FAILURES[name]
    code, _, line = run("-p", USER, "-m", 4, *flags)
    model, tokenizer = load(tiny_checkpoint)
    with pytest.raises(IFPError) as caught:
        generate(model, tokenizer, CHAT[1:], max_tokens=4, **kwargs)
    assert code == 1
    assert str(caught.value).startswith(begins)
    assert line.rpartition("error: ")[2] == " ".join(str(caught.value).split())


def test_the_network_is_kept_while_it_generates(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    answer = Answer(model, tokenizer, Request(USER, options={"max_tokens": 4}))
    for _ in answer:
        model.networks.clear()
        assert model.networks.info.entries == 1
    model.networks.clear()
    assert model.networks.info.entries == 0


def test_figures_are_there_from_python_too(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    answer = Answer(model, tokenizer, Request(CHAT, warm=True, options={"max_tokens": 4}))
    with pytest.raises(IFPError, match="Nothing was generated"):
        _ = answer.stats
    assert len(list(answer)) == 4
    figures = answer.stats.to_dict()
    assert figures["selection"]["source"] == "activations"
    assert figures["warm_prompt"]["source"] == "prefill"
    assert figures["first_token_seconds"] > figures["load"]["seconds"]
    again = Answer(model, tokenizer, Request(CHAT, warm=True, options={"max_tokens": 4}))
    list(again)
    assert again.stats.to_dict()["warm_prompt"]["source"] == "memory"


# -- stored prompts


@pytest.fixture
def stored(run, tmp_path):
    file = tmp_path / "text.safetensors"
    flags = ("-p", "Text:", "--task", "A poet.", "--prompt-cache-file", file)
    assert run(*flags, "--prefill", "pruned", main=cache_prompt)[0] == 0
    return file


def test_a_stored_prompt_is_continued_from_python_too(run, tiny_checkpoint, stored):
    flags = ("-p", " So?", "-m", 8, "--task", "A poet.", "--prompt-cache-file", stored)
    code, text, line = run(*flags, "--prefill", "pruned")
    assert code == 0, line
    model, tokenizer = load(tiny_checkpoint)
    chat = [{"role": "user", "content": " So?"}]
    kwargs = {"task": "A poet.", "prompt_cache_file": stored, "max_tokens": 8}
    kwargs["prefill"] = "pruned"
    assert text == generate(model, tokenizer, chat, **kwargs) + "\n"


@pytest.mark.parametrize(
    ("loading", "kwargs", "message"),
    [
        ({}, {"task": "A cook."}, "another selection"),
        ({}, {"task": "A poet.", "prefill": "dense"}, "by a sub-network.*give --prefill pruned"),
        ({"dtype": mx.bfloat16}, {"task": "A poet."}, "another selection|another dtype"),
        ({}, {"task": "A poet.", "max_kv_size": 64}, "another kv-settings"),
    ],
)
def test_what_a_stored_prompt_is_not_right_for(tiny_checkpoint, stored, loading, kwargs, message):
    model, tokenizer = load(tiny_checkpoint, **loading)
    kwargs = {"prompt_cache_file": stored, "prefill": "pruned", "max_tokens": 2} | kwargs
    with pytest.raises(IFPError, match=message):
        generate(model, tokenizer, CHAT[1:], **kwargs)


def test_what_the_whole_model_has_read_serves_every_task(run, tiny_checkpoint, tmp_path):
    file = tmp_path / "text.safetensors"
    code, _, line = run("-p", "Text:", "--prompt-cache-file", file, main=cache_prompt)
    assert code == 0, line
    model, tokenizer = load(tiny_checkpoint)
    chat = [{"role": "user", "content": " So?"}]
    for task in ("A poet.", "A cook."):
        flags = ("-p", " So?", "-m", 8, "--task", task, "--prompt-cache-file", file)
        code, text, _ = run(*flags, "--prefill", "dense")
        kwargs = {"task": task, "prompt_cache_file": file, "max_tokens": 8}
        assert (code, text) == (0, generate(model, tokenizer, chat, **kwargs) + "\n")
        # It is what one prompt gives.
        whole = [{"role": "user", "content": "Text: So?"}]
        assert text == generate(model, tokenizer, whole, task, max_tokens=8) + "\n"
    code, _, line = run(*flags, "--prefill", "pruned")
    assert code == 1 and "was read by the whole model" in line and "--prefill dense" in line


def test_another_version_of_mlx_lm_computes_others(tiny_checkpoint, stored, monkeypatch):
    monkeypatch.setattr("mlx_ifp.prompt_cache.key.mlx_lm_version", "9.9")
    model, tokenizer = load(tiny_checkpoint)
    kwargs = {"task": "A poet.", "prompt_cache_file": stored, "max_tokens": 2}
    kwargs["prefill"] = "pruned"
    with pytest.raises(IFPError, match=r"another mlx-lm \(.*\) than this one \(9.9\); make it ag"):
        generate(model, tokenizer, CHAT[1:], **kwargs)


@pytest.mark.parametrize("flags", [("--dense",), ("--draft-model", "any")])
def test_flags_that_exclude_dense_prefill(run, flags):
    code, _, line = run("-p", USER, "--prefill", "dense", *flags)
    assert code == 1 and line.endswith(" exclude each other.") and flags[0] in line


def test_the_table_says_where_the_whole_model_reads(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    for prefill in ("dense", "pruned"):
        answer = Answer(model, tokenizer, Request(USER, prefill=prefill, options={"max_tokens": 2}))
        list(answer)
        (row,) = [line for line in answer.stats.table().splitlines() if line.startswith("prefill")]
        assert row.endswith("tokens, dense" if prefill == "dense" else "tokens")
