"""Text token by token as `app.charts.chips` has it, drawn: one component for every page.

The component gets data, never markup: its script writes texts as text nodes, so no prompt can be more than text.
"""

from collections.abc import Sequence
from dataclasses import asdict

import streamlit as st
from streamlit.components import v2

from app.charts.chips import Chip

_CSS = """
.chips { font-family: var(--st-code-font, monospace); font-size: 14px; line-height: 2; white-space: pre-wrap;
  color: var(--st-text-color); }
.chips span { border-radius: 3px; padding: 1px 0; cursor: default; }
.chips span.marked { outline: 2px solid #CC79A7; outline-offset: 0; }
.chips span.missing { background: repeating-linear-gradient(-45deg, #9A9A9A55 0 2px, transparent 2px 6px); }
.chips .glyph { opacity: .45; }
.note { position: relative; min-height: 1.4em; font: 13px var(--st-font, sans-serif); color: var(--st-text-color); opacity: .8; }
"""
_HTML = '<div class="chips"></div><div class="note"></div>'
_JS = """
export default function ({ data, parentElement }) {
  const box = parentElement.querySelector('.chips'), note = parentElement.querySelector('.note');
  box.replaceChildren(); note.textContent = data.note;
  for (const chip of data.chips) {
    const span = document.createElement('span');
    for (const piece of chip.text.split(/(\\n)/)) {
      if (piece === '\\n') {
        const glyph = document.createElement('span');
        glyph.className = 'glyph'; glyph.textContent = '⏎';
        span.append(glyph, '\\n');
      } else if (piece) span.append(piece);
    }
    if (chip.underline) span.style.borderBottom = '2px solid ' + chip.underline;
    if (chip.colour) span.style.background = chip.colour;
    if (chip.is_marked) span.classList.add('marked');
    if (chip.is_missing) span.classList.add('missing');
    span.addEventListener('mouseenter', () => { note.textContent = chip.note; });
    span.addEventListener('mouseleave', () => { note.textContent = data.note; });
    box.append(span);
  }
}
"""


@st.cache_resource
def _component():
    return v2.component("harness_chips", html=_HTML, css=_CSS, js=_JS)


def show(chips: Sequence[Chip], note: str, key: str) -> None:
    """Draw the chips; `note` is what the line under them says while nothing is hovered, such as the range of the colours."""
    _component()(data={"chips": [asdict(c) for c in chips], "note": note}, key=key)
