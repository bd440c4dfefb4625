"""Read a llama-architecture GGUF file as an mlx-lm model: config, weights and tokenizer."""

import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np
from transformers import PreTrainedTokenizerFast

from mlx_ifp.errors import IFPError

from .gguf_file import GROUP_SIZE, GGUFTensor, check_tensors, copy_blocks, decode, read_header
from .gguf_tokenizer import build_tokenizer, special_ids


@dataclass
class GGUFModel:
    """What mlx-lm needs to build a model.

    Attributes:
        config: a ``config.json`` of model type ``llama``; its ``quantization`` has a default and
            the paths of the modules that differ from it.
        weights: mlx-lm's names -> arrays. Q4_0, Q4_1, Q4_K and Q8_0 are affine quantized: uint32
            [rows, columns * bits / 32], scales and biases float16 [rows, columns / 32]. Q6_K is
            float16. F32 (mostly norms), F16 and BF16 stay what they are.
        tokenizer: with its chat template and special tokens, or None.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]
    tokenizer: PreTrainedTokenizerFast | None


def load_gguf(
    path: str | Path, with_tokenizer: bool = True, scratch: Path | None = None
) -> GGUFModel:
    """Read a GGUF file of the llama architecture (Llama, Mistral, SmolLM2).

    The weights are lazy. If they are evaluated, written and dropped one after the other, this takes
    the memory of the largest one, once as it is in the file and once decoded (58 MB at most for
    SmolLM2-135M, a file of 98 MB). Q6_K takes twice the decoded size.

    MLX reads lazily only from the path of a safetensors file, so the data are copied to a temporary
    one. The copy takes as much of the disk as the GGUF file until the last weight is evaluated or
    dropped. It is deleted before this function returns, and only MLX keeps it open, so it is gone
    when the process ends, however that happens. The GGUF file is not needed any more.

    Args:
        path: the file.
        with_tokenizer: whether to read the tokenizer; its kind does not matter if not.
        scratch: a directory for the copy; None for the system's own.

    Raises:
        IFPError: if the file is missing, not a GGUF or truncated; if its architecture, the type
            of a tensor or the tokenizer is not supported; if a tensor is missing, unknown or of
            another shape than the metadata says; if there is no space for the copy.
    """
    try:
        with open(path, "rb") as file:
            return _read_model(file, with_tokenizer, scratch)
    except IFPError as error:
        raise IFPError(f"{path}: {error}") from error
    except OSError as error:
        raise IFPError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_model(file: BinaryIO, with_tokenizer: bool, scratch: Path | None) -> GGUFModel:
    """Do the work of :func:`load_gguf`; the messages of errors do not name the file yet."""
    metadata, found = read_header(file)
    _check_kind(metadata)
    tensors = check_tensors(found, file.tell(), os.fstat(file.fileno()).st_size)
    config = _read_config(metadata, tensors)
    names = _name_tensors(tensors, config)
    tokenizer = None
    if with_tokenizer:
        context = config["max_position_embeddings"]
        tokenizer = build_tokenizer(metadata, config["vocab_size"], context)
    blocks = copy_blocks(file, tensors, scratch)
    if "rope_freqs.weight" in blocks:
        _set_llama3_scaling(_floats(blocks["rope_freqs.weight"]), config)
    return GGUFModel(config, _read_weights(blocks, tensors, names, config), tokenizer)


def _floats(array: mx.array) -> list[float]:
    return np.array(array.astype(mx.float32)).flatten().tolist()


def _check_kind(metadata: dict[str, Any]) -> None:
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise IFPError(
            f"the architecture is {architecture!r}, and of GGUF files only 'llama' is "
            "supported; convert the model's safetensors instead."
        )
    if metadata.get("split.count", 1) != 1:
        raise IFPError(
            f"one part of {metadata['split.count']}; join them with llama-gguf-split --merge first."
        )
    if metadata.get("llama.expert_count"):
        raise IFPError("a mixture of experts; only dense models are supported.")
    for key in ("attention.scale", "logit_scale", "residual_scale", "embedding_scale"):
        if metadata.get(f"llama.{key}"):
            raise IFPError(f"llama.{key} is not supported; mlx-lm's llama has none.")


def _read_config(metadata: dict[str, Any], tensors: dict[str, GGUFTensor]) -> dict[str, Any]:
    def positive(key: str, default: float | None = None, kind: type[float] = int) -> Any:
        value = metadata.get(f"llama.{key}", default)
        if isinstance(value, list) and len(set(value)) == 1:
            value = value[0]  # there is one per layer, and all are the same
        if not isinstance(value, kind) or not value > 0:
            raise IFPError(f"llama.{key} must be a positive {kind.__name__}, not {value!r}.")
        return value

    if "token_embd.weight" not in tensors:
        raise IFPError("the tensor token_embd.weight is missing.")
    heads, hidden_size = positive("attention.head_count"), positive("embedding_length")
    head_dim = positive("attention.key_length", hidden_size // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if positive(key, head_dim) != head_dim or head_dim % 2:
            raise IFPError(
                f"llama.{key} is {positive(key, head_dim)} for heads of {head_dim} "
                "dimensions; only equal and even ones are supported."
            )
    # Norms are float32 whatever the matrices are; the model shall run in the type of the matrices.
    kinds = {tensor.kind for tensor in tensors.values() if len(tensor.shape) > 1}
    dtype = {"F32": "float32", "BF16": "bfloat16"}.get("".join(kinds), "float16")
    config: dict[str, Any] = {
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
        raise IFPError(f"the rope scaling {scaling!r} is not supported, only 'linear'.")
    ids = special_ids(metadata)
    config |= {f"{name}_token_id": ids[name] for name in ("bos", "eos", "pad") if name in ids}
    stops = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    if len(stops) > 1:
        config["eos_token_id"] = sorted(stops)
    return config


def _modules(config: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Yield GGUF's name, mlx-lm's name and the weight's shape of every module."""
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


