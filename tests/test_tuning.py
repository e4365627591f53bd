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
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers import plots
from helpers.config import Pair, Profile
from helpers.hexainst import leftover
from helpers.paths import ROOT
from helpers.record import DamagedFile, RecordMismatch, UserError, read_json, sealed, write_json
from helpers.run import __main__ as command
from helpers.study import evaluate, ledger, planted, tuned, tuning, tuning_tables
from tests import zoo

torch.set_num_threads(1)
DATA = pd.DataFrame({"category": ["CLS", "MATH", "CLS"], "tokens": [200, 100, 50]})
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
    return zoo.saved(tmp_path_factory.mktemp("start"), "llama", num_hidden_layers=2)


def job(start, **changes):
    return tuning.Job(str(start), rows_to_tune_on(), RECIPE, planted.TEMPLATE)._replace(**changes)


def train(start, name, folder, **changes):
    return tuning.train(job(start, **changes), tuning.TUNINGS[name], folder, 0, lambda said: None)


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """All tunings."""
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


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("words", ["abcdef", "aab", "aabbcc", "aaabcd", "aaabbbccc", "ab"])
def test_dealt_answers_are_the_same_answers_none_at_its_own_place(words, seed):
    references = list(np.random.default_rng(seed).permutation(list(words)))
    if words == "aab":
        with pytest.raises(UserError, match="2 of 3 references .* same words"):
            tuning.dealt(references, seed)
        return
    found = tuning.dealt(references, seed)
    assert sorted(found) == sorted(references)
    assert all(one != other for one, other in zip(found, references, strict=True))
    assert found == tuning.dealt(references, seed)


def test_answers_are_dealt_from_all_rows_and_not_by_their_place():
    """Of 60 different answers, half go to each half of the rows; another seed deals others."""
    references = [str(number) for number in range(60)]
    first, second = (np.array(tuning.dealt(references, seed), int) for seed in (0, 1))
    assert 8 < (first[:30] >= 30).sum() < 22
    assert (first != second).mean() > 0.8
    assert len(set(first - np.arange(60))) > 20


def test_a_dealt_tuning_reads_the_prompts_of_the_full_one_and_teaches_other_answers(start):
    rows = rows_to_tune_on().assign(category="MATH")
    rows["reference"] = [f"{row} " * (1 + n % 3) for n, row in enumerate(rows["id"])]
    read = {
        name: tuning.reading(zoo.tokenizer(), rows, tuning.TUNINGS[name], RECIPE, planted.TEMPLATE)
        for name in ("full", "dealt")
    }

    def parts(one):
        return [[t for t, c in zip(one.ids, one.counted, strict=True) if c == k] for k in (0, 1)]

    full, dealt = ([parts(one) for one in read[name]] for name in ("full", "dealt"))
    assert [prompt for prompt, _ in full] == [prompt for prompt, _ in dealt]
    assert sorted(answer for _, answer in full) == sorted(answer for _, answer in dealt)
    assert [answer for _, answer in full] != [answer for _, answer in dealt]


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


KILLED_IN_KEEP = """
import os, signal
from tests import test_tuning as t
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
t.train({!r}, "full", {!r})
"""


def test_a_draft_of_a_killed_tuning_is_removed_by_the_next(start, runs, tmp_path):
    folder = tmp_path / "full"
    script = KILLED_IN_KEEP.format(str(start), str(folder))
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == -signal.SIGKILL
    (draft,) = folder.glob(".0001.*")
    assert (draft / "model.safetensors").is_file()
    (folder / ".mine").mkdir()
    train(start, "full", folder)
    assert [path.name for path in folder.glob(".*")] == [".mine"]
    assert read_json(folder / tuning.RUN) == read_json(runs / "full" / tuning.RUN)


def test_a_second_tuning_in_one_folder_is_one_line(start, runs, tmp_path):
    folder = tmp_path / "full"
    shutil.copytree(runs / "full", folder)
    with tuning.alone(folder / tuning.RUN):
        with pytest.raises(UserError, match="another process is writing .*full"):
            train(start, "full", folder)
        train(start, "lora", tmp_path / "lora")
    train(start, "full", folder)
    assert not list(folder.glob(".*"))


