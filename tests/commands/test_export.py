"""mlx_ifp.export: what it writes is a stock mlx-lm model that equals the sub-network."""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.config import MaskConfig
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.commands.export import config as config_module
from mlx_ifp.commands.export.stock_model import export
from mlx_ifp.convert import convert
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.selection.files import save_selection

from ..cli.test_bad_input import fails
from ..conftest import ARCHITECTURES, make_dense, make_predictor_checkpoint, run_command
from ..helpers import random_selection, relative_error

TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])


def exported(checkpoint: Path, out: Path, selection, **options) -> tuple:
    """The network that plain mlx-lm loads, its config, the sub-network, and the notes."""
    model, tokenizer = load(checkpoint, cache=False)
    notes = export(open_checkpoint(checkpoint), tokenizer, out, selection, **options)
    network, _, config = mlx_lm.load(str(out), return_config=True)
    ours = model.dense() if selection is None else model.subnetwork(selection)
    return network, config, ours, " ".join(notes)


def in_float32(network):
    """The CPU backend is wrong for quantized weights in half precision."""
    network.set_dtype(mx.float32)
    return network


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float_weights_are_exactly_those_of_the_sub_network(tmp_path, architecture):
    dense = make_dense(tmp_path / "dense", architecture)
    checkpoint = convert(str(dense), tmp_path / "ifp")
    selection = random_selection(3, 160, 75)
    network, config, ours, notes = exported(checkpoint, tmp_path / "out", selection)
    assert config["intermediate_size"] == 75
    assert notes == ""
    assert relative_error(network(TOKENS), ours(TOKENS)) < 1e-6
    down = network.layers[0].mlp.down_proj.weight
    assert down.shape == (64, 75)


def test_the_dense_export_is_the_source(tmp_path, dense_llama, tiny_checkpoint):
    network, _, _, _ = exported(tiny_checkpoint, tmp_path / "out", None)
    source = dict(tree_flatten(load_model(dense_llama)[0].parameters()))
    for name, array in tree_flatten(network.parameters()):
        assert mx.array_equal(array, source[name]), name


@pytest.mark.parametrize(("k", "note"), [(96, "quantized again"), (75, "left unquantized")])
@pytest.mark.parametrize("architecture", ["llama", "phi3"])
def test_only_a_quantized_down_projection_changes(tmp_path, k, note, architecture):
    dense = make_dense(tmp_path / "dense", architecture)
    checkpoint = convert(
        str(dense), tmp_path / "ifp", quantize_weights=True, q_bits=4, q_group_size=32
    )
    network, config, ours, notes = exported(
        checkpoint, tmp_path / "out", random_selection(3, 160, k)
    )
    assert note in notes
    mlp, stored = network.layers[1].mlp, ours.layers[1].mlp
    projection = "gate_up_proj" if architecture == "phi3" else "gate_proj"
    assert mx.array_equal(mlp[projection].weight, stored[projection].weight)
    down = config["quantization"].get("model.layers.1.mlp.down_proj")
    assert (down["bits"] if down else None) == (8 if k == 96 else None)
    assert relative_error(in_float32(network)(TOKENS), ours(TOKENS)) < (0.02 if k == 96 else 1e-5)


@pytest.mark.parametrize("mode", ["affine", "mxfp4"])
def test_soft_values_and_other_modes(tmp_path, mode):
    dense = make_dense(tmp_path / "dense")
    checkpoint = convert(
        str(dense), tmp_path / "ifp", quantize_weights=True, q_mode=mode, q_group_size=32
    )
    selection = random_selection(3, 160, 96, soft=True)
    network, _, ours, _ = exported(checkpoint, tmp_path / "out", selection)
    assert relative_error(in_float32(network)(TOKENS), ours(TOKENS)) < 0.03
    floats, config, _, _ = exported(checkpoint, tmp_path / "float", selection, dequantize=True)
    assert "quantization" not in config
    assert not [n for n, _ in tree_flatten(floats.parameters()) if n.endswith("scales")]
    assert relative_error(in_float32(floats)(TOKENS), ours(TOKENS)) < 0.01


def test_layers_of_different_k_are_filled_with_zeros(tmp_path):
    checkpoint, _ = make_predictor_checkpoint(
        tmp_path / "ifp",
        k=[31, 64, 96],
        mask=MaskConfig("sigmoid", keep_soft_values=True),
        llm={"mlp_bias": True},
    )
    selection = load(checkpoint, cache=False)[0].select("Sort a list.")
    network, config, ours, notes = exported(checkpoint, tmp_path / "out", selection)
    assert config["intermediate_size"] == 96
    assert "zeros" in notes
    assert relative_error(network(TOKENS), ours(TOKENS)) < 1e-6


