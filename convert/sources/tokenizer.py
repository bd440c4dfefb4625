"""Open the tokenizer of a source."""

from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import load_tokenizer

from mlx_ifp.errors import one_line


def open_tokenizer(path: str, trust_remote_code: bool = False) -> TokenizerWrapper:
    """Open the tokenizer of a directory or hub id with mlx-lm.

    Raises:
        IFPError: if there is none.
    """
    with one_line(f"{path} cannot be loaded"):
        return load_tokenizer(path, {"trust_remote_code": trust_remote_code})
