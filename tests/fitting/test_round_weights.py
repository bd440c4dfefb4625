"""``examples/default_model/round_weights.py``: a fitted checkpoint in fewer bits."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_ifp
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert

SCRIPT = Path(__file__).parents[2] / "examples" / "default_model" / "round_weights.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("round_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("bits", [3, 5, 6])
def test_codes_are_packed_as_mlx_packs_them(script, bits):
    codes = np.random.default_rng(0).integers(0, 2**bits, (4, 64))
    ones, zeros = mx.ones((4, 2)), mx.zeros((4, 2))
    packed = mx.array(script.packed(codes.astype(np.uint8), bits))
    found = mx.dequantize(packed, ones, zeros, group_size=32, bits=bits)
    assert np.array_equal(np.array(found), codes)


def test_outputs_are_nearer_than_those_of_weights_that_are_rounded_to_the_nearest(script):
    chance = np.random.default_rng(0)
    inputs = (chance.normal(size=(500, 8)) @ chance.normal(size=(8, 96))).astype(np.float32)
    inputs += 0.1 * chance.normal(size=inputs.shape)
    weight = chance.normal(size=(96, 64)).astype(np.float32)
    products = inputs.T @ inputs
    nearest = mx.dequantize(*mx.quantize(mx.array(weight), 32, 4), 32, 4)
    rows = script.round_rows(weight, products, 4, 32)
    columns = script.round_columns(weight.T.copy(), products, 4, 32)
    for (codes, scales, biases), turned in ((rows, False), (columns, True)):
        groups = codes.reshape(*scales.shape, 32) * scales[..., None] + biases[..., None]
        rounded = groups.reshape(codes.shape)
        error = np.linalg.norm(inputs @ ((rounded.T if turned else rounded) - weight))
        assert error < 0.5 * np.linalg.norm(inputs @ (np.array(nearest) - weight))


def test_a_fitted_checkpoint_in_fewer_bits(fittable, fitted, data, tmp_path):
    native = convert(
        str(fittable),
        tmp_path / "native",
        quantize_weights=True,
        q_bits=8,
        q_group_size=32,
        keep=64,
    )
    output = tmp_path / "rounded"
    command = [sys.executable, SCRIPT, native, fitted, output, "--data", data, "--bits", "6",
               "--group-size", "32", "--keep", "96"]  # fmt: skip
    subprocess.run(list(map(str, command)), check=True, capture_output=True, timeout=300)
    checkpoint = open_checkpoint(output)
    assert checkpoint.fitted and checkpoint.ifp.k == 96
    assert checkpoint.ifp.source["fit"] == open_checkpoint(fitted).ifp.source["fit"]
    rounded, tokenizer = mlx_ifp.load(output, cache=False, dtype=mx.float32)
    whole, _ = mlx_ifp.load(fitted, cache=False, dtype=mx.float32)
    tokens = mx.array([tokenizer.encode("The car is near the tree.")])
    found, expected = rounded.dense()(tokens), whole.dense()(tokens)
    assert not mx.array_equal(found, expected)
    assert mx.abs(found - expected).max().item() < 0.05 * mx.abs(expected).max().item()
    # Other modules are those of the quantized checkpoint.
    kept = "model.layers.0.self_attn.q_proj.weight"
    one, other = (mx.load(str(path / "model.safetensors"))[kept] for path in (output, native))
    assert mx.array_equal(one, other)
