"""What models have read: the ledger against a hook that sees every forward pass, and the least by
hand.
"""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from helpers.capture import budget, losses
from helpers.capture.count import count_groups
from helpers.capture.interventions import ablate
from helpers.capture.tokens import Encoded, encode, encode_groups, token_batches
from helpers.record import DamagedFile, UserError
from helpers.study.answers import continuations
from helpers.study.evaluate import ablation_matrix, nll
from helpers.study.scores import attribution, contribution
from tests import zoo
from tests.test_evaluate import study_of
from tests.test_interventions import neuron_mask

torch.set_num_threads(1)
TEXTS = ["add one", "a fish", "sum 12, 7 and what is behind them", "go on"]


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "x.tokens.jsonl"))
    return tmp_path / "x.tokens.jsonl"


def passes_seen(model, run):
    """Cells of every pass through the trunk while `run` runs, padding included."""
    seen = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    run()
    hook.remove()
    return seen


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_every_pass_stands_in_the_ledger_and_leaves_its_result_as_it_was(
    family, ledger, monkeypatch
):
    model, tokenizer = zoo.build(family), zoo.tokenizer()
    encoded, groups = encode(tokenizer, TEXTS), encode_groups(tokenizer, TEXTS)
    jobs = {
        "counts": lambda: count_groups(model, groups, 64)["all"].arrays(),
        "losses": lambda: {"nll": nll(model, encoded, 64)},
        "scores": lambda: contribution(model, encoded, 64) | attribution(model, encoded, encoded),
    }
    for purpose, job in jobs.items():
        job()  # proofs of a model that is seen for the first time are no part of it
        ledger.unlink(missing_ok=True)
        found = []
        seen = passes_seen(model, lambda job=job, found=found: found.append(job()))
        lines = budget.lines_of(ledger)
        assert [line["padded"] for line in lines] == seen
        assert {line["purpose"] for line in lines} == {purpose}
        with monkeypatch.context() as without:
            without.delenv(budget.LEDGER)
            for name, value in job().items():
                assert (value == found[0][name]).all()
        assert len(budget.lines_of(ledger)) == len(lines)


def test_an_answer_is_its_prompt_and_what_was_generated(ledger):
    model = zoo.build("llama")
    encoded = encode(zoo.tokenizer(), TEXTS)
    answers = continuations(model, encoded, max_new_tokens=5, batch_tokens=200)
    [row] = budget.spent(budget.lines_of(ledger)).values()
    assert row["tokens"] == sum(len(e.ids) for e in encoded) + sum(map(len, answers))
    assert row["ratio"] == 1


def test_the_minimum_is_each_text_once_for_each_state_of_the_model(ledger):
    """Two sets and no set: each row three times is the least. The same again is read by another
    study of the model, which remembers nothing, and costs twice that.
    """
    study = study_of(zoo.build("llama"))
    model = study.model()[0]
    budget.named(model, "pair tuned")
    masks = {"small": neuron_mask(model, 0.05), "large": neuron_mask(model, 0.5)}
    ablation_matrix(study, masks, "zero")
    once = sum(len(e.ids) for e in study.encoded("reference"))
    lines = budget.lines_of(ledger)
    assert {line["model"] for line in lines} == {"pair tuned"}
    found = budget.spent(lines, ())[()]
    assert (found["tokens"], found["minimum"]) == (3 * once, 3 * once)
    ablation_matrix(study_of(model), masks, "zero")
    again = budget.spent(budget.lines_of(ledger), ())[()]
    assert (again["tokens"], again["minimum"], again["ratio"]) == (6 * once, 3 * once, 2)
    ablation_matrix(study, masks, "mean", reference=reference(model))
    other = budget.spent(budget.lines_of(ledger), ())[()]
    assert other["minimum"] == 5 * once  # another operator, another model; intact it is the same


