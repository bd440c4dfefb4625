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
import hashlib
import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

import mlx_ifp
from mlx_ifp.fitting.collect import Statistics, collect
from mlx_ifp.fitting.examples import Example
from mlx_ifp.fitting.ridge import fit_ridge
from mlx_ifp.model import IFPModel
from mlx_ifp.selection.ranks import ranks

OWN_TOKENS, REFERENCE_TOKENS, PROMPT_TOKENS = 72, 64, 220
TASK_EXAMPLES = 8
# Prompts of its own that are left out of the fit.
HELD_OUT = 60


class Masked(nn.Module):
    """A down projection whose input is multiplied by a mask for each text of a batch."""

    def __init__(self, down_proj: nn.Module, layer: int, masks: list[mx.array | None]) -> None:
        super().__init__()
        self._down_proj, self._layer, self._masks = down_proj, layer, masks

    def __call__(self, z: mx.array) -> mx.array:
        masks = self._masks[0]
        return self._down_proj(z if masks is None else z * masks[:, self._layer, None])


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


class Judge:
    """KL divergence of the dense model to masked ones, which read the answer after its prompt."""

    def __init__(self, model: IFPModel) -> None:
        self._masks: list[mx.array | None] = [None]
        self._model = model.dense()
        for i, ffn in enumerate(model.checkpoint.ffns):
            module = self._model
            for part in ffn.path.split("."):
                module = module[int(part)] if isinstance(module, list) else module[part]
            module.down_proj = Masked(module.down_proj, i, self._masks)

    def __call__(self, example: Example, masks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """KL and agreement, float32 [M, n - 1], of masks bool [M, L, d_ffn] on an answer of n."""
        prompt, answer = example.tokens[: example.offset], example.tokens[example.offset :]
        self._masks[0] = None
        cache = make_prompt_cache(self._model)
        mx.eval(self._model(mx.array([prompt]), cache=cache))
        stored = [layer.keys_and_values() for layer in cache]
        inputs = mx.array([answer[:-1]])
        dense = self._logprobs(inputs, cache)
        likely, best = mx.exp(dense), dense.argmax(axis=-1)
        divergence, agreement = [], []
        for start in range(0, len(masks), 8):
            chunk = masks[start : start + 8]
            self._masks[0] = mx.array(chunk.astype(np.float32))
            caches = make_prompt_cache(self._model)
            for layer, pair in zip(caches, stored, strict=True):
                keys, values = (mx.repeat(array, len(chunk), axis=0) for array in pair)
                layer.update_and_fetch(keys, values)
            masked = self._logprobs(mx.repeat(inputs, len(chunk), axis=0), caches)
            divergence.append((likely * (dense - masked)).sum(axis=-1))
            agreement.append((masked.argmax(axis=-1) == best).astype(mx.float32))
            mx.eval(divergence[-1], agreement[-1])
        self._masks[0] = None
        return np.concatenate(divergence), np.concatenate(agreement)

    def _logprobs(self, tokens: mx.array, cache: list) -> mx.array:
        logits = self._model(tokens, cache=cache).astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def top(scores: np.ndarray, k: int) -> np.ndarray:
    """The mask of the k largest scores of each layer."""
    return ranks(scores) > 1 - (k - 0.5) / scores.shape[-1]


def unit(values: np.ndarray) -> np.ndarray:
    """Unit norm in each layer."""
    return values / np.maximum(np.linalg.norm(values, axis=-1, keepdims=True), 1e-30)


def methods(args: argparse.Namespace, model: IFPModel, sets: dict, tasks: list[str]) -> dict:
    """Scores [answers, L, d_ffn] of each method, by its name."""
    shape = (-1, len(model.checkpoint.ffns), model.checkpoint.d_ffn)
    answers, own = sets["answers"], sets["own"]
    used = np.flatnonzero(~np.isin(sets["kinds"], args.without))
    prompts = np.asarray(answers.prompts, np.float32).reshape(shape)
    truth = np.asarray(answers.answers, np.float32).reshape(shape)
    found = {"griffin": list(prompts), "bound: the answer's own statistic": list(truth)}
    outputs = own.answers[used]
    prior = np.asarray(outputs, np.float32).mean(axis=0).reshape(shape[1:])
    found["prior"] = [prior] * len(prompts)
    found["glass: 0.5 griffin, 0.5 prior"] = [ranks(p) + ranks(prior) for p in prompts]
    ridge = fit_ridge(own.hidden[used], outputs, args.rank)
    print(f"fit: {len(used)} examples, lambda {ridge.strength}, errors {ridge.errors}")
    fitted = ridge(np.asarray(answers.hidden)).reshape(shape)
    for blend in args.blend:
        found[f"fit, {blend} griffin"] = [
            blend * ranks(p) + (1 - blend) * ranks(f) for p, f in zip(prompts, fitted, strict=True)
        ]
    for seed in (0, 1):
        shown = np.asarray(sets[f"task {seed}"].answers, np.float32).reshape(shape)
        of = sets[f"names {seed}"]
        means = {task: unit(shown[of == task]).mean(axis=0) for task in set(of)}
        scores = [means.get(task) for task in tasks]
        found[f"task from {TASK_EXAMPLES} examples, seed {seed}"] = scores
        found[f"glass task: 0.5 griffin, seed {seed}"] = [
            None if s is None else ranks(p) + ranks(s) for p, s in zip(prompts, scores, strict=True)
        ]
    return found


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, help="a checkpoint of the dense chat model")
    parser.add_argument("--work", type=Path, required=True, help="where statistics are kept")
    parser.add_argument("--own", type=Path, required=True, help="rows that the model wrote itself")
    parser.add_argument("--reference", type=Path, required=True, help="rows with a task, to judge")
    parser.add_argument("--tasks", type=Path, required=True, help="other rows of the same tasks")
    parser.add_argument("--examples", type=int, default=1000, help="to fit on")
    parser.add_argument("--without", nargs="*", default=[], help="kinds of own rows to leave out")
    parser.add_argument("--answers", type=int, default=10, help="reference answers of each task")
    parser.add_argument("--own-answers", type=int, default=32, help="own answers to judge")
    parser.add_argument("--keep", type=int, nargs="+", default=[768, 1152])
    parser.add_argument("--blend", type=float, nargs="+", default=[0.0, 0.3, 0.5])
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
        for method, scores in found.items():
            shares = []
            for i, own in enumerate(scores):
                squares = np.asarray(answers.answers[i], np.float32).reshape(own.shape) ** 2
                kept = (squares * top(own, k)).sum(axis=-1) / squares.sum(axis=-1)
                shares.append(1 - kept.mean())
            cells = (np.mean([shares[i] for i in group]) for group in groups.values())
            print(f"| {method} |", " | ".join(f"{cell:.3f}" for cell in cells), "|", flush=True)


