"""``mlx_ifp.train`` as users run it: tiny models, real files, real commands."""

import errno
import fcntl
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import IFPError, generate, load
from mlx_ifp.checkpoint import open_checkpoint
from mlx_ifp.convert import convert
from mlx_ifp.train import run
from mlx_ifp.train_options import DEFAULTS, options_of
from mlx_ifp.tuner import training_state
from mlx_ifp.tuner.save import save_student
from mlx_ifp.tuner.student import load_source
from mlx_ifp.tuner.trainer import Trainer

from .conftest import make_dense, run_command

K = 64


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two tasks of short questions and answers."""
    directory = tmp_path_factory.mktemp("data")
    for split, n in (("train", 12), ("valid", 4)):
        with open(directory / f"{split}.jsonl", "w") as file:
            for i in range(n):
                add = {"messages": [{"role": "user", "content": f"What is {i} + {i}?"},
                                    {"role": "assistant", "content": f"It is {i + i}."}],
                       "task": "math"}  # fmt: skip
                write = {"messages": [{"role": "user", "content": f"Write a poem about tree {i}."},
                                      {"role": "assistant", "content": f"O tree {i}, so green!"}],
                         "task": "poems"}  # fmt: skip
                file.write(json.dumps(add) + "\n" + json.dumps(write) + "\n")
    return directory


@pytest.fixture
def options(data, dense_llama, tmp_path):
    """A run of four iterations; keywords change its options."""

    def make(**changes):
        base = {
            "model": str(dense_llama), "data": str(data), "run_path": str(tmp_path / "run"),
            "keep": K, "iters": 4, "batch_size": 2, "predictor_layers": 2, "head_width": 16,
            "warm_start_iters": 6, "warm_start_examples": 12, "steps_per_report": 1,
            "learning_rate": 1e-3, "save_every": 2, "val_batches": 2,
        }  # fmt: skip
        return options_of(base | changes)

    return make


def _log(path: Path) -> list[dict]:
    return [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]


def _losses(path: Path) -> dict[int, float]:
    return {r["iteration"]: r["train_loss"] for r in _log(path) if "train_loss" in r}


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
    reports = _log(path)
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
        "mlx_ifp.train.save_student",
        lambda student, *args, **kwargs: (
            kept.update(student=student),
            save_student(student, *args, **kwargs),
        ),
    )
    return kept


def test_the_checkpoint_is_the_student(options, kept):
    args = options(dtype="float32", warm_start_iters=2)
    model, tokenizer = load(run(args), dtype=mx.float32)
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
    trained = run(args)
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
    first = run(options(**common))
    reports = {}
    for name, teacher in (("dense", str(dense_llama)), ("itself", None)):
        args = options(**common | {"model": str(first), "run_path": str(tmp_path / name),
                                   "teacher": teacher, "iters": 0,
                                   "predictor_layers": None})  # fmt: skip
        run(args)
        reports[name] = _log(Path(args.run_path))[-1]
    last = _log(Path(options().run_path))[-1]
    assert reports["dense"]["dense_loss"] == last["dense_loss"]
    assert reports["dense"]["val_kl"] == pytest.approx(last["val_kl"], rel=1e-3)
    assert reports["itself"]["val_kl"] < reports["dense"]["val_kl"] / 2
    with pytest.raises(IFPError, match="another run: its teacher"):
        run(options(**common | {"model": str(first), "run_path": str(tmp_path / "itself"),
                                "resume": True, "teacher": str(dense_llama),
                                "predictor_layers": None,
                                "mlx_path": str(tmp_path / "other")}))  # fmt: skip


@pytest.mark.parametrize(("dtype", "stored"), [("float16", "F16"), ("bfloat16", "BF16")])
def test_half_precision_is_trained_in_float32(dtype, stored, options, dense_llama, tmp_path):
    half = convert(str(dense_llama), tmp_path / "half", dtype=dtype)
    source = load_source(str(half))
    assert {array.dtype for _, array in tree_flatten(source.llm.parameters())} == {mx.float32}
    first = run(options(model=str(half), iters=2))
    assert {tensor.dtype for tensor in open_checkpoint(first).predictor.values()} == {stored}
    # In float16 the first update would end in NaN.
    args = options(model=str(first), predictor_layers=None, run_path=str(tmp_path / "on"))
    again = run(args)
    assert len([line for line in _log(Path(args.run_path)) if "train_loss" in line]) == 4
    assert open_checkpoint(again).digest != open_checkpoint(first).digest


@pytest.mark.parametrize("kind", ["lora", "predictor"])
def test_a_frozen_model_stays_as_stored_and_what_is_trained_is_float32(
    kind, options, dense_llama, tmp_path, monkeypatch
):
    # As on a GPU.
    monkeypatch.setattr("mlx_ifp.tuner.student.default_dtype", lambda: None)
    students, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: students.append(self.student) or train(self))
    half = convert(str(dense_llama), tmp_path / "half", dtype="bfloat16")
    run(options(model=str(half), fine_tune_type=kind, iters=2, val_batches=0, warm_start_iters=1))
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
    run(options(blend_iters=2, group_masks=True, val_batches=0, save_every=100))
    # The last one is the check before the weights are kept.
    assert used == ["wide", "wide", "narrow", "narrow", "narrow"]


def test_a_resumed_run_gives_the_losses_of_one_that_was_not_stopped(options, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(options(run_path=str(whole), iters=6))

    class Killed(BaseException):
        pass

    train = Trainer.train

    def killed(self):
        def on_step(step):
            if step == 3:
                raise Killed

        train(self, on_step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", killed)
        with pytest.raises(Killed):
            run(options(run_path=str(broken), iters=6))
    assert training_state.latest_checkpoint(broken).name == "checkpoint-0000002"
    run(options(run_path=str(broken), iters=6, resume=True))
    expected = _losses(whole)
    assert _losses(broken) == pytest.approx(expected, rel=1e-5) and len(expected) == 6


def test_a_report_that_spans_a_resume_is_of_all_its_steps(options, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"steps_per_report": 4, "save_every": 6, "val_batches": 0}
    run(options(run_path=str(whole), iters=8, **changes))
    # The end of a run is reported, so it is stopped at step 6 by other means.
    args = options(run_path=str(broken), iters=8, **changes)
    update = Trainer.update

    def stops(self):
        if self.step == 6:
            raise KeyboardInterrupt
        return update(self)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "update", stops)
        run(args)
    run(options(run_path=str(broken), iters=8, resume=True, **changes))
    assert _losses(broken) == pytest.approx(_losses(whole), rel=1e-5)
    assert list(_losses(broken)) == [4, 8]


def _flags(args) -> list[str]:
    """The options that differ from the defaults, as a command line."""
    given = {name: value for name, value in vars(args).items() if value != DEFAULTS[name]}
    return [text for name, value in given.items()
            for text in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip


def _last_step(path: Path) -> int:
    """The step of a run's last complete checkpoint, -1 if there is none."""
    last = training_state.latest_checkpoint(path)
    return -1 if last is None else int(last.name.removeprefix("checkpoint-"))


