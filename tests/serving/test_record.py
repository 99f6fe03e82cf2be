"""`--serve.record`: what is asked and answered, as rows of a run, whatever becomes of the process or its disk."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from harness.commands import record
from harness.errors import EnvironmentFault, SettingsError
from harness.experiments import registry
from harness.experiments.lda.service import app_of
from harness.experiments.requests import KIND, SCHEMA
from harness.run import RunPaths, read_manifest
from harness.serving.record import Exchange, Recording
from harness.store import Reader, Store, open_snapshot
from tests.commands import harness, only_run, refused, run_folders, saying
from tests.faults import injector
from tests.serving.live import (
    ROOT,
    Live,
    Process,
    amplifier_of,
    environment,
    head,
    process,
    raw,
    served,
    serving,
    until,
)
from tests.serving.recordings import exchange, recording_in


class Kept:
    """A writer into memory, which can be held, and can fail."""

    def __init__(self) -> None:
        self.rows: dict[int, Exchange] = {}
        self.calls: list[int] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.error: Exception | None = None

    def __call__(self, first: int, exchanges: Sequence[Exchange]) -> None:
        assert self.may_go_on.wait(60)
        self.calls.append(len(exchanges))
        if self.error is not None:
            raise self.error
        self.rows |= {first + n: one for n, one in enumerate(exchanges)}

    @property
    def last(self) -> dict[str, Any]:
        return self.rows[max(self.rows)].row()


# ---- from memory to a writer ------------------------------------------------------------------------------------


def test_every_exchange_is_written_once_in_its_order_and_the_last_ones_at_the_end() -> None:
    kept = Kept()
    with Recording(kept, every_s=3600.0) as recording:
        for n in range(2_500):
            recording.add(exchange(n))
        until(lambda: kept.rows)  # many are not kept waiting for the hour
    assert [json.loads(one.row()["answer"])["n"] for _, one in sorted(kept.rows.items())] == list(range(2_500))
    assert sorted(kept.rows) == list(range(1, 2_501))
    assert (recording.num_written, recording.num_waiting) == (2_500, 0)
    assert sum(kept.calls) == 2_500


def test_few_are_written_when_their_time_has_come() -> None:
    kept = Kept()
    with Recording(kept, every_s=0.01) as recording:
        recording.add(exchange(0))
        until(lambda: kept.rows)


def test_who_asks_never_waits_for_the_disk_and_is_refused_where_it_is_behind() -> None:
    kept = Kept()
    kept.may_go_on.clear()
    with Recording(kept, every_s=0.001, most=3) as recording:
        for n in range(3):
            assert recording.refusal() is None
            recording.add(exchange(n))
        refusal = recording.refusal()
        assert refusal is not None
        assert (refusal.status, refusal.reason, refusal.retry_after_s) == (503, "recorder", 1)
        recording.add(exchange(3))  # one that had begun before ends all the same
        kept.may_go_on.set()
        until(lambda: recording.refusal() is None)
    assert len(kept.rows) == 4


def test_bytes_that_wait_are_bounded_too() -> None:
    kept = Kept()
    kept.may_go_on.clear()
    with Recording(kept, every_s=0.001, most_bytes=1_000) as recording:
        recording.add(exchange(0, num_bytes=999))
        assert recording.refusal() is None
        recording.add(exchange(1, num_bytes=1))
        assert recording.refusal() is not None
        kept.may_go_on.set()
        until(lambda: recording.refusal() is None)


def test_what_cannot_be_written_is_kept_and_refuses_requests_until_it_can() -> None:
    kept = Kept()
    kept.error = EnvironmentFault("the disk is full")
    with Recording(kept, every_s=0.001) as recording:
        recording.add(exchange(0))
        until(lambda: recording.problem is not None)
        refusal = recording.refusal()
        assert refusal is not None
        assert "the disk is full" in str(refusal)
        recording.add(exchange(1))
        assert not kept.rows
        kept.error = None
        until(lambda: recording.refusal() is None and recording.num_written == 2)
    assert sorted(kept.rows) == [1, 2]


def test_the_end_does_not_wait_for_a_disk_that_stays_full() -> None:
    kept = Kept()
    kept.error = EnvironmentFault("the disk is full")
    with Recording(kept, every_s=3600.0) as recording:
        recording.add(exchange(0))
    assert (recording.num_written, recording.num_waiting) == (0, 1)
    assert recording.refusal() is not None


# ---- from a service to memory -----------------------------------------------------------------------------------


@contextmanager
def overheard(kept: Kept, keys: tuple[bytes, ...] = (), **serve: Any) -> Iterator[tuple[Live, Recording]]:
    service = app_of(amplifier_of(**serve), keys)
    with Recording(kept, every_s=0.01) as recording:
        service.record(recording)
        with serving(service) as live:
            yield live, recording


def row_of(kept: Kept, n: int) -> dict[str, Any]:
    """The row of the n-th request; its client had its answer a moment before."""
    until(lambda: n in kept.rows)
    return kept.rows[n].row()


def test_rows_hold_what_was_asked_and_what_the_client_got() -> None:
    kept = Kept()
    with overheard(kept) as (live, _):
        asked = [
            ("/generate", {"prompt": "hello", "seed": 1}),
            ("/generate_lda", {"prompt": "héllo", "alpha": 1.5}),
            ("/generate_lda_batch", {"prompts": ["a", ""], "alphas": [0, 1], "seed": 2}),
            ("/v1/completions", {"model": "lda", "prompt": ["a", "b"], "n": 2, "max_tokens": 4, "logprobs": 0}),
            ("/rollouts", {"pair_sha256": "0", "contexts": [], "asks": []}),
            ("/generate_lda", {"prompt": "a", "alpha": "much"}),
            ("/generate_lda", {"prompt": ""}),
            ("/v1/completions", {"model": "gpt", "prompt": "a"}),
        ]
        for n, (path, body) in enumerate(asked, 1):
            response = live.post(path, **body)
            row = row_of(kept, n)
            assert (row["path"], row["status"]) == (path, response.status_code)
            assert row["answer"] == response.text
            assert json.loads(row["request"]) == body
            assert row["is_whole"]
            assert 0 < row["seconds"] < 60
            assert isinstance(row["time"], datetime)
        assert [one.status for _, one in sorted(kept.rows.items())] == [200] * 4 + [409, 422, 400, 404]
        live.client.get("/v1/models")
        live.client.get("/metrics")
        live.made("/generate_lda", prompt="last")
        assert json.loads(row_of(kept, len(asked) + 1)["request"]) == {"prompt": "last"}, "to look is no request"
        until(lambda: live.metric("harness_recorded_requests") == len(asked) + 1)


def test_a_stream_is_one_row_with_its_whole_text() -> None:
    kept = Kept()
    body = {"model": "lda", "prompt": ["hello", "b"], "n": 2, "max_tokens": 8, "seed": 4, "stop": ["zz"]}
    with overheard(kept) as (live, _):
        options = {"stream": True, "stream_options": {"include_usage": True}}
        response = live.post("/v1/completions", **body, **options)
        events = [json.loads(line[6:]) for line in response.text.split("\n\n") if line.startswith("data: {")]
        texts = ["", "", "", ""]
        for choice in (choice for event in events for choice in event["choices"]):
            texts[choice["index"]] += choice["text"]
        row = row_of(kept, 1)
        answer = json.loads(row["answer"])
        assert [choice["text"] for choice in answer["choices"]] == texts
        assert any(texts)
        assert answer["usage"] == events[-1]["usage"]
        assert answer["id"] == events[0]["id"]
        assert (row["status"], row["is_whole"], json.loads(row["request"])["stream"]) == (200, True, True)
        whole = live.made("/v1/completions", **body)
        assert answer["choices"] == whole["choices"], "as it would have come in one piece"


def test_a_stream_whose_client_leaves_is_a_row_that_says_so() -> None:
    kept = Kept()
    with overheard(kept) as (live, _):
        worker: Any = live.service.worker
        turn, has_begun, is_gone = worker.turn, threading.Event(), threading.Event()

        def held() -> Any:
            assert not has_begun.is_set() or is_gone.wait(60)
            return turn()

        worker.turn = held
        body = {"model": "lda", "prompt": "hello", "seed": 1, "max_tokens": 100, "n": 4, "stream": True}
        with live.client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
            has_begun.set()
        is_gone.set()
        row = row_of(kept, 1)
    assert (row["status"], row["is_whole"]) == (200, False)
    assert len(json.loads(row["answer"])["choices"]) == 4


def test_bodies_that_are_too_large_or_no_text_are_rows_too() -> None:
    kept = Kept()
    with overheard(kept, max_body_bytes=1_000) as (live, _):
        assert b"413" in raw(live, head("/generate_lda", 5_000, "Connection: close\r\n"))
        row = row_of(kept, 1)
        assert (row["status"], row["request"]) == (413, None)
        chunked = head("/generate_lda", None, "Connection: close\r\n") + b"7d0\r\n" + b"x" * 2_000 + b"\r\n0\r\n\r\n"
        assert b"413" in raw(live, chunked)
        assert (row_of(kept, 2)["status"], row_of(kept, 2)["request"]) == (413, None)
        no_text = b'\xff\xfe{"\\ud800": 1}'
        assert b"400" in raw(live, head("/generate_lda", len(no_text), "Connection: close\r\n") + no_text)
        assert row_of(kept, 3)["request"] == '\ufffd\ufffd{"\\ud800": 1}'


def test_no_key_is_in_any_row_and_who_has_none_leaves_no_row() -> None:
    kept = Kept()
    with overheard(kept, (b"a-key-of-some-length",)) as (live, recording):
        assert live.post("/generate_lda", prompt="a").status_code == 401
        live.client.headers["Authorization"] = "Bearer a-key-of-some-length"
        live.made("/generate_lda", prompt="a")
        row_of(kept, 1)
    assert len(kept.rows) == 1
    assert "a-key-of-some-length" not in repr(kept.rows)
    assert recording.num_waiting == 0


def test_a_service_that_cannot_record_says_so_and_takes_no_request() -> None:
    kept = Kept()
    with overheard(kept) as (live, recording):
        live.made("/generate_lda", prompt="a", seed=1)
        row_of(kept, 1)
        kept.error = EnvironmentFault("the disk is full; free some space")
        until(lambda: recording.problem is not None)
        response = live.post("/generate_lda", prompt="a", seed=1)
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert "cannot: the disk is full" in response.json()["detail"]
        assert live.client.get("/ready").json() == {"status": "not recording"}
        assert live.client.get("/health").status_code == 200
        assert live.metric("harness_refusals_total", reason="recorder") == 1
        kept.error = None
        until(lambda: live.client.get("/ready").status_code == 200)
        live.made("/generate_lda", prompt="b", seed=1)
        row_of(kept, 2)


def test_without_a_recording_nothing_is_kept() -> None:
    with served() as live:
        live.made("/generate_lda", prompt="a", seed=1)
        assert live.service.recording is None
        assert "recorded" not in live.client.get("/metrics").text


# ---- from memory to a run ---------------------------------------------------------------------------------------


def rows_in(folder: Path) -> list[dict[str, Any]]:
    with open_snapshot(RunPaths(folder), SCHEMA) as reader:
        return reader.table("requests")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs with one that was recorded, three requests long."""
    root = tmp_path_factory.mktemp("recorded")
    with recording_in(root) as recording:
        for n in range(3):
            recording.add(exchange(n, status=(200, 422, 503)[n]))
    return root


