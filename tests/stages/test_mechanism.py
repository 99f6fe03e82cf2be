"""The stage `mechanism`: which steps are looked at, which files are kept, and that its rows agree with other stages'."""

import hashlib
import json
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import load

from harness.engine import AnyStage
from harness.engine.executors import Artifact, Item, ItemResult
from harness.errors import ItemFailed, NotFinite
from harness.experiments.gravity.schema import SCHEMA
from harness.experiments.gravity.settings import StoredSettings
from harness.experiments.gravity.stages import mechanism
from harness.experiments.gravity.stages.mechanism import STEP_KINDS, Looked, Mechanism, probe_of, stored_prompts
from harness.models.inside import View, look_inside
from harness.models.load import LM
from harness.models.measure import SPANS, attention_ratios
from harness.run import RunPaths
from harness.store import Row, Store
from harness.tolerance import TOLERANCE
from tests.commands import DATA
from tests.fakes import events_of, rows_of, run_stages
from tests.gravity import prepare, resolve

OF_PROBS = TOLERANCE["float32"].prob
OF_NATS = 5e-5
OWN_TABLES = ("attention", "lens", "decomposition", "activations")


def content_of(artifact: Artifact) -> bytes:
    """A file as it would come to lie on disk."""
    if isinstance(artifact.content, bytes):
        return artifact.content
    with TemporaryDirectory() as folder:
        artifact.content(Path(folder) / "file")
        return (Path(folder) / "file").read_bytes()


def stages_of(**flags: object) -> tuple[AnyStage, ...]:
    """The stages of an experiment on the bundled model, and what they need; nothing is run."""
    given = {"paths.data": DATA, "data.limit": 15, "gravity.stages": "mechanism"} | flags
    return prepare(resolve({name: str(value) for name, value in given.items()}, None, {})).stages


def stage_named(stages: Sequence[AnyStage], name: str) -> Any:
    return next(s for s in stages if s.name == name)


def tables_of(folder: Path, stage: Any) -> dict[str, list[Row]]:
    """What a stage is handed."""
    with Store(RunPaths(folder).results, SCHEMA) as store:
        return {name: store.table(name) for name in stage.reads}


def near(a: Row, b: Row) -> bool:
    """Names and counts are equal, numbers up to rounding; two tokens or neurons that nearly tie may change places."""
    assert a.keys() == b.keys()
    same = [c for c in a if isinstance(a[c], str | int | None)]
    return [a[c] for c in same] == [b[c] for c in same] and all(
        a[c] == pytest.approx(b[c], rel=1e-3, abs=OF_NATS) for c in set(a) - {*same, "top_ids", "top_neurons"}
    )


