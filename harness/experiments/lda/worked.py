"""Worked hits: completions in which a detector fired, cut into their tokens, each with what the training did to it.

Works from stored texts alone: the tokenizer need not be at hand. Escapes nothing: its text is data, and for whoever shows it
to make harmless.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import NamedTuple

from harness.experiments.lda.schema import NATURAL
from harness.store import Reader, Row

NUM_EXAMPLES = 20
SCALE = 3.0
"""Nats from which a token has the full colour: 20 times as likely, or a twentieth."""
_MOST_TOKENS = 400
"""Of a completion that is shown, those around its hit."""
_BEHIND = 60
"""Of them, how many behind the hit."""
_MOST_CONTEXT = 1_500
"""Signs of a prompt that are shown: its last ones."""


class Piece(NamedTuple):
    """A piece of a completion: a token, or several that write a character between them, or a part of one at an end of the
    hit."""

    text: str
    shift: float | None = None
    """Log-probability after less that before, in nats; None where only one of the models is known."""
    is_hit: bool = False
    is_special: bool = False
    """A token that the text does not show, by its name."""
    is_branch: bool = False
    """Here the rollout parts from that at α = 0."""

    @property
    def shade(self) -> float:
        """From −1 to 1."""
        return 0.0 if self.shift is None else max(-1.0, min(1.0, self.shift / SCALE))

    @property
    def told(self) -> str:
        """The difference in words."""
        return "" if self.shift is None else f"{self.shift:+.2f} nats".replace("-", "−")


@dataclass(frozen=True)
class Example:
    """One hit, worked: all the page shows of it."""

    row: Row
    """detector, prompt_id, condition, alpha, sample_id, branch_step, finish_reason."""
    context: str
    """The end of what the model was given."""
    is_context_cut: bool
    pieces: Sequence[Piece]
    num_before: int
    """Tokens of the completion that stand before the first piece, not shown, and behind the last."""
    num_behind: int
    shift: float | None
    """Log-probability after less that before, of all tokens up to where the detector was sure."""
    steps: Sequence[tuple[str, str, str, str]]
    """Token, log-probability after, before, their difference."""


def examples(reader: Reader) -> list[Example]:
    """At most `NUM_EXAMPLES` hits, from every detector and arm in turn: of each prompt the sample that the training raised
    most, and of prompts those not shown yet."""
    rows = reader.query(
        f"""
        WITH raised AS (
            SELECT h.prompt_id, h.condition, h.mode, h.sample_id, h.detector, h.first_step, h.end_step, h.char_span, a.alpha,
                   coalesce(list_sum(r.logp_after[:h.end_step + 1]) - list_sum(r.logp_before[:h.end_step + 1]), 0) AS shift
            FROM hits h JOIN arms a USING (condition) JOIN rollouts r USING (prompt_id, condition, mode, sample_id)
            WHERE h.is_hit),
        one AS (
            SELECT * FROM raised
            QUALIFY row_number() OVER (PARTITION BY detector, condition, prompt_id ORDER BY shift DESC, sample_id) = 1)
        SELECT * FROM one
        QUALIFY row_number() OVER (PARTITION BY detector, condition ORDER BY shift DESC, prompt_id) <= {NUM_EXAMPLES}
        ORDER BY detector, abs(alpha), alpha, shift DESC, prompt_id
        """
    )
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["detector"], row["condition"]), []).append(row)
    return [_example(reader, row) for row in _in_turn([*groups.values()])[:NUM_EXAMPLES]]


def _in_turn(groups: Sequence[list[Row]]) -> list[Row]:
    """One of each group after the other, of a prompt that its detector was not shown for yet; then those that were left."""
    left, found = [[*group] for group in groups], []
    seen: set[tuple[str, str]] = set()
    while True:
        turn = []
        for group in left:
            row = next((r for r in group if (r["detector"], r["prompt_id"]) not in seen), None)
            if row is not None:
                group.remove(row)
                seen.add((row["detector"], row["prompt_id"]))
                turn.append(row)
        if not turn:
            return [*found, *(row for again in zip_longest(*left) for row in again if row is not None)]
        found += turn


def _example(reader: Reader, row: Row) -> Example:
    key = [row["prompt_id"], row["condition"], row["mode"], row["sample_id"]]
    here = "prompt_id = ? AND condition = ? AND mode = ? AND sample_id = ?"
    (found,) = reader.query(
        f"SELECT * FROM completions JOIN rollouts USING (prompt_id, condition, mode, sample_id) WHERE {here}", key
    )
    context = reader.query("SELECT text FROM contexts WHERE prompt_id = ?", [row["prompt_id"]])
    token_ids = found["token_ids"]
    names = {
        r["token_id"]: (r["text"], r["is_special"])
        for r in reader.query("SELECT * FROM vocabulary WHERE list_contains(?, token_id)", [sorted(set(token_ids))])
    }
    after, before = (found[side] or [None] * len(token_ids) for side in ("logp_after", "logp_before"))
    shifts = [None if a is None or b is None else a - b for a, b in zip(after, before, strict=True)]
    branch = _branch(reader, row, token_ids)
    texts = [names.get(token, ("", False)) for token in token_ids]
    start, end = _window(len(token_ids), row["end_step"])
    placed = list(aligned(found["text"], texts))
    pieces = pieces_of(found["text"], placed, texts, shifts, tuple(row["char_span"]), branch, start, end)
    text = context[0]["text"] if context else ""
    until = [x for x in shifts[: row["end_step"] + 1] if x is not None]
    return Example(
        row={**row, "branch_step": branch, "finish_reason": found["finish_reason"]},
        context=text[-_MOST_CONTEXT:],
        is_context_cut=len(text) > _MOST_CONTEXT,
        pieces=pieces,
        num_before=start,
        num_behind=len(token_ids) - end,
        shift=math.fsum(until) if until else None,
        steps=[(repr(texts[n][0]), _nats(after[n]), _nats(before[n]), _nats(shifts[n])) for n in range(start, end)],
    )


def _branch(reader: Reader, row: Row, token_ids: Sequence[int]) -> int | None:
    """The first token that differs from the rollout at α = 0 of the same sample. The view `amplified` says so of all rows at
    once, which takes long."""
    if row["condition"] == NATURAL:
        return None
    other = reader.query(
        "SELECT token_ids FROM completions WHERE prompt_id = ? AND condition = ? AND mode = ? AND sample_id = ?",
        [row["prompt_id"], NATURAL, row["mode"], row["sample_id"]],
    )
    if not other:
        return None
    pairs = enumerate(zip_longest(token_ids, other[0]["token_ids"]))
    return next((n for n, (one, two) in pairs if one != two), None)


def _window(num_tokens: int, end_step: int) -> tuple[int, int]:
    """Which tokens to show: the first ones, or those up to a little behind the hit."""
    end = min(num_tokens, max(_MOST_TOKENS, end_step + 1 + _BEHIND))
    return max(0, end - _MOST_TOKENS), end


def aligned(text: str, texts: Sequence[tuple[str, bool]]) -> Iterator[tuple[int, int, list[int]]]:
    """The text cut where tokens begin: [start, end) and the steps that write it; `texts` are the tokens' own and whether each is
    special. Together the cuts are the text.

    A token that writes a part of a character only has no text of its own to be found, and goes with its neighbours; a special
    one, of which the text shows nothing, has an empty cut.
    """
    done = 0
    waiting: list[int] = []
    behind: list[int] = []  # special ones that came while others waited
    for step, (own, is_special) in enumerate(texts):
        if is_special:
            behind.append(step)
        else:
            # A tokenizer may drop the space in front of a text's first word.
            own = own.lstrip(" ") if not done and not text.startswith(own) else own
            at = _found(text, own, done, len(waiting))
            if at is None:
                waiting.append(step)
                continue
            if waiting:
                yield done, at, waiting
            yield from ((at, at, [one]) for one in behind)
            yield at, at + len(own), [step]
            done, waiting, behind = at + len(own), [], []
        if not waiting:
            yield from ((done, done, [one]) for one in behind)
            behind = []
    if waiting or done < len(text):
        yield done, len(text), waiting
    yield from ((len(text), len(text), [one]) for one in behind)


def _found(text: str, own: str, done: int, num_waiting: int) -> int | None:
    """Where a token's text stands: at the place that was reached, or behind the few characters that others are to write."""
    if not own or "\ufffd" in own:
        return None
    if not num_waiting:
        return done if text.startswith(own, done) else None
    at = text.find(own, done + 1, done + num_waiting + len(own) + 1)
    return None if at < 0 else at


def pieces_of(
    text: str,
    placed: Sequence[tuple[int, int, list[int]]],
    texts: Sequence[tuple[str, bool]],
    shifts: Sequence[float | None],
    hit: tuple[int, ...],
    branch: int | None = None,
    start: int = 0,
    end: int | None = None,
) -> list[Piece]:
    """The tokens from step `start` to `end` as pieces of text, cut where the hit begins and ends."""
    last = len(texts) if end is None else end
    found: list[Piece] = []
    for a, b, steps in placed:
        if steps and (steps[0] >= last or steps[-1] < start):
            continue
        known = [x for step in steps if (x := shifts[step]) is not None]
        shift = math.fsum(known) if known else None
        is_branch = branch in steps
        if a == b:
            found += [Piece(texts[n][0], shifts[n], False, True, n == branch) for n in steps if texts[n][1]]
            continue
        cuts = sorted({a, b, *(place for place in hit if a < place < b)})
        for left, right in pairwise(cuts):
            inside = hit[0] <= left and right <= hit[1]
            found.append(Piece(text[left:right], shift, inside, False, is_branch and left == a))
    return found


def _nats(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}".replace("-", "−")
