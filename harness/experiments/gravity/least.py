"""What a whole experiment forwards, against the least that its results need: every distinct beginning of a text once, and
patched rows from their layer on.

The experiment is a real run, in a folder of its own that is removed; its stages are watched from outside. Knows what
items of the measuring stages carry.
"""

import io
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from harness import tally
from harness.commands import launch
from harness.engine import AnyStage, BatchOutput, Item, ItemResult, Stage, Tables
from harness.errors import RunError
from harness.models.load import LM, shared
from harness.models.patch import Patched, sweep
from harness.settings import Resolved
from harness.tally import Tally
from harness.text.words import Tokens, Trie

MEASURING = ("psem", "greedy", "samples", "mechanism", "patching")


class Texts:
    """Distinct beginnings of texts, each of them a node behind the one that is a token shorter."""

    def __init__(self) -> None:
        self._node_of: dict[tuple[int, int], int] = {}

    def __len__(self) -> int:
        return len(self._node_of)

    def add(self, tokens: Sequence[int], after: int = -1) -> int:
        """The last node of these tokens behind node `after` (-1: where texts begin)."""
        for token in tokens:
            after = self._node_of.setdefault((after, token), len(self._node_of))
        return after

    def add_trie(self, context: Sequence[int], trie: Trie) -> None:
        """A context with all nodes of a trie behind it."""
        last = self.add(context)
        nodes: list[int] = []
        for token, parent in zip(trie.tokens, trie.parents, strict=True):
            nodes.append(self.add([token], last if parent < 0 else nodes[parent]))

    def holds(self, tokens: Sequence[int]) -> bool:
        """Whether a text that was added begins so."""
        node: int | None = -1
        for token in tokens:
            node = self._node_of.get((node, token))
            if node is None:
                return False
        return True


@dataclass
class Need:
    """What must go through a model at least: texts through all layers, and what patches change from their layers on."""

    num_layers: int
    texts: Texts = field(default_factory=Texts)
    changed: float = 0.0
    """Tokens of patched rows, each the share of the layers from its patch on."""
    below: dict[Tokens, int] = field(default_factory=dict)
    """Texts that only patched rows say, and the layers up to which one of them must be computed untouched."""

    def tokens(self) -> float:
        """The least number of tokens; one that goes through some of the layers counts as that share."""
        untouched = sum(layer for text, layer in self.below.items() if not self.texts.holds(text)) / self.num_layers
        return len(self.texts) + self.changed + untouched

    def completion(self, context: Sequence[int], made: Sequence[int]) -> None:
        """A context and what was answered; the last token of an answer is not forwarded."""
        self.texts.add([*context, *made[:-1]])

    def patched(self, target: Tokens, trie: Trie, row: Patched) -> None:
        """The row of one patch, or of none."""
        made = tuple(row.continuation.token_ids[:-1])
        if row.layer < 0:
            self.texts.add_trie(target, trie)
            self.texts.add([*target, *made])
            return
        self.changed += (self.num_layers - row.layer) / self.num_layers * (1 + len(trie) + len(made))
        for n in range(1, len(made) + 1):
            text = (*target, *made[:n])
            self.below[text] = max(row.layer, self.below.get(text, 0))


@dataclass(frozen=True)
class Spent:
    """One stage: tokens forwarded, those of contexts among them, and the least that it would need alone."""

    stage: str
    tokens: float
    prefill: float
    least: float | None
    """None: a stage that is no measurement, such as the certificate."""


@dataclass(frozen=True)
class Account:
    """An experiment: its stages, and the least that all measurements need together, where what one forwards serves all."""

    stages: tuple[Spent, ...]
    least: float

    @property
    def tokens(self) -> float:
        """Forwarded by the measurements."""
        return sum(s.tokens for s in self.stages if s.least is not None)

    @property
    def ratio(self) -> float:
        return self.tokens / self.least

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tokens": self.tokens, "ratio": self.ratio}


