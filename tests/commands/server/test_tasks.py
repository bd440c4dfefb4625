"""Tasks over HTTP are the library's, and models at once."""

from mlx_ifp.checkpoint.directory import open_checkpoint
from mlx_ifp.selection.task_library import Task, TaskLibrary

from ...helpers import random_selection
from .conftest import NAME

TASKS = "/v1/tasks"


def test_a_task_is_made_shown_used_and_deleted(server, task):
    assert task == f"{NAME}:rivers"
    status, shown = server.ask(f"{TASKS}/rivers")
    assert status == 200
    facts = {"name": "rivers", "model": task, "description": "Say what rivers are.", "k": 64}
    assert shown == shown | facts
    assert server.ask(TASKS)[1]["data"] == [shown]
    body = {"model": task, "prompt": "The car", "max_tokens": 1}
    assert server.ask("/v1/completions", body)[1]["mlx_ifp"]["task"] == "rivers"
    again = {"name": "rivers", "description": "Something else."}
    status, refused = server.ask(TASKS, again)
    assert (status, refused["error"]["code"]) == (409, "task_exists")
    assert server.ask(TASKS, again | {"force": True, "keep": 32})[1]["k"] == 32
    # The selection that is used is the new one.
    assert server.ask("/v1/completions", body)[1]["mlx_ifp"]["k"] == 32


def test_a_task_is_made_of_examples(server):
    examples = ["Name one file or key!", "Name one car or tree!"]
    status, made = server.ask(TASKS, {"name": "names", "examples": examples, "keep": 0.5})
    assert (status, made["k"], made["description"]) == (201, 64, "\n".join(examples))
    assert made["selector"] == "examples"
    answered = [{"prompt": each, "completion": "The car is here."} for each in examples]
    body = {"name": "names", "description": "Names.", "examples": answered, "force": True}
    assert server.ask(TASKS, body)[0] == 201
    status, refused = server.ask(TASKS, body | {"examples": [{"completion": "The car."}]})
    assert status == 400 and "prompt" in refused["error"]["message"]
    assert server.ask(f"{TASKS}/names", method="DELETE") == (
        200,
        {"object": "task.deleted", "name": "names", "deleted": True},
    )
    assert server.ask(f"{TASKS}/names", method="DELETE")[0] == 404


def test_the_library_s_tasks_are_there_and_a_damaged_one_says_so(server, scripted_checkpoint):
    checkpoint = open_checkpoint(scripted_checkpoint)
    library = TaskLibrary(checkpoint, server.log.parent / "cache")
    selection = random_selection(2, 128, 16, checkpoint=checkpoint.digest)
    path = library.add(Task("trees", "Say what trees are.", "activations", selection))
    try:
        body = {"model": f"{NAME}:trees", "prompt": "The car", "max_tokens": 1}
        assert server.ask("/v1/completions", body)[1]["mlx_ifp"]["k"] == 16
        path.write_bytes(b"damaged")
        status, refused = server.ask("/v1/completions", body)
        assert status == 400 and "trees" in refused["error"]["message"]
        (shown,) = server.ask(TASKS)[1]["data"]
        assert "error" in shown
    finally:
        assert server.ask(f"{TASKS}/trees", method="DELETE")[0] == 200
