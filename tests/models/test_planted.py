"""Planted neurons: each does what the recipe says, measured by plain forwards of transformers and hooks of this file alone."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from harness.cli import main
from harness.commands.given import is_name
from harness.errors import EnvironmentFault, ModelError
from harness.experiments.weights import spec_of
from harness.files import file_sha256
from harness.models import planted
from harness.models.load import ModelSpec, identify, load
from harness.models.planted import Neuron, Planted, build, is_whole, planted_folder
from harness.settings import ModelSettings, PathSettings

DATA = Path(__file__).resolve().parents[2] / "data"
DEMO = DATA / "models" / "demo"
ROWS = [json.loads(line) for line in (DATA / "neurons" / "planted.jsonl").read_text("utf-8").splitlines()]
PROMPTS = [row["text"] for row in ROWS]
CATEGORIES = [row["category"] for row in ROWS]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    """The planted model, built once."""
    return build(DEMO, tmp_path_factory.mktemp("planted") / "model")


@cache
def model_in(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval().requires_grad_(False)


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(DEMO)


def ids_of(text: str) -> list[int]:
    return tokenizer()(text)["input_ids"]


def logits(model: Any, ids: Sequence[int], zero: Collection[Neuron] = ()) -> Tensor:
    """Logits [T, V] of one text, with these neurons set to 0 at every position."""
    handles = []
    for layer in {n.layer for n in zero}:
        columns = [n.neuron for n in zero if n.layer == layer]

        def silence(_module: nn.Module, args: tuple[Tensor], columns: list[int] = columns) -> tuple[Tensor]:
            edited = args[0].clone()
            edited[..., columns] = 0
            return (edited,)

        handles.append(model.model.layers[layer].mlp.down_proj.register_forward_pre_hook(silence))
    try:
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()


class Seen(NamedTuple):
    """One prompt's forward: activations [L, T, M], the logits at its last token, and the stream before the final norm."""

    ids: list[int]
    activations: Tensor
    logits: Tensor
    resid: Tensor

    @property
    def target(self) -> int:
        return int(self.logits.argmax())


def seen(model: Any, ids: list[int]) -> Seen:
    with kept([*(block.mlp.down_proj for block in model.model.layers), model.model.norm]) as inputs:
        found = logits(model, ids)[-1]
    return Seen(ids, torch.stack(inputs[:-1]), found, inputs[-1][-1])


@contextmanager
def kept(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """The inputs of these modules, in the order in which they are called."""
    inputs: list[Tensor] = []
    handles = [m.register_forward_pre_hook(lambda _m, args: inputs.append(args[0][0])) for m in modules]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


@cache
def all_seen(folder: Path) -> tuple[Seen, ...]:
    return tuple(seen(model_in(folder), ids_of(text)) for text in PROMPTS)


def of_category(folder: Path, category: str | None) -> list[Seen]:
    return [s for s, c in zip(all_seen(folder), CATEGORIES, strict=True) if c == category]


def peaks(folder: Path, skip_first: int = 1) -> Tensor:
    """The largest |a| of each prompt: [prompts, L, M]."""
    return torch.stack([s.activations[:, skip_first:].abs().amax(1) for s in all_seen(folder)])


def peak_tokens(folder: Path, neuron: Neuron, skip_first: int) -> Counter[int]:
    values = [s.activations[neuron.layer, skip_first:, neuron.neuron].abs() for s in all_seen(folder)]
    tokens = (s.ids[skip_first + int(v.argmax())] for s, v in zip(all_seen(folder), values, strict=True))
    return Counter(tokens)


def dla(model: Any, one: Seen) -> Tensor:
    """What each neuron at the last token gives to the top logit, the final norm's scale frozen: s · <W_out, γ*u> · a."""
    norm = model.model.norm
    scale = (one.resid.double().pow(2).mean() + norm.variance_epsilon).rsqrt()
    read = norm.weight.double() * model.lm_head.weight[one.target].double()
    outs = torch.stack([block.mlp.down_proj.weight.double() for block in model.model.layers])
    return scale * torch.einsum("d,ldm->lm", read, outs) * one.activations[:, -1].double()


def effect(model: Any, one: Seen, *neurons: Neuron) -> float:
    """By how much the top logit falls without these neurons."""
    return float(one.logits[one.target] - logits(model, one.ids, neurons)[-1, one.target])


# ---- the model they are put in ---------------------------------------------------------------------------------


def test_zero_rows_change_no_bit_of_the_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planted, "RECIPE", ())
    monkeypatch.setattr(planted, "_read_texts", lambda *_: None)
    monkeypatch.setattr(planted, "_plant", lambda *_: {})
    wide = model_in(build(DEMO, tmp_path / "wide").folder)
    demo = model_in(DEMO)
    assert wide.config.intermediate_size == demo.config.intermediate_size + planted.EXTRA
    for text in PROMPTS[::5]:
        assert (logits(wide, ids_of(text)) - logits(demo, ids_of(text))).abs().max() == 0.0
    batch = torch.tensor([ids_of(text)[:18] for text in PROMPTS[:64]])
    assert torch.equal(wide(input_ids=batch).logits, demo(input_ids=batch).logits)


