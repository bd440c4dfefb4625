"""GGUF files: what the reader makes of a real one, of tiny ones, and of broken ones."""

import io
import json
import re
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import sentencepiece
from mlx.utils import tree_flatten
from mlx_lm import generate
from mlx_lm.models import llama
from mlx_lm.models.rope_utils import initialize_rope
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from mlx_ifp.convert.gguf import GGUFModel, GGUFTensor, _decode, load_gguf
from mlx_ifp.errors import IFPError

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
UNICODE = [
    "Hello, world! It's I'LL",
    "  two  spaces\n\n\ttabs \r\n end ",
    "naïve café, e\u0301, 日本語 한국어 עברית",
    "🎉👩‍👩‍👧 x²½ ٣٤ 12345",
    "",
]


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


def test_digits_are_split(real):
    ids = real.tokenizer.encode("In 1984")
    assert real.tokenizer.convert_ids_to_tokens(ids) == ["In", "Ġ", "1", "9", "8", "4"]


def test_special_tokens_are_one_id_wherever_they_stand(real):
    special = real.tokenizer.added_tokens_decoder
    assert len(special) == 17
    for number, token in special.items():
        assert token.special
        assert real.tokenizer.encode(token.content) == [number]
        assert number in real.tokenizer.encode(f"a{token.content}b")
    ids = real.tokenizer.encode("<|im_start|>Hi<|im_end|>")
    assert real.tokenizer.decode(ids, skip_special_tokens=True) == "Hi"
    assert real.tokenizer.bos_token_id == 1
    assert real.tokenizer.eos_token_id == real.tokenizer.pad_token_id == 2
    assert real.tokenizer.unk_token_id == 0


@pytest.mark.parametrize("text", UNICODE)
def test_decoding_restores_the_text(real, text):
    assert real.tokenizer.decode(real.tokenizer.encode(text)) == text


def test_the_real_tokenizer_survives_saving(real, tmp_path):
    assert_survives_saving(real, tmp_path)


def test_the_chat_template_is_the_files(real, tmp_path):
    chat = [{"role": "user", "content": "Hi"}]
    text = real.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = real.tokenizer.encode(text)
    assert real.tokenizer.decode(ids) == text
    assert ids.count(1) == text.count("<|im_start|>")


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


def assert_survives_saving(gguf: GGUFModel, folder: Path) -> None:
    gguf.tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(gguf.config))
    again = load_tokenizer(folder)
    special = [token.content for token in gguf.tokenizer.added_tokens_decoder.values()]
    for text in [*UNICODE, "".join(special), " ".join(special)]:
        ids = gguf.tokenizer.encode(text)
        assert again.encode(text) == ids
        assert again.decode(ids) == gguf.tokenizer.decode(ids)
        streamed = again.detokenizer
        for number in ids:
            streamed.add_token(number)
        streamed.finalize()
        assert streamed.text.lstrip(" ") == again.decode(ids).lstrip(" ")
    assert again.chat_template == gguf.tokenizer.chat_template
    assert again.special_tokens_map == gguf.tokenizer.special_tokens_map


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
    arrays = _decode(raw.tobytes(), GGUFTensor(kind, (2, 512), block_bytes, 0, raw.size))
    if "scales" in arrays:
        arrays = {k: v.astype(mx.float32) if k != "weight" else v for k, v in arrays.items()}
        values = mx.dequantize(*arrays.values(), group_size=32, bits=4)
    else:
        values = arrays["weight"].astype(mx.float32)
    reference = expected(raw).reshape(2, 512)
    # Scales, or values, are rounded to float16.
    np.testing.assert_allclose(values, reference, rtol=0, atol=1e-3 * np.abs(reference).max())


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
        ({}, {"blk.0.attn_sinks.weight": mx.zeros(4)}, r"blk\.0\.attn_sinks\.weight is unknown"),
        ({}, {"blk.2.attn_norm.weight": mx.zeros(64)}, r"blk\.2\.attn_norm\.weight is unknown"),
        ({}, {"blk.1.ffn_up.weight": None}, r"blk\.1\.ffn_up\.weight is missing"),
        ({}, {"token_embd.weight": None}, r"token_embd\.weight is missing"),
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


