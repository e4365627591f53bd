"""Scores: how much each neuron stands for a category, from what it writes and what its loss costs.

M neurons: the unit "neurons" of the counts (dense MLPs, in a sparse model the routed experts'),
flattened. h is what the down projection reads (see interventions.py). Of a routed expert it is
computed a second time from the bank's own input and weights, so nothing here depends on how the
experts are implemented, or changes it.
"""

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from ..analysis.sets import (
    category_means,
    category_sets,
    contrast,
    frequency,
    lape,
    margin,
    set_size,
)
from ..bars import bar
from ..capture.bank import expert_rows, neuron_outputs, normed
from ..capture.budget import reading
from ..capture.count import refuse_long, refuse_nothing
from ..capture.interventions import Reference, columns, editable, refuse_seed
from ..capture.losses import sequence_losses
from ..capture.sites import find_sites, input_device
from ..capture.tokens import Encoded, encode, refuse_size, refuse_unknown, token_batches
from ..config import SCORES
from ..record import UserError
from .reading import same_beginning

SEES_REFERENCE = ("attribution", "contribution-response")
REMEMBERED = 2**28  # bytes of scores of rows that are kept in memory rather than read again


@dataclass(frozen=True)
class Standing:
    """What one half says of a pair's neurons.

    scores     {score: float [C, M]}, higher is chosen first
    rate       [C, M], mean activation frequency in the category
    magnitude  [M], contribution to the residual stream, mean over all instructions
    """

    scores: dict[str, np.ndarray]
    rate: np.ndarray
    magnitude: np.ndarray


def standing(study, scores, variant: str = "tuned") -> Standing:
    """Score a pair's neurons on a study's rows: those of the half to choose on.

    frequency: the category's mean p. lape, contrast: see analysis.sets. contribution: own mean
    minus the largest other's, at the prompt or (contribution-response) at the reference's tokens.
    attribution: the category's mean. Those in SEES_REFERENCE have read the references of the
    choosing half, the others its instructions only. The study remembers each. (Ours.)
    """
    if unknown := set(scores) - set(SCORES):
        raise UserError(
            f"scores: {sorted(unknown)} unknown, expected some of {SCORES}. Correct the profile."
        )
    labels = study.labels
    of_rows = {
        "frequency": lambda: active(study, variant),
        "attribution": lambda: blamed(study, variant),
        "contribution": lambda: written(study, "prompt", variant),
        "contribution-response": lambda: written(study, "response", variant),
    }

    def mean(score):
        key = (variant, "mean", score)
        return study.once(key, lambda: category_means(of_rows[score](), labels))

    made = {
        "frequency": lambda: mean("frequency"),
        "lape": lambda: lape(mean("frequency")),
        "contrast": lambda: contrast(active(study, variant), labels),
        "attribution": lambda: mean("attribution"),
        "contribution": lambda: margin(mean("contribution")),
        "contribution-response": lambda: margin(mean("contribution-response")),
    }
    found = {score: study.once((variant, score), made[score]) for score in scores}
    return Standing(found, mean("frequency"), mean("contribution").mean(0))


def active(study, variant: str = "tuned") -> np.ndarray:
    """Activation frequency of a pair's neurons in each row's prompt, float32 [I, M]."""
    counts = study.counts(variant)
    return frequency(counts.unit("neurons"), counts.tokens).reshape(len(study.rows), -1)


def written(study, positions: str = "prompt", variant: str = "tuned") -> np.ndarray:
    """`contribution` of a pair's neurons to each row, float32 [I, M], at positions by name;
    remembered, if it is no more than REMEMBERED.
    """

    def read():
        encoded, model = study.encoded(positions, variant), study.model(variant)[0]
        return _neurons_of(contribution(model, encoded, study.profile.batch_tokens))

    width = study.counts(variant).unit("neurons")[0].size
    small = 4 * len(study.rows) * width <= REMEMBERED
    return study.once(("written", variant, positions), read) if small else read()


def blamed(study, variant: str = "tuned") -> np.ndarray:
    """`attribution` of a pair's neurons to each row's loss, over all positions, float32 [I, M]."""
    references, every = (study.encoded(at, variant) for at in ("reference", "all"))
    model = study.model(variant)[0]
    return _neurons_of(attribution(model, references, every, study.profile.batch_tokens))


def sets_of(standing, score, size, seed=0) -> np.ndarray:
    """The share `size` of the neurons that the score ranks first for each category: bool [C, M],
    equal sizes.
    """
    scores = standing.scores[score]
    return category_sets(scores, set_size(scores.shape[1], size), seed)


def _neurons_of(found):
    own = found["expert" if "expert" in found else "dense"]  # the unit "neurons" of the counts
    return own.reshape(len(own), -1)


