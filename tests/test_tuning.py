"""Tunings of a model: equal budgets, killed runs go on bit for bit, what was changed in between is
refused, and what is measured is what a loop finds.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.hexainst import leftover
from helpers.paths import ROOT
from helpers.record import DamagedFile, RecordMismatch, UserError, read_json
from helpers.study import tuning
from tests import planted, zoo

torch.set_num_threads(1)
RECIPE = tuning.Recipe(steps=6, tokens=60, kept=(1, 2, 4), rate=1e-2, rank=2, warm=2, context=16)
ALONE = replace(tuning.TUNINGS["alone"], category="MATH")


def rows_to_tune_on(number=6):
    """Other rows than those that are measured."""
    rows = planted.rows(number)
    rows["instruction"] = rows["instruction"].str[::-1] + "z"
    rows["tags"] = [{"instruction": "human"}] * len(rows)
    return rows.assign(id="left-" + rows["id"], source="made, row " + rows["id"])


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A random Llama of two layers, saved with its tokenizer."""
    folder = tmp_path_factory.mktemp("start")
    zoo.build("llama", num_hidden_layers=2).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def job(start, **changes):
    return tuning.Job(str(start), rows_to_tune_on(), RECIPE, planted.TEMPLATE)._replace(**changes)


def train(start, name, folder, **changes):
    return tuning.train(job(start, **changes), tuning.TUNINGS[name], folder, 0, lambda said: None)


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """All five tunings."""
    folder = tmp_path_factory.mktemp("tunings")
    for name in tuning.TUNINGS:
        train(start, name, folder / name)
    return folder


# ---- what is read


def test_a_schedule_reads_each_sequence_before_any_again_and_keeps_the_budget():
    sizes = np.random.default_rng(0).integers(3, 30, 40).tolist()
    plan = tuning.schedule(sizes, 50, 30, seed=3)
    read = np.cumsum([sum(sizes[i] for i in step) for step in plan])
    assert ((read >= 50 * np.arange(1, 31)) & (read < 50 * np.arange(1, 31) + 30)).all()
    flat = [i for step in plan for i in step]
    for k in range(0, len(flat) - 40, 40):
        assert sorted(flat[k : k + 40]) == list(range(40))
    assert tuning.schedule(sizes, 50, 10, 3) == plan[:10]
    assert tuning.schedule(sizes, 50, 10, 4) != plan[:10]


def test_budgets_are_equal_and_instructions_teach_references_alone(start, runs):
    records = tuning.read_runs(runs)
    assert list(records) == list(tuning.TUNINGS)
    tokenizer, rows = zoo.tokenizer(), rows_to_tune_on()
    read = {
        name: tuning.reading(tokenizer, rows, tuning.TUNINGS[name], RECIPE, planted.TEMPLATE)
        for name in records
    }
    for name, record in records.items():
        total, longest = record["losses"][-1][1], max(len(e.ids) for e in read[name])
        assert 360 <= total < 360 + longest
    for one, row in zip(read["full"], rows.to_dict("records"), strict=True):
        taught = [token for token, counted in zip(one.ids, one.counted, strict=True) if counted]
        assert taught == [*tokenizer(row["reference"])["input_ids"], tokenizer.eos_token_id]
    assert len(read["alone"]) == (rows["category"] == "MATH").sum()
    assert all(sum(e.counted) == len(e.ids) - 1 for e in read["continued"])


def test_plain_text_never_holds_a_question_with_its_answer():
    rows = rows_to_tune_on(2)
    rows["input"] = ["text " + str(n) for n in range(len(rows))]
    rows.at[0, "tags"] = {"instruction": "ours"}
    documents = leftover.plain_text(rows)
    assert documents[0] == "text 0"  # an instruction of ours is no human word
    assert documents[1] == rows["instruction"][1] + "\ntext 1"
    assert documents[len(rows) :] == rows["reference"].to_list()


