"""The verb: a process of its own, signals, keys, and recordings that become demonstrations."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from agentdistill.agreement import Rule
from agentdistill.cascade import BEFORE
from agentdistill.demos import Demos
from agentdistill.serving.cascade import MessageCascade, Shown
from tests.cli_calls import ROOT, answer, refused
from tests.servers import Running, Scripted, chat, exchange, said

pytestmark = pytest.mark.serve

TINY = {"hidden": 16, "heads": 1, "layers": 1, "tokenizer": {"vocabulary": 300, "episodes": 4}}
SECRET = "k-0123456789abcdef"


def recipe(folder: Path, **changes: Any) -> str:
    """A configuration of two tiny models and a cascade of them."""
    said_ = {
        "output": str(folder / "runs"),
        "env": {"id": "tests.toy:Corridor"},
        "sampling": {"max_tokens": 3},
        "models": {"student": TINY, "teacher": TINY},
        "policies": {"both": {"student": "student", "teacher": "teacher", "samples": 2}},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps({**said_, **changes}))
    return str(path)


@contextmanager
def process(*args: str, **environ: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A server of the interpreter's ``args``, and its port once it answers."""
    started = subprocess.Popen(
        [sys.executable, *args],
        cwd=ROOT,
        env={**os.environ, **environ},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert started.stdout is not None and started.stderr is not None
        line = started.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/v1", line)
        assert found, line + started.stderr.read()
        yield started, int(found[1])
    finally:
        started.kill()
        started.communicate()


def test_a_cascade_of_local_models_serves_records_and_drains(tmp_path: Path) -> None:
    """One process: a key, an answer, a signal while one is being answered, and what is on disk."""
    log = tmp_path / "log.jsonl"
    verb = ["-m", "agentdistill.cli", "serve", recipe(tmp_path), "--port", "0"]
    options = ["--policy", "both", "--record", str(log), "--key-env", "SERVE_KEY"]
    with process(*verb, *options, SERVE_KEY=SECRET) as (server, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = chat("P..G\nstart", model="both", metadata={"task_id": "seven"})
        assert exchange(connection, body)[0] == 401
        key = {"Authorization": f"Bearer {SECRET}"}
        status, first, _ = exchange(connection, body, headers=key)
        assert status == 200 and first["agentdistill"]["answers"][0]["drafts"] == 2
        long = chat(f"P..G {SECRET}", model="both", max_tokens=200)
        found: list[int] = []
        begun = threading.Thread(
            target=lambda: found.append(exchange(connection, long, headers=key)[0])
        )
        begun.start()
        while not found and _health(port)["busy"] == 0:
            time.sleep(0.005)
        server.send_signal(signal.SIGTERM)
        begun.join()
        connection.close()
        assert found == [200]
        out, err = server.communicate(timeout=20)
        assert (server.returncode, out, err) == (0, "", "")
    text = log.read_text()
    records = [json.loads(line) for line in text.splitlines()]
    assert len(records) == 2 and SECRET not in text and "Bearer" not in text
    assert records[0]["request"]["messages"] == body["messages"]
    assert records[0]["response"] == first and records[0]["metadata"] == {"task_id": "seven"}
    assert log.stat().st_mode & 0o077 == 0


def _health(port: int) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        return exchange(connection, path="/health")[1]
    finally:
        connection.close()


SLOW = """
import asyncio
from agentdistill.serving.app import Serving
from agentdistill.serving.server import listen, serve
from tests.servers import Scripted
bound = listen("127.0.0.1", 0)
where = f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
serving = Serving(Scripted(after=60), "slow")
asyncio.run(serve(serving, bound, ready=lambda: print(where, flush=True)))
"""


def test_a_second_ctrl_c_ends_what_has_begun() -> None:
    with process("-c", SLOW) as (server, port):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        found: list[int] = []
        begun = threading.Thread(
            target=lambda: found.append(exchange(connection, chat("hi", model="slow"))[0])
        )
        begun.start()
        while _health(port)["busy"] == 0:
            time.sleep(0.005)
        server.send_signal(signal.SIGINT)
        while _health(port)["status"] != "draining":
            time.sleep(0.005)
        server.send_signal(signal.SIGINT)
        begun.join()
        connection.close()
        _, err = server.communicate(timeout=20)
        assert found == [503] and (server.returncode, err) == (0, "")


def test_what_cannot_be_served_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = recipe(tmp_path)
    assert "--key-env" in refused(2, "serve", path, "--host", "0.0.0.0")
    assert "not set" in refused(2, "serve", path, "--key-env", "NO_SUCH_KEY")
    monkeypatch.setenv("EMPTY_KEY", " ")
    assert "not set" in refused(2, "serve", path, "--key-env", "EMPTY_KEY")
    line = refused(2, "serve", path, "--policy", "nobody")
    assert "known: both, student, teacher" in line
    record = ["--record", str(tmp_path / "recipe.yaml" / "log")]
    assert "cannot use" in refused(5, "serve", path, *record)


def test_without_the_packages_it_says_which_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "uvicorn" else real(name)
    )
    assert "pip install 'agentdistill[serve]'" in refused(3, "serve", recipe(tmp_path))


# -- recordings ------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object"}}}


def find(order: int) -> dict[str, Any]:
    arguments = json.dumps({"order": order})
    function = {"name": "find", "arguments": arguments}
    return {"id": f"c{order}", "type": "function", "function": function}


def agent(server: Running, order: int) -> str:
    """An agent as it may exist: asks, does what it is told to, and asks again."""
    messages: list[Any] = [
        {"role": "system", "content": "You help with orders."},
        {"role": "user", "content": f"Where is order {order}?"},
    ]
    while True:
        body = {"model": "cascade", "messages": messages, "tools": [TOOL]}
        status, answer_, _ = server.ask(body)
        assert status == 200
        message = answer_["choices"][0]["message"]
        messages.append(message)
        if not message.get("tool_calls"):
            return str(message["content"])
        for call in message["tool_calls"]:
            content = f"order {order} is in Bremen"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": content})


def test_what_was_recorded_is_shown_to_the_student_afterwards(tmp_path: Path) -> None:
    """The teacher alone is recorded; its log becomes demonstrations; the student sees them."""
    from agentdistill.serving.recording import Recording

    def big(messages: Any, number: int) -> Any:
        if messages[-1].role == "tool":
            return said("It is in Bremen.", reasoning="the tool says so")
        return said("", tool_calls=(find(int(messages[-1].content.split()[-1].strip("?"))),))

    log, run, folder = (tmp_path / name for name in ("log.jsonl", "run", "demos"))
    recording = Recording(log)
    with Running(Scripted(big), recording=recording) as server:
        for order in (7, 8):
            assert agent(server, order) == "It is in Bremen."
    recording.close()
    log.write_bytes(log.read_bytes() + b'{"torn')  # killed in the middle of a line
    Recording(log).close()
    assert len(log.read_text().splitlines()) == 5

    counts = answer("import", str(log), "--to", str(run), "--assume-success")
    assert (counts["trajectories"], counts["joined"], counts["refused"]) == (2, 2, 1)
    facts = answer("demos", str(run), "--to", str(folder))
    assert (facts["episodes"], facts["steps"]) == (2, 4)

    student, teacher = Scripted("no idea", name="small"), Scripted(big, name="big")
    shown = Shown(Demos.open(folder), k=1, window=1)
    one = MessageCascade("cascade", student, teacher, Rule("always"))
    seen = MessageCascade("cascade", student, None, Rule(), shown=shown)
    with Running(one) as server:
        assert agent(server, 9) == "It is in Bremen."
    for order, others in ((9, ("7", "8")), (7, ("8",)), (8, ("7",))):
        with Running(seen) as server:
            assert agent(server, order) == "no idea"
        told = student.asked[-1]["messages"][-1].content
        assert told.startswith(BEFORE) and told.endswith(f"Where is order {order}?")
        (task,) = re.findall(r"Task: Where is order (\d)\?|Seen:\nWhere is order (\d)\?", told)
        assert "".join(task) in others  # never its own
        assert 'Done: find({"order": ' in told and "It is in Bremen." in told
