"""Checkpoints that are not what they seem: code of their own, other weights than the ones counted,
sizes that fit nothing. Each is refused in one line, before anything runs.
"""

import ast
import io
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import zoo
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file

from helpers.capture import checkpoints
from helpers.capture.checkpoints import configuration, fingerprint, locate
from helpers.capture.loading import check_pair, load_model
from helpers.config import Pair, Profile
from helpers.paths import DATA, ROOT
from helpers.record import DamagedFile, UserError
from helpers.run import plan

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def folder(tmp_path):
    return saved(tmp_path / "model")


def saved(folder, family="llama", **changes):
    zoo.build(family, **changes).save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return folder


def edit(path, **changes):
    found = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(found | changes))


def config(folder, **changes):
    edit(folder / "config.json", **changes)


def refused(folder, error, message, plan_too=True):
    """Loading, proving and planning end in one line; nothing is asked."""
    uses = [load_model, locate] + [configuration] * plan_too
    for use in uses:
        with pytest.raises(error, match=message) as caught:
            use(str(folder))
        assert "\n" not in str(caught.value)


# ---- code of a checkpoint's own ----

CODE = """
open({marker!r}, "w").write("ran")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "own"
class Model(LlamaForCausalLM):
    config_class = Config
class Words(PreTrainedTokenizerFast):
    pass
"""
AUTO = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
ELSEWHERE = {name: f"someone/model--{place}" for name, place in AUTO.items()}


@pytest.fixture
def marker(tmp_path, folder, monkeypatch):
    """A file that code lying in the folder would write; "y" waits on standard input."""
    path = tmp_path / "ran"
    for name in ("own.py", "custom_generate/generate.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(CODE.format(marker=str(path)))
    shutil.move(folder / "custom_generate", tmp_path / "custom_generate")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail(f"asked: {asked}"))
    return path


def tokenizer_config(folder, **changes):
    edit(folder / "tokenizer_config.json", **changes)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (lambda f: config(f, model_type="own", auto_map=AUTO), "no 'own' of its own"),
        (lambda f: config(f, model_type="own", auto_map=ELSEWHERE), "no 'own' of its own"),
        (lambda f: config(f, model_type=None, auto_map=AUTO), "config.json has auto_map"),
        (lambda f: config(f, model_type=["llama"], auto_map=AUTO), "config.json has auto_map"),
        (
            lambda f: tokenizer_config(f, auto_map={"AutoTokenizer": [None, "own.Words"]}),
            "tokenizer_config.json has auto_map",
        ),
        (
            lambda f: tokenizer_config(f, auto_map=["own.Words", None]),
            "tokenizer_config.json has auto_map",
        ),
        (lambda f: config(f, _attn_implementation="hub/own"), "'hub/own', code from a hub"),
        (lambda f: config(f, attn_implementation="kernels-community/x:f"), "code from a hub"),
        (lambda f: config(f, _attn_implementation={"": "paged|a/b@main"}), "code from a hub"),
        (lambda f: config(f, _experts_implementation="a/b"), "code from a hub"),
        (lambda f: config(f, text_config={"attn_implementation": "a/b"}), "code from a hub"),
        (lambda f: config(f, kernel_config={"RMSNorm": ["a/b:Norm"]}), "code from a hub"),
        (
            lambda f: edit(f / "generation_config.json", attn_implementation="a/b"),
            "generation_config.json: .*code from a hub",
        ),
        (
            lambda f: shutil.move(f.parent / "custom_generate", f),
            "it has a folder custom_generate",
        ),
    ],
)
def test_a_checkpoint_with_code_of_its_own_is_refused(folder, marker, plant, message):
    plant(folder)
    refused(folder, UserError, f"{message}.*Foreign code is never run")
    assert not marker.exists()


def test_code_beside_a_model_that_transformers_knows_is_left_alone(folder, marker):
    """Many checkpoints still carry the file that was needed before transformers had their type."""
    config(folder, auto_map=AUTO)
    model, _ = load_model(str(folder))
    assert type(model).__module__.startswith("transformers.")
    assert torch.equal(model(IDS).logits, zoo.build("llama")(IDS).logits)
    assert not marker.exists()


