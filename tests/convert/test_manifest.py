"""What a manifest may say: where the backbone's config is, the head, the mask, static scores."""

import mlx.core as mx
import pytest

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert

from .trained import edit_json, save_run

MANIFEST = "ifpruning_config.json"


@pytest.fixture
def run(tmp_path):
    """A run whose manifest names the backbone's config inside of it."""
    save_run(tmp_path / "run", "manifest")
    edit_json(tmp_path / "run" / MANIFEST, predictor_model="predictor_config")
    return tmp_path / "run"


@pytest.mark.parametrize("named", ["predictor_config", "predictor_config/config.json"])
def test_the_backbone_is_found_inside_the_checkpoint(tmp_path, run, named, monkeypatch):
    """Wherever the command is run."""
    monkeypatch.chdir(tmp_path)
    edit_json(run / MANIFEST, predictor_model=named)
    out = convert(str(run), tmp_path / "ifp")
    assert open_checkpoint(out).predictor_config["num_hidden_layers"] == 2


def test_a_config_inside_that_is_none_is_said(tmp_path, run):
    (run / "predictor_config" / "config.json").write_text("{")
    with pytest.raises(IFPError, match="predictor_config/config.json: not valid JSON"):
        convert(str(run), tmp_path / "ifp")
