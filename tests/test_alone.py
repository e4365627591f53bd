"""The chain of notebooks on other profiles than ours: one model alone, a GGUF of a two-layer Llama
with a chat format; and one pair whose neurons are all of routed experts, in bfloat16. Their answers
are all wrong. A check that every page runs and says what it cannot ask, not a result.
"""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import tiny_gguf
import zoo

from helpers.paths import ROOT
from helpers.record import read_json

JUDGED = {"supported", "mixed", "not supported"}
PARTS = ("helpers", "notebooks", "docs", "data/hexainst", "data/grid", "data/trajectory")
ALONE = """
pairs:
  - name: alone
    tuned: model.gguf
chat: true
"""
ROUTED = """
pairs:
  - name: routed
    base: base
    tuned: tuned
    dtype: bfloat16
"""
PROFILE = """
dataset: rows.jsonl
max_new_tokens: 4
scores: [frequency, contribution]
sizes: [0.05, 0.1]
twins: 1
draws: 2
controls: 2
controls_elsewhere: 1
controls_all_rows: 1
ablation_rows: 5
resamples: 100
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository without its models, ten short rows a category, and the profiles."""
    clone = tmp_path_factory.mktemp("alone")
    foreign = shutil.ignore_patterns("__pycache__", "sources", "human.jsonl")
    for part in PARTS:
        shutil.copytree(ROOT / part, clone / part, ignore=foreign)
    for file in ("data/claims.csv", "data/README.md", "README.md", "requirements.txt"):
        shutil.copyfile(ROOT / file, clone / file)
    tiny_gguf.write(clone / "model.gguf")
    zoo.saved(clone / "base", "olmoe")
    zoo.tuned(clone / "tuned", "olmoe")
    rows = pd.read_json(ROOT / "data" / "hexainst" / "ai.jsonl", lines=True)
    length = rows[["instruction", "input", "reference"]].sum(axis=1).str.len()
    short = rows.loc[length.sort_values().index].groupby("category", sort=False).head(10)
    rows = short.sort_index().to_dict("records")
    (clone / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, pair in (("alone", ALONE), ("routed", ROUTED)):
        (clone / "notebooks" / "profiles" / f"{name}.yaml").write_text(pair + PROFILE)
    return clone


def run_chain(clone, profile):
    """Notebooks 00 to 08 under a profile; the folder of its results."""
    books = sorted((clone / "notebooks").glob("0[0-8]_*.ipynb"))
    command = [sys.executable, "-m", "helpers.run", "chain", "--profile", profile, *map(str, books)]
    done = subprocess.run(
        command,
        cwd=clone,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(clone)},
    )
    assert done.returncode == 0, done.stderr
    return clone / "data" / "results" / profile


def test_one_gguf_goes_through_the_chain_and_what_needs_a_pair_says_so(clone):
    results = run_chain(clone, "alone")
    numbers = read_json(results / "summary.json")["pairs"]["alone"]
    assert numbers["accuracy.tuned.QA"] == 0
    assert {"ablation.positive", "layers.neurons.all.twin"} <= set(numbers)
    assert not any("accuracy_lost" in key for key in numbers), "no right answer can be lost"
    said = pd.read_csv(results / "verdicts.csv").set_index(["id", "components"])["verdict"]
    assert said["alteration-beyond-training", "neurons"] == "needs a pair"
    assert said["excess-smallest", "experts"] == "not testable"
    assert said["beyond-pseudo", "contribution"] in JUDGED
    assert (clone / "figures" / "alone" / "06_ablation.png").is_file()


def test_a_pair_of_routed_experts_alone_goes_through_the_chain(clone):
    results = run_chain(clone, "routed")
    numbers = read_json(results / "summary.json")["pairs"]["routed"]
    assert {"ablation.usage.experts.all.critical", "ablation.positive"} <= set(numbers)
    assert "ablation.places.contribution.prompt.zero.own" in numbers
    said = pd.read_csv(results / "verdicts.csv").set_index(["id", "components"])["verdict"]
    assert said["excess-smallest", "shared"] == "not testable"
    assert {said[name, "experts"] for name in ("experts-usage", "excess-smallest")} <= JUDGED
    assert said["alteration-beyond-training", "experts"] == "not testable", "tuned once"
