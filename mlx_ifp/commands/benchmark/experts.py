"""What a sub-network is compared with: a mixture of experts of its active parameters.

Its trunk is the sub-network's. Its experts have random weights: it is for measuring speed.
"""

from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ...llm.build import build_model
from ...llm.ffn import FFN, PROJECTIONS
from ...llm.modules import (
    evaluate,
    find_embedding,
    get_module,
    linear,
    quantized_linear,
    set_module,
    share,
)
from .same_size import arrays_of, float_dtype, memory_of

# mlx-lm's mixture of experts with the same attention, and where in a layer its experts are.
ARCHITECTURES = {
    "llama": ("mixtral", "block_sparse_moe"),
    "mistral": ("mixtral", "block_sparse_moe"),
    "qwen2": ("qwen2_moe", "mlp"),
    "qwen3": ("qwen3_moe", "mlp"),
}
ACTIVE = 4
_OUTPUT = "lm_head"
# MLX quantizes in groups of at least this many.
_LEAST_GROUP = 32


@dataclass(frozen=True)
class Experts:
    """A mixture of experts.

    Attributes:
        network: an mlx-lm model.
        architecture: its name in mlx-lm.
        count, active: experts of a layer, and those that each token goes through.
        shared: those of them that all tokens go through.
        width: channels of an expert.
    """

    network: nn.Module
    architecture: str
    count: int
    active: int
    shared: int
    width: int

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of its weights, and of those that decoding one sample reads for each token."""
        memory = memory_of(self.network)
        switches = sum(
            array.nbytes
            for module in self.network.modules()
            if isinstance(module, (SwitchLinear, QuantizedSwitchLinear))
            for array in arrays_of(module)
        )
        idle = (self.count - self.active) / (self.count - self.shared)
        # An output layer may be the embedding once more.
        arrays = {id(array): array for array in arrays_of(self.network)}
        return {
            "weights_bytes": sum(array.nbytes for array in arrays.values()),
            "bytes_per_token": memory["bytes_per_token"] - round(switches * idle),
        }


def experts_model(
    network: nn.Module, ffns: list[FFN], config: dict[str, Any], k: int | list[int]
) -> tuple[Experts | None, list[str]]:
    """A mixture of experts with a sub-network's trunk and, about, its active channels.

    Four experts of k / 4 channels are active, out of as many as have d_ffn channels together.
    They are quantized as the sub-network's FFN is. Qwen2's has an expert for all tokens: it is
    one of the four.

    Args:
        network (nn.Module): the sub-network.
        ffns (list): the checkpoint's FFNs.
        config (dict): the LLM's.
        k (int or list): channels the sub-network keeps; the mean counts.

    Returns:
        tuple: the mixture, or None if mlx-lm has none with such a trunk, and notes.
    """
    model_type = config["model_type"]
    if model_type not in ARCHITECTURES:
        return None, [f"mixture of experts: mlx-lm has none with the attention of {model_type}."]
    architecture, place = ARCHITECTURES[model_type]
    k = k if isinstance(k, int) else round(sum(k) / len(k))
    d_ffn = ffns[0].d_ffn
    how = _quantization(get_module(network, ffns[0].path))
    unit = _LEAST_GROUP if how else 1
    width = max(1, round(k / ACTIVE / unit)) * unit
    count = max(ACTIVE, round(d_ffn / width))
    shared = 1 if architecture == "qwen2_moe" else 0
    model = build_model(
        vars(network.args)
        | {
            "model_type": architecture,
            "intermediate_size": width,
            "moe_intermediate_size": width,
            "shared_expert_intermediate_size": width,
            "num_local_experts": count,
            "num_experts": count - shared,
            "num_experts_per_tok": ACTIVE - shared,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            # It changes no shape and no time, and each architecture has its own words for it.
            "rope_scaling": None,
        }
    )
    trunk = _own_arrays(network, {ffn.path for ffn in ffns})
    blocks = [f"{ffn.path.rpartition('.')[0]}.{place}" for ffn in ffns]
    theirs = _own_arrays(model, set(blocks))
    if theirs.keys() - trunk.keys() == {_OUTPUT}:
        # Qwen2's mixture has an output layer even where the embedding serves as one.
        embedding = get_module(network, find_embedding(network))
        trunk[_OUTPUT] = _as_linear(cast(nn.Embedding | nn.QuantizedEmbedding, embedding))
    if _shapes(trunk) != _shapes(theirs):
        return None, [
            f"mixture of experts: mlx-lm's {architecture} has another attention than this "
            f"{model_type}."
        ]
    for path, module in trunk.items():
        set_module(model, path, share(module))
    for path, ffn in zip(blocks, ffns, strict=True):
        block = get_module(model, path)
        block.set_dtype(float_dtype(network))
        _quantize(block, _quantization(get_module(network, ffn.path)))
        evaluate(block)
    model.eval()
    evaluate(model)
    notes = [
        f"mixture of experts: {architecture}, {ACTIVE} of {count} experts of {width} channels "
        f"are active{', one of them for all tokens' if shared else ''}; random weights"
    ]
    if width * ACTIVE != k:
        notes.append(f"mixture of experts: {width * ACTIVE} channels are active, not k = {k}")
    return Experts(model, architecture, count, ACTIVE, shared, width), notes


def _as_linear(embedding: nn.Embedding | nn.QuantizedEmbedding) -> nn.Module:
    """The output layer that an embedding is, around its very arrays."""
    if isinstance(embedding, nn.Embedding):
        return linear(embedding.weight)
    how = {name: getattr(embedding, name) for name in ("group_size", "bits", "mode")}
    return quantized_linear(embedding.weight, embedding.scales, embedding.get("biases"), how)


def _quantization(ffn: nn.Module) -> dict[str, dict[str, Any]]:
    """Projection -> how it is quantized; those that are not are left out."""
    return {
        name: {"group_size": ffn[name].group_size, "bits": ffn[name].bits, "mode": ffn[name].mode}
        for name in PROJECTIONS
        if name in ffn and "scales" in ffn[name]
    }


def _quantize(block: nn.Module, how: dict[str, dict[str, Any]]) -> None:
    """Quantize experts; the small layers that choose among them stay floats."""

    def predicate(path: str, module: nn.Module) -> dict[str, Any] | bool:
        one = how.get(path.rpartition(".")[2])
        if one is None or not hasattr(module, "to_quantized"):
            return False
        inputs = module.weight.shape[-1]
        if inputs % one["group_size"] == 0:
            return one
        smaller = one["mode"] == "affine" and inputs % _LEAST_GROUP == 0
        return one | {"group_size": _LEAST_GROUP} if smaller else False

    if how:
        nn.quantize(block, class_predicate=predicate)


def _own_arrays(model: nn.Module, without: set[str]) -> dict[str, nn.Module]:
    """The modules that hold parameters themselves, by path; none below the paths ``without``."""
    prefixes = tuple(f"{path}." for path in without)
    return {
        path: module
        for path, module in model.named_modules()
        if not f"{path}.".startswith(prefixes) and _parameters(module)
    }


def _parameters(module: nn.Module) -> dict[str, mx.array]:
    return {
        name: value
        for name, value in module.items()
        if isinstance(value, mx.array) and not name.startswith("_")
    }


def _shapes(modules: dict[str, nn.Module]) -> dict[str, Any]:
    """Path -> names and shapes of the parameters, as if nothing were quantized."""
    found = {}
    for path, module in modules.items():
        arrays = _parameters(module)
        shapes = {name: array.shape for name, array in arrays.items()}
        if "scales" in arrays:
            rows, packed = arrays["weight"].shape
            shapes = {"weight": (rows, packed * 32 // module.bits)}
            if "bias" in arrays:
                shapes["bias"] = arrays["bias"].shape
        found[path] = shapes
    return found
