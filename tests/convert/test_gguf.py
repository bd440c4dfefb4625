"""GGUF files: the weights and config of a real one and of tiny ones, and broken ones."""

import json
import os
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.models import llama
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp.convert.sources import gguf, gguf_file
from mlx_ifp.convert.sources.gguf import GGUFModel, load_gguf
from mlx_ifp.convert.sources.gguf_file import GGUFTensor, decode
from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import write_safetensors

from ..helpers import memory_peak

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# --- a real file


@pytest.fixture(scope="module")
def real(smollm2_gguf) -> GGUFModel:
    return load_gguf(smollm2_gguf)


def test_the_config_is_the_original_models(real):
    expected = {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    }
    assert expected.items() <= real.config.items()
    four = {"group_size": 32, "bits": 4, "mode": "affine"}
    assert real.config["quantization"] == four | {"model.embed_tokens": four | {"bits": 8}}
    assert "lm_head.weight" not in real.weights
    json.dumps(real.config)


def test_the_weights_are_those_of_mlxs_own_reader_with_the_heads_rows_in_order(real, smollm2_gguf):
    theirs = mx.load(str(smollm2_gguf))
    assert len(theirs) == len(real.weights)
    for name, array in theirs.items():
        *_, layer, module, part = f"-.{name}".split(".")
        ours = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}.get(module)
        ours = real.weights[f"{ours or f'model.layers.{layer}.{LAYER[module]}'}.{part}"]
        expected = np.array(array)
        if module in ("attn_q", "attn_k"):
            heads = expected.reshape(-1, 64, expected.shape[-1])
            expected = np.concatenate([heads[:, 0::2], heads[:, 1::2]], 1).reshape(expected.shape)
        np.testing.assert_array_equal(np.array(ours), expected, name)


def test_the_real_model_knows_the_capital_of_france(real):
    model = build(real, mx.float32)
    tokenizer = TokenizerWrapper(real.tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}], add_generation_prompt=True
    )
    assert "Paris" in generate(model, tokenizer, prompt, max_tokens=12)


def build(gguf: GGUFModel, dtype: mx.Dtype | None = None) -> llama.Model:
    """The mlx-lm model, strictly loaded as mlx-lm's own ``load_model`` does it."""
    model = llama.Model(llama.ModelArgs.from_dict(gguf.config))
    if "quantization" in gguf.config:
        quantization = dict(gguf.config["quantization"])

        def predicate(path, _):
            return quantization.get(path, f"{path}.scales" in gguf.weights)

        default = {key: quantization[key] for key in ("group_size", "bits", "mode")}
        nn.quantize(model, **default, class_predicate=predicate)
    model.load_weights(list(gguf.weights.items()))
    if dtype:
        model.set_dtype(dtype)
    return model


def test_loading_reads_no_weights(smollm2_gguf):
    with memory_peak() as peak:
        gguf = load_gguf(smollm2_gguf, with_tokenizer=False)
    assert peak.nbytes < 1 << 20
    assert len(gguf.weights) == 694


def test_writing_takes_the_memory_of_the_largest_tensor(smollm2_gguf, tmp_path):
    weights = load_gguf(smollm2_gguf, with_tokenizer=False).weights
    largest = max(array.nbytes for array in weights.values())
    with memory_peak() as peak:
        write_safetensors(tmp_path / "weights.safetensors", weights)
    # As it is in the file, and decoded; all weights would be 3.5 times the largest.
    assert peak.nbytes < 2.5 * largest


# --- tiny files

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "vocab_size": 40,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000.0,
    "max_position_embeddings": 128,
    "model_type": "llama",
    "attention_bias": True,
    "tie_word_embeddings": False,
}


def number(value: float, dtype: mx.Dtype = mx.uint32) -> mx.array:
    return mx.array(value, dtype)


