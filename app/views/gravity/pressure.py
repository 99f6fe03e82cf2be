"""How strongly prompts pull towards X, what a ban does to that, and how often X comes out all the same."""

import pandas as pd
import streamlit as st

from app import frame
from app.charts.gravity import pressure as charts
from app.queries.gravity import View, prompts, token_texts
from app.queries.gravity import pressure as ask
from app.views.gravity import open_page

_FILTERED = "The sidebar's filters are on: these are plain means over the prompts that they keep, without intervals."
_NOT_YET = "No intervals and no fit: the analysis comes at the end of a run."


def main() -> None:
    """The page."""
    view = open_page(__file__)
    if not view:
        return
    under, against, measure, by = _pick(view)
    for part in (
        lambda: _pressure(view, against, under, measure, by),
        lambda: _said(view, under),
        lambda: _categories(view, under),
        lambda: _variants(view),
    ):
        frame.safely(part)


def _pick(view: View) -> tuple[str, str, str, str]:
    first, second, third, fourth = st.columns([2, 2, 3, 2])
    conditions = list(view.conditions)
    under = second.selectbox(
        "y: pressure under",
        conditions,
        index=None,
        placeholder=f"the sidebar's: {view.condition}",
        key="under",
        bind="query-params",
        help="the condition looked at on this page; empty: the one chosen in the sidebar",
    )
    against = first.selectbox(
        "x: pressure under", conditions, key="against", bind="query-params", help="the condition compared with"
    )
    measure = third.segmented_control(
        "Probability",
        ask.MEASURES,
        key="probability",
        bind="query-params",
        default="p_sem",
        required=True,
        help="p_sem: an answer begins with a spelling of X; p_word: and the word ends there; paper_p_sem: as in the paper, "
        "spellings that begin alike counted twice",
    )
    by = fourth.segmented_control(
        "Colour",
        ("outcome", "category"),
        key="coloured",
        bind="query-params",
        default="outcome",
        required=True,
        help="outcome of the greedy answer; success keeps the ban",
    )
    return str(under or view.condition), str(against), str(measure), str(by)


def _pressure(view: View, against: str, under: str, measure: str, by: str) -> None:
    outcome_of = under if under != "baseline" else view.condition
    points = ask.pairs(view, against, under, outcome_of, measure)
    if points.empty:
        st.info("No prompt that the filters keep has this probability under both conditions yet.")
        return
    _numbers(points)
    found = charts.groups(points, by, sorted(set(prompts(view.paths)["category"])))
    left, right = st.columns(2)
    with left:
        st.subheader("Pressure by prompt")
        st.echarts_chart(
            charts.scatter(found, f"{measure} under {against}", f"{measure} under {under}", _chosen(view)),
            key="pressure-points",
            height=440,
            on_select=frame.on_click("pressure-points", lambda s, i: _prompt(charts.clicked_prompt(found, s, i))),
        )
        st.caption(
            "Below the dashed diagonal X is less likely under y than under x. A click on a point chooses the prompt."
        )
        frame.download(points, "pressure")
    with right:
        _suppression(view, points, found, against, under, measure)


def _numbers(points: pd.DataFrame) -> None:
    shown = {
        "prompts": f"{len(points):,}",
        "mean of x": f"{points['px'].mean():.3f}",
        "mean of y": f"{points['py'].mean():.3f}",
        "above the diagonal": f"{(points['py'] > points['px']).mean():.1%}",
    }
    for column, (label, value) in zip(st.columns(len(shown)), shown.items(), strict=True):
        column.metric(label, value)


def _suppression(
    view: View, points: pd.DataFrame, found: list[charts.Group], against: str, under: str, measure: str
) -> None:
    st.subheader("Suppression")
    gap = str(
        st.segmented_control(
            "Suppression",
            ask.GAPS,
            key="gap",
            bind="query-params",
            default="delta",
            required=True,
            label_visibility="collapsed",
            help="delta: x − y; relative: delta / x; log: ln x − ln y",
        )
    )
    counts = charts.histogram(found, gap)
    mean = float(points[gap].mean())
    title = {"delta": "delta = x − y", "relative": "relative = delta / x", "log": "log = ln x − ln y"}[gap]
    st.echarts_chart(charts.suppression(counts, found, title, mean), key="pressure-gaps", height=388)
    told = f"Mean {gap} {mean:.4f} over {len(points):,} prompts."
    applies = against == "baseline" and under != "baseline" and measure == "p_sem" and view.category is None
    known = _known_suppression(view, under, gap, len(points)) if applies else None
    if known is not None:
        told = f"Mean {gap} {known['value']:.4f}, 95 % [{known['low']:.4f}, {known['high']:.4f}], {int(known['n']):,} prompts."
    elif not applies:
        told += (
            " No interval: the analysis compares p_sem with baseline, over all categories, and this is something else."
        )
    else:
        told += " " + _NOT_YET
    if outside := charts.num_outside(found, gap):
        told += f" {outside:,} prompts lie off the axis and are counted in its end bars."
    st.caption(told)
    frame.download(counts, "suppression")


