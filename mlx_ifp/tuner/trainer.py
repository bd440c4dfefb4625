"""Train LLM and predictor together (paper, section 3.2)."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.nn.utils import average_gradients
from mlx.utils import tree_map
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.trainer import grad_checkpoint
from tqdm import tqdm

from ..errors import IFPError
from ..llm.modules import scalar
from .batches import Batches, make_batch
from .data import Example
from .dense_targets import Split
from .elastic_k import KeepRange
from .run_log import RunLog
from .step import Mix, batch_loss, compiled_update, make_optimizer, optimizers_of, positions_of
from .student import Student
from .training_args import TrainingArgs
from .training_state import latest_checkpoint, load_state, save_state
from .validation import collapse_warning, validate


class Trainer:
    """Runs the training loop of one run.

    Args:
        student (Student): what is trained; what should not be trained is frozen.
        args (TrainingArgs): the run's numbers.
        run (Path): the run's directory, which exists.
        train, valid (Split): data; valid may be None.
        select_by (str): ``prompt``, ``task`` or ``static``.
        identity (dict): what a resumed run must have in common with this one.
        callback (TrainingCallback): mlx-lm's, or None.
        keep_range (KeepRange): where each batch's k is drawn from; None for the checkpoint's k.

    Attributes:
        step: how many steps are done.
        optimizer: the optimizer, with its state.
    """

    def __init__(
        self,
        student: Student,
        args: TrainingArgs,
        run: Path,
        train: Split,
        valid: Split | None,
        select_by: str,
        identity: dict[str, Any],
        callback: TrainingCallback | None = None,
        keep_range: KeepRange | None = None,
    ) -> None:
        args.check()
        self.student, self.args, self.run = student, args, run
        self.train_split, self.valid_split, self.select_by = train, valid, select_by
        self.identity, self.keep_range = identity, keep_range
        self.world = mx.distributed.init()
        self.log = RunLog(run if self.world.rank() == 0 else None, callback)
        self.batches = Batches(
            train.examples, args.batch_size, seed=args.seed, rank=self.world.rank(),
            world_size=self.world.size(),
        )  # fmt: skip
        by_task: dict[str, list[int]] = {}
        for i, example in enumerate(train.examples):
            if example.task is not None:
                by_task.setdefault(example.task, []).append(i)
        # A prompt that is alone in its task is left out: there is no other to pull it towards.
        self._by_task = {task: members for task, members in by_task.items() if len(members) > 1}
        if args.contrastive_weight and len(self._by_task) < 2:
            raise IFPError(
                "--contrastive-weight needs two tasks of two prompts or more: the field 'task' of "
                "the rows names them. All prompts would be pulled together."
            )
        self.optimizer = make_optimizer(student, args)
        self.optimizer.init(student.trainable_parameters())
        self.step = self.trained_tokens = 0
        # Each step since the last report adds a list: loss, cross-entropy, KL, tokens, seconds.
        self._unreported: list[list[float]] = []
        # This is made at the first update.
        self._apply: Callable[[dict], None] | None = None
        if args.grad_checkpoint:
            grad_checkpoint(student.llm.layers[0])

    # -- checkpoints

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            IFPError: if it is damaged, or of another run.
        """
        state = load_state(path, self.student, self.optimizer)
        # The compiled update is dropped, as it would go on with the earlier state.
        self._apply = None
        theirs = state["identity"]
        for name, value in self.identity.items():
            if theirs.get(name) != value:
                raise IFPError(
                    f"{path} is of another run: its {name} is {theirs.get(name)!r}, here it is "
                    f"{value!r}. Resume with the same, or name another --run-path."
                )
        self.step, self.trained_tokens = state["step"], state["trained_tokens"]
        self._unreported = state["unreported"]

    def save(self) -> None:
        """Write a checkpoint; only the first rank does."""
        if self.world.rank() == 0:
            values = {
                "identity": self.identity,
                "trained_tokens": self.trained_tokens,
                "unreported": self._unreported,
            }
            save_state(self.run, self.step, self.student, self.optimizer, values,
                       self.args.keep_checkpoints)  # fmt: skip

    # -- steps

    def k_of(self, number: int) -> int:
        """How many channels are kept in each layer for a batch."""
        if self.keep_range is None:
            return self.student.k
        return self.keep_range.draw(self.args.seed, number)

    def _mix(self, counts: tuple[float, float], number: int) -> Mix:
        """Say how a batch is trained. Losses are means over the update's tokens on all ranks."""
        args, (answer, distilled) = self.args, counts
        return Mix(
            ce=(1 - args.distill_weight) / max(answer, 1),
            kl=args.distill_weight / max(distilled, 1),
            contrastive=args.contrastive_weight / args.grad_accumulation_steps
            / self.world.size(),
            temperature=args.temperature(self.step),
            blend=args.blend(self.step),
            shared_by=self._sharer(number),
            k=self.k_of(number),
        )  # fmt: skip

    def _sharer(self, number: int) -> int | None:
        """The row whose text selects for the whole batch, if one does."""
        if self.select_by in ("task", "static"):
            return 0
        if not self.args.group_masks:
            return None
        rows = self.args.batch_size // self.world.size()
        return int(np.random.default_rng([self.args.seed, 2, number]).integers(rows))

    def _contrast(self, number: int) -> tuple[Any, list[str]] | tuple[None, None]:
        """Draw prompts of several tasks, at least two of each."""
        if not self.args.contrastive_weight:
            return None, None
        random = np.random.default_rng([self.args.seed, 3, number, self.world.rank()])
        examples, by_task = self.train_split.examples, self._by_task
        tasks = random.permutation(np.array(list(by_task), dtype=object))
        tasks = tasks[: max(1, self.args.contrastive_batch_size // 2)]
        each = max(2, self.args.contrastive_batch_size // max(1, len(tasks)))
        chosen = [
            int(i) for task in tasks
            for i in random.choice(by_task[task], min(each, len(by_task[task])), replace=False)
        ]  # fmt: skip
        # Only the selecting text is used, so the answers need no place in the batch.
        prompts = [Example([0, 0], 1, examples[i].selecting, examples[i].task) for i in chosen]
        return make_batch(prompts, list(range(len(prompts)))), [str(p.task) for p in prompts]

    def gradients(self) -> tuple[dict, float, float, float, int]:
        """Compute the averaged gradients of one update.

        Returns:
            tuple: the gradients, the loss, its cross-entropy and KL parts, and the tokens seen.
        """
        args = self.args
        numbers = [self.step * args.grad_accumulation_steps + i
                   for i in range(args.grad_accumulation_steps)]  # fmt: skip
        batches = [self.batches(number) for number in numbers]
        distill_on = args.distill_on if args.distill_weight else "none"
        positions = [positions_of(batch, distill_on) for batch in batches]
        counts = mx.array([
            float(sum(p.answer_tokens for p in positions)),
            float(sum(p.distilled_tokens for p in positions)),
            float(sum(int(batch.token_mask.sum()) for batch in batches)),
        ])  # fmt: skip
        counts = mx.distributed.all_sum(counts, stream=mx.cpu)
        answer, distilled, tokens = cast(list[float], counts.tolist())
        value_and_grad = nn.value_and_grad(self.student, batch_loss)
        total: dict = {}
        sums = mx.zeros((3,))
        for number, batch, places in zip(numbers, batches, positions, strict=True):
            teacher = None
            if args.distill_weight:
                teacher = self.train_split.targets.teacher(batch.indices, batch.tokens.shape[1] - 1)
            mix = self._mix((answer, distilled), number)
            contrast, tasks = self._contrast(number)
            values, grads = value_and_grad(self.student, batch, places, teacher, mix, contrast,
                                           tasks)  # fmt: skip
            total = tree_map(mx.add, total, grads) if total else grads
            sums = sums + mx.stack(values)
            mx.eval(total, sums)
        if self.world.size() > 1:
            # Each rank's loss is its part of the sum, but averaging divides by the number of ranks.
            total = tree_map(lambda g: g * self.world.size(), average_gradients(total))
            sums = mx.distributed.all_sum(sums, stream=mx.cpu)
        loss, ce, kl = cast(list[float], sums.tolist())
        return total, loss, ce, kl, int(tokens)

    def _require_finite(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        last = latest_checkpoint(self.run)
        raise IFPError(
            f"The loss is {loss} at iteration {self.step + 1}; training stops. "
            + (f"The last good checkpoint is {last}; " if last else "")
            + "lower the learning rate and use --resume."
        )

    def _check_weights(self) -> None:
        """Check that the next batch has a finite loss, as only such weights may be kept.

        An update can ruin the weights, and the loss reported with it was computed before it.
        """
        number = self.step * self.args.grad_accumulation_steps
        batch = self.batches(number)
        positions = positions_of(batch, "none")
        mix = self._mix((positions.answer_tokens, 0), number)
        mix = replace(mix, ce=1 / max(positions.answer_tokens, 1))
        loss, _, _ = batch_loss(self.student, batch, positions, None, mix)
        # The loss is summed over all ranks, so that all of them stop.
        self._require_finite(scalar(mx.distributed.all_sum(loss, stream=mx.cpu)))

    def _compute_targets(self) -> None:
        """Run the dense model over all that this run will ask for.

        The first update gives the LLM new arrays, and the dense model's would stay in memory, too.
        """
        each = self.args.grad_accumulation_steps
        numbers = range(self.step * each, self.args.iters * each)
        first = self.world.rank() == 0
        for number in tqdm(numbers, desc="Dense model", unit="batch", disable=not first):
            self.train_split.targets.compute(self.batches.indices(number))
        self.train_split.targets.forget_model()
        if self.valid_split is not None:
            # In a resumed run nothing has asked yet whether the validation targets are complete.
            self.valid_split.targets.forget_if_done()

    def update(self) -> tuple[float, float, float, int]:
        """Update the weights once; give the loss, its two parts, and the tokens seen."""
        grads, loss, ce, kl, tokens = self.gradients()
        self._require_finite(loss)
        if self._apply is None:
            self._apply = compiled_update(self.student, self.optimizer, self.args.max_grad_norm)
        self._apply(grads)
        mx.eval(self.student.trainable_parameters(), self.optimizer.state)
        if mx.get_cache_memory() > self.args.clear_cache_threshold > 0:
            mx.clear_cache()
        self.step += 1
        self.trained_tokens += tokens
        return loss, ce, kl, tokens

    def _evaluate(self, split: Split, name: str) -> tuple[dict[str, Any], str]:
        report = validate(self.student, split.examples, split.targets,
                          self.args.batch_size, self.args.mask_temperature)  # fmt: skip
        between = report["overlap_between"]
        line = (
            f"{name} loss {report['val_loss']:.3f}, dense {report['dense_loss']:.3f}"
            f", KL to dense {report['val_kl']:.3f} (mean of tasks {report['mean_task_kl']:.3f})"
            f", overlap between tasks {'-' if between is None else f'{between:.3f}'}"
            f", dead channels {report['dead_channels']:.1%}, {name} took {report['val_time']:.1f}s"
        )
        return report, line

    def test(self, split: Split) -> None:
        """Evaluate on a test set, on the first rank, and report."""
        if self.world.rank() != 0:
            return
        report, line = self._evaluate(split, "Test")
        self.log.write(
            {name.replace("val_", "test_"): value for name, value in report.items()}, line
        )

    def validate(self) -> dict[str, Any] | None:
        """Validate on the first rank and report."""
        if self.valid_split is None or self.world.rank() != 0:
            return None
        report, line = self._evaluate(self.valid_split, "Val")
        report = {"iteration": self.step, **report}
        self.log.write(report, f"Iter {self.step}: {line}")
        share = self.student.k / self.student.ffns[0].d_ffn
        if self.select_by != "static" and (warning := collapse_warning(report, share)):
            print(f"[WARNING] {warning}", flush=True)
        return report

    def train(self, on_step: Callable[[int], Any] = lambda _: None) -> None:
        """Run to the last iteration, with reports, validations and checkpoints.

        Args:
            on_step (Callable): called after each step with the number of steps done.

        Raises:
            IFPError: if the loss is not finite, or a checkpoint cannot be written.
        """
        if mx.metal.is_available():
            # mlx_lm.lora does the same, but not all versions of mlx-lm have a function for it.
            mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))
        args = self.args
        if self.step == 0:
            # A run that is resumed at step 0 has its first checkpoint already.
            if latest_checkpoint(self.run) is None:
                self.save()
            self.validate()
        if args.distill_weight:
            self._compute_targets()
        while self.step < args.iters:
            start = time.perf_counter()
            numbers = self.update()
            self._unreported.append([*numbers, time.perf_counter() - start])
            last = self.step == args.iters
            if self.step % args.steps_per_report == 0 or last:
                self._report()
            saving = self.step % args.save_every == 0 or last
            if saving:
                self._check_weights()
            if self.step % args.steps_per_eval == 0 or last:
                self.validate()
            if saving:
                self.save()
            on_step(self.step)

    def _report(self) -> None:
        steps = len(self._unreported)
        *losses, _, _ = np.mean(self._unreported, axis=0).tolist()
        tokens, seconds = np.sum(self._unreported, axis=0).tolist()[-2:]
        self._unreported = []
        # The first is the LLM's and the last the predictor's; if only one is trained, they are one.
        optimizers = optimizers_of(self.optimizer)
        report = {
            "iteration": self.step,
            "train_loss": losses[0],
            "train_cross_entropy": losses[1],
            "train_kl": losses[2],
            "learning_rate": optimizers[0].learning_rate.item(),
            "predictor_learning_rate": optimizers[-1].learning_rate.item(),
            "iterations_per_second": steps / seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": self.trained_tokens,
            "peak_memory": mx.get_peak_memory() / 1e9,
        }
        if self.keep_range is not None:
            # This is the k of the last batch.
            report["k"] = self.k_of(self.step * self.args.grad_accumulation_steps - 1)
        self.log.write(
            report,
            f"Iter {self.step}: Train loss {losses[0]:.3f}, "
            f"Learning Rate {report['learning_rate']:.3e}, It/sec "
            f"{report['iterations_per_second']:.3f}, Tokens/sec {report['tokens_per_second']:.1f}, "
            f"Trained Tokens {self.trained_tokens}, Peak mem {report['peak_memory']:.2f} GB",
        )


def identity_of(source: str, examples: list[Example], args: TrainingArgs, **more: Any) -> dict:
    """Collect what all sessions of one run must have in common."""
    ours = ("batch_size", "grad_accumulation_steps", "seed", "distill_weight", "distill_on",
            "group_masks", "contrastive_weight", "contrastive_batch_size",
            "blend_iters")  # fmt: skip
    values = asdict(args)
    data = hashlib.sha256()
    for example in examples:
        parts = (example.offset, len(example.tokens), *example.tokens, *example.selecting)
        data.update(np.asarray(parts, np.int32).tobytes())
    return {"model": source, "data": data.hexdigest(),
            **{name: values[name] for name in ours}, **more}  # fmt: skip