def test_the_loss_is_that_of_a_loop_over_tokens(start):
    model = AutoModelForCausalLM.from_pretrained(start)
    read = tuning.reading(
        zoo.tokenizer(), rows_to_tune_on(2), tuning.TUNINGS["full"], RECIPE, planted.TEMPLATE
    )
    batch = tuning.padded(read, [0, 5, 9])
    losses = []
    for row in (0, 5, 9):
        logits = model(torch.tensor([read[row].ids])).logits[0].log_softmax(-1)
        for t in range(1, len(read[row].ids)):
            if read[row].counted[t]:
                losses.append(-logits[t - 1, read[row].ids[t]].item())
    found = tuning.loss_of(model, batch, torch.device("cpu")).item()
    assert found == pytest.approx(np.mean(losses), abs=1e-5)


def test_the_rate_warms_up_and_falls():
    rates = [tuning.rate_at(step, RECIPE, 1.0) for step in range(6)]
    assert rates[:2] == [0.5, 1.0]
    assert rates[2] == 1.0
    assert (np.diff(rates[2:]) < 0).all()
    assert rates[-1] > tuning.FLOOR


# ---- training


def test_tunings_learn_keep_and_are_left_alone(start, runs):
    for name, record in tuning.read_runs(runs).items():
        assert list(record["checkpoints"]) == ["0001", "0002", "0004", "0006"]
        assert not (runs / name / tuning.STATE).exists()
        before = (runs / name / tuning.RUN).stat().st_mtime_ns
        assert train(start, name, runs / name) == record
        assert (runs / name / tuning.RUN).stat().st_mtime_ns == before
        read = tuning.reading(
            zoo.tokenizer(), rows_to_tune_on(), tuning.TUNINGS[name], RECIPE, planted.TEMPLATE
        )
        batch = tuning.padded(read, list(range(len(read))))
        ends = (tuning.load_model(str(ref))[0] for ref in (start, runs / name / "0006"))
        before, after = (tuning.loss_of(model, batch, "cpu").item() for model in ends)
        assert after < before


def test_a_low_rank_tuning_leaves_the_start_as_it_was_and_loads(start, runs):
    model, _ = tuning.load_model(str(runs / "lora" / "0006"))
    base, _ = tuning.load_model(str(start))
    change = model.model.layers[0].mlp.gate_proj.weight - base.model.layers[0].mlp.gate_proj.weight
    assert torch.linalg.matrix_rank(change.detach(), atol=1e-5) <= RECIPE.rank
    assert change.abs().max() > 0
    assert torch.equal(model.model.embed_tokens.weight, base.model.embed_tokens.weight)


KILLED = """
import os, signal, sys
from pathlib import Path
from tests import test_tuning as t
from helpers.study import tuning
def report(said):
    if "step {}:" in said:
        os.kill(os.getpid(), signal.SIGKILL)
job = t.job({!r})
tuning.train(job, tuning.TUNINGS[{!r}], {!r}, 0, report)
"""


@pytest.mark.parametrize(("name", "step"), [("full", 4), ("lora", 4), ("continued", 1)])
def test_a_killed_tuning_goes_on_bit_for_bit(start, runs, tmp_path, name, step):
    script = KILLED.format(step, str(start), name, str(tmp_path / name))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / name / tuning.RUN).exists()
    assert (tmp_path / name / tuning.STATE).exists() == (step > 1)
    record = train(start, name, tmp_path / name)
    whole = tuning.read_runs(runs)[name]
    assert record["checkpoints"] == whole["checkpoints"]
    assert record["losses"] == whole["losses"]


def interrupted(start, folder, after=2):
    def report(said):
        if f"step {after + 2}:" in said:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuning.train(job(start), tuning.TUNINGS["full"], folder, 0, report)


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("what", ["rows", "recipe", "template", "start"])
def test_what_was_changed_in_between_is_refused(start, runs, tmp_path, what, finished):
    folder = tmp_path / "full"
    if finished:
        shutil.copytree(runs / "full", folder)
    else:
        interrupted(start, folder)
    other = tmp_path / "other"
    zoo.build("llama", num_hidden_layers=2, seed=5).save_pretrained(other)
    zoo.tokenizer().save_pretrained(other)
    rows = rows_to_tune_on()
    rows.loc[7, "reference"] = "zz"
    changed = {
        "rows": {"rows": rows},
        "recipe": {"recipe": replace(RECIPE, rate=2e-2)},
        "template": {"template": "tell: {instruction}\n"},
        "start": {"start": str(other)},
    }[what]
    with pytest.raises(RecordMismatch, match=what):
        tuning.train(
            job(start)._replace(**changed), tuning.TUNINGS["full"], folder, 0, lambda said: None
        )


