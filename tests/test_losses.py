"""Losses kept on disk: those of a fresh run, but for rounding (sets that are read together share
matrix products); measured once, by whichever study
asks first; measured again where anything that decides them is another.
"""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
import torch

from helpers.config import Pair, Profile
from helpers.paths import ROOT
from helpers.record import UserError
from helpers.study import evaluate, losses, planted
from helpers.study import study as room
from helpers.study.evaluate import ablation_matrix, gain_lost
from helpers.study.scores import reference_activations
from helpers.study.study import Study
from tests import zoo

torch.set_num_threads(1)
ROWS = planted.rows(2)
SETS = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return zoo.saved(tmp_path_factory.mktemp("model"), "llama", num_hidden_layers=2)


@pytest.fixture
def study(checkpoint, tmp_path, monkeypatch):
    """(settings of a profile, rows) -> a Study as a new process has it; files below tmp_path."""
    monkeypatch.setattr(room, "counts_dir", lambda *names: tmp_path.joinpath(*names))
    pair = Pair("pair", None, str(checkpoint))

    def made(rows=ROWS, **settings):
        profile = Profile("p", "none", (pair,), template=planted.TEMPLATE, **settings)
        return Study.of(profile, pair, rows)

    return made


@pytest.fixture
def passes(monkeypatch):
    """A list that grows by one for each set, or none, that losses are measured under."""
    found, measure = [], evaluate._nll

    def counted(model, read, *options):
        found.extend([1] * read.copies)
        return measure(model, read, *options)

    monkeypatch.setattr(evaluate, "_nll", counted)
    return found


def masks(seed=0):
    rng = np.random.default_rng(seed)
    return {n: {"dense": rng.random((2, zoo.N)) < 0.3} for n in range(SETS)}


def table(study, **options):
    return ablation_matrix(study, masks(), "zero", allow_inert=True, **options).to_numpy()


def test_what_is_kept_is_what_a_fresh_run_gives_and_is_measured_once(study, passes, tmp_path):
    first = table(study())
    assert len(passes) == 1 + SETS
    again = study()
    assert (table(again) == first).all()
    assert len(passes) == 1 + SETS
    table(again.take([3, 1]))  # other rows share no batch with the first ones
    assert len(passes) == 2 * (1 + SETS)
    next(tmp_path.rglob("ablated.jsonl")).unlink()
    assert (table(study()) == first).all()
    assert len(passes) == 3 * (1 + SETS)


