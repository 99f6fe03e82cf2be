"""What the browser reads of a run: its snapshot, and its files of activations mapped into memory.

A run may still be computed: any table may be empty, and a newer snapshot is a new `Run`. Knows no screen; loads no torch.
"""

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np

from harness.errors import RunError
from harness.experiments.neurons.browser.tokens import Context, context_of
from harness.experiments.neurons.schema import SCHEMA
from harness.experiments.neurons.settings import METRICS
from harness.run import Manifest, RunPaths, own_setting, read_manifest, state
from harness.run.tensors import Matrix, map_matrices
from harness.store import Reader, Row, open_snapshot

_KEPT = 64
"""Answers of each kind that are kept while a snapshot is open."""
_KEPT_CONTEXTS = 500
_HERE = 1000
"""Neurons of the list of those that are most active at a token."""
_STATISTICS = "neurons"
_T = TypeVar("_T")


class Progress(NamedTuple):
    """A stage: its name, its status, and how many of its items are done."""

    stage: str
    status: str
    done: int
    items: int


@dataclass(frozen=True)
class Ranking:
    """Neurons from first to last, with the value that each is ranked by, and further columns by title."""

    name: str
    column: str
    """What the value is."""
    layers: np.ndarray
    neurons: np.ndarray
    values: np.ndarray
    more: Mapping[str, np.ndarray] = field(default_factory=dict)
    absent: str = ""
    """Why there is none."""

    def __len__(self) -> int:
        return len(self.layers)

    def place_of(self, layer: int, neuron: int) -> int | None:
        """Where a neuron stands, from 0."""
        found = np.flatnonzero((self.layers == layer) & (self.neurons == neuron))
        return int(found[0]) if len(found) else None


class Found(NamedTuple):
    """A place in a prompt, by number."""

    prompt: int
    position: int


class Curve(NamedTuple):
    """A ranking's sets from small to large, and what is left of the logit when they are kept, and when they are dropped."""

    sizes: list[int]
    keep: list[float]
    drop: list[float]


def open_run(paths: RunPaths) -> "Run":
    """A run to look at. Raises RunError, in one line, for one that has nothing of its neurons and computes nothing."""
    run = Run(paths)
    if run.is_empty and run.state != "running":
        run.close()
        raise RunError(
            f"run {paths.run_id} has nothing of its neurons yet; its stage `dump` writes whole activations, `peaks` their "
            f"statistics: harness run neurons --resume {paths.run_id} --neurons.stages dump,peaks"
        )
    return run


