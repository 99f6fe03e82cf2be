"""A whole, plausible run of the neuron experiment, of any size, without a model:
`python -m tests.neurons.synthetic --prompts 12 --layers 4 --neurons 64 --to runs`.

What is planted, so that a reader of the run can be tested against it:
- the first prompts are hostile to a terminal and to a page (`HOSTILE`), and there is a letter's word of 1,500 letters;
- a dumped activation is the neuron's value: at the position of an example the example's, at the target position that of
  `influence`, each rounded to the dtype of the dump, and nowhere else larger than the smallest example;
- all metrics of a prompt rank the same neurons, with noise that is largest for `dla` and smallest for `relp`, around what
  `effects` then measures;
- a ranking's curve rises fast, `loudest` slower, `matched` and `random` hardly before the end.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from harness.experiments.neurons.schema import SCHEMA
from harness.experiments.neurons.settings import CONTROLS, METRICS, NeuronsSettings
from harness.files import file_sha256
from harness.run import ManifestFile, RunPaths, fingerprint, new_run_id, now_text
from harness.store import Store
from tests.gravity import resolve

ROOT = Path(__file__).parents[2]
TOKENIZER = Path("data/models/demo")
STAGES = ("prompts", "dump", "partials", "background", "peaks", "targets", "influence", "effects", "writes", "analysis")
HOSTILE = (
    "\x1b[31mred\x1b[0m \x1b]0;title\x07 \x1b[2J\x1b[H gone \x9b1m \r over\x08\x08\tand \x00 nothing",
    '<script>alert("neuron")</script> & <b>bold</b> [bold red]markup[/] {{ 7 * 7 }}',
    "東京は日本の首都です。",
    "עיר הבירה היא ירושלים \u202eright to left\u202c and \u2066isolated\u2069 مرحبا",
    "A family \U0001f468\u200d\U0001f469\u200d\U0001f467 and a flag \U0001f1eb\U0001f1f7 and e\u0301 combined\u200b.",
    "One long word: " + "a" * 1500 + " end",
)
_WORDS = (
    "the",
    "capital",
    "of",
    "a",
    "river",
    "runs",
    "through",
    "old",
    "city",
    "where",
    "king",
    "built",
    "stone",
    "bridge",
)
_PLACES = ("Texas", "France", "Japan", "Peru", "Norway", "Kenya", "Ohio", "Spain")
_WIDTH = 15  # tokens each way that a neuron writes
_EXAMPLES = 20
_POOL = 1 << 22  # noise that is drawn once, and read from many places

DumpDtype = Literal["off", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Shape:
    """How big the run is and what of it there is.

    `tokens` is about the length of a prompt. `stages` are those that ran; with `is_running` the last of them is half done,
    and the run still going on. `dump_prompts`: only the first so many are dumped. `influence` rows a prompt and metric;
    of so many of them effects are measured one by one.
    """

    num_prompts: int = 12
    num_layers: int = 4
    num_neurons: int = 64
    tokens: int = 16
    seed: int = 0
    is_running: bool = False
    dump: DumpDtype = "float16"
    dump_prompts: int | None = None
    stages: tuple[str, ...] = STAGES
    metrics: tuple[str, ...] = METRICS
    influence: int = 200
    effects: int = 50
    curve: tuple[int, ...] = (1, 2, 5, 10, 20, 50, 100, 200, 500)
    model: str = "synthetic"


def make(root: Path, shape: Shape, now: datetime | None = None) -> RunPaths:
    """Writes a run of this shape under `root` and gives its paths; the same shape gives the same rows and files."""
    digest = fingerprint({"synthetic": asdict(shape)})
    paths = RunPaths(root / new_run_id(shape.model.rsplit("/", 1)[-1], digest, now or datetime.now(UTC)))
    paths.folder.mkdir(parents=True)
    made = _Made(shape)
    file = ManifestFile.create(paths, _manifest(made, digest))
    with Store(paths.results, SCHEMA) as store:
        for stage in STAGES:
            if stage in shape.stages:
                is_half = shape.is_running and stage == shape.stages[-1]
                _fill(store, paths, made, stage, is_half=is_half)
        store.event("warning", "made_up", "this run is made up: <i>nothing</i> was measured \x1b[31mat all")
        store.publish(paths.live)
        if not shape.is_running:
            _finish(file, store)
    return paths


def go_on(paths: RunPaths, shape: Shape, stages: Sequence[str] = STAGES, *, is_last: bool = False) -> None:
    """Goes on with a run of this shape: fills these stages, whatever of them is there already, and publishes."""
    made = _Made(shape)
    with Store(paths.results, SCHEMA) as store:
        for stage in stages:
            _fill(store, paths, made, stage, is_half=False)
        store.publish(paths.live)
        if is_last:
            _finish(ManifestFile.reopen(paths), store)


def _finish(file: ManifestFile, store: Store) -> None:
    file.update(
        status="finished", ended=now_text(), seconds=1.0, num_failed=0, tables=store.counts(), warnings={},
        stages={r["stage"]: r for r in store.stage_rows()},
    )  # fmt: skip


def _fill(store: Store, paths: RunPaths, made: "_Made", stage: str, *, is_half: bool) -> None:
    """The rows of a stage, or of the first half of its items."""
    if stage == "dump" and made.shape.dump == "off":
        return
    total = made.num_items(stage)
    upto = (total + 1) // 2 if is_half else total
    for table, rows in made.rows(stage, upto, paths).items():
        store._con.register("incoming", rows)
        store._con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming ON CONFLICT DO NOTHING")
        store._con.unregister("incoming")
    store.start_stage(stage, 1, total, upto)
    if not is_half:
        store.finish_stage(stage, "done")


class _Made:
    """Everything about a run of one shape, a stage at a time: each draws from its own seed, whatever ran before."""

    def __init__(self, shape: Shape):
        self.shape = shape
        self.num_all = shape.num_layers * shape.num_neurons
        self.texts = _texts(shape)
        self.ids = [f"p{n:04d}" for n in range(shape.num_prompts)]
        tokenizer = Tokenizer.from_file(str(ROOT / TOKENIZER / "tokenizer.json"))
        self.tokenizer = tokenizer
        # One special token in front, as of models that have a token of beginning.
        self.coded = [([0, *c.ids], [(0, 0), *c.offsets]) for c in tokenizer.encode_batch(self.texts)]
        self.lengths = np.array([len(ids) for ids, _ in self.coded])
        self.targets = self.lengths - 1
        self.scale = self.rng("scale").lognormal(0.0, 0.8, self.num_all)

    def rng(self, what: str) -> np.random.Generator:
        return np.random.default_rng([self.shape.seed, *what.encode()])

    def num_items(self, stage: str) -> int:
        if stage in ("partials", "background"):
            return -(-self.shape.num_prompts // 256)
        return {"peaks": self.shape.num_layers, "writes": self.shape.num_layers, "analysis": 1}.get(
            stage, self.num_dumped if stage == "dump" else self.shape.num_prompts
        )

    @property
    def num_dumped(self) -> int:
        most = self.shape.dump_prompts
        return self.shape.num_prompts if most is None else min(most, self.shape.num_prompts)

    def rows(self, stage: str, upto: int, paths: RunPaths) -> Mapping[str, pa.Table]:
        """The tables of a stage, of its first so many items."""
        if stage in ("partials", "background"):
            return {}
        if stage == "dump":
            return self.dumped(upto, paths)
        return getattr(self, f"_{stage}")(upto)

    # -- prompts and activations

    def _prompts(self, upto: int) -> Mapping[str, pa.Table]:
        some = slice(0, upto)
        special = [self.tokenizer.decode([n]) == "" for n in range(self.tokenizer.get_vocab_size())]
        texts = [self.tokenizer.decode([n]) or self.tokenizer.id_to_token(n) for n in range(len(special))]
        coded = self.coded[some]
        return {
            "vocabulary": pa.table({"token_id": range(len(texts)), "text": texts, "is_special": special}),
            "prompts": pa.table({
                "prompt_id": self.ids[some], "category": [_category(n) for n in range(len(self.ids))][some],
                "text": self.texts[some], "target": pa.nulls(upto, pa.string()), "contrast": pa.nulls(upto, pa.string()),
                "row_hash": [fingerprint({"text": t}) for t in self.texts[some]],
            }),
            "contexts": pa.table({
                "prompt_id": self.ids[some], "condition": ["neurons"] * upto, "text": self.texts[some],
                "token_ids": [ids for ids, _ in coded],
                "pieces": [[self.tokenizer.id_to_token(i) for i in ids] for ids, _ in coded],
                "offsets": pa.array([list(map(list, spans)) for _, spans in coded], pa.list_(pa.list_(pa.int32(), 2))),
                "positions": [list(range(len(ids))) for ids, _ in coded],
                "is_counted": [[n > 0 for n in range(len(ids))] for ids, _ in coded],
            }),
        }  # fmt: skip

    def dumped(self, upto: int, paths: RunPaths) -> Mapping[str, pa.Table]:
        """Files of about 64 MB and the rows that tell of them."""
        shape, noise = self.shape, self.rng("noise")
        pool = np.clip(noise.standard_normal(_POOL, np.float32) * 0.7, -2.4, 2.4)
        width = 4 if shape.dump == "float32" else 2
        most = max(1, 64_000_000 // (self.num_all * width))  # rows a file
        files: list[list[int]] = [[]]
        for n in range(upto):
            if files[-1] and sum(self.lengths[files[-1]]) + self.lengths[n] > most:
                files.append([])
            files[-1].append(n)
        index, told = [], []
        for number, prompts in enumerate(f for f in files if f):
            name = f"dump/{number:06d}.safetensors"
            starts = np.concatenate([[0], np.cumsum(self.lengths[prompts])])
            rows = int(starts[-1])
            tensors = {}
            planted = [self._planted(n) for n in prompts]
            for layer in range(shape.num_layers):
                size = rows * shape.num_neurons
                at = (layer * 7919 + number * 104_729) % _POOL
                values = np.resize(np.roll(pool, -at) if size < _POOL else pool, (rows, shape.num_neurons))
                scale = self.scale[layer * shape.num_neurons :][: shape.num_neurons]
                values = values * scale.astype(np.float32)
                for start, (positions, neurons, given) in zip(starts, planted, strict=False):
                    here = neurons // shape.num_neurons == layer
                    values[start + positions[here], neurons[here] % shape.num_neurons] = given[here]
                tensors[f"a.{layer}"] = values
            at_path = paths.artifacts / name
            at_path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(at_path, tensors, shape.dump)
            index += [(self.ids[n], name, int(a), int(b)) for n, a, b in zip(prompts, starts, starts[1:], strict=False)]
            told.append({
                "path": name, "kind": "neurons", "sha256": file_sha256(at_path), "bytes": at_path.stat().st_size,
                "shape": [shape.num_layers, rows, shape.num_neurons], "dtype": shape.dump, "stage": "dump",
                "batch_id": number, "item_key": None,
            })  # fmt: skip
        columns = list(zip(*index, strict=True))
        return {
            "neuron_rows": pa.table({
                **dict(zip(("prompt_id", "path", "row_start", "row_end"), map(list, columns), strict=True)),
                "dtype": [shape.dump] * len(index),
            }),
            "artifacts": pa.Table.from_pylist(told),
        }  # fmt: skip

    def _planted(self, prompt: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions, neurons and values that a dump of this prompt must have."""
        which = self.examples
        found = np.flatnonzero(which.prompt == prompt)
        ranked, active = self._ranked(prompt)
        positions = np.concatenate([which.position[found], np.full(len(ranked), self.targets[prompt])])
        return positions, np.concatenate([found // which.width, ranked]), np.concatenate([which.value[found], active])

    @cached_property
    def examples(self) -> "_Examples":
        """Of every neuron those prompts in which it peaks highest, highest first; never at the target position."""
        rng, shape = self.rng("examples"), self.shape
        width = min(_EXAMPLES, shape.num_prompts)
        strides = [s for s in range(1, shape.num_prompts + 1) if np.gcd(s, shape.num_prompts) == 1]
        start = rng.integers(0, shape.num_prompts, self.num_all)
        prompt = (start[:, None] + rng.choice(strides, self.num_all)[:, None] * np.arange(width)) % shape.num_prompts
        room = np.maximum(1, self.lengths[prompt] - 2)
        position = 1 + (rng.random(prompt.shape) * room).astype(np.int64)
        size = 2.5 + np.sort(rng.exponential(1.5, prompt.shape), axis=1)[:, ::-1]
        sign = np.where(rng.random(self.num_all) < 0.8, 1, -1)[:, None]
        return _Examples(prompt.ravel(), position.ravel(), (size * self.scale[:, None] * sign).ravel(), width)

    # -- statistics

    def _peaks(self, upto: int) -> Mapping[str, pa.Table]:
        rng, shape, which = self.rng("peaks"), self.shape, self.examples
        n = upto * shape.num_neurons
        size = np.abs(which.value.reshape(-1, which.width))[:n]
        rest = 2.0 * self.scale[:n] * (shape.num_prompts - which.width)
        mean_peak = (size.sum(axis=1) + rest) / shape.num_prompts
        low = 1.8 * self.scale[:n] if shape.num_prompts > which.width else size[:, -1]
        sd_background = self.scale[:n] * rng.uniform(0.5, 1.5, n)
        beyond = np.where(rng.random(n) < 0.02, rng.uniform(2, 8, n), rng.normal(0, 0.05, n))
        peak_background = mean_peak - beyond * sd_background
        z = beyond * np.sqrt(shape.num_prompts)
        p = np.exp(-0.717 * np.abs(z) - 0.416 * z * z)  # close to the normal's two tails; plausible is enough
        counted = int((self.lengths - 1).sum())
        values = {
            "layer": np.repeat(np.arange(upto), shape.num_neurons), "neuron": np.tile(np.arange(shape.num_neurons), upto),
            "num_prompts": np.full(n, shape.num_prompts), "num_tokens": np.full(n, counted), "mean_peak": mean_peak,
            "sd_peak": size.std(axis=1), "max_peak": size[:, 0], "min_peak": low,
            "max_signed": which.value.reshape(-1, which.width)[:n, 0], "mean": rng.normal(0, 0.05, n) * self.scale[:n],
            "sd": 0.7 * self.scale[:n], "share_active": rng.beta(2, 2, n), "kurtosis": rng.gamma(2, 2, n),
            "peak_token_mode": rng.integers(1, 4096, n), "peak_token_share": rng.beta(1, 6, n),
            "num_peak_tokens": rng.integers(1, 200, n), "next_token_mode": rng.integers(1, 4096, n),
            "num_next_tokens": rng.integers(1, 200, n), "tokens_error": np.zeros(n, int),
            "share_functional": rng.beta(2, 5, n), "mean_background": rng.normal(0, 0.05, n) * self.scale[:n],
            "peak_background": peak_background, "sd_background": sd_background, "z_background": z, "p_background": p,
            "q": np.minimum(1, p * 20), "out_norm": rng.lognormal(0, 0.3, n),
        }  # fmt: skip
        flat = n * which.width
        some = pa.StructArray.from_arrays(
            [pa.array(self.ids).take(pa.array(which.prompt[:flat])), pa.array(which.position[:flat], pa.int32()),
             pa.array(which.value[:flat])],
            names=["prompt_id", "position", "value"],
        )  # fmt: skip
        offsets = pa.array(np.arange(0, flat + 1, which.width), pa.int32())
        return {"neurons": pa.table({**values, "examples": pa.ListArray.from_arrays(offsets, some)})}

    # -- influence, effects, curves

    def _targets(self, upto: int) -> Mapping[str, pa.Table]:
        rng = self.rng("targets")
        ids = rng.integers(1, 4096, (upto, 5))
        probs = np.sort(rng.dirichlet(np.ones(6), upto)[:, :5])[:, ::-1]
        logit = rng.normal(14, 2, upto)
        return {"targets": pa.table({
            "prompt_id": self.ids[:upto], "mode": ["top1_logit"] * upto, "token_ids": [[int(i)] for i in ids[:, 0]],
            "contrast_ids": [[]] * upto, "position": self.targets[:upto], "logit": logit,
            "logit_contrast": pa.nulls(upto, pa.float64()), "p": probs[:, 0], "rank": np.zeros(upto, int),
            "margin": np.log(probs[:, 0] / probs[:, 1]), "top_ids": ids.tolist(), "top_probs": probs.tolist(),
        })}  # fmt: skip

    def _ranked(self, prompt: int) -> tuple[np.ndarray, np.ndarray]:
        """The neurons that matter for a prompt, from the strongest, and their activations at the target position."""
        rng = np.random.default_rng([self.shape.seed, 17, prompt])
        chosen = rng.choice(self.num_all, min(self.shape.influence, self.num_all), replace=False)
        return chosen, rng.uniform(-2, 2.4, len(chosen)) * self.scale[chosen]

    def _truth(self, prompt: int, size: int) -> np.ndarray:
        rng = np.random.default_rng([self.shape.seed, 18, prompt])
        return 1.5 * np.exp(-np.arange(size) / 15) * np.where(rng.random(size) < 0.7, 1, -1)

    def _claimed(self, prompt: int) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray], np.ndarray]:
        """Neurons, activations, the values of each metric, and what is measured."""
        chosen, active = self._ranked(prompt)
        truth = self._truth(prompt, len(chosen))
        rng = np.random.default_rng([self.shape.seed, 19, prompt])
        noise = {"dla": 0.8, "act_grad": 0.4, "ig": 0.25, "relp": 0.1}
        values = {m: truth * (1 + rng.normal(0, noise[m], len(truth))) for m in METRICS}
        return chosen, active, values, truth

    def _influence(self, upto: int) -> Mapping[str, pa.Table]:
        parts: list[dict[str, Any]] = []
        totals: list[dict[str, Any]] = []
        for n in range(upto):
            chosen, active, values, _ = self._claimed(n)
            for metric in self.shape.metrics:
                order = np.lexsort((chosen, -np.abs(values[metric])))
                value = values[metric][order]
                total_abs = float(np.abs(value).sum()) * 1.3
                share = np.abs(value) / total_abs
                held = np.cumsum(share) - share < 0.8
                parts.append({
                    "who": chosen[order], "activation": active[order], "value": value, "share": share,
                    "place": np.arange(1, len(value) + 1), "selected": held, "weight": value / active[order],
                })  # fmt: skip
                p = share / share.sum()
                totals.append({
                    "prompt_id": self.ids[n], "metric": metric, "total_abs": total_abs, "total": float(value.sum()),
                    "attention": 3.0 if metric == "dla" else None, "embedding": 0.5 if metric == "dla" else None,
                    "bias": 0.0 if metric == "dla" else None, "residual": -2e-7 if metric == "dla" else None,
                    "num_selected": int(held.sum()), "is_cut": False, "effective": float(np.exp(-(p * np.log(p)).sum())),
                    "completeness_gap": 1e-4 if metric == "ig" else None,
                })  # fmt: skip
        keys = [(n, m) for n in range(upto) for m in self.shape.metrics]
        columns = self._stacked(parts, keys, "metric")
        columns["position"] = self.targets[columns.pop("prompt")]
        return {"influence": pa.table(columns), "influence_totals": pa.Table.from_pylist(totals)}

    def _effects(self, upto: int) -> Mapping[str, pa.Table]:
        parts: list[dict[str, Any]] = []
        for n in range(upto):
            chosen, active, values, truth = self._claimed(n)
            rng = np.random.default_rng([self.shape.seed, 20, n])
            measured = -truth * 0.6 + rng.normal(0, 0.02, len(truth))
            for metric in self.shape.metrics:
                order = np.lexsort((chosen, -np.abs(values[metric])))[: self.shape.effects]
                parts.append({
                    "who": chosen[order], "place": np.arange(1, len(order) + 1), "activation": active[order],
                    "edited": np.zeros(len(order)), "delta_logit": measured[order], "delta_logp": measured[order] * 0.5,
                    "delta_contrast": np.full(len(order), np.nan), "predicted": -values[metric][order],
                })  # fmt: skip
        keys = [(n, m) for n in range(upto) for m in self.shape.metrics]
        columns = self._stacked(parts, keys, "ranking")
        columns.pop("prompt")
        columns["delta_contrast"] = pa.nulls(len(columns["place"]), pa.float64())
        columns["kind"] = pa.array(["mean"] * len(columns["place"]))
        return {"effects": pa.table(columns), "curves": self._curves(upto)}

    def _stacked(self, parts: Sequence[Mapping[str, np.ndarray]], keys: Sequence[tuple[int, str]], what: str) -> dict:
        """Columns of all parts one under another, each with its prompt and metric (`what` says how that is called)."""
        sizes = [len(p["who"]) for p in parts]
        who = np.concatenate([p["who"] for p in parts])
        prompt = np.repeat([n for n, _ in keys], sizes)
        rest = {name: np.concatenate([p[name] for p in parts]) for name in parts[0] if name != "who"}
        return {
            "prompt_id": pa.array(self.ids).take(pa.array(prompt)),
            what: pa.array([m for _, m in keys]).take(pa.array(np.repeat(np.arange(len(keys)), sizes))),
            "layer": who // self.shape.num_neurons, "neuron": who % self.shape.num_neurons, **rest, "prompt": prompt,
        }  # fmt: skip

    def _curves(self, upto: int) -> pa.Table:
        sizes = np.array([0, *(k for k in self.shape.curve if k < self.num_all), self.num_all])
        speed = {
            **dict.fromkeys(METRICS, 8.0),
            "loudest": 60.0,
            "matched": 0.4 * self.num_all,
            "random": 0.5 * self.num_all,
        }
        rankings = [*self.shape.metrics, *CONTROLS]
        rng = self.rng("curves")
        out: dict[str, list[np.ndarray]] = {"k": [], "m": [], "at": [], "ranking": [], "mode": []}
        for number, ranking in enumerate(rankings):
            pace = speed[ranking] * rng.uniform(0.8, 1.25, (upto, 1))
            keep = (1 - np.exp(-sizes / pace)) / (1 - np.exp(-self.num_all / pace))
            for turn, m in enumerate((keep, 1 - keep)):
                out["k"].append(np.tile(sizes, upto))
                out["m"].append(m.ravel())
                out["at"].append(np.repeat(np.arange(upto), len(sizes)))
                out["ranking"].append(np.full(m.size, number))
                out["mode"].append(np.full(m.size, turn))
        found = {name: np.concatenate(values) for name, values in out.items()}
        return pa.table({
            "prompt_id": pa.array(self.ids).take(pa.array(found["at"])),
            "ranking": pa.array(rankings).take(pa.array(found["ranking"])), "k": found["k"],
            "mode": pa.array(["keep", "drop"]).take(pa.array(found["mode"])), "m": found["m"], "logit": 6 + 8 * found["m"],
        })  # fmt: skip

    def _writes(self, upto: int) -> Mapping[str, pa.Table]:
        """Of every neuron that a ranking names first; where there are few neurons, of them all."""
        rng = self.rng("writes")
        named = np.concatenate([self._ranked(n)[0][:20] for n in range(self.shape.num_prompts)])
        who = np.arange(self.num_all) if self.num_all <= 4096 else np.unique(named)
        who = who[who < upto * self.shape.num_neurons]
        draw = lambda sign: np.sort(rng.exponential(0.5, (len(who), _WIDTH)), axis=1)[:, ::-1] * sign  # noqa: E731
        explicit = [[{"token_id": 300, "logit": float(v)}] for v in rng.normal(0, 0.3, len(who))]
        return {"neuron_writes": pa.table({
            "layer": who // self.shape.num_neurons, "neuron": who % self.shape.num_neurons,
            "top_ids": _lists(rng.integers(1, 4096, (len(who), _WIDTH))), "top_logits": _lists(draw(1)),
            "low_ids": _lists(rng.integers(1, 4096, (len(who), _WIDTH))), "low_logits": _lists(draw(-1)),
            "explicit": explicit,
        })}  # fmt: skip

    def _analysis(self, upto: int) -> Mapping[str, pa.Table]:
        rng, rows = self.rng("analysis"), []
        strength = {"dla": 0.72, "act_grad": 0.9, "ig": 0.95, "relp": 0.99}
        n = self.shape.num_prompts
        for ranking in self.shape.metrics:
            for measure in ("pearson", "spearman"):
                value = strength[ranking] - rng.uniform(0, 0.02)
                rows.append(
                    ("agreement", ranking, measure, value, value - 0.03, min(1.0, value + 0.03), None, n, "bootstrap")
                )
        for ranking in (*self.shape.metrics, *CONTROLS):
            value = {"loudest": 0.5, "matched": 0.2, "random": 0.15}.get(ranking, 0.85)
            rows += [("curves", ranking, f"area_{mode}", value, value - 0.05, value + 0.05, None, n, "bootstrap")
                     for mode in ("keep", "drop")]  # fmt: skip
        rows.append(("background", "", "share_beyond", 0.02, None, None, None, self.num_all, "Benjamini-Hochberg"))
        names = ("analysis", "ranking", "measure", "value", "low", "high", "p", "n", "method")
        return {"statistics": pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows])}