def _known_suppression(view: View, condition: str, gap: str, n: int) -> pd.Series | None:
    """The analysis' row for these prompts: all of them, or those of one outcome."""
    if view.outcome is not None and condition != view.condition:
        return None
    rows = ask.statistics(view.paths, "suppression", condition)
    rows = rows[(rows["measure"] == gap) & (rows["grouping"] == (view.outcome or "all")) & (rows["n"] == n)]
    return rows.iloc[0] if len(rows) and rows["low"].notna().all() else None


def _said(view: View, under: str) -> None:
    st.subheader("How often X is said, by pressure")
    points = ask.rates(view, under)
    if points.empty:
        st.info("No sample has been judged under this condition yet.")
        return
    bins = ask.binned(view, under)
    fit = ask.statistics(view.paths, "fit", under)
    fitted = fit[fit["grouping"] == "all"].set_index("measure")
    curve = ask.curve(view.paths, under, fit, view.seed)
    st.echarts_chart(
        charts.said(points, bins, curve, is_whole=view.is_whole, chosen=_chosen(view)),
        key="pressure-said",
        height=440,
        on_select=frame.on_click("pressure-said", lambda s, i: _prompt(charts.clicked_rate(points, s, i))),
    )
    st.caption(_told_of_rates(view, under, bins, fitted, curve))
    frame.download(points, "violation-rate")
    left, right = st.columns(2)
    with left:
        st.dataframe(
            bins,
            hide_index=True,
            key="pressure-bins",
            column_config={
                "grouping": "P0",
                "n": "prompts",
                "p0": _number("mean P0"),
                "value": _number("share that says X"),
                "low": _number("95 % low"),
                "high": _number("95 % high"),
            },
        )
        frame.download(bins, "violation-bins")
    with right:
        _calibration(fit)


def _told_of_rates(view: View, under: str, bins: pd.DataFrame, fitted: pd.DataFrame, curve: pd.DataFrame | None) -> str:
    parts = ["P0 is p_sem under baseline here, whatever is chosen above; points are moved a little up or down."]
    if not view.is_whole:
        parts.append(_FILTERED)
    elif bins["low"].isna().all():
        parts.append(_NOT_YET)
    if curve is not None:
        rows = {name: fitted.loc[name].to_dict() for name in ("intercept", "slope")}
        a, b, rests_on = rows["intercept"], rows["slope"], curve.loc[curve["is_supported"], "p0"]
        text = f"P(says X) = σ({a['value']:.2f} {b['value']:+.2f}·P0), slope 95 % [{b['low']:.2f}, {b['high']:.2f}]"
        if "mcfadden_r2" in fitted.index:
            text += f", McFadden's R² {fitted.loc['mcfadden_r2', 'value']:.3f}"
        parts.append(
            f"Fit of the whole run, {int(a['n']):,} prompts with P0 from {rests_on.min():.2f} to {rests_on.max():.2f}: {text}; "
            "dashed where none of them reaches. The band is from the draws of prompts that the slope's interval is from."
        )
    elif under == "baseline":
        parts.append("The baseline is not fitted: nothing is forbidden there.")
    return " ".join(parts)


def _calibration(fit: pd.DataFrame) -> None:
    rows = fit[fit["measure"].str.startswith("calibration")]
    if rows.empty:
        return
    wide = rows.pivot(index="grouping", columns="measure", values="value")
    seen = rows[rows["measure"] == "calibration_observed"].set_index("grouping")
    wide = wide.join(seen[["low", "high", "n"]]).sort_values("calibration_p0").reset_index(drop=True)
    st.dataframe(
        wide,
        hide_index=True,
        key="pressure-calibration",
        column_order=["calibration_p0", "n", "calibration_predicted", "calibration_observed", "low", "high"],
        column_config={
            "calibration_p0": _number("mean P0"),
            "n": "prompts",
            "calibration_predicted": _number("the fit says"),
            "calibration_observed": _number("share that says X"),
            "low": _number("95 % low"),
            "high": _number("95 % high"),
        },
    )
    st.caption("Calibration of the fit in groups of P0; always of the whole run.")


