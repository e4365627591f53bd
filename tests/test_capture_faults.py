"""Models and texts from outside: what is refused in one line, and what is counted right where the
obvious way counts wrong.
"""

import copy

import numpy as np
import pytest
import torch
import zoo
from peft import LoraConfig, get_peft_model
from test_counter import IDS, counting, differing, oracle, run
from test_interventions import IDS as READ
from test_interventions import SEEN, expert_mask, hooks, logits, neuron_mask
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    XLMRobertaTokenizer,
)

from helpers.capture.count import count, count_encoded, count_groups
from helpers.capture.counter import count_masked, count_positive, ready_sites
from helpers.capture.interventions import ablate, editable, neuron_weights, transplant
from helpers.capture.losses import GroupLoss, sequence_losses, token_losses
from helpers.capture.selfcheck import left_padding_is_neutral, self_check
from helpers.capture.sites import UnreadableModel, find_sites
from helpers.capture.tokens import (
    Encoded,
    chat_template,
    encode,
    encode_groups,
    token_batches,
)
from helpers.record import UserError
from helpers.study.answers import continuations
from helpers.study.evaluate import nll, plain_text_nll
from helpers.study.scores import contribution, reference_activations

# ---- an MLP that no site reads


class Plain(nn.Module):
    """A gated MLP whose activation is a function, under any names."""

    def __init__(self, names, width=40):
        super().__init__()
        self.names = names
        for name, shape in zip(names, [(zoo.D, width)] * 2 + [(width, zoo.D)], strict=True):
            self.add_module(name, nn.Linear(*shape, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(F.silu(gate(x)) * up(x))


@pytest.mark.parametrize("names", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
@pytest.mark.parametrize("width", [40, zoo.D])
def test_an_mlp_beside_a_bank_that_is_no_site_is_refused(names, width):
    model = zoo.build("dots1")
    model.model.layers[1].mlp.shared_experts = Plain(names, width).eval()
    with pytest.raises(UnreadableModel, match=r"no activation module in .*layers\.1\.mlp\.shared"):
        find_sites(model)


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_mlp_beside_another_one_that_is_no_site_is_refused(family):
    model = zoo.build(family)
    model.model.layers[2].extra = Plain(("gate_proj", "up_proj", "down_proj")).eval()
    with pytest.raises(UnreadableModel, match=r"no activation module in model\.layers\.2\.extra"):
        find_sites(model)
    model = zoo.build(family)
    model.model.layers[2].mlp_extra = nn.Sequential(
        nn.Linear(zoo.D, 9), nn.ReLU(), nn.Linear(9, zoo.D)
    ).eval()
    with pytest.raises(UnreadableModel, match=r"model\.layers\.2\.mlp_extra"):
        find_sites(model)


def test_a_family_whose_shared_mlp_has_no_activation_module_is_refused():
    config = dict(zoo.COMMON, num_local_experts=6, num_experts_per_tok=2)
    zoo_like = zoo.AutoConfig.for_model("minimax_m3_vl_text", **config)
    with torch.device("meta"):
        model = zoo.AutoModelForCausalLM.from_config(zoo_like)
    with pytest.raises(UnreadableModel, match="shared_experts"):
        find_sites(model)


def test_an_mlp_that_holds_experts_of_its_own_is_refused():
    config = dict(zoo.COMMON, is_moe=True, num_experts=16, num_experts_per_tok=2)
    model = zoo.AutoModelForCausalLM.from_config(zoo.AutoConfig.for_model("doge", **config)).eval()
    with pytest.raises(UnreadableModel, match="not read exactly"):
        count(model, zoo.tokenizer(), ["add"])


# ---- one definition of active


@pytest.mark.parametrize("act", ["sigmoid", "silu", "relu", "gelu", "tanh"])
def test_experts_are_active_where_their_activation_is_positive_as_mlps_are(act):
    model = zoo.build("qwen2_moe", hidden_act=act)
    encoded = [Encoded(tuple(range(3, 12)), (True,) * 9)]
    found = run(model, encoded, 1)
    assert differing(found, oracle(model, encoded)) == 0
    if act == "sigmoid":  # always positive: p = f, whatever the gate's sign
        assert (found.neurons["expert"] == found.routed[..., None]).all()
        assert (found.neurons["shared"] == 9).all()


def test_an_underflown_activation_is_not_active():
    model = zoo.build("mixtral", hidden_act="sigmoid")
    with torch.no_grad():
        for site in find_sites(model):
            neuron_weights(site)["gate"].mul_(1e4)
    encoded = [Encoded(tuple(range(3, 12)), (True,) * 9)]
    found = run(model, encoded, 1)
    assert 0 < found.neurons["expert"].sum() < found.routed.sum() * zoo.N
    assert differing(found, oracle(model, encoded)) == 0


# ---- whatever the default dtype, device and return type are


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float64])
def other_default(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def test_counts_do_not_depend_on_the_default_dtype(other_default):
    x, zeros = torch.ones(301, 1, dtype=torch.float32), torch.zeros(301, dtype=torch.long)
    assert count_positive(x, zeros, 1).tolist() == [[301]]
    assert count_masked(x[None], torch.ones(1, 1, 301, dtype=torch.long)).tolist() == [[[301]]]


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_long_counts_do_not_depend_on_the_default_dtype(family, other_default):
    torch.set_default_dtype(torch.float32)
    model = zoo.build(family, max_position_embeddings=400)
    encoded = [Encoded((5, 7) * 190, (True,) * 380)]
    expected = run(model, encoded, 1)
    torch.set_default_dtype(other_default)
    assert differing(run(model, encoded, 1), expected) == 0


def test_counts_do_not_depend_on_the_default_device():
    model = zoo.build("qwen2_moe")
    encoded = [Encoded(tuple(range(3, 3 + n)), (True,) * n) for n in (4, 9)]
    expected = run(model, encoded, 2)
    with torch.device("meta"):
        made = [next(token_batches(encoded, 20)), next(token_batches(encoded, 99))]
        assert all(b.input_ids.device.type == b.count_mask.device.type == "cpu" for b in made)
        mask = neuron_mask(model)
    torch.set_default_device("cpu")
    assert differing(run(model, encoded, 2), expected) == 0
    assert set(mask) == {"dense", "shared", "expert"}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "qwen2_moe", "bart"])
