"""Ablation on labelled texts of your own, without a profile or a data set: does a label need the
neurons that stand for it?

n measured texts, C labels, s a label's set. Sets are chosen on one half of the texts and measured
on the other, both ways, by the machinery of the chain's own experiments. (Ours.)
"""

import numpy as np
import pandas as pd

from ..analysis.effects import critical, specific_by_category
from ..analysis.stats import SMALLEST, adjust
from ..capture.count import count_encoded, refuse_long
from ..capture.losses import refuse_silent
from ..capture.tokens import check_tokenizer, refuse_unknown, texts_of
from ..config import defaults, refuse_other
from ..record import UserError
from .ablation import draws_of, measure, pooled
from .evaluate import nll
from .quick import SCORES, labels_of, named, read_in
from .reading import encode_rows
from .scores import SEES_REFERENCE, sets_of, standing
from .study import Study

HALVES = ("A", "B")
ROWS = 100  # texts of a label in each half, as many as HexaInst's; `rows` of the settings
SETTINGS = (
    *("epsilon", "seed", "template", "chat", "batch_tokens", "resamples"),
    *("controls", "controls_all_rows", "ablation_rows"),
)  # what of a profile decides an ablation table


def settings_of(profile) -> dict:
    """A profile's settings as `ablation_table` takes them."""
    return {name: getattr(profile, name) for name in SETTINGS}


class Own(Study):
    """A Study of one model in memory on labelled texts: categories are the labels' codes, halves
    are drawn within them, references may be absent; then a text's own tokens are what is predicted.
    """

    @classmethod
    def on(cls, model, tokenizer, texts, labels, references=None, **settings) -> "Own":
        """The study of I texts, labels and, at will, references; `settings` are a profile's.

        Of a label with more than 200 texts (2 x `rows`) as many are drawn. Raises UserError for
        what cannot be read or told apart: see `labels_of` and `texts_of`; a text with two labels.
        """
        profile = defaults((*SETTINGS, "rows"), **{"rows": ROWS} | settings)
        check_tokenizer(tokenizer, model)
        texts = texts_of(texts, "text")
        y, names = labels_of(labels, len(texts))
        rows = pd.DataFrame({"instruction": texts, "input": "", "reference": "", "category": y})
        read, first = encode_rows(tokenizer, rows, read_in(profile, tokenizer)), {}
        rows["copy_of"] = [first.setdefault(one.ids, row) for row, one in enumerate(read)]
        if references is not None:
            rows["reference"] = _references(references, len(texts))
        rows = rows.assign(id=[str(row) for row in range(len(rows))])
        rows = _halved(rows, names, profile)
        study = cls(profile, profile.pairs[0], rows, {"tuned": (model, tokenizer)})
        study.names = tuple(names)
        for positions in ("prompt", "reference"):
            encoded = study.encoded(positions)
            refuse_long(model, encoded, rows["id"])
            refuse_unknown(model, encoded, rows["id"])
        refuse_silent(encoded, rows["id"])
        return study

    @property
    def categories(self) -> tuple:
        """The codes of the labels `names`, which are in the order in which they were given."""
        return tuple(range(len(self.names)))

    @property
    def template(self) -> str:
        """What stands around a text."""
        return read_in(self.profile, self.model()[1])

    @property
    def referenced(self) -> bool:
        """Whether the texts have references."""
        return bool((self.whole.rows["reference"] != "").all())

    def encoded(self, positions: str = "prompt", variant: str = "tuned") -> list:
        """As a Study's; without references a text's own tokens stand for the reference's."""
        if positions == "reference" and not self.referenced:
            positions = "prompt"
        return super().encoded(positions, variant)

    def _counts(self, variant, positions):
        return count_encoded(self.model()[0], self.encoded(positions), self.profile.batch_tokens)


