"""Find a checkpoint: a local directory, a hub repository, or the package's own."""

from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
)

from ..errors import IFPError, one_line
from .config import CONFIG_FILE, DEFAULT_MODEL

# The hub's patterns match files in directories too, such as a tokenizer's other templates.
TOKENIZER_PATTERNS = [
    *("*.json", "*.jsonl", "tokenizer.model", "*.tiktoken", "tiktoken.model", "*.txt", "*.jinja"),
]
HUB_PATTERNS = [*TOKENIZER_PATTERNS, "*.safetensors", "*.py"]


def source_name(model: str | Path) -> str:
    """Name a source as a checkpoint does: by its hub id, or by the last part of its path.

    The rest of a path is private, and would make two checkpoints of one model differ.
    """
    path = expanded(model)
    return path.resolve().name if path.exists() else str(model)


def expanded(path: str | Path) -> Path:
    """Resolve ``~`` in a path; if the user that it names does not exist, it stays as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def resolve(
    path_or_hf_repo: str | Path | None, revision: str | None = None, *, converted: bool = True
) -> Path:
    """Find the directory of a checkpoint: a local one, or a hub repository that is downloaded.

    Args:
        path_or_hf_repo: the checkpoint; None for the package's own.
        revision (str): the revision of a hub repository.
        converted (bool): whether to refuse an ordinary model before its weights are downloaded.

    Raises:
        IFPError: if there is neither such a directory nor such a repository.
    """
    if path_or_hf_repo is None:
        if not DEFAULT_MODEL.is_dir():
            raise IFPError(
                f"No model was named, and {DEFAULT_MODEL}, the default, is missing. "
                "Name one with --model, or make one: mlx_ifp.convert --model MODEL --mlx-path OUT"
            )
        return DEFAULT_MODEL
    path = expanded(path_or_hf_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise IFPError(
            f"{path} is a file, not a checkpoint directory. "
            "Make one of it with: mlx_ifp.convert --model FILE --mlx-path OUT"
        )
    with one_line(
        f"{path_or_hf_repo} is not a directory, and it could not be fetched from the "
        "Hugging Face hub"
    ):
        if converted:
            _require_converted(str(path_or_hf_repo), revision)
        return Path(
            snapshot_download(str(path_or_hf_repo), revision=revision, allow_patterns=HUB_PATTERNS)
        )


def _require_converted(repo: str, revision: str | None) -> None:
    try:
        hf_hub_download(repo, CONFIG_FILE, revision=revision)
    except LocalEntryNotFoundError:
        # Without a network nothing is known; the download will say so.
        pass
    except EntryNotFoundError as error:
        raise IFPError(
            f"{repo} has no {CONFIG_FILE}: it is a model that is not converted. "
            f"Make a checkpoint with: mlx_ifp.convert --model {repo} --mlx-path OUT"
        ) from error