class Ran(NamedTuple):
    """A finished run of fifteen prompts, and its stage with its items."""

    folder: Path
    stage: Mechanism
    items: dict[str, Item]
    lm: LM

    def rows(self, table: str) -> dict[tuple, Row]:
        """By prompt, condition and, where there are such, kind of step and layer."""
        names = ("prompt_id", "condition", "step_kind", "layer")
        return {tuple(r[n] for n in names if n in r): r for r in rows_of(self.folder, table)}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run as it is before its last stage; tests go on with copies of it."""
    folder = tmp_path_factory.mktemp("upstream") / "run"
    run_stages(folder, *stages_of(**{"gravity.stages": "greedy,detect,psem"}), max_tokens=600)
    return folder


@pytest.fixture(scope="module")
def ran(upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = Path(shutil.copytree(upstream, tmp_path_factory.mktemp("mechanism") / "run"))
    stage = stage_named(stages_of(), "mechanism")
    run_stages(folder, stage, max_tokens=600)
    return Ran(folder, stage, {i.key: i for i in stage.items(tables_of(folder, stage))}, stage.setup())


# ---- which steps ----------------------------------------------------------------------------------------------

SOME_SPANS = {"instruction": [0, 2], "negation": None, "mention": [1, 2], "question": [2, 3]}


def test_a_probe_stands_at_the_first_token_and_where_the_word_starts() -> None:
    probe = probe_of((10, 11, 12), [20, 21, 22, 23], 2, (21, 22), SOME_SPANS, keep_whole=True)
    assert probe.tokens == (10, 11, 12, 20, 21), "the answer up to where the word starts, and not the word"
    assert probe.at == (2, 4)
    assert probe.emitted == (20, 22), "what came out of each of the two tokens looked at"
    assert probe.targets == (21, 22)
    assert probe.spans == {"instruction": (0, 2), "negation": None, "mention": (1, 2), "question": (2, 3)}
    assert probe.keep_whole


@pytest.mark.parametrize("first_step", [None, 0])
def test_an_answer_without_the_word_or_that_opens_with_it_is_decided_at_its_first_token(first_step: int | None) -> None:
    probe = probe_of((10, 11, 12), [20, 21], first_step, (20,), SOME_SPANS)
    assert probe.tokens == (10, 11, 12)
    assert probe.at == (2, 2)
    assert probe.emitted == (20, 20)
    assert not probe.keep_whole


# ---- which files ----------------------------------------------------------------------------------------------


def prompts_and_answers(outcomes: Mapping[str, str]) -> tuple[list[Row], list[Row]]:
    """Prompts named `category-number`, and an answer for each letter: F breaks the ban, S keeps it."""
    prompts = [{"prompt_id": i, "category": i.split("-")[0]} for i in outcomes]
    answers = [
        {"prompt_id": i, "condition": condition, "word_present": letter == "F"}
        for i, letters in outcomes.items()
        for condition, letter in zip(("baseline", "negative", "reframe"), letters, strict=False)
    ]
    return prompts, answers


MIXED = {
    **{f"a-{n}": "FF" for n in range(5)}, **{f"a-{n}": "FS" for n in range(5, 12)},
    **{f"b-{n}": "FS" for n in range(6)}, "c-0": "SSF", "c-1": "SSS", "c-2": "FSS",
}  # fmt: skip


def kept(outcomes: Mapping[str, str] = MIXED, seed: int = 0, **rules: Any) -> set[str]:
    return stored_prompts(*prompts_and_answers(outcomes), StoredSettings(**rules), seed)


def by_outcome(ids: set[str], category: str) -> tuple[int, int]:
    """Failures and successes kept of a category. An answer under baseline is not a failure."""
    mine = [i for i in ids if i.startswith(category)]
    return sum("F" in MIXED[i][1:] for i in mine), sum("F" not in MIXED[i][1:] for i in mine)


def test_failures_are_kept_up_to_the_cap_with_as_many_successes_beside_them() -> None:
    assert by_outcome(kept(), "a") == (5, 5)
    assert by_outcome(kept(max_per_category=3), "a") == (3, 3)
    assert by_outcome(kept(), "b") == (0, 1), "one success where nothing fails, though every baseline says the word"
    assert by_outcome(kept(), "c") == (1, 1), "failing under one condition of several is failing"
    only_failures = {k: v for k, v in MIXED.items() if v == "FF"}
    assert kept(only_failures) == set(only_failures)


def test_which_are_kept_follows_from_the_seed_and_not_from_the_order_of_rows() -> None:
    prompts, answers = prompts_and_answers(MIXED)
    want = kept(max_per_category=2)
    for n in range(5):
        random.Random(n).shuffle(prompts)
        random.Random(-n).shuffle(answers)
        assert stored_prompts(prompts, answers, StoredSettings(max_per_category=2), 0) == want
    assert len({frozenset(kept(max_per_category=2, seed=n)) for n in range(8)}) > 3
    without_b = {k: v for k, v in MIXED.items() if not k.startswith("b")}
    assert kept(without_b, max_per_category=2) == {i for i in want if not i.startswith("b")}, "each category for itself"


def test_named_prompts_are_kept_and_no_other_and_a_cap_of_none_keeps_none() -> None:
    assert kept(prompts=("b-1", "a-7")) == {"a-7", "b-1"}
    assert kept(prompts=("b-1",), max_per_category=0) == {"b-1"}
    assert kept(max_per_category=0) == set()
    assert stored_prompts([], [], StoredSettings(), 0) == set()


def test_the_settings_that_decide_files_are_in_its_parameters(ran: Ran) -> None:
    flags = {"gravity.stored.max_per_category": 3, "gravity.stored.prompts": "a,b"}
    before, after = ran.stage.params()["stored"], stage_named(stages_of(**flags), "mechanism").params()["stored"]
    assert before.keys() == after.keys() == {"prompts", "max_per_category"}
    assert all(before[name] != after[name] for name in before)
    assert json.loads(json.dumps(after)) == after


# ---- a run ----------------------------------------------------------------------------------------------------


def test_every_context_has_its_rows_at_both_steps_and_every_layer(ran: Ran) -> None:
    contexts = {(r["prompt_id"], r["condition"]) for r in rows_of(ran.folder, "contexts")}
    layers = range(ran.stage.identity.num_layers)
    assert len(contexts) == 30
    assert len(ran.items) == 30
    for table in ("attention", "lens", "decomposition"):
        assert set(ran.rows(table)) == {(*c, kind, layer) for c in contexts for kind in STEP_KINDS for layer in layers}
    assert set(ran.rows("activations")) == {(*c, layer) for c in contexts for layer in layers}
    assert events_of(ran.folder, "failed_item") == {}


def test_the_decision_is_where_the_detector_found_the_word(ran: Ran) -> None:
    first_step = {(r["prompt_id"], r["condition"]): r["first_step"]
                  for r in rows_of(ran.folder, "detections") if r["mode"] == "greedy"}  # fmt: skip
    for table in ("attention", "lens", "decomposition"):
        for (prompt_id, condition, kind, _), row in ran.rows(table).items():
            assert row["step"] == (0 if kind == "first" else first_step[prompt_id, condition] or 0)


def test_the_last_layer_says_what_the_stages_psem_and_greedy_measured_on_other_paths(ran: Ran) -> None:
    """Their numbers come from a tree behind a shared prefix and from cached decoding."""
    last = ran.stage.identity.num_layers - 1
    answers = {(r["prompt_id"], r["condition"]): r for r in rows_of(ran.folder, "completions")}
    pressures = ran.rows("psem")
    lens = ran.rows("lens")
    for (prompt_id, condition), pressure in pressures.items():
        row = lens[prompt_id, condition, "first", last]
        assert row["entropy"] == pytest.approx(pressure["entropy"], abs=OF_NATS)
        assert row["top_ids"][0] == pressure["top_ids"][0]
        assert row["top_probs"] == pytest.approx(pressure["top_probs"][:5], abs=OF_PROBS)
        assert row["kl_final"] == 0.0
        assert row["p_target"] >= pressure["p_sem"] - OF_PROBS, "no word is likelier than its first token"
        singles = sum(
            np.exp(lp) for s, lp in zip(pressure["sequences"], pressure["logprobs"], strict=True) if len(s) == 1
        )
        assert row["p_target"] >= singles - OF_PROBS
        for kind in STEP_KINDS:
            row = lens[prompt_id, condition, kind, last]
            assert row["p_emitted"] == pytest.approx(
                np.exp(answers[prompt_id, condition]["logprobs"][row["step"]]), abs=OF_PROBS
            )
    assert len({round(r["p_target"], 3) for k, r in lens.items() if k[2:] == ("first", last)}) > 10, "control"


def test_contributions_in_the_table_telescope_and_end_at_the_lens(ran: Ran) -> None:
    lens, parts = ran.rows("lens"), ran.rows("decomposition")
    layers = range(ran.stage.identity.num_layers)
    for key in {k[:3] for k in parts}:
        rows = [parts[*key, layer] for layer in layers]
        total = sum(r["attn_contrib"] + r["ffn_contrib"] for r in rows)
        assert total == pytest.approx(rows[-1]["p_out"] - rows[0]["p_in"], abs=1e-12)
        for before, row, layer in zip([None, *rows], rows, layers, strict=False):
            assert before is None or row["p_in"] == before["p_out"]
            assert row["attn_contrib"] == row["p_attn"] - row["p_in"]
            assert row["ffn_contrib"] == row["p_out"] - row["p_attn"]
            assert row["p_out"] == lens[*key, layer]["p_target"]
    assert max(abs(r["attn_contrib"]) for r in parts.values()) > 0.05, "control"
    assert max(abs(r["ffn_contrib"]) for r in parts.values()) > 0.05


def test_ratios_are_those_of_each_prompts_own_rows_and_are_null_where_a_span_is_missing(ran: Ran) -> None:
    """Against look_inside of one prompt at a time; the run had several to a batch."""
    attention = ran.rows("attention")
    spans = {(r["prompt_id"], r["condition"]): r["spans"] for r in rows_of(ran.folder, "contexts")}
    for item in list(ran.items.values())[::4]:
        prompt_id, condition, probe = item.payload.prompt_id, item.payload.condition, item.payload.probe
        (view,) = look_inside(ran.lm, [probe])
        assert isinstance(view, View)
        own = spans[prompt_id, condition]
        assert {k: v and list(v) for k, v in probe.spans.items()} == {k: v and list(v) for k, v in own.items()}
        lengths = [None if own[name] is None else own[name][1] - own[name][0] for name in SPANS]
        for kind, step in zip(STEP_KINDS, view.steps, strict=True):
            for name, values in attention_ratios(step.masses, lengths).items():
                for layer in range(ran.stage.identity.num_layers):
                    got = attention[prompt_id, condition, kind, layer][name]
                    if values is None:
                        assert got is None
                    else:
                        assert got == pytest.approx(values[layer].tolist(), rel=1e-3, abs=OF_PROBS)
            for layer in range(ran.stage.identity.num_layers):
                row = attention[prompt_id, condition, kind, layer]
                assert row["mean_row"] == pytest.approx(step.mean_row[layer].tolist(), abs=OF_PROBS)
    for (_, condition, _, _), row in attention.items():
        missing = {name for name in ("iar", "nf", "tmf", "pi") if row[name] is None}
        assert missing == ({"nf", "tmf", "pi"} if condition == "baseline" else set())
        assert {name for name in ("iar", "nf", "tmf", "pi") if row[f"{name}_token"] is None} == missing


def test_rows_have_an_entry_for_every_token_of_the_context(ran: Ran) -> None:
    num_tokens = {(r["prompt_id"], r["condition"]): len(r["token_ids"]) for r in rows_of(ran.folder, "contexts")}
    for (prompt_id, condition, _, _), row in ran.rows("attention").items():
        assert len(row["mean_row"]) == num_tokens[prompt_id, condition] + row["step"]
        assert sum(row["mean_row"]) == pytest.approx(1.0, abs=OF_PROBS)
    for (prompt_id, condition, _), row in ran.rows("activations").items():
        assert len(row["resid_norm"]) == num_tokens[prompt_id, condition], "and none for the answer's"
        assert len(row["top_neurons"]) == len(row["top_values"]) == 10
        assert [abs(v) for v in row["top_values"]] == sorted((abs(v) for v in row["top_values"]), reverse=True)


def test_a_word_that_starts_later_in_an_answer_is_looked_at_there(ran: Ran) -> None:
    """The bundled model says its word at once or not at all, so here is an answer that takes two tokens first."""
    item = next(i for i in ran.items.values() if i.payload.condition == "negative")
    prompt_id, condition, probe = item.payload.prompt_id, item.payload.condition, item.payload.probe
    length = probe.at[0] + 1
    context = probe.tokens[:length]
    later = probe_of(context, [30, 31, probe.emitted[0], 32], 2, probe.targets, probe.spans, keep_whole=True)
    (result,) = ran.stage.run(ran.lm, [Item(item.key, len(later.tokens), Looked(prompt_id, condition, later))])
    assert result.error is None
    for table in ("attention", "lens", "decomposition"):
        assert {(r["step_kind"], r["step"]) for r in result.rows[table]} == {("first", 0), ("decision", 2)}
    for row in result.rows["attention"]:
        assert len(row["mean_row"]) == length + row["step"]
    assert {len(r["resid_norm"]) for r in result.rows["activations"]} == {length}, "the context's tokens alone"
    files = {a.kind: load(content_of(a)) for a in result.artifacts}
    assert [files["attention"][kind].shape[2] for kind in STEP_KINDS] == [length, length + 2]
    # The first step does not know what comes after it, and the decision is that of the longer context.
    (alone,) = ran.stage.run(ran.lm, [item])
    longer = probe_of((*context, 30, 31), [probe.emitted[0], 32], 0, probe.targets, probe.spans)
    (behind,) = ran.stage.run(ran.lm, [Item(item.key, len(longer.tokens), Looked(prompt_id, condition, longer))])

    def pressures(got: ItemResult, kind: str) -> list[float]:
        return [r["p_target"] for r in got.rows["lens"] if r["step_kind"] == kind]

    assert pressures(result, "first") == pytest.approx(pressures(alone, "first"), abs=OF_PROBS)
    assert pressures(result, "decision") == pytest.approx(pressures(behind, "first"), abs=OF_PROBS)
    assert pressures(result, "decision") != pytest.approx(pressures(result, "first"), abs=100 * OF_PROBS)


def test_an_answer_that_failed_in_an_earlier_stage_is_no_item(ran: Ran) -> None:
    tables = tables_of(ran.folder, ran.stage)
    gone = tables["greedy_answers"][3]
    tables["greedy_answers"] = [a for a in tables["greedy_answers"] if a is not gone]
    assert {i.key for i in ran.stage.items(tables)} == set(ran.items) - {f"{gone['prompt_id']}|{gone['condition']}"}


def test_items_do_not_depend_on_the_order_of_rows(ran: Ran) -> None:
    tables = tables_of(ran.folder, ran.stage)
    shuffled = {name: random.Random(0).sample(rows, len(rows)) for name, rows in tables.items()}
    again = {i.key: i for i in ran.stage.items(shuffled)}
    assert again == ran.items


# ---- files ----------------------------------------------------------------------------------------------------


def test_every_file_is_there_as_its_row_says_and_holds_what_was_seen(ran: Ran) -> None:
    rows = rows_of(ran.folder, "artifacts")
    whole = {key: i for key, i in ran.items.items() if i.payload.probe.keep_whole}
    assert 0 < len(whole) < len(ran.items), "control: some are kept and some are not"
    assert {(r["kind"], r["prompt_id"], r["condition"]) for r in rows} == {
        (kind, i.payload.prompt_id, i.payload.condition) for i in whole.values() for kind in ("attention", "resid")
    }
    on_disk = {p.relative_to(RunPaths(ran.folder).artifacts).as_posix() for p in
               RunPaths(ran.folder).artifacts.rglob("*") if p.is_file()}  # fmt: skip
    assert {r["path"] for r in rows} == on_disk
    assert len(on_disk) == len(rows) == 2 * len(whole)
    for row in rows:
        content = (RunPaths(ran.folder).artifacts / row["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == row["sha256"]
        assert len(content) == row["bytes"]
        tensors = load(content)
        assert set(tensors) == set(STEP_KINDS)
        assert list(tensors["first"].shape) == row["shape"]
        assert str(tensors["first"].dtype) == row["dtype"] == "float32"
        (view,) = look_inside(ran.lm, [whole[f"{row['prompt_id']}|{row['condition']}"].payload.probe])
        assert isinstance(view, View)
        for kind, step in zip(STEP_KINDS, view.steps, strict=True):
            want = step.rows if row["kind"] == "attention" else step.resid
            assert want is not None
            assert tensors[kind].shape == want.shape
            assert tensors[kind] == pytest.approx(want, abs=OF_PROBS * max(1.0, float(np.abs(want).max())))
    heads = next(r for r in rows if r["kind"] == "attention")
    table = ran.rows("attention")[heads["prompt_id"], heads["condition"], "first", 0]
    mean = load((RunPaths(ran.folder).artifacts / heads["path"]).read_bytes())["first"].mean(1)
    assert mean[0].tolist() == pytest.approx(table["mean_row"], abs=OF_PROBS), "file and table are of one forward"


def test_a_file_says_of_which_prompt_and_condition_it_is(ran: Ran) -> None:
    """For a reader who has the file alone."""
    for row in rows_of(ran.folder, "artifacts"):
        content = (RunPaths(ran.folder).artifacts / row["path"]).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        told = json.dumps(header["__metadata__"])
        assert row["prompt_id"] in told
        assert row["condition"] in told


def test_the_same_item_gives_the_same_file_to_the_last_byte(ran: Ran) -> None:
    """So that two runs can be compared by the hashes in their tables: safetensors writes several entries of metadata in
    an order that changes from call to call, and a sha256 with them."""
    item = next(i for i in ran.items.values() if i.payload.probe.keep_whole)
    hashes = {
        tuple(hashlib.sha256(content_of(a)).hexdigest() for r in ran.stage.run(ran.lm, [item]) for a in r.artifacts)
        for _ in range(12)
    }
    assert len(hashes) == 1


def test_paths_are_the_same_in_every_batch_and_differ_between_items(ran: Ran) -> None:
    items = [i for i in ran.items.values() if i.payload.probe.keep_whole]
    together = {a.path for r in ran.stage.run(ran.lm, items) for a in r.artifacts}
    alone = {a.path for i in items for r in ran.stage.run(ran.lm, [i]) for a in r.artifacts}
    assert together == alone == {r["path"] for r in rows_of(ran.folder, "artifacts")}
    assert len(together) == 2 * len(items)
    # A prompt's own id may hold anything; a path does not.
    prompt_id, condition, probe = items[0].payload.prompt_id, items[0].payload.condition, items[0].payload.probe
    odd = "../../odd|\0/" + "x" * 300
    (result,) = ran.stage.run(ran.lm, [Item(f"{odd}|{condition}", 1, Looked(odd, condition, probe))])
    for artifact in result.artifacts:
        kind, name = artifact.path.split("/")
        assert kind == artifact.kind
        assert len(name) < 60
        assert name.removesuffix(".safetensors").isalnum()
        assert artifact.keys["prompt_id"] == odd != prompt_id


class Failing(NamedTuple):
    """A run in which one kept item was not finite."""

    folder: Path
    key: str


@pytest.fixture(scope="module")
def failing(ran: Ran, upstream: Path, tmp_path_factory: pytest.TempPathFactory) -> Failing:
    key = next(k for k, i in ran.items.items() if i.payload.probe.keep_whole and i.payload.condition == "negative")
    ill = ran.items[key].payload.probe
    folder = Path(shutil.copytree(upstream, tmp_path_factory.mktemp("failing") / "run"))

    def overflowing(lm: LM, probes: Sequence[Any]) -> list[View | ItemFailed]:
        views = look_inside(lm, probes)
        return [NotFinite("not finite") if p == ill else v for p, v in zip(probes, views, strict=True)]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(mechanism, "look_inside", overflowing)
        run_stages(folder, ran.stage, max_tokens=600)
    return Failing(folder, key)


def test_an_item_that_fails_leaves_its_reason_and_neither_row_nor_file(ran: Ran, failing: Failing) -> None:
    assert events_of(failing.folder, "failed_item") == {failing.key: "not finite"}
    prompt_id, condition = failing.key.split("|")

    def without(rows: Sequence[Row]) -> list[Row]:
        return [r for r in rows if (r["prompt_id"], r["condition"]) != (prompt_id, condition)]

    for table in OWN_TABLES:
        assert rows_of(failing.folder, table) == without(rows_of(ran.folder, table)), table
        assert len(rows_of(failing.folder, table)) < len(rows_of(ran.folder, table))
    paths = {r["path"] for r in rows_of(failing.folder, "artifacts")}
    assert paths == {r["path"] for r in without(rows_of(ran.folder, "artifacts"))}
    assert len(paths) == len(rows_of(ran.folder, "artifacts")) - 2
    files = [p for p in RunPaths(failing.folder).artifacts.rglob("*") if p.is_file()]
    assert len(files) == len(paths)


def test_a_retry_brings_what_was_missing_and_touches_nothing_else(ran: Ran, failing: Failing) -> None:
    run_stages(failing.folder, ran.stage, max_tokens=600, retry_failed=True)
    for table in OWN_TABLES:
        for got, want in zip(rows_of(failing.folder, table), rows_of(ran.folder, table), strict=True):
            assert near(got, want), table
    whole = {r["path"]: r["shape"] for r in rows_of(ran.folder, "artifacts")}
    assert {r["path"]: r["shape"] for r in rows_of(failing.folder, "artifacts")} == whole
    assert all((RunPaths(failing.folder).artifacts / path).is_file() for path in whole)


# ---- batches --------------------------------------------------------------------------------------------------


def test_an_item_gives_the_same_alone_and_among_others(ran: Ran) -> None:
    some = list(ran.items.values())[::5]
    together = ran.stage.run(ran.lm, some)
    for item, among in zip(some, together, strict=True):
        (alone,) = ran.stage.run(ran.lm, [item])
        assert isinstance(alone, ItemResult)
        assert len(item.payload.probe.tokens) == item.length
        for table in OWN_TABLES:
            for a, b in zip(alone.rows[table], among.rows[table], strict=True):
                assert near(a, b), table


def test_a_run_that_keeps_no_files_measures_the_same(ran: Ran, upstream: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(upstream, tmp_path / "run"))
    run_stages(folder, replace(ran.stage, stored=StoredSettings(max_per_category=0)), max_tokens=600)
    assert rows_of(folder, "artifacts") == []
    assert not list(RunPaths(folder).artifacts.rglob("*.safetensors"))
    for table in OWN_TABLES:
        assert rows_of(folder, table) == rows_of(ran.folder, table)
