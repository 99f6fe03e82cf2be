"""The pace of a run: batches cut by measured time, signals at any moment, tokens forwarded, and what a run is said to take."""

import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import duckdb
import pytest
from loguru import logger

from harness import tally
from harness.engine import BatchReport, Limits
from harness.engine.estimate import Estimate, Forecast, StageEstimate, duration, measure, spread
from harness.engine.executors import Host, Inline, Item, ItemResult
from harness.engine.plan import CPU_BUDGET, TARGET_S, Pace
from harness.engine.stop import StopSignal
from harness.errors import Stopped
from harness.experiments.gravity.schema import SCHEMA
from harness.log import ConsoleProgress
from harness.run import RunPaths
from harness.run.manifest import RecordedEstimate
from harness.store import Store
from tests.fakes import Fake, Memory, Watcher, measured, plan_of, rows_of, run_stages, same_lengths, score, scored

LONG = same_lengths(900, 20.0)
"""18,000 tokens: more than two batches of the most that a CPU takes at once."""


class Killed(BaseException):
    """Stands for SIGKILL."""


def padded_sizes(folder: Path) -> list[int]:
    return [b["padded_tokens"] for b in rows_of(folder, "batches")]


def paced(folder: Path, lengths: Mapping[str, float] = LONG, **memory: Any) -> list[int]:
    """Padded tokens of the batches of a run on a machine of this speed."""
    machine = Memory(**memory)
    run_stages(folder, Fake(lengths, machine.scored), max_tokens=None, memory=machine)
    return padded_sizes(folder)


# -- batches cut by measured time


def test_a_slow_stage_is_cut_into_batches_of_a_few_seconds(tmp_path: Path) -> None:
    sizes = paced(tmp_path / "slow", per_token_s=0.002)
    assert sizes[:2] == [240, 1_020], "two small batches first"
    assert max(sizes) * 0.002 <= TARGET_S < 4 * max(sizes) * 0.002
    slower = paced(tmp_path / "slower", per_token_s=0.01)
    assert slower[1] == 2 * slower[0], "the second batch too is cut by what the first took"
    assert max(slower[2:]) * 0.01 <= TARGET_S
    slowest = paced(tmp_path / "slowest", per_token_s=0.1)
    assert slowest[1] * 0.1 <= 10
    assert max(slowest[2:]) * 0.1 <= TARGET_S
    # Control: at the speed of a small model only the cap cuts.
    fast = paced(tmp_path / "fast", per_token_s=0.0001)
    assert max(fast) == CPU_BUDGET // 20 * 20
    assert measured(tmp_path / "fast") == measured(tmp_path / "slow")


def test_a_small_model_is_cut_the_same_on_a_machine_that_wavers(tmp_path: Path) -> None:
    """The demo model takes about .9 s for 8,192 tokens: four times that, and a first batch that takes a second more, change
    nothing; a sixteenth of the speed does."""
    usual = paced(tmp_path / "usual", per_token_s=1.1e-4)
    assert paced(tmp_path / "busy", per_token_s=4.4e-4) == usual
    assert paced(tmp_path / "cold", per_token_s=1.1e-4, base_s=0.3) == usual
    assert paced(tmp_path / "slow", per_token_s=1.8e-3) != usual


def test_a_short_stage_is_not_cut_though_its_speed_says_so(tmp_path: Path) -> None:
    """What is left takes less than the target whole: no power of two in it cuts it once more."""
    lengths = same_lengths(150, 20.0)  # 3,000 tokens, of which 1,260 measure
    assert paced(tmp_path, lengths, per_token_s=0.002) == [240, 1_020, 1_740]


def test_what_every_batch_costs_is_shared_by_as_many_tokens_as_the_target_allows(tmp_path: Path) -> None:
    """A second and a half whatever is in it: small batches make the tokens look dear, and larger ones are tried."""
    sizes = paced(tmp_path / "dear", same_lengths(2_000, 20.0), base_s=1.5, per_token_s=5e-4)
    assert sizes[:5] == [240, 500, 1_020, 2_040, 4_080]
    assert set(sizes[5:-1]) == {4_080}
    assert 1.5 + 5e-4 * max(sizes) <= TARGET_S
    # Control: where only tokens cost, the same first batch says that a thousand of them are enough.
    assert max(paced(tmp_path / "plain", same_lengths(2_000, 20.0), per_token_s=1.62 / 240)) < 1_024


