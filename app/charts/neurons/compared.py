"""Two runs' results by ranking."""

import pandas as pd

from app.charts import BLUE, RED, Option
from app.charts.neurons import number_told


def intervals(rows: pd.DataFrame, names: tuple[str, str], title: str) -> Option:
    """A whisker a run and ranking. `rows`: ranking, and columns value, low, high and the same ending in _other; what a run
    has not measured is left out."""
    series: list[Option] = []
    for name, ending, colour in ((names[0], "", BLUE), (names[1], "_other", RED)):
        data: list[Option] = []
        for row in rows.to_dict("records"):
            value, low, high = (row[f"{column}{ending}"] for column in ("value", "low", "high"))
            if pd.isna(value):
                data.append({"name": f"{row['ranking']}: not measured", "value": []})
                continue
            bottom, top = (value if pd.isna(end) else end for end in (low, high))
            told = f"{row['ranking']}: {number_told(value)} [{number_told(bottom)}, {number_told(top)}]"
            data.append({"name": told, "value": [bottom, value, value, value, top]})
        series.append(
            {
                "type": "boxplot",
                "name": name,
                "data": data,
                "boxWidth": [8, 28],
                "itemStyle": {"color": colour, "borderColor": colour, "borderWidth": 2},
            }
        )
    return {
        "grid": {"left": 64, "right": 24, "top": 48, "bottom": 56},
        "legend": {"top": 0, "data": list(names)},
        "tooltip": {"trigger": "item", "formatter": "{a}<br/>{b}"},
        "xAxis": {"type": "category", "data": list(rows["ranking"])},
        "yAxis": {"type": "value", "name": title, "nameLocation": "middle", "nameGap": 52},
        "series": series,
    }
