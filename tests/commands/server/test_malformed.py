"""Whatever is sent, the answer is an error that says what is wrong, and the server goes on."""

import json
import socket

import pytest

from .conftest import NAME

ASK = [{"role": "user", "content": "Hi"}]
CHAT, TEXT, MESSAGES, TASKS = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/messages",
    "/v1/tasks",
)


def chat(**fields) -> bytes:
    return json.dumps({"model": NAME, "messages": ASK} | fields).encode()


def said(content) -> bytes:
    return chat(messages=[{"role": "user", "content": content}])


def claude(**fields) -> bytes:
    return json.dumps({"model": NAME, "max_tokens": 5, "messages": ASK} | fields).encode()


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,not base64!"}}
ELSEWHERE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/secret"}}
TOOL = {"type": "function", "function": {"name": "f"}}

# What is sent -> the status, and a word of the message.
BODIES = [
    ("no JSON", CHAT, b"{model:", 400, "not JSON"),
    ("not UTF-8", CHAT, b'{"model": "\xff"}', 400, "UTF-8"),
    ("NaN", CHAT, b'{"temperature": NaN}', 400, "NaN"),
    ("an endless number", CHAT, b'{"temperature": 1e999}', 400, "temperature"),
    ("a number of 5,000 digits", CHAT, b'{"seed": ' + b"9" * 5000 + b"}", 400, "not JSON"),
    ("a list", CHAT, b"[]", 400, "object"),
    ("nested too deeply", CHAT, b'{"a":' * 100_000, 400, "deeply"),
    ("nothing", CHAT, b"", 400, "not JSON"),
    ("no messages", CHAT, b"{}", 400, "messages"),
    ("messages of text", CHAT, chat(messages="Hi"), 400, "messages"),
    ("empty messages", CHAT, chat(messages=[]), 400, "messages"),
    ("a message that is a number", CHAT, chat(messages=[1]), 400, "message 1"),
    ("an unknown role", CHAT, chat(messages=[{"role": "king", "content": ""}]), 400, "role"),
    ("a content that is a number", CHAT, said(5), 400, "content"),
    ("half a surrogate pair", CHAT, said("\ud800"), 400, "surrogate"),
    ("bad base64", CHAT, said([IMAGE]), 400, "image_url"),
    ("an image elsewhere", CHAT, said([ELSEWHERE]), 400, "image_url"),
    ("a million messages", CHAT, chat(messages=ASK * 1_000_000), 413, "bytes"),
    ("20,000 messages", CHAT, chat(messages=ASK * 20_000), 413, "at most 10,000"),
    ("a prompt beyond the context", CHAT, said("car " * 5000), 400, "at most 2,048"),
    ("negative tokens", CHAT, chat(max_tokens=-1), 400, "max_tokens"),
    ("no tokens", CHAT, chat(max_tokens=0), 400, "max_tokens"),
    ("true tokens", CHAT, chat(max_tokens=True), 400, "max_tokens"),
    ("tokens of text", CHAT, chat(max_tokens="5"), 400, "max_tokens"),
    ("a cold temperature", CHAT, chat(temperature=-0.1), 400, "temperature"),
    ("a list as temperature", CHAT, chat(temperature=[1]), 400, "temperature"),
    ("top_p above 1", CHAT, chat(top_p=1.5), 400, "top_p"),
    ("a seed below 0", CHAT, chat(seed=-1), 400, "seed"),
    ("a seed too large", CHAT, chat(seed=1 << 64), 400, "seed"),
    ("a model that is a number", CHAT, chat(model=5), 400, "model"),
    ("an unknown model", CHAT, chat(model="../../etc/passwd"), 404, "models are"),
    ("an unknown task", CHAT, chat(model=f"{NAME}:nope"), 404, "models are"),
    ("a task that is a path", CHAT, chat(model=f"{NAME}:../x"), 404, "models are"),
    ("stream as text", CHAT, chat(stream="yes"), 400, "stream"),
    ("stream options as text", CHAT, chat(stream=True, stream_options="all"), 400, "stream_o"),
    ("stop as a number", CHAT, chat(stop=5), 400, "stop"),
    ("an empty stop", CHAT, chat(stop=[""]), 400, "stop"),
    ("100 stops", CHAT, chat(stop=["a"] * 100), 400, "stop"),
    ("a bias of words", CHAT, chat(logit_bias={"the": 1}), 400, "logit_bias"),
    ("a bias of text", CHAT, chat(logit_bias={"1": "much"}), 400, "logit_bias"),
    ("a bias beyond the vocabulary", CHAT, chat(logit_bias={"999999": 1}), 400, "999999"),
    ("two answers", CHAT, chat(n=2), 400, "n must be 1"),
    ("a forced tool", CHAT, chat(tools=[TOOL], tool_choice="required"), 400, "tool_choice"),
    ("a tool forced by its name", CHAT, chat(tools=[TOOL], tool_choice={
        "type": "function", "function": {"name": "f"}}), 400, "tool_choice"),
    ("a tool without a name", CHAT, chat(tools=[{"type": "function"}]), 400, "tools"),
    ("a tool call without JSON", CHAT, chat(messages=[
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]),
        400, "no JSON"),
    ("100 top logprobs", CHAT, chat(logprobs=True, top_logprobs=100), 400, "top_logprobs"),
    ("top logprobs alone", CHAT, chat(top_logprobs=2), 400, "logprobs"),
    ("another response format", CHAT, chat(response_format={"type": "xml"}), 400, "type must be"),
    ("an unknown field", CHAT, chat(functions=[]), 400, "functions"),
    ("a model to load", CHAT, chat(draft_model="org/model"), 400, "draft_model"),
    ("an adapter to load", CHAT, chat(adapters="/etc"), 400, "adapters"),
    ("a chat template", CHAT, chat(chat_template_kwargs={"chat_template": "{{ 1 }}"}), 400,
        "chat_template"),
    ("keep of nothing", CHAT, chat(keep=0), 400, "keep"),
    ("keep of too much", CHAT, chat(keep=100_000), 400, "100"),
    ("an unknown selector", CHAT, chat(selector="magic"), 400, "magic"),
    ("an empty task", CHAT, chat(task=""), 400, "task"),
    ("a task of spaces", CHAT, chat(task="  "), 400, "empty"),
    ("a task for the whole model", CHAT, chat(model=f"{NAME}:dense", task="x"), 400, "no effect"),
    ("no prompt", TEXT, b"{}", 400, "prompt"),
    ("a prompt of numbers", TEXT, b'{"prompt": [1, 2]}', 400, "prompt"),
    ("an echo", TEXT, b'{"prompt": "a", "echo": true}', 400, "echo"),
    ("Claude without max_tokens", MESSAGES, chat(), 400, "max_tokens"),
    ("Claude with a system role", MESSAGES, claude(messages=[
        {"role": "system", "content": "x"}]), 400, "message 1"),
    ("Claude with a web search", MESSAGES, claude(tools=[
        {"type": "web_search_20250305", "name": "web_search"}]), 400, "tools"),
    ("Claude with a forced tool", MESSAGES, claude(tool_choice={"type": "any"}), 400,
        "tool_choice"),
    ("a task without a name", TASKS, b'{"description": "x"}', 400, "name"),
    ("a task without a text", TASKS, b'{"name": "x"}', 400, "description"),
    ("a task at a path", TASKS, b'{"name": "../x", "description": "x"}', 400, "name"),
    ("a task called dense", TASKS, b'{"name": "dense", "description": "x"}', 400, "dense"),
    ("a task of no examples", TASKS, b'{"name": "x", "examples": []}', 400, "examples"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("path", "body", "status", "word"), [case[1:] for case in BODIES], ids=[c[0] for c in BODIES]
)
def test_a_body_that_is_wrong_is_named(server, path, body, status, word):
    head, answer = talk(server, post(path, body))
    assert (head, answer["type"]) == (status, "error")
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert word in error["message"] and "\n" not in error["message"]


def post(path: str, body: bytes, length: object = None) -> bytes:
    length = len(body) if length is None else length
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\n\r\n".encode()
        + body
    )


