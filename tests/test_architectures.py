"""Every architecture of mlx-lm: it converts, generates, exports and trains, or is refused."""

import contextlib
import io
import json
import re
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model, save_config
from transformers import CONFIG_MAPPING

import mlx_ifp
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.tokenizers import load_tokenizer_of
from mlx_ifp.commands.export.stock_model import export
from mlx_ifp.commands.train.command import train
from mlx_ifp.commands.train.given import options_of
from mlx_ifp.convert import convert
from mlx_ifp.convert.dense import dtype_of
from mlx_ifp.dense_pass.layers import logits_of, pieces_of, run_layers
from mlx_ifp.errors import IFPError
from mlx_ifp.llm.build import build_model, complete
from mlx_ifp.llm.ffn import find_ffns
from mlx_ifp.llm.hf_config import mlx_config
from mlx_ifp.llm.output import hidden_states, output_layer
from mlx_ifp.tuner.predictor_start import from_layers
from mlx_ifp.tuner.source import load_source

from .architectures import SHAPE, SLIDING, config_of, model_types, saved_by_transformers
from .conftest import tiny_tokenizer

TEXT = "abcdefgh" * 3
INF = float("inf")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows")
    row = {"prompt": "say abc", "completion": "abc"}
    (path / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    return path


def make(path: Path, config: dict, tokenizer: Path) -> Path:
    """A dense model with random weights and this very config.json."""
    model = build_model(mlx_config(config))
    mx.random.seed(0)
    arrays = {
        name: 0.2 * mx.random.normal(array.shape) + (array.ndim == 1)
        if mx.issubdtype(array.dtype, mx.floating)
        else array
        for name, array in tree_flatten(model.parameters())
    }
    shutil.copytree(tokenizer, path)
    mx.save_safetensors(str(path / "model.safetensors"), arrays, metadata={"format": "mlx"})
    save_config(dict(config), path / "config.json")
    return path


def one_step(checkpoint: Path, rows: Path, path: Path, **more) -> None:
    """Train a dense model for one step, with a warm start and a checkpoint at the end."""
    options = {
        "model": str(checkpoint), "data": str(rows), "keep": 0.5, "run_path": str(path),
        "iters": 1, "warm_start_iters": 1, "batch_size": 1, "max_seq_length": 64,
        "head_width": 8, "val_batches": 0, **more,
    }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        train(options_of(options))


# These need more of a config than a shape to be built, or a package; no FFN of theirs is one.
UNKNOWN = {"kimi_k3", "muse_spark", "prism_hadamard_qwen35", "gpt_neox"}


def forms() -> list:
    """Every architecture in the form that transformers 5 saves, or else in its own."""
    found = []
    for name in model_types():
        if name in UNKNOWN:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = config_of(name)
            found.append(pytest.param(saved_by_transformers(config) or config, id=name))
    return found


def prunable(config: dict) -> str | None:
    """None, or why there are no FFNs to prune."""
    try:
        find_ffns(build_model(mlx_config(config)))
    except IFPError as error:
        return str(error)
    return None


@pytest.mark.parametrize("config", forms())
def test_every_architecture_works_or_is_refused_in_a_line(config, tokenizer, rows, tmp_path):
    reason = prunable(config)
    if reason is not None:
        # The refusal comes before a tensor is looked at.
        shutil.copytree(tokenizer, tmp_path / "dense")
        mx.save_safetensors(str(tmp_path / "dense" / "model.safetensors"), {"a": mx.zeros(1)})
        save_config(dict(config), tmp_path / "dense" / "config.json")
        with pytest.raises(IFPError) as error:
            convert(str(tmp_path / "dense"), tmp_path / "ifp")
        assert str(error.value) == reason and "\n" not in reason
        assert re.search("mixture of experts|FFN|module that holds|channel|is a BitLinear", reason)
        return
    dense = make(tmp_path / "dense", config, tokenizer)
    if config["model_type"] in REFUSED:
        with pytest.raises(IFPError, match=REFUSED[config["model_type"]]):
            convert(str(dense), tmp_path / "ifp")
        return
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "ifp", keep=0.5))
    own = load_tokenizer_of(checkpoint, {})
    model, _ = mlx_ifp.load(str(checkpoint.path))
    assert mlx_ifp.generate(model, own, TEXT, max_tokens=2) is not None
    source, _ = load_model(dense, model_config=mlx_config(config))
    tokens = mx.array([own.encode(TEXT)])
    assert mx.allclose(model.dense()(tokens), source(tokens), atol=1e-4)
    # The dense model layer by layer, in two pieces: its logits, and the keys and values it leaves.
    cache, expected = make_prompt_cache(source), make_prompt_cache(source)
    pieces = pieces_of(tokens[0], cache, tokens.size // 2 + 1)
    wanted = [source(piece.tokens, cache=expected) for piece in pieces]
    for hidden, logits in zip(run_layers(model.parent, pieces).hidden, wanted, strict=True):
        assert mx.allclose(logits_of(model.parent, hidden), logits, atol=1e-4)
    following = [source(tokens[:, :1], cache=filled) for filled in (cache, expected)]
    assert mx.allclose(*following, atol=1e-4)
    # The sub-network, the model of its export, and its body with its output layer are one.
    expected = model.subnetwork(model.select(TEXT))(tokens)
    export(checkpoint, own, tmp_path / "export", model.select(TEXT))
    stock, _ = load_model(tmp_path / "export")
    complete(stock)
    assert mx.allclose(stock(tokens), expected, atol=1e-4)
    parameters, logits = output_layer(stock)
    assert mx.allclose(logits(parameters, hidden_states(stock, tokens)[0]), expected[0], atol=1e-4)
    layers = 2
    if (reason := NO_PREDICTOR.get(config["model_type"])) is not None:
        with pytest.raises(IFPError, match=f"{reason}.*--predictor-layers"):
            one_step(dense, rows, tmp_path / "run", predictor_layers=2)
        if "embeddings" in reason:
            return
        layers = 4
    one_step(dense, rows, tmp_path / "run", predictor_layers=layers)
    assert open_checkpoint(tmp_path / "run" / "ifp").ifp.selector == "predictor"


# mlx-lm's own code does not run these.
REFUSED = {"gear": "layers do not run on token ids with a cache"}

# Their first two layers are no model of mlx-lm's, or have an embedding for each layer.
NO_PREDICTOR = {
    "exaone4": "do not run on token ids",
    "olmo3": "cannot build a model",
    "recurrent_gemma": "do not run on token ids",
    "gemma3n": "has 2 embeddings",
    "gemma4": "has 2 embeddings",
    "gemma4_text": "has 2 embeddings",
}


# The same model in the forms of transformers 4 and 5


def numbers(model: nn.Module) -> dict:
    """Everything in a model that is no weight: widths, rotary bases and tables, windows."""
    found = {}
    for path, module in model.named_modules():
        for name, value in [*vars(module).items(), *module.items()]:
            if isinstance(value, mx.array):
                found[path, name] = value.tolist() if name.startswith("_") else value.shape
            elif isinstance(value, bool | int | float | str | None):
                found[path, name] = value
    return found


# transformers has other defaults than mlx-lm for what these configs leave open, or names it
# otherwise; none of it concerns rope, layers or windows that are used.
OTHER_DEFAULTS = {
    "apertus": "rope",
    "gemma4": "pattern",
    "gemma4_text": "pattern",
    "seed_oss": "bias",
}


# Those that transformers has a class for, too.
BOTH = [name for name in model_types() if name not in UNKNOWN and name in CONFIG_MAPPING]


@pytest.mark.parametrize("name", BOTH)
def test_both_forms_of_a_config_make_one_model(name):
    config = config_of(name)
    saved = saved_by_transformers(config)
    if prunable(config) is not None:
        return  # It is refused in both forms; the sweep above sees it.
    assert saved is not None
    old, new = (numbers(build_model(mlx_config(each))) for each in (config, saved))
    expected = OTHER_DEFAULTS.get(name)
    differing = {key for key in old | new if old.get(key) != new.get(key)}
    assert {key for key in differing if expected is None or expected not in f"{key}"} == set()


def all_sliding(**more) -> dict:
    config = config_of("gemma3_text") | {"layer_types": ["sliding_attention"] * 4} | more
    del config["sliding_window_pattern"]
    return config


def test_a_gemma_3_whose_layers_are_all_sliding(tokenizer, tmp_path):
    dense = make(tmp_path / "dense", all_sliding(_sliding_window_pattern=6), tokenizer)
    model, own = mlx_ifp.load(str(convert(str(dense), tmp_path / "ifp", keep=1.0)))
    tokens = mx.array([own.encode(TEXT)])
    got = model.dense().model(tokens)
    # The same with six layers, of which the last two add nothing.
    types = [*SLIDING[:1] * 5, SLIDING[-1]]
    six = build_model(mlx_config(all_sliding(num_hidden_layers=6, layer_types=types)))
    six.load_weights(str(dense / "model.safetensors"), strict=False)
    for layer in six.model.layers[4:]:
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            layer[name].weight = mx.full((32,), -1.0)  # Gemma's norms multiply by 1 + weight
    assert mx.allclose(got, six.model(tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"layer_types": SLIDING}, 4),
        ({"layer_types": SLIDING, "sliding_window_pattern": 6}, 4),
        ({"layer_types": ["sliding_attention"] * 4}, 5),
        ({"layer_types": ["sliding_attention"] * 4, "_sliding_window_pattern": 6}, 6),
        ({"layer_types": ["full_attention"] * 4}, 1),
        ({"_sliding_window_pattern": 6}, 6),
        ({"layer_types": SLIDING, "model_type": "exaone4", "sliding_window_pattern": 4}, "LLLG"),
        ({"layer_types": SLIDING, "model_type": "exaone4"}, "LLLG"),
    ],
)
def test_the_pattern_of_the_layers(fields, expected):
    config = mlx_config({"model_type": "gemma3_text", "sliding_window": 8} | fields)
    assert config["sliding_window_pattern"] == expected


