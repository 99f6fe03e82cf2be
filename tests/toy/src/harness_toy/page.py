"""Its page of the review app: a bar a text, the most surprising first."""

import pandas as pd
import streamlit as st

from app import frame, queries
from app.charts import BLUE, Option
from app.selection import Selection


def main() -> None:
    """The page."""
    selected = frame.open_page(__file__, Selection)
    if selected:
        rows = queries.ask(selected.paths, "SELECT text_id, num_tokens, mean FROM surprisals ORDER BY mean, text_id")
        st.echarts_chart(bars(rows), height=80 + 24 * len(rows), key="surprisals")
        frame.download(rows, "surprisals")


def bars(rows: pd.DataFrame) -> Option:
    """`mean` of each `text_id`; the last row is at the top."""
    return {
        "grid": {"left": 12, "right": 24, "top": 12, "bottom": 24},
        "tooltip": {},
        "xAxis": {"type": "value", "name": "mean surprisal a token", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "category", "data": rows["text_id"].tolist()},
        "series": [{"type": "bar", "data": rows["mean"].tolist(), "itemStyle": {"color": BLUE}}],
    }


main()
