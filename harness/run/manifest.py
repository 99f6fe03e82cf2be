"""What a run says of itself: its manifest, of which every part that is read anywhere has a name and a kind here.

Knows no file: `manifest_file` reads and writes one. What is hashed, sealed and compared is the tree of JSON as it was read,
which a manifest keeps whole.
"""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Annotated, Any, Self, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PrivateAttr,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from harness.errors import DamagedManifest
from harness.run.differences import shortened

STALE_AFTER_S = 30.0
"""A run whose heartbeat is older than this is not running any more, whatever its manifest says."""

_T = TypeVar("_T")


def _dict_if_none(value: Any) -> Any:
    return {} if value is None else value


def _list_if_none(value: Any) -> Any:
    return [] if value is None else value


def _as_it_is(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
    """The mapping itself, checked: there may be a hash for each of 100,000 prompts, and pydantic gives a copy."""
    if value is None:
        return {}
    check(value)
    return value


# Null says what a missing key says, and both read as the empty value.
_Part = Annotated[_T, BeforeValidator(_dict_if_none)]
_Dict = Annotated[dict[str, _T], BeforeValidator(_dict_if_none)]
_List = Annotated[list[_T], BeforeValidator(_list_if_none)]
_Kept = Annotated[dict[str, _T], WrapValidator(_as_it_is)]
_Count = Annotated[int, Field(ge=0)]
_Size = Annotated[int, Field(ge=1)]


class _Record(BaseModel):
    """A part of a manifest. What has no name here is in the manifest's tree alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class RecordedSetting(_Record):
    """What a setting was, and where that came from."""

    value: Any
    source: str | None = None
    """`default`, or the flag, variable or file that gave it."""


class PlannedStage(_Record):
    """A stage as the fingerprint has it: its name, and whatever decides its rows."""

    model_config = ConfigDict(extra="allow")

    name: str

    @property
    def params(self) -> Mapping[str, Any]:
        """Its version and its settings."""
        return self.model_extra or {}


class RecordedParts(_Record):
    """Everything that decides results. Beside the stages it is the experiment's own affair."""

    stages: list[PlannedStage] = []


class RecordedStage(_Record):
    """What a stage came to that has ended; None where an older harness did not write it. See `engine.StageReport`."""

    name: str | None = None
    version: int | None = None
    status: str | None = None
    num_items: _Count | None = None
    num_failed: _Count | None = None
    num_rows: _Count | None = None
    seconds: float | None = None
    tokens: _Count | None = None
    prefill_tokens: _Count | None = None
    padding_tokens: _Count | None = None
    tokens_per_s: float | None = None
    num_batches: _Count | None = None
    splits: _Count | None = None
    peak_bytes: _Count | None = None
    budget: _Count | None = None
    sizes: _List[_Size] = []
    """Items a batch. The same sizes give the same bits again."""
    retried: _Count | None = None
    num_untried: _Count | None = None


class RecordedPrompts(_Record):
    """The file that the run's subjects are from; an experiment that has none says nothing."""

    path: str | None = None
    sha256: str | None = None
    """Of the file."""
    read: _Count | None = None
    used: _Count | None = None
    rejected: _Dict[_Count] = {}
    """Prompts by the rule that refused them."""
    row_hashes: _Kept[str] = {}
    """Of what decides results in each prompt that was used, by its id."""


class RecordedModel(_Record):
    """A model: what it is called, what decides its results, and what it is like."""

    name: str | None = None
    revision: str | None = None
    """A commit; `local` for a folder, `random` for weights that were drawn."""
    dtype: str | None = None
    weights_sha256: str | None = None
    num_parameters: _Count | None = None
    chat_template_sha256: str | None = None
    config: _Kept[Any] = {}
    """As the checkpoint has it."""


class RecordedCode(_Record):
    """The code that ran. Without a repository there is no commit, and nobody knows whether it was changed."""

    version: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    diff_sha256: str | None = None
    """Of the uncommitted changes, which lie beside the manifest."""
    source_sha256: str | None = None


class RecordedMachine(_Record):
    """What is shown of the machine; all of it is compared, in the tree."""

    hostname: str | None = None
    cpu: str | None = None
    gpus: _List[Any] = []
    """A mapping with `name` each; a name alone where an older harness wrote it."""


class RecordedChange(_Record):
    """A key that was not as it had been."""

    key: str
    old: Any
    new: Any


class RecordedResume(_Record):
    """One time that the run was gone on with."""

    time: str | None = None
    argv: list[str] | None = None
    bit_differences: _List[RecordedChange] = []
    """What of code, versions and machine was not as at the start."""


class RecordedMeasurement(_Record):
    """A measurement of the certificate; `ok` is None where nothing of it was compared."""

    measurement: str
    ok: bool | None


class RecordedStageEstimate(_Record):
    """See `engine.estimate.StageEstimate`."""

    seconds: float
    tokens: int
    items: int
    length: float


class RecordedBasis(_Record):
    """What an estimate was measured on: so many `of` all subjects, in so many seconds."""

    subjects: Annotated[int, Field(validation_alias=AliasChoices("subjects", "prompts"))]
    """Called `prompts` while there was one experiment."""
    of: int
    seconds: float


class RecordedEstimate(_Record):
    """See `engine.estimate.Estimate`."""

    stages: dict[str, RecordedStageEstimate]
    measured_on: RecordedBasis


class Manifest(_Record):
    """A run's manifest. A key that it does not have reads as None, or as an empty part."""

    # In this order: of several faults, the first is told of.
    run_id: Annotated[str, Field(min_length=1, max_length=255)]
    fingerprint: str
    """Of `fingerprint_parts`."""
    experiment: str | None = None
    """None: the run is older than experiments are several."""
    kind: str | None = None
    """`serve`: it holds what a service of the experiment was asked. None, as of all others: what its stages measured."""
    parent: str | None = None
    """The run that this one repeats."""
    status: str | None = None
    """As it was written; see `state`."""
    reason: str | None = None
    """Why it stopped."""
    created: str | None = None
    heartbeat: str | None = None
    ended: str | None = None
    device: str | None = None
    planted: bool | None = None
    """Whether the truth of what is measured was made, so that the numbers say nothing of the world."""
    argv: _List[str] = []
    threads: _Size | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Of all its lives together."""
    num_failed: _Count | None = None
    """Items that failed; None before the end."""
    warnings: _Kept[_Count] = {}
    """Lines of the log by level."""
    settings: _Dict[RecordedSetting] = {}
    fingerprint_parts: _Part[RecordedParts] = Field(default_factory=RecordedParts)
    stages: _Dict[RecordedStage] = {}
    """Those that have ended."""
    recorded_sizes: _Dict[list[_Size]] = {}
    """Items a batch, by stage, of the run that this one repeats."""
    resumed: _List[RecordedResume] = []
    accepted_differences: _List[RecordedChange] = []
    """What `reproduce --anyway` was told is not as in the run that this one repeats."""
    prompts: _Part[RecordedPrompts] = Field(default_factory=RecordedPrompts)
    code: _Part[RecordedCode] = Field(default_factory=RecordedCode)
    packages: _Kept[Any] = {}
    numerics: _Kept[Any] = {}
    machine: _Part[RecordedMachine] = Field(default_factory=RecordedMachine)
    model: _Part[RecordedModel] = Field(default_factory=RecordedModel)
    tables: _Kept[_Count] = {}
    """Rows of each; empty before the end."""
    table_sha256: _Kept[str] = {}
    """Of what was measured; empty before the end."""
    sanity: _List[RecordedMeasurement] = []
    """The certificate; empty before the end."""
    other: _Part[RecordedModel] = Field(default_factory=RecordedModel)
    """The second model, of a run that has one."""
    estimate: RecordedEstimate | None = None
    asked_sha256: str | None = None
    """By which the same command is recognised once the run is finished."""
    given_here: str | None = None
    """A mark over the paths that this user gave, see `commands.given`."""
    lock_sha256: str | None = None
    random_numbers: str | None = None

    _tree: Mapping[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _with_its_tree(cls, tree: Any, check: ModelWrapValidatorHandler[Self]) -> Self:
        manifest = check(tree)
        manifest._tree = tree
        return manifest

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> Self:
        """What this JSON says: it may come from a stranger, or a hand may have been in it. `tree` is kept and not copied.

        Raises DamagedManifest where a part that is read somewhere is not of the kind that a manifest has.
        """
        try:
            return cls.model_validate(tree, strict=True)
        except ValidationError as e:
            first = e.errors()[0]
            where, who = ".".join(map(str, first["loc"])), tree.get("run_id") if isinstance(tree, Mapping) else tree
            # Which class would hold it says nothing to a reader.
            what = first["msg"].lower().partition(" or instance of ")[0]
            raise DamagedManifest(f"the manifest of {shortened(who)} is damaged: {shortened(where)}: {what}") from e

    @classmethod
    def new(cls, run_id: str, created: str, content: Mapping[str, Any], facts: Mapping[str, Any]) -> Self:
        """Of a run that begins: what it is made of, and its experiment's own facts, which may have any names.

        In the tree the facts stand behind the content. Raises as `changed` does.
        """
        _check_known(content)
        assert not (taken := facts.keys() & content.keys()), f"facts of an experiment are called {sorted(taken)}"
        tree = {"run_id": run_id, "created": created, **content, **facts, "stages": {}}
        return cls.model_validate(_as_json(tree), strict=True)

    @property
    def tree(self) -> Mapping[str, Any]:
        """All of it as JSON, byte for byte as it was read and in its order, an experiment's own facts among it."""
        return self._tree

    def part(self, name: str) -> Mapping[str, Any]:
        """A part of the tree, with all that is in it; empty where there is none."""
        found = self._tree.get(name)
        return found if isinstance(found, Mapping) else {}

    def says(self, name: str) -> bool:
        """Whether it has a value for a key: a count of none is one, null is not."""
        return self._tree.get(name) is not None

    def changed(self, **changes: Any) -> Self:
        """The same with these keys set, those that are new at its end; whatever JSON cannot say is kept as its text.

        A key that has no name here, or a value of another kind, is a mistake of ours: AssertionError, ValidationError.
        """
        _check_known(changes)
        plain = _as_json(changes)
        whole = {"run_id": self.run_id, "fingerprint": self.fingerprint, **plain}
        checked = self.model_validate(whole, strict=True)  # of what is set alone: 100,000 prompts stay as they are
        manifest = self.model_copy(update={name: getattr(checked, name) for name in plain})
        manifest._tree = {**self._tree, **plain}
        return manifest


def _check_known(content: Mapping[str, Any]) -> None:
    unknown = content.keys() - Manifest.model_fields.keys()
    assert not unknown, f"a manifest has no key {', '.join(sorted(unknown))}; one is made in `Manifest`"


def _as_json(content: Mapping[str, Any]) -> dict[str, Any]:
    """As it reads after a round trip through the file."""
    return json.loads(json.dumps(content, default=str))


def state(manifest: Manifest, now: datetime | None = None) -> str:
    """The status a reader should show: `stopped` for a run that says `running` and whose heartbeat is stale."""
    if manifest.status != "running":
        return manifest.status or "unknown"
    try:
        age = ((now or datetime.now(UTC)) - datetime.fromisoformat(manifest.heartbeat or "")).total_seconds()
    except (ValueError, TypeError):
        return "stopped"
    return "stopped" if age > STALE_AFTER_S else "running"


def setting(manifest: Manifest, name: str, default: Any = None) -> Any:
    """The value that a setting had in a run, by its dotted name; `default` where its manifest does not say."""
    told = manifest.settings.get(name)
    return default if told is None else told.value


def own_setting(manifest: Manifest, name: str, default: Any = None) -> Any:
    """As `setting`, of the experiment's own section: a run that is older than these sections have names calls it `experiment`."""
    found = setting(manifest, f"{manifest.experiment}.{name}", _NO)
    return setting(manifest, f"experiment.{name}", default) if found is _NO else found


_NO = object()


def seed_of(manifest: Manifest) -> int:
    """The run's seed: what is resampled again for a picture takes the draws that its stored numbers took."""
    seed = setting(manifest, "runtime.seed", 0)
    return seed if isinstance(seed, int) and seed >= 0 else 0
