"""Models: loaded from proven checkpoints, compared as a pair, imitated at random."""

import re
import tempfile
import warnings
from itertools import chain
from pathlib import Path

import torch
from accelerate import dispatch_model
from accelerate.utils import align_module_device
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..record import DamagedFile, UserError
from .checkpoints import (
    ADAPTER_WEIGHTS,
    TOKENIZERS,
    base_of,
    fingerprint,
    locate,
    locate_base,
    model_name,
    weight_files,
)
from .gguf_files import BAD, conversion, one_line, quiet, say
from .sites import find_sites
from .tokens import check_tokenizer

__all__ = ["check_pair", "fingerprint", "load_model", "locate", "random_twin", "weight_files"]

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
CONSTANT = re.compile(r"bias$|norm[^.]*\.weight$", re.IGNORECASE)  # may start so, of any shape


def load_model(ref: str, *, dtype: str = "float32", device_map=None, revision: str | None = None):
    """(model, tokenizer) of a checkpoint under any of the names that `locate` knows, in evaluation
    mode; on the CPU unless `device_map` says else. An adapter is merged into its base.

    `dtype` is a key of DTYPES. `model.source` keeps what was loaded: ref, commit, dtype and, for a
    model that is not what its files say by themselves, a note, which is printed once as well.
    Raises UserError for whatever would not be the model meant: see locate, find_sites,
    check_tokenizer, and weights that do not fill the architecture, are left over, or are not
    finite. (Ours.)
    """
    ref = model_name(ref)
    if dtype not in DTYPES:
        raise UserError(
            f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}. Correct it in the profile's "
            "pair."
        )
    if "cuda" in str(device_map) and not torch.cuda.is_available():
        raise UserError(
            f"device_map is {device_map!r}, but torch {torch.__version__} sees no GPU. Use null or "
            "auto."
        )
    folder, commit = locate(ref, revision)
    spill = tempfile.TemporaryDirectory(prefix="offload-") if device_map else None
    whole, tokenizer = _whole(folder), load_tokenizer(ref, revision)
    try:
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                whole,
                dtype=DTYPES[dtype],
                device_map=device_map,
                offload_folder=spill and spill.name,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # to name them, see below
                trust_remote_code=False,
                use_safetensors=True,
            )
    except BAD as error:
        raise UserError(
            f"{ref!r} does not load as a causal language model: {one_line(error)}"
        ) from error
    _refuse_misfits(ref, model, info)
    note = conversion(whole).get("note")
    if whole != folder:
        model, note = _merged(model, folder), f"adapter merged into {base_of(folder)[0]}"
    find_sites(model)
    check_tokenizer(tokenizer, model)
    model.source = {"ref": ref, "commit": commit, "dtype": dtype}
    if note:
        model.source["note"] = note
        say(f"{ref}: {note}")
    model.spill = spill  # weights on disk live as long as the model
    return model.eval(), tokenizer


def load_tokenizer(ref: str, revision: str | None = None):
    """The tokenizer of a checkpoint; of an adapter that brings none, its base's."""
    ref = model_name(ref)
    folder, _ = locate(ref, revision)
    own = any((folder / name).is_file() for name in TOKENIZERS)
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(
                folder if own else _whole(folder), trust_remote_code=False
            )
    except BAD as error:
        raise UserError(f"{ref!r}: its tokenizer does not load: {one_line(error)}") from error


def _whole(folder: Path) -> Path:
    """The folder whose weights are whole: a checkpoint's own, an adapter's base's."""
    return locate_base(folder) if base_of(folder) else folder


def _refuse_misfits(ref, model, info) -> None:
    """Raise DamagedFile unless every weight of the architecture came from the files, every weight
    of the files went into it, and all are finite, buffers that files keep (a router's correction
    bias) among them.
    """
    random = sorted(info["missing_keys"]) + sorted(str(key[0]) for key in info["mismatched_keys"])
    if random:
        raise DamagedFile(
            f"{ref!r}: {len(random)} weights are missing or have another shape "
            f"({', '.join(random[:3])}); they would be random. Check that config.json belongs to "
            "these weights."
        )
    if left := sorted(info["unexpected_keys"]):
        raise DamagedFile(
            f"{ref!r}: {len(left)} weights are left over ({', '.join(left[:3])}): config.json "
            "describes a smaller or another model. Check that it belongs to these weights."
        )
    kept = model.state_dict(keep_vars=True)
    buffers = ((n, b) for n, b in model.named_buffers() if n in kept and b.is_floating_point())
    for name, weight in chain(model.named_parameters(), buffers):
        if weight.numel() and not weight.is_meta and not _finite(weight.detach()):
            raise DamagedFile(
                f"{ref!r}: {name} holds a NaN or an infinity in {weight.dtype}. Copy the "
                "checkpoint again, or load it as float32."
            )


