"""Whether two models can be read together: whether an id is the same token in both.

Compared by the tokens' strings, id by id: two tokenizers of one size may still mean other things. The common vocabulary is the
ids that both have, from 0 on; rows that pad a head are cut. Loads no weights.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from harness.errors import ModelError
from harness.models.load import Codec, ModelIdentity, stop_ids_of

_SHOWN = 3


class NoPair(ModelError):
    """Two models whose ids do not mean the same."""


@dataclass(frozen=True)
class Side:
    """One of the two. `vocab_size` counts ids up to the tokenizer's largest, `head_rows` those that the head gives."""

    model: str
    revision: str
    vocab_size: int
    head_rows: int
    stop_ids: tuple[int, ...]
    template_sha256: str | None
    fingerprint: Mapping[str, str]
    """All that decides its results, see `ModelIdentity.fingerprint`."""


@dataclass(frozen=True)
class Pairing:
    """Two models that can be paired. `vocabs_match`: neither has ids beyond `num_common`."""

    after: Side
    before: Side
    num_common: int
    vocabs_match: bool
    special_match: bool
    warning: str | None

    def sha256(self) -> str:
        """Equal where two pairs give the same numbers, wherever their files lie."""
        told = [(dict(side.fingerprint), side.stop_ids) for side in (self.after, self.before)]
        return hashlib.sha256(json.dumps([told, self.num_common], sort_keys=True).encode()).hexdigest()


def pair_up(after: Codec, before: Codec, of_after: ModelIdentity, of_before: ModelIdentity) -> Pairing:
    """How two models go together. Raises NoPair, one line that names the first ids that differ, where they do not."""
    sides = (_side(after, of_after), _side(before, of_before))
    names = f"{of_after.name} (after) and {of_before.name} (before)"
    tokens = (_tokens(after), _tokens(before))
    shared = min(side.vocab_size for side in sides)
    apart = [n for n in range(shared) if tokens[0].get(n) != tokens[1].get(n)]
    if apart:
        told = ", ".join(f"{n}: {_told(tokens[0].get(n))} against {_told(tokens[1].get(n))}" for n in apart[:_SHOWN])
        raise NoPair(
            f"{names}: expected ids that mean the same token in both, found {len(apart):,} of {shared:,} that do not "
            f"({told}{', …' if len(apart) > _SHOWN else ''}); take two checkpoints of one model"
        )
    _check_alike(names, "special", set(after.all_special_ids), set(before.all_special_ids), tokens)
    _check_alike(names, "stop", set(sides[0].stop_ids), set(sides[1].stop_ids), tokens)
    num_common = min(shared, *(side.head_rows for side in sides))
    warnings = []
    beyond = {which: sum(n >= num_common for n in ids) for which, ids in zip(("after", "before"), tokens, strict=True)}
    for which, number in beyond.items():
        if number:
            warnings.append(f"{number} ids of the model {which} have no counterpart and are never drawn")
    if sides[0].template_sha256 != sides[1].template_sha256:
        warnings.append("their chat templates differ: that of the model after is used for both")
    return Pairing(sides[0], sides[1], num_common, not any(beyond.values()), True, "; ".join(warnings) or None)


def _side(codec: Codec, identity: ModelIdentity) -> Side:
    config = identity.about["config"]
    rows = config.get("vocab_size") or config.get("text_config", {}).get("vocab_size")
    return Side(
        identity.name,
        identity.revision,
        codec.largest_id + 1,
        int(rows or codec.largest_id + 1),
        tuple(sorted(stop_ids_of(codec, identity))),
        identity.about.get("chat_template_sha256"),
        identity.fingerprint(),
    )


def _tokens(codec: Codec) -> dict[int, str]:
    return {n: text for text, n in codec.tokenizer.get_vocab().items()}


def _check_alike(
    names: str, kind: str, after: set[int], before: set[int], tokens: tuple[dict[int, str], dict[int, str]]
) -> None:
    if after == before:
        return
    told = [
        f"only {which}: {', '.join(f'{n} ({_told(known.get(n))})' for n in sorted(more)[:_SHOWN])}"
        for which, more, known in (("after", after - before, tokens[0]), ("before", before - after, tokens[1]))
        if more
    ]
    raise NoPair(f"{names}: expected the same {kind} ids in both, found {'; '.join(told)}")


def _told(text: str | None) -> str:
    return "none" if text is None else ascii(text[:40])