def ablation_table(
    model, tokenizer, texts, labels, references=None, score: str = "contrast", **settings
) -> pd.DataFrame:
    """How much worse the model predicts the texts of every label (or their references) when each
    label's set is ablated: a row per label `ablated` and label `measured`.

    texts [I], labels [I] of 2 to 50 kinds, references [I] strings or None; score: frequency, lape,
    contrast, contribution or, with references, attribution, contribution-response. `settings` are a
    profile's, with its defaults: epsilon (share of the neurons in a set), controls (draws of each
    kind), controls_all_rows, ablation_rows (texts of a label measured in each half), rows,
    resamples, seed, template, chat, batch_tokens.

    n texts (copies of one, which have its tokens, are drawn together); loss, intact, nats per
    token; increase of the loss; mean increase under control sets of the same number of neurons in
    each layer: random; for a label's own set also rate (neurons about as often on) and magnitude
    (writing about as much), both left out where a set fills more than half of a layer. effect:
    increase minus the hardest control's (`hardest`) with its 95 % interval low, high; p (signs
    flipped over texts), p_sets (set and draws change places), holm (of p_sets, over own sets; over
    the others; none where so few draws could not give one below 0.05), sees (the smallest effect
    found with power 0.8). specific, specific_low, specific_high, specific_p: what the own set costs
    its label beyond the others. note: why a row has no numbers. Raises UserError for texts and
    labels that cannot be used; see `Own.on`.

    >>> from helpers import ablation_table, load_model
    >>> model, tokenizer = load_model("data/models/tiny-dense/tuned")
    >>> texts = [f"{name} has a cat ." for name in ("ada", "boris", "eva", "hana")]
    >>> texts += [f"{n} plus 3 is {n + 3} ." for n in range(4)]
    >>> labels = ["pets"] * 4 + ["sums"] * 4
    >>> found = ablation_table(model, tokenizer, texts, labels, controls=2)
    >>> found[["ablated", "measured", "n"]].values.tolist()[:2]
    [['pets', 'pets', 4], ['pets', 'sums', 4]]
    >>> print(found["note"][0])
    not testable: 2 texts of 'pets' in a half, expected 5
    """
    known, more = (*SCORES, "contribution"), f"; with references {', '.join(SEES_REFERENCE)}"
    if references is not None:
        known, more = (*known, *SEES_REFERENCE), ""
    refuse_other(score, known, "score", more)
    study = Own.on(model, tokenizer, texts, labels, references, **settings)
    arrays, half = pooled([_measured(study, half, score) for half in study.halves])
    table = pd.DataFrame(_cells(study, arrays, half))
    own = table["ablated"] == table["measured"]
    if "p" not in table:  # no label has texts enough
        return _shown(table, study.names)
    for some, kind in ((own, "random"), (~own, "everywhere")):
        tested = some & table["p_sets"].notna()
        if 0 < tested.sum() * _least(arrays[kind].shape[1], study.profile.resamples) < 0.05:
            table.loc[tested, "holm"] = adjust(table.loc[tested, "p_sets"], "holm")
    return _shown(table.merge(_specific(study, arrays, half), how="left"), study.names)


def _shown(table, names) -> pd.DataFrame:
    """A table of codes with all columns, and with the labels' names."""
    labels = {column: named(table[column], names) for column in ("ablated", "measured")}
    return table.assign(**labels).reindex(columns=COLUMNS)


COLUMNS = [
    *("ablated", "measured", "n", "loss", "increase", "random", "rate", "magnitude", "hardest"),
    *("effect", "low", "high", "p", "holm", "p_sets", "sees"),
    *("specific", "specific_low", "specific_high", "specific_p", "note"),
]


def _measured(study, half: str, score: str) -> dict:
    """What `measure` gives of one half, sets and controls chosen on the other; with the intact
    `loss` [n], and the first text that each is a copy of, `copies` [n].
    """
    profile, counts = study.profile, study.counts()
    ranked = standing(study.half(study.other(half)), [score])
    sets = sets_of(ranked, score, profile.epsilon, profile.seed)
    drawn, _ = draws_of(ranked, counts, sets, profile.controls, profile.seed, f"own/{half}")
    kinds = {k: dict(zip(study.categories, masks, strict=True)) for k, masks in drawn.items()}
    here, everywhere = study.half(half).measured(), profile.controls_all_rows
    arrays = measure(here, study.masks(sets), kinds, everywhere=everywhere)
    loss = nll(here.model()[0], here.encoded("reference"), profile.batch_tokens)
    return arrays | {"loss": loss, "copies": here.rows["copy_of"].to_numpy()}