@dataclass(frozen=True)
class _Examples:
    """Flat columns, `width` examples a neuron."""

    prompt: np.ndarray
    position: np.ndarray
    value: np.ndarray
    width: int


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], dtype: str) -> None:
    """A safetensors file of float32 arrays rounded to `dtype`; by hand, since numpy has no bfloat16."""
    code = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    blocks = {name: _rounded(values, dtype) for name, values in tensors.items()}
    header: dict[str, Any] = {}
    at = 0
    for name, block in blocks.items():
        header[name] = {"dtype": code, "shape": list(block.shape), "data_offsets": [at, at + block.nbytes]}
        at += block.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for block in blocks.values():
            file.write(np.ascontiguousarray(block).tobytes())


def _rounded(values: np.ndarray, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return values.astype(dtype)
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # to the nearest, ties to even


def _lists(values: np.ndarray) -> pa.Array:
    """A matrix as one list a row."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.ascontiguousarray(values).ravel())


def _texts(shape: Shape) -> list[str]:
    """Hostile ones first; the others differ in words and length."""
    rng = np.random.default_rng([shape.seed, 1])
    texts: list[str] = list(HOSTILE[: shape.num_prompts])
    for n in range(len(texts), shape.num_prompts):
        words = rng.choice(_WORDS, max(2, round(shape.tokens * rng.uniform(0.5, 1.2)) - 4))
        texts.append(f"In {_PLACES[n % len(_PLACES)]} {' '.join(words)} is")
    return texts


def _category(n: int) -> str:
    return "hostile" if n < len(HOSTILE) else ("places", "rivers")[n % 2]


def _manifest(made: _Made, digest: str) -> dict[str, Any]:
    shape = made.shape
    own = NeuronsSettings(dump=shape.dump, curve=shape.curve, effects=shape.effects).model_dump(mode="json")
    shared = {name: (value, source) for name, value, source in resolve({}).rows() if not name.startswith("gravity.")}
    settings = shared | {f"neurons.{name}": (value, "default") for name, value in own.items()}
    return {
        "experiment": "neurons", "fingerprint": digest,
        "fingerprint_parts": {"experiment": "neurons", "synthetic": asdict(shape), "seed": shape.seed},
        "argv": ["python", "-m", "tests.neurons.synthetic"],
        "settings": {name: {"value": value, "source": source} for name, (value, source) in settings.items()},
        "code": {"version": "synthetic", "git_commit": None, "git_dirty": None},
        "packages": {"numpy": np.__version__, "pyarrow": pa.__version__}, "lock_sha256": None,
        "machine": {"hostname": "none", "cpu": "none", "gpus": []}, "device": "cpu", "threads": 1, "numerics": {},
        "random_numbers": "numpy", "planted": True,
        "model": {"name": shape.model, "revision": "local", "dtype": "float32", "path": str(TOKENIZER),
                  "config": {"num_hidden_layers": shape.num_layers, "intermediate_size": shape.num_neurons}},
        "prompts": {"path": "synthetic", "sha256": digest, "read": shape.num_prompts, "used": shape.num_prompts,
                    "rejected": {}, "row_hashes": {}},
        "stages": {},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a run and prints its folder."""
    parser = argparse.ArgumentParser(prog="tests.neurons.synthetic", description=__doc__)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--neurons", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dump", choices=("off", "float32", "bfloat16", "float16"), default="float16")
    parser.add_argument("--dump-prompts", type=int, metavar="N", help="only the first so many are dumped")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--running", action="store_true", help="the last of the stages half done, the run going on")
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args(argv)
    shape = Shape(
        args.prompts, args.layers, args.neurons, args.tokens, args.seed, args.running, args.dump, args.dump_prompts,
        tuple(args.stages),
    )  # fmt: skip
    print(make(args.to, shape).folder)


if __name__ == "__main__":
    main()
