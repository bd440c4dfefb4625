"""Programs that people use talk to the server: openai, anthropic, llm and curl."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import anthropic
import openai
import pytest

from ...conftest import tiny_tokenizer
from .conftest import NAME
from .scripted import THOUGHT

ASK = [{"role": "user", "content": "What is the car?"}]
SAYS = "What is file."
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {}}},
}


@pytest.fixture(scope="module")
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def claude(server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0)


def streamed(client, **kwargs):
    """The chunks of a chat, with usage."""
    options = {"stream": True, "stream_options": {"include_usage": True}, "messages": ASK}
    return list(client.chat.completions.create(model=NAME, **options | kwargs))


# openai


def test_openai_lists_models_and_shows_one(client, task):
    models = client.models.list().data
    assert [model.id for model in models] == [NAME, task, f"{NAME}:dense"]
    assert {model.owned_by for model in models} == {"mlx_ifp"}
    model = client.models.retrieve(task)
    assert model.created > 1_700_000_000 and model.context_length == 2048


def test_openai_chats(client):
    answer = client.chat.completions.create(model=NAME, messages=ASK)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (SAYS, "stop")
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    said = answer.mlx_ifp
    assert (said["k"], said["share"], said["prefill"]) == (64, 0.5, "dense")
    pruned = client.chat.completions.create(
        model=NAME, messages=ASK, extra_body={"prefill": "pruned"}
    )
    assert (pruned.choices[0].message.content, pruned.mlx_ifp["prefill"]) == (SAYS, "pruned")


def test_openai_streams_the_same_answer_usage_last(client):
    whole = client.chat.completions.create(model=NAME, messages=ASK)
    *chunks, usage = streamed(client)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SAYS
    assert [chunk.choices[0].finish_reason for chunk in chunks[-2:]] == [None, "stop"]
    assert chunks[-1].mlx_ifp["source"] == "memory"
    assert usage.choices == [] and usage.object == "chat.completion.chunk"
    assert usage.usage.completion_tokens == whole.usage.completion_tokens


def test_stream_options_may_say_nothing(client):
    assert streamed(client, stream_options={})[-1].choices[0].finish_reason == "stop"


def test_a_conversation_s_next_turn_reads_only_what_is_new(client):
    first = [{"role": "user", "content": "Name one file or key, and say it well!"}]
    answer = client.chat.completions.create(model=NAME, messages=first)
    said = {"role": "assistant", "content": answer.choices[0].message.content}
    turn = [*first, said, {"role": "user", "content": "And the tree?"}]
    usage = client.chat.completions.create(model=NAME, messages=turn).usage
    assert usage.prompt_tokens_details.cached_tokens > answer.usage.prompt_tokens


def test_the_first_user_message_selects_and_models_choose_other_channels(client, task):
    def chosen(**kwargs):
        return client.chat.completions.create(messages=ASK, max_tokens=1, **kwargs).mlx_ifp

    assert chosen(model=NAME)["source"] in ("memory", "disk", "activations")
    named = chosen(model=task)
    assert (named["task"], named["source"]) == ("rivers", "given")
    assert chosen(model=f"{NAME}:dense")["k"] is None
    assert chosen(model=NAME, extra_body={"keep": 32})["k"] == 32
    own = chosen(model=NAME, extra_body={"task": "Say what trees are."})
    assert own["source"] == "activations"
    system = [{"role": "system", "content": "Say what trees are."}, *ASK]
    answer = client.chat.completions.create(
        model=NAME, messages=system, max_tokens=1, extra_body={"selection_from": "system"}
    )
    assert answer.mlx_ifp["source"] == "memory"


def test_openai_gets_logprobs_streamed_and_not(client):
    kwargs = {"logprobs": True, "top_logprobs": 2, "max_tokens": 3}
    whole = client.chat.completions.create(model=NAME, messages=ASK, **kwargs)
    content = whole.choices[0].logprobs.content
    parts = [chunk.choices[0].logprobs for chunk in streamed(client, **kwargs) if chunk.choices]
    assert [entry for part in parts if part for entry in part.content] == content
    assert "".join(entry.token for entry in content) == whole.choices[0].message.content
    assert all(entry.top_logprobs[0].logprob >= entry.logprob for entry in content)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)


def test_openai_calls_tools_streamed_and_not(client):
    kwargs = {"messages": ASK, "model": NAME, "tools": [WEATHER]}
    choice = client.chat.completions.create(**kwargs).choices[0]
    (call,) = choice.message.tool_calls
    assert (choice.finish_reason, call.function.name) == ("tool_calls", "get_weather")
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    deltas = [chunk.choices[0] for chunk in client.chat.completions.create(stream=True, **kwargs)]
    (streamed_call,) = [each for delta in deltas for each in delta.delta.tool_calls or []]
    assert streamed_call.function.model_dump() == call.function.model_dump()
    assert streamed_call.index == 0
    assert deltas[-1].finish_reason == "tool_calls"
    asked = [
        *ASK,
        {"role": "assistant", "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"degrees": 7}'},
    ]
    answer = client.chat.completions.create(**kwargs | {"messages": asked})
    assert answer.choices[0].message.content == SAYS
    none = client.chat.completions.create(**kwargs, tool_choice="none")
    assert none.choices[0].message.tool_calls is None


def test_openai_gets_the_thoughts_apart(client):
    thinking = {"extra_body": {"chat_template_kwargs": {"enable_thinking": True}}}
    message = (
        client.chat.completions.create(model=NAME, messages=ASK, **thinking).choices[0].message
    )
    assert (message.reasoning, message.reasoning_content) == (THOUGHT, THOUGHT)
    assert message.content == SAYS
    deltas = [chunk.choices[0].delta for chunk in streamed(client, **thinking) if chunk.choices]
    assert "".join(getattr(delta, "reasoning", "") for delta in deltas) == THOUGHT


def test_openai_stops_samples_and_repeats_with_a_seed(client):
    def said(**kwargs):
        return client.chat.completions.create(model=NAME, messages=ASK, **kwargs).choices[0]

    # The token is "fi", so only the text can stop inside of it.
    assert said(stop=["no", "i"]).message.content == "What "
    assert said(stop="is").finish_reason == "stop"
    assert said(max_completion_tokens=2).finish_reason == "length"
    hot = {"temperature": 1.5, "top_p": 0.9, "seed": 7}
    assert said(**hot).message.content == said(**hot).message.content
    assert said(logit_bias={"57": -100}).message.content != SAYS
    odd = {"top_k": -1, "min_p": 0.1, "repetition_penalty": 1.1}
    assert said(presence_penalty=0.5, frequency_penalty=0.5, extra_body=odd).message.content


def test_openai_completes_text(client):
    kwargs = {"model": NAME, "prompt": "The car", "max_tokens": 4}
    whole = client.completions.create(**kwargs, logprobs=2)
    text = whole.choices[0].text
    assert whole.usage.completion_tokens == 4
    assert len(whole.choices[0].logprobs.tokens) == 4
    assert len(whole.choices[0].logprobs.top_logprobs[0]) == 2
    parts = client.completions.create(**kwargs, stream=True)
    assert "".join(part.choices[0].text for part in parts) == text


def test_openai_s_answer_follows_a_schema(client):
    schema = {
        "type": "object",
        "properties": {"river": {"enum": ["Nile", "Seine"]}, "long": {"type": "boolean"}},
        "required": ["river", "long"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "river", "schema": schema}}
    choice = client.chat.completions.create(
        model=NAME, messages=ASK, response_format=form, max_tokens=60
    ).choices[0]
    assert choice.finish_reason == "stop"
    assert set(json.loads(choice.message.content)) == {"river", "long"}
    choice = client.chat.completions.create(
        model=NAME,
        messages=ASK,
        response_format={"type": "json_object"},
        max_tokens=60,
        # The grammar lets an object begin, and this ends it.
        logit_bias={tiny_tokenizer().convert_tokens_to_ids("}"): 100},
    ).choices[0]
    assert json.loads(choice.message.content) == {}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        bad = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "no"}}}
        client.chat.completions.create(model=NAME, messages=ASK, response_format=bad)


def test_openai_s_errors_say_what_is_there(client):
    with pytest.raises(openai.NotFoundError, match=f"The models are: {NAME}, {NAME}:dense"):
        client.chat.completions.create(model="gpt-4o", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="n must be 1 here") as caught:
        client.chat.completions.create(model=NAME, messages=ASK, n=2)
    assert caught.value.param == "n"
    with pytest.raises(openai.BadRequestError, match="at most 2,048"):
        client.chat.completions.create(
            model=NAME, messages=[{"role": "user", "content": "car " * 3000}]
        )


# anthropic


def test_anthropic_answers_streamed_and_not(claude):
    kwargs = {"model": NAME, "max_tokens": 16, "messages": ASK, "system": "Be short."}
    message = claude.messages.create(**kwargs)
    assert (message.content[0].text, message.stop_reason) == (SAYS, "end_turn")
    assert message.usage.output_tokens > 0 and message.mlx_ifp["k"] == 64
    with claude.messages.stream(**kwargs) as stream:
        assert "".join(stream.text_stream) == SAYS
        final = stream.get_final_message()
    assert final.usage.output_tokens == message.usage.output_tokens
    assert claude.messages.create(**kwargs | {"max_tokens": 2}).stop_reason == "max_tokens"
    stopped = claude.messages.create(**kwargs, stop_sequences=["is"])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", "is")
    tokens = claude.messages.count_tokens(model=NAME, messages=ASK, system="Be short.")
    read = final.usage.input_tokens + final.usage.cache_read_input_tokens
    assert tokens.input_tokens == read


def test_anthropic_calls_tools_and_gets_their_results(claude):
    tool = {"name": "get_weather", "input_schema": {"type": "object", "properties": {}}}
    kwargs = {"model": NAME, "max_tokens": 16, "tools": [tool]}
    with claude.messages.stream(messages=ASK, **kwargs) as stream:
        message = stream.get_final_message()
    (call,) = message.content
    assert (message.stop_reason, call.name, call.input) == (
        "tool_use",
        "get_weather",
        {"city": "Paris"},
    )
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "7 degrees"}
    asked = [
        *ASK,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": [result]},
    ]
    assert claude.messages.create(messages=asked, **kwargs).content[0].text == SAYS


def test_anthropic_gets_the_thoughts_as_a_block(claude):
    thinking = {"type": "enabled", "budget_tokens": 1024}
    kwargs = {"model": NAME, "max_tokens": 2048, "messages": ASK, "thinking": thinking}
    with claude.messages.stream(**kwargs) as stream:
        final = stream.get_final_message()
    assert [block.type for block in final.content] == ["thinking", "text"]
    assert final.content[0].thinking == THOUGHT


def test_anthropic_s_errors_have_its_classes(claude):
    with pytest.raises(anthropic.NotFoundError, match="The models are"):
        claude.messages.create(model="claude", max_tokens=1, messages=ASK)
    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "?"}}
    with pytest.raises(anthropic.BadRequestError, match="only text can be read"):
        claude.messages.create(
            model=NAME, max_tokens=1, messages=[{"role": "user", "content": [image]}]
        )


# llm and curl


def test_llm_answers_with_its_extra_models_file(server, tmp_path):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: ifp\n  model_name: {NAME}\n  api_base: {server.url}/v1\n  can_stream: true\n"
    )
    done = subprocess.run(
        [Path(sys.executable).with_name("llm"), "-m", "ifp", "What is the car?"],
        capture_output=True,
        text=True,
        env=os.environ | {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"},
        stdin=subprocess.DEVNULL,
    )
    assert (done.stdout.strip(), done.returncode) == (SAYS, 0), done.stderr


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_streams(server):
    body = json.dumps({"model": NAME, "messages": ASK, "stream": True})
    url = f"{server.url}/v1/chat/completions"
    done = subprocess.run(
        ["curl", "-sSN", url, "-d", body], capture_output=True, text=True, check=True
    )
    lines = [line for line in done.stdout.splitlines() if line and not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