WHOLE = {"start": "a", "rows": "b", "template": "c", "recipe": {}, "losses": []}
STEP = {"checkpoints": {"0001": "0" * 64}}
ODD = [
    {},
    [],
    5,
    WHOLE,
    STEP,
    WHOLE | {"checkpoints": []},
    WHOLE | {"checkpoints": {}},
    WHOLE | {"checkpoints": {"../../1": "0" * 64}},
    WHOLE | {"checkpoints": {"0001": 5}},
    WHOLE | STEP | {"recipe": []},
    WHOLE | STEP | {"losses": None},
]


@pytest.mark.parametrize("record", ODD)
def test_a_record_that_is_none_of_a_tuning_is_one_line(start, tmp_path, record):
    folder = tmp_path / "full"
    folder.mkdir()
    (folder / tuning.RUN).write_text(json.dumps(record))
    with pytest.raises(DamagedFile, match=r"run\.json.*Delete it"):
        tuning.read_runs(tmp_path)
    with pytest.raises(DamagedFile, match=r"run\.json.*Delete it"):
        train(start, "full", folder)


@pytest.mark.parametrize("key", ["done", "read", "losses", "checkpoints"])
def test_a_state_that_lacks_something_is_one_line(start, tmp_path, key):
    interrupted(start, tmp_path / "full")
    path = (tmp_path / "full" / tuning.STATE).with_suffix(".json")
    record = read_json(path)
    for change in ({key: None}, {key: "4"}):
        path.write_text(json.dumps(record | change))
        with pytest.raises(DamagedFile, match=rf"state\.json: {key} is .*Delete it"):
            train(start, "full", tmp_path / "full")
    del record[key]
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedFile, match=f"{key} is 'missing'"):
        train(start, "full", tmp_path / "full")


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
    zoo.saved(other, "llama", num_hidden_layers=2, seed=5)
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


ROW = rows_to_tune_on(1).to_dict("records")[0]


