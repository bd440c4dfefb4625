"""A predictor that shares the LLM's embedding, or has a quantized head, and its training pass."""

import json
import shutil

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.config import HeadConfig
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.selectors.predictor import PredictorHead, load_predictor

from ..conftest import ARCHITECTURES, make_predictor_checkpoint
from ..helpers import relative_error

TOKENS = [5, 77, 130, 9, 42, 200, 301, 17, 23, 23, 8]
EMBEDDING = "model.embed_tokens"
BACKBONE = "predictor/model.safetensors"
HEAD = "predictor/head.safetensors"


def edit_json(checkpoint, name, change):
    path = checkpoint / name
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_arrays(checkpoint, name, change):
    """Rewrite a tensor file, and its size in the config."""
    path = checkpoint / name
    arrays = dict(mx.load(str(path)))
    mx.eval(arrays)
    change(arrays)
    mx.save_safetensors(str(path), arrays)
    size = path.stat().st_size
    edit_json(checkpoint, "ifp_config.json", lambda c: c["files"][name].update(bytes=size))


def pack(arrays, module, group_size, bits):
    """Quantize a module's weight in place; what it dequantizes to."""
    parts = mx.quantize(arrays.pop(f"{module}.weight"), group_size, bits)
    for part, array in zip(("weight", "scales", "biases"), parts, strict=True):
        arrays[f"{module}.{part}"] = array
    return mx.dequantize(*parts, group_size=group_size, bits=bits)


def share_embedding(checkpoint):
    """Let the backbone use the LLM's embedding instead of its own."""
    edit_arrays(checkpoint, BACKBONE, lambda arrays: arrays.pop(f"{EMBEDDING}.weight"))
    edit_json(checkpoint, "ifp_config.json", lambda c: c.update(predictor_embedding="llm"))
    for file in (checkpoint / "predictor").glob("*token*"):
        file.unlink()


def quantize_head(checkpoint, how, group_size, bits):
    """Quantize linear2; ``how`` goes into the backbone's config."""
    edit_arrays(checkpoint, HEAD, lambda arrays: pack(arrays, "linear2", group_size, bits))
    edit_json(checkpoint, "predictor/config.json", lambda c: c.update(quantization=how))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """LLM and backbone have one hidden size."""
    path = tmp_path_factory.mktemp("format") / "original"
    return make_predictor_checkpoint(path, backbone={"hidden_size": 64, "head_dim": 16})[0]


@pytest.fixture
def checkpoint(original, tmp_path):
    return shutil.copytree(original, tmp_path / "own")


def message(checkpoint):
    with pytest.raises(IFPError) as caught:
        open_checkpoint(checkpoint)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("bits", [None, 4])
def test_the_llms_embedding_stands_in_for_the_backbones_own(checkpoint, tmp_path, bits):
    embedding = {}

    def edit(arrays):
        embedding["weight"] = arrays[f"{EMBEDDING}.weight"]
        if bits is not None:
            embedding["weight"] = pack(arrays, EMBEDDING, 32, bits)

    edit_arrays(checkpoint, "model.safetensors", edit)
    if bits is not None:
        how = {"group_size": 32, "bits": bits, "mode": "affine"}
        edit_json(checkpoint, "config.json", lambda c: c.update(quantization=how))
    edit_arrays(
        checkpoint, BACKBONE, lambda a: a.update({f"{EMBEDDING}.weight": embedding["weight"]})
    )
    shared = shutil.copytree(checkpoint, tmp_path / "shared")
    share_embedding(shared)
    own, model = load(checkpoint, cache=False)[0], load(shared, cache=False)[0]
    # Dequantized by row or as a whole, the values are the same, so the scores are.
    assert mx.array_equal(model.scores(TOKENS), own.scores(TOKENS))
    assert model.predictor.body.embed_tokens is model.trunk.model.embed_tokens
    assert isinstance(model.predictor.body.embed_tokens, nn.QuantizedEmbedding) is bool(bits)
    text = "Sort a list of dates."
    assert model.selector_tokenizer() is model.tokenizer
    assert model.select(text).layers[0].tolist() == own.select(text).layers[0].tolist()


def test_the_trunk_is_needed_to_share_its_embedding(checkpoint):
    share_embedding(checkpoint)
    with pytest.raises(ValueError, match="the trunk is needed"):
        load_predictor(open_checkpoint(checkpoint))


@pytest.mark.parametrize(
    "backbone", [{"hidden_size": 48, "head_dim": 12}, {"hidden_size": 64, "vocab_size": 400}]
)
def test_another_hidden_size_or_vocabulary_cannot_share(tmp_path, backbone):
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", backbone=backbone)
    share_embedding(checkpoint)
    text = message(checkpoint)
    assert "predictor/config.json: the backbone's model.embed_tokens.weight" in text
    assert f"{backbone.get('vocab_size', 384)} tokens of {backbone['hidden_size']} values" in text
    assert "model*.safetensors has 384 of 64" in text


