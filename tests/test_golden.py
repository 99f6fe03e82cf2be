"""The fingerprint's format and gravity's parts stay byte for byte as recorded runs have them.

Where a test here fails, old runs are not recognised any more: they are neither resumed nor reproduced as the same.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
GOLDEN: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "fixtures" / "golden_manifest.json").read_text("utf-8")
)
CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
OTHER = "Say anything but {target}.\nQuestion: {question}\nAnswer:"


def prepared(recorded: dict[str, Any]) -> Any:
    """The plan of recorded settings, by the names they were recorded under. The one place here that knows who makes it."""
    from tests.gravity import prepare, resolve

    return prepare(resolve(environ={}, recorded=recorded, recorded_by="golden"))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model with a chat template."""
    folder = tmp_path_factory.mktemp("chat") / "demo"
    shutil.copytree(ROOT / "data" / "models" / "demo", folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


def settings_of(name: str, chatty: Path, **changes: Any) -> dict[str, Any]:
    """The recorded settings of a case, with the places of this checkout; `changes` by dotted name."""
    recorded = GOLDEN[name]["settings"] | {"paths.data": str(ROOT / "data")}
    return recorded | ({"model.name": str(chatty)} if name == "chat" else {}) | changes


def as_json(parts: object) -> str:
    return json.dumps(parts, indent=1, ensure_ascii=False)


@pytest.mark.parametrize("name", GOLDEN)
def test_recorded_settings_give_the_recorded_parts_and_fingerprint(name: str, chatty: Path) -> None:
    plan = prepared(settings_of(name, chatty))
    assert as_json(plan.parts) == as_json(GOLDEN[name]["fingerprint_parts"]), "the same keys in the same order"
    assert plan.fingerprint == GOLDEN[name]["fingerprint"]


@pytest.mark.parametrize("name", GOLDEN)
def test_a_fingerprint_is_the_hash_of_its_parts_in_format_1(name: str) -> None:
    """Computed without the package: neither the format's number nor how the parts are written may change."""
    parts = {"format": 1, **GOLDEN[name]["fingerprint_parts"]}
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == GOLDEN[name]["fingerprint"]


def test_the_recorded_cases_have_every_part() -> None:
    """The control: a part that no case has could change unseen."""
    stages = {s["name"] for case in GOLDEN.values() for s in case["fingerprint_parts"]["stages"]}
    assert stages == {"vocabulary", "prompts", "sanity", "single_token", "psem", "select", "greedy", "samples", "detect",
                      "mechanism", "patching", "analysis"}  # fmt: skip
    own, chat = (GOLDEN[name]["fingerprint_parts"] for name in ("own", "chat"))
    assert own["seed"] == 7
    assert own["conditions"]["ban"]["negation"] == "Avoid"
    assert own["conditions"]["reframe"]["instruction"]
    assert {s["name"]: s for s in own["stages"]}["patching"]["min_p0"] == 0.6
    assert {s["name"]: s for s in chat["stages"]}["prompts"]["chat"] is True


@pytest.mark.parametrize(
    ("setting", "value", "part"),
    [("experiment.num_samples", 17, "stages"), ("runtime.seed", 1, "seed"), ("data.limit", 249, "prompts"),
     ("experiment.templates", {"negative": OTHER}, "conditions"), ("model.dtype", "float64", "model")],
)  # fmt: skip
def test_another_value_of_a_setting_that_decides_results_gives_another_fingerprint(
    chatty: Path, setting: str, value: object, part: str
) -> None:
    plan = prepared(settings_of("default", chatty, **{setting: value}))
    assert plan.fingerprint != GOLDEN["default"]["fingerprint"]
    apart = {
        key for key, old in GOLDEN["default"]["fingerprint_parts"].items() if as_json(plan.parts[key]) != as_json(old)
    }
    assert apart - {"stages"} == {part} - {"stages"}
    assert part in apart


def test_a_setting_that_decides_no_result_is_no_part_of_the_fingerprint(chatty: Path, tmp_path: Path) -> None:
    changes = {"batching.max_tokens": 64, "runtime.threads": 1, "runtime.reserve_disk_gb": 0.1, "paths.runs": str(tmp_path),
               "experiment.sanity.budget": "unlimited"}  # fmt: skip
    assert prepared(settings_of("default", chatty, **changes)).fingerprint == GOLDEN["default"]["fingerprint"]
