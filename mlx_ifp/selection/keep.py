"""k, the number of channels to keep in each layer: what users say becomes counts."""

from ..errors import IFPError

Keep = int | float | list[int]
# The share that is kept of a dense model, which does not say what it was trained for.
DEFAULT_KEEP = 0.5

# Widths that are multiples of this keep every fast Metal kernel open.
WIDTH_MULTIPLE = 64


def per_layer(k: int | list[int], layers: int) -> list[int]:
    """One number for each of L layers, made of one number for all of them or of a list."""
    return list(k) if isinstance(k, list) else [k] * layers


def compact(ks: list[int]) -> int | list[int]:
    """k as users and files see it: one number if all layers keep as many, else one for each."""
    return ks[0] if len(set(ks)) == 1 else ks


def resolve_keep(keep: Keep, d_ffn: int, layers: int) -> list[int]:
    """Channels to keep in each layer: L counts.

    Args:
        keep: a count, a list of L counts, or a fraction (a float) of d_ffn, which is rounded to a
            multiple of 64.
        d_ffn (int): channels of a layer.
        layers (int): L.

    Raises:
        IFPError: if a count or the fraction is out of range.
    """
    if isinstance(keep, float):
        if not 0 < keep <= 1:
            raise IFPError(f"The fraction of channels to keep must be in (0, 1], not {keep}.")
        if keep == 1 or d_ffn <= WIDTH_MULTIPLE:
            return [max(1, round(keep * d_ffn))] * layers
        rounded = round(keep * d_ffn / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
        return [min(max(rounded, WIDTH_MULTIPLE), d_ffn)] * layers
    ks = per_layer(keep, layers)
    if len(ks) != layers:
        raise IFPError(f"{len(ks)} values of k were given for {layers} layers.")
    if any(not 1 <= k <= d_ffn for k in ks):
        raise IFPError(f"k must be between 1 and d_ffn = {d_ffn}, not {keep}.")
    return ks


def resolve_one_keep(keep: Keep, d_ffn: int, layers: int) -> int:
    """Channels to keep in each layer, the same number in all of them, as training needs it.

    Args:
        keep, d_ffn, layers: as for :func:`resolve_keep`.

    Raises:
        IFPError: if it is out of range, or a list.
    """
    if isinstance(keep, list):
        raise IFPError(
            "--keep must be one number for all layers in training; --keep-range is for a range."
        )
    return resolve_keep(keep, d_ffn, layers)[0]