def test_only_the_planted_rows_are_new(made: Planted) -> None:
    old, new = load_file(DEMO / "model.safetensors"), load_file(made.folder / "model.safetensors")
    assert old.keys() == new.keys()
    num_new = 0
    for name, weight in old.items():
        kept = new[name][tuple(slice(size) for size in weight.shape)]
        assert torch.equal(kept, weight), name
        if name.endswith("gate_proj.weight"):
            num_new += int((new[name][len(weight) :] != 0).any(1).sum())
    assert num_new == len(made.neurons) == 9
    found = {(n.layer, n.neuron) for n in made.neurons}
    assert len(found) == 9
    assert all(n.neuron >= 256 for n in made.neurons)


def test_every_prompt_keeps_its_answer(made: Planted) -> None:
    for one, row in zip(all_seen(made.folder), ROWS, strict=True):
        assert tokenizer().decode([one.target]) == row["target"], row["id"]
        assert int(logits(model_in(DEMO), one.ids)[-1].argmax()) == one.target


def test_prompts_without_a_planted_category_are_as_they_were(made: Planted) -> None:
    """Their logits move by what the token and position neurons write, a thousandth of what the keys do."""
    for one, category in list(zip(all_seen(made.folder), CATEGORIES, strict=True))[::6]:
        moved = float((logits(model_in(DEMO), one.ids)[-1] - one.logits).abs().max())
        assert (moved > 0.3) == (category in ("heart", "horse")) or category == "horse", (category, moved)
        assert category in ("heart", "horse") or moved < 0.02


def test_the_model_loads_as_any_checkpoint(made: Planted) -> None:
    lm = load(ModelSpec(str(made.folder)))
    assert lm.anatomy.neurons is not None
    assert lm.identity.about["config"]["intermediate_size"] == made.width == 272


# ---- what was planted ------------------------------------------------------------------------------------------


def test_a_key_fires_on_its_category_and_nowhere_else(made: Planted) -> None:
    """6.9 there; elsewhere at most .01 at any token of any other prompt."""
    for key in made.of("key"):
        for one, category in zip(all_seen(made.folder), CATEGORIES, strict=True):
            fired = one.activations[key.layer, :, key.neuron].abs()
            assert (fired[-1] > 5) == (category == key.category)
            assert fired[:-1].max() < 0.01
        mean = sum(float(s.activations[key.layer, -1, key.neuron]) for s in of_category(made.folder, key.category)) / 28
        assert mean == pytest.approx(key.level, rel=0.01)


def test_keys_are_the_first_places_by_dla_and_ablation_shows_less_than_it_claims(made: Planted) -> None:
    model, (earlier, last) = model_in(made.folder), made.of("key")
    claimed, measured = 0.0, 0.0
    for one in of_category(made.folder, last.category):
        claims = dla(model, one)
        order = claims.abs().flatten().argsort(descending=True)[:2].tolist()
        assert order == [n.layer * made.width + n.neuron for n in (last, earlier)]
        for key in (last, earlier):
            claim, found = float(claims[key.layer, key.neuron]), effect(model, one, key)
            assert 0.3 < found < claim
            claimed, measured = claimed + claim, measured + found
    assert measured < 0.7 * claimed
    other = of_category(made.folder, "facts")[0]
    assert abs(effect(model, other, last)) < 1e-3, "control: where it does not fire it does nothing"


def test_all_parts_of_a_logit_add_up_to_it(made: Planted) -> None:
    """So that `dla` above is what it says: MLPs by their neurons, attention, the embedding.

    The norms of transformers go through float32.
    """
    model = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float64, attn_implementation="eager").eval()
    model.requires_grad_(False)
    with kept([block.self_attn.o_proj for block in model.model.layers]) as heads:
        one = seen(model, ids_of(PROMPTS[0]))
    norm, unembedding = model.model.norm, model.lm_head.weight[one.target]
    stream = model.model.embed_tokens.weight[one.ids[-1]].clone()
    for block, head in zip(model.model.layers, heads, strict=True):
        stream += block.self_attn.o_proj.weight @ head[-1]
    scale = (one.resid.pow(2).mean() + norm.variance_epsilon).rsqrt()
    rest = scale * (norm.weight * unembedding) @ stream
    total = float(dla(model, one).sum() + rest)
    assert total == pytest.approx(float(one.logits[one.target]), rel=1e-6)


