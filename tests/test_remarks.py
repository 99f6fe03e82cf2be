"""What a run says of itself: each kind with numbers by hand on both sides of its threshold, and else nothing."""

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import pytest

from harness.experiments import remarks as shared
from harness.experiments.gravity import remarks
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.remarks import Remark, lines, of_certificate
from harness.run import Manifest
from harness.store import Reader, Row, Store
from tests.commands import saying
from tests.fakes import older_store
from tests.gravity import EXPERIMENT, FIELDS

CHAT: dict[str, Any] = {"model": {"chat_template_sha256": "ab", "dtype": "float32"}}
RAW: dict[str, Any] = {"model": {"chat_template_sha256": None, "dtype": "float32"}}


@pytest.fixture
def said_of(tmp_path: Path) -> Callable[..., list[Remark]]:
    """What is said of a run with these rows."""

    def say(tables: dict[str, list[Row]], manifest: dict[str, Any] | None = None) -> list[Remark]:
        with reading(tmp_path, tables) as reader:
            return remarks_of(reader, saying(manifest))

    return say


def remarks_of(reader: Reader, manifest: Manifest) -> list[Remark]:
    """The experiment's, and those of every certificate, as terminal, report and app join them."""
    return [*EXPERIMENT.remarks(reader, manifest), *of_certificate(reader, manifest)]


@contextmanager
def reading(folder: Path, tables: dict[str, list[Row]]) -> Iterator[Reader]:
    with Store(folder / "results.duckdb", SCHEMA) as store:
        for table in SCHEMA.measured:
            store._con.execute(f"DELETE FROM {table}")
        for table, rows in tables.items():
            store._insert(table, rows)
        store.publish(folder / "live.duckdb")
    with Reader(folder / "live.duckdb", SCHEMA) as reader:
        yield reader


def settings(**values: Any) -> dict[str, Any]:
    return {
        "experiment": "gravity",
        "settings": {name.replace("__", "."): {"value": value} for name, value in values.items()},
    }


def answers(texts: list[str], condition: str = "baseline", mode: str = "greedy", ends: str = "stop") -> list[Row]:
    return [
        {"prompt_id": f"p{n}", "condition": condition, "mode": mode, "sample_id": 0, "token_ids": [1], "text": text,
         "answer": text.partition("\n")[0], "finish_reason": ends}
        for n, text in enumerate(texts)
    ]  # fmt: skip


def verdicts(says: list[bool], condition: str = "negative", mode: str = "greedy") -> list[Row]:
    return [
        {"prompt_id": f"p{n}", "condition": condition, "mode": mode, "sample_id": 0, "word_present": said}
        for n, said in enumerate(says)
    ]


def pressures(p0: list[float], sequences: list[list[list[int]]] | None = None) -> list[Row]:
    spelled = sequences or [[[7]]] * len(p0)
    return [
        {"prompt_id": f"p{n}", "condition": "baseline", "p_sem": p, "sequences": s}
        for n, (p, s) in enumerate(zip(p0, spelled, strict=True))
    ]


def certified(max_abs: list[float], ok: bool = True) -> list[Row]:
    return [
        {"measurement": f"m{n}", "num_items": 4, "max_abs": a, "max_rel": a, "flips": 0, "near_ties": 0, "tolerance": 1e-5,
         "worst": "p|negative", "repeated": None, "ok": ok}
        for n, a in enumerate(max_abs)
    ]  # fmt: skip


def kinds(found: list[Remark]) -> list[tuple[str, str | None, int, int]]:
    return [(r.kind, r.group, r.number, r.total) for r in found]


# -- answers


def test_empty_answers_are_told_by_condition_and_mode_and_chat_is_advised_where_there_is_a_template(said_of) -> None:
    """Half of a real instruct model's answers to raw text were empty, and the run said nothing."""
    rows = answers(["", " ", "\u00a0\n", *["Paris"] * 7])
    rows += answers(["", *["Paris"] * 9], mode="sample")
    rows += answers([*["Paris"] * 20, ""], condition="negative")  # 1 of 21 is below a tenth
    found = said_of({"completions": rows}, CHAT)
    assert kinds(found) == [("empty", "baseline", 4, 20)]
    assert found[0].share == 0.2
    assert found[0].sentence == "Under baseline, 3 of 10 greedy answers (30 %) and 1 of 10 samples (10 %) are empty."
    assert "--gravity.chat true" in found[0].advice
    wrapped = said_of({"completions": rows}, CHAT | settings(gravity__chat=True))
    assert "chat" not in wrapped[0].advice
    older = {"settings": {"experiment.chat": {"value": True}}}  # before experiments had names
    assert said_of({"completions": rows}, CHAT | older) == wrapped
    assert "chat" not in said_of({"completions": rows}, RAW)[0].advice
    assert [r.sentence for r in wrapped] == [r.sentence for r in found]


