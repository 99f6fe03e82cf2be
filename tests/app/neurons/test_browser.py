"""The pages of neurons in a real browser: one popup for all tokens, readable colours, hostile text, clicks and links."""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlparse

import duckdb
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page
from playwright.sync_api import TimeoutError as ClickLost

from harness.run import RunPaths
from tests.app import test_browser
from tests.app.test_browser import Tab, serving
from tests.neurons.synthetic import HOSTILE

pytestmark = test_browser.pytestmark
browser = test_browser.browser  # a fixture, of this module too
TITLES = {"neurons": "Neurons", "heat_map": "Token heat map"}
WIDTHS = (1500, 1100, 390)
TOKEN = ".tokens bdi[data-n]"


@pytest.fixture(scope="module")
def address(runs: dict[str, RunPaths]) -> Iterator[str]:
    """The app on the runs of these tests."""
    with serving(runs["whole"].folder.parent) as address:
        yield address


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    tab.page.add_init_script("window.alert = () => console.error('a script of a prompt ran')")
    yield tab
    tab.page.close()


def go(tab: Tab, name: str, **params: str) -> None:
    """To a page by its address: the navigation has the experiment's title too, which is that of a page."""
    query = "&".join(f"{k}={quote(v)}" for k, v in params.items())
    tab.page.goto(f"{tab.address}/{name}?{query}")
    tab.page.wait_for_selector(f"h1:has-text('{TITLES[name]}')", timeout=60_000)
    tab.settle()


def open_map(tab: Tab, **params: str) -> None:
    """The heat map, its tokens drawn: on a busy machine they come after the script's end."""
    go(tab, "heat_map", **params)
    tab.page.wait_for_selector(TOKEN, timeout=60_000)


def check(tab: Tab) -> None:
    """No exception box and no complaint, but for the server that Streamlit looks for below a deep link's address first."""
    tab.complaints = [c for c in tab.complaints if "404" not in c]
    tab.check()


def main_text(tab: Tab) -> str:
    return tab.page.inner_text("[data-testid=stMain]")


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["whole", "no_dump", "running", "early", "peaks"])
def test_the_pages_are_drawn_without_a_complaint(tab: Tab, runs: dict[str, RunPaths], run: str) -> None:
    for name in TITLES:
        go(tab, name, run=runs[run].run_id, neuron="1.3", prompt="p0004")
        check(tab)
        # The newest run is what an address without one means.
        assert tab.params.get("run", runs["whole"].run_id) == runs[run].run_id


def test_one_popup_serves_every_token_of_both_prompts(tab: Tab) -> None:
    open_map(tab, prompt="p0007", pin="p0008", neuron="1.3")
    popup = tab.page.locator(".popup")
    assert popup.count() == 1
    assert not popup.is_visible()
    assert tab.page.locator(".panel").count() == 2
    assert tab.page.locator(f"{TOKEN}[title]").count() == 0
    seen = []
    for panel in (0, 1):
        tokens = tab.page.locator(".panel").nth(panel).locator("bdi[data-n]")
        for n in (2, 5):
            tokens.nth(n).hover()
            assert popup.count() == 1
            assert popup.is_visible()
            seen.append(popup.inner_text())
            assert tokens.nth(n).inner_text().strip() in seen[-1]
            assert f"position {n} · token " in seen[-1]
            assert "neuron 1.3: " in seen[-1]
    assert len(set(seen)) == 4
    tab.page.mouse.move(5, 5)
    assert not popup.is_visible()
    check(tab)


@pytest.mark.thorough
def test_a_click_holds_the_popup_and_keys_go_from_token_to_token(tab: Tab) -> None:
    open_map(tab, prompt="p0007", neuron="1.3")
    tokens, popup = tab.page.locator(TOKEN), tab.page.locator(".popup")
    tokens.nth(3).click()
    tokens.nth(5).hover()
    assert "position 3" in popup.inner_text()
    tab.page.keyboard.press("ArrowRight")
    assert "position 4" in popup.inner_text()
    tab.page.keyboard.press("ArrowLeft")
    tab.page.keyboard.press("ArrowLeft")
    assert "position 2" in popup.inner_text()
    tab.page.keyboard.press("Escape")
    assert not popup.is_visible()
    check(tab)


@pytest.mark.thorough
def test_a_row_has_as_many_tokens_as_asked_for(tab: Tab) -> None:
    open_map(tab, prompt="p0007", neuron="1.3", row="3")
    assert _tokens_by_line(tab)[:2] == [3, 3]
    open_map(tab, prompt="p0007", neuron="1.3")
    assert _tokens_by_line(tab)[0] > 3, "control"


