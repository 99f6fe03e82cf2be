"""Tokens that people name, as text or by number, and which tokens are function words."""

import re
import unicodedata
from collections.abc import Iterable

from harness.errors import SettingsError
from harness.models.load import Codec
from harness.text.words import token_texts

_SHOWN = 12


def ids_of(codec: Codec, given: str, what: str) -> list[int]:
    """The ids of a text, or the one that `id:N` names. Raises SettingsError, which begins with `what`."""
    if found := re.fullmatch(r"id:([0-9]{1,10})", given):
        number = int(found[1])
        if number > codec.largest_id:
            raise SettingsError(f"{what}: expected an id up to {codec.largest_id:,}, found {number:,}")
        return [number]
    ids = codec.encode(given, add_special_tokens=False)
    if not ids:
        raise SettingsError(f"{what}: {given[:80]!r} is no token; give text, or id:N")
    return ids


def one_id(codec: Codec, given: str, what: str, *, has_sequence: bool) -> int:
    """The id of a text that is one token. Raises SettingsError that shows the pieces where it is several."""
    ids = ids_of(codec, given, what)
    if len(ids) == 1:
        return ids[0]
    pieces = " + ".join(repr(codec.decode([i]) or codec.name_of(i)) for i in ids[:_SHOWN])
    advice = "take a text that is one token, or id:N"
    if has_sequence:
        advice += ", or neurons.target = sequence for the log-probability of all"
    if given[:1] in "\"'" or '\\"' in given:
        advice = "the quotes belong to the text as it was given: leave out backslashes and inner quotes"
    elif not given.startswith(" ") and len(codec.encode(f" {given}", add_special_tokens=False)) == 1:
        advice = f"with a space in front ({' ' + given!r}) it is one"
    raise SettingsError(f"{what}: expected one token, {given[:80]!r} is {len(ids)}: {pieces}; {advice}")


def functional_ids(codec: Codec, words: Iterable[str]) -> frozenset[int]:
    """Ids of the tokens that are, spaces and case aside, one of these words, or hold signs alone."""
    known = {w.strip().casefold() for w in words if w.strip()}
    found = set()
    for token, text in enumerate(token_texts(codec)):
        bare = text.strip().casefold()
        if bare and (bare in known or all(unicodedata.category(c)[0] in "PS" for c in bare)):
            found.add(token)
    return frozenset(found)
