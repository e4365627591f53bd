"""Exported sets read back by plain torch, json, safetensors and csv and held against loops; LSN
files of others, hostile ones too; requests answered by a model that is ablated meanwhile.
"""

import csv
import json
import os
import pickle
import stat
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors import safe_open

from helpers.capture.interventions import ablate
from helpers.record import DamagedFile, UserError, sealed, write_tensors
from helpers.study import exports, harness
from tests.test_atlas import SHARE, sets_by_hand, study_of
from tests.test_evaluate import TOKENIZER
from tests.test_interventions import logits, neuron_mask
from tests.zoo import build


def sets_of(units, seed=0):
    """Random Sets; layers are numbered from 1 where there are experts, as behind a dense layer."""
    rng, start = np.random.default_rng(seed), int("experts" in units)
    shapes = {"neurons": (3, 7), "shared": (3, 5), "experts": (3, 4)}
    if "experts" in units:
        shapes["neurons"] = (3, 4, 7)
    members = {unit: rng.random((2, *shapes[unit])) < 0.3 for unit in units}
    layers = dict.fromkeys(units, tuple(range(start, start + 3)))
    return exports.Sets("pair", ("X", "Y"), members, layers, {"score": "contrast"})


DENSE, SPARSE = sets_of(["neurons"]), sets_of(["neurons", "shared", "experts"])


def test_lsn_files_hold_lists_of_tensors_of_numbers(tmp_path):
    path, about = exports.export(DENSE, "lsn", tmp_path)
    found = torch.load(path, weights_only=True)
    assert type(found) is list
    for c in range(2):
        for layer in range(3):
            numbers = found[c][layer]
            assert numbers.dtype == torch.int64
            want = [n for n in range(7) if DENSE.members["neurons"][c, layer, n]]
            assert numbers.tolist() == want
    assert json.loads(about.read_text())["categories"] == ["X", "Y"]
    assert (exports.read_lsn(path, (3, 7)) == DENSE.members["neurons"]).all()


def test_esft_files_name_the_experts_of_every_sparse_layer(tmp_path):
    *paths, about = exports.export(SPARSE, "esft", tmp_path)
    assert [path.name for path in paths] == ["pair-X.json", "pair-Y.json"]
    for c, path in enumerate(paths):
        found = json.loads(path.read_text())
        assert set(found) == {"experts", "shared_experts", "non_expert_modules"}
        assert found["shared_experts"] is found["non_expert_modules"] is False
        assert sorted(found["experts"]) == ["1", "2", "3"]
        for layer in range(3):
            want = [e for e in range(4) if SPARSE.members["experts"][c, layer, e]]
            assert found["experts"][str(layer + 1)] == want
    assert json.loads(about.read_text())["layers"] == {"experts": [1, 2, 3]}


@pytest.mark.parametrize("sets", [DENSE, SPARSE], ids=["dense", "sparse"])
def test_masks_and_tables_hold_the_same_members(tmp_path, sets):
    path, about = exports.export(sets, "safetensors", tmp_path)
    with safe_open(path, "numpy") as file:
        assert set(file.keys()) == set(sets.members)
        for unit in sets.members:
            assert file.get_tensor(unit).dtype == bool
            assert (file.get_tensor(unit) == sets.members[unit]).all()
    record = json.loads(about.read_text())
    assert (record["score"], record["pair"]) == ("contrast", "pair")
    again = exports.read_masks(path)
    assert (again.categories, again.layers) == (sets.categories, sets.layers)
    path, _ = exports.export(sets, "csv", tmp_path)
    with open(path, newline="") as file:
        found = {tuple(row.values()) for row in csv.DictReader(file)}
    want = set()
    for unit, members in sets.members.items():
        for code, layer, *inner in np.argwhere(members).tolist():
            inner = [*inner, ""] if unit == "experts" else ["", *inner][-2:]
            number = sets.layers[unit][layer]
            want.add((sets.categories[code], unit, str(number), *map(str, inner)))
    assert found == want


@pytest.mark.parametrize(
    "change",
    [
        {"pair": None},
        {"layers": [0, 1]},
        {"layers": {"neurons": 3}},
        {"layers": {"neurons": [0, 1]}},
        {"layers": {"others": [0, 1, 2]}},
        {"layers": {"neurons": [0, 1, "2"]}},
        {"categories": "ab"},
        {"categories": ["a"]},
        {"categories": [["a"], "b"]},
    ],
)
def test_a_file_of_something_else_is_not_read_as_masks(tmp_path, change):
    path, about = exports.export(DENSE, "safetensors", tmp_path)
    record = json.loads(about.read_text())
    about.write_text(json.dumps(sealed(record | change)))
    with pytest.raises(DamagedFile, match="holds no sets"):
        exports.read_masks(path)