def test_a_recording_is_a_run_that_is_shown_verified_and_exported(made: Path, tmp_path: Path) -> None:
    at = ("--paths.runs", made)
    manifest = read_manifest(RunPaths(only_run(made)))
    assert (manifest.experiment, manifest.kind, manifest.status, manifest.num_failed) == ("lda", KIND, "finished", 1)
    assert manifest.tables["requests"] == 3
    assert manifest.settings["serve.record"].value is True
    told = harness("verify", "latest", *at)
    assert told.code == 0, told
    assert "FAIL" not in told.out
    assert "ask the same requests" in told.out
    told = harness("show", "latest", *at)
    assert "3 requests, from 2026-01-01 00:00:00" in told.out
    assert "lda, serve" in told.out
    assert "serve" in harness("runs", *at).out
    for form in ("parquet", "csv", "jsonl"):
        assert harness("export", "latest", "--to", tmp_path, "--format", form, *at).code == 0
    rows = pq.read_table(tmp_path / "requests.parquet").to_pylist()
    assert [row["request_id"] for row in rows] == [1, 2, 3]
    assert [json.loads(row["answer"]) for row in rows] == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert [json.loads(line)["status"] for line in (tmp_path / "requests.jsonl").read_text().splitlines()] == [
        200,
        422,
        503,
    ]
    told = harness("report", "latest", "--to", tmp_path, *at)
    assert told.code == 0, told
    assert "Requests by path and status" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("how", "sql"),
    [("changed", "UPDATE requests SET answer = 'x' WHERE request_id = 2"),
     ("missing", "DELETE FROM requests WHERE request_id = 2")],
)  # fmt: skip
def test_a_row_that_was_changed_or_taken_away_is_named(made: Path, tmp_path: Path, how: str, sql: str) -> None:
    root = tmp_path / "runs"
    shutil.copytree(made, root)
    with duckdb.connect(str(only_run(root) / "results.duckdb")) as con:
        con.execute(sql)
    told = harness("verify", "latest", "--paths.runs", root)
    assert told.code == 1
    assert f"requests request_id=2: {how}" in told.out
    assert ("one before this is missing: 3" in told.out) is (how == "missing")