def test_an_embedding_where_none_belongs_and_the_reverse(checkpoint):
    edit_json(checkpoint, "ifp_config.json", lambda c: c.update(predictor_embedding="llm"))
    text = message(checkpoint)
    assert f"{BACKBONE}: the tensor {EMBEDDING}.weight does not belong" in text
    share_embedding(checkpoint)
    open_checkpoint(checkpoint)
    edit_json(checkpoint, "ifp_config.json", lambda c: c.update(predictor_embedding="own"))
    assert f"predictor: the tensor {EMBEDDING}.weight is missing" in message(checkpoint)
    edit_json(checkpoint, "ifp_config.json", lambda c: c.update(predictor_embedding="both"))
    assert "predictor_embedding must be one of own, llm" in message(checkpoint)


def test_a_shared_embedding_needs_a_predictor(tiny_checkpoint, tmp_path):
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / "ifp")
    edit_json(checkpoint, "ifp_config.json", lambda c: c.update(predictor_embedding="llm"))
    assert "head is missing" in message(checkpoint)


HOW = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_head_gives_the_scores_of_its_dequantized_values(
    checkpoint, tmp_path, group_size, bits
):
    quantized = shutil.copytree(checkpoint, tmp_path / "quantized")
    how = {"group_size": group_size, "bits": bits}
    # The module's own entry goes before the global one.
    quantize_head(quantized, HOW | {"head.linear2": how}, group_size, bits)
    packed = mx.load(str(quantized / HEAD))
    assert (packed["linear2.weight"].dtype, packed["linear2.bias"].shape) == (mx.uint32, (480,))
    parts = [packed[f"linear2.{part}"] for part in ("weight", "scales", "biases")]
    plain = {"linear2.weight": mx.dequantize(*parts, **how)}
    edit_arrays(checkpoint, HEAD, lambda arrays: arrays.update(plain))
    models = [load(path, cache=False)[0] for path in (quantized, checkpoint)]
    assert isinstance(models[0].predictor.head.linears[1], nn.QuantizedLinear)
    # The same numbers summed in another order, in float32.
    assert relative_error(*(model.scores(TOKENS) for model in models)) < 1e-5


def test_both_linears_and_the_global_quantization(checkpoint):
    expected = load(checkpoint, cache=False)[0].scores(TOKENS)
    quantize_head(checkpoint, HOW | {"bits": 8}, 64, 8)
    edit_arrays(checkpoint, HEAD, lambda arrays: pack(arrays, "linear1", 64, 8))
    share_embedding(checkpoint)
    model = load(checkpoint, cache=False)[0]
    layers = model.predictor.head.linears
    assert [type(layer) for layer in layers] == [nn.QuantizedLinear] * 2
    scores = model.scores(TOKENS)
    assert scores.dtype == mx.float32 and scores.shape == expected.shape


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (None, "head.linear2 is quantized, but predictor/config.json has no 'quantization'"),
        ({"bits": 4}, "head.linear2 lacks group_size or bits"),
        (HOW | {"mode": "mxfp4"}, "head.linear2 has the quantization mode 'mxfp4'"),
        (
            HOW | {"group_size": 0},
            "predictor/config.json: group_size of head.linear2 must be a number, not 0",
        ),
        (HOW | {"bits": "4"}, "bits of head.linear2 must be a number, not '4'"),
        (HOW | {"bits": 8}, "linear2.weight has the shape (480, 16), expected (480, 32)"),
        (HOW | {"group_size": 32}, "linear2.scales has the shape (480, 2), expected (480, 4)"),
    ],
)
def test_a_wrong_quantization_of_the_head_is_said(checkpoint, how, expected):
    quantize_head(checkpoint, how, 64, 4)
    assert expected in message(checkpoint)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_scores_as_each_text_alone(tmp_path, architecture):
    checkpoint, _ = make_predictor_checkpoint(tmp_path / "ifp", architecture)
    predictor = load(checkpoint, cache=False)[0].predictor
    texts = [TOKENS, TOKENS[:4], [7], [(5 * i) % 380 for i in range(40)]]
    batch = mx.array([text + [1] * (40 - len(text)) for text in texts])
    scores = predictor.batch_scores(batch, mx.array([len(text) for text in texts]))
    assert (scores.shape, scores.dtype) == ((4, 3, 160), mx.float32)
    for row, text in zip(scores, texts, strict=True):
        assert relative_error(row, predictor.scores(text)) < 1e-5


def test_the_head_and_the_backbone_get_gradients(checkpoint):
    predictor = load(checkpoint, cache=False)[0].predictor
    names = ["linears.0.weight", "linears.0.bias", "linears.1.weight", "linears.1.bias"]
    assert [n for n, _ in tree_flatten(predictor.head.trainable_parameters())] == names
    modules = nn.Module()
    modules.backbone, modules.head = predictor.backbone, predictor.head
    tokens, lengths = mx.array([TOKENS, TOKENS[::-1]]), mx.array([11, 6])

    def loss(_):
        return predictor.batch_scores(tokens, lengths).square().mean()

    _, gradients = nn.value_and_grad(modules, loss)(modules)
    for name, gradient in tree_flatten(gradients):
        assert mx.abs(gradient).max().item() > 0, name


def test_a_head_without_biases_is_made_of_arrays_alone():
    arrays = {"linear1.weight": mx.ones((3, 2)), "linear2.weight": mx.ones((4, 3))}
    head = PredictorHead(HeadConfig([2, 3, 4], [False, False], "none"), arrays)
    assert head(mx.array([1.0, 2.0])).tolist() == [9.0] * 4
