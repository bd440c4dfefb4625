"""Find what a chat template puts before and after a user's words."""

import re
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import IFPError
from ..llm.prompt import encode_prompt, token_ids

_SENTINEL = "@@USER@@"


class UserTurn:
    """What a model needs from a chat template in order to write a user's words.

    Attributes:
        end: the token that ends a user's turn.
        special: ids of tokens that neither a user nor an answer writes.

    Args:
        tokenizer: the LLM's.

    Raises:
        IFPError: if the template has no place for a user's words, or does not end a user's turn
            with a special token.
    """

    def __init__(self, tokenizer: TokenizerWrapper) -> None:
        if not tokenizer.has_chat_template:
            raise IFPError("The model has no chat template; name a chat model.")
        self._tokenizer = tokenizer
        thinking = {getattr(tokenizer, name, None) for name in ("think_start", "think_end")}
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.eos_token_ids)
        self.special |= {
            token
            for token, added in tokenizer.added_tokens_decoder.items()
            # Some tokenizers also add ordinary text, such as runs of spaces.
            if added.special or added.content in thinking or _looks_special(added.content)
        }
        _, after = self._around([])
        ending = tokenizer.encode(after, add_special_tokens=False)[:1]
        if not ending or ending[0] not in self.special:
            raise IFPError("The chat template ends a user's turn with no special token, so it "
                           "cannot be seen where a prompt ends; name another model.")  # fmt: skip
        self.end = ending[0]

    def _around(self, earlier: list[dict[str, Any]]) -> tuple[str, str]:
        messages = [*earlier, {"role": "user", "content": _SENTINEL}]
        text = encode_prompt(self._tokenizer, messages, tokenize=False)
        before, found, after = str(text).rpartition(_SENTINEL)
        if not found:
            raise IFPError("The chat template leaves out what the user says; name a chat model.")
        return before, after

    def beginning(self, earlier: list[dict[str, Any]]) -> list[int]:
        """Give the token ids after which a model writes a user's words.

        Args:
            earlier (list): messages that come before the user's.

        Raises:
            IFPError: if the template does not take them, or puts nothing before the user's words.
        """
        tokens = self._tokenizer.encode(self._around(earlier)[0], add_special_tokens=False)
        if not tokens:
            raise IFPError("The chat template puts nothing before what a user says, so the model "
                           "has nothing to go on from; name another model.")  # fmt: skip
        return tokens

    def question(self, messages: list[dict[str, Any]]) -> list[int]:
        """Give the token ids of messages that wait for an answer, which begins without thoughts."""
        tokens = encode_prompt(self._tokenizer, messages, enable_thinking=False)
        assert not isinstance(tokens, str), "messages become tokens"
        return token_ids(tokens)

    def decode(self, tokens: list[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(tokens)


def _looks_special(content: str) -> bool:
    return re.fullmatch(r"<\|.*\|>", content) is not None
