"""What depends on the machine: the type to run in, and how much memory there is."""

import os

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
