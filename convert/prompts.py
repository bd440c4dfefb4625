"""Read the prompts that calibrate a checkpoint's order or make its static scores."""

from pathlib import Path

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ifp.checkpoint.config import CONFIG_FILE, IFPConfig
from mlx_ifp.checkpoint.directory import STATIC_FILE, open_checkpoint
from mlx_ifp.device import default_dtype
from mlx_ifp.errors import IFPError
from mlx_ifp.files.jsonl import read_jsonl
from mlx_ifp.files.tensor_files import write_safetensors
from mlx_ifp.files.text import read_text
from mlx_ifp.llm.messages import row_messages
from mlx_ifp.selectors.selector import Selector
from mlx_ifp.selectors.text import selecting_text
from mlx_ifp.subnetwork.parent import Parent


def read_prompts(path: Path) -> list[str]:
    """Read a prompt per line; a .jsonl file has it in ``messages``, ``prompt`` or ``text``."""
    if path.suffix.lower() == ".jsonl":
        prompts = read_jsonl(path, lambda row, _: str(selecting_text(row_messages(row))))
    else:
        prompts = [line for line in read_text(path).split("\n") if line.strip()]
    if not prompts:
        raise IFPError(f"{path} has no prompts.")
    return prompts


def add_static_scores(
    directory: Path, ifp: IFPConfig, tokenizer: TokenizerWrapper, prompts: list[str]
) -> None:
    """Add the mean of the prompts' activation scores, each scaled to unit norm in every layer."""
    checkpoint = open_checkpoint(directory)
    selector = Selector(checkpoint, Parent.load(checkpoint, default_dtype()), tokenizer)
    total = mx.zeros((len(checkpoint.ffns), checkpoint.d_ffn))
    for prompt in tqdm(prompts, desc="Static scores"):
        scores = selector.scores(prompt, selector="activations")
        total = total + scores / mx.linalg.norm(scores, axis=-1, keepdims=True)
        mx.eval(total)
    ifp.files[STATIC_FILE] = write_safetensors(
        directory / STATIC_FILE, {"scores": total / len(prompts)}
    )
    (directory / CONFIG_FILE).write_text(ifp.to_json())