def contribution(model, encoded: list[Encoded], batch_tokens: int = 8192) -> dict[str, np.ndarray]:
    """|h| times the norm of the neuron's down column, mean over the counted positions: how much it
    writes to the residual stream.

    {"dense" | "shared": float32 [I, L_f, N], "expert": [I, L_f, E, N]}. For a routed expert, h
    carries the router's weight and is 0 for tokens that go elsewhere (the mean is over all
    positions, as in the counts); the gate that some models put on a shared expert's whole output
    is left out. At a reference's positions the score has *seen the reference*. (Ours.)
    """
    sites = _readable(model)
    place, out = _empty(sites, len(encoded))
    norms = {site.name: columns(site).float().norm(dim=-1) for site in sites}  # [N] or [E, N]
    with torch.no_grad():
        for batch in _batches(encoded, batch_tokens, "contribution"):
            mask, where = batch.count_mask.to(input_device(model)), np.array(batch.rows)

            def add(site, seen, mask=mask, where=where):
                for e, row, weight, h, _ in _neurons(site, mask, seen):
                    total = h.new_zeros(len(where), site.width, dtype=torch.float32)  # [B, N]
                    total.index_add_(0, row, h.float().abs() * weight)
                    mean = total * norms[site.name][e] / mask.sum(1, keepdim=True).to(total)
                    out[site.family][(where, place[site.name], *e)] = mean.cpu().numpy()

            with _watch(sites, add):
                _read(model, batch)
    return out


def attribution(
    model, references: list[Encoded], marked: list[Encoded], batch_tokens: int = 8192
) -> dict[str, np.ndarray]:
    """Minus h times the gradient of the reference's NLL with respect to h, summed over positions;
    shapes as above.

    The first-order estimate of how much a row's NLL (nats per token that counts in `references`)
    rises if the neuron is zeroed at the positions that count in `marked`, which is the same text
    or the beginning of it; negative: the neuron stands in the way. It always sees the reference.
    (Gradient x activation; ours.)
    """
    sites = _readable(model)
    same_beginning(marked, references)
    place, out = _empty(sites, len(references))
    for batch in _batches(references, batch_tokens, "attribution"):
        mask = torch.zeros_like(batch.input_ids, device=input_device(model))
        for b, row in enumerate(batch.rows):
            counted = marked[row].counted
            mask[b, : len(counted)] = torch.tensor(counted).to(mask)
        kept, where = {}, np.array(batch.rows)
        grads = _gradients(model, sites, batch, kept)
        with torch.no_grad():
            for (site, seen), grad in zip(kept.items(), grads, strict=True):
                grad = grad.reshape(-1, grad.shape[-1])  # [B*T, N or D]
                for e, row, weight, h, token in _neurons(site, mask, seen):
                    slope = weight * grad[token] @ columns(site)[e].T if e else grad[token]
                    total = h.new_zeros(len(where), site.width, dtype=torch.float32)  # [B, N]
                    total.index_add_(0, row, (h * slope).float())
                    out[site.family][(where, place[site.name], *e)] = -total.cpu().numpy()
    return out


def _batches(encoded, batch_tokens, label):
    with bar(None, label, total=len(encoded), delay=5, unit=" instructions") as moved:
        for batch in token_batches(encoded, batch_tokens):
            yield batch
            moved.update(len(batch.rows))


def _gradients(model, sites, batch, kept):
    """Gradients of the summed loss at what the sites saw last, as `kept` {site: seen} is filled."""
    leaf = model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: out.detach().requires_grad_()
    )
    try:
        with torch.enable_grad(), _watch(sites, lambda site, seen: kept.update({site: seen})):
            loss = sequence_losses(model, batch, "scores").sum()
    finally:
        leaf.remove()
    return torch.autograd.grad(loss, [seen[-1] for seen in kept.values()])


def _read(model, batch):
    device = input_device(model)
    with reading(model, batch.input_ids, batch.attention_mask, "scores"):
        model.base_model(
            input_ids=batch.input_ids.to(device),
            attention_mask=batch.attention_mask.to(device),
            use_cache=False,
        )


