"""A run that stops, however it does: what is kept, who is told, and how it goes on."""

import errno
import fcntl
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_ifp import IFPError
from mlx_ifp.commands.plot.training_curves import read_log
from mlx_ifp.commands.train.command import train
from mlx_ifp.tuner import training_state
from mlx_ifp.tuner.trainer import Trainer

from ...conftest import make_dense
from ...training import flags, losses


def test_a_resumed_run_gives_the_losses_of_one_that_was_not_stopped(options, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(options(run_path=str(whole), iters=6))

    class Killed(BaseException):
        pass

    whole_run = Trainer.train

    def killed(self):
        def on_step(step):
            if step == 3:
                raise Killed

        whole_run(self, on_step)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "train", killed)
        with pytest.raises(Killed):
            train(options(run_path=str(broken), iters=6))
    assert training_state.latest_checkpoint(broken).name == "checkpoint-0000002"
    train(options(run_path=str(broken), iters=6, resume=True))
    expected = losses(whole)
    assert losses(broken) == pytest.approx(expected, rel=1e-5) and len(expected) == 6


def test_a_report_that_spans_a_resume_is_of_all_its_steps(options, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    changes = {"steps_per_report": 4, "save_every": 6, "val_batches": 0}
    train(options(run_path=str(whole), iters=8, **changes))
    # The end of a run is reported, so it is stopped at step 6 by other means.
    args = options(run_path=str(broken), iters=8, **changes)
    update = Trainer.update

    def stops(self):
        if self.step == 6:
            raise KeyboardInterrupt
        return update(self)

    with pytest.MonkeyPatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "update", stops)
        train(args)
    train(options(run_path=str(broken), iters=8, resume=True, **changes))
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    assert list(losses(broken)) == [4, 8]


def _last_step(path: Path) -> int:
    """The step of a run's last complete checkpoint, -1 if there is none."""
    last = training_state.latest_checkpoint(path)
    return -1 if last is None else int(last.name.removeprefix("checkpoint-"))


def test_a_run_killed_with_9_is_resumed(options, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"

    def command(iters):
        script = str(Path(sys.executable).with_name("mlx_ifp.train"))
        return [script, *flags(options(run_path=str(broken), iters=iters, val_batches=0))]

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
    train(options(run_path=str(whole), iters=iters, val_batches=0))
    assert len(losses(whole)) == iters
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)


def test_whoever_stops_a_run_is_told_how_to_go_on(options, monkeypatch, capsys):
    args = options(iters=4, val_batches=0)
    update = Trainer.update

    def stops(self):
        if self.step == 3:
            raise KeyboardInterrupt
        return update(self)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "update", stops)
        train(args)
    assert "go on with --resume; the last complete checkpoint is" in capsys.readouterr().err

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(IFPError, match=r"No space.*--resume"):
        patched.setattr("mlx_ifp.commands.train.command.save_student", full)
        train(options(iters=4, val_batches=0, resume=True))
    train(options(iters=4, val_batches=0, resume=True))
    assert "Nothing is left to train" in capsys.readouterr().out


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
    train(options(**common))
    with pytest.raises(IFPError, match=f"another run: its {name} is"):
        train(options(**common | changes, resume=True, mlx_path=str(tmp_path / "out")))


def test_a_refused_resume_leaves_the_options_of_the_run(options, tmp_path):
    lora = {"rank": 2, "scale": 20.0, "dropout": 0.0}
    common = {"iters": 1, "val_batches": 0, "warm_start_iters": 1, "fine_tune_type": "lora"}
    args = options(**common, lora_parameters=lora)
    train(args)
    before = (Path(args.run_path) / "train_config.json").read_text()
    other = lora | {"scale": 200.0}
    with pytest.raises(IFPError, match="another run: its lora_parameters is"):
        train(options(**common, lora_parameters=other, resume=True, mlx_path=str(tmp_path / "out")))
    assert (Path(args.run_path) / "train_config.json").read_text() == before


