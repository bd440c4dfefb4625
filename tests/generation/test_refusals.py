"""What cannot be right is refused before anything is selected or computed."""

import pytest
from mlx_lm.models.cache import RotatingKVCache, make_prompt_cache

from mlx_ifp import IFPError, generate, load
from mlx_ifp.convert import convert
from mlx_ifp.generation.draft import check_rollback
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.context import context_length

from ..conftest import make_dense, run_command


@pytest.fixture(scope="module")
def sliding(tmp_path_factory):
    """A checkpoint with sliding windows, and a directory with the model it was made of."""
    path = tmp_path_factory.mktemp("sliding")
    dense = make_dense(path / "gemma", "gemma3_text")
    return convert(str(dense), path / "ifp", keep=64), dense


def test_a_model_with_sliding_windows_takes_no_draft(sliding, dense_llama):
    checkpoint, _ = sliding
    model, tokenizer = load(checkpoint, cache=False)
    with pytest.raises(IFPError, match="this model keeps a RotatingKVCache, from which rejected"):
        generate(model, tokenizer, "Hello", max_tokens=2, draft_model=str(dense_llama))
    assert model.selector_runs == 0
    done = run_command("generate", "--model", checkpoint, "-p", "Hi", "--draft-model", dense_llama)
    assert done.returncode == 1 and "cannot be taken back. Leave out --draft-model" in done.stderr


def test_a_draft_with_sliding_windows_is_refused(tiny_checkpoint, sliding):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    with pytest.raises(IFPError, match="the draft model keeps a RotatingKVCache"):
        generate(model, tokenizer, "Hello", max_tokens=2, draft_model=str(sliding[1]))
    assert model.selector_runs == 0


def test_a_prompt_cache_that_rotates_takes_no_draft(tiny_checkpoint):
    model, tokenizer = load(tiny_checkpoint, cache=False)
    draft = model.subnetwork(model.select("Hello", keep=32))
    for network in (model.trunk, draft):
        check_rollback(network, "this model")
    caches = [RotatingKVCache(16) for _ in model.trunk.layers] + make_prompt_cache(draft)
    with pytest.raises(IFPError, match="this model keeps a RotatingKVCache"):
        generate(model, tokenizer, "Hi", max_tokens=2, draft_model=draft, prompt_cache=caches)


def test_a_recurrent_state_takes_no_draft():
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64, "state_size": 8}
    rest = {"intermediate_size": 64, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True}
    network = build_model({"model_type": "mamba", "time_step_rank": 2} | shape | rest)
    with pytest.raises(IFPError, match="this model keeps a ArraysCache"):
        check_rollback(network, "this model")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """A checkpoint of a model with 64 positions."""
    path = tmp_path_factory.mktemp("short")
    dense = make_dense(path / "llama", max_position_embeddings=64)
    return convert(str(dense), path / "ifp", keep=64)


def test_a_prompt_beyond_the_context_is_refused_before_it_runs(short):
    model, tokenizer = load(short, cache=False)
    for kwargs in ({}, {"dense": True}, {"task": "A poet."}):
        with pytest.raises(IFPError, match=r"has 65 tokens, but this model reads at most 64\."):
            generate(model, tokenizer, [5] * 65, max_tokens=1, **kwargs)
    assert model.selector_runs == 0 and model.networks.info.entries == 0
    assert generate(model, tokenizer, [5] * 64, max_tokens=1, task="A poet.")
    # mlx-lm does not heed it for a llama, which makes caches of its own.
    with pytest.raises(IFPError, match="at most 64"):
        generate(model, tokenizer, [5] * 65, max_tokens=1, max_kv_size=32)
    rotating = [RotatingKVCache(32) for _ in model.trunk.layers]
    assert generate(model, tokenizer, [5] * 65, max_tokens=1, task="A poet.", prompt_cache=rotating)


def test_a_context_without_an_end_is_one_where_tokens_see_only_the_last(tmp_path):
    dense = make_dense(tmp_path / "qwen", "qwen2", max_position_embeddings=64)
    model, tokenizer = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    with pytest.raises(IFPError, match="Shorten the prompt, or give --max-kv-size"):
        generate(model, tokenizer, [5] * 65, max_tokens=1)
    assert generate(model, tokenizer, [5] * 65, "A poet.", max_tokens=1, max_kv_size=32)


def test_what_is_stored_before_the_prompt_counts(short):
    model, tokenizer = load(short, cache=False)
    prompt_cache = make_prompt_cache(model.trunk)
    kwargs = {"task": "A poet.", "prompt_cache": prompt_cache, "max_tokens": 1}
    generate(model, tokenizer, [5] * 60, **kwargs)
    with pytest.raises(IFPError, match=r"has 70 tokens"):
        generate(model, tokenizer, [5] * 9, **kwargs)


@pytest.mark.parametrize("command", ["generate", "cache_prompt"])
def test_commands_refuse_it_in_one_line(short, tmp_path, command):
    flags = ("--task", "A poet.", "--no-cache")
    if command == "cache_prompt":
        flags += ("--prompt-cache-file", tmp_path / "p.safetensors")
    done = run_command(command, "--model", short, "-p", "-", *flags, stdin="word " * 200)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "reads at most 64. Shorten the prompt. If the model can read more" in done.stderr


@pytest.mark.parametrize(
    ("config", "length"),
    [
        ({}, None),
        ({"max_position_embeddings": None}, None),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 512}}, 512),
        # Qwen2.5 states the length before, Llama 3.1 and Phi 3 the one after.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {
                    "type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32768,
                },
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            131072,
        ),
        ({"max_position_embeddings": 2048, "rope_scaling": {"type": "linear", "factor": 2}}, 4096),
        (
            {
                "max_position_embeddings": 8192,
                "rope_parameters": {
                    "full_attention": {"rope_type": "linear", "factor": 8.0},
                    "sliding_attention": {"rope_type": "default"},
                },
            },
            65536,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": None}, 4096),
    ],
)
def test_the_longer_reading_of_a_config_counts(config, length):
    assert context_length(config) == length
