"""The dense LLM, layer by layer: several pieces give what mlx-lm's model gives in one call."""

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from mlx_ifp import load
from mlx_ifp.convert import convert
from mlx_ifp.dense_pass.layers import Piece, logits_of, pieces_of, run_layers

from ..conftest import make_dense
from ..helpers import relative_error

# Longer than the sliding window of 32 that the tiny Gemma has.
TOKENS = [(31 * i) % 380 for i in range(70)]
KINDS = {
    "llama": {},
    "gemma3_text": {},
    "phi3": {},
    "quantized": {"quantize_weights": True, "q_bits": 4, "q_group_size": 32},
}


@pytest.fixture(scope="module", params=KINDS)
def model(request, tmp_path_factory):
    path, how = tmp_path_factory.mktemp("layers"), KINDS[request.param]
    dense = make_dense(path / "llm", "llama" if how else request.param)
    return load(convert(str(dense), path / "ifp", keep=64, **how), cache=False)[0]


def states(cache):
    """Keys and values of all layers, in order, without the room for more."""
    return [a for _, a in tree_flatten([c.state for c in cache]) if isinstance(a, mx.array)]


def read(model, step, cache=None, tokens=TOKENS):
    """The last token's logits, the cache, and how many FFNs were read."""
    cache = make_prompt_cache(model.trunk) if cache is None else cache
    before = model.reader.bytes_read
    result = run_layers(model.parent, pieces_of(tokens, cache, step))
    ffns = (model.reader.bytes_read - before) * len(model.parent.ffns) / model.reader.nbytes
    assert ffns == result.ffns_read
    return logits_of(model.parent, result.hidden[-1][:, -1:]), cache, ffns


@pytest.mark.parametrize("step", [2048, 24])
def test_keys_values_and_logits_are_the_dense_models(model, step):
    logits, cache, ffns = read(model, step)
    assert ffns == 3
    dense, expected = model.dense(), make_prompt_cache(model.trunk)
    wanted = dense(mx.array([TOKENS]), cache=expected)[:, -1:]
    assert relative_error(logits, wanted) < 5e-5
    # A sliding window holds more of a longer piece until the next token comes.
    following = [dense(mx.array([[7]]), cache=c) for c in (cache, expected)]
    assert relative_error(*following) < 5e-5
    for ours, theirs in zip(states(cache), states(expected), strict=True):
        assert ours.shape == theirs.shape or step == 24
        if ours.shape == theirs.shape:
            assert relative_error(ours, theirs) < 5e-5


def test_a_cache_that_holds_tokens_is_continued(model):
    whole, *_ = read(model, 2048)
    _, cache, _ = read(model, 24, tokens=TOKENS[:40])
    rest, _, ffns = read(model, 12, cache, TOKENS[40:])
    assert ffns == 3
    assert relative_error(rest, whole) < 5e-5


def test_texts_of_their_own_share_the_reading(model):
    texts = [TOKENS[:9], TOKENS[20:31], TOKENS[40:42]]
    result = run_layers(
        model.parent,
        [Piece(mx.array([text])) for text in texts],
        lambda piece, z, ffn: mx.abs(z).sum(axis=(0, 1)) + 0 * ffn.down_proj(z).sum(),
    )
    assert result.ffns_read == 3
    for text, hidden in zip(texts, result.hidden, strict=True):
        wanted = model.dense()(mx.array([text]))
        assert relative_error(logits_of(model.parent, hidden), wanted) < 5e-5
    alone = run_layers(
        model.parent,
        [Piece(mx.array([texts[1]]))],
        lambda piece, z, ffn: mx.abs(z).sum(axis=(0, 1)),
    )
    for layer, one in zip(result.measured, alone.measured, strict=True):
        assert relative_error(layer[1], one[0]) < 5e-5


def test_progress_counts_layers_and_pieces(model):
    for pieces in (1, 2):
        said = []
        cache = make_prompt_cache(model.trunk)
        run_layers(
            model.parent,
            pieces_of(TOKENS, cache, -(-len(TOKENS) // pieces)),
            progress=lambda *counts, said=said: said.append(counts),
        )
        assert said == [(i, 3 * pieces) for i in range(1, 3 * pieces + 1)]
