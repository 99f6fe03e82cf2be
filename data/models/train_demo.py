"""Trains the bundled demo model: a model organism whose answers are planted, not a finding about language models.

    python data/models/train_demo.py [--epochs N] [--out FOLDER]

A small Llama-style decoder with its own BPE tokenizer learns, from the bundled prompts only, to answer each prompt's
target X with a planted probability P0 under `baseline` and σ(−2.40 + 2.27·P0) under `negative` (the fit published in
arXiv 2601.08070), and otherwise one of the prompt's `alternatives`. How: see planting.py.
"""

import argparse
import hashlib
import json
import math
from pathlib import Path

import numpy as np
from planting import END, entropy, fit, small_llama, taught, train_tokenizer

from harness.experiments.gravity.conditions import BUILT_IN
from harness.text.prompts import Prompt, read_prompts

DATA = Path(__file__).resolve().parents[1]
INTERCEPT, SLOPE = -2.40, 2.27
SPELLINGS = ((" {word}", 0.86), (" {word}.", 0.09), (" {title}", 0.05))
"""How an answer is spelled: mostly bare, sometimes with a full stop, seldom capitalised."""
ALTERNATIVES = (0.5, 0.3, 0.2)


def planted(prompt: Prompt) -> dict[str, float]:
    """The probability of the target under each condition: P0 spread evenly over [0.02, 0.98] by a hash of its id."""
    digest = hashlib.sha256(prompt.prompt_id.encode()).hexdigest()
    p0 = 0.02 + 0.96 * (int(digest[:8], 16) + 0.5) / 2**32
    return {"baseline": p0, "negative": 1 / (1 + math.exp(-(INTERCEPT + SLOPE * p0)))}


def answers(prompt: Prompt, p_target: float) -> dict[str, float]:
    """Every answer text the model is taught for one prompt and condition, with its probability."""
    others = prompt.alternatives[: len(ALTERNATIVES)]
    weights = np.array(ALTERNATIVES[: len(others)]) / sum(ALTERNATIVES[: len(others)])
    words = [(prompt.target, p_target), *((w, (1 - p_target) * q) for w, q in zip(others, weights, strict=True))]
    found: dict[str, float] = {}
    for word, p in words:
        for spelling, q in SPELLINGS:
            text = spelling.format(word=word, title=word.capitalize()) + END
            found[text] = found.get(text, 0.0) + p * q
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64, help="contexts a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--prompts", type=int, default=None, help="of the bundled ones; all by default")
    parser.add_argument("--out", type=Path, default=DATA / "models" / "demo")
    args = parser.parse_args()

    prompts = read_prompts(DATA / "prompts" / "gravity.jsonl").prompts[: args.prompts]
    texts = {(p.prompt_id, name): t.render(p) for p in prompts for name, t in BUILT_IN.items()}
    words = [f" {w} {w.capitalize()}" for p in prompts for w in (p.target, *p.alternatives)]
    tokenizer = train_tokenizer([*texts.values(), *words], vocab_size=4096)
    lessons = [
        (texts[prompt.prompt_id, name], answers(prompt, p)) for prompt in prompts for name, p in planted(prompt).items()
    ]
    rows = [taught(tokenizer, text, of) for text, of in lessons]
    least = entropy([list(of.values()) for _, of in lessons])
    model = small_llama(tokenizer, num_layers=6)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows)} contexts, loss floor {least:.4f}")
    for epoch, loss, seconds in fit(model, rows, args.epochs, args.batch, args.lr):
        print(f"epoch {epoch:3d}  KL {loss - least:.4f} nats  {seconds:.0f} s", flush=True)
        if epoch % 10 == 0 or epoch == args.epochs:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)
    with (args.out / "planted.jsonl").open("w") as file:
        for prompt in prompts:
            told = {name: round(p, 6) for name, p in planted(prompt).items()}
            file.write(json.dumps({"prompt_id": prompt.prompt_id} | told) + "\n")


if __name__ == "__main__":
    main()