def test_decoys_are_the_loudest_of_all_and_do_nothing(made: Planted) -> None:
    model, found = model_in(made.folder), peaks(made.folder)
    everywhere, there = made.of("decoy")
    is_there = torch.tensor([c == there.category for c in CATEGORIES])
    natural = found.clone()
    for decoy in made.of("decoy"):
        natural[:, decoy.layer, decoy.neuron] = 0
    assert found[:, everywhere.layer, everywhere.neuron].mean() > natural.mean(0).max()
    assert found[:, everywhere.layer, everywhere.neuron].max() > natural.max()
    assert found[is_there, there.layer, there.neuron].min() > natural[is_there].max()
    for one in (*of_category(made.folder, there.category)[::5], *of_category(made.folder, "ood")[::9]):
        assert dla(model, one)[everywhere.layer, everywhere.neuron] == 0
        assert torch.equal(logits(model, one.ids, made.of("decoy"))[-1], one.logits)


def test_a_silent_neuron_never_fires_until_its_token_comes(made: Planted) -> None:
    (silent,) = made.of("silent")
    assert peaks(made.folder, skip_first=0)[:, silent.layer, silent.neuron].max() == 0
    columns = [block.mlp.down_proj.weight.norm(dim=0) for block in model_in(made.folder).model.layers]
    largest = max(float(c[:256].max()) for c in columns)
    assert float(columns[silent.layer][silent.neuron]) > 0.5 * largest, "it writes as much as those that write most"
    assert silent.token is not None
    ids = ids_of(PROMPTS[0])
    woken = seen(model_in(made.folder), [*ids[:12], *ids_of(silent.token), *ids[12:]])
    fired = woken.activations[silent.layer, :, silent.neuron]
    assert int(fired.argmax()) == 12
    assert fired[12] > 1, "control: it can fire"


def test_neurons_that_wait_for_one_token_do_not_fire_on_the_background(made: Planted) -> None:
    (silent,), (token,), (everywhere, _) = made.of("silent"), made.of("token"), made.of("decoy")
    lines = (DATA / "neurons" / "background_en.txt").read_text("utf-8").splitlines()
    for line in lines[::4]:
        found = seen(model_in(made.folder), ids_of(line)).activations[:, 1:]
        assert found[silent.layer, :, silent.neuron].abs().max() == 0
        assert found[token.layer, :, token.neuron].abs().max() < 0.1
        assert found[everywhere.layer, :, everywhere.neuron].abs().max() > 30, (
            "control: a decoy without a category does"
        )


def test_a_cancelling_pair_acts_one_by_one_and_not_together(made: Planted) -> None:
    model, (up, down) = model_in(made.folder), made.of("pair")
    for one in of_category(made.folder, up.category):
        values = one.activations[up.layer, -1]
        assert values[up.neuron] == values[down.neuron] > 5
        assert effect(model, one, up) > 0.5
        assert effect(model, one, down) < -0.5
        assert abs(effect(model, one, up, down)) < 1e-4  # float32: the sum is made in another order
        order = dla(model, one).abs().flatten().argsort(descending=True)[:2].tolist()
        assert set(order) == {n.layer * made.width + n.neuron for n in (up, down)}, "the first order sees no pair"
    one = of_category(made.folder, "heart")[0]
    keys = made.of("key")
    assert effect(model, one, *keys) > max(effect(model, one, key) for key in keys), "control: two that do not cancel"


def test_a_token_neuron_peaks_at_its_token_in_every_prompt(made: Planted) -> None:
    (neuron,) = made.of("token")
    assert neuron.token is not None
    (token,) = ids_of(neuron.token)
    assert peak_tokens(made.folder, neuron, skip_first=1) == {token: len(PROMPTS)}
    with_first = peak_tokens(made.folder, neuron, skip_first=0)
    assert with_first.most_common(1)[0][0] == ids_of(PROMPTS[0])[0] != token, "control: the skipped position counts"


def test_a_position_neuron_peaks_at_its_position_in_every_prompt(made: Planted) -> None:
    (neuron,) = made.of("position")
    assert neuron.position is not None
    for one in all_seen(made.folder):
        fired = one.activations[neuron.layer, :, neuron.neuron]
        assert int(fired.abs().argmax()) == neuron.position
        alike = [t for t, i in enumerate(one.ids) if i == one.ids[neuron.position] and t != neuron.position]
        assert alike, "control: the same token stands elsewhere too"
        assert fired[alike].abs().max() < 0.1 < fired[neuron.position]


