"""Losses against a loop by hand, generation in batches against one by one, the ablation matrix
against single runs.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from helpers.capture.interventions import ablate
from helpers.config import Pair, Profile
from helpers.record import UserError
from helpers.study import summary
from helpers.study.ability import likely
from helpers.study.answers import SHORT, answer_ids, continuations, greedy_answers, new_tokens
from helpers.study.evaluate import (
    ablation_matrix,
    accuracy,
    gain_lost,
    nll,
    plain_text_nll,
    reference_nll,
    scored,
    task_scores,
)
from helpers.study.reading import encode_rows
from helpers.study.study import Study
from tests.test_interventions import hooks, neuron_mask
from tests.zoo import ZOO, build, tokenizer

torch.set_num_threads(1)
TOKENIZER = tokenizer()
PROFILE = SimpleNamespace(
    template="say: {instruction}\n", batch_tokens=120, max_new_tokens=7, run_code=False, chat=False
)
TEXTS = [
    "add one",
    "a",
    "what is it that you want from me now?",
    "sum 12, 7",
    "go on",
    "name the dog",
    "b?",
]
ROWS = pd.DataFrame(
    {
        "id": [f"r{i}" for i in range(7)],
        "instruction": TEXTS,
        "input": ["", "to b", "", "", "the list", "", ""],
        "reference": ["two", "x = 1", "nothing", "19", "ok", "rex", "c"],
        "checker": [
            {"name": "exact", "answer": w} for w in ("two", "x", "nothing", "19", "ok", "rex", "c")
        ],
    }
)


SPEECH = (PROFILE.template, PROFILE.batch_tokens, PROFILE.max_new_tokens)


def study_of(model, rows=ROWS):
    """A model of the zoo as the tuned one of a pair."""
    return Study(PROFILE, Pair("pair", "none", "none"), rows, {"tuned": (model, TOKENIZER)})


def test_what_is_too_long_to_be_read_is_refused_by_its_id_before_anything_runs():
    rows = ROWS.assign(category="QA", fold="A", half="A")
    rows.loc[2, "instruction"], rows.loc[1, "reference"] = "a" * 40, "x = 1 and more"
    model = build("llama", max_position_embeddings=200)
    most = max(len(e.ids) for e in study_of(model, rows).encoded("reference"))
    model.config.max_position_embeddings = most  # own prompts fit, others before a reference not
    with pytest.raises(UserError, match="1 of 7 texts are longer .*text r1 has"):
        gain_lost(study_of(model, rows), {})
    with pytest.raises(UserError, match="text r2 has"):  # the instruction beside another reference
        likely(study_of(model, rows))
    model.config.max_position_embeddings = most - 1
    with pytest.raises(UserError, match="1 of 7 texts are longer .*text r2 has"):
        ablation_matrix(study_of(model, rows), {}, "zero")
    with pytest.raises(UserError, match="1 of 7 prompts .*leave no room for 8 new tokens"):
        continuations(model, study_of(model, rows).encoded("prompt"), max_new_tokens=8)


def by_hand(model, row, eos=True):
    """The loss of one reference, one token after the other, in plain words."""
    prompt = PROFILE.template.format(
        instruction=row["instruction"] + ("\n" + row["input"] if row["input"] else "")
    )
    ids, losses = TOKENIZER(prompt)["input_ids"], []
    for token in TOKENIZER(row["reference"])["input_ids"] + [TOKENIZER.eos_token_id] * eos:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
        losses.append(-float(logits.double().log_softmax(-1)[token]))
        ids = ids + [token]
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "phi3", "opt", "qwen2_moe", "gpt_oss", "granitemoe"]
)
def test_reference_nll_equals_a_loop_by_hand_in_row_order(family):
    model = build(family)
    for eos in (True, False):
        expected = [by_hand(model, row, eos) for _, row in ROWS.iterrows()]
        for size in (1, 3, 32):
            at = "reference" if eos else "response"
            found = nll(model, encode_rows(TOKENIZER, ROWS, PROFILE.template, at), size)
            assert found.dtype == np.float64
            np.testing.assert_allclose(found, expected, rtol=2e-6)
        np.testing.assert_allclose(reference_nll(study_of(model), eos=eos), expected, rtol=2e-6)


def test_only_the_references_tokens_and_the_end_are_counted():
    encoded = encode_rows(TOKENIZER, ROWS, PROFILE.template, "reference")
    for row, e in zip(ROWS.to_dict("records"), encoded, strict=True):
        counted = [i for i, c in zip(e.ids, e.counted, strict=True) if c]
        assert counted == [*TOKENIZER(row["reference"])["input_ids"], TOKENIZER.eos_token_id]
    bare = tokenizer()
    bare.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence"):
        encode_rows(bare, ROWS, PROFILE.template, "reference")


def test_plain_text_nll_equals_the_models_own_loss():
    model = build("llama")
    with torch.no_grad():
        expected = [
            float(model(input_ids=(i := torch.tensor([TOKENIZER(t)["input_ids"]])), labels=i).loss)
            for t in TEXTS
            if len(t) > 1
        ]
    np.testing.assert_allclose(
        plain_text_nll(model, TOKENIZER, [t for t in TEXTS if len(t) > 1]), expected, rtol=1e-5
    )
    with pytest.raises(UserError, match="no token whose loss"):
        plain_text_nll(model, TOKENIZER, ["ab", "a"])


def test_answers_that_are_none_are_one_clear_error():
    answers = [row["reference"] for row in ROWS.to_dict("records")]
    assert task_scores(ROWS, iter(answers)).sum() == 6  # of seven
    for bad, said in (
        ([*answers[:-1], float("nan")], "row r6: the answer is nan, expected a string"),
        (answers[0], "answers: found str"),
        (answers[:-1], "6 answers to 7 rows"),
    ):
        with pytest.raises(UserError, match=said):
            task_scores(ROWS, bad)


@pytest.mark.parametrize("texts", ["add one", {"add one": 1}, [], ["add one", None], 7])
def test_plain_texts_that_are_no_list_of_texts_are_refused(texts):
    with pytest.raises(UserError, match="expected a list|text 1 is None|list of texts is empty"):
        plain_text_nll(build("llama"), TOKENIZER, texts)


def test_a_text_longer_than_the_model_reads_has_no_loss():
    model = build("llama")
    long = " add" * (model.config.max_position_embeddings + 1)
    with pytest.raises(UserError, match="1 of 2 texts are longer than the .*: text 1 has"):
        plain_text_nll(model, TOKENIZER, ["add one", long])


@pytest.mark.parametrize("family", ZOO)
def test_generation_in_batches_equals_one_by_one(family):
    model = build(family)
    model.generation_config.eos_token_id = None
    alone = [greedy_answers(model, TOKENIZER, ROWS.iloc[[i]], *SPEECH)[0] for i in range(len(ROWS))]
    assert greedy_answers(model, TOKENIZER, ROWS, *SPEECH) == alone
    assert len(set(alone)) > 1
    mask = neuron_mask(model, 0.4)
    with ablate(model, mask, "zero"):
        hit = greedy_answers(model, TOKENIZER, ROWS, *SPEECH)
    with ablate(model, mask, "zero", how="hook"):
        assert hit == greedy_answers(model, TOKENIZER, ROWS, *SPEECH) != alone


def test_generation_is_greedy_step_by_step_and_ends_at_eos():
    model, row = build("llama"), ROWS.iloc[[0]]
    ids, wanted = TOKENIZER("say: add one\n")["input_ids"], []
    for _ in range(PROFILE.max_new_tokens):
        with torch.no_grad():
            wanted.append(int(model(input_ids=torch.tensor([ids + wanted])).logits[0, -1].argmax()))
    model.generation_config.repetition_penalty, model.generation_config.do_sample = (
        5.0,
        True,
    )  # must not leak in
    model.generation_config.eos_token_id = None
    assert greedy_answers(model, TOKENIZER, row, *SPEECH) == [
        TOKENIZER.decode(wanted, skip_special_tokens=True).strip()
    ]
    model.generation_config.eos_token_id = wanted[3]
    first = wanted.index(wanted[3])
    ended = TOKENIZER.decode(wanted[:first], skip_special_tokens=True).strip()
    assert greedy_answers(model, TOKENIZER, row, *SPEECH) == [ended]


def test_answers_lose_outer_space_and_special_tokens(monkeypatch):
    ids = [TOKENIZER.bos_token_id, *TOKENIZER(" go on\n")["input_ids"], TOKENIZER.pad_token_id]
    monkeypatch.setattr("helpers.study.answers.continuations", lambda *args, **options: [ids])
    spaced = TOKENIZER.decode(ids, skip_special_tokens=True)
    assert greedy_answers(None, TOKENIZER, ROWS.iloc[[0]], *SPEECH) == [spaced.strip()] != [spaced]


def test_task_scores_come_from_each_rows_own_checker():
    scores = task_scores(ROWS, list(ROWS["reference"]))
    assert scores.tolist() == [1, 0, 1, 1, 1, 1, 1]  # the second row's checker wants another answer
    assert task_scores(ROWS, [""] * 7).tolist() == [0] * 7
    with pytest.raises(UserError, match="6 answers to 7 rows"):
        task_scores(ROWS, [""] * 6)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_the_ablation_matrix_is_made_of_single_runs(family):
    model = build(family)
    study = study_of(model)
    before = reference_nll(study)
    masks = {
        "small": neuron_mask(model, 0.05),
        "large": neuron_mask(model, 0.5),
        "none": neuron_mask(model, 0),
    }
    table = ablation_matrix(study, masks, "zero")
    assert list(table.columns) == list(masks)
    assert list(table.index) == list(ROWS["id"])
    assert table.attrs["baseline"] == before.tolist()
    assert (table["none"] == 0).all()
    for name in ("small", "large"):
        with ablate(model, masks[name], "zero"):
            assert (table[name] == reference_nll(study) - before).all()
    assert table["large"].abs().mean() > table["small"].abs().mean() > 0
    assert (reference_nll(study) == before).all()
    assert hooks(model) == 0


def test_a_set_without_any_effect_is_not_passed_over_in_silence():
    model = build("llama")
    model.model.layers[0].mlp.down_proj.weight.data[:, 3] = 0  # a dead neuron
    mask = {"dense": np.zeros((3, 80), bool)}
    mask["dense"][0, 3] = True
    with pytest.raises(RuntimeError, match="the set 'dead' changed the loss of none of 7 rows"):
        ablation_matrix(study_of(model), {"dead": mask}, "zero")
    assert not ablation_matrix(study_of(model), {"dead": mask}, "zero", allow_inert=True).any(
        axis=None
    )


def test_a_loss_that_is_no_number_does_not_pass_for_an_effect():
    """NaN differs from everything, so it would count as having acted."""
    model = build("llama")
    study = study_of(model)
    reference_nll(study)
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(RuntimeError, match="'all' made the loss of some row NaN"):
        ablation_matrix(study, {"all": neuron_mask(model)}, "zero", allow_inert=True)


def test_a_row_of_a_short_checker_has_a_small_budget_and_the_others_the_profiles():
    """Oracle: each row alone, with its budget given by hand."""
    model = build("llama")
    model.generation_config.eos_token_id = None
    checkers = [{"name": name} for name in (*SHORT, "exact", "constraints")]
    rows = ROWS.iloc[:5].assign(checker=checkers)
    wanted = [min(SHORT.get(checker["name"], 40), 40) for checker in checkers]
    assert (
        [new_tokens(row, 40) for row in rows.to_dict("records")] == wanted == [32, 32, 40, 40, 40]
    )
    found = answer_ids(model, TOKENIZER, rows, PROFILE.template, 2, 40)
    alone = [
        answer_ids(model, TOKENIZER, ROWS.iloc[[i]], PROFILE.template, 1, size)[0]
        for i, size in enumerate(wanted)
    ]
    assert found == alone
    assert [new_tokens(row, 7) for row in rows.to_dict("records")] == [7] * 5


def test_a_category_without_a_score_is_shown_as_not_a_number_and_not_missed():
    """CODE whose checker would run code, and may not."""
    rows = ROWS.assign(half="A", category=["CLS", "CODE"] * 3 + ["CODE"])
    code = {"name": "unit_tests", "tests": ["assert f(1) == 2"]}
    rows["checker"] = [
        code if c == "CODE" else k for c, k in zip(rows["category"], rows["checker"], strict=True)
    ]
    answers = list(rows["reference"])
    found = accuracy(
        scored(study_of(None, rows), answers=answers), ["pair", "half"], ["CLS", "CODE", "QA"]
    )
    assert found.loc[("pair", "A"), "CLS"] == 1
    assert found.loc["pair"].isna().to_numpy().tolist() == [[False, True, True]]


def test_what_could_not_be_measured_is_left_out_of_the_summary(tmp_path, monkeypatch):
    monkeypatch.setattr(summary, "results_dir", lambda name: tmp_path / name)
    profile = Profile("mine", "none", (Pair("a", "none", "none"),))
    numbers = {"accuracy.CODE": np.float64("nan"), "accuracy.CLS": 0.5, "ci": [0.25, 0.75]}
    summary.write_part(profile, "00_x", {"a": numbers})
    kept = {"accuracy.CLS": 0.5, "ci": [0.25, 0.75]}
    assert summary.read_parts(profile, ["00_x"]) == {"a": kept}
    with pytest.raises(ValueError, match="not JSON compliant"):  # half an interval is a fault
        summary.write_part(profile, "00_x", {"a": {"ci": [0.25, np.nan]}})