def test_counts_are_not_read_as_masks(tmp_path):
    path = tmp_path / "counts.safetensors"
    write_tensors(path, {"neurons": np.ones((2, 3, 7), np.uint16)}, {"tokens": 9})
    with pytest.raises(DamagedFile, match="holds no sets"):
        exports.read_masks(path)
    about = {"pair": "p", "categories": ["a", "b"], "layers": {"neurons": [0, 1, 2]}}
    write_tensors(path, {"neurons": np.ones((2, 3, 7), np.uint16)}, about)
    with pytest.raises(DamagedFile, match="holds no sets"):
        exports.read_masks(path)


def test_a_studys_sets_are_its_atlas_sets():
    study = study_of("qwen2_moe", base=False)
    sets = exports.sets_of_study(study, "contrast", SHARE)
    assert set(sets.members) == {"neurons", "shared", "experts"}
    for unit, name in {"neurons": "neuron", "shared": "shared", "experts": "expert"}.items():
        for code, category in enumerate(study.categories):
            _, inside, outside, size = sets_by_hand(study, name)[category]
            member = sets.members[unit][code].ravel()
            assert member.sum() == size
            assert member[inside].all()
            assert not member[outside].any()


@pytest.fixture(autouse=True)
def _fixed(monkeypatch):
    monkeypatch.setattr("helpers.study.study.Study.checkpoint", lambda *args: {"weights": "w"})


def test_nothing_is_written_over_and_wrong_kinds_are_refused(tmp_path):
    path, about = exports.export(DENSE, "csv", tmp_path)
    path.write_text("mine")
    with pytest.raises(UserError, match="stands there already"):
        exports.export(DENSE, "csv", tmp_path)
    assert path.read_text() == "mine"
    for file in (path, about):
        file.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="stands there already"):
        exports.export(DENSE, "csv", tmp_path)
    with pytest.raises(UserError, match="'onnx' is unknown, expected one of lsn, esft"):
        exports.export(DENSE, "onnx", tmp_path)
    with pytest.raises(UserError, match="dense: there are no experts"):
        exports.export(DENSE, "esft", tmp_path)
    with pytest.raises(UserError, match="routed experts"):
        exports.export(SPARSE, "lsn", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        exports.export(DENSE, "lsn", tmp_path / "file" / "inside")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_said(tmp_path):
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    with pytest.raises(UserError, match="cannot write"):
        exports.export(DENSE, "lsn", tmp_path)


def numbers(*lists):
    return [torch.tensor(one, dtype=torch.int64) for one in lists]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([numbers([0], [1])], "2 layers, expected 3"),
        ([numbers([0], [7], [])], "neurons 0 to 7, but a layer has 7"),
        ([numbers([0], [-1], [])], "neurons -1 to 0"),
        ([[torch.tensor([0.5])] * 3], "whole numbers"),
        ([[torch.tensor([1]).to_sparse()] * 3], "whole numbers"),
        ([[torch.empty(1, dtype=torch.int64, device="meta")] * 3], "whole numbers"),
        ([[[1], [2], [3]]], "expected a tensor"),
        ({"en": numbers([0], [1], [2])}, "holds dict"),
        ([], "expected a list of lists"),
    ],
)
def test_lsn_files_of_another_shape_are_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(UserError, match=said):
        exports.read_lsn(tmp_path / "other.pth", (3, 7))


def test_lsn_files_may_have_empty_layers_of_any_type(tmp_path):
    torch.save([[torch.tensor([]), *numbers([6], [0, 1])]], tmp_path / "f.pth")
    found = exports.read_lsn(tmp_path / "f.pth", (3, 7))
    assert np.argwhere(found[0]).tolist() == [[1, 6], [2, 0], [2, 1]]


class Code:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("save", [torch.save, lambda x, f: f.write_bytes(pickle.dumps(x))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, save):
    save([[Code(tmp_path / "ran")] * 3], tmp_path / "bad.pth")
    with pytest.raises(UserError, match="nothing in it was run"):
        exports.read_lsn(tmp_path / "bad.pth", (3, 7))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"no pickle", b"PK\x03\x04" + bytes(50)])
def test_what_is_no_file_of_tensors_is_refused(tmp_path, content):
    (tmp_path / "f.pth").write_bytes(content)
    with pytest.raises(UserError, match="not a file of plain tensors"):
        exports.read_lsn(tmp_path / "f.pth", (3, 7))
    with pytest.raises(UserError, match="cannot be read"):
        exports.read_lsn(tmp_path / "none.pth", (3, 7))


def test_theirs_are_held_against_ours_beside_chance():
    theirs = sets_of(["neurons"], seed=1).members["neurons"]
    table = exports.compare(theirs, ["en", "zh"], DENSE)
    assert len(table) == 4
    rng = np.random.default_rng(0)
    for row in table.to_dict("records"):
        one = theirs[["en", "zh"].index(row["theirs"])]
        two = DENSE.members["neurons"][DENSE.categories.index(row["ours"])]
        first, second = ({tuple(x) for x in np.argwhere(s).tolist()} for s in (one, two))
        assert row["jaccard"] == pytest.approx(len(first & second) / len(first | second))
        assert (row["size_theirs"], row["size_ours"]) == (len(first), len(second))
        drawn = []
        for _ in range(3000):
            mixed = rng.permuted(one, axis=1)
            drawn.append((mixed & two).sum() / (mixed | two).sum())
        assert row["chance"] == pytest.approx(np.mean(drawn), abs=0.01)
    assert (exports.compare(DENSE.members["neurons"], "XY", DENSE)["jaccard"][[0, 3]] == 1).all()
    with pytest.raises(UserError, match="a name for each"):
        exports.compare(theirs, ["en"], DENSE)
    with pytest.raises(UserError, match="same layers and neurons"):
        exports.compare(theirs[:, :2], ["en", "zh"], DENSE)


