"""AppWorld: an agent does errands by writing Python against the interfaces of everyday apps.

Invariants
----------
* An action is Python code; variables live on from step to step. The observation is what the code
  printed, or how it failed, cut after ``max_output`` characters with a mark that says so.
* ``valid`` is false where no code ran: none in the text, too long, control characters, a syntax
  error, or something that AppWorld refuses by its syntax (``os.system``). An exception that the
  code raises is an ordinary observation (``info["raised"]``): some of it may have had its effect.
* The episode ends when the agent calls ``apis.supervisor.complete_task``. Then, and at the step
  limit, AppWorld's own tests judge the databases: ``score`` is the share that passed (an agent that
  does nothing passes some), ``success`` and the reward of 1 say that all did. Before, both are 0.
* Code that runs too long is interrupted and observed as such; only where it cannot be interrupted
  it is a fault, like a process that died.
* States are restored by replay: AppWorld's own saved states hold the databases, not the variables.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from agentdistill import equivalence
from agentdistill.envs.appworld import data, setup
from agentdistill.envs.appworld.worlds import START, Nursery, World, nursery
from agentdistill.envs.base import Availability, Card, Moved, TextEnv
from agentdistill.errors import ConfigError, EnvError
from agentdistill.records import Task

ID = "agentdistill/AppWorld-v0"

LONGEST = 50_000
"""Characters of code that are sent to the engine; longer actions are invalid."""

PATIENCE = 20.0
"""Seconds after the interruption of code until its process is killed."""

FOOTPRINT = 0.4
"""GiB that one world needs, the databases included; a quarter of it is its own after a reset."""

INSTRUCTION = """\
You do an errand for your supervisor by writing Python code. Each action is a piece of code that \
is executed; you then see what it printed. Variables stay between actions.
The object `apis` reaches the apps: `apis.<app>.<api>(name=value)`, keyword arguments only.
Look things up before you use them: `print(apis.api_docs.show_app_descriptions())` lists the apps, \
`print(apis.api_docs.show_api_descriptions(app_name='<app>'))` the interfaces of one, \
`print(apis.api_docs.show_api_doc(app_name='<app>', api_name='<api>'))` what one of them takes.
`apis.supervisor` knows your supervisor: profile, addresses, payment cards, and the passwords of \
the accounts. Most apps want the `access_token` that their `login` returns. Lists come in pages: \
go through all of them.
Only print what you need to see; long output is cut. The file system, the network and other \
programs are out of reach. Nobody answers questions: decide yourself.
When the errand is done, call `apis.supervisor.complete_task()`; where it asks for something, call \
`apis.supervisor.complete_task(answer=...)` with the bare answer. That ends the episode."""

EXAMPLES = (
    "print(apis.api_docs.show_app_descriptions())",
    "print(apis.api_docs.show_api_descriptions(app_name='simple_note'))",
    "print(apis.supervisor.show_profile())",
    "print(apis.supervisor.show_account_passwords())",
    "print(apis.simple_note.login(username='nobody@example.com', password='guess'))",
    "count = globals().get('count', 0) + 1\nprint(count)",
    "import os\nos.system('ls')",
    "apis.supervisor.complete_task()",
)

TOOL = {
    "type": "function",
    "function": {
        "name": "execute",
        "description": "Execute Python code in the world of apps; returns what it prints.",
        "parameters": {
            "type": "object",
            "properties": {"code": {"type": "string", "description": "Python code."}},
            "required": ["code"],
            "additionalProperties": False,
        },
    },
}

_NOTHING = {"cut": 0, "ran": False, "completed": False}
_FENCE = re.compile(r"^```(?:python|py)?[ \t]*\n(.*?)^```[ \t]*$", re.DOTALL | re.MULTILINE)
_TAGGED = re.compile(r"\A\s*<code>(.*)</code>\s*\Z", re.DOTALL)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff]")


class AppWorldEnv(TextEnv):
    """AppWorld, one process per episode. See the module docstring for what holds."""

    def __init__(
        self,
        *,
        root: str | Path | None = None,
        seconds: int = 100,
        memory: float = 4.0,
        max_output: int = 10_000,
        max_steps: int | None = None,
        render_mode: str | None = None,
    ) -> None:
        """Nothing is started yet.

        Args:
            root: the folder above ``data``; None is ``$APPWORLD_ROOT``, or where `agentdistill data
                appworld` puts it.
            seconds: after so many, running code is interrupted (100 is AppWorld's own).
            memory: GiB of address space of a world; 0 for no limit.
            max_output: characters of an observation.
            max_steps: step limit; None takes the card's.
            render_mode: ``ansi`` or None.
        """
        super().__init__(max_steps=max_steps, render_mode=render_mode, actions=EXAMPLES)
        for key, value, least in (("seconds", seconds, 1), ("max_output", max_output, 100)):
            if value < least:
                raise ConfigError(f"must be at least {least}", key=key, value=value)
        if memory and memory < 1:
            raise ConfigError("must be 0 (no limit) or at least 1", key="memory", value=memory)
        self._root = Path(root).expanduser().absolute() if root else setup.root().absolute()
        self._seconds, self._limit = int(seconds), max_output
        self._memory = int(memory * 2**30)
        self._nursery: Nursery | None = None
        self._world: World | None = None
        self._specs: dict[str, Any] = {}

    @cached_property
    def card(self) -> Card:
        """The facts about this environment."""
        return Card(
            id=ID,
            version=setup.version() or setup.VERSION,
            data=data.version(self._root),
            licence="Apache-2.0",
            splits=data.SPLITS,
            step_limit=50,
            isolation="server",
            source="https://github.com/StonyBrookNLP/appworld",
            slots=slots(),
            roles={"tune": "dev", "report": "test_normal"},
            notes=(
                f"output cut after {self._limit} characters, code after {self._seconds} s",
                "score: share of AppWorld's tests that pass at the end, of which some need no work",
                "what its bundles contain may be passed on encrypted only",
            ),
        )

    @property
    def instruction(self) -> str:
        """Rules and actions."""
        return INSTRUCTION

    @property
    def goal(self) -> str:
        """The errand, and whose it is."""
        return _goal(self._specs) if self._specs else ""

    @property
    def tools(self) -> list[dict[str, Any]]:
        """One tool, ``execute(code)``."""
        return [TOOL]

    @classmethod
    def availability(cls) -> Availability:
        """What is installed and what data is there."""
        installed, root = setup.python() is not None, setup.root()
        found = data.version(root)
        missing = [] if installed else [f"AppWorld: {setup.REMEDY}"]
        if not found:
            missing.append(f"its tasks in {root}: {data.DOWNLOAD}")
        return Availability(
            package=f"appworld {setup.version()}" if installed else "",
            data=f"{found} in {root}" if found else "",
            missing=tuple(missing),
            needs=tuple(missing),
        )

    def tasks(self, split: str, seed: int = 0) -> Iterator[Task]:
        """The tasks of ``train``, ``dev``, ``test_normal`` or ``test_challenge``.

        With seed 0 in the official order, else shuffled.
        """
        if split not in data.SPLITS:
            known = ", ".join(data.SPLITS)
            raise ConfigError(f"AppWorld's splits are {known}", key="split", value=split)
        names = data.listed(self._root, split)
        return (
            self._task_of(name, split, place)
            for place, name in enumerate(data.shuffled(names, seed))
        )

    def _task_of(self, name: str, split: str, place: int) -> Task:
        found = data.specs(self._root, name)
        payload = {"task": name, "specs": found["digest"]}
        return Task(ID, split, payload, data=found["version"], index=place)

    # -- episodes ---------------------------------------------------------------------------------

    def _begin(self, task: Task) -> str:
        self._drop()
        name = str(task.payload.get("task", ""))
        if not re.fullmatch(r"\w+", name):
            raise ConfigError("is no AppWorld task", key="task", value=dict(task.payload))
        found = data.specs(self._root, name)
        if found["digest"] != task.payload.get("specs"):
            remedy = f"was made with other data than is in {self._root}: list the tasks again"
            raise ConfigError(remedy, key="task", value=name)
        self._specs = found
        self._world = self._open(name)
        return opening(found)

    def _open(self, name: str) -> World:
        python = setup.python()
        if python is None:
            raise EnvError(f"AppWorld is not installed: {setup.REMEDY}")
        if "memory" in str(self._root):
            remedy = "AppWorld takes a path with 'memory' in it for no path: choose another folder"
            raise ConfigError(remedy, key="root", value=str(self._root))
        self._nursery = nursery(python, self._root, self._memory)
        world = self._nursery.world()
        try:
            world.call("start", START, task=name, seconds=self._seconds)
        except EnvError as error:
            remedy = f"if files in {data.folder(self._root, name)} are damaged, {data.DOWNLOAD}"
            raise EnvError(f"cannot start AppWorld's task {name}: {error}; {remedy}") from error
        return world

    def _advance(self, action: str) -> Moved:
        code, refusal = read(action)
        done: dict[str, Any]
        if refusal:
            done = {"output": f"Not executed: {refusal}", **_NOTHING}
        else:
            done = self._call("execute", code=code, limit=self._limit)
        completed, ran = bool(done["completed"]), bool(done["ran"])
        output = _clean(str(done["output"]), int(done["cut"]))
        raised = ran and output.startswith("Execution failed.")
        extra: dict[str, Any] = {"raised": raised}
        success, score = False, 0.0
        if completed or len(self._actions) + 1 >= self.step_limit:
            judged = self._call("evaluate")
            success, tests = bool(judged["success"]), int(judged["tests"])
            score = judged["passed"] / tests if tests else float(success)
            extra |= {"passed": judged["passed"], "tests": tests}
        return Moved(output, float(success), completed, success, score, valid=ran, extra=extra)

    def _call(self, do: str, **arguments: Any) -> dict[str, Any]:
        if self._world is None:
            raise EnvError("AppWorld's world has ended; reset the environment")
        return self._world.call(do, self._seconds + PATIENCE, **arguments)

    def expert_action(self) -> str | None:
        """The recorded solution, all of it at once; None once it ran, and for the test splits.

        It is what AppWorld's authors compiled for this task, not what an agent would do that has to
        look things up first.
        """
        if self._task is None or self._world is None:
            return None
        code = data.solution(self._root, str(self.task.payload["task"]))
        return code if code and code not in self._actions else None

    def meaning(self, action: str) -> str:
        """The syntax tree of its code: comments and layout say nothing."""
        return equivalence.code(read(action)[0] or action)

    def held_out(self, observation: str) -> bool:
        """Whether ``observation`` is the first one of a task outside the training split."""
        return observation in self._held_out

    @cached_property
    def _held_out(self) -> frozenset[str]:
        names = [name for split in data.SPLITS[1:] for name in data.listed(self._root, split)]
        return frozenset(opening(data.specs(self._root, name)) for name in names)

    def _drop(self) -> None:
        world, self._world = self._world, None
        if world is not None:
            world.close()

    def close(self) -> None:
        """End this instance's process; the last instance ends the shared one too."""
        self._drop()
        self._nursery = None


def read(action: str) -> tuple[str, str]:
    """The code in an action: bare, in a fence of Python (the first one), or between code tags.

    Returns:
        The code and "", or "" and why there is nothing to execute.
    """
    if len(action) > LONGEST:
        return "", f"the code has more than {LONGEST:,} characters."
    if _CONTROL.search(action):
        return "", "the code has control characters or broken Unicode."
    text = action.replace("\r\n", "\n")
    tagged = _TAGGED.match(text)
    text = tagged.group(1) if tagged else text
    fenced = _FENCE.search(text)
    text = fenced.group(1) if fenced else text
    return (text, "") if text.strip() else ("", "there is no code.")


def slots(cores: int | None = None, gib: float | None = None) -> int:
    """Worlds to keep at once: four per core, and no more than fit into half of the memory."""
    if cores is None:
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    if gib is None:
        gib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return max(1, min(4 * cores, int(gib / 2 / FOOTPRINT)))


def _clean(output: str, cut: int) -> str:
    """``output`` as valid Unicode, with a mark where it was cut."""
    text = output.encode(errors="replace").decode()
    return f"{text}\n[cut: {cut:,} more characters]" if cut else text


def _goal(found: dict[str, Any]) -> str:
    person = f"{found['name']}, {found['email']}, phone {found['phone']}"
    return f"{found['instruction']}\n(Your supervisor: {person}. It is {found['time']}.)"


def opening(found: dict[str, Any]) -> str:
    """The first observation of a task: the errand, whose it is, where to begin."""
    start = "Begin with print(apis.api_docs.show_app_descriptions()) if you need to look around."
    return f"{_goal(found)}\n{start}"