def test_a_run_killed_with_9_is_resumed(options, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def command(iters):
        flags = _flags(options(run_path=str(broken), iters=iters, val_batches=0))
        return [str(Path(sys.executable).with_name("mlx_ifp.train")), *flags]

    # So many that it cannot end before it is killed; no loss depends on their number.
    process = subprocess.Popen(command(1_000_000), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while _last_step(broken) < 4:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    iters = _last_step(broken) + 4
    done = subprocess.run([*command(iters), "--resume"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run(options(run_path=str(whole), iters=iters, val_batches=0))
    assert len(_losses(whole)) == iters
    assert _losses(broken) == pytest.approx(_losses(whole), rel=1e-5)


def test_two_processes_give_the_losses_of_one(options, tmp_path):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("math: You add numbers.\npoems: You write poems.\n")
    one, two = tmp_path / "one", tmp_path / "two"
    changes = {"select_by": "task", "tasks": str(tasks), "batch_size": 4, "distill_weight": 0.5}
    run(options(run_path=str(one), **changes))
    scripts = Path(sys.executable).parent
    done = subprocess.run(
        [str(scripts / "mlx.launch"), "-n", "2", "--backend", "ring", "--python", sys.executable,
         str(scripts / "mlx_ifp.train"), *_flags(options(run_path=str(two), **changes))],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert (two / "ifp").exists(), done.stdout + done.stderr
    assert _losses(two) == pytest.approx(_losses(one), rel=1e-4)
    # One writer: no iteration is reported twice.
    assert sum("train_loss" in report for report in _log(two)) == 4


@pytest.mark.parametrize("kind", ["full", "layers", "ffn", "lora", "predictor"])
def test_what_is_trained_changes_and_nothing_else(kind, options):
    args = options(fine_tune_type=kind, iters=2, val_batches=0)
    before = dict(tree_flatten(load_source(args.model).llm.parameters()))
    after = dict(tree_flatten(load_source(str(run(args))).llm.parameters()))
    changed = {name for name in before if not mx.array_equal(before[name], after[name])}
    parts = {"embed_tokens", "self_attn", "mlp"}
    found = {part for part in parts for name in changed if f".{part}." in name}
    wanted = {"full": parts, "predictor": set(), "ffn": {"mlp"}}
    assert found == wanted.get(kind, {"self_attn", "mlp"})


def test_one_static_mask(options):
    path = run(options(select_by="static"))
    model, tokenizer = load(path)
    assert model.selector == "static"
    mean, _ = model.select("a").overlap(model.select("b"))
    assert mean == 1 and generate(model, tokenizer, "hello", max_tokens=2) is not None


def test_a_task_description_selects(options, tmp_path):
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("math: You add numbers.\npoems: You write poems.\n")
    args = options(select_by="task", tasks=str(tasks))
    path = run(args)
    assert open_checkpoint(path).ifp.selector == "predictor"
    # All prompts of a task have one mask.
    assert _log(Path(args.run_path))[-1]["overlap_within"] == 1
    tasks.write_text("math: You count.\npoems: You write poems.\n")
    with pytest.raises(IFPError, match="another run: its data"):
        run(options(select_by="task", tasks=str(tasks), resume=True,
                    mlx_path=str(tmp_path / "out")))  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"quantize": True, "q_bits": 4, "q_group_size": 32}, "quantize"),
        ({"hard_mask": True}, "mask"),
        ({"mask_temperature": 5.0}, "mask"),
        ({"text_format": "chat_template"}, "data"),
        ({"dtype": "bfloat16"}, "dtype"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(changes, name, options, tmp_path):
    common = {"iters": 1, "val_batches": 0, "warm_start_iters": 1}
    run(options(**common))
    with pytest.raises(IFPError, match=f"another run: its {name} is"):
        run(options(**common | changes, resume=True, mlx_path=str(tmp_path / "out")))


def test_damaged_targets_are_made_anew(options, tmp_path):
    targets = tmp_path / "targets"
    changes = {"distill_weight": 1.0, "warm_start_iters": 2, "targets_path": str(targets)}
    args = options(run_path=str(tmp_path / "first"), **changes)
    run(args)
    damaged = [*targets.glob("*/ids.npy"), *targets.glob("*/activations-*.npy")]
    assert len(damaged) > 2
    for file in damaged:
        file.write_bytes(file.read_bytes()[:200])
    for logprobs in targets.glob("*/logprobs.npy"):
        logprobs.unlink()
    again = options(run_path=str(tmp_path / "again"), **changes)
    run(again)
    assert _losses(Path(again.run_path)) == pytest.approx(_losses(Path(args.run_path)), rel=1e-6)


def test_a_disk_too_full_for_the_targets_is_one_line(options, tmp_path):
    args = options(warm_start_iters=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal of it, and a write fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(IFPError, match=r"npy could not be written .*--targets-path"):
            run(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_activations_are_kept_for_the_warm_start_only(options):
    args = options(warm_start_examples=5, val_batches=0)
    run(args)
    assert len(list(Path(args.run_path).glob("targets/*/activations-*.npy"))) == 5


@pytest.mark.parametrize(("weight", "iters"), [(0.0, 1), (1.0, 12)])
def test_the_dense_model_leaves_when_it_has_run_over_everything(
    weight, iters, options, monkeypatch
):
    trainers, train = [], Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self: trainers.append(self) or train(self))
    run(options(distill_weight=weight, iters=iters, val_batches=-1))
    (trainer,) = trainers
    assert trainer.train_split.targets.model is trainer.valid_split.targets.model is None


def test_what_selects_is_no_longer_than_the_predictors_context(options, dense_llama, tmp_path):
    short = make_dense(tmp_path / "short", max_position_embeddings=256)
    path = run(options(model=str(short), iters=1, val_batches=0, warm_start_iters=1))
    assert open_checkpoint(path).ifp.text.max_tokens == 256


def test_a_tied_gemma_is_trained_in_4_bits(options, tmp_path):
    gemma = make_dense(tmp_path / "gemma", "gemma3_text")
    path = run(options(model=str(gemma), iters=1, val_batches=0, warm_start_iters=1,
                       quantize=True, q_bits=4, q_group_size=32))  # fmt: skip
    assert generate(*load(path), "hello", max_tokens=2) is not None


def test_a_checkpoint_of_the_hub_is_trained_on(options, tmp_path, monkeypatch):
    first = run(options(iters=1, val_batches=0, warm_start_iters=1))
    monkeypatch.setattr("mlx_ifp.checkpoint.snapshot_download", lambda *_, **__: str(first))
    on = run(options(model="someone/tiny-ifp", iters=1, val_batches=0, predictor_layers=None,
                     run_path=str(tmp_path / "on")))  # fmt: skip
    assert open_checkpoint(on).ifp.head == open_checkpoint(first).ifp.head


def test_pretraining_then_tuning_continues_the_predictor(options, tmp_path):
    first = run(options(stage="pretrain", chunk_size=8, iters=2, batch_size=1,
                        run_path=str(tmp_path / "pretrain")))  # fmt: skip
    second = options(model=str(first), predictor_layers=None, iters=1)
    path = run(second)
    assert not any("warm_start_loss" in report for report in _log(Path(second.run_path)))
    heads = [open_checkpoint(each).ifp.head for each in (first, path)]
    assert heads[0] == heads[1]


def test_the_warm_start_makes_scores_depend_on_the_instruction(options):
    args = options(warm_start_iters=80, iters=0, val_batches=0)
    run(args)
    shares = [r["variance_explained"] for r in _log(Path(args.run_path)) if "warm_start_loss" in r]
    assert shares[-1] > max(0.3, shares[0])


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(options, monkeypatch):
    args = options(val_batches=0)
    gradients = Trainer.gradients

    def broken(self):
        grads, loss, *rest = gradients(self)
        return grads, np.nan if self.step == 3 else loss, *rest

    monkeypatch.setattr(Trainer, "gradients", broken)
    with pytest.raises(IFPError, match=r"iteration 4.*checkpoint-0000002"):
        run(args)
    assert not (Path(args.run_path) / "ifp").exists()


@pytest.mark.parametrize("iters", [1, 4])
def test_ruined_weights_are_never_kept(iters, options):
    args = options(learning_rate=1e30, max_grad_norm=0.0, iters=iters, save_every=1)
    with pytest.raises(IFPError, match=r"last good checkpoint is .*checkpoint-0000000;"):
        run(args)
    path = Path(args.run_path)
    assert [each.name for each in path.glob("*checkpoint*")] == ["checkpoint-0000000"]
    assert not (path / "ifp").exists()
    run(options(resume=True, iters=1))


def test_a_full_disk_leaves_the_last_complete_checkpoint(options, monkeypatch):
    args = options(val_batches=0)
    write, calls = training_state.write_safetensors, []

    def full(*arguments):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(training_state, "write_safetensors", full)
    with pytest.raises(IFPError, match=r"No space left.*checkpoint-0000000"):
        run(args)
    names = sorted(path.name for path in Path(args.run_path).glob("*checkpoint*"))
    assert names == ["checkpoint-0000000"]


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
        run(args)
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


def test_two_processes_do_not_share_a_run(options):
    args = options(iters=1, val_batches=0, warm_start_iters=1)
    Path(args.run_path).mkdir()
    with open(Path(args.run_path) / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(IFPError, match="in use by another process"):
            run(args)
    run(args)


def test_whoever_stops_a_run_is_told_how_to_go_on(options, monkeypatch, capsys):
    args = options(iters=4, val_batches=0)
    update = Trainer.update

    def stops(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "update", stops)
        run(args)
    assert "go on with --resume; the last complete checkpoint is" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(IFPError, match=r"No space.*--resume"):
        patched.setattr("mlx_ifp.train.save_student", full)
        run(options(iters=4, val_batches=0, resume=True))
    run(options(iters=4, val_batches=0, resume=True))
    assert "Nothing is left to train" in capsys.readouterr().out


def test_a_run_is_not_overwritten_nor_resumed_with_another_model(options, dense_llama, tmp_path):
    run(options(iters=1, val_batches=0))
    with pytest.raises(IFPError, match="--resume"):
        run(options(iters=1))
    other = make_dense(tmp_path / "other", seed=5)
    with pytest.raises(IFPError, match="another run: its model"):
        run(options(iters=2, resume=True, model=str(other), mlx_path=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("no_such: 1", "no option"),
        ("iters: many", "iters must be"),
        ("predictor_layers: x", "predictor_layers must be"),
        ("keep: many", "keep"),
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