# ---- the folder ------------------------------------------------------------------------------------------------


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir())}


def test_it_is_the_same_bytes_each_time_and_for_any_number_of_threads(made: Planted, tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from harness.models.planted import build\n"
        "torch.set_num_threads(2); build(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    other = {
        **os.environ,
        "ATEN_CPU_CAPABILITY": "default",
    }  # another machine's instructions, as far as this one has them
    subprocess.run([sys.executable, "-c", code, DEMO, tmp_path / "again"], check=True, env=other)
    assert hashes(tmp_path / "again") == hashes(made.folder)


def test_what_was_planted_is_read_back(made: Planted) -> None:
    assert planted.read(made.folder) == made
    assert Counter(n.kind for n in made.neurons) == {
        "key": 2, "pair": 2, "decoy": 2, "silent": 1, "token": 1, "position": 1,
    }  # fmt: skip
    with pytest.raises(ModelError, match="expected what was planted"):
        planted.read(DEMO)


def test_two_builders_at_once_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Path] = []
    found: list[Path] = []
    both = threading.Barrier(2)
    monkeypatch.setattr(planted, "build", lambda source, target: built.append(target) or build(source, target))

    def one() -> None:
        both.wait()
        found.append(planted_folder(DEMO, tmp_path))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert found == [built[0]] * 2
    assert list((tmp_path / "planted").iterdir()) == [found[0]]


HALVES = {
    "nothing in it": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no facts": lambda folder: (folder / "planted.json").unlink(),
    "facts that are none": lambda folder: (folder / "planted.json").write_text("[]"),
    "cut weights": lambda folder: os.truncate(folder / "model.safetensors", 1000),
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "another config": lambda folder: (folder / "config.json").write_text("{}"),
}


def test_a_half_made_folder_is_replaced(tmp_path: Path) -> None:
    folder = planted_folder(DEMO, tmp_path)
    whole = hashes(folder)
    assert is_whole(folder)
    HALVES["cut weights"](folder)
    left = tmp_path / "planted" / ".planted-left"
    left.mkdir()
    assert hashes(planted_folder(DEMO, tmp_path)) == whole
    assert list(folder.parent.iterdir()) == [folder], "what a killed builder left is gone too"
    before = folder.stat().st_mtime_ns
    assert planted_folder(DEMO, tmp_path).stat().st_mtime_ns == before, "control: a whole one is not built again"


@pytest.mark.parametrize("name", HALVES)
def test_each_kind_of_damage_is_seen(made: Planted, tmp_path: Path, name: str) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in made.folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert is_whole(copy), "control"
    HALVES[name](copy)
    assert not is_whole(copy)


def test_a_file_in_the_place_of_the_folder_is_replaced(made: Planted, tmp_path: Path) -> None:
    folder = planted_folder(DEMO, tmp_path)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    folder.symlink_to(tmp_path / "nowhere")
    assert is_whole(planted_folder(DEMO, tmp_path))
    assert not folder.is_symlink()


