"""Ablation operators against models edited by brute force, in every family; restoration; traps of
naive ablation.
"""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from helpers.capture.budget import state
from helpers.capture.interventions import (
    Reference,
    ablate,
    assert_acted,
    columns,
    editable,
    neuron_weights,
    parts_of,
    transplant,
    weight_change,
)
from helpers.capture.sites import find_sites
from helpers.record import UserError
from tests.zoo import SPARSE, ZOO, build

torch.set_num_threads(1)
IDS = torch.randint(3, 101, (3, 12), generator=torch.Generator().manual_seed(3))
SEEN = torch.ones_like(IDS)
SEEN[1, 9:] = IDS[1, 9:] = 0
GONE = [1, 4]  # the experts that are ablated: in DeepSeek-V3 one of each group


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, attention_mask=SEEN).logits[SEEN.bool()]


def answer(model):
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [3, 4, 5, 6, 7, 8]])
    return model.generate(
        input_ids=ids,
        attention_mask=(ids > 0).long(),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )


def neuron_mask(model, share=0.15, seed=0):
    """A random component mask over every family of the model, made from the sites' shapes alone."""
    rng, sites = np.random.default_rng(seed), find_sites(model)
    shapes = {
        f: [(s.experts, s.width) if f == "expert" else (s.width,) for s in sites if s.family == f]
        for f in {s.family for s in sites}
    }
    return {f: rng.random((len(s), *s[0])) < share for f, s in sorted(shapes.items())}


def placed(model, mask):
    """(site, its part of the mask) one by one, by walking through the model a second way."""
    turn = {family: iter(part) for family, part in mask.items()}
    return [(site, torch.tensor(next(turn[site.family]))) for site in find_sites(model)]


def expert_mask(model, gone=GONE):
    banks = [s for s in find_sites(model) if s.family == "expert"]
    mask = np.zeros((len(banks), banks[0].experts), bool)
    mask[:, gone] = True
    return {"experts": mask}


def silenced(model, mask):
    """A copy whose masked neurons have lost what they *read* (gate and up, or fc), so that they
    put out 0 always.
    """
    twin = copy.deepcopy(model)
    for site, part in placed(twin, mask):
        if site.family == "expert" and site.module.is_concatenated:  # [E, gate then up, D]
            site.module.gate_up_proj.data[part.repeat(1, 2)] = 0
        elif site.family == "expert":  # GPT-OSS: [E, D, gate and up by turns], with bias
            both = part.repeat_interleave(2, -1)
            site.module.gate_up_proj.data.transpose(1, 2)[both] = 0
            site.module.gate_up_proj_bias.data[both] = 0
        for name, read in site.module.named_children():
            if name in ("gate_up_proj", "input_linear"):
                read.weight.data[part.repeat(2)] = 0
            elif name in ("gate_proj", "up_proj", "dense_h_to_4h", "c_fc", "fc1"):
                (read.weight.data.T if name == "c_fc" else read.weight.data)[part] = 0
                if read.bias is not None:
                    read.bias.data[part] = 0
    return twin


def without_experts(model, gone=GONE):
    """A copy from which experts have been deleted: weights cut out, fewer to choose from."""
    twin = copy.deepcopy(model)
    for site in find_sites(twin):
        if site.family == "expert":
            kept = [e for e in range(site.experts) if e not in gone]
            for module in (site.module, site.router):
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(p.data[kept].clone()))
                for name, b in list(module.named_buffers(recurse=False)):
                    setattr(module, name, b[kept].clone())
                module.num_experts = len(kept)
    return twin


def muted_experts(model, gone=GONE):
    """A copy whose given experts write nothing: down projection and its bias are 0."""
    twin = copy.deepcopy(model)
    for site in find_sites(twin):
        if site.family == "expert":
            for name, p in site.module.named_parameters(recurse=False):
                if name.startswith("down_proj"):
                    p.data[gone] = 0
    return twin


