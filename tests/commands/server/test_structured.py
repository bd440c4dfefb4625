"""``response_format``: a grammar lets only some tokens be said."""

import sys

import mlx.core as mx
import pytest

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of
from mlx_ifp.commands.server.failures import Failure
from mlx_ifp.commands.server.structured import Structured

FORM = {"type": "json_schema", "json_schema": {"schema": {"enum": ["a", "b"]}}}


@pytest.fixture(scope="module")
def tokenizer(scripted_checkpoint):
    return load_tokenizer_of(open_checkpoint(scripted_checkpoint), {})


def test_only_what_fits_the_schema_can_be_said_and_then_the_end(tokenizer):
    processor = Structured(tokenizer).processor(FORM)
    said, context, flat = [], [5], mx.zeros((1, 400))
    while True:
        allowed = mx.isfinite(processor(mx.array(context), flat))[0].tolist()
        tokens = [i for i, yes in enumerate(allowed) if yes]
        if tokens == [tokenizer.eos_token_id]:
            break
        assert tokenizer.eos_token_id not in tokens
        said.append(tokens[-1])
        context.append(tokens[-1])
    assert tokenizer.decode(said) in ('"a"', '"b"')
    # The step after the end is computed before the end is seen.
    processor(mx.array([*context, tokenizer.eos_token_id]), flat)


def test_text_needs_no_grammar(tokenizer):
    assert Structured(tokenizer).processor({"type": "text"}) is None


def test_without_the_library_the_extra_is_named(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(Failure, match=r"mlx_ifp\[structured\]"):
        Structured(tokenizer).processor(FORM)