def test_what_to_try_for_empty_answers_depends_on_how_they_ended(said_of) -> None:
    at_once = said_of({"completions": answers(["", "", "x", "x", "x"])}, RAW)
    assert "ends its text at once" in at_once[0].advice
    by_newline = said_of({"completions": answers(["\n", "\n\n", "x", "x", "x"], ends="newline")}, RAW)
    assert "stop_at_newline false" in by_newline[0].advice
    # Two of three by a newline are most, one of three is not.
    mixed = answers(["", "\n", "\n", "x", "x"])
    assert "stop_at_newline" in said_of({"completions": mixed}, RAW)[0].advice
    mixed = answers(["", "", "\n", "x", "x"])
    assert "stop_at_newline" not in said_of({"completions": mixed}, RAW)[0].advice


@pytest.mark.parametrize(("number", "is_said"), [(1, False), (2, True)])
def test_a_tenth_of_the_answers_is_the_threshold(said_of, number: int, is_said: bool) -> None:
    assert remarks.EMPTY == remarks.CUT == 0.1
    empty = said_of({"completions": answers([""] * number + ["x"] * (20 - number))}, CHAT)
    assert [r.kind for r in empty] == ["empty"] * is_said
    cut = answers(["x y"] * number, ends="length") + [
        row | {"prompt_id": f"q{n}"} for n, row in enumerate(answers(["x"] * (20 - number)))
    ]
    assert [r.kind for r in said_of({"completions": cut})] == ["cut"] * is_said


def test_four_answers_are_too_few_to_speak_of_a_share(said_of) -> None:
    assert remarks.FEWEST == 5
    assert not said_of({"completions": answers([""] * 4), "psem": pressures([0.1] * 4, [[[1, 2]]] * 4)}, CHAT)
    assert said_of({"completions": answers([""] * 5)}, CHAT)


def test_cut_answers_name_the_setting_to_raise_and_an_answer_with_a_newline_is_whole(said_of) -> None:
    rows = answers(["one two"] * 5 + ["one\ntwo"] * 5, ends="length")
    rows += answers(["one"] * 10, mode="sample")
    limits = settings(gravity__max_new_tokens_greedy=8, gravity__max_new_tokens_samples=10)
    (found,) = said_of({"completions": rows}, limits)
    assert kinds([found]) == [("cut", "baseline", 5, 10)]
    assert "`--gravity.max_new_tokens_greedy 16`" in found.advice
    assert "samples" not in found.advice
    both = [*rows, *answers(["one two"] * 10, condition="negative", mode="sample", ends="length")]
    assert "max_new_tokens_samples 20" in said_of({"completions": both}, limits)[1].advice
    assert "Try" not in said_of({"completions": rows})[0].advice  # a manifest that does not say the limit


@pytest.mark.parametrize(
    ("says", "told"),
    [([False] * 6, "none of 6 greedy answers says X"), ([True] * 6, "each of 6 greedy answers says X"),
     ([False] * 5 + [True], None), ([False] * 4, None)],
)  # fmt: skip
def test_answers_that_all_end_alike_leave_nothing_to_compare(said_of, says: list[bool], told: str | None) -> None:
    found = said_of({"detections": verdicts(says) + verdicts([False] * 9, "baseline")})
    assert [r.kind for r in found] == ["one_outcome"] * (told is not None)
    if told:
        assert told in found[0].sentence
        assert found[0].share == (1.0 if says[0] else 0.0)
        assert ("pull less" if says[0] else "pull more") in found[0].advice
    rows = verdicts(says) + verdicts([True, False] * 5, mode="sample")
    assert "samples" not in " ".join(lines(said_of({"detections": rows})))