@pytest.mark.parametrize("moment", ["_widened", "sync_files", "sync_folder"])
def test_a_killed_builder_leaves_no_half_folder_and_the_next_one_builds(tmp_path: Path, moment: str) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from harness.models import planted\n"
        f"planted.{moment} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "planted.planted_folder(Path(sys.argv[1]), Path(sys.argv[2]))"
    )
    killed = subprocess.run([sys.executable, "-c", code, DEMO, tmp_path], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert [path.name[:9] for path in (tmp_path / "planted").iterdir()] == [".planted-"]
    folder = planted_folder(DEMO, tmp_path)
    assert is_whole(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    """A file where the folder should be: root, who may run this, can write anywhere else."""
    (tmp_path / "planted").write_text("")
    with pytest.raises(EnvironmentFault, match=r"cannot be written.*--paths\.cache") as told:
        planted_folder(DEMO, tmp_path)
    assert told.value.exit_code == 4
    assert "\n" not in str(told.value)


def test_a_read_only_cache_with_a_whole_folder_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = planted_folder(DEMO, tmp_path)

    def no_writing(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system", str(tmp_path))

    monkeypatch.setattr(Path, "mkdir", no_writing)
    assert planted_folder(DEMO, tmp_path) == folder
    (folder / "planted.json").unlink()
    with pytest.raises(EnvironmentFault, match="the file system can only be read"):
        planted_folder(DEMO, tmp_path)


def test_other_weights_texts_or_recipes_are_other_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "data" / "models" / "demo"
    source.mkdir(parents=True)
    texts = tmp_path / "data" / "neurons"
    texts.mkdir()
    prompts, background = texts / "planted.jsonl", texts / "background_en.txt"
    for path in (prompts, background):
        path.write_bytes((DATA / "neurons" / path.name).read_bytes())
    for path in DEMO.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    names = [planted._name(DEMO)]
    assert planted._name(source) == names[0], "the same files elsewhere are the same model"
    for path in (source / "model.safetensors", source / "tokenizer.json", prompts, background):
        path.write_bytes(path.read_bytes() + b"\n")
        names.append(planted._name(source))
    monkeypatch.setattr(planted, "VERSION", planted.VERSION + 1)
    names.append(planted._name(source))
    assert len(set(names)) == 6
    prompts.unlink()
    with pytest.raises(ModelError, match="expected a file that the planted model is made of"):
        planted_folder(source, tmp_path / "cache")


def test_a_full_disk_is_told_in_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_paths: object) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(planted, "sync_files", full)
    with pytest.raises(EnvironmentFault, match="the disk is full"):
        planted_folder(DEMO, tmp_path)
    assert list((tmp_path / "planted").iterdir()) == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_damaged_demo_model_is_named(tmp_path: Path, name: str) -> None:
    source = tmp_path / "models" / "demo"
    source.mkdir(parents=True)
    for path in DEMO.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / name).write_bytes(b"no such thing")
    with pytest.raises(ModelError, match=name):
        build(source, tmp_path / "made")


def test_a_model_of_another_family_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "models" / "other"
    source.mkdir(parents=True)
    for path in DEMO.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ModelError, match="expected a Llama"):
        build(source, tmp_path / "made")
    assert not (tmp_path / "made").exists()


# ---- its name --------------------------------------------------------------------------------------------------


def test_the_name_stands_for_the_built_folder(made: Planted, tmp_path: Path) -> None:
    paths = PathSettings(data=DATA, cache=tmp_path)
    spec = spec_of(ModelSettings(name="planted-neurons"), "model", paths, "cpu")
    assert Path(spec.name).parent == tmp_path / "planted"
    assert identify(spec).weights_sha256 == identify(ModelSpec(str(made.folder))).weights_sha256
    assert is_name("planted-neurons")
    assert not is_name("planted-neuron"), "control"


def test_a_run_takes_the_name_and_says_that_its_answers_are_planted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(DATA.parent)
    where = ["--paths.runs", str(tmp_path / "runs"), "--paths.cache", str(tmp_path / "cache")]
    assert main(["run", "--model", "planted-neurons", "--limit", "2", "--stages", "psem", *where]) == 0
    (manifest,) = (tmp_path / "runs").glob("*/manifest.json")
    told = json.loads(manifest.read_text("utf-8"))
    assert told["planted"] is True
    assert told["settings"]["model.name"]["value"] == "planted-neurons"


# ---- the bundled texts -----------------------------------------------------------------------------------------


def test_prompts_end_where_a_confident_answer_is_next() -> None:
    assert len(ROWS) == len({row["id"] for row in ROWS}) == len(set(PROMPTS)) == 200
    assert Counter(CATEGORIES)["heart"] == 28
    for row in ROWS:
        assert row["text"].endswith("\nAnswer:")
        found = logits(model_in(DEMO), ids_of(row["text"]))[-1].softmax(-1)
        assert tokenizer().decode([int(found.argmax())]) == row["target"]
        assert found.max() > 0.4
        assert len(ids_of(row["target"])) == 1


def test_background_and_function_words_are_what_they_are_called() -> None:
    background = (DATA / "neurons" / "background_en.txt").read_text("utf-8").splitlines()
    assert len(background) == len(set(background)) >= 400
    assert all(8 <= len(line.split()) <= 40 for line in background)
    starts = Counter(tuple(line.lower().split()[:3]) for line in background)
    assert max(starts.values()) <= 3, "the shapes of its sentences vary"
    words = (DATA / "neurons" / "functional_en.txt").read_text("utf-8").splitlines()
    assert len(words) == len(set(words)) >= 200
    assert all(word and word == word.lower() and not word.split()[1:] for word in words)
    assert {"the", "of", "and", "would", ","} <= set(words)


def test_the_readme_has_the_hashes_of_the_bundled_files() -> None:
    rows = re.findall(r"^\| `(\S+)` \| `([0-9a-f]{64})` \|$", (DATA / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {"neurons/planted.jsonl", "neurons/background_en.txt", "neurons/functional_en.txt"} <= {
        name for name, _ in rows
    }
    assert [name for name, told in rows if file_sha256(DATA / name) != told] == []