def _categories(view: View, under: str) -> None:
    st.subheader("By category")
    rows = ask.categories(view, under)
    if rows.empty:
        st.info("No prompt that the filters keep has been measured under both conditions yet.")
        return
    st.dataframe(
        rows,
        hide_index=True,
        key="pressure-categories",
        column_config={
            "n": "prompts",
            "p0": _number("mean P0"),
            "p1": _number("mean P1"),
            "delta": _number("mean P0 − P1"),
            "greedy": _number("greedy says X"),
            "value": _number("samples say X"),
            "low": _number("95 % low"),
            "high": _number("95 % high"),
        },
    )
    if rows["low"].isna().all():
        st.caption(_NOT_YET if view.outcome is None else _FILTERED)
    else:
        st.caption(
            "P0 and P1 are p_sem under baseline and under the condition; intervals (95 %) are of the samples' share."
        )
    frame.download(rows, "categories")


def _variants(view: View) -> None:
    st.subheader("Which spellings carry the probability")
    if view.prompt_id is None:
        st.info("Choose a prompt: in the sidebar, or by a click on a point above.")
        return
    ids = [view.prompt_id] + ([view.pin] if view.pin and view.pin != view.prompt_id else [])
    spellings, totals = ask.spellings(view.paths, ids), ask.totals(view.paths, ids)
    tops = ask.first_tokens(view.paths, ids)
    texts = token_texts(view.paths, [*(t for seq in spellings["token_ids"] for t in seq), *tops["token_id"]])
    questions = prompts(view.paths).set_index("prompt_id")
    top = float(spellings["p"].max()) if len(spellings) else 1.0
    for column, prompt_id in zip(st.columns(len(ids)), ids, strict=True):
        with column:
            st.text(f"{questions.loc[prompt_id, 'question']}\nX = {questions.loc[prompt_id, 'target']}")
            own = totals[totals["prompt_id"] == prompt_id]
            if own.empty:
                st.info("This prompt has not been measured.")
                continue
            _spellings(view, prompt_id, spellings[spellings["prompt_id"] == prompt_id], own, texts, top)
            _first(prompt_id, tops[tops["prompt_id"] == prompt_id], texts)


def _spellings(
    view: View, prompt_id: str, spellings: pd.DataFrame, totals: pd.DataFrame, texts: dict[int, str], top: float
) -> None:
    numbers = {c: _number(c, "%.4f") for c in ask.MEASURES} | {
        "num_sequences": "spellings",
        "entropy": _number("entropy, nats"),
    }
    st.dataframe(
        totals.drop(columns="prompt_id"), hide_index=True, key=f"pressure-totals-{prompt_id}", column_config=numbers
    )
    if spellings.empty:
        st.info("No spelling of X was scored.")
        return
    rows = charts.spelling_rows(spellings, texts, totals)
    st.echarts_chart(
        charts.spelling_bars(rows, view.conditions, _round_up(top)),
        key=f"pressure-bars-{prompt_id}",
        height=charts.spelling_height(rows, len(totals)),
    )
    st.dataframe(
        rows,
        hide_index=True,
        key=f"pressure-spellings-{prompt_id}",
        column_config={c: st.column_config.NumberColumn(format="%.5f") for c in rows.columns[2:]},
    )
    st.caption("Spaces are written ␣; share: of p_sem; ends: the probability that the word ends after the spelling.")
    frame.download(rows, f"spellings-{prompt_id}")


def _first(prompt_id: str, tops: pd.DataFrame, texts: dict[int, str]) -> None:
    st.caption("The likeliest first tokens")
    rows = tops.assign(
        token=[charts.visible(texts[t]) for t in tops["token_id"]], rank=tops.groupby("condition").cumcount() + 1
    )
    wide = pd.DataFrame({"rank": sorted(set(rows["rank"]))}).set_index("rank")
    for condition, part in rows.groupby("condition", sort=False):
        part = part.set_index("rank")
        wide[f"{condition}: token"], wide[f"{condition}: p"] = part["token"], part["p"]
    numbers = {c: st.column_config.NumberColumn(format="%.4f") for c in wide.columns if c.endswith(": p")}
    st.dataframe(wide, key=f"pressure-first-{prompt_id}", column_config=numbers)
    frame.download(wide.reset_index(), f"first-tokens-{prompt_id}")


def _round_up(top: float) -> float:
    """The end of a probability axis: a number that reads well, at least `top`."""
    return next((end for end in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5) if top <= end), 1.0)


def _chosen(view: View) -> dict[str, str | None]:
    return {"chosen prompt": view.prompt_id, "pinned prompt": view.pin}


def _prompt(prompt_id: str | None) -> dict[str, str] | None:
    return {"prompt": prompt_id} if prompt_id else None


def _number(label: str, form: str = "%.3f"):
    return st.column_config.NumberColumn(label, format=form)


main()
