"""A selection says which channels of each layer are kept, and with what soft values."""

import hashlib
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np

from ..errors import IFPError
from ..llm.ffn import FFN
from ..llm.overflow import not_finite
from .keep import compact
from .masks import soft_topk, topk_mask
from .packed import overlap, pack


@dataclass(frozen=True)
class Selection:
    """Which channels of each layer are kept, and with what soft values.

    Attributes:
        layers: for each layer, the kept channels: int32 [k], ascending. k may differ by layer.
        soft_values: for each layer, float32 [k] in the order of ``layers``, or None if the mask
            is hard.
        d_ffn: F, how many channels each layer has to choose from.
        checkpoint: digest of the checkpoint that the channels belong to.
        digest: SHA-256 of all of this.
    """

    layers: tuple[np.ndarray, ...]
    soft_values: tuple[np.ndarray, ...] | None
    d_ffn: int
    checkpoint: str = ""
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        content = hashlib.sha256(f"{self.checkpoint}:{self.d_ffn}".encode())
        for channels in self.layers:
            content.update(np.packbits(self._bits(channels)).data)
        for values in self.soft_values or ():
            content.update(np.ascontiguousarray(values, dtype=np.float32).data)
        object.__setattr__(self, "digest", content.hexdigest())

    def _bits(self, channels: np.ndarray) -> np.ndarray:
        bits = np.zeros(self.d_ffn, dtype=bool)
        bits[channels] = True
        return bits

    @property
    def mask(self) -> np.ndarray:
        """The hard mask: bool [L, F]."""
        return np.stack([self._bits(channels) for channels in self.layers])

    @property
    def ks(self) -> list[int]:
        """Channels kept in each layer: L numbers."""
        return [len(channels) for channels in self.layers]

    @property
    def k(self) -> int | list[int]:
        """Channels kept: one number if every layer keeps as many, else one for each layer."""
        return compact(self.ks)

    @property
    def share(self) -> float:
        """The share of all channels that is kept."""
        return sum(map(len, self.layers)) / (len(self.layers) * self.d_ffn)

    @property
    def indices(self) -> mx.array | list[mx.array]:
        """int32 [L, k], ascending; a list of L arrays if k differs by layer."""
        return _stacked(self.layers)

    @property
    def weights(self) -> mx.array | list[mx.array] | None:
        """The soft values, float32 [L, k], or None for a hard mask; a list if k differs."""
        return None if self.soft_values is None else _stacked(self.soft_values)

    def overlap(self, other: "Selection") -> tuple[float, np.ndarray]:
        """Shared channels / k (paper, section 4.4 and appendix A.3).

        If the two keep different numbers of channels, k is the larger.

        Returns:
            tuple: the mean over layers, and float64 [L], one value a layer.
        """
        if len(self.layers) != len(other.layers) or self.d_ffn != other.d_ffn:
            raise IFPError(
                f"These selections are of different models: {len(self.layers)} x {self.d_ffn} "
                f"and {len(other.layers)} x {other.d_ffn} channels."
            )
        per_layer = overlap(pack(self.mask), pack(other.mask))
        return float(per_layer.mean()), per_layer


def digest_of(selection: Selection | None) -> str:
    """The name of a sub-network in all caches; None is the dense model."""
    return "dense" if selection is None else selection.digest


def _stacked(layers: tuple[np.ndarray, ...]) -> mx.array | list[mx.array]:
    if len({len(layer) for layer in layers}) == 1:
        return mx.array(np.stack(layers))
    return [mx.array(layer) for layer in layers]


def select_channels(
    scores: mx.array,
    k: int | list[int],
    *,
    operator: str = "topk",
    temperature: float = 1.0,
    keep_soft_values: bool = False,
    checkpoint: str = "",
    computed_in: mx.Dtype | None = None,
) -> Selection:
    """Apply a mask operator to scores (paper, section 3.1: ``m = lambda * Top(lambda, t_ffn)``).

    Args:
        scores (mx.array): float32 [L, F].
        k (int or list): channels to keep in each layer.
        operator (str): ``"topk"``, ``"sigmoid"`` or ``"capped_exp"``.
        temperature (float): of SoftTopK.
        keep_soft_values (bool): keep lambda as the weights of the channels.
        checkpoint (str): digest of the checkpoint, which becomes part of the selection's.
        computed_in (mx.Dtype): the type that the scores were computed in, which a message names;
            None if it is not known.

    Raises:
        IFPError: if a score is not finite or k is out of range.
    """
    check_finite(scores, computed_in)
    # lambda grows with the score. So the top scores are the top lambdas, without their rounding.
    mask = np.array(topk_mask(scores, k))
    layers = tuple(np.flatnonzero(row).astype(np.int32) for row in mask)
    soft_values = None
    if keep_soft_values and operator != "topk":
        soft = np.array(soft_topk(scores, k, operator=operator, temperature=temperature))
        soft_values = tuple(row[channels] for row, channels in zip(soft, layers, strict=True))
    return Selection(layers, soft_values, scores.shape[-1], checkpoint)


def check_finite(scores: mx.array, computed_in: mx.Dtype | None) -> None:
    """Raises IFPError if a score of [L, F] is not finite; see :func:`select_channels`."""
    finite = mx.isfinite(scores).all(axis=-1)
    if not finite.all():
        layer = int(mx.argmin(finite))
        raise not_finite(f"The scores of layer {layer} are not finite", computed_in)


def check_selection(selection: Selection, ffns: list[FFN]) -> None:
    """Raises IFPError if a selection does not have the shape of a model's FFNs."""
    if len(selection.layers) != len(ffns) or selection.d_ffn != ffns[0].d_ffn:
        raise IFPError(
            f"The selection is for {len(selection.layers)} layers of {selection.d_ffn} channels, "
            f"the model has {len(ffns)} of {ffns[0].d_ffn}."
        )
