"""The browser on the terminal: what each key does, what a hostile or damaged run does, and what it costs nobody."""

import asyncio
import json
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Coroutine
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from safetensors.numpy import load_file
from textual.pilot import Pilot

from harness.commands import browse as command
from harness.commands import recognise
from harness.errors import HarnessError, RunError
from harness.experiments.neurons.browser import heat
from harness.experiments.neurons.browser.app import Browser, Help
from harness.experiments.neurons.browser.data import Found, open_run
from harness.experiments.neurons.browser.heat import Depth
from harness.experiments.neurons.browser.keys import KEYS, table
from harness.experiments.neurons.browser.panes import Place, number
from harness.experiments.neurons.browser.tokens import context_of, layout, visible
from harness.experiments.neurons.schema import SCHEMA
from harness.run import RunPaths, locked
from harness.run.tensors import map_matrices
from harness.store import Reader
from tests import synthetic as gravity_synthetic
from tests.commands import harness, refused
from tests.neurons import synthetic
from tests.neurons.synthetic import Shape, write_tensors

ROOT = Path(__file__).parents[2]
SMALL = Shape(num_prompts=10, num_layers=3, num_neurons=40)
EMPTY_STAGES = ("prompts",)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return synthetic.make(tmp_path_factory.mktemp("runs"), SMALL)


@pytest.fixture
def own(paths: RunPaths, tmp_path: Path) -> RunPaths:
    """A copy that a test may damage."""
    return RunPaths(Path(shutil.copytree(paths.folder, tmp_path / paths.run_id)))


Act = Callable[[Browser, Pilot[int]], Coroutine[Any, Any, None]]


def browsing(paths: RunPaths, act: Act, depth: Depth = "full", size: tuple[int, int] = (80, 24)) -> None:
    """Do something in the browser of a run."""

    async def go() -> None:
        app = Browser(open_run(paths), depth)
        async with app.run_test(size=size) as pilot:
            await settled(pilot)
            await act(app, pilot)

    asyncio.run(go())


async def settled(pilot: Pilot[int]) -> None:
    await pilot.pause()
    await pilot.app.workers.wait_for_complete()
    await pilot.pause()


async def press(pilot: Pilot[int], *keys: str) -> None:
    await pilot.press(*keys)
    await pilot.pause()


def screen(app: Browser) -> list[str]:
    """What stands on the screen, line by line."""
    width, height = app.size
    strips = app.screen._compositor.render_strips(app.size)
    lines = ["".join(segment.text for segment in strip) for strip in strips]
    assert len(lines) == height
    assert all(cell_len(line) == width for line in lines), (
        "a line that is not as wide as the screen moves all that follow"
    )
    return lines


def shown(app: Browser) -> str:
    return "\n".join(screen(app))


def read(paths: RunPaths, sql: str) -> list[dict[str, Any]]:
    with Reader(paths.live, SCHEMA) as reader:
        return reader.query(sql)


# -- keys


def test_it_begins_at_the_first_prompts_strongest_neuron_at_the_token_whose_logits_are_read(paths: RunPaths) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        (first,) = read(paths, "SELECT * FROM influence WHERE prompt_id = 'p0000' AND metric = 'dla' AND place = 1")
        assert app._place == Place(0, first["layer"], first["neuron"], first["position"])
        head = shown(app)
        assert paths.run_id in head
        assert "finished" in head
        assert f"prompt 1/10 p0000  layer {first['layer']}/2  neuron {first['neuron']}/39" in head

    browsing(paths, act)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (("right",), {"layer": 2}), (("left",), {"layer": 0}), (("left", "left"), {"layer": 0}),
        (("down",), {"position": 4}), (("up",), {"position": 2}), (("up",) * 9, {"position": 0}),
        (("n",), {"neuron": 21}), (("b",), {"neuron": 19}), (("pagedown",), {"neuron": 39}), (("pageup",), {"neuron": 0}),
        (("left_square_bracket",), {"prompt": 6, "position": None}), (("right_square_bracket",), {"prompt": 8, "position": None}),
        (("g", "3", "enter"), {"neuron": 3}), (("g", *"2.11", "enter"), {"layer": 2, "neuron": 11}),
        (("g", *"L0 N5", "enter"), {"layer": 0, "neuron": 5}),
        (("l", "0", "enter"), {"layer": 0}), (("c", "5", "enter"), {"position": 5}),
        (("c", "minus", "2", "enter"), {"position": -2}), (("g", "3", "escape"), {}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)  # fmt: skip