def test_nothing_goes_on_with_a_recording_or_measures_it_again(made: Path, tmp_path: Path) -> None:
    at, name = ("--paths.runs", made), only_run(made).name
    assert "nothing in it to go on with" in refused(harness("run", "lda", "--resume", name, *at))
    assert "nothing of it is measured again" in refused(harness("reproduce", name, *at))
    assert "All 2 measured tables are equal" in harness("diff", name, name, *at).out
    assert len(run_folders(made)) == 1
    with pytest.raises(SettingsError, match="of the kind 'dream', which this harness does not know"):
        registry.of_run(saying({"kind": "dream"}))
    assert registry.of_run(saying({"kind": KIND, "experiment": "gone"})).name == "serve gone", "it needs no experiment"


def test_json_in_rows_can_be_asked_in_sql(made: Path) -> None:
    with Reader(RunPaths(only_run(made)).live, SCHEMA) as reader:
        found = reader.query("SELECT (answer->>'$.n')::INTEGER AS n FROM requests ORDER BY request_id")
    assert [row["n"] for row in found] == [0, 1, 2]


def test_two_recordings_are_two_runs(tmp_path: Path) -> None:
    for _ in range(2):
        with recording_in(tmp_path) as recording:
            recording.add(exchange(1))
    one, other = (read_manifest(RunPaths(folder)) for folder in run_folders(tmp_path))
    assert one.fingerprint == other.fingerprint
    assert [len(rows_in(folder)) for folder in run_folders(tmp_path)] == [1, 1]


