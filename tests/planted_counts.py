"""Counts whose truth is known: instructions in wordings, wordings in categories, and components
that serve one category. The oracle of the statistics' calibration.

Log odds of firing = component + (category's set) + (category, diffuse) + (wording) + (instruction).
"""

from typing import NamedTuple

import numpy as np

from helpers.analysis.generality import category_scores
from helpers.analysis.sets import category_sets, consensus, recovery, top_k
from helpers.analysis.similarity import jaccard_matrix

SCORES = ("frequency", "lape", "contrast", "contribution")


class World(NamedTuple):
    """counts [I, M], tokens [I], labels [I], clusters (wordings) [I], planted bool [C, M]."""

    counts: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    clusters: np.ndarray
    planted: np.ndarray

    def similarity(self, share=0.1):
        """Pairwise Jaccard of the top sets."""
        size = int(self.counts.shape[1] * share)
        return jaccard_matrix(top_k(self.counts, size, "quantile"))


def even(categories=6, wordings=12, rows=4):
    """Rows of each wording of each category."""
    return [[rows] * wordings] * categories


def counts(rng, sizes, width=250, category=0.0, wording=0.0, row=0.3, serving=(0, 0.0)) -> World:
    """sizes: for each category a list, the rows of each of its wordings. category, wording, row:
    SD of what they add to the log odds (category's is the same in every world of this width).
    serving: (how many components serve each category, by how much they rise in it).
    """
    labels = np.repeat(np.arange(len(sizes)), [sum(rows) for rows in sizes])
    clusters = np.repeat(np.arange(sum(map(len, sizes))), np.concatenate(sizes))
    fixed = np.random.default_rng(width)
    base, diffuse = fixed.normal(-1, 1.5, width), fixed.normal(size=(len(sizes), width))
    planted = np.zeros((len(sizes), width), bool)
    many, rise = serving
    for c, members in enumerate(
        rng.permutation(width)[: many * len(sizes)].reshape(len(sizes), -1)
    ):
        planted[c, members] = True
    odds = base + category * diffuse[labels] + rise * planted[labels]
    odds = odds + wording * rng.normal(size=(clusters[-1] + 1, width))[clusters]
    odds = odds + row * rng.normal(size=(len(labels), width))
    tokens = rng.integers(15, 30, len(labels))
    drawn = rng.binomial(tokens[:, None], 1 / (1 + np.exp(-odds)))
    return World(drawn, tokens, labels, clusters, planted)


def league(rng, effects, sizes=None, many=10, noise=(0.3, 0.3), worlds=5) -> list[dict]:
    """Which score finds components that serve one category? Rows {effect, score, precision,
    recall}, means over categories and worlds; noise: SD of wording and row. Each score chooses as
    many as are planted; `consensus` is the paper's set: top 10 %, in half of the instructions.
    """
    rows = []
    for effect in effects:
        found = {score: [] for score in (*SCORES, "consensus")}
        for _ in range(worlds):
            world = counts(
                rng,
                even() if sizes is None else sizes,
                wording=noise[0],
                row=noise[1],
                serving=(many, effect),
            )
            p = world.counts / world.tokens[:, None]
            chosen = {
                score: category_sets(category_scores(score, p, world.labels), many)
                for score in SCORES
            }
            sets = top_k(world.counts, p.shape[1] // 10, "quantile")
            chosen["consensus"] = consensus(sets, world.labels)
            for score, members in chosen.items():
                hit = recovery(members, world.planted)
                found[score].append([hit["precision"].mean(), hit["recall"].mean()])
        for score, hits in found.items():
            precision, recall = np.mean(hits, 0)
            rows.append(
                {"effect": effect, "score": score, "precision": precision, "recall": recall}
            )
    return rows
