"""A profile with a mistake in it is refused in one line that says what to do."""

import dataclasses
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import config, paths
from helpers.config import Pair, Profile, load_profile
from helpers.hexainst.schema import load_hexainst
from helpers.paths import DATA, MODELS
from helpers.plots.style import save_figure
from helpers.record import UserError
from helpers.run import __main__ as command
from helpers.run.plan import plan
from helpers.study.needed import ablations

PAIR = "pairs: [{name: a, base: b, tuned: c}]\n"
ODD = ("010", "-007", "08.5", "1:30", "1:30.5", "0x1F", "0b11", "1_000", "1_0.5", "010e1")


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "PROFILES", tmp_path)
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
        (f"{PAIR}epsilonn: 0.1", "unknown key 'epsilonn', did you mean 'epsilon'"),
        ("pairs: [{name: a, base: b, tuned: c, dtyp: x}]", "did you mean 'dtype'"),
        ("pairs: [{name: a, base: b}]", "pairs[0]: tuned missing"),
        ("pairs: [{tuned: b}]", "pairs[0]: name missing"),
        (f"dataset: ''\n{PAIR}", "dataset is '', expected text of 1 to 1000"),
        ("pairs: []", "pairs is (), expected 1 to 100 pairs"),
        ("pairs: null", "pairs is None, expected 1 to 100 pairs"),
        ("pairs: a", "pairs is 'a', expected 1 to 100 pairs"),
        ("pairs: [null]", "pairs[0] is None, expected `key: value`"),
        ("pairs: [[a]]", "pairs[0] is ['a'], expected `key: value`"),
        (f"{PAIR}epsilon: 5", "epsilon is 5, expected a share in (0, 0.99]"),
        (f"{PAIR}epsilon: .nan", "epsilon is nan, expected a share"),
        (f"{PAIR}tau: .inf", "tau is inf, expected a share in (0, 1]"),
        (f"{PAIR}tau: true", "tau is True, expected a share"),
        (f"{PAIR}epsilons: 0.1%", "epsilons is '0.1%', expected 1 to 100 shares in (0, 0.99]"),
        (f"{PAIR}epsilons: [null]", "epsilons[0] is None, expected 1 to 100 shares"),
        (f"{PAIR}epsilons: [0.1, [0.1]]", "epsilons[1] is [0.1], expected 1 to 100 shares"),
        (f"{PAIR}epsilons: []", "epsilons is [], expected 1 to 100 shares"),
        (f"{PAIR}epsilons: {{0.1: 1}}", "epsilons is {0.1: 1}, expected 1 to 100 shares"),
        (f"{PAIR}taus: []", "taus is [], expected"),
        (f"{PAIR}scores: []", "scores is [], expected"),
        (f"{PAIR}sizes: []", "sizes is [], expected"),
        (f"{PAIR}sizes: [a]", "sizes[0] is 'a', expected"),
        (f"{PAIR}sizes: [0.05, 0.05000000001]", "expected each once"),
        (f"{PAIR}sizes: [0.05]", "expected 2 to 100 shares"),
        (f"{PAIR}taus: [0, 0.5]", "taus[0] is 0, expected"),
        (f"{PAIR}scores: [freqency]", "scores[0] is 'freqency', expected 1 to 100 scores of freq"),
        (f"{PAIR}scores: [[a]]", "scores[0] is ['a'], expected"),
        (f"{PAIR}scores: [lape, lape]", "expected each once"),
        (f"{PAIR}controls: 0", "controls is 0, expected a whole number from 1 to"),
        (f"{PAIR}seed: -1", "seed is -1, expected a whole number from 0 to 4294967295"),
        (f"{PAIR}seed: 4294967296", "seed is 4294967296, expected"),
        (f"{PAIR}seed: 0x{'f' * 9999}", "no plain decimal number"),
        (f"{PAIR}seed: {'9' * 9999}", "not valid YAML"),
        (f"{PAIR}batch_tokens: many", "batch_tokens is 'many', expected a whole number"),
        (f"{PAIR}batch_tokens: true", "batch_tokens is True, expected a whole number"),
        (f"{PAIR}batch_tokens: 8.0", "batch_tokens is 8.0, expected a whole number"),
        (f"{PAIR}batch_tokens: 1e30", "batch_tokens is 1e+30, expected a whole number"),
        (f"{PAIR}batch_tokens: {10**30}", f"batch_tokens is {10**30}, expected a whole number"),
        (f"{PAIR}threads: 100000", f"the {config.CORES} cores of this machine"),
        (f"{PAIR}jobs: 1000000", f"the {config.CORES} cores of this machine"),
        (f"{PAIR}processes: 1000000", f"the {config.CORES} cores of this machine"),
        (f"{PAIR}run_code: 1", "run_code is 1, expected true or false"),
        (f"{PAIR}chat: 'no'", "chat is 'no', expected true or false"),
        (f"{PAIR}subset: half", "subset is 'half', expected one of full, matched"),
        (f"{PAIR}rows: 0", "rows is 0, expected a whole number from 1 to 1000000, or nothing"),
        (f"{PAIR}grid: ../../x", "grid is '../../x', expected 1 to 64 letters"),
        (f"{PAIR}template: hello", "expected {instruction} in it, once"),
        (
            f"{PAIR}template: '{{instruction}} {{instruction}}'",
            "expected {instruction} in it, once",
        ),
        (f"{PAIR}dataset: 2020-01-01", "dataset is datetime.date(2020, 1, 1), expected text"),
        (f'{PAIR}dataset: "a\\0b"', "expected no control characters"),
        (f'{PAIR}dataset: "\\ud800"', "dataset is '\\ud800', expected"),
        ("pairs: [{name: a/../b, base: b, tuned: c}]", "name is 'a/../b', expected 1 to 64"),
        (f"pairs: [{{name: {'a' * 300}, tuned: c}}]", "expected 1 to 64 letters"),
        ('pairs: [{name: "a\\n", tuned: c}]', "name is 'a\\n', expected 1 to 64"),
        ("pairs: [{name: Ä, tuned: c}]", "name is '\\xc4', expected 1 to 64"),
        ("pairs: [{name: Summary, tuned: c}]", "name results of our own"),
        ("pairs: [{name: notebooks, tuned: c}]", "name results of our own"),
        ("pairs: [{name: grid, tuned: c}]", "name results of our own"),
        ("pairs: [{name: summary.json, tuned: c}]", "name results of our own"),
        ("pairs: [{name: count.tokens.jsonl, tuned: c}]", "name results of our own"),
        ("pairs: [{name: verdicts.csv, tuned: c}]", "name results of our own"),
        ("pairs: [{name: tuning_tests.csv, tuned: c}]", "name results of our own"),
        ("pairs: [{name: d, tuned: c}, {name: D, tuned: e}]", "expected each once"),
        ("pairs: [{name: a, base: b, tuned: c, base_revision: 1234567}]", "expected text of 1"),
        ("pairs: [{name: a, base: data/x, tuned: c, base_revision: m}]", "expected a hub id"),
        ("pairs: [{name: a, base: notebooks, tuned: c, base_revision: m}]", "expected a hub id"),
        ("pairs: [{name: a, tuned: c, base_revision: m}]", "base is None, expected a hub id"),
        ("pairs: [{name: a, tuned: 'pypi:a==1/b', tuned_revision: m}]", "expected a hub id"),
        ("pairs: [{name: a, tuned: c, dtype: int8}]", "expected one of float32"),
        ("pairs: [{name: a, tuned: c, device_map: gpu}]", "expected auto, balanced"),
        (f"{PAIR}seed: 1\nseed: 2", "key 'seed' stands twice"),
        ("pairs: [{name: a, tuned: c, tuned: d}]", "key 'tuned' stands twice"),
        (f"{PAIR}sizes: &a [0.1]\ntaus: *a", "'a' is an anchor, alias or tag"),
        ("pairs: &p [*p]", "'p' is an anchor"),
        (f"{PAIR}<<: {{seed: 1}}", "a key must be a word"),
        (f"{PAIR}? [a]\n: 1", "a key must be a word"),
        (f"{PAIR}seed: !!python/object/apply:os.getcwd []", "is an anchor, alias or tag"),
        (f"{PAIR}seed: !!int ''", "is an anchor, alias or tag"),
        (f"{PAIR}sizes: {'[' * 20_000}", "too many levels"),
        (f"{PAIR}dataset: {'x' * 70_000}", "longer than 65536 bytes"),
        (f"{PAIR}dataset: {'é' * 70_000}", "longer than 65536 bytes"),
        (f"{PAIR}1: 2", "unknown key 1"),
        *((f"{PAIR}rows: {number}", f"'{number}' is no plain decimal number") for number in ODD),
        (f"{PAIR}rows: 0o17", "rows is '0o17', expected a whole number"),
        (f"{PAIR}sizes: [0.1, 00.5]", "'00.5' is no plain decimal number"),
        (f"{PAIR}dataset: 2020-99-99", "not valid YAML"),
        ("dataset: [tiny", "not valid YAML"),
        ("a\n---\nb", "not valid YAML"),
        ("- a", "holds ['a'], expected lines `key: value`"),
        ("", "holds None, expected lines"),
    ],
)
def test_mistakes_are_one_clear_error(profiles, text, says):
    profiles(text if "dataset" in text else f"{text}\ndataset: tiny\n")
    if text in ("", "- a"):
        profiles(text)
    with pytest.raises(UserError) as error:
        load_profile("mine")
    assert says in str(error.value)
    assert "mine.yaml" in str(error.value)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("text", ["0.1", ".1", "+0.1", "1e-1", "1.e-1", "1E-1", ".01e1", "10e-2"])
