"""Objects in processes of their own: they answer, fail, hang, die, and never outlive us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from agentdistill.envs.worker import Child, Worker, scrubbed
from agentdistill.errors import ConfigError, EnvError
from tests.processes import gone


class Echo:
    """What the child constructs."""

    def __init__(self, greeting: str = "hello", fail: str = "") -> None:
        if fail:
            raise ValueError(fail)
        self.greeting = greeting

    def say(self, name: str) -> str:
        print("this goes to the log")
        return f"{self.greeting} {name}"

    def process(self) -> int:
        return os.getpid()

    def variables(self) -> dict[str, str]:
        return dict(os.environ)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def refuse(self, kind: str) -> None:
        if kind == "ours":
            raise ConfigError("must be another", key="kind", value=kind)
        raise KeyError("theirs\nin two lines")

    def leave(self, words: str) -> None:
        print(words, file=sys.stderr, flush=True)
        os._exit(7)


TARGET = "tests.envs.test_worker:Echo"


@pytest.fixture
def worker() -> Iterator[Worker]:
    made = Worker(TARGET, greeting="good morning", deadline=60)
    yield made
    made.close()


def test_calls_return_what_the_object_returns(
    worker: Worker, capfd: pytest.CaptureFixture[str]
) -> None:
    assert worker.call("say", "Ada") == "good morning Ada"
    assert worker.call("process") != os.getpid()
    assert capfd.readouterr().out == ""


def test_calls_from_many_threads_do_not_mix(worker: Worker) -> None:
    names = [f"number {i}" for i in range(50)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda name: worker.call("say", name), names))
    assert answers == [f"good morning {name}" for name in names]


def test_errors_of_the_object_arrive_and_the_worker_goes_on(worker: Worker) -> None:
    with pytest.raises(ConfigError, match="kind='ours': must be another"):
        worker.call("refuse", "ours")
    with pytest.raises(EnvError, match=r"^KeyError: 'theirs\\nin two lines'$"):
        worker.call("refuse", "theirs")
    assert worker.call("say", "again") == "good morning again"


def test_a_constructor_that_fails_says_so_at_the_first_call() -> None:
    worker = Worker(TARGET, fail="no games here")
    with pytest.raises(EnvError, match="no games here"):
        worker.call("say", "Ada")
    worker.close()


def test_a_killed_child_is_an_error_that_names_the_signal(worker: Worker) -> None:
    process = worker.call("process")
    os.kill(process, signal.SIGKILL)
    with pytest.raises(EnvError, match="signal 9"):
        worker.call("say", "Ada")
    assert worker.broken
    with pytest.raises(EnvError, match="has ended"):
        worker.call("say", "Ada")


def test_last_words_are_quoted(worker: Worker) -> None:
    with pytest.raises(EnvError, match=r"exit code 7 \(.*the disk is on fire\)"):
        worker.call("leave", "the disk is on fire")


def test_a_call_beyond_the_deadline_kills_the_child(worker: Worker) -> None:
    process = worker.call("process")
    begun = time.monotonic()
    with pytest.raises(EnvError, match=r"no answer within 0\.2 s"):
        worker.call("sleep", 60, deadline=0.2)
    assert time.monotonic() - begun < 10
    assert gone(process)


def test_close_ends_the_child_and_may_be_repeated(worker: Worker) -> None:
    process = worker.call("process")
    worker.close()
    worker.close()
    assert gone(process)


def test_a_scrubbed_environment_has_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    worker = Worker(TARGET, environ=scrubbed(MARK="here"))
    found = worker.call("variables")
    worker.close()
    assert "OPENAI_API_KEY" not in found
    assert found["MARK"] == "here"


PARENT = """
import sys, time
from agentdistill.envs.worker import Worker
worker = Worker("tests.envs.test_worker:Echo")
print(worker.call("process"), flush=True)
if sys.argv[1] == "busy":
    import threading
    threading.Thread(target=lambda: worker.call("sleep", 600), daemon=True).start()
time.sleep(600)
"""


@pytest.mark.parametrize("state", ["idle", "busy"])
def test_the_child_of_a_killed_parent_goes_too(state: str) -> None:
    path = os.pathsep.join(path or os.getcwd() for path in sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, state],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    time.sleep(0.2)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert parent.stdin is None
    assert gone(child)


def test_a_program_that_is_not_there_is_a_clear_error() -> None:
    with pytest.raises(EnvError, match="cannot start no-such-program"):
        Child(["no-such-program"])
