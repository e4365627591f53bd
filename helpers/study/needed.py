"""Is a category's set needed? One pair's ablations: sets chosen on one half of the rows, losses
measured on the other, both ways; tables for the page, numbers for the summary. Intervals and signs
take the rows of one wording together, or each by itself where a category has too few wordings.

C categories, M neurons. A *level* is one half, or both pooled ("all"). Effects are increases of the
loss of references, nats per token, beyond controls of equal size per layer.
"""

from contextlib import nullcontext

import numpy as np
import pandas as pd
import torch

from ..analysis.controls import layer_matched, usage_matched
from ..analysis.dose import dose_curve
from ..analysis.effects import critical, slope_of, slopes
from ..analysis.generality import category_scores
from ..analysis.sets import (
    category_means,
    category_sets,
    consensus,
    set_size,
    top_experts,
    top_sets,
)
from ..analysis.similarity import within_between
from ..analysis.stats import SMALLEST, adjust, cluster_sizes, plus_one, resample_weights
from ..bars import moved, stage
from ..capture.interventions import ablate
from ..hexainst.corpus import texts
from ..record import NotTestable
from .ablation import KINDS, measure, own_effect, pooled, spared
from .evaluate import (
    WHERE,
    ablation_matrix,
    accuracy,
    damage_split,
    gain_lost,
    plain_text_nll,
    scored,
)
from .experts import NEIGHBOURS
from .scores import reference_activations, sets_of, standing, written
from .sets import MASSIVE, clusters_of, drawn_as_one, largest_outputs
from .summary import span

STEPS = 3  # between sizes of set: of fewer, the second least may be the one jump
TESTED = ("frequency", "contribution")  # the paper's score, and ours: scores of the headline


