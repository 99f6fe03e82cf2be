"""The report of neurons: it tells the store's numbers, says what is not there, and is harmless whatever a prompt says."""

import html
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from harness.commands import report as command
from harness.experiments import registry
from harness.experiments.neurons import method, summary
from harness.experiments.neurons.figures import CAPTIONS, FIGURES, FigureData, gather
from harness.experiments.neurons.schema import SCHEMA
from harness.run import RunPaths, read_manifest
from harness.store import Store, open_snapshot
from tests.commands import harness, only_run
from tests.pages import Page

ROOT = Path(__file__).parents[2]
EXPERIMENT = registry.get("neurons")
Row = dict[str, Any]
HOSTILE = "<script>alert(1)</script>\x1b[2J\x1b]0;owned\x07 {{ 7 * 7 }} [red]$x$[/red]\u202e"
PROMPTS = ("p0<img src=x onerror=e()>", "p1\x1b[31m", "p2", "p3")
TOKENS = ("<|end|>", " is", " are", "<b>bold</b>", "\x1b[2J", "[bold]x[/bold]", "\n", "�", " $a$")
METRICS = ("dla", "act_grad")
MEASURED = {(5, 1): -1.25, (5, 2): 1.125, (0, 7): -0.0625}
"""The change of the logit that each neuron makes in the first prompt; of the n-th it is n + 1 times as large."""
CLAIMED = {"dla": {(5, 1): -1.75, (5, 2): 1.5}, "act_grad": {(5, 1): -1.1875, (0, 7): -0.09375}}


def stat(
    analysis: str, ranking: str, measure: str, value: float, *ends: float, n: int = 4, p: float | None = None
) -> Row:
    low, high = ends or (None, None)
    return {"analysis": analysis, "ranking": ranking, "measure": measure, "value": value, "low": low, "high": high,
            "p": p, "n": n, "method": "made up"}  # fmt: skip


STATISTICS = [
    stat("agreement", "dla", "spearman", 0.6543, 0.6011, 0.7022),
    stat("agreement", "dla", "pearson", 0.7111, 0.6999, 0.7222),
    stat("agreement", "dla", "sign", 0.8123, 0.8001, 0.8345),
    stat("agreement", "dla", "slope", 0.4777, 0.4444, 0.4999),
    stat("agreement", "act_grad", "spearman", 0.9671, 0.9555, 0.9777),
    stat("agreement", "act_grad", "slope", 0.9543, 0.9333, 0.9666),
    stat("curves", "dla", "area_keep", 0.2931, 0.2811, 0.3022),
    stat("curves", "dla", "area_keep_over_matched", 0.1001, 0.0922, 0.1077, p=1e-9),
    stat("curves", "dla", "area_drop", 0.6433, 0.6211, 0.6566),
    stat("curves", "dla", "area_drop_over_matched", 0.0123, -0.0311, 0.0555, p=0.4321),
    stat("curves", "matched", "area_keep", 0.1933, 0.1855, 0.1999),
    stat("background", "all", "share_beyond", 0.765, n=3),
    stat("background", "layer 0", "share_beyond", 0.5, n=2),
    stat("background", "layer 5", "share_beyond", 0.25, n=1),
    stat("influence", "dla", "effective", 258.25, 251.5, 266.125),
    stat("influence", "dla", "largest_residual", 4.2e-6),
]


def texts(store: Store) -> None:
    store._insert("vocabulary", [{"token_id": n, "text": t, "is_special": not n} for n, t in enumerate(TOKENS)])
    for n, prompt_id in enumerate(PROMPTS):
        store._insert("prompts", [{"prompt_id": prompt_id, "category": ("<i>one</i>", "two")[n % 2], "text": HOSTILE,
                                   "target": None, "contrast": None, "row_hash": str(n)}])  # fmt: skip
        store._insert("contexts", [{"prompt_id": prompt_id, "condition": "neurons", "text": HOSTILE, "token_ids": [0, 3, 4],
                                    "pieces": ["x"] * 3, "offsets": [[0, 1]] * 3, "positions": [0, 1, 2],
                                    "is_counted": [False, True, True]}])  # fmt: skip


