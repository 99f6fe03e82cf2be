"""What a run of surprisal is made of: texts and a model, checked before anything is computed."""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.engine.estimate import spread
from harness.errors import PromptFileError
from harness.experiments.experiment import Prepared
from harness.experiments.weights import Models
from harness.files import read_regular
from harness.models.load import ModelIdentity, ModelSpec
from harness.settings import BUNDLED_PROMPTS, Resolved
from harness_toy.settings import ToySettings

BUNDLED = Path(__file__).parent / "texts.jsonl"
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Text:
    """One text, by a name of its own."""

    name: str
    text: str


@dataclass(frozen=True)
class Inputs:
    """What the stages are built from."""

    texts: tuple[Text, ...]
    model: ModelSpec
    identity: ModelIdentity
    settings: ToySettings


def prepare(resolved: Resolved, models: Models) -> Prepared:
    """Check the texts and the model. Loads no weights."""
    data, own = resolved.settings.data, resolved.own(ToySettings)
    path = BUNDLED if data.prompts == BUNDLED_PROMPTS else Path(data.prompts)
    read = read_texts(path)
    texts = read[: data.num_prompts]
    given = Inputs(texts, models.spec, models.identity, own)

    def some(number: int, stages: tuple[str, ...]) -> Inputs:
        return replace(given, texts=tuple(spread(texts, number, lambda t: len(t.text))))

    return Prepared(
        given,
        parts={"texts": {"sha256": _hash_of(texts), "number": len(texts)}},
        num_subjects=len(texts),
        about=f"{len(texts)} texts, in {own.unit}",
        facts={
            "planted": models.spec.name.startswith("random:"),
            "prompts": {"path": str(path), "read": len(read), "used": len(texts)},
        },
        some=some,
        num_contexts=len(texts),
    )


def read_texts(path: Path) -> tuple[Text, ...]:
    """The texts of a JSONL file, `{"name": …, "text": …}` a line. Raises PromptFileError, which names the line."""
    try:
        lines = read_regular(path, _MOST_BYTES).decode("utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise PromptFileError(f"{path}: expected a file of texts in UTF-8: {e}") from e
    found: dict[str, Text] = {}
    for number, line in enumerate(lines, 1):
        try:
            told: Any = json.loads(line)
            text = Text(str(told["name"]), str(told["text"]))
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise PromptFileError(
                f'{path} line {number}: expected {{"name": …, "text": …}}, found {line[:80]!r}'
            ) from e
        if text.name in found:
            raise PromptFileError(f"{path} line {number}: the name {text.name!r} is there twice")
        found[text.name] = text
    if not found:
        raise PromptFileError(f"{path}: expected at least one text, found none")
    return tuple(found.values())


def _hash_of(texts: tuple[Text, ...]) -> str:
    return hashlib.sha256(json.dumps(sorted((t.name, t.text) for t in texts)).encode()).hexdigest()
