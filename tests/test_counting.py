"""Capture on strings and on profiles: positions, reuse, refusal, generation with the cache,
several processes.
"""

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import zoo
from test_counter import differing

from helpers import record
from helpers.capture import budget, selfcheck
from helpers.capture.count import count, count_activations, count_encoded, flips
from helpers.capture.counter import watching
from helpers.capture.interventions import ablate, transplant
from helpers.capture.loading import load_model
from helpers.capture.sites import find_sites
from helpers.capture.tokens import encode, token_batches
from helpers.config import Pair, Profile
from helpers.hexainst import corpus
from helpers.paths import MODELS, ROOT, results_dir
from helpers.record import DamagedFile, RecordMismatch, UserError
from helpers.run import __main__ as command
from helpers.study import answers as answers_room
from helpers.study import counting
from helpers.study import study as room
from helpers.study.answers import continuations
from helpers.study.counting import twin_names
from helpers.study.study import Study

TEXTS = [
    "add 1 and 2.",
    "name a fish",
    "is it so? yes or no: a, b, c",
    "go",
    "sum: a long one, then another one.",
]
ROWS = pd.DataFrame(
    [
        {
            "instruction": t,
            "input": "" if i % 2 else f"no {i}.",
            "reference": f"it is {i}",
            "checker": {"name": "exact", "answer": f"it is {i}"},
        }
        for i, t in enumerate(TEXTS * 2)
    ]
)


@pytest.fixture(scope="module", params=["llama", "qwen2_moe"])
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    zoo.build(request.param).save_pretrained(folder, max_shard_size="100KB")
    zoo.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def setting(checkpoint, tmp_path, monkeypatch):
    """(profile, pair) whose counts go to a folder of their own, three instructions to a shard."""
    monkeypatch.setattr(room, "counts_dir", lambda *names: tmp_path.joinpath(*names))
    monkeypatch.setattr(room, "SHARD", 3)
    pair = Pair("pair", str(checkpoint), str(checkpoint))
    return Profile("test", "none", (pair,), batch_tokens=64, max_new_tokens=5), pair


def capture(profile, pair, variant, positions, rows):
    """The counts of a study made anew: nothing of it is in memory."""
    return Study(profile, pair, rows).counts(variant, positions)


def by_hand(model, tokenizer, text):
    """One text, one character (here: token) after the other, read from the activation modules'
    outputs.
    """
    ids, seen, hooks = tokenizer(text, return_tensors="pt")["input_ids"], [], []
    for layer in model.model.layers:
        hooks.append(layer.mlp.act_fn.register_forward_hook(lambda m, a, out: seen.append(out)))
    model(ids)
    [hook.remove() for hook in hooks]
    return np.stack([(a[0] > 0).sum(0).numpy() for a in seen])


def test_five_lines_count_any_model_on_any_strings():
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    counts = count(model, tokenizer, TEXTS, batch_tokens=64)
    for i, text in enumerate(TEXTS):
        assert counts.tokens[i] == len(text)
        assert (counts.neurons["dense"][i] == by_hand(model, tokenizer, text)).all()
    inputs = tokenizer(TEXTS[:2], return_tensors="pt", padding=True)
    with count_activations(model) as counter:
        streamed = counter(inputs["input_ids"], inputs["attention_mask"])
    assert (streamed.neurons["dense"] == counts.neurons["dense"][:2]).all()
    assert counts.layers == {"dense": (0, 1, 2)}
    assert counts.routed is None
    assert counts.neurons["dense"].dtype == np.uint16
    assert counts.tokens.dtype == np.int32


