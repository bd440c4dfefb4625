"""A predictor and its LLM may have the same embedding and tokenizer, which are stored once."""

from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp.errors import IFPError
from mlx_ifp.llm.modules import find_embedding

from .naming import NamedModel
from .streams import same_values

_REASON = "the same as the LLM's, bit for bit, which the predictor uses"


def shared_embedding(llm: NamedModel, backbone: NamedModel) -> tuple[str, str] | None:
    """Find the paths of the embeddings of LLM and backbone, if both have the same values.

    The values are compared in pieces; neither tensor is ever in memory as a whole.
    """
    try:
        paths = find_embedding(llm.network), find_embedding(backbone.network)
    except IFPError:
        return None
    ours, theirs = (f"{path}.weight" for path in paths)
    same = same_values(llm.tensors[ours], backbone.tensors[theirs])
    return paths if same else None


def same_tokens(one: TokenizerWrapper, other: TokenizerWrapper) -> bool:
    """Whether two tokenizers give the same ids: ``tokenizer.json`` and chat template are equal."""
    ours, theirs = (getattr(each, "backend_tokenizer", None) for each in (one, other))
    if ours is None or theirs is None or one.chat_template != other.chat_template:
        return False
    return ours.to_str() == theirs.to_str()


def leave_out_embedding(backbone: NamedModel, path: str) -> None:
    """Do not convert the embedding at this path; the report says why."""
    names = {name for name in backbone.tensors if name.startswith(f"{path}.")}
    for name in names:
        del backbone.tensors[name]
    for name in [source for source, name in backbone.mapped.items() if name in names]:
        del backbone.mapped[name]
        backbone.skipped[name] = _REASON