def peaks(store: Store, *, has_background: bool = True) -> None:
    for n, (layer, neuron) in enumerate(MEASURED):
        row: Row = {
            "layer": layer, "neuron": neuron, "num_prompts": 4, "num_tokens": 8, "mean_peak": 1.5 + n, "sd_peak": 0.5,
            "max_peak": 9.0, "min_peak": 0.25, "max_signed": -9.0 if n == 1 else 9.0, "mean": 0.1, "sd": 1.0,
            "share_active": 0.5, "kurtosis": 3.0, "peak_token_mode": 3 + n, "peak_token_share": 0.75, "num_peak_tokens": 2,
            "next_token_mode": None, "num_next_tokens": 0, "tokens_error": 0, "share_functional": 0.25, "out_norm": 1.0,
            "examples": [],
        }  # fmt: skip
        if has_background:
            row |= {"mean_background": 0.0, "peak_background": 0.5, "sd_background": 1.0, "z_background": 30.5 - n,
                    "p_background": 1e-9, "q": 1e-8}  # fmt: skip
        store._insert("neurons", [row])
        store._insert("neuron_writes", [{"layer": layer, "neuron": neuron, "top_ids": [1, 3], "top_logits": [2.0, 0.5],
                                         "low_ids": [2, 4], "low_logits": [-1.0, -0.75], "explicit": []}])  # fmt: skip


def influence(store: Store, mode: str = "top1_logit") -> None:
    for n, prompt_id in enumerate(PROMPTS):
        store._insert("targets", [{"prompt_id": prompt_id, "mode": mode, "token_ids": [3], "contrast_ids": [], "position": 2,
                                   "logit": 15.25, "logit_contrast": None, "p": 0.9 - 0.2 * n, "rank": 1, "margin": 1.5,
                                   "top_ids": [3, 4], "top_probs": [0.9 - 0.2 * n, 0.1]}])  # fmt: skip
        for metric in METRICS:
            store._insert("influence_totals", [{"prompt_id": prompt_id, "metric": metric, "total_abs": 9.0, "total": 8.0,
                                                "residual": 1e-6, "num_selected": 2, "is_cut": metric == "dla",
                                                "effective": 258.25}])  # fmt: skip
            for place, ((layer, neuron), value) in enumerate(CLAIMED[metric].items(), 1):
                store._insert("influence", [{"prompt_id": prompt_id, "metric": metric, "layer": layer, "neuron": neuron,
                                             "position": 2, "activation": 2.0, "value": -value, "share": 0.4, "place": place,
                                             "selected": True, "weight": 1.0}])  # fmt: skip


def effects(store: Store) -> None:
    for n, prompt_id in enumerate(PROMPTS):
        for metric in METRICS:
            for place, (neuron, claim) in enumerate(CLAIMED[metric].items(), 1):
                store._insert("effects", [{"prompt_id": prompt_id, "ranking": metric, "layer": neuron[0],
                                           "neuron": neuron[1], "place": place,
                                           "activation": -2.0 if neuron == (5, 2) else 2.0, "edited": 0.0,
                                           "delta_logit": (n + 1) * MEASURED[neuron], "delta_logp": 0.875,
                                           "delta_contrast": None, "predicted": claim, "kind": "mean"}])  # fmt: skip
        for ranking in ("dla", "matched"):
            for mode in ("keep", "drop"):
                for k, m in ((0, 0.0), (2, 0.25), (1632, 1.0)):
                    share = m if mode == "keep" else 1 - m
                    store._insert("curves", [{"prompt_id": prompt_id, "ranking": ranking, "k": k, "mode": mode, "m": share,
                                              "logit": 3 + (n + 1) * share}])  # fmt: skip


