"""Make a checkpoint's prior: what its channels do on answers to prompts that it makes up itself."""

import io
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ifp.checkpoint.config import CONFIG_FILE
from mlx_ifp.checkpoint.directory import STATIC_FILE, open_checkpoint
from mlx_ifp.device import default_cache_bytes, default_dtype
from mlx_ifp.errors import IFPError
from mlx_ifp.files.tensor_files import write_safetensors
from mlx_ifp.llm.build import untouched_random_state
from mlx_ifp.selectors.examples import Example, score_examples
from mlx_ifp.subnetwork.build import assemble
from mlx_ifp.subnetwork.parent import Parent
from mlx_ifp.subnetwork.rows import read_ffn
from mlx_ifp.synthesis.sampling import (
    Request,
    check_batchable,
    safe_batch_size,
    sample_texts,
)
from mlx_ifp.synthesis.user_turn import UserTurn
from mlx_ifp.synthesis.writer import Synthesis, SynthesisArgs

# Prompts that are written, unless the user says how many.
PROMPTS = 64
# The most tokens of a prompt and of an answer.
PROMPT_TOKENS, ANSWER_TOKENS = 64, 48
# A prior that nobody asked for takes no longer than this.
SECONDS = 180.0
# Prompts that become no rows are made up for until this share of all is there. With fewer rows
# than the least there is no prior.
_SHARE, _LEAST = 0.75, 8
_BATCH_SIZE, _TRIAL_TOKENS = 32, 4


class TooSlow(IFPError):
    """A prior that nobody asked for would take too long."""


def add_prior(
    directory: Path, tokenizer: TokenizerWrapper, prompts: int, seconds: float = math.inf
) -> str:
    """Add static scores to a checkpoint that nobody uses yet, and let ``glass`` select.

    The dense model is in memory while it writes.

    Args:
        directory (Path): the checkpoint; its config is replaced.
        tokenizer: of its LLM.
        prompts (int): how many prompts the model makes up.
        seconds (float): the most that this may take.

    Returns:
        str: what was done, for the user.

    Raises:
        IFPError: if there is no prior to be had: the model does not fit into memory, has no chat
            template, or writes hardly anything of use; :class:`TooSlow` if there is no time.
    """
    start = time.perf_counter()
    checkpoint = open_checkpoint(directory)
    parent = Parent.load(checkpoint, default_dtype())
    turn = UserTurn(tokenizer)
    if parent.reader.nbytes > default_cache_bytes():
        raise IFPError("the whole model, which writes it, has no room in memory.")
    network = assemble(
        parent, [read_ffn(parent.reader, ffn, None, dtype=parent.dtype) for ffn in parent.ffns]
    )
    check_batchable(network)
    with untouched_random_state():
        batch = safe_batch_size(network, turn.beginning([]), min(prompts, _BATCH_SIZE))
        if math.isfinite(seconds):
            _check_time(network, turn, prompts, batch, seconds)
        rows = _rows(network, tokenizer, prompts, batch, start + seconds)
    examples = [_example(turn, tokenizer, row["messages"]) for row in rows]
    # The statistic is measured layer by layer, and the memory is wanted for that.
    del network
    with tqdm(total=len(examples), desc="Prior, statistic") as bar:
        found = score_examples(parent, examples, progress=bar.update)
    ifp = checkpoint.ifp
    ifp.files[STATIC_FILE] = write_safetensors(
        directory / STATIC_FILE, {"scores": mx.array(found.scores)}
    )
    ifp.source = ifp.source | {
        "prior": {
            "statistic": "griffin",
            "prompts": len(examples),
            "answer_tokens": sum(found.lengths),
        }
    }
    if ifp.head is None:
        ifp.selector = "glass"
    (directory / CONFIG_FILE).write_text(ifp.to_json())
    return (
        f"The prior comes from {len(examples)} prompts that the model made up and its answers, "
        f"{sum(found.lengths):,} tokens, in {time.perf_counter() - start:.0f} s."
    )


def _check_time(
    network: nn.Module, turn: UserTurn, prompts: int, batch: int, seconds: float
) -> None:
    """Raises TooSlow if a few tokens say that a prior takes too long."""
    request = Request(turn.beginning([]), _TRIAL_TOKENS, 1.0)

    def trial() -> float:
        start = time.perf_counter()
        for _ in sample_texts(network, [request] * batch, set(), top_p=1.0, batch_size=batch):
            pass
        return time.perf_counter() - start

    # The first time includes what is done once.
    trial()
    steps = math.ceil(prompts / batch) * (PROMPT_TOKENS + ANSWER_TOKENS)
    needed = trial() / _TRIAL_TOKENS * steps
    if needed > seconds:
        minutes = math.ceil(needed / 60)
        raise TooSlow(f"it would take about {minutes} minute{'s' * (minutes > 1)}.")


def _rows(
    network: nn.Module, tokenizer: TokenizerWrapper, prompts: int, batch: int, deadline: float
) -> list[dict[str, Any]]:
    """Prompts that the model makes up, with its greedy answers."""
    args = SynthesisArgs(
        count=prompts,
        batch_size=batch,
        max_prompt_tokens=PROMPT_TOKENS,
        max_answer_tokens=ANSWER_TOKENS,
        answer_temps=(0.0,),
    )
    file = io.StringIO()
    with tqdm(total=prompts, desc="Prior, answers") as bar:
        synthesis = Synthesis(network, tokenizer, args, file, on_row=bar.update)

        def enough() -> bool:
            return synthesis.own >= _SHARE * prompts or time.perf_counter() > deadline

        synthesis.write(enough)
    rows = [json.loads(line) for line in file.getvalue().splitlines()]
    if len(rows) < min(_LEAST, prompts):
        reasons = ", ".join(f"{n:,} {why}" for why, n in synthesis.refused.most_common())
        raise IFPError(
            f"of the prompts that the model made up only {len(rows)} were of use"
            + (f" (refused: {reasons})." if reasons else ".")
        )
    return rows


def _example(
    turn: UserTurn, tokenizer: TokenizerWrapper, messages: Sequence[dict[str, Any]]
) -> Example:
    """A prompt and its answer as the model wrote them."""
    tokens = turn.question(list(messages[:-1]))
    answer = tokenizer.encode(messages[-1]["content"], add_special_tokens=False)
    return Example(tokens + answer, (len(tokens), len(tokens) + len(answer)))
