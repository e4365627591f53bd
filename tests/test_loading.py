"""Finding sites, loading checkpoints, telling a pair, position masks, greedy generation."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import zoo
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.capture import checkpoints
from helpers.capture.counter import watching
from helpers.capture.loading import (
    check_pair,
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    random_twin,
)
from helpers.capture.sites import UnreadableModel, find_sites
from helpers.capture.tokens import Encoded, chat_template, check_tokenizer, encode, token_batches
from helpers.record import DamagedFile, UserError
from helpers.study.answers import continuations

LAYOUT = {
    "qwen2_moe": [
        "0 shared 56 1",
        "0 expert 32 6",
        "1 dense 80 1",
        "2 shared 56 1",
        "2 expert 32 6",
    ],
    "deepseek_v3": [
        "0 dense 80 1",
        "1 shared 32 1",
        "1 expert 32 8",
        "2 shared 32 1",
        "2 expert 32 8",
    ],
    "granitemoeshared": [
        "0 shared 24 1",
        "0 expert 80 6",
        "1 shared 24 1",
        "1 expert 80 6",
        "2 shared 24 1",
        "2 expert 80 6",
    ],
    "gpt2": ["0 dense 192 1", "1 dense 192 1", "2 dense 192 1"],
}


# ---- sites ----


@pytest.mark.parametrize("family", zoo.ZOO)
def test_sites_cover_every_layer_once_and_are_found_without_weights(family):
    with torch.device("meta"):
        sites = find_sites(zoo.build(family))
    found = [f"{s.layer} {s.family} {s.width} {s.experts}" for s in sites]
    kind = (
        "expert 80 6"
        if family in ("mixtral", "gpt_oss", "granitemoe", "phimoe")
        else ("expert 32 6" if family in zoo.SPARSE else "dense 80 1")
    )
    wide = {
        "bloom": LAYOUT["gpt2"],
        "deepseek_v2": [
            x.replace(" 8", " 6").replace("shared 32", "shared 64") for x in LAYOUT["deepseek_v3"]
        ],
    }
    wide["deepseek_v2"][0] = "0 dense 80 1"
    assert found == (LAYOUT | wide).get(family, [f"{layer} {kind}" for layer in range(zoo.LAYERS)])
    assert all((s.router is not None and s.act is None) == (s.family == "expert") for s in sites)


@pytest.mark.parametrize(
    ("kind", "extra", "message"),
    [
        ("mamba", {"state_size": 4}, "no MLP in layers"),
        (
            "llama4_text",
            {
                "num_local_experts": 4,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 80,
                "interleave_moe_layer_step": 1,
            },
            "unknown layout of model.layers.0.feed_forward.experts",
        ),
        (
            "dbrx",
            {
                "d_model": 48,
                "n_heads": 4,
                "n_layers": 3,
                "ffn_config": {
                    "ffn_hidden_size": 32,
                    "moe_num_experts": 6,
                    "moe_top_k": 2,
                    "hidden_size": 48,
                },
                "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4},
            },
            "cannot be read exactly",
        ),
    ],
)
def test_other_architectures_are_refused_with_what_is_missing(kind, extra, message):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **zoo.COMMON | extra))
    with pytest.raises(UnreadableModel, match=message):
        find_sites(model)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda m: setattr(m.model.layers[1].mlp, "act_fn", m.model.layers[0].mlp.act_fn),
            "share one activation",
        ),
        (lambda m: delattr(m.model.layers[1].mlp, "act_fn"), r"no MLP in layers \[1\]"),
        (
            lambda m: m.model.layers[1].add_module(
                "second", zoo.build("llama").model.layers[0].mlp
            ),
            "layer 1 has 2 dense",
        ),
        (
            lambda m: setattr(m.model.layers[1].mlp, "down_proj", torch.nn.Linear(zoo.N, 7)),
            r"no MLP in layers \[1\]",
        ),
        (
            lambda m: setattr(m.model.layers[1].mlp, "down_proj", torch.nn.Identity()),
            r"no MLP in layers \[1\]",
        ),
        (lambda m: delattr(m.config, "hidden_size"), r"no MLP in layers \[0, 1, 2\]"),
        (lambda m: setattr(m.config, "num_hidden_layers", 0), "no num_hidden_layers"),
        (
            lambda m: m.model.layers[2].register_parameter(
                "bank", torch.nn.Parameter(torch.ones(2, 3, 4))
            ),
            "unknown layout",
        ),
    ],
)
def test_a_doubtful_model_is_refused(spoil, message):
    model = zoo.build("llama")
    spoil(model)
    with pytest.raises(UnreadableModel, match=message):
        find_sites(model)


def test_a_bank_without_a_router_is_refused():
    model = zoo.build("mixtral")
    model.model.layers[0].mlp.gate = torch.nn.Identity()
    with pytest.raises(UnreadableModel, match=r"no router beside model\.layers\.0\.mlp\.experts"):
        find_sites(model)


# ---- checkpoints ----


@pytest.fixture(params=["llama", "mistral", "qwen2_moe"])
def saved(request, tmp_path):
    """A checkpoint in the layout of the paper's families: sharded safetensors, index, tokenizer
    files.
    """
    model = zoo.build(request.param)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    zoo.tokenizer().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert len(list(tmp_path.glob("model-*"))) > 3
    return tmp_path, model


def test_a_sharded_checkpoint_loads_as_it_was_saved(saved):
    folder, model = saved
    loaded, tokenizer = load_model(str(folder))
    ids = torch.arange(3, 15)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert not loaded.training
    assert loaded.source == {"ref": str(folder), "commit": None, "dtype": "float32"}
    assert tokenizer("a b")["input_ids"] == zoo.tokenizer()("a b")["input_ids"]
    assert load_model(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_model_split_over_memory_and_disk_gives_the_same_logits(saved):
    folder, model = saved
    split = {
        "model.embed_tokens": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    loaded, _ = load_model(str(folder), device_map=split)
    ids = torch.arange(3, 15)[None]
    assert any(p.is_meta for p in loaded.parameters())
    assert torch.allclose(loaded(ids).logits, model(ids).logits)


def test_an_offloaded_pair_is_compared_and_answers_as_a_whole_one_does(saved):
    """Also with the embedding on disk, where the model itself stands on no device."""
    folder, model = saved
    split = {
        "model.embed_tokens": "disk",
        "model.layers": "disk",
        "model.norm": "cpu",
        "model.rotary_emb": "cpu",
        "lm_head": "cpu",
    }
    (whole, tokenizer), (loaded, _) = (
        load_model(str(folder)),
        load_model(str(folder), device_map=split),
    )
    assert loaded.device.type == "meta"
    assert all(
        row["change"] < 1e-6 and row["cosine"] == pytest.approx(1)
        for row in check_pair((whole, tokenizer), (loaded, tokenizer))
    )
    encoded = encode(tokenizer, ["a b", "b a c"])
    assert continuations(loaded, encoded, max_new_tokens=4) == continuations(
        whole, encoded, max_new_tokens=4
    )


def cut(folder, name="model-00002"):
    file = next(folder.glob(f"{name}*"))
    with open(file, "rb+") as stream:
        stream.truncate(file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (cut, DamagedFile, "model-00002.* is truncated"),
        (lambda f: next(f.glob("model-00003*")).unlink(), DamagedFile, "model-00003.* is missing"),
        (lambda f: (f / "config.json").unlink(), DamagedFile, r"config\.json is missing"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("{"),
            DamagedFile,
            "is not valid JSON",
        ),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "nonsense"}'),
            UserError,
            "does not load as a causal",
        ),
        (lambda f: [p.unlink() for p in f.glob("tokenizer*")], DamagedFile, "has no tokenizer"),
    ],
)
def test_a_damaged_checkpoint_is_one_clear_error(saved, damage, error, message):
    damage(saved[0])
    with pytest.raises(error, match=message):
        load_model(str(saved[0]))


def test_weights_that_do_not_fill_the_architecture_are_refused(tmp_path):
    zoo.build("llama").save_pretrained(tmp_path)
    zoo.tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}))
    with pytest.raises(DamagedFile, match="9 weights are missing"):
        load_model(str(tmp_path))


def test_every_file_that_matters_changes_the_fingerprint(saved):
    folder, _ = saved
    seen = {fingerprint(folder)}
    for name in ("config.json", "tokenizer.json", next(folder.glob("model-00002*")).name):
        data = bytearray((folder / name).read_bytes())
        data[-2] ^= 1
        (folder / name).write_bytes(data)
        os.utime(folder / name, ns=(1, len(seen)))
        seen.add(fingerprint(folder))
    (folder / "README.md").write_text("no matter")
    assert len(seen | {fingerprint(folder)}) == 4


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (GatedRepoError, "is gated: accept its licence.*hf auth login"),
        (RepositoryNotFoundError, "neither a local folder nor a model"),
        (RevisionNotFoundError, "no such revision"),
        (LocalEntryNotFoundError, "cannot be reached .*name its folder"),
        (HfHubHTTPError, "cannot be reached"),
        (ConnectionError, "cannot be reached"),
    ],
)
def test_no_access_to_the_hub_is_one_clear_error(monkeypatch, error, message):
    def refuse(*args, **kwargs):
        raise error.__new__(error, "no")  # their constructors want a web server's response

    monkeypatch.setattr(checkpoints.huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=message):
        load_model("someone/some-model", revision="abc")


def test_a_hub_checkpoint_is_recorded_with_the_commit_that_was_resolved(
    monkeypatch, saved, tmp_path_factory
):
    snapshot = tmp_path_factory.mktemp("hub") / "models--a--b" / "snapshots" / "0123abcd"
    shutil.copytree(saved[0], snapshot)
    asked = {}
    monkeypatch.setattr(
        checkpoints.huggingface_hub,
        "snapshot_download",
        lambda ref, **options: asked.update(options, ref=ref) or str(snapshot),
    )
    model, _ = load_model("a/b", revision="main")
    assert model.source["commit"] == "0123abcd"
    assert asked["ref"] == "a/b"
    assert asked["revision"] == "main"
    assert not any("bin" in p or "*.py" in p for p in asked["allow_patterns"])


@pytest.mark.parametrize(
    ("ref", "options", "message"),
    [
        ("data/models/none/base", {}, "does not exist.*make models"),
        ("/nowhere/at/all", {}, "does not exist"),
        ("", {}, "a model is named '', expected a folder"),
        (None, {}, "a model is named None"),
        (3, {}, "a model is named 3"),
        (Path("/nowhere/at/all"), {}, "does not exist"),
        ("x", {"dtype": "int4"}, "expected one of float32"),
        ("x", {"device_map": "cuda"}, "sees no GPU"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_loaded(ref, options, message):
    if "cuda" in options.values() and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match=message):
        load_model(ref, **options)


def test_locate_refuses_pickled_weights(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(DamagedFile, match="pickled weights are not loaded"):
        locate(str(tmp_path))


# ---- pairs and twins
# -----------------------------------------------------------------------------------------------


def nudged(model, by=0.01):
    twin = zoo.build("llama")
    with torch.no_grad():
        for (_, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            q.copy_(p + by * torch.ones_like(p))
    return twin


def test_a_pair_is_told_by_its_weights():
    base, t = zoo.build("llama"), zoo.tokenizer()
    rows = check_pair((base, t), (nudged(base), t))
    assert [r["layer"] for r in rows] == [0, 1, 2]
    assert all(0.9 < r["cosine"] < 1 for r in rows)
    one, two = (
        torch.cat([p.detach().flatten() for p in m.model.layers[0].mlp.parameters()])
        for m in (base, nudged(base))
    )
    assert np.isclose(rows[0]["change"], float((two - one).norm() / one.norm()))


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"seed": 1}, "neither was tuned from the other"),
        ("mistral", {}, "model_type"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_parameters",
        ),
        ("llama", {"intermediate_size": 64}, "intermediate_size, parameters"),
    ],
)
def test_models_that_are_no_pair_are_refused(family, changes, message):
    with pytest.raises(UserError, match=message):
        check_pair(
            (zoo.build("llama"), zoo.tokenizer()), (zoo.build(family, **changes), zoo.tokenizer())
        )


def test_different_token_ids_are_refused():
    other = zoo.tokenizer()
    other.add_tokens(["add"])
    with pytest.raises(UserError, match="token ids"):
        check_pair((zoo.build("llama"), zoo.tokenizer()), (zoo.build("llama"), other))


def test_a_random_twin_shares_the_architecture_only_and_leaves_the_seed_alone():
    model = zoo.build("qwen2_moe")
    torch.manual_seed(5)
    one, two, other, after = (
        random_twin(model, 1),
        random_twin(model, 1),
        random_twin(model, 2),
        torch.rand(1),
    )
    torch.manual_seed(5)
    assert torch.equal(torch.rand(1), after)
    assert find_sites(one) == find_sites(model)
    assert not one.training
    weights = [m.model.layers[0].mlp.experts.down_proj for m in (one, two, other, model)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[3])


def test_a_twin_may_take_the_place_of_its_model():
    """So that two large models never fill the memory together."""
    model = zoo.build("llama")
    kept, alone = random_twin(model, 1), random_twin(model, 1, free=True)
    assert not any(weight.numel() for weight in model.parameters())
    assert all(
        torch.equal(a, b) for a, b in zip(kept.parameters(), alone.parameters(), strict=True)
    )


def constant(name, weight):
    """Is a matrix one number throughout? A bias may be, of any shape."""
    matrix = weight.dim() > 1 and not name.endswith("bias")
    return matrix and bool((weight == weight.flatten()[0]).all())


def started(model, seed):
    """The weights that transformers draws, by name."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dict(AutoModelForCausalLM.from_config(model.config).named_parameters())