def test_the_template_changes_what_is_read_but_not_what_is_counted():
    model, tokenizer = zoo.build("llama"), zoo.tokenizer()
    bare, wrapped = (
        count(model, tokenizer, TEXTS, template=t)
        for t in ("{instruction}", "do: {instruction}\nthen")
    )
    assert (bare.tokens == wrapped.tokens).all()
    assert differing(bare, wrapped) > 100


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "gemma2", "mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss"]
)
def test_generated_tokens_count_as_they_do_step_by_step_with_the_cache(family):
    model, tokenizer = zoo.build(family), zoo.tokenizer()
    model.generation_config.eos_token_id = None
    prompts = encode(tokenizer, TEXTS[:3])
    answers = continuations(model, prompts, max_new_tokens=9)
    one_pass = count(model, tokenizer, TEXTS[:3], responses=answers)
    for i, prompt in enumerate(prompts):
        total, step = {}, 0
        with watching(model) as counter, torch.no_grad():
            cache = [None]

            def cached(run=model.base_model.forward, cache=cache, **inputs):
                out = run(**inputs | {"use_cache": True}, past_key_values=cache[0])
                cache[0] = out.past_key_values
                return out

            model.base_model.forward, plain = cached, model.base_model.forward
            try:
                counter(torch.tensor([prompt.ids]))
                for step, token in enumerate(answers[i], 1):
                    mask = torch.ones(1, len(prompt.ids) + step, dtype=torch.long)
                    counter.trunk = lambda mask=mask, **inputs: cached(
                        **inputs | {"attention_mask": mask}
                    )
                    for name, a in counter(torch.tensor([[token]])).arrays().items():
                        total[name] = total.get(name, 0) + a[0].astype(int)
            finally:
                model.base_model.forward = plain
        assert step == 9
        for name, a in one_pass.arrays().items():
            assert (a[i] == total[name]).all(), name


def test_a_model_split_over_memory_and_disk_gives_the_same_counts(checkpoint):
    split = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    whole, parted = (
        count(*load_model(str(checkpoint), device_map=device_map), TEXTS)
        for device_map in (None, split)
    )
    assert differing(whole, parted) == 0


# ---- a profile's counts
# --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", counting.POSITIONS)
def test_capture_keeps_what_count_gives_and_reuses_it(setting, positions, tmp_path, monkeypatch):
    profile, pair = setting
    model, tokenizer = load_model(pair.base)
    texts = [
        i + ("\n" + x if x else "") for i, x in zip(ROWS["instruction"], ROWS["input"], strict=True)
    ]
    found = capture(profile, pair, "base", positions, ROWS)
    responses = {
        "response": list(ROWS["reference"]),
        "generated": [
            r
            for t in texts
            for r in continuations(
                model, encode(tokenizer, [t], template=profile.template), max_new_tokens=5
            )
        ],
    }
    expected = count(
        model, tokenizer, texts, template=profile.template, responses=responses.get(positions)
    )
    if positions.startswith("prompt-"):
        other = capture(
            profile, pair, "base", {"prompt-even": "prompt-odd"}.get(positions, "prompt-even"), ROWS
        )
        assert (found.tokens + other.tokens == expected.tokens).all()
        assert abs(found.tokens - other.tokens).max() <= 1
        assert all(
            (found.neurons[f] + other.neurons[f] == expected.neurons[f]).all()
            for f in expected.neurons
        )
    else:
        assert differing(found, expected) == 0
    record = json.loads((tmp_path / "test/pair/base" / positions / "record.json").read_text())
    assert record["total"] == 10
    assert record["size"] == 3
    assert len(record["shards"]) == 4
    assert record["found"][0] | {"batching": 0, "made_with": 0} == {
        "device": "cpu",
        "attention": "sdpa",
        "batching": 0,
        "made_with": 0,
    }
    monkeypatch.setattr(room, "load_model", None)  # nothing is loaded again
    assert differing(capture(profile, pair, "base", positions, ROWS), found) == 0


def test_the_even_positions_are_the_first_third_and_so_on(setting):
    profile, pair = setting
    one = ROWS.iloc[3:4].assign(instruction="abc")
    model, tokenizer = load_model(pair.base)
    with count_activations(model) as counter:
        head = len(profile.template.partition("{")[0])
        ids = torch.tensor([encode(tokenizer, ["abc"], template=profile.template)[0].ids])
        mask = torch.zeros_like(ids)
        mask[0, [head, head + 2]] = 1
        expected = counter(ids, count_mask=mask)
    assert differing(capture(profile, pair, "base", "prompt-even", one), expected) == 0
    with pytest.raises(UserError, match="cannot be split in two"):
        capture(profile, pair, "tuned", "prompt-odd", one.assign(instruction="a"))


