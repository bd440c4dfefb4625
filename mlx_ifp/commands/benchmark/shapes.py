"""A checkpoint of the paper's shapes with random weights, as trained ones would be no faster."""

import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.utils import save_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from ...checkpoint.config import HeadConfig, IFPConfig
from ...checkpoint.directory import (
    CHANNELS,
    HEAD_STEM,
    PREDICTOR,
    PREDICTOR_STEM,
    TRUNK,
    write_checkpoint,
)
from ...checkpoint.expected import backbone_tensors, channel_tensors, head_tensors, trunk_tensors
from ...choices import Q_BITS, Q_GROUP_SIZES
from ...errors import IFPError
from ...files.atomic import new_directory
from ...files.tensor_files import LazyTensor, TensorInfo
from ...llm.build import build_model
from ...llm.ffn import PROJECTIONS, find_ffns
from ...selection.keep import WIDTH_MULTIPLE, resolve_keep
from .settings import DEFAULT_SCALE

# The 9B model that is pruned to 3B. The paper does not say how many tokens it knows.
_LLM = {
    "hidden_size": 2048,
    "num_hidden_layers": 56,
    "intermediate_size": 24576,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 98304,
}
_K = 6656
_HEAD_DIM = 128
# A backbone of 294 million parameters; the paper's has 302 million, and is not described.
_BACKBONE = {
    "hidden_size": 1024,
    "num_hidden_layers": 16,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 98304,
}
_P = 128
_EMBEDDING = 0.03


