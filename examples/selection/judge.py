"""KL divergence of the dense model to sub-networks on given answers, and the table of it."""

import argparse
import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache
from tqdm import tqdm

from mlx_ifp.fitting.examples import Example
from mlx_ifp.model import IFPModel
from mlx_ifp.selection.by_layer import ks_by_layer
from mlx_ifp.selection.ranks import ranks


@dataclass
class Method:
    """A way to choose channels.

    Attributes:
        scores: [L, d_ffn] for each answer, or None where it has no say.
        sizes: what compares layers, for k by layer; None keeps the same k in each.
        pruned: whether the sub-network reads the prompt, too.
    """

    scores: list[np.ndarray | None]
    sizes: list[np.ndarray | None] | None = None
    pruned: bool = False

    def mask(self, answer: int, k: int) -> np.ndarray | None:
        """Bool [L, d_ffn]: the channels for an answer, or None."""
        scores = self.scores[answer]
        if scores is None:
            return None
        ks = [k] * len(scores) if self.sizes is None else ks_by_layer(self.sizes[answer], k)
        return top(scores, ks)


def top(scores: np.ndarray, ks: list[int]) -> np.ndarray:
    """The mask of the k largest scores of each layer, where k may differ by layer."""
    return ranks(scores) > 1 - (np.array(ks)[:, None] - 0.5) / scores.shape[-1]


class Masked(nn.Module):
    """A down projection whose input is multiplied by a mask for each text of a batch."""

    def __init__(self, down_proj: nn.Module, layer: int, masks: list[mx.array | None]) -> None:
        super().__init__()
        self._down_proj, self._layer, self._masks = down_proj, layer, masks

    def __call__(self, z: mx.array) -> mx.array:
        masks = self._masks[0]
        return self._down_proj(z if masks is None else z * masks[:, self._layer, None])


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

    def __call__(
        self, example: Example, masks: np.ndarray, pruned: bool
    ) -> tuple[np.ndarray, np.ndarray]:
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
            if pruned:
                self._model(mx.repeat(mx.array([prompt]), len(chunk), axis=0), cache=caches)
            else:
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


def judge(args: argparse.Namespace, model: IFPModel, examples: list[Example], found: dict) -> dict:
    """(method, k) -> for each answer KL and agreement of its tokens, or None."""
    of, results = Judge(model), defaultdict(list)
    for i, example in enumerate(tqdm(examples, desc="Answers")):
        end = example.offset + args.judge_tokens
        example = Example(example.tokens[:end], example.offset)
        text = hashlib.sha256(np.array(example.tokens).tobytes()).hexdigest()[:32]
        file = args.work / "judged" / f"{text}.json"
        file.parent.mkdir(exist_ok=True)
        known = json.loads(file.read_text()) if file.exists() else {}
        for pruned in (False, True):
            wanted = {}
            for name, method in found.items():
                for k in args.keep:
                    mask = method.mask(i, k) if method.pruned == pruned else None
                    if mask is not None:
                        wanted[name, k] = mask
            packed = {pair: digest_of(mask, pruned) for pair, mask in wanted.items()}
            new = [pair for pair, digest in packed.items() if digest not in known]
            if new:
                masks = np.stack([wanted[pair] for pair in new])
                for pair, kl, same in zip(new, *of(example, masks, pruned), strict=True):
                    known[packed[pair]] = [kl.tolist(), same.tolist()]
                file.write_text(json.dumps(known))
            for pair, digest in packed.items():
                results[pair].append((i, *known[digest]))
    return results


def digest_of(mask: np.ndarray, pruned: bool) -> str:
    """What names a judgement of a mask."""
    digest = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()
    return f"{digest} pruned" if pruned else digest


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
