"""The Detections page: counts and pages of answers by hand, X marked in place, chips that tell what is known."""

from pathlib import Path

import pandas as pd
import pytest
from streamlit.testing.v1 import AppTest

from app.charts.chips import CLOSE, OPEN, in_place
from app.charts.gravity import detections as charts
from app.queries.gravity import View
from app.queries.gravity import detections as ask
from app.queries.gravity import prompts as prompts_of
from app.queries.gravity.detections import Asked
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunEntry, RunPaths
from harness.store import Store
from tests import synthetic
from tests.app.conftest import open_view, page_file
from tests.commands import saying
from tests.synthetic import Shape

PAGE = page_file("detections")
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    """A finished run of 110 prompts with 4 samples each: nine pages of samples a condition."""
    shape = Shape(110, 2, 2, 4, ("baseline", "negative"), mechanism=False, num_bootstraps=50)
    return synthetic.write(tmp_path_factory.mktemp("runs"), shape)


@pytest.fixture
def small(tmp_path: Path) -> RunPaths:
    """Two prompts, four samples: X in the answer; only further on; nowhere; and one without a verdict."""
    paths = RunPaths(tmp_path / "20260101-000000-x-0")
    paths.folder.mkdir()
    paths.manifest.write_text('{"run_id": "x", "fingerprint": "0", "status": "failed"}')
    with Store(paths.results, SCHEMA) as store:
        for name, category in (("a", "facts"), ("b", "idioms")):
            store._insert("prompts", [{"prompt_id": name, "category": category, "question": "?", "target": "milk"}])
            store._insert("contexts", [{"prompt_id": name, "condition": "negative", "text": "", "token_ids": [1]}])
        _answer(store, "a", 0, "milk", present=True, spans=[[0, 4]])
        _answer(store, "a", 1, "tea\nmilk", present=False, full=True, spans=[[4, 8]], finish="length")
        _answer(store, "b", 0, "two teas", present=False, form=False)
        _answer(store, "b", 1, "tea", present=None)
        _events(store)
        store.publish(paths.live)
    return paths


def _answer(
    store: Store,
    prompt_id: str,
    n: int,
    text: str,
    *,
    present: bool | None,
    full: bool | None = None,
    form: bool = True,
    spans: list[list[int]] | None = None,
    finish: str = "stop",
) -> None:
    key = {"prompt_id": prompt_id, "condition": "negative", "mode": "sample", "sample_id": n}
    told = {"token_ids": [1, 2], "text": text, "answer": text.split("\n")[0], "finish_reason": finish,
            "logprobs": [-0.5, -1.0], "margins": [0.1, 0.2]}  # fmt: skip
    store._insert("completions", [key | told])
    if present is not None:
        verdict = {"word_present": present, "word_present_full": present if full is None else full, "format_ok": form,
                   "num_occurrences": len(spans or []), "char_spans": spans or [],
                   "token_spans": [[0, 1]] * len(spans or [])}  # fmt: skip
        store._insert("detections", [key | verdict])


def _events(store: Store) -> None:
    """One item that failed, one that failed and was made good since, and a failure of another stage."""
    for kind, stage, key in (("failed_item", "detect", "b|negative|sample|1"), ("failed_item", "detect", "a|negative|sample|0"),
                             ("recovered_item", "detect", "a|negative|sample|0"), ("failed_item", "psem", "a")):  # fmt: skip
        store.event("error", kind, "no tokens for X", stage, key)


def _view(paths: RunPaths, category: str | None = None, outcome: str | None = None) -> View:
    entry = RunEntry(paths, saying(), None)
    return View(entry, ("negative",), "negative", category, outcome, None, None)


# -- queries


