"""Measures of a set of rows: lengths, a length-matched subset, near-duplicates, what words alone
tell of a category.
"""

import re

import numpy as np
import pandas as pd
from scipy import sparse

from ..record import UserError


def text(row) -> str:
    """What the model reads of a row: the instruction and, on the next line, its input if it has
    one.
    """
    return row["instruction"] + ("\n" + row["input"] if row["input"] else "")


def texts(rows: pd.DataFrame) -> list[str]:
    """`text` of every row."""
    return [text(row) for row in rows.to_dict("records")]


def tokens(text: str) -> list[str]:
    """Words, numbers and punctuation marks, lower case: the stated tokenizer of all length
    statistics here.
    """
    return re.findall(r"\w+|[^\w\s]", text.lower())


def shingles(words: list[str], n: int = 3) -> set[tuple]:
    """The n-grams of a text's tokens; every number counts as the same word, so swapped numbers
    change nothing.
    """
    words = ["0" if word.isdigit() else word for word in words]
    return {tuple(words[i : i + n]) for i in range(max(1, len(words) - n + 1))}


def lengths(rows: pd.DataFrame, tokenize=tokens) -> pd.Series:
    """Tokens of each row's text, int [I], under `tokenize` (str -> list; a model's own tokenizer
    serves as well).
    """
    return pd.Series(
        [len(tokenize(text(row))) for row in rows.to_dict("records")],
        index=rows.index,
        name="tokens",
    )


def length_table(rows: pd.DataFrame, tokenize=tokens) -> pd.DataFrame:
    """Length statistics per half and category: rows, mean, min, quartiles, max."""
    table = lengths(rows, tokenize).groupby([rows["half"], rows["category"]], sort=False).describe()
    return (
        table.rename(columns={"count": "rows"})
        .astype({"rows": int})
        .drop(columns="std")
        .round(1)
        .reset_index()
    )


def matched(
    rows: pd.DataFrame, per_category: int = 60, seed: int = 0, tokenize=tokens
) -> pd.DataFrame:
    """A subset in which all categories have the same length distribution, in file order; no half
    depends on another.

    Rows are taken in groups of one per category whose lengths lie within a ratio r, with the
    smallest r (from 1 in steps of 0.01, kept in `attrs["ratio"]`) that yields `per_category`
    groups; in one dimension the greedy walk over sorted lengths finds the most groups. `seed`
    orders rows of equal length and drops surplus groups. Raises UserError where r = 1.25 is not
    enough: such categories cannot be matched.
    """
    all_sizes, kept, ratios = lengths(rows, tokenize), [], {}
    for name in rows["half"].unique():
        size = (
            all_sizes[rows["half"] == name]
            .sample(frac=1, random_state=seed)
            .sort_values(kind="stable")
        )
        category = rows["category"][size.index]
        queues = [list(size[category == c].items()) for c in rows["category"].unique()]
        for ratio in np.arange(100, 126) / 100:
            groups = _groups(queues, ratio)
            if len(groups) >= per_category:
                break
        else:
            raise UserError(
                f"half {name}: {len(groups)} groups of rows of like length (ratio 1.25), "
                f"{per_category} wanted: the categories' lengths differ too much. Add rows of "
                "missing lengths, or ask for fewer."
            )
        chosen = np.random.default_rng(seed).choice(len(groups), per_category, replace=False)
        kept += [index for i in chosen for index in groups[i]]
        ratios[name] = float(ratio)
    subset = rows.loc[rows.index.isin(kept)].reset_index(drop=True)
    subset.attrs["ratio"] = ratios
    return subset


def _groups(queues, ratio):
    heads, groups = [0] * len(queues), []
    while all(head < len(queue) for head, queue in zip(heads, queues, strict=True)):
        front = [queue[head] for head, queue in zip(heads, queues, strict=True)]
        least, most = min(n for _, n in front), max(n for _, n in front)
        if most <= least * ratio:
            groups.append([index for index, _ in front])
            heads = [head + 1 for head in heads]
        else:
            heads = [head + (n == least) for head, (_, n) in zip(heads, front, strict=True)]
    return groups


def near_duplicates(rows: pd.DataFrame, threshold: float = 0.6, n: int = 3) -> pd.DataFrame:
    """Pairs of rows whose sets of word n-grams have a Jaccard index above `threshold`: first,
    second, jaccard.

    All pairs are compared exactly, by one sparse product (no MinHash: a few thousand rows do not
    need it).
    """
    grams = [shingles(tokens(text(row)), n) for row in rows.to_dict("records")]
    codes = {gram: j for j, gram in enumerate(sorted(set().union(*grams)))}
    cells = np.array(
        [(i, codes[gram]) for i, own in enumerate(grams) for gram in own]
    )  # [cells, 2]
    table = sparse.csr_array(
        (np.ones(len(cells), int), tuple(cells.T)), shape=(len(rows), len(codes))
    )
    shared = sparse.triu(table @ table.T, k=1).tocoo()  # [I, I] common n-grams
    sizes, (i, j) = table.sum(1), (shared.row, shared.col)
    jaccard = shared.data / (sizes[i] + sizes[j] - shared.data)
    ids, keep = rows["id"].to_numpy(), jaccard > threshold
    pairs = pd.DataFrame({"first": ids[i[keep]], "second": ids[j[keep]], "jaccard": jaccard[keep]})
    return pairs.sort_values("jaccard", ascending=False, ignore_index=True)


