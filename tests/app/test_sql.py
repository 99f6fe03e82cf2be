"""The console: it answers what one SELECT asks of one run's snapshot, and can do nothing else."""

import io
import json
import threading
import time
from pathlib import Path

import duckdb
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from streamlit.testing.v1 import AppTest

from app.queries import gravity
from app.queries import sql as asked
from harness import asking
from harness.errors import StoreError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Store, ask_locked, question
from tests import synthetic
from tests.app.conftest import open_view, page_file
from tests.cases import some_of
from tests.synthetic import Shape
from tests.test_asking import RUNAWAY

VIEW = page_file("sql")
EXAMPLES = {**gravity.EXAMPLES, **asked.EXAMPLES}
# Streamlit 1.67 itself still calls what newer packages deprecate.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> RunPaths:
    return synthetic.write(tmp_path_factory.mktemp("runs"), Shape(12, 2, 2, 4, mechanism=True, num_bootstraps=50))


@pytest.fixture(scope="module")
def secret(paths: RunPaths) -> Path:
    """Files beside the run that a query might be after: a table of text, and another run's snapshot."""
    folder = paths.folder.parent / "other"
    folder.mkdir()
    (folder / "secret.csv").write_text("word\nhidden\n")
    pq.write_table(pa.table({"word": ["hidden"]}), folder / "secret.parquet")
    (folder / "secret.json").write_text('{"word": "hidden"}')
    with Store(folder / "results.duckdb", SCHEMA) as other:
        other.publish(folder / "live.duckdb")
    return folder


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder, its size and when it was last written."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()}


REFUSED = (
    "COPY prompts TO '{folder}/out.csv'",
    "COPY (SELECT 1) TO '{folder}/out.parquet' (FORMAT parquet)",
    "COPY prompts FROM '{folder}/secret.csv'",
    "ATTACH '{folder}/live.duckdb' AS other",
    "ATTACH ':memory:' AS other",
    "DETACH run",
    "USE memory",
    "SELECT * FROM read_csv('{folder}/secret.csv')",
    "SELECT * FROM read_csv('/etc/passwd')",
    "SELECT * FROM read_text('/etc/passwd')",
    "SELECT * FROM read_blob('/etc/passwd')",
    "SELECT * FROM read_parquet('{folder}/secret.parquet')",
    "SELECT * FROM parquet_metadata('{folder}/secret.parquet')",
    "SELECT * FROM read_json('{folder}/secret.json')",
    "SELECT * FROM sniff_csv('{folder}/secret.csv')",
    "SELECT * FROM read_duckdb('{folder}/live.duckdb', table_name = 'prompts')",
    "SELECT * FROM glob('{folder}/*')",
    "FROM '/etc/passwd'",
    "FROM '{folder}/secret.csv'",
    "FROM '{folder}/live.duckdb'",
    "FROM 'https://example.com/data.csv'",
    "FROM query('SELECT * FROM read_text(''/etc/passwd'')')",
    "SELECT (SELECT max(content) FROM read_text('/etc/passwd'))",
    "INSTALL httpfs",
    "LOAD httpfs",
    "SET memory_limit = '8GB'",
    "SET lock_configuration = false",
    "SET VARIABLE x = 1",
    "RESET enable_external_access",
    "PRAGMA database_list",
    "PRAGMA threads = 8",
    "CALL enable_logging()",
    "SELECT * FROM enable_logging(storage = 'file', storage_config = {{'path': '{folder}/log'}})",
    "SELECT * FROM enable_profiling(save_location = '{folder}/profile.json')",
    "CREATE TABLE mine AS SELECT 1 AS a",
    "CREATE TEMP TABLE mine (a INT)",
    "CREATE TABLE memory.main.mine (a INT)",
    "CREATE SECRET (TYPE s3)",
    "INSERT INTO prompts SELECT * FROM prompts",
    "UPDATE prompts SET target = 'x'",
    "DELETE FROM prompts",
    "DROP TABLE prompts",
    "ALTER TABLE prompts ADD COLUMN x INT",
    "MERGE INTO prompts USING prompts p ON true WHEN MATCHED THEN DELETE",
    "WITH gone AS (DELETE FROM prompts RETURNING *) SELECT * FROM gone",
    "WITH more AS (INSERT INTO events SELECT * FROM events RETURNING *) SELECT * FROM more",
    "SELECT nextval('event_ids')",
    "EXPORT DATABASE '{folder}/dump'",
    "IMPORT DATABASE '{folder}'",
    "VACUUM",
    "CHECKPOINT",
    "BEGIN",
    "PREPARE p AS SELECT 1",
    "EXPLAIN ANALYZE SELECT 1",
    "SELECT 1; SELECT 2",
    "SELECT 1; DROP TABLE prompts",
    "SELECT getenv('HOME')",
    "",
    "-- nothing",
)


@pytest.mark.parametrize("sql", REFUSED)
def test_what_is_no_reading_of_this_run_is_refused_in_one_line_and_leaves_no_trace(
    sql: str, paths: RunPaths, secret: Path
) -> None:
    before = files(paths.folder.parent)
    with pytest.raises(StoreError) as caught:
        ask_locked(paths.live, SCHEMA, sql.format(folder=secret))
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)
    assert files(paths.folder.parent) == before


