"""The page Amplification in a real browser: finished, running and hostile runs, and the clicks that matter."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.app import test_browser
from tests.app.lda.conftest import EARLY, NO_DETECTOR, RUNNING
from tests.app.lda.test_amplification import store_of
from tests.app.test_browser import Tab, serving

pytestmark = test_browser.pytestmark
browser = test_browser.browser  # a fixture, of this module too


@pytest.fixture(scope="module")
def address(lda_root: Path) -> Iterator[str]:
    """The app on the runs of these tests."""
    with serving(lda_root) as address:
        yield address


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    yield tab
    tab.page.close()


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["", RUNNING, EARLY, NO_DETECTOR], ids=["finished", "running", "early", "no detector"])
def test_the_page_is_drawn_without_a_complaint(tab: Tab, run: str) -> None:
    tab.open(**({"run": run} if run else {}))
    for title in ("Amplification", "SQL", "Amplification"):
        tab.go(title)
        tab.check()
    assert not run or tab.params["run"] == run, "the run goes along"


@pytest.mark.thorough
def test_a_click_on_a_point_chooses_its_arm_and_a_row_its_prompt_and_sample(tab: Tab) -> None:
    tab.open()
    tab.go("Amplification")
    assert "arm" not in tab.params
    tab.page.get_by_role("combobox", name="Arm").click()
    tab.page.get_by_role("option", name="0", exact=True).click()
    tab.settle()
    assert tab.params["arm"] == "0"
    tab.click_on_chart(0, *_last_point(tab))
    assert "arm" not in tab.params, "the last arm, which is the one that no address names"
    assert "Hits at α = 4" in tab.page.inner_text("[data-testid=stMain]")
    rows = tab.page.locator("[data-testid=stMain] canvas[data-testid=data-grid-canvas]").nth(1)
    rows.click(position={"x": 15, "y": 55}, force=True)  # a scroller lies over it
    tab.settle()
    assert f"{tab.params['prompt']}, sample {tab.params['sample']}" in tab.page.inner_text("[data-testid=stMain]")
    tab.check()


def _last_point(tab: Tab) -> tuple[float, float]:
    """Where the rightmost dot of the first detector, which is blue, is drawn, in shares of width and height."""
    canvas = tab.page.locator("[data-testid=stMain] [data-testid=stEChartsChart] canvas").first
    canvas.scroll_into_view_if_needed()
    image = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
    is_blue = (np.abs(np.asarray(image).astype(int) - [0, 114, 178]).sum(2) < 30).astype(int)
    is_blue[: int(0.12 * image.height)] = 0  # the legend
    size = 7  # pixels: lines are thinner than a dot
    full = np.lib.stride_tricks.sliding_window_view(is_blue, (size, size)).sum((2, 3)) > 0.7 * size * size
    rows, columns = np.nonzero(full)
    assert len(rows), "no point is drawn"
    last = columns.argmax()
    return (columns[last] + size / 2) / image.width, (rows[last] + size / 2) / image.height


@pytest.mark.thorough
def test_a_pattern_that_is_typed_is_counted_and_stands_in_the_address(tab: Tab) -> None:
    tab.open()
    tab.go("Amplification")
    box = tab.page.get_by_role("textbox", name="Regular expression")
    box.fill("agent")
    box.press("Enter")
    tab.settle()
    assert tab.params["pattern"] == "agent"
    assert "a pattern that is tried until it fits says nothing" in tab.page.inner_text("[data-testid=stMain]")
    tab.check()


@pytest.mark.thorough
def test_text_of_a_prompt_that_is_markup_is_shown_as_text(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("hostile")
    store_of(folder)
    with serving(folder) as address:
        tab = Tab(browser, address)
        tab.page.add_init_script("window.alert = () => console.error('a script of a prompt ran')")
        tab.open(prompt="a")
        tab.go("Amplification")
        main = tab.page.locator("[data-testid=stMain]")
        assert main.locator("script, img[src=x]").count() == 0
        assert "<script" in main.inner_text()
        tab.check()
        tab.page.close()
