"""Weights as MLX's affine quantization leaves them, so that training can see the rounded model.

``mlx_ifp.convert -q`` turns each group of g weights into whole numbers of a few bits, a scale and a
bias. Here the same is computed in PyTorch, in the same order, so that a converted checkpoint has
the very values that were trained.
"""

import torch
from torch import Tensor, nn

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)


def bits_of_parts(parts: list[str]) -> dict[str, int]:
    """``["down_proj=5"]`` as ``{"down_proj": 5}``.

    Raises:
        ValueError: if a part is not of that form, or its bits are none of :data:`BITS`.
    """
    made = {}
    for part in parts:
        name, _, bits = part.partition("=")
        if not name or bits not in map(str, BITS):
            raise ValueError(f"{part!r} must be NAME=BITS, with bits from {BITS}")
        made[name] = int(bits)
    return made


def _scales(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and bias of groups from their smallest and largest weights, all float32.

    The end that is further from 0, the edge, is met exactly, and has the code 0.
    """
    below = low.abs() > high.abs()
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-7)
    scale = torch.where(below, scale, -scale)
    edge = torch.where(below, low, high)
    steps = torch.round(edge / scale)
    zero = steps == 0
    scale = torch.where(zero, scale, edge / torch.where(zero, 1.0, steps))
    return scale, torch.where(zero, 0.0, edge)


def quantize(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """What ``mx.quantize`` makes of a weight, but for the packing.

    Args:
        weight (Tensor): [..., n], in the type it is stored in before it is quantized; n is a
            multiple of the group size.
        bits (int): of a code.
        group_size (int): weights that share a scale and a bias.

    Returns:
        tuple: codes, uint8 [..., n / g, g]; scales and biases [..., n / g, 1] in the weight's type.
    """
    groups = weight.unflatten(-1, (-1, group_size)).float()
    scale, bias = _scales(groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True), bits)
    # The codes are of the float32 scale; that of the checkpoint is cast afterwards.
    codes = torch.round((groups - bias) / scale).clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale.to(weight.dtype), bias.to(weight.dtype)


def dequantize(codes: Tensor, scales: Tensor, biases: Tensor) -> Tensor:
    """What ``mx.dequantize`` makes of them: [..., n] in the type of the scales."""
    return (codes.to(scales.dtype) * scales + biases).flatten(-2)


def rounded(weight: Tensor, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """A weight [..., n] stored as ``dtype``, quantized and dequantized; in its own type."""
    return dequantize(*quantize(weight.to(dtype), bits, group_size)).to(weight.dtype)


def pack(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """All that quantization reads of a weight: its codes, and the two ends of each group.

    Dequantized weights do not always quantize to themselves: a group's scale comes from its ends,
    and the end that is not the edge is moved. So that end is kept, and :func:`unpack` gives weights
    whose codes, scales and biases are those of this weight.

    Args:
        weight (Tensor): [..., n], in the type it is stored in.
        bits, group_size (int): as for :func:`quantize`.

    Returns:
        tuple: codes, uint8 [..., n / g, g]; smallest and largest weight of each group
        [..., n / g, 1].
    """
    groups = weight.unflatten(-1, (-1, group_size))
    codes, _, _ = quantize(weight, bits, group_size)
    return codes, groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)


def unpack(codes: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Weights [..., n] that quantize to the codes, in the type of ``low`` and ``high``."""
    scale, bias = _scales(low.float(), high.float(), bits)
    # In float32: a scale that float16 can hardly hold would move the codes.
    values = (codes * scale + bias).to(low.dtype)
    far = torch.where(low.float().abs() > high.float().abs(), high, low)
    return torch.where(codes == codes.amax(-1, keepdim=True), far, values).flatten(-2)


def _own(weight: Tensor) -> Tensor:
    """The part of a weight that this process holds."""
    weight = weight.detach()
    return weight.to_local() if hasattr(weight, "to_local") else weight


class Rounding:
    """While this context is open, an LLM's weights are what its quantized checkpoint will have.

    Gradients of a loss under it belong to the rounded weights, and the optimizer applies them to
    the float weights that are back when it closes: the straight-through estimator (Bengio et al.,
    2013, arXiv 1308.3432). Each weight is rounded once, however many forward passes follow, and a
    compiled model stays compiled. What shares the LLM's embedding sees it rounded, too.

    Args:
        llm (nn.Module): all its Linears and its embedding are rounded, as far as their rows are
            multiples of the group size.
        downs (list): its down projections. Their groups run along the hidden size: a checkpoint
            stores a channel's weights as a row.
        bits, group_size (int): as for :func:`quantize`.
        dtype (torch.dtype): what the weights are stored in before they are quantized.
        parts (dict): other bits for weights with such a part in their module's name.
    """

    def __init__(
        self,
        llm: nn.Module,
        downs: list[nn.Linear],
        bits: int = 4,
        group_size: int = 64,
        dtype: torch.dtype = torch.float16,
        parts: dict[str, int] | None = None,
    ) -> None:
        if bits not in BITS or group_size not in GROUP_SIZES:
            raise ValueError(f"bits must be one of {BITS}, the group size one of {GROUP_SIZES}")
        self.group_size, self.dtype = group_size, dtype
        turned = {id(down.weight) for down in downs}
        found: dict[int, tuple[Tensor, int]] = {}
        for name, module in llm.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                weight = module.weight
                own = [n for part, n in (parts or {}).items() if part in name]
                if weight.shape[0 if id(weight) in turned else 1] % group_size == 0:
                    # An embedding comes before the output layer that shares its weight.
                    found.setdefault(id(weight), (weight, own[0] if own else bits))
        names = [name for name, _ in llm.named_modules()]
        for part in parts or {}:
            if not any(part in name for name in names):
                raise ValueError(f"no weight of the model has {part!r} in its name")
        self.weights = [(_own(weight), key in turned, own) for key, (weight, own) in found.items()]
        if any(turned and weight.shape[0] % group_size for weight, turned, _ in self.weights):
            raise ValueError(
                f"the processes' parts of the hidden size are no multiples of {group_size}; use "
                "fewer processes or no --quantize-from"
            )
        self._floats: list[Tensor] = []

    @torch.no_grad()
    def __enter__(self) -> "Rounding":
        self._floats = [weight.detach().clone() for weight, *_ in self.weights]
        for weight, turned, bits in self.weights:
            rows = weight.T if turned else weight
            new = rounded(rows, bits, self.group_size, self.dtype)
            weight.copy_(new.T if turned else new)
        return self

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for (weight, *_), floats in zip(self.weights, self._floats, strict=True):
            weight.copy_(floats)
        self._floats = []