def with_constants(model, mask, values):
    """A copy whose masked neurons put out constants: silenced, and what the constants write is
    added by a slow loop.
    """
    twin = silenced(model, mask)
    for site, part in placed(twin, mask):
        written = torch.where(part, values[site.name], 0).unsqueeze(-2) @ columns(
            site
        )  # [1, D] or [E, 1, D]

        def add_dense(module, args, out, written=written):
            return out + written[0]

        def add_routed(module, args, out, written=written):
            out = out.clone()
            for t, (experts, weights) in enumerate(
                zip(args[1].tolist(), args[2].tolist(), strict=True)
            ):
                for e, w in zip(experts, weights, strict=True):
                    out[t] += w * written[e, 0]
            return out

        site.down.register_forward_hook(add_dense) if site.family != "expert" else (
            site.module.register_forward_hook(add_routed)
        )
    return twin


def constants(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        s.name: torch.randn(s.experts, s.width, generator=g)[
            slice(None) if s.family == "expert" else 0
        ]
        for s in find_sites(model)
    }


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def reference(values):
    """A Reference whose only position holds `values`: the mean, and every draw, is just that."""
    filled = {name: torch.ones(v.shape[:-1]) for name, v in values.items()}
    return Reference(values, {name: v.unsqueeze(-2) for name, v in values.items()}, filled)


@pytest.mark.parametrize("family", ZOO)
def test_neurons_equal_a_brute_force_edit_in_every_family(family):
    model = build(family)
    mask, before, answered = neuron_mask(model), logits(model), answer(model)
    twin = silenced(model, mask)
    for how in ("weights", "hook"):
        with ablate(model, mask, "zero", how=how):
            assert torch.equal(logits(model), logits(twin))  # not one bit of difference
            assert torch.equal(answer(model), answer(twin))
    assert_acted(before, logits(twin))
    values = constants(model)
    twin = with_constants(model, mask, values)
    for operator in ("mean", "resample"):
        with ablate(model, mask, operator, reference=reference(values)):
            torch.testing.assert_close(logits(model), logits(twin), atol=2e-5, rtol=1e-4)
            assert torch.equal(answer(model), answer(twin))
    assert_acted(before, logits(twin))
    assert torch.equal(logits(model), before)
    assert torch.equal(answer(model), answered)
    assert hooks(model) == 0


@pytest.mark.parametrize("family", SPARSE)
def test_experts_equal_a_brute_force_edit_in_every_family(family):
    model = build(family)
    mask, before = expert_mask(model), logits(model)
    with ablate(model, mask, "drop"):
        assert torch.equal(logits(model), logits(muted_experts(model)))
        assert_acted(before, logits(model))
    twin = without_experts(model)
    with ablate(model, mask, "reroute"):  # two rows fewer in the router's product: rounding differs
        torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-4)
        assert torch.equal(answer(model), answer(twin))
        assert_acted(before, logits(model))
    assert torch.equal(logits(model), before)
    assert hooks(model) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_everything_comes_back_bit_for_bit_after_an_exception(family):
    model = build(family)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before, methods = logits(model), {name: set(vars(m)) for name, m in model.named_modules()}
    given = reference(constants(model))

    def interrupted():
        with (
            ablate(model, neuron_mask(model), "zero"),
            ablate(model, neuron_mask(model, seed=1), "zero"),
            ablate(model, neuron_mask(model), "mean", reference=given),
        ):
            for operator in ("reroute", "drop") if family in SPARSE else ():
                with ablate(model, expert_mask(model), operator):
                    assert_acted(before, logits(model))
            raise KeyboardInterrupt

    pytest.raises(KeyboardInterrupt, interrupted)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert methods == {name: set(vars(m)) for name, m in model.named_modules()}
    assert hooks(model) == 0
    assert torch.equal(logits(model), before)


def test_a_failing_forward_leaves_the_router_usable():
    model = build("qwen2_moe")
    before = logits(model)
    with ablate(model, expert_mask(model), "reroute"):
        with pytest.raises(RuntimeError, match="shape"):
            find_sites(model)[1].router(torch.zeros(2, 5))
        assert (
            torch.nn.functional.linear(torch.ones(1, 2), torch.ones(6, 2)).isfinite().all()
        )  # no mode left on
        assert_acted(before, logits(model))
    assert torch.equal(logits(model), before)


def test_editing_the_logits_that_a_router_returns_does_nothing():
    """The naive ablation: the block has already read scores and indices. assert_acted is what
    catches it.
    """
    model = build("qwen2_moe")
    before = logits(model)

    def naive(module, args, out):
        return out[0].index_fill(1, torch.tensor(GONE), -torch.inf), *out[1:]

    for site in find_sites(model):
        if site.router is not None:
            site.router.register_forward_hook(naive)
    with pytest.raises(RuntimeError, match="did not act"):
        assert_acted(before, logits(model))


