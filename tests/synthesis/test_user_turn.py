"""The chat template says where a user's words begin and end."""

import pytest
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_ifp.errors import IFPError
from mlx_ifp.synthesis.user_turn import UserTurn

from ..conftest import tiny_tokenizer


def wrapped(template: str | None = None) -> TokenizerWrapper:
    tokenizer = tiny_tokenizer()
    if template is not None:
        tokenizer.chat_template = template
    return TokenizerWrapper(tokenizer)


def test_a_prompt_begins_where_the_users_words_stand():
    tokenizer = wrapped()
    turn = UserTurn(tokenizer)
    assert turn.end == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert turn.decode(turn.beginning([])) == "<|im_start|>user\n"
    system = [{"role": "system", "content": "Be kind."}]
    assert turn.decode(turn.beginning(system)) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n"
    )


def test_a_question_is_what_the_template_makes_of_it():
    tokenizer = wrapped()
    messages = [{"role": "user", "content": " two\nlines "}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert UserTurn(tokenizer).question(messages) == expected


def test_added_text_that_is_not_special_may_be_written():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["    ", "<|tool|>"])
    turn = UserTurn(TokenizerWrapper(tokenizer))
    assert tokenizer.convert_tokens_to_ids("    ") not in turn.special
    assert tokenizer.convert_tokens_to_ids("<|tool|>") in turn.special


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", "makes nothing of these messages"),
        ("{% for m in messages %}User: {{ m.content }}\n{% endfor %}", "no special token"),
        ("{{ '<|im_start|>' }}", "leaves out what the user says"),
    ],
)
def test_a_template_without_a_users_turn_is_refused(template, message):
    with pytest.raises(IFPError, match=message):
        UserTurn(wrapped(template))


def test_nothing_to_go_on_from_is_refused():
    turn = UserTurn(wrapped("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"))
    with pytest.raises(IFPError, match="nothing before"):
        turn.beginning([])
