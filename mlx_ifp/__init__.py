"""Instruction-Following Pruning on MLX: a prompt selects the sub-network that answers it."""

from .errors import IFPError
from .generate import generate, stream_generate
from .masks import Selection
from .model import IFPModel, load
from .prompt_cache import KVSettings

__all__ = [
    "IFPError",
    "IFPModel",
    "KVSettings",
    "Selection",
    "generate",
    "load",
    "stream_generate",
]