class Run:
    """One snapshot of a run. Answers are kept: it does not change."""

    def __init__(self, paths: RunPaths):
        self.paths = paths
        self._seen = _moments(paths)
        self.manifest: Manifest = read_manifest(paths)
        self.state = state(self.manifest)
        self._reader: Reader = open_snapshot(paths, SCHEMA)
        self._asking = threading.Lock()  # a connection refuses a second thread
        self._kept: dict[str, OrderedDict[Any, Any]] = {}
        self._contexts: OrderedDict[int, Context] = OrderedDict()
        self._files: OrderedDict[str, Mapping[int, Matrix] | str] = OrderedDict()
        try:
            self._read_outline()
        except BaseException:
            self.close()
            raise

    def _ask(self, sql: str, params: Sequence[object] | None = None) -> list[Row]:
        with self._asking:
            return self._reader.query(sql, params)

    def _read_outline(self) -> None:
        ask = self._ask
        self.progress = [
            Progress(r["stage"], r["status"], r["num_done"], r["num_items"])
            for r in ask("SELECT stage, status, num_done, num_items FROM stages ORDER BY rowid")
        ]
        known = ask(
            "SELECT prompt_id, category FROM prompts SEMI JOIN contexts USING (prompt_id) ORDER BY prompts.rowid"
        )
        self.prompts = [r["prompt_id"] for r in known]
        self.categories = [r["category"] or "" for r in known]
        self._number = {prompt_id: n for n, prompt_id in enumerate(self.prompts)}
        self._special = {r["token_id"] for r in ask("SELECT token_id FROM vocabulary WHERE is_special")}
        dumped = [r["path"] for r in ask("SELECT path FROM neuron_rows ORDER BY rowid LIMIT 1")]
        self.has_dump = bool(dumped)
        self.metrics = self._named("metric", "influence_totals", METRICS)
        self.effects_of = self._named("ranking", "effects", METRICS)
        (known,) = ask("SELECT count(*) AS n, max(layer) AS layer, max(neuron) AS neuron FROM neurons")
        self.has_statistics = known["n"] > 0
        self.layers, self.num_neurons = self._sizes(dumped)

    def _named(self, column: str, table: str, order: Sequence[str]) -> list[str]:
        names = {r["name"] for r in self._ask(f"SELECT DISTINCT {column} AS name FROM {table}")}
        return [n for n in order if n in names] + sorted(names - set(order))

    def _sizes(self, dumped: Sequence[str]) -> tuple[list[int], int]:
        """The layers there are and the neurons of each: as a file has them, or the tables, or the model's own description."""
        for path in dumped:
            with suppress(RunError):
                layers = self._file(path)
                return sorted(layers), max((m.shape[1] for m in layers.values()), default=0)
        for table in (_STATISTICS, "influence"):
            found = self._ask(f"SELECT DISTINCT layer FROM {table} ORDER BY layer")
            if found:
                (most,) = self._ask(f"SELECT max(neuron) AS neuron FROM {table}")
                return [r["layer"] for r in found], most["neuron"] + 1
        config = self.manifest.model.config
        layers, num = (config.get(name) for name in ("num_hidden_layers", "intermediate_size"))
        # A stranger's manifest may say anything.
        return list(range(min(layers, 10_000) if isinstance(layers, int) else 0)), num if isinstance(num, int) else 0

    @property
    def is_empty(self) -> bool:
        """Whether it has neither activations nor statistics nor any influence."""
        return not (self.has_dump or self.has_statistics or self.metrics)

    def newer(self) -> "Run | None":
        """The run as it stands by now; None where no rows were published since, and its state is the same. May be asked in
        another thread than the other questions."""
        live, manifest = _moments(self.paths)
        if manifest != self._seen[1]:  # a heartbeat writes it every few seconds
            self.manifest = read_manifest(self.paths)
            self._seen = (self._seen[0], manifest)
        if live == self._seen[0] and state(self.manifest) == self.state:
            return None
        return Run(self.paths)

    def prepare(self) -> None:
        """Make the rankings over all prompts ahead: of 240,000 neurons they take a tenth of a second. May be asked in another
        thread than the other questions."""
        for name in ("background", "peak"):
            self._once("ranking", name, lambda name=name: self._over_prompts(name))

    def close(self) -> None:
        """Let the snapshot and the files go."""
        with self._asking:
            self._reader.close()
        self._files.clear()

    # -- what is being computed

    def told(self) -> str:
        """The state of the run in a few words: which stage is at work, and how many are to come."""
        if self.state != "running":
            return self.state
        going = [f"{p.stage} {p.done:,}/{p.items:,}" for p in self.progress if p.status == "running"]
        planned = [s.name for s in self.manifest.fingerprint_parts.stages]
        begun = {p.stage for p in self.progress}
        to_come = sum(1 for name in planned if name not in begun)
        return " · ".join(["running", *going, *([f"{to_come} to come"] if to_come else [])])

    def waits_for(self, stage: str) -> str:
        """Why a stage has given nothing here: in a few words."""
        found = next((p for p in self.progress if p.stage == stage), None)
        if found is None:
            is_going = self.state == "running"
            return f"the stage {stage} has not begun" if is_going else f"the stage {stage} was not run"
        if found.status == "running" and self.state == "running":
            return f"the stage {stage} is at {found.done:,} of {found.items:,}"
        return f"the stage {stage} gave nothing here"

    # -- prompts

    def number_of(self, prompt_id: str) -> int | None:
        """The number of a prompt, from 0; None for one that is not there."""
        return self._number.get(prompt_id)

    def context(self, prompt: int) -> Context:
        """A prompt's tokens."""
        return self.contexts([prompt])[0]

    def contexts(self, prompts: Sequence[int]) -> list[Context]:
        """The tokens of several prompts, those that are not known yet asked for at once."""
        kept = self._contexts
        wanted = [self.prompts[n] for n in dict.fromkeys(prompts) if n not in kept]
        if wanted:
            rows = self._ask(
                f"SELECT * FROM contexts WHERE prompt_id IN ({', '.join('?' * len(wanted))})",
                wanted,
            )
            kept.update((self._number[r["prompt_id"]], context_of(r, self._special)) for r in rows)
        found = [kept[n] for n in prompts]
        for n in prompts:
            kept.move_to_end(n)
        while len(kept) > _KEPT_CONTEXTS:
            kept.popitem(last=False)
        return found

    def texts(self, token_ids: Sequence[int | None]) -> list[str]:
        """The text of each of these tokens, as it stands in the vocabulary."""
        wanted = [n for n in token_ids if n is not None]
        if not wanted:
            return ["" for _ in token_ids]
        places = ", ".join("?" * len(set(wanted)))
        sql = f"SELECT token_id, text FROM vocabulary WHERE token_id IN ({places})"
        known = {r["token_id"]: r["text"] for r in self._ask(sql, sorted(set(wanted)))}
        return ["" if n is None else known.get(n, f"#{n}") or f"#{n}" for n in token_ids]

    def find(self, text: str, after: Found) -> Found | None:
        """The next place where this text begins, in either case of letters: behind `after` in its prompt, then in the prompts
        that follow, then from the first one on."""
        pattern = re.compile(re.escape(text), re.IGNORECASE)
        here = self._places(after.prompt, pattern)
        for position in here:
            if position > after.position:
                return Found(after.prompt, position)
        sql = "SELECT prompt_id FROM contexts WHERE contains(lower(text), lower(?))"
        holding = sorted(n for r in self._ask(sql, [text]) if (n := self._number.get(r["prompt_id"])) is not None)
        for prompt in [n for n in holding if n > after.prompt] + [n for n in holding if n < after.prompt]:
            for position in self._places(prompt, pattern):
                return Found(prompt, position)
        return next((Found(after.prompt, position) for position in here), None)

    def _places(self, prompt: int, pattern: re.Pattern[str]) -> list[int]:
        context = self.context(prompt)
        starts = [a for a, _ in context.spans]
        found: list[int] = []
        for match in pattern.finditer(context.text):
            at = context.token_at(match.start())
            if at is None:  # a space that its token leaves out
                at = next(
                    (n for n, start in enumerate(starts) if start >= match.start() and context.spans[n][1] > start),
                    None,
                )
            if at is not None and at not in found:
                found.append(at)
        return found

    # -- activations

    def values(self, prompt: int, layer: int, first: int, last: int) -> np.ndarray | None:
        """Activations of the neurons `first` to `last` of a layer at every token of a prompt, [tokens, neurons]; NaN where they
        were not dumped. None where nothing of this prompt was, or not this layer.

        Raises RunError, in one line, for a file that is missing, damaged, or of another run or model.
        """
        cells = self.context(prompt).cells
        rows = self._rows_of(prompt)
        if rows is None:
            return None
        matrix, start = rows(layer)
        if matrix is None:
            return None
        dumped = np.array([-1 if c.row is None else c.row for c in cells])
        stored = matrix.read(slice(start, start + int((dumped >= 0).sum())), slice(first, last + 1))
        found = np.full((len(cells), last + 1 - first), np.nan, dtype=np.float32)
        found[dumped >= 0] = stored[dumped[dumped >= 0]]
        return found

    def _rows_of(self, prompt: int) -> Callable[[int], tuple[Matrix | None, int]] | None:
        """A way to the matrix of any layer and the row in it at which a prompt begins."""
        prompt_id = self.prompts[prompt]
        told = self._once("rows", prompt_id, lambda: self._row("neuron_rows", "prompt_id = ?", [prompt_id]))
        if told is None:
            return None
        path, start, end = told["path"], told["row_start"], told["row_end"]
        num = sum(1 for c in self.context(prompt).cells if c.row is not None)
        layers = self._file(path)

        def matrix_of(layer: int) -> tuple[Matrix | None, int]:
            matrix = layers.get(layer)
            if matrix is not None and not (0 <= start <= end <= matrix.shape[0] and end - start == num):
                raise RunError(
                    f"{path}: expected rows {start} to {end} for the {num} tokens of {prompt_id}, found "
                    f"{matrix.shape[0]} rows: the file is of another run"
                )
            if matrix is not None and matrix.shape[1] != self.num_neurons:
                raise RunError(
                    f"{path}: expected {self.num_neurons} neurons in layer {layer}, found {matrix.shape[1]}: the file is of "
                    "another model"
                )
            return matrix, start

        return matrix_of

    def _file(self, path: str) -> Mapping[int, Matrix]:
        """The layers in a file, kept open; of one that cannot be read the reason, again at each question."""
        if path not in self._files:
            try:
                self._files[path] = self._opened(path)
            except RunError as e:
                self._files[path] = str(e)
            if len(self._files) > _KEPT:
                self._files.popitem(last=False)
        self._files.move_to_end(path)
        found = self._files[path]
        if isinstance(found, str):
            raise RunError(found)
        return found

    def _opened(self, path: str) -> Mapping[int, Matrix]:
        matrices = map_matrices(self.paths.artifacts, path)
        named = {int(name[2:]): m for name, m in matrices.items() if re.fullmatch(r"a\.[0-9]{1,6}", name)}
        if not named:
            raise RunError(f"{path}: holds no activations of a layer; it is not a file of the stage dump")
        told = self._row("artifacts", "path = ?", [path])
        size = (self.paths.artifacts / path).stat().st_size
        if told is not None and told["bytes"] is not None and told["bytes"] != size:
            raise RunError(
                f"{path}: expected {told['bytes']:,} bytes as the run wrote them, found {size:,}: it was changed"
            )
        return named

    # -- one neuron

    def statistics(self, layer: int, neuron: int) -> Mapping[str, Any] | None:
        """The row of `neurons`, its examples those that say where they are; None where there is none."""
        return self._once("statistics", (layer, neuron), lambda: self._statistics(layer, neuron))

    def _statistics(self, layer: int, neuron: int) -> Mapping[str, Any] | None:
        row = self._row(_STATISTICS, "layer = ? AND neuron = ?", [layer, neuron])
        if row is None:
            return None
        examples = [e for e in row["examples"] or [] if e and e["prompt_id"] is not None and e["position"] is not None]
        return {**row, "examples": examples}

    def writes(self, layer: int, neuron: int) -> Mapping[str, Any] | None:
        """The row of `neuron_writes`, its tokens as `top_texts` and `low_texts`; None where there is none."""
        return self._once("writes", (layer, neuron), lambda: self._writes(layer, neuron))

    def _writes(self, layer: int, neuron: int) -> Mapping[str, Any] | None:
        row = self._row("neuron_writes", "layer = ? AND neuron = ?", [layer, neuron])
        if row is None:
            return None
        top, low = row["top_ids"] or [], row["low_ids"] or []
        texts = self.texts([*top, *low])
        return {**row, "top_texts": texts[: len(top)], "low_texts": texts[len(top) :]}

    def claims(self, prompt: int, layer: int, neuron: int) -> Mapping[str, Mapping[str, Any]]:
        """By metric, what it says of a neuron in a prompt; with `measured` where its effect was."""
        key = (self.prompts[prompt], layer, neuron)
        return self._once("claims", key, lambda: self._claims(key))

    def _claims(self, key: tuple[str, int, int]) -> Mapping[str, Mapping[str, Any]]:
        where = "WHERE prompt_id = ? AND layer = ? AND neuron = ?"
        found = {r["metric"]: r for r in self._ask(f"SELECT * FROM influence {where}", list(key))}
        for r in self._ask(f"SELECT * FROM effects {where}", list(key)):
            found[r["ranking"]] = {**found.get(r["ranking"], {}), "measured": r}
        return found

    # -- rankings

    def rankings(self) -> list[str]:
        """The rankings that this run has rows for, in the order in which they are gone through."""
        names = list(self.metrics)
        names += ["effects"] if self.effects_of else []
        names += ["background", "peak"] if self.has_statistics else []
        return names + (["active"] if self.has_dump else [])

    def ranking(self, name: str, prompt: int, position: int) -> Ranking:
        """Neurons in the order of a metric in a prompt; of their measured `effects` in it; of how far their peaks are beyond the
        `background`, or of the `peak` itself, over all prompts; or of how `active` they are at a token. Raises RunError as
        `values` does."""
        if name == "active":
            return self._once("active", (prompt, position), lambda: self._active(prompt, position))
        if name in ("background", "peak"):
            return self._once("ranking", name, lambda: self._over_prompts(name))
        key = self.prompts[prompt]
        make = self._by_effect if name == "effects" else self._by_influence
        return self._once("ranking", (name, key), lambda: make(name, key))

    def _by_influence(self, metric: str, prompt_id: str) -> Ranking:
        told = self._columns(
            "SELECT layer, neuron, value, share, selected::INTEGER AS selected FROM influence "
            "WHERE prompt_id = ? AND metric = ? ORDER BY place, layer, neuron",
            [prompt_id, metric],
            ("layer", "neuron", "value", "share", "selected"),
        )
        more = {"share": told["share"], "selected": told["selected"]}
        return Ranking(metric, "value", told["layer"], told["neuron"], told["value"], more, self.waits_for("influence"))

    def _by_effect(self, name: str, prompt_id: str) -> Ranking:
        told = self._columns(
            "SELECT layer, neuron, any_value(delta_logit) AS delta FROM effects WHERE prompt_id = ? "
            "GROUP BY layer, neuron ORDER BY abs(delta) DESC, layer, neuron",
            [prompt_id],
            ("layer", "neuron", "delta"),
        )
        return Ranking(name, "Δ logit", told["layer"], told["neuron"], told["delta"], {}, self.waits_for("effects"))

    def effects(self, ranking: str, prompt: int) -> Ranking:
        """The measured effects of a ranking in a prompt, in its order, beside what it predicts."""
        key = (ranking, self.prompts[prompt])
        return self._once("effects", key, lambda: self._effects(*key))

    def _effects(self, ranking: str, prompt_id: str) -> Ranking:
        told = self._columns(
            "SELECT layer, neuron, delta_logit, predicted, delta_logp FROM effects WHERE prompt_id = ? AND ranking = ? "
            "ORDER BY place, layer, neuron",
            [prompt_id, ranking],
            ("layer", "neuron", "delta_logit", "predicted", "delta_logp"),
        )
        more = {name: told[name] for name in ("predicted", "delta_logp")}
        why = self.waits_for("effects")
        return Ranking(ranking, "measured", told["layer"], told["neuron"], told["delta_logit"], more, why)

    def _over_prompts(self, name: str) -> Ranking:
        columns = ["layer", "neuron", "mean_peak", "z_background", "q"]
        parts = list(self._reader.batches(_STATISTICS, columns))
        told = {
            c: np.concatenate([p.column(c).to_numpy(zero_copy_only=False) for p in parts]) if parts else np.zeros(0)
            for c in columns
        }
        layers, neurons = told["layer"].astype(np.int64), told["neuron"].astype(np.int64)
        by = told["mean_peak" if name == "peak" else "z_background"].astype(np.float64)
        size = np.nan_to_num(np.abs(by), nan=-1.0)
        order = np.argsort(-size, kind="stable")
        if name == "background":
            order = order[size[order] >= 0]
        other = "z_background" if name == "peak" else "q"
        column = "mean peak" if name == "peak" else "z"
        why = "there is no background to compare with" if len(by) else self.waits_for("peaks")
        more = {"z" if name == "peak" else "q": told[other].astype(np.float64)[order]}
        return Ranking(name, column, layers[order], neurons[order], by[order], more, why)

    def _active(self, prompt: int, position: int) -> Ranking:
        rows, cells = self._rows_of(prompt), self.context(prompt).cells
        row = cells[position].row if position < len(cells) else None
        none = np.zeros(0, dtype=np.int64)
        if rows is None or row is None:
            why = "nothing was dumped at this token" if rows else self.waits_for("dump")
            return Ranking("active", "a", none, none, none, absent=why)
        given = {}
        for layer in self.layers:
            matrix, start = rows(layer)
            if matrix is not None:
                given[layer] = matrix.read(slice(start + row, start + row + 1), slice(None))[0]
        every = np.concatenate(list(given.values()))
        size = np.nan_to_num(np.abs(every))
        most = min(_HERE, len(size))
        top = np.argpartition(-size, most - 1)[:most]
        top = top[np.lexsort((top, -size[top]))]
        layers = np.repeat(list(given), [len(v) for v in given.values()])
        return Ranking("active", "a", layers[top], top % self.num_neurons, every[top])

    # -- curves

    def curves(self, prompt: int) -> Mapping[str, Curve]:
        """By ranking, the curve of a prompt."""
        return self._once("curves", prompt, lambda: self._curves(self.prompts[prompt]))

    def _curves(self, prompt_id: str) -> Mapping[str, Curve]:
        found: dict[str, dict[str, dict[int, float]]] = {}
        for r in self._ask("SELECT ranking, mode, k, m FROM curves WHERE prompt_id = ? ORDER BY k", [prompt_id]):
            found.setdefault(r["ranking"], {}).setdefault(r["mode"], {})[r["k"]] = r["m"]
        order = [*METRICS, *sorted(found.keys() - set(METRICS))]
        curves = {}
        for ranking in (name for name in order if name in found):
            keep, drop = (found[ranking].get(mode, {}) for mode in ("keep", "drop"))
            sizes = sorted(keep.keys() | drop.keys())
            curves[ranking] = Curve(sizes, [_number(keep.get(k)) for k in sizes], [_number(drop.get(k)) for k in sizes])
        return curves

    def target(self, prompt: int) -> Mapping[str, Any] | None:
        """The row of `targets`, its tokens as `texts`; None where there is none."""
        return self._once("target", prompt, lambda: self._target(self.prompts[prompt]))

    def _target(self, prompt_id: str) -> Mapping[str, Any] | None:
        row = self._row("targets", "prompt_id = ?", [prompt_id])
        return None if row is None else {**row, "texts": self.texts(row["token_ids"] or [])}

    @property
    def kind(self) -> str:
        """What `effects` were made by, such as setting to the mean."""
        return str(own_setting(self.manifest, "ablate", "mean"))[:20]

    # -- inside

    def _row(self, table: str, where: str, values: Sequence[object]) -> Mapping[str, Any] | None:
        found = self._ask(f"SELECT * FROM {table} WHERE {where} LIMIT 1", list(values))
        return found[0] if found else None

    def _columns(self, sql: str, values: Sequence[object], names: Sequence[str]) -> dict[str, np.ndarray]:
        rows = self._ask(sql, values)
        kinds = {name: np.int64 if name in ("layer", "neuron") else np.float64 for name in names}
        return {name: np.array([_number(r[name]) for r in rows]).astype(kinds[name]) for name in names}

    def _once(self, kind: str, key: Any, make: Callable[[], _T]) -> _T:
        kept = self._kept.setdefault(kind, OrderedDict())
        if key not in kept:
            kept[key] = make()
            if len(kept) > _KEPT:
                kept.popitem(last=False)
        kept.move_to_end(key)
        return kept[key]


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)


_Moment = tuple[int, int, int] | None


def _moments(paths: RunPaths) -> tuple[_Moment, _Moment]:
    """When the snapshot and the manifest were last written."""
    return _moment(paths.live), _moment(paths.manifest)


def _moment(path: os.PathLike[str]) -> _Moment:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns
