"""A profile with a mistake in it is refused in one line that says what to do."""

import json

import pytest

from helpers import config
from helpers.config import load_profile
from helpers.paths import MODELS
from helpers.record import UserError
from helpers.run.plan import plan

PAIR = "pairs: [{name: a, base: b, tuned: c}]\n"


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PROFILES", tmp_path)
    return lambda text: (tmp_path / "mine.yaml").write_text(text)


@pytest.mark.parametrize("name", sorted(p.stem for p in config.PROFILES.glob("*.yaml")))
def test_shipped_profiles_load(name):
    profile = load_profile(name)
    assert profile.name == name
    assert profile.pairs
    assert "{instruction}" in profile.template


def test_the_papers_families_are_one_word_away():
    models = {
        pair.base
        for name in ("llama2-7b", "mistral-7b", "qwen15-moe")
        for pair in load_profile(name).pairs
    }
    assert models == {
        "meta-llama/Llama-2-7b-hf",
        "mistralai/Mistral-7B-v0.1",
        "Qwen/Qwen1.5-MoE-A2.7B",
    }


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "dataset: tiny\n" + PAIR + "epsilonn: 0.1\n",
            "unknown key 'epsilonn', did you mean 'epsilon'",
        ),
        ("dataset: tiny\npairs: [{name: a, base: b, tuned: c, dtyp: x}]\n", "did you mean 'dtype'"),
        ("dataset: tiny\npairs: [{name: a, base: b}]\n", "tuned missing"),
        (PAIR, "dataset missing"),
        ("dataset: tiny\npairs: []\n", "non-empty list `pairs`"),
        (
            "dataset: tiny\n" + PAIR + "epsilon: 5\n",
            "epsilon holds 5, expected a share in (0, 0.99]",
        ),
        (
            "dataset: tiny\n" + PAIR + "epsilons: 0.1%\n",
            "epsilons is '0.1%', expected list or tuple",
        ),
        ("dataset: tiny\n" + PAIR + "sizes: [a]\n", "sizes holds 'a'"),
        ("dataset: tiny\n" + PAIR + "controls: 0\n", "controls is 0, expected 1 or more"),
        (
            "dataset: tiny\n" + PAIR + "scores: [freqency]\n",
            "scores holds ['freqency']. Known: frequency",
        ),
        (
            "dataset: tiny\npairs: [{name: a/../b, base: b, tuned: c}]\n",
            "pairs are named ['a/../b']",
        ),
        (
            "dataset: tiny\npairs: [{name: a, base: b, tuned: c}, {name: a, base: d, tuned: e}]\n",
            "expected different names",
        ),
        (
            "dataset: tiny\npairs: [{name: a, base: b, tuned: c, base_revision: 1234567}]\n",
            "base_revision is 1234567, expected str",
        ),
        ("dataset: tiny\n" + PAIR + "taus: [0, 0.5]\n", "taus holds 0"),
        ("dataset: tiny\n" + PAIR + "batch_size: many\n", "batch_size is 'many', expected int"),
        ("dataset: tiny\n" + PAIR + "batch_size: true\n", "batch_size is True, expected int"),
        ("dataset: tiny\n" + PAIR + "template: hello\n", "has no {instruction}"),
        ("dataset: [tiny\n", "not valid YAML"),
    ],
)
def test_mistakes_are_one_clear_error(profiles, text, says):
    profiles(text)
    with pytest.raises(UserError) as error:
        load_profile("mine")
    assert says in str(error.value)
    assert "mine.yaml" in str(error.value)


def test_unknown_profile_lists_the_known_ones(profiles):
    profiles("dataset: tiny\n" + PAIR)
    with pytest.raises(UserError, match="unknown profile 'tny'.*Profiles: mine"):
        load_profile("tny")


def test_a_profile_is_named_as_its_file(profiles):
    """Else its counts would land among another profile's."""
    profiles("name: tiny\ndataset: tiny\n" + PAIR)
    assert load_profile("mine").name == "mine"


def test_overrides_replace_keys_and_none_keeps_them(profiles):
    profiles("dataset: tiny\n" + PAIR + "epsilon: 0.1\nseed: 3\n")
    profile = load_profile("mine", epsilon=0.02, seed=None)
    assert (profile.epsilon, profile.seed, profile.name) == (0.02, 3, "mine")


def test_the_plan_knows_the_shipped_models():
    """Against the training records, and by counting the rows that notebook 06 reads for one set
    and its controls.
    """
    profile = load_profile("tiny")
    table = plan(profile)
    for pair in profile.pairs:
        record = json.loads((MODELS / pair.name / "base" / "training_record.json").read_text())
        assert table.loc[pair.name, "parameters"] == record["parameters"]
    assert table["neurons"].tolist() == [4 * 512, 4 * (8 * 128 + 64)]
    assert table["routed experts"].tolist() == [0, 4 * 8]
    rows, own, sets = profile.ablation_rows, profile.controls, profile.controls_all_rows
    once = sum(6 * rows + own * rows + sets * 6 * rows for _ in range(6))
    assert table["ablated sequences"].tolist() == [2 * 2 * once, 2 * 3 * once]