def fill(store: Store) -> None:
    texts(store)
    peaks(store)
    influence(store)
    effects(store)
    store._insert("statistics", STATISTICS)
    store._insert("left_out", [{"stage": "partials", "prompt_id": PROMPTS[1], "layer": 3, "position": 2}])


def run_of(folder: Path, fill: Callable[[Store], Any], **manifest: Any) -> RunPaths:
    """A run folder with what `fill` puts in its store."""
    paths = RunPaths(folder / "20260101-000000-x-0")
    paths.folder.mkdir(parents=True)
    content = {"run_id": paths.run_id, "fingerprint": "0", "experiment": "neurons", "status": "finished", **manifest}
    paths.manifest.write_text(json.dumps(content))
    with Store(paths.results, SCHEMA) as store:
        fill(store)
    return paths


def set_to(**values: Any) -> dict[str, Any]:
    return {f"neurons.{name}": {"value": value, "source": "flag"} for name, value in values.items()}


def rendered(paths: RunPaths) -> Page:
    """The page with empty figures, which take most of the time that a report takes."""
    none = {name: {"title": name, "caption": "", "source": "data:,"} for name in FIGURES}
    with open_snapshot(paths, SCHEMA) as reader:
        manifest = read_manifest(paths)
        content = command._content(EXPERIMENT, reader, manifest, EXPERIMENT.report(reader, manifest))
    return Page(command._render({**content, "figures": none}))


def printed(shown: list[object]) -> str:
    """As a terminal of 80 columns has it."""
    console = Console(width=80, record=True, markup=False, highlight=False, file=io.StringIO())
    for one in shown:
        console.print(one)
    return console.export_text()


def table(page: Page, section: str, place: int = 0) -> list[list[str]]:
    """The cells of a section's n-th table, its columns first."""
    inside = page.html.partition(f'<section id="{section}">')[2].partition("</section>")[0]
    found = re.findall(r"<table>(.*?)</table>", inside, re.DOTALL)[place]
    rows = re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    return [[html.unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL)] for row in rows]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    own = set_to(
        effects=100, cumulative=0.8, max_selected=2000, context="at", skip_first=1, layers=[0, 5], dump="float16"
    )
    return run_of(tmp_path_factory.mktemp("runs"), fill, settings=own)


@pytest.fixture(scope="module")
def page(paths: RunPaths) -> Page:
    return Page(command.write(paths).read_text("utf-8"))


# ---- figures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_a_whole_run_is_filled_and_labelled(name: str, paths: RunPaths) -> None:
    with open_snapshot(paths, SCHEMA) as reader:
        figure = FIGURES[name](gather(reader))
    figure.draw_without_rendering()
    assert figure.axes
    for ax in figure.axes:
        assert ax.get_title("left")
        assert ax.get_xlabel()
        assert ax.get_ylabel()
        assert ax.has_data()
    assert set(FIGURES) == set(CAPTIONS)


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_of_an_empty_run_says_so(name: str) -> None:
    figure = FIGURES[name](FigureData())
    (text,) = [text.get_text() for ax in figure.axes for text in ax.texts]
    assert text.startswith("not measured\n(needs")


def test_points_are_claims_and_effects_of_every_neuron_and_prompt(paths: RunPaths) -> None:
    with open_snapshot(paths, SCHEMA) as reader:
        data = gather(reader)
    wanted = {m: {(c, (n + 1) * MEASURED[k]) for n in range(4) for k, c in of.items()} for m, of in CLAIMED.items()}
    assert {m: set(points) for m, points in data.points.items()} == wanted
    assert data.num_points == {"dla": 8, "act_grad": 8}


