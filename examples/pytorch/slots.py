"""One step of many texts at once: attention over slots of a cache, and sampling.

B slots, T positions of the key-value cache, V tokens of the vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

# Candidates of a token: at top-p 0.95 one in 20 is refused, all three once in 8,000 tokens; then
# the likeliest token is taken.
CANDIDATES = 3
BLOCK = 128


def sample(logits: Tensor, temperature: Tensor, top_p: float) -> Tensor:
    """Tokens [B] by nucleus sampling, without sorting the vocabulary.

    The nucleus holds a token if those likelier than it have less than ``top_p`` together. So tokens
    are drawn from the whole distribution and those outside of the nucleus refused, which is the
    same distribution.

    Args:
        logits (Tensor): [B, V].
        temperature (Tensor): [B], 0 is greedy.
        top_p (float): 1 takes the whole distribution.
    """
    logits = logits.float()
    rows, size = logits.shape
    likeliest = logits.argmax(dim=-1)
    # The shift by the largest logit lets a tiny temperature not overflow.
    logits = logits - logits.gather(1, likeliest[:, None])
    probabilities = torch.softmax(logits / temperature.clamp(min=1e-3)[:, None], dim=-1)
    # Draw a block of tokens first, then one in it: sums over the whole vocabulary are slow.
    padded = functional.pad(probabilities, (0, -size % BLOCK)) if size % BLOCK else probabilities
    blocks = padded.view(rows, -1, BLOCK)
    heaps = blocks.sum(dim=-1).cumsum(dim=-1)
    draws = torch.rand(rows, CANDIDATES, device=logits.device) * heaps[:, -1:]
    block = torch.searchsorted(heaps, draws, right=True).clamp(max=heaps.shape[1] - 1)
    inside = blocks.gather(1, block[:, :, None].expand(-1, -1, BLOCK))
    draws = draws - (heaps.gather(1, block) - inside.sum(dim=-1))
    place = torch.searchsorted(inside.cumsum(dim=-1), draws[:, :, None], right=True)[:, :, 0]
    candidates = (block * BLOCK + place.clamp(max=BLOCK - 1)).clamp(max=size - 1)
    # Half precision is enough to tell which tokens are likelier, and twice as fast.
    coarse = probabilities.half() if probabilities.is_cuda else probabilities
    owns = coarse.gather(1, candidates)
    chosen = likeliest
    # The first candidate comes last and stays.
    for column in reversed(range(CANDIDATES)):
        own = owns[:, column, None]
        likelier = torch.where(coarse > own, coarse, 0).sum(dim=-1, dtype=torch.float32)
        # What has no probability can only be drawn by an error of rounding.
        allowed = (likelier < top_p) & (own[:, 0] > 0)
        chosen = torch.where(allowed, candidates[:, column], chosen)
    return torch.where(temperature > 0, chosen, likeliest)


def flash_decode(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float | None):
    """Attention of one token a slot, as long as each slot's text is. CUDA only.

    Args:
        query (Tensor): [B, heads, 1, d].
        key, value (Tensor): [B, key heads, T, d], views of [B, T, key heads, d].
        lengths (Tensor): int32 [B].
        scale (float): of the logits.
    """
    rows, heads, _, width = query.shape
    length = key.shape[2]
    key, value = (x.transpose(1, 2).reshape(rows * length, -1, width) for x in (key, value))
    starts = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
    # What scaled_dot_product_attention calls itself, which takes no lengths.
    out = torch.ops.aten._flash_attention_forward(
        query.reshape(rows, heads, width), key, value, starts, starts * length, 1, length,
        0.0, False, False, scale=scale, seqused_k=lengths,
    )  # fmt: skip
    return out[0].reshape(rows, 1, heads, width)


def sdpa_decode(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None):
    """The same with a mask, [B, 1, 1, T] to be added, anywhere."""
    rows, heads, _, width = query.shape
    # Heads that share a key stand side by side as queries of it, or the cache would be copied.
    query = query.reshape(rows, key.shape[1], -1, width)
    mask = mask.expand(-1, -1, query.shape[2], -1)
    out = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return out.reshape(rows, 1, heads, width)


def _slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' models: [B, heads, S, d] -> [B, S, heads, d].

    ``attention_mask`` is None for whole prompts. For one token of each slot it is a mask to be
    added, [B, 1, 1, T], or lengths, int32 [B, 1, 1, 1].
    """
    if attention_mask is None:
        shared = query.shape[1] != key.shape[1]
        out = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=shared, scale=scaling
        )
        return out.transpose(1, 2).contiguous(), None
    if attention_mask.dtype == torch.int32:
        return flash_decode(query, key, value, attention_mask.view(-1), scaling), None
    return sdpa_decode(query, key, value, attention_mask, scaling), None


# Without a mask function of the same name, transformers makes no mask of its own.
AttentionInterface.register("ifp_slots", _slot_attention)


class SlotCache:
    """Keys and values of all slots, [B, T, heads, d] a layer; what transformers asks of a cache.

    The next call reads the prompts of the slots ``prompts``, from position 0 on; if that is None,
    one token of every slot at ``positions``. It attends to the first ``read`` positions.
    """

    is_compileable = False
    is_sliding = (False,)

    def __init__(self, slots: int, length: int) -> None:
        self.slots, self.length = slots, length
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.prompts: Tensor | None = None
        self.positions: Tensor | None = None
        self.read = length

    def update(
        self, key: Tensor, value: Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        while len(self.keys) <= layer:
            # Zeros, not whatever the memory holds: a NaN would survive a mask.
            for own, new in ((self.keys, key), (self.values, value)):
                shape = (self.slots, self.length, new.shape[1], new.shape[3])
                own.append(torch.zeros(shape, dtype=new.dtype, device=new.device))
        keys, values = self.keys[layer], self.values[layer]
        rows = (key.transpose(1, 2), value.transpose(1, 2))
        if self.prompts is not None:
            keys[self.prompts, : key.shape[2]] = rows[0]
            values[self.prompts, : value.shape[2]] = rows[1]
            return key, value
        for own, new in zip((keys, values), rows, strict=True):
            own.scatter_(1, self.positions.view(-1, 1, 1, 1).expand_as(new), new)
        keys, values = keys[:, : self.read], values[:, : self.read]
        return keys.transpose(1, 2), values.transpose(1, 2)

    def get_seq_length(self, *_: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any) -> int:
        return 0

    def get_mask_sizes(self, length: int, *_: Any) -> tuple[int, int]:
        return length, 0