def test_counts_are_of_answers_and_shares_of_those_with_a_verdict(small: RunPaths) -> None:
    found = ask.counts(_view(small), "negative", "sample")
    assert found[["answers", "judged", "present", "elsewhere", "format_ok", "prompts"]].tolist() == [4, 3, 1, 1, 2, 2]
    assert ask.counts(_view(small, category="idioms"), "negative", "sample")["answers"] == 2
    assert ask.counts(_view(small), "negative", "greedy")["answers"] == 0


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        ({}, ["a0", "a1", "b0", "b1"]),
        ({"says": "present"}, ["a0"]),
        ({"says": "absent"}, ["a1", "b0"]),
        ({"form": "ok"}, ["a0", "a1"]),
        ({"form": "not ok"}, ["b0"]),
        ({"finish": "length"}, ["a1"]),
        ({"says": "absent", "finish": "stop"}, ["b0"]),
    ],
)
def test_filters_keep_the_answers_that_they_name_and_the_count_agrees(
    small: RunPaths, asked: dict[str, str], kept: list[str]
) -> None:
    question = Asked("negative", "sample", **asked)
    rows = ask.answers(_view(small), question, 1)
    assert [f"{r.prompt_id}{r.sample_id}" for r in rows.itertuples()] == kept
    assert ask.num_answers(_view(small), question) == len(kept)


def test_pages_together_are_all_answers_once_and_in_order(whole: RunPaths) -> None:
    asked = Asked("negative", "sample")
    pages = [ask.answers(_view(whole), asked, n) for n in range(1, 11)]
    assert [len(p) for p in pages] == [*[50] * 8, 40, 0]
    keys = list(pd.concat(pages)[["prompt_id", "sample_id"]].itertuples(index=False, name=None))
    assert keys == sorted(set(keys))
    assert ask.num_answers(_view(whole), asked) == len(keys) == 440


def test_an_answer_comes_with_its_verdict_or_without_one(small: RunPaths) -> None:
    judged = ask.answer(small, "a", "negative", "sample", 1)
    assert judged is not None
    assert (judged["char_spans"], judged["token_spans"]) == ([[4, 8]], [[0, 1]])
    unjudged = ask.answer(small, "b", "negative", "sample", 1)
    assert unjudged is not None
    assert (unjudged["word_present"], unjudged["token_spans"]) == (None, None)
    assert ask.answer(small, "b", "negative", "sample", 9) is None


def test_a_mapping_error_that_was_made_good_or_is_of_another_stage_is_none(small: RunPaths) -> None:
    assert ask.mapping_errors(small)["item_key"].tolist() == ["b|negative|sample|1"]


def test_violation_rates_are_those_of_judged_samples(small: RunPaths) -> None:
    rows = ask.violations(_view(small), "negative")
    assert rows[["prompt_id", "num_violations", "num_samples", "rate"]].values.tolist() == [
        ["a", 1, 2, 0.5],
        ["b", 0, 1, 0],
    ]
    assert ask.violations(_view(small, category="idioms"), "negative")["prompt_id"].tolist() == ["b"]


# -- charts


def test_x_is_marked_where_the_characters_say_beyond_the_basic_plane_too() -> None:
    text = "🥛 milk, Milk"
    assert in_place(text, [[2, 6], [8, 12]]) == "🥛 ⟦milk⟧, ⟦Milk⟧"
    assert in_place(text, [[8, 12], [2, 6]]) == in_place(text, [[2, 6], [8, 12]])
    assert in_place(text, None) == in_place(text, []) == text
    assert in_place(text, pd.NA) == text  # type: ignore[arg-type]
    assert in_place(None, None) == ""


def test_the_stored_spans_mark_x_and_nothing_else(whole: RunPaths) -> None:
    rows = ask.answers(_view(whole), Asked("negative", "sample", says="present"), 1)
    assert len(rows) > 10
    for row in rows.to_dict("records"):
        marked = in_place(row["text"], row["char_spans"])
        inside = marked.split(OPEN)[1].split(CLOSE)[0]
        assert inside.casefold() == row["target"].casefold()


def test_chips_tell_what_is_known_and_hatch_what_is_not() -> None:
    answer = {"token_ids": [5, 6, 9], "logprobs": [0.0, -0.6931], "margins": [1.5], "token_spans": [[1, 2]]}
    first, second, third = charts.answer_chips(answer, {5: " mi", 6: "lk"})
    assert [c.is_marked for c in (first, second, third)] == [False, True, False]
    assert [c.is_missing for c in (first, second, third)] == [False, False, True]
    assert (first.text, third.text, third.colour) == (" mi", "[9]", "")
    assert "log-probability 0.0000 (p 1.0000) · margin 1.5000 nats" in first.note
    assert "p 0.5000" in second.note
    assert "margin not recorded · part of X" in second.note
    assert float(first.colour.split()[-1][:-1]) == pytest.approx(2 * float(second.colour.split()[-1][:-1]), abs=2e-3)


