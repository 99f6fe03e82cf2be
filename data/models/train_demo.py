"""Trains the bundled demo model: a model organism whose answers are planted, not a finding about language models.

    python data/models/train_demo.py [--epochs N] [--out FOLDER]

A small Llama-style decoder with its own BPE tokenizer learns, from the bundled prompts only, to answer each prompt's
target X with a planted probability P0 under `baseline` and σ(−2.40 + 2.27·P0) under `negative` (the fit published in
arXiv 2601.08070), and otherwise one of the prompt's `alternatives`. The training loss is the exact cross-entropy to
that distribution: every answer is a branch of one tree per context (see harness/models/score.py), weighted by its mass.
"""

import argparse
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from harness.experiments.gravity.conditions import BUILT_IN
from harness.models import attend
from harness.models.score import tree_batch
from harness.text.prompts import Prompt, read_prompts
from harness.text.words import Trie, build_trie

DATA = Path(__file__).resolve().parents[1]
END = "<|end|>"
INTERCEPT, SLOPE = -2.40, 2.27
SPELLINGS = ((" {word}", 0.86), (" {word}.", 0.09), (" {title}", 0.05))
"""How an answer is spelled: mostly bare, sometimes with a full stop, seldom capitalised."""
ALTERNATIVES = (0.5, 0.3, 0.2)


def planted(prompt: Prompt) -> dict[str, float]:
    """The probability of the target under each condition: P0 spread evenly over [0.02, 0.98] by a hash of its id."""
    digest = hashlib.sha256(prompt.prompt_id.encode()).hexdigest()
    p0 = 0.02 + 0.96 * (int(digest[:8], 16) + 0.5) / 2**32
    return {"baseline": p0, "negative": 1 / (1 + math.exp(-(INTERCEPT + SLOPE * p0)))}


def answers(prompt: Prompt, p_target: float) -> list[tuple[str, float]]:
    """Every answer text the model is taught for one prompt and condition, with its probability."""
    others = prompt.alternatives[: len(ALTERNATIVES)]
    weights = np.array(ALTERNATIVES[: len(others)]) / sum(ALTERNATIVES[: len(others)])
    words = [(prompt.target, p_target), *((w, (1 - p_target) * q) for w, q in zip(others, weights, strict=True))]
    return [
        (spelling.format(word=word, title=word.capitalize()) + END, p * q)
        for word, p in words
        for spelling, q in SPELLINGS
    ]


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over the bundled prompts in both conditions and their answers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False)


def answer_tree(tokenizer: PreTrainedTokenizerFast, choices: list[tuple[str, float]]) -> tuple[Trie, np.ndarray]:
    """The trie of all answers and the mass that flows along each of its edges, as (node that predicts, token, mass)."""
    mass: dict[tuple[int, ...], float] = {}
    for text, p in choices:
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        mass[ids] = mass.get(ids, 0.0) + p
    trie = build_trie(mass)
    flow: dict[tuple[int, int], float] = {}
    for sequence, steps in zip(trie.sequences, trie.steps, strict=True):
        for edge in steps:
            flow[edge] = flow.get(edge, 0.0) + mass[sequence]
    return trie, np.array([(node, token, q) for (node, token), q in flow.items()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=80)
    parser.add_argument("--batch", type=int, default=64, help="contexts a step")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--out", type=Path, default=DATA / "models" / "demo")
    args = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)

    prompts = read_prompts(DATA / "prompts" / "gravity.jsonl").prompts
    texts = {(p.prompt_id, name): t.render(p) for p in prompts for name, t in BUILT_IN.items()}
    words = [f" {w} {w.capitalize()}" for p in prompts for w in (p.target, *p.alternatives)]
    tokenizer = train_tokenizer([*texts.values(), *words], vocab_size=4096)
    rows = []
    for prompt in prompts:
        for name, p_target in planted(prompt).items():
            context = tokenizer.encode(texts[prompt.prompt_id, name], add_special_tokens=False)
            rows.append((context, *answer_tree(tokenizer, answers(prompt, p_target))))
    rows.sort(key=lambda r: len(r[0]) + len(r[1]))
    floor = sum(
        -sum(q * math.log(q) for _, q in answers(p, x) if q) for p in prompts for x in planted(p).values()
    ) / len(rows)

    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True, rope_theta=10_000.0,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attend.registered())
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(rows)} contexts, loss floor {floor:.4f}",
        flush=True,
    )
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=args.lr, betas=(0.9, 0.98)
    )
    batches = [list(range(i, min(i + args.batch, len(rows)))) for i in range(0, len(rows), args.batch)]
    total, step, start = args.epochs * len(batches), 0, time.time()
    for epoch in range(args.epochs):
        loss_sum = 0.0
        for b in rng.permutation(len(batches)):
            contexts, tries, flows = zip(*(rows[i] for i in batches[b]), strict=True)
            tokens, layout, places = tree_batch(contexts, tries, model.device)
            with attend.use(layout):
                hidden = model.model(
                    input_ids=tokens, position_ids=layout.q_positions, use_cache=False
                ).last_hidden_state
            edges = [
                (row, offset + len(c) + node, token, q)
                for (row, offset), c, flow in zip(places, contexts, flows, strict=True)
                for node, token, q in flow
            ]
            row, column, token, mass = (torch.tensor(x) for x in zip(*edges, strict=True))
            at, back = torch.unique(row.long() * tokens.shape[1] + column.long(), return_inverse=True)
            log_p = model.lm_head(hidden.flatten(0, 1)[at]).float().log_softmax(-1)
            loss = -(mass * log_p[back, token.long()]).sum() / len(contexts)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                group["lr"] = (
                    args.lr * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
                )
            optimizer.step()
            step += 1
            loss_sum += loss.item() * len(contexts)
        print(
            f"epoch {epoch + 1:3d}  KL {loss_sum / len(rows) - floor:.4f} nats  {time.time() - start:.0f} s", flush=True
        )
        if (epoch + 1) % 10 == 0 or epoch + 1 == args.epochs:
            model.save_pretrained(args.out)
            tokenizer.save_pretrained(args.out)
    with (args.out / "planted.jsonl").open("w") as file:
        for prompt in prompts:
            file.write(
                json.dumps({"prompt_id": prompt.prompt_id} | {k: round(v, 6) for k, v in planted(prompt).items()})
                + "\n"
            )


if __name__ == "__main__":
    main()
