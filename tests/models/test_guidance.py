"""The same arithmetic as others have published it: transformers' guidance of one model by another (Sanchez et al. 2023).

Its score is γ (ln p_guided − ln p_other) + ln p_other. With the model after as the guided one, the one before as the other, and
γ = 1 + α that is logit-diff amplification; so is contrastive decoding's without its floor (Li et al. 2023).
"""

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.logits_process import UnbatchedClassifierFreeGuidanceLogitsProcessor as Guidance

from harness.models import peers
from harness.models.rollout import Ask, Pair, Rollout, Rule, rollouts
from tests.cases import some_of
from tests.models.test_decode import random_ids
from tests.tiny import FAMILIES, tiny_lm

NEW = 8


@pytest.mark.parametrize("family", some_of(FAMILIES, 5))
@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_greedy_tokens_are_those_of_transformers_guidance(family: str, alpha: float) -> None:
    """Control: another γ gives other tokens for some text."""
    after, before = tiny_lm(family), tiny_lm(family, seed=1)
    size = after.model.config.get_text_config().vocab_size
    contexts = [random_ids(length, seed) for seed, length in enumerate((4, 17, 9, 30, 12, 6))]
    asks = [Ask(c, 0, alpha, NEW) for c in contexts]
    ours = rollouts(Pair(after, before, size), asks, Rule(temperature=0.0, stop_at_end=False))
    guided, other = (peers.twin(lm, "eager") for lm in (after, before))
    made = {gamma: [generated(guided, other, c, gamma) for c in contexts] for gamma in (1 + alpha, 2 + alpha)}
    found = [r.token_ids for r in ours if isinstance(r, Rollout)]
    assert found == made[1 + alpha]
    assert found != made[2 + alpha]


@torch.inference_mode()
def generated(guided: torch.nn.Module, other: torch.nn.Module, context: tuple[int, ...], gamma: float) -> list[int]:
    ids = torch.tensor([context])
    processor = Guidance(gamma, other, unconditional_ids=ids)  # type: ignore[arg-type]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None)
    made = guided.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=config,
        logits_processor=LogitsProcessorList([processor]),
    )
    return made[0, len(context) :].tolist()
