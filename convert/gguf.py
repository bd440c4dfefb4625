"""A llama-architecture GGUF file as an mlx-lm model: config, weights and tokenizer.

``mx.load`` reads GGUF too, but it takes the scales of Q4_K wrongly, opens the file for writing, and
a damaged header can end the process. So the header is read and checked here, and the blocks of
each tensor are rearranged with lazy MLX operations.
"""

import math
import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as PreSequence
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges

from mlx_ifp.errors import IFPError

# The tensor types we read: name, values in a block, bytes of a block.
_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    8: ("Q8_0", 32, 34),
    12: ("Q4_K", 256, 144),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
_OTHER_TYPES = {6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 13: "Q5_K", 39: "MXFP4"}
_PLAIN = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}
_GROUP_SIZE = 32

# Metadata types, as struct spells them; strings and arrays have no fixed size.
_NUMBERS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class _Split:
    """How byte-level BPE cuts text before it merges, one expression after the other."""

    expressions: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token is taken whole
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
# The names llama.cpp gives to what it splits alike.
_SPLITS = {
    name: split
    for names, split in {
        "gpt-2 phi-2 mpt olmo jais trillion granite-docling exaone4": _Split((_GPT2,)),
        "smollm starcoder refact command-r codeshell exaone minerva-7b": _Split((r"\p{N}", _GPT2)),
        "default": _Split((r"[\p{P}$+<=>^~|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
        "llama-bpe llama3 llama-v3 falcon3 pixtral": _Split((_LLAMA3,), True, True),
        "dbrx smaug-bpe": _Split((_LLAMA3,)),
        "qwen2 deepseek-r1-qwen megrez stablelm2": _Split((_LLAMA3.replace("{1,3}", ""),)),
        "tekken": _Split((_TEKKEN,), True, True),
    }.items()
    for name in names.split()
}


@dataclass
class GGUFModel:
    """What mlx-lm needs to build a model.

    Attributes:
        config: a ``config.json`` of model type ``llama``. Its ``quantization`` has mlx-lm's form:
            a default, and the module paths that differ from it.
        weights: mlx-lm's names -> arrays. Q4_0, Q4_1, Q4_K and Q8_0 become affine quantized
            weights (uint32 [rows, columns * bits / 32]) with float16 scales and biases
            [rows, columns / 32]; Q6_K becomes float16; F32 (norms, usually), F16 and BF16 stay.
        tokenizer: with the chat template and the special tokens, or None.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]
    tokenizer: PreTrainedTokenizerFast | None


def load_gguf(path: str | Path, with_tokenizer: bool = True) -> GGUFModel:
    """Read a GGUF file of the llama architecture (Llama, Mistral, SmolLM2).

    All that can be refused is refused before the weights are read, except an unknown rope scaling.
    Memory: the file's bytes are copied into MLX at once (98 MB for a file of 98 MB; the process
    then holds the file's size, and the pages of the mapped file that the system may drop). What
    is done to them is lazy: a tensor takes its final form when it is evaluated, and its bytes are
    freed with the last of its arrays. So to convert, evaluate, write and drop them one by one.

    Args:
        path: the file.
        with_tokenizer: False leaves the tokenizer out, whatever its kind.

    Raises:
        IFPError: if the file is missing, not a GGUF or truncated, its architecture, a tensor's
            type or its tokenizer is not supported, or a tensor is missing, unknown or misshapen.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            # An empty file cannot be mapped, and is no GGUF either.
            if file.read(4) != b"GGUF":
                raise IFPError(f"{path}: not a GGUF file; convert.py also reads model directories.")
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise IFPError(f"{path}: cannot be read: {error.strerror}.") from error
    metadata, tensors = _read_header(path, data)
    config = _read_config(path, metadata, tensors)
    names = _name_tensors(path, config, tensors)
    tokenizer = _build_tokenizer(path, metadata, config) if with_tokenizer else None
    weights = _read_weights(data, config, tensors, names)
    if "rope_freqs.weight" in tensors:
        factors = _decode(data, tensors["rope_freqs.weight"])["weight"].tolist()
        scaling = _llama3_scaling(path, factors, config["head_dim"], config["rope_theta"])
        if scaling:
            config["rope_scaling"] = scaling
    return GGUFModel(config, weights, tokenizer)


@dataclass(frozen=True)
class _Tensor:
    """Where a tensor lies: type, shape (rows first), first byte in the file, size in bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class _Cursor:
    """Reads a mapped file from the start, and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap):
        self.path, self.data, self.offset = path, data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.offset:
            raise IFPError(
                f"{self.path}: the header does not end within the file; it is truncated or "
                "damaged. Download it again."
            )
        self.offset += count
        return self.data[self.offset - count : self.offset]

    def number(self, code: str) -> int:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        try:
            return self.take(self.number("Q")).decode()
        except UnicodeDecodeError as error:
            raise self.damaged("a string that is no UTF-8") from error

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            kind, count = self.number("I"), self.number("Q")
            if kind == _STRING:
                return [self.string() for _ in range(count)]
            if kind in _NUMBERS:
                code = _NUMBERS[kind]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize(code))))
        if kind not in _NUMBERS:
            raise self.damaged(f"a value of the type {kind}")
        number = self.number(_NUMBERS[kind])
        # The shortest decimal of a float32: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(number))) if _NUMBERS[kind] == "f" else number

    def damaged(self, what: str) -> IFPError:
        return IFPError(
            f"{self.path}: the header has {what} before byte {self.offset:,}; "
            "the file is damaged. Download it again."
        )