def test_the_twin_has_random_weights_and_its_own_folder(setting):
    profile, pair = setting
    base, twin = (capture(profile, pair, variant, "prompt", ROWS) for variant in ("base", "twin"))
    assert (base.tokens == twin.tokens).all()
    assert differing(base, twin) > 100
    with pytest.raises(RecordMismatch, match="seed"):
        capture(dataclasses.replace(profile, seed=1), pair, "twin", "prompt", ROWS)


def test_counts_of_twins_that_were_made_otherwise_are_refused(setting, monkeypatch):
    profile, pair = setting
    for variant in ("base", "twin"):
        capture(profile, pair, variant, "prompt", ROWS)
    monkeypatch.setattr(counting, "TWIN", counting.TWIN + 1)
    capture(profile, pair, "base", "prompt", ROWS)
    with pytest.raises(RecordMismatch, match="twin"):
        capture(profile, pair, "twin", "prompt", ROWS)


def test_twins_are_numbered_from_the_profiles_seed_on(setting):
    profile, pair = setting
    assert twin_names(0) == []
    assert twin_names(3) == ["twin", "twin-1", "twin-2"]
    twins = [capture(profile, pair, name, "prompt", ROWS) for name in twin_names(3)]
    assert all(differing(a, b) > 100 for a, b in zip(twins, twins[1:], strict=False))
    later = capture(
        dataclasses.replace(profile, seed=2, name="later"), pair, "twin", "prompt", ROWS
    )
    assert differing(later, twins[2]) == 0
    with pytest.raises(UserError, match="'twin-0', expected one of base, tuned, twin"):
        capture(profile, pair, "twin-0", "prompt", ROWS)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (
            lambda p, pair, rows: (dataclasses.replace(p, template="{instruction}"), pair, rows),
            "template",
        ),
        (
            lambda p, pair, rows: (dataclasses.replace(p, batch_tokens=99), pair, rows),
            "batch_tokens",
        ),
        (lambda p, pair, rows: (dataclasses.replace(p, name="other"), pair, rows), "profile"),
        (lambda p, pair, rows: (p, dataclasses.replace(pair, dtype="bfloat16"), rows), "dtype"),
        (lambda p, pair, rows: (p, pair, rows[::-1]), "data"),
        (lambda p, pair, rows: (p, pair, rows.assign(reference="else")), "data"),
    ],
)
def test_counts_made_under_other_settings_are_refused(setting, tmp_path, monkeypatch, change, key):
    profile, pair = setting
    monkeypatch.setattr(room, "counts_dir", lambda *names: tmp_path / "one" / names[-1])
    capture(profile, pair, "base", "response", ROWS)
    profile, pair, rows = change(profile, pair, ROWS)
    with pytest.raises(RecordMismatch, match=f"was made with {key} ="):
        capture(profile, pair, "base", "response", rows)


def test_counts_of_other_weights_are_refused(setting, tmp_path, checkpoint):
    shutil.copytree(checkpoint, tmp_path / "copy")
    profile, pair = setting[0], dataclasses.replace(setting[1], base=str(tmp_path / "copy"))
    capture(profile, pair, "base", "prompt", ROWS)
    weights = next((tmp_path / "copy").glob("model-00001*"))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(RecordMismatch, match="was made with weights ="):
        capture(profile, pair, "base", "prompt", ROWS)


def test_counts_of_other_versions_are_refused(setting, monkeypatch):
    profile, pair = setting
    capture(profile, pair, "base", "prompt", ROWS)
    now = room.versions()
    monkeypatch.setattr(
        room, "versions", lambda: now | {"pandas": "0.1"}
    )  # has no part in counting
    capture(profile, pair, "base", "prompt", ROWS)
    monkeypatch.setattr(room, "versions", lambda: now | {"torch": "0.1"})
    with pytest.raises(RecordMismatch, match="versions"):
        capture(profile, pair, "base", "prompt", ROWS)


def test_counts_of_an_older_meaning_are_refused(setting, monkeypatch):
    profile, pair = setting
    capture(profile, pair, "base", "prompt", ROWS)
    monkeypatch.setattr(room, "FORMAT", room.FORMAT + 1)
    with pytest.raises(RecordMismatch, match="format"):
        capture(profile, pair, "base", "prompt", ROWS)


