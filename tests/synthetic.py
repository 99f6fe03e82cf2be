"""A whole, plausible run folder of any size, made without a model: `python -m tests.synthetic --prompts 2500 --to runs`.

What is planted, so that a reader of the run can be tested against it:
- the violation probability of a prompt under `negative` has mean σ(−2.40 + 2.27·P0), the paper's fit, and varies between
  prompts; under a further condition the mean is σ(−3.00 + 2.27·P0);
- greedy says X where that probability is over one half, so failures are the prompts with weaker suppression;
- at the last layer the MLP adds more, and attention takes more away, in failures than in successes;
- the first prompts, whose text is hostile to a web page, always fail: so they are among the examples of any report;
- patching restores X late (`resid`, `mlp`) or in the middle (`attn`, `knockout_instruction`), or hardly (`kv_question`).
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from harness.experiments.gravity.conditions import BUILT_IN, Template, token_span
from harness.experiments.gravity.schema import SCHEMA
from harness.run import ManifestFile, RunPaths, fingerprint, new_run_id, now_text
from harness.stats import NUM_BOOTSTRAPS
from harness.store import Row, Store
from harness.text.prompts import Prompt, read_prompts, take
from tests.gravity import resolve

ROOT = Path(__file__).parents[1]
TOKENIZER = Path("data/models/demo")
PLANTED: dict[str, tuple[float, float]] = {"negative": (-2.40, 2.27)}
"""Intercept and slope of the violation probability; every other condition has those of `OTHER`."""
OTHER = (-3.00, 2.27)
CONDITIONS: dict[str, Template] = {
    **BUILT_IN,
    "reframed": Template(
        'Answer with exactly one English word.\nPick a word other than "{target}" here.\nQuestion: {question}\nAnswer:'
    ),
}
HOSTILE = (
    '<script>alert("question")</script> & <b>bold</b>: ',
    "</textarea><img src=x onerror=alert(1)> {{ 7 * 7 }} {% raw %}: ",
    'It\'s "quoted" <!-- and commented: ',
)
PATCHES = ("resid", "attn", "mlp", "kv_question", "kv_instruction", "knockout_instruction")
_BIN_SHARES = (0.4772, 0.0648, 0.0412, 0.0504, 0.3664)  # the paper's 1193, 162, 103, 126, 916 of 2,500
_SPREAD = 4.0  # a beta distribution's a + b: how alike the samples of one prompt are
_STEP_KINDS = ("first", "decision")
_WIDTH = 5  # of top_ids and top_probs


@dataclass(frozen=True)
class Shape:
    """How big the run is and what it has. Without `mechanism`, only pressure, answers and verdicts."""

    num_prompts: int = 2500
    num_layers: int = 28
    num_heads: int = 28
    num_samples: int = 16
    conditions: tuple[str, ...] = ("baseline", "negative")
    seed: int = 0
    mechanism: bool = True
    model: str = "synthetic"
    num_bootstraps: int = NUM_BOOTSTRAPS


@dataclass(frozen=True)
class Truth:
    """What was planted, per prompt: baseline pressure, and by condition P1 = the probability that a sample says X."""

    p0: np.ndarray
    probability: Mapping[str, np.ndarray]

    def says(self, condition: str) -> np.ndarray:
        """Whether the greedy answer has the word."""
        return self.probability[condition] > 0.5


@dataclass(frozen=True)
class _Contexts:
    """The contexts of one condition: ids per prompt, spans per prompt and name, in tokens."""

    token_ids: list[list[int]]
    spans: list[dict[str, list[int] | None]]

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(ids) for ids in self.token_ids])

    def sizes(self, name: str) -> np.ndarray | None:
        """Tokens of a span in each context; None where this condition has no such span."""
        spans = [s[name] for s in self.spans]
        return np.array([b - a for a, b in spans]) if all(spans) else None  # type: ignore[misc]


def write(root: Path, shape: Shape, now: datetime | None = None) -> RunPaths:
    """Writes a finished run of this shape under `root` and gives its paths; the same shape gives the same rows."""
    digest = fingerprint({"synthetic": shape.__dict__})
    paths = RunPaths(root / new_run_id(shape.model.rsplit("/", 1)[-1], digest, now or datetime.now(UTC)))
    paths.folder.mkdir(parents=True)
    prompts = _prompts(shape)
    manifest = ManifestFile.create(paths, _manifest(shape, prompts, digest))
    with Store(paths.results, SCHEMA) as store:
        fill(store, shape, prompts)
        store.publish(paths.live)
        manifest.update(
            status="finished", ended=now_text(), seconds=1.0, num_failed=0, tables=store.counts(), warnings={},
            stages={r["stage"]: r for r in store.stage_rows()},
        )  # fmt: skip
    return paths


def fill(store: Store, shape: Shape, prompts: Sequence[Prompt] | None = None) -> Truth:
    """Puts every table of a run of this shape into an empty store; what was planted."""
    prompts = prompts or _prompts(shape)
    rng = np.random.default_rng(shape.seed)
    tokenizer = Tokenizer.from_file(str(ROOT / TOKENIZER / "tokenizer.json"))
    truth = _truth(rng, shape)
    store._insert("vocabulary", [{"token_id": n, "text": tokenizer.decode([n]), "is_special": tokenizer.decode([n]) == ""}
                                 for n in range(tokenizer.get_vocab_size())])  # fmt: skip
    store._insert("prompts", [_prompt_row(p, tokenizer) for p in prompts])
    contexts = {name: _contexts(store, name, prompts, tokenizer) for name in shape.conditions}
    greedy_steps = {}
    for name in shape.conditions:
        _psem(store, rng, name, prompts, truth, tokenizer)
        greedy_steps[name] = _answers(store, rng, name, prompts, truth, tokenizer, shape.num_samples)
    stages = ["prompts", "psem", "greedy", "samples", "detect"]
    if shape.mechanism:
        for name in shape.conditions:
            _attention(store, rng, name, prompts, truth, contexts[name], greedy_steps[name], shape)
            _lens_and_decomposition(store, rng, name, prompts, truth, greedy_steps[name], shape)
            _activations(store, rng, name, prompts, contexts[name], shape)
        _patching(store, rng, prompts, truth, shape)
        _sanity(store)
        stages += ["mechanism", "patching"]
    stages += _statistics(store, shape)
    for stage in stages:
        store.start_stage(stage, 1, shape.num_prompts, shape.num_prompts)
        store.finish_stage(stage, "done")
    store.event("warning", "rejected_prompt", "row 7: target_in_question: <i>made up</i>")
    return truth


# -- prompts, contexts, pressure


def _prompts(shape: Shape) -> list[Prompt]:
    """Bundled prompts, told apart by a number where more are asked for; the first of them hostile to a web page."""
    bundled = take(read_prompts(ROOT / "data/prompts/gravity.jsonl").prompts, min(shape.num_prompts, 1000))
    found = []
    for i in range(shape.num_prompts):
        prompt, turn = bundled[i % len(bundled)], i // len(bundled)
        mark = HOSTILE[i] if i < len(HOSTILE) else f"({turn + 1}) " if turn else ""
        name = f"{prompt.prompt_id}{f'_{turn + 1}' if turn else ''}"
        found.append(replace(prompt, prompt_id=name, question=mark + prompt.question))
    return found


def _prompt_row(prompt: Prompt, tokenizer: Tokenizer) -> Row:
    return prompt.__dict__ | {
        "alternatives": list(prompt.alternatives), "tier": None,
        "single_token": len(tokenizer.encode(" " + prompt.target, add_special_tokens=False).ids) == 1,
    }  # fmt: skip


def _contexts(store: Store, condition: str, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> _Contexts:
    template = CONDITIONS[condition]
    texts = [template.render(p) for p in prompts]
    coded = tokenizer.encode_batch(texts)
    spans = [
        {name: list(found) if (found := token_span(span, code.offsets)) else None
         for name, span in template.spans(prompt)._asdict().items()}
        for prompt, code in zip(prompts, coded, strict=True)
    ]  # fmt: skip
    ids = [c.ids for c in coded]
    names = [p.prompt_id for p in prompts]
    store._insert(
        "contexts",
        [{"prompt_id": n, "condition": condition, "text": t, "token_ids": i, "spans": s, "offsets": list(map(list, c.offsets))}
         for n, t, i, s, c in zip(names, texts, ids, spans, coded, strict=True)],
    )  # fmt: skip
    return _Contexts(ids, spans)


def _truth(rng: np.random.Generator, shape: Shape) -> Truth:
    n = shape.num_prompts
    bins = rng.choice(5, size=n, p=_BIN_SHARES)
    p0 = np.clip(0.2 * bins + 0.2 * rng.random(n), 0.0005, 0.9995)
    probability = {"baseline": p0}
    for name in shape.conditions:
        if name != "baseline":
            intercept, slope = PLANTED.get(name, OTHER)
            mean = 1 / (1 + np.exp(-(intercept + slope * p0)))
            probability[name] = np.clip(rng.beta(mean * _SPREAD, (1 - mean) * _SPREAD), 1e-6, 1 - 1e-6)
            probability[name][: len(HOSTILE)] = 1 - 1e-6
    return Truth(p0, probability)


def _psem(
    store: Store,
    rng: np.random.Generator,
    condition: str,
    prompts: Sequence[Prompt],
    truth: Truth,
    tokenizer: Tokenizer,
) -> None:
    p = truth.probability[condition]
    spellings = [
        [c.ids for c in tokenizer.encode_batch([" " + w.target, w.target, " " + w.target.upper()])] for w in prompts
    ]
    shares = np.array([0.9, 0.07, 0.03])
    end = rng.uniform(0.95, 1.0, len(p))
    _put(
        store, "psem", prompt_id=[w.prompt_id for w in prompts], condition=[condition] * len(p), p_sem=p, p_word=p * end,
        paper_p_sem=np.minimum(1.0, p * rng.uniform(1.0, 2.0, len(p))), num_sequences=[3] * len(p), sequences=spellings,
        logprobs=_lists(np.log(p[:, None] * shares)), word_end=_lists(np.repeat(end[:, None], 3, axis=1)),
        entropy=rng.uniform(0.2, 5.0, len(p)), top_ids=_lists(rng.integers(0, 4096, (len(p), _WIDTH))),
        top_probs=_lists(np.sort(rng.dirichlet(np.ones(_WIDTH + 1), len(p))[:, :_WIDTH])[:, ::-1]),
    )  # fmt: skip


# -- answers and verdicts


def _answers(
    store: Store,
    rng: np.random.Generator,
    condition: str,
    prompts: Sequence[Prompt],
    truth: Truth,
    tokenizer: Tokenizer,
    num_samples: int,
) -> np.ndarray:
    """Completions and their verdicts, one greedy answer and `num_samples` samples a prompt; the greedy decision steps."""
    says = np.column_stack(
        [truth.says(condition), rng.random((len(prompts), num_samples)) < truth.probability[condition][:, None]]
    )
    forms = rng.choice(4, size=says.shape, p=[0.55, 0.25, 0.1, 0.1])
    completions: list[Row] = []
    detections: list[Row] = []
    steps = np.zeros(len(prompts), dtype=np.int32)
    for i, prompt in enumerate(prompts):
        other = prompt.alternatives[0] if prompt.alternatives else "nothing"
        known = {
            (has, form): _worded(prompt.target, prompt.target if has else other, form, tokenizer, bool(has))
            for has, form in set(zip(says[i].tolist(), forms[i].tolist(), strict=True))
        }
        for j in range(num_samples + 1):
            completion, detection = known[bool(says[i, j]), int(forms[i, j])]
            key = {"prompt_id": prompt.prompt_id, "condition": condition,
                   "mode": "sample" if j else "greedy", "sample_id": max(0, j - 1)}  # fmt: skip
            completions.append(key | completion)
            detections.append(key | detection)
            if j == 0:
                steps[i] = detection["first_step"] or 0
    noise = rng.exponential(0.4, (len(completions), 2))
    for row, (surprise, margin) in zip(completions, noise.tolist(), strict=True):
        row["logprobs"] = [-surprise] * len(row["token_ids"])
        row["margins"] = [margin] * len(row["token_ids"])
    store._insert("completions", completions)
    store._insert("detections", detections)
    return steps


def _worded(target: str, word: str, form: int, tokenizer: Tokenizer, has: bool) -> tuple[Row, Row]:
    """An answer that says `word` in one of four ways, and the verdict on it."""
    before, after = (("", ""), ("", "."), ("", "\nQuestion: <b>next</b>"), (" It is", "!"))[form]
    encode = lambda text: tokenizer.encode(text, add_special_tokens=False).ids if text else []  # noqa: E731
    head, body, tail = encode(before), encode(" " + word), encode(after)
    text = f"{before} {word}{after}"
    char_start = len(before) + 1
    completion = {
        "token_ids": head + body + tail, "text": text, "answer": text.partition("\n")[0],
        "finish_reason": "newline" if "\n" in after else "stop",
    }  # fmt: skip
    detection = {
        "word_present": has, "word_present_full": has, "format_ok": form != 3, "num_occurrences": int(has),
        "first_step": len(head) if has else None, "char_spans": [[char_start, char_start + len(word)]] if has else [],
        "token_spans": [[len(head), len(head) + len(body)]] if has else [],
    }  # fmt: skip
    return completion, detection


# -- mechanism


def _attention(
    store: Store,
    rng: np.random.Generator,
    condition: str,
    prompts: Sequence[Prompt],
    truth: Truth,
    contexts: _Contexts,
    steps: np.ndarray,
    shape: Shape,
) -> None:
    n, layers, heads = len(prompts), shape.num_layers, shape.num_heads
    fixed = np.random.default_rng(shape.seed + 1)  # what belongs to a head is the same in every condition
    iar_of = fixed.uniform(0.3, 0.7, (1, layers, heads))
    nf_of = fixed.uniform(0.1, 0.3, (1, layers, heads))
    sensitive = fixed.random((1, layers, heads)) < 0.1
    p = truth.probability[condition].astype(np.float32)[:, None, None]
    sizes = {name: contexts.sizes(name) for name in ("instruction", "negation", "mention", "question")}
    for kind in _STEP_KINDS:
        noise = lambda scale: rng.normal(0, scale, (n, layers, heads)).astype(np.float32)  # noqa: E731
        iar = np.clip(iar_of - np.where(sensitive, 0.10, 0.01) * p + noise(0.04), 0.01, 0.99)
        columns: dict[str, np.ndarray] = {"iar": iar}
        if sizes["instruction"] is not None and sizes["question"] is not None:
            odds = iar / (1 - iar) * (sizes["question"] / sizes["instruction"])[:, None, None]
            columns["iar_token"] = odds / (1 + odds)
        if sizes["negation"] is not None:
            columns["nf"] = np.clip(nf_of - np.where(sensitive, 0.05, 0.0) * p + noise(0.03), 0, 1)
        if sizes["mention"] is not None:
            primed = 0.08 * p - 0.05 + rng.normal(0, 0.02, (n, 1, 1))
            columns["tmf"] = np.clip(nf_of + primed + noise(0.03), 0, 1)
        if "nf" in columns and "tmf" in columns:
            columns["pi"] = columns["tmf"] - columns["nf"]
        for name, span in (("nf", "negation"), ("tmf", "mention")):
            if name in columns:
                whole, part = sizes["instruction"], sizes[span]
                assert whole is not None
                assert part is not None
                columns[f"{name}_token"] = columns[name] * (whole / part)[:, None, None]
        if "pi" in columns:
            columns["pi_token"] = columns["tmf_token"] - columns["nf_token"]
        step = steps if kind == "decision" else np.zeros(n, dtype=np.int32)
        _put(
            store, "attention", **_keys(prompts, condition, layers, kind), step=np.repeat(step, layers),
            mean_row=_mean_rows(rng, contexts, step, layers),
            **{k: _lists(v.reshape(n * layers, heads).astype(np.float32)) for k, v in columns.items()},
        )  # fmt: skip


def _mean_rows(rng: np.random.Generator, contexts: _Contexts, step: np.ndarray, layers: int) -> pa.Array:
    """Attention rows that sum to one: a third on the first token, the rest spread, more of it on mention and negation."""
    rows = []
    for length, spans, extra in zip(contexts.lengths, contexts.spans, step, strict=True):
        weight = np.ones(length + extra)
        for name, factor in (("mention", 4.0), ("negation", 2.5), ("question", 1.5)):
            if (span := spans[name]) is not None:
                weight[span[0] : span[1]] = factor
        drawn = rng.exponential(1.0, (layers, length + extra)) * weight
        drawn[:, 0] = 0
        drawn *= 0.65 / drawn.sum(axis=1, keepdims=True)
        drawn[:, 0] = 0.35
        rows.append(drawn.astype(np.float32))
    return _ragged(rows)


def _lens_and_decomposition(
    store: Store,
    rng: np.random.Generator,
    condition: str,
    prompts: Sequence[Prompt],
    truth: Truth,
    steps: np.ndarray,
    shape: Shape,
) -> None:
    n, layers = len(prompts), shape.num_layers
    p = truth.probability[condition]
    depth = (np.arange(layers + 1) / layers)[None, :]
    rise = 1 / (1 + np.exp(-14 * (depth - 0.85)))
    curve = p[:, None] * rise / rise[:, -1:]  # column l is the residual before block l; the last one the model's output
    curve[:, 1:-1] = np.clip(curve[:, 1:-1] * rng.uniform(0.8, 1.2, (n, layers - 1)), 0, 1)
    taken = np.minimum(curve[:, :-1], 0.3 * curve[:, :-1] + 0.01 * rng.random((n, layers)))
    attn = -taken
    ffn = np.diff(curve, axis=1) - attn
    flat = lambda values: np.ascontiguousarray(values).ravel()  # noqa: E731
    final_entropy = rng.uniform(0.5, 4.0, (n, 1))
    for kind in _STEP_KINDS:
        key = _keys(prompts, condition, layers, kind) | {
            "step": np.repeat(steps if kind == "decision" else np.zeros(n, dtype=np.int32), layers)
        }
        _put(
            store, "lens", **key, p_target=flat(curve[:, 1:]), p_emitted=flat(np.maximum(curve[:, 1:], 0.8 * rise[:, 1:])),
            entropy=flat(8 - (8 - final_entropy) * rise[:, 1:]), kl_final=np.tile(9 * (1 - rise[0, 1:] / rise[0, -1]), n),
            top_ids=_lists(rng.integers(0, 4096, (n * layers, _WIDTH))),
            top_probs=_lists(np.sort(rng.dirichlet(np.ones(_WIDTH + 1), n * layers)[:, :_WIDTH])[:, ::-1]),
        )  # fmt: skip
        _put(
            store, "decomposition", **key, p_in=flat(curve[:, :-1]), p_attn=flat(curve[:, :-1] + attn),
            p_out=flat(curve[:, 1:]), attn_contrib=flat(attn), ffn_contrib=flat(ffn),
        )  # fmt: skip


def _activations(
    store: Store, rng: np.random.Generator, condition: str, prompts: Sequence[Prompt], contexts: _Contexts, shape: Shape
) -> None:
    layers = shape.num_layers
    growth = np.linspace(5, 80, layers)[:, None]
    norms = [(growth * rng.uniform(0.8, 1.2, (layers, length))).astype(np.float32) for length in contexts.lengths]
    rows = len(prompts) * layers
    _put(
        store, "activations", **_keys(prompts, condition, layers), resid_norm=_ragged(norms),
        top_neurons=_lists(rng.integers(0, 8 * shape.num_heads * 64, (rows, _WIDTH))),
        top_values=_lists(np.sort(rng.exponential(3, (rows, _WIDTH)))[:, ::-1].astype(np.float32)),
    )  # fmt: skip


def _patching(store: Store, rng: np.random.Generator, prompts: Sequence[Prompt], truth: Truth, shape: Shape) -> None:
    """All successes of the first compared condition among the prompts with high pressure, and as many failures."""
    compared = _compared(shape)
    if not compared:
        return
    failed, high = truth.says(compared[0]), truth.p0 >= 0.7
    size = min(int((high & ~failed).sum()), int((high & failed).sum()))
    chosen = np.sort(np.concatenate([np.flatnonzero(high & failed)[:size], np.flatnonzero(high & ~failed)[:size]]))
    layers = shape.num_layers
    depth = np.arange(layers) / max(1, layers - 1)
    effect = {
        "resid": 1 / (1 + np.exp(-10 * (depth - 0.6))), "attn": 0.15 * np.exp(-(((depth - 0.6) / 0.15) ** 2)),
        "mlp": 0.25 * depth**4, "kv_question": 0.02 * np.ones(layers), "kv_instruction": -0.05 * depth,
        "knockout_instruction": 0.35 * np.exp(-(((depth - 0.5) / 0.2) ** 2)),
    }  # fmt: skip
    effect["resid"] /= effect["resid"][-1]  # patching the last block's output gives the baseline's distribution
    before = truth.probability[compared[0]][chosen]
    names = [prompts[i].prompt_id for i in chosen]
    for patch in PATCHES:
        gap = (truth.p0[chosen] - before)[:, None]
        noise = rng.normal(0, 0.02, (len(chosen), layers)) * (effect[patch] < 1)[None, :]
        after = np.clip(before[:, None] + gap * effect[patch][None, :] + noise, 0, 1)
        span = rng.integers(3, 12, len(chosen)) if patch not in ("resid", "attn", "mlp") else np.ones(len(chosen), int)
        _put(
            store, "patching", prompt_id=np.repeat(names, layers), layer=np.tile(np.arange(layers), len(names)),
            patch=[patch] * (len(names) * layers), p_sem_original=np.repeat(before, layers), p_sem_patched=after.ravel(),
            delta_p=(after - before[:, None]).ravel(), continuation=[" (patched)"] * (len(names) * layers),
            flipped=((after > 0.5) != (before[:, None] > 0.5)).ravel(),
            num_patched=np.repeat(span, layers), num_span=np.repeat(span, layers),
        )  # fmt: skip


def _compared(shape: Shape) -> list[str]:
    return [name for name in shape.conditions if name != "baseline"]


def _sanity(store: Store) -> None:
    rows = [("p_sem", 3e-8, 2e-7), ("p_word", 4e-8, 3e-7), ("logprobs", 2e-6, 1e-6), ("attention", 1e-6, 4e-6),
            ("lens", 5e-7, 2e-6), ("patching", 9e-5, 3e-4)]  # fmt: skip
    store._insert(
        "sanity_items",
        [{"measurement": name, "subject": "facts_<Paris>|negative", "num_items": 24, "max_abs": a, "max_rel": r, "flips": 0,
          "near_ties": 0, "tolerance": 1e-5, "worst": "facts_<Paris>|negative", "repeated": None, "ok": a <= 1e-5,
          "left_out": False, "seconds": 0.5} for name, a, r in rows],
    )  # fmt: skip


def _statistics(store: Store, shape: Shape) -> list[str]:
    """The table `statistics`, by the stage that makes it; the names of the stages that ran."""
    from harness.experiments.gravity.stages.analysis import Analysis

    patched = _compared(shape)[0] if _compared(shape) else "negative"
    stage = Analysis(shape.conditions, patched, shape.seed, shape.num_bootstraps)
    items = stage.items({name: store.table(name) for name in stage.reads})
    for result in stage.run(stage.setup(), items):
        assert result.error is None, result.error
        for table, rows in result.rows.items():
            store._insert(table, rows)
    return [stage.name]


# -- columns


def _keys(prompts: Sequence[Prompt], condition: str, layers: int, kind: str | None = None) -> dict[str, Any]:
    rows = len(prompts) * layers
    found: dict[str, Any] = {
        "prompt_id": pa.array([p.prompt_id for p in prompts]).take(pa.array(np.repeat(np.arange(len(prompts)), layers))),
        "condition": pa.array([condition] * rows), "layer": np.tile(np.arange(layers, dtype=np.int32), len(prompts)),
    }  # fmt: skip
    return found | ({"step_kind": pa.array([kind] * rows)} if kind else {})


def _lists(values: np.ndarray) -> pa.Array:
    """A matrix as one list a row."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.ascontiguousarray(values).ravel())