@pytest.mark.parametrize("family", zoo.ZOO | zoo.MORE)
def test_no_matrix_of_a_twin_is_constant_and_all_else_is_as_transformers_draws_it(family):
    model = zoo.build(family)
    plain, twin = started(model, 3), dict(random_twin(model, 3).named_parameters())
    redrawn = {name for name, weight in plain.items() if constant(name, weight)}
    assert {name.split(".")[-3] for name in redrawn} == ({"router"} if family == "afmoe" else set())
    assert not any(constant(name, weight) for name, weight in twin.items())
    assert {name for name in twin if not torch.equal(twin[name], plain[name])} == redrawn


def test_a_twin_whose_router_starts_as_zeros_uses_more_than_k_experts():
    model, ids = zoo.build("afmoe", initializer_range=0.05), torch.arange(3, 83).view(4, 20)
    one, two, other = (random_twin(model, seed) for seed in (1, 1, 2))
    with watching(one) as counter:
        routed = counter(ids).routed.sum(0)  # [L, E]
    assert ((routed > 0).sum(1) > 2).all()
    weights = [twin.model.layers[1].mlp.router.gate.weight for twin in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert weights[0].std().item() == pytest.approx(0.05, rel=0.2)


def test_a_norm_of_a_twin_keeps_its_scale():
    """Cohere's norms of queries have a row of ones for each head."""
    twin = random_twin(zoo.build("cohere", use_qk_norm=True))
    scale = twin.model.layers[0].self_attn.q_norm.weight
    assert scale.dim() == 2
    assert scale.eq(1).all()


# ---- which tokens count
# --------------------------------------------------------------------------------------------

TEMPLATE = "Instruction: {instruction}\nResponse:"


def shown(tokenizer, encoded):
    """The counted tokens, decoded one by one and joined."""
    return "".join(
        tokenizer.decode([i]) for i, c in zip(encoded.ids, encoded.counted, strict=True) if c
    )


def test_only_the_instructions_own_tokens_count_in_a_prompt():
    t = zoo.tokenizer()
    (e,) = encode(t, ["add 1\nto 2."], template=TEMPLATE)
    assert shown(t, e) == "add 1\nto 2."
    assert len(e.ids) == len(TEMPLATE.format(instruction="add 1\nto 2."))


def test_only_the_references_tokens_count_in_a_response():
    t = zoo.tokenizer()
    (e,) = encode(t, ["add 1 to 2."], template=TEMPLATE, responses=["it is 3"])
    assert shown(t, e) == "it is 3"
    assert e.ids[-1] == t.convert_tokens_to_ids("3")
    (glued,) = encode(t, ["add"], template="{instruction}\n", responses=["3"])
    assert t.decode(glued.ids).replace(" ", "") == "add\n3"


def test_generated_token_ids_are_appended_as_they_are():
    (e,) = encode(zoo.tokenizer(), ["add"], template=TEMPLATE, responses=[[9, 8, 7]])
    assert e.ids[-3:] == (9, 8, 7)
    assert sum(e.counted) == 3
    assert all(e.counted[-3:])
    assert not any(encode(zoo.tokenizer(), ["add"], responses=[[]])[0].counted)


def bpe(prefix_space=False, trim_offsets=False, after=""):
    """A byte-level tokenizer with BOS, as GPT-2's or Llama 3's: a token may hold a space, or a
    part of a character.
    """
    words = {
        w: i
        for i, w in enumerate(
            [
                "<bos>",
                "<pad>",
                *sorted(pre_tokenizers.ByteLevel.alphabet()),
                "ad",
                "add",
                "Ġadd",
                "Ġ1",
            ]
        )
    }
    plain = Tokenizer(models.BPE(words, [("a", "d"), ("ad", "d"), ("Ġ", "add"), ("Ġ", "1")]))
    plain.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    plain.decoder = decoders.ByteLevel()
    plain.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=trim_offsets),
            processors.TemplateProcessing(
                single=f"<bos> $A {after}".strip(), special_tokens=[("<bos>", 0), ("<pad>", 1)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<bos>", pad_token="<pad>")


def test_bos_is_left_out_and_a_token_over_the_edge_belongs_to_the_text():
    t = bpe()
    (e,) = encode(t, ["add 1é"], template="Do: {instruction}.")
    assert t.convert_ids_to_tokens([i for i, c in zip(e.ids, e.counted, strict=True) if c]) == [
        "Ġadd",
        "Ġ1",
        "Ã",
        "©",
    ]
    assert e.ids[0] == 0
    assert not e.counted[0]
    assert sum(i == 0 for i in e.ids) == 1


def test_indentation_counts_where_a_tokenizer_trims_it_from_the_offsets():
    """GPT-NeoX and its kin: the offsets of white space are empty, and code is full of it."""
    code = "add 1\n    add 1\n"
    trimmed, plain = (
        encode(bpe(trim_offsets=trim), [code], template="Do:\n{instruction}\nNow:")[0]
        for trim in (True, False)
    )
    assert trimmed.ids == plain.ids
    assert trimmed.counted == plain.counted
    assert sum(plain.counted) == 9
    offsets = bpe(trim_offsets=True)(code, return_offsets_mapping=True)["offset_mapping"]
    assert sum(a == b for a, b in offsets) > 3


def test_what_a_tokenizer_puts_behind_a_text_is_left_out():
    """An end-of-sequence token behind the prompt would end the answer before it begins."""
    ended, plain = (
        encode(bpe(after=after), ["add"], template=TEMPLATE, responses=["1"])[0]
        for after in ("<pad>", "")
    )
    assert bpe(after="<pad>")("add")["input_ids"][-1] == 1
    assert ended == plain
    assert plain.counted[-1]


def test_a_template_that_spells_bos_gets_no_second_one():
    assert sum(i == 0 for i in encode(bpe(), ["add"], template="<bos>[{instruction}]")[0].ids) == 1


def test_a_prompt_reads_the_same_with_and_without_its_response():
    for t in (zoo.tokenizer(), bpe()):
        prompt, whole = (
            encode(t, ["add 1"], template=TEMPLATE, responses=r)[0].ids for r in (None, ["add"])
        )
        assert whole[: len(prompt)] == prompt


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([""], {}, "text 0 is ''"),
        (["a", "  \n"], {}, "text 1"),
        ([None], {}, "text 0 is None"),
        (["a"], {"template": "no place"}, "must hold {instruction} once"),
        (["a"], {"responses": [""]}, "yields no counted token"),
    ],
)
def test_texts_without_tokens_are_refused(texts, options, message):
    with pytest.raises(UserError, match=message):
        encode(zoo.tokenizer(), texts, **options)


