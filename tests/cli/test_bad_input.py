"""What users get wrong: one line, exit code not 0, no traceback, nothing left, nothing lost."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache
from mlx_lm.utils import load_model

from mlx_ifp.cli import dispatch as cli

from ..conftest import make_dense, run_command
from ..helpers import random_selection


def fails(*args, **kwargs):
    """The one line that a command ends with."""
    done = run_command(*args, **kwargs)
    assert done.returncode not in (0, None)
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    if done.returncode == 2:  # argparse puts its usage before the line
        lines = lines[-1:]
    assert len(lines) == 1, done.stderr
    return lines[0]


def generate_fails(checkpoint, *args, **kwargs):
    return fails("generate", "--model", checkpoint, "-p", "Hello", *args, **kwargs)


def test_wrong_path(tmp_path):
    assert "not a directory" in generate_fails(tmp_path / "nowhere")
    assert "not a directory" in generate_fails("nobody/nothing")
    (tmp_path / "file").write_text("x")
    assert "is a file" in generate_fails(tmp_path / "file")


def test_not_a_checkpoint(tmp_path, dense_llama):
    (tmp_path / "empty").mkdir()
    assert "it is no model" in generate_fails(tmp_path / "empty")
    line = generate_fails(dense_llama)
    assert "not converted" in line
    assert "mlx_ifp.convert --model" in line


def test_a_truncated_tensor_file(tiny_checkpoint, tmp_path):
    broken = shutil.copytree(tiny_checkpoint, tmp_path / "broken")
    file = broken / "channels.safetensors"
    file.write_bytes(file.read_bytes()[:50_000])
    line = generate_fails(broken)
    assert str(file) in line
    assert "truncated" in line


@pytest.mark.parametrize("keep", ["0", "-3", "161", "0.0", "1.5", "5,5", "half"])
def test_k_out_of_range(tiny_checkpoint, keep):
    assert any(w in generate_fails(tiny_checkpoint, f"--keep={keep}") for w in ("k", "fraction"))


def test_a_prompt_of_nothing(tiny_checkpoint):
    for prompt in ("", "   ", "-"):
        line = fails("generate", "--model", tiny_checkpoint, "-p", prompt)
        assert "prompt is empty" in line
    assert "empty" in generate_fails(tiny_checkpoint, "--task", " ")


def test_a_task_of_100_000_words(tiny_checkpoint, tmp_path):
    task = tmp_path / "task.txt"
    task.write_text("word " * 100_000)
    line = generate_fails(tiny_checkpoint, "--task-file", task)
    assert "take 4,096" in line


def test_files_that_are_not_there_or_not_what_they_should_be(tiny_checkpoint, tmp_path):
    (tmp_path / "junk").write_bytes(b"\xff\xfe junk")
    assert "junk" in generate_fails(tiny_checkpoint, "--selection", tmp_path / "junk")
    assert "no such selection" in generate_fails(tiny_checkpoint, "--selection", tmp_path / "no")
    assert "not a text file" in generate_fails(tiny_checkpoint, "--task-file", tmp_path / "junk")
    assert "No such file" in generate_fails(tiny_checkpoint, "--task-file", tmp_path / "no")
    for name in ("junk", "no.safetensors"):
        line = generate_fails(tiny_checkpoint, "--prompt-cache-file", tmp_path / name)
        assert name in line


def test_a_prompt_cache_of_mlx_lm_is_refused(tiny_checkpoint, dense_llama, tmp_path):
    model = load_model(dense_llama)[0]
    prompt_cache = make_prompt_cache(model)
    model(mx.array([[1, 2, 3]]), cache=prompt_cache)
    file = tmp_path / "plain.safetensors"
    save_prompt_cache(str(file), prompt_cache, {"model": "m", "tokenizer_config": "{}"})
    line = generate_fails(tiny_checkpoint, "--prompt-cache-file", file)
    assert "not made by mlx_ifp.cache_prompt" in line


def test_a_selection_of_another_checkpoint(tiny_checkpoint, tmp_path):
    from mlx_ifp.selection.files import save_selection

    save_selection(tmp_path / "s", random_selection(3, 160, 64, checkpoint="other"))
    assert "another checkpoint" in generate_fails(tiny_checkpoint, "--selection", tmp_path / "s")


def test_flags_that_do_not_go_together(tiny_checkpoint, tmp_path):
    assert "exclude" in generate_fails(tiny_checkpoint, "--dense", "--selection", tmp_path / "s")
    assert "not allowed with" in generate_fails(tiny_checkpoint, "--task", "a", "--task-file", "b")
    assert "--dense selects nothing" in generate_fails(
        tiny_checkpoint, "--dense", "--show-selection"
    )
    assert "no system message" in generate_fails(tiny_checkpoint, "--task-from", "system")
    assert "JSON" in generate_fails(tiny_checkpoint, "--chat-template-config", "{")
    assert "max-tokens" in generate_fails(tiny_checkpoint, "--max-tokens", 0)
    assert "max-tokens" in generate_fails(tiny_checkpoint, "--max-tokens", -5)
    for flags in (("--dense", "--keep", 8), ("--selection", "s", "--selector", "activations"),
                  ("--prompt-cache-file", "c", "--draft-model", "d")):  # fmt: skip
        assert "exclude each other" in generate_fails(tiny_checkpoint, *flags)
    cached = ("--prompt-cache-file", "c", "--system-prompt", "Be kind.")
    assert "has no effect" in generate_fails(tiny_checkpoint, *cached)
    stats = ("--stats", tmp_path / "none" / "s.json")
    assert "there is no directory" in generate_fails(tiny_checkpoint, *stats)
    assert "--extra-eos-token" in generate_fails(tiny_checkpoint, "--extra-eos-token", "<|no|>")
    assert "--draft-model" in generate_fails(tiny_checkpoint, "--draft-model", tmp_path / "none")
    assert "2**64" in generate_fails(tiny_checkpoint, "--seed", 1 << 64)
    assert "no selector" in generate_fails(tiny_checkpoint, "--selector", "predictor")


@pytest.mark.parametrize("command", ["export", "cache_prompt"])
def test_what_contradicts_a_given_selection_is_refused_first(tiny_checkpoint, tmp_path, command):
    out = tmp_path / "out.safetensors"
    options = {
        "export": ("--save-path", out),
        "cache_prompt": ("-p", "x", "--prompt-cache-file", out),
    }
    nowhere = tmp_path / "none" / "s"
    for flags, words in (
        (("--selection", "s", "--keep", 8), "--selection and --keep exclude each other"),
        (("--task-name", "s", "--selector", "activations"), "--task-name and --selector exclude"),
        (("--task", "x", "--save-selection", nowhere), f"there is no directory {nowhere.parent}"),
    ):
        done = run_command(command, "--model", tiny_checkpoint, *options[command], *flags)
        assert done.returncode == 1 and words in done.stderr
        assert done.stderr.count("\n") == 1 and not out.exists()


def test_keys_and_values_that_cannot_be_quantized(tiny_checkpoint, tmp_path):
    quantized = ("--kv-bits", 4, "--quantized-kv-start", 0)
    flags = ("-p", "x", "--prompt-cache-file", tmp_path / "x.safetensors", *quantized)
    done = run_command("cache_prompt", "--model", tiny_checkpoint, *flags, "--kv-group-size", 128)
    assert done.returncode == 1
    assert "cannot keep this model's keys and values in 4 bits" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    for flag in (("--kv-bits", 7), ("--kv-group-size", 7), ("--quantized-kv-start", -1)):
        assert flag[0] in generate_fails(tiny_checkpoint, *flag)


def test_a_prompt_that_is_no_text(tiny_checkpoint):
    script = Path(sys.executable).with_name("mlx_ifp.generate")
    for locale in ("C.UTF-8", "C"):
        done = subprocess.run(
            [script, "--model", tiny_checkpoint, "-p", "-"],
            input=b"\xff\xfe\xfd",
            capture_output=True,
            env=os.environ | {"LC_ALL": locale},
        )
        assert done.returncode == 1
        assert b"not UTF-8" in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_a_tokenizer_that_is_not_there(tiny_checkpoint, predictor_checkpoint, tmp_path):
    bare = shutil.copytree(tiny_checkpoint, tmp_path / "bare")
    (bare / "tokenizer.json").write_text("{")
    assert "tokenizer cannot be loaded" in generate_fails(bare)
    # The tokenizers library raises a bare Exception for a model that it does not know.
    tokenizer = json.loads((tiny_checkpoint / "tokenizer.json").read_text())
    tokenizer["model"]["type"] = "SuperBPE"
    (bare / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert f"{bare}: the tokenizer cannot be loaded" in generate_fails(bare)
    bare = shutil.copytree(predictor_checkpoint, tmp_path / "predictor")
    (bare / "predictor" / "tokenizer.json").unlink()
    assert "tokenizer" in generate_fails(bare)


def test_a_chat_template_that_refuses_a_message(tiny_checkpoint, tmp_path):
    strict = shutil.copytree(tiny_checkpoint, tmp_path / "strict")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system!') }}{% endif %}"
    (strict / "chat_template.jinja").write_text(template + "{{ messages[0].content }}")
    assert "No system!" in generate_fails(strict, "--system-prompt", "You are a poet.")


def test_stats_that_cannot_be_written_are_refused_before_the_answer(tiny_checkpoint, tmp_path):
    done = run_command("generate", "--model", tiny_checkpoint, "-p", "Hello", "--stats", tmp_path)
    assert done.returncode == 1
    assert not done.stdout
    assert done.stderr.count("\n") == 1
    assert f"{tmp_path} is a directory" in done.stderr


def test_a_clone_without_the_converter_inside(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "mlx_ifp.convert", None)
    monkeypatch.setattr(sys, "argv", ["mlx_ifp", "convert", "--help"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    error = capsys.readouterr().err
    assert ended.value.code == 1 and len(error.splitlines()) == 1
    assert "use the command mlx_ifp.convert" in error


def test_no_command_and_an_unknown_one():
    for args in ((), ("dance",)):
        done = run_command("", *args)
        assert done.returncode == 2
        assert "usage: mlx_ifp COMMAND" in done.stderr


@pytest.mark.parametrize(
    "command", ["generate", "convert", "benchmark", "manage", "cache_prompt", ""]
)
def test_help_has_examples(command):
    done = run_command(command, "-h")
    assert done.returncode == 0
    assert "example" in done.stdout
    if command:
        assert run_command("", command, "-h").stdout == done.stdout


def test_mixture_of_experts_is_refused(tmp_path):
    config = {
        "model_type": "mixtral",
        "vocab_size": 384,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
    }
    from mlx_lm.utils import save_model

    from mlx_ifp.llm.build import build_model

    from ..conftest import tiny_tokenizer

    save_model(tmp_path / "moe", build_model(config))
    (tmp_path / "moe" / "config.json").write_text(json.dumps(config))
    tiny_tokenizer().save_pretrained(tmp_path / "moe")
    line = fails("convert", "--model", tmp_path / "moe", "--mlx-path", tmp_path / "out")
    assert "mixture of experts (model.layers.0.block_sparse_moe.switch_mlp" in line
    assert not (tmp_path / "out").exists()


def test_an_ffn_of_another_kind_is_refused(tmp_path):
    from mlx_ifp.errors import IFPError
    from mlx_ifp.llm.build import build_model
    from mlx_ifp.llm.ffn import find_ffns

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    for config, found in (
        ({"model_type": "starcoder2"} | shape | heads, r"mlp\(c_fc, c_proj\)"),
        (
            {"model_type": "bitnet", "rms_norm_eps": 1e-5, "head_dim": 16} | shape | heads,
            "is a BitLinear",
        ),
    ):
        with pytest.raises(IFPError, match=found):
            find_ffns(build_model(config))


def test_an_unknown_architecture_is_refused(tmp_path):
    dense = make_dense(tmp_path / "dense")
    text = (dense / "config.json").read_text().replace('"llama"', '"alpaca3000"')
    (dense / "config.json").write_text(text)
    line = fails("convert", "--model", dense, "--mlx-path", tmp_path / "out")
    assert "alpaca3000" in line
