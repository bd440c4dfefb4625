"""The trunk is begun before the tokenizer is loaded, read once, and not begun under a limit."""

import pytest

import mlx_ifp
import mlx_ifp.checkpoint.weights
import mlx_ifp.opening
import mlx_ifp.subnetwork.ahead
from mlx_ifp.errors import IFPError


@pytest.fixture
def order(monkeypatch):
    """The steps of loading, as they begin."""
    steps: list[str] = []

    def note(owner, name, step):
        function = getattr(owner, name)

        def noted(*args, **kwargs):
            steps.append(step)
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, noted)

    note(mlx_ifp.checkpoint.weights, "load_tensors", "trunk")
    note(mlx_ifp.opening, "load_tokenizer_of", "tokenizer")
    return steps


def test_the_trunk_is_read_once_while_the_tokenizer_loads(order, tiny_checkpoint):
    mlx_ifp.load(tiny_checkpoint, cache=False)
    assert order == ["trunk", "tokenizer"]


def test_under_a_memory_limit_nothing_is_begun(order, tiny_checkpoint):
    mlx_ifp.load(tiny_checkpoint, cache=False, memory_limit=1 << 30)
    assert order == ["tokenizer", "trunk"]
    order.clear()
    with pytest.raises(IFPError):
        mlx_ifp.load(tiny_checkpoint, cache=False, memory_limit=1 << 10)
    assert order == ["tokenizer"]


def test_channels_are_read_by_who_needs_them(tiny_checkpoint):
    model, _ = mlx_ifp.load(tiny_checkpoint, cache=False)
    assert model.reader.bytes_read == 0