def test_a_model_that_returns_tuples_is_counted(family):
    model = zoo.build(family)
    expected = counting(model)
    model.config.return_dict = False
    self_check(model)
    assert differing(counting(model), expected) == 0


# ---- wrappers and weights that are not what runs


@pytest.mark.parametrize(
    ("wrap", "told"),
    [
        (nn.DataParallel, r"DataParallel .* pass model\.module"),
        (
            lambda m: get_peft_model(m, LoraConfig(target_modules=["q_proj"])),
            r"PeftModel .*merge_and_unload\(\)",
        ),
        (lambda m: nn.Linear(2, 2), "not a transformers causal language model"),
    ],
)
def test_a_wrapped_model_is_refused_in_one_line(wrap, told):
    model = wrap(zoo.build("llama")).eval()
    for use in (
        lambda: counting(model),
        lambda: find_sites(model),
        lambda: count(model, zoo.tokenizer(), ["add"]),
        lambda: ablate(model, {"dense": np.ones((3, zoo.N), bool)}, "zero").__enter__(),
    ):
        with pytest.raises(UserError, match=told):
            use()


def test_a_model_inside_a_peft_wrapper_is_counted_with_its_adapters():
    model = adapted(zoo.build("llama"))
    encoded = [Encoded(tuple(range(3, 12)), (True,) * 9)]
    merged = copy.deepcopy(model).merge_and_unload()
    inside = model.get_base_model()
    assert differing(run(inside, encoded, 1), run(merged, encoded, 1)) == 0


def adapted(model, target="down_proj"):
    model = get_peft_model(model, LoraConfig(target_modules=[target], r=4)).eval()
    draw = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = torch.randn(p.shape, generator=draw) * 0.3
    return model


