"""Find the FFNs of an mlx-lm model by looking at its modules, not at its name."""

import copy
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ..errors import IFPError
from .modules import _name, linear

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_SEPARATE = frozenset(PROJECTIONS)
_FUSED = frozenset(("gate_up_proj", "down_proj"))


@dataclass(frozen=True)
class FFN:
    """Where one layer's gated FFN is, and its shape.

    Attributes:
        path: of the module in the model, such as ``model.layers.0.mlp``.
        fused: gate and up are one ``gate_up_proj`` of 2 * d_ffn rows, gate first.
        d_ffn: intermediate channels.
        hidden_size: input and output width.
        biases: which of gate_proj, up_proj and down_proj have a bias.
    """

    path: str
    fused: bool
    d_ffn: int
    hidden_size: int
    biases: frozenset[str]

    def module_path(self, projection: str) -> str:
        """The path in the model of the module that holds a projection."""
        name = "gate_up_proj" if self.fused and projection != "down_proj" else projection
        return f"{self.path}.{name}"


def find_ffns(model: nn.Module) -> list[FFN]:
    """Find the gated FFN of every layer.

    Raises:
        IFPError: if a layer has no such FFN, has experts, or its channels depend on each other;
            the message says what was found instead.
    """
    layers = getattr(model, "layers", None)
    if not layers:
        raise IFPError(f"{_name(model)} has no list of layers, so no FFN to prune.")
    paths = {id(module): path for path, module in model.named_modules()}
    ffns = [_find_ffn(layer, paths[id(layer)], _name(model)) for layer in layers]
    widths = sorted({ffn.d_ffn for ffn in ffns})
    if len(widths) > 1:
        raise IFPError(
            f"{_name(model)} has FFNs of different widths, {widths}; one width is needed."
        )
    return ffns


def _find_ffn(layer: nn.Module, layer_path: str, name: str) -> FFN:
    modules = list(layer.named_modules())
    for path, module in modules:
        if isinstance(module, (SwitchLinear, QuantizedSwitchLinear)):
            raise IFPError(
                f"{name} is a mixture of experts ({layer_path}.{path}); "
                "only dense models with one gated FFN a layer can be pruned."
            )
    found = []
    for path, module in modules:
        children = frozenset(module.children()) if path else frozenset()
        if children >= _SEPARATE or children >= _FUSED:
            found.append((f"{layer_path}.{path}", module, children >= _FUSED))
    if len(found) != 1:
        raise IFPError(
            f"{name} has {len(found) or 'no'} FFN with gate_proj, up_proj and down_proj "
            f"(or gate_up_proj and down_proj) in {layer_path}; found: {_describe(layer)}."
        )
    path, module, fused = found[0]
    needed = _FUSED if fused else _SEPARATE
    _check_ffn(path, module, needed, name)
    d_ffn = module.down_proj.weight.shape[1]
    if isinstance(module.down_proj, nn.QuantizedLinear):
        d_ffn = d_ffn * 32 // module.down_proj.bits
    biases = {child for child in needed if "bias" in module[child]}
    if "gate_up_proj" in biases:
        biases |= {"gate_proj", "up_proj"}
    hidden_size = module.down_proj.weight.shape[0]
    return FFN(path, fused, d_ffn, hidden_size, frozenset(biases & _SEPARATE))


def _describe(layer: nn.Module) -> str:
    return ", ".join(
        f"{child}({', '.join(module.children())})"
        for child, module in layer.children().items()
        if isinstance(module, nn.Module)
    )


def _check_ffn(path: str, module: nn.Module, needed: frozenset[str], name: str) -> None:
    for child in sorted(needed):
        if not isinstance(module[child], (nn.Linear, nn.QuantizedLinear)):
            kind = type(module[child]).__name__
            raise IFPError(f"{name}: {path}.{child} is a {kind}, not a Linear.")
    others = sorted(
        {key.split(".")[0] for key in dict(tree_flatten(module.parameters()))} - needed,
    )
    if others:
        raise IFPError(f"{name}: {path} also has {', '.join(others)}; channels cannot be cut out.")
    if not _channels_add_up(module, needed):
        raise IFPError(f"{name}: in {path} the channels depend on one another.")


def _channels_add_up(module: nn.Module, needed: frozenset[str]) -> bool:
    """Whether the FFN is a sum over its channels; it is tried with small random weights.

    A norm or a top-k over the channels would break that, and with it all pruning.
    """
    width, half, dims = 16, 8, 8
    fused = "gate_up_proj" in needed
    keys = mx.random.split(mx.random.key(0), 4)
    gate, up, down = (mx.random.normal((width, dims), key=key) for key in keys[:3])
    x = mx.random.normal((3, dims), key=keys[3])

    def run(rows: slice) -> mx.array:
        trial = copy.copy(module)
        projections = {"down_proj": down[rows].T}
        if fused:
            projections["gate_up_proj"] = mx.concatenate([gate[rows], up[rows]])
        else:
            projections |= {"gate_proj": gate[rows], "up_proj": up[rows]}
        for child, weight in projections.items():
            trial[child] = linear(weight)
        return trial(x)

    whole = run(slice(None))
    parts = run(slice(0, half)) + run(slice(half, width))
    return bool(mx.allclose(whole, parts, rtol=1e-3, atol=1e-3))
