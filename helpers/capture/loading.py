"""Checkpoints and the models in them: found, proven whole, loaded, compared as a pair, imitated at
random.
"""

import tempfile
from functools import lru_cache
from pathlib import Path

import huggingface_hub
import torch
from accelerate import dispatch_model
from accelerate.utils import align_module_device
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..paths import ROOT, short
from ..record import DamagedFile, UserError, digest, read_json, sha256
from .sites import find_sites
from .tokens import check_tokenizer

WANTED = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
]  # configuration, weights, tokenizer: no pickle
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of these must be there
UNWANTED = ["consolidated*", "original/*"]  # the same weights in another layout


def locate(ref: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a checkpoint and the commit the hub resolved (None for a local folder).

    `ref` is a folder (absolute, or relative to the repository) or a hub id, which is downloaded
    once. Raises UserError when there is none to be had, DamagedFile when a file of it is missing
    or truncated (only headers are read). (Ours.)
    """
    folder, commit = ROOT / ref, None
    if not folder.is_dir():
        if ref.startswith((".", "/", "~", "data/")) or ref.count("/") > 1:
            raise UserError(
                f"checkpoint {short(folder)} does not exist: expected a folder with config.json and "
                "*.safetensors. Run `make models`, or correct the path in the profile."
            )
        folder = Path(_download(ref, revision))
        commit = folder.name
    for path in [folder / "config.json", *weight_files(folder)]:
        if not path.is_file():
            raise DamagedFile(
                f"{short(path)} is missing. Expected config.json and safetensors weights (pickled "
                f"weights are not loaded). Copy or download the checkpoint {ref!r} again."
            )
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt") as file:
                    file.keys()
            except SafetensorError as error:
                raise DamagedFile(
                    f"{short(path)} is truncated or not a safetensors file ({error}). Copy or download "
                    f"the checkpoint {ref!r} again."
                ) from error
    if not any(
        (folder / name).is_file() for name in TOKENIZERS
    ):  # transformers may make up an empty one
        raise DamagedFile(
            f"{short(folder)} has no tokenizer: expected one of {', '.join(TOKENIZERS)}. Copy or "
            f"download the checkpoint {ref!r} again, tokenizer included."
        )
    return folder, commit


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that the folder's index names, or the single one it must have."""
    index = folder / "model.safetensors.index.json"
    names = (
        set(read_json(index)["weight_map"].values()) if index.is_file() else ["model.safetensors"]
    )
    return [folder / name for name in sorted(names)]


def fingerprint(folder: Path) -> str:
    """One hex digest of everything in a checkpoint that can change a count: weights, config,
    tokenizer.

    Reads every byte (about a second per GB), once per process and version of the files.
    """
    small = [folder / name for name in ("config.json", "tokenizer_config.json", *TOKENIZERS)]
    return digest(
        {
            path.name: _sha256(path, path.stat().st_mtime_ns, path.stat().st_size)
            for path in weight_files(folder) + [path for path in small if path.is_file()]
        }
    )


@lru_cache(maxsize=256)
def _sha256(path, modified, size):
    return sha256(path)


def _download(ref, revision) -> str:
    name = repr(ref) + (f" at revision {revision!r}" if revision else "")
    try:
        return huggingface_hub.snapshot_download(
            ref, revision=revision, allow_patterns=WANTED, ignore_patterns=UNWANTED
        )
    except GatedRepoError as error:
        raise UserError(
            f"{name} is gated: accept its licence on https://huggingface.co/{ref}, run `hf auth login` "
            "(or set HF_TOKEN), then start again."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{name} is neither a local folder nor a model that the hub shows you. Check the spelling in "
            "the profile; for a private model run `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name}: the hub has no such revision. Give a branch, tag or commit of {ref}."
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise UserError(
            f"{name} is not in the local cache and the hub cannot be reached ({type(error).__name__}). "
            "Connect, or download it elsewhere and name its folder in the profile."
        ) from error


DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
MAY_DIFFER = {
    "_name_or_path",
    "transformers_version",
    "dtype",
    "architectures",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_position_embeddings",
    "max_window_layers",
    "initializer_range",
    "router_aux_loss_coef",
    "output_router_logits",
    "attention_dropout",
}


def load_model(ref: str, *, dtype: str = "float32", device_map=None, revision: str | None = None):
    """(model, tokenizer) of a local folder or hub id, in evaluation mode; on the CPU unless
    `device_map` says else.

    `dtype` is a key of DTYPES; `model.source` keeps what was loaded. Raises UserError for whatever
    would not be the model meant: see locate, find_sites, check_tokenizer, and weights that do not
    fill the architecture. (Ours.)
    """
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}. Correct it in the profile's pair."
        )
    if "cuda" in str(device_map) and not torch.cuda.is_available():
        raise UserError(
            f"device_map is {device_map!r}, but torch {torch.__version__} sees no GPU. Use null or auto."
        )
    (folder, commit), spill = locate(ref, revision), tempfile.TemporaryDirectory(prefix="offload-")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=DTYPES[dtype],
            device_map=device_map,
            offload_folder=spill.name,
            output_loading_info=True,
        )
    except (ValueError, OSError, KeyError) as error:
        raise UserError(
            f"{ref!r} does not load as a causal language model with its tokenizer: {error}"
        ) from error
    if wrong := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise DamagedFile(
            f"{ref!r}: {len(wrong)} weights are missing or have another shape ({', '.join(wrong[:3])}); "
            "they would be random. Check that config.json belongs to these weights."
        )
    find_sites(model)
    check_tokenizer(tokenizer, model)
    model.source = {"ref": ref, "commit": commit, "dtype": dtype}
    model.spill = spill  # weights on disk live as long as the model
    return model.eval(), tokenizer


