"""`harness bench`: the fast path against the naive one, same model, same items, one process, results compared.

Ratios are what counts; seconds belong to the machine they were taken on.
"""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from harness import launch, log
from harness.errors import ItemFailed
from harness.models import attend, device, plain
from harness.models.attend import Layout
from harness.models.decode import Completion, Request, Sampling, decode
from harness.models.inside import Probe, View, look_inside, right_padded
from harness.models.load import LM, ModelSpec, load
from harness.models.noise import row_key
from harness.models.patch import PATCHES, Patched, begin, run_rows
from harness.models.score import TreeScores, row_length, score_trees
from harness.settings import Resolved
from harness.stages.patching import align
from harness.stages.prompts import context_row
from harness.text.conditions import BUILT_IN
from harness.text.prompts import Prompt
from harness.text.words import Tokens, WordForms, build_trie, word_forms

_REPEATS = 3
_LONG = 384
"""Tokens of a long text, where the size of whole attention maps shows."""


@dataclass(frozen=True)
class Figure:
    """One way of doing one thing: median seconds, tokens forwarded, and how far its results are from the fast path's."""

    stage: str
    way: str
    seconds: float
    tokens: int
    speedup: float
    """Of the fast path over this way."""
    max_rel: float


@dataclass(frozen=True)
class Subject:
    """One context to time, the spellings of its target, and the noise key of its first sample."""

    context: tuple[int, ...]
    forms: WordForms
    key: int