def _tokens_by_line(tab: Tab) -> list[int]:
    tops = [round(box["y"]) for n in range(8) if (box := tab.page.locator(TOKEN).nth(n).bounding_box())]
    return [tops.count(top) for top in dict.fromkeys(tops)]


_CONTRASTS = """
(elements) => {
  const light = (rgb) => { const p = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
    return 0.2126 * p(rgb[0]) + 0.7152 * p(rgb[1]) + 0.0722 * p(rgb[2]); };
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = numbers(getComputedStyle(document.querySelector('[data-testid=stApp]')).backgroundColor).slice(0, 3);
  return elements.map((e) => {
    const style = getComputedStyle(e), found = style.backgroundImage.match(/linear-gradient\\(rgba?\\([^)]*\\)/g);
    let under = ground;
    if (found && !e.classList.contains('bars')) {
      const [r, g, b, a = 1] = numbers(found[found.length - 1]);
      under = ground.map((v, n) => v * (1 - a) + [r, g, b][n] * a);
    }
    const [one, two] = [light(numbers(style.color).slice(0, 3)), light(under)].sort((x, y) => y - x);
    return (one + 0.05) / (two + 0.05);
  });
}
"""


@pytest.mark.thorough
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_token_is_readable_on_its_colour(browser: Any, address: str, scheme: str) -> None:
    tab = Tab(browser, address)
    tab.page.emulate_media(color_scheme=scheme)
    for params in ({"neuron": "1.3", "pin": "p0008"}, {"neuron": "1.3", "also": "0.1 2.5"}):
        open_map(tab, prompt="p0007", scale="one for each neuron", **params)
        contrasts = tab.page.locator(".tokens bdi[data-n], .legend bdi").evaluate_all(_CONTRASTS)
        assert len(contrasts) > 15
        assert min(contrasts) >= 4.5
    check(tab)
    tab.page.close()


