"""Where an answer begins in the tokens of its conversation, whatever the template does."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp.errors import IFPError
from mlx_ifp.llm.row_tokens import row_tokens

from ..conftest import tiny_tokenizer

GEMMA_4 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}"
)
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "<|im_start|>{{ m['content'].split('</think>')[-1] }}<|im_end|>"
    "{% else %}user: {{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|><think>\n{% endif %}"
)
PLAIN = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
COUNTING = "{{ messages | length }} {% for m in messages %}{{ m['content'] }}{% endfor %}"


def answer(template: str, *contents: str) -> str:
    """The text of the tokens that count."""
    tokenizer = TokenizerWrapper(tiny_tokenizer())
    tokenizer.chat_template = tokenizer._tokenizer.chat_template = template
    roles = ("user", "assistant") * len(contents)
    messages = [
        {"role": role, "content": text} for role, text in zip(roles, contents, strict=False)
    ]
    tokens, offset = row_tokens(tokenizer, {"messages": messages}, answer=True)
    return tokenizer.decode(tokens[offset:])


def test_a_generation_prompt_with_an_empty_thought():
    assert answer(GEMMA_4, "Name a river.", "The Nile.") == "The Nile.<|im_end|>"


def test_a_generation_prompt_that_begins_a_thought():
    assert answer(R1, "Name a river.", "The Nile.") == "The Nile.<|im_end|>"


def test_an_answer_that_begins_as_the_generation_prompt_does():
    words = answer(GEMMA_4, "Name a river.", "<think></think>The Nile.")
    assert words == "The Nile.<|im_end|>"


def test_a_thought_that_the_template_drops_is_not_trained():
    assert answer(R1, "Name a river.", "<think>Hm.</think>The Nile.") == "The Nile.<|im_end|>"


def test_a_token_that_joins_prompt_and_answer_counts():
    tokenizer = tiny_tokenizer()
    whole, prompt = tokenizer.encode("import mx"), tokenizer.encode("imp")
    assert whole[: len(prompt)] != prompt, "the tokenizer of the tests joins these"
    assert answer(PLAIN, "imp", "ort mx") == "mport mx"


def test_a_template_that_changes_the_prompt_is_refused():
    with pytest.raises(IFPError, match=r"changes what stands before the answer .*from token 1 on"):
        answer(COUNTING, "Name a river.", "The Nile.")