def test_a_line_through_batches_is_no_flatter_than_half_of_the_fastest_and_never_falls() -> None:
    assert Pace.fit([(100, 1.0), (300, 2.0)]) == Pace(0.5, 0.005)
    assert Pace.fit([(100, 1.0), (1_000, 1.0)]) == Pace(0.5, 0.0005)
    assert Pace.fit([(100, 3.0), (1_000, 1.0), (1_000, 7.0)]) == Pace(0.5, 0.0005), "what is slow for once says nothing"
    assert Pace.fit([(100, 1.0), (120, 1.0)]) == Pace(0.0, 1 / 120), "too near to each other for a line"
    assert Pace.fit([(0, 1.0)]) is None
    of_large = Pace.typical([(100, 1.0), (250, 2.0), (350, 3.0), (300, 2.5)])
    assert of_large == Pace(0.25, 0.0075), "the mean of the large ones"
    assert Pace.typical([]) is None
    pace = Pace(0.5, 0.005)
    assert (pace.seconds(100), pace.most(1.0), pace.most(0.1)) == (1.0, 100.0, 0.0)
    assert pace.whole(1_024) == pytest.approx(2 * 0.5 + 5.12), "512 tokens take 3.06 seconds, 1,024 over four"
    assert pace.whole(1_024, 64) == pytest.approx(16 * 0.5 + 5.12)


@dataclass(frozen=True)
class Grouped(Fake):
    """Items of groups, named before the stroke of their keys."""

    def items(self, tables: Mapping[str, Any]) -> list[Item]:
        return [Item(key, float(length), None, key.split("|")[0]) for key, length in self.lengths.items()]


def groups_of(folder: Path, stage: Fake, **options: Any) -> list[list[str]]:
    """The groups that each batch has items of."""
    run_stages(folder, stage, **options)
    return [sorted({key.split("|")[0] for key in b["keys"]}) for b in rows_of(folder, "batches")]


def test_items_that_share_work_stay_in_one_batch_where_it_does_not_take_too_long(tmp_path: Path) -> None:
    machine = Memory(per_token_s=0.006)  # 100 tokens a group of five: .6 s; of a hundred items 12 s
    small = {f"g{n:02d}|{i}": 20.0 for n in range(30) for i in range(5)}
    batches = groups_of(tmp_path / "small", Grouped(small, machine.scored), max_tokens=None, memory=machine)
    assert sum(map(len, batches)) == 30, "each group is in one batch"
    assert max(len(b) for b in batches) > 1
    middle = {f"g{n:02d}|{i:03d}": 20.0 for n in range(4) for i in range(40)}  # 800 tokens, 4.8 s: over the target
    batches = groups_of(tmp_path / "middle", Grouped(middle, machine.scored), max_tokens=None, memory=machine)
    assert batches[2:] == [["g01"], ["g02"], ["g03"]], "only the first one was cut, before anything was measured"
    large = {f"g{n:02d}|{i:03d}": 20.0 for n in range(2) for i in range(100)}
    batches = groups_of(tmp_path / "large", Grouped(large, machine.scored), max_tokens=None, memory=machine)
    assert sum(b == ["g01"] for b in batches) > 1, "twelve seconds are too long"
    assert max(padded_sizes(tmp_path / "large")) * 0.006 <= 10
    given = groups_of(tmp_path / "given", Grouped(middle, machine.scored), max_tokens=256, memory=machine)
    assert sum(map(len, given)) > 4
    assert max(padded_sizes(tmp_path / "given")) <= 256, "a budget that is given holds whatever belongs together"
    # Control: without groups a budget cuts wherever it is full.
    plain = groups_of(tmp_path / "plain", Fake(small, machine.scored), max_tokens=None, memory=machine)
    assert sum(map(len, plain)) > 30
    assert measured(tmp_path / "plain") == measured(tmp_path / "small")


def test_a_group_larger_than_memory_is_cut(tmp_path: Path) -> None:
    machine = Memory(base=50_000, per_token=70, capacity=750_000, per_token_s=1e-6)
    # 15,000 tokens a group, where there is room for 8,500.
    lengths = {f"g{n}|{i:03d}": 50.0 for n in range(3) for i in range(300)}
    groups_of(tmp_path, Grouped(lengths, machine.scored), max_tokens=None, memory=machine)
    assert 8_000 < max(padded_sizes(tmp_path)) <= 8_500
    assert max(machine.peaks) <= 750_000


