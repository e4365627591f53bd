"""Counts against a brute-force loop over tokens and experts, from the weights, for every family."""

from contextlib import ExitStack

import numpy as np
import pytest
import torch
import zoo
from torch.nn import functional as F

from helpers.capture import bank, count, counter
from helpers.capture.bank import observed
from helpers.capture.count import count_activations, count_encoded, count_groups
from helpers.capture.counter import count_positive, count_routed, watching
from helpers.capture.counts import Counts, Gathered
from helpers.capture.losses import proven_head
from helpers.capture.proofs import structure
from helpers.capture.selfcheck import self_check
from helpers.capture.sites import UnreadableModel, find_sites
from helpers.capture.tokens import Encoded, token_batches
from helpers.record import UserError

FIRST = ("gate_proj", "gate_up_proj", "dense_h_to_4h", "c_fc", "fc1", "fc_in", "input_linear")
FIRST += ("up_proj",)  # where there is no gate
LENGTHS = (5, 2, 9, 3, 12, 1, 7, 4, 6, 2, 8, 3) * 3  # 36 > the largest batch


@pytest.fixture(scope="module")
def sequences():
    draw = np.random.default_rng(0)
    ids = [tuple(draw.integers(3, zoo.WORDS, n).tolist()) for n in LENGTHS]
    return [Encoded(row, tuple((draw.random(len(row)) < 0.8).tolist())) for row in ids]


def oracle(model, encoded) -> Counts:
    """Each sequence alone and unpadded; each token, each expert, one matrix-vector product from
    the weights.
    """
    sites, parts = find_sites(model), []
    for e in encoded:
        given = {}
        with ExitStack() as stack, torch.no_grad():
            for s in sites:
                kids = dict(s.module.named_children())
                first = (
                    s.module if s.family == "expert" else next(kids[n] for n in FIRST if n in kids)
                )
                stack.callback(
                    first.register_forward_pre_hook(
                        lambda m, args, s=s, given=given: given.update({s.name: (m, args)})
                    ).remove
                )
            model.base_model(input_ids=torch.tensor([e.ids]), use_cache=False)
            arrays = {s.name: looped(s, *given[s.name], e.counted) for s in sites}
        layers = {
            f: tuple(s.layer for s in sites if s.family == f) for f in ("dense", "shared", "expert")
        }
        layers = {f: n for f, n in layers.items() if n}
        stacked = {
            f: np.stack([arrays[s.name][0] for s in sites if s.family == f])[None] for f in layers
        }
        routed = [arrays[s.name][1] for s in sites if s.family == "expert"]
        parts.append(
            Counts(
                np.array([sum(e.counted)], np.int32),
                stacked,
                np.stack(routed)[None] if routed else None,
                layers,
            )
        )
    return Counts.join(parts)


def looped(site, first, args, counted):
    neurons, routed = (
        np.zeros((site.experts, site.width), np.uint16),
        np.zeros(site.experts, np.uint16),
    )
    x = args[0].reshape(len(counted), -1)  # [T, D]
    for t in np.flatnonzero(counted):
        if site.family != "expert":
            weight = first.weight.T if hasattr(first, "nf") else first.weight  # GPT-2's Conv1D
            a = F.linear(x[t], weight, first.bias)[: site.width]  # a fused gate comes first
            neurons[0] += (site.act(a) > 0).numpy()
            continue
        for e in args[1][t].tolist():
            routed[e] += 1
            h = (first.gate_up_proj[e].T if first.is_transposed else first.gate_up_proj[e]) @ x[t]
            if first.has_bias:
                h = h + first.gate_up_proj_bias[e]
            if hasattr(first, "limit"):  # GPT-OSS: interleaved, clamped
                g = h[::2].clamp(max=first.limit)
                neurons[e] += (g * torch.sigmoid(first.alpha * g) > 0).numpy()
            else:
                neurons[e] += (first.act_fn(h[: site.width]) > 0).numpy()
    return (neurons if site.family == "expert" else neurons[0]), routed


def run(model, encoded, size, side="right") -> Counts:  # of at most `size` of the longest
    gathered = Gathered(len(encoded))
    with watching(model) as counter:
        for batch in token_batches(encoded, size * max(LENGTHS), side):
            counts = counter(batch.input_ids, batch.attention_mask, batch.count_mask)
            gathered(batch.rows, {"counted": counts})
    return gathered.counts["counted"]


