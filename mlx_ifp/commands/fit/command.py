"""``mlx_ifp.fit``: give a checkpoint a predictor in closed form; its LLM stays as it is."""

import argparse
import contextlib
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from tqdm import tqdm

from ...errors import IFPError
from ...fitting.collect import Statistics, collect
from ...fitting.data import WritingArgs, answered_rows, own_rows
from ...fitting.examples import Example, Row, make_examples, read_rows
from ...fitting.ridge import Ridge, fit_ridge
from ...fitting.save import check_fittable, save_fitted
from ...model import IFPModel
from ...opening import load

# Without data the model writes so many prompts itself.
_OWN_EXAMPLES = 2000
# Fewer show too little of what people ask.
_LEAST_EXAMPLES = 16


def run(args: argparse.Namespace) -> None:
    """Run ``mlx_ifp.fit``."""
    start = time.perf_counter()
    path = Path(args.mlx_path)
    if path.exists():
        raise IFPError(f"{path} already exists. Delete it or name another --mlx-path.")
    given = None if args.data is None else read_rows(args.data)
    if args.examples is not None and args.examples < _LEAST_EXAMPLES:
        raise IFPError(f"--examples must be {_LEAST_EXAMPLES} or more, not {args.examples}.")
    model, tokenizer = load(
        args.model,
        {"trust_remote_code": args.trust_remote_code},
        revision=args.revision,
        dtype=getattr(mx, args.dtype) if args.dtype else None,
        cache=False,
    )
    check_fittable(model.checkpoint)
    if not tokenizer.has_chat_template:
        raise IFPError(
            f"{model.checkpoint.path} has no chat template, so it is not known where a prompt "
            "ends; fit a chat model."
        )
    directory = _statistics_path(args)
    directory.mkdir(parents=True, exist_ok=True)
    with _told_how_to_go_on(directory):
        rows = _rows(args, model, given, directory)
        examples, left_out = make_examples(
            tokenizer,
            rows,
            max_answer_tokens=args.max_tokens,
            max_seq_length=args.max_seq_length,
        )
        if left_out:
            print(
                f"[INFO] {left_out:,} of {len(rows):,} rows are left out: the prompt is longer "
                "than --max-seq-length, or the answer has one token.",
                file=sys.stderr,
            )
        if len(examples) < _LEAST_EXAMPLES:
            raise IFPError(
                f"{len(examples)} examples are too few to fit a predictor; give at least "
                f"{_LEAST_EXAMPLES}, better thousands."
            )
        statistics = _statistics(model, examples, directory)
        ridge = _fit(statistics, args.rank)
        _save(args, model, ridge, examples)
    if args.statistics_path is None:
        shutil.rmtree(directory)
    error = min(error for _, error in ridge.errors)
    print(
        f"{path}: {len(examples):,} examples, rank {len(ridge.first)}, lambda {ridge.strength}; "
        f"the squared error on examples left out is {error:.1%} of what the mean leaves; "
        f"{time.perf_counter() - start:.0f} s"
    )


def _statistics_path(args: argparse.Namespace) -> Path:
    if args.statistics_path is not None:
        return Path(args.statistics_path)
    path = Path(args.mlx_path)
    return path.with_name(f"{path.name}-statistics")


@contextlib.contextmanager
def _told_how_to_go_on(directory: Path) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print(f"[INFO] What is done is in {directory}; the same command goes on.", file=sys.stderr)
        raise


def _rows(
    args: argparse.Namespace, model: IFPModel, given: list[Row] | None, directory: Path
) -> list[Row]:
    """Rows with answers: given ones, or the model's own."""
    how = WritingArgs(args.max_tokens, args.max_seq_length, args.batch_size, args.seed)

    def dense() -> nn.Module:
        return model.dense()

    if given is not None:
        given = given[: args.examples]
        asked = sum(row.answer is None for row in given)
        with tqdm(desc="Answers", unit="row", total=asked, disable=not asked) as bar:
            rows = answered_rows(dense, model.tokenizer, directory, given, how, bar.update)
    else:
        count = args.examples or _OWN_EXAMPLES
        with tqdm(desc="Prompts and answers", unit="row", total=count) as bar:
            rows = own_rows(dense, model.tokenizer, directory, count, how, bar.update)
    # The pass over the examples reads one FFN at a time, and needs no whole model.
    model.networks.shrink(0)
    mx.clear_cache()
    return rows


def _statistics(model: IFPModel, examples: list[Example], directory: Path) -> Statistics:
    checkpoint = model.checkpoint
    statistics = Statistics(
        directory,
        checkpoint.digest,
        examples,
        len(checkpoint.ffns),
        checkpoint.d_ffn,
        checkpoint.ffns[0].hidden_size,
    )
    done = len(examples) - len(statistics.missing)
    with tqdm(desc="Statistics", unit="example", total=len(examples), initial=done) as bar:
        collect(model.parent, statistics, bar.update)
    return statistics


def _fit(statistics: Statistics, rank: int) -> Ridge:
    columns = 2 * statistics.answers.shape[1]
    with tqdm(desc="Fitting", unit="column", unit_scale=True, total=columns) as bar:
        return fit_ridge(statistics.hidden, statistics.answers, rank, progress=bar.update)


def _save(args: argparse.Namespace, model: IFPModel, ridge: Ridge, examples: list[Example]) -> None:
    fit = {
        "data": "own" if args.data is None else Path(args.data).name,
        "examples": len(examples),
        "rank": len(ridge.first),
        "lambda": ridge.strength,
        "error_left_out": min(error for _, error in ridge.errors),
    }
    save_fitted(model.checkpoint, ridge, args.mlx_path, blend=args.blend, fit=fit)
