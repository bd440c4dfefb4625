"""``mlx_ifp.synthesize``: a chat model writes data to train on."""

import argparse
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from ...checkpoint.config import CONFIG_FILE
from ...checkpoint.locate import resolve
from ...device import default_dtype
from ...errors import IFPError, one_line
from ...files.atomic import check_writable
from ...opening import load
from ...synthesis.files import earlier_rows, read_prompts, read_tasks
from ...synthesis.writer import Prompt, Synthesis, SynthesisArgs, Tasks


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.synthesize``."""
    numbers = _numbers(args)
    tasks = read_tasks(args.tasks) if args.tasks else {}
    prompts = read_prompts(args.prompts) if args.prompts else []
    output = Path(args.output)
    if output.exists() and not args.resume:
        raise IFPError(
            f"{output} already exists; --resume appends to it, or name another --output."
        )
    path = resolve(args.model, converted=False)
    output.parent.mkdir(parents=True, exist_ok=True)
    check_writable(output)
    earlier = earlier_rows(output)
    model, tokenizer = _load(path, args.model, args.trust_remote_code)
    try:
        _synthesize(model, tokenizer, numbers, output, tasks, prompts, earlier)
    except KeyboardInterrupt:
        print(f"[INFO] Rows that are done are in {output}; --resume goes on.", file=sys.stderr)
        raise


def _numbers(args: argparse.Namespace) -> SynthesisArgs:
    if args.count is None and args.prompts is None:
        raise IFPError("Name --count, how many prompts to write, or --prompts, what to answer.")
    if args.tasks is not None and args.count is None:
        raise IFPError("--tasks needs --count, how many prompts to write for them.")
    numbers = SynthesisArgs(
        count=args.count or 0,
        batch_size=args.batch_size,
        max_prompt_tokens=args.max_prompt_tokens,
        max_answer_tokens=args.max_answer_tokens,
        max_seq_length=args.max_seq_length,
        temp=args.temp,
        answer_temps=tuple(args.answer_temp),
        top_p=args.top_p,
        seed=args.seed,
    )
    numbers.check()
    return numbers


def _load(path: Path, name: str, trust_remote_code: bool) -> tuple[nn.Module, TokenizerWrapper]:
    """A dense mlx-lm model, or the whole LLM of a checkpoint."""
    tokenizer_config = {"trust_remote_code": trust_remote_code}
    if (path / CONFIG_FILE).is_file():
        checkpoint, tokenizer = load(path, tokenizer_config, cache=False)
        return checkpoint.dense(), tokenizer
    with one_line(f"{name} cannot be loaded"):
        model, tokenizer = mlx_lm.load(str(path), tokenizer_config)[:2]
    dtype = default_dtype()
    if dtype is not None:
        model.set_dtype(dtype)
        mx.eval(model.parameters())
    return model, tokenizer


def _synthesize(
    model: nn.Module,
    tokenizer: TokenizerWrapper,
    numbers: SynthesisArgs,
    output: Path,
    tasks: Tasks,
    prompts: list[Prompt],
    earlier: list[dict],
) -> None:
    start = time.perf_counter()
    with (
        open(output, "a", encoding="utf-8") as file,
        tqdm(desc="Rows", unit="row", initial=len(earlier)) as bar,
    ):
        synthesis = Synthesis(
            model, tokenizer, numbers, file, tasks=tasks, earlier=earlier, on_row=bar.update
        )
        synthesis.answer(prompts)
        synthesis.write()
    seconds = time.perf_counter() - start
    print(f"{output}: {sum(synthesis.rows.values()):,} new rows{_counts(synthesis.rows)}, "
          f"{synthesis.truncated:,} of them truncated; {sum(synthesis.refused.values()):,} refused"
          f"{_counts(synthesis.refused)}; {synthesis.sampled_tokens:,} tokens in {seconds:.0f} s, "
          f"{synthesis.sampled_tokens / seconds:,.0f} tokens/s")  # fmt: skip


def _counts(counter: dict[str, int]) -> str:
    most = sorted(counter.items(), key=lambda each: -each[1])
    return f" ({', '.join(f'{n:,} {name}' for name, n in most)})" if most else ""