def test_a_decimal_number_is_read_as_it_is_meant(profiles, text):
    profiles(f"{PAIR}dataset: tiny\nepsilon: {text}\n")
    assert load_profile("mine").epsilon == 0.1


def test_what_is_swept_is_swept_from_small_to_large(profiles):
    profiles(
        f"dataset: tiny\n{PAIR}sizes: [0.2, 0.05, 0.1]\nepsilons: [0.1, 0.02]\ntaus: [1.0, 0.5]"
    )
    found = load_profile("mine")
    assert found.sizes == (0.05, 0.1, 0.2)
    assert (found.epsilons, found.taus) == ((0.02, 0.1), (0.5, 1.0))


def test_in_quotes_anything_is_a_text(profiles):
    profiles('pairs: [{name: "010", tuned: "1:30"}]\ndataset: "0x1F"\n')
    found = load_profile("mine")
    assert (found.pairs[0].name, found.pairs[0].tuned, found.dataset) == ("010", "1:30", "0x1F")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-p", "seed", "2024-99-99"], "-p seed: '2024-99-99' is not valid YAML"),
        (["-p", "seed", "9" * 5000], "is not valid YAML"),
        (["-p", "taus", "[" * 2000], "too many levels"),
        (["-p", "taus", "{" * 2000], "too many levels"),
        (["-p", "taus", "[&a 1, *a]"], "anchor, alias or tag"),
        (["-p", "seed", "010"], "'010' is no plain decimal number"),
        (["-p", "seed", "a\0b"], "is not valid YAML"),
        (["-p", "seed", "1", "-p", "seed", "2"], "-p seed stands twice, the last as '2'"),
        (["-p", "seed", "1", "-p", "seed", "1"], "-p seed stands twice"),
    ],
)
def test_a_bad_value_on_the_command_line_is_one_line(arguments, says, capsys, monkeypatch):
    monkeypatch.setattr("helpers.run.chain.run", lambda *given: pytest.fail("it ran"))
    assert command.main(["chain", *arguments]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert said.startswith("error: ")
    assert len(said.splitlines()) == 1
    assert len(said) < 1000


def test_a_value_on_the_command_line_is_read_as_a_profiles():
    given = [("epsilon", "1e-3"), ("taus", "[0.5, 1.0]"), ("seed", "7"), ("name", "'010'")]
    found = {"epsilon": 0.001, "taus": [0.5, 1.0], "seed": 7, "name": "010"}
    assert command.values_of([*given, ("grid", "null")]) == found | {"grid": None}


def test_a_missing_data_set_is_said(profiles):
    profiles(PAIR)
    with pytest.raises(UserError, match="dataset missing, expected text"):
        load_profile("mine")


@pytest.mark.parametrize("name", ["site", "Bench.json", "plans.csv", "planted"])
def test_a_profile_is_not_named_as_what_stands_beside_its_results(profiles, name):
    profiles(f"dataset: a\n{PAIR}")
    (paths.PROFILES / "mine.yaml").rename(paths.PROFILES / f"{name}.yaml")
    with pytest.raises(UserError, match=f"named '{name}', .*name results of our own. Rename"):
        load_profile(name)


def test_every_fault_is_in_the_one_message(profiles):
    profiles(f"dataset: 1\n{PAIR}seed: -1\ntau: 7\n")
    with pytest.raises(UserError, match=r"dataset is 1, .* seed is -1, .* tau is 7, "):
        load_profile("mine")


def test_a_file_that_is_no_text_is_one_clear_error(profiles, tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"dataset: tiny\ntemplate: caf\xe9\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 2: not UTF-8"):
        load_profile("mine")


@pytest.mark.parametrize(
    "name", ["../../../outside", "/etc/passwd", "a/b", "", ".hid", "-p", "a\n", "x" * 65, None, 3]
)
def test_a_name_that_would_leave_the_folder_is_refused(name):
    for use in (load_profile, paths.results_dir, paths.figures_dir):
        with pytest.raises(UserError, match="profile .* cannot name a file or folder"):
            use(name)
    for names in (("p", name, "v", "q"), ("p", "a", name, "q"), ("p", "a", "v", name)):
        with pytest.raises(UserError, match="cannot name a file or folder"):
            paths.counts_dir(*names)


def test_a_figures_name_stays_in_its_folder():
    with pytest.raises(UserError, match="figure '../x' cannot name a file"):
        save_figure(None, None, "../x", "tiny")


def test_paths_of_users_start_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths.resolve("data/mine.jsonl") == paths.ROOT / "data/mine.jsonl"
    assert paths.resolve(tmp_path / "x") == tmp_path / "x"
    assert paths.resolve("~/x") == tmp_path / "x"
    assert len(load_hexainst(dataset="data/hexainst/tiny.jsonl")) == len(
        load_hexainst(dataset="tiny")
    )


@pytest.mark.parametrize(
    ("pair", "base"),
    [
        ("tuned: org/m", None),
        ("base: org/m, tuned: org/m", None),
        ("base: data/models, tuned: ./data/../data/models/", None),
        ("base: org/m, base_revision: v1, tuned: org/m, tuned_revision: v1", None),
        ("base: org/m, base_revision: v1, tuned: org/m, tuned_revision: v2", "org/m"),
        ("base: org/m, tuned: org/n", "org/m"),
    ],
)
def test_one_model_is_enough_and_one_model_twice_is_one(profiles, pair, base):
    profiles(f"dataset: tiny\npairs: [{{name: a, {pair}}}]\n")
    (found,) = load_profile("mine").pairs
    assert found.base == base
    assert ("What compares base and tuned is left out" in found.note) == (base is None)


def test_a_profile_comes_back_from_what_json_makes_of_it():
    """As the processes of one capture get it."""
    profile = load_profile("tiny-full")
    values = json.loads(json.dumps(dataclasses.asdict(profile)))
    pairs = tuple(Pair(**pair) for pair in values["pairs"])
    assert Profile(**values | {"pairs": pairs}) == profile


def test_settings_are_held_in_range_wherever_they_are_replaced():
    with pytest.raises(ValueError, match="seed"):
        dataclasses.replace(load_profile("tiny"), seed=-1)


KEYS = [*Profile.__pydantic_fields__, *Pair.__pydantic_fields__]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.dates()
)
ANY = st.recursive(
    LEAVES,
    lambda kind: st.one_of(
        st.lists(kind, max_size=3),
        st.dictionaries(st.one_of(st.sampled_from(KEYS), LEAVES), kind, max_size=4),
    ),
    max_leaves=12,
)
GOOD = {"dataset": "tiny", "pairs": [{"name": "a", "tuned": "b"}]}


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(st.one_of(ANY, st.dictionaries(st.sampled_from(KEYS), ANY).map(lambda v: GOOD | v)))
def test_any_object_is_a_profile_or_a_user_error(values):
    refused_or_loaded(yaml.safe_dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text("[]{}:,-?!&*|><%@\"'#~0123e.x \n\tyn", max_size=60).map(str.encode),
    ),
    st.booleans(),
)
def test_any_bytes_are_a_profile_or_a_user_error(data, after):
    refused_or_loaded(b"dataset: tiny\npairs: [{name: a, tuned: b}]\n" * after + data)


