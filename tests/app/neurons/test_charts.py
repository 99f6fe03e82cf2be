"""Drawings of neurons as data: opacity by hand, tokens joined and made visible, what a click stands for."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from app.charts.neurons import neurons as charts
from app.charts.neurons import number_told, size_told, tokens
from app.charts.neurons.compared import intervals
from app.charts.neurons.neurons import Point
from app.charts.neurons.tokens import Cell, Colouring
from app.queries.neurons.neurons import EDGES
from tests.neurons.synthetic import HOSTILE

# -- opacity


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.0, 0.0),
        (4e-5, 0.0),  # under the threshold
        (-4e-5, 0.0),
        (6e-5, 0.05 + 0.95 * math.log10(1 + 9 * 6e-5 / 2)),
        (1.0, 0.05 + 0.95 * math.log10(5.5)),
        (-1.0, 0.05 + 0.95 * math.log10(5.5)),
        (2.0, 1.0),
        (50.0, 1.0),
    ],
)
def test_opacity_is_the_formula(value: float, expected: float) -> None:
    assert Colouring().opacity(value, 2.0) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "middle"), [("linear", 0.25), ("square root", 0.5), ("power", 0.25**3), ("logarithm", None)]
)
def test_every_shape_rises_from_the_faintest_to_the_whole_and_names_itself(shape: str, middle: float | None) -> None:
    colouring = Colouring(shape, 3.0)
    if middle is not None:
        assert colouring.opacity(0.25, 1.0) == pytest.approx(0.05 + 0.95 * middle)
    found = [colouring.opacity(r, 1.0) or 0.0 for r in np.linspace(0.001, 1, 50)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(1.0)
    assert "opacity .05 + .95·" in colouring.told


def test_what_is_not_known_is_not_none() -> None:
    assert Colouring().opacity(math.nan, 1.0) is None
    assert Colouring().opacity(1.0, 0.0) == 0.0, "nothing to hold it against"
    assert Colouring(threshold=0.0).opacity(0.0, 1.0) == pytest.approx(0.05)


def test_a_scale_is_over_counted_tokens_of_what_is_compared() -> None:
    first, second = np.array([90.0, 1.0, -3.0]), np.array([np.nan, 2.0, 0.5])
    values = [[first, second], [np.array([80.0, -5.0]), None]]
    counted = [[False, True, True], [False, True]]
    assert tokens.scales(values, counted, "all") == [[5.0, 5.0], [5.0, 5.0]]
    assert tokens.scales(values, counted, "prompt") == [[3.0, 3.0], [5.0, 5.0]]
    assert tokens.scales(values, counted, "neuron") == [[5.0, 2.0], [5.0, 2.0]]
    assert tokens.scales([[], []], counted, "all") == [[], []]
    assert tokens.scales([[None]], [[True]], "all") == [[0.0]]


# -- text


def test_tokens_of_one_character_are_joined_by_their_offsets() -> None:
    assert tokens.cells("a京b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)], list("a???b")) == [
        Cell(0, 1, "a"),
        Cell(1, 4, "京"),
        Cell(4, 5, "b"),
    ]


@pytest.mark.parametrize(
    ("text", "spans", "shown"),
    [
        ("👨‍👩‍👧!", [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)], ["👨‍👩‍👧", "!"]),
        ("🇫🇷🇯🇵", [(0, 1), (1, 2), (2, 3), (3, 4)], ["🇫🇷", "🇯🇵"]),
        ("👍🏽x", [(0, 1), (1, 2), (2, 3)], ["👍🏽", "x"]),
        ("e\u0301f", [(0, 1), (1, 2), (2, 3)], ["e\u0301", "f"]),
        ("ab", [(0, 1), (1, 2)], ["a", "b"]),
    ],
    ids=["family", "flags", "skin", "combined", "control"],
)
def test_tokens_of_what_people_see_as_one_character_are_joined(
    text: str, spans: list[tuple[int, int]], shown: list[str]
) -> None:
    assert [c.text for c in tokens.cells(text, spans, list(text))] == shown


def test_a_token_without_characters_shows_its_piece_and_a_space_goes_with_its_word() -> None:
    found = tokens.cells(
        "the city\nis", [(0, 0), (0, 3), (4, 8), (8, 9), (9, 11)], ["<bos>", "the", "Ġcity", "Ċ", "is"]
    )
    assert [c.text for c in found] == ["<bos>", "the", " city", "⏎", "is"]
    assert [c.ends_line for c in found] == [False, False, False, True, False]
    assert [(c.start, c.stop) for c in found] == [(n, n + 1) for n in range(5)]


@pytest.mark.parametrize("spans", [[(0, 99)], [(3, 1)], [(-2, -1)], [(5, 5)], [(1, 2), (0, 1)]])
def test_offsets_that_fit_no_text_lose_no_token(spans: list[tuple[int, int]]) -> None:
    found = tokens.cells("abc", spans, ["x"] * len(spans))
    assert [n for c in found for n in range(c.start, c.stop)] == list(range(len(spans)))


@pytest.mark.parametrize("text", HOSTILE)
def test_no_sign_of_a_hostile_text_does_anything(text: str) -> None:
    shown = tokens.shown(text)
    bad = [
        c for c in shown if (not c.isprintable() and c != "\u200d") or c in "\u202a\u202b\u202c\u202d\u202e\u2066\u2069"
    ]
    assert bad == []
    assert tokens.shown("\x1b[31m") == "␛[31m"
    assert tokens.shown("\u202e") == "⟨202E⟩"
    assert tokens.shown("\u0301") == "◌\u0301"
    assert tokens.shown("a\u200db") == "a⟨200D⟩b"
    assert tokens.shown("<b>&amp;") == "<b>&amp;", "markup is text, and stays it"


def test_runs_of_tokens_have_the_direction_of_their_letters() -> None:
    assert (tokens.direction("12 עיר a"), tokens.direction("a עיר"), tokens.direction("…")) == ("rtl", "ltr", None)
    parts = [Cell(n, n + 1, text) for n, text in enumerate(["In ", "עיר", " ", "היא", ", ", "so", "!"])]
    assert tokens.directions(parts, "ltr") == ["ltr", "rtl", "rtl", "rtl", "ltr", "ltr", "ltr"]
    assert tokens.directions([], "ltr") == []


# -- panels

TOLD = {
    "token_ids": [7, 8, 9, 10], "special": [True, False, False, False], "counted": [False, True, True, True],
    "dumped": [True, True, True, False],
}  # fmt: skip


def test_a_panel_tells_signed_opacities_and_every_token_of_a_joined_one() -> None:
    parts = [Cell(0, 1, "<bos>"), Cell(1, 3, "京"), Cell(3, 4, "b")]
    values = np.array([50.0, -1.0, 2.0, np.nan], np.float32)
    found = tokens.panel("p0", "京b", parts, TOLD, [values], ["neuron 0.1"], [2.0], Colouring())
    bos, joined, last = found["cells"]
    assert bos["shades"] == [1.0]
    assert (bos["special"], bos["counted"], joined["counted"]) == (True, False, True)
    assert joined["shades"] == [1.0], "the one furthest from 0"
    assert joined["lines"] == [
        "2 tokens of one character",
        "position 1 · token 8", "neuron 0.1: -1 (50% of the scale)",
        "position 2 · token 9", "neuron 0.1: +2 (100% of the scale)",
    ]  # fmt: skip
    assert last["shades"] == [None]
    assert (last["known"], last["lines"][-1]) == (False, "neuron 0.1: not known here")
    json.dumps(found, allow_nan=False)
    negative = tokens.panel("p0", "b", [Cell(1, 2, "b")], TOLD, [values], ["x"], [2.0], Colouring())["cells"][0]
    assert negative["shades"][0] == pytest.approx(-(0.05 + 0.95 * math.log10(5.5)), abs=1e-4)


def test_the_legend_is_symmetric_with_nothing_in_its_middle() -> None:
    shades = [one["shade"] for one in tokens.legend(Colouring())]
    assert shades == [-s for s in reversed(shades)]
    assert shades[len(shades) // 2] == 0.0
    assert shades[-1] == 1.0


# -- the page Neurons

CELLS = pd.DataFrame({"layer": [0, 2, 2], "bin": [0, 0, 2], "n": [1, 3, 4], "share": [0.25, 0.75, 1.0]})


def test_density_has_a_cell_for_every_layer_and_bin_also_where_nothing_lies() -> None:
    option = charts.density(CELLS, [0, 1, 2], EDGES)
    (series,) = option["series"]
    assert option["xAxis"]["data"] == ["1", "2", "3–5"]
    assert len(series["data"]) == 9
    assert series["data"][0]["name"] == "layer 0, places 1: 25.0%, 1 neurons"
    assert [d["value"][2] for d in series["data"]] == [0.25, 0.0, 0.0, 0.0, 0.0, 0.0, 0.75, 0.0, 1.0]
    assert charts.clicked_layer(CELLS, [0, 1, 2], EDGES, 7) == 2
    assert charts.clicked_layer(CELLS, [0, 1, 2], EDGES, 99) is None
    json.dumps(option, allow_nan=False)


def test_bins_are_named_up_to_the_last_that_has_any() -> None:
    far = pd.DataFrame({"layer": [0], "bin": [len(EDGES)], "n": [1], "share": [1.0]})
    labels = charts.bins(EDGES, far)
    assert (labels[0], labels[3], labels[-1]) == ("1", "6–10", f"over {EDGES[-1]:,}")
    assert charts.bins(EDGES, far.head(0)) == []


POINTS = pd.DataFrame(
    {
        "layer": [0, 1, 2], "neuron": [5, 6, 7], "mean_peak": [1.0, 10.0, 3.0], "influence": [0.5, -0.25, 0.0],
        "q": [0.01, 0.9, None],
    }
)  # fmt: skip


def test_a_point_of_the_scatter_names_its_neuron_and_the_chosen_one_is_ringed() -> None:
    option = charts.scatter(POINTS, Point(1, 6))
    beyond, others, ring = option["series"]
    assert beyond["data"][0]["name"] == "neuron 0.5: peak 1, influence +0.5"
    assert [d["value"] for d in others["data"]] == [[10.0, -0.25], [3.0, 0.0]]
    assert ring["data"][0]["value"] == [10.0, -0.25]
    assert option["xAxis"]["type"] == "log"
    assert charts.clicked_point(POINTS, 0, 0) == Point(0, 5)
    assert charts.clicked_point(POINTS, 1, 1) == Point(2, 7)
    assert charts.clicked_point(POINTS, 2, 0) is None, "the ring is nobody"
    silent = POINTS.assign(mean_peak=[0.0, 1.0, 2.0])
    assert charts.scatter(silent, None)["xAxis"]["type"] == "value", "a scale of logarithms has no 0"
    only = POINTS[POINTS["q"] > 0.5]
    assert charts.clicked_point(only, 0, 0) == Point(1, 6), "a series without points is not drawn"
    json.dumps(option, allow_nan=False)


CLAIMS = pd.DataFrame(
    {
        "ranking": ["relp", "dla", "dla", "dla"], "prompt_id": ["a", "a", "{b}", "c"], "layer": [0, 0, 1, 1],
        "neuron": [3, 3, 4, 5], "predicted": [-1.0, -2.0, 0.5, None], "measured": [-1.0, -0.8, 0.25, 1.0],
    }
)  # fmt: skip


def test_claims_stand_against_what_was_measured_with_the_line_on_which_both_agree() -> None:
    option = charts.claims(CLAIMS, Point(1, 4))
    dla, relp, ring = option["series"]
    assert [d["value"] for d in dla["data"]] == [[-2.0, -0.8], [0.5, 0.25]], "what has no claim has no point"
    assert dla["data"][1]["name"] == "neuron 1.4 in (b): dla claims +0.5, measured +0.25"
    assert dla["markLine"]["data"] == [[{"coord": [-1.0, -1.0]}, {"coord": [0.25, 0.25]}]], "as far as both axes go"
    assert ring["data"][0]["value"] == [0.5, 0.25]
    assert relp["name"] == "relp"
    assert charts.clicked_claim(CLAIMS, 0, 1) == Point(1, 4, "{b}")
    assert charts.clicked_claim(CLAIMS, 1, 0) == Point(0, 3, "a")
    assert charts.clicked_claim(CLAIMS, 5, 0) is None
    assert charts.claims(CLAIMS.head(0))["series"] == []
    json.dumps(option, allow_nan=False)


def test_controls_are_dashed_and_an_empty_set_has_no_place_on_logarithms() -> None:
    rows = pd.DataFrame(
        [(r, mode, k, k / 10) for r in ("random", "dla") for mode in ("keep", "drop") for k in (0, 1, 10)],
        columns=["ranking", "mode", "k", "m"],
    )
    option = charts.curves(rows, "keep", ("random",))
    dla, random = option["series"]
    assert (dla["name"], dla["lineStyle"]["type"], random["lineStyle"]["type"]) == ("dla", "solid", "dashed")
    assert dla["data"] == [[1, 0.1], [10, 1.0]]
    assert option["xAxis"]["type"] == "log"
    assert charts.curves(rows.head(0), "drop", ())["series"] == []


def test_a_whisker_an_ranking_and_run() -> None:
    rows = pd.DataFrame({"ranking": ["dla", "ig"], "value": [0.5, None], "low": [0.4, None], "high": [0.6, None],
                         "value_other": [0.3, 0.4], "low_other": [None, 0.3], "high_other": [None, 0.5]})  # fmt: skip
    one, other = intervals(rows, ("this", "other"), "agreement")["series"]
    assert one["data"][0] == {"name": "dla: +0.5 [+0.4, +0.6]", "value": [0.4, 0.5, 0.5, 0.5, 0.6]}
    assert one["data"][1] == {"name": "ig: not measured", "value": []}
    assert other["data"][0]["value"] == [0.3] * 5, "no interval"


def test_numbers_are_told_in_digits_that_count() -> None:
    assert (number_told(0.00012346), number_told(None), number_told(math.nan)) == ("+0.0001235", "–", "–")
    assert (size_told(12345.6), size_told(None)) == ("1.235e+04", "–")
