"""Official data of the environments: who publishes what, where, and under which licence.

Invariants: :data:`DATASETS` is the only place with addresses, sizes, hashes and licences; nothing
here opens a file or a connection.

None of the owners publishes hashes. Those given here were taken from what several unrelated public
projects recorded of their downloads, and all of them agree.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from agentdistill.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Source:
    """One file or archive that somebody publishes.

    Attributes:
        name: the file, or the folder of unpacked files, that it becomes.
        url: where it is.
        owner: who publishes it.
        licence: SPDX expression, or words where there is none.
        size: length of the download in bytes, where it is known.
        sha256: hash of the download, where it is known.
        member: the folder in the archive that becomes ``name``; "" for a file that is no archive.
        page: where a person can download it with a browser, if not at ``url``.
    """

    name: str
    url: str
    owner: str
    licence: str
    size: int | None = None
    sha256: str | None = None
    member: str = ""
    page: str = ""

    @property
    def file(self) -> str:
        """Name of the download: the archive's, or the file's own."""
        return self.url.rpartition("/")[2] if self.member else self.name


@dataclass(frozen=True, slots=True)
class Dataset:
    """What one call of ``agentdistill data NAME`` is about.

    Attributes:
        title: what it is.
        sources: its parts, in the order in which they are fetched: what makes an environment use
            the data comes last; empty where nothing can be fetched from here.
        place: folder below :func:`cache`, or one that begins with ``~``.
        variable: environment variable that names another folder.
        note: what else one should know.
    """

    title: str
    sources: tuple[Source, ...] = ()
    place: str = ""
    variable: str = ""
    note: str = ""

    @property
    def folder(self) -> Path:
        """Where it belongs on this machine."""
        given = os.environ.get(self.variable, "") if self.variable else ""
        return cache() / Path(given or self.place).expanduser()  # an absolute path stays itself

    @property
    def size(self) -> int | None:
        """Bytes to download; None where one is unknown."""
        sizes = [source.size for source in self.sources]
        return None if None in sizes else sum(size or 0 for size in sizes)


def cache() -> Path:
    """Where data goes by default: ``$AGENTDISTILL_HOME`` or ``~/.cache/agentdistill``."""
    return Path(os.environ.get("AGENTDISTILL_HOME") or "~/.cache/agentdistill").expanduser()


def _drive(name: str, number: str, size: int, sha256: str) -> Source:
    """A file that WebShop's authors keep on Google Drive."""
    return Source(
        name,
        f"https://drive.usercontent.google.com/download?id={number}&export=download&confirm=t",
        owner="Princeton NLP (princeton-nlp/WebShop)",
        licence="code MIT; product texts for research use",
        size=size,
        sha256=sha256,
        page=f"https://drive.google.com/file/d/{number}/view",
    )


_HUMAN = _drive(
    "items_human_ins.json",
    "14Kb5SPBk_jfdLZ_CDBNitW98QLDlKR5O",
    5_137_548,
    "cf78667548a71786e1d9049c24b802e48e1084ad4bb021cae56ce1f6d96954a3",
)
_BOXOBAN = "78011d8c86ad423bfb2e1005012393b4c3c24409"

DATASETS = {
    "alfworld": Dataset(
        "ALFWorld's text games (train, valid_seen, valid_unseen)",
        (
            Source(
                "json_2.1.1",
                "https://github.com/alfworld/alfworld/releases/download/0.4.2/"
                "json_2.1.3_tw-pddl.zip",
                owner="alfworld/alfworld",
                licence="MIT",
                size=36_507_267,
                sha256="5df77ea759f2211a4106082839ddbbb790f1ba4e7d097ed732cf453f72aa36cf",
                member="json_2.1.1",
            ),
        ),
        place="~/.cache/alfworld",
        variable="ALFWORLD_DATA",
        note="the games only: trajectories, images and detectors are not needed for text",
    ),
    "appworld": Dataset(
        "AppWorld's tasks and databases",
        note="fetched by AppWorld's own program, which `agentdistill setup appworld` installs; "
        "it may be passed on encrypted only",
    ),
    "boxoban": Dataset(
        "Boxoban levels for Sokoban (unfiltered, medium, hard)",
        (
            Source(
                "boxoban",
                f"https://github.com/google-deepmind/boxoban-levels/archive/{_BOXOBAN}.zip",
                owner="Google DeepMind",
                licence="Apache-2.0",
                member=f"boxoban-levels-{_BOXOBAN}",
            ),
        ),
        note="optional: give a folder of them to Sokoban's option `levels`",
    ),
    "scienceworld": Dataset(
        "nothing: ScienceWorld's tasks are in its package",
        note="pip install 'agentdistill[scienceworld]', and Java 8 or newer",
    ),
    "sokoban": Dataset(
        "nothing: Sokoban generates its levels",
        note="`agentdistill data boxoban` fetches published ones",
    ),
    "webshop": Dataset(
        "WebShop's small catalogue (1,000 products) and its human-written goals",
        (
            _drive(
                "items_ins_v2_1000.json",
                "1IduG0xl544V_A_jv3tHXC0kyFi7PnyBu",
                147_099,
                "f88a36314a397b53b3d9c3fa5878e5f7b26d35019a51ec83fbedeca61a948f6f",
            ),
            _HUMAN,
            _drive(
                "items_shuffle_1000.json",
                "1EgHdxQ_YxqIQlvvq5iKlCrkEKR6-j0Ib",
                4_467_013,
                "30a4765c3a327af72d9a9a95a6b2486d516f0fa1d3ecd83681901ce82a21b269",
            ),
        ),
        place="~/.cache/agentdistill/webshop",
        variable="WEBSHOP_DATA",
        note="without it, WebShop invents a catalogue of its own",
    ),
    "webshop-full": Dataset(
        "WebShop's whole catalogue (1.18 million products) and its human-written goals",
        (
            _drive(
                "items_ins_v2.json",
                "1s2j6NgHljiZzQNL3veZaAiyW_qDEgBNi",
                186_295_270,
                "1d36af476bdb8f82a5da62bd8acdabe54cd8de2fa84010d37da5c4890feb447e",
            ),
            _HUMAN,
            _drive(
                "items_shuffle.json",
                "1A2whVgOO0euk5O13n2iYDM0bQRkkRduB",
                5_479_720_229,
                "2ef591d65df3af89e972ab72468eb82cbf124d876552d9f3678667edd620a6c8",
            ),
        ),
        place="~/.cache/agentdistill/webshop",
        variable="WEBSHOP_DATA",
        note="5.7 GB",
    ),
}
"""What ``agentdistill data`` knows, by name."""


def dataset(name: str) -> Dataset:
    """The data called ``name``; ConfigError if there is none."""
    if name not in DATASETS:
        raise ConfigError(f"no such data; known: {', '.join(DATASETS)}", key="NAME", value=name)
    return DATASETS[name]