def random_twin(model, seed: int = 0, free: bool = False):
    """A model of the same architecture and dtype with random weights: what the tokens alone
    explain (a control).

    It stands where `model` stands, on one device or several. `free` gives up the weights of
    `model` first, so that never two models fill the memory.
    """
    dtype, device, places = model.dtype, model.device, getattr(model, "hf_device_map", {})
    if free:
        for weight in model.parameters():
            weight.data = weight.new_empty(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = AutoModelForCausalLM.from_config(model.config, dtype=dtype).eval()
    if len(set(places.values())) > 1 and "disk" not in places.values():
        return dispatch_model(twin, places)
    return twin if device.type == "meta" else twin.to(device)


def check_pair(base, tuned, lowest: float = 0.1) -> list[dict]:
    """Are two (model, tokenizer) a pair, one tuned from the other? Per site: cosine and relative
    change of weights.

    Returns [{"layer", "family", "cosine" in [-1, 1], "change" = |tuned - base| / |base|}]. Raises
    UserError if parameters, configuration or token ids differ, or a cosine is below `lowest`
    (unrelated weights: about 0). (Ours.)
    """
    (model, tokenizer), (other, tokenizer2), table = base, tuned, []
    config, config2 = model.config.to_dict(), other.config.to_dict()
    words, words2 = tokenizer.get_vocab(), tokenizer2.get_vocab()
    probe = "Instruction: add 12 and 7.\n\nResponse: Größe, naïve; 北京 — ok"
    differ = sorted(
        k for k in (config.keys() | config2.keys()) - MAY_DIFFER if config.get(k) != config2.get(k)
    )
    differ += ["parameters"] * (
        [(n, p.shape) for n, p in model.named_parameters()]
        != [(n, p.shape) for n, p in other.named_parameters()]
    )
    differ += ["token ids"] * (
        any(words2.get(word) != i for word, i in words.items())
        or tokenizer(probe)["input_ids"] != tokenizer2(probe)["input_ids"]
    )
    if differ:
        raise UserError(
            f"base and tuned model differ in {', '.join(differ)}: they are no pair, and no component of "
            "one can be called the same in the other. Correct `base` and `tuned` in the profile."
        )
    for site, site2 in zip(find_sites(model), find_sites(other), strict=True):
        aa, bb, ab = _products(site.module, site2.module)
        table.append(
            {
                "layer": site.layer,
                "family": site.family,
                "change": max(aa + bb - 2 * ab, 0) ** 0.5 / aa**0.5,
                "cosine": ab / (aa * bb) ** 0.5,
            }
        )
        if table[-1]["cosine"] < lowest:
            raise UserError(
                f"the weights of {site.name} have a cosine of {table[-1]['cosine']:.3f} between base and "
                f"tuned, expected {lowest} or more: neither was tuned from the other. Correct the pair."
            )
    return table


def _products(one, other) -> tuple[float, float, float]:
    """<a, a>, <b, b>, <a, b> of all weights of two modules of one shape, piece by piece; offloaded
    ones are fetched.
    """
    total = torch.zeros(3, dtype=torch.float64)
    for part, part2 in zip(one.modules(), other.modules(), strict=True):
        with align_module_device(part), align_module_device(part2):
            for p, q in zip(
                part.parameters(recurse=False), part2.parameters(recurse=False), strict=True
            ):
                for a, b in zip(
                    p.detach().flatten().split(2**22),
                    q.detach().flatten().split(2**22),
                    strict=True,
                ):
                    a, b = a.cpu().double(), b.cpu().double()
                    total += torch.stack([a @ a, b @ b, a @ b])
    return tuple(total.tolist())
