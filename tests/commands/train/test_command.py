"""``mlx_ifp.train`` as users run it: tiny models, real files, real commands."""

import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.commands.train.command import train
from mlx_ifp.convert import convert
from mlx_ifp.tuner.save import save_student
from mlx_ifp.tuner.source import load_source
from mlx_ifp.tuner.trainer import Trainer

from ...conftest import make_dense, run_command
from ...training import OWN_PREDICTOR, K, flags, log, losses


def test_from_a_dense_model_and_jsonl_to_an_answer(data, dense_llama, tmp_path):
    path = tmp_path / "run"
    done = run_command(
        "train", "--model", dense_llama, "--data", data, "--run-path", path, "--keep", K,
        "--iters", 2, "--batch-size", 2, "--predictor-layers", 1, "--warm-start-iters", 3,
        "--warm-start-examples", 8, "--steps-per-report", 1, "--val-batches", 2,
        "--distill-weight", 0.5, "--contrastive-weight", 0.1, "--contrastive-batch-size", 4,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    checkpoint = open_checkpoint(path / "ifp")
    assert checkpoint.ifp.predictor_embedding == "llm" and checkpoint.ifp.k == K
    reports = log(path)
    validation = [report for report in reports if "val_loss" in report]
    assert [report["iteration"] for report in validation] == [0, 2]
    assert set(validation[0]["tasks"]) == {"math", "poems"}
    assert len(validation[0]["overlap_between_by_layer"]) == 3
    assert 0 <= validation[0]["dead_channels"] < 1
    assert validation[0]["dense_loss"] == validation[1]["dense_loss"] > 0
    assert any("warm_start_loss" in report for report in reports)
    answer = run_command("generate", "--model", path / "ifp", "--prompt", "What is 1 + 1?", "-m", 3)
    assert answer.returncode == 0, answer.stderr
    assert "predictor" in answer.stderr
    drawn = run_command("plot", path, "--output", tmp_path / "curves.png")
    assert drawn.returncode == 0 and (tmp_path / "curves.png").exists(), drawn.stderr


@pytest.fixture
def kept(monkeypatch) -> dict:
    """Holds the ``student`` of a run once it is saved."""
    kept = {}
    monkeypatch.setattr(
        "mlx_ifp.commands.train.command.save_student",
        lambda student, *args, **kwargs: (
            kept.update(student=student),
            save_student(student, *args, **kwargs),
        ),
    )
    return kept


def test_the_checkpoint_is_the_student(options, kept):
    args = options(dtype="float32", warm_start_iters=2)
    model, tokenizer = load(train(args), dtype=mx.float32)
    prompt = "Write a poem about tree 3."
    selection = model.select(prompt)
    student = kept["student"]
    tokens = mx.array([tokenizer.encode(prompt)])
    scores = student.scores(tokens, mx.array([tokens.shape[1]]))
    assert mx.allclose(scores[0], model.scores(prompt), rtol=1e-4, atol=1e-4)
    network = student.narrow(student.trunk(), model.scores(prompt), args.mask_temperature)
    ours, theirs = model.subnetwork(selection)(tokens), network(tokens)
    assert mx.abs(ours - theirs).max() < 1e-4 * mx.abs(theirs).max()


def test_quantization_aware_training_trains_what_convert_makes(options, kept, tmp_path):
    args = options(quantize=True, q_bits=4, q_group_size=32, warm_start_iters=2)
    trained = train(args)
    quantized = convert(str(trained), tmp_path / "4bit", quantize_weights=True, q_bits=4,
                        q_group_size=32, predictor_q_bits=0)  # fmt: skip
    student, tokens = kept["student"], mx.array([[5, 9, 200, 31, 7]])
    model, _ = load(quantized, dtype=mx.float32)
    floats, _ = load(trained, dtype=mx.float32)
    prompt = "Write a poem about tree 3."
    network = student.narrow(student.trunk(), model.scores(prompt), args.mask_temperature)
    ours, theirs, unrounded = (
        network(tokens),
        model.subnetwork(model.select(prompt))(tokens),
        floats.subnetwork(floats.select(prompt))(tokens),
    )
    assert mx.abs(ours - theirs).max() < 1e-3 * mx.abs(theirs).max()
    assert mx.abs(unrounded - theirs).max() > 3e-2 * mx.abs(theirs).max()


def test_a_checkpoint_is_trained_on_with_its_first_teacher(options, dense_llama, tmp_path):
    common = {"val_batches": 1, "distill_weight": 1.0, "group_masks": True, "learning_rate": 0.03}
    first = train(options(**common))
    reports = {}
    for name, teacher in (("dense", str(dense_llama)), ("itself", None)):
        args = options(**common | {"model": str(first), "run_path": str(tmp_path / name),
                                   "teacher": teacher, "iters": 0} | OWN_PREDICTOR)  # fmt: skip
        train(args)
        reports[name] = log(Path(args.run_path))[-1]
    last = log(Path(options().run_path))[-1]
    assert reports["dense"]["dense_loss"] == last["dense_loss"]
    assert reports["dense"]["val_kl"] == pytest.approx(last["val_kl"], rel=1e-3)
    assert reports["itself"]["val_kl"] < reports["dense"]["val_kl"] / 2
    with pytest.raises(IFPError, match="another run: its teacher"):
        train(options(**common | {"model": str(first), "run_path": str(tmp_path / "dense"),
                                "resume": True,
                                "mlx_path": str(tmp_path / "other")} | OWN_PREDICTOR))  # fmt: skip
    with pytest.raises(IFPError, match="another run: its teacher"):
        train(options(**common | {"model": str(first), "run_path": str(tmp_path / "itself"),
                                "resume": True, "teacher": str(dense_llama),
                                "mlx_path": str(tmp_path / "other")} | OWN_PREDICTOR))  # fmt: skip


def test_a_test_set_is_evaluated_after_training(options, data, tmp_path, capsys):
    for split, source in (("train", "train"), ("test", "valid")):
        shutil.copy(data / f"{source}.jsonl", tmp_path / f"{split}.jsonl")
    args = options(data=str(tmp_path), test=True)
    train(args)
    said = capsys.readouterr()
    assert "There is no validation set" in said.err
    assert "Test loss" in said.out
    tested = log(Path(args.run_path))[-1]
    # The same rows as a validation set.
    args = options(run_path=str(tmp_path / "again"), val_batches=-1)
    train(args)
    validated = log(Path(args.run_path))[-1]
    assert tested["test_loss"] == pytest.approx(validated["val_loss"], rel=1e-6)
    assert tested["tasks"].keys() == validated["tasks"].keys()


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_half_precision_is_trained_in_float32(dtype, stored, options, dense_llama, tmp_path):
    half = convert(str(dense_llama), tmp_path / "half", dtype=dtype)
    source = load_source(str(half))
    assert {array.dtype for _, array in tree_flatten(source.llm.parameters())} == {mx.float32}
    first = train(options(model=str(half), iters=2))
    assert {tensor.dtype for tensor in open_checkpoint(first).predictor.values()} == {stored}
    # In float16 the first update would end in NaN.
    args = options(model=str(first), **OWN_PREDICTOR, run_path=str(tmp_path / "on"))
    again = train(args)
    assert len([line for line in log(Path(args.run_path)) if "train_loss" in line]) == 4
    assert open_checkpoint(again).digest != open_checkpoint(first).digest


@pytest.mark.parametrize("kind", ["lora", "predictor"])
def test_a_frozen_model_stays_as_stored_and_what_is_trained_is_float32(
    kind, options, dense_llama, tmp_path, monkeypatch
):
    # As on a GPU.
    monkeypatch.setattr("mlx_ifp.tuner.source.default_dtype", lambda: None)
    students, run = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: students.append(self.student) or run(self))
    half = convert(str(dense_llama), tmp_path / "half", dtype="bfloat16")
    train(options(model=str(half), fine_tune_type=kind, iters=2, val_batches=0, warm_start_iters=1))
    (student,) = students
    trained = dict(tree_flatten(student.trainable_parameters()))
    assert {array.dtype for array in trained.values()} == {mx.float32}
    kept = {a.dtype for name, a in tree_flatten(student.parameters()) if name not in trained}
    assert kept == {mx.bfloat16}


