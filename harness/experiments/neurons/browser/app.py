"""The screen of the browser: what is looked at, the keys that change it, and the widgets that draw it.

Lists are drawn a line at a time, and only the lines that are seen: one of 240,000 neurons costs what a short one does.
"""

import asyncio
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.segment import Segment
from rich.style import Style
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.events import Click, Resize
from textual.geometry import Size
from textual.screen import ModalScreen
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widgets import Input

from harness.errors import HarnessError
from harness.experiments.neurons.browser import heat, panes
from harness.experiments.neurons.browser.data import Found, Ranking, Run
from harness.experiments.neurons.browser.heat import Depth
from harness.experiments.neurons.browser.keys import KEYS
from harness.experiments.neurons.browser.panes import Line, Place
from harness.experiments.neurons.browser.tokens import Layout, layout, visible

_WINDOWS = (0, 2, 5)
"""Neighbours on each side that are shown, in the order in which the key goes through them."""
_LOOK_S = 2.0
"""How often a newer snapshot is looked for."""
_AHEAD_S = 0.3
"""When long rankings are made ahead: after the first screen."""
_ASKED = {
    "neuron": ("neuron", "17, or 2.17 with its layer"),
    "layer": ("layer", "a number"),
    "position": ("position", "a number; -1 is the last token"),
    "search": ("find", "text; nothing: the next place"),
}
_WHERE = re.compile(r"\s*(?:l?\s*([0-9]{1,6})\s*[./:,\s]\s*)?n?\s*([0-9]{1,9})\s*", re.IGNORECASE)


def depth_of_terminal() -> Depth:
    """How many colours the terminal has, as its environment says; none where that asks for none."""
    console = Console()
    if console.no_color or console.color_system is None:
        return "mono"
    return "16" if console.color_system == "standard" else "full"


class _Palette:
    """Styles by name, for a number of colours."""

    def __init__(self, depth: Depth):
        is_mono = depth == "mono"
        self.base = Style.from_color(_rgb(heat.INK), _rgb(heat.GROUND)) if depth == "full" else Style.null()
        colour = lambda name, full: None if is_mono else full if depth == "full" else name  # noqa: E731
        faint = Style(color="#8b9098") if depth == "full" else Style(dim=True)
        self._named = {
            "": Style.null(),
            "dim": faint,
            "bold": Style(bold=True),
            "title": Style(bold=True, color=colour("cyan", "#7fb4e6")),
            "here": Style(reverse=True, bold=True),
            "plus": Style(color=colour("green", "#5ccb7f")),
            "minus": Style(color=colour("yellow", "#f0a24a")),
            "alarm": Style(bold=True, color=colour("red", "#ff7b72")),
            "left out": Style(underline=True),
        }

    def __getitem__(self, name: str) -> Style:
        return self._named[name]

    def strip(self, line: Sequence[tuple[str, Any]], width: int) -> Strip:
        """A line of the screen, of this width. Whatever its text holds, no control character leaves here."""
        made = [
            Segment(visible(text), self.base + (self._named[style] if isinstance(style, str) else style))
            for text, style in line
        ]
        return Strip(made).adjust_cell_length(width, self.base)


def _rgb(of: tuple[int, int, int]) -> Any:
    from rich.color import Color

    return Color.from_rgb(*of)


