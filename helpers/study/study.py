"""A Study: one pair of models and the rows they read; it gives counts, answers and models, from
disk where they are.
"""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import PartialState
from tqdm import tqdm

from ..capture.budget import named
from ..capture.checkpoints import base_of, fingerprint, locate
from ..capture.count import flips, passes
from ..capture.counts import Counts, Gathered, Shards
from ..capture.interventions import intact
from ..capture.loading import load_model, load_tokenizer, random_twin
from ..capture.tokens import Encoded, chat_template
from ..config import Pair, Profile
from ..hexainst.corpus import few_of_many, folds, text
from ..hexainst.schema import load_hexainst
from ..paths import counts_dir, resolve, short
from ..record import DamagedFile, NotTestable, UserError, cached, digest, versions
from . import counting
from .answers import LOOSE, SHORT, answer_ids, greedy_answers, spoken
from .counting import COUNTING, FORMAT, SHARD
from .equal_length import SIZE, SIZES, Draws, draw_path, draw_settings, with_draws
from .losses import Losses
from .reading import encode_once, encode_rows


def rows_of(profile: Profile) -> pd.DataFrame:
    """The rows that a profile asks for, with their column `fold`: its data set, whole or the
    length-matched subset, and of each half and category the first `rows` (all if None).
    """
    rows = load_hexainst(dataset=profile.dataset, subset=profile.subset)
    if profile.rows is not None:
        first = rows.groupby(["half", "category"]).cumcount() < profile.rows
        rows = rows[first].reset_index(drop=True)
    return rows.assign(fold=folds(rows))


DECIDING = ("id", "category", "reference", "fold")  # what sets and effects hang on, beside the text
READ_ALONE = 4  # instructions that are read twice, in a batch and alone


def open_model(pair: Pair, variant: str, seed: int = 0):
    """(model, tokenizer) of one variant of a pair: "base", "tuned", or a twin, the base's
    architecture (without a base the tuned model's) with random weights: "twin" from `seed`,
    "twin-1", "twin-2", ... from the ones after it.
    """
    counting.check_names(variant)
    ref, revision = _checkpoint(pair, variant)
    alone = not torch.cuda.is_available() or counting.processes()[1] == 1
    model, tokenizer = load_model(
        ref,
        dtype=pair.dtype,
        revision=revision,
        device_map=pair.device_map if alone else {"": PartialState().device},
    )
    own = counting.twin_seed(variant, seed)
    return (model if own is None else random_twin(model, own, free=True)), tokenizer


def _checkpoint(pair, variant):
    if pair.base is None and variant == "base":
        raise UserError(
            f"pair {pair.name} has no base model. Name one in the profile, or ask for 'tuned'."
        )
    if pair.base is None or variant == "tuned":
        return pair.tuned, pair.tuned_revision
    return pair.base, pair.base_revision


