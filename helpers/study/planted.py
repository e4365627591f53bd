"""A model edited by hand, in which chosen neurons truly serve one category, and a league: which
score finds them, at what planted size, among what noise and which decoys?

Attention writes nothing, so a token is predicted from the one before it. Category c's references
are its letter a_c, then b_c; what turns a_c into b_c are the planted neurons alone. M neurons, C
categories. (Ours.)
"""

from itertools import product

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..analysis.sets import category_sets, recovery
from ..analysis.stats import bootstrap
from ..capture.count import count
from ..config import SCORES, Pair, Profile
from ..hexainst.corpus import texts
from ..hexainst.schema import CATEGORIES
from ..paths import DATA
from ..record import DamagedFile, read_json, sha256, verify, versions, write_json, write_table
from .evaluate import ablation_matrix
from .scores import standing
from .study import Study

LAYERS, N, D = 3, 80, 48  # layers, neurons of each, width of the residual stream
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:?"
WORDS = ["<pad>", "<bos>", "<eos>", "<unk>", *LETTERS, " ", "\n"]
FIRST, SECOND, NOWHERE = "abcdef", "uvwxyz", 46  # 46: a direction that no token is read from
ALWAYS_ON, LAYER = range(40, 48), 1
CIRCUIT = {c: LAYER * N + 10 + i for i, c in enumerate(CATEGORIES)}  # flat indices
SILENT = tuple(layer * N + n for layer in range(LAYERS) for n in ALWAYS_ON)
TEMPLATE = "say: {instruction}\n"