def test_a_key_goes_where_it_says(paths: RunPaths, keys: tuple[str, ...], expected: dict[str, int | None]) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        app._go(prompt=7, layer=1, neuron=20, position=3)
        await press(pilot, *[{" ": "space", ".": "full_stop"}.get(k, k) for k in keys])
        told = {"prompt": 7, "layer": 1, "neuron": 20, "position": 3} | expected
        num = len(app._shown.context(app._place.prompt).cells)
        at = told["position"]  # of a new prompt, the token whose logits are read
        told["position"] = num - 1 if at is None else num + at if at < 0 else at
        assert app._place.__dict__ == told

    browsing(paths, act)


def test_every_key_has_an_action_and_every_action_a_key(paths: RunPaths) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        for key in KEYS:
            for name, action in key.actions:
                if action in ("quit", "help"):
                    continue
                await press(pilot, name)
                assert app.is_running, name
                assert not app._exception, name
                await press(pilot, "escape")
                assert app._asking == "", name
        assert [line for line in screen(app) if line.strip()]

    browsing(paths, act)


def test_the_list_is_gone_through_line_by_line_and_a_new_list_from_its_top(paths: RunPaths) -> None:
    ranked = read(
        paths, "SELECT layer, neuron FROM influence WHERE prompt_id = 'p0000' AND metric = 'dla' ORDER BY place"
    )
    other = read(
        paths, "SELECT layer, neuron FROM influence WHERE prompt_id = 'p0000' AND metric = 'act_grad' ORDER BY place"
    )

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        place = lambda: {"layer": app._place.layer, "neuron": app._place.neuron}  # noqa: E731
        assert place() == ranked[0]
        await press(pilot, "j", "j")
        assert place() == ranked[2]
        await press(pilot, "n", "k")  # another neuron does not move the list
        assert place() == ranked[1]
        await press(pilot, "r", "j")
        assert place() == other[0]
        for name in ("ig", "relp", "effects", "background", "peak", "active", "dla"):
            await press(pilot, "r")
            assert app._ranking == name
            assert f"│{name}" in shown(app)
        await press(pilot, "R")
        assert app._ranking == "active"

    browsing(paths, act)


def test_a_click_picks_a_line_or_a_token(paths: RunPaths) -> None:
    ranked = read(
        paths, "SELECT layer, neuron FROM influence WHERE prompt_id = 'p0000' AND metric = 'dla' ORDER BY place"
    )

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        await pilot.click("#list", offset=(5, 3))
        await pilot.pause()
        assert (app._place.layer, app._place.neuron) == (ranked[3]["layer"], ranked[3]["neuron"])
        await pilot.click("#strip", offset=(3, 0))
        await pilot.pause()
        assert app._place.position == 0

    browsing(paths, act)


def test_an_example_leads_to_the_neurons_peak(paths: RunPaths) -> None:
    (row,) = read(paths, "SELECT examples FROM neurons WHERE layer = 1 AND neuron = 20")

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        app._go(layer=1, neuron=20)
        for n in (1, 3):
            await press(pilot, str(n))
            example = row["examples"][n - 1]
            assert app._shown.prompts[app._place.prompt] == example["prompt_id"]
            assert app._place.position == example["position"]
            assert number(example["value"], sign=True) in screen(app)[1]  # as float16 tells it

    browsing(paths, act)


def test_text_is_found_here_then_in_the_prompts_that_follow_then_from_the_start(paths: RunPaths) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        await press(pilot, "slash", *"RIVER", "enter")
        first = app._place
        text = app._shown.context(first.prompt).text
        start, end = app._shown.context(first.prompt).spans[first.position]
        assert "river" in text[start : end + 10].lower()
        seen = [first]
        for _ in range(12):
            await press(pilot, "slash", "enter")  # nothing typed: the next place
            seen.append(app._place)
        num = sum(r["text"].lower().count("river") for r in read(paths, "SELECT text FROM contexts"))
        assert len(set(seen)) == num > 1
        before = app._place
        await press(pilot, "slash", *"nowhere", "enter")
        assert "'nowhere' is in none of the 10 prompts" in shown(app)
        assert app._place == before

    browsing(paths, act)


