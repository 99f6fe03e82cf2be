"""What a stage reads: the columns it asked for, as little at a time as it needs, and files that are what was measured."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from harness.engine import Artifact, Item, ItemResult
from harness.engine.tables import FileHandle, Tables
from harness.errors import RunError
from harness.experiments.gravity.schema import SCHEMA
from harness.run import RunPaths
from harness.store import Store
from tests.fakes import Fake, run_stages, same_lengths, score, scored

READS = {"psem": ("prompt_id", "p_sem"), "artifacts": ()}


def with_tensors(items: Sequence[Item]) -> list[ItemResult]:
    """A row and a file of tensors an item."""
    return [
        replace(r, artifacts=(Artifact(f"t/{r.key}.safetensors", {}, "t", (3,), "float32",
                                       partial(save_file, {"x": np.full(3, score(r.key), np.float32)})),))
        for r in scored(items)
    ]  # fmt: skip


@pytest.fixture
def tables(tmp_path: Path) -> Iterator[Tables]:
    run_stages(tmp_path, Fake(same_lengths(5), with_tensors))
    paths = RunPaths(tmp_path)
    with Store(paths.results, SCHEMA) as store:
        yield Tables(store, READS, paths.artifacts)


def test_a_table_has_the_columns_asked_for_and_no_other(tables: Tables) -> None:
    whole = [{"prompt_id": key, "p_sem": score(key)} for key in same_lengths(5)]
    assert tables["psem"] == whole
    assert list(tables.streamed("psem")) == whole
    assert [row for b in tables.batches("psem", ["prompt_id"]) for row in b.to_pylist()] == [
        {"prompt_id": key} for key in same_lengths(5)
    ]
    assert set(tables) == {"psem", "artifacts"}
    with pytest.raises(KeyError):
        tables["batches"]
    with pytest.raises(AssertionError, match="did not ask for"):
        tables.batches("psem", ["logprobs"])


def test_rows_with_keys_are_those_and_come_in_the_order_of_the_table(tables: Tables) -> None:
    wanted = [{"prompt_id": "k003", "condition": "baseline"}, {"prompt_id": "k001", "condition": "baseline"}]
    assert [r["prompt_id"] for r in tables.rows_with("psem", wanted)] == ["k001", "k003"]
    assert tables.rows_with("psem", [{"prompt_id": "k003", "condition": "other"}]) == []
    assert tables.rows_with("psem", []) == []


def test_rows_at_hand_read_as_those_of_a_run_do(tables: Tables) -> None:
    given = Tables.of({"psem": [row | {"condition": "baseline"} for row in tables["psem"]]})
    assert Tables.of(given) is given
    wanted = [{"prompt_id": "k003"}]
    assert given.rows_with("psem", wanted, ["p_sem"]) == tables.rows_with("psem", wanted, ["p_sem"])
    assert list(given.streamed("psem", ["prompt_id"])) == list(tables.streamed("psem", ["prompt_id"]))


def test_a_handle_can_be_sent_and_gives_tensors_mapped_from_the_file(tables: Tables) -> None:
    handle = tables.file("t/k002.safetensors")
    assert handle.path.is_absolute()
    with pickle.loads(pickle.dumps(handle)).open() as tensors:
        assert tensors.get_tensor("x").tolist() == [np.float32(score("k002"))] * 3
    with pytest.raises(RunError, match=r"t/other\.safetensors: no such file"):
        tables.file("t/other.safetensors")


def test_a_handle_refuses_a_flipped_byte_by_the_name_of_the_file(tables: Tables) -> None:
    """Also where it was opened before. Control: an untouched neighbour opens."""
    handle, neighbour = (tables.file(f"t/{key}.safetensors") for key in ("k001", "k002"))
    with handle.open():
        pass
    content = bytearray(handle.path.read_bytes())
    content[-1] ^= 1
    handle.path.write_bytes(content)
    with pytest.raises(RunError, match=r"k001\.safetensors: not the file that was measured"), handle.open():
        pass
    with neighbour.open():
        pass
    handle.path.unlink()
    handle.path.symlink_to(neighbour.path)
    with pytest.raises(RunError, match="a link"):
        handle.check()


def test_a_file_is_hashed_once_however_often_it_is_opened(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.engine import tables as module

    hashed: list[object] = []
    real = module.sha256
    monkeypatch.setattr(module, "sha256", lambda file: (hashed.append(file), real(file))[1])
    handle = tables.file("t/k004.safetensors")
    for _ in range(3):
        FileHandle(handle.path, handle.sha256, handle.bytes).check()
    assert len(hashed) == 1


@dataclass(frozen=True)
class Lazy(Fake):
    """Items that get their payload when their batch is about to run."""

    asked: list[list[str]] = field(default_factory=list)
    ahead: int = 0

    @property
    def loads_ahead(self) -> int:
        return self.ahead

    def load(self, tables: Mapping[str, Any], items: Sequence[Item]) -> list[Item]:
        self.asked.append([i.key for i in items])
        return [replace(i, payload=i.key.upper()) for i in items]


@pytest.mark.parametrize("ahead", [0, 8])
def test_payloads_are_loaded_when_their_batch_is_about_to_run(tmp_path: Path, ahead: int) -> None:
    seen: list[str] = []

    def compute(items: Sequence[Item]) -> list[ItemResult]:
        if len(items) > 2:
            raise MemoryError
        seen.extend(i.payload for i in items)
        return scored(items)

    stage = Lazy(same_lengths(10), compute, ahead=ahead)
    run_stages(tmp_path, stage)
    assert seen == [key.upper() for key in same_lengths(10)]
    assert max(map(len, stage.asked)) == (8 if ahead else 4), "as far ahead as the stage allows"
