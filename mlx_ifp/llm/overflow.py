"""Report numbers that are too large for the type that a model runs in."""

from collections.abc import Iterable

import mlx.core as mx

from ..errors import IFPError
from ..files.tensor_files import DTYPES, TensorInfo

# The type with the smallest range comes first.
_FLOATS = (mx.float16, mx.bfloat16, mx.float32)


def computing_type(dtype: mx.Dtype | None, tensors: Iterable[TensorInfo]) -> mx.Dtype | None:
    """Find the type in which weights compute; if there are several, the one that overflows first.

    Args:
        dtype (mx.Dtype): the type that floats are cast to; None keeps the stored types.
        tensors: the stored weights.

    Returns:
        mx.Dtype: None if there are no floats among them.
    """
    if dtype is not None:
        return dtype
    stored = {DTYPES[tensor.dtype] for tensor in tensors}
    return next((each for each in _FLOATS if each in stored), None)


def not_finite(what: str, computed_in: mx.Dtype | None) -> IFPError:
    """Make the error for infinities and NaN, whose message says in one line what to do.

    Args:
        what (str): a whole sentence without its full stop, such as ``"The scores are not finite"``.
        computed_in (mx.Dtype): the type that was computed in; None if it is not known.
    """
    if computed_in is None:
        return IFPError(f"{what}: the weights that they come from are broken.")
    if computed_in == mx.float16:
        return IFPError(
            f"{what}: float16 overflowed, whose largest number is 65,504. "
            "Run in a type that holds larger ones: --dtype bfloat16 or --dtype float32."
        )
    name = str(computed_in).removeprefix("mlx.core.")
    return IFPError(f"{what} in {name}: the weights that they come from are broken.")
