"""Low-rank tuning and trajectories: a three-step run from training to the table a notebook reads,
and its refusals.
"""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from zoo import build

from helpers import paths
from helpers.analysis.similarity import churn
from helpers.config import Pair, load_profile
from helpers.hexainst.schema import load_hexainst
from helpers.record import DamagedFile, RecordMismatch, UserError, read_json, sha256, write_json
from helpers.run import __main__ as command
from helpers.tinyworld import lora, trajectory
from helpers.tinyworld import train as training
from helpers.tinyworld.optim import Muon, optimisers
from helpers.tinyworld.recipe import Recipe

MINI = Recipe(
    documents=200,
    per_category=8,
    pretrain_steps=1,
    pretrain_batch=2,
    context=32,
    tune_steps=3,
    tune_batch=4,
    replay_batch=1,
    evaluate_rows=1,
)
IDS = torch.arange(3, 23).view(2, 10)


# low-rank parts


def randomised(model):
    """Give every `up` something to add."""
    for name, p in model.named_parameters():
        if name.endswith(".up"):
            p.data = 0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return model


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_low_rank_parts_start_as_nothing_and_merge_into_the_same_function(family):
    model, plain = build(family), build(family)
    with torch.no_grad():
        assert torch.equal(lora.attach(model, 4)(IDS).logits, plain(IDS).logits)
        randomised(model)
        merged = lora.merged(model)
        assert torch.allclose(model(IDS).logits, merged(IDS).logits, atol=1e-6)
        assert not torch.allclose(merged(IDS).logits, plain(IDS).logits, atol=1e-2)
    assert list(dict(merged.named_parameters())) == list(dict(plain.named_parameters()))
    for (name, p), q in zip(merged.named_parameters(), plain.parameters(), strict=True):
        change = (p - q).detach()
        if "_proj" in name and p.dim() > 1:
            assert (torch.linalg.matrix_rank(change, atol=1e-4) == 4).all(), name
        else:
            assert not change.any(), name


def test_the_weight_in_use_is_the_sum_it_says():
    part = lora.LowRank((2, 3), 1, 2.0)
    part.up.data, part.down.data = torch.tensor([[1.0], [10.0]]), torch.tensor([[1.0, 2.0, 3.0]])
    assert part(torch.ones(2, 3)).tolist() == [[3, 5, 7], [21, 41, 61]]


def test_only_low_rank_parts_learn_and_adamw_gets_all_of_them():
    model = lora.attach(build("llama"), 2)
    (adamw,) = optimisers(model, 1e-3)
    assert not isinstance(adamw, Muon)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 3 * 7 * 2
    assert all(name.endswith((".up", ".down")) for name in trained)
    assert sum(len(group["params"]) for group in adamw.param_groups) == len(trained)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)


def test_the_seed_draws_the_low_rank_parts_and_leaves_the_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    parts = [
        dict(lora.attach(build("llama"), 2, seed=seed).named_parameters()) for seed in (0, 0, 1)
    ]
    key = next(name for name in parts[0] if name.endswith(".down"))
    assert torch.equal(parts[0][key], parts[1][key])
    assert not torch.equal(parts[0][key], parts[2][key])
    lora.merged(lora.attach(build("llama"), 2))
    assert torch.equal(before, torch.get_rng_state())


# a run, from training to the notebook's table


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectory, "STEPS", (1, 2))
        patch.setattr(trajectory, "PER_CATEGORY", 2)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory, patched):
    """(folder with base/ and tuned/ of three steps, profile, pair, rows)"""
    folder = tmp_path_factory.mktemp("mini") / "tiny-dense"
    training.train("tiny-dense", 0, MINI, folder, report=lambda _: None)
    profile = dataclasses.replace(load_profile("tiny"), max_new_tokens=2)
    pair = Pair("tiny-dense", str(folder / "base"), str(folder / "tuned"))
    return folder, profile, pair, load_hexainst(dataset="tiny")


@pytest.fixture(scope="module")
def runs(made):
    """{regime: (checkpoints' folder, Run)}, the tables in folder/tables."""
    folder, profile, pair, rows = made
    found = {}
    for regime in trajectory.REGIMES:
        trajectory.train(
            "tiny-dense", regime, 0, folder / regime, folder / "base", MINI, report=lambda _: None
        )
        measured = trajectory.measure(profile, pair, rows, folder / regime)
        found[regime] = (
            folder / regime,
            trajectory.write(f"tiny-dense-{regime}-s0", *measured, rows, folder / "tables"),
        )
    return found


def test_a_full_run_ends_in_the_tuned_model_bit_for_bit(made, runs):
    folder, run = runs["full"]
    assert run.steps.tolist() == [0, 1, 2, 3]
    assert sha256(folder / "0003" / "model.safetensors") == sha256(
        made[0] / "tuned" / "model.safetensors"
    )
    assert run.record["checkpoints"]["0003"] == run.record["tuned"]
    assert len(run.record["losses"])
    assert run.record["regime"] == "full"


