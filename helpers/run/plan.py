"""What a profile will cost, from its configurations alone."""

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..capture.sites import find_sites
from ..config import Pair, Profile
from ..hexainst.schema import load_hexainst
from ..paths import ROOT
from ..record import UserError

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def costs(pair: Pair, profile: Profile, rows: int) -> dict:
    """One pair's cost, from its configuration alone: parameters, memory, neurons, experts, counts
    on disk, reading.

    `memory GB` is one model's weights; notebooks 00 and 07 hold two. `analysis GB` is what
    notebook 05 holds of counts. `passes` over all rows: four kinds of positions of base and tuned,
    the twins, and those at equal length. `ablated sequences`: rows read by notebook 06 for its
    consensus and equal-size sets with their controls; its other experiments add about as many
    again, and generations.
    """
    ref = str(ROOT / pair.base) if (ROOT / pair.base).is_dir() else pair.base
    try:
        config = AutoConfig.from_pretrained(ref, revision=pair.base_revision)
    except (OSError, ValueError) as error:
        raise UserError(
            f"no configuration for {pair.base!r}: {str(error).splitlines()[0]} Check the name, "
            "connect, run `hf auth login` for a gated model, or give a local folder."
        ) from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sites = find_sites(model)
    parameters = sum(p.numel() for p in model.parameters())
    neurons = sum(site.width * site.experts for site in sites)
    routed = sum(site.experts for site in sites if site.family == "expert")
    counted, sets = 8 + profile.twins, 2 * (2 + bool(routed))
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
        "counts GB": counted * rows * 2 * (neurons + routed) / 2**30,
        "analysis GB": (2 + profile.twins) * rows * 2 * (neurons + routed) / 2**30,
        "passes": counted + 4 + profile.twins,
        "ablated sequences": profile.ablation_rows * (sets * each[0] + scores * each[1]),
    }


def plan(profile: Profile) -> pd.DataFrame:
    """One row per pair of a profile; see `costs`."""
    rows = len(load_hexainst(dataset=profile.dataset))
    table = [costs(pair, profile, rows) | {"instructions": rows} for pair in profile.pairs]
    return pd.DataFrame(table).set_index("pair")
