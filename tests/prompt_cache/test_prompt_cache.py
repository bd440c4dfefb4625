"""Warm prompts: kept keys and values give what processing the whole prompt gives."""

import copy
import dataclasses
import importlib
import json
import os
import subprocess
import sys
import time
import warnings

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache

from mlx_ifp import IFPError, load, stream_generate
from mlx_ifp.convert import convert
from mlx_ifp.device import default_cache_dir
from mlx_ifp.llm.kv_cache import KVSettings
from mlx_ifp.llm.prompt import encode_prompt, shared_prefix
from mlx_ifp.prompt_cache.files import WarmPromptFiles

from ..conftest import make_dense, run_command
from ..helpers import random_selection

SELECTION = random_selection(3, 160, 64)
OTHER = random_selection(3, 160, 64, seed=1)
PREFIX = [(7 * i) % 300 for i in range(50)]
PROMPT = [*PREFIX, 11, 12, 13]
MESSAGES = [
    {"role": "system", "content": "You are a poet who writes about rivers in short sentences."},
    {"role": "user", "content": "Name three."},
]
# Largest difference of log-probabilities, float32.
TOLERANCE = 1e-4


class Counting:
    """A network that counts the tokens it processes."""

    def __init__(self, network):
        self.network, self.tokens = network, 0

    def __call__(self, inputs, **kwargs):
        self.tokens += inputs.size
        return self.network(inputs, **kwargs)

    def __getitem__(self, name):
        return self.network[name]

    def __getattr__(self, name):
        return getattr(self.network, name)


def prepare(model, selection=SELECTION):
    """A sub-network that counts."""
    ready = model.prepare(selection=selection)
    return dataclasses.replace(ready, network=Counting(ready.network))


def answer(network, tokens, n=12, **kwargs):
    """Greedy tokens and their log-probabilities, [n, vocabulary]."""
    steps = list(generate_step(mx.array(tokens), network, max_tokens=n, **kwargs))
    return [token for token, _ in steps], mx.stack([logprobs for _, logprobs in steps])