class _Watched:
    """A stage that counts what it forwards and remembers what it was given and gave; otherwise the stage itself."""

    def __init__(self, stage: AnyStage):
        assert isinstance(stage, Stage), "gravity has no stage that rests on its own batches"
        self._stage: Stage[Any] = stage
        self.spent = Tally()
        self.done: list[tuple[Item[Any], ItemResult]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stage, name)

    @property
    def name(self) -> str:
        return self._stage.name

    @property
    def version(self) -> int:
        return self._stage.version

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        return self._stage.reads

    @property
    def row_bytes(self) -> int:
        return self._stage.row_bytes

    def params(self) -> dict[str, Any]:
        return self._stage.params()

    def items(self, tables: Tables) -> Sequence[Item[Any]]:
        return self._stage.items(tables)

    def setup(self) -> Any:
        """Loading a model forwards a few tokens to check it: they are nobody's."""
        return self._stage.setup()

    def run(self, context: Any, items: Sequence[Item[Any]]) -> Sequence[ItemResult] | BatchOutput:
        before = tally.now()
        found = self._stage.run(context, items)
        results = found.results if isinstance(found, BatchOutput) else found
        self.spent = _sum(self.spent, tally.now() - before)
        if self._stage.name in MEASURING:
            by_key = {r.key: r for r in results}
            self.done += [(item, by_key[item.key]) for item in items if by_key[item.key].error is None]
        return found


def measure(plan: launch.Plan, resolved: Resolved) -> Account:
    """Run the experiment of `plan` from nothing and count. Raises RunError where it fails."""
    watched = [_Watched(stage) for stage in plan.stages]
    with tempfile.TemporaryDirectory(prefix="harness-") as folder, redirect_stdout(io.StringIO()):
        settings = resolved.settings
        paths = settings.paths.model_copy(update={"runs": Path(folder)})
        aside = replace(resolved, settings=settings.model_copy(update={"paths": paths}))
        ended = launch.start(replace(plan, stages=tuple(watched)), aside, resume="new")
    if ended.code:
        raise RunError(f"the run that is counted ended with {ended.code}; see the lines above")
    lm = shared(plan.inputs.model, plan.inputs.identity)
    num_layers = len(lm.anatomy.blocks)
    together, stages = Need(num_layers), []
    for stage in watched:
        alone = None
        if stage.name in MEASURING:
            alone = Need(num_layers)
            _add_needs(stage, lm, (alone, together))
        if stage.spent.tokens:
            spent = stage.spent
            stages.append(Spent(stage.name, spent.tokens + spent.padding, spent.prefill, alone and alone.tokens()))
    return Account(tuple(stages), together.tokens())


def _add_needs(stage: _Watched, lm: LM, needs: Iterable[Need]) -> None:
    """What one stage's items need, from what they carry and gave."""
    rows = _patched_rows(stage, lm) if stage.name == "patching" else []
    for need in needs:
        for item, result in stage.done:
            if stage.name == "psem":
                need.texts.add_trie(item.payload.token_ids, item.payload.forms.trie)
            elif stage.name in ("greedy", "samples"):
                need.completion(item.payload.token_ids, result.rows["completions"][0]["token_ids"])
            elif stage.name == "mechanism":
                need.texts.add(item.payload.probe.tokens)
        for subject, row in rows:
            need.texts.add(subject.pair.source)
            need.patched(subject.pair.target, subject.trie, row)


def _patched_rows(stage: _Watched, lm: LM) -> list[tuple[Any, Patched]]:
    """(subject, row) of every patched row, swept once more: their table keeps texts, and tokens are wanted."""
    patches_of: dict[str, tuple[Any, list[str]]] = {}
    for item, _ in stage.done:
        subject, patch = item.payload.subject, item.payload.patch
        patches_of.setdefault(subject.prompt_id, (subject, []))[1].append(patch)
    found = []
    for subject, patches in patches_of.values():
        rows = sweep(lm, subject.pair, patches, subject.trie, stage.max_new_tokens, stage.stop_at_newline)
        found += [(subject, row) for row in rows if isinstance(row, Patched)]
    return found


def _sum(one: Tally, other: Tally) -> Tally:
    return Tally(one.tokens + other.tokens, one.prefill + other.prefill, one.padding + other.padding)


def render(account: Account, title: str) -> list[object]:
    """The table, and the line under it."""
    table = Table(title=f"Tokens forwarded: {title}", title_justify="left")
    for column in ("stage", "forwarded", "of it contexts", "least alone", "times the least"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for s in account.stages:
        least = ("", "") if s.least is None else (f"{s.least:,.0f}", f"{s.tokens / s.least:.2f}")
        table.add_row(s.stage, f"{s.tokens:,.0f}", f"{s.prefill:,.0f}", *least)
    table.add_row("measurements", f"{account.tokens:,.0f}", "", f"{account.least:,.0f}", f"{account.ratio:.2f}")
    return [
        table,
        "least: every distinct beginning of a text once, a patched row from its layer on; of all measurements together what "
        "one forwards serves all.",
    ]