def test_reroute_hands_the_tokens_on_and_drop_keeps_the_other_weights():
    model, seen = build("mixtral"), {}
    bank = model.model.layers[0].mlp.experts
    bank.register_forward_pre_hook(lambda module, args: seen.update(index=args[1], weight=args[2]))
    logits(model)
    index, weight = seen["index"], seen["weight"]
    hit = torch.isin(index, torch.tensor(GONE))
    assert hit.any()
    assert not hit.all()
    with ablate(model, expert_mask(model), "drop"):
        bank._forward_pre_hooks.move_to_end(
            next(iter(bank._forward_pre_hooks))
        )  # look after the edit
        logits(model)
        assert torch.equal(seen["index"], index)
        assert torch.equal(seen["weight"], weight.masked_fill(hit, 0))
    with ablate(model, expert_mask(model), "reroute"):
        logits(model)
        assert not torch.isin(seen["index"], torch.tensor(GONE)).any()
        torch.testing.assert_close(
            seen["weight"].sum(1), torch.ones(len(weight))
        )  # Mixtral renormalises itself
        assert torch.equal(seen["index"][~hit.any(1)], index[~hit.any(1)])


def test_reroute_refuses_to_leave_fewer_than_k_experts_and_drop_may_take_all():
    model = build("qwen2_moe")
    for gone in ([0, 1, 2, 3, 4], list(range(6))):
        told = f"leaves {6 - len(gone)} of 6 experts, but a token takes 2"
        with (
            pytest.raises(UserError, match=told),
            ablate(model, expert_mask(model, gone), "reroute"),
        ):
            pass
    with ablate(model, expert_mask(model, list(range(6))), "drop"):
        assert logits(model).isfinite().all()
    grouped = build("deepseek_v3")  # two groups of four; each token chooses two of one group
    grouped.model.layers[1].mlp.gate.e_score_correction_bias[:] = torch.arange(8.0)
    bias = grouped.model.layers[1].mlp.gate.e_score_correction_bias.clone()
    with ablate(grouped, expert_mask(grouped, [4, 5, 6, 7]), "reroute"):
        assert (
            logits(grouped).isfinite().all()
        )  # a whole group is gone: the other takes over, whatever the bias
    with (
        pytest.raises(UserError, match="fewer than K experts"),
        ablate(grouped, expert_mask(grouped, [1, 2, 3, 5, 6, 7]), "reroute"),
    ):
        logits(grouped)
    assert torch.equal(grouped.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_an_empty_mask_is_a_no_op():
    model = build("qwen2_moe")
    before, empty = (
        logits(model),
        {family: part & False for family, part in neuron_mask(model).items()},
    )
    for mask, operator in (
        (None, "zero"),
        ({}, "reroute"),
        (empty, "zero"),
        (expert_mask(model, []), "drop"),
    ):
        with ablate(model, mask, operator):
            assert torch.equal(logits(model), before)
            assert hooks(model) <= 2  # whether the model, or its trunk, ran at all


@pytest.mark.parametrize(
    ("mask", "operator", "told"),
    [
        ({"dense": np.ones((1, 79), bool)}, "zero", "expected bool \\(1, 80\\)"),
        ({"dense": np.ones((1, 80))}, "zero", "found float64"),
        ({"dense": [[True], [True, False]]}, "zero", "rows have different lengths"),
        ({"expert": np.ones((2, 6, 33), bool)}, "zero", "expected bool \\(2, 6, 32\\)"),
        ({"routed": np.ones((2, 6), bool)}, "zero", "family 'routed'"),
        ([(0, 1)], "zero", "ablation mask: found tuple"),
        (np.ones((1, 80), bool), "zero", "ablation mask: found ndarray"),
        (pd.DataFrame({"layer": [0], "neuron": [1]}), "zero", "ablation mask: found DataFrame"),
        ({"dense": np.ones((1, 80), bool)}, "reroute", "Neurons take"),
        ({"dense": np.ones((1, 80), bool)}, "mean", "needs reference"),
        ({"experts": np.ones((2, 6), bool)}, "zero", "whole experts"),
        (
            {"experts": np.ones((2, 6), bool), "dense": np.ones((1, 80), bool)},
            "drop",
            "nest two contexts",
        ),
        ({}, "knockout", "operator 'knockout'"),
    ],
)
def test_bad_masks_and_operators_are_refused(mask, operator, told):
    model = build("qwen2_moe")
    before = logits(model)
    with pytest.raises(UserError, match=told), ablate(model, mask, operator):
        pass
    assert torch.equal(logits(model), before)
    assert hooks(model) == 0


@pytest.mark.parametrize("operator", ["mean", "resample"])
@pytest.mark.parametrize(
    ("given", "told"),
    [
        (5, "found int"),
        (reference({}), "the reference has None for"),
        (reference({"model.layers.0.mlp": torch.ones(3)}), r"has \(3,\) for .* expected \(80,\)"),
    ],
)
def test_a_reference_that_is_none_or_another_models_is_refused(operator, given, told):
    model = build("llama")
    with (
        pytest.raises(UserError, match=told),
        ablate(model, neuron_mask(model), operator, reference=given),
    ):
        pass


@pytest.mark.parametrize("seed", [2**70, 2**32, -1, True, 1.0, "0", None])
def test_a_seed_that_is_none_is_refused_at_the_start(seed):
    model = build("llama")
    given = constants(model)
    with (
        pytest.raises(UserError, match=r"seed is .*, expected a whole number from 0 to 4294967295"),
        ablate(model, neuron_mask(model), "resample", reference=reference(given), seed=seed),
    ):
        pass
    assert hooks(model) == 0


def test_weights_that_are_not_plain_floats_are_never_edited_in_silence():
    model = build("llama")
    mask, mlp = neuron_mask(model), model.model.layers[1].mlp
    before = logits(model)
    with ablate(model, mask, "zero"):
        wanted = logits(model)
    real, mlp.down_proj = mlp.down_proj, Offloaded(mlp.down_proj)
    assert not editable(find_sites(model)[1])
    assert editable(find_sites(model)[0])
    assert torch.equal(logits(model), before)
    with ablate(model, mask, "zero"):  # falls back on the hook, for this layer
        assert torch.equal(logits(model), wanted)
    with pytest.raises(UserError, match="offloaded"), ablate(model, mask, "zero", how="weights"):
        pass
    mlp.down_proj = real
    assert torch.equal(logits(model), before)
    real.weight = nn.Parameter(real.weight.to(torch.int8), requires_grad=False)
    assert not editable(find_sites(model)[1])


class Offloaded(nn.Linear):
    """A linear layer as accelerate leaves it between forwards: on the meta device, its weights
    fetched when it runs.
    """

    def __init__(self, real):
        super().__init__(real.in_features, real.out_features, bias=False, device="meta")
        self.fetch = [real]

    def forward(self, x):
        return self.fetch[0](x)


def test_experts_are_edited_alike_in_both_fused_implementations_and_refused_in_others():
    model = build("qwen2_moe")
    mask, given = neuron_mask(model), reference(constants(model))
    results = []
    for running in ("grouped_mm", "batched_mm"):
        model.set_experts_implementation(running)
        with ablate(model, mask, "mean", reference=given):
            results.append(logits(model))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-4)
    model.set_experts_implementation("eager")
    with (
        pytest.raises(UserError, match="running as 'eager'"),
        ablate(model, mask, "mean", reference=given),
    ):
        logits(model)
    assert logits(model).isfinite().all()


