"""What a profile will cost, from its configurations alone: `python -m helpers.plan --profile P`."""

import argparse
import sys

import pandas as pd
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from helpers.config import Pair, Profile, load_profile
from helpers.hexainst import load_hexainst
from helpers.paths import ROOT
from helpers.record import UserError
from helpers.sites import find_sites

PASSES = 9  # forward passes over the rows in notebook 02: four kinds of positions of base and tuned, one of the twin
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def costs(pair: Pair, rows: int) -> dict:
    """One pair's size, from its configuration alone: parameters, memory, neurons, experts, counts on disk."""
    ref = str(ROOT / pair.base) if (ROOT / pair.base).is_dir() else pair.base
    try:
        config = AutoConfig.from_pretrained(ref, revision=pair.base_revision)
    except (OSError, ValueError) as error:
        raise UserError(f"no configuration for {pair.base!r}: {str(error).splitlines()[0]} Check the name, "
                        "connect, run `hf auth login` for a gated model, or give a local folder.") from error
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sites = find_sites(model)
    parameters = sum(p.numel() for p in model.parameters())
    neurons = sum(site.width * site.experts for site in sites)
    routed = sum(site.experts for site in sites if site.family == "expert")
    return {"pair": pair.name, "parameters": parameters, "memory GB": parameters * BYTES[pair.dtype] / 2**30,
            "layers": len({site.layer for site in sites}), "neurons": neurons, "routed experts": routed,
            "passes": PASSES, "counts GB": PASSES * rows * 2 * (neurons + routed) / 2**30}


def plan(profile: Profile) -> pd.DataFrame:
    """One row per pair of a profile; see `costs`."""
    rows = len(load_hexainst(dataset=profile.dataset))
    return pd.DataFrame([costs(pair, rows) | {"instructions": rows} for pair in profile.pairs]).set_index("pair")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="tiny")
    try:
        print(plan(load_profile(parser.parse_args().profile)).T.to_string(float_format="{:,.2f}".format))
    except UserError as error:
        sys.exit(f"error: {error}")
