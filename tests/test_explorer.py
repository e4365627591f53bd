"""The page within the page: small, the same each time, and its data are the table's."""

import json
import re

import numpy as np
import pandas as pd

from helpers.hexainst.schema import CATEGORIES
from helpers.plots.explorer import explorer

PAIRS, SCORES, SIZES = (
    ("one", "two"),
    ("frequency", "lape", "contrast", "attribution", "contribution"),
    (0.2, 0.01, 0.05),
)


def page():
    rng, names = np.random.default_rng(0), list(CATEGORIES)
    table = pd.DataFrame(
        [
            {
                "pair": p,
                "score": s,
                "size": k,
                "ablated": a,
                "measured": m,
                "own": rng.random(),
                "random": 0.1,
            }
            for p in PAIRS
            for s in SCORES
            for k in SIZES
            for a in names
            for m in names
        ]
    )
    answers = {
        (p, s): {c: [f"<b>{c}</b></script>", "x"] for c in names} for p in PAIRS for s in SCORES
    }
    return table, explorer(
        table,
        "5 %",
        dict.fromkeys(names, "ask"),
        {p: dict.fromkeys(names, "yes") for p in PAIRS},
        answers,
    )


def test_the_page_is_small_and_the_same_each_time_and_holds_the_tables_numbers():
    table, html = page()
    assert html.data == page()[1].data
    assert len(html.data) < 200_000
    assert repr(html) == "<IPython.core.display.HTML object>"
    data = json.loads(re.search(r"data=(\{.*\}),state=", html.data)[1])
    assert data["choices"]["size"] == ["1 %", "5 %", "20 %"]
    assert data["choices"]["score"] == list(SCORES)
    row = table[
        (table["pair"] == "two") & (table["size"] == 0.05) & (table["score"] == "lape")
    ].iloc[8]  # CODE, QA
    assert data["effects"]["two|lape|5 %"][1][2] == [round(row["own"], 3), 0.1]


def test_an_answer_cannot_end_the_script_and_the_box_is_found_without_a_current_script():
    html = page()[1].data
    assert html.count("</script>") == 1
    assert "currentScript" not in html
    box = re.search(r'<div id="(explorer-\w+)"', html)[1]
    assert f"getElementById('{box}')" in html
    assert "__" not in re.sub(r"data=\{.*\},state=", "", html)