def test_quantised_layers_and_packed_weights_are_refused():
    model = zoo.build("llama")
    packed = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    for use in (counting, lambda m: count(m, zoo.tokenizer(), ["add"])):
        with pytest.raises(UserError, match="quantised"):
            use(packed)

    class Packed(torch.Tensor):
        """A weight in a form of its own, as torchao's are."""

    weight = model.model.layers[1].mlp.down_proj.weight
    model.model.layers[1].mlp.down_proj.weight = nn.Parameter(weight.data.as_subclass(Packed))
    with pytest.raises(UserError, match="quantised"):
        ready_sites(model)
    assert not editable(find_sites(model)[1])


def low_rank(model):
    return adapted(model).get_base_model()


def normed(model, name="down_proj"):
    parametrizations.weight_norm(getattr(model.model.layers[1].mlp, name))
    return model


def normed_by_a_hook(model, name="down_proj"):
    weight_norm(getattr(model.model.layers[1].mlp, name))
    return model


def wrapped(model):
    down = model.model.layers[1].mlp.down_proj
    own = down.forward
    down.forward = lambda x: own(x) + F.linear(x, torch.full((zoo.D, zoo.N), 0.1))
    return model


def one_layer(model):
    model.model.layers[2].mlp.down_proj = model.model.layers[1].mlp.down_proj
    return model


def one_weight(model):
    model.model.layers[2].mlp.down_proj.weight = model.model.layers[1].mlp.down_proj.weight
    return model


def one_memory(model):
    model.model.layers[2].mlp.down_proj.weight.data = model.model.layers[
        1
    ].mlp.down_proj.weight.data
    return model


class Adapted(nn.Linear):
    """A linear layer with a part beside its weight, as loralib makes them."""

    def forward(self, x):
        return super().forward(x) + 0.3 * x[..., : zoo.D]


def other_kind(model):
    mlp = model.model.layers[1].mlp
    weight, mlp.down_proj = mlp.down_proj.weight, Adapted(zoo.N, zoo.D, bias=False)
    mlp.down_proj.weight = weight
    return model.eval()


@pytest.mark.parametrize(
    "change",
    [
        low_rank,
        normed,
        normed_by_a_hook,
        wrapped,
        one_layer,
        one_weight,
        one_memory,
        other_kind,
    ],
)
def test_zero_acts_on_what_runs_not_on_a_weight_that_does_not(change):
    model = change(zoo.build("llama"))
    mask = {"dense": np.zeros((3, zoo.N), bool)}
    mask["dense"][1, ::3] = True
    before, state = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    silent = copy.deepcopy(model)
    mlp = silent.model.layers[1].mlp
    gone = torch.from_numpy(mask["dense"][1])
    mlp.gate_proj.weight.data[gone] = mlp.up_proj.weight.data[gone] = 0  # h = 0, whatever reads it
    wanted = logits(silent)
    assert not torch.equal(before, wanted)
    for how in ("auto", "hook"):
        with ablate(model, mask, "zero", how=how):
            torch.testing.assert_close(logits(model), wanted, atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="cannot act"), ablate(model, mask, "zero", how="weights"):
        pass
    with pytest.raises(UserError, match="computed or wrapped|shares weights"):
        next(iter([transplant(model, zoo.build("llama"), mask).__enter__()]))
    assert torch.equal(logits(model), before)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


def computed(model):
    return normed(model, "gate_proj")


def computed_by_a_hook(model):
    return normed_by_a_hook(model, "gate_proj")


def up_adapted(model):
    return adapted(model, "up_proj").get_base_model()


def up_wrapped(model):
    up = model.model.layers[1].mlp.up_proj
    own = up.forward
    up.forward = lambda x: own(x) * 2
    return model


class Doubled(nn.Linear):
    """A linear layer that gives twice what its weight does."""

    def forward(self, x):
        return 2 * super().forward(x)


def up_of_another_kind(model):
    model.model.layers[1].mlp.up_proj = Doubled(zoo.D, zoo.N, bias=False)
    return model.eval()