def test_a_damaged_state_is_named(options, tmp_path):
    args = options(iters=1, val_batches=0, warm_start_iters=1)
    train(args)
    (Path(args.run_path) / "checkpoint-0000001" / "state.json").write_text("{}")
    with pytest.raises(IFPError, match=r"checkpoint-0000001 is damaged \(state.json has no"):
        train(options(resume=True, mlx_path=str(tmp_path / "out")))


def test_a_run_is_not_overwritten_nor_resumed_with_another_model(options, dense_llama, tmp_path):
    train(options(iters=1, val_batches=0))
    with pytest.raises(IFPError, match="--resume"):
        train(options(iters=1))
    other = make_dense(tmp_path / "other", seed=5)
    with pytest.raises(IFPError, match="another run: its model"):
        train(options(iters=2, resume=True, model=str(other), mlx_path=str(tmp_path / "out")))


def test_two_processes_do_not_share_a_run(options):
    args = options(iters=1, val_batches=0, warm_start_iters=1)
    Path(args.run_path).mkdir()
    with open(Path(args.run_path) / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(IFPError, match="in use by another process"):
            train(args)
    train(args)


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(options, monkeypatch):
    args = options(val_batches=0)
    gradients = Trainer.gradients

    def broken(self):
        grads, loss, *rest = gradients(self)
        return grads, np.nan if self.step == 3 else loss, *rest

    monkeypatch.setattr(Trainer, "gradients", broken)
    with pytest.raises(IFPError, match=r"iteration 4.*checkpoint-0000002"):
        train(args)
    assert not (Path(args.run_path) / "ifp").exists()


@pytest.mark.parametrize("iters", [1, 4])
def test_ruined_weights_are_never_kept(iters, options):
    args = options(learning_rate=1e30, max_grad_norm=0.0, iters=iters, save_every=1)
    with pytest.raises(IFPError, match=r"last good checkpoint is .*checkpoint-0000000;"):
        train(args)
    path = Path(args.run_path)
    assert [each.name for each in path.glob("*checkpoint*")] == ["checkpoint-0000000"]
    assert not (path / "ifp").exists()
    train(options(resume=True, iters=1))


def test_a_full_disk_leaves_the_last_complete_checkpoint(options, monkeypatch):
    args = options(val_batches=0)
    write, calls = training_state.write_safetensors, []

    def full(*arguments, **options):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    monkeypatch.setattr(training_state, "write_safetensors", full)
    with pytest.raises(IFPError, match=r"No space left.*checkpoint-0000000"):
        train(args)
    names = sorted(path.name for path in Path(args.run_path).glob("*checkpoint*"))
    assert names == ["checkpoint-0000000"]


def test_a_full_disk_spares_the_only_checkpoint(options, monkeypatch):
    train(options(iters=0, val_batches=0))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    args = options(val_batches=0, resume=True, mlx_path=str(Path(options().run_path) / "more"))
    with monkeypatch.context() as patched:
        patched.setattr(training_state, "write_safetensors", full)
        with pytest.raises(IFPError, match=r"No space left.*checkpoint-0000000"):
            train(args)
    train(args)


def test_a_line_of_the_log_that_a_kill_has_cut_is_dropped(options):
    args = options(val_batches=0, iters=2)
    train(args)
    path = Path(args.run_path)
    with open(path / "log.jsonl", "a") as file:
        file.write('{"iteration": 3, "train_lo')
    train(options(val_batches=0, resume=True, mlx_path=str(path / "more")))
    assert read_log(path).series("train", "train_loss")[0] == [1, 2, 3, 4]


def test_a_disk_too_full_for_the_targets_is_one_line(options, tmp_path):
    args = options(warm_start_iters=0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Python ignores the signal of it, and a write fails as on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(IFPError, match=r"npy could not be written .*--targets-path"):
            train(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
