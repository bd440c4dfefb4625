"""Instruction-Following Pruning on MLX: a prompt selects the sub-network that answers it."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import IFPError
    from .generation.stream import stream_generate
    from .generation.whole import generate
    from .llm.kv_cache import KVSettings
    from .model import IFPModel
    from .opening import load
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

# Name -> module. They are imported when they are asked for, so that a command's help needs no MLX.
_HOMES = {
    "IFPError": "errors",
    "IFPModel": "model",
    "KVSettings": "llm.kv_cache",
    "Selection": "selection.selection",
    "generate": "generation.whole",
    "load": "opening",
    "stream_generate": "generation.stream",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name != "IFPError":
        importlib.import_module(".fast_import", __name__).import_transformers()
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
