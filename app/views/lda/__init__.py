"""Pages of amplification, and the filters that they share as widgets; their SQL is `app.queries.lda`'s."""

import streamlit as st

from app import frame
from app.queries import lda as ask
from app.queries.lda import View
from app.selection import RunEntry, Selection
from harness.errors import HarnessError


def open_page(file: str) -> View | None:
    """Draw the head of the page in `file`; what is looked at, or None where there is nothing to show."""
    return frame.open_page(file, pick)


def pick(entry: RunEntry) -> View:
    """Draw the filters of a run in the sidebar."""
    try:
        arms, detectors = ask.arms(entry.paths), ask.detectors(entry.paths, Selection(entry).manifest)
        rows = ask.prompts(entry.paths)
        ids, categories = list(rows["prompt_id"]), sorted(set(rows["category"]))
    except HarnessError as e:
        st.warning(str(e))
        arms, detectors, ids, categories = (), (), [], []
    detector = st.selectbox(
        "Detector",
        detectors,
        key="detector",
        bind="query-params",
        placeholder="none in this run",
        help="the rule on a completion's text whose hits are shown",
    )
    category = st.selectbox(
        "Category", categories, key="category", bind="query-params", index=None, placeholder="every category"
    )
    prompt_id = st.selectbox("Prompt", ids, key="prompt", bind="query-params", index=None, placeholder="none chosen")
    return View(
        entry=entry,
        arms=arms,
        detectors=detectors,
        detector=str(detector) if detector else None,
        category=category,
        prompt_id=prompt_id,
    )
