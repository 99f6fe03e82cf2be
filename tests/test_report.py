"""The report page: whole in itself, harmless whatever a prompt says, true to the store, and honest about what is missing."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from harness.commands import report as command
from harness.errors import EnvironmentFault, RunError
from harness.experiments.gravity import method, report
from harness.experiments.gravity.figures import FIGURES
from harness.experiments.gravity.report import Segment, token_segments
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, read_manifest
from harness.store import Reader, Store, open_snapshot
from tests import synthetic
from tests.gravity import EXPERIMENT
from tests.pages import Page
from tests.synthetic import Shape

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    shape = Shape(60, 4, 4, 8, ("baseline", "negative", "reframed"), num_bootstraps=100)
    return synthetic.write(tmp_path_factory.mktemp("runs"), shape)


@pytest.fixture(scope="module")
def page(paths: RunPaths) -> Page:
    return Page(command.write(paths).read_text("utf-8"))


def run_of(folder: Path, fill: Callable[[Store], Any], **manifest: Any) -> RunPaths:
    """A run folder with what `fill` puts in its store."""
    paths = RunPaths(folder / "20260101-000000-x-0")
    paths.folder.mkdir()
    content = {"run_id": paths.run_id, "fingerprint": "0", "status": "finished", **manifest}
    paths.manifest.write_text(json.dumps(content))
    with Store(paths.results, SCHEMA) as store:
        fill(store)
    return paths


def written(paths: RunPaths) -> Page:
    return Page(command.write(paths).read_text("utf-8"))


def rendered(paths: RunPaths) -> Page:
    """The page with empty figures, which take most of the time that a report takes."""
    none = {name: {"title": name, "caption": "", "source": "data:,"} for name in FIGURES}
    with open_snapshot(paths, SCHEMA) as reader:
        manifest = read_manifest(paths)
        content = command._content(EXPERIMENT, reader, manifest, EXPERIMENT.report(reader, manifest))
    return Page(command._render({**content, "figures": none}))


def test_page_and_figures_are_written_where_the_run_is_or_where_asked_and_are_the_same(
    page: Page, paths: RunPaths, tmp_path: Path
) -> None:
    elsewhere = tmp_path / "a" / "b"
    assert command.write(paths, elsewhere) == elsewhere / "report.html"
    wanted = {f"figures/{name}.{form}" for name in FIGURES for form in ("png", "svg")}
    for folder in (paths.report, elsewhere):
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert files == {"report.html"} | wanted
    for name in wanted:
        assert (elsewhere / name).read_bytes() == (paths.report / name).read_bytes()
    dated = re.compile(r"Written [^.]*\.")
    assert dated.sub("", (elsewhere / "report.html").read_text("utf-8")) == dated.sub("", page.html)
    with Image.open(elsewhere / "figures" / "violation.png") as image:
        assert image.width == 1350


def test_the_page_fetches_nothing_and_runs_nothing(page: Page) -> None:
    tags = [tag for tag, _ in page.tags]
    assert not {"script", "iframe", "object", "embed", "link", "base", "form"} & set(tags)
    for _, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")]
        assert str(attributes.get("src") or "data:").startswith("data:image/svg+xml;base64,"[: len("data:")])
        assert str(attributes.get("href") or "#").startswith("#")
    style = page.html.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"https?://", re.sub(r'src="data:[^"]*"', "", page.html))
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert tags.count("img") == len(FIGURES)
    assert all(a.get("alt") for tag, a in page.tags if tag == "img")


def test_prompts_and_completions_are_shown_as_text_however_they_look(page: Page) -> None:
    for hostile in (
        '<script>alert("question")</script> & <b>bold</b>',
        "<img src=x onerror=alert(1)> {{ 7 * 7 }}",
        "<!-- and",
    ):
        assert hostile in page.text  # as text, which is how a parser gives back what was escaped
        assert hostile not in page.html
    assert "<b>next</b>" in page.text  # in a completion
    assert "facts_<Paris>|negative" in page.text  # in the table `sanity`
    assert "b" not in {tag for tag, _ in page.tags}


def test_the_method_is_told_once_for_the_page_and_the_documentation(
    page: Page, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood in the report's template and in docs/method.md, each in words of its own."""
    assert method.TERMS
    for part in (method.SOURCE, method.QUESTION, *(meaning for _, meaning in method.TERMS), *method.LIMITS):
        assert part in page.text
    told = (ROOT / "docs" / "method.md").read_text("utf-8")
    assert f"\n{method.terms_markdown()}\n" in told
    assert f"\n{method.limits_markdown()}\n" in told
    assert method.QUESTION in told
    monkeypatch.setattr(method, "LIMITS", (*method.LIMITS[:-1], "another"))
    assert method.limits_markdown() not in told, "the control"


