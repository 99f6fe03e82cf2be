"""What the training scripts of the bundled models share: a tokenizer of their own, and a loss that plants probabilities.

The loss is the exact cross-entropy to a given distribution over answers: every answer is a branch of one tree per context
(see harness/models/score.py), weighted by its mass. A probability of 3e-4 is so learned from every pass over its context,
where a sampled answer would show it once in 3,000.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from harness.models import attend
from harness.models.score import rows_of_trees, tree_batch
from harness.text.words import Trie, build_trie

END = "<|end|>"


@dataclass(frozen=True)
class Taught:
    """A context, the trie of all answers to it, and the mass that flows along each of the trie's edges."""

    context: tuple[int, ...]
    trie: Trie
    flow: tuple[tuple[int, int, float], ...]
    """(node that predicts, -1 for the context; token; mass)."""


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE over these texts."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False)


def taught(tokenizer: PreTrainedTokenizerFast, context: str, answers: Mapping[str, float]) -> Taught:
    """What is to be learned of one context: the probability of each answer, its end of text included in its text."""
    mass: dict[tuple[int, ...], float] = {}
    for text, p in answers.items():
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        mass[ids] = mass.get(ids, 0.0) + p
    trie = build_trie(mass)
    flow: dict[tuple[int, int], float] = {}
    for sequence, steps in zip(trie.sequences, trie.steps, strict=True):
        for edge in steps:
            flow[edge] = flow.get(edge, 0.0) + mass[sequence]
    ids = tuple(tokenizer.encode(context, add_special_tokens=False))
    return Taught(ids, trie, tuple((node, token, q) for (node, token), q in flow.items()))


def small_llama(tokenizer: PreTrainedTokenizerFast, num_layers: int, seed: int = 0) -> torch.nn.Module:
    """A Llama-style decoder 128 wide, with random weights, ready for our attention."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_theta=10_000.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attend.registered())


def entropy(rows: Sequence[Sequence[float]]) -> float:
    """The least that the loss can come to: the mean entropy, in nats, of the taught distributions."""
    return sum(-sum(q * math.log(q) for q in row if q) for row in rows) / len(rows)


def fit(
    model: torch.nn.Module,
    rows: Sequence[Taught],
    epochs: int,
    batch: int,
    rate: float,
    keep: Callable[[int], None] = lambda epoch: None,
) -> Iterator[tuple[int, float, float]]:
    """Train, and tell of (epoch, mean cross-entropy in nats, seconds). The rate warms up and follows a cosine."""
    rows = sorted(rows, key=lambda r: len(r.context) + len(r.trie))
    rng = np.random.default_rng(0)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=rate, betas=(0.9, 0.98)
    )
    batches = [rows[i : i + batch] for i in range(0, len(rows), batch)]
    total, step, start = epochs * len(batches), 0, time.time()
    for epoch in range(1, epochs + 1):
        loss_sum = 0.0
        for b in rng.permutation(len(batches)):
            loss = _loss(model, batches[b])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in optimizer.param_groups:
                cosine = 0.5 * (1 + math.cos(math.pi * step / total))
                group["lr"] = rate * min(1.0, (step + 1) / 100) * (0.02 + 0.98 * cosine)
            optimizer.step()
            step += 1
            loss_sum += loss.item() * len(batches[b])
        keep(epoch)
        yield epoch, loss_sum / len(rows), time.time() - start


def _loss(model: torch.nn.Module, rows: Sequence[Taught]) -> Tensor:
    """Mean cross-entropy of these contexts' answers, in nats."""
    contexts, tries = [r.context for r in rows], [r.trie for r in rows]
    device = next(model.parameters()).device
    tokens, layout = tree_batch(contexts, tries, device)
    cells = layout.cells
    assert cells is not None
    with attend.use(layout):
        hidden = model.model(
            input_ids=cells.gather(tokens), position_ids=cells.gather(layout.q_positions), use_cache=False
        ).last_hidden_state
    nodes = rows_of_trees(cells.spread(hidden), contexts, tries)
    starts = np.cumsum([0] + [1 + len(t) for t in tries])
    edges = [
        (int(start) + 1 + node, token, q)
        for start, row in zip(starts, rows, strict=False)
        for node, token, q in row.flow
    ]
    at, token, mass = (torch.tensor(x) for x in zip(*edges, strict=True))
    log_p = model.lm_head(nodes).float().log_softmax(-1)
    return -(mass * log_p[at, token]).sum() / len(rows)
