"""What the benchmark compares with: several samples, a mixture of experts, the paper's shapes."""

import os

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlx_ifp import load
from mlx_ifp.commands.benchmark.experts import experts_model
from mlx_ifp.commands.benchmark.loading import ColdFiles, _in_memory
from mlx_ifp.commands.benchmark.prefill import prefill_seconds
from mlx_ifp.commands.benchmark.shapes import describe, paper_shapes, write_shapes
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError
from mlx_ifp.generation.steps import sampled_steps
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.ffn import find_ffns

from ...conftest import ARCHITECTURES, make_dense, run_command
from ...helpers import random_selection

PROMPT = mx.array([5, 77, 130, 9, 42, 200, 301, 17])


def model_of(tmp_path, architecture, **options):
    """A tiny checkpoint in use."""
    dense = make_dense(tmp_path / "dense", architecture)
    return load(convert(str(dense), tmp_path / "ifp", keep=64, **options), cache=False)[0]


# Of gemma3, some layers have a cache that rotates.
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("step_size", [3, 2048])
def test_greedy_samples_are_what_generate_step_gives(architecture, step_size):
    network = build_model(ARCHITECTURES[architecture] | {"model_type": architecture})
    steps = sampled_steps(
        PROMPT, network, 3, prefill_step_size=step_size, sampler=lambda x: mx.argmax(x, axis=-1)
    )
    # Greedy, if no sampler is given.
    alone = generate_step(PROMPT, network, max_tokens=-1)
    for _ in range(40):
        assert next(steps) == [next(alone)[0]] * 3


def test_samples_differ_and_follow_their_own_tokens():
    network = build_model(ARCHITECTURES["llama"] | {"model_type": "llama"})
    seen = []

    def sampler(logprobs):
        """Each sample takes the token of another rank."""
        seen.append(logprobs)
        ranked = mx.argsort(-logprobs, axis=-1)
        return mx.take_along_axis(ranked, mx.arange(2)[:, None], axis=-1)[:, 0]

    steps = sampled_steps(PROMPT, network, 2, sampler=sampler)
    tokens = mx.array([next(steps) for _ in range(5)])
    assert (tokens[:, 0] != tokens[:, 1]).any()
    for i in range(2):
        whole = network(mx.concatenate([PROMPT, tokens[:, i]])[None])[0, len(PROMPT) - 1 : -1]
        expected = whole - mx.logsumexp(whole, axis=-1, keepdims=True)
        for step in range(5):
            assert mx.allclose(seen[step][i], expected[step], atol=1e-4)


def test_samples_are_drawn_at_temperature_one():
    small = {"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 8}
    mx.random.seed(3)
    network = build_model(ARCHITECTURES["llama"] | small)
    prompt = PROMPT % 8
    logits = network(prompt[None])[0, -1]
    tokens = mx.array(next(sampled_steps(prompt, network, 2000)))
    drawn = (tokens[:, None] == mx.arange(8)).mean(axis=0)
    assert mx.abs(drawn - mx.softmax(logits)).max() < 0.04
    for temperature in (0.5, 2):
        assert mx.abs(drawn - mx.softmax(logits / temperature)).max() > 0.08


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "mixtral"), ("mistral", "mixtral"), ("qwen2", "qwen2_moe"), ("qwen3", "qwen3_moe")],
)
def test_a_mixture_has_the_trunk_and_as_many_active_channels(tmp_path, architecture, name):
    model = model_of(tmp_path, architecture)
    ffns, config = model.checkpoint.ffns, model.checkpoint.config
    network = model.subnetwork(random_selection(3, 160, 64))
    mixture, notes = experts_model(network, ffns, config, 64)
    assert (mixture.architecture, mixture.count, mixture.active, mixture.width) == (name, 10, 4, 16)
    assert len(notes) == 1
    assert type(mixture.network).__module__ == f"mlx_lm.models.{name}"
    mine, its = (dict(tree_flatten(n.parameters())) for n in (mixture.network, network))
    shared = {n for n in its if not n.startswith(tuple(f"{ffn.path}." for ffn in ffns))}
    assert len(shared) > 10
    assert all(mine[n] is its[n] for n in shared)
    routers = sum(array.nbytes for n, array in mine.items() if n.split(".")[-2].endswith("gate"))
    assert routers > 0
    # 4 of 10 experts of 16 channels are read, as 64 channels are.
    bytes_of_64 = sum(array.nbytes for array in its.values())
    assert mixture.memory["bytes_per_token"] == bytes_of_64 + routers
    assert mixture.memory["weights_bytes"] == bytes_of_64 + routers + 4 * 96 * 3 * 64 * 3
    logits = mixture.network(PROMPT[None])
    assert logits.shape == (1, 8, 384)
    assert mx.isfinite(logits).all()


def test_a_mixture_is_quantized_as_the_checkpoint_is(tmp_path):
    model = model_of(tmp_path, "llama", quantize_weights=True, q_bits=8, q_group_size=64)
    network = model.subnetwork(random_selection(3, 160, 128))
    config = model.checkpoint.config
    mixture, notes = experts_model(network, model.checkpoint.ffns, config, [120, 128, 136])
    experts = [m for m in mixture.network.modules() if isinstance(m, QuantizedSwitchLinear)]
    assert len(experts) == 9
    # The width of an expert is no multiple of 64; down_proj, which runs along it, takes 32.
    assert {(m.bits, m.group_size, m.input_dims) for m in experts} == {(8, 64, 64), (8, 32, 32)}
    assert (mixture.count, mixture.width, len(notes)) == (5, 32, 1)
    assert mx.isfinite(mixture.network(PROMPT[None])).all()


