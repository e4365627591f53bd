"""A beginning that sequences share, such as a chat template's, is read once for all of them: what
follows in each goes on from its keys and values.

No more than another way to read the same: it is taken only of models that were seen to give the
same hidden states either way. All is ours, not the paper's.
"""

from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .budget import reading
from .counter import ROUNDING
from .proofs import Proofs
from .sites import input_device, returning_dicts
from .tokens import Batch, Encoded, padded, token_batches

LEAST, FEW = 16, 3  # tokens of a beginning, and sequences, that are worth a pass of its own
STRETCHED = ("dynamic", "longrope")  # position embeddings that change with the length of a pass
KEPT = (DynamicLayer, DynamicSlidingWindowLayer)  # layers that keep keys and values, nothing else
_proven = Proofs()  # model -> whether a beginning may be read apart
_whole: WeakKeyDictionary = WeakKeyDictionary()  # model -> how many contexts want it to read whole


class Begun(DynamicCache):
    """Keys and values of one beginning (token ids `ids` [n]), [K, H, n, D] in each layer: read K
    times, under as many ablated sets, or once. Any number of rows and passes read behind it, and
    leave it as it is.
    """

    def __init__(self, read: DynamicCache, ids: torch.Tensor):
        super().__init__()
        self.layers, self.ids, self.sets = read.layers, ids, None
        if not all(type(layer) in KEPT for layer in self.layers):
            raise TypeError("a layer that keeps something else than keys and values")

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Keys and values [B, H, n + T, D] of the beginning and of what follows it, of each row
        under its own of `sets` [B].
        """
        layer = self.layers[layer_idx]
        both = ((layer.keys, key_states), (layer.values, value_states))
        return tuple(torch.cat([self._of_rows(kept, new), new], 2) for kept, new in both)

    def _of_rows(self, kept, new):
        if len(kept) == 1:
            return kept.expand(len(new), -1, -1, -1)
        return kept[self.sets.to(new.device)]


@dataclass(frozen=True)
class Split:
    """Sequences [I] as they are read `copies` times over, under as many ablated sets: the beginning
    that all share, a batch of a row for each copy (None: none that pays), and batches of what
    follows it in each; row i of these is sequence i % I of copy i // I.
    """

    beginning: Batch | None
    batches: list[Batch]
    copies: int = 1

    @property
    def rows(self) -> int:
        """How many there are, copies included."""
        return sum(len(batch.rows) for batch in self.batches)

    @property
    def tokens(self) -> int:
        """How many tokens are read, padding included."""
        read = [self.beginning] if self.beginning is not None else []
        return sum(batch.input_ids.numel() for batch in (*read, *self.batches))

    def sets(self, batch: Batch) -> torch.Tensor:
        """Which copy each row of a batch belongs to, long [B]."""
        size = 1 if batch is self.beginning else self.rows // self.copies
        return torch.tensor(batch.rows, dtype=torch.long, device="cpu") // size


def split(
    model, encoded: list[Encoded], batch_tokens: int = 8192, apart: bool = True, copies: int = 1
) -> Split:
    """How a model reads these sequences, `copies` times over; whole if `apart` is False."""
    size = shared(encoded) if apart and len(encoded) >= FEW else 0
    if size < LEAST or not reads_apart(model):
        return Split(None, list(token_batches(encoded * copies, batch_tokens)), copies)
    first = padded([_cut(encoded[0], slice(0, size))] * copies, range(copies))
    rest = [_cut(one, slice(size, None)) for one in encoded] * copies
    return Split(first, list(token_batches(rest, batch_tokens, ahead=size)), copies)


def shared(encoded: list[Encoded]) -> int:
    """How many first tokens all sequences have in common, position groups included. None of them
    counts, nor does the token behind them: what is said of a token hangs on the one before it.

    >>> shared([Encoded((1, 2, 3, 4), (False, False, False, True)),
    ...         Encoded((1, 2, 9, 4), (False, False, False, True))])
    2
    """
    one = encoded[0]
    size = min((*e.counted, True).index(True) for e in encoded) - 1
    for other in encoded[1:]:
        if tuple(other.groups) != tuple(one.groups):
            return 0
        pairs = [(one.ids, other.ids)]
        pairs += [(mask, other.groups[name]) for name, mask in one.groups.items()]
        for a, b in pairs:
            size = next((i for i in range(size) if a[i] != b[i]), size)
    return max(size, 0)


def _cut(one: Encoded, at: slice) -> Encoded:
    groups = {name: mask[at] for name, mask in one.groups.items()}
    return Encoded(one.ids[at], one.counted[at], groups)


def begin(model, beginning: Batch, purpose: str = "losses") -> Begun:
    """Read a beginning, for `behind`."""
    ids, mask = beginning.input_ids, beginning.attention_mask
    with returning_dicts(model), reading(model, ids, mask, purpose):
        return _begun(model, ids, mask)


def behind(model, ids, mask, begun: Begun | None = None) -> torch.Tensor:
    """The trunk's last hidden state [B, T, D] of ids [B, T], padded on the right, of which mask is
    1 where there is no padding; read behind a beginning, if there is one.
    """
    if begun is None:
        return _trunk(model, ids, mask, use_cache=False).last_hidden_state
    seen = torch.cat([mask.new_ones(len(mask), len(begun.ids)), mask], 1)
    found = _trunk(model, ids, seen, use_cache=True, past_key_values=begun)
    return found.last_hidden_state


def _begun(model, ids, mask) -> Begun:
    return Begun(_trunk(model, ids, mask, use_cache=True).past_key_values, ids[0])


def _trunk(model, ids, mask, **options):
    device = input_device(model)
    return model.base_model(input_ids=ids.to(device), attention_mask=mask.to(device), **options)


@contextmanager
def whole(model, asked: bool = True):
    """While open, the model reads all sequences whole, if that is asked: under what differs from
    row to row in the beginning, too.
    """
    _whole[model] = _whole.get(model, 0) + asked
    try:
        yield
    finally:
        _whole[model] -= asked


@torch.no_grad()
def reads_apart(model) -> bool:
    """Whether the model gives the same hidden states when a beginning is read apart: tried once,
    with one beginning for two passes. A model that cannot do it reads whole, and so does one in
    training mode or under `whole`.

    That runs the model, so ask before an ablation acts at places of one batch.
    """
    if model.training or _whole.get(model):
        return False
    if model not in _proven:
        _proven[model] = not _stretched(model) and _same(model)
    return _proven[model]


def _stretched(model) -> bool:
    text = model.config.get_text_config(decoder=True)
    return any(f"'{name}'" in str(getattr(text, "rope_parameters", "")) for name in STRETCHED)


def _same(model) -> bool:
    rows = model.get_input_embeddings().num_embeddings
    ids = (torch.arange(48, device="cpu") * 7 + 5).remainder(rows).reshape(2, 24)
    ids[1, :LEAST] = ids[0, :LEAST]
    mask = torch.ones_like(ids)
    mask[1, -3:] = 0
    rest = ids[:, LEAST:], mask[:, LEAST:]
    try:
        with returning_dicts(model):
            expected = behind(model, ids, mask)[:, LEAST:]
            begun = _begun(model, ids[:1, :LEAST], mask[:1, :LEAST])
            found = [behind(model, *rest, begun) for _ in range(2)]
    except Exception:  # whatever a cache of some architecture cannot do: it is read whole
        return False
    real = rest[1].bool().to(expected.device)
    spread = expected[real].float().std(0).clamp_min(1e-12)  # of each channel: some are huge
    gaps = [((again - expected)[real].float().abs() / spread).mean(-1).max() for again in found]
    return all(bool(gap <= ROUNDING[expected.dtype]) for gap in gaps)
