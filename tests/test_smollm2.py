"""The real model: SmolLM2-135M-Instruct, 4-bit, from its GGUF file."""

import json

import mlx.core as mx
import pytest

from mlx_ifp import load
from mlx_ifp.convert.sources.gguf import load_gguf
from mlx_ifp.files.tensor_files import cast
from mlx_ifp.llm.build import build_model
from mlx_ifp.selection.files import load_selection

from .conftest import run_command
from .helpers import mask_model, relative_error

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def loaded(smollm2):
    return load(smollm2, cache=False)


def test_the_dense_model_is_that_of_the_gguf_file(loaded, smollm2_gguf):
    """Apart from the down projections, which are rounded to 8 bits along the other axis."""
    model, tokenizer = loaded
    gguf = load_gguf(smollm2_gguf)
    names = {name.removesuffix(".scales") for name in gguf.weights if name.endswith(".scales")}
    original = build_model(gguf.config, names)
    original.load_weights([(n, cast(a, mx.float32)) for n, a in gguf.weights.items()])
    tokens = mx.array([tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True)])
    ours, theirs = model.dense()(tokens), original(tokens)
    assert (ours.argmax(axis=-1) == theirs.argmax(axis=-1)).mean().item() > 0.95
    logs = [x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (theirs, ours)]
    # Measured 0.002 nats a token on this prompt.
    assert (mx.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=-1).mean().item() < 0.004


def test_a_sub_network_equals_the_masked_model_and_reads_half(loaded):
    model, tokenizer = loaded
    model.networks.clear()  # rows that are in memory would not be read
    before = model.reader.bytes_read
    ready = model.prepare("Name three rivers in France.", keep=768)
    scored = model.reader.nbytes  # the activations selector reads each layer once
    assert model.reader.bytes_read - before - scored == model.reader.nbytes // 2
    assert ready.bytes_read == model.reader.nbytes // 2
    reference = mask_model(model.dense(), ready.selection, model.checkpoint.ffns)
    model.networks.clear()  # the dense one is masked now
    tokens = mx.array([tokenizer.encode("The capital of France is")])
    assert relative_error(ready.network(tokens), reference(tokens)) < 2e-5


def test_tasks_select_differently(smollm2, tmp_path):
    """As in examples/two_tasks.py, with the commands a user types."""
    stats = tmp_path / "stats.json"
    tasks = ("You are an expert Python programmer.", "You are an expert in geography.")
    for i, task in enumerate(tasks):
        done = run_command(
            "generate", "--model", smollm2, "--task", task, "-p", "Hello", "-m", 2, "--stats",
            stats, "--keep", "0.75", "--save-selection", tmp_path / f"{i}.selection",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        said = json.loads(stats.read_text())
        assert said["selection"]["source"] == "activations"
        assert said["total_parameters"] == 134_515_008
    one, two = (load_selection(tmp_path / f"{i}.selection") for i in range(2))
    assert 0.75 < one.overlap(two)[0] < 0.98
