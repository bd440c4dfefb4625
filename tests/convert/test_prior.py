"""A converted model writes the text that its prior is made from."""

import contextlib
import io
import json
import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import STATIC_FILE, open_checkpoint
from mlx_ifp.convert import convert, prior
from mlx_ifp.convert.command import convert_with
from mlx_ifp.convert.options import setup_arg_parser

from ..conftest import make_dense


@pytest.fixture(scope="module")
def with_prior(chat_model, tmp_path_factory):
    """The checkpoint of a chat model, and what the conversion said about its prior."""
    out, said = tmp_path_factory.mktemp("prior") / "ifp", io.StringIO()
    flags = ["--model", str(chat_model), "--mlx-path", str(out), "--keep", "64", "--prior", "12"]
    with contextlib.redirect_stderr(said):
        convert_with(setup_arg_parser().parse_args(flags))
    return out, said.getvalue()


def test_the_model_writes_its_own_prior(with_prior):
    path, said = with_prior
    checkpoint = open_checkpoint(path)
    assert checkpoint.selectors == ["activations", "static", "glass"]
    assert checkpoint.ifp.selector == "glass"
    made = checkpoint.ifp.source["prior"]
    assert 9 <= made["prompts"] <= 12 and made["answer_tokens"] > made["prompts"]
    assert f"The prior comes from {made['prompts']} prompts that the model made up" in said
    model, _ = load(path, cache=False)
    scores = mx.load(str(path / STATIC_FILE))["scores"]
    # Each example has unit norm in every layer, so the mean's norm is 1 at most.
    norms = np.linalg.norm(np.array(scores), axis=-1)
    assert (norms > 0.1).all() and (norms <= 1 + 1e-6).all()
    assert model.selector == "glass"
    assert model.select("What is a file?").ks == [64] * 2


def test_a_checkpoint_gets_a_prior_later(with_prior, chat_model, tmp_path):
    plain = convert(str(chat_model), tmp_path / "plain", keep=64)
    assert open_checkpoint(plain).ifp.selector == "activations"
    state = mx.random.state[0].tolist()
    again = convert(str(plain), tmp_path / "again", prior=12)
    assert mx.random.state[0].tolist() == state
    one, other = (mx.load(str(path / STATIC_FILE))["scores"] for path in (with_prior[0], again))
    assert mx.allclose(one, other, rtol=1e-5)
    # Another precision keeps it.
    copied = convert(str(again), tmp_path / "copy", keep=128)
    assert open_checkpoint(copied).ifp.selector == "glass"
    assert mx.array_equal(mx.load(str(copied / STATIC_FILE))["scores"], other)


def test_a_prior_that_nobody_asked_for_must_be_quick(chat_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mlx_ifp.convert.conversion.SECONDS", 0.0)
    path = convert(str(chat_model), tmp_path / "slow", prior=None)
    assert open_checkpoint(path).ifp.selector == "activations"
    said = " ".join(capsys.readouterr().err.split())
    assert "There is no prior" in said and re.search(r"it would take about \d+ minutes?\.", said)
    assert f"mlx_ifp.convert --model {path} --mlx-path {path}-prior --prior" in said
    monkeypatch.setattr("mlx_ifp.convert.conversion.SECONDS", 600.0)
    monkeypatch.setattr("mlx_ifp.convert.conversion.PROMPTS", 8)
    path = convert(str(chat_model), tmp_path / "quick", prior=None)
    assert open_checkpoint(path).ifp.selector == "glass"


def test_why_there_is_no_prior(chat_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prior, "default_cache_bytes", lambda: 1)
    with pytest.raises(IFPError, match=r"No prior can be made: the whole model.*no room in memory"):
        convert(str(chat_model), tmp_path / "large", prior=True)
    assert not (tmp_path / "large").exists()
    path = convert(str(chat_model), tmp_path / "large", prior=None)
    assert open_checkpoint(path).ifp.selector == "activations"
    assert "There is no prior for the selector glass: the whole" in capsys.readouterr().err
    (tmp_path / "p.txt").write_text("a\n")
    with pytest.raises(IFPError, match="--prior and --static-prompts exclude each other"):
        convert(str(chat_model), tmp_path / "x", prior=8, static_prompts=tmp_path / "p.txt")


def test_a_model_without_a_chat_template_gets_none(tmp_path, capsys):
    dense = make_dense(tmp_path / "dense")
    config = json.loads((dense / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (dense / "tokenizer_config.json").write_text(json.dumps(config))
    (dense / "chat_template.jinja").unlink(missing_ok=True)
    convert(str(dense), tmp_path / "ifp", prior=None)
    assert "prior" not in capsys.readouterr().err
    with pytest.raises(IFPError, match="No prior can be made: The model has no chat template"):
        convert(str(dense), tmp_path / "other", prior=True)


def test_a_checkpoint_may_keep_k_by_layer(chat_model, tmp_path):
    path = convert(str(chat_model), tmp_path / "ifp", keep=64, keep_by_layer=True)
    assert load(path, cache=False)[0].text_selector.scoring.by_layer
    with pytest.raises(IFPError, match="must be one too, such as 64, not 100"):
        convert(str(chat_model), tmp_path / "odd", keep=100, keep_by_layer=True)
    assert not (tmp_path / "odd").exists()