def test_links_within_the_page_lead_somewhere(page: Page) -> None:
    ids = {a["id"] for _, a in page.tags if a.get("id")}
    links = {str(a["href"])[1:] for tag, a in page.tags if tag == "a"}
    assert links <= ids
    assert {
        "headline",
        "violation",
        "attention",
        "patching",
        "examples",
        "sanity",
        "method",
        "limits",
        "manifest",
    } <= links


def test_headline_and_tables_hold_the_numbers_of_the_store(page: Page, paths: RunPaths) -> None:
    with Reader(paths.live, SCHEMA) as reader:
        rate = reader.query("SELECT avg(rate) AS r FROM violation WHERE condition = 'negative'")[0]["r"]
        slope = reader.query("SELECT * FROM statistics WHERE measure = 'slope' AND condition = 'negative'")[0]
        lens = reader.query(
            "SELECT * FROM statistics WHERE analysis = 'lens' AND measure = 'p_target' AND layer = 3 AND step_kind = 'first' "
            "AND condition = 'negative' AND measured = 'negative' AND grouping = 'failure'"
        )[0]
        phrasing = reader.query("SELECT * FROM statistics WHERE analysis = 'phrasing' AND measure = 'violation_rate'")[
            0
        ]
    assert f"Under “negative”, {100 * rate:.1f} % [" in page.text
    for row, places in ((slope, 2), (lens, 3), (phrasing, 3)):
        low, value, high = (f"{row[k]:.{places}f}".replace("-", "−") for k in ("low", "value", "high"))
        assert f"{value} [{low}, {high}]" in page.text
    for told in (
        "reframed",
        f"Planted. {EXPERIMENT.planted}",
        "2601.08070",
        "Benjamini–Hochberg",
        "priming where delta < 0 or pi > 0",
    ):
        assert told in page.text


def test_what_to_know_of_a_run_stands_before_its_results_and_commands_are_marked(
    paths: RunPaths, tmp_path: Path
) -> None:
    assert 'id="remarks"' not in rendered(run_of(tmp_path, lambda store: None)).html

    def fill(store: Store) -> None:
        for n in range(6):
            for mode in ("greedy", "sample"):
                store._insert("completions", [{"prompt_id": f"p{n}", "condition": "<b>bold</b>", "mode": mode, "sample_id": 0,
                                               "text": "", "answer": "", "finish_reason": "stop"}])  # fmt: skip

    folder = tmp_path / "empty"
    folder.mkdir()
    page = rendered(run_of(folder, fill, model={"chat_template_sha256": "ab"}))
    told = "Under <b>bold</b>, 6 of 6 greedy answers (100 %) and 6 of 6 samples (100 %) are empty."
    assert told in page.text
    assert "<code>--gravity.chat true</code>" in page.html
    assert "<b>bold" not in page.html
    assert page.html.index('id="remarks"') < page.html.index('id="headline"')


