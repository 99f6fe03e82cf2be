"""Which models may be read together: by their tokens' strings, their special ids and what ends a text."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harness.models import attend
from harness.models.load import Codec, assemble
from harness.models.noise import row_key
from harness.models.pairing import NoPair, Pairing, pair_up
from harness.models.rollout import Ask, Pair, Rollout, Rule, rollouts
from tests.tiny import END, build_model, byte_tokenizer, identity, tiny_lm

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


def tokenizer(letters: list[str], end: str = END, extra: tuple[str, ...] = ()) -> Codec:
    made = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(letters)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    found = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=end, clean_up_tokenization_spaces=False)
    if extra:
        found.add_tokens(list(extra))
    return Codec(found)


def config(**told: object) -> dict:
    return {"config": {"eos_token_id": 256, "vocab_size": 260, **told}, "generation_config": None}


def paired(after: Codec, before: Codec, **told: object) -> Pairing:
    of_after = replace(identity("a"), about=config())
    return pair_up(after, before, of_after, replace(identity("b"), about=config(**told)))


PLAIN = tokenizer(LETTERS)


def test_one_vocabulary_is_a_pair_and_rows_that_pad_a_head_are_cut() -> None:
    found = paired(PLAIN, tokenizer(LETTERS), vocab_size=512)
    assert (found.num_common, found.vocabs_match, found.special_match, found.warning) == (257, True, True, None)
    assert (found.after.head_rows, found.before.head_rows) == (260, 512)
    assert found.after.stop_ids == (256,)


def test_permuted_ids_are_refused_and_the_first_that_differ_are_named() -> None:
    swapped = [*LETTERS[:65], LETTERS[66], LETTERS[65], *LETTERS[67:]]
    with pytest.raises(NoPair) as told:
        paired(PLAIN, tokenizer(swapped))
    assert f"65: '{LETTERS[65]}' against '{LETTERS[66]}', 66:" in str(told.value).encode("unicode_escape").decode()
    assert "2 of 257" in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("before", "told"),
    [
        (tokenizer(LETTERS, end="<|stop|>"), "256: '<|end|>' against '<|stop|>'"),
        (tokenizer(LETTERS[:200]), "200: "),
    ],
)  # fmt: skip
def test_other_vocabularies_are_refused(before: Codec, told: str) -> None:
    with pytest.raises(NoPair, match="expected ids that mean the same token") as error:
        paired(PLAIN, before)
    assert told in str(error.value)


def test_other_special_and_stop_ids_are_refused_by_name() -> None:
    special = byte_tokenizer()
    special.add_special_tokens({"additional_special_tokens": ["!"]})
    with pytest.raises(NoPair, match=r"the same special ids in both, found only before: 0 \('!'\)"):
        paired(PLAIN, Codec(special))
    with pytest.raises(NoPair, match=r"the same stop ids in both, found only before: 7 "):
        paired(PLAIN, PLAIN, eos_token_id=[256, 7])


def test_ids_that_one_has_beyond_the_other_are_never_drawn_and_it_is_said() -> None:
    found = paired(tokenizer(LETTERS, extra=("hello",)), PLAIN)
    assert (found.num_common, found.vocabs_match) == (257, False)
    assert "1 ids of the model after have no counterpart" in str(found.warning)


def test_the_hash_says_whether_two_pairs_give_the_same_numbers() -> None:
    assert paired(PLAIN, PLAIN).sha256() == paired(PLAIN, tokenizer(LETTERS)).sha256()
    other = pair_up(
        PLAIN, PLAIN, replace(identity("a"), about=config()), replace(identity("b", "float64"), about=config())
    )
    assert other.sha256() != paired(PLAIN, PLAIN).sha256()


def tables(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return model.get_input_embeddings().weight, model.get_output_embeddings().weight


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gpt2", "tiny-gemma2", "tiny-neox", "tiny-qwen3"])
def test_a_longer_padded_head_gives_the_same_rollouts(family: str) -> None:
    """Law 8 of amplification: rows behind the common vocabulary are in no distribution."""
    after, before = tiny_lm(family), tiny_lm(family, seed=1)
    wide = build_model(family, seed=1, vocab_size=300)
    narrow = before.model
    for mine, given in zip(tables(wide), tables(narrow), strict=True):
        mine.data[: len(given)] = given.data
        # No constant row: of it a LayerNorm leaves nothing but rounding.
        mine.data[len(given) :] = torch.linspace(-5.0, 5.0, mine.shape[-1])
    named = dict(wide.named_parameters())
    for name, parameter in narrow.named_parameters():
        if named[name].shape == parameter.shape:
            named[name].data.copy_(parameter.data)
    longer = assemble(wide, Codec(byte_tokenizer()), identity(family))
    assert attend.NAME
    asks = [Ask((65, 66, 67 + n), row_key(0, "p", "lda", n), a, 6) for n in range(3) for a in (-1.0, 0.0, 2.0)]
    one, other = (rollouts(Pair(after, b, 257), asks, Rule(), (-1.0, 0.0, 2.0)) for b in (before, longer))
    for a, b in zip(one, other, strict=True):
        assert isinstance(a, Rollout)
        assert isinstance(b, Rollout)
        assert a.token_ids == b.token_ids
        assert np.allclose(a.arm_steps, b.arm_steps, atol=2e-4)
    # Control: with the padding counted the numbers are others.
    uncut = rollouts(Pair(None, longer, 300), [replace(x, alpha=-1.0) for x in asks[:3]], Rule())
    assert [u.logp_before for u in uncut] != [o.logp_before for o in other[:3]]  # type: ignore[union-attr]