def _cells(study, arrays, half):
    """A row per label ablated and label measured, by their codes."""
    profile, own = study.profile, ("random", "rate", "magnitude")
    for s in study.categories:
        for c in study.categories:
            at = arrays["labels"] == c
            controls = {kind: arrays[kind][at] for kind in own if kind in arrays}
            if s != c:
                controls = {"random": arrays["everywhere"][at][:, :, s]}
            increase, loss = arrays["own"][at, s], float(arrays["loss"][at].mean())
            row = {"ablated": s, "measured": c, "n": int(at.sum()), "loss": loss}
            row |= {"increase": float(increase.mean()), "note": ""}
            row |= {kind: float(values.mean()) for kind, values in controls.items()}
            fewest, clusters = _different(arrays, half, c).min(), _clusters(arrays["copies"][at])
            if fewest < SMALLEST:
                what = "texts" if clusters is None else "different texts"
                of = f"{what} of {study.names[c]!r} in a half"
                yield row | {"note": f"not testable: {fewest} {of}, expected {SMALLEST}"}
                continue
            settings = profile.resamples, profile.seed, clusters
            found = critical(increase, controls, half[at], *settings)
            low, high = found["critical_ci"]
            row |= {"increase": found["own"], "hardest": found["hardest"]}
            row |= {kind: found[kind] for kind in controls}
            row |= {"effect": found["critical"], "low": low, "high": high}
            row |= {"p": found["p_critical"], "p_sets": found["p_sets"]}
            yield row | {"sees": found["critical_sees"]}


def _different(arrays, half, label: int) -> np.ndarray:
    """How many different texts of a label each half has, [2]."""
    at = arrays["labels"] == label
    return np.array([len(np.unique(arrays["copies"][at & (half == h)])) for h in (0, 1)])


def _clusters(copies):
    """Copies of one text as a cluster; None where every text stands once."""
    return None if len(np.unique(copies)) == len(copies) else copies


def _least(draws: int, resamples: int) -> float:
    """The smallest p_sets that so many draws in each half can give, see `effects.exchange`."""
    return 1 / min((draws + 1) ** len(HALVES), resamples + 1)


def _specific(study, arrays, half) -> pd.DataFrame:
    """What each label's set costs the label beyond the others; labels with too few texts are left
    out of both.
    """
    labels = arrays["labels"]
    sizes = np.array([_different(arrays, half, c) for c in study.categories])
    enough = np.flatnonzero((sizes >= SMALLEST).all(1))
    columns = ["ablated", "measured", *COLUMNS[-5:-1]]
    if len(enough) < 2:
        return pd.DataFrame(columns=columns).astype({"ablated": int, "measured": int})
    at = np.isin(labels, enough)
    settings = study.profile.resamples, study.profile.seed, _clusters(arrays["copies"][at])
    found = specific_by_category(
        arrays["own"][at][:, enough],
        arrays["everywhere"][at][:, :, enough],
        np.searchsorted(enough, labels[at]),
        half[at],
        *settings,
    )
    codes = [enough[row["category"]] for row in found]
    rows = [
        [code, code, *(row.get(k) for k in NUMBERS)] for code, row in zip(codes, found, strict=True)
    ]
    return pd.DataFrame(rows, columns=columns)


NUMBERS = ("specific", "low", "high", "p")


def _references(references, texts: int) -> list[str]:
    references = texts_of(references, "reference")
    if len(references) != texts:
        raise UserError(
            f"{len(references)} references for {texts} texts: give one per text, or none at all."
        )
    return references


