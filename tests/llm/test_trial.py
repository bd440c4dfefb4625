"""What cannot run is refused before anything is computed."""

import pytest

import mlx_ifp
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError
from mlx_ifp.llm.build import build_model
from mlx_ifp.llm.kv_cache import KVSettings
from mlx_ifp.llm.modules import find_body
from mlx_ifp.llm.trial import check_runs

from ..architectures import config_of
from ..conftest import make_dense


def test_a_trial_computes_nothing():
    # The embedding alone would be 32 TB.
    check_runs(build_model(config_of("llama") | {"vocab_size": 1_000_000_000, "hidden_size": 8192}))


@pytest.mark.parametrize("name", ["plamo", "plamo2", "plamo3"])
def test_the_body_takes_token_ids_where_a_decoder_holds_the_layers(name):
    model = build_model(config_of(name))
    assert find_body(model) == "model"
    check_runs(model)


def test_a_model_that_mlx_lm_cannot_run():
    with pytest.raises(IFPError, match="'gear' is not supported: mlx-lm's layers do not run on to"):
        check_runs(build_model(config_of("gear")))


def test_a_model_without_an_output_is_enough_for_a_predictor():
    model = build_model(config_of("llama"))
    model.pop("lm_head")
    check_runs(model, body_only=True)
    with pytest.raises(IFPError, match="mlx-lm's model does not run on token ids"):
        check_runs(model)


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("gemma3_text", KVSettings(kv_bits=4, kv_group_size=32), "RotatingKVCache Quantization"),
        ("llama", KVSettings(kv_bits=4, kv_group_size=64), "divisible by the quantization group"),
        ("qwen2", KVSettings(kv_bits=4, kv_group_size=32, max_kv_size=64), "RotatingKVCache"),
    ],
)
def test_keys_and_values_that_cannot_be_quantized(name, settings, reason):
    model = build_model(config_of(name) | {"head_dim": 32})
    with pytest.raises(IFPError, match=f"cannot keep this model's keys and values in 4 .*{reason}"):
        settings.check(model)


def test_keys_and_values_that_can_be_quantized():
    KVSettings(kv_bits=4, kv_group_size=32).check(
        build_model(config_of("llama") | {"head_dim": 32})
    )


def test_generation_refuses_them_before_it_reads_the_prompt(tmp_path):
    dense = make_dense(tmp_path / "dense", "gemma3_text")
    model, tokenizer = mlx_ifp.load(str(convert(str(dense), tmp_path / "ifp")))
    with pytest.raises(IFPError, match="cannot keep this model's keys and values in 4 bits"):
        mlx_ifp.generate(model, tokenizer, "hello", max_tokens=5000, kv_bits=4)
