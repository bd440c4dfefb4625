"""Where caches are kept."""

from pathlib import Path

import pytest

from mlx_ifp.device import default_cache_dir


@pytest.mark.parametrize("root", ["rel", "./rel", ""])
def test_a_relative_xdg_cache_home_is_ignored(monkeypatch, root):
    monkeypatch.delenv("MLX_IFP_CACHE")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", root)
    assert default_cache_dir() == Path.home() / ".cache" / "mlx_ifp"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_cache_dir() == Path("/var/cache/mlx_ifp")