def up_packed(model):
    mlp = model.model.layers[1].mlp
    some = nn.Sequential(mlp.up_proj)
    packed = torch.ao.quantization.quantize_dynamic(some, {nn.Linear}, dtype=torch.qint8)
    mlp.up_proj = packed[0]
    return model


@pytest.mark.parametrize(
    "change",
    [computed, computed_by_a_hook, up_adapted, up_wrapped, up_of_another_kind, up_packed],
)
def test_neurons_whose_rows_are_not_what_runs_are_not_moved(change):
    plain, changed = zoo.build("llama", seed=1), change(zoo.build("llama"))
    mask, before = neuron_mask(plain), logits(changed)
    for host, donor in ((changed, plain), (plain, changed)):
        with pytest.raises(UserError, match="computed or wrapped"), transplant(host, donor, mask):
            pass
    assert torch.equal(logits(changed), before)
    assert torch.equal(logits(plain), logits(zoo.build("llama", seed=1)))


def test_zero_leaves_what_a_norm_before_the_down_projection_makes_of_the_others():
    model = zoo.build("bitnet")
    mask = {"dense": np.zeros((3, zoo.N), bool)}
    mask["dense"][1, ::3] = True
    gone = torch.from_numpy(mask["dense"][1])
    cut, silent = copy.deepcopy(model), copy.deepcopy(model)
    cut.model.layers[1].mlp.down_proj.weight.data[:, gone] = 0
    silent.model.layers[1].mlp.gate_proj.weight.data[gone] = 0
    for how in ("weights", "hook"):
        with ablate(model, mask, "zero", how=how):
            assert torch.equal(logits(model), logits(cut))  # the norm has seen them
            assert (logits(model) - logits(silent)).abs().max() > 1e-3  # act(gate) := 0 does not


# ---- reroute wherever the bias of the choice stands


@pytest.mark.parametrize("family", zoo.MORE_SPARSE)
def test_reroute_equals_a_model_without_the_experts(family):
    model = zoo.build(family)
    draw = torch.Generator().manual_seed(9)
    for module in model.modules():  # biases that help to choose, and would choose the masked ones
        for name, t in {**module._parameters, **module._buffers}.items():
            if t is not None and ("correction_bias" in name or name == "expert_bias"):
                t.data = torch.rand(t.shape, generator=draw) + 2.0
    mask, before = expert_mask(model, [1, 4]), logits(model)
    twin = deleted(model, [1, 4])
    with ablate(model, mask, "reroute"):
        torch.testing.assert_close(logits(model), logits(twin), atol=1e-5, rtol=1e-4)
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)


def deleted(model, gone):
    """A copy without some of its six experts: everything in a sparse block that has a row or a
    number for each of them has lost these.
    """
    twin, kept = copy.deepcopy(model), [e for e in range(6) if e not in gone]
    for block in [s.block for s in find_sites(twin) if s.block is not None]:
        for module in block.modules():
            for store in (module._parameters, module._buffers):
                for name, t in store.items():
                    if t is not None and 6 in t.shape:
                        rest = t.data.index_select(t.shape.index(6), torch.tensor(kept))
                        store[name] = nn.Parameter(rest) if isinstance(t, nn.Parameter) else rest
            if getattr(module, "num_experts", 0) == 6:
                module.num_experts = len(kept)
    return twin


def test_a_choice_by_token_ids_cannot_be_rerouted_and_says_so():
    changes = dict(zoo.COMMON, num_local_experts=6, num_experts_per_tok=2)
    config = zoo.AutoConfig.for_model("deepseek_v4", **changes)
    model = zoo.AutoModelForCausalLM.from_config(config).eval()
    hashed = [s for s in find_sites(model) if s.router is not None and hasattr(s.router, "tid2eid")]
    assert hashed
    with (
        pytest.raises(UserError, match="table of token ids"),
        ablate(model, expert_mask(model, [1]), "reroute"),
    ):
        pass


