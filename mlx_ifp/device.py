"""What depends on the machine: the type to run in, and how much memory there is."""

import os
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np


def default_dtype() -> mx.Dtype | None:
    """float32 on a CPU, where half precision is slow or, quantized, wrong; else None."""
    return mx.float32 if mx.default_device().type == mx.DeviceType.cpu else None


def default_cache_bytes() -> int:
    """Half of the memory that MLX may use, as Metal says, or that the CUDA card or machine has."""
    info = mx.device_info()
    limit = (
        info.get("max_recommended_working_set_size")
        or info.get("total_memory")
        or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    return int(limit) // 2


def shares_memory() -> bool:
    """Whether the processor may write to arrays in place, as with Metal and on the CPU.

    A CUDA card has memory of its own. MLX moves an array out of it as soon as the processor asks
    for its address: the array is slow from then on, and others may be using it while it moves.
    """
    return not (mx.cuda.is_available() and mx.default_device().type == mx.DeviceType.gpu)


def copy_to_device(rows: np.ndarray) -> mx.array:
    """Bytes [n, width] in the device's own memory, evaluated.

    ``mx.array`` alone leaves them where both sides can reach them. The result of a device's
    operation lies with the device, unless the operation reuses its input's memory. The input is
    therefore held while the operation runs.
    """
    shared = mx.array(rows)
    copied = shared | mx.array(0, mx.uint8)
    mx.eval(copied)
    return copied


def default_cache_dir() -> Path:
    """``$MLX_IFP_CACHE``, or the platform's place for caches."""
    if own := os.environ.get("MLX_IFP_CACHE"):
        return Path(own).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "mlx_ifp"
    # The XDG specification has a path that is not absolute ignored.
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (root if root.is_absolute() else Path.home() / ".cache") / "mlx_ifp"