def test_a_text_that_the_tokenizer_swallows_is_refused():
    t = zoo.tokenizer()
    t.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace("a", "")
    with pytest.raises(UserError, match="yields no counted token"):
        encode(t, ["aaa"])


def test_a_tokenizer_that_does_not_fit_is_refused():
    class Slow:
        is_fast, vocab_size = False, 10

    with pytest.raises(UserError, match="no character offsets"):
        check_tokenizer(Slow(), zoo.build("llama"))
    with pytest.raises(UserError, match="46 tokens, the model 40 embeddings"):
        check_tokenizer(zoo.tokenizer(), zoo.build("llama", vocab_size=40))


def test_batches_hold_every_sequence_once_under_its_own_mask():
    encoded = [
        Encoded(tuple(range(3, 3 + n)), (True,) * (n - 1) + (False,)) for n in (2, 7, 3, 5, 1)
    ]
    for side in ("right", "left"):
        rows = []
        for b in token_batches(encoded, 60, side):
            rows += b.rows
            for i, row in enumerate(b.rows):
                keep = b.attention_mask[i] == 1
                assert tuple(b.input_ids[i][keep].tolist()) == encoded[row].ids
                assert tuple((b.count_mask[i][keep] == 1).tolist()) == encoded[row].counted
                assert (b.count_mask[i] <= b.attention_mask[i]).all()
                assert keep[0] if side == "right" else keep[-1]
        assert rows == [1, 3, 2, 0, 4]


