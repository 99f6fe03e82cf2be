"""Values of other libraries on the same model: captum's integrated gradients, nnsight's activations."""

import numpy as np
import pytest
import torch

from harness.experiments.neurons.bench import captum_integrated
from harness.models.attribution import attribute
from harness.models.neurons import circuit_of, read
from harness.models.scene import Scene, Target
from tests.tiny import tiny_lm

TARGET = Target((5, 7, 100, 32, 90, 91, 33), (40,))


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-qwen2", "tiny-qwen3", "tiny-phi3"])
def test_integrated_gradients_are_captums(family: str) -> None:
    """captum's path begins at a text of id 0: these families' embedding of it is zero, and so are their neurons there."""
    captum = pytest.importorskip("captum.attr")
    circuit = circuit_of(tiny_lm(family))
    assert not bool(circuit.lm.model.get_input_embeddings().weight[0].any())  # type: ignore[union-attr]
    ours = attribute(Scene(circuit, TARGET, is_upto=True), ("ig",)).values["ig"]
    theirs = captum_integrated(circuit, TARGET, captum.LayerIntegratedGradients, 64).sum(1)
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
    other = attribute(Scene(circuit, TARGET, is_upto=True), ("act_grad",)).values["act_grad"]
    assert float((other - theirs).abs().max()) > 1e-2 * float(theirs.abs().max()), "the control: another metric"


@pytest.mark.parametrize("family", ["tiny-llama", "tiny-gemma2", "tiny-gpt2"])
def test_activations_are_nnsights(family: str) -> None:
    nnsight = pytest.importorskip("nnsight")
    from harness.models import peers

    lm = tiny_lm(family)
    twin = peers.twin(lm, "eager")
    paths = {id(module): path for path, module in lm.model.named_modules()}
    model = nnsight.NNsight(twin)
    modules = []
    for module in circuit_of(lm).outlets:
        part = model
        for name in paths[id(module.module)].split("."):
            part = part[int(name)] if name.isdigit() else getattr(part, name)
        modules.append(part)
    with torch.inference_mode(), model.trace(input_ids=torch.tensor([TARGET.tokens]), use_cache=False):
        kept = nnsight.save([m.input[0] for m in modules])
    rows: dict[int, np.ndarray] = {}
    read(lm, [TARGET.tokens], [range(7)], range(4), lambda n, r: rows.__setitem__(n, r.numpy()))
    for layer, theirs in enumerate(kept):
        assert np.abs(rows[layer] - theirs.numpy()).max() <= 1e-4 * np.abs(theirs.numpy()).max()
