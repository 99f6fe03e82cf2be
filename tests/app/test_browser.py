"""The app in a real browser: every page on a finished and on a running run, and the clicks that matter.

Skipped where Chromium or Playwright is not installed. Any exception box, console error or request to another machine
fails a test.
"""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from PIL import Image

from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Reader
from tests import synthetic
from tests.app.conftest import PAGES, RUNNING
from tests.app.test_experiments import marbles_of
from tests.synthetic import Shape

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]
ROOT = Path(__file__).parents[2]
ARGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update"]  # fmt: skip


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    """The app on the runs of these tests."""
    with serving(root) as address:
        yield address


@contextmanager
def serving(root: Path, script: str = "app") -> Iterator[str]:
    """`streamlit run app` on a folder of runs, as a user starts it; its address. `script` is another one to run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "streamlit", "run", script, "--server.port", str(port)]
    server = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "OUTPUT_ROOT": str(root)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/_stcore/health", server)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(20)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert server.poll() is None, "the app's server ended"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.25)
    raise AssertionError("the app's server does not answer")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as p:
        opened = p.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield opened
        opened.close()


class Tab:
    """A page of the browser that remembers what went wrong."""

    def __init__(self, browser: Any, address: str):
        self.page = browser.new_page(viewport={"width": 1400, "height": 1400})
        self.address = address
        self.complaints: list[str] = []
        self.page.on("console", lambda m: self.complaints.append(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("pageerror", lambda e: self.complaints.append(f"script: {e}"))
        self.page.on("request", self._seen)

    def _seen(self, request: Any) -> None:
        host = urlparse(request.url).hostname
        if host not in (None, "127.0.0.1", "localhost"):
            self.complaints.append(f"asks {host}")

    def open(self, **params: str) -> None:
        """The first page, with shared state in the address."""
        query = "&".join(f"{k}={v}" for k, v in params.items())
        self.page.goto(f"{self.address}/?{query}")
        self.page.wait_for_selector("[data-testid=stSidebarNav]", timeout=60_000)
        self.settle()

    def go(self, title: str) -> None:
        """To another page by the navigation."""
        self.page.click(f"[data-testid=stSidebarNav] >> text='{title}'")
        self.page.wait_for_selector(f"h1:has-text('{title}')", timeout=30_000)
        self.settle()

    def settle(self) -> None:
        """Until the script has run and what it drew stands."""
        self.page.wait_for_timeout(400)
        self.page.wait_for_selector("[data-testid=stApp][data-test-script-state=notRunning]", timeout=60_000)
        self.page.wait_for_timeout(600)

    def check(self) -> None:
        """No exception box, and nothing that anybody complained of."""
        boxes = [box.inner_text() for box in self.page.locator("[data-testid=stException]").all()]
        assert boxes == []
        assert self.complaints == []

    @property
    def params(self) -> dict[str, str]:
        return {k: v[0] for k, v in parse_qs(urlparse(self.page.url).query).items()}

    def click_on_chart(self, number: int, x: float, y: float) -> None:
        """Click on a chart's canvas, at shares of its width and height."""
        canvas = self.page.locator("[data-testid=stMain] canvas").nth(number)
        canvas.scroll_into_view_if_needed()
        box = canvas.bounding_box()
        self.page.mouse.move(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        self.page.wait_for_timeout(150)
        self.page.mouse.click(box["x"] + box["width"] * x, box["y"] + box["height"] * y)
        self.settle()

    def coloured_spot(self, number: int) -> tuple[float, float]:
        """Where in a chart, below its legend, something blue or red is drawn: a point, in shares of width and height."""
        canvas = self.page.locator("[data-testid=stMain] canvas").nth(number)
        canvas.scroll_into_view_if_needed()
        image = Image.open(io.BytesIO(canvas.screenshot())).convert("RGB")
        pixels = np.asarray(image).astype(int)
        coloured = np.abs(pixels[..., 0] - pixels[..., 2]) > 80
        coloured[: int(0.15 * image.height)] = False
        rows, columns = np.nonzero(coloured)
        assert len(rows), "nothing is drawn"
        middle = len(rows) // 2
        return columns[middle] / image.width, rows[middle] / image.height


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    yield tab
    tab.page.close()


@pytest.mark.thorough
@pytest.mark.parametrize("run", ["", RUNNING], ids=["finished", "running"])
def test_every_page_is_drawn_without_a_complaint(tab: Tab, run: str) -> None:
    tab.open(**({"run": run} if run else {}))
    for title in (page.title for page in PAGES.values()):
        tab.go(title)
        tab.check()
        assert not run or tab.params["run"] == run, "the run goes along"


@pytest.mark.thorough
def test_a_filter_goes_along_and_a_copied_link_opens_the_same_view(tab: Tab, browser: Any, address: str) -> None:
    tab.open()
    tab.go("P_sem")
    tab.page.click("[data-testid=stSidebar] >> text='failure'")
    tab.settle()
    assert tab.params["outcome"] == "failure"
    tab.go("Detections")
    assert tab.params["outcome"] == "failure"
    copied = Tab(browser, address)
    copied.page.goto(tab.page.url)
    copied.page.wait_for_selector("h1:has-text('Detections')", timeout=60_000)
    # A busy machine draws the sidebar late.
    copied.page.wait_for_selector("[data-testid=stSidebar] >> text='failure'", timeout=60_000)
    copied.settle()
    pressed = copied.page.locator(
        "[data-testid=stSidebar] button[aria-checked=true], [data-testid=stSidebar] button[kind$=Active]"
    )
    assert "failure" in " ".join(pressed.all_inner_texts())
    # A deep link makes Streamlit look for its server below the page's address first; nothing else may be missing.
    assert all(re.search("404", c) for c in copied.complaints), copied.complaints
    copied.page.close()
    tab.check()


def test_a_click_on_a_point_chooses_its_prompt_which_goes_along(tab: Tab) -> None:
    tab.open()
    tab.go("P_sem")
    tab.click_on_chart(0, *tab.coloured_spot(0))
    chosen = tab.params["prompt"]
    tab.go("Prompt")
    assert tab.params["prompt"] == chosen
    assert chosen in tab.page.inner_text("[data-testid=stMain]")
    tab.check()


@pytest.mark.thorough
def test_a_click_on_a_head_locks_it_and_one_on_a_patch_shows_its_prompts(tab: Tab) -> None:
    tab.open()
    tab.go("Attention")
    tab.click_on_chart(1, 0.5, 0.4)
    assert {"layer", "head"} <= tab.params.keys()
    tab.check()
    tab.go("Patching")
    tab.click_on_chart(0, 0.6, 0.4)
    assert {"layer", "patch"} <= tab.params.keys()
    tab.check()


@pytest.mark.thorough
def test_text_of_a_prompt_that_is_markup_is_shown_as_text(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A synthetic run's first prompts hold scripts and tags; nothing of them may become an element, or run."""
    folder = tmp_path_factory.mktemp("hostile")
    paths = synthetic.write(folder, Shape(12, 3, 2, 2, num_bootstraps=20))
    with Reader(paths.live, SCHEMA) as reader:
        hostile = [r for r in reader.query("SELECT prompt_id, question FROM prompts") if "<script" in r["question"]]
    assert hostile, "the control: there is markup to show"
    with serving(folder) as address:
        tab = Tab(browser, address)
        tab.page.add_init_script("window.alert = () => console.error('a script of a prompt ran')")
        main = tab.page.locator("[data-testid=stMain]")
        for row in hostile[:1]:
            tab.open(prompt=row["prompt_id"])
            for title in (page.title for page in PAGES.values()):
                tab.go(title)
                assert main.locator("script, img[src=x], marquee").count() == 0
                tab.check()
            tab.go("Prompt")
            assert "<script" in main.inner_text()
        tab.page.close()


INSTALLED = """
import runpy, sys
from pathlib import Path

sys.path[:0] = [{root!r}]
from app import experiments
from tests.app.test_experiments import Toy

if experiments.names()[-1] != "toy":
    toy, names, get = Toy(Path({folder!r})), experiments.names(), experiments.get
    experiments.names = lambda: (*names, "toy")
    experiments.get = lambda name: toy if name == "toy" else get(name)
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.thorough
def test_pages_of_an_experiment_from_outside_stand_in_the_navigation(
    browser: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Their files lie outside of the app; the address that another experiment has already is theirs by their name."""
    folder, toy = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("toy")
    paths = synthetic.write(folder, Shape(12, 3, 2, 2, num_bootstraps=20))
    manifest = json.loads(paths.manifest.read_text())
    other = RunPaths(folder / "20990101-000000-toy-0")
    marbles_of(other.folder, manifest | {"experiment": "toy", "marbles": 3})
    script = toy / "main.py"
    script.write_text(
        INSTALLED.format(root=str(ROOT), folder=str(toy), script=str(ROOT / "app" / "streamlit_app.py")), "utf-8"
    )
    with serving(folder, str(script)) as address:
        tab = Tab(browser, address)
        tab.open()
        navigation = tab.page.inner_text("[data-testid=stSidebarNav]")
        assert all(title in navigation for title in ("Runs", "P_sem", "Marbles", "Heap", "One marble"))
        for title, url in (("Heap", "/marbles"), ("One marble", "/toy-prompt")):
            tab.go(title)
            assert urlparse(tab.page.url).path == url
            assert f"{other.run_id} has 3 marbles" in tab.page.inner_text("[data-testid=stMain]")
            tab.check()
        tab.go("P_sem")  # of runs of its own: the one that was looked at is no choice here
        assert "P_sem" in tab.page.inner_text("[data-testid=stMain]")
        assert other.run_id not in tab.page.inner_text("[data-testid=stSidebar]")
        tab.check()
        tab.page.close()