def test_a_model_is_opened_only_if_something_is_missing_and_several_processes_open_their_own(
    setting, monkeypatch
):
    profile, pair = setting
    opened, open_model = [], room.open_model
    monkeypatch.setattr(room, "open_model", lambda *a: opened.append(a[1]) or open_model(*a))
    for _ in range(2):
        capture(profile, pair, "base", "prompt", ROWS)
    assert opened == ["base"]
    monkeypatch.setattr(counting, "launch", lambda job, n: opened.append((job["variant"], n)))
    with pytest.raises(DamagedFile):  # nobody counted anything
        capture(dataclasses.replace(profile, processes=2), pair, "tuned", "prompt", ROWS)
    assert opened == ["base", ("tuned", 2)]


@pytest.mark.parametrize(
    ("variant", "positions", "rows", "message"),
    [
        ("chat", "prompt", ROWS, "variant is 'chat'"),
        ("base", "all", ROWS, "positions is 'all'"),
        ("base", "prompt", ROWS[:0], "no rows"),
        ("base", "response", ROWS.assign(reference=""), "no counted token"),
        ("base", "prompt", ROWS.assign(instruction="x" * 300), "more than the 256"),
    ],
)
def test_what_cannot_be_captured_is_one_clear_error(setting, variant, positions, rows, message):
    with pytest.raises(UserError, match=message):
        capture(*setting, variant, positions, rows)


def test_a_generation_that_ends_at_once_has_no_tokens(setting, monkeypatch):
    monkeypatch.setattr(
        answers_room, "continuations", lambda model, encoded, **options: [[] for _ in encoded]
    )
    counts = capture(*setting, "base", "generated", ROWS)
    assert not counts.tokens.any()
    assert not any(c.any() for c in counts.neurons.values())


def test_flips_counts_the_cells_that_batching_moved():
    model = zoo.build("llama")
    encoded = encode(zoo.tokenizer(), TEXTS)
    counts = count_encoded(model, encoded)
    assert flips(model, encoded[:2], counts) == {
        "cells": 2 * (3 * zoo.N + 1),
        "differ": 0,
        "most": 0,
    }
    counts.neurons["dense"][1, 2, 3] += 2
    assert flips(model, encoded[:2], counts) == {
        "cells": 2 * (3 * zoo.N + 1),
        "differ": 1,
        "most": 2,
    }


@pytest.mark.parametrize("pair", sorted(p.name for p in MODELS.glob("tiny-*")))
def test_the_shipped_models_are_read_exactly(pair):
    model, tokenizer = load_model(str(MODELS / pair / "tuned"))
    alone, together = (count(model, tokenizer, ["Add 3 and 4.", "Name a town."], n) for n in (1, 2))
    assert differing(alone, together) == 0


# ---- several processes
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def profile_of_two(tmp_path):
    """A profile for two processes, whose results lie where the command line puts them."""
    checkpoint = tmp_path / "model"
    zoo.build("qwen2_moe").save_pretrained(checkpoint)
    zoo.tokenizer().save_pretrained(checkpoint)
    pair = Pair("pair", str(checkpoint), str(checkpoint))
    profile = Profile(f"test-{os.getpid()}", "none", (pair,), batch_tokens=64, processes=2)
    yield profile, pair
    shutil.rmtree(results_dir(profile.name), ignore_errors=True)


@pytest.mark.parametrize("checkpoint", ["llama"], indirect=True)
def test_base_and_tuned_read_the_same_tokens_or_nothing_is_counted(setting, checkpoint, tmp_path):
    """Markers of a chat format that are words of the tuned tokenizer alone."""
    profile, pair = setting
    tuned, tokenizer = tmp_path / "chat", zoo.tokenizer()
    shutil.copytree(checkpoint, tuned)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    tokenizer.save_pretrained(tuned)
    profile = dataclasses.replace(profile, template="<|user|>{instruction}")
    pair = dataclasses.replace(pair, tuned=str(tuned))
    with pytest.raises(UserError, match="pair: of '.* base reads .* tokens and tuned"):
        capture(profile, pair, "base", "prompt", ROWS)
    plain = dataclasses.replace(profile, template="{instruction}:")
    assert len(capture(plain, pair, "base", "prompt", ROWS).tokens) == len(ROWS)


