"""Channels may be stored in another order: everything stays the same but where they lie."""

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.checkpoint.weights import load_tensors
from mlx_ifp.commands.export.stock_model import export
from mlx_ifp.convert import convert
from mlx_ifp.convert.calibrate import channel_order

from ..conftest import make_dense, make_predictor_checkpoint
from ..helpers import random_selection

PROMPTS = [
    {"prompt": "Name three rivers.", "completion": "Nile."},
    {"text": "Sort a list of dates in Python."},
    {"messages": [{"role": "user", "content": "Write a poem."}]},
]
HOW = {
    "float": {"dtype": "bfloat16"},
    "affine": {"quantize_weights": True, "q_bits": 4, "q_group_size": 32},
    "mxfp4": {"quantize_weights": True, "q_mode": "mxfp4"},
}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in PROMPTS))
    return path


@pytest.fixture(scope="module", params=HOW)
def pair(request, tmp_path_factory, prompts):
    """The same model in the original order and in another one."""
    root = tmp_path_factory.mktemp("calibrate")
    architecture = "granite" if request.param == "affine" else "phi3"
    dense = str(make_dense(root / "dense", architecture))
    how = HOW[request.param] | {"keep": 64}
    plain = convert(dense, root / "plain", **how)
    return plain, convert(dense, root / "calibrated", calibrate=prompts, **how)


def arrays_of(network):
    return dict(tree_flatten(network.parameters()))


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, array in mine.items():
        assert array.dtype == theirs[name].dtype, name
        assert mx.array_equal(array, theirs[name]), name


def test_rows_are_stored_as_the_order_says(pair):
    plain, calibrated = pair
    order = load_file(calibrated / "order.safetensors")["order"]
    assert (order != np.arange(160)).any(axis=1).all()
    mine, theirs = (mx.load(str(path / "channels.safetensors")) for path in (calibrated, plain))
    for name, array in theirs.items():
        layer = int(name.split(".")[2])
        assert mx.array_equal(mine[name], array[mx.array(order[layer].astype(np.int32))]), name
    assert json.loads((calibrated / "ifp_config.json").read_text())["channel_order"] == "stored"


def test_networks_are_the_same_to_the_bit(pair):
    models = [load(path, cache=False)[0] for path in pair]
    text = "What is a list?"
    selections = [model.select(text) for model in models]
    for a, b in zip(*(selection.layers for selection in selections), strict=True):
        assert np.array_equal(a, b)
    for selection in (random_selection(3, 160, [1, 64, 150], soft=True, seed=1), None,
                      random_selection(3, 160, 64, seed=2)):  # fmt: skip
        read = [model.prepare(selection=selection, dense=selection is None) for model in models]
        assert_same(*(arrays_of(ready.network) for ready in read))
        assert len({(r.bytes_read, r.channels_reused) for r in read}) == 1
    tensors = [load_tensors(model.checkpoint.channels, None) for model in models]
    assert_same(*tensors)


def test_answers_are_the_same(pair):
    answers = []
    for path in pair:
        model, tokenizer = load(path, cache=False)
        answers.append(generate(model, tokenizer, "Name three rivers.", max_tokens=12))
    assert answers[0] == answers[1] != ""


def test_exports_are_the_same(pair, tmp_path):
    selection = random_selection(3, 160, 64, soft=True)
    for i, path in enumerate(pair):
        checkpoint = open_checkpoint(path)
        tokenizer = load(path, cache=False)[1]
        export(checkpoint, tokenizer, tmp_path / str(i), selection, dequantize=True)
        export(checkpoint, tokenizer, tmp_path / f"dense{i}", dequantize=True)
    for name in ("", "dense"):
        files = [(tmp_path / f"{name}{i}" / "model.safetensors").read_bytes() for i in range(2)]
        assert files[0] == files[1]


def test_an_order_survives_another_precision_and_can_be_made_anew(pair, prompts, tmp_path):
    plain, calibrated = pair
    for i, path in enumerate(pair):
        convert(str(path), tmp_path / f"f{i}", dequantize_weights=True, dtype="float32", keep=32)
    mine, theirs = (open_checkpoint(tmp_path / f"f{i}") for i in (1, 0))
    assert mine.ifp.channel_order == "stored"
    assert_same(*(load_tensors(c.channels, None) for c in (mine, theirs)))
    again = convert(str(calibrated), tmp_path / "again", calibrate=prompts)
    fresh = convert(str(plain), tmp_path / "fresh", calibrate=prompts)
    for file in ("order.safetensors", "channels.safetensors"):
        assert (again / file).read_bytes() == (fresh / file).read_bytes()


