"""Several ablated sets in one pass, against each of them in a pass of its own."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.capture import budget
from helpers.capture.bank import is_bank
from helpers.capture.beginnings import split
from helpers.capture.interventions import Places, ablate
from helpers.capture.losses import proven_head, sequence_losses
from helpers.capture.tokens import encode, padded
from helpers.record import UserError
from helpers.study import evaluate
from helpers.study import study as study_room
from helpers.study.evaluate import WHERE, ablation_matrix, gain_lost
from helpers.study.scores import reference_activations
from helpers.study.study import Study
from tests import zoo
from tests.test_beginnings import HEAD, sequences
from tests.test_evaluate import ROWS, study_of
from tests.test_interventions import expert_mask, neuron_mask

torch.set_num_threads(1)
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TEXTS = ["add one", "sum 12, 7", "name the dog"]


def three(model):
    """Masks of three sizes; the second leaves whole layers as they are."""
    found = [neuron_mask(model, share, seed) for seed, share in enumerate((0.1, 0.5, 0.3))]
    for part in found[1].values():
        part[0] = False
    return found


def typical(model):
    return reference_activations(model, zoo.tokenizer(), TEXTS)


def with_budget(model, tokens):
    study = study_of(model)
    profile = SimpleNamespace(**vars(study.profile) | {"batch_tokens": tokens})
    return Study(profile, study.pair, study.rows, {"tuned": study.model()})


def one_by_one(model, masks, operator, encoded, **options):
    """Losses [K, I]: each set in a context, each sequence in a pass of its own."""
    found = []
    for mask in masks:
        with torch.no_grad(), ablate(model, mask, operator, **options):
            losses = [sequence_losses(model, padded(encoded, [i])) for i in range(len(encoded))]
        found.append(torch.cat(losses).numpy())
    return np.stack(found)


@pytest.mark.parametrize("operator", ["zero", "mean"])
@pytest.mark.parametrize("name", [*zoo.ZOO, *zoo.MORE])
def test_sets_that_are_read_together_cost_what_each_costs_alone(name, operator):
    model, encoded = zoo.build(name), sequences()
    options = {} if operator == "zero" else {"reference": typical(model)}
    proven_head(model)
    expected = one_by_one(model, three(model), operator, encoded, **options)
    found = evaluate._under(model, encoded, three(model), operator, WHERE[0], 90, **options)
    np.testing.assert_allclose(found, expected, rtol=3e-5)
    assert all(np.abs(a - b).max() > 1e-4 for a, b in pairwise(expected))


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_so_they_do_at_every_place_and_whatever_stands_together(name, where):
    study = study_of(zoo.build(name))
    masks = dict(enumerate(three(study.model()[0])))
    together = ablation_matrix(study, masks, "zero", where=where, allow_inert=True)
    for n, mask in masks.items():
        alone = ablation_matrix(
            study_of(study.model()[0]), {n: mask}, "zero", where=where, allow_inert=True
        )
        np.testing.assert_allclose(together[n], alone[n], atol=2e-6)
        assert where == "prompt" or alone[n].abs().max() > 1e-3


@pytest.fixture
def passes(monkeypatch):
    """(sets, tokens) of each measurement of losses."""
    found, measure = [], evaluate._nll

    def seen(model, read, *options):
        found.append((read.copies, read.tokens))
        return measure(model, read, *options)

    monkeypatch.setattr(evaluate, "_nll", seen)
    return found


def test_as_many_sets_share_a_pass_as_its_budget_holds(passes):
    study = study_of(zoo.build("llama"))
    model = study.model()[0]
    masks = {n: neuron_mask(model, 0.2, n) for n in range(5)}
    encoded, sizes = study.encoded("reference"), []
    for tokens in (30, 350, 500, 4096):
        most = max(1, tokens // split(model, encoded, tokens).tokens)
        passes.clear()
        ablation_matrix(with_budget(model, tokens), masks, "zero")
        found = [copies for copies, _ in passes[1:]]
        assert found == [min(most, 5 - i) for i in range(0, 5, most)]
        assert all(copies == 1 or read <= tokens for copies, read in passes[1:])
        sizes.append(found)
    assert sizes[0] == [1] * 5
    assert sizes[-1] == [5]
    assert len({tuple(size) for size in sizes}) >= 3


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_instruction_gain_is_lost_alike(name):
    model = zoo.build(name)
    rows = ROWS.assign(category="QA")
    masks = dict(enumerate(three(model)))
    together = gain_lost(study_of(model, rows), masks)
    assert together.shape == (len(rows), 3)
    for n, mask in masks.items():
        alone = gain_lost(study_of(model, rows), {n: mask})
        np.testing.assert_allclose(together[:, n], alone[:, 0], atol=5e-6)
    assert np.abs(together).max() > 1e-3


def test_the_ledger_knows_which_set_each_sequence_was_under(tmp_path, monkeypatch):
    model, encoded = zoo.build("llama"), sequences()
    proven_head(model), split(model, encoded)
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "tokens.jsonl"))
    masks = three(model)
    for some in (masks, masks[::-1]):
        evaluate._under(model, encoded, some, "zero", WHERE[0], 4096)
    lines = budget.lines_of(tmp_path / "tokens.jsonl")
    beginnings = [line for line in lines if set(line["lengths"]) == {len(HEAD)}]
    rest = [text for line in lines if line not in beginnings for text in line["texts"]]
    assert [len(set(line["texts"])) for line in beginnings] == [3, 3]
    assert (len(rest), len(set(rest))) == (2 * 3 * len(encoded), 3 * len(encoded))
    spent = budget.spent(lines)["losses",]
    assert spent["tokens"] == 2 * spent["minimum"]
    assert all(line["altered"] for line in lines)


def test_what_cannot_stand_in_one_pass_is_refused():
    dense, sparse = zoo.build("llama"), zoo.build("qwen2_moe")
    mask, whole = neuron_mask(dense), expert_mask(sparse)
    refused = [
        (dense, [mask, mask], "zero", {}),
        (dense, [mask], "resample", {"reference": typical(dense), "where": Places()}),
        (sparse, [whole, whole], "drop", {"where": Places()}),
        (dense, [], "zero", {"where": Places()}),
    ]
    for model, masks, operator, options in refused:
        with (
            pytest.raises(UserError, match="Several sets at once"),
            ablate(model, masks, operator, **options),
        ):
            pass
    with (
        pytest.raises(UserError, match="cannot act"),
        ablate(dense, [mask, mask], "zero", how="weights", where=Places()),
    ):
        pass


def test_half_precision_and_edits_of_weights_are_read_one_set_at_a_time(passes):
    model, half = zoo.build("llama"), zoo.build("llama").bfloat16()
    masks = dict(enumerate(three(model)))
    ablation_matrix(with_budget(model, 4096), masks, "zero")
    assert [sets for sets, _ in passes] == [1, 3]
    for other, options in ((model, {"how": "weights"}), (half, {})):
        passes.clear()
        ablation_matrix(with_budget(other, 4096), masks, "zero", **options)
        assert [sets for sets, _ in passes] == [1] * 4


def test_what_is_compared_is_read_alike(monkeypatch):
    """Under `resample` all is read whole, the intact rows too: half precision rounds otherwise."""
    study, seen, cut = study_of(zoo.build("llama")), [], evaluate.split
    reference = {"reference": typical(study.model()[0])}

    def kept(*options, **named):
        seen.append(cut(*options, **named).beginning is not None)
        return cut(*options, **named)

    monkeypatch.setattr(evaluate, "split", kept)
    monkeypatch.setattr(study_room.Study, "encoded", lambda *_, **__: sequences())
    mask = {0: three(study.model()[0])[0]}
    with_rows = study.take(range(len(sequences())))
    ablation_matrix(with_rows, mask, "zero")
    assert set(seen) == {True}
    seen.clear()
    ablation_matrix(with_rows, mask, "resample", **reference)
    assert set(seen) == {False}


def test_neurons_of_experts_stand_together_though_whole_experts_do_not(passes):
    model = zoo.build("qwen2_moe")
    neurons = {n: neuron_mask(model, 0.4, n) for n in range(3)}
    experts = {n: expert_mask(model, [n, n + 1]) for n in range(3)}
    for masks, operator, copies in ((neurons, "zero", [3]), (experts, "drop", [1] * 3)):
        passes.clear()
        ablation_matrix(with_budget(model, 4096), masks, operator)
        assert [sets for sets, _ in passes[1:]] == copies
    assert gain_lost(study_of(model, ROWS.assign(category="QA")), {}).shape == (len(ROWS), 0)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=GPU)])
@pytest.mark.parametrize("running", ["grouped_mm", "batched_mm"])
def test_neurons_of_routed_experts_are_zero_where_a_loop_over_tokens_sets_them_so(running, device):
    model, rng = zoo.build("qwen2_moe").to(device), np.random.default_rng(0)
    model.set_experts_implementation(running)
    ids = torch.tensor(rng.integers(4, 40, (3, 7)), device=device)
    masks = [{"expert": neuron_mask(model, 0.5, n)["expert"]} for n in range(2)]
    where = Places(torch.tensor(rng.random((3, 7)) < 0.5), torch.tensor([1, 0, 1]))
    with torch.no_grad(), ablate(model, masks, "zero", where=where):
        found = model(ids).logits

    def loop(layer, bank):
        def forward(hidden, index, weights):
            out = torch.zeros_like(hidden)
            for t, b in enumerate(torch.arange(3).repeat_interleave(7).tolist()):
                for e, weight in zip(index[t].tolist(), weights[t], strict=True):
                    gate, up = (bank.gate_up_proj[e] @ hidden[t]).chunk(2)
                    h = torch.nn.functional.silu(gate) * up
                    if where.mask[b, t % 7]:
                        h[torch.tensor(masks[where.sets[b]]["expert"][layer, e])] = 0
                    out[t] += weight * (bank.down_proj[e] @ h)
            return out

        return forward

    for layer, bank in enumerate(filter(is_bank, model.modules())):
        bank.forward = loop(layer, bank)
    with torch.no_grad():
        torch.testing.assert_close(found, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_places_that_nobody_filled_are_refused():
    model, ids = zoo.build("llama"), torch.arange(4, 9)[None]
    full = torch.ones(1, 5, dtype=torch.bool)
    for masks, where in ((three(model), Places(full)), (three(model)[0], Places())):
        with (
            pytest.raises(UserError, match="Fill it before each pass"),
            ablate(model, masks, "zero", where=where),
        ):
            model(ids)


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
@pytest.mark.parametrize(
    ("mask", "sets"),
    [((2, 8), [0, 1]), ((2, 4), [0, 1]), ((3, 6), [0, 1]), ((2, 6), [0, 1, 1]), ((2, 6), [0])],
)
def test_places_of_another_pass_are_refused(name, mask, sets):
    model, ids = zoo.build(name), torch.arange(4, 16).view(2, 6)
    where = Places(torch.ones(mask, dtype=torch.bool), torch.tensor(sets))
    with (
        pytest.raises(UserError, match="where the model reads 12 tokens"),
        ablate(model, three(model), "zero", where=where),
    ):
        model(ids)


def test_whole_experts_have_no_places():
    study = study_of(zoo.build("qwen2_moe"))
    masks = {0: expert_mask(study.model()[0])}
    with pytest.raises(UserError, match="whole experts at the places"):
        ablation_matrix(study, masks, "drop", where="prompt")


def test_sets_in_experts_that_do_not_run_fused_are_read_one_at_a_time(passes):
    model = zoo.build("qwen2_moe")
    masks = {n: {"expert": neuron_mask(model, 0.4, n)["expert"]} for n in range(3)}
    together = ablation_matrix(with_budget(model, 4096), masks, "zero")
    model.set_experts_implementation("eager")
    passes.clear()
    alone = ablation_matrix(with_budget(model, 4096), masks, "zero")
    assert [sets for sets, _ in passes[1:]] == [1] * 3
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_contexts_of_several_sets_nest_and_leave_the_model_as_it_was():
    model = zoo.build("llama")
    ids = torch.tensor(encode(zoo.tokenizer(), TEXTS[:1])[0].ids)[None].repeat(2, 1)
    masks = three(model)
    where = Places(torch.ones_like(ids, dtype=torch.bool), torch.tensor([0, 1]))
    other = Places(where.mask, torch.tensor([1, 0]))
    with torch.no_grad():
        before = model(ids).logits
        with (
            ablate(model, masks[:2], "zero", where=where),
            ablate(model, masks[1:], "zero", where=other),
        ):
            both = model(ids).logits
        for row, pair in enumerate(((0, 2), (1, 1))):
            with ablate(model, masks[pair[0]], "zero"), ablate(model, masks[pair[1]], "zero"):
                alone = model(ids[:1]).logits[0]
            torch.testing.assert_close(both[row], alone, rtol=1e-4, atol=1e-5)
        assert torch.equal(model(ids).logits, before)