@pytest.mark.thorough
@pytest.mark.parametrize("width", WIDTHS)
def test_no_page_scrolls_sideways(browser: Any, address: str, width: int) -> None:
    tab = Tab(browser, address)
    tab.page.set_viewport_size({"width": width, "height": 1000})
    for name, number in (("neurons", "p0004"), ("heat_map", "p0005"), ("heat_map", "p0000")):
        go(tab, name, prompt=number, pin="p0003", neuron="1.3", also="0.1 2.5")
        wide, room = tab.page.evaluate(
            "() => { const m = document.querySelector('[data-testid=stMain]'); return [m.scrollWidth, m.clientWidth]; }"
        )
        assert wide <= room, name
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= width
    check(tab)
    tab.page.close()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_text_is_text_and_does_nothing(tab: Tab, number: int) -> None:
    open_map(tab, prompt=f"p{number:04d}", neuron="1.3")
    main = tab.page.locator("[data-testid=stMain]")
    assert main.locator("script, img[src=x], .tokens b, .tokens i").count() == 0
    shown = "".join(tab.page.locator(TOKEN).all_text_contents())
    assert not [
        c for c in shown if (ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2069")
    ]
    if number == 1:
        assert "<script>alert(" in shown
    if number == 2:
        assert "東京は日本の首都です。" in shown
    if number == 3:
        assert tab.page.locator(".tokens").first.get_attribute("dir") == "rtl"
        assert "⟨202E⟩" in shown
    if number == 4:
        cells = tab.page.locator(TOKEN).all_text_contents()
        assert [c.strip() for c in cells if "\U0001f468" in c] == ["\U0001f468\u200d\U0001f469\u200d\U0001f467"]
        assert [c.strip() for c in cells if "\U0001f1eb" in c] == ["\U0001f1eb\U0001f1f7"]
    tab.page.locator(TOKEN).nth(1).hover()
    assert tab.page.locator(".popup script, .popup b").count() == 0
    check(tab)


@pytest.mark.thorough
def test_an_id_that_is_markup_is_text_in_a_tooltip_too(runs: dict[str, RunPaths], browser: Any, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)>"
    shutil.copytree(runs["whole"].folder, tmp_path / runs["whole"].run_id)
    with duckdb.connect(str(tmp_path / runs["whole"].run_id / "live.duckdb")) as con:
        for table in ("prompts", "contexts", "influence", "influence_totals", "effects", "curves", "targets"):
            con.execute(f"UPDATE {table} SET prompt_id = ? WHERE prompt_id = 'p0004'", [hostile])
    with serving(tmp_path) as address:
        tab = Tab(browser, address)
        tab.page.add_init_script("window.alert = () => console.error('a script of a prompt ran')")
        go(tab, "neurons", prompt=hostile)
        chart = tab.page.locator("[data-testid=stEChartsChart]").nth(2)
        chart.scroll_into_view_if_needed()
        box = chart.locator("canvas").first.bounding_box()
        x, y = _dot(chart.locator("canvas").first)
        tab.page.mouse.move(box["x"] + x, box["y"] + y)
        tab.page.wait_for_timeout(500)
        tooltip = tab.page.get_by_text(f"in {hostile}: dla claims")
        assert tooltip.count() == 1
        assert tab.page.locator("img[src=x]").count() == 0
        open_map(tab, prompt=hostile, neuron="1.3")
        assert tab.page.locator(".title").first.inner_text() == hostile
        assert tab.page.locator("img[src=x]").count() == 0
        check(tab)
        tab.page.close()


def test_a_click_on_a_point_chooses_its_neuron_and_a_copied_link_shows_the_same(
    tab: Tab, browser: Any, address: str
) -> None:
    go(tab, "neurons", by="peak", metric="relp")
    assert "neuron" not in tab.params
    scatter = tab.page.locator("[data-testid=stEChartsChart]").nth(1).locator("canvas").first
    scatter.scroll_into_view_if_needed()
    box = scatter.bounding_box()
    x, y = _dot(scatter)
    tab.page.mouse.move(box["x"] + x, box["y"] + y)
    tab.page.wait_for_timeout(200)
    tab.page.mouse.click(box["x"] + x, box["y"] + y)
    tab.settle()
    chosen = tab.params["neuron"]
    assert f"Neuron {chosen}" in main_text(tab)
    tab.page.get_by_role("slider").first.press("ArrowRight")
    tab.settle()
    assert parse_qs(urlparse(tab.page.url).query)["layers"] == ["1", "2"]
    copied = Tab(browser, address)
    copied.page.goto(tab.page.url)
    copied.page.wait_for_selector(f"h3:has-text('Neuron {chosen}')", timeout=60_000)
    copied.settle()
    for _ in range(40):  # a busy machine draws the last parts late
        if main_text(copied) == main_text(tab):
            break
        tab.page.wait_for_timeout(500)
    assert main_text(copied) == main_text(tab)
    check(copied)
    copied.page.close()
    check(tab)


def _dot(canvas: Any) -> tuple[float, float]:
    """The middle of a dot of the scatter, in pixels: the one that is furthest to the right, where few others lie."""
    image = np.asarray(Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")).astype(int)
    is_dot = (image[..., 2] - image[..., 0] > 90).astype(int)  # blue, on white
    is_dot[: int(0.14 * len(is_dot))] = 0  # the legend
    full = np.lib.stride_tricks.sliding_window_view(is_dot, (5, 5)).sum((2, 3)) >= 20
    rows, columns = np.nonzero(full)
    assert len(rows), "no point is drawn"
    last = columns.argmax()
    return columns[last] + 2.5, rows[last] + 2.5


@pytest.mark.thorough
def opened_by_click(tab: Tab, x: float, y: float) -> Page:
    """The page that a link in a drawn table opens: a click on one that is just being drawn again is lost."""
    for _ in range(6):
        tab.page.mouse.move(x, y)
        tab.page.wait_for_timeout(300)
        try:
            with tab.page.context.expect_page(timeout=10_000) as opened:
                tab.page.mouse.click(x, y)
            return opened.value
        except ClickLost:
            continue
    raise AssertionError("no page was opened")


def test_an_example_opens_the_map_of_its_prompt(tab: Tab, runs: dict[str, RunPaths]) -> None:
    go(tab, "neurons", run=runs["whole"].run_id, neuron="1.3", metric="ig")
    table = tab.page.locator("[data-testid=stDataFrame]").nth(2)
    table.scroll_into_view_if_needed()
    box = table.bounding_box()
    image = np.asarray(Image.open(io.BytesIO(table.screenshot())).convert("RGB")).astype(int)
    rows, columns = np.nonzero(image[..., 2] - image[..., 0] > 100)  # a link is blue
    assert len(rows), "no link is drawn"
    page = opened_by_click(tab, box["x"] + columns[0] + 6, box["y"] + rows[0] + 4)
    page.wait_for_selector("h1:has-text('Token heat map')", timeout=60_000)
    asked = {k: v[0] for k, v in parse_qs(urlparse(page.url).query).items()}
    assert (asked["neuron"], asked["metric"]) == ("1.3", "ig")
    assert asked["prompt"].startswith("p0")
    page.wait_for_selector(TOKEN, timeout=60_000)
    page.close()
    check(tab)
