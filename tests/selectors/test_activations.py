"""The training-free selector: GRIFFIN's statistic, one FFN in memory at a time."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, load
from mlx_ifp.convert import convert
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.llm.modules import get_module
from mlx_ifp.selectors.activations import activation_scores

from ..conftest import make_dense
from ..helpers import memory_peak, relative_error

TOKENS = [5, 77, 130, 9, 42, 200, 301, 17, 23, 23, 8]


def griffin(dense, tokens):
    """The statistic written down plainly: record Z of the dense model, normalise, norm."""
    model = load_model(dense)[0]
    recorded = []
    for ffn in find_ffns(model):
        module = get_module(model, ffn.path)
        down = module.down_proj

        class Recorder:
            def __init__(self, down):
                self.down = down

            def __call__(self, z):
                recorded.append(np.array(z[0], np.float64))
                return self.down(z)

        object.__setattr__(module, "down_proj", Recorder(down))
        module.pop("down_proj")
    model(mx.array([tokens]))
    normalised = [z / np.linalg.norm(z, axis=-1, keepdims=True) for z in recorded]
    return np.stack([np.linalg.norm(z, axis=0) for z in normalised])


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "granite", "glm4"])
def test_scores_are_griffins_statistic(tmp_path, architecture):
    dense = make_dense(tmp_path / "dense", architecture)
    model, _ = load(convert(str(dense), tmp_path / "ifp"), cache=False)
    scores = model.scores(TOKENS, selector="activations")
    assert scores.dtype == mx.float32
    expected = griffin(dense, TOKENS)
    assert scores.shape == expected.shape
    assert np.allclose(np.array(scores), expected, rtol=1e-4, atol=1e-6)


def test_chunks_equal_one_pass(tiny_checkpoint):
    model, _ = load(tiny_checkpoint, cache=False)
    one, several = (
        activation_scores(model.parent, TOKENS, prefill_step_size=step) for step in (2048, 4)
    )
    assert relative_error(several, one) < 1e-5


def test_the_full_ffn_is_never_resident(tmp_path):
    dense = make_dense(
        tmp_path / "dense", hidden_size=256, intermediate_size=4096, num_hidden_layers=8
    )
    model, _ = load(convert(str(dense), tmp_path / "ifp", keep=64), cache=False)
    with memory_peak() as peak:
        model.scores(TOKENS)
    layer = model.reader.nbytes / 8
    assert peak.nbytes < 2.2 * layer
    assert model.reader.bytes_read == model.reader.nbytes


def test_a_model_that_overflows_float16_is_told_so(tmp_path):
    dense = make_dense(tmp_path / "dense")
    weights = mx.load(str(dense / "model.safetensors"))
    large = {name: array * 400 if "mlp" in name else array for name, array in weights.items()}
    mx.eval(large)
    mx.save_safetensors(str(dense / "model.safetensors"), large, {"format": "mlx"})
    checkpoint = convert(str(dense), tmp_path / "ifp", keep=64)
    load(checkpoint, cache=False)[0].select("Hello")
    model, _ = load(checkpoint, cache=False, dtype=mx.float16)
    with pytest.raises(IFPError, match=r"float16 overflowed.*--dtype bfloat16 or --dtype float32"):
        model.select("Hello")
