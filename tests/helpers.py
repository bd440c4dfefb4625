"""What several test files compare with, and how they measure memory."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_ifp.llm.ffn import FFN, find_ffns
from mlx_ifp.llm.modules import get_module
from mlx_ifp.selection.selection import Selection


class MaskedInput(nn.Module):
    """A down projection that sees its input times a mask: FFN(X, m) of the paper."""

    def __init__(self, down_proj: nn.Module, mask: mx.array) -> None:
        super().__init__()
        self.down_proj = down_proj
        self.mask = mask

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(x * self.mask.astype(x.dtype))


def mask_model(model: nn.Module, selection: Selection, ffns: list[FFN] | None = None) -> nn.Module:
    """Mask the activations of a whole dense model in place."""
    for i, ffn in enumerate(ffns or find_ffns(model)):
        mask = np.zeros(ffn.d_ffn, np.float32)
        values = 1.0 if selection.soft_values is None else selection.soft_values[i]
        mask[selection.layers[i]] = values
        module = get_module(model, ffn.path)
        module.down_proj = MaskedInput(module.down_proj, mx.array(mask))
    return model


def random_selection(layers, d_ffn, k, *, soft=False, seed=0, checkpoint="") -> Selection:
    """k random channels in each layer; ``k`` may be a list."""
    rng = np.random.default_rng(seed)
    ks = k if isinstance(k, list) else [k] * layers
    channels = tuple(np.sort(rng.choice(d_ffn, n, replace=False)).astype(np.int32) for n in ks)
    values = tuple(rng.uniform(0.05, 1, n).astype(np.float32) for n in ks) if soft else None
    return Selection(channels, values, d_ffn, checkpoint)


def relative_error(a: mx.array, b: mx.array) -> float:
    """Largest difference over the largest magnitude."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return (mx.abs(a - b).max() / mx.abs(b).max()).item()


@dataclass
class Peak:
    """The most bytes that MLX held above what it held before. They are set when the block ends."""

    nbytes: int | None = None


@contextmanager
def memory_peak() -> Iterator[Peak]:
    """Measures a block: ``with memory_peak() as peak: ...``, then ``peak.nbytes``."""
    # Earlier work must have ended, and cycles of earlier tests must be freed before the block. If
    # they were freed inside it, they would hide as many bytes.
    mx.synchronize()
    gc.collect()
    mx.clear_cache()
    peak, before = Peak(), mx.get_active_memory()
    mx.reset_peak_memory()
    yield peak
    peak.nbytes = mx.get_peak_memory() - before
