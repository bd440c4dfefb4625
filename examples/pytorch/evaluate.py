"""How close trained models are to their dense source, at several k, and what they answer.

    python evaluate.py --dense smollm2 --model runs/prompt --static runs/static \\
        --data data/valid.jsonl --keep 512 768 1152 1536 --rounded 4 64 --output results.json

Every answer of the data is predicted under the sub-network of its own prompt. KL is that of the
dense model to the pruned one, over the whole vocabulary, in nats a token of the answers.
"""

import argparse
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import DataError, DeviceData, by_length, load_examples
from model import MaskedLM, ModelError, load_llm
from output import write_text
from rounding import Rounding, bits_of_parts
from save import load_checkpoint
from transformers import AutoTokenizer
from transformers.utils import logging
from validate import validate

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
OWN = "own"


def fail(text: object) -> SystemExit:
    return SystemExit(f"evaluate.py: {text}")


def rounding_of(model: MaskedLM, rounded: list[int] | None, parts: list[str]) -> Any:
    """A context in which the LLM's weights are rounded to (bits, group size), or as they are.

    ``parts`` are ``NAME=BITS``, for weights with other bits.
    """
    if rounded is None:
        return nullcontext()
    try:
        return Rounding(model.llm, model.downs, *rounded, DTYPES["float16"], bits_of_parts(parts))
    except ValueError as error:
        raise fail(error) from error


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """The report of one k, with the means over tasks that the model wrote and that were given."""
    tasks = report["tasks"]

    def mean(name: str, chosen: list[dict[str, Any]]) -> float | None:
        return float(np.mean([task[name] for task in chosen])) if chosen else None

    own = [task for name, task in tasks.items() if name.startswith(OWN)]
    given = [task for name, task in tasks.items() if not name.startswith(OWN)]
    return report | {
        "mean_task_agreement": mean("agreement", list(tasks.values())),
        "own_kl": mean("kl", own),
        "given_kl": mean("kl", given),
    }


def evaluate_data(
    model: MaskedLM, dense: MaskedLM, data: DeviceData, keep: list[int], batch_tokens: int
) -> dict[str, dict[str, Any]]:
    """Reports of :func:`validate` for each k."""
    batches = by_length(data, batch_tokens)
    return {
        str(k): summary(
            validate(model, dense, data, batches, k, block=data.block, dtype=torch.float32)
        )
        for k in keep
    }


@torch.no_grad()
def greedy_answers(
    model: MaskedLM,
    tokenizer: Any,
    predictor_tokenizer: Any,
    questions: list[str],
    keep: list[int | None],
    max_tokens: int,
    rows: int = 256,
) -> list[list[str]]:
    """Answers to all questions at each k, one list a k; None is the dense model.

    Args:
        model (MaskedLM): each question runs under its own mask.
        tokenizer, predictor_tokenizer: the LLM's and the predictor's.
        questions (list): what a user says.
        keep (list): k of each list of answers.
        max_tokens (int): of an answer.
        rows (int): answers written at once.
    """
    device = next(model.llm.parameters()).device
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
        )
        for question in questions
    ]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # Whoever reads the LLM's own states reads the prompt as the LLM does.
    selecting = prompts if model.reads_own_state else predictor_tokenizer(questions)["input_ids"]
    wanted = [(i, k) for k in keep for i in range(len(questions))]
    answers: list[str] = []
    for start in range(0, len(wanted), rows):
        part = wanted[start : start + rows]
        masks = None
        if model.predictor is not None and any(k is not None for _, k in part):
            ids, mask = _padded([selecting[i] for i, _ in part], left=False)
            scores = model.scores(ids.to(device), mask.to(device))
            masks = torch.ones_like(scores)
            for k in {k for _, k in part if k is not None}:
                chosen = torch.tensor([own == k for _, own in part], device=device)
                mode = "soft" if model.mode == "soft" else "hard"
                masks[chosen] = model.masks(scores[chosen], k, mode=mode)
        ids, mask = _padded([prompts[i] for i, _ in part], left=True)
        with model.masked(masks) as llm:
            out = llm.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
            )
        answers += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
    n = len(questions)
    return [answers[i * n : (i + 1) * n] for i in range(len(keep))]


