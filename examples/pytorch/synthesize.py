"""A chat model writes its own training data (Xu et al. 2024, "Magpie", arXiv 2406.08464).

    python synthesize.py --model smollm2 --output data/train.jsonl --minutes 10 --split-valid 400

After the beginning of a user turn a chat model continues with what users ask. What it writes until
the turn ends is a prompt, and what it answers to that prompt alone is the answer. Prompts begin in
three ways: with nothing (``free``), with the first words of a request (``openings``), or with a
text that the model wrote in an earlier answer, to be asked about (``reading``). With
``--prompts`` it also answers given prompts, and with ``--tasks`` it writes prompts for named tasks.

Each line of the output is ``{"messages": [user, assistant], "task": ...}``. ``"truncated": true``
says that the answer was cut: its last token is not followed by the end of a turn.
"""

import time

STARTED = time.perf_counter()  # a time limit counts the imports, too
# ruff: noqa: E402

import argparse
import json
import random
import sys
from pathlib import Path

import torch
from generation import Generator
from output import write_text
from rows import existing_rows, fail, given_prompts, split_valid
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging
from writer import PROMPT_TEMPERATURE, Synthesis


def parse_mix(text: str) -> list[tuple[str, float]]:
    """``free=0.5,openings=0.5`` as pairs."""
    pairs = []
    for part in text.split(","):
        name, _, share = part.partition("=")
        try:
            pairs.append((name.strip(), float(share)))
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part!r} is not KIND=SHARE") from None
        if pairs[-1][0] not in PROMPT_TEMPERATURE or pairs[-1][1] < 0:
            raise argparse.ArgumentTypeError(f"kinds are {', '.join(PROMPT_TEMPERATURE)}")
    return pairs


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="a chat model: a transformers directory")
    add("--output", type=Path, required=True, metavar="FILE.jsonl")
    add("--count", type=int, help="rows with prompts of the model's own (default: no limit)")
    add("--minutes", type=float, help="when to stop; what is unfinished then is kept as truncated")
    add("--prompts", type=Path, metavar="FILE.jsonl", help="given prompts, to be answered too")
    add("--prompts-count", type=int, metavar="N", help="only N of them, drawn at random")
    add(
        "--tasks",
        type=Path,
        metavar="FILE.yaml",
        help="task names, each with a description or a list of sentences that users say",
    )
    add(
        "--mix",
        type=parse_mix,
        metavar="KIND=SHARE,...",
        help="how own prompts begin (default: free=0.5,openings=0.3,reading=0.2; "
        "with --tasks: tasks=1)",
    )
    add(
        "--split-valid",
        type=int,
        default=0,
        metavar="N",
        help="move N rows to FILE-valid.jsonl in the end, half of them of given prompts",
    )
    add(
        "--valid-prompts",
        type=Path,
        metavar="FILE.jsonl",
        help="given prompts for FILE-valid.jsonl; never for the other file",
    )
    add("--valid-prompts-count", type=int, metavar="N", help="only N of them, drawn at random")
    add(
        "--answer-temperature",
        type=float,
        nargs="+",
        default=[0.7, 0.0, 1.0],
        help="one of these is drawn for each answer (default: 0.7 0 1)",
    )
    add("--prompt-temperature", type=float, default=1.0, help="a factor (default: 1)")
    add("--top-p", type=float, default=0.95)
    add("--max-prompt-tokens", type=int, default=128, help="that are sampled for a prompt")
    add("--max-answer-tokens", type=int, default=256)
    add(
        "--max-given-tokens",
        type=int,
        default=384,
        help="of a whole prompt with its template; longer ones are left out",
    )
    add("--batch-size", type=int, help="texts at once (default: what fits into the GPU)")
    add(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="default: bfloat16 on a GPU, else float32",
    )
    add("--device", help="default: cuda if there is one, else cpu")
    add("--no-graphs", action="store_true", help="run without CUDA graphs")
    add("--seed", type=int, default=0)
    add("--resume", action="store_true", help="append to a file that exists")
    add("--report", type=Path, metavar="FILE.json", help="write counts and speed there")
    return parser  # fmt: skip


def check_args(args: argparse.Namespace, valid: Path) -> None:
    if args.count is None and args.minutes is None and not args.prompts:
        raise fail("say when to stop: --count, --minutes or --prompts.")
    if args.mix is None:
        mix = "tasks=1" if args.tasks else "free=0.5,openings=0.3,reading=0.2"
        # Without a number of own rows, given prompts alone are answered.
        args.mix = parse_mix(mix) if args.count is not None or args.minutes else []
    if any(kind == "tasks" for kind, _ in args.mix) and not args.tasks:
        raise fail("tasks in --mix needs --tasks FILE.yaml.")
    if sum(share for _, share in args.mix) <= 0 and args.mix:
        raise fail("--mix needs a share above 0.")
    if min(args.answer_temperature) < 0 or not 0 < args.top_p <= 1:
        raise fail("temperatures cannot be below 0, and --top-p is above 0 and at most 1.")
    for path in (args.output, valid):
        if path.exists() and not args.resume:
            raise fail(f"{path} exists; add --resume to append to it, or name another --output.")
    if not Path(args.model).is_dir():
        raise fail(f"{args.model} is no directory; give a transformers model's.")


