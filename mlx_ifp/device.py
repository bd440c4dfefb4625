"""What depends on the machine: the type to run in, and how much memory there is."""

import os
import sys
from pathlib import Path

import mlx.core as mx


def default_dtype() -> mx.Dtype | None:
    """float32 on a CPU device, where half precision is slow and, quantized, wrong; else as is."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def default_cache_bytes() -> int:
    """Half of the memory MLX may use."""
    info = mx.device_info()
    limit = info.get("max_recommended_working_set_size") or (
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return int(limit) // 2


def default_cache_dir() -> Path:
    """``$MLX_IFP_CACHE``, or the platform's place for caches."""
    if own := os.environ.get("MLX_IFP_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_ifp"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "mlx_ifp"
