"""Low-rank tuning (LoRA, Hu et al. 2021): frozen weights W, trained up and down in W + scale * up
@ down.

Matrices are parametrised in place by torch, so counting, losses and optimisers see an ordinary
model. A 3-D weight (fused experts) is a stack of matrices, each with a pair of its own.
"""

import math
from operator import attrgetter

import torch
from torch import nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """W [.., m, n] -> W + scale * up [.., m, r] @ down [.., r, n]; up starts at zero, so at first
    nothing changes.
    """

    def __init__(self, shape, rank: int, scale: float):
        super().__init__()
        *stack, m, n = shape
        self.scale, self.up = scale, nn.Parameter(torch.zeros(*stack, m, rank))
        self.down = nn.Parameter(torch.randn(*stack, rank, n) / math.sqrt(n))

    def forward(self, weight):
        """The weight in use."""
        return weight + self.scale * (self.up @ self.down)


def attach(model, rank: int, scale: float = 2.0, seed: int = 0):
    """Freeze the model and give each attention and MLP projection (names ending in _proj) a
    trained low-rank part.

    Returns the model. The seed draws the `down` matrices.
    """
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for module, name in _projections(model):
            parametrize.register_parametrization(
                module, name, LowRank(getattr(module, name).shape, rank, scale)
            )
    return model


def _projections(model) -> list[tuple]:
    """(module, name of its weight) of every projection: `weight` of a linear *_proj, a bank's own
    3-D *_proj.
    """
    found = [
        (module, "weight")
        for name, module in model.named_modules()
        if name.endswith("_proj") and isinstance(module, nn.Linear)
    ]
    return found + [
        (module, name)
        for module in model.modules()
        for name, p in module.named_parameters(recurse=False)
        if name.endswith("_proj") and p.dim() == 3
    ]


def merged(model):
    """A plain model of the same class with the low-rank parts added into its weights; `model`
    stays as it is.
    """
    with torch.random.fork_rng():
        plain = type(model)(model.config).to(model.dtype).train(model.training)
    with torch.no_grad():
        for name, p in plain.named_parameters():
            p.copy_(attrgetter(name)(model))
    return plain