def test_significant_heads_are_counted_and_their_absence_is_said(page: Page, paths: RunPaths, tmp_path: Path) -> None:
    with Reader(paths.live, SCHEMA) as reader:
        heads = reader.query(
            "SELECT q FROM statistics WHERE analysis = 'attention' AND head >= 0 AND measured = condition AND q IS NOT NULL "
            "AND step_kind = 'first' AND measure IN ('iar', 'nf', 'tmf', 'pi')"
        )
    found = sum(r["q"] < 0.05 for r in heads)
    assert found
    assert f"{found:,} of {len(heads):,} differences between failures and successes are significant" in page.text

    def without_findings(store: Store) -> None:
        synthetic.fill(store, Shape(40, 2, 2, 4, num_bootstraps=50))
        store._con.execute("UPDATE statistics SET q = 0.5 WHERE q IS NOT NULL")

    told = rendered(run_of(tmp_path, without_findings)).text
    assert "None of 16 differences between failures and successes is significant" in told
    assert "none is significant" in told


def test_an_empty_run_says_that_nothing_was_measured(tmp_path: Path) -> None:
    page = written(run_of(tmp_path, lambda store: None))
    assert page.text.count("not measured") >= 8
    assert "not checked in this run" in page.text
    assert "No failure to show" in page.text
    assert "Planted." not in page.text
    assert EXPERIMENT.planted not in page.text


def test_a_run_with_only_a_baseline_is_reported(tmp_path: Path) -> None:
    page = written(
        run_of(tmp_path, lambda store: synthetic.fill(store, Shape(20, 2, 2, 4, ("baseline",), num_bootstraps=50)))
    )
    assert "Under “baseline”" in page.text
    assert "no fit" in page.text
    assert "No failure to show" in page.text


def test_a_run_without_mechanism_is_reported_and_its_examples_say_what_is_missing(tmp_path: Path) -> None:
    page = written(
        run_of(tmp_path, lambda store: synthetic.fill(store, Shape(30, 2, 2, 4, mechanism=False, num_bootstraps=50)))
    )
    assert "Lens: not measured." in page.text
    assert "Attention: not measured." in page.text
    assert "mention" in {str(a.get("class")).split()[-1] for tag, a in page.tags if tag == "span"}


def test_nulls_are_dashes_and_never_zeros(tmp_path: Path) -> None:
    def fill(store: Store) -> None:
        synthetic.fill(store, Shape(30, 2, 2, 4, num_bootstraps=50))
        store._con.execute("UPDATE statistics SET value = NULL, se = NULL, low = NULL, high = NULL, p = NULL, q = NULL")
        store._con.execute("UPDATE sanity_items SET max_abs = NULL, flips = NULL, worst = NULL")

    page = rendered(run_of(tmp_path, fill))
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", page.html.partition('id="mechanism"')[2].partition('id="patching"')[0])
    assert cells.count("–") > 20
    assert not [c for c in cells if c.startswith("0.")]


def test_an_unfinished_run_is_reported_with_its_state_and_reason(tmp_path: Path) -> None:
    page = rendered(run_of(tmp_path, lambda store: None, status="failed", reason="ModelError: <none> found"))
    assert "failed (ModelError: <none> found)" in page.text


def test_the_papers_numbers_stand_beside_those_of_its_model_only(page: Page, paths: RunPaths, tmp_path: Path) -> None:
    assert "Beside the paper" not in page.text
    shape = Shape(40, 28, 1, 4, model="Qwen/Qwen2.5-7B-Instruct", num_bootstraps=50)
    beside = rendered(synthetic.write(tmp_path, shape)).text
    for told in ("Beside the paper (arXiv 2601.08070)", "2.27 [2.21, 2.33]", "0.463 (916)", "0.386", "−0.132", "441"):
        assert told in beside


def test_examples_are_twenty_failures_spread_over_categories_and_kinds_strongest_first(paths: RunPaths) -> None:
    with Reader(paths.live, SCHEMA) as reader:
        examples = report._examples(reader)
        again = report._examples(reader)
        failures = reader.query("SELECT p.category, o.taxonomy, s.p1 FROM outcomes o JOIN prompts p USING (prompt_id) "
                                "JOIN suppression s USING (prompt_id, condition) WHERE outcome = 'failure'")  # fmt: skip
    assert examples == again
    assert len({e.prompt["prompt_id"] for e in examples}) == len(examples) <= report.NUM_EXAMPLES
    groups = {(r["category"], r["taxonomy"]) for r in failures}
    first = [(e.prompt["category"], e.prompt["taxonomy"]) for e in examples]
    shown = first[: len(set(first))]
    assert len(set(shown)) == len(shown)  # every group once before any twice
    assert {g[0] for g in groups} == {c for c, _ in first}
    assert examples[0].prompt["p1"] == max(r["p1"] for r in failures)


