"""What ``mlx_ifp.train`` says of bad options, bad data and bad YAML."""

import json
from pathlib import Path

import pytest

from mlx_ifp import IFPError
from mlx_ifp.commands.train.command import train
from mlx_ifp.commands.train.given import options_of
from mlx_ifp.commands.train.options import OPTIONS, defaults, setup_arg_parser

from ...conftest import run_command


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "--model"),
        ({"data": None}, "--data"),
        ({"keep": 10_000}, "k must be between 1 and d_ffn"),
        ({"resume": True}, "no checkpoint to resume"),
        ({"select_by": "task"}, "--tasks"),
        ({"predictor_layers": 9}, "--predictor-layers"),
        ({"predictor_layers": 0}, "--predictor-layers"),
        ({"seed": -1}, "--seed"),
        ({"warm_start_examples": 0}, "--warm-start-examples"),
        ({"head_width": 0}, "--head-width"),
        ({"contrastive_batch_size": 1}, "--contrastive-batch-size"),
        ({"weight_decay": -1.0}, "--weight-decay"),
        ({"learning_rate": float("inf")}, "--learning-rate"),
        ({"val_batches": -2}, "--val-batches"),
        ({"tasks": "tasks.yaml"}, "--select-by task and --tasks"),
        ({"num_layers": 0}, "--num-layers must be above 0"),
        ({"warm_start_learning_rate": float("nan")}, "--warm-start-learning-rate"),
        ({"select_by": "static", "hard_mask": True}, "A static mask is hard"),
        ({"select_by": "static", "contrastive_weight": 0.1}, "no predictor: --contrastive-weight"),
        ({"distill_on": "answer"}, "--distill-on needs --distill-weight"),
        ({"test": True}, "has no test set"),
        ({"mlx_path": "/dev/null/x/ifp"}, "no files can be made in /dev/null"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": ["x", 10]}}, "schedule"),
        ({"lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 0]}}, "schedule"),
        (
            {"fine_tune_type": "lora", "lora_parameters": {"rank": 2, "scale": 1, "dropout": 0.1}},
            "dropout must be 0",
        ),
        (
            {
                "fine_tune_type": "lora",
                "lora_parameters": {"rank": 2, "scale": 1, "dropout": 0, "keys": ["none"]},
            },
            "no linear layers",
        ),
        ({"num_layers": -7}, "--num-layers"),
        ({"distill_weight": 2.0}, "--distill-weight"),
        ({"iters": -1}, "--iters"),
        ({"model": "no/such/model/here"}, "no/such/model/here"),
        ({"max_seq_length": 8}, "line 1"),
        ({"report_to": "nobody"}, "--report-to nobody"),
        ({"lr_schedule": {"name": "no_such"}}, "schedule"),
        ({"fine_tune_type": "lora", "lora_parameters": {"rank": 2}}, "lora_parameters"),
        ({"q_bits": 4}, "need -q"),
        ({"teacher": "no/such/teacher"}, "no/such/teacher"),
        ({"quantize": True, "q_bits": 17}, "cannot be quantized"),
    ],
)
def test_bad_options_are_one_line(changes, words, options):
    args = options(**changes)
    with pytest.raises(IFPError, match=words) as error:
        train(args)
    assert "\n" not in str(error.value)
    assert not (Path(args.run_path) / "ifp").exists()


@pytest.mark.parametrize(
    ("text", "words"), [("", "train.jsonl"), ('{"messages": []}\n{"mess', "line 1")]
)
def test_bad_data_is_one_line_of_the_command(text, words, dense_llama, tmp_path):
    (tmp_path / "train.jsonl").write_text(text)
    done = run_command(
        "train", "--model", dense_llama, "--data", tmp_path, "--run-path", tmp_path / "run"
    )
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1
    assert words in done.stderr and not (tmp_path / "run").exists()


def test_an_option_without_a_value_has_its_default(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("iters:\nhead_width: 8\nseed: null\n")
    args = options_of({"config": str(file)})
    assert (args.iters, args.head_width, args.seed) == (1000, 8, 0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such: 1", "no option"),
        ("iters: many", "iters must be"),
        ("predictor_layers: x", "predictor_layers must be"),
        ("keep: many", "keep"),
        ("keep: true", "keep must be"),
        ("keep: {a: 1}", "keep must be"),
        ("config: other.yaml", "no option"),
        ("fine_tune_type: some", "fine_tune_type must be one of"),
        ("dtype: int8", "dtype must be one of"),
        ("- a", "options"),
        ("a: [", "valid YAML"),
    ],
)
def test_a_wrong_yaml_file_is_one_line(text, words, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    done = run_command("train", "-c", file)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert words in done.stderr and str(file) in done.stderr


def test_every_option_has_a_flag_and_help_or_is_of_yaml_only():
    actions = {action.dest: action for action in setup_arg_parser()._actions}
    for name, each in OPTIONS.items():
        assert each.metadata["help"] and (name in actions) != each.metadata["yaml_only"]
        if name in actions:
            assert actions[name].choices == each.metadata["choices"]
    assert set(defaults()) == {*OPTIONS, "config"}


def test_flags_are_over_yaml_and_yaml_is_over_defaults(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("iters: 7\nlearning-rate: 1\nkeep: 50%\nlora_parameters: {rank: 2}\n")
    flags = setup_arg_parser().parse_args(["-c", str(file), "--iters", "9"])
    args = options_of(vars(flags))
    assert (args.iters, args.keep, args.batch_size) == (9, 0.5, 4)
    assert args.lora_parameters == {"rank": 2}
    assert isinstance(args.learning_rate, float)


def test_a_contrast_needs_two_tasks(options, data, tmp_path):
    for split in ("train", "valid"):
        rows = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        lines = [json.dumps({"messages": row["messages"]}) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    args = options(data=str(tmp_path), contrastive_weight=0.1, warm_start_iters=0)
    with pytest.raises(IFPError, match="--contrastive-weight needs two tasks"):
        train(args)
