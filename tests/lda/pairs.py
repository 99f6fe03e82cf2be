"""Pairs of tiny checkpoints, made on the spot, and runs of them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.commands import Told, harness
from tests.tiny import build_model, byte_tokenizer

PROMPTS = ("The sky is", "Once upon a time there was", "2 + 2 =", "Who?")
WATCH = {"e": {"any_of": ["e"], "at_start": ["e", "th"]}, "two": {"regex": "[ab]{2}"}}
SMALL = {
    "lda.num_samples": 2,
    "lda.max_new_tokens": 5,
    "lda.alphas": "-1,0,1.5",
    "lda.detectors": json.dumps(WATCH),
    "runtime.device": "cpu",
}


def checkpoint(folder: Path, family: str = "tiny-llama", seed: int = 0, **overrides: Any) -> Path:
    """A tiny model and its tokenizer as a folder."""
    build_model(family, seed, **overrides).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def pair_in(folder: Path, family: str = "tiny-llama", apart: float = 0.05) -> dict[str, Any]:
    """Settings that name a model and one that some training might have made of it: its weights moved a little."""
    # No row of the head is padding, which `decode` of one model would draw. Two tokenizers bring a token of their own.
    size = 258 if family in ("tiny-gpt2", "tiny-qwen2") else 257
    checkpoint(folder / "before", family, vocab_size=size)
    model = build_model(family, vocab_size=size)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(7)
        for parameter in model.parameters():
            parameter.add_(apart * parameter.std() * torch.randn_like(parameter) if parameter.ndim > 1 else 0.0)
    model.save_pretrained(folder / "after")
    byte_tokenizer().save_pretrained(folder / "after")
    return {"model.name": folder / "after", "other.name": folder / "before"}


def prompts_in(folder: Path, prompts: Sequence[str | Mapping[str, Any]] = PROMPTS) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "prompts.jsonl"
    rows = [{"prompt": p} if isinstance(p, str) else dict(p) for p in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def run(root: Path, settings: Mapping[str, Any], *flags: object) -> Told:
    """`harness run lda` with these settings, by dotted name."""
    given = [f"--{name}={value}" for name, value in {"paths.runs": root, **settings}.items()]
    return harness("run", "lda", *given, *flags)