def _ragged(blocks: Sequence[np.ndarray]) -> pa.Array:
    """Matrices of different widths as one list a row."""
    sizes = np.concatenate([np.full(len(b), b.shape[1]) for b in blocks])
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate([b.ravel() for b in blocks]))


def _put(store: Store, table: str, **columns: Any) -> None:
    """Whole columns into a table: rows as dicts would take minutes at this size."""
    incoming = pa.table(
        {name: values if isinstance(values, pa.Array) else pa.array(values) for name, values in columns.items()}
    )
    store._con.register("incoming", incoming)
    store._con.execute(f"INSERT INTO {table} BY NAME SELECT * FROM incoming")
    store._con.unregister("incoming")


# -- manifest and command


def _manifest(shape: Shape, prompts: Sequence[Prompt], digest: str) -> dict[str, Any]:
    templates = {name: CONDITIONS[name].__dict__ for name in shape.conditions}
    return {
        "experiment": "gravity", "fingerprint": digest,
        "fingerprint_parts": {"experiment": "gravity", "synthetic": shape.__dict__, "conditions": templates, "seed": shape.seed},
        "argv": ["python", "-m", "tests.synthetic"],
        "settings": {name: {"value": value, "source": source} for name, value, source in resolve({}).rows()},
        "code": {"version": "synthetic", "git_commit": None, "git_dirty": None},
        "packages": {"numpy": np.__version__, "pyarrow": pa.__version__}, "lock_sha256": None,
        "machine": {"hostname": "none", "cpu": "none", "gpus": []}, "device": "cpu", "threads": 1, "numerics": {},
        "random_numbers": "numpy", "planted": True,
        "model": {"name": shape.model, "revision": "local", "dtype": "float32", "path": str(TOKENIZER),
                  "config": {"num_hidden_layers": shape.num_layers, "num_attention_heads": shape.num_heads}},
        "prompts": {"path": "synthetic", "sha256": digest, "read": len(prompts) + 1, "used": len(prompts),
                    "rejected": {"target_in_question": 1}, "row_hashes": {p.prompt_id: p.row_hash for p in prompts}},
        "stages": {},
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a run and prints its folder."""
    parser = argparse.ArgumentParser(prog="tests.synthetic", description=__doc__)
    parser.add_argument("--prompts", type=int, default=2500)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=28)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--conditions", nargs="+", default=["baseline", "negative"], choices=list(CONDITIONS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, required=True)
    args = parser.parse_args(argv)
    shape = Shape(args.prompts, args.layers, args.heads, args.samples, tuple(args.conditions), args.seed)
    print(write(args.to, shape).folder)


if __name__ == "__main__":
    main()
