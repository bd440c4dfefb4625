"""Find the order in which a checkpoint stores its channels, from what prompts select.

The order of channels inside a layer is free: an FFN is a sum over them. When the channels that
prompts select together are stored side by side, they are read from disk in a few long runs.
"""

import os
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper
from tqdm import tqdm

from mlx_ifp.checkpoint.config import CONFIG_FILE
from mlx_ifp.checkpoint.directory import CHANNELS, ORDER_FILE, ORDER_TENSOR, open_checkpoint
from mlx_ifp.device import default_dtype
from mlx_ifp.files.tensor_files import DTYPES, LazyTensor, TensorInfo, write_safetensors
from mlx_ifp.selectors.selector import Selector
from mlx_ifp.subnetwork.channels import ChannelReader
from mlx_ifp.subnetwork.parent import Parent

CLUSTERS = 16
_ROUNDS = 20


def calibrate(directory: Path, tokenizer: TokenizerWrapper | None, prompts: list[str]) -> None:
    """Let the checkpoint's own selector read prompts, and store its channels in a better order.

    One tensor of channels is in memory at a time, and one file of them is on disk twice.

    Args:
        directory (Path): a checkpoint that nobody uses yet; its files are replaced.
        tokenizer: the tokenizer of its LLM.
        prompts (list): texts for which the selector chooses channels.

    Raises:
        IFPError: if a prompt is too long for the selector.
    """
    checkpoint = open_checkpoint(directory)
    selector = Selector(checkpoint, Parent.load(checkpoint, default_dtype()), tokenizer)
    masks = [selector.select(prompt).mask for prompt in tqdm(prompts, desc="Calibrating")]
    order = channel_order(np.stack(masks))
    del selector
    layers = {ffn.path: i for i, ffn in enumerate(checkpoint.ffns)}
    ifp = checkpoint.ifp
    files: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.channels.items():
        files.setdefault(info.path.name, {})[name] = info
    total = sum(info.nbytes for info in checkpoint.channels.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="Ordering") as bar:
        for file, infos in files.items():
            reader = ChannelReader(infos)
            tensors = {
                name: _reordered(reader, name, info, order[layers[name.rsplit(".", 2)[0]]])
                for name, info in infos.items()
            }
            new = directory / f"{CHANNELS}.new"
            ifp.files[file] = write_safetensors(new, tensors, bar.update)
            os.replace(new, directory / file)
    (directory / ORDER_FILE).unlink(missing_ok=True)
    rows = {ORDER_TENSOR: mx.array(order.astype(np.uint32))}
    ifp.files[ORDER_FILE] = write_safetensors(directory / ORDER_FILE, rows)
    ifp.channel_order = "stored"
    (directory / CONFIG_FILE).write_text(ifp.to_json())


def _reordered(reader: ChannelReader, name: str, info: TensorInfo, order: np.ndarray) -> LazyTensor:
    """A tensor with its rows in another order; the reader finds a row by its channel's number."""

    def read(*_: int) -> mx.array:
        (array,) = reader.read([[(name, None)]])
        return mx.take(array, mx.array(order), axis=0)

    return LazyTensor(info.shape, DTYPES[info.dtype], read)


def channel_order(masks: np.ndarray) -> np.ndarray:
    """Find the order to store channels in, from what prompts selected.

    Prompts that select similar channels are put into the same cluster. A channel belongs to a
    cluster if most of its prompts select it. Channels that belong to all clusters come first, and
    those that belong to none come last. Channels of the same clusters lie together, and the most
    frequent of them come first.

    Args:
        masks (array): bool [prompts, L, d_ffn], True where a prompt selects a channel.

    Returns:
        array: int64 [L, d_ffn], a permutation in each row.
    """
    labels = _cluster(masks)
    members = [masks[labels == label] for label in np.unique(labels)]
    # The largest cluster decides first.
    members.sort(key=len, reverse=True)
    order = []
    for layer in range(masks.shape[1]):
        bits = np.stack([member[:, layer].mean(axis=0) > 0.5 for member in members])
        pattern = (bits * (1 << np.arange(len(bits))[::-1])[:, None]).sum(axis=0)
        frequency = masks[:, layer].sum(axis=0)
        # lexsort sorts by the last key first; channels that are equal keep their order.
        order.append(np.lexsort((-frequency, -pattern, -bits.sum(axis=0))))
    return np.stack(order)


def _cluster(masks: np.ndarray) -> np.ndarray:
    """Put each prompt into a cluster around one of the most unlike prompts; return int [n]."""
    common = np.zeros((len(masks), len(masks)))
    for layer in range(masks.shape[1]):
        rows = masks[:, layer].astype(np.float32)
        common += rows @ rows.T
    centers = [int(common.sum(axis=1).argmax())]
    while len(centers) < min(CLUSTERS, len(masks)):
        nearest = common[:, centers].max(axis=1)
        nearest[centers] = np.inf
        centers.append(int(nearest.argmin()))
    for _ in range(_ROUNDS):
        labels = common[:, centers].argmax(axis=1)
        # A center is in its own cluster, unless another center selects the very same channels.
        groups = [np.flatnonzero(labels == i) for i in range(len(centers))]
        new = [
            int(group[common[np.ix_(group, group)].sum(axis=1).argmax()]) if len(group) else center
            for group, center in zip(groups, centers, strict=True)
        ]
        if new == centers:
            break
        centers = new
    return common[:, centers].argmax(axis=1)
