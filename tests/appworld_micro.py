"""Small tasks of our own for AppWorld's real engine, built when the tests run.

The databases, the API documents and the task files come from the installed package's own classes,
so nothing that its licence wants encrypted lies in this repository. :func:`build` runs this file
with the interpreter of AppWorld's own virtual environment.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

USER = {
    "first_name": "Ada",
    "last_name": "Byron",
    "email": "ada@example.com",
    "phone_number": "5550100",
}
PASSWORD = "engine-no-2"
NOTES = {
    "Assam": "A strong black tea for the morning.",
    "Bridge": "Measure the second arch again.",
    "Ceylon": "Tea with lemon, no milk.",
    "Darjeeling": "The lightest tea of the four.",
    "Engine": "Order two hundred brass wheels.",
}
SPLITS = {
    "train": ("aaaaaa1_1", "aaaaaa1_2", "aaaaaa1_3"),
    "dev": ("bbbbbb2_1",),
    "test_normal": ("cccccc3_1",),
    "test_challenge": ("dddddd4_1",),
}
WORDS = ("tea", "milk", "arch", "lemon", "brass", "morning")
"""What the notes are counted by, a word per task."""

UNCHANGED = "assert that no note was changed."

EVALUATION = f'''
def evaluate(test, public_data, private_data, main_user, models, ground_truth_answer):
    with test("assert answers match."):
        task = models.end.supervisor.Task.all()[0].to_dict(humanize=True)
        test.answer(task["answer"], ground_truth_answer)
    with test("{UNCHANGED}"):
        test.case(models.changed_model_names(), "==", set())
'''

SOLUTION = """
def solution(apis, requester):
    passwords = apis.supervisor.show_account_passwords()
    password = [p["password"] for p in passwords if p["account_name"] == "simple_note"][0]
    login = apis.simple_note.login(username="{email}", password=password)
    notes = apis.simple_note.search_notes(access_token=login["access_token"])
    found = 0
    for note in notes:
        content = apis.simple_note.show_note(
            note_id=note["note_id"], access_token=login["access_token"]
        )["content"]
        found += "{word}" in content.lower()
    apis.supervisor.complete_task(answer=found)
"""


def build(python: Path, root: Path) -> None:
    """Make a root folder with data/datasets, data/tasks and data/api_docs; takes about 10 s."""
    root.mkdir(parents=True, exist_ok=True)
    environ = {**os.environ, "APPWORLD_ROOT": str(root), "APPWORLD_CACHE": str(root / "cache")}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(python), __file__],
        env=environ,
        cwd=root,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"the micro tasks were not built: {done.stderr[-2000:]}")


def _inside() -> None:
    """What runs in the other interpreter."""
    from appworld.apps import get_all_apps
    from appworld.collections.api_docs import ApiDocCollection
    from appworld.collections.models import ModelCollection
    from appworld.common.path_store import path_store

    data = Path(path_store.data)
    (data / "datasets").mkdir(parents=True, exist_ok=True)
    for split, ids in SPLITS.items():
        (data / "datasets" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    documents = ApiDocCollection.build(load_apps=tuple(get_all_apps(skip_admin=True)))
    (data / "api_docs" / "standard").mkdir(parents=True, exist_ok=True)
    for app, apis in documents.items():
        marked = {name: {**document, "canary_string": ""} for name, document in apis.items()}
        (data / "api_docs" / "standard" / f"{app}.json").write_text(json.dumps(marked))
    apps = list(get_all_apps())
    base = ModelCollection.load(to_db_home_path=":memory:base", load_apps=apps, create_db=True)
    _fill(base, documents)
    base.save(str(data / "base_dbs"), format="full")
    names = [task for ids in SPLITS.values() for task in ids]
    for name, word in zip(names, WORDS, strict=True):
        place = f":memory:micro-{name}"
        models = ModelCollection.load(place, str(data / "base_dbs"), load_apps=apps)
        _task(name, word, models, full=not name.startswith(("cccccc", "dddddd")))


def _task(name: str, word: str, models: Any, full: bool) -> None:
    from appworld.apps import get_all_apps
    from appworld.common.constants import DB_VERSION
    from appworld.common.datetime import DateTime
    from appworld.common.path_store import path_store
    from appworld.task import Task

    question = f"How many of my notes mention the word {word}?"
    row = models.supervisor.Task.all()[0]
    row.instruction = question
    row.save()
    answer = sum(word in content.lower() for content in NOTES.values())
    task = Task(
        id=name,
        instruction=question,
        supervisor=models.supervisor.Supervisor.all()[0],
        datetime=DateTime(2023, 5, 18, 12, 0, 0),
        allowed_apps=get_all_apps(skip_admin=True),
        db_version=DB_VERSION,
        model_collection=models,
    )
    task.save(model_collection_format="changes")
    _ground_truth(Path(path_store.data) / "tasks" / name / "ground_truth", word, answer, full)


def _ground_truth(folder: Path, word: str, answer: int, full: bool) -> None:
    """What the engine judges by, as files (its own writer wants a code formatter)."""
    folder.mkdir()
    solution = SOLUTION.format(word=word, **USER)
    tests = [("assert answers match.", "no_op_fail"), (UNCHANGED, "no_op_pass")]
    metadata = {"difficulty": 1, "mode": "full" if full else "minimal"}
    metadata |= {"num_apps": 1, "num_apis": 5, "num_api_calls": 8, "num_solution_code_lines": 9}
    files = {
        "evaluation.py": EVALUATION,
        "answer.json": json.dumps(answer),
        "public_data.json": "{}",
        "private_data.json": "{}",
        "test_data.json": json.dumps([{"requirement": r, "label": n} for r, n in tests]),
        "metadata.json": json.dumps(metadata),
    }
    if full:
        files |= {"solution.py": solution, "compiled_solution.py": solution}
    for file, text in files.items():
        (folder / file).write_text(text)


def _fill(models: Any, documents: Any) -> None:
    """One person, her notes, the task, and documents of the apps that it is about."""
    for app in ("api_docs", "supervisor", "simple_note"):
        for document in documents[app].values():
            facts = {name: value for name, value in document.items() if name != "app_name"}
            models.api_docs.ApiDoc.create_save(app_name_=app, **facts)
    facts = {**USER, "birthday": "1990-12-10", "sex": "female"}
    main_user = models.admin.MainUser.create_save(**facts)
    supervisor = models.supervisor.Supervisor.create_save(**facts)
    models.admin.AccountPassword.create_save(
        main_user_id=main_user.id, account_name="simple_note", password=PASSWORD
    )
    models.supervisor.AccountPassword.create_save(
        supervisor_id=supervisor.id, account_name="simple_note", password=PASSWORD
    )
    models.supervisor.Task.create_save(supervisor_id=supervisor.id, instruction="to be set")
    user = models.simple_note.User.create_save(
        first_name=USER["first_name"],
        last_name=USER["last_name"],
        email=USER["email"],
        password=PASSWORD,
        verified=True,
    )
    for title, content in NOTES.items():
        models.simple_note.Note.create_save(user_id=user.id, title=title, content=content)


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: our helpers must not hide AppWorld's modules
    _inside()
