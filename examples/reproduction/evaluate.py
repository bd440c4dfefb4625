"""Compare the arms on validation data. Each runs as a user would run it.

    python evaluate.py --model smollm2-float --data data --runs runs --output results.json

Every answer is scored under the sub-network that its own text selects. The scores are
cross-entropy, the full KL(dense || sub-network) of each token, and whether greedy decoding gives
the reference answer (that is, every token of it is the likeliest). Results are written after each
arm. Run the script again to go on.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import yaml
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp import IFPModel, load
from mlx_ifp.cli.dispatch import script
from mlx_ifp.evaluation.scoring import answer_logprobs, read_prompt, score
from mlx_ifp.selection.overlap import overlap_summary
from mlx_ifp.selection.selection import Selection
from mlx_ifp.subnetwork.prepared import Prepared
from mlx_ifp.tuner.data import Example, load_examples

HERE = Path(__file__).parent
# The tasks whose answers are a few words.
SHORT = ("commonsense", "paraphrase", "reading", "science")
# Some sub-networks stay in memory, for the prompts of one task or for reuse.
CACHE_BYTES = 4 << 30
Prepare = Callable[[Example], Prepared]


def first_of_each(examples: list[Example], per_task: int) -> list[Example]:
    """The first ``per_task`` examples of each task."""
    counts: dict[str | None, int] = defaultdict(int)
    chosen = []
    for example in examples:
        counts[example.task] += 1
        if counts[example.task] <= per_task:
            chosen.append(example)
    return chosen


def logprobs_of(network: Any, example: Example) -> mx.array:
    """Log-probabilities of an answer's tokens: float32 [tokens, vocabulary]."""
    read = read_prompt(network, example.tokens[: example.offset])
    return answer_logprobs(network, read, example.tokens[example.offset :])


class Scorer:
    """Scores answers against the dense model, whose log-probabilities are kept in memory."""

    def __init__(self, dense: Any, tokenizer: TokenizerWrapper, examples: list[Example]) -> None:
        self.tokenizer, self.examples = tokenizer, examples
        self.dense = []
        for example in examples:
            logprobs = logprobs_of(dense, example)
            mx.eval(logprobs)
            self.dense.append(logprobs)

    def score(self, i: int, logprobs: mx.array) -> dict[str, float]:
        """Sums over the answer's tokens, and what greedy decoding would give."""
        answer = self.examples[i].tokens[self.examples[i].offset :]
        one = score(self.dense[i], logprobs, answer)
        text = [token not in self.tokenizer.all_special_ids for token in answer]
        return {
            "ce": one.ce,
            "kl": one.kl,
            "tokens": one.tokens,
            "exact": float(all(one.right)),
            "begins": float(all(one.right[: sum(text)])),
        }

    def arm(self, prepare: Prepare, math: int) -> dict[str, Any]:
        """Score all examples under the networks that ``prepare`` gives.

        Args:
            prepare (Callable): example -> a network ready to run.
            math (int): word problems to answer by decoding.
        """
        rows: dict[str, list[dict[str, float]]] = defaultdict(list)
        selections: list[Selection] = []
        solved: list[bool] = []
        reused = 0
        for i, example in enumerate(self.examples):
            ready = prepare(example)
            rows[example.task].append(self.score(i, logprobs_of(ready.network, example)))
            if ready.selection is not None:
                selections.append(ready.selection)
            reused += ready.reuse_overlap is not None
            if example.task == "math" and len(solved) < math:
                solved.append(self._solves(ready.network, example))
        tasks = {}
        for task, scores in sorted(rows.items()):
            tokens = sum(score["tokens"] for score in scores)
            tasks[task] = {
                "ce": sum(score["ce"] for score in scores) / tokens,
                "kl": sum(score["kl"] for score in scores) / tokens,
                "exact": float(np.mean([score["exact"] for score in scores])),
                "begins": float(np.mean([score["begins"] for score in scores])),
                "examples": len(scores),
                "tokens": tokens,
            }
        result: dict[str, Any] = {"tasks": tasks, "reused": reused}
        for name in ("ce", "kl"):
            result[name] = float(np.mean([task[name] for task in tasks.values()]))
        for name in ("exact", "begins"):
            result[name] = float(np.mean([tasks[task][name] for task in SHORT if task in tasks]))
        if solved:
            result["math_solved"], result["math_problems"] = sum(solved), len(solved)
        if selections:
            names = [example.task for example in self.examples]
            result["overlap"] = asdict(overlap_summary(selections, names))
        return result

    def _solves(self, network: Any, example: Example) -> bool:
        """Whether the last number of a decoded answer is that of the reference."""
        reference = self.tokenizer.decode(example.tokens[example.offset :])
        answer = mlx_lm.generate(
            network, self.tokenizer, example.tokens[: example.offset], max_tokens=160
        )
        found, wanted = (re.findall(r"-?\d[\d,]*\.?\d*", text) for text in (answer, reference))
        last = [numbers[-1].strip(",.") if numbers else None for numbers in (found, wanted)]
        return last[0] is not None and last[0] == last[1]