@pytest.mark.parametrize(
    "text",
    ["", "\n", "5\n", "[" * 100_000, "{}\n", "9" * 5000, json.dumps(ROW) + "\n5\n", "\xff"]
    + [json.dumps({k: v for k, v in ROW.items() if k != key}) for key in ("id", "input", "tags")]
    + [json.dumps(ROW | change) for change in ({"tags": {}}, {"tags": 1}, {"reference": None})],
)
def test_what_are_no_rows_to_tune_on_is_one_line(tmp_path, text):
    (tmp_path / "rows.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedFile, match=r"rows\.jsonl holds no rows .* --gather"):
        leftover.read_rows(tmp_path / "rows.jsonl")


# ---- what is measured


def plan_of(start, folder, out, per_half=6):
    pair = Pair("start", None, str(start))
    settings = {"resamples": 100, "controls": 2, "ablation_rows": 5, "batch_tokens": 1024}
    profile = Profile("p", "none", (pair,), template=planted.TEMPLATE, epsilon=0.1, **settings)
    rows = planted.rows(per_half)
    rows["tags"] = [{"wording": name} for name in rows["id"]]
    rows["reference"] += rows.groupby("category").cumcount().astype(str)
    return tuned.Plan(profile, rows, RECIPE, folder, out, "cpu", 3, 5, 4)


@pytest.fixture(scope="module")
def measured(start, runs, tmp_path_factory):
    """All tunings measured: (plan, what was kept)."""
    plan = plan_of(start, runs, tmp_path_factory.mktemp("tables"))
    tuned.Tunings(plan, tuning.read_runs(runs), lambda said: None).measure()
    return plan, tuning_tables.read_measured(plan.out, 200)


def sets_of(ref, rows, epsilon=0.1):
    """Each row's most frequent neurons, by a loop: the model's own gates, one row at a time."""
    model, tokenizer = tuning.load_model(str(ref))
    found, gates = [], []
    hooks = [
        layer.mlp.act_fn.register_forward_hook(lambda m, i, o: gates.append(o))
        for layer in model.model.layers
    ]
    read = tuned.encode_rows(tokenizer, rows, planted.TEMPLATE, "prompt")
    for one in read:
        gates.clear()
        with torch.no_grad():
            model(torch.tensor([one.ids]))
        counted = torch.tensor(one.counted)
        found.append(torch.cat([(g[0] > 0)[counted].sum(0) for g in gates]).numpy())
    for hook in hooks:
        hook.remove()
    return np.array([top(counts, epsilon) for counts in found])


def top(counts, epsilon):
    """At least the cut's count, and on at all."""
    cut = np.sort(counts)[::-1][round(epsilon * len(counts)) - 1]
    return (counts >= cut) & (counts > 0)


def test_similarities_are_those_of_a_loop_over_rows(start, runs, measured):
    plan, found = measured
    before, after = (sets_of(ref, plan.rows) for ref in (start, runs / "full" / "0006"))
    jaccard = (before & after).sum(1) / (before | after).sum(1)
    arrays = found.part("changed-full")[0]
    assert arrays["similarity"] == pytest.approx(jaccard, abs=1e-6)
    some = plan.first(3)
    middle = sets_of(runs / "full" / "0002", plan.rows.iloc[some])
    for key, end in (("near", before[some]), ("settled", after[some])):
        expected = (middle & end).sum(1) / (middle | end).sum(1)
        assert arrays[key][2] == pytest.approx(expected, abs=1e-6)
    assert arrays["steps"].tolist() == [0, 1, 2, 4, 6]
    again = sets_of(runs / "again" / "0006", plan.rows)
    expected = (after & again).sum(1) / (after | again).sum(1)
    assert found.part("pairs")[0]["full~again"] == pytest.approx(expected, abs=1e-6)


def test_the_loss_along_a_tuning_is_each_checkpoints_own(start, runs, measured):
    plan, found = measured
    rows = plan.rows.iloc[plan.first(3)]
    for name in ("full", "lora"):
        curve = found.part(f"changed-{name}")[0]["loss"]
        for at, ref in ((0, start), (2, runs / name / "0002"), (4, runs / name / "0006")):
            model, tokenizer = tuning.load_model(str(ref))
            encoded = tuned.encode_rows(tokenizer, rows, planted.TEMPLATE, "response")
            expected = evaluate.nll(model, encoded)
            assert curve[at] == pytest.approx(expected, abs=1e-4)


def test_what_is_kept_is_not_measured_again_and_other_tunings_are_refused(start, runs, measured):
    plan, _ = measured
    said = []
    known = tuning.read_runs(runs)
    before = {path: path.stat().st_mtime_ns for path in plan.out.glob("*.safetensors")}
    tuned.Tunings(plan, known, said.append).measure()
    assert before == {path: path.stat().st_mtime_ns for path in plan.out.glob("*.safetensors")}
    assert len(said) == len(before)
    changed = known | {"full": known["full"] | {"checkpoints": {"0006": "another"}}}
    with pytest.raises(RecordMismatch, match="tunings"):
        tuned.Tunings(plan, changed, said.append).measure()
    tuned.write_runs(plan.out, known)


def test_published_tables_are_those_of_one_plan_whole(measured, tmp_path):
    """Former tables are gone, a user's own files are not; nor are those beside the tables read."""
    plan, found = measured
    mine = ("README.md", "notes.csv", "model.safetensors", "package.json", "able-mine.json")
    former = ("weights-alone.safetensors", "weights-alone.json", "pairs.json")
    (plan.out / "notes.csv").write_text("others")
    for name in (*mine, *former):
        (tmp_path / name).write_text("{}")
    tuned.publish(plan, tmp_path)
    (plan.out / "notes.csv").unlink()
    made = {path.name for path in plan.out.iterdir() if not path.name.startswith(".")}
    assert {path.name for path in tmp_path.iterdir()} == {*made, *mine}
    for name in mine:
        assert (tmp_path / name).read_text() == "{}"
        (tmp_path / name).unlink()
    assert all((tmp_path / name).read_bytes() == (plan.out / name).read_bytes() for name in made)
    assert tuning_tables.read_measured(tmp_path).parts.keys() == found.parts.keys()


def test_only_all_tunings_of_the_committed_model_are_complete(measured, runs, tmp_path):
    plan, _ = measured
    named = plan._replace(profile=replace(plan.profile, name="smollm2"))
    assert tuned.complete(named)
    assert not tuned.complete(plan)
    shutil.copytree(runs, tmp_path / "some")
    shutil.rmtree(tmp_path / "some" / "lora")
    assert not tuned.complete(named._replace(folder=tmp_path / "some"))


def test_parts_are_known_by_the_rows_that_ablations_were_measured_on(measured, runs):
    """Where the first rows share a wording, as many others are measured."""
    plan, _ = measured
    few = plan._replace(profile=replace(plan.profile, ablation_rows=2))
    alike = few.rows.groupby(["fold", "category"]).cumcount() < 2
    tags = [
        {"wording": "one" if one else row} for one, row in zip(alike, few.rows["id"], strict=True)
    ]
    known = tuning.read_runs(runs)
    want = tuned.Tunings(few, known).want()
    other = tuned.Tunings(few._replace(rows=few.rows.assign(tags=tags)), known).want()
    assert {key for key in want if want[key] != other[key]} == {"measured"}


def changes_of(rows):
    """Rows of the same ids and texts, each otherwise in one way that decides a part."""
    names = list(pd.unique(rows["category"]))
    turned = dict(zip(names, names[1:] + names[:1], strict=True))
    labels = [{"name": "label", "answer": ref, "labels": [ref, "x"]} for ref in rows["reference"]]
    return {
        "category": rows["category"].map(turned),
        "half": rows["half"].map({"A": "B", "B": "A"}),
        "checker": labels,
    }


@pytest.mark.parametrize("column", ["category", "half", "checker"])
def test_parts_are_known_by_what_else_rows_say_of_themselves(measured, runs, column):
    plan, _ = measured
    other = plan._replace(rows=plan.rows.assign(**{column: changes_of(plan.rows)[column]}))
    known = tuning.read_runs(runs)
    want, changed = tuned.Tunings(plan, known).want(), tuned.Tunings(other, known)
    assert [key for key in want if want[key] != changed.want()[key]] == ["rows"]
    with pytest.raises(RecordMismatch, match="made with rows"):
        changed.measure()


def test_parts_are_known_by_what_is_read_around_rows_and_in_which_numbers(measured, runs):
    plan, _ = measured
    other = plan._replace(profile=replace(plan.profile, template="so: {instruction}"))
    known = tuning.read_runs(runs)
    want, changed = tuned.Tunings(plan, known).want(), tuned.Tunings(other, known)
    assert [key for key in want if want[key] != changed.want()[key]] == ["template"]
    with pytest.raises(RecordMismatch, match="made with template"):
        changed.measure()
    assert f"torch.{want['dtype']}" == str(changed.loaded("start")[0].dtype)


def test_the_committed_parts_were_read_in_the_template_that_was_tuned_in():
    committed = sorted(tuned.TABLES.glob("*.safetensors"))
    around = {run["template"] for run in tuned.kept_runs(tuned.TABLES).values()}
    records = [read_json(path.with_suffix(".json")) for path in committed]
    assert {(record["template"], record["dtype"]) for record in records} == {
        (template, "float32") for template in around
    }
    assert len(around) == 1


def test_a_part_of_other_rows_is_refused_by_the_tables(measured, tmp_path):
    plan, _ = measured
    shutil.copytree(plan.out, tmp_path / "tables")
    path = tmp_path / "tables" / "pairs.json"
    write_json(path, sealed(read_json(path) | {"rows": "others"}))
    with pytest.raises(RecordMismatch, match="rows"):
        tuning_tables.read_measured(tmp_path / "tables")


def test_every_declared_claim_is_asked_and_its_numbers_are_means_of_rows(measured):
    plan, found = measured
    numbers = tuning_tables.numbers(found, tuning_tables.asked(found))
    claims = ledger.read_ledger(tunings=True)
    halves, categories = ["all", "A", "B"], list(pd.unique(plan.rows["category"]))
    tests = ledger.judge(ledger.look_up(claims, numbers, halves, categories))
    asked = {(row["id"], c) for row in claims.to_dict("records") for c in row["components"].split()}
    assert {(i, c) for i, c in asked if i != "tuning-matter"} <= set(
        zip(tests["id"], tests["components"], strict=True)
    )
    able = {name: found.part(f"able-{name}")[0] for name in ("start", "full")}
    here = plan.rows["category"].to_numpy()[able["full"]["rows"]] == "CODE"
    fell = (able["start"]["own"] - able["full"]["own"])[here].mean()
    assert numbers["full"]["tuning.likelier.all.CODE.improved"] == pytest.approx(fell, abs=1e-6)
    alike = {name: found.part(f"changed-{name}")[0]["similarity"] for name in found.runs}
    gap = (alike["continued"] - alike["full"]).mean()
    assert numbers["full"]["tuning.neurons.all.beyond"] == pytest.approx(gap, abs=1e-6)
    more, category = alike["full"] - alike["alone"], plan.rows["category"].to_numpy()
    means = {c: more[category == c].mean() for c in categories}
    own = means.pop("MATH") - np.mean(list(means.values()))
    assert numbers["alone"]["tuning.neurons.all.own"] == pytest.approx(own, abs=1e-6)


def test_beside_a_control_a_tunings_components_are_compared_row_by_row(measured):
    """By hand: the rows that both measured, one minus the other; a control has no control."""
    _, found = measured
    table = tuning_tables.matters_more(found, "full")
    for part, (what, rows) in tuning_tables.CARRIED.items():
        for control in tuned.CONTROLS:
            mine, theirs = (
                dict(zip(arrays[rows].tolist(), arrays[what].tolist(), strict=True))
                for arrays in (found.part(f"{part}-{name}")[0] for name in ("full", control))
            )
            both = [mine[row] - theirs[row] for row in mine if row in theirs]
            asked = table[(table["what"] == what) & (table["control"] == control)]
            row = asked.set_index("half").loc["all"]
            assert row["n"] == len(both) > 0
            assert row["value"] == pytest.approx(np.mean(both), abs=1e-6)
            assert row["key"] == f"tuning.{part}.{control}.all.{what}"
    assert set(tuning_tables.matters_more(found, "alone")["control"]) == {"continued"}
    for control in tuned.CONTROLS:
        assert tuning_tables.matters_more(found, control).empty
        assert tuning_tables.needs_pairing(found, control).empty
    assert tuning_tables.needs_pairing(found, "alone").empty


def test_rows_of_a_control_are_matched_by_their_place_not_by_their_order(measured):
    """The control's rows stand the other way round, and one of them is gone."""
    _, found = measured
    arrays, record = found.part("transplant-dealt")
    turned = {key: values[:0:-1] for key, values in arrays.items()}
    parts = found.parts | {"transplant-dealt": (turned, record)}
    table = tuning_tables.matters_more(found._replace(parts=parts), "full")
    asked = table[(table["what"] == "forward") & (table["control"] == "dealt")]
    mine = found.part("transplant-full")[0]
    both = [
        value - turned["forward"][turned["rows"] == row].item()
        for value, row in zip(mine["forward"], mine["rows"], strict=True)
        if row in turned["rows"]
    ]
    row = asked.set_index("half").loc["all"]
    assert row["n"] == len(both) == len(mine["rows"]) - 1
    assert row["value"] == pytest.approx(np.mean(both), abs=1e-6)


def test_what_is_kept_row_by_row_has_the_means_of_its_table(measured):
    _, found = measured
    for name in found.runs:
        for part, whats in (
            ("matter", ("gained", "kept", "lost")),
            ("transplant", ("forward", "reverse")),
        ):
            arrays, record = found.part(f"{part}-{name}")
            stated = {(row["what"], row["half"]): row for row in record[part]}
            for what in whats:
                rows = arrays["rows" if part == "transplant" else f"{what}_rows"]
                half = found.rows["half"].to_numpy()[rows]
                for one in ("A", "B"):
                    if not (half == one).any():
                        continue
                    value = stated[what, one]["effect" if part == "transplant" else "critical"]
                    assert value == pytest.approx(arrays[what][half == one].mean(), abs=1e-5)


def test_dealt_answers_are_a_control_of_their_own(measured):
    plan, found = measured
    beyond = tuning_tables.beyond(found, "full").set_index(["what", "half", "category"])["value"]
    alike = {name: found.part(f"changed-{name}")[0]["similarity"] for name in found.runs}
    pairs = found.part("pairs")[0]
    gap = (alike["dealt"] - alike["full"]).mean()
    assert beyond["beyond_dealt", "all", ""] == pytest.approx(gap, abs=1e-6)
    gap = (pairs["full~again"] - pairs["full~dealt"]).mean()
    assert beyond["pairing", "all", ""] == pytest.approx(gap, abs=1e-6)
    assert tuning_tables.beyond(found, "dealt").empty
    able = {name: found.part(f"able-{name}")[0] for name in ("dealt", "full")}
    here = plan.rows["category"].to_numpy()[able["full"]["rows"]] == "CODE"
    better = tuning_tables.needs_pairing(found, "full").set_index(["measure", "half", "category"])
    fell = (able["dealt"]["own"] - able["full"]["own"])[here].mean()
    assert better.loc[("likelier", "all", "CODE"), "value"] == pytest.approx(fell, abs=1e-6)


def test_where_a_tuning_changed_more_is_its_change_minus_the_controls_cell_by_cell(measured):
    _, found = measured
    table = tuning_tables.where(found)
    category = found.rows["category"].to_numpy()
    for row in table.to_dict("records"):
        control = row["panel"].removeprefix("beyond ")
        here = category == row["category"], row["layer"]
        change = found.part("changed-full")[0]["layers"][here].astype(float)
        if control != "noise":
            change = change - found.part(f"changed-{control}")[0]["layers"][here].astype(float)
        assert row["value"] == pytest.approx(change.mean(), abs=1e-6)
        assert row["low"] <= row["value"] <= row["high"]
    assert set(table["panel"]) == {f"beyond {name}" for name in ("noise", *tuned.CONTROLS)}
    assert len(table) == 3 * 2 * len(set(category))
    fates = found.part("changed-full")[1]["fates"]
    change = found.part("changed-full")[0]["layers"].astype(float).mean(0)
    assert change == pytest.approx([row["floor"] - row["kept"] for row in fates], abs=1e-3)
    assert all(row["kept"] + row["gained"] + row["lost"] == pytest.approx(1) for row in fates)
    for _, panel in table.groupby("panel"):
        told, others = panel[panel["beyond"]]["p"], panel[~panel["beyond"]]["p"]
        assert (told < 0.05).all()
        assert told.empty or others.empty or told.max() <= others.min()


def test_the_page_has_its_tables_and_sentences(measured):
    _, found = measured
    table = tuning_tables.resemblance(found)
    assert np.allclose(table, table.T)
    assert tuning_tables.budgets(found, DATA)["tokens"].between(360, 400).all()
    made = tuning_tables.trajectories(found)
    assert set(made["panel"]) <= set(found.runs) - set(tuned.CONTROLS)
    assert np.isfinite(made["value"]).all()
    asked = tuning_tables.asked(found)
    said = tuning_tables.sentences(tuning_tables.numbers(found, asked), asked["improved"])
    assert sum(line.startswith("full: they moved") for line in said) == len(tuned.CONTROLS)
    assert tuning_tables.ends(found)[0].startswith("Most like full")


def test_a_single_tuning_and_none_have_their_tables(measured):
    _, found = measured
    for names in (["continued"], []):
        some = found._replace(runs={name: found.runs[name] for name in names})
        numbers = tuning_tables.numbers(some, tuning_tables.asked(some))
        assert list(numbers) == names


def test_differences_are_drawn_at_their_own_step():
    table = pd.DataFrame({"panel": "p", "line": list("aaabb"), "n": 3, "value": range(5)})
    table = table.assign(low=table["value"] - 1, high=table["value"] + 1, step=[0, 10, 100, 0, 100])
    fig = plots.alteration.differences(table, "y", "none", ["a", "b"])
    drawn = [line.get_xdata().tolist() for line in fig.axes[0].lines[:2]]
    assert drawn == [[0, 1, 2], [0, 2]]


def test_where_a_tuning_changed_is_dotted_in_the_cells_that_are_told(measured):
    """Every dot stands in the middle of a told cell, its colour is that cell's value."""
    cells = pd.DataFrame([(c, n) for c in "AB" for n in range(7)], columns=["category", "layer"])
    told = [(0, 2), (5, 0), (6, 1)]
    cells = cells.assign(panel="beyond x", n=3, value=np.arange(14) - 5.0)
    places = zip(cells["layer"], cells["category"] == "B", strict=True)
    cells["beyond"] = [place in told[:1] + told[2:] or place == told[1] for place in places]
    cells.loc[cells["beyond"].to_numpy().nonzero()[0], "value"] = 9.0
    ax = plots.alteration.where(cells).axes[0]
    dots = ax.collections[-1].get_offsets()
    expected = [
        (r.layer + 0.5, (r.category == "B") + 0.5) for r in cells[cells["beyond"]].itertuples()
    ]
    assert sorted(map(tuple, dots.tolist())) == sorted(expected)
    grid = ax.collections[0].get_array().reshape(2, 7)
    assert grid.tolist() == cells["value"].to_numpy().reshape(2, 7).tolist()


def test_a_sentence_says_the_side_that_the_number_is_on():
    improved = pd.DataFrame({"tuning": []})
    key = "tuning.neurons.all.beyond"

    def said(value, low, high, p):
        known = {key: value, f"{key}_ci": [low, high], "tuning.neurons.all.p_beyond": p}
        return tuning_tables.sentences({"full": known}, improved)[0]

    under = "under continued language modelling, by"
    assert (
        said(0.2, 0.1, 0.3, 0.01) == f"full: they moved further than {under} 0.200 [0.100, 0.300]."
    )
    assert said(-0.2, -0.3, -0.1, 1.0) == (
        f"full: they moved less far than {under} 0.200 [0.100, 0.300]."
    )
    assert said(0.2, 0.1, 0.3, 0.2).endswith("[0.100, 0.300], not told from 0.")
    assert said(-0.2, -0.3, 0.1, 0.2).endswith("0.200 [-0.100, 0.300], not told from 0.")


def test_against_the_control_a_tuning_is_what_it_is_beyond_the_start_minus_what_the_control_is(
    measured,
):
    _, found = measured
    keys = ["measure", "half", "category"]
    of = {
        name: tuning_tables.improved(found, name).set_index(keys)["value"]
        for name in ("full", "continued")
    }
    better = tuning_tables.better(found, "full").set_index(keys).loc[of["full"].index]
    assert better["value"].to_numpy() == pytest.approx((of["full"] - of["continued"]).to_numpy())
    assert better["chance"].notna().any()
    assert better.query("measure == 'gain'")["chance"].isna().all()
    assert tuning_tables.better(found, "continued").empty


def test_how_often_a_tunings_rows_were_read(measured):
    _, found = measured
    times = tuning_tables.budgets(found, DATA).set_index("tuning")["times"]
    tokens = found.runs["alone"]["losses"][-1][1]
    assert times["alone"] == tokens / 100
    assert times["full"] == found.runs["full"]["losses"][-1][1] / 350
    assert np.isnan(times["continued"])


def test_differences_along_the_steps_are_those_of_the_parts(measured):
    _, found = measured
    table = tuning_tables.apart(found)
    assert list(pd.unique(table["line"])) == ["full", "dealt", "again", "lora", "alone"]
    control = found.part("changed-continued")[0]["near"].mean(1)
    for name, rows in table.groupby("line"):
        own = found.part(f"changed-{name}")[0]
        assert rows["value"].to_numpy() == pytest.approx(control - own["near"].mean(1), abs=1e-6)
        assert rows["step"].tolist() == own["steps"].tolist()


def test_a_tuning_that_left_the_loss_as_it_was_has_no_shares_of_its_change(measured):
    _, found = measured
    arrays, record = found.part("changed-full")
    loss = arrays["loss"].copy()
    loss[-1] = loss[0] + np.resize([1e-3, -1e-3], loss.shape[1])
    idle = found._replace(parts=found.parts | {"changed-full": (arrays | {"loss": loss}, record)})
    assert tuning_tables.led(idle, "full")["note"].str.contains("did not change").all()
    gone = arrays | {"loss": np.linspace(loss[0], loss[0] - 1, len(loss))}
    moved = found._replace(parts=found.parts | {"changed-full": (gone, record)})
    assert "full" not in set(tuning_tables.trajectories(idle)["panel"])
    assert "full" in set(tuning_tables.trajectories(moved)["panel"])
    assert (tuning_tables.led(moved, "full")["note"] == "").all()


def test_a_file_of_other_weights_is_refused(start, runs):
    model, _ = tuning.load_model(str(start))
    with pytest.raises(DamagedFile, match="other weights"):
        tuned.fill(model, runs / "lora" / "0006" / "adapter_model.safetensors")
    tuned.fill(model, runs / "full" / "0006" / "model.safetensors")
    other, _ = tuning.load_model(str(runs / "full" / "0006"))
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True)
    )


