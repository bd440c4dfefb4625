"""mlx_ifp.convert: dense models and GGUF files become checkpoints, whole or not at all."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, save_config, save_model

from mlx_ifp import IFPError, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.convert.prompts import read_prompts
from mlx_ifp.llm.build import build_model

from ..cli.test_bad_input import fails
from ..conftest import ARCHITECTURES, make_dense, run_command, tiny_tokenizer
from ..helpers import memory_peak, relative_error

TOKENS = mx.array([[5, 77, 130, 9, 42, 200, 301, 17]])


def test_the_command_makes_a_checkpoint_that_generates(dense_llama, tmp_path):
    out = tmp_path / "out"
    options = ("--keep", "0.5", "--no-prior")
    done = run_command("convert", "--model", dense_llama, "--mlx-path", out, *options)
    assert done.returncode == 0, done.stderr
    assert "3 layers of 160 channels, k = 64" in done.stdout
    assert "100%" in done.stderr
    assert sorted(path.name for path in out.iterdir()) == [
        "channels.safetensors",
        "chat_template.jinja",
        "config.json",
        "ifp_config.json",
        "model.safetensors",
        "source_tensors.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    again = run_command("generate", "--model", out, "-p", "Hello", "-m", 4)
    assert again.returncode == 0, again.stderr


def test_recorded_sizes_and_digests_are_those_of_the_files(tiny_checkpoint):
    import hashlib

    for name, record in open_checkpoint(tiny_checkpoint).ifp.files.items():
        data = (tiny_checkpoint / name).read_bytes()
        assert record == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizing_matches_mlx_lm_but_for_the_axis_of_down_proj(tmp_path, bits):
    from mlx_lm.utils import quantize_model

    dense = make_dense(tmp_path / "dense", "llama")
    out = convert(str(dense), tmp_path / "ifp", quantize_weights=True, q_bits=bits, q_group_size=32)
    network, config = load_model(dense)
    weight = network.layers[1].mlp.down_proj.weight
    network, config = quantize_model(network, config, 32, bits)
    expected = dict(tree_flatten(network.parameters()))
    stored = mx.load(str(out / "model.safetensors")) | mx.load(str(out / "channels.safetensors"))
    assert stored.keys() == expected.keys()
    for name, array in stored.items():
        if "down_proj" not in name:
            assert mx.array_equal(array, expected[name]), name
    turned = mx.quantize(weight.T, group_size=32, bits=bits)
    for part, array in zip(("weight", "scales", "biases"), turned, strict=True):
        assert mx.array_equal(stored[f"model.layers.1.mlp.down_proj.{part}"], array)


def test_a_quantized_source_keeps_its_bits_and_says_what_was_quantized_again(tmp_path, capfd):
    dense = make_dense(tmp_path / "dense", "phi3")
    from mlx_lm.utils import quantize_model

    network, config = quantize_model(*load_model(dense), 32, 8)
    save_model(dense, network)
    save_config(config, dense / "config.json")
    out = convert(str(dense), tmp_path / "ifp")
    assert "3 layers were quantized along d_ffn" in capfd.readouterr().err
    model, _ = load(out, cache=False)
    original = load_model(dense)[0]
    mlp, source = model.dense().layers[0].mlp, original.layers[0].mlp
    assert mx.array_equal(mlp.gate_up_proj.weight, source.gate_up_proj.weight)
    assert model.dense().layers[0].mlp.down_proj.bits == 8
    assert relative_error(model.dense()(TOKENS), original(TOKENS)) < 0.02
    with pytest.raises(IFPError, match="quantized already"):
        convert(str(dense), tmp_path / "twice", quantize_weights=True)
    whole = convert(str(dense), tmp_path / "whole", dequantize_weights=True)
    model, _ = load(whole, cache=False)
    assert relative_error(model.dense()(TOKENS), original(TOKENS)) < 1e-5


def test_a_group_size_that_does_not_fit_leaves_the_ffn_unquantized(tmp_path, capfd):
    dense = make_dense(tmp_path / "dense", hidden_size=96, head_dim=24)
    out = convert(str(dense), tmp_path / "ifp", quantize_weights=True, q_group_size=64)
    assert "stays unquantized" in capfd.readouterr().err
    model, _ = load(out, cache=False)
    assert mx.isfinite(model.dense()(TOKENS)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hugging_face_files_convert_too(tmp_path, architecture):
    """Sharded files with an index, and a config as transformers writes it."""
    dense = make_dense(tmp_path / "dense", architecture)
    arrays = mx.load(str(dense / "model.safetensors"))
    names = sorted(arrays)
    (dense / "model.safetensors").unlink()
    (dense / "model.safetensors.index.json").unlink()
    for i, part in enumerate((names[::2], names[1::2])):
        mx.save_safetensors(
            str(dense / f"model-0000{i + 1}-of-00002.safetensors"), {n: arrays[n] for n in part}
        )
    config = json.loads((dense / "config.json").read_text()) | {"torch_dtype": "bfloat16"}
    (dense / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(convert(str(dense), tmp_path / "ifp"))
    assert {tensor.dtype for tensor in checkpoint.channels.values()} == {"BF16"}


def test_the_spelling_of_a_path_makes_no_other_checkpoint(dense_llama, tmp_path, monkeypatch):
    monkeypatch.chdir(dense_llama.parent)
    spelled = (str(dense_llama), dense_llama.name, f"./{dense_llama.name}/")
    made = [convert(text, tmp_path / str(i), keep=64) for i, text in enumerate(spelled)]
    assert len({open_checkpoint(path).digest for path in made}) == 1


def test_prompts_of_a_file_are_read_line_by_line(tmp_path):
    file = tmp_path / "p.jsonl"
    parts = [{"type": "text", "text": "three"}]
    rows = [{"prompt": "one\u2028and one"}, {"messages": [{"role": "user", "content": parts}]}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_text("\n\n".join(lines))
    assert read_prompts(file) == ["one\u2028and one", "three"]
    for bad, words in (
        ('{"prompt": 5}', "a row has messages"),
        ('{"messages": [3]}', "message 1 must be an object"),
        ("[]", "must be a JSON object"),
        ("{", "not JSON"),
    ):
        file.write_text("\n\n".join([*lines, bad]))
        with pytest.raises(IFPError, match=f"p.jsonl: line 5: {words}"):
            read_prompts(file)


def test_static_scores_come_from_prompts(dense_llama, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    texts = ["Name three rivers.", "Write a poem.", "Sort a list."]
    rows = [{"prompt": texts[0]}, {"text": texts[1]}]
    rows.append({"messages": [{"role": "user", "content": texts[2]}]})
    prompts.write_text("\n".join(json.dumps(row) for row in rows))
    out = convert(str(dense_llama), tmp_path / "ifp", keep=64, static_prompts=prompts)
    model, _ = load(out, selector="static")
    expected = np.zeros((3, 160))
    for text in texts:
        scores = np.array(model.scores(text, selector="activations"))
        expected += scores / np.linalg.norm(scores, axis=-1, keepdims=True) / 3
    assert np.allclose(np.array(model.scores("whatever")), expected, atol=1e-6)
    assert model.select("One.").digest == model.select("Two.").digest


def test_a_conversion_holds_little_more_than_its_largest_tensor(tmp_path):
    """Counted by MLX: the whole is 50 MB, the largest tensor 4.2 MB."""
    dense = make_dense(
        tmp_path / "dense", hidden_size=256, intermediate_size=4096, num_hidden_layers=4
    )
    with memory_peak() as peak:
        out = convert(str(dense), tmp_path / "ifp", quantize_weights=True, q_bits=8)
    sizes = [tensor.nbytes for tensor in mx.load(str(dense / "model.safetensors")).values()]
    assert sum(sizes) > 12 * max(sizes)
    assert peak.nbytes < 3 * max(sizes)
    assert open_checkpoint(out).d_ffn == 4096


# -- what goes wrong


def convert_fails(model, out, *args, **kwargs):
    before = set(Path(out).parent.iterdir()) if Path(out).parent.is_dir() else set()
    line = fails("convert", "--model", model, "--mlx-path", out, *args, **kwargs)
    if Path(out).parent.is_dir():
        assert set(Path(out).parent.iterdir()) == before
    return line


def test_an_existing_path_is_not_overwritten(dense_llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    assert "already exists" in convert_fails(dense_llama, tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep"


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "fake.gguf").write_bytes(b"not a gguf file at all" * 10)
    out = tmp_path / "out"
    assert "holds no weights" in convert_fails(tmp_path / "empty", out)
    assert "cannot be loaded" in convert_fails(tmp_path / "nowhere", out)
    assert "not a .safetensors file nor one of .pt" in convert_fails(tmp_path / "notes.txt", out)
    assert "fake.gguf" in convert_fails(tmp_path / "fake.gguf", out)


def test_damaged_sources(tmp_path):
    dense = make_dense(tmp_path / "dense")
    file = dense / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "truncated" in convert_fails(dense, tmp_path / "out")
    arrays = None
    file.write_bytes(data)
    arrays = dict(mx.load(str(file)))
    mx.eval(arrays)
    del arrays["model.norm.weight"]
    mx.save_safetensors(str(file), arrays)
    assert "the tensor model.norm.weight is missing" in convert_fails(dense, tmp_path / "out")
    file.unlink()
    index = dense / "model.safetensors.index.json"
    assert "model.safetensors: the shard is missing" in convert_fails(dense, tmp_path / "out")
    index.write_text(index.read_text().replace("model.safetensors", "../model.safetensors"))
    assert "not a file of this directory" in convert_fails(dense, tmp_path / "out")
    index.unlink()
    assert "holds no weights" in convert_fails(dense, tmp_path / "out")


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["--keep", "0"], "k must be between 1"),
        (["--keep", "161"], "k must be between 1"),
        (["--keep=1.5"], "fraction"),
        (["--keep", "many"], "no count"),
        (["--q-bits", "4"], "need -q"),
        (["-q", "--q-bits", "7"], "7"),
        (["-q", "-d"], "not allowed with"),
        (["--static-prompts", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_wrong_arguments(dense_llama, tmp_path, args, expected):
    assert expected in convert_fails(dense_llama, tmp_path / "out", *args)


def test_prompts_that_are_none(dense_llama, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"nothing": 1}\n')
    line = convert_fails(dense_llama, tmp_path / "out", "--static-prompts", prompts)
    assert "line 2" in line


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB, if this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_without_room_is_refused_before_anything_is_written(dense_llama, small_disk):
    line = convert_fails(dense_llama, small_disk / "out")
    assert "MB free" in line


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, small_disk, monkeypatch):
    """Free space may go while we write: then the write itself fails."""
    from mlx_ifp.convert import conversion

    dense = make_dense(tmp_path / "dense", intermediate_size=4096)
    monkeypatch.setattr(conversion, "_check_space", lambda *_: None)
    with pytest.raises(OSError, match="No space left"):
        convert(str(dense), small_disk / "out")
    assert not list(small_disk.iterdir())


@pytest.fixture(scope="module")
def slow_to_convert(tmp_path_factory) -> Path:
    """A dense model of 600 MB."""
    path = tmp_path_factory.mktemp("slow") / "dense"
    return make_dense(path, hidden_size=512, intermediate_size=8192, num_hidden_layers=12)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_conversion_leaves_nothing(slow_to_convert, tmp_path, kind):
    folder = tmp_path / "made"
    folder.mkdir()
    script = Path(sys.executable).with_name("mlx_ifp.convert")
    process = subprocess.Popen(
        [str(script), "--model", str(slow_to_convert), "--mlx-path", str(folder / "out"), "-q"],
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(folder.glob(".out.*/model.safetensors")):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, kind)
    _, stderr = process.communicate(timeout=120)
    if kind == signal.SIGKILL:
        # A killed process cannot clean up; a watcher does, in a moment.
        assert process.returncode == -signal.SIGKILL
        while list(folder.iterdir()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return
    assert process.returncode == 130
    assert stderr.strip().splitlines()[-1].endswith("interrupted")
    assert "Traceback" not in stderr
    assert not list(folder.iterdir())


def test_random_state_is_left_alone(dense_llama, tmp_path):
    """Building models draws random weights; a user's seed must not feel that."""
    mx.random.seed(11)
    expected = mx.random.normal((4,)).tolist()
    mx.random.seed(11)
    build_model(json.loads((dense_llama / "config.json").read_text()))
    assert mx.random.normal((4,)).tolist() == expected


def test_the_tokenizer_can_come_from_elsewhere(dense_llama, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    bare = make_dense(tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    assert "cannot be loaded" in convert_fails(bare, tmp_path / "out")
    out = convert(str(bare), tmp_path / "out", tokenizer=str(tmp_path / "tokenizer"))
    assert load(out, cache=False)[1].encode("Hello")