def difference(a, b):
    return mx.abs(a - b).max().item()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model with heads of 32, so that keys and values can be quantized."""
    path = tmp_path_factory.mktemp("warm")
    return convert(str(make_dense(path / "llm", head_dim=32)), path / "ifp", keep=64)


@pytest.fixture
def model(checkpoint):
    return load(checkpoint)[0]


@pytest.mark.parametrize(
    "settings",
    [
        KVSettings(),
        KVSettings(max_kv_size=128),
        KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=0),
        KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=52),
    ],
    ids=["float", "rotating", "8 bits", "8 bits later"],
)
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_a_warm_prompt_gives_what_a_cold_one_gives(checkpoint, settings, disk):
    kv = dataclasses.asdict(settings)
    model = load(checkpoint)[0]
    ready = prepare(model)
    # Quantized keys and values are only read after the step that made them, so the
    # comparison takes the same steps.
    cold, expected = answer(ready.network.network, PROMPT, prefill_step_size=len(PREFIX), **kv)
    assert model.warm_prompt(ready, PREFIX, settings, disk=disk) == len(PREFIX)
    assert ready.network.tokens == len(PREFIX)
    if disk:
        model = load(checkpoint)[0]
        ready = prepare(model)
    ready.network.tokens = 0
    prompt_cache, rest = model.warm.fetch(ready, PROMPT, settings)
    assert rest == PROMPT[len(PREFIX) :]
    warm, logprobs = answer(ready.network, rest, prompt_cache=prompt_cache, **kv)
    assert warm == cold
    assert difference(logprobs, expected) < TOLERANCE
    # The rest of the prompt, and each token of the answer, are processed.
    assert ready.network.tokens == len(rest) + 12


def test_eight_bits_warm_or_cold_in_one_step_differ_by_their_rounding(model):
    settings = KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    kv = dataclasses.asdict(settings)
    ready = prepare(model)
    exact = answer(ready.network, PROMPT)[1][0]
    cold = answer(ready.network, PROMPT, **kv)[1][0]
    model.warm_prompt(ready, PREFIX, settings)
    prompt_cache, rest = model.warm.fetch(ready, PROMPT, settings)
    warm = answer(ready.network, rest, prompt_cache=prompt_cache, **kv)[1][0]
    assert 0 < difference(warm, exact) < 0.02
    assert difference(warm, cold) < 0.02


@pytest.mark.parametrize("architecture", ["gemma3_text", "smollm3"])
def test_other_kinds_of_caches(tmp_path, architecture):
    dense = make_dense(tmp_path / "llm", architecture)
    model = load(convert(str(dense), tmp_path / "ifp", keep=64))[0]
    ready = prepare(model)
    # The long prefix fills the sliding window of 32, and the short one does not.
    for prefix in (PREFIX[:20], PREFIX):
        cold, expected = answer(ready.network, PROMPT)
        model.warm_prompt(ready, prefix, disk=True)
        model.warm.clear()
        prompt_cache, rest = model.warm.fetch(ready, PROMPT)
        assert rest == PROMPT[len(prefix) :]
        warm, logprobs = answer(ready.network, rest, prompt_cache=prompt_cache)
        assert warm == cold
        assert difference(logprobs, expected) < TOLERANCE


def test_a_second_warming_costs_nothing(model):
    ready = prepare(model)
    assert model.warm_prompt(ready, PREFIX[:30]) == 30
    assert model.warm_prompt(ready, PREFIX) == 20
    assert model.warm_prompt(ready, mx.array(PREFIX)) == 0
    assert ready.network.tokens == 50
    assert model.warm_prompt(ready, []) == 0


def test_nothing_is_served_under_anything_else(checkpoint, model, tmp_path):
    ready = prepare(model)
    settings = KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=0)
    model.warm_prompt(ready, PREFIX, disk=True)
    model.warm_prompt(ready, PREFIX, settings, disk=True)
    assert model.warm.fetch(ready, PROMPT)[1] == PROMPT[50:]
    nothing = (None, PROMPT)
    assert model.warm.fetch(prepare(model, OTHER), PROMPT) == nothing
    assert model.warm.fetch(model.prepare(dense=True), PROMPT) == nothing
    soft = random_selection(3, 160, 64, soft=True)
    assert model.warm.fetch(prepare(model, soft), PROMPT) == nothing
    assert model.warm.fetch(ready, PROMPT, KVSettings(max_kv_size=64)) == nothing
    for change in ({"kv_bits": 4}, {"kv_group_size": 64}, {"quantized_kv_start": 9}):
        assert model.warm.fetch(ready, PROMPT, dataclasses.replace(settings, **change)) == nothing
    half = load(checkpoint, dtype=mx.bfloat16)[0]
    assert half.warm.fetch(prepare(half), PROMPT) == nothing
    dense = make_dense(tmp_path / "llm", seed=1, head_dim=32)
    other = load(convert(str(dense), tmp_path / "ifp", keep=64))[0]
    assert other.warm.fetch(prepare(other), PROMPT) == nothing
    assert other.warm.files.directory == model.warm.files.directory
    same = load(checkpoint)[0]
    assert same.warm.fetch(prepare(same), PROMPT)[1] == PROMPT[50:]


def test_mlx_ifp_refuses_it_under_another_selection(checkpoint):
    model, tokenizer = load(checkpoint)
    model.warm_prompt(prepare(model), PREFIX)
    prompt_cache, rest = model.warm.fetch(prepare(model), PROMPT)
    with pytest.raises(IFPError, match="another selection"):
        next(stream_generate(model, tokenizer, rest, selection=OTHER, prompt_cache=prompt_cache))


def test_generation_does_not_change_what_is_kept(model):
    ready = prepare(model)
    model.warm_prompt(ready, PREFIX)
    first, rest = model.warm.fetch(ready, PROMPT)
    second, _ = model.warm.fetch(ready, PROMPT)
    long, _ = answer(ready.network, rest, prompt_cache=first)
    other, _ = answer(ready.network, [5, 6, 7, 8], prompt_cache=second)
    third, _ = model.warm.fetch(ready, PROMPT)
    assert answer(ready.network, rest, prompt_cache=third)[0] == long
    assert long == answer(ready.network, PROMPT)[0]
    assert other == answer(ready.network, [*PREFIX, 5, 6, 7, 8])[0]


def test_the_longest_prefix_is_found_and_the_last_token_left(model):
    ready = prepare(model)
    for n in (10, 30, 20):
        model.warm_prompt(ready, PREFIX[:n])
    for prompt, kept in [
        (PREFIX, 30),
        (PREFIX[:25], 24),  # cut from the 30
        (PREFIX[:20], 19),
        ([*PREFIX[:12], 299, 298], 12),
        ([299, *PREFIX], 0),
        (PREFIX[:1], 0),
    ]:
        prompt_cache, rest = model.warm.fetch(ready, prompt)
        assert rest == prompt[kept:]
        assert (prompt_cache is None) == (kept == 0)
        warm = answer(ready.network, rest, 3, prompt_cache=prompt_cache)[0]
        assert warm == answer(ready.network, prompt, 3)[0]
    assert model.warm.fetch(ready, [])[1] == []


def test_quantized_ones_are_not_cut(model):
    ready = prepare(model)
    settings = KVSettings(kv_bits=8, kv_group_size=32, quantized_kv_start=40)
    model.warm_prompt(ready, PREFIX, settings)
    assert model.warm.fetch(ready, PREFIX[:30], settings) == (None, PREFIX[:30])
    assert model.warm.fetch(ready, PROMPT, settings)[1] == PROMPT[50:]


def test_the_least_recently_used_goes_first(model):
    ready = prepare(model)
    prompts = [[i, *PREFIX] for i in range(4)]
    model.warm_prompt(ready, prompts[0])
    model.warm.max_bytes = 3 * model.warm.info.nbytes
    for prompt in prompts[1:3]:
        model.warm_prompt(ready, prompt)
    model.warm.fetch(ready, [*prompts[0], 1])
    model.warm_prompt(ready, prompts[3])
    assert [model.warm.fetch(ready, [*p, 1])[0] is not None for p in prompts] == [1, 0, 1, 1]
    info = model.warm.info
    assert (info.entries, info.nbytes) == (3, info.max_bytes)
    # Keys and values take 2 bytes instead of 4, in 3 layers of 2 heads of 32.
    assert info.nbytes == 3 * 51 * 2 * 3 * 2 * 32 * 4


def test_one_larger_than_the_bound_still_serves_its_own_prompt(model):
    ready = prepare(model)
    model.warm.max_bytes = 10
    prompt_cache, rest = model.warm.start(ready, PROMPT, 50)
    assert rest == PROMPT[50:]
    assert (
        answer(ready.network, rest, prompt_cache=prompt_cache)[0]
        == (answer(ready.network, PROMPT)[0])
    )
    assert model.warm.info.entries == 0


# -- on disk


def flip(data):
    """Flip one bit of the last array."""
    return data[:-9] + bytes([data[-9] ^ 64]) + data[-8:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"garbage" * 100,
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        flip,
        lambda data: data.replace(b"mlx_ifp.warm_prompt", b"somebody.elses_file"),
        lambda data: data.replace(b'KVCache"', b'KVCashe"'),
    ],
    ids=["empty", "garbage", "half", "one byte short", "one bit", "foreign", "unknown cache"],
)
def test_a_damaged_file_is_ignored_with_one_warning_and_rebuilt(checkpoint, model, damage):
    model.warm_prompt(prepare(model), PREFIX, disk=True)
    (path,) = model.warm.files.entries()
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)
    model = load(checkpoint)[0]
    ready = prepare(model)
    with pytest.warns(UserWarning, match="Ignoring a damaged warm prompt") as seen:
        assert model.warm_prompt(ready, PREFIX, disk=True) == 50
    assert len(seen) == 1
    assert path.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = load(checkpoint)[0]
        assert model.warm_prompt(prepare(model), PREFIX, disk=True) == 0
    assert model.warm.info.loads == 1


def test_a_place_that_cannot_be_written_warns_once_and_works(checkpoint, tmp_path):
    (tmp_path / "file").write_text("not a directory")
    model = load(checkpoint, cache_dir=tmp_path / "file")[0]
    ready = prepare(model)
    with pytest.warns(UserWarning, match="not kept on disk") as seen:
        assert model.warm_prompt(ready, PREFIX, disk=True) == 50
        assert model.warm_prompt(ready, [9, *PREFIX], disk=True) == 51
    assert len(seen) == 1
    assert model.warm.fetch(ready, PROMPT)[1] == PROMPT[50:]


def test_nothing_is_written_unless_asked(checkpoint, model):
    model.warm_prompt(prepare(model), PREFIX)
    assert model.warm.files.entries() == []
    without = load(checkpoint, cache=False)[0]
    assert without.warm_prompt(prepare(without), PREFIX, disk=True) == 50
    assert without.warm.files is None


def filled(n=8, value=1.0):
    """A prompt cache of n tokens."""
    layer = KVCache()
    layer.keys, layer.values, layer.offset = *[mx.full((1, 1, n, 8), value)] * 2, n
    return [layer]


def test_the_disk_is_bounded_and_tidy(tmp_path):
    key = "0" * 64
    files = WarmPromptFiles(tmp_path, max_bytes=2500)
    files.store(key, (9, 1), filled(40))
    assert files.entries() == []  # larger than the bound
    files.store(key, (9, 1), filled(2))
    (path,) = files.entries()
    files.max_bytes = 3 * path.stat().st_size
    path.unlink()
    abandoned, fresh = (files.directory / f".{name}.safetensors" for name in "ab")
    for path in (abandoned, fresh):
        path.write_bytes(b"x")
    os.utime(abandoned, (0, 0))
    for i in range(4):
        files.store(key, (i, 1), filled(2))
        os.utime(files.entries()[0], (time.time() - 10 + i,) * 2)
    assert files.longest(key, [0, 1, 2]) is None
    assert files.longest(key, [3, 1, 2])[1] == 2
    assert sum(path.stat().st_size for path in files.entries()) == files.max_bytes
    assert not abandoned.exists()
    assert fresh.exists()
    assert files.directory.stat().st_mode & 0o77 == 0


WRITER = """
import sys
import mlx.core as mx
from mlx_lm.models.cache import KVCache
from mlx_ifp.prompt_cache.files import WarmPromptFiles
files, layer = WarmPromptFiles(sys.argv[1]), KVCache()
layer.keys = layer.values = mx.full((1, 1, 4096, 8), float(sys.argv[2]))
layer.offset = 4096
print("ready", flush=True)
sys.stdin.readline()
for i in range(20):
    files.store("0" * 64, (1, 2, 3), [layer])
