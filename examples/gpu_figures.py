"""Does it run on this device, and how fast? Checks against the CPU, and the paper's latency table.

    python examples/gpu_figures.py --output figures --seconds 400

*Checks*: each thing the package does is done on MLX's default device and, in another process, on
the CPU, and the numbers are compared. A check that fails, hangs or ends its process does not stop
the others. MLX multiplies float32 with TF32 on a CUDA card unless ``MLX_ENABLE_TF32`` is 0, which
it is here.

*Table*: random weights in the shapes of the paper's 9B -> 3B model (``mlx_ifp.benchmark --shapes``
makes the same ones), divided by ``--scale``. The checkpoint is written and each network is made
once; then prompts of 4,000 and 512 tokens are answered by one and by four samples, and the
networks decode in turns. The most wanted figures come first, and whatever time is left is used.

On a card the checks take four minutes, most of it to compile kernels. They disturb what is timed,
so measure in a run of its own:

    python examples/gpu_figures.py --no-table --seconds 480 --output checks
    python examples/gpu_figures.py --checks --seconds 300 --output figures

Everything is written at once, to ``checks.jsonl`` and ``table.jsonl``; a short table ends the run.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CPU_SCALE = 16
TINY_SCALE = 16
TINY = ("float32", "bfloat16", "4-bit")
TOKENS = [5, 77, 130, 9, 42, 200, 31, 17, 3, 250, 61, 8, 99, 120, 54, 1]
TEXT = "You are an expert Python programmer."
# Seconds for one check at most. On CUDA each kernel of a quantized matrix product is compiled when
# it is first used, for 20 seconds.
CHECK_LIMIT = 240.0
# How a process ends after an error that may have left the device unusable for it.
START_AGAIN = 75
# What a check may differ from the CPU by, relative to the largest number of an array.
FLOAT32 = 1e-4
BFLOAT16 = 5e-2


# -- what runs in the worker processes; there MLX is imported


class Checks:
    """The checks of one device. Methods named ``check_...`` give a dict of what was seen.

    Arrays in it are compared with the CPU's, other values are shown. An ``error`` of a check is
    compared with its ``limit``.

    Args:
        folder (Path): holds the tiny checkpoints.
        quick (bool): small sizes.
    """

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick

    def _model(self, name: str, **options: Any) -> Any:
        import mlx.core as mx

        from mlx_ifp import load

        dtype = mx.bfloat16 if name == "bfloat16" else mx.float32
        return load(self.folder / name, cache=False, **{"dtype": dtype, **options})

    def _selection(self, model: Any, seed: int, share: float = 0.3) -> Any:
        """The same random channels on every device."""
        from mlx_ifp import Selection

        random, d_ffn = np.random.default_rng(seed), model.checkpoint.d_ffn
        layers = tuple(
            np.sort(random.choice(d_ffn, int(share * d_ffn), replace=False)).astype(np.int32)
            for _ in model.checkpoint.ffns
        )
        return Selection(layers, None, d_ffn, model.checkpoint.digest)

    def check_device(self) -> dict[str, Any]:
        """What MLX says of the device, and what the package makes of it."""
        import mlx.core as mx

        from mlx_ifp.device import default_cache_bytes, default_dtype, shares_memory

        return {
            "mlx": mx.__version__,
            "device": str(mx.default_device()),
            "info": mx.device_info(),
            "default_dtype": str(default_dtype()),
            "default_cache_bytes": default_cache_bytes(),
            "shares_memory": shares_memory(),
            "python": sys.version.split()[0],
            "cores": os.cpu_count(),
        }

    def check_quantized_matmul(self) -> dict[str, Any]:
        """``transpose=False`` against numpy: the down projections of quantized sub-networks."""
        import mlx.core as mx

        seen, worst = {}, 0.0
        random = np.random.default_rng(0)
        for mode, bits, group in (("affine", 4, 64), ("affine", 8, 64), ("mxfp4", 4, 32)):
            weight = mx.array(random.normal(size=(1216, 256)).astype(np.float32))
            quantized = mx.quantize(weight, group_size=group, bits=bits, mode=mode)
            how = {"group_size": group, "bits": bits, "mode": mode}
            exact = mx.dequantize(*quantized, **how).astype(mx.float32)
            exact = np.array(exact).astype(np.float64)
            # Fewer of the rarer modes: what compiles them takes longer than they do.
            for tokens in (1, 64) if (mode, bits) == ("affine", 4) else (1,):
                x = random.normal(size=(tokens, 1216)).astype(np.float32)
                biases = quantized[2] if len(quantized) > 2 else None
                for dtype in (mx.float32, mx.bfloat16):
                    got = mx.quantized_matmul(
                        mx.array(x).astype(dtype),
                        quantized[0],
                        scales=quantized[1],
                        biases=biases,
                        transpose=False,
                        **how,
                    )
                    error = _error(np.array(got.astype(mx.float32)), x @ exact)
                    seen[f"{mode} {bits} {str(dtype).split('.')[-1]} {tokens}"] = error
                    if dtype == mx.float32:
                        worst = max(worst, error)
        return {"errors": seen, "error": worst, "limit": FLOAT32}

    def check_writing_in_place(self) -> dict[str, Any]:
        """Whether the device sees what the processor writes to an evaluated array, and how often.

        Not needed where ``shares_memory`` is false; said for the record.
        """
        import mlx.core as mx

        array = mx.zeros((64, 1024), mx.uint16)
        view = array.view(mx.bfloat16)
        mx.eval(array, view)
        np.frombuffer(memoryview(array), np.uint16)[:] = 0x3F80
        first = float(view.astype(mx.float32).sum())
        np.frombuffer(memoryview(array), np.uint16)[:] = 0x4000
        second = float(view.astype(mx.float32).sum())
        return {"seen": [first == 65536.0, second == 131072.0]}

    def check_copies(self) -> dict[str, Any]:
        """GB/s of ways to bring rows to the device, and of reading them there again."""
        import mlx.core as mx

        from mlx_ifp.device import copy_to_device

        megabytes = 8 if self.quick else 256
        rows = np.ones((megabytes << 8, 4096), np.uint8)

        def read(array: Any) -> float:
            start = time.perf_counter()
            mx.eval(array.view(mx.uint32).sum())
            return rows.nbytes / (time.perf_counter() - start) / 1e9

        def written() -> Any:
            array = mx.zeros(rows.shape, mx.uint8)
            mx.eval(array)
            np.frombuffer(memoryview(array), np.uint8).reshape(rows.shape)[:] = rows
            return array

        seen = {}
        file = self.folder / "rows.safetensors"
        mx.save_safetensors(str(file), {"rows": mx.array(rows)})

        def loaded() -> Any:
            array = mx.load(str(file))["rows"]
            mx.eval(array)
            return array

        ways = {"mx.array": lambda: mx.array(rows), "copy_to_device": lambda: copy_to_device(rows),
                "written in place": written, "mx.load": loaded}  # fmt: skip
        read(mx.zeros(rows.shape, mx.uint8))
        for name, way in ways.items():
            for _ in range(2):
                start = time.perf_counter()
                array = way()
                mx.synchronize()
                made = rows.nbytes / (time.perf_counter() - start) / 1e9
                seen[name] = {"made": made, "read first": read(array), "read again": read(array)}
                del array
            mx.clear_cache()
        file.unlink()
        return {"gigabytes_a_second": seen}

    def check_reading_rows(self) -> dict[str, Any]:
        """Rows of the reader equal those that MLX loads."""
        import mlx.core as mx

        from mlx_ifp.checkpoint.directory import open_checkpoint
        from mlx_ifp.subnetwork.channels import ChannelReader

        rows, same = np.array([0, 1, 2, 9, 77, 500, 501, 1023], np.int32), []
        for name in TINY:
            checkpoint = open_checkpoint(self.folder / name)
            whole = mx.load(str(self.folder / name / "channels.safetensors"))
            reader = ChannelReader(checkpoint.channels)
            for tensor, expected in whole.items():
                some, every = reader.read([[(tensor, rows)], [(tensor, None)]])
                same.append(bool(mx.array_equal(some, expected[mx.array(rows)])))
                same.append(bool(mx.array_equal(every, expected)))
        return {"tensors": len(same), "error": same.count(False), "limit": 0}

    def _logits(self, name: str) -> dict[str, Any]:
        import mlx.core as mx

        model, _ = self._model(name)
        first, second = self._selection(model, 1), self._selection(model, 2)
        network = model.subnetwork(first)
        tokens = mx.array([TOKENS * 4])
        found = {
            f"logits of {n}": network(tokens[:, :n]).astype(mx.float32) for n in (1, 3, 16, 64)
        }
        found["dense"] = model.dense()(tokens).astype(mx.float32)
        # The dense model stands by: nothing is read for this one.
        prepared = model.prepare(selection=second)
        found["switched"] = prepared.network(tokens).astype(mx.float32)
        return {
            "bytes_read_by_the_switch": prepared.bytes_read,
            "arrays": {key: np.array(value) for key, value in found.items()},
        }

    def check_float32(self) -> dict[str, Any]:
        """Logits of a sub-network, of the dense model, and after a switch."""
        return self._logits("float32") | {"limit": FLOAT32}

    def check_bfloat16(self) -> dict[str, Any]:
        """The same in bfloat16, in which the CPU itself differs from float32 by a percent."""
        return self._logits("bfloat16") | {"limit": BFLOAT16}

    def check_quantized(self) -> dict[str, Any]:
        """The same of a 4-bit checkpoint; activations are float32."""
        return self._logits("4-bit") | {"limit": FLOAT32}

    def check_generation(self) -> dict[str, Any]:
        """Greedy tokens of ``stream_generate``, with their log-probabilities."""
        from mlx_ifp import stream_generate

        model, tokenizer = self._model("float32")
        given = {"selection": self._selection(model, 1), "max_tokens": 16}
        said = list(stream_generate(model, tokenizer, TOKENS, **given))
        chosen = [float(one.logprobs[one.token]) for one in said]
        tokens = [one.token for one in said]
        return {"arrays": {"tokens": np.array(tokens, np.float64), "logprobs": np.array(chosen)},
                "limit": FLOAT32}  # fmt: skip

    def check_selection(self) -> dict[str, Any]:
        """Scores of the predictor and of the activations, and the channels they choose.

        A channel at the border may fall to the other side: at most one in a thousand.
        """
        model, _ = self._model("float32")
        arrays = {}
        for selector in ("predictor", "activations"):
            arrays[f"scores, {selector}"] = np.array(model.scores(TEXT, selector=selector))
            arrays[f"mask, {selector}"] = model.select(TEXT, selector=selector).mask
        return {"arrays": arrays, "limit": FLOAT32}

    def check_training_step(self) -> dict[str, Any]:
        """The loss of a batch, all gradients, and the loss after one update."""
        import mlx.nn as nn
        from mlx.utils import tree_flatten

        from mlx_ifp.tuner.batches import make_batch
        from mlx_ifp.tuner.data import Example
        from mlx_ifp.tuner.predictor_start import from_checkpoint
        from mlx_ifp.tuner.source import load_source
        from mlx_ifp.tuner.step import (
            Mix,
            batch_loss,
            compiled_update,
            make_optimizer,
            positions_of,
        )
        from mlx_ifp.tuner.student import Student, choose_trainable
        from mlx_ifp.tuner.training_args import TrainingArgs

        source = load_source(str(self.folder / "float32"))
        start = from_checkpoint(source, None, False)
        student = Student(source.llm, source.ffns, start.backbone, start.head,
                          source.checkpoint.ifp, None, start.embedding)  # fmt: skip
        choose_trainable(student, "full", {})
        examples = [Example(TOKENS * 2, 8, TOKENS[i:], None) for i in (0, 4)]
        batch = make_batch(examples, [0, 1])
        positions, mix = positions_of(batch, "none"), Mix(1.0, 0.0, 0.0, 0.1, 1.0, 0)

        def loss_of(student: Any) -> Any:
            return batch_loss(student, batch, positions, None, mix)[0]

        loss, gradients = nn.value_and_grad(student, loss_of)(student)
        arrays = {name: np.array(gradient) for name, gradient in tree_flatten(gradients)}
        arrays["loss"] = np.array(loss)
        optimizer = make_optimizer(student, TrainingArgs())
        optimizer.init(student.trainable_parameters())
        compiled_update(student, optimizer, 1.0)(gradients)
        arrays["loss after an update"] = np.array(loss_of(student))
        # Gradients are sums of many terms, each rounded.
        return {"arrays": arrays, "limit": 10 * FLOAT32}

    def check_threads(self) -> dict[str, Any]:
        """Threads that load, switch and evict at once get what one thread gets."""
        import mlx.core as mx

        model, _ = self._model("float32")
        selections = [self._selection(model, seed) for seed in range(6)]
        tokens = mx.array([TOKENS])
        expected = [np.array(model.subnetwork(one)(tokens)) for one in selections]
        model.networks.clear()
        model.networks.max_bytes = model.networks.max_bytes and 3 * _bytes(
            model.subnetwork(selections[0])
        )
        errors: list[Any] = []

        def work(number: int) -> None:
            try:
                for i in range(12):
                    which = (number * 5 + i) % len(selections)
                    prepared = model.prepare(selection=selections[which])
                    with model.using(prepared) as network:
                        got = np.array(network(tokens))
                    errors.append(_error(got, expected[which]))
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        if any(thread.is_alive() for thread in threads):
            raise RuntimeError("a thread did not end in 30 s")
        for error in errors:
            if isinstance(error, Exception):
                raise error
        return {"runs": len(errors), "error": max(errors), "limit": FLOAT32}

    def check_memory(self) -> dict[str, Any]:
        """The estimate against what MLX holds, and a limit that is kept."""
        import gc

        import mlx.core as mx

        from mlx_ifp import IFPError
        from mlx_ifp.memory.budget import Estimator

        gc.collect()
        mx.clear_cache()
        before = mx.get_active_memory()
        model, _ = self._model("float32")
        network = model.subnetwork(self._selection(model, 1))
        mx.synchronize()
        held = mx.get_active_memory() - before
        estimator = Estimator(model.checkpoint, mx.float32)
        k = int(0.3 * model.checkpoint.d_ffn)
        expected = estimator.trunk + estimator.network([k] * len(model.checkpoint.ffns))
        del network
        try:
            self._model("float32", memory_limit=estimator.trunk // 2)
            refused = False
        except IFPError:
            refused = True
        limited, _ = self._model("float32", memory_limit=2 * expected + estimator.predictor)
        limited.prepare(TEXT)
        seen = {"held": held, "estimated": expected, "too_low_a_limit_is_refused": refused}
        return seen | {"error": abs(held / expected - 1) + (not refused), "limit": 0.1}

    def check_default_model(self) -> dict[str, Any]:
        """The package's own model, if it is installed: logits in float32, and what it says."""
        import mlx.core as mx

        from mlx_ifp import generate, load
        from mlx_ifp.checkpoint.locate import DEFAULT_MODEL

        if self.quick or not (DEFAULT_MODEL / "channels.safetensors").exists():
            return {"skipped": "quick" if self.quick else "its weights are not installed"}
        model, tokenizer = load(cache=False, dtype=mx.float32)
        network = model.subnetwork(self._selection(model, 1, 0.5))
        logits = network(mx.array([TOKENS]))
        said = generate(model, tokenizer, [{"role": "user", "content": "Name a river."}],
                        max_tokens=24)  # fmt: skip
        return {"arrays": {"logits": np.array(logits)}, "said": said, "limit": 10 * FLOAT32}