def talk(server, sent: bytes, *, half_closed: bool = False):
    """The status and the JSON that a connection gives for some bytes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(sent)
        if half_closed:
            connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as file:
            head, _, body = file.read().partition(b"\r\n\r\n")
    return int(head.split()[1]), json.loads(body)


GET = "GET {} HTTP/1.1\r\nHost: 127.0.0.1\r\n{}\r\n"
CONNECTIONS = [
    ("half a body", post(CHAT, chat()[:20], 100), 408),
    ("a length that is no number", post(CHAT, b"", "many"), 400),
    ("a negative length", post(CHAT, b"", -5), 400),
    ("a length beyond all bounds", post(CHAT, b"", 10**14), 413),
    ("no length", f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode(), 411),
    ("a method that is wrong here", GET.format(CHAT, "").encode(), 405),
    ("a method that is unknown", b"BREW / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 405),
    ("a path that is not there", GET.format("/v1/files", "").encode(), 404),
    ("a path out of the tasks", GET.format("/v1/tasks/..%2f..%2fx", "").encode(), 404),
    ("a huge header", GET.format("/", f"X: {'x' * 70_000}\r\n").encode(), 431),
    ("500 headers", GET.format("/", "X: x\r\n" * 500).encode(), 431),
    ("a huge path", GET.format("/" + "x" * 70_000, "").encode(), 414),
    ("no HTTP at all", b"\x16\x03\x01 hello there\r\n\r\n", 400),
    ("another version", b"GET / HTTP/9.9\r\n\r\n", 400),
]  # fmt: skip


@pytest.mark.parametrize(
    ("sent", "status"), [case[1:] for case in CONNECTIONS], ids=[case[0] for case in CONNECTIONS]
)
def test_a_connection_that_is_wrong_is_answered(server, sent, status):
    head, answer = talk(server, sent, half_closed=True)
    assert head == status and answer["error"]["message"]


def test_the_server_has_gone_on(server):
    status, answer = server.ask(CHAT, {"model": NAME, "messages": ASK, "max_tokens": 2})
    assert status == 200 and answer["choices"][0]["finish_reason"] == "length"
    assert server.ask("/health") == (200, {"status": "ok", "running": 0, "waiting": 0})
    assert "Traceback" not in server.log.read_text()
