"""The page Amplification's drawings: rates against α, a rollout as chips shaded by what the training changed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pandas as pd

from app.charts import COLOURS, GREEN, ORANGE, Option
from app.charts.chips import Chip, shade
from app.charts.lda import number_told, rate_told

RAISED, LOWERED = (213, 94, 0), (0, 114, 178)
"""Colours of what the training made likelier and less likely: Okabe and Ito's vermilion and blue."""
BRANCH = "▸"
_DEEPEST = 0.6
"""Opacity at the end of the scale: text stays readable on it, light and dark."""
_PAD, _STEP = 0.04, 0.012
"""Of the axis: what is left free at its ends, and how far two detectors' points stand apart."""
_SYMBOLS = ("circle", "rect", "diamond", "triangle")
_REPLACEMENT = "�"
"""What a part of a character looks like by itself."""


class Point(NamedTuple):
    """What a drawn point stands for."""

    detector: str
    condition: str


class _Drawn(NamedTuple):
    series: Option
    points: tuple[Point, ...] = ()


# -- rates


def rates(rows: pd.DataFrame, detectors: Sequence[str], chosen: Point | None, *, is_log: bool) -> Option:
    """The share of hits against α, a line a detector with 95 % intervals, its exact curve dashed beside it. `rows` are those
    of `queries.lda.amplification.rates`; `detectors` are all of the run, so that what is not measured yet changes no colour.

    A scale of logarithms has no zero: an arm without a hit stands there as a hollow triangle at the upper end of its
    interval, and its line leaves it out.
    """
    known = rows[rows["rate"].notna() | rows["exact"].notna()]
    series = [d.series for d in _drawn(known, detectors, is_log=is_log)] + _ring(
        known, detectors, chosen, is_log=is_log
    )
    alphas = sorted(set(known["alpha"]))
    pad = _PAD * _span(known)
    return {
        "grid": {"left": 12, "right": 24, "top": 48, "bottom": 12},
        "legend": {"top": 0, "type": "scroll", "itemWidth": 18, "data": list(dict.fromkeys(s["name"] for s in series))},
        "tooltip": {"trigger": "item", "formatter": "{b}"},
        "xAxis": {
            "type": "value",
            "name": "α",
            "nameLocation": "middle",
            "nameGap": 28,
            "min": _rounded(alphas[0] - pad) if alphas else None,
            "max": _rounded(alphas[-1] + pad) if alphas else None,
            "axisLabel": {"showMinLabel": False, "showMaxLabel": False},
        },
        "yAxis": {
            "type": "log" if is_log else "value",
            "name": "share of rollouts with a hit",
            "nameLocation": "middle",
            "nameGap": 52,
            "min": floor_of(known) if is_log else 0,
            "max": top_of(known, is_log=is_log),  # ECharts knows the points, and not how far their intervals go
        },
        "animation": False,
        "series": series,
    }


def clicked(rows: pd.DataFrame, detectors: Sequence[str], series: int, item: int, *, is_log: bool) -> Point | None:
    """The detector and arm behind a clicked point of `rates`; None for a click on something else."""
    known = rows[rows["rate"].notna() | rows["exact"].notna()]
    drawn = _drawn(known, detectors, is_log=is_log)
    if series >= len(drawn) or item >= len(drawn[series].points):
        return None
    return drawn[series].points[item]


def floor_of(rows: pd.DataFrame) -> float:
    """Where a scale of logarithms begins: the power of ten below all that is drawn on it and is not zero."""
    drawn = [v for column in ("rate", "low", "high", "exact") for v in rows[column].dropna() if v > 0]
    return 10.0 ** math.floor(math.log10(min(drawn))) if drawn else 1e-3


def top_of(rows: pd.DataFrame, *, is_log: bool) -> float:
    """Where the scale ends, intervals and all: at 1, 2 or 5 times a power of ten, on a scale of logarithms at a power."""
    drawn = [v for column in ("rate", "high", "exact") for v in rows[column].dropna() if v > 0]
    if not drawn:
        return 1.0
    power = math.floor(math.log10(max(drawn)))
    steps = (1.0, 10.0) if is_log else (1.0, 2.0, 5.0, 10.0)
    return min(1.0, next(float(f"{step:g}e{power}") for step in steps if max(drawn) <= step * 10.0**power * (1 + 1e-9)))


def _span(rows: pd.DataFrame) -> float:
    """How wide the arms lie; 1 where there is one alone."""
    return float(rows["alpha"].max() - rows["alpha"].min()) if rows["alpha"].nunique() > 1 else 1.0


