"""Every figure draws what the store holds, says what was not measured, and takes any number of conditions."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from scipy import stats as scipy_stats

from harness.experiments.gravity import figures
from harness.experiments.gravity.figures import FIGURES, FigureData
from harness.experiments.gravity.schema import SCHEMA
from harness.store import Reader, Store
from tests import synthetic
from tests.synthetic import Shape


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    shape = Shape(60, 4, 4, 8, ("baseline", "negative", "reframed"), num_bootstraps=100)
    with Reader(synthetic.write(tmp_path_factory.mktemp("runs"), shape).live, SCHEMA) as reader:
        yield reader


@pytest.fixture(scope="module")
def data(reader: Reader) -> FigureData:
    return figures.gather(reader)


def snapshot(folder: Path, shape: Shape | None) -> Reader:
    with Store(folder / "results.duckdb", SCHEMA) as store:
        if shape is not None:
            synthetic.fill(store, shape)
        store.publish(folder / "live.duckdb")
    return Reader(folder / "live.duckdb", SCHEMA)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def says_not_measured(figure: Figure) -> bool:
    return len(figure.axes) == 1 and any(text.startswith("not measured") for text in words(figure))


def titled(figure: Figure, title: str) -> list[Axes]:
    return [ax for ax in figure.axes if ax.get_title("left") == title]


def means(ax: Axes, index: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Where the points of an axes' error bars are."""
    bars = [c for c in ax.containers if isinstance(c, ErrorbarContainer)]
    line = bars[index].lines[0]
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def curve(ax: Axes, label: str) -> np.ndarray:
    (line,) = (line for line in ax.lines if str(line.get_label()).startswith(label))
    return np.asarray(line.get_ydata(), dtype=float)


def point(prompt_id: str, condition: str = "negative", **values: Any) -> dict[str, Any]:
    columns = (
        "p0",
        "p1",
        "delta",
        "relative",
        "num_samples",
        "num_violations",
        "rate",
        "outcome",
        "iar",
        "nf",
        "tmf",
        "pi",
    )
    return {"prompt_id": prompt_id, "condition": condition} | dict.fromkeys(columns) | values


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_a_whole_run_is_filled_and_labelled(name: str, data: FigureData) -> None:
    figure = FIGURES[name](data)
    assert not says_not_measured(figure)
    for ax in figure.axes:
        assert ax.get_title("left")
        assert ax.get_xlabel()
        assert ax.get_ylabel() or name == "taxonomy"
        assert ax.has_data() or any("no such span" in text.get_text() for text in ax.texts)
    legends = [t.get_text() for ax in figure.axes if (box := ax.get_legend()) for t in box.get_texts()]
    titles = [ax.get_title("left") for ax in figure.axes]
    assert any("n = " in text for text in [*legends, *titles])
    assert figure.get_figwidth() <= figures.WIDTH


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_an_empty_run_says_so(name: str, tmp_path: Path) -> None:
    assert says_not_measured(FIGURES[name](FigureData()))
    if name == "violation":
        with snapshot(tmp_path, None) as reader:
            found = figures.gather(reader)
        assert (found.conditions, list(found.points), list(found.statistics)) == ((), [], [])


def test_a_figure_is_the_same_file_every_time(data: FigureData) -> None:
    files = []
    for _ in range(2):
        buffer = io.BytesIO()
        FIGURES["violation"](data).savefig(buffer, format="png", dpi=50)
        files.append(buffer.getvalue())
    assert files[0] == files[1]


def test_a_run_with_only_a_baseline_shows_its_rates_and_says_what_needs_a_comparison(tmp_path: Path) -> None:
    with snapshot(tmp_path, Shape(30, 2, 2, 4, ("baseline",), num_bootstraps=50)) as reader:
        data = figures.gather(reader)
    shown = {name for name, draw in FIGURES.items() if not says_not_measured(draw(data))}
    assert shown == {"violation"}


def test_without_mechanism_only_the_figures_of_answers_are_drawn(tmp_path: Path) -> None:
    with snapshot(tmp_path, Shape(30, 2, 2, 4, mechanism=False, num_bootstraps=50)) as reader:
        data = figures.gather(reader)
    shown = {name for name, draw in FIGURES.items() if not says_not_measured(draw(data))}
    assert shown == {"violation", "suppression", "taxonomy"}


def test_violation_shows_the_mean_of_each_bin_at_its_mean_pressure() -> None:
    points = [
        point("a", p0=0.10, rate=0.25, num_samples=4, num_violations=1),
        point("b", p0=0.20 - 1e-9, rate=0.75, num_samples=4, num_violations=3),
        point("c", p0=0.20, rate=1.0, num_samples=4, num_violations=4),
        point("d", p0=None, rate=1.0, num_samples=4, num_violations=4),
        point("e", p0=0.9),
    ]
    (ax,) = FIGURES["violation"](FigureData(("negative",), points)).axes
    x, y = means(ax)
    assert x.tolist() == pytest.approx([0.15, 0.20])
    assert y.tolist() == pytest.approx([0.5, 1.0])
    (dots,) = ax.collections[:1]
    drawn = np.asarray(dots.get_offsets())
    assert len(drawn) == 3  # not the one without a pressure, nor the one without samples
    assert drawn[:, 0].tolist() == pytest.approx([0.10, 0.20 - 1e-9, 0.20])
    assert np.abs(drawn[:, 1] - [0.25, 0.75, 1.0]).max() < 0.5 / 4  # jitter moves a point by less than half a sample