def differing(one: Counts, two: Counts) -> int:
    one, two = one.arrays(), two.arrays()
    assert one.keys() == two.keys()
    assert all(one[k].shape == two[k].shape and one[k].dtype == two[k].dtype for k in one)
    return sum(int((one[k] != two[k]).sum()) for k in one)


@pytest.mark.parametrize("family", zoo.ZOO)
def test_counts_equal_the_loop_for_any_batch_size_padding_and_order(family, sequences):
    model = zoo.build(family)
    expected = oracle(model, sequences)
    assert 0.1 < next(iter(expected.neurons.values())).mean() / expected.tokens.mean() < 0.8
    for size, side in ((1, "right"), (7, "right"), (32, "right"), (7, "left"), (32, "left")):
        assert differing(run(model, sequences, size, side), expected) == 0, (
            f"batches of {size}, padded {side}"
        )
    turned = expected.room(len(sequences))
    turned.put(range(len(sequences))[::-1], expected)
    assert differing(run(model, sequences[::-1], 7), turned) == 0


@pytest.mark.parametrize("family", zoo.MORE)
def test_every_other_family_that_is_listed_equals_the_loop(family, sequences):
    model = zoo.build(family)
    self_check(model)
    assert differing(run(model, sequences[:5], 5), oracle(model, sequences[:5])) == 0
    assert zoo.families()[family] in ("dense", "mixture of experts")


@pytest.mark.parametrize("family", [*zoo.ZOO, *zoo.MORE_SPARSE])
def test_every_position_group_of_one_pass_equals_a_pass_of_its_own(family, sequences):
    model, draw = zoo.build(family), np.random.default_rng(2)
    grouped = [with_groups(e, draw) for e in sequences[:8]]
    found = count_groups(model, grouped, batch_tokens=30)
    for name in NAMES:
        alone = run(model, [Encoded(e.ids, e.groups[name]) for e in grouped], 3)
        assert differing(found[name], alone) == 0


NAMES = ("all", "none", "even", "drawn", "again")  # overlapping, empty, and the same twice


def with_groups(e, draw):
    size = len(e.ids)
    drawn = tuple((draw.random(size) < 0.5).tolist())
    masks = ((True,) * size, (False,) * size, tuple(t % 2 == 0 for t in range(size)), drawn, drawn)
    return Encoded(e.ids, e.counted, dict(zip(NAMES, masks, strict=True)))


@pytest.mark.parametrize("family", zoo.ZOO)
def test_counting_leaves_no_trace(family):
    model, ids = zoo.build(family), torch.arange(3, 15).reshape(2, 6)
    before, state = model(ids).logits, model.state_dict()
    implementation = model.get_experts_implementation()

    def failing():
        with count_activations(model) as counter:
            counter(ids)
            raise ZeroDivisionError

    pytest.raises(ZeroDivisionError, failing)
    assert torch.equal(model(ids).logits, before)
    assert model.get_experts_implementation() == implementation
    assert all(torch.equal(state[k], v) for k, v in zoo.build(family).state_dict().items())
    assert not any(
        m._forward_hooks or m._forward_pre_hooks or "observer" in vars(m) for m in model.modules()
    )


@pytest.mark.parametrize("family", zoo.SPARSE)
def test_every_experts_implementation_gives_the_same_counts_and_comes_back(family, sequences):
    model, ids, found = zoo.build(family), torch.arange(3, 35).reshape(2, 16), []
    with observed(model):
        ours = model(ids).logits
    for implementation in ("eager", "grouped_mm", "batched_mm"):
        model.set_experts_implementation(implementation)
        assert torch.allclose(model(ids).logits, ours, atol=1e-4)
        found.append(count_encoded(model, sequences, 7))
        assert model.get_experts_implementation()[""] == implementation
    assert differing(found[0], found[1]) == differing(found[0], found[2]) == 0


@pytest.mark.parametrize("family", zoo.SPARSE)
def test_frequencies_of_experts_obey_their_bounds(family, sequences):
    model = zoo.build(family)
    counts = count_encoded(model, sequences, 7)
    assert (counts.neurons["expert"].max(-1) <= counts.routed).all()  # p_e <= f_e
    assert (counts.routed.sum(-1) == 2 * counts.tokens[:, None]).all()  # sum of f = K
    assert counts.tokens.tolist() == [sum(e.counted) for e in sequences]


def test_qwen2_moe_experts_are_bit_for_bit_the_eager_ones():
    model, ids = zoo.build("qwen2_moe"), torch.arange(3, 35).reshape(2, 16)
    model.set_experts_implementation("eager")
    eager = model(ids).logits
    with observed(model):
        assert torch.equal(model(ids).logits, eager)