def test_two_processes_leave_the_same_bytes_as_one(profile_of_two, tmp_path, monkeypatch):
    profile, pair = profile_of_two
    rows = pd.concat([ROWS] * 20, ignore_index=True)  # two shards of 128, 72
    Study(profile, pair, rows).shards("base")
    two = {
        p.name: p.read_bytes() for p in (results_dir(profile.name) / "pair/base/prompt").iterdir()
    }
    monkeypatch.setattr(room, "counts_dir", lambda *names: tmp_path / "one" / names[-1])
    capture(dataclasses.replace(profile, processes=1), pair, "base", "prompt", rows)
    assert {p.name: p.read_bytes() for p in (tmp_path / "one" / "prompt").iterdir()} == two
    assert len(two) == 5


def test_a_failure_in_the_processes_is_an_error_here(profile_of_two, capfd):
    profile, pair = profile_of_two
    with pytest.raises(UserError, match="2 capture processes ended with exit code"):
        capture(profile, pair, "base", "prompt", ROWS.assign(instruction="x" * 300))
    assert "more than the 256 that can be read" in capfd.readouterr().err


def test_the_command_line_captures_a_profile_or_says_what_is_wrong(
    setting, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(
        command,
        "load_profile",
        lambda name: dataclasses.replace(setting[0], name=name, processes=2, rows=4),
    )
    monkeypatch.setattr(command, "results_dir", tmp_path.joinpath)
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "tokens.jsonl"))
    every = ROWS.assign(half="ai", category=["CLS"] * 6 + ["QA"] * 4)
    monkeypatch.setattr(room, "load_hexainst", lambda dataset, subset: every)
    assert command.main(["count", "--profile", "mine", "--variants", "tuned"]) == 0
    assert sorted(p.name for p in (tmp_path / "mine/pair/tuned").iterdir()) == [
        "drawn-16-0.05",
        "drawn-32-0.05",
        "drawn-8-0.05",
        "prompt",
        "prompt-even",
        "prompt-odd",
        "response",
    ]
    assert "pair tuned response: 8 instructions" in capsys.readouterr().out  # four of each
    monkeypatch.undo()
    assert command.main(["count", "--profile", "no-such-profile"]) == 1
    assert "unknown profile 'no-such-profile'" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        command.main(["count", "--profile", "tiny", "--positions", "all"])
    assert "invalid choice: 'all'" in capsys.readouterr().err


# ---- a study: fewer rows, answers, models
# ---------------------------------------------------------------------------------------------


def named(rows=ROWS):
    """Rows of two categories in two folds."""
    return rows.assign(id=range(len(rows)), category=list("ab") * 5, fold=["x"] * 6 + ["y"] * 4)


def test_a_half_has_the_counts_answers_and_codes_of_its_own_rows(setting):
    study = Study(*setting, named())
    half = study.half("y")
    assert (study.halves, study.other("x"), study.categories) == (("x", "y"), "y", ("a", "b"))
    assert study.half("y") is half
    assert half.labels.tolist() == [0, 1, 0, 1]
    assert half.category("b").labels.tolist() == [1, 1]
    assert half.rows["id"].tolist() == half.places.tolist() == [6, 7, 8, 9]
    assert half.category("b").take([1]).rows["id"].tolist() == [9]
    for counts, part in (
        (study.counts(), half.counts()),
        (study.counts("base", "response"), half.counts("base", "response")),
    ):
        for name, array in counts.arrays().items():
            assert (part.arrays()[name] == array[6:]).all()
    assert half.answers() == study.answers()[6:]
    few = Study(dataclasses.replace(setting[0], ablation_rows=2), setting[1], named())
    assert few.half("x").measured().rows["id"].tolist() == [0, 1, 2, 3]