# -- pressure


@pytest.mark.parametrize(("inside", "is_said"), [(19, True), (18, False)])
def test_p0_nearly_all_in_one_bin_allow_no_curve(said_of, inside: int, is_said: bool) -> None:
    """All 100 prompts of a real run were under .2."""
    assert remarks.ONE_BIN == 0.95
    found = said_of({"psem": pressures([0.01, *[0.1999] * (inside - 1), *[0.2] * (20 - inside)])})
    assert kinds(found) == [("one_bin", None, inside, 20)] * is_said
    if is_said:
        assert "19 of 20 prompts (95 %) have a P0 in [0, .2); all lie from 0.010 to 0.200." in found[0].sentence
    high = said_of({"psem": pressures([0.9] * 6)})
    assert "[.8, 1]" in high[0].sentence
    assert "harder" in high[0].advice


@pytest.mark.parametrize(("number", "is_said"), [(2, True), (1, False)])
def test_targets_that_the_tokenizer_splits_are_those_without_a_spelling_of_one_token(
    said_of, number: int, is_said: bool
) -> None:
    assert remarks.SPLIT == 0.1
    whole, split = [[1, 2], [7]], [[1, 2], [1, 3, 4]]
    rows = pressures([0.05, 0.3, 0.5, 0.7, 0.9] * 4, [split] * number + [whole] * (20 - number))
    rows += [row | {"condition": "negative"} for row in rows]  # the same targets again
    found = said_of({"psem": rows})
    assert kinds(found) == [("split", None, number, 20)] * is_said


def fitted(p0: list[float], slope: tuple[float, float] | None, says: list[bool] | None = None) -> dict[str, list[Row]]:
    """A run with psem, samples and an analysis that found this interval of the slope, or no fit."""
    row = {
        "condition": "negative",
        "measured": "",
        "step_kind": "",
        "grouping": "all",
        "patch": "",
        "layer": -1,
        "head": -1,
    }
    statistics = [row | {"analysis": "rates", "measure": "violation_rate", "value": 0.5}]
    if slope is not None:
        low, high = slope
        statistics.append(row | {"analysis": "fit", "measure": "slope", "value": 0.0, "low": low, "high": high})
    says = says or [n % 2 == 0 for n in range(len(p0))]
    return {"psem": pressures(p0), "detections": verdicts(says, mode="sample"), "statistics": statistics}


SPREAD = [0.1, 0.3, 0.5, 0.7, 0.85, 0.9]
"""Over .8 of the axis, so that the slopes ±2.5 leave 5 × .8 = 4 logits open."""


@pytest.mark.parametrize(("slope", "is_said"), [((-2.51, 2.5), True), ((-2.49, 2.5), False), (None, True)])
def test_a_slope_that_is_nearly_free_and_a_fit_that_does_not_exist_are_told(
    said_of, slope: tuple[float, float] | None, is_said: bool
) -> None:
    assert remarks.WIDE == 4.0
    found = said_of(fitted(SPREAD, slope))
    assert kinds(found) == [("fit", "negative", 6, 6)] * is_said
    if is_said:
        assert "P0 from 0.100 to 0.900" in found[0].sentence
        assert ("there is no fit" in found[0].sentence) is (slope is None)
    # Over a tenth of the axis the same interval leaves a tenth of the logits open.
    near = said_of(fitted([0.10, 0.12, 0.14, 0.16, 0.17, 0.18], (-2.51, 2.5)))
    assert [r.kind for r in near] == ["one_bin"]


def test_no_fit_is_not_remarked_upon_before_the_analysis_nor_where_all_samples_end_alike(said_of) -> None:
    assert "fit" not in [r.kind for r in said_of(fitted(SPREAD, None) | {"statistics": []})]
    assert [r.kind for r in said_of(fitted(SPREAD, None, [False] * 6))] == ["one_outcome"]


# -- the certificate