def tiny_metadata() -> dict:
    return {
        "general.architecture": "llama",
        "llama.block_count": number(2),
        "llama.embedding_length": number(64),
        "llama.feed_forward_length": number(96),
        "llama.attention.head_count": number(4),
        "llama.attention.head_count_kv": number(2),
        "llama.attention.key_length": number(24),
        "llama.attention.value_length": number(24),
        "llama.attention.layer_norm_rms_epsilon": number(1e-6, mx.float32),
        "llama.context_length": number(128),
        "llama.rope.freq_base": number(5000.0, mx.float32),
    }


def tiny_model() -> llama.Model:
    mx.random.seed(3)
    model = llama.Model(llama.ModelArgs.from_dict(SHAPE))
    model.update(
        {"model": {"norm": {"weight": mx.random.uniform(0.5, 1.5, (64,))}}},
    )
    for layer in model.layers:
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            bias = layer.self_attn[projection].bias
            layer.self_attn[projection].bias = mx.random.normal(bias.shape)
    return model


def tiny_tensors(model: llama.Model) -> dict[str, mx.array]:
    """Named and permuted as llama.cpp's converter does it."""
    names = {name: gguf for gguf, name in LAYER.items()}
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    tensors = {}
    for name, array in tree_flatten(model.parameters()):
        module, _, part = name.rpartition(".")
        gguf = outer.get(module)
        if gguf is None:
            _, _, layer, inner = module.split(".", 3)
            gguf = f"blk.{layer}.{names[inner]}"
        heads = {"q_proj": 4, "k_proj": 2}.get(module.rpartition(".")[2])
        if heads:
            halves = array.reshape(heads, 2, 12, *array.shape[1:])
            array = halves.swapaxes(1, 2).reshape(array.shape)
        tensors[f"{gguf}.{part}"] = array
    return tensors


def save(folder: Path, metadata: dict | None = None, tensors: dict | None = None) -> Path:
    """A tiny GGUF file; a None removes the entry."""
    path = folder / "tiny.gguf"
    metadata = tiny_metadata() | (metadata or {})
    tensors = tiny_tensors(tiny_model()) | (tensors or {})
    mx.save_gguf(
        str(path),
        {name: array for name, array in tensors.items() if array is not None},
        {key: value for key, value in metadata.items() if value is not None},
    )
    return path


def load_tiny(folder: Path, *args) -> GGUFModel:
    return load_gguf(save(folder, *args), with_tokenizer=False)


def assert_refused(path: Path, expected: str, with_tokenizer: bool = False) -> None:
    with pytest.raises(IFPError, match=expected) as caught:
        load_gguf(path, with_tokenizer)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_model_survives_the_way_through_gguf(tmp_path):
    model = tiny_model()
    gguf = load_tiny(tmp_path)
    assert gguf.tokenizer is None
    assert SHAPE.items() <= gguf.config.items()
    assert "quantization" not in gguf.config
    for name, array in tree_flatten(model.parameters()):
        assert mx.array_equal(gguf.weights[name], array), name
    tokens = mx.arange(12)[None]
    assert mx.array_equal(build(gguf)(tokens), model(tokens))


def test_the_file_is_not_needed_after_loading(tmp_path):
    path = save(tmp_path)
    gguf = load_gguf(path, with_tokenizer=False)
    path.write_bytes(b"")
    for name, array in tree_flatten(tiny_model().parameters()):
        assert mx.array_equal(gguf.weights[name], array), name


def test_nothing_is_left_in_the_temporary_directory(tmp_path, monkeypatch):
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(directory))
    gguf = load_tiny(tmp_path)
    assert not list(directory.iterdir())
    mx.eval(gguf.weights)


def test_a_bias_the_file_does_not_have_is_zero(tmp_path):
    removed = {f"blk.{i}.attn_output.bias": None for i in range(2)}
    gguf = load_tiny(tmp_path, None, removed)
    assert gguf.config["attention_bias"]
    assert not gguf.weights["model.layers.1.self_attn.o_proj.bias"].any()
    build(gguf)


def test_without_output_the_embeddings_are_tied(tmp_path):
    gguf = load_tiny(tmp_path, None, {"output.weight": None})
    assert gguf.config["tie_word_embeddings"]
    build(gguf)


