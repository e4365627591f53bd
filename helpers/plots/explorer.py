"""A page within the page: choose pair, score, size and set, see what its ablation does. No kernel,
no network.
"""

import json
from pathlib import Path

import pandas as pd
from IPython.display import HTML

from ..record import digest
from .style import colours

PAGE = Path(__file__).with_suffix(".html")


def explorer(
    matrices: pd.DataFrame, shown: str, prompts: dict, intact: dict, answers: dict
) -> HTML:
    """Bars and answers behind four selectors, as one HTML fragment with its data in it.

    matrices  columns pair, score, size, ablated, measured, own, random
    shown     the size of the answers' sets, in words.  prompts: {category: instruction}
    intact    {pair: {category: answer}}
    answers   {(pair, score): {category: [without own set, without random]}}
    """
    effects, categories = {}, list(matrices["ablated"].unique())
    sizes = {size: f"{size * 100:g} %" for size in sorted(matrices["size"].unique())}
    for (pair, score, size), part in matrices.groupby(["pair", "score", "size"], sort=False):
        own, random = (
            part.pivot(index="ablated", columns="measured", values=name)
            .loc[categories, categories]
            .to_numpy(float)
            .tolist()
            for name in ("own", "random")
        )
        effects[f"{pair}|{score}|{sizes[size]}"] = [
            [[round(a, 3), round(b, 3)] for a, b in zip(*rows, strict=True)]
            for rows in zip(own, random, strict=True)
        ]
    choices = {
        "pair": list(matrices["pair"].unique()),
        "score": list(matrices["score"].unique()),
        "size": list(sizes.values()),
        "set": categories,
    }
    data = {
        "effects": effects,
        "choices": choices,
        "colours": list(colours(categories).values()),
        "shown": shown,
        "prompts": prompts,
        "intact": intact,
        "answers": {"|".join(key): value for key, value in answers.items()},
    }
    text = json.dumps(data, separators=(",", ":"), sort_keys=True).replace("</", "<\\/")
    page = PAGE.read_text("utf-8")
    return HTML(page.replace("__DATA__", text).replace("__ID__", f"explorer-{digest(data)[:8]}"))