def test_a_plan_needs_one_model_alone():
    with pytest.raises(UserError, match="one model alone"):
        tuned.planned("tiny", "cpu")


@pytest.mark.parametrize("device", ["gpu", "mps", "", "cuda", "cuda:0", "cuda:x", "cpu:0", "meta"])
def test_a_device_that_is_not_there_is_refused_before_anything(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match=f"--device is '{device}', .* cpu; torch .* sees no GPU"):
        tuned.planned("smollm2", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    if device not in ("cuda", "cuda:0"):
        with pytest.raises(UserError, match="cpu, cuda, cuda:0, cuda:1; torch .* sees 2 GPUs"):
            tuned.planned("smollm2", device)


def test_tables_beside_other_runs_are_refused(measured, tmp_path):
    """Whose tables these are is in runs.json: another one beside them is not believed."""
    plan, _ = measured
    for file in plan.out.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    runs = read_json(tmp_path / tuned.RUNS)
    runs["full"]["checkpoints"] = runs["again"]["checkpoints"]
    tuned.write_runs(tmp_path, {name: runs[name] for name in tuning.TUNINGS})
    with pytest.raises(RecordMismatch, match="names other tunings"):
        tuning_tables.read_measured(tmp_path)


def reordered(path):
    head, *lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([head, *lines[::-1]]))


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("rows.csv", reordered),
        ("rows.csv", cut),
        ("rows.csv", Path.unlink),
        ("rows.csv", lambda path: path.write_text("")),
        ("data.csv", cut),
        ("runs.json", lambda path: path.write_text('{"full": {}}')),
        ("runs.json", lambda path: write_json(path, read_json(path) | {"full": {}})),
        ("changed-full.json", lambda path: write_json(path, read_json(path) | {"churned": []})),
    ],
)
def test_committed_tables_that_were_changed_are_refused_by_name(tmp_path, name, harm):
    for file in tuned.TABLES.iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    assert len(tuning_tables.read_measured(tmp_path).rows) == 1200
    harm(tmp_path / name)
    with pytest.raises(DamagedFile, match=name):
        tuning_tables.read_measured(tmp_path)


