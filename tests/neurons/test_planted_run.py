"""What was planted comes out (spec §9): each row of the table, on a run of the planted model over the command line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from harness.experiments.neurons.inputs import measuring
from harness.models.ablate import Change, Set, effects, sets
from harness.models.load import ModelSpec, identify
from harness.models.planted import Planted, read
from harness.models.scene import Scene, Target
from tests.commands import harness, manifest, only_run, query


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, of fewer prompts: all categories are among them."""
    root = tmp_path_factory.mktemp("planted")
    told = harness("run", "neurons", "--limit", 56, "--paths.runs", root, "--neurons.effects", 60)
    assert told.code == 0, told.err
    assert "Certificate: all 6 measurements agree" in told.out
    assert "were written into it" in told.out
    return only_run(root)


@pytest.fixture(scope="module")
def planted(ran: Path) -> Planted:
    return read(Path(manifest(ran)["model"]["path"]))


def of(ran: Path, sql: str, **values: Any) -> list[tuple]:
    return query(ran, sql.format(**values))


def test_the_keys_fire_on_their_category_alone_and_lead_the_ranking(ran: Path, planted: Planted) -> None:
    last = max(planted.of("key"), key=lambda n: n.layer)
    ranked = of(
        ran,
        "SELECT category = '{c}', i.place, i.activation FROM influence i JOIN prompts USING (prompt_id) "
        "WHERE metric = 'dla' AND (layer, neuron) = ({l}, {n})",
        c=last.category, l=last.layer, n=last.neuron,
    )  # fmt: skip
    own = [r for r in ranked if r[0]]
    assert own
    assert all(place == 1 for _, place, _ in own), "dla place 1"
    assert min(a for *_, a in own) > 5
    assert all(abs(a) < 0.1 for is_own, _, a in ranked if not is_own)
    for key in planted.of("key"):
        (value, effect, predicted) = of(
            ran,
            "SELECT avg(value), avg(-delta_logit), avg(-predicted) FROM effects e JOIN influence i ON (i.prompt_id, i.layer, "
            "i.neuron, i.metric) = (e.prompt_id, e.layer, e.neuron, e.ranking) JOIN prompts p ON p.prompt_id = e.prompt_id "
            "WHERE ranking = 'dla' AND category = '{c}' AND (e.layer, e.neuron) = ({l}, {n})",
            c=key.category, l=key.layer, n=key.neuron,
        )[0]  # fmt: skip
        assert 0.3 < effect < predicted, "ablation shows less than dla claims: norms are not frozen in life"
        assert value == pytest.approx(predicted, rel=0.2)


def test_decoys_are_loudest_and_move_nothing(ran: Path, planted: Planted) -> None:
    loudest = of(ran, "SELECT layer, neuron FROM neurons ORDER BY max_peak DESC LIMIT 2")
    assert set(loudest) == {(d.layer, d.neuron) for d in planted.of("decoy")}
    for decoy in planted.of("decoy"):
        at = {"l": decoy.layer, "n": decoy.neuron}
        assert of(ran, "SELECT out_norm FROM neurons WHERE (layer, neuron) = ({l}, {n})", **at) == [(0.0,)]
        for table in ("influence", "effects"):
            column = "value" if table == "influence" else "delta_logit"
            found = of(ran, f"SELECT max(abs({column})) FROM {table} WHERE (layer, neuron) = ({{l}}, {{n}})", **at)
            assert found in ([(None,)], [(0.0,)]), table


def test_the_silent_one_writes_much_and_never_fires(ran: Path, planted: Planted) -> None:
    (silent,) = planted.of("silent")
    found = of(
        ran, "SELECT max_peak, share_active, out_norm, z_background FROM neurons WHERE (layer, neuron) = ({l}, {n})",
        l=silent.layer, n=silent.neuron,
    )  # fmt: skip
    (peak, share, norm, z) = found[0]
    assert (peak, share, z) == (0.0, 0.0, None)
    (median,) = of(ran, "SELECT median(out_norm) FROM neurons")[0]
    assert norm > median
    assert of(ran, "SELECT count(*) FROM effects WHERE (layer, neuron) = ({l}, {n}) AND abs(delta_logit) > 0",
              l=silent.layer, n=silent.neuron) == [(0,)]  # fmt: skip


def test_the_token_and_the_position_are_where_their_neurons_peak(ran: Path, planted: Planted) -> None:
    """Control: with the first position counted, the token neuron's peaks stand elsewhere."""
    (token,), (position,) = planted.of("token"), planted.of("position")
    found = of(ran, "SELECT v.text, peak_token_share FROM neurons JOIN vocabulary v ON token_id = peak_token_mode "
                    "WHERE (layer, neuron) = ({l}, {n})", l=token.layer, n=token.neuron)  # fmt: skip
    assert found == [(token.token, 1.0)]
    (examples,) = of(
        ran, "SELECT list_distinct(list_transform(examples, lambda e: e.position)) FROM neurons "
             "WHERE (layer, neuron) = ({l}, {n})",
        l=position.layer, n=position.neuron,
    )[0]  # fmt: skip
    assert examples == [position.position]
    root = ran.parent.parent / "control"
    told = harness(
        "run", "neurons", "--limit", 21, "--paths.runs", root, "--neurons.skip_first", 0, "--stages", "peaks"
    )
    assert told.code == 0
    control = of(only_run(root), "SELECT v.text FROM neurons JOIN vocabulary v ON token_id = peak_token_mode "
                                 "WHERE (layer, neuron) = ({l}, {n})", l=token.layer, n=token.neuron)  # fmt: skip
    assert control != [(token.token,)]


def test_dlas_parts_add_up_to_the_logit(ran: Path) -> None:
    (worst, logit) = query(
        ran, "SELECT max(abs(residual)), max(abs(logit)) FROM influence_totals JOIN targets USING (prompt_id) "
             "WHERE metric = 'dla'"
    )[0]  # fmt: skip
    assert worst <= 1e-5
    assert logit > 10


def test_a_cancelling_pair_moves_the_logit_one_by_one_and_not_together(ran: Path, planted: Planted) -> None:
    """The measured sets show it; first-order metrics do not. Control: another pair adds up."""
    one, other = planted.of("pair")
    rows = of(
        ran, "SELECT prompt_id, value FROM influence JOIN prompts USING (prompt_id) WHERE category = '{c}' AND metric = 'dla' "
             "AND layer = {l} AND neuron IN ({a}, {b}) ORDER BY prompt_id, neuron",
        c=one.category, l=one.layer, a=one.neuron, b=other.neuron,
    )  # fmt: skip
    values = np.array([v for _, v in rows]).reshape(-1, 2)
    assert (np.abs(values) > 1).all(), "the ranking has both at its head"
    assert np.abs(values.sum(1)).max() < 1e-4
    prompt_id = rows[0][0]
    tokens, ids, at = of(
        ran, "SELECT c.token_ids, t.token_ids, position FROM contexts c JOIN targets t USING (prompt_id) WHERE prompt_id = '{p}'",
        p=prompt_id,
    )[0]  # fmt: skip
    spec = ModelSpec(str(planted.folder))
    circuit = measuring(spec, identify(spec), has_relp=False).circuit
    scene = Scene(circuit, Target(tuple(tokens[: at + 1]), tuple(ids)))
    shape = (circuit.num_layers, circuit.num_neurons)
    nothing = Change(0.0, torch.zeros(shape))
    alone = effects(scene, np.array([[one.layer, one.neuron], [other.layer, other.neuron]]), nothing)
    deltas = alone.changed["value"] - alone.clean["value"]
    assert np.abs(deltas).min() > 0.5
    assert deltas[0] * deltas[1] < 0
    key = max(planted.of("key"), key=lambda n: n.layer)
    for pair, is_nothing in (((one, other), True), ((one, key), False)):
        places = torch.full(shape, 10**6)
        for n, neuron in enumerate(pair):
            places[neuron.layer, neuron.neuron] = n
        (value,) = sets(scene, places[None], [Set(0, 2, False)], nothing)
        assert bool(abs(value - alone.clean["value"]) < 1e-3) is is_nothing


def test_rankings_stand_over_matched_controls_and_shuffled_ones_do_not(ran: Path) -> None:
    """Law 6: on the planted model the areas of curves; the control draws rankings by lot."""
    for ranking in ("dla", "act_grad", "ig", "relp"):
        for mode, sign in (("keep", 1), ("drop", -1)):
            ((value, low, high, p),) = of(
                ran, "SELECT value, low, high, p FROM statistics WHERE ranking = '{r}' AND measure = 'area_{m}_over_matched'",
                r=ranking, m=mode,
            )  # fmt: skip
            assert sign * value > 0, (ranking, mode)
            assert sign * (low if sign > 0 else high) > 0
            assert p < 1e-3
    from harness.stats import paired_differences

    areas = dict(
        query(ran, "SELECT prompt_id || '|' || ranking, avg(m) FROM curves WHERE mode = 'keep' AND k > 0 GROUP BY ALL")
    )
    prompts = sorted({k.split("|")[0] for k in areas})
    rng = np.random.default_rng(0)
    drawn = np.array([rng.permutation([areas[f"{p}|random"], areas[f"{p}|matched"]]) for p in prompts])
    assert paired_differences(drawn[:, :1], drawn[:, 1:]).p[0] > 0.01, "shuffled labels do not differ"
