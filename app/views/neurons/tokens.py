"""Prompts token by token as `app.charts.neurons.tokens` has them, drawn: one component, with one popup for all of its tokens.

The component gets data, never markup: its script writes texts as text nodes, so no prompt can be more than text. Each token
is isolated (`bdi`), so that none turns the direction of its neighbours.
"""

from collections.abc import Sequence
from typing import Any

import streamlit as st
from streamlit.components import v2

POSITIVE, NEGATIVE = (0, 158, 115), (230, 159, 0)
"""Okabe and Ito's green and orange."""

_CSS = """
.heat { position: relative; color: var(--st-text-color); font-family: var(--st-font, sans-serif); }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr)); gap: 16px; }
.panel { min-width: 0; }
.title { font-weight: 600; font-size: 14px; margin-bottom: 4px; overflow-wrap: anywhere; unicode-bidi: isolate; }
.tokens { font-family: var(--st-code-font, monospace); font-size: 14px; line-height: 1.6; white-space: pre-wrap;
  overflow-wrap: anywhere; border-radius: 4px; padding: 4px; outline-offset: 2px; }
.tokens bdi, .legend bdi { border-radius: 3px; cursor: default; }
.tokens bdi[data-n] { display: inline-block; max-width: 100%; padding: 1px 0; margin: 2px 0; line-height: 1.4;
  vertical-align: top; }
.tokens bdi.active { outline: 2px solid var(--st-primary-color); }
.tokens bdi.uncounted { border-bottom: 2px dotted currentColor; border-radius: 3px 3px 0 0; }
.tokens bdi.unknown { outline: 1px dashed #808080; outline-offset: -1px; }
.tokens bdi.bars { padding-bottom: var(--bars); }
.legend { font-size: 13px; margin-top: 10px; line-height: 2; }
.legend bdi { padding: 2px 7px; white-space: nowrap; }
.legend .tokens { font: inherit; }
.legend .gap { display: inline-block; width: 12px; }
.popup { position: absolute; z-index: 10; max-width: min(340px, 96%); padding: 6px 10px; font-size: 13px; line-height: 1.5;
  white-space: pre-wrap; overflow-wrap: anywhere; pointer-events: none; background: var(--st-secondary-background-color);
  color: var(--st-text-color); border: 1px solid #808080; border-radius: 6px; box-shadow: 0 2px 8px #0004; }
.popup[hidden] { display: none; }
.popup .token { font-family: var(--st-code-font, monospace); font-weight: 600; }
"""
_HTML = """<div class="heat"><div class="panels"></div><div class="legend"></div>
<div class="popup" role="status" hidden></div></div>"""
_JS = """
const HATCH = 'repeating-linear-gradient(-45deg, #80808066 0 2px, transparent 2px 6px)';

function ground(box) {
  const probe = document.createElement('span');
  probe.style.color = getComputedStyle(box).getPropertyValue('--st-background-color') || '#ffffff';
  box.append(probe);
  const found = getComputedStyle(probe).color.match(/[\\d.]+/g).slice(0, 3).map(Number);
  probe.remove();
  return found;
}

function luminance(rgb) {
  const part = (v) => { v /= 255; return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  return 0.2126 * part(rgb[0]) + 0.7152 * part(rgb[1]) + 0.0722 * part(rgb[2]);
}

function colour(data, shade) {
  return `rgba(${(shade > 0 ? data.positive : data.negative).join(', ')}, ${Math.abs(shade)})`;
}

/* Black or white, whichever reads better on the mixture: the worse case of the two is 4.58 to 1. */
function ink(data, shade, under) {
  const over = shade > 0 ? data.positive : data.negative, a = Math.abs(shade);
  return luminance(under.map((v, n) => v * (1 - a) + over[n] * a)) > 0.179 ? '#000' : '#fff';
}

function paint(element, data, shades, isSpecial, under) {
  const layers = isSpecial ? [HATCH] : [];
  if (shades.length > 1) {
    element.classList.add('bars');
    element.style.setProperty('--bars', 5 * shades.length + 'px');
    shades.forEach((shade, n) => {
      if (shade === null || !shade) return;
      const c = colour(data, shade), at = 5 * (shades.length - 1 - n);
      layers.push(`linear-gradient(${c}, ${c}) 0 calc(100% - ${at}px) / 100% 4px no-repeat`);
    });
  } else if (shades.length && shades[0]) {
    const c = colour(data, shades[0]);
    layers.push(`linear-gradient(${c}, ${c})`);
    element.style.color = ink(data, shades[0], under);
  }
  element.style.background = layers.join(', ');
}

export default function ({ data, parentElement }) {
  const heat = parentElement.querySelector('.heat'), panels = heat.querySelector('.panels');
  const legend = heat.querySelector('.legend'), popup = heat.querySelector('.popup');
  const under = ground(heat);
  let isHeld = false, active = null;
  panels.replaceChildren(); legend.replaceChildren(); popup.hidden = true;

  function show(element, cell) {
    if (active) active.classList.remove('active');
    active = element;
    element.classList.add('active');
    const name = document.createElement('div'), rest = document.createElement('div'), text = document.createElement('bdi');
    name.className = 'token'; text.textContent = cell.text; name.append(text); rest.textContent = cell.lines.join('\\n');
    popup.replaceChildren(name, rest);
    popup.hidden = false;
    const own = heat.getBoundingClientRect(), at = element.getBoundingClientRect(), size = popup.getBoundingClientRect();
    const isBelow = at.bottom + size.height + 8 < window.innerHeight || at.top < size.height + 8;
    popup.style.left = Math.max(0, Math.min(at.left - own.left, own.width - size.width)) + 'px';
    popup.style.top = (isBelow ? at.bottom - own.top + 4 : at.top - own.top - size.height - 4) + 'px';
  }
  function hide() {
    if (active) active.classList.remove('active');
    active = null; isHeld = false; popup.hidden = true;
  }

  for (const panel of data.panels) {
    const box = document.createElement('div'), title = document.createElement('div'), tokens = document.createElement('div');
    box.className = 'panel'; title.className = 'title'; tokens.className = 'tokens';
    title.textContent = panel.title; tokens.dir = panel.dir; tokens.tabIndex = 0;
    tokens.setAttribute('role', 'group');
    tokens.setAttribute('aria-label', 'tokens of ' + panel.title + '; arrow keys go from one to the next');
    let run = tokens;
    const drawn = panel.cells.map((cell, n) => {
      const element = document.createElement('bdi');
      element.textContent = cell.text;
      if (!cell.counted) element.classList.add('uncounted');
      if (!cell.known) element.classList.add('unknown');
      paint(element, data, cell.shades, cell.special, under);
      element.dataset.n = n;
      if (cell.dir === panel.dir) run = tokens;
      else if (run === tokens) {
        run = document.createElement('bdi');
        run.dir = cell.dir;
        tokens.append(run);
      }
      run.append(element);
      if (data.per_row ? (n + 1) % data.per_row === 0 : cell.ends_line) {
        tokens.append(document.createElement('br'));
        run = tokens;
      }
      return element;
    });
    const cellOf = (target) => target.closest && target.closest('bdi[data-n]');
    tokens.addEventListener('mouseover', (e) => {
      const element = cellOf(e.target);
      if (element && !isHeld) show(element, panel.cells[element.dataset.n]);
    });
    tokens.addEventListener('mouseleave', () => { if (!isHeld) hide(); });
    tokens.addEventListener('click', (e) => {
      const element = cellOf(e.target);
      if (!element || (isHeld && element === active)) return hide();
      show(element, panel.cells[element.dataset.n]); isHeld = true;
    });
    tokens.addEventListener('keydown', (e) => {
      const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[e.key];
      if (e.key === 'Escape') return hide();
      if (!step || !drawn.length) return;
      e.preventDefault();
      const now = drawn.indexOf(active), n = now < 0 ? 0 : Math.max(0, Math.min(drawn.length - 1, now + step));
      show(drawn[n], panel.cells[n]); isHeld = true;
    });
    tokens.addEventListener('blur', hide);
    box.append(title, tokens);
    panels.append(box);
  }

  const swatch = (text, shades, classes, isSpecial) => {
    const element = document.createElement('bdi');
    element.textContent = text;
    for (const name of classes) element.classList.add(name);
    paint(element, data, shades, isSpecial, under);
    legend.append(element, ' ');
  };
  const gap = () => { const g = document.createElement('span'); g.className = 'gap'; legend.append(g); };
  legend.append('r: ');
  for (const one of data.legend) swatch(one.text, [one.shade], [], false);
  gap(); swatch('special', [], [], true);
  const tokensLike = document.createElement('span');
  tokensLike.className = 'tokens';
  tokensLike.style.padding = '0';
  for (const [text, name] of [['not in the statistics', 'uncounted'], ['not known', 'unknown']]) {
    const element = document.createElement('bdi');
    element.textContent = text; element.className = name;
    tokensLike.append(element, '  ');
  }
  legend.append(' ', tokensLike);
}
"""


@st.cache_resource
def _component():
    return v2.component("harness_token_heat", html=_HTML, css=_CSS, js=_JS)


def show(panels: Sequence[dict[str, Any]], legend: Sequence[dict[str, Any]], per_row: int, key: str) -> None:
    """Draw prompts side by side, `per_row` tokens in a row (0: as many as fit), with the legend under them."""
    _component()(
        data={
            "panels": list(panels), "legend": list(legend), "per_row": per_row,
            "positive": list(POSITIVE), "negative": list(NEGATIVE),
        },
        key=key,
    )  # fmt: skip