def _padded(rows: list[list[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and their mask, int64 [B, n]."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), None) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), 1
    return ids, mask


def table(runs: dict[str, dict[str, dict[str, Any]]]) -> str:
    """The results, a line for each run and k."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        "| run | k | KL, mean of tasks | own prompts | given prompts | same token | CE "
        "| overlap within | between |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, reports in runs.items():
        for k, r in reports.items():
            cells = [
                name, k, f"{r['mean_task_kl']:.3f}", number(r["own_kl"], ".3f"),
                number(r["given_kl"], ".3f"), number(r["mean_task_agreement"], ".1%"),
                f"{r['val_loss']:.3f}", number(r["overlap_within"], ".2f"),
                number(r["overlap_between"], ".2f"),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dense", required=True, help="the dense model: a transformers directory")
    add("--model", help="a trained checkpoint whose masks follow the prompt")
    add("--static", help="a trained checkpoint with one mask for all")
    add("--data", type=Path, metavar="FILE.jsonl", help="held-out rows with answers")
    add("--examples", type=int, help="only so many of them, evenly spread")
    add("--max-length", type=int, default=1024, help="longer rows are left out, in tokens")
    add("--keep", type=int, nargs="+", required=True, metavar="K")
    add(
        "--rounded",
        type=int,
        nargs=2,
        metavar=("BITS", "GROUP"),
        help="with the LLM's weights as convert -q rounds them",
    )
    add(
        "--rounded-bits-of",
        nargs="+",
        default=[],
        metavar="NAME=BITS",
        help="other bits for weights with this in their name",
    )
    add(
        "--questions",
        type=Path,
        metavar="FILE",
        help="a question a line; greedy answers at each k beside the dense model's",
    )
    add("--max-answer-tokens", type=int, default=96)
    add("--batch-tokens", type=int, help="of a batch, padding included")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--output", type=Path, required=True, metavar="FILE.json")
    return parser  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.output.exists():
        raise fail(f"{args.output} exists; name a new file or remove it.")
    if not (args.data or args.questions) or not (args.model or args.static):
        raise fail("give --data or --questions, and --model or --static.")
    try:
        results = run(args)
    except (DataError, ModelError) as error:
        raise fail(error) from error
    except torch.cuda.OutOfMemoryError as error:
        raise fail("out of GPU memory; lower --batch-tokens.") from error
    write_text(args.output, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if results["runs"]:
        print(table(results["runs"]))
    print(f"{args.output}: {results['seconds']:.0f} s")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All results, as they are written."""
    start = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    if on_gpu:
        # TF32: its error is far below that of 4 bits, and float32 is four times slower.
        torch.set_float32_matmul_precision("high")
    dense = MaskedLM(load_llm(args.dense)).to(device)
    questions = []
    if args.questions:
        lines = args.questions.read_text(encoding="utf-8").splitlines()
        questions = [line.strip() for line in lines if line.strip() and line[0] != "#"]
    results: dict[str, Any] = {"keep": args.keep, "rounded": args.rounded, "runs": {}}
    answers: dict[str, list[str]] = {}
    if questions:
        tokenizer = AutoTokenizer.from_pretrained(args.dense)
        made = greedy_answers(dense, tokenizer, tokenizer, questions, [None],
                              args.max_answer_tokens)  # fmt: skip
        answers["dense"] = made[0]
    for name, path in (("prompt", args.model), ("static", args.static)):
        if not path:
            continue
        model, tokenizer, predictor_tokenizer, _ = load_checkpoint(path)
        if model.channels < max(args.keep) or min(args.keep) < 1:
            raise fail(f"--keep must be between 1 and the {model.channels} channels of a layer.")
        model.to(device)
        with rounding_of(model, args.rounded, args.rounded_bits_of):
            if args.data:
                examples = load_examples(
                    args.data, tokenizer, predictor_tokenizer, max_length=args.max_length,
                    chat_format=model.reads_own_state,
                )  # fmt: skip
                if args.examples and args.examples < len(examples):
                    chosen = np.linspace(0, len(examples) - 1, args.examples).astype(int)
                    examples = [examples[i] for i in chosen]
                data = DeviceData(examples, device, 4096 if on_gpu else 256)
                tokens = args.batch_tokens or (32768 if on_gpu else 1024)
                results["runs"][name] = evaluate_data(model, dense, data, args.keep, tokens)
            if questions:
                made = greedy_answers(model, tokenizer, predictor_tokenizer, questions, args.keep,
                                      args.max_answer_tokens)  # fmt: skip
                for k, texts in zip(args.keep, made, strict=True):
                    answers[f"{name} {k}"] = texts
    if questions:
        results["answers"] = [
            {"question": question} | {name: texts[i] for name, texts in answers.items()}
            for i, question in enumerate(questions)
        ]
    return results | {"seconds": time.perf_counter() - start}


if __name__ == "__main__":
    sys.exit(main())