def test_a_drawn_curve_is_of_all_prompts_together_and_no_small_span_upsets_it(tmp_path: Path) -> None:
    """The mean of m(k) over prompts was −19 where one of ten prompts moved by .003 of a logit in all."""

    def narrow(store: Store) -> None:
        for prompt_id, none, some, whole in (("a", 1.0, 2.0, 5.0), ("b", 1.0, 3.0, 1.001)):
            for k, value in ((0, none), (2, some), (9, whole)):
                m = (value - none) / (whole - none)
                store._insert("curves", [{"prompt_id": prompt_id, "ranking": "dla", "k": k, "mode": "keep", "m": m,
                                          "logit": value}])  # fmt: skip

    with open_snapshot(run_of(tmp_path, narrow), SCHEMA) as reader:
        drawn = {r["k"]: r["m"] for r in gather(reader).curves}
        assert summary.narrow(reader) == (1, 2)
    assert drawn == pytest.approx({2: 1.5 / 2.0005, 9: 1.0})
    assert np.mean([0.25, 2 / 0.001]) > 900, "the control: the mean of ratios"


# ---- the page -------------------------------------------------------------------------------------------------


def test_the_strongest_neurons_stand_with_their_claims_and_effects_by_category(page: Page) -> None:
    columns, *rows = table(page, "strongest")
    assert columns == ["neuron", "peaks at", "raises", "lowers", "Σ|Δ|", "prompts", "mean Δ", "claimed by dla",
                       "Δ in <i>one</i>", "Δ in two", "mean peak", "z"]  # fmt: skip
    # Four prompts: effects are 1, 2, 3, 4 times as large; of the first category those of 1 and 3.
    assert rows[0] == ["5.1", "<b>bold</b>", "␣is <b>bold</b>", "␣are \\x1b[2J", "12.50", "4", "−3.125", "−1.750", "−2.500",
                       "−3.750", "1.50", "30.5"]  # fmt: skip
    assert [row[0] for row in rows] == ["5.1", "5.2", "0.7"]
    assert rows[2][5:8] == ["4", "−0.156", "–"], "dla never names it: no claim"


def test_prompts_are_the_surest_a_typical_one_and_the_least_with_what_every_metric_claims(page: Page) -> None:
    section = page.html.partition('<section id="prompts">')[2].partition("</section>")[0]
    titles = [html.unescape(t) for t in re.findall(r"<h3>(.*?)</h3>", section, re.DOTALL)]
    assert [t.split(",")[0] for t in titles] == ["Prompt p0<img␣src=x␣onerror=e()>", "Prompt p2", "Prompt p3"]
    columns, *rows = table(page, "prompts", 0)
    assert columns[4:] == ["place by dla", "measured Δ", "dla claims", "act_grad claims"]
    assert rows[0] == ["5.1", "␣is <b>bold</b>", "␣are \\x1b[2J", "2.00", "1", "−1.250", "−1.750", "−1.188"]
    assert rows[1][:4] == ["5.2", "␣are \\x1b[2J", "␣is <b>bold</b>", "−2.00"], "below 0 it raises what it else lowers"
    assert rows[2][4:] == ["–", "−0.062", "–", "−0.094"]
    assert "p = 0.9, rank 1, logit 15.25, 1.50 over the best other" in page.text


def test_agreement_and_curves_are_what_the_analysis_stored(page: Page) -> None:
    assert table(page, "agreement")[1:] == [
        ["dla", "0.654 [0.601, 0.702]", "0.711 [0.700, 0.722]", "0.812 [0.800, 0.835]", "0.478 [0.444, 0.500]", "4"],
        ["act_grad", "0.967 [0.956, 0.978]", "–", "–", "0.954 [0.933, 0.967]", "4"],
    ]
    assert table(page, "curves")[1:] == [
        ["dla", "0.293 [0.281, 0.302]", "+0.100 [0.092, 0.108]", "<0.001", "0.643 [0.621, 0.657]", "+0.012 [−0.031, 0.056]",
         "0.432"],
        ["matched (control)", "0.193 [0.185, 0.200]", "–", "–", "–", "–", "–"],
    ]  # fmt: skip
    for told in (
        "The neuron that moves the target most is 5.1: set to its mean over the background it changes the logit by 3.125 up or "
        "down, mean over the 4 prompts in which it was measured; where dla names it, by −3.125, and dla claims −1.750.",
        "act_grad 0.97 [0.96, 0.98], dla 0.65 [0.60, 0.70].",
        "Sets kept: dla is furthest from neurons matched by layer and loudness, its area under the curve +0.10 [0.09, 0.11]",
        "Sets changed: no metric does surely better than neurons matched by layer and loudness.",
        "3 of 3 neurons peak on these prompts otherwise than on the background (q < 0.05): 3 higher, 0 lower.",
    ):
        assert told in page.text