# --- tokenizers of tiny files


def bpe_metadata(**changes) -> dict:
    """A byte-level BPE tokenizer trained on this file, and what a GGUF says of it."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>", "<|begin|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train([__file__], trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = [*sorted(model["vocab"], key=model["vocab"].get), "<user>"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.token_type": mx.array([3, 3] + [1] * 498 + [4], mx.int32),
        "tokenizer.ggml.bos_token_id": number(1),
        "tokenizer.ggml.eos_token_id": number(0),
        "tokenizer.chat_template": "{{ messages[0].content }}",
    } | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}


def load_with(folder: Path, metadata: dict, vocab_size: int = 501) -> GGUFModel:
    tensors = {name: mx.zeros((vocab_size, 64)) for name in ("token_embd.weight", "output.weight")}
    return load_gguf(save(folder, metadata, tensors))


def test_byte_level_bpe_gives_the_ids_of_its_origin(tmp_path):
    metadata = bpe_metadata()
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split()) for merge in metadata["tokenizer.ggml.merges"]]
    origin = Tokenizer(models.BPE(vocab, merges))
    origin.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gguf = load_with(tmp_path, metadata)
    lines = [line for line in Path(__file__).read_text().splitlines() if "<" not in line]
    for text in [*UNICODE, *lines]:
        assert gguf.tokenizer.encode(text) == origin.encode(text).ids
    assert gguf.tokenizer.encode("a<user>") == [*origin.encode("a").ids, 500]
    assert not gguf.tokenizer.added_tokens_decoder[500].special
    assert_survives_saving(gguf, tmp_path)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", "ĠI", "'", "LL", "Ġ12345", "!!", "ĊĊ"]),
        ("smollm", ["It", "'s", "ĠI", "'", "LL", "Ġ", "1", "2", "3", "4", "5", "!!", "ĊĊ"]),
        ("llama-bpe", ["It", "'s", "ĠI", "'LL", "Ġ", "123", "45", "!!ĊĊ"]),
        ("qwen2", ["It", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "5", "!!ĊĊ"]),
        ("tekken", ["It", "'s", "ĠI", "'LL", "Ġ", "1", "2", "3", "4", "5", "!!ĊĊ"]),
        ("default", ["It", "'", "s", "ĠI", "'", "LL", "Ġ", "123", "45", "!!", "ĊĊ"]),
    ],
)
def test_text_is_split_the_models_way(tmp_path, pre, pieces):
    tokenizer = load_with(tmp_path, bpe_metadata(pre=pre)).tokenizer.backend_tokenizer
    found = tokenizer.pre_tokenizer.pre_tokenize_str("It's I'LL 12345!!\n\n")
    assert [piece for piece, _ in found] == pieces


@pytest.mark.parametrize("key", ["add_bos_token", "add_eos_token"])
def test_bos_and_eos_are_added_if_the_file_says_so(tmp_path, key):
    plain = load_with(tmp_path, bpe_metadata()).tokenizer.encode("Hi")
    gguf = load_with(tmp_path, bpe_metadata(**{key: number(True, mx.bool_)}))
    expected = [1, *plain] if key == "add_bos_token" else [*plain, 0]
    assert gguf.tokenizer.encode("Hi") == expected
    assert gguf.tokenizer.encode("Hi", add_special_tokens=False) == plain
    assert_survives_saving(gguf, tmp_path)


def test_llama_3_adds_bos_unless_the_file_says_no(tmp_path):
    assert load_with(tmp_path, bpe_metadata(pre="llama-bpe")).tokenizer.encode("Hi")[0] == 1
    no = bpe_metadata(pre="llama-bpe", add_bos_token=number(False, mx.bool_))
    assert load_with(tmp_path, no).tokenizer.encode("Hi")[0] != 1


def test_a_prefix_space_is_added_if_the_file_says_so(tmp_path):
    plain = load_with(tmp_path, bpe_metadata(pre="smollm")).tokenizer
    prefix = bpe_metadata(pre="smollm", add_space_prefix=number(True, mx.bool_))
    gguf = load_with(tmp_path, prefix)
    assert gguf.tokenizer.encode("Hi 12") == plain.encode(" Hi 12")
    assert gguf.tokenizer.encode(" Hi") == plain.encode(" Hi")
    assert_survives_saving(gguf, tmp_path)


def test_every_end_token_is_in_the_config(tmp_path):
    gguf = load_with(tmp_path, bpe_metadata(eot_token_id=number(7)))
    assert gguf.config["eos_token_id"] == [0, 7]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"pre": "rot13"}, "'rot13'"),
        ({"pre": None}, "None"),
        ({"model": "bert"}, "'bert'"),
        ({"model": None}, "None"),
        ({"merges": ["no such", "pair s"]}, "cannot be built"),
        ({"tokens": ["a"] * 501}, "repeats"),
    ],
)
def test_unknown_tokenizers_are_refused_with_a_way_out(tmp_path, changes, expected):
    metadata = bpe_metadata(**changes)
    with pytest.raises(IFPError, match=re.escape(expected)) as caught:
        load_with(tmp_path, metadata)
    assert "--tokenizer" in str(caught.value)
    assert str(tmp_path / "tiny.gguf") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert load_gguf(tmp_path / "tiny.gguf", with_tokenizer=False).tokenizer is None


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no-prefix"])
def spm(request) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece model of Llama 2's kind, trained on this file."""
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(Path(__file__).read_text().splitlines()),
        model_writer=file,
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=file.getvalue())
    processor.prefix = request.param
    return processor


