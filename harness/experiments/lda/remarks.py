"""What a run of amplification should say of itself."""

from collections.abc import Iterator

from harness.experiments.lda.schema import NATURAL
from harness.experiments.lda.summary import stored_rows
from harness.experiments.remarks import Remark, share_told
from harness.run import Manifest
from harness.store import Reader

_FEW_EFFECTIVE = 10
"""Effective hits under which a reweighted rate rests on too little."""
_MOST_CUT = 0.5
"""Share of rollouts that were cut off at which their end is worth a word."""


def remarks_of(reader: Reader, manifest: Manifest) -> list[Remark]:
    """Detectors that never fired, rollouts that were cut off, natural rates that rest on little."""
    return [*_nothing_judged(reader), *_never_fired(reader), *_cut_off(reader), *_thin(reader)]


def _nothing_judged(reader: Reader) -> Iterator[Remark]:
    (row,) = reader.query("SELECT (SELECT count(*) FROM completions) AS made, (SELECT count(*) FROM hits) AS judged")
    (stage,) = reader.query("SELECT count(*) AS n FROM stages WHERE stage = 'hits' AND status <> 'running'")
    if row["made"] and not row["judged"] and stage["n"]:
        yield Remark(
            "judged", None, row["made"], row["made"],
            f"{row['made']:,} completions were made, and none of them was judged.",
            "Name a detector: `--lda.detectors '{\"NAME\": {\"any_of\": [\"…\"]}}'`, or [lda.detectors.NAME] in a file.",
            "no detector",
        )  # fmt: skip


def _never_fired(reader: Reader) -> Iterator[Remark]:
    rows = reader.query(
        "SELECT detector, count(*) AS n FROM hits GROUP BY detector HAVING count(*) FILTER (is_hit) = 0 ORDER BY detector"
    )
    for row in rows:
        yield Remark(
            "hits", row["detector"], row["n"], row["n"],
            f"Detector {row['detector']} fired in none of {row['n']:,} rollouts: its rate is at most {3 / row['n']:.2g} in all "
            "(rule of three), whatever was hoped for.",
            "Try a larger α, more samples, or phrases with `at_start`, whose rate is exact.",
            "no hit",
        )  # fmt: skip


def _cut_off(reader: Reader) -> Iterator[Remark]:
    rows = reader.query(
        "SELECT condition, count(*) AS n, count(*) FILTER (finish_reason = 'length') AS cut FROM completions "
        "GROUP BY condition ORDER BY condition"
    )
    for row in rows:
        if row["cut"] >= _MOST_CUT * row["n"]:
            yield Remark(
                "ended", row["condition"], row["cut"], row["n"],
                f"{row['condition']}: {share_told(row['cut'], row['n'], 'rollouts')} were cut at the limit of new tokens.",
                "What they would have said further on is in no rate: try a larger `--lda.max_new_tokens`.",
                "cut off",
            )  # fmt: skip


def _thin(reader: Reader) -> Iterator[Remark]:
    for (analysis, detector, _, measure), row in stored_rows(reader).items():
        if (analysis, measure) != ("natural", "effective_hits") or not row["n"] or row["value"] is None:
            continue
        if row["value"] < _FEW_EFFECTIVE:
            yield Remark(
                "weights", detector, round(row["value"]), row["n"],
                f"{detector}: the reweighted natural rate rests on {row['n']:,} hits that are worth {row['value']:.1f}.",
                f"Try arms nearer to 0 (such as 0.5), or more samples: hits far from {NATURAL} weigh little.",
                "few effective hits",
            )  # fmt: skip