def load_model(args: argparse.Namespace) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = args.dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    try:
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        llm = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise fail(f"{args.model} is no chat model that transformers loads: {reason}") from error
    return llm.to(device).eval(), tokenizer


def end_tokens(llm: torch.nn.Module) -> list[int]:
    """Ids that end an answer, as ``generate`` has them."""
    ids = getattr(llm.generation_config, "eos_token_id", None)
    ids = llm.config.get_text_config().eos_token_id if ids is None else ids
    return [ids] if isinstance(ids, int) else list(ids or [])


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    valid = args.output.with_name(f"{args.output.stem}-valid{args.output.suffix}")
    check_args(args, valid)
    chance = random.Random(args.seed)
    given = given_prompts(args.prompts, args.prompts_count, chance) if args.prompts else []
    held_out = []
    if args.valid_prompts:
        held_out = given_prompts(args.valid_prompts, args.valid_prompts_count, chance)
    llm, tokenizer = load_model(args)
    old, old_valid = existing_rows(args.output), existing_rows(valid)
    # What comes next must not be what came first.
    args.seed += len(old) + len(old_valid)
    torch.manual_seed(args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        open(args.output, "a", encoding="utf-8") as train_file,
        open(valid, "a", encoding="utf-8") as valid_file,
    ):
        synthesis = Synthesis(tokenizer, args, {False: train_file, True: valid_file})
        synthesis.mix = dict(args.mix)
        done = set()
        for row in old + old_valid:
            users = [m for m in row["messages"] if m["role"] == "user"]
            done.add(users[0]["content"])
            if row.get("source") == "own":
                synthesis.duplicates.add(users[0]["content"])
                synthesis.own += 1
        in_valid = {p["messages"][-1]["content"] for p in held_out}
        for prompts, is_valid in ((given, False), (held_out, True)):
            synthesis.add_given(
                (
                    p
                    for p in prompts
                    if p["messages"][-1]["content"] not in done
                    and (is_valid or p["messages"][-1]["content"] not in in_valid)
                ),
                is_valid,
            )
        longest = args.max_given_tokens + max(args.max_answer_tokens, args.max_prompt_tokens)
        stops = [synthesis.template.end, *end_tokens(llm)]
        try:
            generator = Generator(
                llm, stops, longest, args.batch_size, args.top_p, graphs=not args.no_graphs
            )
            until = None
            if args.minutes:
                until = STARTED + 60 * args.minutes
                # Prompts that begin in the last seconds would get no answers.
                synthesis.no_more_prompts_at = until - min(10, 0.1 * 60 * args.minutes)
            stats = generator.run(synthesis.next_requests, synthesis.on_complete, until)
        except torch.cuda.OutOfMemoryError as error:
            raise fail("out of GPU memory; lower --batch-size. Written rows are kept.") from error
    if valid.stat().st_size == 0:
        valid.unlink()
    moved = 0
    if args.split_valid:
        moved = split_valid(args.output, valid, args.split_valid, random.Random(args.seed))
    if synthesis.hopeless:
        print(
            f"[WARNING] {synthesis.kept} of {synthesis.tried:,} prompts were of use, so no more "
            "were written; it takes a chat model that knows what users say."
        )
    report = {
        "rows": dict(synthesis.rows),
        "truncated": synthesis.truncated,
        "rejected": dict(synthesis.rejected),
        "valid_rows": moved or len(existing_rows(valid)),
        "batch_size": generator.slots,
        "sampled_tokens": stats.sampled,
        "prompt_tokens": stats.prompt,
        "generation_seconds": stats.seconds,
        "tokens_per_second": stats.sampled / max(stats.seconds, 1e-9),
        "seconds": time.perf_counter() - STARTED,
        "notes": stats.notes,
    }
    if args.report:
        write_text(args.report, json.dumps(report, indent=2) + "\n")
    print(
        f"{args.output}: {sum(synthesis.rows.values()):,} new rows "
        f"({', '.join(f'{n:,} {task}' for task, n in sorted(synthesis.rows.items()))}), "
        f"{synthesis.truncated:,} truncated, {sum(synthesis.rejected.values()):,} refused "
        f"({', '.join(f'{n:,} {why}' for why, n in synthesis.rejected.most_common())}); "
        f"{stats.sampled:,} tokens in {stats.seconds:.0f} s, "
        f"{report['tokens_per_second']:,.0f} tokens/s"
    )


if __name__ == "__main__":
    sys.exit(main())