def refused_or_loaded(data):
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "PROFILES", Path(folder))
        (Path(folder) / "mine.yaml").write_bytes(data)
        try:
            profile, said = load_profile("mine"), ""
        except UserError as error:
            profile, said = None, str(error)
    assert said.isprintable()
    assert ("mine.yaml" in said) == (profile is None)
    if profile:
        assert json.dumps(dataclasses.asdict(profile), allow_nan=False)


def test_unknown_profile_lists_the_known_ones(profiles):
    profiles("dataset: tiny\n" + PAIR)
    with pytest.raises(UserError, match="unknown profile 'tny'.*Profiles: mine"):
        load_profile("tny")


def test_a_profile_is_named_as_its_file(profiles):
    """Else its counts would land among another profile's."""
    profiles("name: mine\ndataset: tiny\n" + PAIR)
    assert load_profile("mine").name == "mine"
    for name, shown in (("tiny", "'tiny'"), ("[mine]", "['mine']"), ("null", "None")):
        profiles(f"name: {name}\ndataset: tiny\n{PAIR}")
        with pytest.raises(UserError) as error:
            load_profile("mine")
        assert f"mine.yaml: name is {shown}, expected 'mine'" in str(error.value)


def test_a_profile_with_another_ending_is_named(profiles, tmp_path):
    profiles("dataset: tiny\n" + PAIR)
    (tmp_path / "other.yml").write_text("dataset: tiny\n" + PAIR)
    with pytest.raises(UserError, match=r"other\.yml does: its ending must be \.yaml\)"):
        load_profile("other")