def test_further_pretraining_reads_as_many_tokens_as_tuning_and_no_instruction(made, runs):
    _, run = runs["pretraining"]
    _, tokenizer, rows, *_ = training.prepare("tiny-dense", 0, MINI)
    equal = run.record["pretraining"]
    ids, _ = training.encode_tuning(tokenizer, rows)
    tuned = MINI.tune_batch * np.mean([len(i) for i in ids]) + MINI.replay_batch * MINI.context
    assert abs(equal["pretrain_batch"] * MINI.context - tuned) <= MINI.context / 2
    assert equal["pretrain_steps"] == MINI.tune_steps
    assert run.record["checkpoints"]["0003"] != runs["full"][1].record["checkpoints"]["0003"]


def test_what_is_read_is_what_was_measured(made, runs):
    folder, profile, pair, rows = made
    read = trajectory.read(profile, pair, rows, folder / "tables")
    assert list(read) == ["full-s0", "lora-s0", "pretraining-s0"]
    for regime, (_, run) in runs.items():
        again = read[f"{regime}-s0"]
        assert again.rows.tolist() == run.rows.tolist()
        assert len(run.rows) == 2 * 6 * 2
        assert again.experts is None
        assert (run.neurons[0] == 1).all()
        assert (run.to_final[-1] == 1).all()
        assert (again.neurons == run.neurons).all()
        assert run.correct.shape == run.neurons.shape == (4, 24)
    counts = trajectory.count(
        *trajectory.load_model(pair.tuned),
        [trajectory.text(r) for r in rows.iloc[run.rows].to_dict("records")],
        template=profile.template,
    )
    sets = trajectory.top_sets(counts.unit("neurons"), profile.epsilon)[0]
    assert (churn(sets, read["full-s0"].final)["jaccard"] == 1).all()


def test_the_table_holds_the_means(made, runs):
    _, _, _, rows = made
    run = runs["lora"][1]
    table = trajectory.table(run, rows)
    assert len(table) == 4 * 2 * 6
    assert (table["rows"] == 2).all()
    here = rows.iloc[run.rows]
    some = ((here["half"] == "B") & (here["category"] == "QA")).to_numpy()
    line = table.query("step == 2 and half == 'B' and category == 'QA'").iloc[0]
    assert line["neurons_similarity"] == pytest.approx(run.neurons[2][some].mean())


