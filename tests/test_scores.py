"""Contribution against what ablation takes away, attribution against finite differences, means
against a plain loop, and a planted circuit that the right scores find and frequency cannot.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from helpers.analysis.controls import layer_matched
from helpers.capture.interventions import ablate, columns
from helpers.capture.sites import find_sites
from helpers.capture.tokens import encode
from helpers.config import Pair
from helpers.record import UserError
from helpers.study import planted as circuits
from helpers.study import scores
from helpers.study.evaluate import ablation_matrix, reference_nll
from helpers.study.reading import encode_rows
from helpers.study.scores import attribution, contribution, reference_activations
from helpers.study.study import Study
from tests.test_evaluate import PROFILE, ROWS, TEXTS, TOKENIZER, study_of
from tests.test_interventions import hooks
from tests.zoo import DENSE, build

torch.set_num_threads(1)
STEP = 0.03  # of the finite differences, in float32


def read(positions, rows=ROWS, template=PROFILE.template):
    return encode_rows(TOKENIZER, rows, template, positions)


def blame(model, positions="all", rows=ROWS):
    return attribution(model, read("reference", rows), read(positions, rows), PROFILE.batch_tokens)


FAMILIES = [
    "llama",
    "gpt2",
    "gemma2",
    "phi3",
    "opt",
    "bloom",
    "qwen2_moe",
    "deepseek_v3",
    "gpt_oss",
    "granitemoeshared",
    "phimoe",
]


def some_neurons(model, sites, seed=0):
    """Three neurons of each site: (site, place in its family, () or (expert,), neuron)."""
    rng, turn = np.random.default_rng(seed), {}
    for site in sites:
        place = turn[site.family] = turn.get(site.family, -1) + 1
        for _ in range(3):
            expert = (int(rng.integers(site.experts)),) if site.family == "expert" else ()
            yield site, place, expert, int(rng.integers(site.width))


@pytest.mark.parametrize("family", FAMILIES)
def test_contribution_is_the_length_of_what_the_neuron_adds_to_its_mlps_output(family):
    model = build(family)
    sites = find_sites(model)
    shapes = {
        f: [(s.experts, s.width) if f == "expert" else (s.width,) for s in sites if s.family == f]
        for f in {s.family for s in sites}
    }
    for positions in ("prompt", "response"):
        found = contribution(model, read(positions), PROFILE.batch_tokens)
        responses = list(ROWS["reference"]) if positions == "response" else None
        texts = [
            t + ("\n" + i if i else "")
            for t, i in zip(ROWS["instruction"], ROWS["input"], strict=True)
        ]
        encoded = encode(TOKENIZER, texts, template=PROFILE.template, responses=responses)
        for site, place, e, n in some_neurons(model, sites):
            mask = {
                site.family: np.zeros((len(shapes[site.family]), *shapes[site.family][0]), bool)
            }
            mask[site.family][(place, *e, n)] = True
            module = site.module if site.family == "expert" else site.down
            for row in (0, 2):  # one row at a time, without padding
                outs = []

                def listen(module, args, out, outs=outs):
                    outs.append(out.reshape(-1, out.shape[-1]))

                hook = module.register_forward_hook(listen)
                ids = torch.tensor([encoded[row].ids])
                with torch.no_grad():
                    model(input_ids=ids)
                    with ablate(model, mask, "zero"):
                        model(input_ids=ids)
                hook.remove()
                lost = (outs[0] - outs[1]).norm(dim=-1)[torch.tensor(encoded[row].counted)].mean()
                assert found[site.family][(row, place, *e, n)] == pytest.approx(
                    float(lost), rel=2e-3, abs=2e-6
                )
    assert {f: a.shape for f, a in found.items()} == {
        f: (7, len(s), *s[0]) for f, s in shapes.items()
    }
    assert all((a >= 0).all() and a.any() and a.dtype == np.float32 for a in found.values())
    assert hooks(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_attribution_is_the_slope_of_the_loss_as_the_neuron_is_turned_down(family):
    model = build(family)
    found, close = blame(model), []
    for site, place, e, n in some_neurons(model, find_sites(model), seed=1):
        column, around = columns(site)[e][n], []
        whole = column.clone()
        for factor in (1 - STEP, 1 + STEP):
            column.copy_(whole * factor)
            around.append(reference_nll(study_of(model)))
            column.copy_(whole)
        slope = (around[0] - around[1]) / (2 * STEP)  # [I]
        close += np.isclose(
            found[site.family][(slice(None), place, *e, n)], slope, rtol=0.01, atol=2e-5
        ).tolist()
    smooth = (
        family in DENSE and family != "opt"
    )  # where the step moves a token to another expert the loss jumps,
    assert all(close) if smooth else np.mean(close) > 0.9  # and OPT's ReLU has corners
    assert len(close) >= 3 * 7 * len(find_sites(model))
    assert all(p.grad is None for p in model.parameters())
    assert hooks(model) == 0


def test_attribution_of_a_frozen_model_is_the_same():
    model, rows = build("llama"), ROWS.iloc[:2]
    free = blame(model, rows=rows)
    frozen = blame(model.requires_grad_(False), rows=rows)
    np.testing.assert_allclose(free["dense"], frozen["dense"], rtol=1e-4, atol=1e-7)


def test_attribution_can_be_kept_to_the_prompts_or_the_references_positions():
    model = build("llama")
    row = ROWS.iloc[[2]]
    site = find_sites(model)[1]
    parts = {p: blame(model, p, row) for p in ("prompt", "response")}
    start, length = len("say: "), len(row["instruction"].item())
    template = {
        "prompt": range(start, start + length),
        "response": range(start + length + 1, start + length + 8),
    }
    for positions, where in template.items():
        around = []
        for factor in (1 - STEP, 1 + STEP):

            def turn_down(module, args, factor=factor, where=where):
                h = args[0].clone()
                h[:, list(where), 7] *= factor
                return h

            hook = site.down.register_forward_pre_hook(turn_down)
            around.append(reference_nll(study_of(model, row))[0])
            hook.remove()
        slope = (around[0] - around[1]) / (2 * STEP)
        assert parts[positions]["dense"][0, 1, 7] == pytest.approx(slope, rel=0.01, abs=2e-5)
    with pytest.raises(UserError, match="positions is 'answer'"):
        read("answer", row)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe", "gpt_oss"])
def test_reference_means_and_draws_are_those_of_a_plain_loop(family):
    model, rows = build(family), {}
    model.set_experts_implementation("batched_mm") if family in ("qwen2_moe", "gpt_oss") else None
    sites, texts = find_sites(model), TEXTS
    for site in sites:  # all h of all tokens, one text at a time, by another way in
        if site.family == "expert":
            seen, gate = {}, site.module._apply_gate
            site.module.register_forward_pre_hook(
                lambda m, a, seen=seen: seen.update(ids=a[1].reshape(-1).tolist())
            )

            def listen(gate_up, gate=gate, seen=seen, name=site.name):
                h = gate(gate_up)
                for e, values in zip(seen["ids"], h, strict=True):
                    rows.setdefault((name, e), []).append(values)
                return h

            site.module._apply_gate = listen
        else:
            site.down.register_forward_pre_hook(
                lambda m, a, n=site.name: rows.setdefault((n, None), []).extend(
                    a[0].reshape(-1, a[0].shape[-1])
                )
            )
    with torch.no_grad():
        [model(input_ids=torch.tensor([TOKENIZER(t)["input_ids"]])) for t in texts]
    expected = {key: torch.stack(values) for key, values in rows.items()}
    found = reference_activations(build(family), TOKENIZER, texts, batch_tokens=120, draws=16)
    for (name, e), values in expected.items():
        at = () if e is None else (e,)
        torch.testing.assert_close(found.mean[name][at], values.mean(0), atol=1e-5, rtol=1e-4)
        assert int(found.filled[name][at]) == min(16, len(values))
        drawn = found.draws[name][at][: int(found.filled[name][at])]
        apart = torch.cdist(drawn, values, compute_mode="donot_use_mm_for_euclid_dist").numpy()
        own = linear_sum_assignment(apart)  # each a position of its own, though two may be alike
        assert len(own[0]) == len(drawn)
        assert apart[own].max() < 1e-3
    again = reference_activations(build(family), TOKENIZER, texts, batch_tokens=120, draws=16)
    assert all(torch.equal(found.draws[n], again.draws[n]) for n in found.draws)


@pytest.mark.parametrize("texts", ["add one", {"add one": 1}, [], ["add one", ""], None])
def test_reference_texts_that_are_no_list_of_texts_are_refused(texts):
    with pytest.raises(UserError, match="expected a list|text 1 is ''|list of texts is empty"):
        reference_activations(build("llama"), TOKENIZER, texts)


@pytest.mark.parametrize(
    "given", [{"draws": 0}, {"draws": 2.0}, {"seed": -1}, {"seed": 2**70}, {"batch_tokens": 0}]
)
def test_draws_and_seeds_that_are_none_are_refused(given):
    reference_activations(build("llama"), TOKENIZER, TEXTS, draws=np.int64(2), seed=np.int64(3))
    with pytest.raises(UserError, match=f"{next(iter(given))} is .*, expected a whole number"):
        reference_activations(build("llama"), TOKENIZER, TEXTS, **given)


def planted():
    """A Llama in which two neurons know that "b" follows "a", and two others that "d" follows "c".

    No attention; each token reads only itself. Twenty neurons of a layer fire at every token and
    write next to nothing. Returns (model, {circuit: bool [3, 80]}).
    """
    model, where = build("llama"), {"ab": (1, [4, 9]), "cd": (2, [4, 70])}
    words = TOKENIZER.get_vocab()
    with torch.no_grad():
        embed, head = model.get_input_embeddings().weight, model.lm_head.weight
        embed.copy_(torch.eye(101, 48))  # 44 words, each its own direction; 44 to 47 are free
        head.zero_()
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.mul_(1e-3)
            layer.mlp.gate_proj.weight[20:40].abs_().add_(0.2)  # always on
        for free, (pair, (number, neurons)) in zip((45, 46), where.items(), strict=True):
            mlp = model.model.layers[number].mlp
            mlp.gate_proj.weight[neurons] = mlp.up_proj.weight[neurons] = 0
            mlp.gate_proj.weight[neurons] -= 0.5
            for w in (mlp.gate_proj.weight, mlp.up_proj.weight):
                w[neurons, words[pair[0]]] = 1.0
            mlp.down_proj.weight[:, neurons] = 0
            mlp.down_proj.weight[free, neurons] = 0.0125  # h is about 40: far from saturation
            head[words[pair[1]], free] = 1.2
    masks = {pair: np.zeros((3, 80), bool) for pair in where}
    for pair, (number, neurons) in where.items():
        masks[pair][number, neurons] = True
    return model, masks


def test_a_planted_circuit_is_found_by_its_effect_and_missed_by_frequency():
    model, masks = planted()
    rows = pd.DataFrame(
        {
            "id": list("0123"),
            "instruction": ["sum it", "name one", "go on", "what now"],
            "input": "",
            "reference": ["ab", "ab", "cd", "cd"],
            "category": ["ab", "ab", "cd", "cd"],
        }
    )
    profile, read_here = (
        SimpleNamespace(template="{instruction}\n", batch_tokens=120, chat=False),
        lambda positions: read(positions, rows, "{instruction}\n"),
    )
    study = Study(profile, Pair("pair", "none", "none"), rows, {"tuned": (model, TOKENIZER)})
    rng = np.random.default_rng(0)
    sets = {pair: {"dense": mask} for pair, mask in masks.items()}
    known = {"dense": masks["ab"] | masks["cd"]}
    sets |= {f"random {i}": layer_matched(sets["ab"], rng, exclude=known) for i in range(5)}
    table = ablation_matrix(study, sets, "zero", eos=False).to_numpy()
    assert (table[:2, 0] > 1.5).all()
    assert (table[2:, 1] > 1.5).all()
    assert abs(table[:2, 1:]).max() < 0.01
    assert abs(table[2:, [0, *range(2, 7)]]).max() < 0.01

    written = contribution(model, read_here("response"))["dense"]  # [I, 3, 80]
    blamed = attribution(model, read_here("response"), read_here("all"))["dense"]
    own, rest = np.array([True, True, False, False]), np.array([False, False, True, True])
    for score in (written, blamed):
        for pair, mine, other in (("ab", own, rest), ("cd", rest, own)):
            contrast = score[mine].mean(0) - score[other].mean(0)
            assert set(np.flatnonzero(contrast >= np.sort(contrast, axis=None)[-2])) == set(
                np.flatnonzero(masks[pair])
            )

    fired = [np.zeros(80) for _ in range(3)]  # the paper's frequency, over the prompts' tokens
    for layer, counts in zip(model.model.layers, fired, strict=True):

        def add(module, args, out, counts=counts):
            counts += (out > 0).sum((0, 1)).numpy()

        layer.mlp.act_fn.register_forward_hook(add)
    with torch.no_grad():
        [
            model(input_ids=torch.tensor([TOKENIZER(t + "\n")["input_ids"]]))
            for t in rows["instruction"]
        ]
    top = np.argsort(-np.concatenate(fired), kind="stable")[:60]
    assert not (masks["ab"] | masks["cd"]).reshape(-1)[top].any()


def test_scores_of_rows_are_remembered_where_they_are_small(monkeypatch):
    study = circuits.study()
    model, size = study.model()[0], study.profile.batch_tokens
    for positions in ("prompt", "response"):
        expected = contribution(model, study.encoded(positions), size)["dense"]
        found = scores.written(study, positions)
        np.testing.assert_array_equal(found, expected.reshape(len(expected), -1))
        assert scores.written(study, positions) is found
    monkeypatch.setattr(scores, "REMEMBERED", found.nbytes - 1)
    large = circuits.study()
    again = scores.written(large)
    assert scores.written(large) is not again