def test_float16_stays_float16(tmp_path):
    half = {k: v.astype(mx.float16) for k, v in tiny_tensors(tiny_model()).items() if v.ndim > 1}
    gguf = load_tiny(tmp_path, None, half)
    assert gguf.weights["lm_head.weight"].dtype == mx.float16
    assert gguf.weights["model.norm.weight"].dtype == mx.float32
    assert gguf.config["torch_dtype"] == "float16"


def halves(raw: np.ndarray, start: int) -> np.ndarray:
    return np.ascontiguousarray(raw[:, start : start + 2]).view(np.float16).astype(np.float64)


def q4_k(raw: np.ndarray) -> np.ndarray:
    """Value by value: of each 64, the low halves of 32 bytes, then the high ones."""
    out = np.zeros((len(raw), 256))
    s = raw[:, 4:16].astype(int)
    for i in range(256):
        j = i // 32
        if j < 4:
            scale, low = s[:, j] & 63, s[:, j + 4] & 63
        else:
            scale = s[:, j + 4] & 15 | s[:, j - 4] >> 6 << 4
            low = s[:, j + 4] >> 4 | s[:, j] >> 6 << 4
        q = raw[:, 16 + i // 64 * 32 + i % 32].astype(int) >> (j % 2 * 4) & 15
        out[:, i] = halves(raw, 0)[:, 0] * scale * q - halves(raw, 2)[:, 0] * low
    return out


def q6_k(raw: np.ndarray) -> np.ndarray:
    """Value by value: 4 bits of one byte and 2 of another, signed scales of 16 values."""
    out = np.zeros((len(raw), 256))
    for i in range(256):
        part, j = divmod(i, 128)
        low = raw[:, part * 64 + j % 64].astype(int) >> (j // 64 * 4) & 15
        high = raw[:, 128 + part * 32 + j % 32].astype(int) >> (j // 32 * 2) & 3
        scale = raw[:, 192 + i // 16].astype(np.int8).astype(int)
        out[:, i] = halves(raw, 208)[:, 0] * scale * ((high << 4 | low) - 32)
    return out


@pytest.mark.parametrize(
    ("kind", "block_bytes", "scales", "expected"),
    [("Q4_K", 144, (0, 2), q4_k), ("Q6_K", 210, (208,), q6_k)],
)
def test_k_quants_decode_to_their_values(kind, block_bytes, scales, expected):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (4, block_bytes), dtype=np.uint8)
    for start in scales:
        values = rng.uniform(0.001, 0.01, (4, 1)).astype(np.float16)
        raw[:, start : start + 2] = values.view(np.uint8)
    tensor = GGUFTensor(kind, (2, 512), (2, 2, block_bytes), (0, raw.size))
    arrays = decode(tensor, mx.array(raw).reshape(tensor.stored))
    if "scales" in arrays:
        arrays = {k: v.astype(mx.float32) if k != "weight" else v for k, v in arrays.items()}
        values = mx.dequantize(*arrays.values(), group_size=32, bits=4)
    else:
        values = arrays["weight"].astype(mx.float32)
    reference = expected(raw).reshape(2, 512)
    # Scales, or values, are rounded to float16.
    np.testing.assert_allclose(values, reference, rtol=0, atol=1e-3 * np.abs(reference).max())


@pytest.mark.parametrize(
    ("kind", "per_block", "block_bytes"),
    [row for row in gguf_file.TENSOR_TYPES.values() if row[0] not in gguf_file.PLAIN_TYPES],
)
def test_a_tensor_decoded_in_steps_is_the_same(monkeypatch, kind, per_block, block_bytes):
    rng = np.random.default_rng(0)
    blocks = mx.array(rng.integers(0, 256, (5, 256 // per_block, block_bytes), dtype=np.uint8))
    tensor = GGUFTensor(kind, (5, 256), blocks.shape, (0, blocks.size))
    whole = decode(tensor, blocks)
    monkeypatch.setattr(gguf_file, "VALUES_AT_ONCE", 2 * 256)
    steps = decode(tensor, blocks)
    assert whole.keys() == steps.keys()
    for part in whole:
        assert mx.array_equal(whole[part].view(mx.uint16), steps[part].view(mx.uint16)), part


# --- rope scaling


@pytest.mark.parametrize(
    "keys",
    [
        {"scaling.type": "linear", "scaling.factor": 4.0},
        {"scaling.factor": 4.0},
        {"scale_linear": 4.0},
    ],
)
def test_linear_rope_scaling(tmp_path, keys):
    metadata = {
        f"llama.rope.{key}": value if isinstance(value, str) else number(value, mx.float32)
        for key, value in keys.items()
    }
    scaling = load_tiny(tmp_path, metadata).config["rope_scaling"]
    assert scaling == {"rope_type": "linear", "factor": 4.0}


def test_every_end_token_is_in_the_config(tmp_path):
    metadata = {
        "tokenizer.ggml.tokens": list("abcdefgh"),
        "tokenizer.ggml.bos_token_id": number(1),
        "tokenizer.ggml.eos_token_id": number(0),
        "tokenizer.ggml.eot_token_id": number(7),
    }
    config = load_tiny(tmp_path, metadata).config
    assert config["bos_token_id"] == 1
    assert config["eos_token_id"] == [0, 7]


def test_no_rope_scaling(tmp_path):
    metadata = {"llama.rope.scaling.type": "none", "llama.rope.scaling.factor": number(4.0)}
    assert "rope_scaling" not in load_tiny(tmp_path, metadata).config


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("factor", "high", "context"), [(8.0, 4.0, 8192), (32.0, 4.0, 8192), (16.0, 8.0, 2048)]
)
def test_llama3_rope_scaling_is_recovered(tmp_path, head_dim, factor, high, context):
    theta = 500000.0
    frequencies = 1 / theta ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    turns = context * frequencies / (2 * np.pi)
    smooth = np.clip((turns - 1) / (high - 1), 0, 1)
    factors = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    tensors = {"rope_freqs.weight": mx.array(factors)}
    for i in range(2):
        for name, shape in {
            "q.weight": (4 * head_dim, 64),
            "k.weight": (2 * head_dim, 64),
            "v.weight": (2 * head_dim, 64),
            "output.weight": (64, 4 * head_dim),
        }.items():
            tensors[f"blk.{i}.attn_{name}"] = mx.zeros(shape)
        tensors |= {f"blk.{i}.attn_{name}.bias": None for name in ("q", "k", "v", "output")}
    metadata = {
        "llama.rope.freq_base": number(theta, mx.float32),
        "llama.attention.key_length": number(head_dim),
        "llama.attention.value_length": number(head_dim),
    }
    config = load_tiny(tmp_path, metadata, tensors).config
    assert config["rope_scaling"] == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    rope = initialize_rope(head_dim, theta, False, config["rope_scaling"], 131072)
    np.testing.assert_allclose(rope._freqs, factors / frequencies, rtol=1e-4)


def test_rope_factors_of_one_are_no_scaling(tmp_path):
    gguf = load_tiny(tmp_path, None, {"rope_freqs.weight": mx.ones(12)})
    assert "rope_scaling" not in gguf.config


@pytest.mark.parametrize(
    "factors",
    [list(range(1, 13)), list(range(12)), [8.0] * 11, [1.0, 1.5] + [2.0] * 10, [mx.inf] * 12],
)
def test_other_rope_factors_are_refused(tmp_path, factors):
    tensors = {"rope_freqs.weight": mx.array(factors, mx.float32)}
    assert_refused(save(tmp_path, None, tensors), "rope_freqs.weight")


# --- what is refused


@pytest.mark.parametrize(
    ("metadata", "tensors", "expected"),
    [
        ({"general.architecture": "qwen2"}, {}, "architecture is 'qwen2'"),
        ({"general.architecture": None}, {}, "architecture is None"),
        ({"general.alignment": "none"}, {}, "damaged"),
        ({"general.alignment": number(0)}, {}, "damaged"),
        ({}, {"blk.0.attn_sinks.weight": mx.zeros(4)}, r"blk\.0\.attn_sinks\.weight is unknown"),
        ({}, {"blk.2.attn_norm.weight": mx.zeros(64)}, r"blk\.2\.attn_norm\.weight is unknown"),
        ({}, {"blk.1.ffn_up.weight": None}, r"blk\.1\.ffn_up\.weight is missing"),
        ({}, {"token_embd.weight": None}, r"token_embd\.weight is missing"),
        ({}, {"token_embd.weight": mx.zeros((0, 64))}, r"token_embd\.weight of shape \(0, 64\)"),
        ({}, {"blk.0.ffn_gate_exps.weight": mx.zeros((4, 96, 64))}, "ffn_gate_exps"),
        ({"llama.expert_count": number(8)}, {}, "mixture of experts"),
        ({}, {"blk.0.attn_k.weight": mx.zeros((96, 64))}, r"attn_k\.weight has the shape"),
        ({"llama.block_count": None}, {}, r"llama\.block_count"),
        ({"llama.block_count": number(4000000000)}, {}, r"blk\.2\.attn_norm\.weight is missing"),
        ({"llama.rope.dimension_count": number(12)}, {}, "rope.dimension_count"),
        ({"llama.rope.scaling.type": "yarn"}, {}, "yarn"),
        ({"llama.logit_scale": number(0.5, mx.float32)}, {}, "logit_scale"),
        ({"split.count": number(3, mx.uint16)}, {}, "one part of 3"),
    ],
)
def test_models_it_cannot_represent_are_refused(tmp_path, metadata, tensors, expected):
    assert_refused(save(tmp_path, metadata, tensors), expected)


def test_an_unsupported_tensor_type_is_named(tmp_path):
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    name = b"blk.1.ffn_up.weight"
    kind = data.index(name) + len(name) + 4 + 2 * 8
    data[kind : kind + 4] = (13).to_bytes(4, "little")
    path.write_bytes(data)
    assert_refused(path, r"blk\.1\.ffn_up\.weight has the type Q5_K")


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    for name, content in {"empty": b"", "short": b"GG", "other": b"PK\3\4" * 100}.items():
        (tmp_path / name).write_bytes(content)
        assert_refused(tmp_path / name, "not a GGUF file")
    (tmp_path / "old").write_bytes(b"GGUF\1\0\0\0" + bytes(100))
    assert_refused(tmp_path / "old", "GGUF version 1")
    assert_refused(tmp_path / "absent.gguf", "No such file")
    assert_refused(tmp_path, "directory")


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path):
    data = save(tmp_path).read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in [*range(8, 2000, 7), len(data) // 2, len(data) - 1]:
        cut.write_bytes(data[:size])
        assert_refused(cut, "truncated")


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path)
    name_tensors = gguf._name_tensors

    def shrink_first(*args):
        os.truncate(path, path.stat().st_size // 2)
        return name_tensors(*args)

    monkeypatch.setattr(gguf, "_name_tensors", shrink_first)
    assert_refused(path, "truncated while it was read")


def test_without_space_for_the_copy_the_way_out_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    assert_refused(save(tmp_path), "absent .*; it takes")


def test_a_tokenizer_that_is_refused_can_be_left_out(tmp_path):
    path = save(tmp_path, {"tokenizer.ggml.model": "bert"})
    assert_refused(path, "'bert' is not supported; .* --tokenizer", with_tokenizer=True)
    assert load_gguf(path, with_tokenizer=False).tokenizer is None


def test_a_damaged_header_never_gets_through_as_another_error(tmp_path):
    data = save(tmp_path).read_bytes()
    rng = np.random.default_rng(0)
    path = tmp_path / "damaged.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + rng.bytes(5000))
    assert_refused(path, "damaged")
    for _ in range(300):
        copy = bytearray(data)
        for position in rng.integers(4, 2000, 3):
            copy[position] = rng.integers(256)
        path.write_bytes(copy)
        try:
            load_gguf(path, with_tokenizer=False)
        except IFPError as error:
            assert "\n" not in str(error)