def random_selection(model: IFPModel, k: int, seed: int) -> Selection:
    """k channels of each layer, drawn at random."""
    random, checkpoint = np.random.default_rng(seed), model.checkpoint
    layers = tuple(
        np.sort(random.permutation(checkpoint.d_ffn)[:k]).astype(np.int32) for _ in checkpoint.ffns
    )
    return Selection(layers, None, checkpoint.d_ffn, checkpoint.digest)


def table(results: dict[str, Any]) -> str:
    """A Markdown table of means over tasks."""
    tasks = sorted(next(iter(results.values()))["tasks"])
    lines = [
        "| arm | CE | KL | exact | begins | math | within | between | "
        + " | ".join(f"KL {task}" for task in tasks) + " |",
        "| --- " * (8 + len(tasks)) + "|",
    ]  # fmt: skip
    for arm, result in results.items():
        overlap = result.get("overlap", {})
        cells = [f"{result[name]:.3f}" for name in ("ce", "kl")]
        cells += [f"{result[name]:.1%}" for name in ("exact", "begins")]
        cells.append(f"{result['math_solved']}/{result['math_problems']}"
                     if "math_solved" in result else "-")  # fmt: skip
        cells += [f"{overlap[name]:.3f}" if overlap.get(name) is not None else "-"
                  for name in ("within", "between")]  # fmt: skip
        cells += [f"{result['tasks'][task]['kl']:.3f}" for task in tasks]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@script
def main() -> None:
    """Evaluate what is not in the output yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="The source as a checkpoint of mlx_ifp")
    parser.add_argument("--data", required=True, help="Directory with {train,valid}.jsonl")
    parser.add_argument("--runs", type=Path, required=True, help="Directory of run.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON with the results")
    parser.add_argument("--per-task", type=int, default=20, help="Examples of each task")
    parser.add_argument("--math", type=int, default=10, help="Word problems to decode")
    parser.add_argument("--keep", type=int, nargs="*", default=[768, 384], help="Untrained arms")
    parser.add_argument(
        "--reuse-overlap",
        type=float,
        nargs="+",
        default=[],
        metavar="X",
        help="Also with sub-networks reused for selections that overlap this much",
    )
    args = parser.parse_args()
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}

    source, tokenizer = load(args.model, cache=False, cache_bytes=CACHE_BYTES)
    texts = yaml.safe_load((HERE / "tasks.yaml").read_text(encoding="utf-8"))

    def examples_of(model: IFPModel, task_texts: dict[str, str] | None = None) -> list[Example]:
        # The text that selects is tokenized as each model's config says, and the configs differ.
        text = model.checkpoint.ifp.text
        own = model.selector_tokenizer()
        data = load_examples(args.data, tokenizer, own, text, task_texts=task_texts)
        return first_of_each(data["valid"], args.per_task)

    scorer = Scorer(source.dense(), tokenizer, examples_of(source))

    def keep(arm: str, prepare: Prepare) -> None:
        if arm not in results:
            results[arm] = scorer.arm(prepare, args.math)
            args.output.write_text(json.dumps(results, indent=1) + "\n")
            print(arm, f"CE {results[arm]['ce']:.3f} KL {results[arm]['kl']:.3f}", flush=True)

    keep("dense", lambda _: source.prepare(dense=True))
    for k in args.keep:
        drawn = random_selection(source, k, seed=0)
        keep(f"random-{k}", lambda _, s=drawn: source.prepare(selection=s))
        keep(
            f"activations-{k}",
            lambda e, k=k: source.prepare(e.selecting, selector="activations", keep=k),
        )
    for run in sorted(args.runs.glob("*-*-*")):
        for reuse in (None, *args.reuse_overlap):
            arm = run.name if reuse is None else f"{run.name}, reuse {reuse}"
            if arm in results or not (run / "ifp").exists():
                continue
            model, _ = load(run / "ifp", cache=False, cache_bytes=CACHE_BYTES, reuse_overlap=reuse)
            own = examples_of(model, texts if run.name.startswith("task") else None)
            selecting = {
                id(example): its.selecting
                for example, its in zip(scorer.examples, own, strict=True)
            }
            keep(arm, lambda e, m=model, selecting=selecting: m.prepare(selecting[id(e)]))
    print(table(results))


if __name__ == "__main__":
    main()
