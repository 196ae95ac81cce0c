"""The report in a real browser: what is seen, pointed at, typed, and what never happens."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentdistill import api
from agentdistill.report import report
from tests.browser.screenshots import DESKTOP, PHONE, browser, open_card, opened, picture
from tests.reports import hostile_trajectory, plant, recipe

pytestmark = pytest.mark.browser
WIDTHS = (PHONE, DESKTOP)
SCHEMES = ("light", "dark")

CONTRAST = """() => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => {
    const part = rgb.slice(0, 3).map((v) => v / 255);
    const linear = part.map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const back = (node) => {
    for (; node; node = node.parentElement) {
      const rgb = parse(getComputedStyle(node).backgroundColor);
      if (rgb.length === 3 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const ratio = (node) => {
    const pair = [light(parse(getComputedStyle(node).color)), light(back(node))];
    return (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  };
  const cards = document.querySelector("#cards"), line = document.createElement("p");
  line.className = "tokens";
  cards.append(line);
  const found = {};
  for (const [letter, size] of [["d", 9], ["s", 6], ["t", 6], ["f", 6]]) {
    cards.dataset.by = letter;
    for (let shade = 0; shade < size; shade++) {
      const token = document.createElement("i");
      token.className = letter + shade;
      line.append(token);
      found[token.className] = ratio(token);
    }
  }
  for (const name of [".dim", ".end", "a", "th small", ".which", ".yes", ".no", ".readout"])
    for (const node of document.querySelectorAll(name)) found[name] = ratio(node);
  return found;
}"""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A small run, with hostile texts among its trajectories."""
    output = tmp_path_factory.mktemp("runs")
    whole = api.distill(recipe(output)).path
    plant(whole, [hostile_trajectory("plain"), hostile_trajectory("fault")])
    return Path(whole)


@pytest.fixture(scope="module")
def page_file(run) -> Path:
    """Its report, scored."""
    return Path(report([run], trajectories=8).file)


@pytest.fixture(scope="module")
def chromium(page_file):
    """One browser for all tests; after the run, which has an event loop of its own."""
    with browser() as found:
        yield found


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_nothing_sticks_out_and_nothing_is_asked_for(chromium, page_file, width, scheme):
    asked, complaints = [], []
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(node => { node.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate("window.hacked") is None
    assert (asked, complaints) == ([page_file.as_uri()], [])
    page.close()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everything_can_be_read(chromium, page_file, scheme):
    with opened(chromium, page_file, DESKTOP, scheme) as page:
        open_card(page)
        ratios = page.evaluate(CONTRAST)
    assert len(ratios) >= 30
    assert {name: ratio for name, ratio in ratios.items() if ratio < 4.5} == {}


def test_the_theme_follows_the_system_until_chosen(chromium, page_file):
    def colour(page):
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    with opened(chromium, page_file, DESKTOP, "dark") as page:
        dark = colour(page)
        page.locator("#theme").click()
        light = colour(page)
        assert (dark, light) == ("rgb(20, 23, 26)", "rgb(255, 255, 255)")
        assert page.locator("#theme").inner_text() == "dark"
        page.emulate_media(media="print")
        assert colour(page) == light
        assert not page.locator("nav").is_visible()


def test_filters(chromium, page_file):
    with opened(chromium, page_file, PHONE) as page:
        everything = page.locator(".card:visible").count()
        for kind in ("failed", "success", "divergent", "fault"):
            page.locator("select[name=kind]").select_option(kind)
            found = page.locator(".card:visible")
            kinds = [card.get_attribute("data-kinds").split() for card in found.all()]
            assert 0 < len(kinds) < everything
            assert all(kind in known for known in kinds)
            assert f"{len(kinds)} of {everything} shown" in page.locator("output").inner_text()
        page.locator("select[name=stage]").select_option("distilled")
        assert page.locator("#none").is_visible()  # its episodes had no faults


@pytest.mark.parametrize("width", WIDTHS)
def test_tokens_tell_their_values(chromium, page_file, width):
    with opened(chromium, page_file, width) as page:
        card, tip = open_card(page), page.locator("#tip")
        tokens = card.locator(".tokens").first.locator("i")
        student = tokens.nth(1).get_attribute("data-v").split()[0]
        tokens.nth(0).hover()
        assert "student, as drawn" in tip.inner_text()
        page.mouse.move(0, 0)
        assert not tip.is_visible()
        tokens.nth(0).focus()
        page.keyboard.press("ArrowRight")
        assert tokens.nth(1).evaluate("node => node === document.activeElement")
        assert student.replace("-", "\u2212") in tip.inner_text()
        box = tip.bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= width
        page.keyboard.press("Escape")
        assert not tip.is_visible()
        stops = card.locator(".tokens").first.locator("i[tabindex='0']")
        assert stops.count() == 1  # the Tab key stops once at a response


def test_colours_can_be_chosen(chromium, page_file):
    with opened(chromium, page_file, DESKTOP) as page:
        token = open_card(page).locator(".tokens i[class*='t']").first

        def colour():
            return token.evaluate("node => getComputedStyle(node).backgroundColor")

        seen = set()
        shades = token.get_attribute("class").split()
        token.evaluate("node => { node.className = 'd8 s0 t3 f5'; }")
        for by in ("d", "s", "t", "f"):
            page.locator("select[name=by]").select_option(by)
            seen.add(colour())
        assert len(shades) == 4 and len(seen) == 4
        assert not page.locator(".key-d").is_visible() and page.locator(".key-p").is_visible()


def test_charts_are_read_with_the_keyboard_and_nothing_moves(chromium, page_file):
    with opened(chromium, page_file, DESKTOP) as page:
        figure = page.locator("figure.chart").first
        below = "document.querySelector('#time').offsetTop"
        before = page.evaluate(below)
        figure.locator(".plot").focus()
        page.keyboard.press("ArrowRight")
        first = figure.locator(".readout").inner_text()
        page.keyboard.press("ArrowRight")
        second = figure.locator(".readout").inner_text()
        assert first != second and "environment steps" in second
        assert page.evaluate(below) == before
        heat = page.locator(".heat").first
        heat.locator(".hit").first.hover()
        said = heat.locator("xpath=..").locator(".readout").inner_text()
        assert said.startswith("turn 1, environment steps 0 to")


def test_without_scripts_everything_is_there(chromium, page_file):
    with opened(chromium, page_file, DESKTOP, java_script_enabled=False) as page:
        assert page.locator(".results tbody tr").count() == 4
        assert page.locator(".card:visible").count() > 10
        for name in ("#filters", "#theme", "#tip"):
            assert not page.locator(name).is_visible()


def test_empty_states_fit_a_phone(chromium, run, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / "config.yaml").write_text((run / "config.yaml").read_text())
    report([new])
    with opened(chromium, new / "report.html", PHONE) as page:
        assert page.locator(".empty:visible").count() == 4
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE


def test_pictures_can_be_taken(chromium, page_file, tmp_path):
    picture(page_file, tmp_path / "pictures", chromium)
    names = sorted(file.name for file in (tmp_path / "pictures").iterdir())
    assert len(names) == 4 * 7 + 2 and "390-dark-6-card.png" in names