def _error(got: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, relative to the largest number expected."""
    if got.shape != expected.shape:
        return math.inf
    got, expected = got.astype(np.float64), expected.astype(np.float64)
    error = float(np.abs(got - expected).max() / max(np.abs(expected).max(), 1e-30))
    return error if math.isfinite(error) else math.inf


def _bytes(network: Any) -> int:
    from mlx.utils import tree_flatten

    return sum(array.nbytes for _, array in tree_flatten(network.parameters()))


CHECKS = [name.removeprefix("check_") for name in vars(Checks) if name.startswith("check_")]


def work_checks(folder: Path, device: str, names: list[str], quick: bool) -> None:
    """The life of a process that checks: each result is written as soon as it is there."""
    import mlx.core as mx

    if device == "cpu":
        mx.set_default_device(mx.cpu)
    checks = Checks(folder, quick)
    for name in names:
        _append(folder / f"{device}.jsonl", {"check": name, "begins": True})
        start = time.perf_counter()
        try:
            seen = getattr(checks, f"check_{name}")()
            arrays = seen.pop("arrays", None)
            if arrays is not None:
                np.savez(folder / f"{device}-{name}.npz", **arrays)
        except Exception as error:
            seen = {"failed": f"{type(error).__name__}: {error}",
                    "traceback": traceback.format_exc(limit=-6)}  # fmt: skip
            again = isinstance(error, RuntimeError)
        else:
            again = False
        seen["seconds"] = round(time.perf_counter() - start, 3)
        _append(folder / f"{device}.jsonl", {"check": name} | seen)
        if again:
            sys.exit(START_AGAIN)


def work_tiny(folder: Path) -> None:
    """Write the tiny checkpoints, the same for all devices."""
    import mlx.core as mx

    from mlx_ifp.commands.benchmark.shapes import write_shapes

    mx.set_default_device(mx.cpu)
    for name in TINY:
        dtype, bits = mx.bfloat16 if name == "bfloat16" else mx.float32, None
        if name == "4-bit":
            bits = 4
        write_shapes(folder / name, TINY_SCALE, dtype=dtype, bits=bits)


class Table:
    """The paper's latency table, figure by figure.

    Args:
        scale (int): what the shapes are divided by.
        work (Path): where the checkpoint is written.
        out (Path): ``table.jsonl``.
        deadline (float): of ``time.time``.
        quick (bool): short prompts, one trial.
    """

    def __init__(self, scale: int, work: Path, out: Path, deadline: float, quick: bool) -> None:
        self.scale, self.work, self.out = scale, work, out
        self.deadline, self.quick = deadline, quick
        self.trials = 1 if quick else 3

    @property
    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def say(self, what: str, **figures: Any) -> None:
        """Write a line."""
        _append(self.out, {"what": what, "left": round(self.left, 1)} | figures)

    def prepare(self) -> None:
        """Write the checkpoint."""
        import mlx.core as mx

        from mlx_ifp.commands.benchmark.shapes import describe, write_shapes
        from mlx_ifp.device import default_dtype

        start = time.perf_counter()
        self.path = self.work / "paper"
        dtype = default_dtype() or mx.bfloat16
        geometry = write_shapes(self.path, self.scale, dtype=dtype)
        nbytes = sum(file.stat().st_size for file in self.path.rglob("*.safetensors"))
        self.say("checkpoint", scale=self.scale, model=describe(geometry), geometry=geometry,
                 dtype=str(dtype), bytes=nbytes, seconds=time.perf_counter() - start)  # fmt: skip

    def bandwidth(self) -> None:
        """Bytes a second of a large copy (read and written) and of a large read."""
        import mlx.core as mx

        count = (1 << 22 if self.quick else 1 << 29) * (mx.default_device().type == mx.gpu or 0.125)
        array = mx.arange(int(count), dtype=mx.uint32)
        mx.eval(array)
        copies, reads = [], []
        for _ in range(5):
            start = time.perf_counter()
            copied = array | mx.array(1, mx.uint32)
            mx.eval(copied)
            copies.append(2 * array.nbytes / (time.perf_counter() - start))
            del copied
            start = time.perf_counter()
            mx.eval(array.max())
            reads.append(array.nbytes / (time.perf_counter() - start))
        self.copy, self.read = max(copies), max(reads)
        self.say("bandwidth", device=mx.device_info(), bytes=array.nbytes,
                 copy=self.copy, read=self.read, mlx=mx.__version__)  # fmt: skip

    def run(self) -> None:
        """All figures, in the order of their worth."""
        from dataclasses import replace

        import mlx.core as mx

        from mlx_ifp import load
        from mlx_ifp.commands.benchmark import runs
        from mlx_ifp.commands.benchmark.command import OTHER_TASK, TASK
        from mlx_ifp.commands.benchmark.experts import experts_model
        from mlx_ifp.commands.benchmark.same_size import memory_of, same_size_model

        long, short = (48, 16) if self.quick else (4000, 512)
        settings = runs.Settings(
            (long,), 10 if self.quick else 100, self.trials, samples=4, prefill_step_size=4096
        )
        start = time.perf_counter()
        model, _ = load(self.path, cache=False)
        self.say("trunk", seconds=time.perf_counter() - start)
        bench = runs.Bench(model, (TASK, OTHER_TASK), settings)
        bench.set_prompt(long)
        ready: dict[str, Any] = {}
        self.memory: dict[str, dict[str, int]] = {}

        def alone(row: str, get: Callable[[], Any], **more: Any) -> Any:
            """Make a network, run it once, and say how much memory that took."""
            mx.clear_cache()
            mx.reset_peak_memory()
            before, start = mx.get_active_memory(), time.perf_counter()
            have = get()
            made = time.perf_counter() - start
            ran = bench.run({runs.REPEAT: have})[runs.REPEAT]
            self.memory[row] = memory_of(have.network) | more
            self.say("alone", row=row, made_seconds=made, run=ran, memory=self.memory[row],
                     held_before=before, peak_memory=mx.get_peak_memory())  # fmt: skip
            return have

        def same_size() -> None:
            same, notes = same_size_model(first.network, model.checkpoint.ffns)
            ready[runs.SAME_SIZE] = alone(runs.SAME_SIZE, lambda: _prepared(same))
            self.decode(bench, ready, notes)

        def full() -> None:
            ready[runs.FULL] = alone(runs.FULL, lambda: _prepared(model.dense()))

        def experts() -> None:
            mixture, notes = experts_model(
                first.network, model.checkpoint.ffns, model.checkpoint.config, first.selection.k
            )
            ready[runs.EXPERTS] = alone(
                runs.EXPERTS, lambda: _prepared(mixture.network), **mixture.memory
            )
            self.decode(bench, ready, notes)

        def other(tokens: int, samples: int) -> None:
            bench.settings = replace(settings, prompt_tokens=(tokens,), samples=samples)
            bench.set_prompt(tokens)
            self.decode(bench, ready)

        first = alone("first prompt, the very first", bench.first)
        # Until here the checks were running beside it.
        while not (self.work / "go").exists() and self.left > 0:
            time.sleep(0.1)
        self.bandwidth()
        for _ in range(1 if self.quick else 2):
            first = alone("first prompt, from the file cache", bench.first)
        ready[runs.REPEAT] = alone(runs.REPEAT, bench.again)
        self.attempt(same_size)
        self.attempt(full)
        # As in the paper: the whole model is in the device's memory, and rows are gathered there.
        self.attempt(self.selecting, bench, model)
        self.attempt(experts)
        for tokens, samples in ((long, 1), (short, 4), (short, 1)):
            self.attempt(other, tokens, samples)
        self.attempt(self.cold, model, first.selection, first.bytes_read)

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Do a step if there is time; what fails is said, and the rest goes on."""
        if self.left < 5:
            self.say("skipped", step=step.__name__, args=args[-1:])
            return
        try:
            step(*args)
        except Exception as error:
            self.fail(step.__name__, error)

    def fail(self, step: str, error: Exception) -> None:
        """Say what failed."""
        self.say("failed", step=step, error=f"{type(error).__name__}: {error}",
                 traceback=traceback.format_exc(limit=-8))  # fmt: skip

    def selecting(self, bench: Any, model: Any) -> None:
        """A new task's selection and loading, while the full model is in memory."""
        for _ in range(self.trials + 2):
            ready = model.prepare(next(bench._texts[0]))
            self.say("select, full model in memory", select_seconds=ready.select_seconds,
                     load_seconds=ready.load_seconds, bytes_read=ready.bytes_read)  # fmt: skip
        again = model.prepare(bench.text)
        self.say("repeat", select_seconds=again.select_seconds, load_seconds=again.load_seconds)

    def decode(self, bench: Any, ready: dict[str, Any], notes: list[str] | None = None) -> None:
        """Let the networks at hand answer in turns, some times, and say the medians."""
        import mlx.core as mx

        from mlx_ifp.commands.benchmark.runs import REPEAT
        from mlx_ifp.llm.kv_cache import Generation, kv_bytes

        settings, trials = bench.settings, []
        # The first one warms up what is compiled for these shapes.
        for trial in range(self.trials + (not self.quick)):
            if trial > 1 and self.left < 8:
                break
            trials.append(bench.run(dict(ready)))
        trials = trials[1:] or trials
        prompt, steps = int(bench.prompt.size), settings.generation_tokens - 1
        kv = settings.samples * kv_bytes(
            ready[REPEAT].network, Generation(prompt, settings.generation_tokens)
        )
        rows = {}
        for row in ready:
            runs = [trial[row] for trial in trials]
            seconds = statistics.median(run["decode_seconds"] for run in runs)
            moved = self.memory[row]["bytes_per_token"] + kv
            rows[row] = {
                "prefill_seconds": _spread(run["prefill_seconds"] for run in runs),
                "decode_seconds": _spread(run["decode_seconds"] for run in runs),
                "decode_tps": steps * settings.samples / seconds,
                "bytes_a_step": moved,
                "share_of_read_bandwidth": moved * steps / seconds / self.read,
                "share_of_copy_bandwidth": moved * steps / seconds / self.copy,
                "faster_by_turns": statistics.median(
                    theirs / ours
                    for trial in trials
                    for theirs, ours in zip(
                        trial[row]["turn_seconds"], trial[REPEAT]["turn_seconds"], strict=True
                    )
                ),
            }
        self.say("decode", prompt_tokens=prompt, generation_tokens=settings.generation_tokens,
                 samples=settings.samples, trials=len(trials), rows=rows, notes=notes or [],
                 peak_memory=mx.get_peak_memory())  # fmt: skip

    def cold(self, model: Any, selection: Any, nbytes: int) -> None:
        """Loading after the system was made to forget the files, if there is time and a way."""
        from mlx_ifp.commands.benchmark.loading import ColdFiles, cold_seconds, copy_seconds
        from mlx_ifp.errors import IFPError

        size = model.reader.nbytes
        # The files are read three times.
        if self.left < 10 + 3 * size / 1e9:
            self.say("cold", skipped="not enough time")
            return
        try:
            files = ColdFiles(sorted({t.path for t in model.checkpoint.channels.values()}))
        except IFPError as error:
            self.say("cold", skipped=str(error))
            return
        self.say("cold", copy_seconds=copy_seconds(nbytes),
                 **cold_seconds(model, selection, nbytes, files))  # fmt: skip


def _prepared(network: Any) -> Any:
    from mlx_ifp.subnetwork.prepared import Prepared

    return Prepared(network, None, "", 0.0, 0.0, 0)


def _spread(values: Iterator[float]) -> list[float]:
    """Median, least, most."""
    values = list(values)
    return [statistics.median(values), min(values), max(values)]


def work_table(args: argparse.Namespace) -> None:
    """The life of the process that measures. What is timed begins when the checks are done."""
    import mlx.core as mx

    scale = auto_scale(args.seconds, Path(args.work)) if args.scale == "auto" else int(args.scale)
    table = Table(scale, Path(args.work), Path(args.output) / "table.jsonl", args.deadline,
                  args.quick)  # fmt: skip
    table.say("begins", scale=scale, device=str(mx.default_device()))
    try:
        table.prepare()
        table.run()
        table.say("ends")
    except Exception as error:
        table.fail("run", error)


def auto_scale(seconds: float, work: Path) -> int:
    """1 where the card, the disk and the time are large enough; else 2; on a CPU 16."""
    import mlx.core as mx

    if mx.default_device().type != mx.DeviceType.gpu:
        return CPU_SCALE
    info = mx.device_info()
    memory = info.get("max_recommended_working_set_size") or info.get("total_memory") or 0
    if memory > 60e9 and shutil.disk_usage(work).free > 24e9 and seconds >= 90:
        return 1
    return 2 if memory > 10e9 else 4


# -- the parent, which needs no MLX


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line, default=str) + "\n")


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Worker:
    """A process of this script that does one kind of work, started again if it dies on the way.

    Args:
        folder (Path): where it writes ``device.jsonl``.
        device (str): ``device``, MLX's default one, or ``cpu``.
        names (list): its checks.
        flags (list): passed on.
        limit (float): seconds for one check.
    """

    def __init__(
        self, folder: Path, device: str, names: list[str], flags: list[str], limit: float
    ) -> None:
        self.folder, self.device, self.flags, self.limit = folder, device, flags, limit
        self.left, self.failed = list(names), {}
        self.process: subprocess.Popen | None = None
        self.since = time.time()

    def done(self) -> bool:
        """Look after the process; whether all checks have ended."""
        log = self.folder / f"{self.device}.jsonl"
        results = _lines(log)
        ended = {line["check"] for line in results if "begins" not in line} | set(self.failed)
        begun = [line["check"] for line in results if line["check"] not in ended]
        before = len(self.left)
        self.left = [name for name in self.left if name not in ended]
        if len(self.left) < before:
            self.since = time.time()
        if not self.left:
            self.stop()
            return True
        running = self.process is not None and self.process.poll() is None
        if running and time.time() - self.since < self.limit:
            return False
        expected = self.process is not None and self.process.poll() == START_AGAIN
        if self.process is not None and not expected:
            how = "no end" if running else f"the process ended ({self.process.returncode})"
            self.stop()
            # It died before its first check: that is the first one's failure.
            self.failed[begun[-1] if begun else self.left[0]] = how
            self.left = [name for name in self.left if name not in self.failed]
        if self.left:
            command = ["--worker", "checks", "--device", self.device, "--checks", *self.left]
            log = open(self.folder / f"{self.device}.log", "a")  # noqa: SIM115
            self.process = _start([*command, "--work", str(self.folder), *self.flags], log)
            self.since = time.time()
        return not self.left

    def stop(self) -> None:
        """End the process."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


def _start(arguments: list[str], log: Any) -> subprocess.Popen:
    # The checks are about right or wrong: TF32 would hide what is wrong behind what is rounded.
    own = {} if "table" in arguments else {"MLX_ENABLE_TF32": "0"}
    environment = {**os.environ, **own, "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, *arguments], env=environment, stdout=log, stderr=log
    )


def judge(folder: Path, names: list[str], failed: dict[str, str]) -> list[dict[str, Any]]:
    """Each check with ``ok`` and, where arrays were compared, the largest error."""
    results = {d: {r["check"]: r for r in _lines(folder / f"{d}.jsonl") if "begins" not in r}
               for d in ("device", "cpu")}  # fmt: skip
    judged = []
    for name in names:
        result = dict(results["device"].get(name, {"check": name}))
        if name in failed or len(result) == 1:
            result["failed"] = failed.get(name, "not begun in time")
        mine, theirs = (folder / f"{d}-{name}.npz" for d in ("device", "cpu"))
        if "failed" not in result and mine.exists():
            if theirs.exists():
                with np.load(mine) as got, np.load(theirs) as expected:
                    errors = {key: _difference(key, got[key], expected[key]) for key in got.files}
                result["error"] = max(errors.values())
                result["worst"] = dict(sorted(errors.items(), key=lambda e: -e[1])[:8])
            else:
                reason = results["cpu"].get(name, {}).get("failed", "not in time")
                result["not_compared"] = f"the CPU's part failed: {reason}"
        result["ok"] = "failed" not in result and (
            "not_compared" not in result
            and ("limit" not in result or result["error"] <= result["limit"])
        )
        judged.append(result)
    return judged


def _difference(name: str, got: np.ndarray, expected: np.ndarray) -> float:
    if name.startswith("mask"):
        # A thousandth of the channels may differ.
        return float((got != expected).mean() / expected.mean() / 2 / 1e-3 * FLOAT32)
    return _error(got, expected)


def summary(judged: list[dict[str, Any]], table: list[dict[str, Any]]) -> str:
    """What to read at the end."""
    lines = ["", f"{'check':<20} {'':<6} {'error':>9} {'limit':>8} {'s':>6}"]
    for one in judged:
        error, limit = (f"{one[n]:.1e}" if n in one else "-" for n in ("error", "limit"))
        why = one.get("failed") or one.get("not_compared") or one.get("skipped") or ""
        lines.append(f"{one['check']:<20} {'ok' if one['ok'] else 'FAILED':<6} {error:>9} "
                     f"{limit:>8} {one.get('seconds', 0):>6.1f} {why[:120]}".rstrip())  # fmt: skip
    lines.append("")
    for line in table:
        if line["what"] == "checkpoint":
            lines.append(f"{line['model']}\n{line['dtype']}, {line['bytes'] / 1e9:.2f} GB, written "
                         f"in {line['seconds']:.1f} s")  # fmt: skip
        elif line["what"] == "bandwidth":
            lines.append(f"{line['device'].get('device_name')}: copy {line['copy'] / 1e9:.0f} GB/s "
                         f"(read and written), read {line['read'] / 1e9:.0f} GB/s")  # fmt: skip
        elif line["what"] == "alone":
            run = line["run"]
            lines.append(f"{line['row']:<44} select {run['select_seconds']:.4f} load "
                         f"{run['load_seconds']:.4f} prefill {run['prefill_seconds']:.4f} s, peak "
                         f"{line['peak_memory'] / 1e6:.0f} MB")  # fmt: skip
        elif "select_seconds" in line:
            lines.append(f"{line['what']:<44} select {line['select_seconds']:.4f} load "
                         f"{line['load_seconds']:.4f}")  # fmt: skip
        elif line["what"] == "decode":
            lines.append(f"{line['prompt_tokens']} tokens in, {line['generation_tokens']} out, "
                         f"{line['samples']} samples")  # fmt: skip
            for row, f in line["rows"].items():
                lines.append(
                    f"  {row:<26} prefill {f['prefill_seconds'][0]:.4f} decode "
                    f"{f['decode_seconds'][0]:.4f} s, {f['decode_tps']:.0f} tokens/s, of read "
                    f"bandwidth {f['share_of_read_bandwidth']:.2f}, sub-network faster by "
                    f"{f['faster_by_turns']:.3f}"
                )
        elif line["what"] in ("failed", "skipped", "cold"):
            lines.append(json.dumps(line | {"traceback": ""}, default=str))
    return "\n".join(lines)


def setup_arg_parser() -> argparse.ArgumentParser:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", default="auto", help="Of the table's shapes (default: auto)")
    parser.add_argument("--output", default="gpu-figures", help="Directory for the results")
    parser.add_argument("--seconds", type=float, default=420, help="Limit of the whole run")
    parser.add_argument("--quick", action="store_true", help="Short prompts, one trial")
    parser.add_argument("--no-table", action="store_true", help="Checks only")
    parser.add_argument("--checks", nargs="*", default=CHECKS, help="Which (default: all)")
    parser.add_argument("--work", help="Where checkpoints are written (default: temporary)")
    parser.add_argument("--worker", choices=["checks", "tiny", "table"], help=argparse.SUPPRESS)
    parser.add_argument("--device", default="device", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    return parser


def main() -> None:
    """Run all, within the limit."""
    args = setup_arg_parser().parse_args()
    if args.worker == "tiny":
        work_tiny(Path(args.work))
    elif args.worker == "checks":
        work_checks(Path(args.work), args.device, args.checks, args.quick)
    elif args.worker == "table":
        work_table(args)
    else:
        if args.work is not None:
            Path(args.work).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="gpu-figures-", dir=args.work) as work:
            sys.exit(parent(args, Path(work)))


def parent(args: argparse.Namespace, work: Path) -> int:
    """Start the workers, look after them, and say what they found; 0 if nothing failed."""
    began = time.time()
    deadline = began + args.seconds - 3
    out = Path(args.output)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("checks.jsonl", "table.jsonl"):
        (out / name).unlink(missing_ok=True)
    quick = ["--quick"] * args.quick
    log = open(out / "log.txt", "w")  # noqa: SIM115
    table = None
    if not args.no_table:
        table = _start(["--worker", "table", "--scale", args.scale, "--output", str(out), "--work",
                        str(work), "--deadline", str(deadline), "--seconds", str(args.seconds),
                        *quick], log)  # fmt: skip
    failed: dict[str, str] = {}
    try:
        if args.checks:
            tiny = _start(["--worker", "tiny", "--work", str(work)], log)
            tiny.wait(timeout=max(5, deadline - time.time()))
            # The table is to have most of the time.
            until = deadline if args.no_table else began + 0.4 * args.seconds
            limit = CHECK_LIMIT if args.no_table else min(CHECK_LIMIT, 0.2 * args.seconds)
            workers = [Worker(work, device, args.checks, quick, limit)
                       for device in ("device", "cpu")]  # fmt: skip
            while not all([worker.done() for worker in workers]) and time.time() < until:
                time.sleep(0.1)
            for worker in workers:
                worker.stop()
            failed = workers[0].failed
        judged = judge(work, args.checks, failed)
        for one in judged:
            _append(out / "checks.jsonl", one)
        print(summary(judged, []), flush=True)
        (work / "go").touch()
        if table is not None:
            try:
                table.wait(timeout=max(1, deadline - time.time()))
            except subprocess.TimeoutExpired:
                print("The time is up.")
    finally:
        if table is not None and table.poll() is None:
            table.kill()
            table.wait()
        for name in ("device.log", "cpu.log"):
            if (work / name).exists():
                shutil.copy(work / name, out / name)
    lines = _lines(out / "table.jsonl")
    print(summary(judged, lines))
    print(f"{time.time() - began:.0f} s; all of it is in {out}")
    said = {line["what"] for line in lines}
    whole = args.no_table or ("ends" in said and "failed" not in said)
    return 0 if whole and all(one["ok"] for one in judged) else 1


if __name__ == "__main__":
    main()
