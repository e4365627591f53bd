"""What a profile will cost, from its configurations alone."""

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..capture.checkpoints import configuration
from ..capture.gguf_files import BAD, one_line
from ..capture.loading import unlike
from ..capture.sites import find_sites
from ..config import Pair, Profile, load_profile
from ..hexainst.corpus import text
from ..record import UserError
from ..study.needed import ablations
from ..study.study import rows_of

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LETTERS = 4  # in a token, about
GROUPS = 4  # kinds of positions whose counts a pass gives: prompt, its two halves, response
SPEED = 8e10  # operations a second of one quiet core in float32: 289 tokens/s of 135 M parameters
# {profile: where it differs from the family's default configuration in transformers}; None where
# the checkpoint itself can be had without a hub
QWEN = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN |= {"num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True}
SMOL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152}
EXAMPLES = {
    "tiny": None,
    "smollm2": ("llama", SMOL | {"tie_word_embeddings": True}),
    "smollm2-pair": ("llama", SMOL | {"tie_word_embeddings": True}),
    "qwen25-05b-pair": ("qwen2", QWEN),
    "olmoe-pair": ("olmoe", {"intermediate_size": 1024}),
    "llama2-7b": ("llama", {}),
    "mistral-7b": ("mistral", {}),
    "qwen15-moe": ("qwen2_moe", {}),
}


def costs(pair: Pair, profile: Profile, rows: pd.DataFrame, config=None) -> dict:
    """One pair's cost, from its configurations alone: parameters, memory, neurons, experts, counts
    on disk, reading. config: the transformers configuration of both (default: the checkpoints'
    own). Raises UserError where these are no pair.

    `memory GB` is one model's weights; notebooks 00 and 07 hold two. `analysis GB` is what
    notebook 05 holds of counts. `passes` over all rows, all kinds of positions in each: the pair's
    models and the twins. `ablated sequences`: losses that notebooks 04 and 06 measure under some
    ablation (see `needed.ablations`). `core hours` and `ablation hours` are what the two take on
    one core, to a factor of about two: 2 operations per parameter in use and token, four letters to
    a token, no generation.
    """
    model = _planned(pair) if config is None else _empty(config, pair.name)
    sites = find_sites(model)
    parameters = sum(p.numel() for p in model.parameters())
    neurons = sum(site.width * site.experts for site in sites)
    routed = sum(site.experts for site in sites if site.family == "expert")
    passes = 1 + bool(pair.base) + profile.twins
    counted = GROUPS * passes
    letters = sum(len(text(row)) + len(row["reference"]) for row in rows.to_dict("records"))
    hours = letters / LETTERS * 2 * _in_use(model, sites) / SPEED / 3600  # of all rows, once
    most = max((site.experts for site in sites if site.family == "expert"), default=0)
    ablated = sum(ablations(profile, rows["category"].nunique(), most).values())
    return {
        "pair": pair.name,
        "parameters": parameters,
        "memory GB": parameters * BYTES[pair.dtype] / 2**30,
        "layers": len({site.layer for site in sites}),
        "neurons": neurons,
        "routed experts": routed,
        "counts GB": counted * len(rows) * 2 * (neurons + routed) / 2**30,
        "analysis GB": passes * len(rows) * 2 * (neurons + routed) / 2**30,
        "passes": passes,
        "core hours": passes * hours,
        "ablated sequences": ablated,
        "ablation hours": ablated / len(rows) * hours,
    }


def _empty(config, name: str):
    """The model of a configuration, without weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except BAD as error:
        raise UserError(
            f"{name}: no causal language model by its configuration: {one_line(error)}"
        ) from error


def _planned(pair: Pair):
    """A pair's model without weights. Raises UserError where base and tuned differ in what
    `capture.loading.check_pair` would refuse: configuration, names and shapes of the weights.
    """
    tuned = _empty(configuration(pair.tuned, pair.tuned_revision), pair.name)
    if not pair.base:
        return tuned
    base = _empty(configuration(pair.base, pair.base_revision), pair.name)
    if differ := unlike(base, tuned):
        raise UserError(
            f"{pair.name}: base {pair.base!r} and tuned {pair.tuned!r} differ in "
            f"{', '.join(differ)}: they are no pair. Correct `base` and `tuned` in the profile."
        )
    return base


def _in_use(model, sites) -> float:
    """Parameters that one token goes through: of its experts only the chosen ones."""
    chosen = getattr(model.config, "num_experts_per_tok", None) or 1
    banks = [site for site in sites if site.family == "expert"]
    idle = sum(
        (1 - min(1, chosen / site.experts)) * sum(p.numel() for p in site.module.parameters())
        for site in banks
    )
    return sum(p.numel() for p in model.parameters()) - idle


def plan(profile: Profile) -> pd.DataFrame:
    """One row per pair of a profile; see `costs`."""
    rows = rows_of(profile)
    table = [costs(pair, profile, rows) | {"instructions": len(rows)} for pair in profile.pairs]
    return pd.DataFrame(table).set_index("pair")


def plans() -> pd.DataFrame:
    """A row per pair of EXAMPLES' profiles: what the chain costs on models of very different size.
    Needs no hub. Their data set is the AI half, and the human half where it was built.
    """
    table = []
    for name, shape in EXAMPLES.items():
        profile = load_profile(name)
        rows = rows_of(profile)
        config = AutoConfig.for_model(shape[0], **shape[1]) if shape else None
        for pair in profile.pairs:
            row = {"profile": name} | costs(pair, profile, rows, config)
            table.append(row | {"instructions": len(rows)})
    return pd.DataFrame(table)
