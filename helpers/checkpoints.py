"""Checkpoint folders: find or download one, prove it whole, say which commit and which weights it holds."""

from functools import lru_cache
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

from helpers.paths import ROOT, short
from helpers.record import DamagedFile, UserError, digest, read_json, sha256

WANTED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]       # configuration, weights, tokenizer: no pickle
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")          # one of these must be there
UNWANTED = ["consolidated*", "original/*"]                                # the same weights in another layout


def locate(ref: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a checkpoint and the commit the hub resolved (None for a local folder).

    `ref` is a folder (absolute, or relative to the repository) or a hub id, which is downloaded once. Raises UserError
    when there is none to be had, DamagedFile when a file of it is missing or truncated (only headers are read). (Ours.)
    """
    folder, commit = ROOT / ref, None
    if not folder.is_dir():
        if ref.startswith((".", "/", "~", "data/")) or ref.count("/") > 1:
            raise UserError(f"checkpoint {short(folder)} does not exist: expected a folder with config.json and "
                            "*.safetensors. Run `make models`, or correct the path in the profile.")
        folder = Path(_download(ref, revision))
        commit = folder.name
    for path in [folder / "config.json", *weight_files(folder)]:
        if not path.is_file():
            raise DamagedFile(f"{short(path)} is missing. Expected config.json and safetensors weights (pickled "
                              f"weights are not loaded). Copy or download the checkpoint {ref!r} again.")
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except SafetensorError as error:
                raise DamagedFile(f"{short(path)} is truncated or not a safetensors file ({error}). Copy or download "
                                  f"the checkpoint {ref!r} again.") from error
    if not any((folder / name).is_file() for name in TOKENIZERS):      # transformers may make up an empty one
        raise DamagedFile(f"{short(folder)} has no tokenizer: expected one of {', '.join(TOKENIZERS)}. Copy or "
                          f"download the checkpoint {ref!r} again, tokenizer included.")
    return folder, commit


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, or the single one it must have."""
    index = folder / "model.safetensors.index.json"
    names = set(read_json(index)["weight_map"].values()) if index.is_file() else ["model.safetensors"]
    return [folder / name for name in sorted(names)]


def fingerprint(folder: Path) -> str:
    """One hex digest of everything in a checkpoint that can change a count: weights, config, tokenizer.

    Reads every byte (about a second per GB), once per process and version of the files.
    """
    small = [folder / name for name in ("config.json", "tokenizer_config.json", *TOKENIZERS)]
    return digest({path.name: _sha256(path, path.stat().st_mtime_ns, path.stat().st_size)
                   for path in weight_files(folder) + [path for path in small if path.is_file()]})


@lru_cache(maxsize=256)
def _sha256(path, modified, size):
    return sha256(path)


def _download(ref, revision) -> str:
    name = repr(ref) + (f" at revision {revision!r}" if revision else "")
    try:
        return huggingface_hub.snapshot_download(ref, revision=revision, allow_patterns=WANTED,
                                                 ignore_patterns=UNWANTED)
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: accept its licence on https://huggingface.co/{ref}, run `hf auth login` "
                        "(or set HF_TOKEN), then start again.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name} is neither a local folder nor a model that the hub shows you. Check the spelling in "
                        "the profile; for a private model run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name}: the hub has no such revision. Give a branch, tag or commit of {ref}.") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__}). "
                        "Connect, or download it elsewhere and name its folder in the profile.") from error
