"""Train an LLM and its sparsity predictor together: Instruction-Following Pruning in PyTorch.

    python train.py --model DIR --data train.jsonl --output run --predictor-layers 4 \
        --keep 0.5 1.0 --distill-weight 1 --iters 1000
    accelerate launch train.py ...

The method is that of Hou et al., ICML 2025 (arXiv 2501.02086), section 3. ``mlx_ifp.convert --model
run`` turns the result into a checkpoint for MLX.
"""

import time

START = time.time()  # a time limit counts the imports, too
# ruff: noqa: E402

import argparse
import contextlib
import json
import math
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, set_seed
from data import BatchOrder, DataError, DeviceData, by_length, draw_k, load_examples
from model import ModelError
from optimizer import OddSteps, make_optimizer, rate
from options import check_options, count_of, fail, setup_arg_parser, task_descriptions
from resume import identity, load_state, save_state, states
from rounding import Rounding, bits_of_parts
from save import load_models, save_checkpoint
from step import Step
from torch import Tensor, nn
from validate import collapse_warning
from warm_start import fit_predictor


class Trainer:
    """A run: its data, its optimizer, where it is, and what it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, Path(args.output)
        # Without being told, processes on CPUs would not find one another.
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.dtype = getattr(torch, args.dtype)
        self.on_gpu = self.device.type == "cuda"
        self.block = args.loss_block or (2048 if self.on_gpu else 256)
        set_seed(args.seed)
        self.model, self.teacher, *self.tokenizers = load_models(args)
        ends = sorted(count_of(keep, self.model.channels) for keep in args.keep)
        self.low, self.high = ends[0], ends[-1]
        self.model.k = self._middle()
        self.train_data, self.valid_data = self._load_data()
        self.order = BatchOrder(self.train_data.lengths, args.batch_tokens, args.seed)
        self.rounding: Rounding | None = None
        self.iteration = self.trained_tokens = 0
        self.pieces, self.compiled = 1, args.compile
        self.odd_steps = OddSteps(args.skip_above, self.device)
        self.now = 0.0  # the share of the run that is done
        self.seconds_before = 0.0  # of earlier sessions of this run
        self.reserve = 5.0  # seconds that the last validation and save take

    def _middle(self) -> int:
        """k of validations and of the checkpoint's manifest."""
        middle = (self.low + self.high) // 2
        nearest = round(middle / 64) * 64
        return nearest if self.low <= nearest <= self.high and self.low < self.high else middle

    def _load_data(self) -> tuple[DeviceData, DeviceData | None]:
        args, data = self.args, Path(self.args.data)
        train = data / "train.jsonl" if data.is_dir() else data
        valid = Path(args.valid) if args.valid else data / "valid.jsonl"
        descriptions = task_descriptions(args.task_descriptions)

        def load(path: Path) -> DeviceData:
            examples = load_examples(
                path, *self.tokenizers, stage=args.stage, max_length=args.max_length,
                chunk_size=args.chunk_size, descriptions=descriptions,
                chat_format=self.model.reads_own_state,
            )  # fmt: skip
            return DeviceData(examples, self.device, self.block)

        return load(train), load(valid) if args.valid or valid.exists() else None

    # -- what a run says

    def log(self, report: dict[str, Any], line: str) -> None:
        """Append a report to log.jsonl, and print a line."""
        if self.main:
            with open(self.output / "log.jsonl", "a") as file:
                file.write(json.dumps(report) + "\n")
            print(line, flush=True)

    # -- the run

    def train(self) -> None:
        """From the start, or from the state to resume, to the end."""
        args = self.args
        self.output.mkdir(parents=True, exist_ok=True)
        self.model.to(self.device)
        self.teacher.to(self.device)
        if not args.resume and args.warm_start_iters:
            self._warm_start()
        if self.dtype != torch.float32:
            # What autocast would make of the matrices anyway, in half the memory.
            for module in self.teacher.llm.get_decoder().layers.modules():
                if isinstance(module, nn.Linear):
                    module.to(self.dtype)
        if args.grad_checkpoint:
            self.model.llm.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.llm.train()
            self.model.keep_masks = True
        teacher = self.teacher if args.distill_weight > 0 else None
        step = Step(self.model, teacher, self.dtype, self.block)
        if args.compile:
            step.compile_parts()
        self.optimizer = make_optimizer(self.model, args)
        self.step, self.optimizer = self.accelerator.prepare(step, self.optimizer)
        if args.quantize_from < 1:
            # Of the weights as they are now: several processes may hold a part each.
            try:
                self.rounding = Rounding(
                    self.model.llm, self.model.downs, args.q_bits, args.q_group_size,
                    getattr(torch, args.save_dtype), bits_of_parts(args.q_bits_of),
                )  # fmt: skip
            except ValueError as error:
                raise fail(error) from error
        if args.resume:
            self._resume()
        elif self.valid_data is not None:
            self.validate()
        self.begin = time.time() - self.seconds_before
        self.end = START + 60 * args.minutes - self.reserve if args.minutes else math.inf
        sums, tokens, begin = [], 0, time.perf_counter()
        while (now := self.progress()) < 1:
            self.now = now
            values, seen = self.update(now)
            sums.append(values)
            tokens += seen
            self.trained_tokens += seen
            self.iteration += 1
            if self._is_due(args.steps_per_report) or self.iteration == args.iters:
                self._report(sums, tokens, time.perf_counter() - begin)
                sums, tokens, begin = [], 0, time.perf_counter()
            others = time.perf_counter()
            if self._is_due(args.steps_per_eval) and self.valid_data is not None:
                self.validate()
            if self._is_due(args.save_every):
                self._save_state()
            begin += time.perf_counter() - others
        if sums:
            self._report(sums, tokens, time.perf_counter() - begin)
        self.finish()

    def _is_due(self, every: int) -> bool:
        return every > 0 and self.iteration % every == 0

    def progress(self) -> float:
        """The share of the run that is done: of its steps or of its time, the larger."""
        share = self.iteration / self.args.iters if self.args.iters else 0.0
        if self.args.minutes:
            share = max(share, (time.time() - self.begin) / max(self.end - self.begin, 1e-9))
            if self.accelerator.num_processes > 1:
                # All processes go by the clock of the first.
                share = broadcast(torch.tensor(share, device=self.device)).item()
        return share

    def update(self, progress: float) -> tuple[Tensor, int]:
        """One step: the loss with its two parts, on the device, and the tokens of all processes."""
        args, accelerator = self.args, self.accelerator
        each, processes = args.grad_accumulation_steps, accelerator.num_processes
        first = self.iteration * each * processes
        batches = [self.order(first + i) for i in range(each * processes)]
        counts = [self.train_data.counts(indices) for indices in batches]
        answer, every = (sum(count) for count in zip(*counts, strict=True))
        distilled = every if args.distill_on == "all" else answer
        # Gradients are means over the processes, the loss is a mean over the tokens of all.
        ce = (1 - args.distill_weight) / max(answer, 1) * processes
        kl = args.distill_weight / max(distilled, 1) * processes
        k = draw_k(self.low, self.high, self.iteration, args.seed)
        start = args.mask_temperature_start or args.mask_temperature
        temperature = start ** (1 - progress) * args.mask_temperature**progress
        blend = min(1.0, (self.iteration + 1) / (args.blend_iters + 1))
        on = args.distill_on if args.distill_weight else "answer"
        own = batches[accelerator.process_index :: processes]
        with self._rounded(progress):
            total = self._gradients(own, on, (k, temperature, blend, ce, kl))
        norm = accelerator.clip_grad_norm_(self.step.parameters(), args.max_grad_norm or math.inf)
        self.odd_steps(norm, self.iteration, self.step.parameters())
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate(args, self.iteration, progress)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, every

    def _gradients(self, own: list[Any], on: str, inputs: tuple[Any, ...]) -> Tensor:
        """Add up gradients of this process's batches; the summed loss and its parts.

        A batch that does not fit the GPU is cut in two, and so are all that follow. If the first
        step cannot be compiled, nothing is.
        """
        accelerator = self.accelerator
        while True:
            pieces = [piece for rows in own for piece in np.array_split(rows, self.pieces)]
            pieces = [piece for piece in pieces if len(piece)]
            total = torch.zeros(3, device=self.device)
            try:
                for i, piece in enumerate(pieces):
                    last = i == len(pieces) - 1
                    with contextlib.nullcontext() if last else accelerator.no_sync(self.step):
                        loss, *parts = self.step("loss", self.train_data.batch(piece, on), *inputs)
                        accelerator.backward(loss)
                    total += torch.stack([loss.detach(), *parts])
                return total
            except torch.cuda.OutOfMemoryError:
                if accelerator.num_processes > 1 or all(len(piece) == 1 for piece in pieces):
                    raise
                self.pieces *= 2
                problem = f"the GPU's memory is full: batches are cut into {self.pieces} pieces"
            except Exception as error:
                if not self.compiled or self.iteration > 0:
                    raise
                self.compiled = False
                torch.compiler.set_stance("force_eager")
                reason = " ".join(str(error).split())[:300]
                problem = f"not compiled, which is slower: {type(error).__name__}: {reason}"
            # Outside of the handlers, which keep the failed step's tensors alive.
            print(f"[WARNING] {problem}", flush=True)
            self.optimizer.zero_grad()
            if self.on_gpu:
                torch.cuda.empty_cache()

    def _rounded(self, progress: float) -> Any:
        if self.rounding is None or progress < self.args.quantize_from:
            return contextlib.nullcontext()
        return self.rounding

    def _report(self, sums: list[Tensor], tokens: int, seconds: float) -> None:
        mean = torch.stack(sums).mean(dim=0)
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(mean, reduction="mean")
        loss, ce, kl = mean.tolist()
        if not math.isfinite(loss):
            saved = states(self.output)
            left = f"the last state is {saved[-1]}" if saved else "no state was saved"
            raise fail(
                f"the loss is {loss} before iteration {self.iteration}; {left}; lower "
                "--learning-rate"
            )
        # Linux counts in KB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        if self.on_gpu:
            peak = torch.cuda.max_memory_allocated()
        of = {group["base"]: group["lr"] for group in self.optimizer.param_groups}
        report = {
            "iteration": self.iteration,
            "train_loss": loss,
            "train_cross_entropy": ce,
            "train_kl": kl,
            "learning_rate": of.get(self.args.learning_rate, 0.0),
            "predictor_learning_rate": of.get(self.args.predictor_learning_rate, 0.0),
            "iterations_per_second": len(sums) / seconds,
            "tokens_per_second": tokens / seconds,
            "trained_tokens": self.trained_tokens,
            "peak_memory": peak / 1e9,
            "k": draw_k(self.low, self.high, self.iteration - 1, self.args.seed),
            "progress": self.now,
            "skipped_updates": int(self.odd_steps.skipped.item()),
            "rounded": self.rounding is not None and self.now >= self.args.quantize_from,
            "seconds": time.time() - START,
        }
        self.log(
            report,
            f"Iter {self.iteration}: Train loss {loss:.3f}, Learning Rate "
            f"{report['learning_rate']:.3e}, Tokens/sec {report['tokens_per_second']:.1f}, "
            f"Trained Tokens {self.trained_tokens}, Peak mem {peak / 1e9:.2f} GB, "
            f"{self.now:.0%} done",
        )

    def validate(self) -> None:
        """Validate, each process alike, and report."""
        start = time.perf_counter()
        batches = by_length(self.valid_data, self.args.batch_tokens, self.args.valid_examples)
        # Other shapes and no gradients: compiling them would take longer than this.
        with torch.compiler.set_stance("force_eager"), self._rounded(self.now), torch.no_grad():
            report = self.step("measure", self.teacher, self.valid_data, batches, self.model.k)
        report = {"iteration": self.iteration, **report}
        between = report["overlap_between"]
        self.log(
            report,
            f"Iter {self.iteration}: Val loss {report['val_loss']:.3f}, dense "
            f"{report['dense_loss']:.3f}, KL to dense {report['val_kl']:.3f} (mean of tasks "
            f"{report['mean_task_kl']:.3f}) at k = {self.model.k}, same token "
            f"{report['agreement']:.1%}, overlap between tasks "
            f"{'-' if between is None else f'{between:.3f}'}, dead channels "
            f"{report['dead_channels']:.1%}, Val took {report['val_time']:.1f}s",
        )
        warning = collapse_warning(report, self.model.k / self.model.channels)
        if warning and self.main and self.args.select_by != "static":
            print(f"[WARNING] {warning}", flush=True)
        self.reserve = max(self.reserve, 5.0 + 1.5 * (time.perf_counter() - start))

    def _warm_start(self) -> None:
        """Each process does the same."""
        args = self.args

        def report(numbers: dict[str, Any]) -> None:
            self.log(
                numbers,
                f"Warm start {numbers['warm_start_iteration']}: "
                f"{numbers['variance_explained']:.1%} of the variance explained",
            )

        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            fit_predictor(
                self.model, self.teacher, self.train_data, iters=args.warm_start_iters,
                examples=args.warm_start_examples, batch_size=64, batch_tokens=args.batch_tokens,
                seed=args.seed, report=report,
            )  # fmt: skip

    # -- files

    def _identity(self) -> dict[str, Any]:
        processes = self.accelerator.num_processes
        return identity(self.args, self.train_data.examples, processes)

    def _save_state(self) -> None:
        usual = self.odd_steps.usual
        where = {
            "iteration": self.iteration,
            "trained_tokens": self.trained_tokens,
            "seconds": time.time() - self.begin,
            "usual_norm": None if usual is None else usual.item(),
            "identity": self._identity(),
        }
        save_state(self.accelerator, self.output, where)

    def _resume(self) -> None:
        where = load_state(self.accelerator, self.output, self._identity())
        self.iteration, self.trained_tokens = where["iteration"], where["trained_tokens"]
        self.seconds_before = where["seconds"]
        if where["usual_norm"] is not None:
            self.odd_steps.usual = torch.tensor(where["usual_norm"], device=self.device)

    def finish(self) -> None:
        """Write the checkpoint, then validate: weights come first."""
        args = self.args
        # Weights that are divided among processes come together on the first.
        state = self.accelerator.get_state_dict(self.step)
        if self.main:
            save_checkpoint(
                self.output, self.model, *self.tokenizers,
                {
                    "keep_range": [self.low, self.high],
                    "select_by": args.select_by,
                    "training": {
                        "iters": self.iteration, "tokens": self.trained_tokens,
                        "stage": args.stage, "distill_weight": args.distill_weight,
                        "seconds": round(time.time() - START, 1),
                    },
                    "quantization": None if self.rounding is None
                    else {"bits": args.q_bits, "group_size": args.q_group_size,
                          "bits_of": bits_of_parts(args.q_bits_of)},
                },
                dtype=getattr(torch, args.save_dtype), shard_size=args.shard_size,
                state={name.removeprefix("model."): tensor for name, tensor in state.items()},
            )  # fmt: skip
            print(f"Saved {self.output}", flush=True)
        if self.valid_data is not None:
            self.validate()


def main() -> None:
    """Run the command."""
    args = setup_arg_parser().parse_args()
    check_options(args)
    try:
        Trainer(args).train()
    except (DataError, ModelError) as error:
        raise fail(error) from error
    except torch.cuda.OutOfMemoryError as error:
        raise fail(
            "the GPU's memory is full; lower --batch-tokens (with --grad-accumulation-steps), use "
            "--grad-checkpoint, or lower --loss-block"
        ) from error
    except OSError as error:
        raise fail(f"{error}; nothing that was there is lost") from error
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
