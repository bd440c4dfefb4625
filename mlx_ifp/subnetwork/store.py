"""Selection -> network, kept in memory."""

import mlx.nn as nn
from mlx.utils import tree_flatten

from ..checkpoint.directory import Checkpoint
from ..llm.modules import get_module


def _ffn_bytes(network: nn.Module, checkpoint: Checkpoint) -> int:
    """Bytes of a sub-network's own channels."""
    modules = (get_module(network, ffn.path) for ffn in checkpoint.ffns)
    return sum(array.nbytes for module in modules for _, array in tree_flatten(module.parameters()))


def _set_width(network: nn.Module, k: int | list[int]) -> None:
    """The sub-network's own arguments tell its width, for those who look there."""
    args = getattr(network, "args", None)
    if hasattr(args, "intermediate_size"):
        args.intermediate_size = k