def test_low_rank_moves_projections_only(made, runs):
    base, tuned = (training.load(made[0] / "base"), training.load(runs["lora"][0] / "0003"))
    moved = {
        name
        for (name, p), q in zip(base.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved == {name for name, _ in base.named_parameters() if "_proj" in name}


def test_a_finished_run_is_not_trained_again_and_another_seed_is_another_run(
    made, runs, tmp_path, monkeypatch
):
    folder, *_ = made
    monkeypatch.setattr(training, "tune", None)  # would fail if called
    again = trajectory.train("tiny-dense", "full", 0, folder / "full", folder / "base", MINI)
    assert again["checkpoints"] == read_json(folder / "full" / trajectory.RUN)["checkpoints"]
    monkeypatch.undo()
    monkeypatch.setattr(trajectory, "STEPS", (1, 2))
    other = trajectory.train(
        "tiny-dense", "full", 1, tmp_path, folder / "base", MINI, report=lambda _: None
    )
    assert other["checkpoints"]["0003"] != again["checkpoints"]["0003"]
    assert other["base"] == again["base"]


def test_other_settings_have_no_trajectory_and_other_weights_are_refused(made, runs):
    folder, profile, pair, rows = made
    tables = folder / "tables"
    assert trajectory.read(dataclasses.replace(profile, epsilon=0.1), pair, rows, tables) == {}
    assert trajectory.read(profile, dataclasses.replace(pair, name="other"), rows, tables) == {}
    assert trajectory.read(profile, pair, rows, folder / "nothing here") == {}
    assert trajectory.read(profile, pair, rows.assign(instruction="hello."), tables) == {}
    assert trajectory.read(dataclasses.replace(profile, run_code=True), pair, rows, tables) == {}
    checkers = [{"name": "exact", "answer": reference} for reference in rows["reference"]]
    assert trajectory.read(profile, pair, rows.assign(checker=checkers), tables) == {}
    names = list(rows["category"].unique())
    turned = rows["category"].map(dict(zip(names, names[1:] + names[:1], strict=True)))
    assert trajectory.read(profile, pair, rows.assign(category=turned), tables) == {}
    for name in ("base", "tuned"):
        wrong = dataclasses.replace(pair, **{name: str(folder / "lora" / "0002")})
        with pytest.raises(RecordMismatch, match=f"measured beside another {name} model"):
            trajectory.read(profile, wrong, rows, tables)


def test_missing_and_altered_files_are_refused(made, runs, tmp_path):
    folder, profile, pair, rows = made
    (folder / "lora" / "0002").rename(tmp_path / "away")
    try:
        with pytest.raises(DamagedFile, match="0002 is missing or not the one in run.json"):
            trajectory.measure(profile, pair, rows, folder / "lora")
    finally:
        (tmp_path / "away").rename(folder / "lora" / "0002")
    with pytest.raises(RecordMismatch, match="base"):
        trajectory.measure(
            profile, dataclasses.replace(pair, base=pair.tuned), rows, folder / "lora"
        )
    with pytest.raises(DamagedFile, match="is missing"):
        trajectory.measure(profile, pair, rows, tmp_path)
    table = folder / "tables" / "tiny-dense-lora-s0.safetensors"
    whole = table.read_bytes()
    try:
        table.write_bytes(whole[:-1] + b"x")
        with pytest.raises(DamagedFile, match="sha256"):
            trajectory.read(profile, pair, rows, folder / "tables")
    finally:
        table.write_bytes(whole)


def test_a_base_of_other_texts_is_refused(made, tmp_path):
    with pytest.raises(UserError, match="trained on other texts"):
        trajectory.train(
            "tiny-dense",
            "full",
            0,
            tmp_path,
            made[0] / "base",
            dataclasses.replace(MINI, documents=900),
        )


def test_the_command_writes_a_run(made, tmp_path, monkeypatch, capsys):
    folder, profile, pair, rows = made
    monkeypatch.setattr(trajectory, "FOLDER", tmp_path / "tables")
    monkeypatch.setattr(trajectory, "RECIPES", {"tiny-dense": MINI})
    monkeypatch.setattr(
        command, "load_profile", lambda _: dataclasses.replace(profile, pairs=(pair,))
    )
    monkeypatch.setattr(command, "results_dir", lambda _: tmp_path)
    monkeypatch.setattr(paths, "MODELS", folder.parent)
    assert (
        command.main(["trajectory", "--pair", "tiny-dense", "--regime", "lora", "--seed", "5"]) == 0
    )
    found = trajectory.read(profile, pair, rows, tmp_path / "tables")
    assert list(found) == ["lora-s5"]
    assert found["lora-s5"].steps.tolist() == [0, 1, 2, 3]
    assert found["lora-s5"].record["recipe"]["tune_lr"] == trajectory.LOW_RANK_LR
    assert {f.suffix for f in (tmp_path / "tables").iterdir()} == {".csv", ".json", ".safetensors"}
    with pytest.raises(SystemExit):
        command.main(["trajectory", "--pair", "tiny-mamba"])
    assert "tiny-mamba" in capsys.readouterr().err


# what is shipped

SHIPPED, ROWS = sorted(trajectory.FOLDER.glob("*.json")), trajectory.PER_CATEGORY


def test_both_pairs_have_a_shipped_trajectory_of_eight_checkpoints_in_three_megabytes(monkeypatch):
    monkeypatch.setattr(trajectory, "PER_CATEGORY", ROWS)
    profile = load_profile("tiny")
    rows = load_hexainst(dataset=profile.dataset)
    for pair in profile.pairs:
        found = trajectory.read(profile, pair, rows)
        assert "full-s0" in found
        for run in found.values():
            assert len(run.steps) >= 9
            assert np.isfinite(run.correct).all()
            assert len(run.rows) >= 240
            assert (run.experts is None) == (pair.name == "tiny-dense")
    assert sum(file.stat().st_size for file in trajectory.FOLDER.iterdir()) < 3e6


def test_a_file_that_is_no_run_is_named_and_one_of_another_name_is_left_alone(
    monkeypatch, tmp_path
):
    monkeypatch.setattr(trajectory, "PER_CATEGORY", ROWS)
    profile = load_profile("tiny")
    pair, rows = profile.pairs[0], load_hexainst(dataset=profile.dataset)
    for file in trajectory.FOLDER.glob(f"{pair.name}-full-s0.*"):
        shutil.copyfile(file, tmp_path / file.name)
    (tmp_path / "notes.json").write_text("[]")
    (tmp_path / f"{pair.name}-s1-full-s0.json").write_text('{"pair": "another"}')
    assert list(trajectory.read(profile, pair, rows, tmp_path)) == ["full-s0"]
    run, odd = tmp_path / f"{pair.name}-full-s0.json", tmp_path / f"{pair.name}-notes.json"
    for text in ("[]", "{}", json.dumps({"pair": pair.name})):
        odd.write_text(text)
        with pytest.raises(DamagedFile, match=odd.name):
            trajectory.read(profile, pair, rows, tmp_path)
    odd.unlink()
    for change in ({"width": 100}, {"settings": {}}):
        write_json(tmp_path / run.name, read_json(trajectory.FOLDER / run.name) | change)
        with pytest.raises(DamagedFile, match=f"{run.name} was edited"):
            trajectory.read(profile, pair, rows, tmp_path)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda f: f.stem)
def test_shipped_record_says_what_it_was_made_of(file):
    record = read_json(file)
    assert file.stem == f"{record['pair']}-{record['regime']}-s{record['seed']}"
    assert record["base"] == sha256(paths.MODELS / record["pair"] / "base" / "model.safetensors")
    shipped = read_json(paths.MODELS / record["pair"] / "tuned" / training.RECORD)
    assert record["data"] == shipped["data"]
    assert record["tuned"] == shipped["sha256"]
    if record["regime"] == "full":
        assert record["recipe"] == shipped["recipe"]
    assert {"recipe", "versions", "losses", "checkpoints", "settings"} <= set(record)