def test_answers_are_those_of_each_row_alone_and_kept(setting, tmp_path, monkeypatch):
    profile, pair = setting
    model, tokenizer = load_model(pair.tuned)
    study = Study(profile, pair, named())
    alone = [
        continuations(
            model,
            encode(tokenizer, [corpus.text(row)], template=profile.template),
            max_new_tokens=5,
        )[0]
        for row in ROWS.to_dict("records")
    ]
    files = tmp_path / "test/pair/tuned/answers"
    assert study.take([4]).answer_ids() == [alone[4]]
    assert [path.name for path in files.glob("*.safetensors")] == ["answers-00001.safetensors"]
    assert study.answer_ids() == alone
    assert study.answers() == study.generate()
    before = {path: path.read_bytes() for path in files.iterdir()}
    assert len(before) == 2 * 4
    next(iter(before)).write_bytes(b"half")
    monkeypatch.setattr(
        room, "answer_ids", lambda *args, own=room.answer_ids: calls.append(1) or own(*args)
    )
    calls = []
    assert Study(profile, pair, named()).answer_ids() == alone
    assert len(calls) == 1
    assert {path: path.read_bytes() for path in files.iterdir()} == before
    for change in ({"max_new_tokens": 6}, {"template": "{instruction} "}):
        with pytest.raises(RecordMismatch, match=f"made with {next(iter(change))}"):
            Study(dataclasses.replace(profile, **change), pair, named()).answers()
    with pytest.raises(RecordMismatch, match="made with data"):
        Study(profile, pair, named()[::-1]).answers()


PROMPTS = ["add 1 and 2", "a", "name 3 fish, please.", "x", "who?", "say hello twice", "b"]


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2_moe", "bart", "marian"])
def test_answers_in_a_batch_are_those_one_by_one(family, tmp_path, monkeypatch):
    """Whatever left padding does to a family's positions; what is tried first is no line of the
    ledger, and where it changes nothing lengths are batched as ever.
    """
    model, encoded = zoo.build(family), encode(zoo.tokenizer(), PROMPTS)
    model.generation_config.eos_token_id = None
    alone = [continuations(model, [one], max_new_tokens=8)[0] for one in encoded]
    monkeypatch.setenv(budget.LEDGER, str(tmp_path / "ledger"))
    assert continuations(model, encoded, max_new_tokens=8, batch_tokens=400) == alone
    lengths = [line["lengths"] for line in budget.lines_of(tmp_path / "ledger")]
    batches = token_batches(encoded, 400, "left", 8, answers_room.LOOSE)
    mixed = [[len(encoded[row].ids) for row in batch.rows] for batch in batches]
    assert any(len(set(some)) > 1 for some in mixed)
    if family in ("bart", "marian"):
        assert all(len(set(some)) == 1 for some in lengths)
        assert max(map(len, lengths)) > 1  # those of one length are together
    else:
        assert lengths == mixed


def test_whether_padding_moves_a_model_is_tried_once(monkeypatch):
    model, encoded, tried = zoo.build("llama"), encode(zoo.tokenizer(), PROMPTS), []
    own = selfcheck._generated
    monkeypatch.setattr(selfcheck, "_generated", lambda *args: tried.append(1) or own(*args))
    continuations(model, encoded[:1], max_new_tokens=2)  # nothing is padded
    assert not tried
    for _ in range(3):
        continuations(model, encoded, max_new_tokens=2)
    assert len(tried) == 2  # beside a longer row, and alone


def test_nothing_of_an_ablated_model_is_kept(setting, tmp_path):
    study = Study(*setting, named())
    model, intact = study.model()[0], study.generate()
    family = study.counts().family("neurons")
    mask = {family: np.ones_like(study.counts().neurons[family][0], bool)}
    with ablate(model, mask, "zero"):
        assert study.generate() != intact
        for ask in (study.answers, lambda: study.counts("tuned", "generated")):
            with pytest.raises(UserError, match="an intervention is open"):
                ask()
    assert not list(tmp_path.glob("test/pair/tuned/answers/*"))
    assert study.answers() == intact