def _halved(rows, names, profile) -> pd.DataFrame:
    """The rows in random order, `fold` A or B, at most `rows` of each label in each; copies, texts
    of the same tokens, stay in one half, for what is chosen on a text is not to be measured on it.
    """
    y, first = rows["category"].to_numpy(), rows["copy_of"].to_numpy()
    for row in np.flatnonzero(y != y[first]):
        raise UserError(
            f"text {row} ({rows['instruction'][row][:60]!r}) has the label {names[y[row]]!r}, text "
            f"{first[row]}, of the same tokens, {names[y[first[row]]]!r}. Give them one label, or "
            "leave one out."
        )
    place, count = {}, [0] * len(names)
    order = np.random.default_rng(profile.seed).permutation(len(rows))
    for row in order:
        if first[row] not in place:
            place[first[row]] = HALVES[count[y[row]] % 2]
            count[y[row]] += 1
    alone = [name for name, number in zip(names, count, strict=True) if number < 2]
    if alone:
        raise UserError(
            f"all texts of {', '.join(map(repr, alone[:10]))} are the same: expected two different "
            "ones or more, to choose on some and measure on others."
        )
    rows = rows.assign(fold=rows["copy_of"].map(place)).iloc[order]
    return rows[rows.groupby(["fold", "category"]).cumcount() < (profile.rows or len(rows))]


def noted(table) -> pd.DataFrame:
    """An ablation table whose rows without a note have "": one read back from a CSV file has NaN.
    Raises UserError for what is none.
    """
    refuse_table(table, COLUMNS, "ablation_table")
    table = table.reset_index(drop=True)
    return table.assign(note=[note if isinstance(note, str) else "" for note in table["note"]])


KEYS = ("label", "ablated", "measured", "layer", "expert", "neuron")  # what tells rows apart


def refuse_table(table, columns, maker: str) -> None:
    """UserError unless a table has a row, and the columns, of what `maker` gives, and every row its
    label and a place of its own.
    """
    missing = [name for name in columns if name not in getattr(table, "columns", ())]
    if missing or not len(table):
        found = f"{type(table).__name__} without {missing[0]!r}" if missing else "no row"
        raise UserError(f"found {found}, expected the table that {maker}(...) gives.")
    for name in [one for one in ("label", "ablated", "measured") if one in columns]:
        if nameless := int(table[name].isna().sum()):
            raise UserError(
                f"{nameless} rows have no {name!r}, expected each label as {maker}(...) gave it. A "
                "label such as None or NA is lost on the way back from a CSV file, but for "
                'read_csv(file, keep_default_na=False, na_values=[""]).'
            )
    keys = [name for name in KEYS if name in table]
    if again := int(table.duplicated(keys).sum()):
        raise UserError(
            f"{again} rows have the same {', '.join(keys)} as an earlier one, expected one table "
            f"that {maker}(...) gives. Take several tables one by one."
        )


def _said_specific(row) -> str:
    if pd.isna(row.specific):
        return "whether it costs the other labels less is not testable: they have too few texts"
    ends = f"[{row.specific_low:+.2f}, {row.specific_high:+.2f}]"
    return f"{row.specific:+.2f} {ends} beyond what it costs the other labels"


def sentences(table: pd.DataFrame) -> list[str]:
    """What an ablation table says, a sentence per label and one for all."""
    table = noted(table)
    own, lines = table[table["ablated"] == table["measured"]], []
    for row in own.itertuples():
        if row.note:
            lines.append(f"{row.measured}: {row.note}")
            continue
        word = "is not shown to need its set"
        if pd.isna(row.holm):
            word = "could not be shown to need its set by so few control draws"
        elif row.low > 0 and row.holm < 0.05:
            word = "needs its set"
        lines.append(
            f"{row.measured} {word}: {row.increase:+.2f} nats per token without it, "
            f"{row.effect:+.2f} [{row.low:+.2f}, {row.high:+.2f}] beyond the hardest control "
            f"({row.hardest}); {_said_specific(row)}."
        )
    return lines