def paper_shapes(scale: int) -> dict[str, Any]:
    """The paper's geometry, every dimension divided.

    Heads keep their width and the hidden size is that of all heads; at least one KV head stays.
    FFNs are multiples of 64, and k is the paper's share of them.

    Args:
        scale (int): what to divide by.

    Returns:
        dict: ``llm`` and ``backbone``, mlx-lm configs; ``k``; and ``P``, of the head.

    Raises:
        IFPError: if it leaves no head.
    """
    if scale < 1:
        raise IFPError(f"--scale must be at least 1, not {scale}.")
    most = _LLM["num_attention_heads"]
    if scale > most:
        raise IFPError(
            f"--scale {scale} leaves none of the {most} attention heads; {most} is the most."
        )
    llm = _divided(_LLM, scale, _HEAD_DIM)
    k, *_ = resolve_keep(
        _K / _LLM["intermediate_size"], llm["intermediate_size"], llm["num_hidden_layers"]
    )
    backbone = _divided(_BACKBONE, scale, _BACKBONE["hidden_size"] // most)
    return {"llm": llm, "backbone": backbone, "k": k, "P": _P // scale}


def check_quantization(bits: int, group_size: int) -> None:
    """Raises IFPError if MLX cannot quantize so."""
    for option, value, choices in (
        ("--q-bits", bits, Q_BITS),
        ("--q-group-size", group_size, Q_GROUP_SIZES),
    ):
        if value not in choices:
            raise IFPError(f"{option} is one of {', '.join(map(str, choices))}, not {value}.")


def _divided(shape: dict[str, int], scale: int, head_dim: int) -> dict[str, Any]:
    divided = {name: max(value // scale, 1) for name, value in shape.items()}
    kv_heads = divided["num_key_value_heads"]
    heads = divided["num_attention_heads"] // kv_heads * kv_heads
    d_ffn = divided["intermediate_size"]
    return divided | {
        "model_type": "llama",
        "head_dim": head_dim,
        "hidden_size": heads * head_dim,
        "num_attention_heads": heads,
        "intermediate_size": max(d_ffn // WIDTH_MULTIPLE, 1) * WIDTH_MULTIPLE,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
    }


def write_shapes(
    path: Path,
    scale: int = DEFAULT_SCALE,
    *,
    dtype: mx.Dtype = mx.bfloat16,
    bits: int | None = None,
    group_size: int = 64,
) -> dict[str, Any]:
    """Write a checkpoint of :func:`paper_shapes` with random weights.

    Args:
        path (Path): the directory to make.
        scale (int): what to divide every dimension by.
        dtype (mx.Dtype): of the floats.
        bits (int): quantize the LLM, not the predictor, in so many bits; None does not.
        group_size (int): then, of the quantization.

    Returns:
        dict: the geometry, for people: ``scale``, ``llm``, ``predictor``.

    Raises:
        IFPError: if the scale leaves no head, or the shapes cannot be quantized so.
    """
    shapes = paper_shapes(scale)
    llm, backbone = shapes["llm"], shapes["backbone"]
    ffns = find_ffns(build_model(llm))
    modules: set[str] = set()
    if bits is not None:
        check_quantization(bits, group_size)
        llm = llm | {"quantization": {"group_size": group_size, "bits": bits, "mode": "affine"}}
        # The hidden size, along which all is quantized, is a multiple of 128.
        modules = {
            name
            for name, module in build_model(llm).named_modules()
            if hasattr(module, "to_quantized")
        }
    channels = {ffn.module_path(projection) for ffn in ffns for projection in PROJECTIONS}
    model = build_model(llm, modules - channels)
    # channel_tensors only asks which names are there.
    found = {f"{name}.scales": TensorInfo(path, "", (), 0, 0) for name in modules & channels}
    head = HeadConfig(
        [backbone["hidden_size"], shapes["P"], len(ffns) * ffns[0].d_ffn], [True, True]
    )
    expected = {
        TRUNK: trunk_tensors(model, ffns),
        CHANNELS: channel_tensors(llm, ffns, found),
        PREDICTOR_STEM: backbone_tensors(build_model(backbone)),
        HEAD_STEM: head_tensors(head, backbone, {}),
    }
    keys = iter(mx.random.split(mx.random.key(0), sum(map(len, expected.values()))))
    tensors: dict[str, dict[str, mx.array | LazyTensor]] = {
        stem: {
            name: _random(name, shape, "U32" in types, dtype, (bits, group_size), next(keys))
            for name, (shape, types) in group.items()
        }
        for stem, group in expected.items()
    }
    ifp = IFPConfig(
        k=shapes["k"],
        selector="predictor",
        head=head,
        source={"random_weights": "the paper's shapes", "scale": scale},
    )
    tokenizer = _byte_tokenizer()
    with new_directory(path) as directory:
        write_checkpoint(directory, llm, ifp, tensors)
        save_config(dict(backbone), directory / PREDICTOR / "config.json")
        tokenizer.save_pretrained(directory)
        tokenizer.save_pretrained(directory / PREDICTOR)
    return {
        "scale": scale,
        "llm": _plain(llm) | {"k": shapes["k"]},
        "predictor": _plain(backbone) | {"P": shapes["P"]},
    }


def _plain(config: dict[str, Any]) -> dict[str, int]:
    return {name: config[name] for name in (*_LLM, "head_dim")}


def _random(
    name: str,
    shape: tuple[int, ...],
    packed: bool,
    dtype: mx.Dtype,
    quantization: tuple[int | None, int],
    key: mx.array,
) -> mx.array:
    """Random numbers as in a new model, made when they are written; norms are 1, biases 0.

    The embedding is small, so that the whole of a text, not its last token, makes the scores.
    """
    module, _, part = name.rpartition(".")
    bits, group_size = quantization
    if packed:
        return mx.random.randint(-(1 << 31), (1 << 31) - 1, shape, key=key).view(mx.uint32)
    if len(shape) == 1:
        return mx.zeros(shape, dtype) if part == "bias" else mx.ones(shape, dtype)
    inputs = shape[-1] if part == "weight" else shape[-1] * group_size
    largest = _EMBEDDING if module.endswith("embed_tokens") else math.sqrt(3 / inputs)
    if part == "weight":
        return mx.random.uniform(-largest, largest, shape, dtype, key=key)
    assert bits is not None, "scales belong to quantized weights"
    # The numbers of a group lie evenly about 0.
    step = 2 * largest / (2**bits - 1)
    return mx.full(shape, step if part == "scales" else -largest, dtype)


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token: it needs no training, and tells all texts apart."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def describe(geometry: dict[str, Any]) -> str:
    """One line for people."""
    llm, predictor = geometry["llm"], geometry["predictor"]
    return (
        "random weights in the paper's shapes"
        + (f", divided by {geometry['scale']}" if geometry["scale"] > 1 else "")
        + ": hidden size {hidden_size}, {num_hidden_layers} layers, {num_attention_heads} query / "
        "{num_key_value_heads} KV heads of {head_dim}, d_ffn {intermediate_size}, k {k}, "
        "{vocab_size} tokens; ".format(**llm)
        + "predictor: hidden size {hidden_size}, {num_hidden_layers} layers, "
        "d_ffn {intermediate_size}, P {P}".format(**predictor)
    )
