"""The atlas of neurons and experts as a page's data: a table checked, packed small, and safe inside
a script.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from ..paths import short
from ..record import DamagedFile, read_record, sha256

KEYS = ("pair", "unit", "layer", "expert", "neuron", "score", "sets", "part", "fate", "massive")
EFFECT = ("effect", "effect_low", "effect_high", "effect_control", "effect_of")
PER_CATEGORY = ("p", "low", "high", "score", "rank", "in")
WORDS = ("pair", "unit", "score", "part", "fate", "effect_of")
NUMBERS = ("layer", "expert", "neuron", *EFFECT[:4])
TOKEN = ("row", "position", "token", "left", "right", "value")
CHUNK, FIRST, SHOWN = 500, 50, 5  # rows of a file of cards; rows on the page; tokens of a card
AGAIN = "Make it anew: `python -m helpers.run atlas --profile NAME`."


def script(value) -> str:
    """JSON that may stand in a script: ASCII alone, and no sign that could end or comment one.

    >>> script("</script><!-- \u2028")
    '"\\\\u003c/script\\\\u003e\\\\u003c!-- \\\\u2028"'
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e")


@dataclass(frozen=True)
class Atlas:
    """A checked table: a row per component, the best of its `rank`s first, those in no set last;
    `tokens` [[[row, position, token, left, right, value],
    ...], ...] in its order.
    """

    table: pd.DataFrame
    categories: list[str]
    tokens: list


def read(path: Path) -> Atlas:
    """The atlas at `path`. Raises DamagedFile for one that is not what the record beside it
    describes and, with the line, for what is none: a column that is missing, a p outside 0 to 1,
    tokens that are no list of records.
    """
    record = path.with_suffix(".json")
    if record.is_file() and read_record(record, {"csv": str})["csv"] != sha256(path):
        raise DamagedFile(
            f"{short(path)} was cut or changed: its sha256 is not the one in {record.name}. {AGAIN}"
        )
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:
        raise DamagedFile(f"{short(path)} cannot be read as a table: {error}. {AGAIN}") from error
    categories = [name[2:] for name in table.columns if name.startswith("p_")]
    counted = [f"{kind}_{name}" for name in categories or ["<category>"] for kind in PER_CATEGORY]
    if missing := [name for name in (*KEYS, *EFFECT, "tokens", *counted) if name not in table]:
        raise DamagedFile(f"{short(path)} has no column {', '.join(missing[:5])}. {AGAIN}")
    for name in ["massive", *(f"in_{name}" for name in categories)]:
        table[name] = table[name].str.lower().isin(("true", "1", "1.0"))
    for name in [*NUMBERS, *(name for name in counted if not name.startswith("in_"))]:
        text, table[name] = table[name], pd.to_numeric(table[name], errors="coerce").astype(float)
        bad = np.isinf(table[name]) | table[name].isna() & ~text.isin(("", "nan", "NaN"))
        if name == "layer" or name.startswith("p_"):
            bad |= table[name].isna() | ~table[name].between(0, 1 if name != "layer" else np.inf)
        _refuse(path, bad, text, name)
    tokens = _tokens(path, table.pop("tokens"))
    table["rank"] = table[[f"rank_{name}" for name in categories]].min(axis=1)
    table["lost"] = ~table[[f"in_{name}" for name in categories]].any(axis=1)
    table = table.sort_values(["lost", "rank"], kind="stable")
    return Atlas(table.reset_index(drop=True), categories, [tokens[i] for i in table.index])


def _refuse(path, bad, text, name) -> None:
    if bad.any():
        at = int(np.argmax(bad.to_numpy()))
        wanted = "a number from 0 to 1" if name.startswith("p_") else "a number"
        raise DamagedFile(
            f"{short(path)}, row {at + 1}: {name} is {text.iloc[at][:80]!a}, expected {wanted}. "
            f"{AGAIN}"
        )


def _no_number(name):
    raise ValueError(f"{name} is no JSON")