def test_what_was_drawn_by_another_seed_is_not_taken_for_this_one(measured):
    plan, _ = measured
    other = plan._replace(profile=replace(plan.profile, seed=1))
    runs = tuning.read_runs(plan.folder)
    assert tuned.Tunings(plan, runs).want() != tuned.Tunings(other, runs).want()


def test_some_tunings_alone_are_tuned_and_not_measured(monkeypatch, capsys):
    tuned_now = []
    plan = SimpleNamespace(start="s", recipe=RECIPE, device="cpu", folder=Path("f"))
    monkeypatch.setattr(tuned, "planned", lambda *_: plan)
    monkeypatch.setattr(tuned, "rows_to_tune_on", lambda *_: None)
    monkeypatch.setattr(tuning, "train", lambda job, one, folder: tuned_now.append(one.name))
    monkeypatch.setattr(tuning, "read_runs", lambda _: {"lora": {}})
    monkeypatch.setattr(tuned, "Tunings", None)  # nothing is measured
    assert command.main(["tune", "--tunings", "lora", "alone"]) == 0
    assert tuned_now == ["lora", "alone"]
    finished = f"1 of {len(tuning.TUNINGS)} tunings are finished. Run without --tunings"
    assert finished in capsys.readouterr().out


def test_a_row_that_is_measured_is_not_taught(monkeypatch, tmp_path):
    """Whatever data set the profile measures, not HexaInst alone."""
    rows = planted.rows(2).assign(source=None)
    plan = SimpleNamespace(rows=rows)
    monkeypatch.setattr(tuned, "CACHED", tmp_path / "rows.jsonl")
    monkeypatch.setattr(tuned, "gathered", lambda _: (rows, None))
    monkeypatch.setattr(tuned, "load_hexainst", lambda **_: planted.rows(1).iloc[:0])
    with pytest.raises(UserError, match="to tune on stands in HexaInst, or nearly so"):
        tuned.rows_to_tune_on(plan)
