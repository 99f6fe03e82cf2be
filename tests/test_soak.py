"""The soak's judgement: what grows, is left, differs or fails is named, and what does not is not."""

import pytest

from tests.soak import ENOUGH, GROWTH, Told, lines, verdict

REST = {"children": 0, "temp_files": 0, "tmpdir_files": 0}


def samples(number: int, per_sample: float = 0.0) -> list[dict[str, float]]:
    """Flat ones, but for a memory that grows."""
    return [
        {"at_s": 15.0 * n, "rss_mb": 300.0 + per_sample * n, "fds": 30.0 + n % 3, "children": n % 2}
        for n in range(number)
    ]


def told(**counts: int) -> Told:
    told = Told()
    told.counts.update({"runs ended identical": 3, "pages": 9} | counts)
    return told


def test_what_is_flat_is_called_so() -> None:
    assert verdict(told(), lines(samples(60)), REST) == []


def test_a_leak_is_named_and_too_few_samples_are_not_judged() -> None:
    leak = 2 * GROWTH["rss_mb"] / 60
    (line,) = [found for found in lines(samples(60, leak)) if found.name == "rss_mb"]
    assert not line.is_flat
    assert line.per_hour == pytest.approx(leak * 240)
    assert verdict(told(), lines(samples(60, leak)), REST) == [f"rss_mb rose by {line.rose:.1f}"]
    assert verdict(told(), lines(samples(ENOUGH - 1, 1000.0)), REST) == []


def test_what_is_left_differs_or_fails_is_named() -> None:
    assert verdict(told(), [], REST | {"children": 1}) == ["children at rest: 1, expected 0"]
    bad = told()
    bad.differing, bad.failures, bad.pages = ["a: psem"], ["b"], ["c"]
    assert verdict(bad, [], REST) == ["differs: a: psem", "failed: b", "page: c"]
    assert len(verdict(told(pages=0), [], REST)) == 1, "a soak that did nothing is no evidence"