def _tokens(path, column) -> list:
    """The records of every row as lists in the order of TOKEN."""
    found = []
    for line, text in enumerate(column, 1):
        try:
            records = json.loads(text or "[]", parse_constant=_no_number)
            found.append([[record[key] for key in TOKEN] for record in records[:SHOWN]])
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise DamagedFile(
                f"{short(path)}, row {line}: tokens is no JSON list of records with "
                f"{', '.join(TOKEN)} ({type(error).__name__}). {AGAIN}"
            ) from error
    return found


def _short(value, digits: int = 4):
    """A number to few digits, or None."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.{digits}g}")


def _column(table, name: str) -> list:
    if name in ("layer", "expert", "neuron") or name.startswith("rank"):
        whole = (None if math.isnan(v) else v for v in table[name])  # but for ranks of ties
        return [int(v) if v is not None and v.is_integer() else v for v in whole]
    return [_short(v) for v in table[name]]


def _coded(values) -> dict:
    """A column of few words: the words once, and each row's place among them."""
    codes, words = pd.factorize(values.fillna(""))
    return {"words": list(words), "codes": codes.tolist()}


def packed(atlas: Atlas) -> dict:
    """What sorting, search and the rows of the page need: columns; p in thousandths, the sets as
    places in `categories`, the strongest tokens as one text.
    """
    table, names = atlas.table, atlas.categories
    member = table[[f"in_{name}" for name in names]].to_numpy(bool)
    return {
        "categories": names,
        "chunk": CHUNK,
        **{name: _coded(table[name]) for name in WORDS},
        **{name: _column(table, name) for name in ("layer", "expert", "neuron", "rank")},
        **{name: _column(table, name) for name in ("effect", "effect_control")},
        "massive": table["massive"].astype(int).tolist(),
        "p": [(table[f"p_{name}"] * 1000).round().astype(int).tolist() for name in names],
        "sets": [np.flatnonzero(row).tolist() for row in member],
        "words": [" ".join(str(token[2]).strip() for token in row) for row in atlas.tokens],
        "means": means(atlas),
    }


def means(atlas: Atlas) -> dict:
    """{"pair|unit": [[layer, mean p of each category in thousandths], ...]} of the listed ones."""
    columns = [f"p_{name}" for name in atlas.categories]
    grouped = atlas.table.groupby(["pair", "unit", "layer"], sort=True)[columns].mean()
    found = {}
    for (pair, unit, layer), row in grouped.iterrows():
        line = [int(layer), *(round(1000 * value) for value in row)]
        found.setdefault(f"{pair}|{unit}", []).append(line)
    return found


def cards(atlas: Atlas):
    """The rest of each row, CHUNK at a time: [low, high, score, rank of each category, tokens,
    bounds of the effect].
    """
    table = atlas.table
    kinds = [
        list(zip(*(_column(table, f"{kind}_{name}") for name in atlas.categories), strict=True))
        for kind in ("low", "high", "score", "rank")
    ]
    bounds = zip(_column(table, "effect_low"), _column(table, "effect_high"), strict=True)
    rows = list(zip(*kinds, atlas.tokens, bounds, strict=True))
    for start in range(0, len(rows), CHUNK):
        yield rows[start : start + CHUNK]


def first_rows(atlas: Atlas) -> list[dict]:
    """The first rows as the page shows them without JavaScript."""
    rows = []
    for row in atlas.table.head(FIRST).to_dict("records"):
        p = {name: row[f"p_{name}"] for name in atlas.categories}
        rows.append(row | {"name": component(row), "p": p, "most": max(p.values())})
    return rows


def component(row: dict) -> str:
    """A component's name on the page: layer, and neuron or expert.

    >>> component({"layer": 2, "unit": "neuron", "neuron": 17.0, "expert": float("nan")})
    'L2 neuron 17'
    """
    expert, neuron = (row[key] if pd.notna(row[key]) else None for key in ("expert", "neuron"))
    said = [f"L{int(row['layer'])}"]
    if expert is not None:
        said.append(f"expert {int(expert)}")
    if neuron is not None:
        said.append(f"{'neuron' if expert is not None else row['unit']} {int(neuron)}")
    return " ".join(said)