def _read_header(path: Path, data: mmap.mmap) -> tuple[dict[str, Any], dict[str, _Tensor]]:
    """Metadata and tensors of a GGUF file, all inside the file."""
    cursor = _Cursor(path, data)
    cursor.take(4)
    version = cursor.number("I")
    if version not in (2, 3):
        raise IFPError(f"{path}: GGUF version {version} is not supported, only 2 and 3.")
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    metadata = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.number("I"))
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise IFPError(
            f"{path}: the architecture is {architecture!r}, and only 'llama' GGUF files can be "
            "read; convert the original (safetensors) model instead."
        )
    if metadata.get("split.count", 1) > 1:
        raise IFPError(
            f"{path}: one of {metadata['split.count']} parts of a model; merge them first "
            "(llama-gguf-split --merge)."
        )
    found = {}
    for _ in range(tensor_count):
        name, dims = cursor.string(), cursor.number("I")
        if not 1 <= dims <= 4:
            raise cursor.damaged(f"a tensor of {dims} dimensions")
        shape = tuple(cursor.number("Q") for _ in range(dims))[::-1]
        found[name] = (shape, cursor.number("I"), cursor.number("Q"))
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise cursor.damaged(f"an alignment of {alignment!r}")
    start = -(-cursor.offset // alignment) * alignment
    tensors = {}
    for name, (shape, kind, offset) in found.items():
        if kind not in _TYPES:
            raise IFPError(
                f"{path}: {name} has the type {_OTHER_TYPES.get(kind, f'number {kind}')}, which is "
                f"not supported; use a file of {', '.join(type_[0] for type_ in _TYPES.values())}."
            )
        label, per_block, block_bytes = _TYPES[kind]
        if shape[-1] % per_block:
            raise IFPError(f"{path}: {name} has rows of {shape[-1]} values, which {label} cannot hold.")
        nbytes = math.prod(shape) // per_block * block_bytes
        if start + offset + nbytes > len(data):
            raise IFPError(
                f"{path}: {name} ends at byte {start + offset + nbytes:,}, but the file has "
                f"{len(data):,}; it is truncated. Download it again."
            )
        tensors[name] = _Tensor(label, shape, start + offset, nbytes)
    return metadata, tensors


def _read_config(
    path: Path, metadata: dict[str, Any], tensors: dict[str, _Tensor]
) -> dict[str, Any]:
    def positive(key: str, default: float | None = None) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise IFPError(f"{path}: llama.{key} is {value!r}; one positive number is needed.")
        return value

    if metadata.get("llama.expert_count"):
        raise _mixture_of_experts(path, "llama.expert_count")
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if metadata.get(f"llama.{key}"):
            raise IFPError(f"{path}: llama.{key} has no counterpart in mlx-lm's llama.")
    if "token_embd.weight" not in tensors:
        raise _missing(path, "token_embd.weight")
    heads = positive("attention.head_count")
    hidden_size = positive("embedding_length")
    head_dim = positive("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if positive(key, head_dim) != head_dim or head_dim % 2:
            raise IFPError(
                f"{path}: llama.{key} is {metadata.get(f'llama.{key}')} and the heads have "
                f"{head_dim} dimensions; they must be equal and even."
            )
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
        "rms_norm_eps": positive("attention.layer_norm_rms_epsilon"),
        "rope_theta": positive("rope.freq_base", 10000.0),
        "tie_word_embeddings": "output.weight" not in tensors,
    }
    scaling = metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        factor = positive("rope.scaling.factor")
        config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    elif scaling != "none" or (scaling == "none" and "llama.rope.scale_linear" in metadata):
        pass
    return config
