"""Charts of gravity's pages; a colour an outcome, the same on all of them."""

from app.charts import BLUE, RED

OUTCOME_COLOURS = {"success": BLUE, "failure": RED}
