"""``--keep-range``: one checkpoint is trained for every k of a range."""

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

from mlx_ifp import IFPError
from mlx_ifp.commands.train.command import train
from mlx_ifp.commands.train.given import options_of
from mlx_ifp.commands.train.options import setup_arg_parser
from mlx_ifp.tuner.trainer import Trainer

from ...training import log, losses

# Of 160 channels; 64, 128 and 160 are drawn.
RANGE = {"keep": None, "keep_range": [64, 1.0], "val_batches": 0}


@pytest.fixture
def trainer_of(monkeypatch):
    """A run's trainer, before its first step."""

    def trainer_of(args) -> Trainer:
        made = []
        with monkeypatch.context() as patched:
            patched.setattr(Trainer, "train", lambda self: made.append(self))
            train(args)
        return made[0]

    return trainer_of


@pytest.mark.parametrize("group_masks", [False, True], ids=["wide", "narrow"])
def test_a_batch_has_the_loss_that_its_k_alone_has(options, trainer_of, tmp_path, group_masks):
    changes = {"group_masks": group_masks, "distill_weight": 0.5}
    elastic = trainer_of(options(**RANGE, **changes, run_path=str(tmp_path / "elastic")))
    alone = trainer_of(options(**changes, val_batches=0, run_path=str(tmp_path / "alone")))
    numbers = {elastic.k_of(number): number for number in range(20)}
    assert set(numbers) == {64, 128, 160}
    seen = set()
    for k, number in numbers.items():
        elastic.step = alone.step = number
        alone.student.ifp.k = k
        assert alone.k_of(number) == k
        (grads, loss, *_), (expected_grads, expected, *_) = elastic.gradients(), alone.gradients()
        assert loss == pytest.approx(expected, rel=1e-6)
        for (name, grad), (_, other) in zip(
            tree_flatten(grads), tree_flatten(expected_grads), strict=True
        ):
            assert mx.isfinite(grad).all() and mx.allclose(grad, other, rtol=1e-4, atol=1e-7), name
        alone.student.ifp.k = 96
        seen.add(alone.gradients()[1] == pytest.approx(loss, rel=1e-6))
    assert seen == {False}


def test_a_resumed_run_draws_the_same_k(options, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    result = train(options(**RANGE | {"val_batches": 1}, run_path=str(whole)))
    update = Trainer.update

    def stops(self):
        if self.step == 2:
            raise KeyboardInterrupt
        return update(self)

    changes = RANGE | {"val_batches": 1, "run_path": str(broken)}
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Trainer, "update", stops)
        train(options(**changes))
    with pytest.raises(IFPError, match="its keep_range is"):
        train(options(**changes | {"keep_range": [64, 128], "keep": 128}, resume=True))
    train(options(**changes, resume=True))
    assert losses(broken) == pytest.approx(losses(whole), rel=1e-5)
    ks = [[report["k"] for report in log(path) if "k" in report] for path in (whole, broken)]
    assert ks[0] == ks[1] and len(ks[0]) == 4 and set(ks[0]) <= {64, 128, 160}
    # The checkpoint's own k is the middle of the range, which it also names.
    ifp = json.loads((result / "ifp_config.json").read_text())
    assert ifp["k"] == 128 and ifp["source"]["training"]["keep_range"] == [64, 160]


def test_the_checkpoints_k_is_one_of_the_range(options):
    with pytest.raises(
        IFPError, match=r"--keep is 32 channels, outside of --keep-range, 64 to 160"
    ):
        train(options(**RANGE | {"keep": 32}))
    with pytest.raises(IFPError, match="--keep-range is for a range"):
        train(options(keep=[64, 96]))


def test_a_range_is_two_numbers_in_flags_and_yaml(tmp_path):
    flags = setup_arg_parser().parse_args(["--keep-range", "50%", "512"])
    assert options_of(vars(flags)).keep_range == [0.5, 512]
    file = tmp_path / "c.yaml"
    file.write_text("keep_range: [25%, 1.0]\n")
    assert options_of({"config": str(file)}).keep_range == [0.25, 1.0]
    assert options_of({}).keep_range is None


@pytest.mark.parametrize("value", ["0.5", "[0.5]", "[0.5, 0.7, 1.0]", "[true, 1.0]", "{a: 1}"])
def test_anything_else_in_yaml_is_refused(tmp_path, value):
    file = tmp_path / "c.yaml"
    file.write_text(f"keep_range: {value}\n")
    with pytest.raises(IFPError, match="keep_range must be a list of two"):
        options_of({"config": str(file)})