def test_the_blend_is_wide_and_ends_narrow(options, monkeypatch):
    used = []
    for name in ("wide", "narrow"):
        cls = "mlx_ifp.tuner.student.Student." + name
        original = getattr(__import__("mlx_ifp.tuner.student", fromlist=["x"]).Student, name)
        monkeypatch.setattr(
            cls,
            lambda self, *a, name=name, original=original: used.append(name) or original(self, *a),
        )
    train(options(blend_iters=2, group_masks=True, val_batches=0, save_every=100))
    # The last one is the check before the weights are kept.
    assert used == ["wide", "wide", "narrow", "narrow", "narrow"]


def test_two_processes_give_the_losses_of_one(options, tmp_path):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("math: You add numbers.\npoems: You write poems.\n")
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"select_by": "task", "tasks": str(tasks), "batch_size": 4, "distill_weight": 0.5}
    train(options(run_path=str(one), **changes))
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [str(scripts / "mlx.launch"), "-n", "2", "--backend", "ring", "--python", sys.executable,
         str(scripts / "mlx_ifp.train"), *flags(options(run_path=str(two), **changes))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (two / "ifp").exists(), done.stdout + done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    # One writer: no iteration is reported twice.
    assert sum("train_loss" in report for report in log(two)) == 4


@pytest.mark.parametrize("kind", ["full", "layers", "ffn", "lora", "predictor"])
def test_what_is_trained_changes_and_nothing_else(kind, options):
    args = options(fine_tune_type=kind, iters=2, val_batches=0)
    before = dict(tree_flatten(load_source(args.model).llm.parameters()))
    after = dict(tree_flatten(load_source(str(train(args))).llm.parameters()))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    parts = {"embed_tokens", "self_attn", "mlp"}
    found = {part for part in parts for name in changed if f".{part}." in name}
    wanted = {"full": parts, "predictor": set(), "ffn": {"mlp"}}
    assert found == wanted.get(kind, {"self_attn", "mlp"})


def test_one_static_mask(options):
    path = train(options(select_by="static"))
    model, tokenizer = load(path)
    assert model.selector == "static"
    mean, _ = model.select("a").overlap(model.select("b"))
    assert mean == 1 and generate(model, tokenizer, "hello", max_tokens=2) is not None


def test_a_task_description_selects(options, tmp_path):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("math: You add numbers.\npoems: You write poems.\n")
    args = options(select_by="task", tasks=str(tasks))
    path = train(args)
    assert open_checkpoint(path).ifp.selector == "predictor"
    # All prompts of a task have one mask.
    assert log(Path(args.run_path))[-1]["overlap_within"] == 1
    tasks.write_text("math: You count.\npoems: You write poems.\n")
    with pytest.raises(IFPError, match="another run: its data"):
        train(options(select_by="task", tasks=str(tasks), resume=True,
                    mlx_path=str(tmp_path / "out")))  # fmt: skip


def test_damaged_targets_are_made_anew(options, tmp_path):
    targets = tmp_path / "targets"
    changes = {"distill_weight": 1.0, "warm_start_iters": 2, "targets_path": str(targets)}
    args = options(run_path=str(tmp_path / "first"), **changes)
    train(args)
    damaged = [*targets.glob("*/ids.npy"), *targets.glob("*/activations-*.npy")]
    assert len(damaged) > 2
    for file in damaged:
        file.write_bytes(file.read_bytes()[:200])
    for logprobs in targets.glob("*/logprobs.npy"):
        logprobs.unlink()
    again = options(run_path=str(tmp_path / "again"), **changes)
    train(again)
    assert losses(Path(again.run_path)) == pytest.approx(losses(Path(args.run_path)), rel=1e-6)


def test_activations_are_kept_for_the_warm_start_only(options):
    args = options(warm_start_examples=5, val_batches=0)
    train(args)
    assert len(list(Path(args.run_path).glob("targets/*/activations-*.npy"))) == 5


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_dense_model_leaves_before_the_first_update(weight, options, monkeypatch):
    held, update = [], Trainer.update

    def watched(self):
        held.append([self.train_split.targets.model, self.valid_split.targets.model])
        return update(self)

    monkeypatch.setattr(Trainer, "update", watched)
    train(options(distill_weight=weight, iters=2, val_batches=-1))
    assert held == [[None, None]] * 2


def test_what_selects_is_no_longer_than_the_predictors_context(options, dense_llama, tmp_path):
    short = make_dense(tmp_path / "short", max_position_embeddings=256)
    path = train(options(model=str(short), iters=1, val_batches=0, warm_start_iters=1))
    assert open_checkpoint(path).ifp.text.max_tokens == 256


def test_a_tied_gemma_is_trained_in_4_bits(options, tmp_path):
    gemma = make_dense(tmp_path / "gemma", "gemma3_text")
    path = train(options(model=str(gemma), iters=1, val_batches=0, warm_start_iters=1,
                       quantize=True, q_bits=4, q_group_size=32))  # fmt: skip
    assert generate(*load(path), "hello", max_tokens=2) is not None


def test_a_checkpoint_of_the_hub_is_trained_on(options, tmp_path, monkeypatch):
    first = train(options(iters=1, val_batches=0, warm_start_iters=1))
    monkeypatch.setattr("mlx_ifp.checkpoint.locate.snapshot_download", lambda *_, **__: str(first))
    on = train(options(model="someone/tiny-ifp", iters=1, val_batches=0, **OWN_PREDICTOR,
                     run_path=str(tmp_path / "on")))  # fmt: skip
    assert open_checkpoint(on).ifp.head == open_checkpoint(first).ifp.head


def test_pretraining_then_tuning_continues_the_predictor(options, tmp_path):
    first = train(options(stage="pretrain", chunk_size=8, iters=2, batch_size=1,
                        run_path=str(tmp_path / "pretrain")))  # fmt: skip
    second = options(model=str(first), **OWN_PREDICTOR, iters=1)
    path = train(second)
    assert not any("warm_start_loss" in report for report in log(Path(second.run_path)))
    heads = [open_checkpoint(each).ifp.head for each in (first, path)]
    assert heads[0] == heads[1]


def test_the_warm_start_makes_scores_depend_on_the_instruction(options):
    args = options(warm_start_iters=80, iters=0, val_batches=0)
    train(args)
    shares = [r["variance_explained"] for r in log(Path(args.run_path)) if "warm_start_loss" in r]
    assert shares[-1] > max(0.3, shares[0])