def spm_metadata(spm: sentencepiece.SentencePieceProcessor) -> dict:
    kinds = {2: spm.is_unknown, 3: spm.is_control, 6: spm.is_byte}
    ids = range(spm.vocab_size())
    types = [next((kind for kind, test in kinds.items() if test(i)), 1) for i in ids]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": mx.array([spm.get_score(i) for i in ids]),
        "tokenizer.ggml.token_type": mx.array(types, mx.int32),
        "tokenizer.ggml.add_space_prefix": number(spm.prefix, mx.bool_),
    }


def test_a_sentencepiece_vocabulary_encodes_as_sentencepiece_does(tmp_path, spm):
    gguf = load_with(tmp_path, spm_metadata(spm), 600)
    lines = [line for line in Path(__file__).read_text().splitlines() if "</s>" not in line]
    for text in [*UNICODE, *lines, "a   b    c", " leading", "tab\tnew\nline"]:
        ids = gguf.tokenizer.encode(text)
        assert ids == [1, *spm.encode(text)], text
        assert gguf.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert gguf.tokenizer.bos_token_id == gguf.config["bos_token_id"] == 1
    assert gguf.tokenizer.eos_token_id == gguf.config["eos_token_id"] == 2
    assert gguf.tokenizer.encode("</s>", add_special_tokens=False) == [2]


def test_a_sentencepiece_tokenizer_survives_saving(tmp_path, spm):
    assert_survives_saving(load_with(tmp_path, spm_metadata(spm), 600), tmp_path)


def test_bos_can_be_left_out(tmp_path, spm):
    off = {"tokenizer.ggml.add_bos_token": number(False, mx.bool_)}
    gguf = load_with(tmp_path, spm_metadata(spm) | off, 600)
    assert gguf.tokenizer.encode("Hi there") == spm.encode("Hi there")
    assert_survives_saving(gguf, tmp_path)