def test_in_bf16_batching_moves_few_counts_by_one():
    draw = np.random.default_rng(1)
    encoded = [
        Encoded(tuple(draw.integers(3, zoo.WORDS, 30).tolist()), (True,) * 30) for _ in range(8)
    ]
    model = zoo.build("llama", torch.bfloat16)
    one, many = (run(model, encoded, size).neurons["dense"].astype(int) for size in (1, 8))
    assert (one != many).mean() < 0.05
    assert np.abs(one - many).max() <= 2


@pytest.mark.parametrize("groups", [1, 5])
def test_experts_counted_as_one_product_equal_a_loop(groups, monkeypatch):
    """As on a GPU, in float16: pairs in any order, masks that overlap, few cells at a time."""
    monkeypatch.setattr(counter, "_on_cpu", lambda device: False)
    draw = torch.Generator().manual_seed(groups)
    size, length, k, experts, width = 3, 7, 2, 5, 4
    a = torch.randn(size * length * k, width, generator=draw)
    rows = torch.arange(size * length).repeat_interleave(k)
    ids = torch.cat([torch.randperm(experts, generator=draw)[:k] for _ in range(size * length)])
    masks = (torch.rand(size, groups, length, generator=draw) < 0.6).float()
    expected = torch.zeros(size, groups, experts, width)
    for pair in range(len(a)):
        b, t = divmod(int(rows[pair]), length)
        for p in range(groups):
            if masks[b, p, t]:
                expected[b, p, ids[pair]] += a[pair] > 0
    mixed = torch.randperm(len(a), generator=draw)
    for cells in (2**19, 7):
        monkeypatch.setitem(counter.BLOCK, "cpu", cells)
        found = count_routed(a[mixed], ids[mixed], rows[mixed], masks, experts)
        assert found.dtype == torch.float16
        assert torch.equal(found.float(), expected)


@pytest.mark.parametrize(
    "family", ["llama", "gpt2", "qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"]
)
def test_a_gpus_way_of_counting_gives_the_same_counts(family, sequences, monkeypatch):
    model = zoo.build(family)
    expected = {size: run(model, sequences, size) for size in (7, 32)}
    draw = np.random.default_rng(1)
    grouped = [
        Encoded(
            e.ids,
            e.counted,
            {n: tuple((draw.random(len(e.ids)) < n / 6).tolist()) for n in range(6)},
        )
        for e in sequences
    ]
    alone = count_groups(model, grouped, 64)
    monkeypatch.setattr(counter, "_on_cpu", lambda device: False)
    for size, counts in expected.items():
        assert differing(run(model, sequences, size), counts) == 0
    for name, counts in count_groups(model, grouped, 64).items():
        assert differing(counts, alone[name]) == 0


def test_float16_counts_where_it_is_exact_and_nowhere_else(monkeypatch):
    """2049 ones, which float16 would round to 2048."""
    monkeypatch.setattr(counter, "_on_cpu", lambda device: False)
    for length in (2048, 2049):
        found = counter.count_masked(torch.ones(1, length, 1), torch.ones(1, 1, length))
        assert found.item() == length


def test_count_positive_is_blind_to_block_size(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    x, group = torch.randn(101, 7, generator=draw), torch.randint(0, 5, (101,), generator=draw)
    expected = torch.stack([(x[group == g] > 0).sum(0) for g in range(4)])
    for cells in (1, 50, 10**6):
        monkeypatch.setitem(counter.BLOCK, "cpu", cells)
        assert torch.equal(count_positive(x, group, 4), expected.float())


# ---- what must be refused
# -----------------------------------------------------------------------------------------

IDS = torch.arange(3, 15).reshape(2, 6)


def counting(model, ids=IDS, **masks):
    with watching(model) as counter:
        return counter(ids, **masks)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda m: m.train(), "training mode"),
        (lambda m: m.model.layers[1].mlp.train(), "training mode"),
        (torch.compile, "compiled"),
        (lambda m: (m.model.layers[0].mlp.compile(), m)[1], "compiled"),
        (lambda m: m.to("meta"), "no weights"),
        (lambda m: (setattr(m, "is_quantized", True), m)[1], "quantised"),
        (lambda m: (setattr(m, "_tp_size", 2), m)[1], "tensor parallelism"),
    ],
)
def test_a_model_that_cannot_be_counted_is_refused(break_it, message):
    model = zoo.build("llama")
    broken = break_it(model)
    with pytest.raises(UserError, match=message):
        counting(model if broken is None else broken)