def test_a_connection_that_is_not_locked_would_see_the_files(paths: RunPaths, secret: Path) -> None:
    with duckdb.connect(str(paths.live), read_only=True) as con:
        for name in ("secret.csv", "secret.parquet", "secret.json"):
            assert con.execute(f"SELECT * FROM '{secret / name}'").fetchall() == [("hidden",)]


def test_variables_of_the_program_are_no_tables(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    secret_frame = pd.DataFrame({"word": ["hidden"]})
    monkeypatch.setattr(question, "secret_frame", secret_frame, raising=False)
    with duckdb.connect(str(paths.live), read_only=True) as con:
        assert con.execute("SELECT * FROM secret_frame").fetchall() == [("hidden",)], "DuckDB finds it by its name"
    with pytest.raises(StoreError, match="does not exist"):
        ask_locked(paths.live, SCHEMA, "SELECT * FROM secret_frame")


@pytest.mark.parametrize("options", ["", "(FORMAT csv)", "(FORMAT csv, USE_TMP_FILE false)"])
@pytest.mark.parametrize("ending", ["", ".wal", ".wal.recovery"])
def test_a_copy_inside_a_query_cannot_write_to_the_snapshot_either(options: str, ending: str, paths: RunPaths) -> None:
    before = files(paths.folder)
    for where in (paths.live, Path("/proc/self/fd/3")):
        with pytest.raises(StoreError):
            ask_locked(paths.live, SCHEMA, f"WITH x AS (COPY (SELECT 1) TO '{where}{ending}' {options}) SELECT 1")
    assert files(paths.folder) == before


@pytest.mark.parametrize(
    ("sql", "rows"),
    [
        ("SELECT * FROM prompts", 12),
        ("FROM prompts WHERE category <> ''", 12),
        ("WITH x AS (SELECT 1 AS a) SELECT * FROM x -- a comment", 1),
        ("SELECT 1;", 1),
        ("VALUES (1), (2)", 2),
        ("DESCRIBE prompts", 10),
        ("SUMMARIZE prompts", 10),
        ("SELECT 1 AS a, 2 AS a", 1),
        ("SELECT * FROM prompts WHERE false", 0),
        ("SELECT * FROM violation", 24),
    ],
)
def test_what_reads_is_answered(sql: str, rows: int, paths: RunPaths) -> None:
    answer = ask_locked(paths.live, SCHEMA, sql)
    assert len(answer.rows) == rows
    assert not answer.is_cut
    assert len(set(answer.rows.column_names)) == answer.rows.num_columns > 0


def test_an_answer_is_cut_at_so_many_rows_and_says_so(paths: RunPaths) -> None:
    cut, whole = (ask_locked(paths.live, SCHEMA, f"FROM range({n})", max_rows=50) for n in (51, 50))
    assert (len(cut.rows), cut.is_cut) == (50, True)
    assert (len(whole.rows), whole.is_cut) == (50, False)


def test_an_answer_of_big_rows_is_cut_before_it_fills_the_memory(paths: RunPaths) -> None:
    answer = ask_locked(paths.live, SCHEMA, "SELECT repeat('x', 100000) AS x FROM range(5000)", max_rows=5000)
    assert answer.is_cut
    assert 0 < len(answer.rows) < 5000


def test_a_query_is_stopped_when_its_time_is_over_and_the_next_one_is_answered(paths: RunPaths) -> None:
    endless = "SELECT count(*) FROM range(10000000) a, range(10000000) b WHERE a.range + b.range < -1"
    start = time.perf_counter()
    with pytest.raises(StoreError, match=r"stopped after 0\.5 s"):
        ask_locked(paths.live, SCHEMA, endless, limit_s=0.5)
    assert time.perf_counter() - start < 5
    assert ask_locked(paths.live, SCHEMA, "SELECT 1 AS a").rows["a"].to_pylist() == [1]


def test_a_query_of_any_length_or_with_more_memory_than_there_is_ends_in_a_line(paths: RunPaths) -> None:
    with pytest.raises(StoreError, match="20,000 characters"):
        ask_locked(paths.live, SCHEMA, "SELECT '" + "x" * 20_000 + "'")
    with pytest.raises(StoreError, match="Memory"):
        ask_locked(
            paths.live, SCHEMA, "SELECT count(DISTINCT repeat('x', 1000) || range) FROM range(5000000)", limit_s=60.0
        )


def test_csv_and_parquet_can_be_read_back(paths: RunPaths, tmp_path: Path) -> None:
    rows = ask_locked(
        paths.live,
        SCHEMA,
        "SELECT prompt_id, token_ids, spans, INTERVAL 1 DAY AS day, TIMESTAMP '2026-01-02 03:04:05' AS at, NULL AS none "
        "FROM contexts ORDER BY ALL",
    ).rows
    (tmp_path / "a.csv").write_bytes(asked.as_csv(rows))
    table = pd.read_csv(tmp_path / "a.csv")
    assert [json.loads(v) for v in table["token_ids"]] == rows["token_ids"].to_pylist()
    assert [json.loads(v) for v in table["spans"]] == rows["spans"].to_pylist()
    assert table["at"][0] == "2026-01-02 03:04:05"
    (tmp_path / "a.parquet").write_bytes(asked.as_parquet(rows))
    back = pq.read_table(tmp_path / "a.parquet")
    assert back.column_names == rows.column_names
    assert back["token_ids"].to_pylist() == rows["token_ids"].to_pylist()


@pytest.mark.parametrize("title", EXAMPLES)
def test_every_example_is_answered(title: str, paths: RunPaths) -> None:
    assert ask_locked(paths.live, SCHEMA, EXAMPLES[title]).rows.num_columns > 1


# -- the page


def opened(root: Path, monkeypatch: pytest.MonkeyPatch, **params: str) -> AppTest:
    monkeypatch.setenv("OUTPUT_ROOT", str(root))
    test = open_view(VIEW.stem, **params)
    assert not test.exception
    return test


def test_a_query_in_the_address_is_answered_and_a_row_count_is_told(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = opened(paths.folder.parent, monkeypatch, sql="SELECT target FROM prompts ORDER BY target")
    assert len(test.dataframe[-1].value) == 12
    assert any(c.value.startswith("12 rows in") for c in test.caption)


def test_without_a_query_nothing_is_asked_and_an_example_is_a_click_away(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = opened(paths.folder.parent, monkeypatch)
    assert any("Write a query" in i.value for i in test.info)
    test.button(key="example-Rates").click().run()
    assert test.text_area(key="sql").value == EXAMPLES["Rates"]
    assert set(test.dataframe[-1].value["condition"]) == {"baseline", "negative"}


def test_a_wrong_query_is_a_line_and_no_exception(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    test = opened(paths.folder.parent, monkeypatch, sql="SELECT * FROM nowhere")
    assert "nowhere does not exist" in test.code[0].value
    assert "\n" not in test.code[0].value


@pytest.mark.parametrize("what", some_of(RUNAWAY, 2))
def test_a_query_that_runs_away_is_a_line_and_the_page_answers_the_next_one(
    what: str, paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "LIMIT_S", 1.0)
    test = opened(paths.folder.parent, monkeypatch, sql=RUNAWAY[what])
    assert test.code[0].value.startswith("No answer. ")
    assert "\n" not in test.code[0].value
    monkeypatch.setattr(asked, "LIMIT_S", 60.0)
    test.text_area(key="sql").set_value(f"SELECT 6 * 7 AS answer -- after {what}").run()
    assert not test.exception
    assert test.dataframe[-1].value["answer"].to_list() == [42]
    assert psutil.Process().children() == []


def test_a_process_that_dies_while_it_answers_is_a_line_on_the_page(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asked, "LIMIT_S", 300.0)
    is_over = threading.Event()

    def kill_it() -> None:
        while not is_over.wait(0.02):
            for child in psutil.Process().children():
                if child.cpu_times().user > 0.5:
                    child.kill()
                    return

    thread = threading.Thread(target=kill_it)
    thread.start()
    try:
        test = opened(paths.folder.parent, monkeypatch, sql=RUNAWAY["a product of tables"])
    finally:
        is_over.set()
        thread.join()
    assert test.code[0].value.startswith("No answer. the process that answered died: SIGKILL")


def test_text_that_a_spreadsheet_would_compute_is_marked_in_a_file_of_its_own(paths: RunPaths) -> None:
    rows = asking.answer(
        paths.live,
        SCHEMA,
        "SELECT * FROM (VALUES ('=1+1', -1.5, ['=2']), ('plain', 2, NULL), (NULL, -3, []), ('-x', 4, ['a'])) "
        't("=name", number, list)',
    ).rows
    safe, number = asked.for_spreadsheets(rows)
    assert number == 3, "two cells and a name"
    told, marked = (pd.read_csv(io.BytesIO(asked.as_csv(r))) for r in (rows, safe))
    assert told["=name"].to_list()[:2] == ["=1+1", "plain"]
    assert marked["'=name"].to_list()[:2] == ["'=1+1", "plain"]
    assert marked["'=name"].to_list()[3] == "'-x"
    assert marked["number"].to_list() == told["number"].to_list() == [-1.5, 2, -3, 4]
    assert marked["list"].equals(told["list"])


def test_the_page_offers_a_file_for_spreadsheets_and_says_what_it_changes(
    paths: RunPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = opened(paths.folder.parent, monkeypatch, sql="SELECT unnest(['=a', '+b', 'c']) AS word")
    assert any(b.proto.label == "CSV for spreadsheets (2 changed)" for b in test.get("download_button"))


def test_the_columns_of_a_chosen_table_are_listed(paths: RunPaths, monkeypatch: pytest.MonkeyPatch) -> None:
    test = opened(paths.folder.parent, monkeypatch, table="suppression")
    assert list(test.dataframe[0].value["column"]) == ["prompt_id", "condition", "p0", "p1", "delta", "relative", "log"]


def test_the_page_opens_on_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "harness run" in opened(tmp_path, monkeypatch).info[0].value
