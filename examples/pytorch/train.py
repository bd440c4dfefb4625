"""Train an LLM and its sparsity predictor together: Instruction-Following Pruning in PyTorch.

    python train.py --model DIR --data train.jsonl --output run --predictor-layers 4 \
        --keep 0.5 1.0 --distill-weight 1 --iters 1000
    accelerate launch train.py ...

The method is that of Hou et al., ICML 2025 (arXiv 2501.02086), section 3. ``mlx_ifp.convert --model
run`` turns the result into a checkpoint for MLX.
"""

import time

START = time.time()  # a time limit counts the imports, too

import argparse  # noqa: E402
import contextlib  # noqa: E402
import copy  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import resource  # noqa: E402
import shutil  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from accelerate.utils import broadcast, set_seed  # noqa: E402
from data import BatchOrder, DataError, DeviceData, by_length, draw_k, load_examples  # noqa: E402
from losses import blockwise_loss, terms  # noqa: E402
from masks import OPERATORS  # noqa: E402
from model import (  # noqa: E402
    MaskedLM,
    ModelError,
    Predictor,
    StaticScores,
    first_layers,
    load_backbone,
    load_llm,
)
from rounding import BITS, GROUP_SIZES, Rounding  # noqa: E402
from save import is_checkpoint, load_checkpoint, save_checkpoint  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402
from validate import collapse_warning, validate  # noqa: E402
from warm_start import fit_predictor  # noqa: E402

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STATE = "state"  # in the output directory, of a run that can be resumed