def test_on_a_gpu_memory_and_time_hold_together(tmp_path: Path) -> None:
    lengths = same_lengths(6_000, 20.0)
    room = {"base": 50_000, "per_token": 7, "capacity": 400_000}
    by_memory = max(paced(tmp_path / "memory", lengths, **room, per_token_s=1e-6))
    by_time = max(paced(tmp_path / "time", lengths, **room, per_token_s=2e-4))
    both = paced(tmp_path / "both", lengths, **room | {"capacity": 120_000}, per_token_s=2e-4)
    assert 30_000 < by_memory <= 0.85 * 50_000
    assert TARGET_S / 2 < by_time * 2e-4 <= TARGET_S
    assert max(both) <= 10_000 < by_time < by_memory


def test_a_stage_expected_to_be_slow_begins_with_less(tmp_path: Path) -> None:
    machine = Memory(per_token_s=0.1)
    paths = RunPaths(tmp_path)
    from harness.engine import Engine

    with Store(paths.results, SCHEMA) as store:
        stage = Fake(same_lengths(8, 20.0), machine.scored)
        limits = Limits(None, 0, rates={stage.name: 0.1})
        Engine(store, paths, Inline(machine), limits, Watcher(), StopSignal()).run([stage], lambda report: None)
    assert max(padded_sizes(tmp_path)) * 0.1 <= 10
    assert paced(tmp_path / "unexpected", same_lengths(13, 20.0), per_token_s=0.1)[0] * 0.1 > 10, "control"


def test_seconds_of_work_are_the_lesser_of_what_passed_and_what_was_computed() -> None:
    assert Host().work_s(10.0, 1.0) == 1.0, "the machine was busy with something else"
    assert Host().work_s(1.0, 2.0) == 1.0, "two threads"


@dataclass(frozen=True)
class Uneven(Fake):
    """Rows whose last bits follow from the batch they were measured in, as a model's do."""

    def run(self, context: None, items: Sequence[Item]) -> Sequence[ItemResult]:
        self.compute(items)
        batch = 1e-9 * len(items) + 1e-12 * int(items[0].key[1:])
        return [
            ItemResult(i.key, {"psem": [{"prompt_id": i.key, "condition": "baseline", "p_sem": score(i.key) + batch}]})
            for i in items
        ]


def uneven_run(folder: Path, kill_at: int | None, per_token_s: float) -> int:
    """A life of a run on a machine of this speed, killed at that batch; the number of batches it computed."""
    machine, calls = Memory(per_token_s=per_token_s), []

    def compute(items: Sequence[Item]) -> Sequence[ItemResult]:
        if len(calls) == kill_at:
            raise Killed
        calls.append(len(items))
        return machine.scored(items)

    run_stages(folder, Uneven(LONG, compute), max_tokens=None, memory=machine)
    return len(calls)


@pytest.mark.thorough
def test_a_plan_cut_by_measured_time_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """Killed at each batch. Once the plan is whole it alone decides, and the second life may be eight times slower."""
    num_batches = uneven_run(tmp_path / "whole", None, 0.001)
    rows, plan = measured(tmp_path / "whole"), plan_of(tmp_path / "whole")
    assert num_batches > 5
    for call in range(num_batches):
        folder = tmp_path / str(call)
        with pytest.raises(Killed):
            uneven_run(folder, call, 0.001)
        uneven_run(folder, None, 0.001 if call < 2 else 0.008)
        assert plan_of(folder) == plan, f"another plan after a kill at batch {call}"
        assert measured(folder) == rows, f"other bits after a kill at batch {call}"
    # Control: the same kill, and a plan that is cut anew by what the second life measures.
    folder = tmp_path / "anew"
    with pytest.raises(Killed):
        uneven_run(folder, 3, 0.001)
    with duckdb.connect(str(RunPaths(folder).results)) as con:
        con.execute("DELETE FROM batches WHERE status = 'planned'")
        con.execute("UPDATE batches SET work_s = 8 * work_s")
    uneven_run(folder, None, 0.008)
    assert measured(folder) != rows


# -- tokens forwarded


