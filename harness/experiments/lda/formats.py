"""How a prompt becomes the text that both models continue."""

import re

from harness.errors import SettingsError
from harness.experiments.lda.settings import PLACE
from harness.models.load import Codec

_SYSTEM = "{system}"
_ALPACA_SYSTEM = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
"""Taori et al. 2023, the template for instructions without input."""
_ALPACA = f"{_SYSTEM}\n\n### Instruction:\n{PLACE}\n\n### Response:\n"


def check(form: str, system: str, codec: Codec) -> None:
    """Raises SettingsError or ModelError where prompts cannot be put in this format."""
    if system and (form == "raw" or (form not in ("chat", "alpaca") and _SYSTEM not in form)):
        raise SettingsError(
            f"lda.system_prompt: the format {form[:40]!r} has no place for it; use chat, alpaca or a template with {_SYSTEM}"
        )
    if form == "chat":
        codec.chat("a question", system)


def text_of(form: str, prompt: str, system: str, codec: Codec) -> str:
    """The text of one prompt, up to where the answer begins."""
    if form == "raw":
        return prompt
    if form == "chat":
        return codec.chat(prompt, system)
    if form == "alpaca":
        return _filled(_ALPACA, prompt, system or _ALPACA_SYSTEM)
    return _filled(form, prompt, system)


def tokens_of(form: str, text: str, codec: Codec) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of such a text, and each token's [start, end) in it. A chat template writes the model's own specials itself."""
    return codec.chat_context(text) if form == "chat" else codec.context(text)


def _filled(template: str, prompt: str, system: str) -> str:
    """In one go, so that a prompt that speaks of `{system}` stays as it is."""
    given = {PLACE: prompt, _SYSTEM: system}
    return re.sub(r"\{prompt\}|\{system\}", lambda found: given[found[0]], template)
