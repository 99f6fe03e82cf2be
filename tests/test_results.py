"""Published results: what stands under docs/results can be made again from its manifest alone, by anybody."""

import json
import re
from pathlib import Path

import pytest

from harness.commands import reproduce
from harness.commands.replay import settings_of
from harness.models.fetch import FETCHABLE
from harness.run import setting
from harness.text.prompts import read_prompts
from tests.commands import DATA

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"
MANIFESTS = sorted(RESULTS.glob("*/manifest.json"))


def test_there_are_results() -> None:
    assert MANIFESTS


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.parent.name)
def test_a_published_manifest_needs_nothing_of_the_machine_it_was_made_on(path: Path, tmp_path: Path) -> None:
    manifest, original = reproduce.find(tmp_path, str(path))
    assert original is None
    assert manifest.status == "finished"
    assert manifest.num_failed == 0
    assert all(v.ok for v in manifest.sanity)
    assert not manifest.code.git_dirty
    values = settings_of(manifest, tmp_path)  # this user has given no path: recorded ones are not among them
    name = setting(manifest, "model.name")
    assert values["model.name"] == name
    assert manifest.model.weights_sha256 == FETCHABLE[str(name)].file_sha256
    assert values["data.prompts"] == "bundled"
    hashes = {p.prompt_id: p.row_hash for p in read_prompts(DATA / "prompts" / "gravity.jsonl").prompts}
    recorded = manifest.prompts.row_hashes
    assert recorded.items() <= hashes.items()
    assert len(recorded) == manifest.prompts.used


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.parent.name)
def test_a_published_manifest_tells_nothing_of_a_person_or_a_place(path: Path) -> None:
    text = path.read_text("utf-8")
    json.loads(text)
    assert not re.search(r'"/(home|root|tmp|work)/', text)


def test_every_figure_that_a_page_shows_is_there() -> None:
    for page in [*RESULTS.glob("*.md"), RESULTS.parent.parent / "README.md"]:
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text("utf-8")):
            assert (page.parent / name).is_file(), f"{page.name} shows {name}"