def test_violation_draws_the_fit_of_the_store_solid_among_its_prompts_and_dashed_beyond(data: FigureData) -> None:
    (ax,) = titled(FIGURES["violation"](data), "negative")
    fit = {r["measure"]: r["value"] for r in data.where("fit", condition="negative", grouping="all")}
    p0 = [float(p["p0"]) for p in data.prompts("negative", "p0", "rate")]
    lines = [line for line in ax.lines if line.get_color() == figures.VERMILLION]
    spans = {tuple(np.asarray(line.get_xdata())[[0, -1]].tolist()): line.get_linestyle() for line in lines}
    assert spans == {(0.0, min(p0)): "--", (min(p0), max(p0)): "-", (max(p0), 1.0): "--"}
    for line in lines:
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        assert y == pytest.approx(1 / (1 + np.exp(-fit["intercept"] - fit["slope"] * x)))
    below, above, inside = (c.get_alpha() for c in ax.collections if isinstance(c, PolyCollection))
    assert above is not None
    assert inside is not None
    assert below == above < inside
    (told,) = (str(line.get_label()) for line in lines if str(line.get_label()).startswith("σ("))
    assert f"P0 {min(p0):.2f} to {max(p0):.2f}" in told
    (baseline,) = titled(FIGURES["violation"](data), "baseline")
    assert not [line for line in baseline.lines if line.get_color() == figures.VERMILLION]


def test_bars_of_the_bins_are_those_that_the_analysis_stored() -> None:
    points = [point(str(i), p0=0.1, rate=0.5 * i, num_samples=4, num_violations=2 * i) for i in range(3)]
    row = dict.fromkeys(("patch", "layer", "head", "se", "p", "q", "measured", "step_kind", "method"))
    stored = {"analysis": "rates", "condition": "negative", "measure": "violation_rate", "grouping": "[0, .2)",
              "value": 0.5, "low": 0.125, "high": 0.625, "n": 3} | row  # fmt: skip
    for n, wanted in ((3, [0.125, 0.625]), (2, None)):  # of two prompts: it was made before the third was measured
        (ax,) = FIGURES["violation"](FigureData(("negative",), points, [stored | {"n": n}])).axes
        (bars,) = (c for c in ax.containers if isinstance(c, ErrorbarContainer))
        (segment,) = bars.lines[2][0].get_segments()
        assert (segment[:, 1].tolist() == wanted) is (wanted is not None)


def test_suppression_counts_what_lies_below_its_axis_and_draws_means_of_all() -> None:
    points = [point(str(i), p0=0.5, relative=r) for i, r in enumerate((0.5, -0.1, -3.0))]
    (ax,) = FIGURES["suppression"](FigureData(("negative",), points)).axes
    assert means(ax)[1].tolist() == pytest.approx([-2.6 / 3])
    assert curve(ax, "median").tolist() == pytest.approx([-0.1])
    assert len(np.asarray(ax.collections[0].get_offsets())) == 2
    legend = ax.get_legend()
    assert legend is not None
    assert any("n = 3, 1 below the axis" in t.get_text() for t in legend.get_texts())


def test_attention_splits_prompts_by_outcome_and_leaves_out_nulls() -> None:
    points = [
        point("a", p0=0.1, outcome="success", iar=0.2),
        point("b", p0=0.1, outcome="success", iar=0.4),
        point("c", p0=0.1, outcome="failure", iar=0.9),
        point("d", p0=0.1, outcome="failure", iar=None),
    ]
    figure = FIGURES["attention"](FigureData(("negative",), points))
    iar, nf, tmf = figure.axes
    assert means(iar, 0)[1].tolist() == pytest.approx([0.3])
    assert means(iar, 1)[1].tolist() == pytest.approx([0.9])
    assert all("not measured" in ax.texts[0].get_text() for ax in (nf, tmf))


def test_attention_equals_the_store(reader: Reader, data: FigureData) -> None:
    """Mean over layers of the mean over heads, first step, of failures under `negative` with P0 of .8 and more."""
    rows = reader.query(
        "SELECT prompt_id, avg(list_avg(tmf)) AS tmf FROM attention JOIN outcomes USING (prompt_id, condition) "
        "JOIN suppression USING (prompt_id, condition) WHERE condition = 'negative' AND step_kind = 'first' "
        "AND outcome = 'failure' AND p0 >= 0.8 GROUP BY prompt_id"
    )
    ax = titled(FIGURES["attention"](data), "negative")[2]
    assert means(ax, 1)[1][-1] == pytest.approx(np.mean([r["tmf"] for r in rows]))


