"""What a profile will cost, from its configurations alone."""

import pandas as pd
import torch
from transformers import AutoModelForCausalLM

from ..capture.checkpoints import configuration
from ..capture.gguf_files import BAD, one_line
from ..capture.sites import find_sites
from ..config import Pair, Profile
from ..hexainst.corpus import text
from ..hexainst.schema import load_hexainst
from ..record import UserError

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
LETTERS = 4  # in a token, about
SPEED = 8e10  # operations a second of one quiet core in float32: 289 tokens/s of 135 M parameters


def costs(pair: Pair, profile: Profile, rows: pd.DataFrame) -> dict:
    """One pair's cost, from its configuration alone: parameters, memory, neurons, experts, counts
    on disk, reading.

    `memory GB` is one model's weights; notebooks 00 and 07 hold two. `analysis GB` is what
    notebook 05 holds of counts. `passes` over all rows: four kinds of positions of base and tuned,
    the twins, and those at equal length. `core hours` is what they take on one core, to a factor of
    about two: 2 operations per parameter in use and token, four letters to a token, no generation.
    `ablated sequences`: rows read by notebook 06 for its consensus and equal-size sets with their
    controls; its other experiments add about as many again, and generations.
    """
    ref = pair.base or pair.tuned
    model = _empty(ref, pair.base_revision if pair.base else pair.tuned_revision)
    sites = find_sites(model)
    parameters = sum(p.numel() for p in model.parameters())
    neurons = sum(site.width * site.experts for site in sites)
    routed = sum(site.experts for site in sites if site.family == "expert")
    counted, sets = 8 + profile.twins, 2 * (2 + bool(routed))
    passes = counted + 4 + profile.twins
    letters = sum(len(text(row)) + len(row["reference"]) for row in rows.to_dict("records"))
    seconds = passes * letters / LETTERS * 2 * _in_use(model, sites) / SPEED
    # each set and its controls, in rows per category: own sets and some controls on all rows,
    # controls on their own
    each = [36 + 6 * kinds * profile.controls + 36 * profile.controls_all_rows for kinds in (1, 3)]
    scores = 0 if profile.grid else 2 * len(profile.scores)
    return {
        "pair": pair.name,
        "parameters": parameters,
        "memory GB": parameters * BYTES[pair.dtype] / 2**30,
        "layers": len({site.layer for site in sites}),
        "neurons": neurons,
        "routed experts": routed,
        "counts GB": counted * len(rows) * 2 * (neurons + routed) / 2**30,
        "analysis GB": (2 + profile.twins) * len(rows) * 2 * (neurons + routed) / 2**30,
        "passes": passes,
        "core hours": seconds / 3600,
        "ablated sequences": profile.ablation_rows * (sets * each[0] + scores * each[1]),
    }


def _empty(ref: str, revision: str | None):
    """The model of a checkpoint, without weights."""
    config = configuration(ref, revision)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except BAD as error:
        raise UserError(
            f"{ref!r} is no causal language model by its configuration: {one_line(error)}"
        ) from error


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
    rows = load_hexainst(dataset=profile.dataset)
    table = [costs(pair, profile, rows) | {"instructions": len(rows)} for pair in profile.pairs]
    return pd.DataFrame(table).set_index("pair")
