"""What a run should say of itself: answers that are empty or cut, a curve that rests on a corner, a check that nearly failed.

One function reads a snapshot and its manifest; terminal, report and app show what it finds. Knows no statistics of its
own, loads nothing heavy, and leaves out what a run of an older schema cannot answer. A remark is a thing to act upon: it
says what was counted and what to try. Every threshold stands here with its reason.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from harness.experiments.gravity.bins import BIN_NAMES, bin_of
from harness.experiments.remarks import Remark, share_told
from harness.run import Manifest, own_setting
from harness.store import Reader, Row

Kind = Literal["empty", "cut", "one_outcome", "one_bin", "fit", "split"]

TITLES: Mapping[str, str] = {
    "empty": "empty answers",
    "cut": "answers cut short",
    "one_outcome": "answers that all end alike",
    "one_bin": "pressure in one bin",
    "fit": "a slope left open",
    "split": "targets of several tokens",
}
"""What each kind is about, in a few words."""
FEWEST = 5
"""Answers or prompts below which a share is not remarked upon: one of four is chance."""
EMPTY = 0.1
"""Share of empty answers from which the model, as it was asked, did not answer; a model that does leaves hardly any."""
CUT = 0.1
"""Share of answers cut by length from which rates may be too low: what X would stand in was never written."""
ONE_BIN = 0.95
"""Share of the prompts in one of the five pressure bins from which a curve over P0 has no second point."""
SPLIT = 0.1
"""Share of targets without a spelling of one token from which the lens is largely about parts of words."""
WIDE = 4.0
"""Logits by which the two ends of the slope's interval differ over the P0 that the fit rests on: the odds at one end of
the pressure against those at the other are then unknown by a factor of over 50 (e⁴)."""
_EMPTY_SQL = r"regexp_full_match(coalesce(answer, ''), '[\s\p{Z}]*')"
_MODES = {"greedy": "greedy answers", "sample": "samples"}


def remarks_of(reader: Reader, manifest: Manifest) -> list[Remark]:
    """What there is to say of a run, the answers first; of an unfinished one, as far as it came. The certificate has its own."""
    known = set(reader.tables())
    found: list[Remark] = []
    for needs, look in _LOOKS:
        if known.issuperset(needs):
            found += look(reader, manifest)
    return [replace(r, title=TITLES[r.kind]) for r in found]


# -- answers


def _empty(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    asked = _per_condition(
        reader,
        "completions",
        _EMPTY_SQL,
        f"{_EMPTY_SQL} AND (finish_reason = 'newline' OR contains(text, chr(10)))",
    )
    remarked = {c: modes for c, modes in asked.items() if _is_many(modes, EMPTY)}
    number = sum(row["number"] for modes in remarked.values() for row in modes.values())
    by_newline = sum(row["also"] for modes in remarked.values() for row in modes.values())
    advice = _to_be_answered(manifest, begins_lines=2 * by_newline > number)
    for condition, modes in remarked.items():
        yield _of_modes("empty", condition, modes, "empty", advice)


def _to_be_answered(manifest: Manifest, begins_lines: bool) -> str:
    """What to try where a model does not answer."""
    if manifest.model.chat_template_sha256 and not own_setting(manifest, "chat"):
        return "Try `--gravity.chat true`: the model has a chat template, and was asked in raw text."
    if begins_lines:
        return (
            "Most of them begin with a new line, where the answer ends. Try a template of your own that ends where the "
            "answer begins (`[gravity.templates]`), or `--gravity.stop_at_newline false` to see what comes after it."
        )
    return "The model ends its text at once. Try other words (`[gravity.templates]`), or a model that follows instructions."


def _cut(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    # What stands behind a newline is no part of the answer, so an answer that has one is whole.
    for condition, modes in _per_condition(
        reader, "completions", "finish_reason = 'length' AND NOT contains(text, chr(10))"
    ).items():
        if _is_many(modes, CUT):
            names = {"greedy": "greedy", "sample": "samples"}
            raised = [
                f"`--gravity.max_new_tokens_{names[mode]} {2 * limit}`"
                for mode, row in modes.items()
                if _is_many({mode: row}, CUT)
                and isinstance(limit := own_setting(manifest, f"max_new_tokens_{names[mode]}"), int)
            ]
            told = f" Try {' and '.join(raised)}." if raised else ""
            advice = f"An X that would have come later is not counted.{told}"
            yield _of_modes("cut", condition, modes, "cut by their length", advice)


def _one_outcome(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    advice = (
        "Where all end alike there is nothing to compare. Try more prompts (`--limit all`), or prompts that pull {} "
        "toward X."
    )
    for condition, modes in _per_condition(reader, "detections", "word_present").items():
        modes = {mode: row for mode, row in modes.items() if row["total"] >= FEWEST}
        for none, way in ((True, "more"), (False, "less")):
            alike = {m: r for m, r in modes.items() if r["number"] == (0 if none else r["total"])}
            if condition != "baseline" and alike:
                told = " and ".join(f"{r['total']:,} {_MODES[m]}" for m, r in alike.items())
                total = sum(r["total"] for r in alike.values())
                yield Remark(
                    "one_outcome",
                    condition,
                    0 if none else total,
                    total,
                    f"Under {condition}, {'none' if none else 'each'} of {told} says X.",
                    advice.format(way),
                )


def _per_condition(reader: Reader, table: str, is_so: str, also: str = "FALSE") -> dict[str, dict[str, Row]]:
    """condition -> mode -> number of rows that are so, of these also so, and total; baseline and greedy first."""
    rows = reader.query(
        f"SELECT condition, mode, count(*) AS total, count(*) FILTER ({is_so}) AS number, count(*) FILTER ({also}) AS also "
        f"FROM {table} WHERE mode IN ('greedy', 'sample') GROUP BY condition, mode "
        "ORDER BY condition <> 'baseline', condition, mode"
    )
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        found.setdefault(row["condition"], {})[row["mode"]] = row
    return found


def _is_many(modes: Mapping[str, Row], share: float) -> bool:
    return any(row["total"] >= FEWEST and row["number"] >= share * row["total"] for row in modes.values())


def _of_modes(kind: Kind, condition: str, modes: Mapping[str, Row], how: str, advice: str) -> Remark:
    seen = {mode: row for mode, row in modes.items() if row["number"]}
    told = " and ".join(share_told(row["number"], row["total"], _MODES[mode]) for mode, row in seen.items())
    number, total = (sum(row[key] for row in seen.values()) for key in ("number", "total"))
    return Remark(kind, condition, number, total, f"Under {condition}, {told} are {how}.", advice)


# -- pressure


def _one_bin(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    rows = reader.query("SELECT p_sem FROM psem WHERE condition = 'baseline' AND p_sem IS NOT NULL")
    if len(rows) < FEWEST:
        return
    (fullest, number), *_ = Counter(bin_of(row["p_sem"]) for row in rows).most_common(1)
    if number >= ONE_BIN * len(rows):
        p0 = [row["p_sem"] for row in rows]
        weak = " or a model that is surer of its answers" if fullest == 0 else " or harder questions"
        yield Remark(
            "one_bin",
            None,
            number,
            len(rows),
            f"{share_told(number, len(rows), 'prompts')} have a P0 in {BIN_NAMES[fullest]}; all lie from {min(p0):.3f} "
            f"to {max(p0):.3f}.",
            f"How violation changes beyond these cannot be read from this run. Try prompts of other pressure "
            f"(`--prompts FILE`){weak}.",
        )


def _fit(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    """A slope that the data leave open, and a fit that they do not determine at all."""
    more = "Try more prompts (`--limit all`), or prompts whose P0 lie further apart."
    pressed = reader.query(
        "SELECT v.condition, count(*) AS n, min(b.p_sem) AS low, max(b.p_sem) AS high, "
        "sum(v.num_violations) AS said, sum(v.num_samples) AS samples FROM violation v "
        "JOIN psem b ON b.prompt_id = v.prompt_id AND b.condition = 'baseline' "
        "WHERE v.condition <> 'baseline' GROUP BY v.condition ORDER BY v.condition"
    )
    slopes = {
        r["condition"]: r for r in reader.query("SELECT * FROM statistics WHERE analysis = 'fit' AND measure = 'slope'")
    }
    is_analysed = bool(reader.query("SELECT 1 FROM statistics WHERE analysis = 'rates' LIMIT 1"))
    for row in pressed:
        slope, n = slopes.get(row["condition"]), row["n"]
        if slope is None:
            if is_analysed and n >= FEWEST and 0 < row["said"] < row["samples"]:
                yield Remark(
                    "fit",
                    row["condition"],
                    n,
                    n,
                    f"Under {row['condition']}, {n:,} prompts with P0 from {row['low']:.3f} to {row['high']:.3f} do not "
                    "determine how violation changes with pressure: there is no fit.",
                    more,
                )
        elif slope["low"] is not None and (slope["high"] - slope["low"]) * (row["high"] - row["low"]) > WIDE:
            yield Remark(
                "fit",
                row["condition"],
                n,
                n,
                f"Under {row['condition']}, the slope of the fit is nearly free: {slope['low']:.1f} to {slope['high']:.1f}, "
                f"from {n:,} prompts with P0 from {row['low']:.3f} to {row['high']:.3f}.",
                more,
            )


def _split(reader: Reader, manifest: Manifest) -> Iterator[Remark]:
    (row,) = reader.query(
        "SELECT count(*) AS total, count(*) FILTER (shortest > 1) AS number FROM ("
        "SELECT prompt_id, min(list_min([len(s) FOR s IN sequences])) AS shortest FROM psem "
        "WHERE len(sequences) > 0 GROUP BY prompt_id)"
    )
    if row["total"] >= FEWEST and row["number"] >= SPLIT * row["total"]:
        yield Remark(
            "split",
            None,
            row["number"],
            row["total"],
            f"The tokenizer splits X in {share_told(row['number'], row['total'], 'prompts')}: no spelling of it is one token.",
            "P(X) is of the whole word, lens and contributions of its first token only. Add `single_token` to `--stages` to "
            "keep the prompts whose X is one token.",
        )


_Look = Callable[[Reader, Manifest], Iterator[Remark]]
_LOOKS: tuple[tuple[tuple[str, ...], _Look], ...] = (
    (("completions",), _empty),
    (("completions",), _cut),
    (("detections",), _one_outcome),
    (("psem",), _one_bin),
    (("violation", "psem", "statistics"), _fit),
    (("psem",), _split),
)
"""What each look needs to be in the snapshot, in the order of showing."""
