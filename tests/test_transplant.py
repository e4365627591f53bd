"""Transplants and weight change: exact on every family of the zoo, restored bit for bit, refused
where in doubt.
"""

import copy

import numpy as np
import pytest
import torch
from zoo import ZOO, build

from helpers.capture.interventions import columns, neuron_weights, transplant, weight_change
from helpers.capture.sites import find_sites
from helpers.record import UserError

IDS = torch.arange(3, 23).view(2, 10)


def everything(model) -> dict:
    """A mask of all neurons."""
    masks = {}
    for site in find_sites(model):
        shape = (site.experts, site.width) if site.family == "expert" else (site.width,)
        masks.setdefault(site.family, []).append(np.ones(shape, bool))
    return {family: np.stack(layers) for family, layers in masks.items()}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def state(model):
    return {name: p.clone() for name, p in model.state_dict().items()}


def same(one, two):
    return all(torch.equal(one[name], two[name]) for name in one)


def other_neurons(model):
    """A copy that differs in its neurons' own weights only."""
    changed = copy.deepcopy(model)
    for site in find_sites(changed):
        for view in neuron_weights(site).values():
            view += 0.1 * torch.randn(
                view.shape, generator=torch.Generator().manual_seed(site.layer)
            )
    return changed


@pytest.mark.parametrize("family", ZOO)
def test_all_neurons_carry_all_of_the_mlps_and_come_back_bit_for_bit(family):
    donor = build(family)
    host = other_neurons(donor)
    before = state(host)
    inside = {site.name for site in find_sites(host)}
    moved = {name for name, p in before.items() if not torch.equal(p, donor.state_dict()[name])}
    ours = {
        name
        for name in before
        if any(name.startswith(site + ".") for site in inside)
        and "norm" not in name
        and "attn" not in name
        and "attention" not in name
        and "router" not in name
    }
    biases = {
        f"{name}.bias"
        for name, _ in host.named_modules()
        if name.rpartition(".")[2]
        in ("down_proj", "dense_4h_to_h", "c_proj", "fc2", "output_linear", "fc_out")
    }
    biases |= {name for name in before if name.endswith("down_proj_bias")}
    assert moved == ours - biases
    assert not torch.equal(logits(host), logits(donor))
    with transplant(host, donor, everything(host)):
        assert torch.equal(logits(host), logits(donor))
    assert same(before, state(host))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "mixtral", "gpt_oss", "qwen2_moe"])
def test_a_gate_row_moves_its_own_neuron_only(family):
    """The counted activation of neuron 3 (of expert 1) depends on its gate row, that of others
    does not.
    """
    from helpers.capture.counter import watching

    model = build(family)
    site = find_sites(model)[0]

    def counts():
        with watching(model) as counter:
            return counter(IDS).neurons[site.family][:, 0]  # [B, N] or [B, E, N]

    before = counts().astype(int)
    at = (1, 3) if site.family == "expert" else (3,)
    gate = neuron_weights(site)
    gate["gate"][at] = 100 * torch.randn(
        gate["gate"][at].shape, generator=torch.Generator().manual_seed(1)
    )
    moved = np.abs(counts().astype(int) - before).sum(0)
    assert moved[at] > 0
    moved[at] = 0
    assert not moved.any()


@pytest.mark.parametrize("family", ["phi3", "mixtral", "gpt_oss"])
def test_gate_and_up_are_different_rows(family):
    weights = neuron_weights(find_sites(build(family))[0])
    before = weights["gate"].clone()
    weights["up"].zero_()
    assert torch.equal(weights["gate"], before)
    assert before.any()


def test_an_empty_set_is_a_no_op_and_a_failing_body_restores():
    donor = build("llama")
    host = other_neurons(donor)
    before, plain = state(host), logits(host)
    none = {family: np.zeros_like(mask) for family, mask in everything(host).items()}
    with transplant(host, donor, none):
        assert torch.equal(logits(host), plain)
    with pytest.raises(KeyError), transplant(host, donor, everything(host)):
        raise KeyError
    assert same(before, state(host))


def test_one_neuron_is_its_two_rows_and_one_column():
    donor, host = build("llama", seed=1), build("llama")
    mask = {"dense": np.zeros((3, 80), bool)}
    mask["dense"][1, 7] = True
    expected = copy.deepcopy(host)
    one, two = expected.model.layers[1].mlp, donor.model.layers[1].mlp
    with torch.no_grad():
        one.gate_proj.weight[7], one.up_proj.weight[7] = (
            two.gate_proj.weight[7],
            two.up_proj.weight[7],
        )
        one.down_proj.weight[:, 7] = two.down_proj.weight[:, 7]
    with transplant(host, donor, mask):
        assert same(state(host), expected.state_dict())


def test_weight_change_of_hand_made_weights():
    base = build("qwen2_moe")
    tuned, expert = copy.deepcopy(base), [s for s in find_sites(base) if s.family == "expert"]
    bank = [s for s in find_sites(tuned) if s.family == "expert"][1]
    neuron_weights(bank)["gate"][2, 5] *= 1.5
    next(p for p in bank.router.parameters() if p.shape[0] == 6).data[4] *= 3
    columns(bank)[0, 0] += 1  # no gate row: does not count
    found = weight_change(base, tuned)
    assert found["expert"].shape == (len(expert), 6, 32)
    assert found["experts"].shape == (
        len(expert),
        6,
    )
    assert np.argwhere(found["expert"]).tolist() == [[1, 2, 5]]
    assert found["expert"][1, 2, 5] == pytest.approx(0.5)
    assert np.argwhere(found["experts"]).tolist() == [[1, 4]]
    assert found["experts"][1, 4] == pytest.approx(2)
    assert not found["shared"].any()
    assert not found["dense"].any()


def test_other_shapes_and_dead_rows_are_refused():
    with (
        pytest.raises(UserError, match="other shapes in the donor"),
        transplant(
            build("llama"), build("llama", intermediate_size=40), everything(build("llama"))
        ),
    ):
        pass
    with (
        pytest.raises(UserError, match="donor has no model.layers.2.mlp"),
        transplant(build("llama"), build("llama", num_hidden_layers=2), everything(build("llama"))),
    ):
        pass
    dead = build("llama")
    dead.model.layers[0].mlp.gate_proj.weight.data[0] = 0
    with pytest.raises(UserError, match="row of zeros"):
        weight_change(dead, build("llama"))
    with torch.device("meta"):
        absent = type(dead)(dead.config)
    with pytest.raises(UserError, match="offloaded, quantised or sharded"):
        neuron_weights(find_sites(absent)[0])