def test_without_such_a_mixture_a_note_says_so(tmp_path):
    model = model_of(tmp_path, "gemma2")
    network = model.subnetwork(random_selection(3, 160, 64))
    config = model.checkpoint.config
    mixture, [note] = experts_model(network, model.checkpoint.ffns, config, 64)
    assert mixture is None
    assert "none with the attention of gemma2" in note


def test_another_attention_is_no_comparison(tmp_path):
    # Mixtral's heads are as wide as they fill the hidden size.
    dense = make_dense(tmp_path / "dense", head_dim=32)
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    network = model.subnetwork(random_selection(3, 160, 64))
    config = model.checkpoint.config
    mixture, [note] = experts_model(network, model.checkpoint.ffns, config, 64)
    assert mixture is None
    assert "another attention" in note


def test_the_paper_s_shapes():
    whole = paper_shapes(1)
    llm = whole["llm"]
    assert (llm["hidden_size"], llm["num_hidden_layers"], llm["intermediate_size"]) == (
        2048,
        56,
        24576,
    )
    assert (llm["num_attention_heads"], llm["num_key_value_heads"], llm["head_dim"]) == (16, 2, 128)
    assert (whole["k"], whole["P"]) == (6656, 128)

    def millions(config):
        return sum(a.size for _, a in tree_flatten(build_model(config).parameters())) / 1e6

    # The 9B, and a predictor of about 302 million.
    assert 8500 < millions(llm) < 9500
    assert 250 < millions(whole["backbone"]) < 350
    for scale in (3, 5, 8, 16):
        shapes = paper_shapes(scale)
        for config in (shapes["llm"], shapes["backbone"]):
            ffns = find_ffns(build_model(config))
            assert ffns[0].d_ffn % 64 == 0
            assert config["num_attention_heads"] % config["num_key_value_heads"] == 0
        d_ffn = shapes["llm"]["intermediate_size"]
        assert shapes["k"] / d_ffn == pytest.approx(6656 / 24576, abs=32 / d_ffn)
    with pytest.raises(IFPError, match="leaves none of the 16"):
        paper_shapes(17)


@pytest.mark.parametrize("group_size", [32, 128])
def test_a_checkpoint_of_the_shapes_runs(tmp_path, group_size):
    geometry = write_shapes(tmp_path / "paper", 16, dtype=mx.float32, bits=4, group_size=group_size)
    model, _ = load(tmp_path / "paper", cache=False)
    assert geometry["llm"]["k"] == model.k == 384
    assert model.checkpoint.config["quantization"]["group_size"] == group_size
    ready, other = model.prepare("Sort a list."), model.prepare("Name a river.")
    assert (ready.source, ready.selection.d_ffn) == ("predictor", 1536)
    # A text is not like another.
    assert 0.1 < ready.selection.overlap(other.selection)[0] < 0.9
    logits = ready.network(PROMPT[None])
    assert logits.shape == (1, 8, 6144)
    assert mx.isfinite(logits).all()
    assert mx.abs(logits).max() < 30
    line = describe(geometry)
    assert "divided by 16: hidden size 128, 3 layers, 1 query / 1 KV heads of 128" in line


def test_the_command_makes_the_shapes_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = run_command(
        *("benchmark", "--shapes", "paper", "--scale", 16, "-q", "--q-bits", 8),
        *("-p", 4, "-g", 2, "-n", 1, "--no-moe"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("random weights in the paper's shapes, divided by 16: ")
    assert "8-bit, float32, k = 384 of 1536 channels in 3 layers" in done.stdout
    assert not list(tmp_path.glob("mlx_ifp-*"))


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs posix_fadvise: Linux")
def test_as_many_bytes_are_read_as_are_asked_for(tmp_path):
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.write_bytes(bytes(10_000_000))
    files = ColdFiles(paths)
    assert files.read(9_000_000) == 9_000_000
    assert files.read(15_000_000) == 15_000_000
    assert files.read() == 20_000_000
    still = files.drop()
    assert still == -1 or 0 <= still <= 1
    # Reading makes warm what dropping may have made cold.
    files.read()
    assert all(_in_memory(paths[0]) + _in_memory(paths[1]))


def test_a_prompt_is_read_by_the_whole_model_or_by_the_sub_network(tiny_checkpoint):
    model = load(tiny_checkpoint, cache=False)[0]
    seconds = prefill_seconds(model, 12, 2048)
    ways = [f"{known}_{by}_seconds" for by in ("dense", "pruned") for known in ("first", "known")]
    assert list(seconds) == ways and min(seconds.values()) > 0
    # Two prompts select. Two more passes over the FFNs would be one too many: the first prompt
    # that is read densely shares the selector's.
    assert model.selector_runs == 2
    channels = 64 * 3 * 3 * 64 * 4
    assert model.reader.bytes_read == 3 * model.reader.nbytes + 2 * channels