@pytest.mark.parametrize("command", ["count", "plan"])
def test_the_command_line_runs_no_foreign_code_and_asks_nothing(folder, tmp_path, command):
    """The real one, in a copy of the house with a profile of its own, "y" on standard input."""
    house, marker = tmp_path / "house", tmp_path / "ran"
    shutil.copytree(ROOT / "helpers", house / "helpers", ignore=lambda *_: ["__pycache__"])
    (house / "notebooks" / "profiles").mkdir(parents=True)
    (house / "data").mkdir()
    (house / "data" / "hexainst").symlink_to(DATA / "hexainst")
    pair = {"name": "own", "base": str(folder), "tuned": str(folder)}
    (house / "notebooks" / "profiles" / "own.yaml").write_text(
        json.dumps({"dataset": "tiny", "pairs": [pair]})
    )
    (folder / "own.py").write_text(CODE.format(marker=str(marker)))
    config(folder, model_type="own", auto_map=AUTO)
    done = subprocess.run(
        [sys.executable, "-m", "helpers.run", command, "--profile", "own"],
        cwd=house,
        env=os.environ | {"PYTHONPATH": str(house)},
        input="y\n" * 99,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "Foreign code is never run" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert "[y/N]" not in done.stdout + done.stderr
    assert not marker.exists()


def test_no_call_leaves_the_question_open():
    """Whatever loads a configuration, a tokenizer or a model says no to code."""
    calls = []
    for path in (*(ROOT / "helpers").rglob("*.py"), ROOT / "tests" / "bench.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and ast.unparse(node.func)
            if called and re.fullmatch(r"Auto\w+\.from_(pretrained|config)", called):
                given = {word.arg: ast.unparse(word.value) for word in node.keywords}
                calls.append((path.name, node.lineno, given.get("trust_remote_code")))
    assert len(calls) > 8
    assert [call for call in calls if call[2] != "False"] == []


# ---- the weights that are counted ----


def index(folder, **changes):
    """The checkpoint in shards, and its index edited."""
    (folder / "model.safetensors").unlink()
    zoo.build("llama").save_pretrained(folder, max_shard_size="60KB")
    edit(folder / "model.safetensors.index.json", **changes)


def both_layouts(folder):
    single = (folder / "model.safetensors").read_bytes()
    index(folder)
    (folder / "model.safetensors").write_bytes(single)


def tensors(folder, change):
    file = folder / "model.safetensors"
    found = load_file(file)
    change(found)
    save_file(found, file, metadata={"format": "pt"})


def first(found, value):
    found["model.layers.1.mlp.up_proj.weight"][2, 3] = value


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (both_layouts, UserError, "more than one layout: model.safetensors beside model-00001"),
        (
            lambda f: (f / "pytorch_model.bin").write_bytes(b"x"),
            UserError,
            "more than one layout: pytorch_model.bin beside model.safetensors",
        ),
        (
            lambda f: (f / "pytorch_model-00001-of-00002.bin").write_bytes(b"x"),
            UserError,
            "more than one layout",
        ),
        (
            lambda f: shutil.copy(
                f / "model.safetensors", f / "shard-00000-model-00001-of-00001.safetensors"
            ),
            UserError,
            "more than one layout: shard-",
        ),
        (
            lambda f: shutil.copy(f / "model.safetensors", f / "model-00001-of-00001.safetensors"),
            UserError,
            "more than one layout: model-00001",
        ),
        (lambda f: index(f, weight_map={}), DamagedFile, "weight_map must name"),
        (lambda f: index(f, weight_map=[]), DamagedFile, "weight_map must name"),
        (lambda f: index(f, weight_map={"a": "../x.safetensors"}), DamagedFile, "inside its"),
        (lambda f: index(f, weight_map={"a": "/x.safetensors"}), DamagedFile, "inside its folder"),
        (lambda f: index(f, weight_map={"a": 3}), DamagedFile, "weight_map must name"),
        (lambda f: index(f, weight_map={"a": "x.bin"}), DamagedFile, "weight_map must name"),
        (lambda f: index(f, weight_map={"a": "no.safetensors"}), DamagedFile, "is missing"),
        (
            lambda f: (f / "model.safetensors.index.json").write_text("[]"),
            DamagedFile,
            "holds list, expected a JSON object",
        ),
        (
            lambda f: tensors(f, lambda t: t.update(a_weight=torch.ones(2, dtype=torch.int8))),
            UserError,
            "a_weight is stored as I8: quantised",
        ),
        (lambda f: os.truncate(f / "model.safetensors", 9999), DamagedFile, "is truncated"),
        (lambda f: os.truncate(f / "model.safetensors", 0), DamagedFile, "is truncated"),
        (lambda f: config(f, transformers_weights="x.safetensors"), UserError, "names weights of"),
    ],
)
def test_weights_in_doubt_are_refused_by_name(folder, spoil, error, message):
    spoil(folder)
    refused(folder, error, message, plan_too="transformers_weights" in message)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: config(f, num_hidden_layers=1), "18 weights are left over .*layers.1"),
        (lambda f: config(f, num_hidden_layers=5), "18 weights are missing"),
        (lambda f: config(f, vocab_size=60), "2 weights are missing or have another shape .*lm_"),
        (lambda f: config(f, intermediate_size=40), "9 weights are missing or have another shape"),
        (lambda f: tensors(f, lambda t: t.update(a=torch.ones(2))), r"1 weights are left over \(a"),
        (lambda f: tensors(f, lambda t: t.pop("lm_head.weight")), "1 weights are missing"),
        (lambda f: tensors(f, lambda t: first(t, torch.nan)), "layers.1.mlp.up_proj.* a NaN"),
        (lambda f: tensors(f, lambda t: first(t, -torch.inf)), "layers.1.mlp.up_proj.* an inf"),
    ],
)
def test_weights_that_do_not_fill_their_architecture_are_refused(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DamagedFile, match=message) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_an_expert_too_many_is_left_over(tmp_path):
    folder = saved(tmp_path / "model", "qwen2_moe")
    config(folder, num_experts=5)
    with pytest.raises(UserError, match="left over|another shape|does not load"):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: (f / "config.json").write_text("[]"), DamagedFile, "holds list"),
        (lambda f: (f / "config.json").write_text("[" * 99999), DamagedFile, "is not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), DamagedFile, "is not valid JSON"),
        (lambda f: (f / "tokenizer_config.json").write_text("3"), DamagedFile, "holds int"),
        (lambda f: config(f, num_hidden_layers=0), UserError, "num_hidden_layers is 0, expected 1"),
        (lambda f: config(f, num_hidden_layers=-1), UserError, "is -1, expected 1"),
        (lambda f: config(f, num_attention_heads=0), UserError, "num_attention_heads is 0"),
        (lambda f: config(f, vocab_size=-4), UserError, "vocab_size is -4"),
        (
            lambda f: config(f, quantization_config={"quant_method": "bitsandbytes"}),
            UserError,
            "the checkpoint is quantised .*'bitsandbytes'",
        ),
        (
            lambda f: config(f, quantization_config={"quant_method": "own"}),
            UserError,
            "the checkpoint is quantised .*'own'",
        ),
        (lambda f: config(f, model_type="nonsense"), UserError, "does not know"),
        (lambda f: (f / "config.json").unlink(), DamagedFile, "config.json is missing"),
    ],
)
def test_a_configuration_that_is_no_models_is_refused(folder, spoil, error, message):
    spoil(folder)
    refused(folder, error, message)


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 7},
        {"hidden_size": 48.5},
        {"num_hidden_layers": "three"},
        {"hidden_act": "nonsense"},
        {"rms_norm_eps": "small"},
        {"rope_parameters": {"rope_type": "nonsense"}},
        {"_attn_implementation": "nonsense"},
        {"_attn_implementation": "flash_attention_2"},
        {"model_type": "vit"},
    ],
    ids=str,
)
def test_what_transformers_cannot_build_is_one_line(folder, changes):
    """In the plan as in the count."""
    config(folder, **changes)
    profile = Profile(
        name="own", dataset="tiny", pairs=(Pair(name="own", base=str(folder), tuned=str(folder)),)
    )
    for use in (lambda: load_model(str(folder)), lambda: plan.plan(profile)):
        with pytest.raises(UserError) as caught:
            use()
        assert "\n" not in str(caught.value)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path):
    with pytest.raises(UserError, match="46 tokens, the model 40 embeddings"):
        load_model(str(saved(tmp_path / "model", vocab_size=40)))


