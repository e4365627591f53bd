"""The chain of notebooks on one model alone: a GGUF of a two-layer Llama with a chat format, whose
answers are all wrong. A check that every page runs and says what it cannot ask, not a result.
"""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import tiny_gguf

from helpers.paths import ROOT
from helpers.record import read_json

PARTS = ("helpers", "notebooks", "docs", "data/hexainst", "data/grid", "data/trajectory")
PROFILE = """
dataset: rows.jsonl
pairs:
  - name: alone
    tuned: model.gguf
chat: true
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
    """A copy of the repository without its models, ten short rows a category, and the profile."""
    clone = tmp_path_factory.mktemp("alone")
    foreign = shutil.ignore_patterns("__pycache__", "sources", "human.jsonl")
    for part in PARTS:
        shutil.copytree(ROOT / part, clone / part, ignore=foreign)
    for file in ("data/claims.csv", "data/README.md", "README.md", "requirements.txt"):
        shutil.copyfile(ROOT / file, clone / file)
    tiny_gguf.write(clone / "model.gguf")
    rows = pd.read_json(ROOT / "data" / "hexainst" / "ai.jsonl", lines=True)
    length = rows[["instruction", "input", "reference"]].sum(axis=1).str.len()
    short = rows.loc[length.sort_values().index].groupby("category", sort=False).head(10)
    rows = short.sort_index().to_dict("records")
    (clone / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (clone / "notebooks" / "profiles" / "alone.yaml").write_text(PROFILE)
    return clone


def test_one_gguf_goes_through_the_chain_and_what_needs_a_pair_says_so(clone):
    books = sorted((clone / "notebooks").glob("0[0-8]_*.ipynb"))
    command = [sys.executable, "-m", "helpers.run", "chain", "--profile", "alone", *map(str, books)]
    done = subprocess.run(
        command,
        cwd=clone,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(clone)},
    )
    assert done.returncode == 0, done.stderr
    results = clone / "data" / "results" / "alone"
    numbers = read_json(results / "summary.json")["pairs"]["alone"]
    assert numbers["accuracy.tuned.QA"] == 0
    assert {"ablation.positive", "layers.neurons.all.twin"} <= set(numbers)
    assert not any("accuracy_lost" in key for key in numbers), "no right answer can be lost"
    said = pd.read_csv(results / "verdicts.csv").set_index(["id", "components"])["verdict"]
    assert said["alteration-beyond-training", "neurons"] == "needs a pair"
    assert said["excess-smallest", "experts"] == "not testable"
    assert said["beyond-pseudo", "contribution"] in ("supported", "mixed", "not supported")
    assert (clone / "figures" / "alone" / "06_ablation.png").is_file()
