"""A profile with a mistake in it is refused in one line that says what to do."""

import pytest

from helpers import config
from helpers.config import load_profile
from helpers.record import UserError

PAIR = "pairs: [{name: a, base: b, tuned: c}]\n"


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    monkeypatch.setattr(config, "PROFILES", tmp_path)
    return lambda text: (tmp_path / "mine.yaml").write_text(text)


@pytest.mark.parametrize("name", sorted(p.stem for p in config.PROFILES.glob("*.yaml")))
def test_shipped_profiles_load(name):
    profile = load_profile(name)
    assert profile.name == name and profile.pairs and "{instruction}" in profile.template


def test_the_papers_families_are_one_word_away():
    models = {pair.base for name in ("llama2-7b", "mistral-7b", "qwen15-moe") for pair in load_profile(name).pairs}
    assert models == {"meta-llama/Llama-2-7b-hf", "mistralai/Mistral-7B-v0.1", "Qwen/Qwen1.5-MoE-A2.7B"}


@pytest.mark.parametrize(("text", "says"), [
    ("dataset: tiny\n" + PAIR + "epsilonn: 0.1\n", "unknown key 'epsilonn', did you mean 'epsilon'"),
    ("dataset: tiny\npairs: [{name: a, base: b, tuned: c, dtyp: x}]\n", "did you mean 'dtype'"),
    ("dataset: tiny\npairs: [{name: a, base: b}]\n", "tuned missing"),
    (PAIR, "dataset missing"),
    ("dataset: tiny\npairs: []\n", "non-empty list `pairs`"),
    ("dataset: tiny\n" + PAIR + "epsilon: 5\n", "expected a share in (0, 1]"),
    ("dataset: tiny\n" + PAIR + "taus: [0, 0.5]\n", "taus holds 0"),
    ("dataset: tiny\n" + PAIR + "batch_size: many\n", "batch_size is 'many', expected int"),
    ("dataset: tiny\n" + PAIR + "batch_size: true\n", "batch_size is True, expected int"),
    ("dataset: tiny\n" + PAIR + "template: hello\n", "has no {instruction}"),
    ("dataset: [tiny\n", "not valid YAML"),
])
def test_mistakes_are_one_clear_error(profiles, text, says):
    profiles(text)
    with pytest.raises(UserError) as error:
        load_profile("mine")
    assert says in str(error.value) and "mine.yaml" in str(error.value)


def test_unknown_profile_lists_the_known_ones(profiles):
    profiles("dataset: tiny\n" + PAIR)
    with pytest.raises(UserError, match="unknown profile 'tny'.*Profiles: mine"):
        load_profile("tny")


def test_overrides_replace_keys_and_none_keeps_them(profiles):
    profiles("dataset: tiny\n" + PAIR + "epsilon: 0.1\nseed: 3\n")
    profile = load_profile("mine", epsilon=0.02, seed=None)
    assert (profile.epsilon, profile.seed, profile.name) == (0.02, 3, "mine")
