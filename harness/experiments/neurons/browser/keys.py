"""The keys of the browser, told once: for the program, for its help, and for docs/browser.md."""

from typing import NamedTuple


class Key(NamedTuple):
    """What a person presses, what happens, and the keys by Textual's names with the action of each."""

    shown: str
    says: str
    actions: tuple[tuple[str, str], ...]


KEYS: tuple[Key, ...] = (
    Key("← →", "layer before, after", (("left", "layer(-1)"), ("right", "layer(1)"))),
    Key("↑ ↓", "token before, after", (("up", "token(-1)"), ("down", "token(1)"))),
    Key("n b", "next neuron, the one before", (("n", "neuron(1)"), ("b", "neuron(-1)"))),
    Key("PgDn PgUp", "100 neurons on, back", (("pagedown", "neuron(100)"), ("pageup", "neuron(-100)"))),
    Key("[ ]", "prompt before, after", (("left_square_bracket", "prompt(-1)"), ("right_square_bracket", "prompt(1)"))),
    Key("j k", "next neuron of the ranking, the one before", (("j", "ranked(1)"), ("k", "ranked(-1)"))),
    Key("1 … 9", "to a top example of the neuron", tuple((str(n), f"example({n})") for n in range(1, 10))),
    Key("g", "go to a neuron: `17`, or `2.17` with its layer", (("g", "ask('neuron')"),)),
    Key("l", "go to a layer", (("l", "ask('layer')"),)),
    Key("c", "go to a position; negative ones count from the end", (("c", "ask('position')"),)),
    Key("/", "find text in the prompts from here on; nothing typed: the next place", (("slash", "ask('search')"),)),
    Key("a w", "window: how many neighbours of the neuron are shown", (("a", "window"), ("w", "window"))),
    Key("r R", "next ranking, the one before", (("r", "ranking(1)"), ("R", "ranking(-1)"))),
    Key("e", "measured effects and curves in place of the ranking", (("e", "effects"),)),
    Key("s", "scale: the largest in this prompt, or in all prompts", (("s", "scale"),)),
    Key("?", "these keys", (("question_mark", "help"),)),
    Key("Esc", "leave a question or this page", (("escape", "back"),)),
    Key("q", "leave", (("q", "quit"), ("ctrl+c", "quit"))),
)

HINTS = (
    "? keys", "q leave", "←→ layer", "↑↓ token", "n b neuron", "[ ] prompt", "j k ranked", "r list", "e effects", "/ find",
    "g l c go to", "a window", "s scale",
)  # fmt: skip
"""For the last line of the screen: the first of them where there is no room for all."""


def table() -> str:
    """The keys as a table in Markdown."""
    rows = [f"| {key.shown} | {key.says} |" for key in KEYS]
    return "\n".join(["| key | does |", "|---|---|", *rows])
