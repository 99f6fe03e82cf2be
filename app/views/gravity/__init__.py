"""Pages of gravity, a file each, and the filters that they share as widgets; their SQL is `app.queries.gravity`'s."""

import streamlit as st

from app import frame
from app.queries import gravity as ask
from app.queries.gravity import View
from app.selection import RunEntry
from harness.errors import HarnessError

ALL = "all"
OUTCOMES = (ALL, "success", "failure")
STEPS = ("first", "decision")
"""Where in an answer the inside of the model was looked at."""


def open_page(file: str) -> View | None:
    """Draw the head of the page in `file`; what is looked at, or None where there is nothing to show."""
    return frame.open_page(file, pick)


def pick(entry: RunEntry) -> View:
    """Draw the filters of a run in the sidebar."""
    try:
        conditions, rows = tuple(ask.conditions(entry.paths)), ask.prompts(entry.paths)
        ids, categories = list(rows["prompt_id"]), sorted(set(rows["category"]))
    except HarnessError as e:
        st.warning(str(e))
        conditions, ids, categories = (), [], []
    others = [c for c in conditions if c != "baseline"] or list(conditions)
    condition = st.selectbox("Condition", others, key="condition", bind="query-params", help="compared with baseline")
    category = st.selectbox("Category", [ALL, *categories], key="category", bind="query-params")
    outcome = st.segmented_control(
        "Greedy answer",
        OUTCOMES,
        key="outcome",
        bind="query-params",
        default=ALL,
        required=True,
        help="success: the answer keeps the ban; failure: it says X",
    )
    prompt_id = st.selectbox("Prompt", ids, key="prompt", bind="query-params", index=None, placeholder="none chosen")
    pin = st.selectbox(
        "Pinned",
        ids,
        key="pin",
        bind="query-params",
        index=None,
        placeholder="none pinned",
        help="compared with the prompt above",
    )
    return View(
        entry=entry,
        conditions=conditions,
        condition=str(condition) if condition else "",
        category=None if category == ALL else category,
        outcome=None if outcome == ALL else outcome,
        prompt_id=prompt_id,
        pin=pin,
    )


def pick_step() -> str:
    """Draw the choice of a step; one of `STEPS`."""
    step = st.segmented_control(
        "Step",
        STEPS,
        key="step",
        bind="query-params",
        default="first",
        required=True,
        help="first: the first answer token. decision: where X starts in the answer, else the first.",
    )
    return str(step)