def test_a_router_that_does_not_heed_its_logits_is_told_apart_from_groups():
    model = zoo.build("mixtral")
    router = model.model.layers[0].mlp.gate
    own = router.forward

    def fixed(x):
        first, weights, index = own(x)
        return first, weights, torch.ones_like(index).cumsum(-1)  # experts 1 and 2, always

    router.forward = fixed
    with (
        pytest.raises(UserError, match="does not choose by its logits alone"),
        ablate(model, expert_mask(model, [1]), "reroute"),
    ):
        model(input_ids=READ, attention_mask=SEEN)


# ---- texts


@pytest.mark.parametrize("texts", ["add12", b"add12", {"a": 1}, None, 7, {"a", "b"}])
def test_what_is_no_list_of_texts_is_refused(texts):
    with pytest.raises(UserError, match="expected a list"):
        count(zoo.build("llama"), zoo.tokenizer(), texts)
    with pytest.raises(UserError, match="expected a list"):
        encode(zoo.tokenizer(), ["a"], responses=texts if texts is not None else 7)


@pytest.mark.parametrize(
    ("texts", "options", "told"),
    [
        ([], {}, "list of texts is empty"),
        (["a", b"b"], {}, "text 1 is b'b'"),
        ([["a"]], {}, "text 0"),
        (["ok", "a\ud83d"], {}, "text 1 holds half of a character"),
        (["ok"], {"responses": ["a\udc00"]}, "response 0 holds half"),
        (["ok"], {"responses": ["a", "b"]}, "1 texts and 2 responses"),
        (["ok"], {"responses": [[1.5]]}, "list of token ids"),
        (["ok"], {"responses": [[2**70]]}, r"response 0 is '\[1180\d+\]': .* list"),
        (["ok"], {"responses": [[True, False]]}, "list of token ids"),
        (["ok"], {"responses": [np.array([True])]}, "list of token ids"),
        (["ok", "a"], {"responses": [[5], [101]]}, "text 1 has the token id 101, .* 101 embedd"),
        (["ok", "\u200b \ufeff"], {}, r"text 1 is '\\u200b"),
        (["<bos><eos>"], {}, "no counted token"),
        (["ok"], {"template": None}, "must hold"),
        (["ok"], {"batch_tokens": 0}, "batch_tokens is 0"),
        (["ok"], {"batch_tokens": -1}, "batch_tokens is -1"),
        (["ok"], {"batch_tokens": 1.5}, "batch_tokens is 1.5"),
        (["ok"], {"batch_tokens": True}, "batch_tokens is True"),
    ],
)
def test_texts_and_sizes_that_cannot_be_counted_are_refused(texts, options, told):
    with pytest.raises(UserError, match=told):
        count(zoo.build("llama"), with_bos(), texts, **options)


def test_ids_without_an_embedding_are_refused_by_whatever_reads_them():
    model, tokenizer = zoo.build("llama"), longer(zoo.tokenizer())
    for use in (
        lambda: count(model, tokenizer, ["ok", "a<new>"]),
        lambda: plain_text_nll(model, tokenizer, ["ok", "a<new>"]),
        lambda: reference_activations(model, tokenizer, ["ok", "a<new>"]),
    ):
        with pytest.raises(UserError, match="text 1 has the token id 101, .* 101 embeddings"):
            use()
    strange = [Encoded((5, 6, 101), (True,) * 3)] * 2
    batch = next(token_batches(strange, 20))
    for use in (
        lambda: count_encoded(model, strange),
        lambda: sequence_losses(model, batch),
        lambda: nll(model, strange),
        lambda: contribution(model, strange),
        lambda: continuations(model, strange, max_new_tokens=2),
    ):
        with pytest.raises(UserError, match="token id 101.* 101 embeddings"):
            use()
    assert not hooks(model)


def longer(tokenizer):
    """The zoo's tokenizer with as many words as its models have embeddings, and `<new>` behind."""
    tokenizer.add_tokens([f"<{n}>" for n in range(len(tokenizer), zoo.WORDS)] + ["<new>"])
    return tokenizer


def with_bos():
    """The zoo's tokenizer, adding BOS itself, as Llama's does."""
    tokenizer = zoo.tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return tokenizer