def test_tokens_are_those_forwarded_around_a_batch(tmp_path: Path) -> None:
    def compute(items: Sequence[Item]) -> list[ItemResult]:
        with tally.prefilling():
            tally.add(10.4 * len(items), 3.0)
        tally.add(2.0 * len(items))
        return [replace(r, rows={}) for r in scored([])] or [ItemResult(i.key, {}) for i in items]

    tally.add(1_000.0)  # what somebody else forwarded before
    watcher = Watcher()
    (report,) = run_stages(tmp_path, Fake(same_lengths(5), compute), max_tokens=30, watcher=watcher)
    batches = rows_of(tmp_path, "batches")
    assert [(b["tokens"], b["prefill_tokens"], b["padding_tokens"]) for b in batches] == [(37, 31, 3), (25, 21, 3)]
    (row,) = rows_of(tmp_path, "stages")
    assert (row["tokens"], row["prefill_tokens"], row["padding_tokens"]) == (62, 52, 6)
    assert (report.tokens, report.prefill_tokens, report.padding_tokens) == (62, 52, 6)
    assert [b.tokens for b in watcher.done] == [37, 25]
    assert report.tokens_per_s == pytest.approx(62 / row["seconds"], rel=0.05)


# -- signals


@dataclass(frozen=True)
class Slow(Fake):
    """Takes ten seconds, in small steps, at one of its three tasks; the first thing it does there is to be told to stop."""

    at: str = "run"
    steps: list[float] = field(default_factory=list)

    def _pause(self, here: str) -> None:
        if here != self.at:
            return
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(1_000):
            time.sleep(0.01)
            self.steps.append(0.01)

    def items(self, tables: Mapping[str, Any]) -> list[Item]:
        self._pause("items")
        return super().items(tables)

    def setup(self) -> None:
        self._pause("setup")

    def run(self, context: None, items: Sequence[Item]) -> Sequence[ItemResult]:
        try:
            self._pause("run")
        except BaseException as e:
            # As a library does with an exception from a signal's handler.
            raise RuntimeError("query interrupted") from e
        return scored(items)


@pytest.mark.parametrize(("at", "grace_s"), [("items", 60.0), ("setup", 60.0), ("run", 0.1)])
def test_a_signal_drops_what_cannot_end_in_time_whatever_the_stage_is_at(
    at: str, grace_s: float, tmp_path: Path
) -> None:
    """Listing and loading are dropped at once: nothing is lost by it, and one call of a library may take seconds."""
    stage = Slow(same_lengths(3), at=at)
    with StopSignal(grace_s) as stop, pytest.raises(Stopped):
        run_stages(tmp_path, stage, max_tokens=10, stop=stop)
    assert len(stage.steps) < 300, "dropped long before its end"
    assert rows_of(tmp_path, "events") == [], "an item that was dropped has not failed"
    run_stages(tmp_path, Fake(same_lengths(3)), max_tokens=10)
    assert len(rows_of(tmp_path, "psem")) == 3