def test_a_search_goes_round_and_comes_back(paths: RunPaths) -> None:
    run = open_run(paths)
    at = Found(0, 0)
    seen = []
    for _ in range(200):
        found = run.find("bridge", at)
        assert found is not None
        if found in seen:
            assert found == seen[0]
            break
        seen.append(found)
        at = found
    told = sum(r["text"].count("bridge") for r in read(paths, "SELECT text FROM contexts"))
    assert len(seen) == told
    assert run.find("no such text", at) is None
    run.close()


def test_window_scale_and_effects_change_what_is_shown(paths: RunPaths) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        app._go(neuron=20)
        await press(pilot, "a")
        assert all(any(line.startswith(f"{n:>6} ") for line in screen(app)) for n in range(18, 23))
        await press(pilot, "w")
        assert any(line.startswith(f"{15:>6} ") for line in screen(app))
        await press(pilot, "a")
        assert not any(line.startswith(f"{20:>6} ") for line in screen(app)[4:12])
        assert "this prompt" in shown(app)
        await press(pilot, "s")
        (row,) = read(paths, f"SELECT max_peak FROM neurons WHERE layer = {app._place.layer} AND neuron = 20")
        assert f"scale {number(row['max_peak'])} all prompts" in shown(app)
        await press(pilot, "e")
        text = shown(app)
        assert "effects of dla" in text
        assert "random" in text
        assert "predicted against measured" in text
        await press(pilot, "e")
        assert "effects of dla" not in shown(app)

    browsing(paths, act)


@pytest.mark.parametrize("size", [(80, 24), (160, 50), (40, 12), (20, 5)])
@pytest.mark.parametrize("depth", ["full", "16", "mono"])
def test_it_fits_any_screen(paths: RunPaths, size: tuple[int, int], depth: Depth) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        for key in ("a", "e", "r", "question_mark", "x", "right_square_bracket"):
            await press(pilot, key)
            screen(app)  # every line as wide as the screen

    browsing(paths, act, depth, size)


def test_help_tells_every_key_and_any_key_leaves_it(paths: RunPaths) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        await press(pilot, "question_mark")
        assert isinstance(app.screen, Help)
        text = shown(app)
        assert [key.shown for key in KEYS if key.says not in text] == []
        await press(pilot, "q")  # leaves the help, not the browser
        assert not isinstance(app.screen, Help)
        assert app.is_running

    browsing(paths, act, size=(100, 40))


@pytest.mark.parametrize("key", ["q", "ctrl+c"])
def test_it_is_left_by_a_key(paths: RunPaths, key: str) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        await press(pilot, key)
        assert app._exit

    browsing(paths, act)


def test_the_keys_in_the_documentation_are_those_of_the_program() -> None:
    assert table() in (ROOT / "docs" / "browser.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (("g", *"99", "enter"), "expected a neuron of 0 to 39, found '99'"),
        (("g", *"7.1", "enter"), "expected a layer of 0 to 2, found '7'"),
        (("g", *"abc", "enter"), "expected a neuron such as 17, or 2.17 with its layer, found 'abc'"),
        (("g", "enter"), "expected a neuron such as 17"),
        (("l", "9", "enter"), "expected a layer of 0 to 2, found '9'"),
        (("c", *"1000", "enter"), "expected a position of -"),
        (("c", "x", "enter"), "found 'x'"),
        (("slash", "enter"), "nothing to find"),
        (("g", *("9" * 45), "enter"), "found '999999999"),
    ],
)  # fmt: skip
def test_bad_input_is_told_in_a_line_and_nothing_is_lost(paths: RunPaths, keys: tuple[str, ...], told: str) -> None:
    async def act(app: Browser, pilot: Pilot[int]) -> None:
        before = app._place
        await press(pilot, *["full_stop" if k == "." else k for k in keys])
        assert told in shown(app)
        assert app._place == before
        await press(pilot, "n")  # it goes away with the next key
        assert told not in shown(app)

    browsing(paths, act)


# -- law 9


