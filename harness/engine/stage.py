"""What a stage is, and what it computes: items in, rows and files out. Knows no store, no executor and no experiment.

Three kinds. `map`: items in any company, in batches. `fold`: batches in the order of their plan, each handing a state on
to the next. `loop`: one item after the other in the order of the list, each resting on what the one before it left.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

from harness.engine.tables import FileHandle, Tables

Kind = Literal["map", "fold", "loop"]
Keeps = Literal["all", "last"]
Payload = TypeVar("Payload")


@dataclass(frozen=True, slots=True)
class Item(Generic[Payload]):
    """The smallest unit a stage computes.

    `key` names its content, never its place. `length` is what it adds to a padded batch, in tokens; a fraction where
    items that stand together share a context. `payload` is what the stage needs to compute it. Items of one `group` share
    work, have one length and keys that sort together, and are kept in one batch where it does not take too long.
    """

    key: str
    length: int | float
    payload: Payload = None  # type: ignore[assignment]
    group: str = ""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file too big for the store. It comes to lie under the run's artifacts, at `path`, and is told of in a row.

    `content` is the file itself, or a function that writes it to the path that it is given, so that it never has to be in
    memory whole. `keys` say what the file is of, in columns of the reader's choice. `shape` and `dtype` are those of the
    file's first tensor. The same item, or batch, gives the same path again.
    """

    path: str
    keys: Mapping[str, str]
    kind: str
    shape: tuple[int, ...]
    dtype: str
    content: bytes | Callable[[Path], None]


@dataclass(frozen=True)
class ItemResult:
    """What one item gave: rows to insert and rows to change, per table, and files; or an error and nothing else."""

    key: str
    rows: dict[str, list[dict[str, Any]]]
    updates: dict[str, list[dict[str, Any]]] | None = None
    error: str | None = None
    artifacts: tuple[Artifact, ...] = ()
    replaces: dict[str, dict[str, Any]] | None = None
    """Per table, the values that mark older rows which these take the place of."""

    @classmethod
    def failed(cls, key: str, error: object) -> "ItemResult":
        return cls(key, {}, error=str(error) or repr(error))


@dataclass(frozen=True)
class BatchOutput:
    """What a batch gave where that is more than a result an item: files of the batch as a whole, and of a `fold` or
    `loop` the state that the next batch goes on from. A batch without a state leaves the one before it as it is."""

    results: Sequence[ItemResult]
    artifacts: tuple[Artifact, ...] = ()
    state: Artifact | None = None
    """Its `path` is a file's name alone: where it lies follows from stage and batch, so that no state is written over."""


class _Described(Protocol):
    """What is said of a stage of any kind. A stage may also say, where the default is not right:

    - `kind: ClassVar[Kind]`, `map` by default;
    - `file_bytes: int`, disk that the files of one item take, 0 by default;
    - `keeps: Keeps`, of a `fold` or `loop`: all its states, or (by default) the last one only;
    - `grace_s: float`, how long a batch in progress may go on after a signal, before it is dropped.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int:
        """Changes when the stage's results would."""
        ...

    @property
    def reads(self) -> Mapping[str, tuple[str, ...]]:
        """Tables it is handed, and of each the columns that it uses; none named: all."""
        ...

    @property
    def row_bytes(self) -> int:
        """Disk that one item's rows take, roughly."""
        ...

    def params(self) -> dict[str, Any]:
        """Everything of its settings that decides its rows, for the fingerprint."""
        ...

    def items(self, tables: Tables) -> Sequence[Item[Any]]:
        """All its items, done or not."""
        ...

    def setup(self) -> Any:
        """What `run` needs and is costly to make; once per worker."""
        ...


@runtime_checkable
class Stage(_Described, Protocol[Payload]):
    """One step of an experiment: rows in, rows out. It opens no store and draws no progress."""

    def run(self, context: Any, items: Sequence[Item[Payload]]) -> Sequence[ItemResult] | BatchOutput:
        """One result per item. An exception fails the whole batch, which is then tried in halves."""
        ...


@runtime_checkable
class Chain(_Described, Protocol[Payload]):
    """A stage of kind `fold` or `loop`: a batch rests on what the one before it left.

    The state must follow from the state before and from the items that worked: an item that fails adds nothing to it.
    """

    def run(
        self, context: Any, items: Sequence[Item[Payload]], before: FileHandle | None
    ) -> Sequence[ItemResult] | BatchOutput:
        """As of a `Stage`; `before` is the state that the batch before left, None where there is none yet."""
        ...


@runtime_checkable
class Loads(Protocol):
    """A stage whose items carry little until their batch is about to run, so that many can be listed.

    It may say `loads_ahead: int`: how many items may be loaded in one go, for those whose payloads are small. A table is
    looked through for every `load`.
    """

    def load(self, tables: Tables, items: Sequence[Item[Any]]) -> Sequence[Item[Any]]:
        """The same items, in the same order, with all that `run` needs."""
        ...


AnyStage = Stage[Any] | Chain[Any]


def kind_of(stage: AnyStage) -> Kind:
    """A stage's kind."""
    kind = getattr(stage, "kind", "map")
    assert kind in ("map", "fold", "loop"), f"stage {stage.name}: no kind {kind!r}"
    return kind


def loaded(stage: AnyStage, tables: Tables, items: Sequence[Item[Any]]) -> list[Item[Any]]:
    """Items as `run` takes them. A stage may change what they carry here, and nothing that a plan rests on."""
    if not items or not isinstance(stage, Loads):
        return list(items)
    found = list(stage.load(tables, items))
    assert [(i.key, i.length) for i in found] == [(i.key, i.length) for i in items], f"stage {stage.name}: other items"
    return found
