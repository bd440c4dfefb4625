"""Instruction-Following Pruning on MLX: a prompt selects the sub-network that answers it."""

from .errors import IFPError
from .generation.stream import generate, stream_generate
from .llm.kv_cache import KVSettings
from .model import IFPModel, load
from .selection.selection import Selection

__all__ = [
    "IFPError",
    "IFPModel",
    "KVSettings",
    "Selection",
    "generate",
    "load",
    "stream_generate",
]