def _finite(weight) -> bool:
    return all(bool(end.isfinite()) for end in torch.aminmax(weight))


def _merged(model, folder: Path):
    """A base with an adapter's weights added into its own. Raises DamagedFile unless the adapter's
    file and the adapter's places in the base hold the same names, UserError for an adapter that is
    no change of weights.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing keys: compared below
            adapted = PeftModel.from_pretrained(model, folder)
        if not hasattr(adapted.base_model, "merge_and_unload"):
            kind = adapted.active_peft_config.peft_type.value
            raise UserError(
                f"the adapter {folder} is of the kind {kind}: it changes no weights and cannot "
                "be merged into its base. Use a LoRA adapter, or a whole checkpoint."
            )
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            differ = set(file.keys()) ^ set(get_peft_model_state_dict(adapted))
        if differ:
            raise ValueError(f"weights without a counterpart: {', '.join(sorted(differ)[:3])}")
        return adapted.merge_and_unload(safe_merge=True)
    except BAD as error:
        raise DamagedFile(
            f"the adapter {folder} does not fit {base_of(folder)[0]!r}: {one_line(error)}"
        ) from error


def random_twin(model, seed: int = 0, free: bool = False):
    """A model of the same architecture and dtype with random weights: what the tokens alone
    explain (a control). No matrix is a constant, whatever transformers starts it with.

    It stands where `model` stands, on one device or several. `free` gives up the weights of
    `model` first, so that never two models fill the memory.
    """
    dtype, device, places = model.dtype, model.device, getattr(model, "hf_device_map", {})
    if free:
        for weight in model.parameters():
            weight.data = weight.new_empty(0)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        twin = AutoModelForCausalLM.from_config(
            model.config, dtype=dtype, trust_remote_code=False
        ).eval()
        _redraw_constants(twin)
    if len(set(places.values())) > 1 and "disk" not in places.values():
        return dispatch_model(twin, places)
    return twin if device.type == "meta" else twin.to(device)


@torch.no_grad()
def _redraw_constants(twin) -> None:
    """Normal weights for every matrix that is one number throughout: AFMoE's router is zeros and
    would send every token to the same experts. Biases and the scales of norms stay.
    """
    text = twin.config.get_text_config(decoder=True)
    std = getattr(text, "initializer_range", None) or 0.02
    for name, weight in twin.named_parameters():
        if weight.dim() > 1 and weight.numel() > 1 and not CONSTANT.search(name):
            low, high = weight.aminmax()
            if low == high:
                weight.normal_(std=std)


def unlike(model, other) -> list[str]:
    """What two models of a pair share, and these do not: keys of their configurations (those apart
    that a tuning may change), "parameters" for names and shapes of their weights.
    """
    one, two = model.config.to_dict(), other.config.to_dict()
    keys = (one.keys() | two.keys()) - MAY_DIFFER
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, other)]
    differ = sorted(key for key in keys if one.get(key) != two.get(key))
    return differ + ["parameters"] * (shapes[0] != shapes[1])


def check_pair(base, tuned, lowest: float = 0.1) -> list[dict]:
    """Are two (model, tokenizer) a pair, one tuned from the other? Per site: cosine and relative
    change of weights.

    Returns [{"layer", "family", "cosine" in [-1, 1], "change" = |tuned - base| / |base|}]. Raises
    UserError if parameters, configuration or token ids differ, or a cosine is below `lowest`
    (unrelated weights: about 0). (Ours.)
    """
    (model, tokenizer), (other, tokenizer2), table = base, tuned, []
    words, words2 = tokenizer.get_vocab(), tokenizer2.get_vocab()
    probe = "Instruction: add 12 and 7.\n\nResponse: Größe, naïve; 北京 — ok"
    differ = unlike(model, other) + ["token ids"] * (
        any(words2.get(word) != i for word, i in words.items())
        or tokenizer(probe)["input_ids"] != tokenizer2(probe)["input_ids"]
    )
    if differ:
        raise UserError(
            f"base and tuned model differ in {', '.join(differ)}: they are no pair, and no "
            "component of one can be called the same in the other. Correct `base` and `tuned` in "
            "the profile."
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
        if not table[-1]["cosine"] >= lowest:  # a NaN is no pair either
            raise UserError(
                f"the weights of {site.name} have a cosine of {table[-1]['cosine']:.3f} between "
                f"base and tuned, expected {lowest} or more: neither was tuned from the other. "
                "Correct the pair."
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
