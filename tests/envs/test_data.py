"""Fetching official data: resumed, compared, unpacked safely; against a server on this machine."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from agentdistill.envs import download, sources
from agentdistill.envs.data import SUMS, State, check, get, look
from agentdistill.envs.sources import DATASETS, Source, dataset
from agentdistill.errors import ConfigError, EnvError, StoreError
from tests.envs.web import Site, serving, start_of

BODY = bytes(range(251)) * 4000  # about 1 MB, no two parts of it alike
DIGEST = hashlib.sha256(BODY).hexdigest()
FAST = (0.0, 0.0)


@pytest.fixture
def site() -> Iterator[Site]:
    with serving(Site({"/file.bin": BODY})) as found:
        yield found


@pytest.fixture
def plain(site: Site) -> Source:
    """A single file whose hash is known."""
    return Source("file.bin", f"{site.url}/file.bin", "we", "MIT", len(BODY), DIGEST)


def zipped(*files: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return out.getvalue()


GAMES = zipped(("games-1/train/a.txt", b"first"), ("games-1/b.txt", b"second"), ("README", b"x"))


@pytest.fixture
def archive(site: Site) -> Source:
    """An archive about which nothing is known beforehand."""
    site.files["/v1/games.zip"] = GAMES
    return Source("games", f"{site.url}/v1/games.zip", "we", "MIT", member="games-1")


def names(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def fetched(source: Source, folder: Path) -> State:
    return get(source, folder, pauses=FAST)


# -- a file ----------------------------------------------------------------------------------------


def test_a_file_arrives_whole_and_only_once(site: Site, plain: Source, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    folder = tmp_path / "new" / "folder"
    assert look(plain, folder).state == "absent"
    state = get(plain, folder, lambda *step: seen.append(step), FAST)
    assert state.state == "present" and state.path.read_bytes() == BODY
    assert names(folder) == ["file.bin"]
    downloading = [step for step in seen if step[0] == "downloading"]
    assert downloading[0][1:] == (0, len(BODY)) and downloading[-1][1:] == (len(BODY), len(BODY))
    assert ("checking", len(BODY), len(BODY)) in seen
    assert fetched(plain, folder).ok and len(site.asked) == 1
    assert check(plain, folder) == State(
        "file.bin", state.path, "verified", "agrees with the known hash"
    )


def test_drops_are_resumed_where_they_happened(site: Site, plain: Source, tmp_path: Path) -> None:
    site.cut = {0: 100_000, 1: 1, 2: 300_000, 3: 0, 4: 0}
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    starts = [start_of(header) for _, header in site.asked]
    assert starts == [0, 100_000, 100_001, 400_001, 400_001, 400_001]


def test_a_later_call_goes_on_with_what_is_there(site: Site, plain: Source, tmp_path: Path) -> None:
    site.cut = {number: 0 for number in range(1, 4)} | {0: 70_000}
    with pytest.raises(EnvError, match="3 attempts ended at byte 70,000"):
        fetched(plain, tmp_path)
    assert look(plain, tmp_path).state == "partial"
    assert look(plain, tmp_path).detail == "70,000 bytes arrived"
    site.asked.clear()
    site.cut = {}
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert [start_of(header) for _, header in site.asked] == [70_000]


def test_a_server_without_ranges_makes_it_start_over(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    site.ranges, site.cut = False, {0: 90_000}
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert [start_of(header) for _, header in site.asked] == [0, 90_000]


def test_a_server_that_always_drops_at_the_same_byte_is_given_up(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    site.ranges, site.cut = False, dict.fromkeys(range(50), 90_000)
    with pytest.raises(EnvError, match=r"ended after 90,000 of 1,004,000 bytes; 3 attempts"):
        fetched(plain, tmp_path)
    assert len(site.asked) == 4


def test_a_range_that_was_not_asked_for_is_not_used(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    site.shift, site.cut = 7, {0: 50_000}
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert [start_of(header) for _, header in site.asked] == [0, 50_000, 0]


@pytest.mark.parametrize("length", [True, False])
def test_a_file_of_unknown_length_and_hash(site: Site, tmp_path: Path, length: bool) -> None:
    site.length = length
    source = Source("file.bin", f"{site.url}/file.bin", "we", "MIT")
    assert fetched(source, tmp_path).path.read_bytes() == BODY
    assert (tmp_path / "file.bin.sha256").read_text() == f"{DIGEST}  file.bin\n"
    assert check(source, tmp_path).detail == "agrees with the hash of its first download"
    (tmp_path / "file.bin").unlink()
    site.files["/file.bin"] = BODY[:-1]
    with pytest.raises(EnvError, match=r"of the first download.*by hand"):
        fetched(source, tmp_path)
    assert names(tmp_path) == ["file.bin.sha256"]


def test_a_body_shorter_than_known_is_never_taken_for_whole(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    site.length, site.cut = False, {0: 1000}
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert [start_of(header) for _, header in site.asked] == [0, 1000]


def test_a_complete_part_is_not_fetched_again(site: Site, plain: Source, tmp_path: Path) -> None:
    part = tmp_path / ".file.bin.part"
    part.write_bytes(BODY)
    assert fetched(plain, tmp_path).ok and site.asked == []
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    part.write_bytes(BODY)  # of a file whose length nobody knows: the server says it is all (416)
    assert fetched(replace(plain, size=None), tmp_path).ok
    assert [start_of(header) for _, header in site.asked] == [len(BODY)]


def test_a_part_longer_than_the_file_is_thrown_away(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    (tmp_path / ".file.bin.part").write_bytes(BODY + b"more")
    unknown = replace(plain, size=None, sha256=None)
    assert fetched(unknown, tmp_path).path.read_bytes() == BODY
    assert [start_of(header) for _, header in site.asked] == [len(BODY) + 4, 0]


# -- what differs ----------------------------------------------------------------------------------


def test_a_wrong_hash_keeps_nothing(site: Site, plain: Source, tmp_path: Path) -> None:
    site.files["/file.bin"] = bytes(len(BODY))
    with pytest.raises(EnvError, match=f"is not the known one .{DIGEST}.*by hand: download"):
        fetched(plain, tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_part_is_replaced_by_a_fresh_download(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    (tmp_path / ".file.bin.part").write_bytes(b"of an older version")
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert [start_of(header) for _, header in site.asked] == [19, 0]


def test_another_length_is_refused_before_it_is_fetched(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    with pytest.raises(EnvError, match=r"has 1,004,000 bytes, not 5: its owner replaced it"):
        fetched(replace(plain, size=5), tmp_path)
    assert names(tmp_path) == []


def test_check_finds_what_was_changed_and_changes_nothing(plain: Source, tmp_path: Path) -> None:
    assert check(plain, tmp_path).state == "absent"
    (tmp_path / "file.bin").write_bytes(bytes(len(BODY)))
    assert check(plain, tmp_path).state == "damaged"
    (tmp_path / "file.bin").write_bytes(b"short")
    assert check(plain, tmp_path).detail == "5 bytes instead of 1,004,000"
    with pytest.raises(EnvError, match="5 bytes instead of 1,004,000; move it away"):
        fetched(plain, tmp_path)
    bare = replace(plain, size=None, sha256=None)
    assert check(bare, tmp_path).state == "unverified"
    assert names(tmp_path) == ["file.bin"]


# -- answers that are no file ----------------------------------------------------------------------


@pytest.mark.parametrize("status", [404, 403, 410])
def test_an_http_error_says_what_to_do(
    site: Site, plain: Source, tmp_path: Path, status: int
) -> None:
    site.status = {0: status}
    with pytest.raises(EnvError) as caught:
        fetched(plain, tmp_path)
    assert re.search(f"{plain.url}: the server answers {status} .*; by hand: ", str(caught.value))
    assert f"save it as {tmp_path / 'file.bin'}" in str(caught.value)
    assert len(site.asked) == 1 and names(tmp_path) == []


def test_a_busy_server_is_asked_again(site: Site, plain: Source, tmp_path: Path) -> None:
    site.status = {0: 503, 1: 429}
    assert fetched(plain, tmp_path).ok and len(site.asked) == 3
    site.status = dict.fromkeys(range(99), 500)
    (tmp_path / "file.bin").unlink()
    with pytest.raises(EnvError, match="answers 500"):
        fetched(plain, tmp_path)


@pytest.mark.parametrize("host", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_no_network_is_one_line_with_the_address(tmp_path: Path, host: str) -> None:
    source = Source("file.bin", f"{host}/file.bin", "we", "MIT", page="https://page.example")
    began = time.monotonic()
    with pytest.raises(EnvError) as caught:
        get(source, tmp_path)
    text = str(caught.value)
    assert f"cannot fetch {host}/file.bin: cannot reach" in text and "\n" not in text
    assert "by hand: download https://page.example, save it as" in text
    assert time.monotonic() - began < 20 and names(tmp_path) == []


def test_a_page_of_the_network_is_not_taken_for_the_file(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    site.answer = lambda path: ("text/html; charset=utf-8", b"<html>Please log in</html>")
    with pytest.raises(EnvError, match="a web page in place of the file"):
        fetched(plain, tmp_path)
    assert names(tmp_path) == []


FORM = """<html><form id="download-form" action="{action}" method="get">
<input type="submit" value="Download anyway"><input type="hidden" name="id" value="a b">
<input type="hidden" name="uuid" value="7&amp;8"></form></html>"""


def test_the_page_before_large_files_is_answered_once(
    site: Site, plain: Source, tmp_path: Path
) -> None:
    def page(path: str) -> tuple[str, bytes] | None:
        return (
            None
            if path.startswith("/real")
            else ("text/html", FORM.format(action="/real").encode())
        )

    site.answer, site.cut = page, {1: 200_000}
    site.files["/real?id=a+b&uuid=7%268"] = BODY
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert [path.partition("?")[0] for path, _ in site.asked] == ["/file.bin", "/real", "/real"]


@pytest.mark.parametrize("action", ["/loop", "http://elsewhere.example/real"])
def test_a_page_that_leads_nowhere_is_an_error(
    site: Site, plain: Source, tmp_path: Path, action: str
) -> None:
    site.answer = lambda path: ("text/html", FORM.format(action=action).encode())
    with pytest.raises(EnvError, match="a web page in place of the file"):
        fetched(plain, tmp_path)
    assert len(site.asked) <= 2


# -- the disk, other processes, interruption -------------------------------------------------------


def test_a_full_disk_is_noticed_before_and_while_writing(
    plain: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 1000))
        with pytest.raises(StoreError, match=r"0.00 GB free, 0.00 GB are needed.*--to"):
            fetched(plain, tmp_path)
    assert names(tmp_path) == []

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *args, **more: Full(os.fspath(self), mode.replace("b", "")),
    )
    with pytest.raises(StoreError, match=r"cannot write .*No space left on device; free space"):
        fetched(plain, tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
def test_a_folder_that_is_not_ours(plain: Source, tmp_path: Path) -> None:
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(StoreError, match="Permission denied"):
        fetched(plain, tmp_path)


def test_a_folder_that_is_a_file(plain: Source, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"cannot write .*choose another folder with --to"):
        fetched(plain, tmp_path / "file" / "below")


def test_two_at_once_do_not_mix(site: Site, plain: Source, tmp_path: Path) -> None:
    site.gate = threading.Event()
    first = threading.Thread(target=fetched, args=(plain, tmp_path))
    first.start()
    while not (tmp_path / ".file.bin.part").exists():
        time.sleep(0.01)
    while not site.asked:
        time.sleep(0.01)
    with pytest.raises(StoreError, match="another process is fetching this file"):
        fetched(plain, tmp_path)
    site.gate.set()
    first.join()
    assert (tmp_path / "file.bin").read_bytes() == BODY and names(tmp_path) == ["file.bin"]


def test_what_another_process_has_just_finished_is_not_fetched(
    site: Site, plain: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = download.part_file

    def late(path: Path) -> Any:
        (tmp_path / "file.bin").write_bytes(BODY)
        return real(path)

    monkeypatch.setattr(download, "part_file", late)
    assert fetched(plain, tmp_path).ok
    assert site.asked == [] and names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_process_leaves_a_part_to_go_on_with(
    site: Site, plain: Source, tmp_path: Path, number: signal.Signals
) -> None:
    site.gate = threading.Event()
    code = (
        "from pathlib import Path; from agentdistill.envs.data import get;"
        "from agentdistill.envs.sources import Source;"
        f"get(Source('file.bin', {plain.url!r}, 'we', 'MIT', {len(BODY)}, {DIGEST!r}),"
        f" Path({str(tmp_path)!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    part = tmp_path / ".file.bin.part"
    while not part.exists() or part.stat().st_size < len(BODY) // 4:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    process.wait(20)
    site.gate.set()
    arrived = part.stat().st_size
    assert 0 < arrived < len(BODY) and names(tmp_path) == [".file.bin.part"]
    assert fetched(plain, tmp_path).path.read_bytes() == BODY
    assert start_of(site.asked[-1][1]) == arrived


# -- archives --------------------------------------------------------------------------------------


def test_an_archive_becomes_a_folder_with_its_hashes(
    site: Site, archive: Source, tmp_path: Path
) -> None:
    assert fetched(archive, tmp_path).ok and fetched(archive, tmp_path).ok
    assert len(site.asked) == 1
    assert names(tmp_path) == ["games.sha256", f"games/{SUMS}", "games/b.txt", "games/train/a.txt"]
    assert (tmp_path / "games" / "train" / "a.txt").read_bytes() == b"first"
    assert check(archive, tmp_path).detail == f"2 files agree with {SUMS}"
    if program := shutil.which("sha256sum"):
        command = [program, "--check", "--strict", SUMS]
        assert subprocess.run(command, cwd=tmp_path / "games", capture_output=True).returncode == 0
    (tmp_path / "games" / "b.txt").write_text("changed")
    (tmp_path / "games" / "train" / "a.txt").unlink()
    found = check(archive, tmp_path)
    assert found.state == "damaged" and found.detail.startswith(
        "2 of 2 files are missing or changed"
    )


def test_a_folder_from_elsewhere_is_left_alone(site: Site, archive: Source, tmp_path: Path) -> None:
    (tmp_path / "games").mkdir()
    (tmp_path / "games" / "mine.txt").touch()
    assert fetched(archive, tmp_path).state == "present" and site.asked == []
    assert check(archive, tmp_path).state == "unverified"
    assert names(tmp_path) == ["games/mine.txt"]


def test_an_archive_that_a_person_put_there_is_used(
    site: Site, archive: Source, tmp_path: Path
) -> None:
    (tmp_path / "games.zip").write_bytes(GAMES)
    known = replace(archive, sha256=hashlib.sha256(GAMES).hexdigest(), size=len(GAMES))
    assert fetched(known, tmp_path).ok and site.asked == []
    assert names(tmp_path) == ["games.zip", f"games/{SUMS}", "games/b.txt", "games/train/a.txt"]
    shutil.rmtree(tmp_path / "games")
    (tmp_path / "games.zip").write_bytes(GAMES + b"!")
    with pytest.raises(EnvError, match=r"games.zip has SHA-256 .*is not the known one"):
        fetched(known, tmp_path)
    assert names(tmp_path) == ["games.zip"]


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    return info


@pytest.mark.parametrize(
    "name",
    ["games-1/../../evil", "/evil", "..", "games-1\\..\\evil", link("games-1/evil")],
    ids=str,
)
def test_an_entry_that_would_leave_the_folder_stops_everything(
    site: Site, archive: Source, tmp_path: Path, name: str | zipfile.ZipInfo
) -> None:
    site.files["/v1/games.zip"] = zipped(("games-1/good", b"1"), (name, b"/etc/passwd"))
    inner = tmp_path / "inner"
    with pytest.raises(EnvError, match="has an unsafe entry, nothing unpacked"):
        fetched(archive, inner)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no archive at all", "is no sound zip archive"),
        (GAMES[:-30], "is no sound zip archive"),
        (GAMES.replace(zipped(("x", b"first"))[31:38], b"\0" * 7), "is no sound zip archive"),
        (zipped(("other/a", b"1")), "has no files below games-1/"),
    ],
    ids=["text", "cut", "flipped", "other"],
)
def test_a_bad_archive_leaves_nothing_behind(
    site: Site, archive: Source, tmp_path: Path, content: bytes, message: str
) -> None:
    assert content != GAMES
    site.files["/v1/games.zip"] = content
    with pytest.raises(EnvError, match=message):
        fetched(archive, tmp_path)
    assert names(tmp_path) == [] and list(tmp_path.iterdir()) == []
    site.files["/v1/games.zip"] = GAMES
    assert fetched(archive, tmp_path).ok


def test_unpacking_that_was_interrupted_is_done_again(
    site: Site, archive: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = tmp_path / ".games.unpacking" / "rest"
    left.mkdir(parents=True)

    def stops(*args: Any) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(download, "_write", stops)
        with pytest.raises(KeyboardInterrupt):
            fetched(archive, tmp_path)
    assert names(tmp_path) == [".games.zip.part"]
    assert fetched(archive, tmp_path).ok and not left.exists()
    assert [start_of(header) for _, header in site.asked] == [0, len(GAMES)]


# -- the facts -------------------------------------------------------------------------------------


def test_the_facts_are_complete() -> None:
    for name, found in DATASETS.items():
        assert found.title and (found.sources or found.note), name
        for source in found.sources:
            assert source.url.startswith("https://") and source.owner and source.licence
            assert source.sha256 is None or re.fullmatch("[0-9a-f]{64}", source.sha256)
            assert "/" not in source.name and "/" not in source.file
    for name in ("webshop", "webshop-full"):  # half of it must not look like a catalogue
        assert "items_shuffle" in dataset(name).sources[-1].name
    with pytest.raises(ConfigError, match="known: alfworld, appworld, boxoban"):
        dataset("alfred")


def test_folders_follow_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ALFWORLD_DATA", "WEBSHOP_DATA", "AGENTDISTILL_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert dataset("alfworld").folder == tmp_path / ".cache" / "alfworld"
    assert dataset("webshop").folder == tmp_path / ".cache" / "agentdistill" / "webshop"
    assert dataset("boxoban").folder == tmp_path / ".cache" / "agentdistill"
    monkeypatch.setenv("AGENTDISTILL_HOME", str(tmp_path / "mine"))
    monkeypatch.setenv("ALFWORLD_DATA", "~/games")
    assert dataset("boxoban").folder == sources.cache() == tmp_path / "mine"
    assert dataset("alfworld").folder == tmp_path / "games"


def test_the_known_hash_is_that_of_the_official_file() -> None:
    path = Path(__file__).resolve().parents[3] / "shared" / "data" / "webshop"
    (source,) = (s for s in dataset("webshop").sources if s.name == "items_ins_v2_1000.json")
    if not (path / source.name).exists():
        pytest.skip(f"needs the official {source.name} in {path}")
    assert check(source, path).state == "verified"