class Study:
    """One pair of models, the rows they read, and the settings under which they do.

    rows [I] hold the columns of HexaInst and `fold`, the part of the data (see corpus.folds) that a
    row is chosen or measured on. `half`, `category`, `measured` and `take` give the Study of fewer
    rows: it shares the models, and its counts and answers are those rows' of the whole. What was
    read or computed is remembered until `close`. In memory are the models that `model` was asked
    for, and at most one more: the one that was last needed to fill a file. (Ours.)
    """

    def __init__(
        self, profile: Profile, pair: Pair, rows: pd.DataFrame, models: dict | None = None
    ):
        """`models` {variant: (model, tokenizer)} are used instead of those that the pair names."""
        if rows.empty:
            raise UserError(f"profile {profile.name}: there are no rows. Check its data set.")
        self.profile, self.pair, self.rows = profile, pair, rows.reset_index(drop=True)
        self.whole, self.places = self, np.arange(len(rows))
        self._models, self._spare, self._remembered = {} if models is None else models, {}, {}
        self._named = models is None  # the models are those that the pair names

    @classmethod
    def of(cls, profile: Profile, pair: Pair, rows: pd.DataFrame | None = None) -> "Study":
        """The Study of a pair on the profile's data set, or on rows that were read before."""
        rows = rows_of(profile) if rows is None else rows
        return cls(profile, pair, rows if "fold" in rows else rows.assign(fold=folds(rows)))

    # ---- what it is

    @property
    def name(self) -> str:
        """The pair's name, and its folder's."""
        return self.pair.name

    @property
    def has_base(self) -> bool:
        """Whether there is a base model that the tuned one came from."""
        return self.pair.base is not None

    @property
    def variants(self) -> tuple[str, ...]:
        """The models of the pair: ("base", "tuned"), or ("tuned",)."""
        return ("base", "tuned") if self.has_base else ("tuned",)

    @property
    def at_hand(self) -> bool:
        """Whether the tuned model is a folder of this machine, whole without any other."""
        folder = resolve(self.pair.tuned)
        return folder.is_dir() and base_of(folder) is None

    @property
    def categories(self) -> tuple[str, ...]:
        """Names in order of first appearance in the whole; what the codes in `labels` mean."""
        return tuple(dict.fromkeys(self.whole.rows["category"]))

    @property
    def labels(self) -> np.ndarray:
        """Category of each row as a code into `categories`, int [I]."""
        return pd.Categorical(self.rows["category"], self.categories).codes.astype(int)

    @property
    def halves(self) -> tuple[str, ...]:
        """The folds of the whole, in order of first appearance: two, or one where rows are few."""
        return tuple(dict.fromkeys(self.whole.rows["fold"]))

    @property
    def units(self) -> tuple[str, ...]:
        """Kinds of components: "neurons", and in a sparse model "shared" (if any) and "experts"."""
        counts = self.whole.counts()
        shared = ("shared",) if "shared" in counts.neurons else ()
        return ("neurons", *shared, *(() if counts.routed is None else ("experts",)))

    @property
    def template(self) -> str:
        """What every model of the pair reads around an instruction: the profile's template or, if
        it says `chat`, that of the tuned model's own chat format. Base and tuned read the same.
        """
        if not self.profile.chat:
            return self.profile.template
        ref, revision = _checkpoint(self.pair, "tuned")
        return self.whole.once("template", lambda: chat_template(load_tokenizer(ref, revision)))

    # ---- fewer rows

    def take(self, rows) -> "Study":
        """The Study of some of its rows: places int [n] or bool [I]."""
        part = copy.copy(self)
        part.rows = self.rows.iloc[rows].reset_index(drop=True)
        part.places, part._remembered = self.places[rows], {}
        return part

    def half(self, name: str) -> "Study":
        """The rows of one fold. Raises NotTestable if a category has none there."""
        here = (self.rows["fold"] == name).to_numpy()
        missing = set(self.rows["category"]) - set(self.rows["category"][here])
        if name not in self.halves or missing:
            raise NotTestable(
                f"half {name!r} of {self.halves} has no row of {sorted(missing)}: nothing can be "
                "chosen or measured there. Add rows, or leave these categories out of the data set."
            )
        return self.once(("half", name), lambda: self.take(here))

    def rng(self, half: str) -> np.random.Generator:
        """What draws at random for one half: another one than the other half's."""
        return np.random.default_rng([self.profile.seed, self.halves.index(half)])

    def other(self, name: str) -> str:
        """The half that has no part in `name`. Raises NotTestable if there is one half only."""
        if len(self.halves) != 2 or name not in self.halves:
            raise NotTestable(
                f"{self.name}: the halves are {self.halves}, none beside {name!r}: what is chosen "
                "on one cannot be measured on another. Add rows: two of each category at least."
            )
        return self.halves[1 - self.halves.index(name)]

    def category(self, name: str) -> "Study":
        """The rows of one category."""
        return self.take((self.rows["category"] == name).to_numpy())

    def measured(self) -> "Study":
        """`ablation_rows` rows of each category, in as many wordings as there are (`few_of_many`):
        what ablations are measured on.
        """
        number = self.profile.ablation_rows
        return self.once(
            "measured", lambda: self.take(few_of_many(self.rows, ["category"], number))
        )

    def measured_rows(self) -> str:
        """A digest of the ids of the rows that `measured` takes of all halves."""
        return digest(self._measured()["id"].tolist())

    def measured_sizes(self) -> pd.Series:
        """How many rows of each category `measured` takes of all halves."""
        found = self._measured()["category"].value_counts()
        return found.reindex(self.categories, fill_value=0)

    def _measured(self) -> pd.DataFrame:
        some = few_of_many(self.rows, ["fold", "category"], self.profile.ablation_rows)
        return self.rows[some]

    # ---- what it has read, or computed

    def once(self, key, compute):
        """What `compute()` gave the first time it was asked for under this key."""
        if key not in self._remembered:
            self._remembered[key] = compute()
        return self._remembered[key]

    def model(self, variant: str = "tuned"):
        """(model, tokenizer), loaded on first use and shared until `close`; see `open_model`."""
        if variant not in self._models:
            self._models[variant] = self._at_hand(variant)
            self._spare.clear()
        return self._models[variant]

    def reader(self, variant: str = "tuned"):
        """As `model`, to make what is kept on disk: let go when another one is needed for that.

        Raises UserError while an intervention on it is open, or a hook of someone's is on it.
        """
        loaded = self._at_hand(variant)
        if not intact(loaded[0]):
            raise UserError(
                f"{self.name} {variant}: an intervention is open (or a hook is on the model), and "
                "what is kept on disk is the intact model's. Ask for it before, or use `generate` "
                "for an ablated one's answers."
            )
        return loaded

    def _at_hand(self, variant):
        if variant in self._models:
            return self._models[variant]
        if variant not in self._spare:
            self._spare.clear()  # before the next one takes its place
            torch.set_num_threads(self.profile.threads)
            self._spare[variant] = open_model(self.pair, variant, self.profile.seed)
            named(self._spare[variant][0], f"{self.name} {variant}")
        return self._spare[variant]

    def close(self) -> None:
        """Forget the models and what was remembered; what is on disk comes back when asked for."""
        self._models.clear()
        self._spare.clear()
        self._remembered.clear()
        self.whole._remembered.clear()

    def masks(self, sets, unit: str = "neurons") -> dict[str, dict]:
        """The component mask (see `ablate`) of each category's set, sets bool [C, M]."""
        counts = self.whole.counts()
        own = zip(self.categories, sets, strict=True)
        return {category: counts.mask(unit, members) for category, members in own}

    def encoded(self, positions: str = "prompt", variant: str = "tuned") -> list[Encoded]:
        """What `variant` reads of each row, and which tokens count; see `encode_rows`."""
        tokenizer = self._at_hand(variant)[1]
        answers = self.answer_ids(variant) if positions == "generated" else None
        return encode_rows(tokenizer, self.rows, self.template, positions, answers)

    def reading_of(self, rows: pd.DataFrame, variant: str = "tuned") -> list[Encoded]:
        """Other rows, read as this study's are: their references count, end of sequence too."""
        return encode_rows(self._at_hand(variant)[1], rows, self.template, "reference")

    def reading(self, variant: str = "tuned", positions: str = "prompt") -> list[Encoded]:
        """What `variant` reads once for all its counts (see `encode_once`); twins read the prompts
        alone, and nothing else is asked of them.
        """
        rows = self.rows
        if variant.startswith("twin") and positions == "prompt":
            rows = rows.assign(reference="")
        read = encode_once(self._at_hand(variant)[1], rows, self.template, positions)
        if variant == "base":
            self._refuse_other_ids(read, positions)
        return read

    def _refuse_other_ids(self, read, positions) -> None:
        """Raise UserError for the first row of which base and tuned do not read the same tokens."""
        if "tuned" in self._models:
            tokenizer = self._models["tuned"][1]
        else:
            tokenizer = load_tokenizer(*_checkpoint(self.pair, "tuned"))
        tuned = encode_once(tokenizer, self.rows, self.template, positions)
        for said, one, two in zip(self.rows["instruction"], read, tuned, strict=True):
            if one.ids != two.ids:
                raise UserError(
                    f"{self.name}: of {said[:40]!a} base reads {len(one.ids)} tokens and tuned "
                    f"{len(two.ids)}, or others: counts of the two could not be compared. A marker "
                    "of the chat format may be one token to the tuned model alone: take "
                    "`chat: false` and a template without it."
                )

    # ---- kept on disk

    def counts(self, variant: str = "tuned", positions: str = "prompt") -> Counts:
        """Counts of one model at one kind of positions, of these rows; from disk, else counted.

        variant    "base", "tuned" or a twin (see `open_model`)
        positions  "prompt", "prompt-even", "prompt-odd", "response" or "generated" (`encode_rows`)
        Files: data/results/<profile>/<pair>/<variant>/<positions>/. Raises RecordMismatch if those
        in place were made under other settings, from other weights or other rows. (Paper, sec.
        counting; disk and processes: ours.)
        """
        whole = self.whole.once(
            ("counts", variant, positions), lambda: self.whole._counts(variant, positions)
        )
        if self.whole is self:
            return whole
        return Counts.of({k: a[self.places] for k, a in whole.arrays().items()}, whole.layers)

    def _counts(self, variant, positions):
        shards = self._shards(variant, positions)
        try:
            if shards.sealed():
                return shards.load()
        except DamagedFile:
            pass  # a shard is missing or damaged: it is counted again
        self._fill(shards, variant, positions)
        return shards.load()

    def shards(self, variant: str = "tuned", positions: str = "prompt") -> Shards:
        """As `counts`, for counts larger than memory: the finished shards of the whole, to be read
        one at a time.
        """
        shards = self.whole._shards(variant, positions)
        if not shards.finished():
            self.whole._fill(shards, variant, positions)
        return shards

    def folder(self, variant: str, what: str) -> Path:
        """Where one model's counts, answers or draws lie."""
        return counts_dir(self.profile.name, self.name, variant, what)

    def _shards(self, variant, positions):
        return Shards(
            self.folder(variant, positions),
            self.settings(variant, positions),
            len(self.rows),
            SHARD,
        )

    def _fill(self, shards, variant, positions):
        several = self.profile.processes > 1 and variant not in self._models
        if several and counting.processes()[1] == 1 and shards.missing():
            counting.launch(self._job(variant, positions), self.profile.processes)
            return
        counting.fill(
            shards,
            lambda k, bar: self._read(variant, positions, list(shards.rows(k)), bar),
            f"{self.name} {variant} {positions}",
        )

    def _read(self, variant, positions, rows, bar):
        """(counts, what they were made with) of one file's rows. Each text is read once: the pass
        also makes the file's counts at the other positions and at equal length, where missing.
        """
        model, part, profile = self.reader(variant)[0], self.take(rows), self.profile
        k, draws, gathered = rows[0] // SHARD, {}, Gathered(len(rows))
        if positions == "generated":
            answers = part.encoded("generated", variant)
            some = [Encoded(e.ids, e.counted, {"generated": e.counted}) for e in answers]
        else:
            some = part.reading(variant, positions)
            for size in SIZES if variant == "tuned" else (SIZE,):
                some = with_draws(some, rows, size, profile.draws, profile.seed)
                draws[size] = Draws(rows, size, profile.draws, profile.epsilon, profile.seed)
        names = [name for name in some[0].groups if "drawn" not in name]
        for batch, counts in passes(model, some, profile.batch_tokens, progress=bar):
            gathered(batch, {name: counts[name] for name in names})
            for drawn in draws.values():
                drawn(batch, counts)
        found = counting.made_with(model)
        if k == 0:
            found["batching"] = flips(model, some[:READ_ALONE], gathered.counts[names[0]])
        for name in names:
            shards = self._shards(variant, name)
            if name != positions and shards.missing([k]):
                shards.write(k, gathered.counts[name], found)
        for size, drawn in draws.items():
            path, want = draw_path(self, variant, size, k), draw_settings(self, variant, size)
            cached(path, want, lambda drawn=drawn: (drawn.arrays(), {}))
        return gathered.counts[positions], found

    def settings(self, variant: str = "tuned", positions: str = "prompt") -> dict:
        """All that decides a count, as the shards' record keeps it; no model is loaded for it."""
        counting.check_names(variant, positions)
        profile, pair = self.profile, self.pair
        generated, seed = positions == "generated", counting.twin_seed(variant, profile.seed)
        made = {} if seed is None else {"twin": counting.TWIN}
        return (
            self.checkpoint(variant)
            | made
            | {
                "profile": profile.name,
                "pair": pair.name,
                "variant": variant,
                "positions": positions,
                "seed": seed,
                "dtype": pair.dtype,
                "device_map": pair.device_map,
                "template": self.template,
                "data": self.digest("response" if positions == "response" else "prompt"),
                "versions": {name: versions()[name] for name in COUNTING},
                "batch_tokens": profile.batch_tokens,
                "format": FORMAT,
                "max_new_tokens": self._budget() if generated else None,
            }
        )

    def _budget(self):
        return {
            "most": self.profile.max_new_tokens,
            "checkers": self.digest("checkers"),
            "padding": LOOSE,
            **SHORT,
        }

    def checkpoint(self, variant: str = "tuned") -> dict:
        """What a variant was loaded from: {"ref", "commit", "weights": a digest of its files}."""

        def look():
            ref, revision = _checkpoint(self.pair, variant)
            folder, commit = locate(ref, revision)
            return {"ref": ref, "commit": commit, "weights": fingerprint(folder)}

        return self.whole.once(("checkpoint", variant), look)

    def lost(self, keys: list[str], compute, variant: str = "tuned") -> list[np.ndarray]:
        """Losses of some of its rows under ablations, float64 [n] each: what was measured under
        these keys; `compute(missing keys)` yields the others, which are kept.

        File: data/results/<profile>/<pair>/<variant>/losses/ablated.jsonl. Models that were handed
        over have no file: they may be any. Whoever edits a loaded model's weights by hand must hand
        it over, or what is kept is not the named model's. (Ours.)
        """
        kept = self.whole.once(("losses", variant), lambda: self.whole._losses(variant))
        return kept(keys, compute)

    def _losses(self, variant):
        if not self._named:
            return Losses()
        path, made = self.folder(variant, "losses") / "ablated.jsonl", counting.made_with
        settings = self.settings(variant, "response") | made(self.model(variant)[0])
        return Losses(path, settings | {"threads": torch.get_num_threads()})

    def digest(self, what: str = "prompt") -> str:
        """A digest of the rows: of each one's text ("prompt"), with its reference ("response"), or
        with that, its id, category and fold ("rows"); of the names of their "checkers".
        """
        of_row = {
            "prompt": lambda row: [text(row), ""],
            "response": lambda row: [text(row), row["reference"]],
            "rows": lambda row: [text(row), *(row[key] for key in DECIDING)],
            "checkers": lambda row: row["checker"]["name"],
        }[what]
        return self.once(
            ("digest", what), lambda: digest([of_row(row) for row in self.rows.to_dict("records")])
        )

    def answers(self, variant: str = "tuned") -> list[str]:
        """Greedy answers of the intact model to these rows, in their order; from disk, else
        generated and kept. See `answer_ids`.
        """
        return [answer for _, answer in self._answers(variant)]

    def answer_ids(self, variant: str = "tuned") -> list[list[int]]:
        """The same as token ids, without the end-of-sequence token.

        Files: data/results/<profile>/<pair>/<variant>/answers/, as many rows to one as of counts,
        each with its record; an interrupted run goes on where it was. Only the files that these
        rows stand in are computed. Raises RecordMismatch as `counts` does. (Ours.)
        """
        return [ids for ids, _ in self._answers(variant)]

    def _answers(self, variant):
        """[(token ids, answer)] of these rows."""
        whole, found = self.whole, {}
        needed = sorted({int(place) // SHARD for place in self.places})
        label = f"{self.name} {variant} answers"
        for k in tqdm(needed, label, delay=5, leave=False, unit=f" x {SHARD} instructions"):
            found[k] = whole.once(("answers", variant, k), lambda k=k: whole._answered(variant, k))
        return [found[place // SHARD][place % SHARD] for place in self.places.tolist()]

    def _answered(self, variant, k):
        """[(token ids, answer)] of one file."""
        rows = self.take(np.arange(k * SHARD, min((k + 1) * SHARD, len(self.rows))))
        want = self.settings(variant, "generated") | {"positions": "answers"}
        want["rows"] = [int(rows.places[0]), int(rows.places[-1]) + 1]
        folder = self.folder(variant, "answers")

        def generate():
            model, tokenizer = self.reader(variant)
            ids = answer_ids(model, tokenizer, rows.rows, *self._speech())
            arrays = {
                "ids": np.array([token for one in ids for token in one], np.int32),
                "lengths": np.array([len(one) for one in ids], np.int32),
            }
            return arrays, {"answers": spoken(tokenizer, ids), "made_with": versions()}

        anew = f"Delete {short(folder)} to answer anew"
        arrays, record = cached(folder / f"answers-{k:05d}.safetensors", want, generate, anew)
        ids = np.split(arrays["ids"], np.cumsum(arrays["lengths"])[:-1])
        return list(zip((part.tolist() for part in ids), record["answers"], strict=True))

    def generate(self, variant: str = "tuned") -> list[str]:
        """Greedy answers of the model as it is now, ablated or not; nothing is kept."""
        return greedy_answers(*self.model(variant), self.rows, *self._speech())

    def _speech(self):
        return self.template, self.profile.batch_tokens, self.profile.max_new_tokens

    # ---- other processes

    def _job(self, variant, positions) -> dict:
        """What each of several processes is told: JSON, read by `from_job`."""
        return {
            "profile": dataclasses.asdict(self.profile),
            "pair": self.name,
            "variant": variant,
            "positions": positions,
            "rows": self.rows.to_dict("records"),
        }

    @classmethod
    def from_job(cls, path) -> tuple["Study", str, str]:
        """(study, variant, positions) of a job's file; the study counts in one process."""
        job = json.loads(Path(path).read_text())
        pairs = tuple(Pair(**pair) for pair in job["profile"]["pairs"])
        profile = Profile(**job["profile"] | {"pairs": pairs, "processes": 1})
        pair = next(pair for pair in pairs if pair.name == job["pair"])
        study = cls(profile, pair, pd.DataFrame(job["rows"]))
        return study, job["variant"], job["positions"]


def studies(profile: Profile, rows: pd.DataFrame | None = None) -> dict[str, Study]:
    """{pair's name: Study} of every pair of a profile, all on the same rows."""
    rows = rows_of(profile) if rows is None else rows
    return {pair.name: Study.of(profile, pair, rows) for pair in profile.pairs}