def test_nothing_of_a_transplanted_or_hooked_model_is_kept(setting, tmp_path):
    study = Study(*setting, named())
    model, family = study.model()[0], study.counts().family("neurons")
    mask = {family: np.ones_like(study.counts().neurons[family][0], bool)}
    donor = zoo.build(model.config.model_type, seed=1)
    site = find_sites(model)[0]
    for opened in (
        lambda: transplant(model, donor, mask),
        lambda: site.down.register_forward_hook(lambda module, args, out: out * 0),
        lambda: site.module.register_forward_pre_hook(lambda module, args: (args[0] * 0,)),
    ):
        with opened():
            for ask in (study.answers, lambda: study.counts("tuned", "generated")):
                with pytest.raises(UserError, match="an intervention is open"):
                    ask()
    assert not list(tmp_path.glob("test/pair/tuned/answers/*"))
    with transplant(model, donor, {}):  # no neuron is another's
        assert study.answers() == study.generate()


def test_what_transformers_hangs_on_a_model_is_no_intervention(setting):
    study = Study(*setting, named())
    model = study.model()[0]
    model(torch.arange(3, 9)[None], output_hidden_states=True)  # installs hooks that stay
    assert any(part._forward_hooks for part in model.modules())
    assert len(study.answers()) == len(ROWS)


def test_a_model_is_loaded_once_and_let_go(setting, monkeypatch):
    study, opened = Study(*setting, named()), []
    monkeypatch.setattr(
        room, "open_model", lambda *a, own=room.open_model: opened.append(a[1]) or own(*a)
    )
    assert study.half("x").model() is study.model() is study.half("y").model()
    study.counts("twin")
    study.counts("twin-1")
    study.answers("twin-1")
    assert opened == ["tuned", "twin", "twin-1"]
    assert (list(study._models), list(study._spare)) == (["tuned"], ["twin-1"])
    study.close()
    assert not study._models | study._spare
    study.half("x").model()
    assert opened == ["tuned", "twin", "twin-1", "tuned"]


def test_a_model_is_opened_with_the_profiles_threads(setting):
    before = torch.get_num_threads()
    study = Study(dataclasses.replace(setting[0], threads=2), setting[1], named())
    study.model("tuned")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_files_are_read_once(setting, monkeypatch):
    Study(*setting, named()).counts()
    read = []
    monkeypatch.setattr(record, "load", lambda data, own=record.load: read.append(1) or own(data))
    study = Study(*setting, named())
    for _ in range(2):
        study.counts()
        study.half("x").counts()
    assert len(read) == 4


def test_a_study_without_a_base_has_the_tuned_model_and_its_twins(setting):
    profile, pair = setting
    study = Study(profile, dataclasses.replace(pair, base=None), named())
    assert (study.variants, study.has_base) == (("tuned",), False)
    assert (Study(profile, pair, named()).variants) == ("base", "tuned")
    assert differing(study.counts(), study.counts("twin")) > 100
    with pytest.raises(UserError, match="pair pair has no base model"):
        study.counts("base")


def test_units_are_those_that_the_model_has(setting):
    study = Study(*setting, named())
    sparse = study.counts().routed is not None
    assert study.units == (("neurons", "shared", "experts") if sparse else ("neurons",))


@pytest.mark.parametrize("size", ["abc", "", "0", "-1", "2"])
def test_a_number_of_processes_that_nobody_started_is_one_line(size):
    """At a second try, too; in a process of its own, for the first try leaves its mark."""
    code = "from helpers.record import UserError\nfrom helpers.study import counting\n"
    code += "for _ in range(2):\n try: counting.processes()\n except UserError as e: print(e)\n"
    env = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    run = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(
        run, env=env | {"WORLD_SIZE": size}, cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    for line in lines:
        assert line.startswith(f"WORLD_SIZE is {size!r}")
        assert line.endswith("Unset it, or start with torchrun or `accelerate launch`.")


LAUNCHED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    "text", ["# README", "[]", "{}", '{"profile": []}', '{"profile": {"pairs": [{"x": 1}]}}']
)
def test_a_job_that_is_none_is_one_line(text, tmp_path, capsys):
    (tmp_path / "job").write_text(text)
    assert command.main(["count", "--job", str(tmp_path / "job")]) == 1
    said = capsys.readouterr().err
    assert f"--job {tmp_path / 'job'} is no job of ours" in said
    assert len(said.splitlines()) == 1