def test_dynamically_quantised_layers_are_refused():
    model = zoo.build("llama")
    model.model.layers[0].mlp.act_fn = type(
        "Fake", (torch.nn.Module,), {"__module__": "torch.ao.nn.quantized"}
    )()
    with pytest.raises(UserError, match="quantised"):
        counting(model.eval())


def test_uneven_widths_are_refused():
    model = zoo.build("llama")
    model.model.layers[1].mlp = zoo.build("llama", intermediate_size=64).model.layers[1].mlp
    with pytest.raises(UserError, match="widths differ"):
        counting(model)


@pytest.mark.parametrize(
    ("ids", "masks", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, "one shape"),
        (torch.arange(3, 9), {}, "one shape"),
        (IDS, {"attention_mask": torch.ones(2, 5)}, "one shape"),
        (IDS, {"attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "all padding"),
        (
            IDS,
            {
                "attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]]),
                "count_mask": torch.ones(2, 6),
            },
            "within",
        ),
        (IDS + 90, {}, "outside its 101 embeddings"),
        (torch.full((1, 257), 5), {}, "257 tokens, more than the 256"),
    ],
)
def test_a_batch_that_cannot_be_counted_is_refused(ids, masks, message):
    with pytest.raises(UserError, match=message):
        counting(zoo.build("llama"), ids, **masks)


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_nan_activations_are_refused(family):
    model = zoo.build(family)
    with torch.no_grad():
        find_sites(model)[0].module.down_proj.weight[:] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        counting(model)


def test_padding_may_hold_nan_and_any_token():
    model = zoo.build("llama")
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    one, two = IDS.clone(), IDS.clone()
    two[1, 4:] = 2  # the end-of-sequence id: only the mask says what is padding
    assert (
        differing(
            counting(model, one, attention_mask=mask), counting(model, two, attention_mask=mask)
        )
        == 0
    )


def test_a_pass_without_masks_inside_the_context_is_refused():
    model = zoo.build("llama")
    with pytest.raises(UserError, match=r"instead of model\(...\)"), watching(model):
        model(IDS)
    with pytest.raises(UserError, match="nothing was counted"), watching(model):
        pass
    with watching(model) as counter:
        counter(IDS)
        with pytest.raises(UserError, match=r"counted already|instead of"):
            counting(model)


def test_two_counters_on_one_sparse_model_are_refused():
    model = zoo.build("mixtral")
    with watching(model) as counter:
        counter(IDS)
        with pytest.raises(UserError, match="being counted already"):
            counting(model)


def test_an_mlp_that_does_not_call_its_activation_is_noticed():
    model = zoo.build("llama")
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(
        F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    )  # as a fused kernel would
    with pytest.raises(RuntimeError, match=r"layers\.1\.mlp saw 0 tokens"):
        counting(model)


def test_rows_that_never_reach_the_experts_are_noticed(monkeypatch):
    model = zoo.build("mixtral")
    bank = model.model.layers[0].mlp.experts
    whole = type(bank).forward
    monkeypatch.setattr(
        bank, "forward", lambda h, i, w: whole(bank, h[:-1], i[:-1], w[:-1]).new_zeros(h.shape)
    )
    with pytest.raises(RuntimeError, match="saw 11 tokens where the model read 12"):
        counting(model)


def test_a_forward_that_failed_does_not_spoil_the_next():
    model = zoo.build("llama")
    with watching(model) as counter:
        hook = model.model.layers[1].register_forward_pre_hook(lambda m, args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            counter(IDS)
        hook.remove()
        assert differing(counter(IDS), counting(zoo.build("llama"))) == 0


# ---- the start-up self-check
# ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", zoo.ZOO)
def test_the_self_check_passes_every_family(family, dtype):
    self_check(zoo.build(family, dtype))


def swapped(model):
    """Gate and up exchanged in the experts' forward pass: the counted half would be wrong."""
    bank = model.model.layers[0].mlp.experts
    bank._apply_gate = lambda h: bank.act_fn(h.chunk(2, -1)[1]) * h.chunk(2, -1)[0]


def normed(model):
    """A norm between activation and down projection: neurons no longer stand for its inputs one by
    one.
    """
    mlp = model.model.layers[1].mlp
    mlp.forward = lambda x: mlp.down_proj(
        F.layer_norm(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x), (zoo.N,))
    )


def ungated(model):
    """Experts whose gate gates nothing."""
    model.model.layers[0].mlp.experts._apply_gate = lambda h: h.chunk(2, -1)[0] * 0.5


@pytest.mark.parametrize(
    ("family", "spoil", "message"),
    [
        ("mixtral", swapped, "its gate is not the part"),
        ("llama", normed, "does not silence it alone"),
        ("mixtral", ungated, "its gate is not the part"),
    ],
)
def test_the_self_check_refuses_what_is_computed_in_another_way(family, spoil, message):
    model = zoo.build(family)
    spoil(model)
    with pytest.raises(UnreadableModel, match=message), count_activations(model):
        pass


@pytest.mark.parametrize(("family", "spoil"), [("mixtral", swapped), ("llama", normed)])
def test_a_model_that_is_built_otherwise_after_its_first_count_is_proven_again(
    family, spoil, monkeypatch
):
    model, tried = zoo.build(family), []
    own = count.self_check
    monkeypatch.setattr(count, "self_check", lambda model: tried.append(1) or own(model))
    for _ in range(2):
        count_encoded(model, [Encoded((5, 6, 7), (True,) * 3)])
    assert len(tried) == 1
    spoil(model)
    with pytest.raises(UnreadableModel), count_activations(model):
        pass


@pytest.mark.parametrize("family", ["llama", "qwen2_moe", "gpt_oss"])
def test_a_model_that_is_being_counted_is_built_as_before(family):
    """Else what was proven would be proven again under the hooks of the count."""
    model = zoo.build(family)
    before = structure(model)
    with count_activations(model) as counter:
        assert structure(model) == before
        ids = torch.ones(1, 3, dtype=torch.long)
        counter(ids, torch.ones_like(ids), torch.ones_like(ids))
    assert structure(model) == before


def test_what_was_proven_of_a_head_is_proven_again_when_it_is_another():
    model = zoo.build("llama")
    assert proven_head(model) == (1.0, 0.0)
    model.forward = lambda *a, **k: twice(type(model).forward(model, *a, **k))
    assert proven_head(model) == (pytest.approx(2.0), 0.0)
    del model.forward
    assert proven_head(model) == (1.0, 0.0)


def twice(found):
    found.logits = found.logits * 2
    return found


def test_the_self_check_compares_with_the_models_own_experts(monkeypatch):
    model = zoo.build("mixtral")
    read = bank.activated
    monkeypatch.setattr(  # counts the other half
        "helpers.capture.bank.activated", lambda b, h: (h.chunk(2, -1)[1], read(b, h)[1])
    )
    with pytest.raises(UnreadableModel, match="not those of a loop"):
        self_check(model)
    monkeypatch.undo()
    model.set_experts_implementation("eager")
    experts = model.model.layers[1].mlp.experts
    own = experts.forward

    def scaled(*args):
        return own(*args) * (1.01 if experts.config._experts_implementation == "eager" else 1)

    monkeypatch.setattr(experts, "forward", scaled)
    with pytest.raises(UnreadableModel, match="the model's own differ"):
        self_check(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_counts_what_a_processor_counts(sequences):
    """Every family in float32, after its own proof there. A gate within rounding of zero may fall
    to the other side: at most one cell of a family in ten thousand.
    """
    found, cells = {}, {}
    for family in zoo.families():
        model = zoo.build(family)
        here = count_encoded(model, sequences)
        self_check(model.cuda())
        found[family] = differing(here, count_encoded(model, sequences))
        cells[family] = sum(values.size for values in here.arrays().values())
    print(f"{len(cells)} families, {sum(cells.values())} cells, differing: {sum(found.values())}")
    assert not {name: n for name, n in found.items() if n > cells[name] / 10_000}


@pytest.mark.parametrize("length", [301, 2500])
def test_counts_are_exact_inside_autocast(length):
    x, masks = torch.ones(1, length, 3), torch.ones(1, 2, length)
    nobody = torch.zeros(length, dtype=torch.long)
    with torch.autocast("cpu", torch.bfloat16):
        found = counter.count_masked(x, masks)
        one = count_routed(x[0], nobody, torch.arange(length), masks, 1)
        alone = count_positive(x[0], nobody, 1)
    assert {*found.flatten().tolist(), *one.flatten().tolist(), *alone.flatten().tolist()} == {
        float(length)
    }


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_a_model_is_not_counted_inside_autocast(family, sequences):
    model = zoo.build(family)
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(UserError, match="leave the autocast block"),
    ):
        count_encoded(model, sequences)
    with count_activations(model) as counting:
        counting(IDS)
        with (
            torch.autocast("cpu", torch.bfloat16),
            pytest.raises(UserError, match="leave the autocast block"),
        ):
            counting(IDS)
