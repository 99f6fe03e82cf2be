"""What a run should say of itself before its numbers are read, and what every experiment's certificate gives to say.

Terminal, report and app show the same remarks. A remark is a thing to act upon: it says what was counted and what to try.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from harness.run import Manifest
from harness.store import Reader

NEAR = 0.5
"""Share of its tolerance from which a measurement of the certificate nearly failed."""


@dataclass(frozen=True)
class Remark:
    """One thing to know of a run: `number` of `total` are so, in a sentence, and what to try.

    Text in backticks is to be typed. Names in it are the run's own: to be shown as text.
    """

    kind: str
    """Sorts remarks by subject, and names the pages of the app that show it."""
    group: str | None
    """The part of the run that it is of; None for all of it."""
    number: int
    total: int
    sentence: str
    advice: str
    title: str = ""
    """The kind in a few words."""

    @property
    def share(self) -> float:
        return self.number / self.total if self.total else 0.0


def agrees(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether every measurement of a certificate was made and agrees; `rows` are those of the view `sanity`."""
    return all(v["ok"] for v in rows)


def lines(remarks: Iterable[Remark]) -> list[str]:
    """The remarks as paragraphs, those that have the same advice together."""
    return [
        " ".join([*(r.sentence for r in group), advice])
        for (_, advice), group in groupby(remarks, key=lambda r: (r.kind, r.advice))
    ]


def certificate_lines(rows: Sequence[Mapping[str, Any]], is_whole: bool) -> Iterator[str]:
    """The certificate in one line; none where there is none. `is_whole`: the stage that makes it has come to its end."""
    if not rows:
        return
    apart = [v["measurement"] for v in rows if v["ok"] is False]
    if apart:
        yield (
            f"Certificate: the fast path DISAGREES with the plain reference on {', '.join(apart)}: do not trust this run."
        )
        return
    missing = [v["measurement"] for v in rows if v["ok"] is None]
    made, left = len(rows) - len(missing), sum(v.get("num_left_out") or 0 for v in rows)
    so_far = "" if is_whole else " made so far"
    line = f"Certificate: all {made} measurements{so_far} agree with the plain reference"
    line += f"; NOT measured: {', '.join(missing)}" if missing and is_whole else ""
    yield line + (f"; {left} further comparisons left out for its budget, see `sanity`." if left else ".")


def of_certificate(reader: Reader, manifest: Manifest) -> list[Remark]:
    """What there is to say of the certificate, where the run has one."""
    known = set(reader.tables())
    found = [*_certificate(reader, manifest)] if "sanity" in known else []
    return found + ([*_left_out(reader, manifest)] if "sanity_items" in known else [])


def _certificate(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    rows = reader.query("SELECT measurement, max_abs, tolerance, ok FROM sanity ORDER BY max_abs / tolerance DESC")
    near = [r for r in rows if r["ok"] and r["max_abs"] is not None and r["max_abs"] > NEAR * r["tolerance"] > 0]
    if near:
        told = ", ".join(f"{r['measurement']} {r['max_abs']:.1e} of {r['tolerance']:.0e}" for r in near[:3])
        half = manifest.model.dtype in ("bfloat16", "float16")
        yield Remark(
            "certificate",
            None,
            len(near),
            len(rows),
            f"{len(near)} of {len(rows)} measurements of the certificate are near the tolerance: {told}"
            f"{', …' if len(near) > 3 else ''}.",
            "Try `--model.dtype float32`, which computes closer."
            if half
            else "Try `harness sanity --num-prompts 16` with the same settings: it compares more subjects.",
            "a certificate near its tolerance",
        )


def _left_out(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    """Measurements of which nothing was compared; that some comparisons had no time, the certificate's own line tells."""
    rows = reader.query("SELECT * FROM sanity_items")
    names = {str(row.get("measurement")) for row in rows}
    missing = sorted(names - {str(row.get("measurement")) for row in rows if not row.get("left_out")})
    if missing:
        yield Remark(
            "left_out",
            None,
            len(missing),
            len(names),
            f"{share_told(len(missing), len(names), 'measurements')} of the certificate were left out: {', '.join(missing)}.",
            "Try `harness sanity --full` with the same settings.",
            "an incomplete certificate",
        )


def share_told(number: int, total: int, what: str) -> str:
    """`12 of 250 prompts (5 %)`."""
    return f"{number:,} of {total:,} {what} ({100 * number / total:.0f} %)"
