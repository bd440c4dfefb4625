"""A checkpoint on the Hugging Face hub: its model card, and the upload."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

from huggingface_hub import HfApi, ModelCard, ModelCardData

from ..errors import one_line
from .directory import open_checkpoint

TAGS = ["mlx", "instruction-following-pruning"]


def write_model_card(directory: Path, name: str, base_model: str | None = None) -> None:
    """Write ``README.md`` as mlx-lm does: what the checkpoint is, and how to use it.

    Args:
        directory (Path): the checkpoint.
        name (str): the name of its repository.
        base_model (str): the hub id it was converted from, or None.
    """
    checkpoint = open_checkpoint(directory)
    ifp = checkpoint.ifp
    card = ModelCard.from_template(
        ModelCardData(
            library_name="mlx_ifp",
            pipeline_tag="text-generation",
            tags=TAGS,
            base_model=base_model,
        ),
        template_str="---\n{{ card_data }}\n---\n",
    )
    made_from = f" from [{base_model}](https://huggingface.co/{base_model})" if base_model else ""
    card.text = dedent(f"""
        # {name}

        Converted{made_from} to the format of mlx_ifp, version {ifp.source.get("mlx_ifp")}:
        {checkpoint.config["model_type"]}, {len(checkpoint.ffns)} layers of {checkpoint.d_ffn} FFN
        channels, of which a prompt or task selects k = {ifp.k}. Selector: {ifp.selector}.

        ```bash
        mlx_ifp.generate --model {name} --prompt "hello"
        ```

        ```python
        from mlx_ifp import load, generate

        model, tokenizer = load("{name}")
        messages = [{{"role": "user", "content": "hello"}}]
        response = generate(model, tokenizer, messages, verbose=True)
        ```
        """)
    card.save(directory / "README.md")


def upload_checkpoint(directory: Path, repo: str, base_model: str | None = None) -> None:
    """Upload a checkpoint with its model card; the repository is created if it does not exist.

    Raises:
        IFPError: if the hub refuses it; the checkpoint stays where it is.
    """
    write_model_card(directory, repo, base_model)
    with uploading(directory, repo):
        api = HfApi()
        api.create_repo(repo_id=repo, exist_ok=True)
        api.upload_folder(folder_path=str(directory), repo_id=repo, repo_type="model")


@contextlib.contextmanager
def uploading(directory: str | Path, repo: str) -> Iterator[None]:
    """Raise an upload's errors as one line that also says what is complete."""
    with one_line(f"{directory} is complete, but not uploaded to {repo}"):
        yield