def test_a_pattern_without_a_period_is_refused(tokenizer, tmp_path):
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
    config = config_of("gemma3_text") | {"layer_types": types}
    dense = make(tmp_path / "dense", config, tokenizer)
    with pytest.raises(IFPError, match="one full layer in every few, which layer_types is not"):
        convert(str(dense), tmp_path / "ifp")


def test_training_reads_the_config_as_convert_does(tokenizer, tmp_path):
    saved = saved_by_transformers(config_of("llama"))
    assert "rope_theta" not in saved
    source = load_source(str(make(tmp_path / "dense", saved, tokenizer)))
    assert source.llm.model.layers[0].self_attn.rope.base == SHAPE["rope_theta"]
    assert source.config["rope_theta"] == SHAPE["rope_theta"]


def test_training_refuses_what_convert_refuses(tokenizer, tmp_path):
    dense = make(tmp_path / "dense", config_of("llama") | {"hidden_act": "gelu"}, tokenizer)
    for attempt in (lambda: convert(str(dense), tmp_path / "ifp"), lambda: load_source(str(dense))):
        with pytest.raises(IFPError, match="the activation is 'gelu', but mlx-lm's llama has ano"):
            attempt()


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_a_predictor_of_the_first_layers_of_a_model_that_shares_keys_and_values(
    layers, tokenizer, tmp_path
):
    config = config_of("gemma4_text") | {"hidden_size_per_layer_input": 0}
    source = load_source(str(make(tmp_path / "dense", config, tokenizer)))
    start = from_layers(source, layers)
    assert len(start.backbone.layers) == layers
    own = ["k_proj" in layer.self_attn for layer in start.backbone.layers]
    assert own == [True, True, False, False][:layers]


