"""A model whose activations are larger than float16 holds, as Gemma 3's are, is told what to do."""

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model, save_model

from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.selectors.selector import Selector
from mlx_ifp.subnetwork.parent import Parent

from ..conftest import make_dense, run_command

MESSAGE = r"float16 overflowed.*--dtype bfloat16 or --dtype float32"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A checkpoint of a tiny llama whose FFNs give numbers of about 10^7."""
    folder = tmp_path_factory.mktemp("large")
    dense = make_dense(folder / "dense")
    model, _ = load_model(dense)
    for layer in model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            layer.mlp[name].weight = layer.mlp[name].weight * 400
    save_model(dense, model)
    return convert(str(dense), folder / "ifp", keep=64)


def test_scores_name_the_type_that_overflowed(large):
    for dtype in (mx.bfloat16, mx.float32):
        load(large, dtype=dtype, cache=False)[0].select("Hello", selector="activations")
    model, _ = load(large, dtype=mx.float16, cache=False)
    with pytest.raises(IFPError, match=MESSAGE):
        model.select("Hello", selector="activations")


def test_so_do_the_scores_of_a_model_that_is_stored_in_float16(large, tmp_path):
    dense = make_dense(tmp_path / "dense")
    half = convert(str(dense), tmp_path / "half", keep=64, dtype="float16")
    selector = Selector(open_checkpoint(half), Parent.load(open_checkpoint(half)))
    assert selector._computed_in("activations") == mx.float16
    selector = Selector(open_checkpoint(large), Parent.load(open_checkpoint(large)))
    assert selector._computed_in("activations") == mx.float32


def test_a_given_selection_does_not_lead_to_tokens_that_mean_nothing(large):
    exact, tokenizer = load(large, dtype=mx.float32, cache=False)
    selection = exact.select("Hello", selector="activations")
    generate(exact, tokenizer, "Hello", selection=selection, max_tokens=2)
    model, tokenizer = load(large, dtype=mx.float16, cache=False)
    for which in ({"selection": selection}, {"dense": True}):
        with pytest.raises(IFPError, match=MESSAGE):
            generate(model, tokenizer, "Hello", max_tokens=2, **which)


def test_the_command_line_says_so_too(large):
    done = run_command("generate", "--model", large, "-p", "Hello", "-m", 2, "--dtype", "float16")
    assert done.returncode == 1
    line = done.stderr.strip().splitlines()[-1]
    assert "float16 overflowed" in line
    assert "--dtype bfloat16" in line