def test_what_a_set_costs_is_remembered_for_these_rows_and_the_model_as_it_is(ledger):
    study = study_of(zoo.build("llama"))
    model, part = study.model()[0], study.take([0, 2, 3])
    masks = {"small": neuron_mask(model, 0.05), "large": neuron_mask(model, 0.5)}
    first, of_part = ablation_matrix(study, masks, "zero"), ablation_matrix(part, masks, "zero")
    count = len(budget.lines_of(ledger))
    again = ablation_matrix(study, {"renamed": masks["large"]}, "zero")
    assert (again["renamed"] == first["large"]).all()
    assert again.attrs == first.attrs
    assert ablation_matrix(study.take([0, 2, 3]), masks, "zero").equals(of_part)
    assert len(budget.lines_of(ledger)) == count
    elsewhere = ablation_matrix(study, masks, "zero", where="response")
    assert not elsewhere.equals(first)
    with ablate(model, neuron_mask(model, 0.3), "zero"):
        other = ablation_matrix(study, masks, "zero", allow_inert=True)
    assert other.attrs != first.attrs
    assert not other.equals(first)
    assert ablation_matrix(study, masks, "zero").equals(first)


def reference(model):
    from helpers.study.scores import reference_activations

    with pytest.MonkeyPatch.context() as without:
        without.delenv(budget.LEDGER)
        return reference_activations(model, zoo.tokenizer(), TEXTS)


def test_padding_is_told_from_text():
    line = {"model": "m", "altered": "", "purpose": "losses", "lengths": [3, 1], "new": []}
    line |= {"texts": ["a", "b"], "padded": 6, "seconds": 0.5}
    other = line | {"altered": "x"}
    found = budget.spent([line, line, other], ("purpose", "altered"))
    assert found["losses", ""]["tokens"] == 8
    assert found["losses", ""]["minimum"] == found["losses", "x"]["minimum"] == 4
    assert np.isclose(found["losses", ""]["padding"], 1 - 4 / 6)
    assert found["losses", ""]["seconds"] == 1


def test_writers_side_by_side_leave_whole_lines(ledger):
    model, ids = zoo.build("llama", vocab_size=300), torch.ones(40, 30, dtype=torch.long)

    def write(n):
        with budget.reading(model, ids + n, ids, "losses"):
            pass

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(200)))
    assert len({line["texts"][0] for line in budget.lines_of(ledger)}) == 200


def test_a_pass_that_failed_is_no_line_and_a_damaged_ledger_is_one_error(ledger):
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(UserError), budget.reading(zoo.build("llama"), ids, ids, "losses"):
        raise UserError("stopped")
    assert not ledger.exists()
    ledger.write_text(json.dumps({}) + "\n{half")
    with pytest.raises(DamagedFile, match="no ledger of tokens"):
        budget.lines_of(ledger)


@pytest.mark.parametrize("name", ["absent/x.jsonl", "", "file/x.jsonl"])
def test_a_ledger_that_cannot_be_written_is_refused_before_the_pass(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / name))
    ids, read = torch.ones(1, 3, dtype=torch.long), []
    with (
        pytest.raises(UserError, match=f"{budget.LEDGER} names .*cannot be written"),
        budget.reading(zoo.build("llama"), ids, ids, "losses"),
    ):
        read.append("the pass")
    assert not read


def test_what_keeps_a_line_from_being_written_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / ("n" * 300)))
    ids = torch.ones(1, 3, dtype=torch.long)
    with (
        pytest.raises(UserError, match="cannot write .*File name too long"),
        budget.reading(zoo.build("llama"), ids, ids, "losses"),
    ):
        pass


# ---- how much a pass takes


def largest_logits(model, run):
    """The most logits that the head gives at one time."""
    seen = []
    head = model.get_output_embeddings()
    hook = head.register_forward_hook(lambda module, args, out: seen.append(out.numel()))
    run()
    hook.remove()
    return max(seen)