@pytest.fixture
def with_certificate(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Runs have this certificate, and these comparisons behind it, from now on; however a store keeps them."""
    tables, query = Reader.tables, Reader.query

    def give(rows: list[Row] = (), items: list[Row] | None = None) -> None:  # type: ignore[assignment]
        def asked(self: Reader, sql: str, params: Any = None) -> list[Row]:
            if "FROM sanity_items" in sql:
                return list(items or ())
            return list(rows) if "FROM sanity" in sql else query(self, sql, params)

        more = ["sanity", *([] if items is None else ["sanity_items"])]
        monkeypatch.setattr(Reader, "query", asked)
        monkeypatch.setattr(Reader, "tables", lambda self: [*tables(self), *more])

    return give


def test_a_measurement_over_half_of_its_tolerance_is_near_and_one_beyond_it_is_not_called_near(
    said_of, with_certificate
) -> None:
    assert shared.NEAR == 0.5
    with_certificate(certified([9e-6, 5.1e-6, 4.9e-6, 0.0]))
    found = said_of({})
    assert kinds(found) == [("certificate", None, 2, 4)]
    assert "m0 9.0e-06 of 1e-05, m1 5.1e-06 of 1e-05." in found[0].sentence
    assert "--num-prompts" in found[0].advice
    assert "float32" in said_of({}, {"model": {"dtype": "bfloat16"}})[0].advice
    with_certificate([*certified([2e-5], ok=False), *certified([1e-6])])
    assert said_of({}) == []  # one that disagrees is told elsewhere
    with_certificate([row | {"max_abs": None} for row in certified([0.0])])  # nothing of it was compared
    assert said_of({}) == []


def test_a_measurement_that_the_certificate_left_out_whole_is_named(said_of, with_certificate) -> None:
    with_certificate(items=[
        {"measurement": m, "left_out": gone}
        for m, gone in (("lens", True), ("patching", True), ("patching", True), ("lens", False), ("p_sem", None))
    ])  # fmt: skip
    (found,) = said_of({})
    assert kinds([found]) == [("left_out", None, 1, 3)]
    assert "left out: patching." in found.sentence


# -- any run


def test_a_run_of_the_first_schema_and_a_manifest_that_says_nothing_are_no_failure(tmp_path: Path) -> None:
    older_store(tmp_path / "live.duckdb", 1)
    with duckdb.connect(str(tmp_path / "live.duckdb")) as con:
        con.execute("INSERT INTO completions (prompt_id, condition, mode, sample_id) "
                    "SELECT 'p' || n, 'baseline', 'greedy', 0 FROM range(6) t(n)")  # fmt: skip
        con.execute("INSERT INTO psem (prompt_id, condition) VALUES ('p', 'baseline')")
    for told in ({}, {"settings": None, "model": None}, {"settings": {"gravity.chat": {"value": 3}}, "model": {}}):
        with Reader(tmp_path / "live.duckdb", SCHEMA) as reader:
            assert kinds(remarks_of(reader, saying(told))) == [("empty", "baseline", 6, 6)]


def test_nothing_is_said_of_a_run_in_which_nothing_is_wrong_or_nothing_was_measured(said_of) -> None:
    assert said_of({}) == []
    fine = fitted(SPREAD, (1.0, 3.0))
    fine |= {"completions": answers(["x"] * 20)}
    fine["detections"] += verdicts([True, False] * 3)
    assert said_of(fine, CHAT) == []


def test_conditions_with_the_same_advice_share_it(said_of) -> None:
    rows = answers([""] * 6) + answers([""] * 6, condition="negative")
    found = said_of({"completions": rows, "psem": pressures([0.1] * 6)}, CHAT)
    told = lines(found)
    assert len(found) == 3
    assert len(told) == 2
    assert told[0].startswith("Under baseline, 6 of 6 greedy answers (100 %) are empty. Under negative, 6 of 6")
    assert told[0].count("Try `--gravity.chat true`") == 1
    assert "pressure" in remarks.TITLES[found[2].kind]
    assert lines([]) == []


def test_what_is_to_be_typed_is_there_to_be_typed(said_of) -> None:
    source = "".join(Path(inspect.getfile(module)).read_text("utf-8") for module in (remarks, shared))
    typed = {flag.removeprefix("--") for flag in re.findall(r"`(--[\w.]+)", source) if "{" not in flag}
    assert {"gravity.chat", "model.dtype"} <= typed, "of either module"
    assert typed <= {*list(FIELDS.names), "limit", "prompts", "stages", "gravity.max_new_tokens_"}