def reference_activations(
    model, tokenizer, texts, batch_tokens: int = 8192, draws: int = 64, seed: int = 0
) -> Reference:
    """Mean of h over all tokens of reference texts (BOS left out), and `draws` single positions to
    resample from.

    Streaming: sums in float64, and a uniform sample without replacement of the positions (for an
    expert, of those routed to it). An expert that no reference token reaches has mean 0. Kept on
    the CPU as float32. Raises UserError for what is no list of texts, or an empty one. (Ours.)
    """
    refuse_size(draws, "draws")
    refuse_seed(seed)
    encoded = encode(tokenizer, texts)
    refuse_nothing(encoded)
    refuse_long(model, encoded)
    refuse_unknown(model, encoded)
    sites, random = _readable(model), torch.Generator().manual_seed(int(seed))
    keys = [
        (site.name, e)
        for site in sites
        for e in (range(site.experts) if site.family == "expert" else [None])
    ]
    widths = {site.name: site.width for site in sites}
    total = {key: torch.zeros(widths[key[0]], dtype=torch.float64) for key in keys}
    count, bank = (
        dict.fromkeys(keys, 0),
        {key: (torch.zeros(0), torch.zeros(0, widths[key[0]])) for key in keys},
    )

    def add(site, seen):
        for e, _, _, h, _ in _neurons(site, mask, seen):
            key, h = (site.name, *(e or (None,))), h.float().cpu()
            total[key] += h.sum(0, dtype=torch.float64)
            count[key] += len(h)
            known, kept = bank[key]
            tickets = torch.cat([known, torch.rand(len(h), generator=random)])
            best = tickets.topk(min(draws, len(tickets))).indices
            new = best >= len(known)  # few of the many positions of a batch
            rows = h.new_empty(len(best), h.shape[1])
            rows[new], rows[~new] = h[best[new] - len(known)], kept[best[~new]]
            bank[key] = tickets[best], rows

    with torch.no_grad(), _watch(sites, add):
        for batch in _batches(encoded, batch_tokens, "reference texts"):
            mask = batch.count_mask.to(input_device(model))
            _read(model, batch)

    def gather(site, value):
        parts = [value(key) for key in keys if key[0] == site.name]
        return torch.stack(parts) if site.family == "expert" else parts[0]

    mean = {s.name: gather(s, lambda k: (total[k] / max(count[k], 1)).float()) for s in sites}
    padded = {
        s.name: gather(s, lambda k: F.pad(bank[k][1], (0, 0, 0, draws - len(bank[k][1]))))
        for s in sites
    }
    return Reference(
        mean, padded, {s.name: gather(s, lambda k: torch.tensor(len(bank[k][1]))) for s in sites}
    )


def read_outputs(model, encoded: list[Encoded], tell, batch_tokens: int = 8192) -> None:
    """Read sequences, and tell of every neuron's output h (what the down projection reads) at the
    counted positions: tell(family, place, row [n], token [n], h [n, N]).

    place: the layer's place in its family and, of a routed expert, its number; row and token say
    which sequence, and which of its tokens, each line of h belongs to. (Ours.)
    """
    sites = _readable(model)
    place, _ = _empty(sites, 0)
    with torch.no_grad():
        for batch in _batches(encoded, batch_tokens, "outputs"):
            mask, where = batch.count_mask.to(input_device(model)), np.array(batch.rows)

            def told(site, seen, mask=mask, where=where):
                for e, row, weight, h, token in _neurons(site, mask, seen):
                    at = (token % mask.shape[1]).cpu().numpy()
                    key, who = (place[site.name], *e), where[row.cpu().numpy()]
                    tell(site.family, key, who, at, h.float().cpu().numpy())
                    if e:
                        tell("experts", key, who, at, weight.float().cpu().numpy())

            with _watch(sites, told):
                _read(model, batch)


def _readable(model):
    sites = find_sites(model)
    for site in sites:
        bank = site.module if site.family == "expert" else None
        if not editable(site) or bank is not None and (not bank.has_gate or normed(bank)):
            raise UserError(
                f"{site.name}: its neurons' outputs cannot be read here: weights offloaded, "
                "quantised or sharded, or experts without a gate or with their own norm. Load it "
                "whole and unquantised."
            )
    return sites


def _empty(sites, size):
    """{site name: its place among the family's layers}, {family: zeros [I, L_f, (E,) N]}."""
    place, count, shape = {}, {}, {}
    for site in sites:
        place[site.name] = count.setdefault(site.family, 0)
        count[site.family] += 1
        shape[site.family] = (
            (site.experts, site.width) if site.family == "expert" else (site.width,)
        )
    return place, {f: np.zeros((size, count[f], *shape[f]), np.float32) for f in count}


@contextmanager
def _watch(sites, tell):
    """tell(site, (h,)) for every MLP that runs, tell(site, (inputs, index, weights, output)) for
    every expert bank.
    """
    with ExitStack() as stack:
        for site in sites:
            if site.family == "expert":

                def routed(module, args, out, site=site):
                    tell(site, (*args[:3], out))

                stack.callback(site.module.register_forward_hook(routed).remove)
            else:

                def dense(module, args, site=site):
                    tell(site, (args[0],))

                stack.callback(site.down.register_forward_pre_hook(dense).remove)
        yield


def _neurons(site, mask, seen):
    """Yield (() or (expert,), row [n], router weight [n, 1] or 1, h [n, N], token [n]) of the
    tokens in mask [B, T].
    """
    length, flat = mask.shape[1], mask.reshape(-1).bool().to(seen[0].device)  # layers may differ
    if site.family != "expert":
        token = flat.nonzero()[:, 0]
        yield (), token // length, 1.0, seen[0].detach().reshape(-1, site.width)[token], token
        return
    inputs, index, weights, _ = (x.detach() for x in seen)
    bank, index = site.module, index.masked_fill(~flat[:, None], -1)  # [B*T, K]
    for e in index[index >= 0].unique().tolist():
        token, slot = expert_rows(index, e)
        h = neuron_outputs(bank, inputs[token], e).detach()
        yield (e,), token // length, weights[token, slot][:, None], h, token