def test_a_bar_a_rate_where_all_prompts_have_as_many_samples_else_bins() -> None:
    rates = pd.DataFrame({"num_samples": [4, 4, 4], "num_violations": [0, 4, 4], "rate": [0.0, 1.0, 1.0]})
    counts = charts.rate_counts(rates)
    assert counts["n"].tolist() == [1, 0, 0, 0, 2]
    assert charts.rate_histogram(counts, 4)["xAxis"]["data"] == ["0", "1", "2", "3", "4"]
    mixed = charts.rate_counts(rates.assign(num_samples=[4, 8, 4], rate=[0.0, 0.5, 1.0]))
    assert (len(mixed), mixed["n"].sum(), mixed["n"].iloc[-1]) == (20, 3, 1)
    assert charts.rate_histogram(mixed, None)["xAxis"]["data"][0] == "0.00 to 0.05"
    assert charts.rate_counts(rates.head(0)).empty


# -- the page


def _page(root: Path, monkeypatch: pytest.MonkeyPatch, **params: str) -> AppTest:
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    test = open_view(PAGE.stem, **params)
    assert not test.exception, [e.value for e in test.exception]
    return test


def _told(test: AppTest) -> str:
    return "\n".join(str(e.value) for e in [*test.caption, *test.info, *test.text])


def _answers(test: AppTest) -> pd.DataFrame:
    return next(d.value for d in test.dataframe if "X marked" in d.value.columns)


def test_the_page_and_the_filters_come_from_the_address(whole: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    root = whole.folder.parent
    test = _page(root, monkeypatch, page="2")
    first = ask.answers(_view(whole), Asked("negative", "sample"), 2).iloc[0]
    assert tuple(_answers(test)[["prompt_id", "sample_id"]].iloc[0]) == (first["prompt_id"], first["sample_id"])
    assert "Answers 51 to 100 of 440" in _told(test)
    test = _page(root, monkeypatch, says="present", under="baseline", mode="greedy", category="facts")
    assert _answers(test)["word_present"].all()
    assert len(_answers(test)) == ask.num_answers(
        _view(whole, category="facts"), Asked("baseline", "greedy", says="present")
    )


def test_a_page_beyond_the_last_and_a_sample_that_is_not_there_are_put_right(
    whole: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = prompts_of(whole)["prompt_id"].iloc[0]
    test = _page(whole.folder.parent, monkeypatch, page="9", prompt=prompt, sample="3")
    assert "Answers 401 to 440" in _told(test)
    assert next(b for b in test.selectbox if b.label == "Sample").value == 3
    next(b for b in test.selectbox if b.label == "Category").select("facts").run()
    assert not test.exception
    assert test.number_input[0].value == 2, "facts have two pages"
    test = _page(whole.folder.parent, monkeypatch, page="9999", sample="77", prompt=prompt)
    assert len(_answers(test)) > 0


def test_a_chosen_prompt_and_a_pinned_one_show_their_answers_as_data(
    whole: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompts_of(whole)["prompt_id"].tolist()
    root = whole.folder.parent
    assert "Choose a prompt" in _told(_page(root, monkeypatch))
    test = _page(root, monkeypatch, prompt=ids[0], pin=ids[1], mode="greedy")
    assert "Choose a prompt" not in _told(test)
    assert len(test.code) == 2
    assert not any("<b>" in m.value or "<script" in m.value for m in [*test.markdown, *test.caption, *test.info])


def test_errors_and_answers_without_a_verdict_are_told(small: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    test = _page(small.folder.parent, monkeypatch, prompt="b", sample="1")
    metrics = {m.label: m.value for m in test.metric}
    assert (metrics["answers"], metrics["X present"], metrics["mapping errors"]) == ("4", "1", "1")
    assert "1 answers have no verdict" in _told(test)
    assert "no verdict; format not judged" in _told(test)
    with Store(small.results, SCHEMA) as store:
        store._con.execute("DROP VIEW violation")
        store.publish(small.live)
    assert "view violation is missing" in _page(small.folder.parent, monkeypatch).code[0].value
