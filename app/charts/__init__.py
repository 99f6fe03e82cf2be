"""Data frame to chart: no Streamlit, no SQL."""

import altair as alt
import numpy as np
import pandas as pd

from harness.stats import LogisticFit


def rate_against_pressure(points: pd.DataFrame, fit: LogisticFit | None) -> alt.LayerChart:
    """Share of samples that say X against P0, one point a prompt, with the fitted curve.

    `points`: columns p0, rate, prompt_id, category, target.
    """
    axes = {"x": alt.X("p0:Q", title="P0 (pressure under baseline)", scale=alt.Scale(domain=[0, 1]))}
    dots = (
        alt.Chart(points)
        .mark_circle(opacity=0.5)
        .encode(
            **axes,
            y=alt.Y("rate:Q", title="share of samples that say X", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("category:N"),
            tooltip=["prompt_id:N", "target:N", alt.Tooltip("p0:Q", format=".3f"), alt.Tooltip("rate:Q", format=".3f")],
        )
    )
    if fit is None:
        return alt.layer(dots)
    x = np.linspace(0, 1, 101)
    curve = (
        alt.Chart(pd.DataFrame({"p0": x, "rate": fit.predict(x)})).mark_line(color="black").encode(**axes, y="rate:Q")
    )
    return alt.layer(dots, curve)