# ---- fingerprints ----


@pytest.mark.parametrize(
    "name",
    [
        *("generation_config.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
        *("vocab.json", "tokenizer.model", "chat_template.jinja", "words.tiktoken"),
        "additional_chat_templates/tool.jinja",
    ],
)
def test_whatever_can_change_a_count_changes_the_fingerprint(folder, name):
    seen = [fingerprint(folder)]
    (folder / name).parent.mkdir(exist_ok=True)
    for content in ("{}", '{"a": 1}'):
        (folder / name).write_text(content)
        seen.append(fingerprint(folder))
    assert len(set(seen)) == 3


def test_notes_and_other_layouts_that_nobody_reads_leave_the_fingerprint_alone(folder):
    before = fingerprint(folder)
    for name in ("training_record.json", "README.md", "consolidated.safetensors", "own.py"):
        (folder / name).write_text("{}")
    assert fingerprint(folder) == before


def test_the_fingerprint_is_of_the_file_that_is_loaded(folder, tmp_path):
    """Also through links that lead out of the folder, as in the hub's cache."""
    before = fingerprint(folder)
    blob = shutil.move(folder / "model.safetensors", tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(blob)
    assert fingerprint(folder) == before
    assert torch.equal(load_model(str(folder))[0](IDS).logits, zoo.build("llama")(IDS).logits)
    other = saved(tmp_path / "other", seed=1) / "model.safetensors"
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(other)
    assert fingerprint(folder) != before


# ---- names ----


def test_a_local_folder_has_no_revision(folder):
    refused_line = "has no revision 'main': only hub ids have"
    for use in (load_model, locate, configuration):
        with pytest.raises(UserError, match=refused_line):
            use(str(folder), revision="main")


@pytest.mark.parametrize(
    "ref", ["/nowhere/model.gguf", "data/none/x.gguf", "/etc/hostname", "~/" + "x" * 300]
)
def test_a_path_that_is_no_checkpoint_is_one_line(ref):
    with pytest.raises(UserError, match="neither a folder nor a .gguf file"):
        load_model(ref)


def test_a_plan_downloads_no_weights(folder, monkeypatch):
    asked = []

    def download(ref, revision, allow_patterns, ignore_patterns):
        asked.append((ref, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(checkpoints.huggingface_hub, "snapshot_download", download)
    (folder / "model.safetensors").unlink()
    pairs = (
        Pair(name="pair", base="a/b", tuned="a/c", base_revision="one"),
        Pair(name="single", base=None, tuned="a/c", tuned_revision="two"),
    )
    table = plan.plan(Profile(name="own", dataset="tiny", pairs=pairs))
    parameters = sum(p.numel() for p in zoo.build("llama").parameters())
    assert table["parameters"].tolist() == [parameters] * 2
    read = [("a/c", None), ("a/b", "one"), ("a/c", "two")]
    assert [(ref, revision) for ref, revision, _ in asked] == read
    assert not any("safetensors" in pattern for *_, patterns in asked for pattern in patterns)


def test_a_plan_counts_only_the_experts_that_a_token_goes_through(tmp_path):
    """Two of six: a third of their weights."""
    folder = saved(tmp_path / "model", "mixtral")
    model = zoo.build("mixtral")
    bank = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    whole = sum(p.numel() for p in model.parameters())
    assert plan._in_use(model, plan.find_sites(model)) == pytest.approx(whole - bank * 4 / 6)
    pair = Pair(name="own", base=str(folder), tuned=str(folder))
    table = plan.plan(Profile(name="own", dataset="tiny", pairs=(pair,)))
    assert table["routed experts"].item() == 18
    assert table["core hours"].item() > 0


def test_a_pair_with_a_nan_is_no_pair():
    base, tuned = zoo.build("llama"), zoo.build("llama")
    with torch.no_grad():
        tuned.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match="layers.1.mlp have a cosine of nan"):
        check_pair((base, zoo.tokenizer()), (tuned, zoo.tokenizer()))


# ---- adapters ----


@pytest.fixture
def adapter(folder, tmp_path):
    """(folder of an adapter, the logits of base and adapter)."""
    torch.manual_seed(1)
    places = ["down_proj", "q_proj"]
    adapted = get_peft_model(
        zoo.build("llama"), LoraConfig(r=4, target_modules=places, init_lora_weights=False)
    ).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=str(folder))
    with torch.no_grad():
        return tmp_path / "adapter", adapted(IDS).logits


def test_an_adapter_is_merged_into_its_base_and_said(adapter, folder):
    place, logits = adapter
    model, _ = load_model(str(place))
    assert not isinstance(model, PeftModel)
    assert torch.allclose(model(IDS).logits, logits, atol=1e-5)
    assert not torch.allclose(model(IDS).logits, zoo.build("llama")(IDS).logits, atol=1e-2)
    assert model.source["note"] == f"adapter merged into {folder}"
    assert configuration(str(place)).intermediate_size == zoo.N


@pytest.mark.parametrize(
    "kind",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    ],
)
def test_an_adapter_that_changes_no_weights_is_said(kind, folder, tmp_path):
    place = tmp_path / "adapter"
    get_peft_model(zoo.build("llama"), kind).save_pretrained(place)
    edit(place / "adapter_config.json", base_model_name_or_path=str(folder))
    with pytest.raises(UserError, match="of the kind PR.*cannot be merged") as error:
        load_model(str(place))
    assert not isinstance(error.value, DamagedFile)


def test_an_adapters_fingerprint_knows_its_base(adapter, folder):
    place, seen = adapter[0], {fingerprint(adapter[0])}
    tensors(folder, lambda found: first(found, 9.0))
    seen.add(fingerprint(place))
    edit(place / "adapter_config.json", lora_alpha=99)
    assert len(seen | {fingerprint(place)}) == 3


def no_base(place, folder):
    edit(place / "adapter_config.json", base_model_name_or_path=None)


def base_gone(place, folder):
    shutil.rmtree(folder)


def base_is_adapter(place, folder):
    edit(place / "adapter_config.json", base_model_name_or_path=str(place))


def both(place, folder):
    shutil.copy(folder / "config.json", place)


def imports(place, folder):
    edit(place / "adapter_config.json", megatron_config={"a": 1}, megatron_core="own")


def other_base(place, folder):
    saved(folder, intermediate_size=40)


def half(place, folder):
    file = place / "adapter_model.safetensors"
    found = load_file(file)
    save_file(dict(list(found.items())[:-1]), file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_base, "names no base model"),
        (base_gone, "is an adapter of .*does not exist"),
        (base_is_adapter, "itself an adapter. Merge that one first"),
        (both, "holds both config.json and adapter_config.json"),
        (imports, "Foreign code is never run"),
        (other_base, "does not fit"),
        (half, "does not fit .*weights without a counterpart"),
        (lambda place, folder: (place / "adapter_model.safetensors").unlink(), "is missing"),
    ],
)
def test_an_adapter_that_does_not_fit_is_one_line(adapter, folder, spoil, message):
    spoil(adapter[0], folder)
    with pytest.raises(UserError, match=message) as caught:
        load_model(str(adapter[0]))
    assert "\n" not in str(caught.value)


# ---- buffers, shards, names


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_buffer_that_is_not_finite_is_refused(tmp_path, family, value):
    place = saved(tmp_path / "model", family)
    weights = load_file(place / "model.safetensors")
    name = next(n for n in weights if n.endswith("e_score_correction_bias"))
    weights[name][1] = value
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(DamagedFile, match="e_score_correction_bias holds a NaN or an infinity"):
        load_model(str(place))


def test_a_weight_in_two_shards_is_refused(folder):
    index(folder)
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, weight = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: weight * 3}, second, {"format": "pt"})
    with pytest.raises(UserError, match=f"{name} stands in {first.name} and in {second.name}"):
        load_model(str(folder))