def test_an_interrupted_experiment_goes_on_at_the_set_where_it_stopped(study, monkeypatch):
    """With a budget that holds no two sets."""
    measure, left = evaluate._nll, [3]

    def killed(*options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return measure(*options)

    monkeypatch.setattr(evaluate, "_nll", killed)
    with pytest.raises(KeyboardInterrupt):
        table(study(batch_tokens=30))
    left[0] = 1
    found = table(study(batch_tokens=30))
    assert left == [0]
    assert (found == table(study(resamples=7, batch_tokens=30))).all()
    assert left == [0]


def test_every_place_operator_and_reference_has_losses_of_its_own(study, passes):
    one = study()
    typical = reference_activations(*one.model(), ["add one", "sum 12, 7"])
    other = reference_activations(*one.model(), ["name the dog"])
    calls = [
        lambda s: table(s),
        lambda s: table(s, where="prompt"),
        lambda s: table(s, eos=False),
        lambda s: ablation_matrix(s, masks(1), "zero", allow_inert=True).to_numpy(),
        lambda s: ablation_matrix(s, masks(), "mean", reference=typical).to_numpy(),
        lambda s: ablation_matrix(s, masks(), "mean", reference=other).to_numpy(),
        lambda s: ablation_matrix(s, masks(), "resample", reference=typical, seed=3).to_numpy(),
        lambda s: ablation_matrix(s, masks(), "resample", reference=typical, seed=4).to_numpy(),
        lambda s: gain_lost(s, masks()),
        lambda s: gain_lost(s, masks(1)),
    ]
    first = [call(study()) for call in calls]
    seen = len(passes)
    assert [(call(study()) == found).all() for call, found in zip(calls, first, strict=True)]
    assert len(passes) == seen
    assert len({found.tobytes() for found in first}) == len(calls)


@pytest.mark.parametrize(
    "change",
    [
        {"template": "{instruction}"},
        {"batch_tokens": 60},
        {"rows": ROWS.assign(reference=ROWS["reference"] + " dog")},
        {"rows": ROWS.assign(instruction=ROWS["instruction"] + " now")},
        {"rows": ROWS.iloc[[1, 0, *range(2, len(ROWS))]]},
    ],
)
def test_other_settings_or_rows_are_measured_again(study, passes, change):
    table(study())
    seen = len(passes)
    made = study(change.get("rows", ROWS))
    settings = {name: value for name, value in change.items() if name != "rows"}
    made.profile = dataclasses.replace(made.profile, **settings)
    table(made)
    assert len(passes) == seen + 1 + SETS


def test_other_weights_and_other_code_are_measured_again(study, passes, checkpoint, monkeypatch):
    table(study())
    seen = len(passes)
    monkeypatch.setattr(losses, "CODE", "another")
    table(study())
    assert len(passes) == seen + 1 + SETS
    kept = (checkpoint / "model.safetensors").read_bytes()
    try:
        zoo.build("llama", num_hidden_layers=2, seed=5).save_pretrained(checkpoint)
        table(study())
    finally:
        (checkpoint / "model.safetensors").write_bytes(kept)
    assert len(passes) == seen + 2 * (1 + SETS)


def test_a_part_of_a_study_that_reads_otherwise_has_losses_of_its_own(study, passes):
    one = study()
    first, gains = table(one), gain_lost(one, masks())
    other = one.take(np.arange(len(ROWS)))
    other.rows = other.rows.assign(reference=other.rows["reference"] + " dog")
    assert (table(other) != first).any()
    mixed = one.take(np.arange(len(ROWS)))
    mixed.rows = mixed.rows.assign(category=list("ab") * (len(ROWS) // 2))
    assert (gain_lost(mixed, masks()) != gains).any()
    seen = len(passes)
    assert (table(one) == first).all()
    assert len(passes) == seen


def test_nothing_is_kept_while_a_hook_of_someone_is_on_the_model(study, tmp_path):
    one = study()
    layer = one.model()[0].model.layers[0].mlp
    hook = layer.register_forward_hook(lambda module, args, out: out * 0)
    hooked = table(one)
    hook.remove()
    assert not list(tmp_path.rglob("ablated.jsonl"))
    assert (table(study()) != hooked).any()


def test_the_order_of_a_masks_families_has_losses_of_its_own():
    mask = {"dense": np.ones((1, 2), bool), "shared": np.zeros((1, 3), bool)}
    assert evaluate._mark(mask) != evaluate._mark(dict(reversed(mask.items())))
    assert evaluate._mark(mask) == evaluate._mark(dict(mask))


def test_a_change_of_the_code_that_measures_is_another_code(tmp_path):
    helpers = ROOT / "helpers"
    for name in ("capture", "study"):
        shutil.copytree(helpers / name, tmp_path / name)
    assert losses.code_of(tmp_path) == losses.code_of(helpers) == losses.CODE
    seen = {losses.CODE}
    for name in ("capture/losses.py", "capture/tokens.py", "study/evaluate.py", "study/study.py"):
        with open(tmp_path / name, "a") as file:
            file.write("\n")
        seen.add(losses.code_of(tmp_path))
    assert len(seen) == 5


def test_a_file_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "losses").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        losses.Losses(tmp_path / "losses" / "a.jsonl", {})(["a"], lambda _: [[1.0]])


def test_a_line_cut_short_costs_its_own_set_alone(study, passes, tmp_path):
    first = table(study())
    path = next(tmp_path.rglob("ablated.jsonl"))
    path.write_bytes(path.read_bytes()[:-7])
    seen = len(passes)
    np.testing.assert_allclose(table(study()), first, atol=1e-6)
    assert len(passes) == seen + 1
    odd = ["[1]", '"x"', "null", '["a", 3, [1]]', '{"b": ']
    settings, key, _, end = json.loads(path.read_text().splitlines()[-1])
    for value in ("[NaN]", "[" * 5000, "9" * 400, "9" * 5000, "[[1]]", "1]", "[" * 900 + "]" * 900):
        odd += [f'["{settings}","{key}",{value}]', f'["{settings}","{key}",{value},"{end}"]']
    path.write_text("\n".join([path.read_text(), *odd]))
    np.testing.assert_allclose(table(study()), first, atol=1e-6)
    assert len(passes) == seen + 1


@pytest.mark.parametrize(
    "edited",
    [
        lambda line: re.sub(r"\[[\d.,]+\]", "[9.0]", line),
        lambda line: re.sub(r"\[([\d.]+),", r"[\1,\1,", line),
        lambda line: re.sub(r",[\d.]+\]", "]", line),
        lambda line: line.replace('"zero', '"mean', 1),
        lambda line: line.rpartition(",")[0] + "]",  # as former versions kept it
    ],
)
def test_a_line_that_is_not_as_it_was_written_is_measured_again(tmp_path, edited):
    """One value would be everyone's: it stretches over all rows."""
    path, losses_of = tmp_path / "a.jsonl", [[0.0, 1.5, 2.0], [3.0, 4.0, 5.5]]
    losses.Losses(path)(["zero-a", "zero-b"], lambda missing: losses_of)
    first, line, rest = path.read_text().partition("\n")[2].partition("\n")
    path.write_text(f"\n{edited(first)}{line}{rest}")
    assert path.read_text() != f"\n{first}\n{rest}"
    again, asked = losses.Losses(path), []
    found = again(["zero-a", "zero-b"], lambda missing: asked.extend(missing) or losses_of[:1])
    assert np.array_equal(found, losses_of)
    assert asked == ["zero-a"]
    assert np.array_equal(losses.Losses(path)(["zero-a", "zero-b"], None), losses_of)
    assert set(losses.Losses(path).kept) == {"zero-a", "zero-b"}


def test_models_that_were_handed_over_have_no_file(study, tmp_path):
    named = study()
    first = table(named)
    other = zoo.build("llama", num_hidden_layers=2, seed=5), named.model()[1]
    given = Study(named.profile, named.pair, named.rows, {"tuned": other})
    assert (table(given) != first).all()
    assert len(list(tmp_path.rglob("ablated.jsonl"))) == 1
    assert len(next(tmp_path.rglob("ablated.jsonl")).read_text().splitlines()) == 2 + SETS


def test_a_loss_that_is_no_number_is_not_kept(tmp_path):
    kept = losses.Losses(tmp_path / "a.jsonl", {})
    kept(["a", "b"], lambda missing: [[1.0, np.nan], [1.0, 2.0]])
    assert kept(["a"], lambda missing: [[4.0, 5.0]])[0].tolist() == [4.0, 5.0]
    (tmp_path / "a.jsonl").unlink()
    kept = losses.Losses(tmp_path / "a.jsonl", {})
    kept(["a", "b"], lambda missing: [[1.0, np.nan], [1.0, 2.0]])
    again = losses.Losses(tmp_path / "a.jsonl", {})
    assert again(["b"], None)[0].tolist() == [1.0, 2.0]
    assert [x.tolist() for x in again(["b", "a", "a"], lambda missing: [[3.0]] * len(missing))] == [
        [1.0, 2.0],
        [3.0],
        [3.0],
    ]


def test_what_was_measured_before_a_stop_is_kept(tmp_path):
    def stopped(missing):
        yield [1.0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        losses.Losses(tmp_path / "a.jsonl", {})(["a", "b"], stopped)
    again, asked = losses.Losses(tmp_path / "a.jsonl", {}), []

    def rest(missing):
        asked.extend(missing)
        return [[2.0]]

    assert [x.tolist() for x in again(["a", "b"], rest)] == [[1.0], [2.0]]
    assert asked == ["b"]
