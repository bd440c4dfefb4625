"""A complete answer."""

from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..llm.prompt import Prompt
from ..model import IFPModel
from .stream import stream_generate


def generate(
    model: IFPModel,
    tokenizer: TokenizerWrapper,
    prompt: Prompt,
    task: str | None = None,
    verbose: bool = False,
    **kwargs: Any,
) -> str:
    """A complete answer from the sub-network that the task or the prompt selects.

    Args:
        model, tokenizer, prompt, task: as in :func:`stream_generate`.
        verbose (bool): print the text as it comes, and mlx-lm's figures.
        kwargs: passed on to :func:`stream_generate`.
    """
    text = ""
    response = None
    for response in stream_generate(model, tokenizer, prompt, task, **kwargs):
        text += response.text
        if verbose:
            print(response.text, end="", flush=True)
    if verbose and response is not None:
        print(
            f"\n{'=' * 10}\n"
            f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec\n"
            f"Generation: {response.generation_tokens} tokens, "
            f"{response.generation_tps:.3f} tokens-per-sec\n"
            f"Peak memory: {response.peak_memory:.3f} GB"
        )
    return text