def _name_tensors(tensors: dict[str, GGUFTensor], config: dict[str, Any]) -> dict[str, str]:
    """Map GGUF's names to mlx-lm's; add ``attention_bias`` and ``mlp_bias`` to the config."""
    for tensor in tensors:
        if "_exps" in tensor or "ffn_gate_inp" in tensor:
            raise IFPError(f"{tensor} belongs to experts; only dense models are supported.")
    names = {}
    for gguf, name, shape in _modules(config):
        if f"{gguf}.weight" not in tensors:
            raise IFPError(f"the tensor {gguf}.weight is missing.")
        parts = {"weight": shape}
        if name.endswith("_proj") and f"{gguf}.bias" in tensors:
            parts["bias"] = shape[:1]
        for part, expected in parts.items():
            actual = tensors[f"{gguf}.{part}"].shape
            if actual != expected:
                raise IFPError(f"{gguf}.{part} has the shape {actual}, not {expected}.")
            names[f"{gguf}.{part}"] = f"{name}.{part}"
    for tensor in sorted(tensors.keys() - names.keys() - {"rope_freqs.weight"}):
        raise IFPError(f"the tensor {tensor} is unknown; mlx-lm's llama has none like it.")
    biases = [name for name in names.values() if name.endswith(".bias")]
    config["attention_bias"] = any(".self_attn." in name for name in biases)
    config["mlp_bias"] = any(".mlp." in name for name in biases)
    return names


def _set_llama3_scaling(factors: list[float], config: dict[str, Any]) -> None:
    """Add the ``rope_scaling`` whose rule stretches wavelengths by these factors [head_dim / 2].

    Between the wavelengths that are left alone and those that are stretched by ``factor``, 1 / f is
    linear in the frequency. The line has two parameters and the rule has three, so
    ``low_freq_factor`` is free and is set to 1.
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
    raise IFPError("rope_freqs.weight fits no llama3 rope scaling, others are unsupported.")


def _read_weights(
    blocks: dict[str, mx.array],
    tensors: dict[str, GGUFTensor],
    names: dict[str, str],
    config: dict[str, Any],
) -> dict[str, mx.array]:
    """Map mlx-lm's names to unevaluated arrays; add ``quantization`` to the config."""
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    weights: dict[str, mx.array] = {}
    quantized: dict[str, dict[str, Any]] = {}
    for gguf, name in names.items():
        module = name.rpartition(".")[0]
        arrays = decode(tensors[gguf], blocks[gguf])
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
            # mlx-lm has biases on all projections or on none; a bias of zeros changes nothing.
            zeros = mx.zeros(tensors[gguf].shape[:1], mx.float16)
            weights[f"{module}.bias"] = weights.get(f"{module}.bias", zeros)
    if quantized:
        bits = Counter(own["bits"] for own in quantized.values()).most_common(1)[0][0]
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": bits, "mode": "affine"}
        config["quantization"] |= {k: own for k, own in quantized.items() if own["bits"] != bits}
    return weights


def _unpermute(array: mx.array, heads: int) -> mx.array:
    """Reorder rows [heads * d, ...]: llama.cpp interleaves the halves of a head that HF rotates."""
    return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