YARN = {"rope_type": "yarn", "rope_theta": 7.0, "factor": 4.0}
LONG = YARN | {"original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}}, {"rope_theta": 7.0}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 7.0}),
        ({"rope_theta": 9.0, "rope_parameters": {"rope_theta": 7.0}}, {"rope_theta": 9.0}),
        ({"rope_parameters": YARN}, {"rope_scaling": YARN | {"type": "yarn"}}),
        ({"rope_parameters": LONG}, {"original_max_position_embeddings": 64}),
        (
            {"rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_theta": 3.0}}},
            {"rope_theta": 7.0, "rope_local_base_freq": 3.0},
        ),
        (
            {"rope_parameters": {"sliding_attention": {"rope_theta": 3.0}}},
            {"rope_theta": 3.0, "rope_local_base_freq": 3.0},
        ),
        ({"time_step_limit": [0.0, {"__float__": "Infinity"}]}, {"time_step_limit": [0, INF]}),
        ({"model_type": "qwen3_moe", "num_local_experts": 4}, {"num_experts": 4}),
    ],
)
def test_fields_that_transformers_5_writes_elsewhere(fields, expected):
    assert mlx_config({"model_type": "llama"} | fields).items() >= expected.items()


@pytest.mark.parametrize(
    "config",
    [
        {"dtype": "float16"},
        {"torch_dtype": "float16"},
        {"torch_dtype": "torch.float16"},
        {"text_config": {"dtype": "float16"}},
        {"text_config": {"torch_dtype": "float16"}},
    ],
)
def test_the_type_of_a_config(config):
    assert dtype_of(config) == "float16"