"""


def test_two_processes_that_write_one_entry_leave_whole_files(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path), value],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for value in "12"
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.write("\n")
        writer.stdin.flush()
    files, values = WarmPromptFiles(tmp_path), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while any(writer.poll() is None for writer in writers):
            time.sleep(0.002)
            if (found := files.longest("0" * 64, [1, 2, 3, 4])) is not None:
                keys = found[0][0].keys
                values.append(keys[0, 0, 0, 0].item())
                assert mx.all(keys == values[-1]).item()
        assert files.longest("0" * 64, [1, 2, 3, 4]) is not None
    for writer in writers:
        writer.communicate()
        assert writer.returncode == 0
    assert len(values) > 5
    assert set(values) <= {1.0, 2.0}
    assert len(list(files.directory.iterdir())) == 1


# -- prompts

IN_THE_USERS_TURN = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ system }}\n{{ m.content | trim }} "
    "[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
)
USER_FIRST = "{% for m in messages | reverse %}{{ m.content }}|{% endfor %}"


@pytest.mark.parametrize("template", [None, IN_THE_USERS_TURN, USER_FIRST])
@pytest.mark.parametrize("system", [True, False])
def test_the_shared_prefix_of_any_template(checkpoint, template, system):
    _, tokenizer = load(checkpoint)
    kwargs = {"chat_template": template} if template else {}

    def prompt(content):
        return [*(MESSAGES[:1] if system else []), {"role": "user", "content": content}]

    counts = set()
    for content in ("Name three.", "  who?", "42", "äöü", "\n\n"):
        tokens = list(encode_prompt(tokenizer, prompt(content), **kwargs))
        n = shared_prefix(tokenizer, prompt(content), tokens, **kwargs)
        text = tokenizer.decode(tokens[:n])
        assert content.strip() not in text or not content.strip()
        assert (MESSAGES[0]["content"] in text) == (system and template != USER_FIRST)
        counts.add(n)
    assert len(counts) <= 2  # a beginning that the tokenizer joins with what stands before it


def test_later_turns_do_not_count(checkpoint):
    _, tokenizer = load(checkpoint)
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": "Seine."},
        {"role": "user", "content": "a"},
    ]
    long, short = (list(encode_prompt(tokenizer, m)) for m in (turns, MESSAGES))
    assert shared_prefix(tokenizer, turns, long) == shared_prefix(tokenizer, MESSAGES, short) > 10


def test_the_next_prompt_of_a_task_begins_after_the_system_prompt(checkpoint):
    model, tokenizer = load(checkpoint)
    task = "A poet."

    def run(messages, **kwargs):
        kwargs |= {"prefill": "pruned", "max_tokens": 8}
        steps = list(stream_generate(model, tokenizer, messages, task, **kwargs))
        return [r.token for r in steps], steps[-1].prompt_tokens

    second = [MESSAGES[0], {"role": "user", "content": "Which is the longest?"}]
    for messages in (MESSAGES, second):
        cold, whole = run(messages)
        warm, left = run(messages, warm=True)
        n = shared_prefix(tokenizer, messages, encode_prompt(tokenizer, messages))
        assert warm == cold
        assert left == whole - n
    assert model.warm.info.prefilled == n
    assert run(MESSAGES, warm=True, selection=OTHER)[0] == run(MESSAGES, selection=OTHER)[0]
    assert model.warm.info.prefilled == 2 * n


@pytest.mark.parametrize(
    ("prompt", "kwargs", "message"),
    [
        ("text", {}, "as messages"),
        ([1, 2, 3], {}, "as messages"),
        ("", {}, "as messages"),
        ([], {}, "as messages"),
        (MESSAGES, {"prompt_cache": filled()}, "prompt_cache exclude"),
        (MESSAGES, {"draft_model": object()}, "draft_model exclude"),
    ],
)
def test_what_cannot_begin_warm(checkpoint, prompt, kwargs, message):
    model, tokenizer = load(checkpoint)
    with pytest.raises(IFPError, match=message):
        next(stream_generate(model, tokenizer, prompt, dense=True, warm=True, **kwargs))


def command(monkeypatch, capsys, name, *args):
    """Run a command in this process; what it wrote to stdout."""
    monkeypatch.setattr(sys, "argv", [f"mlx_ifp.{name}", *map(str, args)])
    importlib.import_module(f"mlx_ifp.commands.{name}").main()
    return capsys.readouterr().out


def test_the_next_process_begins_after_the_system_prompt(checkpoint, tmp_path, monkeypatch, capsys):
    stats = tmp_path / "stats.json"
    flags = ["--model", checkpoint, "--task", "A poet.", "-m", 8, "--stats", stats]
    flags += ["--system-prompt", MESSAGES[0]["content"], "--prompt"]

    def run(*args):
        text = command(monkeypatch, capsys, "generate", *flags, *args)
        return text, json.loads(stats.read_text())

    expected, cold = run("Name three.")
    assert "warm_prompt" not in cold
    _, first = run("Another.", "--warm-system-prompt")
    done = run_command("generate", *flags, "Name three.", "--warm-system-prompt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    second = json.loads(stats.read_text())
    assert (first["warm_prompt"]["source"], second["warm_prompt"]["source"]) == ("prefill", "disk")
    n = second["warm_prompt"]["tokens"]
    assert f"{n} tokens, disk" in done.stderr
    assert n == first["warm_prompt"]["tokens"] > 10
    assert second["prefill"]["tokens"] == cold["prefill"]["tokens"] - n
    # Other settings find nothing, and their keys and values are kept apart.
    _, rotating = run("Name three.", "--warm-system-prompt", "--max-kv-size", 99)
    assert rotating["warm_prompt"]["source"] == "prefill"
    listed = command(monkeypatch, capsys, "manage", "--scan")
    assert [line.split()[1] for line in listed.splitlines()[-2:]] == [str(n)] * 2
    assert str(checkpoint) in listed.splitlines()[-1]
    deleted = command(monkeypatch, capsys, "manage", "--delete")
    assert "1 selections and 2 warm prompts" in deleted
    assert WarmPromptFiles(default_cache_dir()).entries() == []


@pytest.mark.parametrize(
    "other",
    [
        ["--no-cache"],
        ["--prompt-cache-file", "f"],
        ["--draft-model", "m"],
        ["--ignore-chat-template"],
    ],
)
def test_flags_that_do_not_go_with_it(checkpoint, monkeypatch, capsys, other):
    with pytest.raises(SystemExit):
        command(
            monkeypatch, capsys, "generate", "--model", checkpoint, "--warm-system-prompt", *other
        )
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"--warm-system-prompt and {other[0]} exclude each other" in line


def test_copies_share_their_arrays_until_they_are_written():
    layers = filled()
    twin = copy.deepcopy(layers)
    twin[0].update_and_fetch(mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 1, 8)))
    assert (layers[0].offset, twin[0].offset) == (8, 9)
    assert mx.all(layers[0].keys[..., :8, :] == 1).item()
    assert mx.all(layers[0].keys[..., 8:, :] == 0).item()