def test_nothing_of_a_prompt_reaches_the_terminal_as_a_command(paths: RunPaths) -> None:
    """Control: the text does hold what a terminal would obey."""
    texts = {r["text"] for r in read(paths, "SELECT text FROM contexts")}
    assert {"\x1b", "\x9b", "\x07", "\u202e", "\u2066", "\u200d"} <= {c for text in texts for c in text}

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        for _ in range(10):
            for key in ("1", "e", "right_square_bracket", "slash", "escape", "a"):
                await press(pilot, key)
            bad = {c for c in shown(app) if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
            assert bad <= {"\n"}  # between the lines
        app._go(prompt=0, position=0)
        await pilot.pause()
        assert "\\x1b[31mred\\x1b[0m" in shown(app)

    browsing(paths, act)


def test_hostile_names_and_numbers_of_the_store_do_no_more(own: RunPaths) -> None:
    manifest = json.loads(own.manifest.read_text("utf-8"))
    manifest["model"]["name"] = "\x1b[2J[bold]evil[/bold]\u202e"
    own.manifest.write_text(json.dumps(manifest), "utf-8")
    with synthetic.Store(own.results, SCHEMA) as store:
        store._con.execute("UPDATE vocabulary SET text = '\x1b[2J' || text")
        store._con.execute(
            "UPDATE neurons SET mean_peak = 'nan', sd = NULL, q = NULL, z_background = 'inf', examples = NULL"
        )
        store._con.execute("UPDATE effects SET kind = '\x1b[31m'")
        store._con.execute("UPDATE curves SET m = NULL")
        store._con.execute("UPDATE contexts SET offsets = NULL, is_counted = NULL WHERE prompt_id = 'p0003'")
        store._con.execute("UPDATE targets SET position = 100000, contrast_ids = NULL, token_ids = NULL")
        store._con.execute("UPDATE neurons SET num_prompts = NULL, max_peak = NULL WHERE neuron < 20")
        store._con.execute(
            "UPDATE neurons SET examples = [NULL, {'prompt_id': 'p0001', 'position': -9, 'value': NULL}] WHERE layer = 1"
        )
        store._con.execute("UPDATE influence SET place = NULL, share = NULL, selected = NULL WHERE metric = 'ig'")
        store._con.execute("UPDATE contexts SET pieces = [NULL] WHERE prompt_id = 'p0004'")
        store.publish(own.live)

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        for key in ("e", "r", "a", *["right_square_bracket"] * 4, *["r"] * 8, "1", "left", "left", "right", "1"):
            await press(pilot, key)
            assert not {c for c in shown(app) if unicodedata.category(c) in ("Cc", "Cf")} - {"\n"}
        assert "[bold]evil[/bold]" in shown(app)

    browsing(own, act, size=(120, 30))


@given(st.text())
def test_visible_text_holds_nothing_that_is_not_printed(text: str) -> None:
    assert visible(text).isprintable()
    assert visible(visible(text)) == visible(text)


@given(st.lists(st.text(max_size=8), max_size=12), st.integers(1, 30), st.integers(1, 2))
def test_a_layout_keeps_every_token_in_order_and_within_the_width(texts: list[str], width: int, least: int) -> None:
    ends = np.cumsum([0, *map(len, texts)]).tolist()
    row = {"prompt_id": "p", "token_ids": list(range(len(texts))), "pieces": texts, "text": "".join(texts),
           "offsets": [list(pair) for pair in pairwise(ends)], "positions": list(range(len(texts))),
           "is_counted": [True] * len(texts)}  # fmt: skip
    context = context_of(row, {0})
    laid = layout(context.cells, width, least)
    pieces = [piece for line in laid.lines for piece in line]
    assert [p.token for p in pieces] == sorted(p.token for p in pieces)
    assert {p.token for p in pieces} == set(range(len(texts)))
    assert all(sum(p.width for p in line) <= max(width, 2) for line in laid.lines)
    assert all(cell_len(p.text) == p.width for p in pieces)
    assert all(any(p.token == n for p in laid.lines[laid.line_of[n]]) for n in range(len(texts)))
    assert all(laid.token_at(y, 0) == line[0].token for y, line in enumerate(laid.lines) if line)


def test_bytes_of_one_character_are_shown_together(paths: RunPaths) -> None:
    run = open_run(paths)
    context = run.context(2)  # of Chinese characters, three bytes each
    assert [c.text for c in context.cells[1:4]] == ["東", "·", "·"]
    assert [(c.part, c.of) for c in context.cells[1:4]] == [(1, 3), (2, 3), (3, 3)]
    assert "".join(c.text for c in context.cells[1:] if c.part == 1) == visible(context.text)
    assert context.cells[0].is_special
    assert not context.cells[0].is_counted
    run.close()


# -- colours and signs


def test_colours_are_green_above_zero_and_orange_below_and_grow_with_the_activation() -> None:
    for depth in ("full", "16"):
        up, down = heat.style_of(1.0, 1.0, depth), heat.style_of(-1.0, 1.0, depth)
        assert up.bgcolor is not None
        assert down.bgcolor is not None
        assert up != down
        assert heat.style_of(0.0, 1.0, depth) == heat.style_of(float("nan"), 1.0, depth)
    colour = heat.style_of(1.0, 1.0, "full").bgcolor
    assert colour is not None
    red, green, _ = colour.get_truecolor()
    assert green > red
    assert [heat.opacity(s) for s in (0, 1)] == pytest.approx([0.05, 1.0])
    assert heat.style_of(4e-5, 1.0, "full") == heat.style_of(0.0, 1.0, "full")  # under the threshold
    assert not heat.style_of(1.0, 1.0, "mono")
    assert [heat.sign_of(v, 9.0) for v in (9, -9, 1, -4.4, 0.4, float("nan"))] == ["+9", "-9", "+1", "-4", "  ", "  "]


def test_without_colour_no_colour_is_sent_and_signs_stand_under_the_tokens(paths: RunPaths) -> None:
    async def colours(app: Browser) -> set[Any]:
        strips = app.screen._compositor.render_strips(app.size)
        kinds = {c for s in strips for g in s if g.style for c in (g.style.color, g.style.bgcolor) if c is not None}
        return {c for c in kinds if not c.is_default}

    async def mono(app: Browser, pilot: Pilot[int]) -> None:
        await press(pilot, "1", "a")
        told = {c.number for c in await colours(app)}
        assert told <= {8}  # bars and borders, which Textual leaves out by itself
        assert "+9" in screen(app)[3]

    async def full(app: Browser, pilot: Pilot[int]) -> None:
        assert len(await colours(app)) > 10
        assert "+9" not in screen(app)[3]

    browsing(paths, mono, "mono")
    browsing(paths, full, "full")


# -- values


@pytest.mark.parametrize("dump", ["float16", "float32", "bfloat16"])
def test_values_are_those_of_the_file(tmp_path: Path, dump: Any) -> None:
    paths = synthetic.make(tmp_path, replace(SMALL, num_prompts=7, dump=dump))
    run = open_run(paths)
    (row,) = read(paths, "SELECT * FROM neuron_rows WHERE prompt_id = 'p0006'")
    found = run.values(6, 2, 5, 9)
    assert found is not None
    if dump == "bfloat16":  # which numpy does not know
        exact = synthetic._Made(replace(SMALL, num_prompts=7, dump="float32"))
        positions, neurons, values = exact._planted(6)
        for position, neuron, value in zip(positions, neurons, values, strict=True):
            if neuron // 40 == 2 and 5 <= neuron % 40 <= 9:
                assert found[position, neuron % 40 - 5] == pytest.approx(value, rel=2**-8)
    else:
        stored = load_file(paths.artifacts / row["path"])["a.2"][row["row_start"] : row["row_end"], 5:10]
        assert np.array_equal(found, stored.astype(np.float32))
    active = run.ranking("active", 6, 3)
    column = [run.values(6, int(layer), int(n), int(n)) for layer, n in zip(active.layers, active.neurons, strict=True)]
    assert [float(c[3, 0]) for c in column if c is not None] == active.values.tolist()
    assert np.all(np.diff(np.abs(active.values)) <= 0)
    run.close()


def test_tokens_that_were_not_dumped_are_told_and_the_others_keep_their_values(own: RunPaths) -> None:
    """As of a run with `positions = "last"`."""
    whole = open_run(own)
    before = whole.values(3, 1, 0, 39)
    whole.close()
    assert before is not None
    with synthetic.Store(own.results, SCHEMA) as store:
        store._con.execute("UPDATE contexts SET positions = positions[-1:] WHERE prompt_id = 'p0003'")
        store._con.execute("UPDATE neuron_rows SET row_start = row_end - 1 WHERE prompt_id = 'p0003'")
        store.publish(own.live)
    run = open_run(own)
    after = run.values(3, 1, 0, 39)
    assert after is not None
    assert np.array_equal(after[-1], before[-1])
    assert np.isnan(after[:-1]).all()
    run.close()

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        app._go(prompt=3, position=2)
        await pilot.pause()
        assert "not dumped" in shown(app)

    browsing(own, act)


def test_a_ranking_over_all_prompts_is_in_its_order(paths: RunPaths) -> None:
    run = open_run(paths)
    by_z = read(paths, "SELECT layer, neuron FROM neurons ORDER BY abs(z_background) DESC, layer, neuron")
    found = run.ranking("background", 0, 0)
    assert [(r["layer"], r["neuron"]) for r in by_z] == list(zip(found.layers, found.neurons, strict=True))
    by_peak = read(paths, "SELECT layer, neuron FROM neurons ORDER BY mean_peak DESC, layer, neuron")
    found = run.ranking("peak", 0, 0)
    assert [(r["layer"], r["neuron"]) for r in by_peak] == list(zip(found.layers, found.neurons, strict=True))
    assert found.place_of(by_peak[7]["layer"], by_peak[7]["neuron"]) == 7
    run.close()


# -- runs that go on, that have little, that are damaged


def test_a_run_that_goes_on_is_shown_as_it_grows_and_the_place_is_kept(tmp_path: Path) -> None:
    shape = replace(SMALL, stages=("prompts", "dump"), is_running=True)
    paths = synthetic.make(tmp_path, shape)

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        assert "running · dump 5/10" in screen(app)[0]
        assert "the stage peaks has not begun" in shown(app)
        app._go(prompt=7, layer=2, neuron=11, position=4)
        await pilot.pause()
        assert "no activations of this prompt and layer: the stage dump is at 5 of 10" in shown(app)
        place = app._place
        synthetic.go_on(paths, shape, ("dump", "peaks"))
        app.look()
        await settled(pilot)
        assert app._place == place
        text = shown(app)
        assert "peak mean" in text
        assert "no activations" not in text
        assert "the stage influence has not begun" in text
        synthetic.go_on(paths, shape, is_last=True)
        app.look()
        await settled(pilot)
        assert app._place == place
        assert "finished" in screen(app)[0]
        assert "dla" in app._shown.rankings()
        was = app._shown
        app.look()  # control: nothing new
        await settled(pilot)
        assert app._shown is was

    with locked(paths):
        browsing(paths, act)


def test_a_run_without_a_prompt_yet_opens_and_fills(tmp_path: Path) -> None:
    shape = replace(SMALL, stages=(), is_running=True)
    paths = synthetic.make(tmp_path, shape)

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        assert "no prompt yet" in shown(app)
        for key in KEYS:
            for name, action in key.actions:
                if action not in ("quit", "help"):
                    await press(pilot, name)
                    await press(pilot, "escape")
        for keys in (("g", "1", "enter"), ("l", "1", "enter"), ("c", "1", "enter"), ("slash", "x", "enter")):
            await press(pilot, *keys)
        synthetic.go_on(paths, shape)
        app.look()
        await settled(pilot)
        assert "prompt 1/10" in shown(app)
        assert "│dla" in shown(app)

    with locked(paths):
        browsing(paths, act)


@pytest.mark.parametrize("stages", [("prompts", "peaks"), ("prompts", "targets", "influence"), ("prompts", "dump")])
@pytest.mark.parametrize("dump", ["off", "float16"])
def test_a_run_with_some_of_its_tables_shows_those_and_says_what_is_missing(
    tmp_path: Path, stages: tuple[str, ...], dump: Any
) -> None:
    paths = synthetic.make(tmp_path, replace(SMALL, stages=stages, dump=dump))
    if stages == ("prompts", "dump") and dump == "off":
        with pytest.raises(RunError, match="has nothing of its neurons yet"):
            open_run(paths)
        return

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        missing = [stage for stage in ("dump", "influence") if stage not in stages]
        assert all(f"the stage {stage} was not run" in shown(app) for stage in missing[:1])
        for key in ("e", "e", "a", "n", "1", *["r"] * 9, "j", "right", "right_square_bracket"):
            await press(pilot, key)
            screen(app)

    browsing(paths, act, size=(100, 30))


def _damaged(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "other bytes":
        path.write_bytes(b"not a file of tensors" * 10)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "a link":
        path.rename(path.with_suffix(".aside"))
        path.symlink_to(path.with_suffix(".aside"))
    elif how == "nested":
        header = b"[" * 200_000
        path.write_bytes(len(header).to_bytes(8, "little") + header)
    else:  # of another model: the same rows, other neurons
        rows = load_file(path)["a.0"].shape[0]
        write_tensors(path, {f"a.{n}": np.zeros((rows, 24), np.float32) for n in range(3)}, "float16")


@pytest.mark.parametrize("how", ["missing", "cut", "other bytes", "empty", "a link", "nested", "another model"])
def test_a_damaged_file_is_told_in_a_line_and_the_rest_goes_on(own: RunPaths, how: str) -> None:
    (path,) = {r["path"] for r in read(own, "SELECT path FROM neuron_rows")}
    _damaged(own.artifacts / path, how)

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        told = screen(app)[-1]
        assert "000000.safetensors" in told or "000000" in "".join(screen(app)[-2:])
        assert "peak mean" in shown(app)  # the statistics are in the store
        assert "│dla" in shown(app)
        await press(pilot, "j", "right_square_bracket", "r", "e", "a", "down")
        assert "000000" in screen(app)[-1]

    browsing(own, act, size=(200, 24))


def test_a_file_of_other_rows_is_named_as_one_of_another_run(own: RunPaths) -> None:
    (path,) = {r["path"] for r in read(own, "SELECT path FROM neuron_rows")}
    with synthetic.Store(own.results, SCHEMA) as store:
        store._con.execute("UPDATE neuron_rows SET row_end = row_end + 1")
        store.publish(own.live)
    run = open_run(own)
    with pytest.raises(RunError, match="the file is of another run"):
        run.values(0, 0, 0, 0)
    with pytest.raises(RunError):
        map_matrices(own.artifacts, "../manifest.json")
    assert set(map_matrices(own.artifacts, path)) == {"a.0", "a.1", "a.2"}
    run.close()


# -- the command


class _Stub:
    """An experiment, as far as the command asks it anything."""

    name = "neurons"

    def browse(self, paths: RunPaths) -> int:
        return 7 if paths.run_id else 0


def test_the_command_finds_a_run_by_its_id_or_folder_and_shows_it(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "experiment_of", lambda manifest: _Stub())
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(getattr(sys, stream), "isatty", lambda: True, raising=False)
    root = paths.folder.parent
    assert command.command(root, paths.run_id) == 7
    assert command.command(root, "latest") == 7
    assert command.command(Path("elsewhere"), str(paths.folder)) == 7
    with pytest.raises(HarnessError, match="expected a run_id"):
        command.command(root, "none")


def test_without_a_terminal_it_says_so_in_a_line(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recognise.registry, "get", lambda name: _Stub())
    told = refused(harness("browse", paths.run_id, "--paths.runs", str(paths.folder.parent)))
    assert "draws on a terminal" in told


def test_a_run_of_another_experiment_and_an_unknown_one_are_refused(tmp_path: Path) -> None:
    other = gravity_synthetic.write(tmp_path, gravity_synthetic.Shape(2, 1, 1, 1, num_bootstraps=10))
    told = refused(harness("browse", other.run_id, "--paths.runs", str(tmp_path)))
    assert "is of the experiment gravity, whose runs cannot be browsed" in told
    assert "expected a run_id" in refused(harness("browse", "nothing", "--paths.runs", str(tmp_path)))


def test_a_run_without_neurons_says_which_stage_to_run(tmp_path: Path) -> None:
    paths = synthetic.make(tmp_path, replace(SMALL, stages=EMPTY_STAGES))
    with pytest.raises(RunError, match=r"its stage `dump` writes whole activations.*--neurons\.stages dump,peaks"):
        open_run(paths)


def test_the_browser_loads_no_torch() -> None:
    code = (
        "import sys, harness.experiments.neurons.browser.app, harness.commands.browse\n"
        "print([m for m in ('torch', 'transformers', 'scipy', 'pandas', 'matplotlib', 'streamlit') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_nothing_of_the_run_is_written(own: RunPaths) -> None:
    def files() -> dict[str, tuple[int, int]]:
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in own.folder.rglob("*") if p.is_file()}

    before = files()

    async def act(app: Browser, pilot: Pilot[int]) -> None:
        await press(pilot, "n", "e", "r", "right_square_bracket", "a")
        app.look()
        await settled(pilot)

    browsing(own, act)
    assert files() == before
