"""Stage `analysis`: every number of the report, with its interval, its p and its share of false discoveries.

One item an analysis, named by what it rests on: what is measured again or more of is analysed again, and its rows take the
place of the older ones. What was not measured gives no rows.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from types import MappingProxyType
from typing import Any

import numpy as np
from scipy.stats import binomtest

from harness.engine import AnyTables, FileHandle, Item, ItemResult, Tables
from harness.experiments.lda.inputs import MODE, Inputs, item_key
from harness.experiments.lda.schema import NATURAL
from harness.experiments.lda.settings import LdaSettings
from harness.experiments.lda.stages.diff_tokens import KIND, read_sums
from harness.models.raised import PLACES
from harness.rates import (
    FEWEST_HITS,
    FEWEST_PROMPTS,
    Drawn,
    extrapolated_rate,
    natural_rate,
)
from harness.stats import NUM_BOOTSTRAPS, benjamini_hochberg, mean_interval, paired_differences

Row = dict[str, Any]
_LENGTH = 1  # per item: no tokens, so all analyses fit in one batch
_CHUNK = 4_096
"""Hits whose log-probabilities are in memory at once."""
_KEY = ("prompt_id", "condition", "mode", "sample_id")
_EMPTY: Row = dict.fromkeys(("value", "se", "low", "high", "p", "q"))
_RULE_OF_THREE = 3.0
"""Upper 95 % bound of a rate that was seen 0 times in n: 3/n (Hanley & Lippman-Hand 1983)."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one detector said of one rollout, by its prompt, arm and sample; of a hit the log-probability up to the step at
    which it was sure, naturally and under each arm."""

    prompt_id: str
    condition: str
    sample_id: int
    is_hit: bool
    logp_natural: float = math.nan
    logp_arms: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Used:
    """One analysis by name, and all that it rests on."""

    analysis: str
    verdicts: Mapping[str, tuple[Verdict, ...]] = field(default_factory=dict)
    """By detector."""
    rows: tuple[tuple[Any, ...], ...] = ()
    file: FileHandle | None = None


@dataclass(frozen=True)
class Analysis:
    """Writes `statistics` and `token_diffs`. Uses what the other stages wrote, and no model."""

    arms: Mapping[str, float]
    num_planned: int
    """Rollouts of each arm, failed ones too."""
    settings: LdaSettings
    seed: int
    num_bootstraps: int = NUM_BOOTSTRAPS
    name = "analysis"
    version = 1
    reads = MappingProxyType(
        {
            "hits": (*_KEY, "detector", "is_hit", "end_step"),
            "rollouts": (*_KEY, "logp_after", "arm_steps"),
            "exact_rates": ("prompt_id", "detector", "condition", "logp", "logp_after", "logp_left_out"),
            "rollout_summaries": (*_KEY, "num_tokens", "finish_reason", "mass_removed", "branch_step"),
            "artifacts": ("path", "kind", "sha256"),
        }
    )
    row_bytes = 5_000_000

    @classmethod
    def build(cls, given: Inputs) -> "Analysis":
        return cls(given.arms, len(given.prompts) * given.settings.num_samples, given.settings, given.seed)

    def params(self) -> dict[str, Any]:
        return {"natural_rate": self.settings.natural_rate, "num_bootstraps": self.num_bootstraps}

    def items(self, tables: AnyTables) -> list[Item[Used]]:
        given = Tables.of(tables)
        verdicts = self._verdicts(given)
        exact = _sorted(given, "exact_rates")
        found = [Used("rates", verdicts), Used("contrasts", verdicts), Used("natural", verdicts, exact)]
        found += [Used("exact", rows=exact), Used("rollouts", rows=_sorted(given, "rollout_summaries"))]
        sums = [r for r in given["artifacts"] if r["kind"] == KIND]
        found += [Used(f"tokens {place}", file=given.file(r["path"])) for r in sums[-1:] for place in PLACES]
        return [Item(item_key(used.analysis, _digest(used)), _LENGTH, used) for used in found]

    def most_items(self, num_subjects: int) -> int:
        return 5 + len(PLACES)

    def setup(self) -> None:
        return None

    def run(self, context: None, items: Sequence[Item[Used]]) -> list[ItemResult]:
        return [self._one(item) for item in items]

    def _one(self, item: Item[Used]) -> ItemResult:
        used = item.payload
        if used.file is not None:
            place = used.analysis.split()[-1]
            rows = token_rows(used.file, place)
            return ItemResult(item.key, {"token_diffs": rows}, replaces={"token_diffs": {"place": place}})
        compute = {
            "rates": self._rates,
            "contrasts": self._contrasts,
            "natural": self._natural,
            "exact": self._exact,
            "rollouts": self._rollouts,
        }
        rows = [_complete(used.analysis, row) for row in compute[used.analysis](used)]
        return ItemResult(item.key, {"statistics": rows}, replaces={"statistics": {"analysis": used.analysis}})

    # ---- what is used ---------------------------------------------------------------------------------------------

    def _verdicts(self, tables: Tables) -> dict[str, tuple[Verdict, ...]]:
        """By detector, in the order of prompt, arm and sample."""
        found: dict[str, list[Verdict]] = defaultdict(list)
        waiting: list[Row] = []
        for row in tables.streamed("hits"):
            if row["is_hit"]:
                waiting.append(row)
            else:
                found[row["detector"]].append(Verdict(row["prompt_id"], row["condition"], row["sample_id"], False))
        for n in range(0, len(waiting), _CHUNK):
            for detector, verdict in _weighed(tables, waiting[n : n + _CHUNK], len(self.arms)):
                found[detector].append(verdict)
        order = {condition: n for n, condition in enumerate(self.arms)}
        return {
            detector: tuple(sorted(some, key=lambda v: (v.prompt_id, order[v.condition], v.sample_id)))
            for detector, some in sorted(found.items())
        }

    # ---- analyses -------------------------------------------------------------------------------------------------

    def _rates(self, used: Used) -> Iterator[Row]:
        for detector, verdicts in used.verdicts.items():
            for condition in self.arms:
                counts = _counts(v for v in verdicts if v.condition == condition)
                if counts:
                    yield from self._rate_rows(detector, condition, counts)

    def _rate_rows(self, detector: str, condition: str, counts: Mapping[str, tuple[int, int]]) -> Iterator[Row]:
        of = {"detector": detector, "condition": condition, "n": len(counts)}
        num_hits, num = (sum(c[k] for c in counts.values()) for k in (0, 1))
        yield {**of, **self._rate(counts), "measure": "rate"}
        if num == len(counts):
            low, high = binomtest(num_hits, num).proportion_ci(method="wilson")
            told = "Wilson's interval; one rollout a prompt"
            yield {**of, "measure": "rate_wilson", "value": num_hits / num, "low": low, "high": high, "method": told}
        for measure, value in (("hits", num_hits), ("judged", num), ("failed", self.num_planned - num)):
            yield {**of, "measure": measure, "value": value, "method": "rollouts"}

    def _rate(self, counts: Mapping[str, tuple[int, int]]) -> Row:
        """Mean over prompts of the share of hits."""
        num_hits, num = (sum(c[k] for c in counts.values()) for k in (0, 1))
        found = mean_interval([hits / of for hits, of in counts.values()], self.seed, self.num_bootstraps)
        row = {"value": found.mean, "se": found.se, "low": found.low, "high": found.high}
        if num_hits in (0, num):
            bound = min(1.0, _RULE_OF_THREE / num)
            ends = {"low": 0.0, "high": bound} if not num_hits else {"low": 1 - bound, "high": 1.0}
            return {
                **row,
                "se": None,
                **ends,
                "method": f"mean over prompts; {num_hits} of {num:,} hits: rule of three",
            }
        return {**row, "method": f"mean over prompts; percentile bootstrap over them, B={self.num_bootstraps}"}

    def _contrasts(self, used: Used) -> Iterator[Row]:
        """Each arm less the model after, rollouts of one prompt and sample against each other."""
        rows = []
        for detector, verdicts in used.verdicts.items():
            said = {(v.prompt_id, v.sample_id, v.condition): v.is_hit for v in verdicts}
            for condition in self.arms:
                if condition != NATURAL and NATURAL in self.arms:
                    row = self._contrast(said, condition)
                    rows += [{**row, "detector": detector, "condition": condition}] if row else []
        tested = [row for row in rows if row["p"] is not None and math.isfinite(row["p"])]
        qs = benjamini_hochberg(np.array([row["p"] for row in tested], dtype=np.float64))
        for row, q in zip(tested, qs, strict=True):
            row["q"] = float(q)
        yield from rows

    def _contrast(self, said: Mapping[tuple[str, int, str], bool], condition: str) -> Row | None:
        by_prompt: dict[str, list[tuple[bool, bool]]] = defaultdict(list)
        for prompt_id, sample_id, of in said:
            if of == condition and (prompt_id, sample_id, NATURAL) in said:
                key = (prompt_id, sample_id)
                by_prompt[prompt_id].append((said[*key, condition], said[*key, NATURAL]))
        if not by_prompt:
            return None
        one, other = (
            np.array([[np.mean([pair[k] for pair in pairs])] for pairs in by_prompt.values()]) for k in (0, 1)
        )
        found = paired_differences(one, other, self.seed, self.num_bootstraps)
        return {
            "measure": "contrast",
            **{name: float(getattr(found, name)[0]) for name in ("value", "se", "low", "high", "p")},
            "n": len(by_prompt),
            "method": f"rate less that of {NATURAL}, paired by prompt and sample; bootstrap over prompts, "
            f"B={self.num_bootstraps}; p by the paired t, q by Benjamini-Hochberg over detectors × arms",
        }

    def _natural(self, used: Used) -> Iterator[Row]:
        """The rate at α = 0 by every way there is to it."""
        exact: dict[str, list[float]] = defaultdict(list)
        # Every arm has a row of a prompt, and each of these the model after.
        for _, detector, _, _, logp_after, _ in {(r[0], r[1]): r for r in used.rows}.values():
            exact[detector].append(_exp(logp_after))
        detectors = sorted({*used.verdicts, *exact})
        for detector in detectors:
            of = {"detector": detector, "condition": NATURAL}
            verdicts = used.verdicts.get(detector, ())
            if detector in exact:
                told = "of beginning with the phrase; exact, for these prompts"
                yield {**of, "measure": "exact", "value": float(np.mean(exact[detector])), "n": len(exact[detector]),
                       "method": told}  # fmt: skip
            counts = _counts(v for v in verdicts if v.condition == NATURAL)
            if counts:
                row = self._rate(counts)
                cut = f"; not natural: {self.settings.cut}" if self.settings.cut else ""
                yield {**of, **row, "measure": "counted", "n": len(counts), "method": row["method"] + cut}
            if verdicts:
                yield from ({**of, **row} for row in self._reweighted(verdicts))
                yield {**of, **self._extrapolated(verdicts)}

    def _reweighted(self, verdicts: Sequence[Verdict]) -> Iterator[Row]:
        if self.settings.natural_rate == "off":
            return
        if cut := self.settings.cut:
            yield {"measure": "reweighted", "n": 0, "method": f"not given: {cut}"}
            return
        prompts = {prompt_id: n for n, prompt_id in enumerate(dict.fromkeys(v.prompt_id for v in verdicts))}
        arms = {condition: n for n, condition in enumerate(self.arms)}
        nothing = (math.nan,) * len(arms)
        drawn = Drawn(
            np.array([prompts[v.prompt_id] for v in verdicts]),
            np.array([arms[v.condition] for v in verdicts]),
            np.array([v.is_hit for v in verdicts]),
            np.array([v.logp_natural for v in verdicts]),
            np.array([v.logp_arms or nothing for v in verdicts]),
        )
        found = natural_rate(drawn, self.seed)
        e = found.estimate
        few = "" if len(prompts) >= FEWEST_PROMPTS else f"; no interval from fewer than {FEWEST_PROMPTS} prompts"
        told = f"balance heuristic over {len(arms)} arms, {found.num_hits} hits; bootstrap over prompts{few}"
        if not found.num_hits:  # nothing to weigh: an interval from 0 to 0 would claim what was not seen
            told += "; no hit in any arm: there is nothing to reweight"
            yield {"measure": "reweighted", "n": len(prompts), "method": told}
            return
        yield {"measure": "reweighted", "value": e.mean, "se": e.se, "low": e.low, "high": e.high, "n": len(prompts),
               "method": told}  # fmt: skip
        yield {
            "measure": "effective_hits",
            "value": found.effective_size,
            "n": found.num_hits,
            "method": "equally weighted hits that the hits are worth (Kish)",
        }

    def _extrapolated(self, verdicts: Sequence[Verdict]) -> Row:
        counts = {c: _counts(v for v in verdicts if v.condition == c) for c in self.arms}
        hits, num = ([sum(x[k] for x in counts[c].values()) for c in self.arms] for k in (0, 1))
        value = extrapolated_rate(list(self.arms.values()), hits, num)
        used = sum(a > 0 and FEWEST_HITS <= h < n for a, h, n in zip(self.arms.values(), hits, num, strict=True))
        told = f"line through logit(rate) of the {used} arms above 0 with {FEWEST_HITS} hits or more, read off at 0; no interval"
        return {"measure": "extrapolated", "value": value, "n": used, "method": told}

    def _exact(self, used: Used) -> Iterator[Row]:
        by_cell: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
        for _, detector, condition, logp, _, left_out in used.rows:
            by_cell[detector, condition].append((_exp(logp), _exp(left_out)))
        for (detector, condition), found in sorted(by_cell.items()):
            value, more = (float(np.mean([pair[k] for pair in found])) for k in (0, 1))
            told = "exact, for these prompts; the upper end adds the tokenisations that were not followed"
            yield {"detector": detector, "condition": condition, "measure": "rate", "value": value, "low": value,
                   "high": min(1.0, value + more), "n": len(found), "method": told}  # fmt: skip

    def _rollouts(self, used: Used) -> Iterator[Row]:
        """How rollouts of an arm look, whatever is in them."""
        by_arm: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        for _, condition, mode, _, *rest in used.rows:
            if mode == MODE:
                by_arm[condition].append(tuple(rest))
        for condition in self.arms:
            rows = by_arm.get(condition, [])
            if not rows:
                continue
            measures = {
                "num_tokens": (np.mean([r[0] for r in rows]), "mean tokens a rollout"),
                "ended": (np.mean([r[1] == "stop" for r in rows]), "share that ended by themselves"),
                "mass_removed": (np.mean([r[2] for r in rows]), "mean over rollouts of what floor and top-p left out"),
            }
            if NATURAL in self.arms and condition != NATURAL and self.settings.common_noise:
                parted = np.mean([r[3] is not None for r in rows])
                measures["branched"] = (parted, f"share whose text is not that of {NATURAL} with the same noise")
            for measure, (value, told) in measures.items():
                yield {"detector": "", "condition": condition, "measure": measure, "value": float(value),
                       "n": len(rows), "method": told}  # fmt: skip


def token_rows(file: FileHandle, place: str) -> list[Row]:
    """Rows of `token_diffs`, one a token."""
    sums, k = read_sums(file), PLACES.index(place)
    columns = (sums.n[k], sums.mean[k], sums.sd[k], sums.positive[k], sums.top[k])
    return [
        {
            "token_id": token,
            "place": place,
            "n": int(n),
            "mean": _finite(mean),
            "sd": _finite(sd),
            "share_positive": _finite(positive / n) if n else None,
            "num_top": int(top),
        }
        for token, (n, mean, sd, positive, top) in enumerate(zip(*columns, strict=True))
    ]


def _weighed(tables: Tables, hits: Sequence[Row], num_arms: int) -> Iterator[tuple[str, Verdict]]:
    """Hits with their log-probabilities up to the step at which each was sure."""
    keys = [{name: row[name] for name in _KEY} for row in hits]
    wanted = list({tuple(key.values()): key for key in keys}.values())
    steps = {tuple(row[name] for name in _KEY): row for row in tables.rows_with("rollouts", wanted)}
    for row, key in zip(hits, keys, strict=True):
        found, until = steps[tuple(key.values())], row["end_step"] + 1
        after = found["logp_after"]
        natural = math.nan if after is None else math.fsum(after[:until])
        # Every arm's number of a step, then those of the next one.
        arms = tuple(math.fsum(found["arm_steps"][k : until * num_arms : num_arms]) for k in range(num_arms))
        yield row["detector"], Verdict(row["prompt_id"], row["condition"], row["sample_id"], True, natural, arms)


def _counts(verdicts: Iterable[Verdict]) -> dict[str, tuple[int, int]]:
    """Hits and rollouts of each prompt."""
    found: dict[str, tuple[int, int]] = {}
    for v in verdicts:
        hits, num = found.get(v.prompt_id, (0, 0))
        found[v.prompt_id] = (hits + v.is_hit, num + 1)
    return found


def _sorted(tables: Tables, name: str) -> tuple[tuple[Any, ...], ...]:
    """A table's rows as the stage asked for them, in an order of their own."""
    columns = Analysis.reads[name]
    rows = (tuple(row[c] for c in columns) for row in tables.streamed(name))
    return tuple(sorted(rows, key=lambda row: [*map(str, row[:4])]))


def _digest(used: Used) -> str:
    """Follows from what an analysis rests on, and from nothing else."""
    digest = blake2b(digest_size=8)
    digest.update(repr((used.rows, sorted(used.verdicts.items()))).encode())
    digest.update((used.file.sha256 if used.file else "").encode())
    return digest.hexdigest()


def _complete(analysis: str, row: Row) -> Row:
    """A row of `statistics` with all its columns. What is not determined is NULL, where the arithmetic says NaN."""
    row = _EMPTY | row | {"analysis": analysis}
    for column in _EMPTY:
        row[column] = _finite(row[column])
    return row


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _exp(logp: float | None) -> float:
    return 0.0 if logp is None else math.exp(logp)