def test_overrides_replace_keys_and_none_keeps_them(profiles):
    profiles("dataset: tiny\n" + PAIR + "epsilon: 0.1\nseed: 3\n")
    profile = load_profile("mine", epsilon=0.02, seed=None)
    assert (profile.epsilon, profile.seed, profile.name) == (0.02, 3, "mine")


def test_the_plan_knows_the_shipped_models():
    """Against the training records; what 06 reads is counted in test_needed."""
    profile = load_profile("tiny")
    table = plan(profile)
    for pair in profile.pairs:
        record = json.loads((MODELS / pair.name / "base" / "training_record.json").read_text())
        assert table.loc[pair.name, "parameters"] == record["parameters"]
    assert table["neurons"].tolist() == [4 * 512, 4 * (8 * 128 + 64)]
    assert table["routed experts"].tolist() == [0, 4 * 8]
    ablated = [sum(ablations(profile, 6, experts).values()) for experts in (0, 8)]
    assert table["ablated sequences"].tolist() == ablated
    share = table["ablation hours"] / table["core hours"]
    assert np.allclose(share, table["ablated sequences"] / 1200 / table["passes"])


def test_the_committed_plans_are_those_of_the_profiles_now():
    """README prints them; an experiment more, and they would speak of the chain that was."""
    table = pd.read_csv(DATA / "published" / "plans.csv")
    for row in table.to_dict("records"):
        profile = load_profile(row["profile"])
        experts = row["routed experts"] // row["layers"]
        assert row["ablated sequences"] == sum(ablations(profile, 6, experts).values())
        assert row["passes"] == 1 + bool(profile.pairs[0].base) + profile.twins