def test_without_a_signal_the_same_error_is_a_failed_item(tmp_path: Path) -> None:
    """The control of the one before: the error that a dropped batch ends with counts where nobody asked for an end."""

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        raise RuntimeError("query interrupted")

    run_stages(tmp_path, Fake(same_lengths(1), compute))
    assert [e["kind"] for e in rows_of(tmp_path, "events")] == ["failed_item"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_it_is_dropped_again_where_the_first_time_was_lost() -> None:
    """An exception in a destructor is printed and lost: the alarm tries again."""

    class Deaf:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a second one drops at once: in here

    start = time.perf_counter()

    def work() -> None:
        with StopSignal(grace_s=0.2) as stop, stop.droppable():
            deaf = Deaf()
            del deaf
            while time.perf_counter() - start < 8:
                time.sleep(0.01)

    with pytest.raises(Stopped):
        work()
    assert time.perf_counter() - start < 5


# -- what a run takes


@dataclass
class Clock:
    """Time that passes where it is told to."""

    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Costly(Fake):
    """Items of a cost: so many seconds a batch, so many a token."""

    clock: Clock = field(default_factory=Clock)
    batch_s: float = 0.0
    token_s: float = 0.0
    most: int = 10**9

    def most_items(self, num_subjects: int) -> int:
        return self.most

    def run(self, context: None, items: Sequence[Item]) -> Sequence[ItemResult]:
        self.clock.now += self.batch_s + self.token_s * sum(i.length for i in items)
        tally.add(2.0 * sum(i.length for i in items))
        return [ItemResult(i.key, {}) for i in items]


class Ticking(Memory):
    """An accelerator whose seconds are those of a clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.since = clock, clock.now

    def reset_peak(self) -> None:
        self.since = self.clock.now

    def work_s(self, wall_s: float, cpu_s: float) -> float:
        return self.clock.now - self.since


def costly_stages(clock: Clock, prompts: Sequence[int], token_s: float = 0.004) -> list[Costly]:
    """Two stages that grow with the prompts, one that does not."""
    lengths = {f"p{n}": float(n) for n in prompts}
    samples = {f"p{n}|{i}": float(n) / 2 for n in prompts for i in range(4)}
    return [
        Costly(lengths, name="first", clock=clock, batch_s=0.2, token_s=token_s),
        Costly(samples, name="second", clock=clock, batch_s=0.4, token_s=2 * token_s),
        Costly({"all": 1.0}, name="once", clock=clock, batch_s=3.0, most=1),
    ]


PROMPTS = tuple(range(20, 220))


def estimated(token_s: float = 0.004) -> tuple[Estimate, Clock, list[int]]:
    clock, asked = Clock(), []

    def build(number: int) -> list[Costly]:
        asked.append(number)
        return costly_stages(clock, spread(PROMPTS, number, float), token_s)

    whole = measure(
        build, SCHEMA, len(PROMPTS), Inline(Ticking(clock)), Limits(None, 0), StopSignal(), Watcher(), clock
    )
    return whole, clock, asked


def test_an_estimate_is_near_what_the_run_takes_stage_by_stage(tmp_path: Path) -> None:
    whole, clock, asked = estimated()
    assert asked == [1, 7]
    assert (whole.num_subjects, whole.of_subjects) == (7, 200)
    before = clock.now
    assert whole.cost_s == pytest.approx(before - 100.0)
    taken = {}
    for stage in costly_stages(clock, PROMPTS):
        start = clock.now
        (report,) = run_stages(tmp_path / stage.name, stage, max_tokens=None, memory=Ticking(clock))
        taken[stage.name] = clock.now - start
        assert whole.stages[stage.name].items == report.num_items
        assert whole.stages[stage.name].tokens == pytest.approx(report.tokens, rel=0.1)
    for name, seconds in taken.items():
        assert whole.stages[name].seconds == pytest.approx(seconds, rel=0.3), name
    assert whole.cost_s < 0.06 * sum(taken.values())
    # Control: another speed is another estimate.
    assert estimated(token_s=0.012)[0].seconds > 2 * whole.seconds


def test_what_one_prompt_says_is_short_is_tried_on_no_more() -> None:
    clock, asked = Clock(), []

    def build(number: int) -> list[Costly]:
        asked.append(number)
        return costly_stages(clock, spread(PROMPTS, number, float), 1e-5)[2:]

    whole = measure(
        build, SCHEMA, len(PROMPTS), Inline(Ticking(clock)), Limits(None, 0), StopSignal(), Watcher(), clock
    )
    assert asked == [1]
    assert (whole.num_subjects, whole.stages["once"].items) == (1, 1)
    assert whole.seconds == pytest.approx(3.0, rel=0.01), "and what does not grow with the prompts is not multiplied"


def test_an_estimate_comes_back_from_a_manifest() -> None:
    whole, _, _ = estimated()
    again = Estimate.recorded(RecordedEstimate.model_validate(whole.record(), strict=True))
    assert again.record() == whole.record()
    assert again.seconds == pytest.approx(whole.seconds, rel=0.01)


def test_the_things_chosen_are_as_large_as_all_on_the_mean() -> None:
    for number in range(1, 8):
        chosen = spread(PROMPTS, number, float)
        assert len(set(chosen)) == number
        if number != 2:  # of two, one is the middle and the other of the lower quarter
            assert sum(chosen) / number == pytest.approx(sum(PROMPTS) / len(PROMPTS), rel=0.15)
        assert PROMPTS[len(PROMPTS) // 2] in chosen
    first = PROMPTS[:7]
    assert sum(first) / 7 < 0.5 * sum(PROMPTS) / len(PROMPTS), "control: the first ones are not"


def known(**seconds: float) -> Estimate:
    return Estimate({name: StageEstimate(s, 0, 10, 100.0) for name, s in seconds.items()}, 1, 10, 1.0)


def test_what_is_left_is_corrected_by_what_was_measured() -> None:
    forecast = Forecast(known(a=100.0, b=100.0, c=200.0))
    forecast.started("a", 100.0, 0.0)
    assert forecast.stage_left_s() == pytest.approx(100)
    assert forecast.run_left_s() == pytest.approx(400)
    forecast.advanced(50.0, 100.0)  # half of it, and twice as slow
    assert forecast.stage_left_s() == pytest.approx(95, rel=0.03)
    forecast.advanced(50.0, 200.0)
    forecast.ended()
    forecast.started("b", 50.0, 0.0)  # half of what was expected
    assert forecast.stage_left_s() == pytest.approx(50 * 1.9, rel=0.02), "half the items, nearly twice as slow"
    assert forecast.run_left_s() == pytest.approx(250 * 1.9, rel=0.02)


def test_a_resumed_run_goes_on_from_the_stored_estimate() -> None:
    forecast = Forecast(known(a=100.0, b=100.0), {"a": 100.0})
    forecast.started("b", 100.0, 75.0)
    assert forecast.run_left_s() == pytest.approx(25)


def test_without_an_estimate_only_the_stage_is_told() -> None:
    forecast = Forecast()
    forecast.started("a", 100.0, 0.0)
    assert (forecast.stage_left_s(), forecast.run_left_s()) == (None, None)
    forecast.advanced(25.0, 5.0)
    assert forecast.stage_left_s() == pytest.approx(15)


def test_a_duration_is_told_as_a_person_would() -> None:
    told = {0.2: "1 s", 40: "40 s", 99: "99 s", 125: "2 min", 5_000: "83 min", 11_100: "3 h 05 min"}
    assert {s: duration(float(s)) for s in told} == told


# -- progress without a terminal


@pytest.fixture
def lines() -> Iterator[list[str]]:
    found: list[str] = []
    handle = logger.add(lambda message: found.append(str(message).strip()), level="INFO", format="{message}")
    yield found
    logger.remove(handle)


def told_at(
    clock: Clock, progress: ConsoleProgress, lines: list[str], seconds: int, step: Callable[[int], None]
) -> list[int]:
    """The seconds at which a line came."""
    found = []
    for second in range(1, seconds + 1):
        clock.now = 100.0 + second
        step(second)
        before = len(lines)
        progress.tell_if_due()
        found += [second] * (len(lines) - before)
    return found


def test_a_stage_says_something_within_five_seconds_and_then_ever_less_often(lines: list[str]) -> None:
    clock = Clock()
    progress = ConsoleProgress(Forecast(known(a=900.0, b=100.0)), clock)
    progress.doing("a", "listing its items")
    at = told_at(clock, progress, lines, 4, lambda second: None)
    assert at == [4]
    assert "listing its items…" in lines[-1]
    progress.doing("a", "")
    progress.stage_started("a", 900, 0, 900.0, 0.0)

    def step(second: int) -> None:
        progress.batch_done(BatchReport("a", 1, 1.0, 50, 1.0, 0))

    at = told_at(clock, progress, lines, 900, step)
    gaps = [b - a for a, b in pairwise(at)]
    assert max(gaps) <= 61
    assert gaps == sorted(gaps)
    assert 15 < len(at) < 60
    assert "50 tokens/s" in lines[-1]
    assert "left" in lines[-1]
    assert "of the run" in lines[-1]


def test_a_quick_stage_says_only_that_it_is_done(lines: list[str]) -> None:
    clock = Clock()
    progress = ConsoleProgress(None, clock)
    progress.stage_started("a", 3, 0, 3.0, 0.0)
    assert told_at(clock, progress, lines, 3, lambda s: progress.batch_done(BatchReport("a", 1, 1.0, 0, 1.0, 0))) == []
    progress.stage_finished("a")
    assert lines == ["a done: 3 items in 3.0 s"]
    clock.now += 100
    progress.tell_if_due()
    assert len(lines) == 1, "and nothing between stages"


def test_what_comes_after_a_stage_does_not_tell_of_the_time_that_was_left_of_it(lines: list[str]) -> None:
    """The end of a run of 100,000 prompts made digests for a minute and said `1 s left` all the while."""
    clock = Clock()
    progress = ConsoleProgress(None, clock)
    progress.stage_started("a", 30, 0, 30.0, 0.0)
    told_at(clock, progress, lines, 10, lambda s: progress.batch_done(BatchReport("a", 2, 2.0, 0, 1.0, 0)))
    assert "left" in lines[-1], "the control"
    progress.stage_finished("a")
    progress.doing("all stages", "making a digest of every row")
    told_at(clock, progress, lines, 40, lambda s: None)
    assert "making a digest" in lines[-1]
    assert "left" not in lines[-1]
