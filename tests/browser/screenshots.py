"""Pictures of a report in headless Chromium, at the width of a phone and of a desktop.

    python -m tests.browser.screenshots REPORT.html FOLDER

Needs the package playwright and `chromium` on PATH.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHONE, DESKTOP = 390, 1280
A4 = 794
"""Pixels that a sheet is wide."""
SECTIONS = ("results", "training", "time", "stages", "trajectories")


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        place = shutil.which("chromium")
        found = playwright.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield found
        found.close()


@contextmanager
def opened(
    found: Any, report: Path, width: int, scheme: str = "light", **more: Any
) -> Iterator[Any]:
    """A page with ``report``, from the disk."""
    page = found.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme, **more)
    page.goto(report.absolute().as_uri())
    yield page
    page.close()


def open_card(page: Any) -> Any:
    """Open the first trajectory whose tokens were scored, or the first one."""
    scored = page.locator(".card:has(.tokens)")
    card = (scored if scored.count() else page.locator(".card")).first
    card.locator("summary").click()
    return card


def picture(report: Path, folder: Path, found: Any) -> None:
    """Sections, an open trajectory with a token in focus, a chart in focus, and the print."""
    folder.mkdir(parents=True, exist_ok=True)
    for width in (PHONE, DESKTOP):
        for scheme in ("light", "dark"):
            with opened(found, report, width, scheme) as page:
                _sections(page, folder, f"{width}-{scheme}")
    with opened(found, report, DESKTOP) as page:
        page.pdf(path=str(folder / "print.pdf"), format="A4")
    with opened(found, report, A4, "dark") as page:
        page.emulate_media(media="print")
        page.screenshot(path=str(folder / "print.png"), full_page=True)


def _sections(page: Any, folder: Path, name: str) -> None:
    plots = page.locator(".plot")
    if plots.count():
        plots.first.focus()
        for _ in range(12):
            page.keyboard.press("ArrowRight")
    page.locator("header").screenshot(path=str(folder / f"{name}-0-header.png"))
    for number, section in enumerate(SECTIONS, 1):
        if section == "trajectories" and page.locator(".card").count():
            _one_card(page, folder, name)
        place = page.locator(f"#{section}")
        place.screenshot(path=str(folder / f"{name}-{number}-{section}.png"))


def _one_card(page: Any, folder: Path, name: str) -> None:
    card = open_card(page)
    if card.locator(".tokens i").count():
        card.locator(".tokens i").first.focus()
        page.keyboard.press("ArrowRight")
    card.scroll_into_view_if_needed()
    page.screenshot(path=str(folder / f"{name}-6-card.png"))


if __name__ == "__main__":
    with browser() as chromium:
        picture(Path(sys.argv[1]), Path(sys.argv[2]), chromium)
