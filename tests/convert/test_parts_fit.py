"""The parts of a model fit together: tokens have rows, a config says what the weights are."""

import json
import shutil

import mlx.core as mx
import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of
from mlx_ifp.convert import convert
from mlx_ifp.errors import IFPError

from ..conftest import make_dense, tiny_tokenizer


def of_words(count: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(count)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=words)


def test_a_tokenizer_of_a_larger_model_is_refused(tmp_path, dense_llama, tiny_checkpoint):
    """MLX would read beyond the embedding of 384 rows."""
    of_words(500).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(IFPError, match=r"'w384' has the id 384, but .* only 384 rows"):
        convert(str(dense_llama), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert not (tmp_path / "out").exists()
    shutil.copytree(tiny_checkpoint, tmp_path / "ifp")
    shutil.copytree(tmp_path / "tokenizer", tmp_path / "ifp", dirs_exist_ok=True)
    with pytest.raises(IFPError, match="'w384' has the id 384"):
        load_tokenizer_of(open_checkpoint(tmp_path / "ifp"))


def test_added_tokens_without_rows_are_named(tmp_path, dense_llama, capsys):
    """Gemma 3 of 1B is published so, and works."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image_soft_token>"])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out = convert(str(dense_llama), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert "beyond the embedding's 384 rows: <image_soft_token>" in capsys.readouterr().err
    assert load_tokenizer_of(open_checkpoint(out)).encode("Hello")


def test_bits_that_the_config_does_not_name_are_those_of_the_shapes(tmp_path):
    """mlx-lm finds them out; a checkpoint says them."""
    dense = make_dense(tmp_path / "dense")
    arrays = mx.load(str(dense / "model.safetensors"))
    packed = {}
    for name, array in arrays.items():
        if array.ndim < 2:
            packed[name] = array
            continue
        bits = 8 if "embed" in name else 4
        parts = mx.quantize(array, group_size=32, bits=bits)
        for part, values in zip(("weight", "scales", "biases"), parts, strict=True):
            packed[name.replace("weight", part)] = values
    mx.eval(packed)
    mx.save_safetensors(str(dense / "model.safetensors"), packed)
    config = json.loads((dense / "config.json").read_text())
    config["quantization"] = {"group_size": 32, "bits": 4}
    (dense / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "out"))
    assert checkpoint.config["quantization"]["model.embed_tokens"]["bits"] == 8


@pytest.mark.parametrize("method", ["bitsandbytes", "fp8"])
def test_a_quantization_that_mlx_lm_does_not_read_is_named(tmp_path, method):
    dense = make_dense(tmp_path / "dense")
    arrays = dict(mx.load(str(dense / "model.safetensors")))
    name = "model.layers.0.mlp.up_proj.weight"
    arrays[name] = mx.zeros(arrays[name].shape, mx.uint8)
    mx.eval(arrays)
    mx.save_safetensors(str(dense / "model.safetensors"), arrays)
    config = json.loads((dense / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(IFPError, match=f"quantized with '{method}'") as caught:
        convert(str(dense), tmp_path / "out")
    assert "/.out." not in str(caught.value)


def test_a_tokenizer_with_several_templates_stays_what_it_is(tmp_path, dense_llama):
    dense = tmp_path / "dense"
    shutil.copytree(dense_llama, dense)
    templates = dense / "additional_chat_templates"
    templates.mkdir()
    (templates / "tool_use.jinja").write_text("tools")
    (dense / "consolidated.safetensors.index.json").write_text("{}")
    (dense / "._tokenizer.json").write_text("not JSON")
    first = convert(str(dense), tmp_path / "a")
    (first / "._tokenizer.json").write_text("not JSON")
    second = convert(str(first), tmp_path / "b", dtype="bfloat16")
    assert (second / "additional_chat_templates" / "tool_use.jinja").read_text() == "tools"
    assert not list(second.glob(".*"))
    assert not list(second.glob("*.index.json"))
