"""A model whose critical neurons are known, and instructions that need them: the oracle of
ablation's tests.

Attention writes nothing, so a token is predicted from the one before it. Category c's references
are its letter a_c, then b_c; what turns a_c into b_c is one neuron of layer 1. In every layer
stand neurons that are always on and write nothing.
"""

import pandas as pd
import torch

from helpers.capture.count import count
from helpers.config import Pair, Profile
from helpers.hexainst.corpus import texts
from helpers.hexainst.schema import CATEGORIES
from helpers.study.study import Study
from tests import zoo

TEMPLATE = "say: {instruction}\n"

FIRST, SECOND = "abcdef", "uvwxyz"
ALWAYS_ON, LAYER = range(40, 48), 1
CIRCUIT = {
    category: LAYER * zoo.N + 10 + c for c, category in enumerate(CATEGORIES)
}  # flat indices


def model():
    """Llama of 3 layers x 80 neurons; the residual stream has a place per token and a constant
    one, the last.
    """
    made, words = zoo.build("llama"), zoo.tokenizer().get_vocab()
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in made.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            for part in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
                part.weight.copy_(0.01 * torch.randn(part.weight.shape, generator=noise))
            layer.mlp.gate_proj.weight[:, -1] = -1.0
            layer.mlp.gate_proj.weight[ALWAYS_ON] = 0
            layer.mlp.gate_proj.weight[ALWAYS_ON, -1] = 1.0
            layer.mlp.up_proj.weight[ALWAYS_ON, -1] = 1.0
            layer.mlp.down_proj.weight[:, ALWAYS_ON] = 0
        made.model.embed_tokens.weight.copy_(torch.eye(zoo.WORDS, zoo.D))
        made.model.embed_tokens.weight[:, -1] = 1.0
        made.lm_head.weight.copy_(2 * torch.eye(zoo.WORDS, zoo.D))
        mlp = made.model.layers[LAYER].mlp
        for c, (first, second) in enumerate(zip(FIRST, SECOND, strict=True)):
            mlp.gate_proj.weight[10 + c, words[first]] = 2.0
            mlp.up_proj.weight[10 + c, words[first]] = 1.0
            mlp.down_proj.weight[:, 10 + c] = 0
            mlp.down_proj.weight[words[second], 10 + c] = 0.03
    return made


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


def study(data=None, **settings) -> Study:
    """The planted model as the tuned one of a pair, its prompts counted; nothing is on disk."""
    data, loaded = rows() if data is None else data, (model(), zoo.tokenizer())
    pair = Pair("pair", "none", "none")
    profile = Profile("planted", "none", (pair,), template=TEMPLATE, batch_tokens=512, **settings)
    made = Study(profile, pair, data, {"tuned": loaded})
    counts = count(*loaded, texts(data), template=TEMPLATE)
    made.once(("counts", "tuned", "prompt"), lambda: counts)
    return made