def test_the_command_and_plain_mlx_lm(tmp_path, smollm2):
    """The real model: what mlx_ifp generates for a task, mlx_lm.generate generates too."""
    task, prompt = "You are a helpful assistant.", "What is the capital of France?"
    out = tmp_path / "out"
    done = run_command(
        "export", "--model", smollm2, "--task", task, "--save-path", out, "--keep", "0.75",
        "--save-selection", tmp_path / "s.safetensors", "--dequantize",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"{out}: llama, intermediate_size 1152" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    theirs = subprocess.run(
        [str(Path(sys.executable).with_name("mlx_lm.generate")), "--model", str(out),
         "--prompt", prompt, "-m", "6", "--temp", "0", "--verbose", "False"],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert theirs.returncode == 0, theirs.stderr
    ours = run_command(
        "generate", "--model", smollm2, "--selection", tmp_path / "s.safetensors", "-p", prompt,
        "-m", 6, "--temp", 0, "--verbose", "F",
    )  # fmt: skip
    assert ours.returncode == 0, ours.stderr
    # Half precision against float32: the beginning of the text is the same.
    assert theirs.stdout.strip()[:12] == ours.stdout.strip()[:12]


def test_gguf_and_back(tmp_path, tiny_checkpoint):
    """What mlx-lm writes, our own reader of GGUF reads: the logits are the same to float16."""
    selection = random_selection(3, 160, 96)
    _, _, ours, notes = exported(tiny_checkpoint, tmp_path / "out", selection, gguf=True)
    assert "SentencePiece" in notes
    file = tmp_path / "out" / "ggml-model-f16.gguf"
    again = convert(str(file), tmp_path / "again", tokenizer=str(tiny_checkpoint))
    model, _ = load(again, cache=False)
    assert relative_error(model.dense()(TOKENS), ours(TOKENS)) < 5e-3


def test_wrong_arguments(tmp_path, tiny_checkpoint, dense_llama):
    def export_fails(*args):
        line = fails("export", "--model", tiny_checkpoint, "--save-path", tmp_path / "out", *args)
        assert not list(tmp_path.glob("*out*"))
        return line

    assert "Name one of --task" in export_fails()
    assert "Name one of --task" in export_fails("--dense", "--task", "x")
    assert "selects nothing" in export_fails("--dense", "--save-selection", tmp_path / "s")
    assert "no such selection" in export_fails("--selection", tmp_path / "nowhere.safetensors")
    save_selection(tmp_path / "s.safetensors", random_selection(3, 160, 64, checkpoint="other"))
    assert "another" in export_fails("--selection", tmp_path / "s.safetensors")
    assert "not converted" in fails("export", "--model", dense_llama, "--dense")
    (tmp_path / "mine").mkdir()
    line = fails("export", "--model", tiny_checkpoint, "--dense", "--save-path", tmp_path / "mine")
    assert "already exists" in line


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model_type": "qwen2"}, "architecture 'qwen2'"),
        ({"head_dim": 24}, "heads whose size"),
        ({"attention_bias": True}, "biases of the attention"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling"),
        ({"quantization": {"group_size": 32, "bits": 4}}, "add --dequantize"),
    ],
)
def test_gguf_is_refused_where_it_would_be_wrong(tiny_checkpoint, tmp_path, values, expected):
    checkpoint = open_checkpoint(tiny_checkpoint)
    checkpoint.config = checkpoint.config | values
    _, tokenizer = load(tiny_checkpoint, cache=False)
    with pytest.raises(IFPError, match=expected):
        export(checkpoint, tokenizer, tmp_path / "out", gguf=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("architecture", "values", "field"),
    [
        (
            "recurrent_gemma",
            {"attention_bias": False, "conv1d_width": 4, "logits_soft_cap": 30.0,
             "attention_window_size": 32, "block_types": ["recurrent", "recurrent", "attention"],
             "lru_width": 64, "num_key_value_heads": 1},
            "intermediate_size",
        ),
        (
            "afm7",
            {"hidden_dim": 64, "num_layers": 3, "num_kv_reuse_layers": 1, "num_heads": 4,
             "num_kv_heads": 2, "hidden_dim_scale_factor": 2.5},
            "hidden_dim_scale_factor",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("known", [True, False])
def test_an_ffn_that_is_not_as_wide_as_intermediate_size(
    tmp_path, monkeypatch, architecture, values, field, known
):
    """The config is one of which mlx-lm builds this width, also where the field must be found."""
    if not known:
        plain = config_module.with_width
        monkeypatch.setattr(
            config_module, "with_width", lambda c, k: plain(c, k) | {field: c[field] * 1.1}
        )
    config = ARCHITECTURES["llama"] | values
    dense = make_dense(tmp_path / "dense", "llama", model_type=architecture, **config)
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "ifp", keep=0.5))
    _, tokenizer = load(checkpoint.path, cache=False)
    layers, d_ffn = len(checkpoint.ffns), checkpoint.d_ffn
    for k, out in ((33, "odd"), (d_ffn, "whole")):
        notes = export(checkpoint, tokenizer, tmp_path / out, random_selection(layers, d_ffn, k))
        assert (field in " ".join(notes)) == (not known and k != d_ffn)
        network, _ = mlx_lm.load(str(tmp_path / out))
        assert find_ffns(network)[0].d_ffn == k


def test_a_width_that_no_config_has_is_refused_before_anything_is_written(tmp_path):
    ffn = {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False}
    attention = {"n_heads_in_group": 2, "no_op": False, "replace_with_linear": False}
    blocks = [{"attention": attention, "ffn": ffn}] * 3
    dense = make_dense(tmp_path / "dense", model_type="nemotron-nas", block_configs=blocks)
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "ifp"))
    _, tokenizer = load(checkpoint.path, cache=False)
    selection = random_selection(3, checkpoint.d_ffn, 100)
    with pytest.raises(IFPError, match="100 channels cannot be a stock model"):
        export(checkpoint, tokenizer, tmp_path / "out", selection)
    assert not (tmp_path / "out").exists()
