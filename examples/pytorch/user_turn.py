"""What a model needs from a chat template in order to write a user's words."""

from rows import fail
from transformers import PreTrainedTokenizerBase

_SENTINEL = "@@USER@@"


class Template:
    """What the chat template puts before and after what a user says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise fail("the model has no chat template; give a chat model.")
        if not tokenizer.is_fast:
            raise fail("the model has no tokenizer.json; give one that has.")
        self.tokenizer = tokenizer
        turn = self._render([{"role": "user", "content": _SENTINEL}], answer=False)
        self.before, found, after = turn.partition(_SENTINEL)
        end = tokenizer.encode(after, add_special_tokens=False)[:1] if found else []
        self.special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        if not end or end[0] not in self.special:
            raise fail("the chat template ends a user's turn with no special token.")
        self.end = end[0]

    def _render(self, messages: list[dict[str, str]], answer: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer
        )

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Token ids of texts that hold their special tokens already."""
        if not texts:
            return []
        # What transformers puts around the tokenizer takes longer than the tokenizer.
        encoded = self.tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
        return [each.ids for each in encoded]

    def decode(self, rows: list[list[int]]) -> list[str]:
        """Texts of token ids, with their special tokens."""
        return self.tokenizer.backend_tokenizer.decode_batch(rows, skip_special_tokens=False)

    def beginnings(self, earlier: list[list[dict[str, str]]], openings: list[str]) -> list[str]:
        """User turns that begin with some words, after earlier messages."""
        texts = []
        for messages, opening in zip(earlier, openings, strict=True):
            turn = self.before
            if messages:
                turn = self._render(
                    [*messages, {"role": "user", "content": _SENTINEL}], answer=False
                ).partition(_SENTINEL)[0]
            texts.append(turn + opening)
        return texts

    def questions(self, prompts: list[list[dict[str, str]]]) -> list[str]:
        """Conversations that wait for an answer."""
        return [self._render(messages, answer=True) for messages in prompts]