def test_a_disk_that_was_full_for_a_while_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "Recording", lambda write: Recording(write, every_s=0.01))
    usual, failing = Store.append, threading.Event()
    broken: list[Store] = []

    def append(self: Store, table: str, rows: Any) -> None:
        if self not in broken:
            usual(self, table, rows)
        if failing.is_set():  # after the rows: a COMMIT may fail and have kept them all the same
            broken.append(self)
        if self in broken:  # DuckDB takes nothing more after some errors
            raise EnvironmentFault("the disk is full")

    monkeypatch.setattr(Store, "append", append)
    with recording_in(tmp_path) as recording:
        recording.add(exchange(0))
        until(lambda: recording.num_written == 1)
        failing.set()
        recording.add(exchange(1))
        until(lambda: recording.problem is not None)
        recording.add(exchange(2))
        failing.clear()
        until(lambda: recording.num_written == 3)
    assert [row["request_id"] for row in rows_in(only_run(tmp_path))] == [1, 2, 3]
    assert harness("verify", "latest", "--paths.runs", tmp_path).code == 0


FILLED = """
import sys
from pathlib import Path
from tests.faults.injector import Fault, arm
from tests.serving.live import until
from tests.serving.recordings import exchange, recording_in
from harness.commands import record
from harness.serving.record import Recording

root, journal = Path(sys.argv[1]), Path(sys.argv[2])
record.Recording = lambda write: Recording(write, every_s=0.01)
full = Fault(at=1, action="fail", error="ENOSPC", is_lasting=True, calls=(sys.argv[3],), files="*/results.duckdb*")
with recording_in(root) as recording:
    recording.add(exchange(0))
    until(lambda: recording.num_written == 1)
    arm(root, journal, full)
    recording.add(exchange(1))
    until(lambda: recording.problem is not None)
    print(recording.problem)
    arm(root, journal, Fault())
    recording.add(exchange(2))
    until(lambda: recording.num_written == 3)
"""


@pytest.mark.skipif(injector.why_not() is not None, reason=str(injector.why_not()))
@pytest.mark.parametrize("call", ["write", "sync"])
def test_calls_that_the_system_refuses_for_a_while_lose_nothing(tmp_path: Path, call: str) -> None:
    root = tmp_path / "runs"
    done = subprocess.run(
        [sys.executable, "-c", FILLED, str(root), str(tmp_path / "journal"), call], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "LD_PRELOAD": str(injector.compiled())}, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the disk is full" in done.stdout
    assert [row["request_id"] for row in rows_in(only_run(root))] == [1, 2, 3]
    assert harness("verify", "latest", "--paths.runs", root).code == 0


