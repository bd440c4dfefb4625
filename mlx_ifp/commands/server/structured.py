"""``response_format``: llguidance lets the model say only what fits a JSON schema."""

import json
import threading
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx_lm.tokenizer_utils import TokenizerWrapper

from .checks import json_object
from .failures import bad_request

_FIELD = "response_format"


class Follows:
    """A logits processor that leaves only tokens with which the answer can still follow a grammar.

    Args:
        tokenizer: llguidance's.
        grammar (str): llguidance's.
        ends (list): the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, grammar: str, ends: list[int]) -> None:
        from llguidance import LLMatcher

        self._matcher = LLMatcher(tokenizer, grammar)
        self._words = np.zeros((tokenizer.vocab_size + 31) // 32, np.uint32)
        self._size = tokenizer.vocab_size
        self._ends, self._began = ends, False

    def __call__(self, tokens: mx.array, logits: mx.array) -> mx.array:
        """Logits [1, V] after ``tokens``, whose last one was generated, but for the first call."""
        if self._began and not self._matcher.is_stopped():
            self._matcher.consume_token(cast(int, tokens[-1].item()))
        self._began = True
        allowed = np.zeros(logits.shape[-1], bool)
        if self._matcher.is_stopped():
            # Nothing can follow what was said.
            allowed[self._ends] = True
        else:
            self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
            bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")[: self._size]
            allowed[: len(bits)] = bits[: len(allowed)]
        return mx.where(mx.array(allowed), logits, -mx.inf)


class Structured:
    """What makes processors for one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        self._tokenizer = tokenizer
        self._own: Any = None
        self._lock = threading.Lock()

    def processor(self, response_format: Any) -> Follows | None:
        """The processor for a ``response_format``; None if any text will do.

        Raises:
            Failure: if the format is wrong, or the library is not there.
        """
        schema = _schema_of(json_object(_FIELD, response_format))
        if schema is None:
            return None
        try:
            from llguidance import LLMatcher
            from llguidance.hf import from_tokenizer
        except ImportError as error:
            message = f'{_FIELD} needs llguidance; install it: pip install "mlx_ifp[structured]".'
            raise bad_request(message, _FIELD) from error
        ends = list(self._tokenizer.eos_token_ids)
        with self._lock:
            if self._own is None:
                fast = self._tokenizer._tokenizer
                try:
                    self._own = from_tokenizer(fast, eos_token=ends)
                except Exception as error:
                    message = f"{_FIELD}: llguidance cannot use this model's tokenizer."
                    raise bad_request(message, _FIELD) from error
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            wrong = LLMatcher.validate_grammar(grammar, self._own)
        except ValueError as error:
            wrong = str(error)
        if wrong:
            raise bad_request(f"{_FIELD}: {wrong.splitlines()[0][:300]}", _FIELD)
        return Follows(self._own, grammar, ends)


def _schema_of(given: dict[str, Any]) -> dict[str, Any] | None:
    kind = given.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    if kind == "json_schema":
        named = json_object(f"{_FIELD}.json_schema", given.get("json_schema"))
        return json_object(f"{_FIELD}.json_schema.schema", named.get("schema"))
    raise bad_request(f"{_FIELD}: type must be text, json_object or json_schema.", _FIELD)