def read(tokenizer, text, **options):
    (e,) = encode(tokenizer, [text], **options)
    words = tokenizer.convert_ids_to_tokens(e.ids)
    return words, [w for w, counted in zip(words, e.counted, strict=True) if counted]


def test_special_tokens_in_the_text_are_no_text():
    words, counted = read(zoo.tokenizer(), "ad<eos>d<pad>!")
    assert words == ["a", "d", "<eos>", "d", "<pad>", "<unk>"]
    assert counted == ["a", "d", "d", "<unk>"]  # an unknown word stands for text


@pytest.mark.parametrize("text", ["<bos>add", "<bos><bos>add"])
def test_a_doubled_beginning_is_read_once_with_a_warning(text):
    with pytest.warns(UserWarning, match="it is read once"):
        words, counted = read(with_bos(), text)
    assert words == ["<bos>", *"add"]
    assert counted == [*"add"]
    with pytest.warns(UserWarning, match="1 of 2 texts"):
        encode(with_bos(), [text, "b"])


@pytest.mark.parametrize("inner", ["words", "pieces"])
def test_an_unknown_word_is_text_where_only_the_tokenizers_model_names_it(inner, tmp_path):
    named = zoo.tokenizer()
    if inner == "pieces":
        words = [(word, 0.0) for word in sorted(named.get_vocab(), key=named.get_vocab().get)]
        core = Tokenizer(models.Unigram(words, unk_id=named.unk_token_id))
        named = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    named.save_pretrained(tmp_path)
    unnamed = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert unnamed.unk_token is None
    expected = encode(named, ["a \u00e9 b"])[0]
    assert named.unk_token_id in expected.ids
    assert encode(unnamed, ["a \u00e9 b"])[0].counted[-5:] == expected.counted[-5:] == (True,) * 5
    named.unk_token = None
    assert encode(named, ["a \u00e9 b"])[0] == expected


def test_a_beginning_that_the_template_writes_is_no_doubled_one(recwarn):
    assert read(with_bos(), "add", template="<bos>{instruction}")[0] == ["<bos>", *"add"]
    assert not recwarn.list


