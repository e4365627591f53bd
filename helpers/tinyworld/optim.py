"""The optimisers of the tiny models: Muon (Jordan et al. 2024) for hidden matrices, AdamW for
everything else.

Muon is written here because torch.optim.Muon takes no 3-D parameters (fused experts) and
multiplies in bfloat16, which is slow on a CPU.
"""

import math
from collections import defaultdict

import torch


def orthogonal(stack, steps: int = 5):
    """Each matrix of `stack` [..., m, n] with its singular values brought near 1 (quintic
    Newton-Schulz iteration).

    >>> flat = orthogonal(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    >>> [round(s, 1) for s in torch.linalg.svdvals(flat).tolist()]
    [1.1, 0.8]
    """
    tall = stack.shape[-2] > stack.shape[-1]
    x = stack.mT if tall else stack
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised matrix by matrix; a 3-D parameter is a stack of matrices.

    Updates have the root mean square of AdamW's (0.2), so that one learning rate serves both
    optimisers.
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """One update of every parameter from its gradient; those of one shape in one stack."""
        for group in self.param_groups:
            alike = defaultdict(list)
            for p in group["params"]:
                average = self.state[p].setdefault("average", torch.zeros_like(p))
                average.mul_(group["momentum"]).add_(p.grad)
                alike[p.shape].append((p, p.grad + group["momentum"] * average))
            for shape, pairs in alike.items():
                size = group["lr"] * 0.2 * math.sqrt(max(shape[-2:]))
                updates = orthogonal(torch.stack([ahead for _, ahead in pairs]))
                for (p, _), update in zip(pairs, updates, strict=True):
                    p.add_(update, alpha=-size)


def optimisers(model, lr) -> list:
    """[Muon for the projections, AdamW for embeddings, norms and routers]; of low-rank parts, all
    AdamW. Frozen parameters get none.
    """
    hidden, rest = [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (
                hidden
                if p.ndim > 1 and "_proj" in name and "parametrizations" not in name
                else rest
            ).append(p)
    adamw = torch.optim.AdamW(rest, lr, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(hidden, lr), adamw] if hidden else [adamw]


def update(optimisers, loss, step: int, steps: int, peak: float) -> None:
    """Backward pass and one step, at the rate of a cosine from `peak` to 2 % with 5 % linear
    warm-up.
    """
    warm = max(1, steps // 20)
    turn = math.pi * max(0, step - warm) / max(1, steps - warm)
    rate = peak * min((step + 1) / warm, 0.02 + 0.98 * 0.5 * (1 + math.cos(turn)))
    loss.backward()
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = rate
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