class Lines(ScrollView, can_focus=False):
    """Lines that are made when they are drawn. `picked` is told the number of a line that is clicked."""

    def __init__(self, palette: _Palette, id: str, picked: Callable[[int], None] | None = None):
        super().__init__(id=id)
        self._palette, self._picked = palette, picked
        self._num: int = 0
        self._line: Callable[[int], Sequence[tuple[str, Any]]] = lambda _: []

    def show(self, num: int, line: Callable[[int], Sequence[tuple[str, Any]]], at: int | None = None) -> None:
        """Show so many lines; the line `at` is scrolled to where it is out of sight."""
        self._num, self._line = num, line
        self.virtual_size = Size(self.size.width, num)
        if at is not None:
            self.bring(at)
        self.refresh()

    def show_all(self, lines: Sequence[Line]) -> None:
        """Show these lines, and take as many of the screen."""
        self.styles.height = len(lines)
        self.show(len(lines), lambda n: lines[n])

    def bring(self, at: int, num: int = 1) -> None:
        """Scroll so that these lines are seen, in the middle where they were not."""
        top, height = self.scroll_offset.y, self.size.height
        if height and not top <= at <= at + num <= top + height:
            most = max(0, self._num - height)
            self.scroll_to(y=min(most, max(0, at - height // 2)), animate=False, immediate=True, force=True)

    def render_line(self, y: int) -> Strip:
        """A line of the screen."""
        n = self.scroll_offset.y + y
        line = self._line(n) if n < self._num else []
        return self._palette.strip(line, self.scrollable_content_region.width)

    def on_click(self, event: Click) -> None:
        """A line is picked."""
        n = self.scroll_offset.y + event.y
        if self._picked is not None and n < self._num:
            self._picked(n)


class Tokens(Lines):
    """A prompt's tokens, each with its activation as colour, or in signs beneath it."""

    def __init__(self, palette: _Palette, depth: Depth, id: str, picked: Callable[[int], None]):
        super().__init__(palette, id)
        self._depth: Depth = depth
        self._token_picked = picked
        self._laid: tuple[object, Layout] = (None, Layout((), ()))
        self._high = 2 if depth == "mono" else 1

    def lay(self, context: Any, width: int) -> int:
        """Lay a prompt out in lines of this width; how many lines of the screen it takes."""
        key = (id(context), width)
        if self._laid[0] != key:
            self._laid = (key, layout(context.cells, width, 2 if self._depth == "mono" else 1))
        return len(self._laid[1].lines) * self._high

    def show_tokens(self, context: Any, values: np.ndarray | None, scale: float, position: int) -> None:
        """Draw them, this position marked and in sight."""
        laid = self._laid[1]

        def line(n: int) -> list[tuple[str, Any]]:
            row, is_under = divmod(n, self._high)
            return [self._piece(context, p, values, scale, position, bool(is_under)) for p in laid.lines[row]]

        self.show(len(laid.lines) * self._high, line)
        if position < len(laid.line_of):
            self.bring(laid.line_of[position] * self._high, self._high)

    def _piece(
        self, context: Any, piece: Any, values: np.ndarray | None, scale: float, position: int, is_under: bool
    ) -> tuple[str, Any]:
        value = float(values[piece.token]) if values is not None else float("nan")
        if is_under:
            return heat.sign_of(value, scale).ljust(piece.width)[: piece.width], "dim"
        own = self._palette[panes.cell_style(context.cells[piece.token])]
        style = own + heat.style_of(value, scale, self._depth)
        return piece.text, style + self._palette["here"] if piece.token == position else style

    def on_click(self, event: Click) -> None:
        """A token is picked."""
        token = self._laid[1].token_at((self.scroll_offset.y + event.y) // self._high, event.x)
        if token is not None:
            self._token_picked(token)


class Help(ModalScreen[None]):
    """The keys and the marks; any other key than those that scroll leaves it."""

    def __init__(self, palette: _Palette, depth: Depth):
        super().__init__()
        self._palette = palette
        self._depth: Depth = depth

    def compose(self) -> ComposeResult:
        """One list of lines."""
        yield Lines(self._palette, "help")

    def on_resize(self) -> None:
        """Draw it."""
        lines = panes.help_lines(self._depth)
        self.query_one("#help", Lines).show(len(lines), lambda n: lines[n])

    def on_key(self, event: Any) -> None:
        """Scroll, or leave."""
        event.stop()
        by = {"down": 1, "up": -1, "pagedown": 10, "pageup": -10}.get(event.key)
        if by is None:
            self.dismiss()
        else:
            self.query_one("#help", Lines).scroll_relative(y=by, animate=False)


class Browser(App[int]):
    """A neuron run on the terminal."""

    ENABLE_COMMAND_PALETTE = False
    AUTO_FOCUS = None  # the line to type in is there before it is wanted
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding(key, action, show=False, priority=key == "ctrl+c") for one in KEYS for key, action in one.actions
    ]
    CSS = f"""
    Screen {{ background: rgb{heat.GROUND}; color: rgb{heat.INK}; }}
    Screen:ansi {{ background: ansi_default; color: ansi_default; }}
    Lines {{ scrollbar-size-vertical: 1; scrollbar-size-horizontal: 0; overflow-x: hidden; scrollbar-gutter: stable;
             scrollbar-background: rgb{heat.GROUND}; scrollbar-color: rgb(70, 74, 82); }}
    Lines:ansi {{ scrollbar-background: ansi_default; scrollbar-color: ansi_bright_black; background: ansi_default; }}
    #header, #under, #window, #head, #status, #label {{ overflow: hidden; scrollbar-size-vertical: 0; scrollbar-gutter: auto; }}
    #header {{ height: 2; }}
    #under, #status, #asking, #label {{ height: 1; }}
    #window, #head {{ height: 0; }}
    #body {{ height: 1fr; }}
    #neuron {{ width: 1fr; }}
    #right {{ width: 1fr; border-left: solid rgb(70, 74, 82); }}
    #right:ansi {{ border-left: solid ansi_bright_black; }}
    #list {{ height: 1fr; }}
    #asking {{ display: none; }}
    #label {{ width: 10; }}
    #ask {{ border: none; height: 1; padding: 0; width: 1fr; background: rgb{heat.GROUND}; }}
    #ask:ansi {{ background: ansi_default; color: ansi_default; }}
    Help {{ background: rgb{heat.GROUND}; }}
    Help:ansi {{ background: ansi_default; }}
    """

    def __init__(self, run: Run, depth: Depth | None = None):
        self._depth: Depth = depth or depth_of_terminal()
        super().__init__(ansi_color=self._depth != "full")
        self._palette = _Palette(self._depth)
        self._shown = run
        self._place = Place(0, 0, 0, 0)
        self._window = 0
        self._is_of_prompt = True
        self._is_effects = False
        self._ranking = ""
        self._listed: Ranking | None = None
        self._picked: int | None = None
        """Which line of the list was picked last; none of one that is new."""
        self._asking = ""
        self._sought = ""
        self._message = ""
        self._is_looking = False

    # -- the screen

    def compose(self) -> ComposeResult:
        """Head, tokens, neighbours; the neuron beside the ranking; a line for what is asked and told."""
        palette = self._palette
        yield Lines(palette, "header")
        yield Tokens(palette, self._depth, "strip", self._pick_token)
        yield Lines(palette, "under")
        yield Lines(palette, "window")
        with Horizontal(id="body"):
            yield Lines(palette, "neuron")
            with Vertical(id="right"):
                yield Lines(palette, "head")
                yield Lines(palette, "list", self._pick_line)
        yield Lines(palette, "status")
        with Horizontal(id="asking"):
            yield Lines(palette, "label")
            yield Input(id="ask", compact=True)

    def on_mount(self) -> None:
        """Begin at the first prompt's first neuron, and look for newer rows from time to time."""
        self._begin()
        self.set_timer(_AHEAD_S, self._prepare)
        self.set_interval(_LOOK_S, self.look)

    def _prepare(self) -> None:
        self.run_worker(asyncio.to_thread(self._shown.prepare), exit_on_error=False)

    def on_resize(self, event: Resize) -> None:
        """Lay everything out anew, once the widgets have their sizes."""
        self.call_after_refresh(self._show)

    def on_unmount(self) -> None:
        """Let the run go."""
        self._shown.close()

    def _begin(self) -> None:
        """A place worth looking at: the neuron that the first ranking has first, at the token whose logits are read."""
        run = self._shown
        names = run.rankings()
        self._ranking = names[0] if names else ""
        if not run.prompts:
            return
        last = max(0, len(run.context(0).cells) - 1)
        layer = run.layers[0] if run.layers else 0
        self._place = Place(0, layer, 0, min(last, max(0, self._read_at(0))))
        first = self._list()
        if first is not None and len(first):
            self._place = replace(self._place, layer=int(first.layers[0]), neuron=int(first.neurons[0]))
            self._listed, self._picked = first, 0

    def _list(self) -> Ranking | None:
        """The list on the right; None where there is none, or where its file cannot be read."""
        run, place = self._shown, self._place
        if not run.prompts:
            return None
        try:
            if self._is_effects:
                names = run.effects_of
                return run.effects(
                    self._ranking if self._ranking in names else (names or [self._ranking])[0], place.prompt
                )
            return run.ranking(self._ranking, place.prompt, place.position) if self._ranking else None
        except HarnessError as e:
            self._message = self._message or str(e)
            return None

    def _show(self) -> None:
        """Draw what is looked at; in the last line, what of it cannot be read."""
        if self.is_running and self.is_mounted:
            try:
                self._draw()
            except HarnessError as e:
                self._lines("status").show_all([[(panes.cut(str(e), self.size.width), "alarm")]])

    def _draw(self) -> None:
        run, place = self._shown, self._place
        width = self.size.width
        values, first = self._values()
        own = None if values is None else values[:, place.neuron - first]
        scale = self._scale(own)
        value = float(own[place.position]) if own is not None and place.position < len(own) else None
        self._lines("header").show_all(panes.header(run, place, value, width))
        listed, self._listed = self._listed, self._list()
        if listed is not None and listed is not self._listed:  # rankings are kept: the same one is the same object
            self._picked = None
        at = None if self._listed is None else self._listed.place_of(place.layer, place.neuron)
        note = ""
        if run.prompts:
            context = run.context(place.prompt)
            strip = self.query_one("#strip", Tokens)
            strip.styles.height = min(strip.lay(context, width - 1), max(4, self.size.height // 3))
            strip.show_tokens(context, own, scale, place.position)
            note = panes.token_note(context, place.position)
        self._lines("under").show_all(
            [panes.under_strip(scale, self._is_of_prompt, _WINDOWS[self._window], self._listed, at, note)]
        )
        self._lines("window").show_all(self._neighbours(values, first, scale))
        pane = self._lines("neuron")
        room = max(10, width // 2 - 2)
        told = panes.neuron_lines(run, place, own, room) if run.prompts and run.num_neurons else []
        pane.show(len(told), lambda n: told[n])
        self._show_list(self._listed, at, width - width // 2 - 3)
        self._lines("status").show_all(
            [[(panes.cut(self._message, width), "alarm")] if self._message else panes.hints(width)]
        )

    def _show_list(self, found: Ranking | None, at: int | None, width: int) -> None:
        run, head, lines = self._shown, self._lines("head"), self._lines("list")
        if found is None:
            told = run.waits_for("influence") if not self._ranking else ""
            head.show_all([[("no ranking", "title")], [(panes.cut(told, width), "dim")]])
            lines.show(0, lambda _: [])
        elif self._is_effects:
            head.show_all(panes.effects_head(run, found, run.curves(self._place.prompt), width))
            lines.show(len(found), lambda n: panes.effects_line(found, n, n == at), self._picked or 0)
        else:
            head.show_all(panes.ranking_head(run, found, self._place.prompt, width))
            lines.show(len(found), lambda n: panes.ranking_line(found, n, n == at), self._picked or 0)

    def _lines(self, name: str) -> Lines:
        return self.query_one(f"#{name}", Lines)

    def _values(self) -> tuple[np.ndarray | None, int]:
        """Activations of the neuron and its neighbours, and which is the first of these."""
        run, place, reach = self._shown, self._place, _WINDOWS[self._window]
        first, last = max(0, place.neuron - reach), min(run.num_neurons - 1, place.neuron + reach)
        if not run.prompts:
            return None, first
        try:
            found = run.values(place.prompt, place.layer, first, last)
        except HarnessError as e:
            self._message = self._message or str(e)
            return None, first
        if found is None:
            told = run.waits_for("dump")
            self._message = self._message or f"no activations of this prompt and layer: {told}"
        return found, first

    def _scale(self, own: np.ndarray | None) -> float:
        """What counts as the strongest: the neuron's largest activation in this prompt, or in all of them."""
        if not self._is_of_prompt:
            row = self._shown.statistics(self._place.layer, self._place.neuron)
            if row is not None and row["max_peak"]:
                return float(row["max_peak"])
        finite = np.abs(own[np.isfinite(own)]) if own is not None else np.zeros(0)
        return float(finite.max()) if len(finite) else 0.0

    def _neighbours(self, values: np.ndarray | None, first: int, scale: float) -> list[Any]:
        if values is None or not self._window:
            return []
        at = self._place.position
        return [
            panes.window_line(
                first + n, values[:, n], scale, at, self.size.width, self._depth, first + n == self._place.neuron
            )
            for n in range(values.shape[1])
        ]

    # -- going on

    def look(self) -> None:
        """Look for newer rows, aside; where there are, show the same place in them."""
        if not self._is_looking:
            self._is_looking = True
            self.run_worker(self._look(), exit_on_error=False)

    async def _look(self) -> None:
        try:
            newer = await asyncio.to_thread(_prepared, self._shown)
        except (HarnessError, OSError) as e:
            self._tell(f"no newer rows can be read: {e}")
            return
        finally:
            self._is_looking = False
        if newer is not None:
            self._take(newer)

    def _take(self, newer: Run) -> None:
        """Show the same place in newer rows."""
        older, place = self._shown, self._place
        self._shown = newer
        if not older.prompts:
            self._begin()
        else:
            prompt = newer.number_of(older.prompts[place.prompt])
            self._place = replace(place, prompt=prompt or 0)
            self._ranking = self._ranking or (newer.rankings() or [""])[0]
            self._listed = None  # it is another object now, and its lines are about the same
        older.close()
        self._message = ""
        self._show()

    def _tell(self, message: str) -> None:
        self._message = message
        self._show()

    def _go(self, **changes: int) -> None:
        """Look somewhere else, as near to it as there is something."""
        run, place = self._shown, replace(self._place, **changes)
        self._message = ""
        if run.prompts:
            prompt = min(max(0, place.prompt), len(run.prompts) - 1)
            if prompt != self._place.prompt and "position" not in changes:
                place = replace(place, position=self._read_at(prompt))
            last = max(0, len(run.context(prompt).cells) - 1)
            neuron = min(max(0, place.neuron), max(0, run.num_neurons - 1))
            self._place = replace(place, prompt=prompt, neuron=neuron, position=min(max(0, place.position), last))
        self._show()

    def _read_at(self, prompt: int) -> int:
        """Where to look in a prompt that is new: at the token whose logits are read."""
        target = self._shown.target(prompt)
        return 10**9 if target is None or target["position"] is None else int(target["position"])

    # -- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """While something is asked, keys are for the answer."""
        return not self._asking or action in ("back", "quit")

    def action_layer(self, by: int) -> None:
        """Another layer of those there are."""
        layers, now = self._shown.layers, self._place.layer
        if not layers:
            return
        at = layers.index(now) + by if now in layers else 0
        self._go(layer=layers[min(max(0, at), len(layers) - 1)])

    def action_token(self, by: int) -> None:
        """Another token."""
        self._go(position=self._place.position + by)

    def action_neuron(self, by: int) -> None:
        """Another neuron of the layer."""
        self._go(neuron=self._place.neuron + by)

    def action_prompt(self, by: int) -> None:
        """Another prompt."""
        self._go(prompt=self._place.prompt + by)

    def action_ranked(self, by: int) -> None:
        """The neuron that stands so many further in the list than the one picked last; of a list that is new the first."""
        if self._listed is None or not len(self._listed):
            self._tell("there is no ranking to go through here")
            return
        self._pick_line(0 if self._picked is None else min(max(0, self._picked + by), len(self._listed) - 1))

    def action_example(self, which: int) -> None:
        """Where the neuron peaks."""
        row = self._shown.statistics(self._place.layer, self._place.neuron)
        examples = (row or {}).get("examples") or []
        if which > len(examples):
            self._tell(f"this neuron has {len(examples)} examples, not {which}")
            return
        prompt = self._shown.number_of(examples[which - 1]["prompt_id"])
        if prompt is None:
            self._tell(f"prompt {examples[which - 1]['prompt_id']} is not in this run")
            return
        self._go(prompt=prompt, position=examples[which - 1]["position"])

    def action_window(self) -> None:
        """More neighbours, or none again."""
        self._window = (self._window + 1) % len(_WINDOWS)
        self._go()

    def action_ranking(self, by: int) -> None:
        """Another ranking."""
        names = self._shown.rankings()
        self._is_effects = False
        if names:
            at = names.index(self._ranking) if self._ranking in names else -by
            self._ranking = names[(at + by) % len(names)]
        self._go()

    def action_effects(self) -> None:
        """Effects and curves, or the ranking again."""
        self._is_effects = not self._is_effects
        self._go()

    def action_scale(self) -> None:
        """The other scale."""
        self._is_of_prompt = not self._is_of_prompt
        self._go()

    def action_help(self) -> None:
        """The keys."""
        self.push_screen(Help(self._palette, self._depth))

    def action_ask(self, what: str) -> None:
        """A line to type in."""
        self._asking = what
        label, hint = _ASKED[what]
        self._lines("status").display = False
        self.query_one("#asking").display = True
        self._lines("label").show_all([[(f"{label}: ", "bold")]])
        field = self.query_one("#ask", Input)
        field.value, field.placeholder = "", hint
        field.focus()

    async def action_back(self) -> None:
        """Leave the line."""
        self._leave_line()
        self._go()

    def _leave_line(self) -> None:
        self._asking = ""
        self.query_one("#asking").display = False
        self._lines("status").display = True
        self.screen.set_focus(None)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """An answer: go there, or say in a line what is wrong with it."""
        what, text = self._asking, event.value
        self._leave_line()
        try:
            self._answer(what, text)
        except ValueError as e:
            self._tell(str(e))
        except HarnessError as e:
            self._tell(str(e))

    def _answer(self, what: str, text: str) -> None:
        run, place = self._shown, self._place
        if what == "search":
            self._sought = text or self._sought
            if not self._sought or not run.prompts:
                raise ValueError("nothing to find")
            found = run.find(self._sought, Found(place.prompt, place.position))
            if found is None:
                raise ValueError(f"{self._sought[:40]!r} is in none of the {len(run.prompts):,} prompts")
            self._go(prompt=found.prompt, position=found.position)
        elif what == "neuron":
            match = _WHERE.fullmatch(text)
            if match is None:
                raise ValueError(f"expected a neuron such as 17, or 2.17 with its layer, found {text[:40]!r}")
            layer = place.layer if match[1] is None else _whole(match[1], "layer", run.layers)
            self._go(layer=layer, neuron=_whole(match[2], "neuron", range(run.num_neurons)))
        elif what == "layer":
            self._go(layer=_whole(text, "layer", run.layers))
        else:
            num = len(run.context(place.prompt).cells) if run.prompts else 0
            at = _whole(text, "position", range(-num, num))
            self._go(position=at + num if at < 0 else at)

    def _pick_token(self, token: int) -> None:
        self._go(position=token)

    def _pick_line(self, n: int) -> None:
        if self._listed is not None and n < len(self._listed):
            self._picked = n
            self._go(layer=int(self._listed.layers[n]), neuron=int(self._listed.neurons[n]))


def _prepared(run: Run) -> Run | None:
    newer = run.newer()
    if newer is not None:
        newer.prepare()
    return newer


def _whole(text: str, what: str, among: Sequence[int]) -> int:
    """A whole number that is one of these. Raises ValueError, in one line."""
    number = int(text) if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", text) else None
    if number is None or number not in among:
        told = f"{among[0]} to {among[-1]}" if len(among) else "none, since there are none yet"
        raise ValueError(f"expected a {what} of {told}, found {text[:40]!r}")
    return number