def command(resolved: Resolved, shape: str, stages: Sequence[str], num_contexts: int, out: Path | None) -> int:
    """Print the figures, and write them to `out` as JSON."""
    settings = resolved.settings
    where = device.resolve_device(settings.runtime.device)
    device.set_threads(settings.runtime.threads)
    device.be_exact()
    dtype = settings.model.dtype
    spec = ModelSpec(
        f"random:{shape}", dtype=dtype, device=where, random_tokenizer=settings.paths.data_folder / "models" / "demo"
    )
    plan = launch.prepare(resolved)
    lm = load(spec)
    subjects = [
        Subject(
            tuple(lm.codec.context(t.render(p))[0]), word_forms(p.target, lm.codec), row_key(0, p.prompt_id, name, 0)
        )
        for p in plan.inputs.prompts
        for name, t in plan.inputs.conditions.items()
    ][:num_contexts]
    figures: list[Figure] = []
    if "psem" in stages:
        figures += bench_psem(lm, subjects)
    if "samples" in stages:
        figures += bench_samples(lm, subjects, settings.experiment.num_samples)
    if "attention" in stages:
        figures += bench_attention(lm, subjects)
    if "mechanism" in stages:
        figures += bench_mechanism(lm, subjects)
    if "patching" in stages:
        figures += bench_patching(lm, plan.inputs.prompts[: max(1, num_contexts // 8)])
    about = _about(lm, shape, subjects, where)
    table = Table(title=", ".join(f"{k} {v}" for k, v in about.items()), title_justify="left")
    for column in ("stage", "way", "seconds", "tokens forwarded", "tokens/s", "fast path is", "max rel diff"):
        table.add_column(column, justify="left" if column in ("stage", "way") else "right")
    for f in figures:
        table.add_row(
            f.stage,
            f.way,
            f"{f.seconds:.2f}",
            f"{f.tokens:,}",
            f"{f.tokens / f.seconds:,.0f}",
            f"{f.speedup:.2f}×" if f.speedup < 1.5 else f"{f.speedup:.1f}×",
            f"{f.max_rel:.1e}",
        )
    log.print_out(table)
    least = least_tokens(subjects)
    log.print_out(f"psem: at least {least:,} tokens must be forwarded (every distinct prefix once)")
    if out is not None:
        out.write_text(
            json.dumps({"about": about, "least_tokens": least, "figures": [asdict(f) for f in figures]}, indent=2)
            + "\n"
        )
    return 0


def bench_psem(lm: LM, subjects: Sequence[Subject], max_tokens: int = 2048) -> list[Figure]:
    """Tree scoring against one padded row per (context, sequence), and against one sequence at a time.

    Both batched ways get their rows longest first, in batches of the same padded size.
    """
    rows = [(s.context, s.forms.trie) for s in subjects]
    pairs = [(s.context, q) for s in subjects for q in s.forms.trie.sequences]
    fast_s, fast_tokens, scores = _timed(
        lm, lambda: _in_batches(rows, lambda r: row_length(*r), max_tokens, lambda b: _trees(lm, b))
    )
    flat = np.concatenate([s.logprobs for s in scores])
    padded_s, padded_tokens, padded = _timed(
        lm, lambda: _in_batches(pairs, lambda r: len(r[0]) + len(r[1]), max_tokens, lambda b: padded_rows(lm, b))
    )
    stride = max(1, len(pairs) // 40)
    some = pairs[::stride]
    plain_s, plain_tokens, plain_scores = _timed(
        lm, lambda: [plain.sequence_logprob(lm, c, q) for c, q in some], repeats=1
    )
    scale = len(pairs) / len(some)
    return [
        Figure("psem", f"tree ({len(subjects)} contexts, {len(pairs)} sequences)", fast_s, fast_tokens, 1.0, 0.0),
        Figure("psem", "one padded row per (context, sequence)", padded_s, padded_tokens, padded_s / fast_s, _rel(padded, flat)),
        Figure("psem", f"one sequence at a time ({len(some)} timed, scaled)", plain_s * scale, int(plain_tokens * scale),
               plain_s * scale / fast_s, _rel(plain_scores, flat[::stride])),
    ]  # fmt: skip


def _in_batches(
    rows: Sequence[Any], length: Callable[[Any], int], max_tokens: int, work: Callable[[list[Any]], Sequence[Any]]
) -> list[Any]:
    """`work` on batches of the rows, longest first, at most `max_tokens` padded tokens each; results in the rows' order."""
    order = sorted(range(len(rows)), key=lambda i: -length(rows[i]))
    results: list[Any] = [None] * len(rows)
    while order:
        size = max(1, max_tokens // length(rows[order[0]]))
        for i, result in zip(order[:size], work([rows[i] for i in order[:size]]), strict=True):
            results[i] = result
        order = order[size:]
    return results


def _trees(lm: LM, batch: Sequence[Any]) -> list[TreeScores]:
    scores = score_trees(lm, [c for c, _ in batch], [t for _, t in batch])
    assert all(isinstance(s, TreeScores) for s in scores), "a context failed"
    return [s for s in scores if isinstance(s, TreeScores)]


@torch.inference_mode()
def padded_rows(lm: LM, pairs: Sequence[tuple[Tokens, Tokens]]) -> list[float]:
    """The usual batched way: every (context, sequence) a right-padded row, logits at all positions."""
    width = max(len(c) + len(q) for c, q in pairs)
    tokens = torch.tensor([[*c, *q, *[0] * (width - len(c) - len(q))] for c, q in pairs], device=lm.device)
    positions = torch.arange(width, device=lm.device).expand(len(pairs), width)
    log_p = lm.logits(lm.hidden(tokens, Layout(positions, positions))).log_softmax(-1)
    at = [(r, len(c) - 1 + n, token) for r, (c, q) in enumerate(pairs) for n, token in enumerate(q)]
    row, column, token = torch.tensor(at, device=lm.device).T
    sums = torch.zeros(len(pairs), device=lm.device, dtype=torch.float64)
    return sums.index_add_(0, row, log_p[row, column, token].double()).cpu().tolist()


def bench_samples(lm: LM, subjects: Sequence[Subject], num_samples: int) -> list[Figure]:
    """Every distinct text forwarded once, against every sample forwarded for itself (batched, with a cache)."""
    sampling = Sampling(10, 1.0, 0.9, stop_at_newline=False)
    requests = [Request(s.context, s.key + n) for s in subjects for n in range(num_samples)]
    fast_s, fast_tokens, fast = _timed(lm, lambda: decode([lm], requests, sampling))
    naive_s, naive_tokens, naive = _timed(lm, lambda: _unshared(lm, requests, sampling))
    differing = sum(a != b for a, b in zip(_tokens(fast), _tokens(naive), strict=True)) / len(requests)
    return [
        Figure("samples", f"each distinct text once ({num_samples} samples a prompt)", fast_s, fast_tokens, 1.0, 0.0),
        Figure("samples", "each sample for itself", naive_s, naive_tokens, naive_s / fast_s, differing),
    ]


def _unshared(lm: LM, requests: Sequence[Request], sampling: Sampling) -> list[Any]:
    """As `decode`, but no two samples of a prompt in one batch, so that nothing is shared."""
    by_context: dict[Tokens, list[int]] = {}
    for i, request in enumerate(requests):
        by_context.setdefault(request.context, []).append(i)
    rounds = max(map(len, by_context.values()))
    result: list[Any] = [None] * len(requests)
    for n in range(rounds):
        index = [ids[n] for ids in by_context.values() if n < len(ids)]
        for i, done in zip(index, decode([lm], [requests[i] for i in index], sampling), strict=True):
            result[i] = done
    return result


def bench_attention(lm: LM, subjects: Sequence[Subject], max_tokens: int = 2048) -> list[Figure]:
    """SDPA with every layer's and head's row of the last token, against plain SDPA, and against eager attention's maps;
    for the contexts as they are, and for texts of `_LONG` tokens joined of them."""
    contexts = [s.context for s in subjects]
    joined = tuple(token for context in contexts for token in context)
    long = [joined[n : n + _LONG] for n in range(0, len(joined) - _LONG + 1, _LONG)][:4]
    return [
        figure
        for name, texts in (("", contexts), (f", {_LONG} tokens", long))
        if texts
        for figure in _attention_figures(lm, texts, name, max_tokens)
    ]


def _attention_figures(lm: LM, texts: Sequence[Tokens], name: str, max_tokens: int) -> list[Figure]:
    fast_s, fast_tokens, fast = _timed(lm, lambda: _in_batches(texts, len, max_tokens, lambda b: _tapped(lm, b)))
    sdpa_s, sdpa_tokens, _ = _timed(lm, lambda: _in_batches(texts, len, max_tokens, lambda b: _forward_only(lm, b)))
    with plain.eager(lm):
        eager_s, eager_tokens, maps = _timed(
            lm, lambda: _in_batches(texts, len, max_tokens, lambda b: _eager_maps(lm, b))
        )
    apart = max(float(np.abs(a - b).max()) for a, b in zip(fast, maps, strict=True))
    return [
        Figure("attention", f"SDPA and the last token's rows{name}", fast_s, fast_tokens, 1.0, 0.0),
        Figure("attention", f"plain SDPA, no rows{name}", sdpa_s, sdpa_tokens, sdpa_s / fast_s, 0.0),
        Figure("attention", f"eager, whole maps returned{name}", eager_s, eager_tokens, eager_s / fast_s, apart),
    ]


@torch.inference_mode()
def _tapped(lm: LM, batch: Sequence[Tokens]) -> list[np.ndarray]:
    """[L, H, T] of each context's last token."""
    tokens, layout = right_padded(batch, lm.device)
    at = torch.tensor([[len(c) - 1] for c in batch], device=lm.device)
    rows: list[torch.Tensor] = []
    with attend.watch_rows(at, lambda _layer, weights: rows.append(weights[:, :, 0])):
        lm.hidden(tokens, layout)
    whole = torch.stack(rows, 1).cpu().numpy()
    return [whole[r, :, :, : len(c)] for r, c in enumerate(batch)]


@torch.inference_mode()
def _forward_only(lm: LM, batch: Sequence[Tokens]) -> list[None]:
    lm.hidden(*right_padded(batch, lm.device))
    return [None] * len(batch)


@torch.inference_mode()
def _eager_maps(lm: LM, batch: Sequence[Tokens]) -> list[np.ndarray]:
    tokens, layout = right_padded(batch, lm.device)
    mask = torch.tensor([[n < len(c) for n in range(tokens.shape[1])] for c in batch], device=lm.device).long()
    maps = lm.model.base_model(
        input_ids=tokens, attention_mask=mask, position_ids=layout.q_positions, use_cache=False, output_attentions=True
    ).attentions
    return [np.stack([m[r, :, len(c) - 1, : len(c)].float().cpu().numpy() for m in maps]) for r, c in enumerate(batch)]


def bench_mechanism(lm: LM, subjects: Sequence[Subject], max_tokens: int = 2048) -> list[Figure]:
    """Everything of gravity.md §5 from one forward, against one prompt and one layer at a time."""
    probes = [
        Probe(s.context, (len(s.context) - 1,), (s.context[-1],), s.forms.first_tokens, {"question": (1, 4)})
        for s in subjects
    ]
    fast_s, fast_tokens, fast = _timed(
        lm, lambda: _in_batches(probes, lambda p: len(p.tokens), max_tokens, lambda b: look_inside(lm, b))
    )
    some = probes[:: max(1, len(probes) // 8)]

    def one_by_one() -> list[dict[str, np.ndarray]]:
        return [
            plain.layers(lm, p, p.at[0], p.emitted[0])
            | {"rows": plain.attention_rows(lm, p.tokens, p.at[0])} for p in some
        ]  # fmt: skip

    plain_s, plain_tokens, slow = _timed(lm, one_by_one, repeats=1)
    scale = len(probes) / len(some)
    views = [v for v in fast[:: max(1, len(probes) // 8)] if isinstance(v, View)]
    apart = max(float(np.abs(v.steps[0].p_out - w["p_out"]).max()) for v, w in zip(views, slow, strict=True))
    return [
        Figure("mechanism", f"one forward a batch ({len(probes)} contexts)", fast_s, fast_tokens, 1.0, 0.0),
        Figure("mechanism", f"one prompt, one layer at a time ({len(some)} timed, scaled)", plain_s * scale,
               int(plain_tokens * scale), plain_s * scale / fast_s, apart),
    ]  # fmt: skip


def bench_patching(lm: LM, prompts: Sequence[Prompt]) -> list[Figure]:
    """All six patches at every layer as the rows of one forward, against one (patch, layer) at a time that goes on from
    the same prefilled prefix, forked each time."""
    pairs = [align(*(context_row(lm.codec, p, n, t, chat=False) for n, t in BUILT_IN.items())) for p in prompts]
    tries = [build_trie(word_forms(p.target, lm.codec).events) for p in prompts]
    names = [(name, layer) for name in PATCHES for layer in range(len(lm.anatomy.blocks))]

    def together() -> list[float]:
        return [x for pair, trie in zip(pairs, tries, strict=True)
                for x in _p_sems(run_rows(lm, pair, begin(lm, pair, PATCHES), names, trie, 8, False))]  # fmt: skip

    def one_at_a_time() -> list[float]:
        found = []
        for pair, trie in zip(pairs, tries, strict=True):
            start = begin(lm, pair, PATCHES)
            for name in names:
                found += _p_sems(run_rows(lm, pair, start, [name], trie, 8, False))
        return found

    fast_s, fast_tokens, fast = _timed(lm, together)
    slow_s, slow_tokens, slow = _timed(lm, one_at_a_time, repeats=1)
    apart = float((np.abs(np.array(fast) / np.array(slow) - 1)).max())
    told = f"{len(pairs)} prompts × {len(names)} (patch, layer) pairs"
    return [
        Figure("patching", f"rows of one forward ({told})", fast_s, fast_tokens, 1.0, 0.0),
        Figure(
            "patching", "one pair at a time, its own fork of the prefix", slow_s, slow_tokens, slow_s / fast_s, apart
        ),
    ]


def _p_sems(rows: Sequence[Patched | ItemFailed]) -> list[float]:
    assert all(isinstance(r, Patched) for r in rows), "a row failed"
    return [float(np.exp(r.scores.logprobs).sum()) for r in rows if isinstance(r, Patched)]


def least_tokens(subjects: Sequence[Subject]) -> int:
    """Tokens that must be forwarded at least once: the distinct prefixes of all contexts and their tries' nodes."""
    prefixes: set[Tokens] = set()
    for s in subjects:
        prefixes.update(s.context[:n] for n in range(1, len(s.context) + 1))
    nodes = {(s.context, s.forms.trie.tokens) for s in subjects}
    return len(prefixes) + sum(len(tokens) for _, tokens in nodes)


def _timed(lm: LM, work: Callable[[], Any], repeats: int = _REPEATS) -> tuple[float, int, Any]:
    """Median seconds of `work` after one warm-up, tokens it forwards (padding counted), and its result."""
    forwarded = 0

    def count(_module: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal forwarded
        forwarded += kwargs["input_ids"].numel()

    handle = lm.model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        if repeats > 1:
            work()
        forwarded, seconds, result = 0, [], None
        for _ in range(repeats):
            _settle(lm)
            start = time.perf_counter()
            result = work()
            _settle(lm)
            seconds.append(time.perf_counter() - start)
    finally:
        handle.remove()
    return statistics.median(seconds), forwarded // repeats, result


def _settle(lm: LM) -> None:
    if lm.device.type == "cuda":
        torch.cuda.synchronize()


def _rel(a: Sequence[float], b: Sequence[float] | np.ndarray) -> float:
    x, y = np.asarray(a), np.asarray(b)
    return float((np.abs(np.expm1(x - y))).max())


def _tokens(completions: Sequence[Any]) -> list[list[int]]:
    return [c.token_ids if isinstance(c, Completion) else [] for c in completions]


def _about(lm: LM, shape: str, subjects: Sequence[Subject], where: str) -> dict[str, Any]:
    lengths = [len(s.context) for s in subjects]
    gpu = torch.cuda.get_device_name() if where == "cuda" else f"{platform.machine()} {torch.get_num_threads()} threads"
    return {
        "shape": shape, "parameters": f"{sum(p.numel() for p in lm.model.parameters()) / 1e6:.0f}M",
        "dtype": lm.identity.dtype, "device": gpu, "torch": torch.__version__, "contexts": len(subjects),
        "mean context": round(statistics.mean(lengths), 1),
    }  # fmt: skip
