"""From a chat model to a trained, evaluated checkpoint in one command with a time limit.

    bash default_model.sh --minutes 8 --output results

Stages: the GGUF file as a transformers directory; data that the model writes itself; training; the
checkpoint in small files; evaluation; the same with a static mask, trained for a fifth of the time.
A stage that fails is reported in one line, and what can still run runs. Seconds and speed of each
stage are in ``timing.json``.
"""

import argparse
import gzip
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GGUF = HERE.parent / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

MANIFEST = "ifpruning_config.json"  # of a trained checkpoint


def fail(text: object) -> SystemExit:
    return SystemExit(f"default_model.py: {text}")


class Run:
    """Runs stages, and keeps the time.

    Args:
        output (Path): where logs and results go.
        seconds (float): the limit of all stages together, from now.
    """

    def __init__(self, output: Path, seconds: float) -> None:
        self.output = output
        self.start = time.monotonic()
        self.limit = seconds
        self.timing: dict[str, Any] = {"limit_seconds": seconds, "stages": {}}

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.start + self.limit - time.monotonic()

    def stage(self, name: str, script: str, *args: object, timeout: float) -> bool:
        """Run a script of this directory; whether it succeeded. Its output goes to NAME.log."""
        begin = time.monotonic()
        command = [sys.executable, str(HERE / script), *map(str, args)]
        log = self.output / f"{name}.log"
        why = None
        with open(log, "w", encoding="utf-8") as file:
            print(" ".join(command), file=file, flush=True)
            env = os.environ | {"PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
            env.setdefault("TOKENIZERS_PARALLELISM", "true")
            try:
                done = subprocess.run(
                    command, stdout=file, stderr=file, timeout=max(timeout, 1), env=env
                )
                why = f"exit status {done.returncode}" if done.returncode else None
            except subprocess.TimeoutExpired:
                why = f"cut after {timeout:.0f} s"
        seconds = time.monotonic() - begin
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        last = lines[-1] if len(lines) > 1 else "no output"
        self.timing["stages"][name] = {"seconds": round(seconds, 1), "failed": why}
        self.write_timing()
        passed = f"{time.monotonic() - self.start:5.0f} s"
        state = f"{name} FAILED ({why})" if why else name
        print(f"[{passed}] {state}, {seconds:.0f} s: {last[:300]}", flush=True)
        return why is None

    def note(self, stage: str, **values: Any) -> None:
        """Add what a stage measured to the timing."""
        self.timing["stages"].setdefault(stage, {}).update(values)
        self.write_timing()

    def write_timing(self) -> None:
        self.timing["total_seconds"] = round(time.monotonic() - self.start, 1)
        (self.output / "timing.json").write_text(json.dumps(self.timing, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def channels_kept(model: Path) -> list[int]:
    """A third, a half, three quarters and all of the channels of a layer, in multiples of 64."""
    config = read_json(model / "config.json")
    channels = config.get("text_config", config).get("intermediate_size")
    if not channels:
        raise fail(f"{model} has no config.json with an intermediate_size.")
    step = 64 if channels >= 256 else 1
    shares = (1 / 3, 1 / 2, 3 / 4, 1)
    return sorted({max(1, round(channels * share / step) * step) for share in shares})


def training_speed(log: Path) -> dict[str, Any]:
    """Steps, tokens and the median speed, out of a run's log.jsonl."""
    try:
        rows = [json.loads(line) for line in log.read_text().splitlines()]
    except (OSError, ValueError):
        return {}
    reports = [row for row in rows if "tokens_per_second" in row]
    if not reports:
        return {"iterations": 0}
    speeds = sorted(row["tokens_per_second"] for row in reports)
    last = reports[-1]
    return {
        "iterations": last["iteration"],
        "trained_tokens": last["trained_tokens"],
        "tokens_per_second": round(speeds[len(speeds) // 2]),
        "peak_memory_gb": round(last["peak_memory"], 2),
    }


def gpu_memory() -> float:
    """GB of the GPU's free memory, 0 without one; asked in a process that ends at once."""
    code = "import torch; print(torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    try:
        return float(out.stdout.split()[-1]) / 1e9
    except (IndexError, ValueError):
        return 0.0


def settings(args: argparse.Namespace, memory: float) -> dict[str, list[object]]:
    """Flags of the stages for this device."""
    if args.tiny:
        return {
            "synthesize": [
                "--max-answer-tokens", 32, "--max-given-tokens", 600, "--prompts-count", 24,
                "--valid-prompts-count", 6, "--split-valid", 12, "--batch-size", 16,
            ],
            "train": ["--batch-tokens", 1024, "--dtype", "float32", "--warm-start-iters", 3,
                      "--predictor-llm", "--predictor-head", 8, "--valid-examples", 8],
            "static": ["--batch-tokens", 1024, "--dtype", "float32", "--warm-start-iters", 3,
                       "--valid-examples", 8],
            "evaluate": ["--examples", 12, "--max-answer-tokens", 8],
        }  # fmt: skip
    # A 135M model, its teacher and the optimizer take 3 GB, a token of a batch 0.8 MB (measured on
    # an H200: 15.5 GB at 16,384). With 16,384 tokens a step took 0.17 s and the GPU mostly waited
    # for its host, so batches are as large as fits.
    tokens = int(max(2048, min(65536, (memory - 6) / 0.001 // 2048 * 2048)))
    both = ["--batch-tokens", tokens, "--learning-rate", args.learning_rate, "--warmup-iters", 50,
            "--warm-start-iters", 1000, "--warm-start-examples", 16384, "--valid-examples", 256,
            "--schedule", "linear"]  # fmt: skip
    if memory:
        both.append("--compile")
    else:
        both += ["--dtype", "float32"]
    return {
        "synthesize": ["--prompts-count", 8850, "--valid-prompts-count", 240,
                       "--split-valid", 480, *(["--count", 1000] if args.data else [])],
        "train": [*both, "--predictor-llm", "--predictor-head", 64,
                  "--predictor-learning-rate", args.predictor_learning_rate],
        # Too short to be worth a compilation.
        "static": [*(flag for flag in both if flag != "--compile"), "--valid-examples", 64,
                   "--predictor-learning-rate", args.predictor_learning_rate],
        "evaluate": ["--max-answer-tokens", 96],
    }  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=8, help="of all stages together (default: 8)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", type=Path, help="a chat model: a transformers directory")
    source.add_argument("--gguf", type=Path, help=f"or a GGUF file (default: {GGUF.name})")
    add("--prompts", type=Path, metavar="FILE.jsonl", help="given prompts, to be answered too")
    add(
        "--valid-prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="given prompts to evaluate on (default: some of --prompts)",
    )
    add("--output", type=Path, required=True, help="a directory that is empty or not there yet")
    add("--work", type=Path, help="a new directory for models and data (default: a temporary one)")
    # With a predictor of four layers, 6e-4 and 2e-4 diverged at 16,384 tokens a batch. With a head
    # on the own state, 5e-4 and 2e-4 did not, but the masks became alike.
    add("--learning-rate", type=float, default=5e-4)
    add("--predictor-learning-rate", type=float, default=2e-5)
    add(
        "--data",
        type=Path,
        metavar="FILE.jsonl.gz",
        help="conversations that the model wrote earlier; then few new ones are made, to validate",
    )
    add("--q-group-size", type=int, choices=[32, 64, 128], default=64)
    add("--q-bits-of", nargs="+", default=[], metavar="NAME=BITS", help="as for train.py")
    add("--floats", action="store_true", help="hand over the floats; larger than rounded weights")
    add("--no-static", action="store_true", help="leave out the static mask, for a longer training")
    add("--seed", type=int, default=0)
    add("--tiny", action="store_true", help="small settings: to try it on a CPU with a tiny model")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    gguf = None if args.model else args.gguf or GGUF
    for path in (args.model, gguf, args.prompts, args.valid_prompts, args.data):
        if path is not None and not path.exists():
            raise fail(f"{path} is not there; name a model, GGUF file or prompts that are.")
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise fail(f"{args.output} exists and is not empty; name a new directory.")
    if args.work and args.work.exists():
        raise fail(f"{args.work} exists; name a new directory.")
    if args.minutes <= 0:
        raise fail("--minutes must be above 0.")
    args.output.mkdir(parents=True, exist_ok=True)
    if args.work:
        args.work.mkdir(parents=True)
        finished = run(args, gguf, args.work)
    else:
        with tempfile.TemporaryDirectory(prefix="default_model.") as work:
            finished = run(args, gguf, Path(work))
    if not finished:
        raise fail(f"no checkpoint; see the logs in {args.output}.")


def run(args: argparse.Namespace, gguf: Path | None, work: Path) -> bool:
    """All stages; whether there is a checkpoint."""
    output, limit = args.output, 60 * args.minutes
    runner = Run(output, limit)
    memory = gpu_memory()
    flags = settings(args, memory)
    runner.timing |= {"gpu_memory_gb": round(memory, 1), "seed": args.seed}
    dense = args.model
    if gguf is not None:
        dense = work / "dense"
        if not runner.stage("gguf", "gguf_model.py", gguf, dense, timeout=0.3 * limit):
            return False
    keep = channels_kept(dense)

    # A third of the time, from the start, is for data; less if most of it is there.
    seconds = (0.12 if args.data else 0.33) * limit - (limit - runner.left)
    data, report = work / "train.jsonl", output / "synthesize.json"
    given = ["--prompts", args.prompts] if args.prompts else []
    if args.valid_prompts:
        given += ["--valid-prompts", args.valid_prompts]
    runner.stage(
        "synthesize", "synthesize.py", "--model", dense, "--output", data, "--report", report,
        "--minutes", max(seconds, 5) / 60, "--seed", args.seed, *given, *flags["synthesize"],
        timeout=seconds + max(30, 0.15 * limit),
    )  # fmt: skip
    made = read_json(report)
    names = ("rows", "valid_rows", "sampled_tokens", "tokens_per_second", "truncated", "batch_size")
    runner.note("synthesize", **{name: made[name] for name in names if name in made})
    valid = work / "train-valid.jsonl"
    if args.data:
        append_rows(args.data, data, work / "train-valid.jsonl")
    if not data.exists() or data.stat().st_size == 0:
        if not args.prompts:
            return False
        print("no data was written: training on the answers of --prompts", flush=True)
        data, valid = args.prompts, args.valid_prompts or valid
    keep_samples(data, valid, output)

    # What follows the training: its evaluation, and the static mask with a fifth of its time.
    after = min(75, 0.25 * limit)
    # Imports, compilation and first validation come before any training.
    before_training = min(25, 0.1 * limit)
    seconds = runner.left - after
    if not args.no_static:
        seconds = (seconds - before_training) / 1.2
    checked = ["--valid", valid] if valid.exists() else []
    bits_of = ["--q-bits-of", *args.q_bits_of] if args.q_bits_of else []
    common = [
        "--model", dense, "--data", data, *checked, "--keep", keep[0], keep[-1],
        "--prefill", "dense", "--distill-weight", 1, "--distill-on", "all",
        "--quantize-from", 0.75, "--q-bits", 4, "--q-group-size", args.q_group_size, *bits_of,
        "--seed", args.seed,
    ]  # fmt: skip
    trained = work / "prompt"
    # Nothing cuts it but the limit: without its weights all was in vain.
    done = runner.stage(
        "train", "train.py", *common, "--output", trained, "--minutes", seconds / 60,
        *flags["train"], timeout=max(runner.left, 60) + 30,
    )  # fmt: skip
    again = (runner.left - after) / 1.2
    if not done and not (trained / MANIFEST).exists() and again > 0.3 * seconds:
        # Once more with what is left, slower and in less memory.
        seconds, trained = again, work / "prompt-2"
        flags["train"] = [flag for flag in flags["train"] if flag != "--compile"]
        flags["train"] += ["--batch-tokens", 4096]
        runner.stage(
            "train-again", "train.py", *common, "--output", trained, "--minutes", seconds / 60,
            *flags["train"], timeout=max(runner.left, 60) + 30,
        )  # fmt: skip
    runner.note("train", **training_speed(trained / "log.jsonl"))
    copy_log(trained, output / "log.jsonl")
    if not (trained / MANIFEST).exists():
        return False
    # Packed codes have four bits each.
    group = ["--q-group-size", args.q_group_size]
    floats = args.floats or args.q_bits_of
    if floats or not runner.stage(
        "pack", "pack_model.py", trained, output / "packed", *group, timeout=120
    ):
        # As it is, if it cannot be packed: larger, but not lost.
        shutil.copytree(trained, output / "checkpoint", ignore=shutil.ignore_patterns("state*"))

    evaluation = ["--dense", dense, "--keep", *keep, "--rounded", 4, args.q_group_size]
    evaluation += ["--rounded-bits-of", *args.q_bits_of] if args.q_bits_of else []
    evaluation += flags["evaluate"]
    if valid.exists():
        evaluation += ["--data", valid]
    questions = HERE / "questions.txt"
    if args.tiny:
        few = work / "questions.txt"
        few.write_text("\n".join(questions.read_text().splitlines()[:5]) + "\n")
        questions = few
    results = [output / "results.json", output / "results-static.json"]
    runner.stage(
        "evaluate", "evaluate.py", *evaluation, "--model", trained, "--questions", questions,
        "--output", results[0], timeout=max(60, runner.left),
    )  # fmt: skip

    static = work / "static"
    seconds = min(seconds / 5 + before_training, runner.left - max(10, after / 4))
    if args.no_static:
        print("static: left out", flush=True)
    elif seconds > 5 and valid.exists():
        runner.stage(
            "static", "train.py", *common, "--output", static, "--minutes", seconds / 60,
            "--select-by", "static", *flags["static"], timeout=max(runner.left, 30) + 15,
        )  # fmt: skip
        runner.note("static", **training_speed(static / "log.jsonl"))
        copy_log(static, output / "log-static.jsonl")
        if (static / MANIFEST).exists():
            runner.stage(
                "evaluate-static", "evaluate.py", *evaluation, "--static", static,
                "--output", results[1], timeout=max(60, runner.left + 30),
            )  # fmt: skip
    else:
        print("static: no time left for it", flush=True)
    steps = {
        name: runner.timing["stages"].get(stage, {})
        for name, stage in (("prompt", "train"), ("static", "static"))
    }
    write_table(results, steps, output / "table.md")
    runner.write_timing()
    return True


def append_rows(source: Path, data: Path, valid: Path) -> None:
    """Add the rows of a file, gzipped or not, to the training data; no prompt of ``valid``."""
    held_out = set()
    if valid.exists():
        with open(valid, encoding="utf-8") as rows:
            held_out = {prompt_of(line) for line in rows if line.strip()}
    opened = gzip.open if source.suffix == ".gz" else open
    with opened(source, "rt", encoding="utf-8") as rows, open(data, "a", encoding="utf-8") as file:
        for number, line in enumerate(rows, 1):
            try:
                if line.strip() and prompt_of(line) not in held_out:
                    file.write(line)
            except (ValueError, LookupError, TypeError, StopIteration) as error:
                raise fail(f"{source}: line {number} is no row with a user's message.") from error


def prompt_of(line: str) -> str:
    """What the user says first in a row of training data."""
    messages = json.loads(line)["messages"]
    return next(m["content"] for m in messages if m["role"] == "user").strip().lower()


def keep_samples(data: Path, valid: Path, output: Path) -> None:
    """Keep the validation rows and the first thousand of training with the results."""
    with open(data, encoding="utf-8") as file:
        rows = [line for line, _ in zip(file, range(1000), strict=False)]
    (output / "train-sample.jsonl").write_text("".join(rows), encoding="utf-8")
    if valid.exists():
        shutil.copy(valid, output / "valid.jsonl")


def copy_log(run: Path, to: Path) -> None:
    if (run / "log.jsonl").exists():
        shutil.copy(run / "log.jsonl", to)


def write_table(results: list[Path], steps: dict[str, dict[str, Any]], to: Path) -> None:
    """The tables of all evaluations as one, and what each run was trained, printed and written."""
    # Imported late: until here nothing needs PyTorch in this process.
    from evaluate import table

    runs = {}
    for path in results:
        runs |= read_json(path).get("runs", {})
    if not runs:
        return
    lines = [table(runs), ""]
    for name in runs:
        count, tokens = (steps[name].get(key, 0) for key in ("iterations", "trained_tokens"))
        lines.append(f"{name}: {count:,} steps, {tokens:,} tokens")
        if count < 100:
            lines.append(f"[WARNING] {name} was hardly trained; its rows compare nothing.")
    to.write_text("\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