def test_a_predictor_calibrates_its_own_checkpoint(tmp_path, prompts):
    path, _ = make_predictor_checkpoint(tmp_path / "predictor")
    calibrated = convert(str(path), tmp_path / "calibrated", calibrate=prompts)
    models = [load(p, cache=False)[0] for p in (path, calibrated)]
    ready = [model.prepare("Name three rivers.") for model in models]
    assert {r.source for r in ready} == {"predictor"}
    assert_same(*(arrays_of(r.network) for r in ready))
    # Never selected by the three prompts: last.
    masks = np.stack([model_mask(models[0], prompt) for prompt in texts()])
    order = load_file(calibrated / "order.safetensors")["order"]
    for layer in range(3):
        count = masks[:, layer].sum(axis=0)[order[layer]]
        assert (count == 3)[: (count == 3).sum()].all()
        assert (count == 0)[(count > 0).sum() :].all()


def texts():
    return [PROMPTS[0]["prompt"], PROMPTS[1]["text"], PROMPTS[2]["messages"][0]["content"]]


def model_mask(model, prompt):
    return model.select(prompt).mask


def test_selections_become_few_runs():
    """Two tasks, each with channels of its own among common ones, scattered all over."""
    rng = np.random.default_rng(0)
    kinds = np.stack([rng.permutation(np.repeat([0, 1, 2, 3], 64)) for _ in range(2)])
    masks = np.stack(
        [(kinds == 0) | (kinds == 1 + i % 2) for i in range(10)] + [(kinds == 0) | (kinds == 1)]
    )
    order = channel_order(masks)
    for mask in masks:
        for layer in range(2):
            assert runs(mask[layer]) > 40
            assert runs(mask[layer][order[layer]]) <= 2
    for layer in range(2):
        assert kinds[layer][order[layer]].tolist() == sorted(kinds[layer].tolist())


def runs(mask) -> int:
    return int((np.diff(mask.astype(int), prepend=0) == 1).sum())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda order: order * 0, "layer 0 does not hold each channel once"),
        (lambda order: order + 1, "layer 0 does not hold each channel once"),
        (lambda order: order[:, :100], "has the shape"),
        (lambda order: order.astype(np.float32), "has the type F32"),
    ],
    ids=["zeros", "range", "shape", "type"],
)
def test_an_order_that_is_none_is_refused(tiny_checkpoint, prompts, tmp_path, damage, message):
    path = convert(str(tiny_checkpoint), tmp_path / "bad", calibrate=prompts)
    file = path / "order.safetensors"
    save_file({"order": damage(load_file(file)["order"])}, file)
    config = json.loads((path / "ifp_config.json").read_text())
    config["files"][file.name]["bytes"] = file.stat().st_size
    (path / "ifp_config.json").write_text(json.dumps(config))
    with pytest.raises(IFPError, match=message) as error:
        open_checkpoint(path)
    assert "order.safetensors" in str(error.value)


@pytest.mark.parametrize(
    ("field", "message"),
    [("original", "must be 'stored'"), ("sorted", "channel_order must be one of")],
)
def test_the_config_must_say_that_there_is_an_order(
    tiny_checkpoint, prompts, tmp_path, field, message
):
    path = convert(str(tiny_checkpoint), tmp_path / "bad", calibrate=prompts)
    config = json.loads((path / "ifp_config.json").read_text())
    (path / "ifp_config.json").write_text(json.dumps(config | {"channel_order": field}))
    with pytest.raises(IFPError, match=message):
        open_checkpoint(path)


def test_a_missing_order_is_refused(tiny_checkpoint, prompts, tmp_path):
    path = convert(str(tiny_checkpoint), tmp_path / "bad", calibrate=prompts)
    config = json.loads((path / "ifp_config.json").read_text())
    del config["files"]["order.safetensors"]
    (path / "ifp_config.json").write_text(json.dumps(config))
    with pytest.raises(IFPError, match=r"the tensor order is missing"):
        open_checkpoint(path)


def test_bad_prompts_leave_nothing(dense_llama, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"nothing": 1}\n')
    with pytest.raises(IFPError, match="line 1: a row has messages"):
        convert(str(dense_llama), tmp_path / "out", calibrate=tmp_path / "p.jsonl")
    assert not (tmp_path / "out").exists()


def test_selecting_builds_no_model(tmp_path, prompts, monkeypatch):
    """Selections are made from the checkpoint and its trunk."""
    from mlx_ifp import model

    def refused(*_, **__):
        raise AssertionError("a model was built")

    monkeypatch.setattr(model.IFPModel, "__init__", refused)
    dense = str(make_dense(tmp_path / "dense"))
    out = convert(dense, tmp_path / "ifp", keep=64, static_prompts=prompts, calibrate=prompts)
    assert open_checkpoint(out).selectors == ["activations", "static", "glass"]