def test_what_was_left_out_is_told_with_its_reason(page: Page) -> None:
    rows = {row[0]: row[1:] for row in table(page, "left_out")[1:]}
    assert rows["tokens not counted"][0] == "4 of 12"
    assert rows["layers"][0] == "all but 0, 5"
    assert rows["texts of stage partials"] == ["1", "an activation is no finite number: p1\\x1b[31m"]
    assert rows["selected neurons"][0] == "cut: dla in 4 of 4 prompts"
    assert "The set that holds the cumulative share of |influence| was cut: dla in 4 of 4 prompts." in page.text
    assert rows["neurons not changed"][0] == "12 of 12 prompts × neurons were"
    assert "neurons.context = at" in rows["earlier positions"][1]


def test_prompts_tokens_and_names_are_text_whatever_they_look_like(page: Page) -> None:
    assert "<script>alert(1)</script>\\x1b[2J\\x1b]0;owned\\x07 {{ 7 * 7 }} [red]$x$[/red]\\x202e" in page.text
    for raw in ("<script", "<b>", "<i>", "<img src=x", "\x1b", "\x07", "\u202e"):
        assert raw not in page.html
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "b", "i", "iframe", "link", "object"} & tags
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
    sources = [str(a["src"]) for tag, a in page.tags if tag == "img"]
    assert all(s.startswith("data:image/svg+xml;base64,") for s in sources)


def test_the_terminal_shows_hostile_tokens_as_text_and_keeps_to_its_width(paths: RunPaths) -> None:
    with open_snapshot(paths, SCHEMA) as reader:
        shown = EXPERIMENT.render(reader, read_manifest(paths))
    told = printed(shown)
    assert max(map(len, told.splitlines())) <= 80
    assert "\x1b" not in told
    assert "\\x1b[2J" in told
    assert "[bold]x[/bold]" in told
    assert "-3.125 │ -1.750" in told
    assert "0.65 [0.60, 0.70] │  0.48" in told


def test_a_token_of_dozens_of_signs_is_cut_and_a_name_is_not() -> None:
    assert summary.shown_token("\n" + 20 * "\t") == "\\x0a\\x09\\x09\\x09\\x0…"
    assert summary.shown_token(" Austin") == "␣Austin"
    assert summary.shown_text("p" * 99) == "p" * 99


def test_links_within_the_page_lead_somewhere_and_the_method_is_told(page: Page) -> None:
    ids = [a["id"] for _, a in page.tags if a.get("id")]
    links = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert links <= set(ids)
    assert len(ids) == len(set(ids))
    assert {"strongest", "prompts", "agreement", "curves", "influence", "background", "left_out"} <= links
    for part in (method.SOURCES, method.QUESTION, *(meaning for _, meaning in method.TERMS), *method.LIMITS):
        assert part in page.text


# ---- what is not there ----------------------------------------------------------------------------------------


def test_an_empty_run_says_that_nothing_was_measured(tmp_path: Path) -> None:
    page = Page(command.write(run_of(tmp_path, lambda store: None)).read_text("utf-8"))
    assert page.text.count("not measured") >= 7
    assert "No effect yet (stage influence is not among the stages of this run" in page.text
    with open_snapshot(RunPaths(only_run(tmp_path)), SCHEMA) as reader:
        assert EXPERIMENT.render(reader, read_manifest(RunPaths(only_run(tmp_path)))) == []


