"""Runs of the neuron experiment on tiny checkpoints, made on the spot."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.commands import Told, harness
from tests.lda.pairs import checkpoint

TEXTS = ("The sky is blue", "Once upon a time", "2 + 2 = 4", "Who is there?", "aa bb cc", "été 日本 🙂")
SMALL = {
    "runtime.device": "cpu",
    "neurons.dump": "float32",
    "neurons.curve": "1,5,50",
    "neurons.effects": 5,
    "neurons.ig_steps": 8,
    "neurons.top_examples": 3,
    "neurons.background": "off",
}


def prompts_in(folder: Path, rows: Sequence[str | Mapping[str, Any]] = TEXTS, name: str = "prompts.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    told = [{"id": f"p{n}", "text": r} if isinstance(r, str) else dict(r) for n, r in enumerate(rows)]
    path.write_text("".join(json.dumps(row) + "\n" for row in told), "utf-8")
    return path


def corpus_in(folder: Path, num: int = 12) -> Path:
    """A background: short texts of letters."""
    path = folder / "background.txt"
    words = ("one", "red", "fish", "over", "tall", "tree", "seven", "hills")
    lines = [" ".join(words[(n * k + k) % len(words)] for k in range(1, 5)) + f" {n}" for n in range(num)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def given_in(folder: Path, family: str = "tiny-llama", **overrides: Any) -> dict[str, Any]:
    """Settings of a small run: a tiny model, prompts, and a background."""
    size = 258 if family in ("tiny-gpt2", "tiny-qwen2") else 257
    return {
        "model.name": checkpoint(folder / "model", family, vocab_size=size),
        "data.prompts": prompts_in(folder),
        "paths.cache": folder / "cache",
        **SMALL,
        "neurons.background": corpus_in(folder),
        **overrides,
    }


def run(root: Path, settings: Mapping[str, Any], *flags: object) -> Told:
    """`harness run neurons` with these settings, by dotted name."""
    given = [f"--{name}={value}" for name, value in {"paths.runs": root, **settings}.items()]
    return harness("run", "neurons", *given, *flags)