def _beside(rows: pd.DataFrame, detectors: Sequence[str], name: str) -> float:
    """How far a detector's points stand from their α, so that no interval covers another one's."""
    if len(detectors) < 2:
        return 0.0
    step = min(_STEP, 2 * _PAD / len(detectors)) * _span(rows)
    return _rounded((detectors.index(name) - (len(detectors) - 1) / 2) * step)


def _drawn(rows: pd.DataFrame, detectors: Sequence[str], *, is_log: bool) -> list[_Drawn]:
    found: list[_Drawn] = []
    for n, name in enumerate(detectors):
        mine = rows[rows["detector"] == name]
        colour, symbol = COLOURS[n % len(COLOURS)], _SYMBOLS[n // len(COLOURS) % len(_SYMBOLS)]
        mine = mine.assign(x=mine["alpha"] + _beside(rows, detectors, name))
        counted = mine[mine["rate"].notna()]
        shown = counted[counted["rate"] > 0] if is_log else counted
        if len(shown):
            found.append(_counted(name, shown, colour, symbol, floor_of(rows) if is_log else 0.0))
        bounds = counted[(counted["rate"] <= 0) & (counted["high"] > 0)] if is_log else counted.head(0)
        if len(bounds):
            found.append(_bounds(name, bounds, colour))
        exact = mine[mine["exact"] > 0] if is_log else mine[mine["exact"].notna()]
        if len(exact):
            found.append(_exact(name, exact, colour))
    return found


def _counted(name: str, rows: pd.DataFrame, colour: str, symbol: str, floor: float) -> _Drawn:
    series: Option = {
        "type": "line",
        "name": name,
        "symbol": symbol,
        "symbolSize": 9,
        "z": 4,
        "selectedMode": "single",
        "itemStyle": {"color": colour},
        "lineStyle": {"color": colour, "width": 2},
        "data": [{"name": _told(r), "value": [r["x"], r["rate"]]} for r in rows.to_dict("records")],
    }
    whiskers = [
        [{"coord": [r["x"], max(r["low"], floor)]}, {"coord": [r["x"], r["high"]]}]
        for r in rows.to_dict("records")
        if r["low"] == r["low"] and r["high"] == r["high"]
    ]
    if whiskers:
        series["markLine"] = {
            "symbol": "none",
            "silent": True,
            "animation": False,
            "data": whiskers,
            "label": {"show": False},
            "lineStyle": {"color": colour, "type": "solid", "width": 2},
        }
    return _Drawn(series, _points(rows))


def _bounds(name: str, rows: pd.DataFrame, colour: str) -> _Drawn:
    series: Option = {
        "type": "scatter",
        "name": f"{name}: no hit, at most",
        "symbol": "triangle",
        "symbolRotate": 180,
        "symbolSize": 11,
        "z": 4,
        "selectedMode": "single",
        "itemStyle": {"color": "transparent", "borderColor": colour, "borderWidth": 2},
        "data": [{"name": _told(r), "value": [r["x"], r["high"]]} for r in rows.to_dict("records")],
    }
    return _Drawn(series, _points(rows))


def _exact(name: str, rows: pd.DataFrame, colour: str) -> _Drawn:
    series: Option = {
        "type": "line",
        "name": f"{name}: exact",
        "symbol": "circle",
        "symbolSize": 4,
        "itemStyle": {"color": colour},
        "lineStyle": {"color": colour, "width": 1.5, "type": "dashed"},
        "data": [{"name": _exact_told(r), "value": [r["x"], r["exact"]]} for r in rows.to_dict("records")],
    }
    return _Drawn(series, _points(rows))


def _points(rows: pd.DataFrame) -> tuple[Point, ...]:
    return tuple(Point(str(d), str(c)) for d, c in zip(rows["detector"], rows["condition"], strict=True))


def _ring(rows: pd.DataFrame, detectors: Sequence[str], chosen: Point | None, *, is_log: bool) -> list[Option]:
    if chosen is None or chosen.detector not in detectors:
        return []
    at = rows[(rows["detector"] == chosen.detector) & (rows["condition"] == chosen.condition) & rows["rate"].notna()]
    if at.empty:
        return []
    row = at.iloc[0]
    height = row["high"] if is_log and row["rate"] <= 0 else row["rate"]
    if height != height:
        return []
    return [
        {
            "type": "scatter",
            "name": "chosen",
            "data": [[float(row["alpha"]) + _beside(rows, detectors, chosen.detector), float(height)]],
            "silent": True,
            "symbol": "circle",
            "symbolSize": 20,
            "z": 5,
            "tooltip": {"show": False},
            "itemStyle": {"color": "transparent", "borderColor": ORANGE, "borderWidth": 3},
        }
    ]


def _told(row: Mapping[Any, Any]) -> str:
    hits = f"{int(row['hits']):,} of {int(row['judged']):,} rollouts"
    return f"{row['detector']}, α = {row['alpha']:g}: {rate_told(row['rate'], row['low'], row['high'])}, {hits}"


def _exact_told(row: Mapping[Any, Any]) -> str:
    more = row["left_out"]
    told = f" (tokenisations not followed: at most {number_told(more)} more)" if more == more and more > 0 else ""
    return f"{row['detector']}, α = {row['alpha']:g}: exactly {number_told(row['exact'])} begin with the phrase{told}"


def _rounded(value: float) -> float:
    return round(value, 6)


# -- what no hit says


def nothing_seen(rows: pd.DataFrame) -> list[str]:
    """What it means where a detector never fired, an arm a line, and in all arms together where it fired in none. `rows`: those
    of one detector of `queries.lda.amplification.rates`."""
    counted = rows[rows["rate"].notna()]
    never = counted[counted["hits"] == 0]
    told = [
        f"α = {r['alpha']:g}: no hit in {int(r['judged']):,} rollouts, so the rate is at most "
        f"{number_told(min(1.0, 3 / r['judged']))} (rule of three, 95 %)."
        for r in never.to_dict("records")
    ]
    if len(never) > 1 and len(never) == len(counted):
        judged = int(never["judged"].sum())
        told = [
            f"No hit in any arm, {judged:,} rollouts in all. Arm by arm the rate is at most "
            f"{number_told(min(1.0, 3 / float(never['judged'].max())))} (rule of three, 95 %).",
        ]
    if told:
        told.append(
            "That nothing was seen does not show that there is nothing: a rate n times smaller takes n times as many "
            "rollouts, a larger α, or a phrase whose probability is computed exactly (`at_start`)."
        )
    return told


# -- rollouts


class Piece(NamedTuple):
    """Tokens shown together, [start, stop), their text, and where it stands in the whole, in characters; None: not known."""

    start: int
    stop: int
    text: str
    chars: tuple[int, int] | None


def pieces(texts: Sequence[str], special: Sequence[bool], whole: str) -> list[Piece]:
    """Tokens with their texts, those joined that are parts of one character: what they are together stands in `whole`, the
    text that all of them decode to without the special ones."""
    found: list[Piece] = []
    at, n = 0, 0
    while n < len(texts):
        if special[n]:
            found.append(Piece(n, n + 1, texts[n], None))
            n += 1
        elif _REPLACEMENT not in texts[n]:
            text = texts[n] if whole.startswith(texts[n], at) else texts[n].lstrip(" ")
            is_here = bool(text) and whole.startswith(text, at)  # some tokenizers leave out the first blank
            found.append(Piece(n, n + 1, text if is_here else texts[n], (at, at + len(text)) if is_here else None))
            at += len(text) if is_here else 0
            n += 1
        else:
            stop = n
            while stop < len(texts) and not special[stop] and _REPLACEMENT in texts[stop]:
                stop += 1
            end = _begins(texts, special, stop, whole, at)
            text = whole[at:end]
            found.append(Piece(n, stop, text or "".join(texts[n:stop]), (at, end) if text else None))
            at, n = end, stop
    return found


def _begins(texts: Sequence[str], special: Sequence[bool], n: int, whole: str, at: int) -> int:
    """Where in the whole, at or behind `at`, the next token with a text of its own begins; its end where there is none."""
    for text, is_special in zip(texts[n:], special[n:], strict=True):
        if not is_special and text:
            found = whole.find(text, at)
            return found if found >= 0 else len(whole)
    return len(whole)


def differences(rollout: Mapping[str, Any]) -> list[float | None]:
    """ℓ_after − ℓ_before of each token, in nats; None where a model was not run."""
    after, before = rollout["logp_after"] or [], rollout["logp_before"] or []
    return [_less(_at(after, n), _at(before, n)) for n in range(len(rollout["token_ids"]))]


def widest(rollouts: Sequence[Mapping[str, Any]]) -> float:
    """The largest difference of any token of these, whichever its sign; 0 where none is known."""
    known = [abs(d) for r in rollouts for d in differences(r) if d is not None and math.isfinite(d)]
    return max(known, default=0.0)


def rollout_chips(rollout: Mapping[str, Any], texts: Mapping[int, tuple[str, bool]], top: float) -> list[Chip]:
    """A rollout's tokens: shaded by their difference on a scale of ±`top` nats, what the detector found outlined, the first
    token that is not that of α = 0 underlined, with a mark before it; hovering tells id and log-probabilities."""
    ids = [int(t) for t in rollout["token_ids"]]
    told = [texts.get(t, (f"[{t}]", False)) for t in ids]
    apart, branch = differences(rollout), rollout["branch_step"]
    found: list[Chip] = []
    for piece in pieces([t for t, _ in told], [s for _, s in told], rollout["text"] or ""):
        steps = range(piece.start, piece.stop)
        of = [apart[n] for n in steps]
        value = math.fsum(v for v in of if v is not None) if None not in of else None
        is_branch = branch in steps
        if is_branch:
            found.append(Chip(BRANCH, note=f"the text parts from that at α = 0 here, at step {branch}"))
        found.append(
            Chip(
                piece.text,
                colour=shade_of(value, top),
                note=" + ".join(_token_note(rollout, n, ids[n], apart[n]) for n in steps),
                is_marked=_is_found(rollout, piece),
                is_missing=value is None,
                underline=GREEN if is_branch else "",
            )
        )
    if branch == len(ids):
        found.append(Chip(BRANCH, note="the text at α = 0 goes on where this one ends"))
    return found


def shade_of(value: float | None, top: float) -> str:
    """The colour of a difference on a scale of ±`top`: what was raised and what was lowered look different."""
    if value is None or not value:
        return ""
    return shade(_DEEPEST * min(1.0, abs(value) / top) if top > 0 else None, 1.0, RAISED if value > 0 else LOWERED)


def legend(top: float) -> list[Chip]:
    """The scale as chips, from lowered to raised."""
    if not top:
        return []
    steps = [k / 4 for k in range(-4, 5)]
    return [Chip(f" {share * top:+.2f} ", colour=shade_of(share * top, top), note="nats") for share in steps]


def scale_told(top: float) -> str:
    """What the legend says in words."""
    outside = (
        "outlined: what the detector found; ▸ and a line: the first token that is not that of α = 0; hatched: not known"
    )
    if not top:
        return f"background: none, since the two models do not differ on these tokens, or one was not run; {outside}"
    ends = f"−{top:.2f} (blue: the training lowered it) to +{top:.2f} (vermilion: it raised it)"
    return f"background: logp after − logp before of the token in nats, {ends}; {outside}"


def token_rows(rollouts: Sequence[Mapping[str, Any]], texts: Mapping[int, tuple[str, bool]]) -> pd.DataFrame:
    """alpha, step, token_id, text, logp_after, logp_before, difference, logp_arm, is_branch, is_found of every token."""
    rows: list[dict[str, Any]] = []
    for rollout in rollouts:
        apart = differences(rollout)
        ids = [int(t) for t in rollout["token_ids"]]
        told = [texts.get(t, (f"[{t}]", False)) for t in ids]
        cut = pieces([t for t, _ in told], [s for _, s in told], rollout["text"] or "")
        marked = {n for p in cut if _is_found(rollout, p) for n in range(p.start, p.stop)}
        for n, token in enumerate(ids):
            rows.append(
                {
                    "alpha": rollout["alpha"],
                    "step": n,
                    "token_id": token,
                    "text": told[n][0],
                    "logp_after": _at(rollout["logp_after"] or [], n),
                    "logp_before": _at(rollout["logp_before"] or [], n),
                    "difference": apart[n],
                    "logp_arm": _at(rollout["logp_arm"] or [], n),
                    "is_branch": rollout["branch_step"] == n,
                    "is_found": n in marked,
                }
            )
    return pd.DataFrame(rows)


def _is_found(rollout: Mapping[str, Any], piece: Piece) -> bool:
    """Whether a piece has a part of what the detector found: by characters, and by steps where these are not known."""
    if not rollout["is_hit"]:
        return False
    if piece.chars is not None and rollout["char_span"] is not None:
        start, end = rollout["char_span"]
        return piece.chars[0] < end and start < piece.chars[1]
    is_within = rollout["first_step"] <= piece.start <= rollout["end_step"]
    return is_within and rollout["char_span"] is None


def _token_note(rollout: Mapping[str, Any], n: int, token: int, difference: float | None) -> str:
    parts = [f"step {n}", f"token {token}"]
    for name in ("after", "before", "arm"):
        value = _at(rollout[f"logp_{name}"] or [], n)
        parts.append(f"{name} {value:.4f}" if value is not None else f"{name} not run")
    return " · ".join([*parts, f"difference {difference:+.4f} nats"] if difference is not None else parts)


def _less(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _at(values: Sequence[Any], n: int) -> float | None:
    return None if n >= len(values) or values[n] is None or values[n] != values[n] else float(values[n])


def visible(text: str) -> str:
    """Text on one line with its spaces and line ends to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥")