# ---- the evaluation harness


class Plain:
    """As a harness model answers: three kinds of requests, from `self.model`."""

    def __init__(self, model):
        self.model = model

    def loglikelihood(self, requests, disable_tqdm=False):
        return logits(self.model)

    loglikelihood_rolling = generate_until = loglikelihood


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
def test_requests_are_answered_ablated_and_the_model_is_itself_again(kind):
    model = build("llama")
    mask, intact = neuron_mask(model), logits(model)
    lm = type("Lm", (harness.Ablating, Plain), {"mask": mask})(model)
    with ablate(model, mask, "zero"):
        want = logits(model)
    found = getattr(lm, kind)([], disable_tqdm=True)
    assert torch.equal(found, want)
    assert not torch.equal(found, intact)
    assert torch.equal(logits(model), intact)
    assert torch.equal(type("Lm", (harness.Ablating, Plain), {})(model).loglikelihood([]), intact)


ROWS = pd.DataFrame(
    {
        "instruction": [f"is {word} a or b?" for word in ("one", "two", "three", "four")],
        "input": "",
        "checker": [{"name": "label", "labels": ["a", "b", "cc"], "answer": x} for x in "abab"],
    }
)


def test_a_task_of_labels_is_a_file_that_the_harness_reads(tmp_path):
    path = harness.label_task(ROWS, tmp_path, "own_task", "say: {instruction}\n")
    task = yaml.safe_load(path.read_text())
    assert (task["task"], task["target_delimiter"]) == ("own_task", "")
    [data] = task["dataset_kwargs"]["data_files"].values()
    lines = [json.loads(line) for line in Path(data).read_text().splitlines()]
    assert [line["choices"][line["answer"]] for line in lines] == list("abab")
    assert lines[0]["prompt"] == "say: is one a or b?\n"
    labels = {"name": "label", "labels": ["Negative", "*positive*."], "answer": "Positive"}
    path = harness.label_task(ROWS.assign(checker=[labels] * 4), tmp_path, "spelt")
    assert {json.loads(line)["answer"] for line in path.with_suffix(".jsonl").open()} == {1}
    for bad in (labels | {"answer": "neutral"}, {"name": "label", "labels": ["a"]}, "label", None):
        rows = ROWS.assign(id=list("wxyz"), checker=[labels, labels, bad, labels])
        with pytest.raises(UserError, match="row y: .*checker"):
            harness.label_task(rows, tmp_path, "none")
    with pytest.raises(UserError, match="stands there already"):
        harness.label_task(ROWS, tmp_path, "own_task")
    for template in ("say it", "{instruction} {instruction}"):
        with pytest.raises(UserError, match=r"expected \{instruction\} in it, once"):
            harness.label_task(ROWS, tmp_path, "bare", template)
    with pytest.raises(UserError, match="nothing to choose from"):
        harness.label_task(
            ROWS.assign(checker=[{"name": "exact", "answer": "a"}] * 4), tmp_path, "other"
        )
    with pytest.raises(UserError, match="cannot name a file"):
        harness.label_task(ROWS, tmp_path, "../up")


def test_without_the_harness_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.models.huggingface", None)
    with pytest.raises(UserError, match="pip install lm-eval"):
        harness.ablated_lm(build("llama"), TOKENIZER)


def test_the_harness_gives_the_accuracy_of_a_loop(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-eval is an optional extra: pip install lm-eval")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model, template = build("llama"), "say: {instruction}\n"
    mask = neuron_mask(model, share=0.8)
    path = harness.label_task(ROWS, tmp_path, "own_task", template)
    table = harness.evaluate(model, TOKENIZER, [path], {"intact": None, "gone": mask}, batch_size=2)
    assert table[["set", "task", "metric", "n"]].to_numpy().tolist() == [
        [name, "own_task", "acc", 4] for name in ("intact", "gone")
    ]

    def right(row):
        start = TOKENIZER(template.replace("{instruction}", row["instruction"]))["input_ids"]
        scores = []
        for label in row["checker"]["labels"]:
            ids = [*start, *TOKENIZER(label, add_special_tokens=False)["input_ids"]]
            with torch.no_grad():
                chance = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(float(chance[t - 1, ids[t]]) for t in range(len(start), len(ids))))
        return int(np.argmax(scores)) == row["checker"]["labels"].index(row["checker"]["answer"])

    want = [np.mean([right(row) for row in ROWS.to_dict("records")])]
    with ablate(model, mask, "zero"):
        want.append(np.mean([right(row) for row in ROWS.to_dict("records")]))
    assert table["value"].tolist() == want