# ---- generation ----


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2_moe"])
def test_generation_is_greedy_whatever_the_batch_and_the_models_own_settings(family):
    model = zoo.build(family)
    model.generation_config.repetition_penalty, model.generation_config.eos_token_id = 3.0, [2, 17]
    encoded = encode(zoo.tokenizer(), ["add 1 and 2", "a", "name 3 fish, please."])
    expected = []
    for e in encoded:
        ids = list(e.ids)
        while len(ids) < len(e.ids) + 12:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in (2, 17):
                ids.pop()
                break
        expected.append(ids[len(e.ids) :])
    assert continuations(model, encoded, max_new_tokens=12, batch_tokens=120) == expected
    assert continuations(model, encoded, max_new_tokens=12, batch_tokens=1) == expected
    assert model.generation_config.repetition_penalty == 3.0


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_chat_template_that_asks_for_the_date_gives_the_same_text_tomorrow(quote):
    tokenizer = load_tokenizer("data/models/tiny-dense/tuned")
    asked = f"strftime_now( {quote}%d %b %Y{quote} )"
    tokenizer.chat_template = (
        f"{{% if strftime_now is defined %}}{{{{ {asked} }}}}: {{% endif %}}"
        "{{ messages[0]['content'] }}"
    )
    assert chat_template(tokenizer) == "01 Jan 2025: {instruction}"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only with tools') }}",
        "{% if %}",
        "{{ messages[0].content.a.b }}",
        "{{ messages[0]['content']() }}",
        {"one": "x", "other": "y"},
    ],
)
def test_a_chat_template_that_cannot_be_rendered_is_one_error(template):
    tokenizer = load_tokenizer("data/models/tiny-dense/tuned")
    tokenizer.chat_template = template
    with pytest.raises(UserError, match="cannot be rendered for one instruction: .*chat: false"):
        chat_template(tokenizer)
