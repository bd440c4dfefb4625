"""Batched sampling from a causal LM of transformers, for many prompts of unequal length.

A batch has a fixed number of slots. Each holds one text that is being written; a text that ends
makes room for the next prompt, so no slot computes in vain. All that a step needs stays on the
device, and the host looks only every ``CHUNK`` steps. On CUDA the steps are replayed from a CUDA
graph. If a graph cannot be made, it says so and runs them one by one.

B slots, T positions of the key-value cache, V tokens of the vocabulary.
"""

import contextlib
import inspect
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from slots import SlotCache, flash_decode, sample, sdpa_decode
from torch import Tensor, nn

CHUNK = 32
# The cache is read up to the longest text, rounded up to this.
_BUCKET = 128
_PREFILL_TOKENS = 64 * 1024


@dataclass
class Request:
    """A prompt to continue.

    Attributes:
        prompt: token ids, at least one.
        max_tokens: how many to write at most.
        temperature: 0 is greedy.
        tag: whatever the caller wants back.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 1.0
    tag: Any = None


@dataclass
class Completion:
    """A finished request: ``tokens`` without the one that ended it, ``ended`` if one did."""

    request: Request
    tokens: list[int]
    ended: bool


@dataclass
class Stats:
    """What a generator did: tokens sampled, prompt tokens read, seconds, decode steps."""

    sampled: int = 0
    prompt: int = 0
    steps: int = 0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)


class Generator:
    """Writes texts from a model.

    Args:
        llm (nn.Module): a causal LM on its device; its attention implementation is replaced.
        stops (Iterable): ids of tokens that end a text.
        length (int): positions of a slot; a prompt and its ``max_tokens`` must fit together.
        slots (int): texts at once, or None: as many as the device's free memory holds.
        top_p (float): of all requests.
        graphs (bool): whether to replay CUDA graphs, on CUDA.
    """

    def __init__(
        self,
        llm: nn.Module,
        stops: Iterable[int],
        length: int,
        slots: int | None = None,
        top_p: float = 0.95,
        graphs: bool = True,
    ) -> None:
        config = llm.config.get_text_config()
        window = getattr(config, "sliding_window", None)
        if window and window < length and getattr(config, "use_sliding_window", True):
            raise SystemExit(
                f"generation: the model attends to {window} tokens only, a text takes {length}; "
                "lower the numbers of tokens."
            )
        self.llm, self.top_p = llm, top_p
        self.device, self.dtype = next(llm.parameters()).device, next(llm.parameters()).dtype
        llm.set_attn_implementation("ifp_slots")
        if self.device.type == "cuda":
            # cuDNN's attention makes a plan for every new shape, and prompts have all shapes.
            torch.backends.cuda.enable_cudnn_sdp(False)
        self.length = -(-length // _BUCKET) * _BUCKET if self.device.type == "cuda" else length
        self.slots = slots or self._fitting_slots(config)
        self.stats = Stats()
        # Newer versions of transformers call the argument "cache".
        names = inspect.signature(llm.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.cache = SlotCache(self.slots, self.length)
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}
        self.use_graphs = graphs and self.device.type == "cuda"
        self.flash = self.device.type == "cuda" and self._flash_works(config)
        # With lengths instead of masks, no place beyond a text's end is read: one graph will do.
        self.bucket = self.length if self.flash else _BUCKET

        def state(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.stops = torch.tensor(sorted(set(stops)), device=self.device)
        self.token, self.position, self.count = (state(self.slots) for _ in range(3))
        self.limit = state(self.slots) + 1
        self.temperature = state(self.slots, dtype=torch.float32)
        self.ended = state(self.slots, dtype=torch.bool)
        self.done = torch.ones(self.slots, dtype=torch.bool, device=self.device)
        self.out = state(self.slots, self.length)
        self.places = torch.arange(self.length, device=self.device)

    def _fitting_slots(self, config: Any) -> int:
        """Slots that fit into 55% of the free memory, keys, values and logits counted."""
        if self.device.type != "cuda":
            return 32
        free, _ = torch.cuda.mem_get_info(self.device)
        _, heads, width = self._heads(config)
        cache = 2 * config.num_hidden_layers * heads * width * self.length * self.dtype.itemsize
        # Some six float32 arrays of the size of the logits live at once in sampling.
        slots = int(0.55 * free / (cache + 6 * 4 * config.vocab_size))
        return max(16, min(4096, slots // 128 * 128 if slots >= 128 else slots))

    @staticmethod
    def _heads(config: Any) -> tuple[int, int, int]:
        """Query heads, key heads and the width of a head."""
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        return heads, getattr(config, "num_key_value_heads", None) or heads, width

    def _note(self, text: str) -> None:
        self.stats.notes.append(text)
        print(f"generation: {text}", file=sys.stderr, flush=True)

    def _flash_works(self, config: Any) -> bool:
        """Whether attention by lengths is there, right, and faster than with masks; says which."""
        heads, shared, width = self._heads(config)
        make = {"device": self.device, "dtype": self.dtype}
        rows = min(self.slots, 512)
        query = torch.randn(rows, heads, 1, width, **make)
        key, value = torch.randn(2, rows, self.length, shared, width, **make).transpose(2, 3)
        # As long as texts are on average, about.
        lengths = torch.randint(1, self.length // 2, (rows,), device=self.device).to(torch.int32)
        hidden = torch.arange(self.length, device=self.device)[None] >= lengths[:, None]
        mask = torch.zeros(hidden.shape, **make).masked_fill(hidden, float("-inf"))[:, None, None]
        seconds = []
        try:
            outs = []
            for function, how in ((flash_decode, lengths), (sdpa_decode, mask)):
                outs.append(function(query, key, value, how, width**-0.5))
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    function(query, key, value, how, width**-0.5)
                torch.cuda.synchronize()
                seconds.append((time.perf_counter() - start) / 10)
            error = (outs[0].float() - outs[1].float()).abs().max().item()
        except Exception as error:
            self._note(f"attention with masks ({' '.join(str(error).split())[:200]})")
            return False
        works = error < 0.1 and seconds[0] < seconds[1]
        self._note(
            f"attention by {'lengths' if works else 'masks'}: {1e6 * seconds[0]:.0f} us by "
            f"lengths, {1e6 * seconds[1]:.0f} us with masks, difference {error:.1e}"
        )
        return works

    def _forward(self, **inputs: Any) -> Tensor:
        """Logits of the last position, [rows, V]."""
        inputs |= {self.cache_name: self.cache, "use_cache": True, "logits_to_keep": 1}
        out = self.llm(**inputs)
        return out.logits[:, -1]

    def _step(self) -> None:
        """Write one token in every slot that is not done. Nothing here waits for the device."""
        self.cache.prompts, self.cache.positions = None, self.position
        if self.flash:
            mask = (self.position + 1).to(torch.int32)[:, None, None, None]
        else:
            hidden = self.places[None, : self.cache.read] > self.position[:, None]
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device)
            mask = mask.masked_fill(hidden, float("-inf"))[:, None, None, :]
        # transformers hands a mask of four dimensions on as it is, whatever it means.
        logits = self._forward(
            input_ids=self.token[:, None],
            position_ids=self.position[:, None],
            attention_mask=mask,
        )
        token = sample(logits, self.temperature, self.top_p)
        alive = ~self.done
        place = self.count.clamp(max=self.length - 1)[:, None]
        old = self.out.gather(1, place)[:, 0]
        self.out.scatter_(1, place, torch.where(alive, token, old)[:, None])
        self.count += alive
        ended = (token[:, None] == self.stops[None]).any(dim=-1) & alive
        self.ended |= ended
        self.done |= ended | (self.count >= self.limit)
        self.position += ~self.done
        self.token.copy_(torch.where(alive, token, self.token))

    def _steps(self, bucket: int, steps: int) -> None:
        """Some steps that read the cache up to ``bucket``."""
        self.cache.read = bucket
        if self.use_graphs and bucket not in self.graphs:
            self._capture(bucket)
        graph = self.graphs.get(bucket)
        for _ in range(steps):
            if graph is None:
                self._step()
            else:
                graph.replay()

    def _capture(self, bucket: int) -> None:
        """Record a step as a CUDA graph; without one, steps run as they are."""
        state = (self.token, self.position, self.count, self.limit, self.temperature)
        state = (*state, self.ended, self.done, self.out)
        saved = [tensor.clone() for tensor in state]
        # While it is recorded, all slots are done: nothing is written but one place in the cache,
        # which the next step writes again.
        start = time.perf_counter()
        try:
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self.done.fill_(True)
                    self._step()
            torch.cuda.current_stream().wait_stream(stream)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            pool = next(iter(self.graphs.values())).pool() if self.graphs else None
            with torch.cuda.graph(graph, pool=pool):
                self._step()
            self.graphs[bucket] = graph
            note = f"CUDA graph for {bucket} positions in {time.perf_counter() - start:.1f} s"
        except Exception as error:
            self.use_graphs = False
            self.graphs.clear()
            with contextlib.suppress(Exception):
                torch.cuda.synchronize()
            note = f"no CUDA graphs, steps run one by one ({' '.join(str(error).split())[:200]})"
        for tensor, old in zip(state, saved, strict=True):
            tensor.copy_(old)
        self._note(note)

    def _fill(self, slots: list[int], requests: list[Request]) -> None:
        """Read the prompts of some requests into free slots."""
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        while order:
            # Prompts of like length go together, as many as make a batch of some tokens.
            longest = len(requests[order[-1]].prompt)
            size = max(1, _PREFILL_TOKENS // longest)
            chosen, order = order[-size:], order[:-size]
            rows = [requests[i] for i in chosen]
            ids = torch.zeros(len(rows), longest, dtype=torch.long)
            for row, request in zip(ids, rows, strict=True):
                row[: len(request.prompt)] = torch.tensor(request.prompt)
            where = torch.tensor([slots[i] for i in chosen])
            columns = [
                [r.prompt[-1] for r in rows],
                [len(r.prompt) - 1 for r in rows],
                [r.max_tokens for r in rows],
            ]
            columns = torch.tensor(columns)
            temperatures = torch.tensor([r.temperature for r in rows], dtype=torch.float32)
            ids, where, columns, temperatures = (
                tensor.to(self.device) for tensor in (ids, where, columns, temperatures)
            )
            if longest > 1:
                # The last token of a prompt is read by the first step, at its own place. What
                # stands right of a prompt is overwritten before anything looks at it.
                self.cache.prompts = where
                self._forward(input_ids=ids)
            self.token[where], self.position[where], self.limit[where] = columns
            self.temperature[where] = temperatures
            self.count[where] = 0
            self.ended[where] = False
            self.done[where] = False
            self.stats.prompt += sum(len(r.prompt) for r in rows)

    @torch.no_grad()
    def run(
        self,
        next_requests: Callable[[int], list[Request]],
        on_complete: Callable[[list[Completion]], None],
        until: float | None = None,
    ) -> Stats:
        """Write texts until there are no more requests.

        Args:
            next_requests (Callable): gives at most as many requests as it is asked for.
            on_complete (Callable): is given finished texts while the device works on the next.
            until (float): of ``time.perf_counter()``: when to stop. Unfinished texts are given as
                they are then.
        """
        start = time.perf_counter()
        running: dict[int, Request] = {}
        heads: dict[int, int] = {}  # by slot: the position that its next token gets
        finished: list[Completion] = []
        self.done.fill_(True)
        while True:
            free = [slot for slot in range(self.slots) if slot not in running]
            fresh = next_requests(len(free)) if free else []
            for request in fresh:
                if len(request.prompt) + request.max_tokens > self.length:
                    raise ValueError("a request is longer than a slot")
            taken = free[: len(fresh)]
            if fresh:
                self._fill(taken, fresh)
                for slot, request in zip(taken, fresh, strict=True):
                    running[slot], heads[slot] = request, len(request.prompt)
            if running:
                longest = max(heads[slot] for slot in running) + CHUNK
                bucket = min(-(-longest // self.bucket) * self.bucket, self.length)
                self._steps(bucket, CHUNK)
                self.stats.steps += CHUNK
            # The device is busy now: time for what the last steps gave.
            if finished:
                on_complete(finished)
                finished = []
            elif not running:
                break
            late = until is not None and time.perf_counter() > until
            finished = self._collect(running, heads, everything=late)
            if late:
                on_complete(finished)
                break
        self.stats.seconds += time.perf_counter() - start
        return self.stats

    def _collect(
        self, running: dict[int, Request], heads: dict[int, int], everything: bool = False
    ) -> list[Completion]:
        """Take the finished texts, or all, out of their slots; waits for the device."""
        if not running:
            return []
        flags = (self.done.long(), self.ended.long(), self.count, self.position)
        done, ended, count, position = torch.stack(flags).tolist()
        slots = [slot for slot in running if everything or done[slot]]
        for slot in running:
            heads[slot] = position[slot] + 1
        if not slots:
            return []
        width = max(count[slot] for slot in slots)
        rows = self.out[torch.tensor(slots, device=self.device), :width].cpu().tolist()
        completions = []
        for slot, row in zip(slots, rows, strict=True):
            self.stats.sampled += count[slot]
            # The token that ended the text is no part of it.
            tokens = row[: count[slot] - bool(ended[slot])]
            completions.append(Completion(running.pop(slot), tokens, bool(ended[slot])))
        return completions