# The league: what stands beside the planted neurons, how much these write, how loud the rest is.
DECOYS = ("none", "always on", "readers", "writers")
WRITES, NOISES, DRAWS, MANY = (0.003, 0.01, 0.03), (0.1, 0.3, 0.5), 10, 4
TABLE = DATA / "grid" / "planted.csv"
SETTINGS = {
    "decoys": DECOYS,
    "writes": WRITES,
    "noises": NOISES,
    "draws": DRAWS,
    "planted": MANY,
    "neurons": LAYERS * N,
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character, <bos> known but not put in front."""
    plain = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "unk": "<unk>"}
    special = {f"{name}_token": word for name, word in names.items()}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **special)


def model(circuit=None, write: float = 0.03, noise: float = 0.01, silent=SILENT, seed: int = 3):
    """Llama of 3 layers x 80 neurons; the residual stream has a place per token and a constant
    one, the last.

    circuit: {category: flat index, or several}; together a category's neurons write `write` per
    unit of activation. noise: SD of all neurons' other gate and up weights (off everywhere at .1;
    at .5 some are on at any token, and write at random). silent: neurons that are always on and
    write nothing.
    """
    config = LlamaConfig(
        vocab_size=101,
        hidden_size=D,
        intermediate_size=N,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    draw = torch.Generator().manual_seed(seed)
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            mlp = layer.mlp
            for part, sd in ((mlp.gate_proj, noise), (mlp.up_proj, noise), (mlp.down_proj, 0.01)):
                part.weight.copy_(sd * torch.randn(part.weight.shape, generator=draw))
            mlp.gate_proj.weight[:, -1] = -1.0
        made.model.embed_tokens.weight.copy_(torch.eye(101, D))
        made.model.embed_tokens.weight[:, -1] = 1.0
        made.lm_head.weight.copy_(2 * torch.eye(101, D))
        for place in silent:
            mlp, n = made.model.layers[place // N].mlp, place % N
            mlp.gate_proj.weight[n] = 0
            mlp.gate_proj.weight[n, -1] = mlp.up_proj.weight[n, -1] = 1.0
            mlp.down_proj.weight[:, n] = 0
    for c, places in enumerate((circuit or CIRCUIT).values()):
        places = np.atleast_1d(places)
        serve(made, c, places, WORDS.index(SECOND[c]), write / len(places))
    return made


@torch.no_grad()
def serve(made, c: int, places, target: int, write: float) -> None:
    """Let the neurons at flat `places` fire at category c's letter and write to direction
    `target`.
    """
    for place in places:
        mlp, n = made.model.layers[place // N].mlp, int(place % N)
        mlp.gate_proj.weight[n, WORDS.index(FIRST[c])] = 2.0
        mlp.up_proj.weight[n, WORDS.index(FIRST[c])] = 1.0
        mlp.down_proj.weight[:, n] = 0
        mlp.down_proj.weight[target, n] = write


def rows(per_half: int = 8) -> pd.DataFrame:
    """Instructions in two halves; half of an instruction's letters are its category's."""
    filler = "0123456789"
    return pd.DataFrame(
        [
            {
                "id": f"{half}-{category}-{i}",
                "fold": half,
                "half": half,
                "category": category,
                "input": "",
                "instruction": "".join(FIRST[c] + filler[(i + k) % 10] for k in range(3 + i % 3)),
                "reference": FIRST[c] + SECOND[c],
                "checker": {"name": "exact", "answer": FIRST[c] + SECOND[c]},
            }
            for half in ("A", "B")
            for c, category in enumerate(CATEGORIES)
            for i in range(per_half)
        ]
    )


def study(data=None, made=None, **settings) -> Study:
    """The planted model (or `made`) as the tuned one of a pair, its prompts counted; nothing is on
    disk.
    """
    data, loaded = rows() if data is None else data, (made or model(), tokenizer())
    pair = Pair("pair", "none", "none")
    profile = Profile("planted", "none", (pair,), template=TEMPLATE, batch_tokens=512, **settings)
    found = Study(profile, pair, data, {"tuned": loaded})
    counts = count(*loaded, texts(data), template=TEMPLATE)
    found.once(("counts", "tuned", "prompt"), lambda: counts)
    return found


def world(decoys: str, write: float, noise: float, seed: int):
    """(model, planted bool [C, M]) of one draw: MANY neurons a category, anywhere, beside `decoys`.

    always on: 24 neurons that are on at every token and write nothing. readers: MANY a category
    that fire exactly where the planted ones are meant to, and write nothing. writers: the same, and
    each writes three times what a planted one does, to where nothing is read from.
    """
    size = len(CATEGORIES) * MANY
    order = np.random.default_rng([seed, 1]).permutation(LAYERS * N)
    own, others = order[:size].reshape(-1, MANY), order[size : 2 * size]
    made = model(
        dict(zip(CATEGORIES, own, strict=True)),
        write,
        noise,
        others if decoys == "always on" else (),
        seed,
    )
    if decoys in ("readers", "writers"):
        lost = 3 * write / MANY if decoys == "writers" else 0.0
        for c, places in enumerate(others.reshape(-1, MANY)):
            serve(made, c, places, NOWHERE, lost)
    planted = np.zeros((len(own), LAYERS * N), bool)
    planted[np.arange(len(own))[:, None], own] = True
    return made, planted


def auc(scores, planted) -> np.ndarray:
    """The chance that a planted component scores higher than another, ties counting half: [C] from
    [C, M].

    >>> auc([[3.0, 1.0, 1.0]], [[False, True, False]])
    array([0.25])
    """
    planted = np.asarray(planted, bool)
    own, rest = planted.sum(-1), (~planted).sum(-1)
    ranks = (rankdata(scores, axis=-1) * planted).sum(-1)
    return (ranks - own * (own + 1) / 2) / (own * rest)


def find(decoys: str, write: float, noise: float, seed: int) -> list[dict]:
    """What each score finds in one draw, chosen on half A: a row a score, recall (of the planted,
    in sets of their number) and auc, means over the categories; loss, the rise of the own
    category's loss on half B without its planted neurons, nats per reference token.
    """
    made, planted = world(decoys, write, noise, seed)
    here = study(rows(), made)
    ranked, other = standing(here.half("A"), SCORES), here.half("B")
    hurt = ablation_matrix(other, here.masks(planted), "zero").to_numpy()
    loss = hurt[np.arange(len(hurt)), other.labels].mean()
    found = []
    for score in SCORES:
        values = ranked.scores[score]
        hit = recovery(category_sets(values, MANY, seed), planted)["recall"].mean()
        found.append({"score": score, "recall": hit, "auc": auc(values, planted).mean()})
    return [{"loss": loss} | row for row in found]


def league(decoys=DECOYS, writes=WRITES, noises=NOISES, draws: int = DRAWS) -> pd.DataFrame:
    """Which score finds planted neurons? A row per decoys, write, noise and score: loss, then
    recall and auc (means over draws) with their 95 % intervals over draws (Student's), and the
    recall of chance. An auc of chance is one half.
    """
    lines = []
    for kind, write, noise in product(decoys, writes, noises):
        found = [find(kind, write, noise, seed) for seed in range(draws)]
        for n, score in enumerate(SCORES):
            part = pd.DataFrame([one[n] for one in found])
            line = {"decoys": kind, "write": write, "noise": noise, "score": score}
            line |= {"loss": part["loss"].mean(), "draws": draws}
            for name in ("recall", "auc"):
                line |= _mean_of(name, part[name].to_numpy())
            lines.append(line | {"chance": MANY / (LAYERS * N)})
    return pd.DataFrame(lines)


def _mean_of(name, values) -> dict:
    each = np.arange(len(values))
    found = bootstrap(lambda w: w @ values / w.sum(1), 0 * each, clusters=each)
    low, high = np.clip([found.low, found.high], 0, 1)
    return {name: values.mean(), f"{name}_low": low, f"{name}_high": high}


def write(table: pd.DataFrame, path=TABLE) -> None:
    """Keep the league's table, and beside it what it was made with."""
    write_table(path, table)
    record = SETTINGS | {"made_with": versions(), "sha256": sha256(path)}
    write_json(path.with_suffix(".json"), record)


def committed(path=TABLE) -> pd.DataFrame:
    """The table as `write` kept it. Raises RecordMismatch if the league's settings have changed
    since, DamagedFile if the table is not that of its record.
    """
    record = read_json(path.with_suffix(".json"))
    verify(record, SETTINGS, path, "Run `python -m helpers.run planted` to compute it anew")
    if not path.exists() or sha256(path) != record["sha256"]:
        raise DamagedFile(
            f"{path.name} is missing or changed. Run `python -m helpers.run planted`."
        )
    return pd.read_csv(path)


def sentences(table: pd.DataFrame, most: float = 0.9) -> list[str]:
    """What each score found, in words: in how many settings it finds at least `most` of the
    planted, and beside which decoys it fares worst.
    """
    widest = (table["recall_high"] - table["recall_low"]).max() / 2
    said = [
        f"Chance finds {table['chance'].iloc[0]:.1%} (AUC 0.5); the widest 95 % interval of a "
        f"recall is {widest:.2f} to either side."
    ]
    for score, part in table.groupby("score", sort=False):
        beside = part.groupby("decoys", sort=False)["recall"].mean()
        said.append(
            f"{score} finds at least {most:.0%} of the planted neurons in "
            f"{(part['recall'] >= most).sum()} of {len(part)} settings; worst beside decoys "
            f"'{beside.idxmin()}' (mean recall {beside.min():.2f}); AUC {part['auc'].min():.2f} to "
            f"{part['auc'].max():.2f}."
        )
    return said
