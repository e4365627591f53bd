"""A beginning that is read once for all, against sequences that are read whole."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.capture import beginnings, budget
from helpers.capture.beginnings import FEW, LEAST, Begun, begin, reads_apart, shared, split
from helpers.capture.interventions import Places, ablate
from helpers.capture.losses import proven_head, sequence_losses
from helpers.capture.tokens import Encoded, padded
from helpers.study import evaluate
from helpers.study.evaluate import nll
from helpers.study.scores import reference_activations
from tests import zoo
from tests.test_interventions import neuron_mask

torch.set_num_threads(1)
HEAD = tuple(range(5, 5 + LEAST + 2))
SIZES = (9, 3, 14, 3, 6)
EVERY = [*zoo.ZOO, *zoo.MORE]


def sequences(head=HEAD, sizes=SIZES):
    """Encoded sequences that begin with `head`; the last two tokens of each count."""
    draw = np.random.default_rng(3)
    tails = [tuple(draw.integers(4, 40, n).tolist()) for n in sizes]
    return [
        Encoded(head + tail, (False,) * (len(head) + len(tail) - 2) + (True, True))
        for tail in tails
    ]


def alone(model, encoded):
    """The loss of each sequence, read whole and on its own."""
    with torch.no_grad():
        return np.array([float(sequence_losses(model, padded(encoded, [i]))) for i in range(5)])


@pytest.mark.parametrize("name", EVERY)
def test_losses_are_those_of_sequences_read_whole(name):
    model, encoded = zoo.build(name), sequences()
    expected = alone(model, encoded)
    np.testing.assert_allclose(nll(model, encoded, 40), expected, rtol=2e-5)
    mask = neuron_mask(model)
    with ablate(model, mask, "zero"):
        ablated = alone(model, encoded)
        np.testing.assert_allclose(nll(model, encoded, 40), ablated, rtol=2e-5)
    assert not np.allclose(ablated, expected, rtol=1e-4)


def test_a_layer_that_keeps_a_running_state_is_read_whole():
    assert {name for name in EVERY if not reads_apart(zoo.build(name))} == {"minimax"}


def test_the_beginning_ends_before_the_token_that_says_the_first_counted_one():
    ids, no = (1, 2, 3, 4, 5), (False,)
    one = Encoded(ids, no * 4 + (True,))
    assert shared([one, one]) == 3
    assert shared([one, Encoded((1, 2, 9, 4, 5), no * 4 + (True,))]) == 2
    assert shared([one, Encoded(ids, no * 2 + (True,) * 3)]) == 1
    assert shared([one, Encoded(ids, (True,) * 5)]) == 0
    assert shared([one, Encoded((1, 2), no * 2)]) == 1
    at = [Encoded(ids, one.counted, {"where": (True, True, i > 0, True, True)}) for i in range(2)]
    assert shared(at) == 2


def test_a_short_beginning_or_few_sequences_are_read_whole():
    model, encoded = zoo.build("llama"), sequences()
    read = split(model, encoded, 40)
    assert read.beginning.input_ids.tolist() == [list(HEAD)]
    tokens = sum(int(batch.attention_mask.sum()) for batch in read.batches)
    assert tokens == sum(SIZES)
    assert sorted(row for batch in read.batches for row in batch.rows) == list(range(5))
    for some in (sequences(HEAD[: LEAST - 1]), encoded[: FEW - 1]):
        whole = split(model, some, 40)
        assert whole.beginning is None
        assert sum(int(b.attention_mask.sum()) for b in whole.batches) == sum(
            len(e.ids) for e in some
        )
    assert split(model, encoded, 40, apart=False).beginning is None


def test_any_number_of_passes_leave_a_beginning_as_it_is():
    model, encoded = zoo.build("llama"), sequences()
    read = split(model, encoded, 40)
    begun = begin(model, read.beginning)
    before = [layer.keys.clone() for layer in begun.layers]
    assert len(read.batches) > 1
    with torch.no_grad():
        one, two = ([sequence_losses(model, b, begun=begun) for b in read.batches] for _ in "ab")
    assert torch.equal(torch.cat(one), torch.cat(two))
    assert all(torch.equal(a, layer.keys) for a, layer in zip(before, begun.layers, strict=True))
    assert begun.get_seq_length() == len(HEAD)


@pytest.mark.parametrize("where", evaluate.WHERE[1:])
def test_an_ablation_acts_at_its_places_of_the_beginning_too(where):
    model, encoded = zoo.build("llama"), sequences()
    prompts = [
        Encoded(e.ids[:-2], (False,) * LEAST + (True,) * (len(e.ids) - LEAST - 2)) for e in encoded
    ]
    study = SimpleNamespace(encoded=lambda *_: prompts)
    at = evaluate._marked(study, "tuned", encoded, where)
    found, mask = [], neuron_mask(model)
    proven_head(model)
    for apart in (True, False):
        places, read = Places(), split(model, at, 40, apart)
        with ablate(model, mask, "zero", where=places):
            found.append(evaluate._nll(model, read, places))
    assert split(model, at, 40).beginning is not None
    np.testing.assert_allclose(found[0], found[1], rtol=2e-5)


def test_keys_of_a_batch_are_within_the_budget_too():
    model = zoo.build("llama")
    encoded = sequences(HEAD * 3, [4] * 40)
    budget_of = 10 * (3 * len(HEAD) + 4)
    assert [len(batch.rows) for batch in split(model, encoded, budget_of).batches] == [10] * 4


def test_a_model_in_training_mode_or_under_resampling_reads_whole():
    model, encoded = zoo.build("llama"), sequences()
    assert split(model.train(), encoded, 40).beginning is None
    assert split(model.eval(), encoded, 40).beginning is not None
    reference = reference_activations(model, zoo.tokenizer(), ["add one", "sum 12, 7"])
    with ablate(model, neuron_mask(model), "resample", reference=reference):
        assert split(model, encoded, 40).beginning is None
    assert split(model, encoded, 40).beginning is not None


def test_the_ledger_knows_a_text_by_all_of_it_and_counts_what_was_read(tmp_path, monkeypatch):
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "tokens.jsonl"))
    model, encoded = zoo.build("llama"), sequences()
    nll(model, encoded, 4000)
    alone(model, encoded)
    lines = [x for x in budget.lines_of(tmp_path / "tokens.jsonl") if x["purpose"] == "losses"]
    first, rest, whole = lines[0], lines[1], lines[2:]
    assert (first["lengths"], sorted(rest["lengths"])) == ([len(HEAD)], sorted(SIZES))
    assert sorted(rest["texts"]) == sorted(text for line in whole for text in line["texts"])
    spent = budget.spent(lines)["losses",]
    assert spent["minimum"] == len(HEAD) + sum(SIZES)
    assert spent["tokens"] == spent["minimum"] + sum(SIZES) + 5 * len(HEAD)


def test_sequences_of_other_groups_share_nothing():
    one, two = (Encoded((1,) * 40, (False,) * 40, {name: (True,) * 40}) for name in "ab")
    assert shared([one, two]) == 0


def test_positions_that_stretch_with_the_length_of_a_pass_are_read_whole():
    model = zoo.build("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    assert not reads_apart(model)


def test_a_cache_that_cannot_be_shared_means_reading_whole(monkeypatch):
    def refused(*_):
        raise NotImplementedError

    monkeypatch.setattr(Begun, "update", refused)
    model, encoded = zoo.build("llama"), sequences()
    assert split(model, encoded, 40).beginning is None
    np.testing.assert_allclose(nll(model, encoded, 40), alone(model, encoded), rtol=2e-5)


def test_a_beginning_that_a_pass_alters_is_not_taken(monkeypatch):
    update = Begun.update

    def altering(self, keys, values, layer, *options):
        found = update(self, keys, values, layer, *options)
        self.layers[layer].keys = self.layers[layer].keys * 1.01
        return found

    monkeypatch.setattr(Begun, "update", altering)
    assert not reads_apart(zoo.build("llama"))


def test_a_beginning_that_gives_something_else_is_not_taken(monkeypatch):
    behind = beginnings.behind

    def shifted(model, ids, mask, begun=None):
        return behind(model, ids, mask, begun) + (0.1 if begun is not None else 0)

    monkeypatch.setattr(beginnings, "behind", shifted)
    assert not reads_apart(zoo.build("llama"))