@pytest.mark.parametrize("length", [40, 200])
def test_losses_make_no_more_logits_at_a_time_however_long_the_texts(length, monkeypatch):
    monkeypatch.setattr(losses, "CELLS", 20 * zoo.WORDS)
    monkeypatch.setattr(losses, "LEAST", 1)
    model = zoo.build("llama")
    encoded = [Encoded(tuple(range(3, 40)) * 6, (True,) * 222)] * 3
    encoded = [Encoded(e.ids[:length], e.counted[:length]) for e in encoded]
    expected = nll(model, encoded, 1)
    for run in (
        lambda: nll(model, encoded, 3 * length),
        lambda: attribution(model, encoded, encoded, 3 * length),
    ):
        rows = model.get_output_embeddings().weight.shape[0]
        assert largest_logits(model, run) <= 20 * rows
    monkeypatch.setattr(losses, "CELLS", 2**22)
    np.testing.assert_allclose(nll(model, encoded, 3 * length), expected, rtol=1e-6)


def test_a_large_vocabulary_is_read_in_blocks_that_fill_a_processor(monkeypatch):
    """Of more words than CELLS, LEAST tokens at a time."""
    monkeypatch.setattr(losses, "CELLS", 1)
    monkeypatch.setattr(losses, "LEAST", 30)
    model = zoo.build("llama")
    rows = model.get_output_embeddings().weight.shape[0]
    encoded = [Encoded(tuple(range(3, 40)), (True,) * 37)] * 3
    assert largest_logits(model, lambda: nll(model, encoded, 111)) == 30 * rows


def test_contribution_scores_need_no_logits():
    model = zoo.build("qwen2_moe")
    encoded = encode(zoo.tokenizer(), TEXTS)
    with pytest.raises(ValueError, match="empty"):
        largest_logits(model, lambda: contribution(model, encoded))


def test_gradients_do_not_depend_on_how_the_head_is_cut(monkeypatch):
    model, encoded = zoo.build("qwen2_moe"), encode(zoo.tokenizer(), TEXTS)
    whole = attribution(model, encoded, encoded)
    monkeypatch.setattr(losses, "CELLS", 1)
    monkeypatch.setattr(losses, "LEAST", 1)
    for name, value in attribution(model, encoded, encoded).items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ahead", [0, 24])
def test_batches_pad_little_where_lengths_allow_and_leave_the_longest_alone(ahead):
    draw = np.random.default_rng(1)
    sizes = [*draw.integers(20, 120, 1200), 9000]
    encoded = [Encoded((5,) * n, (True,) * n) for n in sizes]
    made = list(token_batches(encoded, 4096, "left", ahead))
    assert made[0].rows == [1200]
    assert sorted(row for b in made for row in b.rows) == list(range(1201))
    cells = [len(b.rows) * (b.input_ids.shape[1] + ahead) for b in made]
    assert all(n <= 4096 for n in cells[1:])
    assert sum(cells) <= 1.05 * (sum(sizes) + ahead * len(sizes))


def test_an_ablation_that_nothing_ran_under_marks_nothing(ledger):
    model = zoo.build("llama")
    with ablate(model, {}, "zero"):
        nll(model, encode(zoo.tokenizer(), TEXTS))
    assert {line["altered"] for line in budget.lines_of(ledger)} == {""}


@pytest.mark.parametrize("read", ["losses", "answers"])
def test_nothing_is_read_inside_autocast(read):
    """A loss or an answer in bfloat16 would be kept as one in float32."""
    model, encoded = zoo.build("llama"), encode(zoo.tokenizer(), ["name a fish", "go"])
    calls = {
        "losses": lambda: nll(model, encoded),
        "answers": lambda: continuations(model, encoded, max_new_tokens=3),
    }
    whole = calls[read]()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match="leave the autocast block"),
    ):
        calls[read]()
    assert np.array_equal(np.concatenate(calls[read](), None), np.concatenate(whole, None))
