"""What the page Token heat map asks: a prompt's tokens, and of a few neurons their activations at each of them.

Of the files of a dump only the pages that hold these rows and columns are read: they are mapped into memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from app import queries
from app.queries.neurons import Neuron, View, plain_rows
from harness.errors import RunError
from harness.run import RunPaths
from harness.run.tensors import map_matrices

NUM_CANDIDATES = 50


@dataclass(frozen=True)
class Context:
    """A prompt as the model saw it; all lists have an entry a token."""

    prompt_id: str
    text: str
    token_ids: list[int]
    pieces: list[str]
    offsets: list[tuple[int, int]]
    """Characters of each token in `text`, [start, end)."""
    special: list[bool]
    counted: list[bool]
    """Whether the statistics have it."""
    positions: list[int]
    """Tokens whose activations are dumped, in the order of the rows of the dump; this list has an entry a row."""


def context(paths: RunPaths, prompt_id: str) -> Context | None:
    """A prompt's tokens; None where they are not stored."""
    rows = plain_rows(
        queries.ask(
            paths,
            """
            SELECT prompt_id, text, token_ids, pieces, offsets::INTEGER[][] AS offsets, positions, is_counted
            FROM contexts WHERE prompt_id = ? LIMIT 1
            """,
            [prompt_id],
        )
    )
    if not rows:
        return None
    (row,) = rows
    ids = [int(n) for n in row["token_ids"] or []]
    special = queries.ask(
        paths, "SELECT token_id FROM vocabulary WHERE is_special AND list_contains(?, token_id)", [sorted(set(ids))]
    )
    known = set(map(int, special["token_id"]))
    offsets = [(int(a), int(b)) for a, b in row["offsets"] or []]
    return Context(
        prompt_id,
        row["text"] or "",
        ids,
        _filled(row["pieces"], [f"[{n}]" for n in ids]),
        _filled(offsets, [(0, 0)] * len(ids)),
        [n in known for n in ids],
        _filled(row["is_counted"], [True] * len(ids)),
        [int(n) for n in row["positions"] or []],
    )


def _filled(given: Sequence[Any] | None, instead: list[Any]) -> list[Any]:
    """The given list where it has an entry a token."""
    return list(given) if given is not None and len(given) == len(instead) else instead


def has_dump(paths: RunPaths, prompt_id: str) -> bool:
    """Whether a prompt's activations are among the files."""
    return not queries.ask(paths, "SELECT 1 FROM neuron_rows WHERE prompt_id = ?", [prompt_id]).empty


def values(paths: RunPaths, told: Context, neurons: Sequence[Neuron]) -> dict[Neuron, np.ndarray | None]:
    """Activations of each of these neurons at every token of a prompt, [tokens]; NaN where they were not dumped. None for a
    neuron that the file has no column of.

    Raises HarnessError, in one line, for a prompt without a file, and for a file that is missing, broken or of another run.
    """
    found = queries.ask(
        paths,
        "SELECT r.path, r.row_start, r.row_end, a.path IS NOT NULL AS is_listed "
        "FROM neuron_rows r LEFT JOIN artifacts a USING (path) WHERE r.prompt_id = ?",
        [told.prompt_id],
    )
    if found.empty:
        raise RunError(f"{told.prompt_id}: its activations are in no file of this run")
    row = found.iloc[0]
    path, start, end = str(row["path"]), int(row["row_start"]), int(row["row_end"])
    if not row["is_listed"]:
        raise RunError(f"{path}: not among the files that this run says it wrote")
    if any(not 0 <= n < len(told.token_ids) for n in told.positions):
        raise RunError(f"{told.prompt_id}: expected positions within its {len(told.token_ids)} tokens, found others")
    matrices = map_matrices(paths.artifacts, path)
    result: dict[Neuron, np.ndarray | None] = {}
    for one in neurons:
        matrix = matrices.get(f"a.{one.layer}")
        if matrix is None or one.number >= matrix.shape[1]:
            result[one] = None
            continue
        if not 0 <= start <= end <= matrix.shape[0] or end - start != len(told.positions):
            raise RunError(
                f"{path}: expected rows {start} to {end} for {len(told.positions)} tokens, found {matrix.shape[0]} rows: "
                "the file is of another run"
            )
        whole = np.full(len(told.token_ids), np.nan, np.float32)
        whole[told.positions] = matrix.read(slice(start, end), slice(one.number, one.number + 1))[:, 0]
        result[one] = whole
    return result


def known_peaks(paths: RunPaths, told: Context, neurons: Sequence[Neuron]) -> dict[Neuron, np.ndarray | None]:
    """The same without a dump: only the peak is known, of those neurons that have this prompt among their top examples."""
    result: dict[Neuron, np.ndarray | None] = {}
    for one in neurons:
        rows = queries.ask(
            paths,
            """
            SELECT e.position, e.value FROM (SELECT unnest(examples) AS e FROM neurons WHERE layer = ? AND neuron = ?)
            WHERE e.prompt_id = ?
            """,
            [one.layer, one.number, told.prompt_id],
        )
        whole = np.full(len(told.token_ids), np.nan, np.float32)
        for position, value in zip(rows["position"], rows["value"], strict=True):
            if 0 <= position < len(whole):
                whole[int(position)] = value
        result[one] = whole
    return result


def candidates(view: View, prompt_id: str) -> pd.DataFrame:
    """layer, neuron, place, value (influence), share, activation (at the target position), mean_peak of the neurons that the
    metric ranks first for a prompt; where there is no ranking, those that peak highest over all prompts."""
    rows = queries.ask(
        view.paths,
        f"""
        SELECT i.layer, i.neuron, i.place, i.value, i.share, i.activation, n.mean_peak
        FROM influence i LEFT JOIN neurons n USING (layer, neuron)
        WHERE i.prompt_id = ? AND i.metric = ? ORDER BY i.place LIMIT {NUM_CANDIDATES}
        """,
        [prompt_id, view.metric],
    )
    if len(rows):
        return rows
    return queries.ask(
        view.paths,
        f"""
        SELECT layer, neuron, row_number() OVER () AS place, NULL::DOUBLE AS value, NULL::DOUBLE AS share,
               NULL::DOUBLE AS activation, mean_peak
        FROM (SELECT * FROM neurons ORDER BY mean_peak DESC, layer, neuron LIMIT {NUM_CANDIDATES})
        """,
    )
