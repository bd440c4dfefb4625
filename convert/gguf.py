"""A llama-architecture GGUF file as an mlx-lm model: config, weights and tokenizer.

``mx.load`` reads GGUF too, but (mlx 0.32) it decodes every second block of Q4_K with the scale of
its neighbour, needs write access to the file, and a damaged header can end the process. So the
header is read and checked here, and the blocks are rearranged by lazy MLX operations.
"""

import math
import mmap
import os
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from mlx_ifp.errors import IFPError

# Tensor types by number: name, values in a block, bytes of a block.
TENSOR_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
UNREADABLE_TYPES = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 39: "MXFP4"}
PLAIN_TYPES = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
GROUP_SIZE = 32

# Metadata types by number, as struct spells them; strings and arrays have no fixed size.
NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4


@dataclass(frozen=True)
class PreTokenizer:
    """How byte-level BPE splits text before it merges: by one expression after the other."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token stays whole
    add_bos: bool = False  # if the file does not say


_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# By llama.cpp's names; those it splits alike share a line.
PRE_TOKENIZERS = {
    name: pre_tokenizer
    for names, pre_tokenizer in (
        ("default", PreTokenizer((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))),
        ("gpt-2 phi-2 mpt olmo jais trillion exaone4", PreTokenizer((_GPT2,))),
        ("smollm starcoder refact command-r codeshell exaone", PreTokenizer((r"\p{N}", _GPT2))),
        ("llama-bpe llama3 llama-v3 falcon3 pixtral", PreTokenizer((_LLAMA3,), True, True)),
        ("dbrx smaug-bpe", PreTokenizer((_LLAMA3,))),
        ("qwen2 deepseek-r1-qwen megrez", PreTokenizer((_LLAMA3.replace("{1,3}", ""),))),
        ("tekken", PreTokenizer((_TEKKEN,), True, True)),
    )
    for name in names.split()
}


@dataclass
class GGUFModel:
    """What mlx-lm needs to build a model.

    Attributes:
        config: a ``config.json`` of model type ``llama``; its ``quantization`` is a default and
            the module paths that differ from it.
        weights: mlx-lm's names -> arrays. Q4_0, Q4_1, Q4_K and Q8_0 are affine quantized: uint32
            [rows, columns * bits / 32], scales and biases float16 [rows, columns / 32]. Q6_K is
            float16. F32 (mostly norms), F16 and BF16 stay what they are.
        tokenizer: with its chat template and special tokens, or None.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]
    tokenizer: PreTrainedTokenizerFast | None


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: type, shape (rows first), first byte in the file and its size."""

    kind: str
    shape: tuple[int, ...]
    block_bytes: int
    offset: int
    nbytes: int


def load_gguf(path: str | Path, with_tokenizer: bool = True) -> GGUFModel:
    """Read a GGUF file of the llama architecture (Llama, Mistral, SmolLM2).

    The bytes of all tensors are in memory when this returns: as much as the file has. Their final
    form is lazy: it is computed when an array is evaluated, and the bytes go with the last array
    made of them. So a conversion that evaluates, writes and drops one tensor after the other needs
    the file's size and one tensor more (SmolLM2-135M, 98 MB: 97 MB of MLX's memory, then 125).

    Args:
        path: the file.
        with_tokenizer: False leaves the tokenizer out, whatever its kind.

    Raises:
        IFPError: if the file is missing, not a GGUF or truncated; if its architecture, the type
            of a tensor or the tokenizer is not supported; if a tensor is missing, unknown or of
            another shape than the metadata says.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            if file.read(4) != b"GGUF":
                raise IFPError(f"{path}: not a GGUF file; give a .gguf file of a llama model.")
            version = int.from_bytes(file.read(4), "little")
            if version not in (2, 3):
                raise IFPError(f"{path}: GGUF version {version}; only 2 and 3 are supported.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise IFPError(f"{path}: cannot be read ({error.strerror}).") from error
    try:
        metadata, found, start = _read_header(data)
    except (struct.error, ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise IFPError(
            f"{path}: the header is truncated or damaged; get the file again."
        ) from error
    _check_kind(path, metadata)
    tensors = _check_tensors(path, found, start, len(data))
    config = _read_config(path, metadata, tensors)
    names = _name_tensors(path, tensors, config)
    tokenizer = _build_tokenizer(path, metadata, config) if with_tokenizer else None
    if "rope_freqs.weight" in tensors:
        factors = _decode(data, tensors["rope_freqs.weight"])["weight"].flatten().tolist()
        _set_llama3_scaling(path, factors, config)
    return GGUFModel(config, _read_weights(data, tensors, names, config), tokenizer)


def _unpack(data: mmap.mmap, code: str) -> tuple[Any, ...]:
    values = struct.unpack_from("<" + code, data, data.tell())
    data.seek(struct.calcsize("<" + code), os.SEEK_CUR)
    return values


def _string(data: mmap.mmap) -> str:
    (length,) = _unpack(data, "Q")
    return _unpack(data, f"{length}s")[0].decode()


def _value(data: mmap.mmap, kind: int) -> Any:
    if kind == STRING:
        return _string(data)
    if kind == ARRAY:
        kind, count = _unpack(data, "IQ")
        if kind == STRING:
            return [_string(data) for _ in range(count)]
        return list(_unpack(data, f"{count}{NUMBERS[kind]}"))
    (number,) = _unpack(data, NUMBERS[kind])
    # The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06.
    return float(str(np.float32(number))) if NUMBERS[kind] == "f" else number


def _read_header(data: mmap.mmap) -> tuple[dict[str, Any], dict[str, tuple], int]:
    """Metadata; name -> (shape, type number, offset); the first byte after the header."""
    data.seek(8)
    tensor_count, metadata_count = _unpack(data, "QQ")
    metadata, tensors = {}, {}
    for _ in range(metadata_count):
        key = _string(data)
        metadata[key] = _value(data, *_unpack(data, "I"))
    for _ in range(tensor_count):
        name = _string(data)
        (dims,) = _unpack(data, "I")
        shape = _unpack(data, f"{dims}Q")[::-1]
        tensors[name] = (shape, *_unpack(data, "IQ"))
    alignment = metadata.get("general.alignment", 32)
    return metadata, tensors, math.ceil(data.tell() / alignment) * alignment


def _check_kind(path: Path, metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise IFPError(
            f"{path}: the architecture is {architecture!r}, and of GGUF files only 'llama' is "
            "supported; convert the model's safetensors instead."
        )
    if metadata.get("split.count", 1) != 1:
        raise IFPError(
            f"{path}: one part of {metadata['split.count']}; join them with "
            "llama-gguf-split --merge first."
        )
    if metadata.get("llama.expert_count"):
        raise IFPError(f"{path}: a mixture of experts; only dense models are supported.")
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if metadata.get(f"llama.{key}"):
            raise IFPError(f"{path}: llama.{key} is not supported; mlx-lm's llama has none.")


def _check_tensors(
    path: Path, found: dict[str, tuple], start: int, size: int
) -> dict[str, GGUFTensor]:
    tensors = {}
    for name, (shape, number, offset) in found.items():
        if number not in TENSOR_TYPES:
            raise IFPError(
                f"{path}: {name} has the type {UNREADABLE_TYPES.get(number, number)}; only "
                f"{', '.join(kind for kind, *_ in TENSOR_TYPES.values())} are supported."
            )
        kind, per_block, block_bytes = TENSOR_TYPES[number]
        if not shape or shape[-1] % per_block or (len(shape) == 1 and per_block > 1):
            raise IFPError(f"{path}: {name} of shape {shape} cannot be {kind}; get the file again.")
        nbytes = math.prod(shape) // per_block * block_bytes
        if start + offset + nbytes > size:
            raise IFPError(
                f"{path}: {name} ends at byte {start + offset + nbytes:,}, but the file has "
                f"{size:,}; it is truncated. Get it again."
            )
        tensors[name] = GGUFTensor(kind, shape, block_bytes, start + offset, nbytes)
    return tensors


def _read_config(
    path: Path, metadata: dict[str, Any], tensors: dict[str, GGUFTensor]
) -> dict[str, Any]:
    def positive(key: str, default: float | None = None, kind: type = int) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # one per layer, all the same
        if not isinstance(value, kind) or not value > 0:
            raise IFPError(
                f"{path}: llama.{key} must be a positive {kind.__name__}, not {value!r}."
            )
        return value

    if "token_embd.weight" not in tensors:
        raise IFPError(f"{path}: the tensor token_embd.weight is missing.")
    heads, hidden_size = positive("attention.head_count"), positive("embedding_length")
    head_dim = positive("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if positive(key, head_dim) != head_dim or head_dim % 2:
            raise IFPError(
                f"{path}: llama.{key} is {positive(key, head_dim)} for heads of {head_dim} "
                "dimensions; only equal and even ones are supported."
            )
    # Norms are float32 whatever the matrices are; the model is to run in the type of these.
    kinds = {tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1}
    dtype = {"F32": "float32", "BF16": "bfloat16"}.get("".join(kinds), "float16")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": positive("feed_forward_length"),
        "num_hidden_layers": positive("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": positive("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "max_position_embeddings": positive("context_length"),
        "rms_norm_eps": positive("attention.layer_norm_rms_epsilon", kind=float),
        "rope_theta": positive("rope.freq_base", 10000.0, float),
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": dtype,
    }
    scaling = metadata.get("llama.rope.scaling.type", "linear")
    if scaling == "linear":
        old = metadata.get("llama.rope.scale_linear", 1.0)
        factor = positive("rope.scaling.factor", old, float)
        if factor != 1:
            config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none":
        raise IFPError(f"{path}: the rope scaling {scaling!r} is not supported, only 'linear'.")
    ids = _special_ids(metadata)
    config |= {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    stops = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    if len(stops) > 1:
        config["eos_token_id"] = sorted(stops)
    return config


def _modules(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """GGUF's name, mlx-lm's name and the weight's shape of every module."""
    hidden, ffn, vocab = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    queries = config["num_attention_heads"] * config["head_dim"]
    keys = config["num_key_value_heads"] * config["head_dim"]
    yield "token_embd", "model.embed_tokens", (vocab, hidden)
    yield "output_norm", "model.norm", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "output", "lm_head", (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        for gguf, name, shape in (
            ("attn_norm", "input_layernorm", (hidden,)),
            ("attn_q", "self_attn.q_proj", (queries, hidden)),
            ("attn_k", "self_attn.k_proj", (keys, hidden)),
            ("attn_v", "self_attn.v_proj", (keys, hidden)),
            ("attn_output", "self_attn.o_proj", (hidden, queries)),
            ("ffn_norm", "post_attention_layernorm", (hidden,)),
            ("ffn_gate", "mlp.gate_proj", (ffn, hidden)),
            ("ffn_up", "mlp.up_proj", (ffn, hidden)),
            ("ffn_down", "mlp.down_proj", (hidden, ffn)),
        ):
            yield f"blk.{i}.{gguf}", f"model.layers.{i}.{name}", shape


def _name_tensors(
    path: Path, tensors: dict[str, GGUFTensor], config: dict[str, Any]
) -> dict[str, str]:
    """GGUF's names of all tensors -> mlx-lm's; adds ``attention_bias`` and ``mlp_bias``."""
    for tensor in tensors:
        if "_exps" in tensor or "ffn_gate_inp" in tensor:
            raise IFPError(f"{path}: {tensor} belongs to experts; only dense models are supported.")
    names = {}
    for gguf, name, shape in _modules(config):
        if f"{gguf}.weight" not in tensors:
            raise IFPError(f"{path}: the tensor {gguf}.weight is missing.")
        parts = {"weight": shape}
        if name.endswith("_proj") and f"{gguf}.bias" in tensors:
            parts["bias"] = shape[:1]
        for part, expected in parts.items():
            actual = tensors[f"{gguf}.{part}"].shape
            if actual != expected:
                raise IFPError(f"{path}: {gguf}.{part} has the shape {actual}, not {expected}.")
            names[f"{gguf}.{part}"] = f"{name}.{part}"
    for tensor in sorted(tensors.keys() - names.keys() - {"rope_freqs.weight"}):
        raise IFPError(f"{path}: the tensor {tensor} is unknown; mlx-lm's llama has none like it.")
    biases = [name for name in names.values() if name.endswith(".bias")]
    config["attention_bias"] = any(".self_attn." in name for name in biases)
    config["mlp_bias"] = any(".mlp." in name for name in biases)
    return names


def _set_llama3_scaling(path: Path, factors: list[float], config: dict[str, Any]) -> None:
    """Add the ``rope_scaling`` whose rule stretches wavelengths by these factors [head_dim / 2].

    Between the wavelengths left alone and those stretched by ``factor``, 1 / f is linear in the
    frequency. The line has two parameters and the rule three, so ``low_freq_factor`` is free: 1.
    """
    if all(f == 1 for f in factors):
        return
    half, factor, guesses = config["head_dim"] // 2, factors[0], []
    frequencies = [config["rope_theta"] ** (-i / half) / (2 * math.pi) for i in range(half)]
    if len(factors) == half and all(1 <= f < math.inf for f in factors):
        factor = max(factors)
        smooth = [(factor / f - 1) / (factor - 1) for f in factors]
        line = [(x, y) for x, y in zip(frequencies, smooth, strict=True) if 0 < y < 1]
        guesses.append((4.0, 8192))
        if len(line) > 1:
            (x0, y0), (x1, y1) = line[0], line[-1]
            slope = (y0 - y1) / (x0 - x1)
            span = 1 / max(slope * x0 - y0, 1e-6)  # high_freq_factor - 1
            guesses.append((max(round(1 + span, 3), 1.001), round(slope * span)))
    for high, context in guesses:
        expected = [min(max((context * x - 1) / (high - 1), 0), 1) for x in frequencies]
        expected = [1 / ((1 - y) / factor + y) for y in expected]
        # The converter computes in float32.
        if np.allclose(factors, expected, rtol=1e-4, atol=0):
            config["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": 1.0,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
            return
    raise IFPError(
        f"{path}: rope_freqs.weight fits no llama3 rope scaling, others are unsupported."
    )


def _read_weights(
    data: mmap.mmap, tensors: dict[str, GGUFTensor], names: dict[str, str], config: dict[str, Any]
) -> dict[str, mx.array]:
    """mlx-lm's names -> arrays, not evaluated; adds ``quantization`` to the config."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights, quantized = {}, {}
    for gguf, name in names.items():
        module = name.rpartition(".")[0]
        arrays = _decode(data, tensors[gguf])
        if module.endswith(tuple(heads)):
            own = heads[module.rpartition(".")[2]]
            arrays = {part: _unpermute(array, own) for part, array in arrays.items()}
        weights[name] = arrays.pop("weight")
        weights |= {f"{module}.{part}": array for part, array in arrays.items()}
        if arrays:
            bits = weights[name].shape[-1] * 32 // tensors[gguf].shape[-1]
            quantized[module] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        biased = config["mlp_bias" if ".mlp." in module else "attention_bias"]
        if biased and module.endswith("_proj"):
            # mlx-lm has biases on all projections or on none; a zero changes nothing.
            zeros = mx.zeros(tensors[gguf].shape[:1], mx.float16)
            weights[f"{module}.bias"] = weights.get(f"{module}.bias", zeros)
    if quantized:
        bits = Counter(own["bits"] for own in quantized.values()).most_common(1)[0][0]
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        config["quantization"] |= {k: own for k, own in quantized.items() if own["bits"] != bits}
    return weights


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """Rows [heads * d, ...]: of each head, llama.cpp interleaves the halves that HF rotates."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def _decode(data: mmap.mmap, tensor: GGUFTensor) -> dict[str, mx.array]:
    """``weight``, and for quantized types ``scales`` and ``biases``, not evaluated."""
    raw = mx.array(np.frombuffer(data, np.uint8, tensor.nbytes, tensor.offset))
    kind, shape = tensor.kind, tensor.shape
    if kind in PLAIN_TYPES:
        return {"weight": raw.view(PLAIN_TYPES[kind]).reshape(shape)}
    raw = raw.reshape(*shape[:-1], -1, tensor.block_bytes)

    def half(start: int) -> mx.array:
        return raw[..., start : start + 2].view(mx.float16)

    def bytes_at(start: int, stop: int, *split: int) -> mx.array:
        return raw[..., start:stop].reshape(*raw.shape[:-1], *split)

    def nibbles(packed: mx.array) -> mx.array:
        return mx.concatenate([packed & 15, packed >> 4], -1)

    if kind == "Q6_K":
        # Groups of 16, smaller than any of MLX's.
        high = bytes_at(128, 192, 2, 32)
        high = mx.concatenate([high >> shift & 3 for shift in (0, 2, 4, 6)], -1)
        values = nibbles(bytes_at(0, 128, 2, 64)) | high << 4
        values = values.reshape(*raw.shape[:-1], 16, 16).astype(mx.float32) - 32
        scales = half(208).astype(mx.float32) * raw[..., 192:208].view(mx.int8)
        return {"weight": (values * scales[..., None]).astype(mx.float16).reshape(shape)}
    if kind == "Q8_0":
        packed = raw[..., 2:] ^ 128  # from signed to unsigned
        scales, biases = half(0), half(0) * -128
    else:
        if kind == "Q4_K":
            values = nibbles(bytes_at(16, 144, 4, 32))
            low, mid, top = (raw[..., i : i + 4] for i in (4, 8, 12))
            scales = mx.concatenate([low & 63, (top & 15) | (low >> 6 << 4)], -1)
            biases = mx.concatenate([mid & 63, (top >> 4) | (mid >> 6 << 4)], -1)
            scales = (scales * half(0).astype(mx.float32)).astype(mx.float16)
            biases = -(biases * half(2).astype(mx.float32)).astype(mx.float16)
        elif kind == "Q4_1":
            values, scales, biases = nibbles(raw[..., 4:]), half(0), half(2)
        else:
            values, scales, biases = nibbles(raw[..., 2:]), half(0), half(0) * -8
        packed = values[..., ::2] | (values[..., 1::2] << 4)
    arrays = {"weight": packed.view(mx.uint32), "scales": scales, "biases": biases}
    return {part: array.reshape(*shape[:-1], -1) for part, array in arrays.items()}


def _special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Ids of the special tokens the file names."""
    count = len(metadata.get("tokenizer.ggml.tokens") or ())
    # SentencePiece's own, which old files leave out.
    own = {"unk": 0, "bos": 1, "eos": 2}
    ids = own if metadata.get("tokenizer.ggml.model") == "llama" else {}
    keys = {name: name for name in ("bos", "eos", "eot", "eom")}
    for name, key in (keys | {"unk": "unknown", "pad": "padding"}).items():
        ids[name] = metadata.get(f"tokenizer.ggml.{key}_token_id", ids.get(name))
    return {name: id for name, id in ids.items() if isinstance(id, int) and 0 <= id < count}


def _build_tokenizer(
    path: Path, metadata: dict[str, Any], config: dict[str, Any]
) -> PreTrainedTokenizerFast:
    def refuse(reason: str) -> IFPError:
        return IFPError(f"{path}: {reason}; give the model's own with --tokenizer PATH.")

    kind, pre = (metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind not in ("gpt2", "llama"):
        raise refuse(f"the tokenizer {kind!r} is not supported")
    if kind == "gpt2" and pre not in PRE_TOKENIZERS:
        raise refuse(f"the tokenizer's way to split text, {pre!r}, is not supported")
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    if not len(set(tokens)) == len(tokens) == len(types) <= config["vocab_size"]:
        raise refuse("the tokenizer repeats tokens or has more than the embedding")
    ids = _special_ids(metadata)
    named = {name: tokens[number] for name, number in ids.items()}
    try:
        if kind == "gpt2":
            backend, add_bos = _byte_level_bpe(metadata), PRE_TOKENIZERS[pre].add_bos
        else:
            backend, add_bos = _sentencepiece_bpe(metadata, types, ids), True
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=kind != USER_DEFINED)
                for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
                if kind in (UNKNOWN, CONTROL, USER_DEFINED) or number in ids.values()
            ]
        )
        first, last = (
            [named[name]] if metadata.get(f"tokenizer.ggml.add_{name}_token", add) else []
            for name, add in (("bos", add_bos and "bos" in named), ("eos", False))
        )
        if first or last:
            backend.post_processor = TemplateProcessing(
                single=[*first, "$A", *last],
                pair=[*first, "$A", *last, *first, "$B", *last],
                special_tokens=[(token, tokens.index(token)) for token in first + last],
            )
        return PreTrainedTokenizerFast(
            tokenizer_object=backend,
            chat_template=metadata.get("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
            model_max_length=config["max_position_embeddings"],
            **{f"{k}_token": named[k] for k in ("bos", "eos", "unk", "pad") if k in named},
        )
    except Exception as error:  # tokenizers raises no narrower one
        raise refuse(f"the tokenizer cannot be built ({error!r})") from error


def _byte_level_bpe(metadata: dict[str, Any]) -> Tokenizer:
    vocab = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    pre = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]]
    backend = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    splits = [pre_tokenizers.Split(Regex(text), "isolated") for text in pre.expressions]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        # Not ByteLevel's own: after the splits, it would put a space before every piece.
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(" "), normalizers.Replace(Regex(r"\A (?=\s)"), "")]
        )
    return backend


def _sentencepiece_bpe(
    metadata: dict[str, Any], types: list[int], ids: dict[str, int]
) -> Tokenizer:
    tokens = metadata["tokenizer.ggml.tokens"]
    vocab = {token: i for i, token in enumerate(tokens)}
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"], strict=True))
    reserved = {token for token, type_ in zip(tokens, types, strict=True) if type_ != NORMAL}
    merges = generate_merges(vocab, scores, reserved | {tokens[i] for i in ids.values()})
    unknown = tokens[ids["unk"]]
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    # Like llama.cpp, and unlike Metaspace, this adds the space before a text that has one too.
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    spaces = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend
