"""Causal language models: load one, check that two are a pair, encode instructions with position masks, generate."""

import tempfile
from dataclasses import dataclass

import torch
from accelerate import dispatch_model
from accelerate.utils import align_module_device
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.checkpoints import locate
from helpers.record import DamagedFile, UserError
from helpers.sites import find_sites, input_device

DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16")}
MAY_DIFFER = {"_name_or_path", "transformers_version", "dtype", "architectures", "use_cache", "bos_token_id",
              "eos_token_id", "pad_token_id", "max_position_embeddings", "max_window_layers", "initializer_range",
              "router_aux_loss_coef", "output_router_logits", "attention_dropout"}


def load_model(ref: str, *, dtype: str = "float32", device_map=None, revision: str | None = None):
    """(model, tokenizer) of a local folder or hub id, in evaluation mode; on the CPU unless `device_map` says else.

    `dtype` is a key of DTYPES; `model.source` keeps what was loaded. Raises UserError for whatever would not be the
    model meant: see locate, find_sites, check_tokenizer, and weights that do not fill the architecture. (Ours.)
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}. Correct it in the profile's pair.")
    if "cuda" in str(device_map) and not torch.cuda.is_available():
        raise UserError(f"device_map is {device_map!r}, but torch {torch.__version__} sees no GPU. Use null or auto.")
    (folder, commit), spill = locate(ref, revision), tempfile.TemporaryDirectory(prefix="offload-")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype], device_map=device_map,
                                                           offload_folder=spill.name, output_loading_info=True)
    except (ValueError, OSError, KeyError) as error:
        raise UserError(f"{ref!r} does not load as a causal language model with its tokenizer: {error}") from error
    if wrong := sorted(info["missing_keys"]) + sorted(str(key) for key in info["mismatched_keys"]):
        raise DamagedFile(f"{ref!r}: {len(wrong)} weights are missing or have another shape ({', '.join(wrong[:3])}); "
                          "they would be random. Check that config.json belongs to these weights.")
    find_sites(model)
    check_tokenizer(tokenizer, model)
    model.source = {"ref": ref, "commit": commit, "dtype": dtype}
    model.spill = spill                                                # weights on disk live as long as the model
    return model.eval(), tokenizer


def check_tokenizer(tokenizer, model) -> None:
    """Raise UserError if the tokenizer gives no character offsets, or has more words than the model embeddings."""
    if not tokenizer.is_fast:
        raise UserError(f"{type(tokenizer).__name__} gives no character offsets: the instruction's own tokens cannot "
                        "be told from the template's. Use a fast tokenizer (one with a tokenizer.json).")
    rows = model.get_input_embeddings().num_embeddings
    if tokenizer.vocab_size > rows:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model {rows} embeddings: they do not "
                        "belong together. Load both from one checkpoint.")


def random_twin(model, seed: int = 0, free: bool = False):
    """A model of the same architecture and dtype with random weights: what the tokens alone explain (a control).

    It stands where `model` stands, on one device or several. `free` gives up the weights of `model` first, so that
    never two models fill the memory.
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
    """Are two (model, tokenizer) a pair, one tuned from the other? Per site: cosine and relative change of weights.

    Returns [{"layer", "family", "cosine" in [-1, 1], "change" = |tuned - base| / |base|}]. Raises UserError if
    parameters, configuration or token ids differ, or a cosine is below `lowest` (unrelated weights: about 0). (Ours.)
    """
    (model, tokenizer), (other, tokenizer2), table = base, tuned, []
    config, config2 = model.config.to_dict(), other.config.to_dict()
    words, words2 = tokenizer.get_vocab(), tokenizer2.get_vocab()
    probe = "Instruction: add 12 and 7.\n\nResponse: Größe, naïve; 北京 — ok"
    differ = sorted(k for k in (config.keys() | config2.keys()) - MAY_DIFFER if config.get(k) != config2.get(k))
    differ += ["parameters"] * ([(n, p.shape) for n, p in model.named_parameters()]
                                != [(n, p.shape) for n, p in other.named_parameters()])
    differ += ["token ids"] * (any(words2.get(word) != i for word, i in words.items())
                               or tokenizer(probe)["input_ids"] != tokenizer2(probe)["input_ids"])
    if differ:
        raise UserError(f"base and tuned model differ in {', '.join(differ)}: they are no pair, and no component of "
                        "one can be called the same in the other. Correct `base` and `tuned` in the profile.")
    for site, site2 in zip(find_sites(model), find_sites(other), strict=True):
        aa, bb, ab = _products(site.module, site2.module)
        table.append({"layer": site.layer, "family": site.family, "change": max(aa + bb - 2 * ab, 0) ** 0.5 / aa ** 0.5,
                      "cosine": ab / (aa * bb) ** 0.5})
        if table[-1]["cosine"] < lowest:
            raise UserError(f"the weights of {site.name} have a cosine of {table[-1]['cosine']:.3f} between base and "
                            f"tuned, expected {lowest} or more: neither was tuned from the other. Correct the pair.")
    return table


def _products(one, other) -> tuple[float, float, float]:
    """<a, a>, <b, b>, <a, b> of all weights of two modules of one shape, piece by piece; offloaded ones are fetched."""
    total = torch.zeros(3, dtype=torch.float64)
    for part, part2 in zip(one.modules(), other.modules(), strict=True):
        with align_module_device(part), align_module_device(part2):
            for p, q in zip(part.parameters(recurse=False), part2.parameters(recurse=False), strict=True):
                for a, b in zip(p.detach().flatten().split(2**22), q.detach().flatten().split(2**22), strict=True):
                    a, b = a.cpu().double(), b.cpu().double()
                    total += torch.stack([a @ a, b @ b, a @ b])
    return tuple(total.tolist())


@dataclass(frozen=True)
class Encoded:
    """One sequence: token ids [T], and for each token whether its activations are counted [T]."""

    ids: tuple[int, ...]
    counted: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """Padded sequences. `rows` [B] are their places in the list that was batched; masks [B, T] hold 0 and 1."""

    rows: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    count_mask: torch.Tensor


def encode(tokenizer, texts, *, template: str = "{instruction}", responses=None) -> list[Encoded]:
    """Token ids of template-wrapped texts, and which tokens count.

    Without `responses` those of the text itself count: neither BOS nor the template's words; a token that holds at
    least one character of the text is the text's. With responses, exactly theirs count: strings are read after the
    prompt and one space (none if the template ends in white space), lists of token ids are appended as they are.
    Raises UserError for an empty text or a text or response without a token of its own. (Paper, sec. counting.)

    >>> encode(tokenizer, ["Add 1 and 2."], template="Instruction: {instruction}")      # doctest: +SKIP
    [Encoded(ids=(1, 7, 8, 20, ...), counted=(False, False, False, True, ...))]
    """
    if template.count("{instruction}") != 1:
        raise UserError(f"template {template!r} must hold {{instruction}} once.")
    head, tail = template.split("{instruction}")
    gap, plain = "" if tail[-1:].isspace() else " ", [None] * len(texts)
    special = tokenizer.bos_token is None or not head.startswith(tokenizer.bos_token)
    encoded = []
    for row, (text, response) in enumerate(zip(texts, plain if responses is None else responses, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"text {row} is {text!r}: an empty instruction has no tokens to count. Remove the row.")
        prompt = head + text + tail
        start, end, full = len(head), len(head) + len(text), prompt
        if isinstance(response, str):
            start, full = len(prompt + gap), prompt + gap + response
            end = len(full)
        ids, counted = _marked(tokenizer, full, special, start, end)
        if response is not None and not isinstance(response, str):
            ids, counted = ids + list(response), [False] * len(ids) + [True] * len(response)
        elif not any(counted):
            raise UserError(f"text {row} ({full[:60]!r}) yields no counted token with {type(tokenizer).__name__}. "
                            "Remove the row, or use the tokenizer that belongs to the model.")
        encoded.append(Encoded(tuple(ids), tuple(counted)))
    return encoded


def _marked(tokenizer, full, special, start, end):
    """Token ids of `full`, without what a tokenizer puts behind it, and which of them hold a character of start:end.

    Some tokenizers trim white space from offsets until (of a code's indentation) nothing is left; such a token holds
    the characters since the last one.
    """
    tokens = tokenizer(full, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True)
    ids, added, counted, last = list(tokens["input_ids"]), tokens["special_tokens_mask"], [], 0
    for (a, b), extra in zip(tokens["offset_mapping"], added, strict=True):
        counted.append(not extra and max(a if a < b else min(last, a), start) < min(b, end))
        last = last if extra else max(last, b)
    size = max((i + 1 for i, extra in enumerate(added) if not extra), default=0)
    return ids[:size], counted[:size]


def batches(encoded: list[Encoded], batch_size: int = 32, side: str = "right"):
    """Yield Batches of at most `batch_size` sequences of like length, longest first, padded on `side`.

    Padding is what the attention mask says it is, never a token id (it is filled with id 0).
    """
    order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))
    for first in range(0, len(order), batch_size):
        rows = order[first:first + batch_size]
        length = len(encoded[rows[0]].ids)
        ids, mask, count = torch.zeros(3, len(rows), length, dtype=torch.long)                  # [B, T] each
        for b, row in enumerate(rows):
            n = len(encoded[row].ids)
            at = slice(0, n) if side == "right" else slice(length - n, length)
            ids[b, at], mask[b, at] = torch.tensor(encoded[row].ids), 1
            count[b, at] = torch.tensor(encoded[row].counted, dtype=torch.long)
        yield Batch(rows, ids, mask, count)


@torch.no_grad()
def generate(model, encoded: list[Encoded], *, max_new_tokens: int, batch_size: int = 32) -> list[list[int]]:
    """Greedy continuations as token ids, without the end-of-sequence token; order as given. Sampling and penalties that
    a chat model's own generation settings name are put aside meanwhile: base and tuned are decoded alike. (Ours.)"""
    own, out, device = model.generation_config, [[] for _ in encoded], input_device(model)
    stops = set(own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]) - {None}
    model.generation_config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=0,
                                               eos_token_id=own.eos_token_id)
    try:
        for batch in batches(encoded, batch_size, side="left"):
            ids = model.generate(batch.input_ids.to(device), attention_mask=batch.attention_mask.to(device))
            for row, new in zip(batch.rows, ids[:, batch.input_ids.shape[1]:].tolist(), strict=True):
                out[row] = new[:next((i for i, t in enumerate(new) if t in stops), len(new))]
    finally:
        model.generation_config = own
    return out