def judge(args: argparse.Namespace, model: IFPModel, examples: list[Example], found: dict) -> dict:
    """(method, k) -> for each answer KL and agreement of its tokens, or None."""
    of, results = Judge(model), defaultdict(list)
    for i, example in enumerate(tqdm(examples, desc="Answers")):
        wanted = [(n, k) for n, scores in found.items() for k in args.keep if scores[i] is not None]
        masks = np.stack([top(found[name][i], k) for name, k in wanted])
        packed = [hashlib.sha256(np.packbits(mask).tobytes()).hexdigest() for mask in masks]
        text = hashlib.sha256(np.array(example.tokens).tobytes()).hexdigest()[:32]
        file = args.work / "judged" / f"{text}.json"
        file.parent.mkdir(exist_ok=True)
        known = json.loads(file.read_text()) if file.exists() else {}
        new = [j for j, name in enumerate(packed) if name not in known]
        if new:
            divergence, agreement = of(example, masks[new])
            for j, kl, same in zip(new, divergence, agreement, strict=True):
                known[packed[j]] = [kl.tolist(), same.tolist()]
            file.write_text(json.dumps(known))
        for pair, name in zip(wanted, packed, strict=True):
            results[pair].append((i, *known[name]))
    return results


def report(args: argparse.Namespace, names: list[str], results: dict) -> None:
    """Print a table: the mean over tasks of the mean over tokens."""
    tasks = sorted(set(names), key=lambda name: (name.startswith("own"), name))
    summary = {}
    for (method, k), answers in results.items():
        of_task = {}
        for task in tasks:
            of = [(kl, same) for i, kl, same in answers if names[i] == task]
            if of:
                parts = zip(*of, strict=True)
                of_task[task] = [float(np.concatenate(part).mean()) for part in parts]
        given = [v for task, v in of_task.items() if not task.startswith("own")]
        own = [v for task, v in of_task.items() if task.startswith("own")]
        summary[f"{method} | {k}"] = {
            "reference": np.mean(given, axis=0).tolist() if given else None,
            "own": np.mean(own, axis=0).tolist() if own else None,
            "tasks": of_task,
        }
    for group in ("reference", "own"):
        print(f"\n| {group} |", " | ".join(f"k = {k}" for k in args.keep), "|")
        print("| --- |", " | ".join("---" for _ in args.keep), "|")
        for method in dict.fromkeys(method for method, _ in results):
            cells = [summary.get(f"{method} | {k}", {}).get(group) for k in args.keep]
            if any(cells):
                print(f"| {method} |", " | ".join(f"{c[0]:.3f}, {c[1]:.0%}" for c in cells), "|")
    if args.json:
        args.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
