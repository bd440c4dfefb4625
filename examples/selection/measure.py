"""Compare ways to choose channels without training the LLM.

The measure is the KL divergence of the dense model's next-token distribution to the sub-network's,
on given answers, where the dense model has read the prompt. The first token of an answer does not
count, because it comes from the dense model. Results of each answer are kept in --work, so that a
stopped run goes on. Before that it prints how much of what the channels do in the answer each
selection leaves out, which costs next to nothing; --quick stops there.

    python examples/selection/measure.py --model smollm2-ifp --work selection-work \\
        --own examples/default_model/conversations.jsonl.gz \\
        --reference data/instructions-valid.jsonl --tasks data/instructions-train.jsonl
"""

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from judge import Method, judge, report
from tqdm import tqdm

import mlx_ifp
from mlx_ifp.cli.dispatch import script
from mlx_ifp.dense_pass.statistics import text_statistics
from mlx_ifp.files.atomic import new_file
from mlx_ifp.fitting.collect import Statistics, collect
from mlx_ifp.fitting.examples import Example
from mlx_ifp.fitting.ridge import fit_ridge
from mlx_ifp.model import IFPModel
from mlx_ifp.selection.by_layer import standardised
from mlx_ifp.selection.ranks import ranks
from mlx_ifp.selectors.scoring import norms_of

OWN_TOKENS, REFERENCE_TOKENS, PROMPT_TOKENS = 72, 64, 220
TASK_EXAMPLES = 8
# Prompts of its own that are left out of the fit.
HELD_OUT = 60


