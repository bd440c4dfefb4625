"""A backbone whose embedding is the LLM's is converted with the LLM's, in any layout."""

import json

import mlx.core as mx
import pytest

from mlx_ifp import load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.convert.streams import same_values
from mlx_ifp.files.tensor_files import LazyTensor

from ..conftest import tiny_tokenizer
from .trained import save_run

TOKENS = [5, 77, 130, 9, 42]
LAYOUTS = ("split", "module", "manifest")


def other_tokenizer(path) -> str:
    """Gives other ids than the LLM's: every text begins with a special token."""
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save_pretrained(path)
    return str(path)


def embedding_of(out) -> str:
    """Whose embedding a checkpoint's predictor uses."""
    return open_checkpoint(out).ifp.predictor_embedding


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_equal_embedding_is_stored_once(tmp_path, layout, capfd):
    given = save_run(tmp_path / "run", layout)
    shared = convert(mlx_path=tmp_path / "shared", **given)
    assert "uses the LLM's embedding and tokenizer" in capfd.readouterr().err
    own = convert(
        mlx_path=tmp_path / "own",
        **given | {"predictor_tokenizer": other_tokenizer(tmp_path / "other")},
    )
    assert (embedding_of(shared), embedding_of(own)) == ("llm", "own")
    assert [file.name for file in (shared / "predictor").iterdir() if "token" in file.name] == []
    assert not any("embed_tokens" in name for name in open_checkpoint(shared).predictor)
    scores = [load(out, cache=False)[0].scores(TOKENS) for out in (shared, own)]
    assert mx.array_equal(*scores)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_report_says_so(tmp_path, layout):
    out = convert(mlx_path=tmp_path / "ifp", **save_run(tmp_path / "run", layout))
    report = json.loads((out / "source_tensors.json").read_text())
    (skipped,) = [name for name in report["skipped"]["backbone"] if "embed_tokens" in name]
    assert "the same as the LLM's, bit for bit" in report["skipped"]["backbone"][skipped]
    assert skipped not in report["mapped"]["backbone"]


def one_bit(body) -> None:
    weight = body["embed_tokens.weight"]
    bits = weight.view(mx.uint32)
    bits[-1, -1] += 1
    body["embed_tokens.weight"] = bits.view(weight.dtype)


def half(body) -> None:
    body["embed_tokens.weight"] = body["embed_tokens.weight"].astype(mx.float16)


@pytest.mark.parametrize("change", [one_bit, half])
def test_another_embedding_stays(tmp_path, change):
    out = convert(mlx_path=tmp_path / "ifp", **save_run(tmp_path / "run", "manifest", change))
    assert embedding_of(out) == "own"


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ({"quantize_weights": True}, "llm"),
        ({"dtype": "float16"}, "llm"),
        ({"quantize_weights": True, "predictor_q_bits": 0}, "own"),
        ({"quantize_weights": True, "predictor_q_bits": 8}, "own"),
        ({"dtype": "float16", "predictor_dtype": "float32"}, "own"),
    ],
)
def test_an_embedding_in_another_precision_is_another_one(tmp_path, precision, expected):
    given = save_run(tmp_path / "run", "manifest")
    out = convert(mlx_path=tmp_path / "ifp", **given, **precision)
    assert embedding_of(out) == expected
    assert mx.isfinite(load(out, cache=False)[0].scores(TOKENS)).all()


def test_tensors_are_compared_in_pieces():
    """No more than the rows of one step are read at a time, and none after a difference."""
    array = mx.arange(80, dtype=mx.float32).reshape(10, 8)
    reads = []

    def lazy(values):
        def read(start, stop):
            reads.append((start, stop))
            return values[start:stop]

        return LazyTensor(values.shape, values.dtype, read, 3)

    assert same_values(lazy(array), lazy(array + 0))
    assert reads[::2] == [(0, 3), (3, 6), (6, 9), (9, 10)]
    reads.clear()
    changed = array + 0
    changed[4, 0] = -1
    assert not same_values(lazy(array), lazy(changed))
    assert reads[-1] == (3, 6)
    reads.clear()
    assert not same_values(lazy(array), lazy(array.astype(mx.float16)))
    assert reads == []