def test_a_checkpoint_that_was_altered_is_refused(start, runs, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(runs / "full", folder)
    shutil.copy(folder / "0001" / "model.safetensors", folder / "0004" / "model.safetensors")
    with pytest.raises(DamagedFile, match="0004"):
        train(start, "full", folder)
    interrupted(start, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "0002")
    with pytest.raises(DamagedFile, match="0002"):
        train(start, "full", tmp_path / "again")


def test_a_loss_that_is_not_finite_ends_the_tuning_and_keeps_what_was(start, tmp_path):
    recipe = replace(RECIPE, rate=1e30)
    with pytest.raises(UserError, match=r"step \d: the loss is (nan|inf)"):
        train(start, "full", tmp_path / "full", recipe=recipe)
    assert not (tmp_path / "full" / tuning.RUN).exists()


def test_without_peft_a_low_rank_tuning_is_refused(start, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="needs the package peft"):
        train(start, "lora", tmp_path / "lora")


def test_a_start_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError):
        train(tmp_path / "nothing", "full", tmp_path / "full")


def test_tunings_of_different_starts_are_not_compared(runs, tmp_path):
    for name in ("full", "again"):
        shutil.copytree(runs / name, tmp_path / name)
    record = read_json(tmp_path / "again" / tuning.RUN)
    (tmp_path / "again" / tuning.RUN).write_text(json.dumps(record | {"start": "another"}))
    with pytest.raises(UserError, match="differ in their start"):
        tuning.read_runs(tmp_path)


# ---- rows to tune on


@pytest.mark.parametrize("how", ["text", "source", "near"])
def test_a_row_that_stands_in_hexainst_is_refused(how):
    rows = rows_to_tune_on(2)
    held = planted.rows(2).assign(source=[f"s, row {n}" for n in range(24)])
    leftover.refuse_overlap(rows, held)
    long = "one two three four five six seven eight nine ten eleven twelve"
    if how == "text":
        rows.loc[3, "instruction"] = held.loc[5, "instruction"]
    if how == "source":
        rows.loc[3, "source"] = "s, row 5"
    if how == "near":
        held.loc[5, "instruction"], rows.loc[3, "instruction"] = long, long + " thirteen"
    with pytest.raises(UserError, match=rf"row {rows['id'][3]} to tune on stands"):
        leftover.refuse_overlap(rows, held)


def test_nearest_is_that_of_a_loop():
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcd"), 12)) for _ in range(30)]
    some, others = texts[:12], texts[12:]
    found = leftover.nearest(some, others).set_index("row")
    for row, said in enumerate(some):
        own = leftover.shingles(said.split())
        jaccard = [
            len(own & g) / len(own | g) for g in (leftover.shingles(o.split()) for o in others)
        ]
        assert found["jaccard"].get(row, 0) == pytest.approx(max(jaccard))


def test_rows_come_back_from_disk_and_damage_is_one_line(tmp_path):
    rows = rows_to_tune_on()
    leftover.save_rows(tmp_path / "rows.jsonl", rows)
    assert leftover.rows_digest(leftover.read_rows(tmp_path / "rows.jsonl")) == (
        leftover.rows_digest(rows)
    )
    (tmp_path / "rows.jsonl").write_text('{"half')
    with pytest.raises(DamagedFile, match="rows to tune on"):
        leftover.read_rows(tmp_path / "rows.jsonl")
    with pytest.raises(UserError, match="human half"):
        leftover.gather_rows(planted.rows(2))