def test_resample_takes_whole_positions_of_the_reference_and_is_repeatable():
    model, heard = build("llama"), []
    site = find_sites(model)[0]
    draws = (
        torch.arange(5.0)[:, None].expand(5, 80).contiguous()
    )  # position r holds the value r everywhere
    given = Reference(
        {}, {site.name: draws}, {site.name: torch.tensor(4)}
    )  # the fifth is not filled
    mask = {"dense": np.zeros((3, 80), bool)}
    mask["dense"][0, 10:30] = True

    def run(seed):
        with ablate(model, mask, "resample", reference=given, seed=seed):
            hook = site.down.register_forward_pre_hook(lambda m, a: heard.append(a[0]))
            logits(model)
            hook.remove()
        return heard.pop()

    h = run(0)[..., 10:30]  # [B, T, 20]
    assert (h == h[..., :1]).all()
    assert set(h[..., 0].unique().tolist()) == {0.0, 1.0, 2.0, 3.0}
    assert torch.equal(run(0), run(0))
    assert torch.equal(run(np.int64(7)), run(7))
    assert not torch.equal(run(0), run(1))


def test_a_hook_that_the_model_never_reaches_is_an_error():
    model = build("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: x  # as a fused kernel would: the children are never called
    with (
        pytest.raises(RuntimeError, match="nothing was edited in .*layers.1.mlp"),
        ablate(model, neuron_mask(model), "zero", how="hook"),
    ):
        logits(model)


KINDS = {
    "zero": lambda model, n: ablate(model, neuron_mask(model, 0.4, n), "zero"),
    "hook": lambda model, n: ablate(model, neuron_mask(model, 0.4, n), "zero", how="hook"),
    "transplant": lambda model, n: transplant(
        model, build("deepseek_v3", seed=1), neuron_mask(model, 0.4, n)
    ),
    "reroute": lambda model, n: ablate(model, expert_mask(model, [n]), "reroute"),
    "drop": lambda model, n: ablate(model, expert_mask(model, [n]), "drop"),
}


@pytest.mark.parametrize("last", KINDS)
@pytest.mark.parametrize("first", KINDS)
def test_contexts_that_close_in_another_order_leave_the_model_as_it_was(first, last):
    """What is still open acts as it does alone."""
    model = build("deepseek_v3")
    before, plain = copy.deepcopy(model.state_dict()), logits(model)
    forwards = [dict(vars(module)) for module in model.modules()]
    contexts = [KINDS[kind](model, n) for n, kind in enumerate((first, "zero", last))]
    with contexts[1], contexts[2]:
        expected = logits(model)
    contexts = [KINDS[kind](model, n) for n, kind in enumerate((first, "zero", last))]
    for context in contexts:
        context.__enter__()
    contexts[0].__exit__(None, None, None)
    assert torch.equal(logits(model), expected)
    for context in contexts[1:]:
        context.__exit__(None, None, None)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert [vars(module).keys() for module in model.modules()] == [one.keys() for one in forwards]
    assert torch.equal(logits(model), plain)
    assert hooks(model) == 0
    assert state(model) == ""


def test_gradients_flow_inside_an_ablation():
    model = build("llama")
    with ablate(model, neuron_mask(model), "zero"):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0


def test_parts_of_leaves_out_empty_layers_and_keeps_the_order():
    model = build("deepseek_v2")
    mask = neuron_mask(model)
    mask["shared"][0] = False
    named = [(site.family, site.layer) for site, _ in parts_of(find_sites(model), mask)]
    assert named == [("dense", 0), ("expert", 1), ("expert", 2), ("shared", 2)]


@pytest.mark.parametrize("family", ["apertus", "arcee", "jais2", "mpt", "nemotron"])
def test_the_up_projection_of_a_plain_mlp_is_its_gate(family):
    """Its neurons' weights can be compared and moved; the model comes back bit for bit."""
    host, donor = build(family), build(family, seed=1)
    before, plain = copy.deepcopy(host.state_dict()), logits(host)
    for site in find_sites(host):
        up, found = site.module.up_proj, neuron_weights(site)
        assert set(found) == {"gate", "down"} | ({"gate.bias"} if up.bias is not None else set())
        assert found["gate"].data_ptr() == up.weight.data_ptr()
    change = weight_change(host, donor)
    assert set(change) == {"dense"}
    assert change["dense"].shape == (3, find_sites(host)[0].width)
    assert np.isfinite(change["dense"]).all()
    assert (change["dense"] > 0).all()
    with transplant(host, donor, neuron_mask(host)):
        assert not torch.equal(logits(host), plain)
    assert all(torch.equal(p, before[name]) for name, p in host.state_dict().items())
    assert torch.equal(logits(host), plain)


def test_an_up_projection_beside_another_is_not_taken_for_the_gate():
    model = build("llama")
    model.model.layers[0].mlp.gate_proj = nn.Linear(48, 40, bias=False)
    with pytest.raises(UserError, match="no projection of 80 or 160 rows"):
        neuron_weights(find_sites(model)[0])