def setup_arg_parser() -> argparse.ArgumentParser:
    """The options of a run."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", required=True, help="Directory of a dense model, or of a trained checkpoint")
    add("--teacher", help="Dense model to distil from and compare with (default: --model)")
    add("--data", required=True, help="JSONL file, or a directory with train.jsonl (valid.jsonl)")
    add("--valid", help="JSONL file to validate on (default: valid.jsonl of the directory, if any)")
    add("--output", required=True, help="New directory for checkpoint, log and state")
    add("--resume", action="store_true", help="Go on from the state in --output")
    add("--stage", choices=["sft", "pretrain"], default="sft", help="The paper's two stages")
    add("--max-length", type=int, default=1024, help="Longer rows are left out, in tokens")
    add("--chunk-size", type=int, default=256, help="Tokens of a chunk, for --stage pretrain")
    group = parser.add_argument_group("masks and predictor")
    add = group.add_argument
    add("--keep", type=float, nargs="+", default=[0.5], metavar="K",
        help="Channels kept in each layer, a count or a share up to 1.0; two: k is drawn anew from "
        "this range in each step")  # fmt: skip
    add("--valid-keep", type=float, help="k of validations (default: middle of --keep)")
    add("--select-by", choices=["prompt", "task", "static"], default="prompt",
        help="The prompt, the description of its task, or nothing: one mask for all")  # fmt: skip
    add("--task-descriptions", help="YAML file: task -> description, for --select-by task")
    add("--predictor-layers", type=int, help="The predictor is the LLM's first so many layers")
    add("--predictor-model", help="Directory of a pretrained predictor backbone")
    add("--mask", choices=["soft", "straight_through"], default="straight_through",
        help="Values of the mask in training; straight_through is 0 or 1")  # fmt: skip
    add("--mask-operator", choices=OPERATORS, default="sigmoid", help="SoftTopK")
    add("--mask-temperature", type=float, default=0.1, help="Epsilon of SoftTopK at the end")
    add("--mask-temperature-start", type=float, help="At the beginning (default: the same)")
    add("--blend-iters", type=int, default=0, help="Steps in which the mask rises from none")
    add("--warm-start-iters", type=int, default=0,
        help="Steps that fit the predictor to the dense model's activations first")  # fmt: skip
    add("--warm-start-examples", type=int, default=2048, help="Training examples used for that")
    group = parser.add_argument_group("optimization")
    add = group.add_argument
    add("--iters", type=int, help="Steps of the optimizer")
    add("--minutes", type=float, help="Time limit of the whole command, last save included")
    add("--distill-weight", type=float, default=0.0,
        help="Share of KL(dense || masked) in the loss; the rest is cross-entropy")  # fmt: skip
    add("--distill-on", choices=["all", "answer"], default="all", help="Tokens that are distilled")
    add("--learning-rate", type=float, default=1e-4, help="AdamW's, of the LLM")
    add("--predictor-learning-rate", type=float, default=1e-4, help="AdamW's, of the predictor")
    add("--schedule", choices=["cosine", "linear", "constant"], default="cosine",
        help="How the rates fall to 0 at the end")  # fmt: skip
    add("--warmup-iters", type=int, default=20, help="Steps in which the rates rise")
    add("--weight-decay", type=float, default=0.01, help="AdamW's, of matrices")
    add("--max-grad-norm", type=float, default=1.0, help="Gradients are clipped; 0 for never")
    add("--skip-above", type=float, default=5.0,
        help="A step is skipped if its gradients' norm is so many times the usual one")  # fmt: skip
    add("--batch-tokens", type=int, default=16384, help="Tokens of a batch, padding included")
    add("--grad-accumulation-steps", type=int, default=1, help="Batches of a step, each process")
    add("--seed", type=int, default=0)
    group = parser.add_argument_group("rounded weights")
    add = group.add_argument
    add("--quantize-from", type=float, default=1.0,
        help="From this share of the run on the weights are those of convert -q")  # fmt: skip
    add("--q-bits", type=int, default=4, help="As for mlx_ifp.convert")
    add("--q-group-size", type=int, default=64, help="As for mlx_ifp.convert")
    group = parser.add_argument_group("memory and speed")
    add = group.add_argument
    add("--dtype", choices=["bfloat16", "float32"], default="bfloat16",
        help="Of computation; weights are trained in float32")  # fmt: skip
    add("--compile", action="store_true", help="torch.compile layers and loss")
    add("--grad-checkpoint", action="store_true", help="Recompute activations to save memory")
    add("--loss-block", type=int, help="Positions whose logits are in memory at once")
    group = parser.add_argument_group("reports and files")
    add = group.add_argument
    add("--steps-per-report", type=int, default=10)
    add("--steps-per-eval", type=int, default=0, help="0: only at the beginning and at the end")
    add("--valid-examples", type=int, default=512, help="Used, evenly spread")
    add("--save-every", type=int, default=0, help="Steps between states to resume from; 0: none")
    add("--save-dtype", choices=DTYPES, default="float16", help="Of the weights in the checkpoint")
    add("--shard-size", default="4GB", help="Of the LLM's files at most, for instance 16MB")
    return parser


def fail(message: object) -> SystemExit:
    """The end of a run, in one line."""
    return SystemExit(f"train.py: {message}")


def check_options(args: argparse.Namespace) -> None:
    """End with one line if options are out of range or contradict one another."""
    for name, low, high in (
        ("distill_weight", 0, 1), ("quantize_from", 0, 1), ("weight_decay", 0, math.inf),
        ("learning_rate", 0, math.inf), ("predictor_learning_rate", 0, math.inf),
        ("batch_tokens", 1, math.inf), ("grad_accumulation_steps", 1, math.inf),
        ("steps_per_report", 1, math.inf), ("max_length", 2, math.inf), ("seed", 0, 2**32 - 1),
        ("chunk_size", 1, math.inf), ("skip_above", 1, math.inf),
        ("blend_iters", 0, math.inf), ("warmup_iters", 0, math.inf),
    ):  # fmt: skip
        if not low <= getattr(args, name) <= high:
            flag = "--" + name.replace("_", "-")
            raise fail(f"{flag} must be from {low} to {high}, not {getattr(args, name)}")
    for name in ("mask_temperature", "mask_temperature_start", "iters", "minutes", "loss_block"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise fail(f"--{name.replace('_', '-')} must be above 0, not {value}")
    if args.q_bits not in BITS or args.q_group_size not in GROUP_SIZES:
        raise fail(f"--q-bits must be one of {BITS}, --q-group-size one of {GROUP_SIZES}")
    if args.iters is None and args.minutes is None:
        raise fail("say how long to train: --iters or --minutes")
    if len(args.keep) > 2:
        raise fail("--keep takes one number, or the two ends of a range")
    if args.select_by == "static" and (args.predictor_layers or args.predictor_model):
        raise fail("--select-by static has no predictor; leave out --predictor-layers or -model")
    if args.predictor_layers and args.predictor_model:
        raise fail("the predictor is --predictor-layers or --predictor-model, not both")
    if (args.select_by == "task") != (args.task_descriptions is not None):
        raise fail("--select-by task and --task-descriptions go together")
    if args.select_by == "task" and args.stage == "pretrain":
        raise fail("in --stage pretrain chunks select; use --select-by prompt or static")
    output = Path(args.output)
    if args.resume and not (output / STATE).is_dir():
        raise fail(f"{output} has no state to resume from; a run saves it with --save-every")
    # The first of several processes may have made it already.
    if output.exists() and not args.resume and os.environ.get("RANK", "0") == "0":
        raise fail(f"{output} exists; name a new directory, or --resume the run in it")


def count_of(keep: float, channels: int) -> int:
    """A count, or a share up to 1.0, as a number of channels."""
    count = round(keep * channels) if keep <= 1 else int(keep)
    if not 1 <= count <= channels:
        raise fail(f"--keep {keep:g} is not between 1 and the {channels} channels of a layer")
    return count


def load_models(args: argparse.Namespace) -> tuple[MaskedLM, MaskedLM, Any, Any]:
    """The model to train and the frozen dense one, both in float32, and both tokenizers."""
    if is_checkpoint(args.model) and not (args.predictor_layers or args.predictor_model):
        model, tokenizer, predictor_tokenizer, manifest = load_checkpoint(args.model)
        if args.select_by != "static" and manifest.get("select_by") == "static":
            raise fail(f"{args.model} has no predictor; name --predictor-layers")
    else:
        llm = load_llm(args.model)
        tokenizer = predictor_tokenizer = AutoTokenizer.from_pretrained(args.model)
        model = MaskedLM(llm)
        shape = (model.layers, model.channels)
        if args.select_by == "static":
            model.predictor = StaticScores(*shape)
        elif args.predictor_model:
            model.predictor = Predictor(load_backbone(args.predictor_model), *shape)
            predictor_tokenizer = AutoTokenizer.from_pretrained(args.predictor_model)
        elif args.predictor_layers:
            model.predictor = Predictor(first_layers(llm, args.predictor_layers), *shape)
        else:
            raise fail("name the predictor: --predictor-layers N or --predictor-model DIR")
    model.operator, model.mode = args.mask_operator, args.mask
    model.temperature = args.mask_temperature
    model.check_logits()
    # A copy, before training gives the student other weights.
    dense = load_llm(args.teacher) if args.teacher else copy.deepcopy(model.llm)
    return model, MaskedLM(dense.requires_grad_(False)), tokenizer, predictor_tokenizer


class Step(nn.Module):
    """The loss of a batch, as one module: what accelerate wraps for several processes.

    Args:
        model (MaskedLM): what is trained.
        teacher (MaskedLM): the frozen dense model, or None; no part of the module.
        dtype (torch.dtype): of computation.
        block (int): positions whose logits are made at once.
        terms_of (Callable): of :func:`losses.blockwise_loss`.
    """

    def __init__(
        self,
        model: MaskedLM,
        teacher: MaskedLM | None,
        dtype: torch.dtype,
        block: int,
        terms_of: Any = terms,
    ) -> None:
        super().__init__()
        self.model = model
        self.settings = (teacher, dtype, block, terms_of)

    def forward(self, work: str, *args: Any) -> Any:
        """``loss`` or ``measure``: what shards a module's weights gathers them around this call."""
        return getattr(self, work)(*args)

    def measure(self, teacher: MaskedLM, data: DeviceData, batches: Any, k: int) -> dict[str, Any]:
        """What :func:`validate.validate` says."""
        _, dtype, block, _ = self.settings
        with torch.autocast(data.device.type, dtype, enabled=dtype != torch.float32):
            return validate(self.model, teacher, data, batches, k, block=block, dtype=dtype)

    def loss(
        self, batch: Any, k: int, temperature: float, blend: float, ce: float, kl: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, and as values its cross-entropy and KL.

        Args:
            batch (Batch): of ``data.py``.
            k (int): channels kept.
            temperature (float): of SoftTopK.
            blend (float): 0 is the dense model, 1 the masked one.
            ce, kl (float): what an answer's token counts for in the cross-entropy, and any token
                whose position is in the batch in the KL.
        """
        teacher, dtype, block, terms_of = self.settings
        model, device = self.model, batch.tokens.device
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            scores = model.scores(batch.selecting, batch.selecting_mask)
            masks = model.masks(scores, k, temperature=temperature)
            hidden = model.hidden(batch.tokens, masks, blend)
            hidden = hidden.flatten(0, 1).index_select(0, batch.places)
            dense = None
            if teacher is not None and kl:
                with torch.no_grad():
                    theirs = teacher.hidden(batch.tokens).flatten(0, 1)[batch.places]
                dense = (theirs, teacher.llm.get_output_embeddings().weight)
            loss, *parts = blockwise_loss(
                hidden,
                model.llm.get_output_embeddings().weight,
                model.logits,
                dense,
                batch.labels,
                batch.answer * ce,
                batch.every * kl,
                block=block,
                dtype=dtype,
                terms_of=terms_of,
            )
        return loss, *parts


def try_compile(
    model: MaskedLM, teacher: MaskedLM | None, device: torch.device
) -> tuple[Any, str | None]:
    """Compile the layers and the terms of the loss; says why not, if it cannot be done.

    One graph serves all layers, and shapes are symbols in it: one compilation a model.
    """
    try:
        # The mask is an attribute of a module, and has as many rows as the batch.
        torch._dynamo.config.force_nn_module_property_static_shapes = False
        # A batch of as many rows as a head has values is no special case.
        torch.fx.experimental._config.use_duck_shape = False
        torch._dynamo.config.cache_size_limit = 64
        # A trial: a missing compiler shows here, and not in the middle of a step.
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=device))
    except Exception as error:  # of many kinds
        return terms, " ".join(str(error).split())[:200]
    for each in (model, teacher):
        for layer in each.llm.get_decoder().layers if each is not None else ():
            layer.compile(dynamic=True)
    return torch.compile(terms, dynamic=False), None


class Trainer:
    """A run: its data, its optimizer, where it is, and what it writes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.output = args, Path(args.output)
        # Without being told, processes on CPUs would not find one another.
        self.accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.dtype = DTYPES[args.dtype]
        on_gpu = self.device.type == "cuda"
        self.block = args.loss_block or (2048 if on_gpu else 256)
        set_seed(args.seed)
        self.model, self.teacher, self.tokenizer, self.predictor_tokenizer = load_models(args)
        ends = sorted(count_of(keep, self.model.channels) for keep in args.keep)
        self.low, self.high = ends[0], ends[-1]
        self.valid_k = self._middle()
        self.model.k = self.valid_k
        self.train_data, self.valid_data = self._load_data()
        self.order = BatchOrder(self.train_data.lengths, args.batch_tokens, args.seed)
        self.rounding: Rounding | None = None
        self.iteration = self.trained_tokens = 0
        self.pieces, self.compiled = 1, False
        # The gradients' usual norm, and how many steps were skipped; both stay on the device.
        self.usual_norm: Tensor | None = None
        self.skipped = torch.zeros((), device=self.device)
        self.now = 0.0  # the share of the run that is done
        self.seconds_before = 0.0  # of earlier sessions of this run
        self.reserve = 5.0  # seconds that the last validation and save take

    def _middle(self) -> int:
        """k of validations and of the checkpoint's manifest."""
        if self.args.valid_keep is not None:
            return count_of(self.args.valid_keep, self.model.channels)
        middle = (self.low + self.high) // 2
        nearest = round(middle / 64) * 64
        return nearest if self.low <= nearest <= self.high and self.low < self.high else middle

    def _load_data(self) -> tuple[DeviceData, DeviceData | None]:
        args, data = self.args, Path(self.args.data)
        train = data / "train.jsonl" if data.is_dir() else data
        valid = Path(args.valid) if args.valid else data / "valid.jsonl" if data.is_dir() else None
        if valid is not None and not args.valid and not valid.exists():
            valid = None
        descriptions = None
        if args.task_descriptions:
            try:
                descriptions = yaml.safe_load(Path(args.task_descriptions).read_text())
            except (OSError, ValueError, yaml.YAMLError) as error:
                raise DataError(f"{args.task_descriptions} cannot be read ({error})") from error
            good = isinstance(descriptions, dict) and all(
                isinstance(text, str) for text in descriptions.values()
            )
            if not good:
                raise DataError(f"{args.task_descriptions} must map each task to a description")

        def load(path: Path) -> DeviceData:
            examples = load_examples(
                path, self.tokenizer, self.predictor_tokenizer, stage=args.stage,
                max_length=args.max_length, chunk_size=args.chunk_size, descriptions=descriptions,
            )  # fmt: skip
            return DeviceData(examples, self.device, self.block)

        return load(train), load(valid) if valid else None

    # -- what a run says

    def log(self, report: dict[str, Any], line: str) -> None:
        """Append a report to log.jsonl, and print a line."""
        if self.main:
            with open(self.output / "log.jsonl", "a") as file:
                file.write(json.dumps(report) + "\n")
            print(line, flush=True)

    def identity(self) -> dict[str, Any]:
        """What two sessions of one run have in common."""
        names = ("model", "teacher", "stage", "keep", "select_by", "predictor_layers",
                 "predictor_model", "mask", "mask_operator", "mask_temperature",
                 "mask_temperature_start", "blend_iters", "distill_weight", "distill_on",
                 "batch_tokens", "grad_accumulation_steps", "seed", "dtype")  # fmt: skip
        digest = hashlib.sha256()
        for example in self.train_data.examples:
            parts = (example.offset, len(example.tokens), *example.tokens, *example.selecting)
            digest.update(np.array(parts, np.int32))
        processes = {"processes": self.accelerator.num_processes}
        return {n: getattr(self.args, n) for n in names} | {"data": digest.hexdigest()} | processes

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
            for layer in self.teacher.llm.get_decoder().layers:
                for module in layer.modules():
                    if isinstance(module, nn.Linear):
                        module.to(self.dtype)
        if args.grad_checkpoint:
            self.model.llm.gradient_checkpointing_enable({"use_reentrant": False})
            self.model.llm.train()
            self.model.keep_masks = True
        distils = args.distill_weight > 0
        terms_of = terms
        if args.compile:
            terms_of, problem = try_compile(
                self.model, self.teacher if distils else None, self.device
            )
            self.compiled = problem is None
            if problem and self.main:
                print(f"[WARNING] not compiled, which is slower: {problem}", flush=True)
        step = Step(self.model, self.teacher if distils else None, self.dtype, self.block, terms_of)
        self.optimizer = self._optimizer()
        self.step, self.optimizer = self.accelerator.prepare(step, self.optimizer)
        if args.quantize_from < 1:
            # Of the weights as they are now: several processes may hold a part each.
            self.rounding = Rounding(
                self.model.llm, self.model.downs, args.q_bits, args.q_group_size,
                DTYPES[args.save_dtype],
            )  # fmt: skip
        if args.resume:
            self._resume()
        elif self.valid_data is not None:
            self.validate()
        self.begin = time.time() - self.seconds_before
        self.end = START + 60 * args.minutes - self.reserve if args.minutes else math.inf
        sums, tokens, last_report = [], 0, time.perf_counter()
        while (now := self.progress()) < 1:
            self.now = now
            values, seen = self.update(now)
            sums.append(values)
            tokens += seen
            self.trained_tokens += seen
            self.iteration += 1
            if self.iteration % args.steps_per_report == 0 or self.iteration == args.iters:
                self._report(sums, tokens, time.perf_counter() - last_report)
                sums, tokens, last_report = [], 0, time.perf_counter()
            evaluates = args.steps_per_eval and self.iteration % args.steps_per_eval == 0
            if evaluates and self.valid_data is not None:
                self.validate()
                last_report = time.perf_counter()
            if args.save_every and self.iteration % args.save_every == 0:
                self._save_state()
                last_report = time.perf_counter()
        if sums:
            self._report(sums, tokens, time.perf_counter() - last_report)
        self.finish()

    def progress(self) -> float:
        """The share of the run that is done: of its steps or of its time, the larger."""
        share = self.iteration / self.args.iters if self.args.iters else 0.0
        if self.args.minutes:
            share = max(share, (time.time() - self.begin) / max(self.end - self.begin, 1e-9))
            if self.accelerator.num_processes > 1:
                # All processes go by the clock of the first.
                share = broadcast(torch.tensor(share, device=self.device)).item()
        return share

    def _rate(self, progress: float) -> float:
        """What the learning rates are multiplied with."""
        warm = min(1.0, (self.iteration + 1) / (self.args.warmup_iters + 1))
        falling = {
            "cosine": (1 + math.cos(math.pi * progress)) / 2,
            "linear": 1 - progress,
            "constant": 1.0,
        }[self.args.schedule]
        return warm * falling

    def _optimizer(self) -> torch.optim.Optimizer:
        """AdamW for the LLM and the predictor, each with its own rate."""
        args, of_llm = self.args, {id(p) for p in self.model.llm.parameters()}
        groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
        for parameter in self.model.parameters():
            kind = (id(parameter) in of_llm, parameter.ndim > 1)
            groups.setdefault(kind, []).append(parameter)
        return torch.optim.AdamW(
            [
                {
                    "params": parameters,
                    "base": args.learning_rate if llm else args.predictor_learning_rate,
                    "weight_decay": args.weight_decay if matrix else 0.0,
                }
                for (llm, matrix), parameters in groups.items()
            ],
            lr=args.learning_rate,
            betas=(0.9, 0.95),
            fused=self.device.type == "cuda",
        )

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
        self._clip()
        rate = self._rate(progress)
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total, every

    def _clip(self) -> None:
        """Clip gradients, and let a step count for nothing whose gradients are far from usual.

        A rate of 6e-4 went well for 320 steps, then one bad stretch undid all of them: the loss
        rose from 0.45 to 1.9 and the masks collapsed. Nothing here waits for the device.
        """
        args = self.args
        norm = self.accelerator.clip_grad_norm_(
            self.step.parameters(), args.max_grad_norm or math.inf
        )
        # With FSDP2 both are divided among the processes.
        norm = (norm.full_tensor() if hasattr(norm, "full_tensor") else norm).detach().float()
        usual = norm if self.usual_norm is None else self.usual_norm
        odd = norm > args.skip_above * usual
        # An odd step moves what is usual a little: if it goes on, it is the new usual.
        self.usual_norm = torch.where(odd, 1.02 * usual, 0.98 * usual + 0.02 * norm)
        self.skipped += odd.float()
        keep = (~odd).float()
        for parameter in self.step.parameters():
            grad = parameter.grad
            if grad is not None:
                (grad.to_local() if hasattr(grad, "to_local") else grad).mul_(keep)

    def _gradients(self, own: list[np.ndarray], on: str, inputs: tuple[Any, ...]) -> Tensor:
        """Add up gradients of this process's batches; the summed loss and its parts.

        A batch that does not fit the GPU is cut in two, and so are all that follow. If the first
        one cannot be compiled, nothing is.
        """
        accelerator = self.accelerator
        while True:
            pieces = [piece for indices in own for piece in np.array_split(indices, self.pieces)]
            pieces = [piece for piece in pieces if len(piece)]
            total, problem = torch.zeros(3, device=self.device), ""
            try:
                for i, piece in enumerate(pieces):
                    batch = self.train_data.batch(piece, on)
                    last = i == len(pieces) - 1
                    with contextlib.nullcontext() if last else accelerator.no_sync(self.step):
                        loss, *parts = self.step("loss", batch, *inputs)
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
                reason = " ".join(str(error).split())[:300]
                problem = f"not compiled, which is slower: {type(error).__name__}: {reason}"
                self._do_without_compiling()
            # Outside of the handlers, which keep the failed step's tensors alive.
            print(f"[WARNING] {problem}", flush=True)
            self.optimizer.zero_grad()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()

    def _do_without_compiling(self) -> None:
        self.compiled = False
        torch.compiler.set_stance("force_eager")

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
            states = sorted((self.output / STATE).glob("step-*"))
            left = f"the last state is {states[-1]}" if states else "no state was saved"
            raise fail(
                f"the loss is {loss} before iteration {self.iteration}; {left}; lower "
                "--learning-rate"
            )
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 1e9
        else:
            # Linux counts in KB, macOS in bytes.
            unit = 1 if sys.platform == "darwin" else 1024
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
        rates = sorted({(g["base"], g["lr"]) for g in self.optimizer.param_groups})
        of = {base: rate for base, rate in rates}
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
            "peak_memory": peak,
            "k": draw_k(self.low, self.high, self.iteration - 1, self.args.seed),
            "progress": self.now,
            "skipped_updates": int(self.skipped.item()),
            "rounded": self.rounding is not None and self.now >= self.args.quantize_from,
            "seconds": time.time() - START,
        }
        self.log(
            report,
            f"Iter {self.iteration}: Train loss {loss:.3f}, Learning Rate "
            f"{report['learning_rate']:.3e}, Tokens/sec {report['tokens_per_second']:.1f}, "
            f"Trained Tokens {self.trained_tokens}, Peak mem {peak:.2f} GB, {self.now:.0%} done",
        )

    def validate(self) -> None:
        """Validate, each process alike, and report."""
        start = time.perf_counter()
        batches = by_length(self.valid_data, self.args.batch_tokens, self.args.valid_examples)
        # Other shapes and no gradients: compiling them would take longer than this.
        with torch.compiler.set_stance("force_eager"), self._rounded(self.now), torch.no_grad():
            report = self.step("measure", self.teacher, self.valid_data, batches, self.valid_k)
        report = {"iteration": self.iteration, **report}
        between = report["overlap_between"]
        self.log(
            report,
            f"Iter {self.iteration}: Val loss {report['val_loss']:.3f}, dense "
            f"{report['dense_loss']:.3f}, KL to dense {report['val_kl']:.3f} (mean of tasks "
            f"{report['mean_task_kl']:.3f}) at k = {self.valid_k}, same token "
            f"{report['agreement']:.1%}, overlap between tasks "
            f"{'-' if between is None else f'{between:.3f}'}, dead channels "
            f"{report['dead_channels']:.1%}, Val took {report['val_time']:.1f}s",
        )
        share = self.valid_k / self.model.channels
        warning = collapse_warning(report, share)
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

    def _save_state(self) -> None:
        """What is needed to go on; the one before is removed afterwards."""
        target = self.output / STATE / f"step-{self.iteration:08}"
        temporary = target.with_name(".saving")
        if self.main:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(temporary), safe_serialization=False)
        if self.main:
            where = {
                "iteration": self.iteration,
                "trained_tokens": self.trained_tokens,
                "seconds": time.time() - self.begin,
                "usual_norm": None if self.usual_norm is None else self.usual_norm.item(),
                "identity": self.identity(),
            }
            (temporary / "run.json").write_text(json.dumps(where))
            others = list(target.parent.glob("step-*"))
            temporary.rename(target)
            for other in others:
                shutil.rmtree(other)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        states = sorted((self.output / STATE).glob("step-*"))
        if not states:
            raise fail(f"{self.output / STATE} holds no state; start again with another --output")
        where = json.loads((states[-1] / "run.json").read_text())
        for name, value in json.loads(json.dumps(self.identity())).items():
            theirs = where["identity"].get(name)
            if theirs != value:
                raise fail(
                    f"{states[-1]} is of another run: its {name} is {theirs!r}, here it is "
                    f"{value!r}; resume with the same, or name another --output"
                )
        self.accelerator.load_state(str(states[-1]))
        self.iteration, self.trained_tokens = where["iteration"], where["trained_tokens"]
        self.seconds_before = where["seconds"]
        if where.get("usual_norm") is not None:
            self.usual_norm = torch.tensor(where["usual_norm"], device=self.device)

    def finish(self) -> None:
        """Write the checkpoint, then validate: weights come first."""
        args = self.args
        # Weights that are divided among processes come together on the first.
        state = self.accelerator.get_state_dict(self.step)
        if self.main:
            save_checkpoint(
                self.output, self.model, self.tokenizer, self.predictor_tokenizer,
                {
                    "keep_range": [self.low, self.high],
                    "select_by": args.select_by,
                    "training": {
                        "iters": self.iteration, "tokens": self.trained_tokens,
                        "stage": args.stage, "distill_weight": args.distill_weight,
                        "seconds": round(time.time() - START, 1),
                    },
                    "quantization": None if self.rounding is None
                    else {"bits": args.q_bits, "group_size": args.q_group_size},
                },
                dtype=DTYPES[args.save_dtype], shard_size=args.shard_size,
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