XLMR = [("<s>", 0.0), ("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
XLMR += [(c, -5.0) for c in "adgoQ:你好12"] + [("▁Q", -2.0), ("▁add", -2.0)]


def metaspace(kind):
    if kind == "xlm-r":
        return XLMRobertaTokenizer(vocab=XLMR)
    backend = Tokenizer(models.Unigram(XLMR, unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@pytest.mark.parametrize("kind", ["xlm-r", "always", "first"])
@pytest.mark.parametrize(
    ("template", "text", "counted"),
    [
        ("Q: {instruction}", "add", ["▁add"]),  # holds characters of the text
        ("Q: {instruction}", "你好 12", ["你", "好", "▁", "1", "2"]),  # the text's own space
        ("{instruction}", "你好", ["你", "好"]),
        ("Q: {instruction} 你", "好", ["好"]),
    ],
)
def test_the_templates_word_marker_is_no_text(kind, template, text, counted):
    assert read(metaspace(kind), text, template=template)[1] == counted


def test_groups_are_the_prompts_the_responses_and_all_but_special_tokens():
    (e,) = encode_groups(with_bos(), ["add"], template="q:{instruction}=", responses=["ok"])
    assert len(e.ids) == 1 + len("q:add= ok")
    marks = {name: "".join("x" if m else "." for m in mask) for name, mask in e.groups.items()}
    assert marks == {"prompt": "...xxx....", "all": ".xxxxxxxxx", "response": "........xx"}
    assert e.counted == e.groups["prompt"]


# ---- batches by tokens, left padding


def test_batches_by_tokens_keep_to_their_budget_and_pad_little():
    draw = np.random.default_rng(0)
    sizes = np.clip(draw.lognormal(4.1, 0.5, 1200).astype(int), 8, 400)  # HexaInst-like
    encoded = [Encoded((5,) * n, (True,) * n) for n in sizes]
    made = list(token_batches(encoded, 4096))
    assert sorted(row for b in made for row in b.rows) == list(range(1200))
    assert all(b.input_ids.numel() <= 4096 for b in made)
    assert sum(b.input_ids.numel() for b in made) <= 1.05 * sizes.sum()
    assert [b.rows for b in token_batches([encoded[0], Encoded((5,) * 9, (True,) * 9)], 5)] == [
        [0],
        [1],
    ]


def test_left_padding_that_moves_positions_is_noticed():
    assert left_padding_is_neutral(zoo.build("llama"))
    assert not left_padding_is_neutral(zoo.build("bart"))
    model = zoo.build("bart")
    mask = torch.tensor([[1] * 6, [0] * 2 + [1] * 4])
    with pytest.raises(UserError, match="Pad on the right"):
        counting(model, IDS, attention_mask=mask)
    assert counting(model, IDS, attention_mask=mask.flip(1)).tokens.tolist() == [6, 4]


def test_what_padding_does_under_random_draws_is_not_taken_for_the_models_own():
    model = zoo.build("llama")
    texts = ["add 1 and 2", "name 3 fish, please."]
    drawn = reference_activations(model, zoo.tokenizer(), texts)
    mask = {"dense": np.ones((zoo.LAYERS, zoo.N), bool)}
    with ablate(model, mask, "resample", reference=drawn):
        assert not left_padding_is_neutral(model)
    assert left_padding_is_neutral(model)


# ---- losses in the same pass

HEADS = ["llama", "gemma2", "cohere", "granite", "minicpm3", "nanochat", "gpt2", "opt", "gptj"]


@pytest.mark.parametrize("family", [*HEADS, "qwen2_moe", "bart"])
def test_losses_from_hidden_states_are_those_of_the_models_own_logits(family, monkeypatch):
    monkeypatch.setattr("helpers.capture.losses.CELLS", 3 * zoo.WORDS)  # three tokens at a time
    monkeypatch.setattr("helpers.capture.losses.LEAST", 1)
    model, texts = zoo.build(family), ["add", "no", "put it in"]
    encoded = encode_groups(with_bos(), texts, template="q:{instruction}=", responses=texts[::-1])
    loss = GroupLoss(model, len(texts))
    counted = count_groups(model, encoded, 20, observers=[loss])
    for row, e in enumerate(encoded):
        ids = torch.tensor([e.ids])
        with torch.no_grad():
            nats = -model(ids).logits[0].log_softmax(-1)
        wanted = sum(nats[t - 1, e.ids[t]] for t in np.flatnonzero(e.groups["response"]))
        assert float(loss.total[row]) == pytest.approx(float(wanted), rel=1e-5)
    assert loss.tokens.tolist() == counted["response"].tokens.tolist()
    alone = count_encoded(model, [Encoded(e.ids, e.groups["prompt"]) for e in encoded])
    assert differing(counted["prompt"], alone) == 0


def test_a_head_of_another_kind_is_refused():
    model = zoo.build("llama")
    head = model.lm_head
    own = model.forward

    def shifted(*args, **kwargs):
        out = own(*args, **kwargs)
        out.logits = out.logits + torch.arange(float(zoo.WORDS))
        return out

    model.forward = shifted
    with pytest.raises(UnreadableModel, match="in a way of its own"):
        token_losses(model, torch.zeros(1, 3, zoo.D), IDS[:1, :3], torch.ones(1, 3))
    assert head is model.lm_head


def test_a_first_token_has_no_loss_and_shapes_are_checked():
    model = zoo.build("llama")
    hidden = model.model(IDS).last_hidden_state
    losses = token_losses(model, hidden, IDS, torch.ones_like(IDS))
    assert losses.shape == IDS.shape
    assert (losses[:, 0] == 0).all()
    assert (losses[:, 1:] > 0).all()
    assert not token_losses(model, hidden, IDS, torch.zeros_like(IDS)).any()
    with pytest.raises(UserError, match="token_losses"):
        token_losses(model, hidden[:, 1:], IDS, torch.ones_like(IDS))


# ---- a model without a trunk, templates that no tokenizer reads


def test_a_model_that_is_its_own_base_model_is_refused():
    config = AutoConfig.for_model("mllama", text_config=zoo.COMMON)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert model.base_model is model
    with pytest.raises(UserError, match="no trunk of its own"):
        count(model, zoo.tokenizer(), ["add 12"])


def test_half_a_character_in_a_template_is_refused():
    with pytest.raises(UserError, match="the template holds half of a character"):
        encode(zoo.tokenizer(), ["add 12"], template="\ud800{instruction}")


# ---- chat templates

SMOL = """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}\
{{ '<|im_start|>system
You are SmolLM<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""
LLAMA = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{{- "<|head|>system<|end|>\\n\\nToday Date: " + date_string + "\\n\\n<|eot|>" }}
{%- for message in messages %}
    {{- '<|head|>' + message['role'] + '<|end|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|end|>\\n\\n' }}
{%- endif %}
"""
SAID = "{{ messages[0]['content'] }}"
UNCHANGED = (
    (
        SMOL,
        "<|im_start|>system\nYou are SmolLM<|im_end|>\n"
        "<|im_start|>user\n{instruction}<|im_end|>\n<|im_start|>assistant\n",
    ),
    (
        LLAMA,
        "<bos><|head|>system<|end|>\n\nToday Date: 01 Jan 2025\n\n<|eot|>"
        "<|head|>user<|end|>\n\n{instruction}<|eot|><|head|>assistant<|end|>\n\n",
    ),
    (f"\n  {{% if true %}}\nx{{% endif %}}\n{SAID}\n\n", "\nx{instruction}\n"),
    (f"  {{# none #}}\n\n {SAID}", "\n {instruction}"),
)


def chatting(template):
    tokenizer = zoo.tokenizer()
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(("template", "text"), UNCHANGED)
def test_a_chat_template_is_rendered_as_it_stands(template, text):
    tokenizer = chatting(template)
    assert chat_template(tokenizer) == text
    turn = [{"role": "user", "content": "{instruction}"}]
    undated = tokenizer.apply_chat_template(
        turn, tokenize=False, add_generation_prompt=True, date_string="01 Jan 2025"
    )
    assert undated == text


@pytest.mark.parametrize(
    ("asked", "date"),
    [
        ("strftime_now(format='%d %b %Y')", "01 Jan 2025"),
        ("strftime_now('%d' ~ ' %b')", "01 Jan"),
        ('strftime_now("it\'s %-d")', "it's 1"),
        ("strftime_now('%%d %H:%M, day %j')", "%d 00:00, day 001"),
        ("(strftime_now('%Y') | int) + 1", "2026"),
    ],
)
def test_a_date_is_the_same_one_however_it_is_asked_for(asked, date):
    assert chat_template(chatting(f"{{{{ {asked} }}}}: {SAID}")) == f"{date}: {{instruction}}"
    told = (
        f"{{% macro f() %}}{{% set d = {asked} %}}{{{{ d }}}}{{% endmacro %}}{{{{ f() }}}} {SAID}"
    )
    assert chat_template(chatting(told)) == f"{date} {{instruction}}"


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (SAID + "{{ 1/0 }}", "cannot be rendered .*ZeroDivisionError"),
        (SAID + "{{ range(10**9) | list }}", "cannot be rendered .*OverflowError"),
        (
            "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}" + SAID,
            "cannot be rendered .*RecursionError",
        ),
        ("{{ '\\ud800' }}" + SAID, "holds half of a character"),
        (SAID + "{{ ['a', 'b'] | random }}", "the same each time"),
        ("{{ messages[0]['content'] | lower }}", "text once, unchanged"),
        ("{{ messages[0]['content'] | e }}", "text once, unchanged"),
        ("{{ messages[0]['content'].split() | join(' ') }}", "text once, unchanged"),
        (SAID + SAID, "text once, unchanged"),
    ],
)
def test_a_chat_template_that_no_text_can_be_put_in_is_one_error(template, told):
    with pytest.raises(UserError, match=told):
        chat_template(chatting(template))