def test_a_run_of_the_stage_dump_alone_has_a_page(tmp_path: Path) -> None:
    page = rendered(run_of(tmp_path, texts, settings=set_to(dump="bfloat16", skip_first=1)))
    rows = {row[0]: row[1:] for row in table(page, "left_out")[1:]}
    assert rows["tokens not counted"][0] == "4 of 12"
    assert "bfloat16" in rows["digits of dumped activations"][1]


def test_without_effects_contributions_stand_in_their_place_and_say_so(tmp_path: Path) -> None:
    def without(store: Store) -> None:
        texts(store)
        peaks(store)
        influence(store)

    paths = run_of(tmp_path, without, settings=set_to(effects=0))
    page = rendered(paths)
    columns, *rows = table(page, "prompts", 0)
    assert columns[5:] == ["measured Δ", "dla contributes", "act_grad contributes"]
    assert rows[0][4:] == ["1", "–", "+1.750", "+1.188"]
    assert "Effects were not measured: what a metric ascribes stands there" in page.text
    with open_snapshot(paths, SCHEMA) as reader:
        told = printed(EXPERIMENT.render(reader, read_manifest(paths)))
    assert "furthest from the background" in told
    assert "│      1.50 │         0.50 │ 30.5 │" in told
    assert "mean Δ" not in page.html.partition('<section id="strongest">')[2].partition("</section>")[0]


def test_without_a_background_the_page_says_so_and_what_neurons_were_set_to(tmp_path: Path) -> None:
    def without(store: Store) -> None:
        texts(store)
        peaks(store, has_background=False)
        influence(store)
        effects(store)

    page = rendered(run_of(tmp_path, without, settings=set_to(background="off")))
    assert page.text.count("not measured: there is no background (neurons.background)") == 2
    assert "set to its mean over the prompts themselves, as there is no background" in page.text


def test_a_sequence_is_told_in_nats(tmp_path: Path) -> None:
    def sequence(store: Store) -> None:
        texts(store)
        influence(store, "sequence")
        effects(store)

    page = rendered(run_of(tmp_path, sequence))
    assert "it changes the log-probability in nats by 0.875" in page.text
    assert table(page, "strongest")[1][6] == "+0.875"


def test_a_real_run_is_reported_with_its_own_numbers(tmp_path: Path) -> None:
    told = harness("run", "neurons", "--limit", 4, "--neurons.background", "off", "--neurons.sanity.num_prompts", 1,
                   "--neurons.effects", 10, "--neurons.curve", "1,10", "--paths.runs", tmp_path)  # fmt: skip
    assert told.code == 0, told.err
    paths = RunPaths(only_run(tmp_path))
    page = rendered(paths)
    with open_snapshot(paths, SCHEMA) as reader:
        stored = summary.stored_rows(reader)
        for row in table(page, "agreement")[1:]:
            assert row[1] == summary.interval_told(stored["agreement", row[0], "spearman"]).replace("-", "−")
        for r in summary.strongest(reader, 3):
            (row,) = (x for x in table(page, "strongest")[1:] if x[0] == f"{r['layer']}.{r['neuron']}")
            assert row[6] == summary.change_told(r["mean"]).replace("-", "−")
        loudest = reader.query("SELECT layer, neuron FROM neurons ORDER BY mean_peak DESC LIMIT 1")
    assert "This model's neurons were written into it" in page.text
    rows = {row[0]: row for row in table(page, "strongest")[1:]}
    # The planted truth: the key neuron writes " heart", and does less than dla claims; the decoy is loud, and moves nothing.
    assert rows["5.256"][2].startswith("␣heart")
    measured, claimed = (float(rows["5.256"][n].replace("−", "-")) for n in (6, 7))
    assert claimed < measured < 0
    assert loudest == [{"layer": 3, "neuron": 256}]
    assert "3.256" not in rows


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
