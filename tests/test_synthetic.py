"""The synthetic run is a run like any other: the same files, schema and identities, and the effects it says it has."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths, list_runs, read_manifest, state
from harness.stats import fit_violations
from harness.store import Reader, Store
from harness.text.detect import detect
from tests import synthetic
from tests.synthetic import OTHER, PLANTED, Shape

SMALL = Shape(40, 3, 2, 4, ("baseline", "negative", "reframed"), num_bootstraps=100)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return synthetic.write(tmp_path_factory.mktemp("runs"), SMALL)


@pytest.fixture(scope="module")
def reader(paths: RunPaths):
    with Reader(paths.live, SCHEMA) as reader:
        yield reader


def test_the_folder_is_a_finished_run_with_every_table_filled(paths: RunPaths, reader: Reader) -> None:
    (entry,) = list_runs(paths.folder.parent)
    assert entry.problem is None
    assert entry.facts()["prompts"] == 40
    assert state(read_manifest(paths)) == "finished"
    counts = {name: reader.query(f"SELECT count(*) AS n FROM {name}")[0]["n"] for name in SCHEMA.tables}
    assert {name for name, n in counts.items() if not n} == {"artifacts", "batches"}
    assert counts["attention"] == counts["lens"] == 40 * 3 * 2 * 3  # prompts, conditions, step kinds, layers
    assert counts["detections"] == counts["completions"] == 40 * 3 * 5  # one greedy and four samples
    assert {r["patch"] for r in reader.query("SELECT DISTINCT patch FROM patching")} == set(synthetic.PATCHES)


def test_the_same_shape_gives_the_same_rows_and_another_seed_others(tmp_path: Path) -> None:
    shape = Shape(8, 2, 2, 2, num_bootstraps=50)
    rows = {}
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        with Store(tmp_path / f"{name}.duckdb", SCHEMA) as store:
            synthetic.fill(store, Shape(**{**shape.__dict__, "seed": seed}))
            rows[name] = {t: store.table(t) for t in SCHEMA.tables if t != "events"}  # which hold the time
    assert rows["one"] == rows["again"]
    assert rows["one"] != rows["other"]
    assert rows["one"]["prompts"] == rows["other"]["prompts"]


def test_the_planted_fit_is_recovered(tmp_path: Path) -> None:
    with Store(tmp_path / "t.duckdb", SCHEMA) as store:
        synthetic.fill(store, Shape(600, 1, 1, 16, ("baseline", "negative", "reframed"), mechanism=False))
        for condition, (intercept, slope) in (("negative", PLANTED["negative"]), ("reframed", OTHER)):
            rows = store.query("SELECT p0, num_violations AS k, num_samples AS n FROM violation v "
                               "JOIN suppression s USING (prompt_id, condition) WHERE condition = ?", [condition])  # fmt: skip
            p0, k, n = (np.array([float(r[c]) for r in rows]) for c in ("p0", "k", "n"))
            fit = fit_violations(p0, k, n)
            assert fit is not None
            assert fit.slope_interval[0] < slope < fit.slope_interval[1]
            assert fit.intercept_interval[0] < intercept < fit.intercept_interval[1]
            stored = {r["measure"]: r["value"] for r in store.query(
                "SELECT measure, value FROM statistics WHERE analysis = 'fit' AND condition = ?", [condition])}  # fmt: skip
            assert stored["slope"] == pytest.approx(fit.slope, abs=1e-9)


def test_the_verdicts_are_those_of_the_detector(reader: Reader) -> None:
    tokenizer = Tokenizer.from_file(str(synthetic.ROOT / synthetic.TOKENIZER / "tokenizer.json"))
    rows = reader.query(
        "SELECT c.token_ids, c.text, c.answer, p.target, d.* FROM completions c "
        "JOIN detections d USING (prompt_id, condition, mode, sample_id) JOIN prompts p USING (prompt_id)"
    )
    assert {r["word_present"] for r in rows} == {True, False}
    for row in rows:
        found = detect(row["token_ids"], row["target"], lambda ids: tokenizer.decode(list(ids)))
        assert (found.text, found.answer) == (row["text"], row["answer"])
        assert (found.word_present, found.word_present_full, found.format_ok) == (
            row["word_present"], row["word_present_full"], row["format_ok"],
        )  # fmt: skip
        assert found.first_step == row["first_step"]
        assert [list(o.char_span) for o in found.occurrences] == [list(s) for s in row["char_spans"]]
        assert [list(o.token_span) for o in found.occurrences] == [list(s) for s in row["token_spans"]]


def test_attention_rows_cover_the_context_and_a_span_that_is_missing_is_null(reader: Reader) -> None:
    rows = reader.query(
        "SELECT a.*, len(c.token_ids) AS length FROM attention a JOIN contexts c USING (prompt_id, condition)"
    )
    assert {r["step"] > 0 for r in rows} == {True, False}
    for row in rows:
        assert len(row["mean_row"]) == row["length"] + row["step"]
        assert sum(row["mean_row"]) == pytest.approx(1, abs=1e-5)
        assert row["step_kind"] == "decision" or row["step"] == 0
        assert len(row["iar"]) == len(row["iar_token"]) == 2
    missing = {(r["condition"], m) for r in rows for m in ("nf", "tmf", "pi", "pi_token") if r[m] is None}
    assert missing == {("baseline", m) for m in ("nf", "tmf", "pi", "pi_token")} | {
        ("reframed", m) for m in ("nf", "pi", "pi_token")
    }


def test_contributions_telescope_to_the_final_probability(reader: Reader) -> None:
    rows = reader.query(
        "SELECT d.*, l.p_target, lead(d.p_in) OVER (PARTITION BY prompt_id, condition, step_kind ORDER BY layer) AS following, "
        "p.p_sem FROM decomposition d JOIN lens l USING (prompt_id, condition, step_kind, layer) "
        "JOIN psem p USING (prompt_id, condition)"
    )
    for row in rows:
        assert row["p_in"] + row["attn_contrib"] + row["ffn_contrib"] == pytest.approx(row["p_out"])
        assert row["p_out"] == pytest.approx(row["p_target"])
        assert row["p_out"] == pytest.approx(row["p_sem"] if row["layer"] == 2 else row["following"])


def test_patching_the_last_residual_gives_the_baseline_and_both_outcomes_are_patched_alike(reader: Reader) -> None:
    rows = reader.query(
        "SELECT p.p_sem_patched, b.p_sem FROM patching p JOIN psem b USING (prompt_id) "
        "WHERE patch = 'resid' AND layer = 2 AND b.condition = 'baseline'"
    )
    assert [r["p_sem_patched"] for r in rows] == pytest.approx([r["p_sem"] for r in rows])
    counts = reader.query(
        "SELECT outcome, count(DISTINCT prompt_id) AS n FROM patching JOIN outcomes USING (prompt_id) "
        "WHERE condition = 'negative' GROUP BY outcome"
    )
    assert {r["outcome"] for r in counts} == {"success", "failure"}
    assert len({r["n"] for r in counts}) == 1


def test_the_planted_effects_are_there(reader: Reader) -> None:
    def value(**keys: object) -> float:
        where = " AND ".join(f"{k} = ?" for k in keys)
        (row,) = reader.query(f"SELECT value FROM statistics WHERE {where}", list(keys.values()))
        return row["value"]

    negative = {"condition": "negative", "grouping": "difference"}
    last = {**negative, "measured": "negative", "step_kind": "first", "layer": 2}
    assert value(analysis="suppression", measure="log", **negative) < 0  # failures are suppressed less
    assert value(analysis="decomposition", measure="ffn_contrib", **last) > 0
    assert value(analysis="decomposition", measure="attn_contrib", **last) < 0
    effect = {"analysis": "patching", "measure": "delta_p", "grouping": "all", "layer": 2}
    assert value(patch="resid", **effect) > value(patch="mlp", **effect) > value(patch="kv_question", **effect)


def test_the_command_prints_the_folder_it_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    synthetic.main(["--prompts", "4", "--layers", "1", "--heads", "1", "--samples", "2", "--to", str(tmp_path)])
    folder = Path(capsys.readouterr().out.strip())
    assert read_manifest(RunPaths(folder)).prompts.used == 4
    assert datetime.fromisoformat(str(read_manifest(RunPaths(folder)).created)).tzinfo == UTC