def agreeing(pairs: pd.DataFrame, ids, labels) -> int:
    """How many of `near_duplicates`' pairs have one label; `labels` [I] of the rows `ids` [I].

    >>> pairs = pd.DataFrame({"first": list("aab"), "second": list("bcc")})
    >>> agreeing(pairs, list("abc"), [1, 1, 2])  # a and b
    1
    """
    label = dict(zip(ids, labels, strict=True))
    return int((pairs["first"].map(label) == pairs["second"].map(label)).sum())


def wordings(rows: pd.DataFrame) -> np.ndarray:
    """The wording of each row, str [I]: rows of one wording differ in their contents alone and are
    a cluster, no independent instructions. A wording lies in one category.

    Named by the row's tag `wording`; where there is none, by its instruction with quoted texts and
    numbers masked: what is asked about then stands in `input`, or the row is a wording of its own.

    >>> rows = pd.DataFrame({"category": "QA", "instruction": ["Is 2 odd?", "is 3 odd?"]})
    >>> wordings(rows.assign(tags=[{}, {}])).tolist()
    ['QA: is 0 odd?', 'QA: is 0 odd?']
    """
    named = rows["tags"] if "tags" in rows else [None] * len(rows)
    names = [
        (tags or {}).get("wording") or _masked(instruction)
        for tags, instruction in zip(named, rows["instruction"], strict=True)
    ]
    return np.array([f"{own}: {name}" for own, name in zip(rows["category"], names, strict=True)])


def few_of_many(rows: pd.DataFrame, by: list[str], number: int) -> np.ndarray:
    """`number` rows of each group of the columns `by`, in as many wordings as can be: the first row
    of each wording, then the second ones; bool [I].

    >>> rows = pd.DataFrame({"category": "QA", "instruction": ["Say 1", "Say 2", "Name it"]})
    >>> few_of_many(rows, ["category"], 2).tolist()
    [True, False, True]
    """
    rows = rows.reset_index(drop=True).assign(wording=wordings(rows))
    again = rows.groupby([*by, "wording"], sort=False).cumcount()
    place = rows.loc[again.sort_values(kind="stable").index].groupby(by, sort=False).cumcount()
    return (place.sort_index() < number).to_numpy()


def _masked(instruction: str) -> str:
    """An instruction without its contents: quoted texts as "_", numbers as 0."""
    quoted = re.sub(r'["“`][^"”`]*["”`]', '"_"', instruction.lower())
    return " ".join(re.sub(r"\d+([.,]\d+)*", "0", quoted).split())


def predict_category(
    rows: pd.DataFrame, folds=10, seed: int = 0, smoothing: float = 1.0
) -> np.ndarray:
    """Category of every row guessed from its bag of words alone, cross-validated: str [I].

    folds: how many, stratified by category; or each row's fold [I], e.g. the halves: a row is
    judged by the words of the other folds. Multinomial naive Bayes with equal priors, words unseen
    in training ignored. Its accuracy is the lexical baseline: what a statement about "category
    structure" must beat to be more than vocabulary. Folds are dealt by our own lines:
    StratifiedKFold deals others, and would move published accuracies (0.733 to 0.778 on the matched
    subset). Raises UserError where no category has two rows.

    >>> texts = {"instruction": ["red one", "blue two"] * 4, "input": ""}
    >>> rows = pd.DataFrame({"category": ["A", "B"] * 4} | texts)
    >>> (predict_category(rows, folds=4) == rows["category"]).mean()
    np.float64(1.0)
    """
    # Here, as the library takes a second to import and all of helpers imports this file.
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.model_selection import PredefinedSplit, cross_val_predict
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_pipeline

    labels = rows["category"].to_numpy()
    fold = _dealt(rows, folds, seed) if np.ndim(folds) == 0 else np.asarray(folds)
    fold = np.unique(fold, return_inverse=True)[1]
    if len(set(fold)) < 2:
        raise UserError(
            f"{len(rows)} rows, and no category with two, cannot be cross-validated. Add rows."
        )
    model = make_pipeline(
        CountVectorizer(analyzer=tokens), MultinomialNB(alpha=smoothing, fit_prior=False)
    )
    return cross_val_predict(model, texts(rows), labels, cv=PredefinedSplit(fold))


def _dealt(rows, folds, seed) -> np.ndarray:
    """Rows of each category dealt to so many folds at random: int [I]."""
    order = rows.groupby("category").cumcount().sample(frac=1, random_state=seed)
    labels = rows["category"].to_numpy()[rows.index.get_indexer(order.index)]
    return order.groupby(labels).cumcount().reindex(rows.index).to_numpy() % folds


def folds(rows: pd.DataFrame) -> pd.Series:
    """Two disjoint parts to choose on and to measure on: the data's halves or, where only one is
    there, its even and odd rows of each category (named so: no replication in another wording).

    >>> folds(pd.DataFrame({"half": "ai", "category": ["A", "A", "B", "B"]})).tolist()
    ['even rows', 'odd rows', 'even rows', 'odd rows']
    """
    if rows["half"].nunique() == 2:
        return rows["half"]
    return rows.groupby("category").cumcount().mod(2).map({0: "even rows", 1: "odd rows"})