def test_what_could_not_be_written_at_the_end_is_said_and_the_run_is_not_sealed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append(self: Store, table: str, rows: Any) -> None:
        raise EnvironmentFault("the disk is full")

    monkeypatch.setattr(Store, "append", append)
    with ExitStack() as stack:
        stack.enter_context(
            pytest.raises(EnvironmentFault, match=r"2 answered requests could not be recorded in .*: the disk is full")
        )
        recording = stack.enter_context(recording_in(tmp_path))
        recording.add(exchange(0))
        recording.add(exchange(1))
    manifest = read_manifest(RunPaths(only_run(tmp_path)))
    assert manifest.status == "failed"
    assert "2 answered requests could not be recorded" in str(manifest.reason)
    assert not RunPaths(only_run(tmp_path)).seal.exists()


# ---- the whole command ------------------------------------------------------------------------------------------


def metric(running: Process, name: str) -> float:
    lines = running.client.get("/metrics").text.splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(f"{name} ")), -1.0)


def ask(running: Process, seed: int) -> str:
    response = running.client.post("/generate_lda", json={"prompt": "Who are you?", "seed": seed, "max_new_tokens": 5})
    assert response.status_code == 200, response.text
    return response.text


def test_a_signal_ends_it_with_every_answer_in_a_sealed_run(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with process(tmp_path, "--paths.runs", str(root), "--serve.record") as running:
        assert f"recording in {only_run(root)}" in running.log.read_text()
        answers = [ask(running, seed) for seed in range(5)]
        code, seconds = running.ended(signal.SIGTERM)
        assert code == 0, running.log.read_text()
        assert seconds < 10
    rows = rows_in(only_run(root))
    assert [row["answer"] for row in rows] == answers
    manifest = read_manifest(RunPaths(only_run(root)))
    assert (manifest.status, manifest.kind, manifest.experiment) == ("finished", KIND, "amplified")
    assert "--serve.record" in manifest.argv
    told = harness("verify", "latest", "--paths.runs", root)
    assert told.code == 0, told.out


def test_what_a_signal_breaks_off_is_a_row_too_and_the_seal_is_in_time(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    flags = ("--amplified.stop_at_eos", "false", "--batching.max_tokens", "2000")
    with process(tmp_path, "--paths.runs", str(root), "--serve.record", *flags) as running:
        answers: list[str] = []

        def post() -> None:
            body = {"prompts": ["Who are you?"], "num_samples": 1000, "max_new_tokens": 400}
            answers.append(running.client.post("/generate_lda_batch", json=body).text)

        threads = [threading.Thread(target=post) for _ in range(3)]
        for thread in threads:
            thread.start()
        until(lambda: metric(running, "harness_running_rows") > 0 and metric(running, "harness_queued_rows") > 1500)
        code, seconds = running.ended(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert (code, seconds < 10) == (0, True), running.log.read_text()
    rows = rows_in(only_run(root))
    assert sorted(row["answer"] for row in rows) == sorted(answers)
    assert {row["status"] for row in rows} <= {200, 503}
    assert read_manifest(RunPaths(only_run(root))).status == "finished"


def test_a_killed_one_keeps_all_rows_but_those_of_the_last_moment(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with process(tmp_path, "--paths.runs", str(root), "--serve.record") as running:
        answers = [ask(running, seed) for seed in range(4)]
        until(lambda: metric(running, "harness_recorded_requests") == 4)
        answers += [ask(running, seed) for seed in range(4, 6)]
        running.popen.kill()
        running.popen.wait(60)
    rows = rows_in(only_run(root))
    assert [row["answer"] for row in rows] == answers[: len(rows)]
    assert 4 <= len(rows) <= 6
    manifest = read_manifest(RunPaths(only_run(root)))
    assert (manifest.status, manifest.ended) == ("running", None)
    told = harness("verify", "latest", "--paths.runs", root)
    assert told.code == 0, told.out
    assert "requests" in harness("show", "latest", "--paths.runs", root).out


def test_without_the_setting_no_run_is_made(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    with process(tmp_path, "--paths.runs", str(root)) as running:
        ask(running, 0)
        assert running.ended(signal.SIGTERM)[0] == 0
    assert not root.exists()


def test_a_folder_that_cannot_be_written_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [
        sys.executable,
        "-m",
        "harness",
        "serve",
        "amplified",
        "--serve.port",
        "0",
        "--serve.record",
        "--paths.runs",
    ]
    done = subprocess.run(
        [*command, str(tmp_path / "file" / "runs")],
        cwd=ROOT,
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 4
    assert f"harness: paths.runs: cannot write to {tmp_path / 'file' / 'runs'}: Not a directory" in done.stderr
    assert "recording" not in done.stderr