def test_priming_states_pearsons_correlation_and_its_interval(data: FigureData) -> None:
    points = data.prompts("negative", "pi", "rate")
    found: Any = scipy_stats.pearsonr([p["pi"] for p in points], [p["rate"] for p in points])
    low, high = found.confidence_interval()
    (ax,) = FIGURES["priming"](data).axes  # the other condition has no negation, hence no PI
    legend = ax.get_legend()
    assert legend is not None
    told = legend.get_texts()[1].get_text()
    assert told == f"r = {found.statistic:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−")
    same = [point(str(i), pi=0.1, rate=i / 9) for i in range(9)]
    (ax,) = FIGURES["priming"](FigureData(("negative",), [p | {"num_samples": 9} for p in same])).axes
    legend = ax.get_legend()
    assert legend is not None
    assert "too little variation" in legend.get_texts()[1].get_text()


def test_lens_curves_equal_the_means_of_the_store(reader: Reader, data: FigureData) -> None:
    (ax,) = titled(FIGURES["lens"](data), "negative")
    for outcome in ("success", "failure"):
        for measured in ("baseline", "negative"):
            rows = reader.query(
                "SELECT layer, avg(p_target) AS mean FROM lens l JOIN outcomes o ON o.prompt_id = l.prompt_id "
                "WHERE o.condition = 'negative' AND outcome = ? AND l.condition = ? AND step_kind = 'first' "
                "GROUP BY layer ORDER BY layer", [outcome, measured],
            )  # fmt: skip
            assert curve(ax, f"{outcome}, {measured}").tolist() == pytest.approx([r["mean"] for r in rows])


def test_a_layer_without_a_value_breaks_the_line(data: FigureData) -> None:
    broken = [r | {"value": None, "low": None, "high": None} if r["layer"] == 1 else r for r in data.statistics]
    (ax,) = titled(FIGURES["lens"](FigureData(data.conditions, data.points, broken)), "negative")
    assert np.isnan(curve(ax, "failure, negative")).tolist() == [False, True, False, False]


def test_contributions_and_patching_equal_the_means_of_the_store(reader: Reader, data: FigureData) -> None:
    (ax,) = titled(FIGURES["contributions"](data), "reframed: MLP (FFN)")
    rows = reader.query(
        "SELECT layer, avg(ffn_contrib) AS mean FROM decomposition JOIN outcomes USING (prompt_id, condition) "
        "WHERE condition = 'reframed' AND outcome = 'failure' AND step_kind = 'first' GROUP BY layer ORDER BY layer"
    )
    assert curve(ax, "failure").tolist() == pytest.approx([r["mean"] for r in rows])
    (ax,) = titled(FIGURES["patching"](data), figures.PATCHES["mlp"])
    for where, label in (("true", "all"), ("p_sem >= 0.8", "P0 in [.8, 1]")):
        rows = reader.query(
            "SELECT layer, avg(delta_p) AS mean FROM patching JOIN psem USING (prompt_id) "
            f"WHERE condition = 'baseline' AND patch = 'mlp' AND {where} GROUP BY layer ORDER BY layer"
        )
        assert curve(ax, label).tolist() == pytest.approx([r["mean"] for r in rows])


def test_taxonomy_bars_are_the_counts_of_the_store(reader: Reader, data: FigureData) -> None:
    (ax,) = FIGURES["taxonomy"](data).axes
    drawn = [[bar.get_width() for bar in container] for container in ax.containers]
    counts = {
        (r["condition"], r["kind"]): r["n"]
        for r in reader.query(
            "SELECT condition, coalesce(taxonomy, 'unknown') AS kind, count(*) AS n FROM outcomes "
            "WHERE outcome = 'failure' GROUP BY ALL"
        )
    }
    kinds = ("priming", "override", "unknown")
    assert drawn == [[counts.get((c, kind), 0) for c in ("negative", "reframed")] for kind in kinds]
    none = [r | {"value": 0.0} for r in data.where("taxonomy")]
    assert "no failures" in words(FIGURES["taxonomy"](FigureData(data.conditions, (), none)))[-1]


def test_any_number_of_conditions_each_get_a_panel_whatever_their_names() -> None:
    names = ("baseline", "negative", "costs $5 or $6", "a_b^{c}", "naïve", "ban & <b>")
    points = [
        point(f"{c}{i}", c, p0=i / 9, rate=i / 9, relative=0.5, num_samples=9, num_violations=i)
        for c in names
        for i in range(10)
    ]
    figure = FIGURES["violation"](FigureData(names, points))
    figure.savefig(io.BytesIO(), format="svg")
    assert len(figure.axes) == 6
    assert len(FIGURES["suppression"](FigureData(names, points)).axes) == 5


def test_conditions_come_with_the_baseline_first_and_heads_are_left_out(data: FigureData) -> None:
    assert data.conditions == ("baseline", "negative", "reframed")
    assert data.compared == ("negative", "reframed")
    assert len(data.points) == 180
    assert {r["head"] for r in data.statistics} == {-1}