def test_an_example_shows_the_whole_prompt_its_attention_and_the_word_in_the_answer(paths: RunPaths) -> None:
    with Reader(paths.live, SCHEMA) as reader:
        for example in report._examples(reader):
            key = [example.prompt["prompt_id"], example.prompt["condition"]]
            context = reader.query("SELECT * FROM contexts WHERE prompt_id = ? AND condition = ?", key)[0]
            (row,) = reader.query("SELECT mean_row FROM attention WHERE prompt_id = ? AND condition = ? AND step_kind = 'first' "
                                  "AND layer = ?", [*key, example.attention_layer])  # fmt: skip
            assert "".join(s.text for s in example.context) == context["text"]
            assert sum(s.share or 0 for s in example.context) == pytest.approx(sum(row["mean_row"]))
            mention = "".join(s.text for s in example.context if "mention" in s.spans)
            said = [s.text for s in example.completion if s.spans == ("occurrence",)]
            assert example.prompt["target"] in mention
            assert said == [example.prompt["target"]]
            assert [int(r[0]) for r in example.lens] == [0, 1, 2, 3]


def test_without_token_offsets_an_example_marks_question_and_mention_by_their_words(
    paths: RunPaths, tmp_path: Path
) -> None:
    """As in a run whose store is older than the column."""
    live = tmp_path / "live.duckdb"
    shutil.copy(paths.live, live)
    with Store(live, SCHEMA) as store:
        store._con.execute("UPDATE contexts SET offsets = NULL")
    with Reader(live, SCHEMA) as reader:
        examples = report._examples(reader)
        text = {r["prompt_id"]: r["text"] for r in reader.query("SELECT * FROM contexts WHERE condition = 'negative'")}
    for example in (e for e in examples if e.prompt["condition"] == "negative"):
        assert "".join(s.text for s in example.context) == text[example.prompt["prompt_id"]]
        assert {s.spans: s.text for s in example.context}["question",] == example.prompt["question"]
        assert {s.spans: s.text for s in example.context}["mention",] == example.prompt["target"]
        assert {name for name, _, _ in example.masses} == {"instruction", "negation", "mention", "question"}


def test_tokens_cut_the_text_and_keep_their_attention() -> None:
    shares = [0.4, 0.1, 0.2, 0.1, 0.2]
    offsets = [
        (0, 0),
        (0, 2),
        (2, 3),
        (2, 3),
        (4, 6),
    ]  # a special token, a word, a character of two tokens, a gap, a word
    found = token_segments("ab€ cd!", offsets, shares, {"mention": (1, 3)})
    assert "".join(s.text for s in found) == "ab€ cd!"
    assert [(s.text, s.spans) for s in found] == [
        ("ab", ("mention",)), ("€", ("mention",)), (" ", ()), ("cd", ()), ("!", ())
    ]  # fmt: skip
    assert [s.share for s in found] == [pytest.approx(0.1), pytest.approx(0.3), None, pytest.approx(0.2), None]
    assert [s.shade for s in found] == [pytest.approx(0.5), 1.0, 0.0, 1.0, 0.0]
    assert token_segments("ab", [(0, 2)], None, {}) == [Segment("ab")]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (-0.0004, "0.000"),
        (-0.25, "−0.250"),
        (-123456.7, "−1.23e+05"),
        (0.1235, "0.123"),
    ],
)
def test_numbers_are_written_for_readers(value: float | None, text: str) -> None:
    assert report._number(value) == text


def test_what_cannot_be_read_or_written_is_said(paths: RunPaths, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be written"):
        command.write(paths, tmp_path / "file")
    with pytest.raises(RunError, match="no run"):
        command.write(RunPaths(tmp_path / "nothing"))


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