class Needed:
    """The ablations of one study. Each method measures one thing, returns its tidy table and adds
    its headline numbers to `numbers` {key: value}, as data/claims.csv names them. (Ours.)
    """

    def __init__(self, study):
        self.study, self.profile, self.numbers = study, study.profile, {}
        self.halves, self.means = study.halves, {}

    # ---- sets, rows, controls

    def ranked(self, half: str):
        """The standing of the profile's scores and of TESTED on `half` (see scores.standing)."""
        scores = dict.fromkeys((*self.profile.scores, *TESTED))
        return standing(self.study.half(half), tuple(scores))

    def sets(self, score: str, measured_on: str, size=None) -> np.ndarray:
        """bool [C, M]: the share `size` that a score ranks first on the half *not* measured on."""
        ranked = self.ranked(self.study.other(measured_on))
        return sets_of(ranked, score, size or self.profile.epsilon, self.profile.seed)

    def experts(self) -> int:
        """Routed experts of a layer, 0 if dense."""
        routed = self.study.counts().routed
        return 0 if routed is None else routed.shape[-1]

    def here(self, half: str):
        """The rows that are measured of a half."""
        return self.study.half(half).measured()

    def controls(self, own: dict, number: int, half: str, draw=layer_matched) -> dict[str, list]:
        """`number` random sets of the same layers for each category's mask; others for the sets
        that are measured on the other half.
        """
        rng = self.study.rng(half)
        return {c: [draw(mask, rng) for _ in range(number)] for c, mask in own.items()}

    def levels(self, parts: dict):
        """Yield ("all" or a half, arrays, group of each row, half of each row) of {half: what
        `measure` gives}; arrays["clusters"] [n]: see `clusters`.
        """
        count = len(self.study.categories)
        for some in (self.halves, *([half] for half in self.halves)):
            arrays, half = pooled([parts[h] for h in some])
            arrays["clusters"] = self.clusters(some)
            name = some[0] if len(some) == 1 else "all"
            yield name, arrays, arrays["labels"] + count * half, half

    def clusters(self, halves) -> np.ndarray:
        """What the rows that are measured of some halves are drawn with, see `drawn_as_one`."""
        return np.concatenate([drawn_as_one(self.here(half)) for half in halves])

    def units(self) -> set[str]:
        """What is drawn in the halves, {"wordings", "rows"}; see `clusters_of`."""
        return {clusters_of(self.here(half))[1] for half in self.halves}

    def _against(self, own, half, number=None, operator="zero", variant="tuned", **options):
        """Own sets and random ones, each on its own category's rows alone."""
        number = number or self.profile.controls_elsewhere
        sets = {"own": {c: [mask] for c, mask in own.items()}}
        sets["random"] = self.controls(own, number, half)
        return measure(self.here(half), {}, sets, operator, variant=variant, **options)

    def _critical(self, arrays, groups, kinds=("random",)) -> dict:
        controls = {kind: arrays[kind] for kind in kinds}
        return critical(arrays["own"][:, 0], controls, groups, *self._how(arrays))

    def _how(self, arrays) -> tuple:
        return self.profile.resamples, self.profile.seed, arrays["clusters"]

    def _keep(self, prefix: str, found: dict, names) -> None:
        self.numbers |= {f"{prefix}.{name}": found[name] for name in names}

    # ---- consensus sets, as the paper has them

    def consensus_sets(self) -> dict:
        """{(kind, half chosen on): bool [C, M]}: `neurons`, the consensus of the top sets;
        `contribution`, as many by that score; in a sparse model `experts`, of the top-K sets, if
        these can be rerouted (see `_reroutable`).
        """
        counts, profile, found = self.study.counts(), self.profile, {}
        neurons = top_sets(counts.unit("neurons"), profile.epsilon)[0]
        for half in self.halves:
            part = self.study.half(half)
            own = consensus(neurons[part.places], part.labels, profile.tau)
            scores = self.ranked(half).scores["contribution"]
            sized = [category_sets(scores, n, profile.seed)[c] for c, n in enumerate(own.sum(1))]
            found["neurons", half], found["contribution", half] = own, np.stack(sized)
            if counts.routed is not None:
                k = counts.per_token()
                top = top_experts(counts.routed, k, profile.seed).reshape(len(neurons), -1)
                found["experts", half] = consensus(top[part.places], part.labels, profile.tau)
        if self._reroutable(sets for (kind, _), sets in found.items() if kind == "experts"):
            return found
        return {key: sets for key, sets in found.items() if key[0] != "experts"}

    def _reroutable(self, sets) -> bool:
        """Whether sets of experts, bool [C, L x E] each, leave every layer K experts to be chosen,
        and as many to draw controls from as they have.
        """
        for members in sets:
            experts, k = self.experts(), self.study.counts().per_token()
            most = members.reshape(-1, experts).sum(-1).max(initial=0)
            if most > experts - max(k, most):
                return False
        return True

    def by_consensus(self) -> pd.DataFrame:
        """Critical and specific? A row per kind of set and level, against random sets alone."""
        rows, sets = [], self.consensus_sets()
        for kind in dict.fromkeys(kind for kind, _ in sets):
            unit, operator = ("experts", "reroute") if kind == "experts" else ("neurons", "zero")
            parts = {}
            for half in self.halves:
                own = self.study.masks(sets[kind, self.study.other(half)], unit)
                drawn = {"random": self.controls(own, self.profile.controls, half)}
                everywhere = self.profile.controls_all_rows
                parts[half] = measure(self.here(half), own, drawn, operator, everywhere)
            for level, arrays, _, half in self.levels(parts):
                found = own_effect(arrays, half, self.profile.resamples, self.profile.seed)
                self._keep(f"ablation.{kind}.{level}", found, found)
                rows.append({"pair": self.study.name, "sets": kind, "measured on": level} | found)
            for key in ("specificity", "specificity_ci", "p"):
                self.numbers[f"ablation.{kind}.{key}"] = self.numbers[f"ablation.{kind}.all.{key}"]
            self._matrices(kind, parts)
        if self.experts() and ("experts", self.halves[0]) not in sets:
            head = {"pair": self.study.name, "sets": "experts", "measured on": "all"}
            rows.append(head | {"note": "too few other experts in some layer to be rerouted to"})
        return pd.DataFrame(rows)

    def _matrices(self, kind, parts):
        means = {"matrix": lambda d: d["own"], "control_matrix": lambda d: d["everywhere"].mean(1)}
        for name, of in means.items():
            found = [category_means(of(d), d["labels"]).T for d in parts.values()]
            self.numbers[f"ablation.{kind}.{name}"] = np.mean(found, axis=0)

    def matrix(self, kind: str) -> pd.DataFrame:
        """Effect minus random control of `by_consensus`, a row per set ablated and category; n:
        rows of a category.
        """
        names = list(self.study.categories)
        beyond = np.subtract(*(self.numbers[f"ablation.{kind}.{n}"] for n in MATRICES))
        grid = pd.MultiIndex.from_product([names, names], names=["ablated", "measured"])
        table = grid.to_frame(index=False).assign(increase=np.ravel(beyond))
        rows = self.study.measured_sizes()
        panel = f"{self.study.name}: {CHOSEN[kind]}, n = {span(rows)}"
        return table.assign(panel=panel, n=table["measured"].map(rows))

    # ---- equal sizes: from the grid

    def from_grid(self, league: pd.DataFrame, by_category: pd.DataFrame) -> None:
        """Take the headline size's numbers out of the grid's tables."""
        mine = (league["pair"] == self.study.name) & (league["size"] == self.profile.epsilon)
        for row in league[mine].to_dict("records"):
            prefix = f"ablation.equal.{row['score']}.{row['half']}"
            self._keep(prefix, row, EQUAL)
            ends = {n: [row[f"{n}_low"], row[f"{n}_high"]] for n in ("own", *EFFECTS)}
            self.numbers |= {f"{prefix}.{name}_ci": ci for name, ci in ends.items()}
            drawn = [k for k in ("own", "random", "rate", "magnitude") if pd.notna(row[k])]
            self._keep(prefix, row, drawn)
        mine = (by_category["pair"] == self.study.name) & (
            by_category["size"] == self.profile.epsilon
        )
        for row in by_category[mine].to_dict("records"):
            prefix = f"ablation.equal.{row['score']}.{row['half']}.{row['category']}"
            for name in ("critical", "specific"):
                if pd.notna(row[name]):
                    self.numbers[f"{prefix}.{name}"] = row[name]
                    self.numbers[f"{prefix}.{name}_ci"] = [row[f"{name}_low"], row[f"{name}_high"]]
            beside = ("p_sets", "p_specific", "critical_sees", "specific_sees")
            self._keep(prefix, row, [k for k in beside if pd.notna(row[k])])

    # ---- dose

    def doses(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(curve, fits): damage at each share of the neurons, beside random sets of the same
        layers and neurons in one random order; slopes by score and, of STEPS steps or more, the
        second least step, the share in per cent where the curve bends, and its shape in words.
        """
        lines, fits, sizes = [], [], self.profile.sizes
        for score in TESTED:
            parts = {
                half: [self._against(self._masks(score, half, size), half) for size in sizes]
                for half in self.halves
            }
            by_size = [self.levels({h: parts[h][i] for h in parts}) for i in range(len(sizes))]
            for alike in zip(*by_size, strict=True):
                (level, _, groups, _), doses = alike[0], [arrays for _, arrays, _, _ in alike]
                fits.append(self._fit(score, level, doses, groups))
                if level == "all":
                    lines += self._curve(score, doses, groups)
        return pd.DataFrame(lines + self._random_order()), pd.DataFrame(fits)

    def _masks(self, score, half, size=None):
        return self.study.masks(self.sets(score, half, size))

    def _fit(self, score, level, doses, groups) -> dict:
        parts, how = [(d["own"][:, 0], d["random"]) for d in doses], self._how(doses[0])
        fit = slope_of(parts, groups, slopes(np.log2(self.profile.sizes)), *how)
        prefix = f"ablation.dose.{score}.{level}"
        names = (("slope", "estimate"), ("slope_ci", "ci"), ("p", "p"), ("sees", "sees"))
        self.numbers |= {f"{prefix}.{name}": fit[key] for name, key in names}
        row = {"pair": self.study.name, "score": score, "measured on": level}
        row |= {"slope": fit["estimate"], "low": fit["ci"][0], "high": fit["ci"][1]}
        row |= {"p": fit["p"], "sees": fit["sees"]}
        if len(parts) - 1 < STEPS:
            missing = ("second least step", "its low", "its p", "bends at", "from", "to")
            return row | dict.fromkeys(missing, np.nan) | {"shape": "too few sizes to tell"}
        steps = []
        for one, two in zip(parts, parts[1:], strict=False):
            steps.append(slope_of([one, two], groups, [-1.0, 1.0], *how))
        second = sorted(steps, key=lambda step: step["estimate"])[1]
        self.numbers |= {
            f"{prefix}.second_least": second["estimate"],
            f"{prefix}.second_least_ci": second["ci"],
            f"{prefix}.p_second_least": second["p"],
        }
        row |= {"second least step": second["estimate"]}
        row |= {"its low": second["ci"][0], "its p": second["p"]}
        try:
            found = dose_curve(100 * np.array(self.profile.sizes), parts, groups, *how)
        except NotTestable as reason:
            return row | dict.fromkeys(("bends at", "from", "to"), np.nan) | {"shape": str(reason)}
        change = found["change"]
        self.numbers |= {
            f"{prefix}.change": change["at"],
            f"{prefix}.change_ci": [change["low"], change["high"]],
        }
        ends = {"bends at": change["at"], "from": change["low"], "to": change["high"]}
        return row | ends | {"shape": found["shape"]}

    def _curve(self, score, doses, groups) -> list[dict]:
        lines = []
        for share, d in zip(self.profile.sizes, doses, strict=True):
            found = self._critical(d, groups)
            head = {"pair": self.study.name, "share": share, "n": len(d["labels"])}
            ends = {"low": found["own_ci"][0], "high": found["own_ci"][1]}
            lines.append(head | {"line": score, "increase": found["own"]} | ends)
            null = dict.fromkeys(("increase", "low", "high"), found["random"])
            lines.append(head | {"line": f"null: random, layers of {score}"} | null)
        return lines

    def _random_order(self, draws: int = 3) -> list[dict]:
        """Neurons in one random order over the whole model, the first so many of it."""
        counts, found = self.study.counts(), []
        width = counts.unit("neurons")[0].size
        for half in self.halves:
            for draw in range(draws):
                place = np.random.default_rng([self.profile.seed, draw]).permutation(width)
                masks = {
                    s: counts.mask("neurons", place < set_size(width, s))
                    for s in self.profile.sizes
                }
                found.append(ablation_matrix(self.here(half), masks, "zero").mean().to_numpy())
        head = {"pair": self.study.name, "line": "null: random order"}
        return [
            head | {"share": share} | dict.fromkeys(("increase", "low", "high"), value)
            for share, value in zip(self.profile.sizes, np.mean(found, axis=0), strict=True)
        ]

    # ---- sufficiency and operators

    def typical(self, half: str):
        """What neurons do on the texts of a half, with their references (see Reference)."""
        if half not in self.means:
            rows, template = self.study.half(half).rows, self.study.template
            read = [
                f"{template.replace('{instruction}', text)} {reference}"
                for text, reference in zip(texts(rows), rows["reference"], strict=True)
            ]
            settings = {"batch_tokens": self.profile.batch_tokens, "seed": self.profile.seed}
            self.means[half] = reference_activations(*self.study.model(), read, **settings)
        return self.means[half]

    def sufficient(self) -> pd.DataFrame:
        """What sparing the own set saves when all categories' sets are set to their means."""
        rows = []
        for score in TESTED:
            parts = {}
            for half in self.halves:
                sets, rng = self.sets(score, half), self.study.rng(half)
                drawn = spared(self.study.counts(), sets, self.profile.controls_elsewhere, rng)
                masks = {
                    kind: dict(zip(self.study.categories, each, strict=True))
                    for kind, each in drawn.items()
                }
                reference = self.typical(self.study.other(half))
                parts[half] = measure(self.here(half), {}, masks, "mean", reference=reference)
            for level, d, groups, _ in self.levels(parts):
                spare = [(d["own spared"][:, 0], d["random spared"])]
                fit = slope_of(spare, groups, [-1.0], *self._how(d))
                names = (("saved", "estimate"), ("saved_ci", "ci"), ("p", "p"), ("sees", "sees"))
                prefix = f"ablation.sufficient.{score}.{level}"
                self.numbers |= {f"{prefix}.{name}": fit[key] for name, key in names}
                row = {"pair": self.study.name, "score": score, "measured on": level}
                row |= {kind: d[kind].mean() for kind in ("none spared", "random spared")}
                row |= {"own spared": d["own spared"].mean(), "saved": fit["estimate"]}
                row |= {"low": fit["ci"][0], "high": fit["ci"][1], "sees": fit["sees"]}
                rows.append(row | {"p": fit["p"]})
        return pd.DataFrame(rows)

    def operators(self) -> pd.DataFrame:
        """The same sets under each operator, against random sets under the same one."""
        todo = [(score, operator) for score in TESTED for operator in ("zero", "mean", "resample")]
        rows, chosen = [], self.consensus_sets()
        if ("experts", self.halves[0]) in chosen:
            todo += [("experts", operator) for operator in ("reroute", "drop")]
        for score, operator in todo:
            parts = {}
            for half in self.halves:
                other, options = self.study.other(half), {}
                own = self._masks(score, half) if score != "experts" else None
                if operator in ("mean", "resample"):
                    options = {"reference": self.typical(other)}
                own = own or self.study.masks(chosen["experts", other], "experts")
                parts[half] = self._against(own, half, operator=operator, **options)
            _, arrays, groups, _ = next(self.levels(parts))
            found = self._critical(arrays, groups)
            names = ("critical", "critical_ci", "p_critical")
            self._keep(f"ablation.operators.{score}.{operator}", found, names)
            rows.append({"pair": self.study.name, "score": score, "operator": operator} | found)
        return pd.DataFrame(rows)

    def usage(self) -> pd.DataFrame:
        """Consensus experts rerouted, against those that come nearest in use; empty if there are
        none that can be (see `consensus_sets`).
        """
        counts, rows, chosen, parts = self.study.counts(), [], self.consensus_sets(), {}
        if ("experts", self.halves[0]) not in chosen:
            return pd.DataFrame(rows)
        used = {"experts": counts.routed.sum(0) / counts.tokens.sum()}  # f [L, E]
        for half in self.halves:
            own = self.study.masks(chosen["experts", self.study.other(half)], "experts")
            matched = self.controls(
                own, self.profile.controls, half, lambda mask, rng: usage_matched(mask, used, rng)
            )
            sets = {"own": {c: [mask] for c, mask in own.items()}, "usage": matched}
            sets["random"] = self.controls(own, self.profile.controls, half)
            parts[half] = measure(self.here(half), {}, sets, "reroute")
        for level, arrays, groups, _ in self.levels(parts):
            found = self._critical(arrays, groups, ("usage",))
            prefix = f"ablation.usage.experts.{level}"
            self._keep(prefix, found, ("critical", "critical_ci", "p_sets"))
            random = float(arrays["random"].mean())
            rows.append({"pair": self.study.name, "measured on": level, "random": random} | found)
        return pd.DataFrame(rows)

    # ---- following, parts of a set, groups that are no categories, places

    def by_category(self, prefix: str, parts: dict, units: str) -> pd.DataFrame:
        """A row per category, halves pooled: own minus mean of the random draws, with interval and
        p_sets (the set exchanged with its draws), or a note why it has none; numbers under
        `prefix`.<level>.<category>.
        """
        rows = []
        for level, arrays, groups, _ in self.levels(parts):
            for code, category in enumerate(self.study.categories):
                at = arrays["labels"] == code
                part = {name: arrays[name][at] for name in ("own", "random", "clusters")}
                row = {"pair": self.study.name, "measured on": level, "category": category}
                try:
                    found = self._critical(part, groups[at])
                except NotTestable as reason:
                    rows.append(row | {"note": str(reason)})
                    continue
                where = f"{prefix}.{level}.{category}"
                self.numbers |= {
                    f"{where}.{units}": found["critical"],
                    f"{where}.{units}_ci": found["critical_ci"],
                    f"{where}.p_sets": found["p_sets"],
                }
                rows.append(row | found)
        return pd.DataFrame(rows)

    def following(self) -> pd.DataFrame:
        """Instruction gain that each score's sets take away, beyond random ones; see gain_lost."""
        tables = []
        for score in TESTED:
            parts = {}
            for half in self.halves:
                own = self._masks(score, half)
                drawn = self.controls(own, self.profile.controls, half)
                parts[half] = self._drawn_effects(self.here(half), own, drawn, _lost)["lost"]
            table = self.by_category(f"ablation.gain.{score}", parts, "lost")
            tables.append(table.assign(score=score))
        return pd.concat(tables, ignore_index=True)

    def _drawn_effects(self, here, own, drawn, effect) -> dict:
        """{name: arrays} of what `effect(study, masks)` {name: [I, sets]} gives of each category's
        rows under its own set and its random ones.
        """
        size, found = (len(here.rows), 1 + self.profile.controls), {}
        for category, mask in own.items():
            at = (here.rows["category"] == category).to_numpy()
            masks = {"own": mask} | dict(enumerate(drawn[category]))
            for name, values in effect(here.take(at), masks).items():
                found.setdefault(name, np.zeros(size))[at] = values
        labels = here.labels.astype(np.int32)
        return {
            name: {"own": values[:, :1], "random": values[:, 1:], "labels": labels}
            for name, values in found.items()
        }

    def split(self) -> pd.DataFrame:
        """What each score's sets do beyond random ones after the row's own instruction (whole) and
        without any (language), and the difference (following); see damage_split. Empty where the
        template leaves nothing to be read without an instruction.
        """
        rows = []
        for score in TESTED:
            try:
                parts = {half: self._split(score, half) for half in self.halves}
            except NotTestable:
                return pd.DataFrame()
            for name in ("whole", "language", "following"):
                for level, arrays, groups, _ in self.levels({h: parts[h][name] for h in parts}):
                    found = self._critical(arrays, groups)
                    self._keep(f"ablation.split.{score}.{level}.{name}", found, SPLIT)
                    row = {"pair": self.study.name, "score": score, "damage": name}
                    rows.append(row | {"measured on": level} | found)
        return pd.DataFrame(rows)

    def _split(self, score, half) -> dict:
        own = self._masks(score, half)
        drawn = self.controls(own, self.profile.controls, half)
        return self._drawn_effects(self.here(half), own, drawn, damage_split)

    def own_part(self) -> pd.DataFrame:
        """The frequency sets' own part (members of at most half of the sets), against random ones;
        `share` says how much of each set that is.
        """
        parts, shares = {}, []
        for half in self.halves:
            sets = self.sets("frequency", half)
            own = PARTS["own"](sets, None)
            shares.append(own.sum(1) / sets.sum(1))
            masks = {c: m for c, m in self.study.masks(own).items() if _members(m)}
            parts[half] = self._against_some(masks, half)
        table = self.by_category("ablation.part.frequency", parts, "critical")
        share = dict(zip(self.study.categories, np.mean(shares, axis=0), strict=True))
        return table.assign(share=table["category"].map(share)) if len(table) else table

    def parts(self) -> pd.DataFrame:
        """What losing parts of each score's sets costs, on the own category's rows, against random
        neurons of the same layers (see PARTS; few draws). `share`: of the set's members, mean over
        categories. A part without members has no effect to show.
        """
        sets = {(s, half): self.sets(s, half) for s in TESTED for half in self.halves}
        massive, rows = {half: self._massive(half) for half in self.halves}, []
        for score in TESTED:
            for name, of in PARTS.items():
                part = {half: of(sets[score, half], massive[half]) for half in self.halves}
                shares = [part[half].sum(1) / sets[score, half].sum(1) for half in self.halves]
                row = {"pair": self.study.name, "score": score, "part": name}
                row |= {"share": float(np.mean(shares))}
                if row["share"]:
                    found = {h: self._against(self.study.masks(part[h]), h) for h in self.halves}
                    _, arrays, groups, _ = next(self.levels(found))
                    row |= self._critical(arrays, groups)
                    prefix = f"ablation.parts.{score}.{name.replace(' ', '_')}"
                    self._keep(prefix, row, ("share", "critical", "critical_ci"))
                rows.append(row)
        return pd.DataFrame(rows)

    def _massive(self, half) -> np.ndarray:
        """Which neurons are massive activations on rows of the half that sets are chosen on, [M]"""
        read = self.here(self.study.other(half))
        return largest_outputs(read, np.arange(len(read.rows)))[1] > MASSIVE

    def _against_some(self, own: dict, half) -> dict:
        """As _against, at full number of draws; categories without a set lose nothing."""
        here, count = self.here(half), self.profile.controls
        found = {"own": np.zeros((len(here.rows), 1))}
        found["random"] = np.zeros((len(here.rows), count))
        for category, drawn in self.controls(own, count, half).items():
            at = (here.rows["category"] == category).to_numpy()
            masks = {"own": own[category]} | dict(enumerate(drawn))
            increase = ablation_matrix(here.take(at), masks, "zero", allow_inert=True).to_numpy()
            found["own"][at], found["random"][at] = increase[:, :1], increase[:, 1:]
        return found | {"labels": here.labels.astype(np.int32)}

    def pseudo(self) -> pd.DataFrame:
        """Specificity of contribution sets of the categories, and of groups of the same rows that
        are no kinds of instruction; what the categories have beyond the largest of these. A
        grouping that these rows do not allow is left out, and a note says why.
        """
        written_by = {h: written(self.study.half(self.study.other(h))) for h in self.halves}
        parts, missing = {}, []
        for name in ("category", *GROUPINGS):
            try:
                parts[name] = {h: self._specific(name, h, written_by[h]) for h in self.halves}
            except NotTestable as reason:
                missing.append(str(reason))
        note = {"note": " ".join(missing)} if missing else {}
        compared = [name for name in GROUPINGS if name in parts]
        if "category" not in parts or not compared:
            return pd.DataFrame([{"pair": self.study.name, "measured on": "all"} | note])
        rows = []
        for some in (self.halves, *([half] for half in self.halves)):
            level = some[0] if len(some) == 1 else "all"
            drawn = {
                name: self._drawn([found[half] for half in some]) for name, found in parts.items()
            }
            value = {name: float(replicates[0]) for name, replicates in drawn.items()}
            most = max(compared, key=value.get)
            beyond = drawn["category"] - drawn[most]
            low, high = np.quantile(beyond[1:], [0.025, 0.975])
            prefix = f"ablation.pseudo.contribution.{level}"
            self.numbers |= {f"{prefix}.beyond": float(beyond[0])}
            self.numbers |= {f"{prefix}.beyond_ci": [float(low), float(high)]}
            p = float(plus_one(0.0, -beyond[1:]))
            self.numbers[f"{prefix}.p_beyond"] = p
            row = {"pair": self.study.name, "measured on": level} | value
            row |= {"beyond": float(beyond[0]), "low": low, "high": high, "p": p}
            rows.append(row | note)
        return pd.DataFrame(rows)

    def _specific(self, name, half, output) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(effect minus random [n, G], group of each measured row [n], what is drawn as one [n]) of
        one grouping; output [I, M]: what the neurons write on the rows that sets are chosen on.
        """
        other, here = self.study.half(self.study.other(half)), self.here(half)
        if name == "category":
            sets, groups = self.sets("contribution", half), here.labels
        else:
            chosen, groups = groups_of(name, other.rows, here.rows, len(self.study.categories))
            scores = category_scores("contribution", output, chosen)
            size = set_size(scores.shape[1], self.profile.epsilon)
            sets = category_sets(scores, size, self.profile.seed)
        few, counts = np.bincount(groups).min(), self.study.counts()
        if few < SMALLEST:
            raise NotTestable(
                f"groups by {name}: {few} rows of one are measured, and {SMALLEST} are needed."
            )
        own = {g: counts.mask("neurons", members) for g, members in enumerate(sets)}
        drawn = self.controls(own, 1, half)
        masks = own | {("random", g): masks[0] for g, masks in drawn.items()}
        increase = ablation_matrix(here, masks, "zero", allow_inert=True).to_numpy()
        within = [f"{g}, {name}" for g, name in zip(groups, self.clusters([half]), strict=True)]
        if min(cluster_sizes(within, groups)) < SMALLEST:
            within = range(len(groups))
        return increase[:, : len(own)] - increase[:, len(own) :], groups, np.array(within)

    def _drawn(self, parts) -> np.ndarray:
        """Specificity of [(effect, groups, clusters)], first as it is, then clusters resampled
        within groups, each part by itself: [1 + R].
        """
        found = []
        for number, (effect, groups, clusters) in enumerate(parts):
            seed = [self.profile.seed, number]
            weights = resample_weights(groups, self.profile.resamples, seed, clusters)
            weights = np.vstack([np.ones(len(groups)), weights])  # [1 + R, n]
            member = groups == np.arange(effect.shape[1])[:, None]  # [G, n]
            drawn = weights[:, None] * member  # [1 + R, G, n]
            means = drawn @ effect / drawn.sum(-1, keepdims=True)
            found.append(within_between(means)["gap"])
        return np.mean(found, axis=0)

    def places(self) -> pd.DataFrame:
        """By how much losses rise under the `own` set (with an interval over rows), under one
        `random` set of its layers, and under another category's (`others`), by where the ablation
        acts and by operator. The n rows are of one half; `partners` says under which other set.
        """
        half, rows = self.halves[0], []
        here, reference = self.here(half), self.typical(self.study.other(half))
        labels, other = here.labels, partners(here.labels, len(self.study.categories))
        clusters = {"clusters": self.clusters([half])}
        for score in TESTED:
            own = self._masks(score, half)
            drawn = self.controls(own, 1, half)
            for where in WHERE:
                for operator in ("zero", "mean"):
                    options = {"reference": reference} if operator == "mean" else {}
                    options |= {"where": where, "allow_inert": True}
                    risen = {name: np.zeros((len(labels), 1)) for name in ("own", "random")}
                    others = np.zeros(len(labels))
                    for code, (category, mask) in enumerate(own.items()):
                        at = (labels == code) | (other == code)
                        masks = {"own": mask, "random": drawn[category][0]}
                        found = ablation_matrix(here.take(at), masks, operator, **options)
                        mine = labels[at] == code
                        for name, values in risen.items():
                            values[labels == code, 0] = found[name][mine]
                        others[other == code] = found["own"][~mine]
                    found = self._critical(risen | clusters, labels)
                    prefix = f"ablation.places.{score}.{where.replace(' ', '_')}.{operator}"
                    self._keep(prefix, found, ("own", "own_ci", "random"))
                    row = {"pair": self.study.name, "score": score, "where": where}
                    row |= {"operator": operator, "own": found["own"]}
                    row |= dict(zip(("low", "high"), found["own_ci"], strict=True))
                    row |= {"random": found["random"], "others": others.mean()}
                    rows.append(row | {"n": len(labels)})
        return pd.DataFrame(rows)

    # ---- answers and language

    def accuracy_lost(self) -> pd.DataFrame:
        """Drop of task accuracy on the own category, the others, and the own under a random set;
        of the categories that have a right answer to lose. `left out` names the others.
        """
        rows, chosen = [], self.consensus_sets()
        with stage(f"{self.study.name} answers", 2 * len(chosen) * len(self.study.categories)):
            for (kind, half), sets in chosen.items():
                row = {"pair": self.study.name, "sets": kind, "measured on": self.study.other(half)}
                rows.append(row | self._answers_lost(kind, row["measured on"], sets))
        table = pd.DataFrame(rows)
        means = table.groupby("sets", sort=False)[["own", "others", "random"]].mean()
        for kind, mean in means.iterrows():
            kept = {k: v for k, v in mean.items() if np.isfinite(v)}
            self.numbers |= {f"ablation.{kind}.accuracy_lost_{k}": v for k, v in kept.items()}
        return table

    def _answers_lost(self, kind, half, sets) -> dict:
        """One row of `accuracy_lost`: sets bool [C, ...], measured on a half."""
        unit, operator = ("experts", "reroute") if kind == "experts" else ("neurons", "zero")
        here, masks = self.here(half), self.study.masks(sets, unit)
        intact, drawn = self._accuracy(here), self.controls(masks, 1, half)
        able = np.nan_to_num(intact) > 0
        missing = [c for c, good in zip(masks, able, strict=True) if not good]
        having, drop = here.take(able[here.labels]), {"own": [], "others": [], "random": []}
        for code, (category, mask) in enumerate(masks.items() if able.any() else ()):
            lost = intact - self._accuracy(having, mask, operator)
            drop["others"] += lost[able & (np.arange(len(able)) != code)].tolist()
            if able[code]:
                drop["own"].append(lost[code])
                under = self._accuracy(here.category(category), drawn[category][0], operator)
                drop["random"].append(intact[code] - under[code])
        means = {name: np.mean(values) if values else np.nan for name, values in drop.items()}
        return means | {"left out": ", ".join(missing) or "none"}

    def _accuracy(self, here, mask=None, operator="zero") -> np.ndarray:
        """[C]: of the answers that are kept, or of those under an ablation."""
        answers = None
        if mask:
            with ablate(here.model()[0], mask, operator):
                answers = here.generate()
            moved(1)
        table = accuracy(scored(here, answers=answers), ["model"], self.study.categories)
        return table.to_numpy()[0]

    def passages(self) -> list[str]:
        """Plain texts: the longest inputs of the rows, bare; as many as rows are measured of two
        categories.
        """
        rows, number = self.study.rows, 2 * self.profile.ablation_rows
        found = [p for p in rows.loc[rows["category"] == "SUM", "input"] if p]
        return (found or sorted(texts(rows), key=len, reverse=True))[:number]

    def plain_loss(self, mask=None, operator="zero") -> float:
        """Mean loss of the passages, nats per token, intact or ablated."""
        model, passages = self.study.model(), self.passages()
        with ablate(model[0], mask or {}, operator):
            found = float(plain_text_nll(*model, passages).mean())
        moved(len(passages) if mask else 0)
        return found

    def damage(self, scores) -> pd.DataFrame:
        """A point per score, half and category: loss of plain text against the own category's."""
        points, quiet = [], self.plain_loss()
        for score in scores:
            for half in self.halves:
                masks, here = self._masks(score, half), self.here(half)
                increase = ablation_matrix(here, masks, "zero", allow_inert=True).to_numpy()
                own = category_means(increase, here.labels).T
                for i, (category, mask) in enumerate(masks.items()):
                    point = {"pair": self.study.name, "score": score, "half": half}
                    plain = self.plain_loss(mask) - quiet
                    point |= {"category": category, "plain": plain, "own": own[i, i]}
                    points.append(point | {"n": int((here.labels == i).sum())})
        points += self._random_damage(quiet)
        table = pd.DataFrame(points)
        for score, mean in table.groupby("score")["plain"].mean().items():
            if score in scores:
                self.numbers[f"ablation.equal.{score}.plain_text"] = mean
        return table

    def _random_damage(self, quiet) -> list[dict]:
        points = []
        for half in self.halves:
            drawn, here = self.controls(self._masks("contribution", half), 1, half), self.here(half)
            for category, [mask] in drawn.items():
                part = here.category(category)
                own = ablation_matrix(part, {"random": mask}, "zero", allow_inert=True)
                point = {"pair": self.study.name, "score": "null: random", "half": half}
                point |= {"category": category, "plain": self.plain_loss(mask) - quiet}
                points.append(point | {"own": float(own["random"].mean()), "n": len(own)})
        return points

    # ---- does the instrument work?

    def checks(self) -> pd.DataFrame:
        """A positive control (the whole last layer at once) and a negative one (the sets by
        contribution in a twin with random weights, beyond random sets), on n rows of one half.
        """
        half = self.halves[0]
        own, here = self._masks("contribution", half), self.here(half)
        layer = {"last layer": self._last_layer(next(iter(own.values())))}
        strong = float(ablation_matrix(here, layer, "zero")["last layer"].mean())
        arrays = self._against(own, half, variant="twin")
        weak = self._critical(arrays | {"clusters": self.clusters([half])}, arrays["labels"])
        self.numbers |= {"ablation.positive": strong, "ablation.negative": weak["critical"]}
        self.numbers["ablation.negative_ci"] = weak["critical_ci"]
        row = {"pair": self.study.name, "positive: last layer": strong}
        row |= {"negative: twin": weak["critical"], "low": weak["critical_ci"][0]}
        row |= {"high": weak["critical_ci"][1], "p": weak["p_critical"], "n": len(here.rows)}
        return pd.DataFrame([row])

    def _last_layer(self, like):
        mask = {family: np.zeros_like(values) for family, values in like.items()}
        next(iter(mask.values()))[-1] = True
        return mask


def ablations(profile, categories: int, experts: int = 0) -> dict[str, int]:
    """How many losses of a row each experiment of notebook 06 measures under some ablation, by the
    name of its method ("grid": the cells, where none is committed), and notebook 04's
    `single_experts`; of one pair whose halves both have `ablation_rows` of every category. experts:
    in a layer, none if dense. A row that two tables ask for is read once, so a run reads a little
    less. (Ours.)
    """
    sparse = experts > 0
    own, full, sizes = categories, categories**2, len(profile.sizes)
    drawn, few = profile.controls, profile.controls_elsewhere
    everywhere = full * min(drawn, profile.controls_all_rows)
    half = {
        "by_consensus": (2 + sparse) * (full + own * drawn + everywhere),
        "doses": len(TESTED) * sizes * own * (1 + few) + 3 * sizes * own,
        "following": 2 * len(TESTED) * own * (1 + drawn),
        "split": 2 * len(TESTED) * own * (1 + drawn),  # half of it is read for `following`
        "own_part": own * (1 + drawn),
        "parts": len(PARTS) * len(TESTED) * own * (1 + few),
        "pseudo": (1 + len(GROUPINGS)) * 2 * full,
        "sufficient": len(TESTED) * own * (2 + few),
        "operators": (3 * len(TESTED) + 2 * sparse) * own * (1 + few),
        "usage": sparse * own * (1 + 2 * drawn),
        "damage": len(TESTED) * full + own + (len(TESTED) + 1) * own * 2,  # two: plain texts
        "single_experts": own * experts if experts > NEIGHBOURS else 0,
    }
    if profile.grid is None:
        main = full + len(KINDS) * own * drawn + everywhere
        other = full + len(KINDS) * own * few + full * min(2, few, profile.controls_all_rows)
        half["grid"] = len(profile.scores) * (main + (sizes - 1) * other)
    once = {"places": len(WHERE) * 2 * len(TESTED) * 2 * 2 * own}
    once["checks"] = own + own * (1 + few)
    every = {name: 2 * count for name, count in half.items()} | once
    rows = min(profile.ablation_rows, profile.rows or profile.ablation_rows)
    return {name: rows * count for name, count in every.items()}


def groups_of(name: str, chosen: pd.DataFrame, measured: pd.DataFrame, count: int) -> tuple:
    """Codes 0..count-1 of the rows that sets are chosen on and of those measured: groups that are
    no kinds of instruction. `opening`: by the first word, of like size in both together; `length`:
    by characters, and `random`: of like size in each.

    Raises NotTestable where a group has no row in one of the two. (Ours.)
    """
    rng = np.random.default_rng(0)
    if name == "opening":
        found = _by_opening(chosen, measured, count)
    else:
        found = [_of_like_size(name, rows, count, rng) for rows in (chosen, measured)]
    if any(len(set(codes)) < count for codes in found):
        raise NotTestable(f"groups by {name}: one of {count} has no row in a half. Add rows.")
    return tuple(found)


def _by_opening(chosen, measured, count) -> list[np.ndarray]:
    words = [rows["instruction"].str.split().str[0].str.lower() for rows in (chosen, measured)]
    loads, place = np.zeros(count), {}
    for word, size in pd.concat(words).value_counts().items():
        place[word] = int(loads.argmin())
        loads[place[word]] += size
    return [word.map(place).to_numpy(int) for word in words]


def _of_like_size(name, rows, count, rng) -> np.ndarray:
    noise = rng.random(len(rows))
    size = (rows["instruction"] + rows["input"]).str.len() if name == "length" else 0 * noise
    return np.lexsort((noise, size)).argsort() * count // len(rows)


def partners(labels: np.ndarray, count: int) -> np.ndarray:
    """For each row one other category, [n] codes 0..count-1: the rows of a category take the others
    in turn, so each pair of categories has as many rows as any, but for one. (Ours.)

    >>> partners(np.array([0, 0, 0, 1, 1, 2]), 3).tolist()
    [1, 2, 1, 2, 0, 0]
    """
    turn = pd.Series(labels).groupby(labels).cumcount().to_numpy()
    return (labels + 1 + turn % (count - 1)) % count


def _lost(study, masks) -> dict[str, np.ndarray]:
    return {"lost": gain_lost(study, masks)}


def _members(mask) -> int:
    return sum(int(part.sum()) for part in mask.values())


PARTS = {  # of sets, bool [C, M], massive neurons [M]: their members that ...
    "whole": lambda sets, massive: sets,
    "general": lambda sets, massive: sets & sets.all(0),  # stand in the set of every category
    "own": lambda sets, massive: sets & (sets.sum(0) <= len(sets) / 2),  # of at most half of them
    "no massive": lambda sets, massive: sets & ~massive,  # are no massive activations
}
GROUPINGS = ("opening", "length", "random")
CHOSEN = {  # kinds of consensus sets, as titles of panels say them
    "neurons": "sets by frequency",
    "contribution": "sets by contribution",
    "experts": "experts",
}
MATRICES = ("matrix", "control_matrix")
EFFECTS = ("critical", "specificity")
SPLIT = ("critical", "critical_ci", "p_sets")
EQUAL = (
    "critical",
    "p_critical",
    "p_sets",
    "critical_sees",
    "specificity",
    "p",
    "p_sets_specificity",
    "specificity_sees",
)


# ---- several pairs on one page


def together(found: dict, method: str, *arguments) -> pd.DataFrame:
    """The tables that a method of several Needed gives, one below the other."""
    with _progress(found, method):
        tables = [getattr(one, method)(*arguments) for one in found.values()]
    return pd.concat(tables, ignore_index=True)


def _progress(found: dict, method: str):
    """A bar over the rows that a method reads under ablations; none where the plan has no number of
    them.
    """
    planned = [
        ablations(one.profile, len(one.study.categories), one.experts()).get(method, 0)
        for one in found.values()
    ]
    label = method.replace("_", " ")
    return stage(label, sum(planned), unit=" rows") if sum(planned) else nullcontext()


def dose_tables(found: dict) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(curves, fits) of several Needed, nulls last in the curves."""
    with _progress(found, "doses"):
        curves, fits = zip(*(one.doses() for one in found.values()), strict=True)
    curve = pd.concat(curves, ignore_index=True)
    null = curve["line"].str.startswith("null")
    return pd.concat([curve[~null], curve[null]]), pd.concat(fits, ignore_index=True)


def matrices(found: dict) -> pd.DataFrame:
    """Effect minus random control of every pair's consensus sets, as plots.matrices draws them."""
    return pd.concat(
        one.matrix(kind)
        for one in found.values()
        for kind in CHOSEN
        if f"ablation.{kind}.matrix" in one.numbers
    )


def league(table: pd.DataFrame, pairs: dict) -> pd.DataFrame:
    """The grid's rows of these pairs, halves pooled, with `shown`: "critical [interval]"."""
    mine = table[table["pair"].isin(list(pairs)) & (table["half"] == "all")]
    ends = zip(mine["critical"], mine["critical_low"], mine["critical_high"], strict=True)
    mine = mine.assign(n=mine["rows"])
    return mine.assign(shown=[f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in ends])


def per_category(table: pd.DataFrame, pairs: dict, size: float) -> pd.DataFrame:
    """The grid's rows by category of these pairs, halves pooled, at one size, with `holm` over the
    categories and `supported`.
    """
    here = table["pair"].isin(list(pairs)) & (table["half"] == "all") & (table["size"] == size)
    mine = table[here & table["score"].isin(TESTED) & table["critical"].notna()].copy()
    families = mine.groupby(["pair", "score"])["p_sets"]
    mine["holm"] = families.transform(lambda p: adjust(p.to_numpy(), "holm"))
    mine["supported"] = (mine["critical_low"] > 0) & (mine["holm"] < 0.05)
    rows = {name: study.measured_sizes() for name, study in pairs.items()}
    places = zip(mine["pair"], mine["category"], strict=True)
    return mine.assign(n=[int(rows[pair][category]) for pair, category in places])


def shown(table: pd.DataFrame, index, columns, otherwise: str):
    """Some columns of a table, rounded; or a sentence where it is empty."""
    return table.set_index(index)[columns].round(4) if len(table) else otherwise


def tested(table: pd.DataFrame, columns):
    """Some columns of a table, rounded, and why a row has no numbers, where one has none."""
    return table[[*columns, *table.columns.intersection(["note"])]].round(4)


def sentences(found: dict) -> list[str]:
    """What the page found, pair by pair."""
    said = []
    for name, one in found.items():
        numbers, every = one.numbers, one.study.categories
        for score in TESTED:
            key = f"ablation.equal.{score}.all"
            if f"{key}.critical" not in numbers:
                continue
            said.append(
                f"{name}: losing the {one.profile.epsilon:.0%} of neurons that {score} ranks first "
                f"costs {_nats(numbers, key, 'critical')} beyond the hardest control. Category by "
                f"category that is supported in {_held(numbers, key, 'critical_ci', every)}."
            )
            held = _held(numbers, f"ablation.gain.{score}.all", "lost_ci", every)
            again = _apart(numbers, score)
            said.append(f"{name}: losing them takes instruction gain away in {held}.{again}")
        said += [f"{name}: {line}" for line in (*_said_once(numbers), *_said_of_places(numbers))]
        said += [f"{name}: {alike}" for alike in same_experts(one)]
        if "rows" in one.units():
            said.append(
                f"{name}: a category has fewer than five wordings in a half, so that rows of one "
                "wording are taken for independent: intervals and p are too sure."
            )
        low, high = numbers["ablation.negative_ci"]
        said.append(
            f"{name}: the controls of the instrument: the whole last layer costs "
            f"{numbers['ablation.positive']:.2f}; in an untrained twin the sets by contribution "
            f"cost {numbers['ablation.negative']:.3f} [{low:.3f}, {high:.3f}] beyond random ones."
        )
    return said


def _apart(numbers, score) -> str:
    """The second measure of following: what a set costs with the instruction, less without any."""
    key = f"ablation.split.{score}.all.following"
    if f"{key}.critical" not in numbers:
        return ""
    return (
        " What they cost after the row's instruction, less what they cost after an empty one, is "
        f"{_nats(numbers, key, 'critical')}."
    )


def _nats(numbers, key, name) -> str:
    low, high = numbers[f"{key}.{name}_ci"]
    return f"{numbers[f'{key}.{name}']:.2f} nats per token [{low:.2f}, {high:.2f}]"


def _held(numbers, key, interval, categories) -> str:
    """In how many of the categories that can be tested the interval lies above 0 and p, Holm over
    them, is below 0.05: the ledger's rule.
    """
    asked = [c for c in categories if f"{key}.{c}.p_sets" in numbers]
    if not asked:
        return "no category: none can be tested"
    holm = adjust([numbers[f"{key}.{c}.p_sets"] for c in asked], "holm")
    held = [
        c
        for c, p in zip(asked, holm, strict=True)
        if numbers[f"{key}.{c}.{interval}"][0] > 0 and p < 0.05
    ]
    return f"{len(held)} of {len(asked)} categories tested ({', '.join(held) or 'none'})"


ONCE = {  # beginnings of keys, what of them, the sentence around the value
    "pseudo.contribution": (
        "beyond",
        "sets by contribution are more specific than those of groups "
        "of rows that are no categories, by {}.",
    ),
    "dose.{score}": (
        "second_least",
        "from one size to the next, losing more of what {score} ranks first adds {} or more beyond "
        "random sets, at every step but one.",
    ),
    "sufficient.{score}": (
        "saved",
        "sparing the category's own set by {score} saves {} more than sparing random ones.",
    ),
    "experts": (
        "specificity",
        "losing a category's most used experts costs its own rows {} more than the others' rows.",
    ),
    "usage.experts": (
        "critical",
        "losing a category's most used experts costs {} more than losing those of the layer that "
        "come nearest in use (they are used less).",
    ),
}


def _said_once(numbers):
    for beginning, (name, around) in ONCE.items():
        for score in TESTED if "{score}" in beginning else ("",):
            key = f"ablation.{beginning.format(score=score)}.all"
            if f"{key}.{name}" in numbers:
                yield around.format(_nats(numbers, key, name), score=score)


def _said_of_places(numbers):
    for score in TESTED:
        keys = [f"ablation.places.{score}.{where.replace(' ', '_')}.zero" for where in WHERE]
        if f"{keys[0]}.own" in numbers:
            every, later, prompt, response = (_nats(numbers, key, "own") for key in keys)
            yield (
                f"losses rise by {every} where the sets by {score} are zero at every token, by "
                f"{later} at all but the first, by {prompt} at the prompt alone, by {response} at "
                f"the response alone. One random set a category, zero at every token: "
                f"{numbers[f'{keys[0]}.random']:.2f}."
            )


def same_experts(one) -> list[str]:
    """Which categories have one and the same set of experts: equal rows of their matrix (equal to
    the last digit, as losses of different sets never are).
    """
    groups = {}
    matrix = one.numbers.get("ablation.experts.matrix", [])
    for category, row in zip(one.study.categories, matrix, strict=False):
        groups.setdefault(tuple(row), []).append(category)
    return [
        f"{' and '.join(some)} have one and the same set of experts: their rows in Figure 6.1 are "
        "one experiment."
        for some in groups.values()
        if len(some) > 1
    ]


def keep_grid(found: dict, league: pd.DataFrame, by_category: pd.DataFrame) -> None:
    """`Needed.from_grid` of several."""
    for one in found.values():
        one.from_grid(league, by_category)


@torch.no_grad()
def last_logits(model, ids) -> torch.Tensor:
    """What a model expects after token ids [1, T]: logits [V]."""
    return model(ids).logits[0, -1]