def rows_of(path: Path) -> list[dict]:
    """Rows of a JSONL file, which may be compressed."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        return [json.loads(line) for line in file]


def example_of(tokenizer, row: dict, tokens: int) -> Example:
    """The first prompt of a row and its answer, with the end of the turn unless it was cut."""
    messages = row["messages"]
    end = [message["role"] for message in messages].index("user") + 1
    prompt = list(tokenizer.apply_chat_template(messages[:end], add_generation_prompt=True))
    answer = tokenizer.encode(messages[end]["content"], add_special_tokens=False)
    if not row.get("truncated"):
        answer.append(tokenizer.eos_token_id)
    return Example(prompt + answer[:tokens], len(prompt))


def shuffled(rows: list[dict], chance: random.Random) -> list[dict]:
    """A copy in another order."""
    rows = list(rows)
    chance.shuffle(rows)
    return rows


def of_each_task(rows: list[dict], count: int) -> Iterator[dict]:
    """The first rows of each task."""
    seen: Counter[str] = Counter()
    for row in rows:
        seen[row["task"]] += 1
        if seen[row["task"]] <= count:
            yield row


def measured(model: IFPModel, examples: list[Example], directory: Path, name: str) -> Statistics:
    """Statistics of examples, kept on disk."""
    checkpoint, ffns = model.checkpoint, model.checkpoint.ffns
    shape = (len(ffns), ffns[0].d_ffn, ffns[0].hidden_size)
    statistics = Statistics(
        directory / name, checkpoint.digest, examples, *shape, prompts=name == "answers"
    )
    done = len(examples) - len(statistics.missing)
    with tqdm(desc=f"Statistics of {name}", total=len(examples), initial=done) as bar:
        collect(model.parent, statistics, bar.update)
    return statistics


def unit(values: np.ndarray) -> np.ndarray:
    """Unit norm in each layer."""
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-30)


def of_prompts(model: IFPModel, examples: list[Example], directory: Path) -> np.ndarray:
    """The statistic `probe` of prompts, float32 [N, L, d_ffn], kept on disk."""
    file = directory / "probe.npy"
    if not file.exists():
        texts = [example.tokens[: example.offset] for example in examples]
        with new_file(file) as temporary, open(temporary, "wb") as opened:
            np.save(opened, text_statistics(model.parent, texts, statistic="probe").values)
    return np.load(file)


def methods(args: argparse.Namespace, model: IFPModel, sets: dict, tasks: list[str]) -> dict:
    """The methods, by their names."""
    shape = (-1, len(model.checkpoint.ffns), model.checkpoint.d_ffn)
    answers, own = sets["answers"], sets["own"]
    used = np.flatnonzero(~np.isin(sets["kinds"], args.without))
    prompts = np.asarray(answers.prompts, np.float32).reshape(shape)
    truth = np.asarray(answers.answers, np.float32).reshape(shape)
    norms = np.array(norms_of(model.checkpoint))
    sizes = [standardised(p * norms) for p in prompts]
    griffin = [ranks(p) for p in prompts]
    found = {
        "griffin": Method(griffin),
        "griffin, pruned prefill": Method(griffin, pruned=True),
        "griffin, k by layer": Method(griffin, sizes),
        "norm": Method([ranks(p * norms) for p in prompts]),
        "probe": Method([ranks(p) for p in sets["probe"]]),
        "bound: the answer's own statistic": Method([ranks(a) for a in truth]),
    }
    outputs = own.answers[used]
    prior = np.asarray(outputs, np.float32).mean(axis=0).reshape(shape[1:])
    found["prior"] = Method([ranks(prior)] * len(prompts))
    glass = [g + ranks(prior) for g in griffin]
    found["glass: 0.5 griffin, 0.5 prior"] = Method(glass)
    found["glass, pruned prefill"] = Method(glass, pruned=True)
    ridge = fit_ridge(own.hidden[used], outputs, args.rank)
    print(f"fit: {len(used)} examples, lambda {ridge.strength}, errors {ridge.errors}")
    fitted = ridge(np.asarray(answers.hidden)).reshape(shape)
    for count in args.fit_on:
        fewer = fit_ridge(own.hidden[used[:count]], own.answers[used[:count]], args.rank)
        guesses = fewer(np.asarray(answers.hidden)).reshape(shape)
        share = args.blend[0]
        found[f"fit on {count}, {share} griffin"] = Method(
            [share * g + (1 - share) * ranks(f) for g, f in zip(griffin, guesses, strict=True)]
        )
    for blend in args.blend:
        scores = [blend * g + (1 - blend) * ranks(f) for g, f in zip(griffin, fitted, strict=True)]
        name = f"fit, {blend} griffin"
        found[name] = Method(scores)
        if blend == args.blend[0]:
            found[f"{name}, pruned prefill"] = Method(scores, pruned=True)
            by = [blend * s + (1 - blend) * standardised(f * norms)
                  for s, f in zip(sizes, fitted, strict=True)]  # fmt: skip
            found[f"{name}, k by layer"] = Method(scores, by)
    for seed in (0, 1):
        of, shown = sets[f"names {seed}"], sets[f"task {seed}"]
        measured = unit(np.asarray(shown.answers, np.float32).reshape(shape))
        predicted = unit(ridge(np.asarray(shown.hidden)).reshape(shape))

        def mean(values: np.ndarray) -> list[np.ndarray | None]:
            means = {task: ranks(values[of == task].mean(axis=0)) for task in set(of)}  # noqa: B023
            return [means.get(task) for task in tasks]

        def blend(*parts: tuple[float, list]) -> list[np.ndarray | None]:
            columns = zip(*(scores for _, scores in parts), strict=True)
            return [
                None if any(each is None for each in column)
                else sum(weight * each for (weight, _), each in zip(parts, column, strict=True))
                for column in columns
            ]  # fmt: skip

        task, guess = mean(measured), mean(predicted)
        fit = found[f"fit, {args.blend[0]} griffin"].scores
        name = f"task from {TASK_EXAMPLES} examples"
        found[f"{name}, seed {seed}"] = Method(task)
        found[f"mean prediction for {TASK_EXAMPLES} examples, seed {seed}"] = Method(guess)
        # Both are of the same kind, so they are added as they are.
        added = mean(0.7 * measured + 0.3 * predicted)
        found[f"{name}, 0.3 mean prediction, seed {seed}"] = Method(added)
        found[f"{name}, 0.5 griffin, seed {seed}"] = Method(blend((0.5, task), (0.5, griffin)))
        found[f"{name}, 0.5 fit, seed {seed}"] = Method(blend((0.5, task), (0.5, fit)))
    return found


@script
def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a checkpoint of the dense chat model")
    parser.add_argument("--work", type=Path, required=True, help="where statistics are kept")
    parser.add_argument("--own", type=Path, required=True, help="rows that the model wrote itself")
    parser.add_argument("--reference", type=Path, required=True, help="rows with a task, to judge")
    parser.add_argument("--tasks", type=Path, required=True, help="other rows of the same tasks")
    parser.add_argument("--examples", type=int, default=1000, help="to fit on")
    parser.add_argument("--fit-on", type=int, nargs="*", default=[], help="so many of them, too")
    parser.add_argument("--without", nargs="*", default=[], help="kinds of own rows to leave out")
    parser.add_argument("--answers", type=int, default=10, help="reference answers of each task")
    parser.add_argument("--own-answers", type=int, default=32, help="own answers to judge")
    parser.add_argument("--judge-tokens", type=int, default=32, help="of an answer are judged")
    parser.add_argument("--keep", type=int, nargs="+", default=[768, 1152])
    parser.add_argument("--blend", type=float, nargs="+", default=[0.3])
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--only", nargs="+", help="names of methods that begin so")
    parser.add_argument("--quick", action="store_true", help="judge no answers")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    model, tokenizer = mlx_ifp.load(args.model, cache=False)
    chance = random.Random(0)
    own_rows = []
    for row in shuffled(rows_of(args.own), chance):
        example = example_of(tokenizer, row, OWN_TOKENS)
        if example.offset <= PROMPT_TOKENS and len(example.tokens) - example.offset >= 6:
            own_rows.append((row, example))
        if len(own_rows) >= args.examples + HELD_OUT:
            break
    reference = shuffled(rows_of(args.reference), chance)
    shown = shuffled(rows_of(args.tasks), chance)
    judged = own_rows[: args.own_answers]
    names = ["own" if row["task"] != "own-reading" else row["task"] for row, _ in judged]
    rows = list(of_each_task(reference, args.answers))
    examples = [example for _, example in judged]
    examples += [example_of(tokenizer, row, REFERENCE_TOKENS) for row in rows]
    names += [row["task"] for row in rows]
    sets = {
        "kinds": np.array([row["task"] for row, _ in own_rows[HELD_OUT:]]),
        "answers": measured(model, examples, args.work, "answers"),
        "own": measured(model, [e for _, e in own_rows[HELD_OUT:]], args.work, "own"),
    }
    for seed in (0, 1):
        rows = list(of_each_task(shown, (seed + 1) * TASK_EXAMPLES))
        rows = list(of_each_task(rows[::-1], TASK_EXAMPLES)) if seed else rows
        made = [example_of(tokenizer, row, OWN_TOKENS) for row in rows]
        sets[f"task {seed}"] = measured(model, made, args.work, f"task-{seed}")
        sets[f"names {seed}"] = np.array([row["task"] for row in rows])
    sets["probe"] = of_prompts(model, examples, args.work)
    found = methods(args, model, sets, names)
    if args.only:
        found = {n: s for n, s in found.items() if n.startswith(tuple(args.only))}
    left_out(args, names, found, sets["answers"])
    if not args.quick:
        report(args, names, judge(args, model, examples, found))


def left_out(args: argparse.Namespace, names: list[str], found: dict, answers: Statistics) -> None:
    """Print the share of the answers' squared activations that selections leave out."""
    groups = {
        "own": [i for i, name in enumerate(names) if name == "own"],
        "own, a text to read": [i for i, name in enumerate(names) if name == "own-reading"],
        "reference": [i for i, name in enumerate(names) if not name.startswith("own")],
        "of it, code": [i for i, name in enumerate(names) if name == "code"],
        "of it, reading": [i for i, name in enumerate(names) if name == "reading"],
    }
    for k in args.keep:
        print(f"\n| share left out, k = {k} |", " | ".join(groups), "|")
        print("| --- |", " | ".join("---" for _ in groups), "|")
        for name, method in found.items():
            shares = []
            for i in range(len(names)):
                mask = method.mask(i, k)
                if mask is None:
                    shares.append(np.nan)
                    continue
                squares = np.asarray(answers.answers[i], np.float32).reshape(mask.shape) ** 2
                kept = (squares * mask).sum(axis=-1) / squares.sum(axis=-1)
                shares.append(1 - kept.mean())
            cells = (np.mean([shares[i] for i in group]) for group in groups.values())
            print(f"| {name} |", " | ".join(f"{cell:.4f}" for cell in cells), "|", flush=True)


if __name__ == "__main__":
    main()
