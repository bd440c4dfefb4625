"""The statistics of channels, against plain numpy on what the dense model's channels did."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_ifp import load
from mlx_ifp.convert import convert
from mlx_ifp.dense_pass.statistics import down_norms, text_statistics
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.llm.modules import get_module
from mlx_ifp.selectors.activations import activation_scores

from ..architectures import config_of
from ..conftest import make_dense

TEXTS = [[5, 77, 130, 9, 42, 200, 301, 17, 23, 23, 8], [9, 9, 300], [41, 7, 7, 12, 19, 250, 3]]
SPANS = [(4, 11), (0, 2), (6, 7)]
NAMES = ["griffin", "norm", "probe"]


def recorded(dense, tokens):
    """For each layer what goes into the dense model's down projection, [n, d_ffn], and its weight
    [d, d_ffn]."""
    model = load_model(dense)[0]
    inputs, weights = [], []

    def recording(down):
        def call(z):
            inputs.append(np.array(z[0], np.float64))
            return down(z)

        return call

    for ffn in find_ffns(model):
        module = get_module(model, ffn.path)
        down = module.pop("down_proj")
        weights.append(np.array(down.weight, np.float64))
        object.__setattr__(module, "down_proj", recording(down))
    model(mx.array([tokens]))
    return list(zip(inputs, weights, strict=True))


def plainly(dense, tokens, span, statistic):
    """The statistic as its paper writes it: float64 [L, d_ffn]."""
    layers = []
    for z, w in recorded(dense, tokens):
        z = z[slice(*span)]
        if statistic == "probe":
            outputs = (w**2) * (np.linalg.norm(z, axis=0) ** 2)
            layers.append(np.linalg.norm(outputs, axis=0))
            continue
        scores = np.linalg.norm(z / np.linalg.norm(z, axis=-1, keepdims=True), axis=0)
        layers.append(scores * np.linalg.norm(w, axis=0) if statistic == "norm" else scores)
    return np.stack(layers)


@pytest.fixture(scope="module", params=["llama", "phi3"])
def model(request, tmp_path_factory):
    """A dense model, and its checkpoint in use; one of the two has fused FFNs."""
    folder = tmp_path_factory.mktemp(request.param)
    dense = make_dense(folder / "dense", request.param)
    return dense, load(convert(str(dense), folder / "ifp", keep=64), cache=False)[0]


@pytest.mark.parametrize("statistic", NAMES)
def test_a_statistic_is_that_of_its_paper(model, statistic):
    dense, ifp = model
    found = text_statistics(ifp.parent, TEXTS, SPANS, statistic)
    assert found.values.dtype == np.float32
    for values, tokens, span in zip(found.values, TEXTS, SPANS, strict=True):
        assert np.allclose(values, plainly(dense, tokens, span, statistic), rtol=1e-4, atol=1e-6)


def test_the_ffns_are_read_once_for_texts_of_any_length(model):
    _, ifp = model
    layers = len(ifp.parent.ffns)
    together = text_statistics(ifp.parent, TEXTS, SPANS)
    assert together.ffns_read == layers
    # The three texts have 3, 7 and 11 tokens, so each becomes a batch of its own, or two fit.
    one_by_one = text_statistics(ifp.parent, TEXTS, SPANS, batch_tokens=1)
    assert one_by_one.ffns_read == layers
    assert np.allclose(together.values, one_by_one.values, rtol=1e-5, atol=1e-7)
    finished: list[int] = []
    in_passes = text_statistics(
        ifp.parent, TEXTS, SPANS, batch_tokens=1, pass_tokens=10, progress=finished.append
    )
    assert in_passes.ffns_read == 2 * layers
    assert finished == [2, 1]
    assert np.allclose(together.values, in_passes.values, rtol=1e-5, atol=1e-7)


def test_a_body_that_loops_over_its_layers(tmp_path):
    dense = make_dense(tmp_path / "dense", "llama", **config_of("iquestloopcoder"))
    ifp, _ = load(convert(str(dense), tmp_path / "ifp", keep=0.5), cache=False)
    found = text_statistics(ifp.parent, TEXTS)
    for tokens, values in zip(TEXTS, found.values, strict=True):
        alone = np.array(activation_scores(ifp.parent, tokens))
        assert np.allclose(values, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("statistic", NAMES)
def test_pieces_of_a_text_add_up(model, statistic):
    _, ifp = model
    whole = text_statistics(ifp.parent, TEXTS[:1], None, statistic).values[0]
    cut = activation_scores(ifp.parent, TEXTS[0], statistic=statistic, prefill_step_size=4)
    assert np.allclose(np.array(cut), whole, rtol=1e-4, atol=1e-6)


def test_columns_are_found_in_quantized_checkpoints(tmp_path):
    dense = make_dense(tmp_path / "dense")
    quantized = convert(str(dense), tmp_path / "ifp", quantize_weights=True, q_bits=8,
                        q_group_size=32)  # fmt: skip
    parent = load(quantized, cache=False)[0].parent
    norms = np.array(down_norms(parent.reader, parent.ffns, parent.config))
    for (_, weight), row in zip(recorded(dense, [5]), norms, strict=True):
        assert np.allclose(row, np.linalg.norm(weight, axis=0), rtol=1e-2)
    griffin, times_norm = (
        text_statistics(parent, TEXTS, None, name).values for name in ("griffin", "norm")
    )
    assert np.allclose(times_norm, griffin * norms, rtol=1e-4)
