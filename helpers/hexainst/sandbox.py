"""Programs a model wrote run in a caged process of their own: `run(program) -> Outcome`. Only
after an opt-in.

This file is both sides. The parent starts it as a script (`python -I -S`, empty environment, a
session of its own), sends the program through stdin and kills the whole group at the wall limit.
Nothing is written to disk, so nothing is left there whoever is killed. The child dies with its
parent: at once on Linux, elsewhere at the wall limit. It imports what the program may import
(MODULES), then seals itself for good, and only then executes it:

- limits (POSIX): CPU seconds, address space (not on macOS), written bytes, open files, no new
  process (this one does not bind root), no core file;
- audit (everywhere): a Python audit hook refuses every event not in QUIET: opening files, sockets,
  forking, spawning, signals, other imports, ctypes. It stops Python code, not a break-out through
  the interpreter's own memory;
- kernel (Linux on x86_64 and aarch64, no root needed): a seccomp filter leaves some thirty system
  calls. No file can be opened, no socket, process or thread made, no signal sent, whatever the
  program does. This layer is the wall.

Not contained: a program may cheat its own tests (they run in its process: what it says of itself
is its own result and no one else's), and may use CPU and memory up to the limits. Without the
kernel layer (macOS, other machines) a program can reach the system's C library through the
interpreter's frames; there `run` refuses unless asked for with `without_seccomp`. As root without
that layer, and on Windows, it always refuses.
"""

import ast
import json
import math
import os
import platform
import secrets
import signal
import struct
import subprocess
import sys
import tempfile
import time
from array import array
from contextlib import suppress
from dataclasses import dataclass, field

MODULES = {
    "abc",
    "array",
    "ast",
    "base64",
    "binascii",
    "bisect",
    "calendar",
    "cmath",
    "collections",
    "contextlib",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "difflib",
    "enum",
    "fractions",
    "functools",
    "hashlib",
    "heapq",
    "html",
    "io",
    "itertools",
    "json",
    "math",
    "numbers",
    "operator",
    "os",
    "queue",
    "random",
    "re",
    "statistics",
    "string",
    "struct",
    "sys",
    "textwrap",
    "time",
    "types",
    "typing",
    "unicodedata",
    "zlib",
}


LAZY = {
    "_strptime",
    "encodings.ascii",
    "encodings.latin_1",
}  # what modules above import at their first use
QUIET = {
    "array.__new__",
    "builtins.id",
    "code.__new__",
    "compile",
    "exec",
    "function.__new__",
    "gc.get_objects",
    "gc.get_referents",
    "gc.get_referrers",
    "marshal.dumps",
    "marshal.loads",
    "object.__delattr__",
    "object.__getattr__",
    "object.__setattr__",
    "sys._getframe",
    "sys._getframemodulename",
    "sys.excepthook",
    "sys.unraisablehook",
    "time.sleep",
}


# read write close fstat lseek mmap mprotect munmap brk rt_sigaction rt_sigprocmask rt_sigreturn
# mremap madvise
# sched_yield nanosleep getpid gettid exit exit_group gettimeofday clock_gettime clock_getres
# clock_nanosleep getrandom
# futex sigaltstack restart_syscall getrusage times writev (the numbers differ by machine)
CALLS = {
    "x86_64": (
        0xC000003E,
        (
            0,
            1,
            3,
            5,
            8,
            9,
            10,
            11,
            12,
            13,
            14,
            15,
            25,
            28,
            24,
            35,
            39,
            186,
            60,
            231,
            96,
            228,
            229,
            230,
            318,
            202,
            131,
            219,
            98,
            100,
            20,
        ),
    ),
    "aarch64": (
        0xC00000B7,
        (
            63,
            64,
            57,
            80,
            62,
            222,
            226,
            215,
            214,
            134,
            135,
            139,
            216,
            233,
            124,
            101,
            172,
            178,
            93,
            94,
            169,
            113,
            114,
            115,
            278,
            98,
            132,
            128,
            165,
            153,
            66,
        ),
    ),
}


PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38  # <linux/prctl.h>
SECCOMP_MODE_FILTER = 2


class Unavailable(Exception):
    """No sufficient cage on this platform."""


@dataclass(frozen=True)
class Outcome:
    """What became of a program: ok = it ran to its end without an error; `status` says what
    happened, in words.
    """

    ok: bool
    status: str
    refused: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    output: str = field(default="", repr=False)
    seconds: float = 0.0


def run(
    program: str, seconds: float = 4.0, megabytes: int = 512, without_seccomp: bool = False
) -> Outcome:
    """Run a Python program in the cage; always returns, at the latest after ten times `seconds` of
    wall time.

    seconds: CPU time. megabytes: address space. Output is cut at 1 MB; its first 2,000 characters
    are returned. without_seccomp: run it also where there is no kernel layer. Raises Unavailable
    where the platform cannot contain a program (see the module's text).

    >>> run("assert sorted([2, 1]) == [1, 2]").ok
    True
    >>> run("open('/etc/passwd')").refused
    ('open',)
    """
    if os.name != "posix":
        raise Unavailable(
            f"model-written code is not executed on {platform.system()}: no process limits there"
        )
    nonce, start = secrets.token_hex(16), time.monotonic()
    job = {
        "program": program,
        "nonce": nonce,
        "seconds": seconds,
        "megabytes": megabytes,
        "without_seccomp": without_seccomp,
        "parent": os.getpid(),
    }
    child, late, lines, printed = _converse(json.dumps(job).encode(), 10 * seconds)
    said = [line.removeprefix(nonce).split(" ", 1) for line in lines if line.startswith(nonce)]
    if said and said[0][0] == "unsafe":  # only the first word is the cage's for certain
        raise Unavailable(f"model-written code is not executed {said[0][1]}")
    refused = tuple(rest for kind, rest in said if kind == "refused")
    layers = next((tuple(rest.split()) for kind, rest in said if kind == "layers"), ())
    status = next((rest for kind, rest in said if kind == "end"), None)
    if status is None:
        status = f"stopped after {10 * seconds:g} s" if late else _death(child.returncode, printed)
    ok = status == "finished" and [kind for kind, _ in said].count("layers") == 1
    ok = ok and {kind for kind, _ in said} <= {"layers", "refused", "end"}
    return Outcome(ok, status, refused, layers, printed, time.monotonic() - start)


def _converse(job, limit):
    """Start the child, give it its job, wait: (the dead child, whether `limit` seconds were too
    few, the lines it said, what it printed).
    """
    reader, writer = os.pipe()
    with tempfile.TemporaryFile() as output, os.fdopen(reader, "rb") as verdict:
        try:
            child = subprocess.Popen(
                [sys.executable, "-I", "-S", "-B", os.path.abspath(__file__), str(writer)],
                cwd="/",
                env={},
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=[writer],
                start_new_session=True,
            )
        finally:
            os.close(writer)
        try:
            child.communicate(job, timeout=limit)
            late = False
        except subprocess.TimeoutExpired:
            late = True
        finally:
            _kill(child)
        os.set_blocking(reader, False)
        lines = (verdict.read(1 << 16) or b"").decode(errors="replace").splitlines()
        output.seek(0)
        return child, late, lines, output.read(2000).decode(errors="replace")


def _kill(child):
    with suppress(ProcessLookupError, PermissionError):  # gone already; macOS says EPERM for that
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _death(code, printed):
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"killed by {names.get(-code, -code)}" + (
            " (CPU limit)" if -code == signal.SIGXCPU else ""
        )
    return f"left with exit code {code} before its end" + (
        f": {printed.strip()[-200:]}" if code else ""
    )


def _child(channel):
    prctl = _prctl()
    if prctl:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    job = json.load(sys.stdin)
    if os.getppid() != job["parent"]:  # it died before it could be followed
        os._exit(1)
    say = _speaker(channel, job["nonce"])
    layers = ["limits", "audit"]
    _limit(job["seconds"], job["megabytes"])
    try:
        tree = ast.parse(job["program"])
        code = compile(tree, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        say("end", f"does not parse: {error}")
        return
    _preload(tree)
    if _filter(prctl):
        layers.append("kernel")
    elif os.geteuid() == 0:
        say("unsafe", "as root without the kernel's filter. Use an ordinary account.")
        return
    elif not job["without_seccomp"]:
        say("unsafe", "without the kernel's filter (seccomp), which is missing here.")
        return
    _watch(say)
    say("layers", " ".join(layers))
    try:
        exec(code, {"__name__": "__main__"})
        sys.stdout.flush()
        status = "finished"
    except (
        BaseException
    ) as error:  # whatever the program raised, SystemExit included, is its result
        status = f"{type(error).__name__}: {str(error)[:300]}"
    say("end", status)


def _speaker(channel, nonce):
    write = os.write

    def say(kind, text):
        write(channel, f"{nonce}{kind} {' '.join(text.split())}\n".encode(errors="replace"))

    return say


def _preload(tree):
    names = set(LAZY)
    for node in ast.walk(tree):
        found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names |= {name for name in found if name.split(".")[0] in MODULES}
    for name in names:
        with suppress(ImportError):  # the program meets the same error at its own import
            __import__(name)


def _limit(seconds, megabytes):
    import resource  # POSIX only, while this file must import everywhere

    cpu = math.ceil(seconds)
    limits = {
        "CPU": cpu,
        "AS": megabytes << 20,
        "FSIZE": 1 << 20,
        "NOFILE": 16,
        "CORE": 0,
        "NPROC": 0,
    }
    if sys.platform == "darwin":  # refuses this one
        del limits["AS"]
    for name, limit in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        limit = limit if hard == resource.RLIM_INFINITY else min(limit, hard)
        resource.setrlimit(kind, (limit, limit + 1 if name == "CPU" and limit == cpu else limit))
    sys.modules.pop("resource")
    signal.alarm(10 * cpu + 1)  # the wall limit, should no parent be there to see to it


def _watch(say):
    """Install the audit hook; what it refuses is said to the parent at once, each kind of event a
    single time.
    """
    for name in set(sys.modules) & {
        "ctypes",
        "_ctypes",
        "subprocess",
        "_posixsubprocess",
        "tempfile",
        "shutil",
    }:
        del sys.modules[name]  # a second import would raise no event
    seen = set()

    def hook(event, details):
        if event in QUIET:
            return
        if event not in seen and len(seen) < 20:
            seen.add(event)
            say("refused", event + (f" {details[0]}"[:60] if event == "import" else ""))
        raise PermissionError(f"refused: {event}")

    sys.addaudithook(hook)


def _prctl():
    """Linux's prctl(option, ...) for this process; None elsewhere."""
    if sys.platform != "linux":
        return None
    import ctypes  # only here: where it is not needed, no program can find it in memory

    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int] + [ctypes.c_ulong] * 4
    return prctl


def _filter(prctl):
    """Install the seccomp filter: calls in CALLS pass, all others fail with EPERM. False where
    there is none.
    """
    if prctl is None or platform.machine() not in CALLS:
        return False
    arch, calls = CALLS[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    steps = [(load, 0, 0, 4), (equal, 1, 0, arch), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(equal, len(calls) - i, 0, number) for i, number in enumerate(calls)]
    steps += [(give, 0, 0, 0x00050001), (give, 0, 0, 0x7FFF0000)]
    code = array("B", b"".join(struct.pack("HBBI", *step) for step in steps))
    program = array("B", struct.pack("HP", len(steps), code.buffer_info()[0]))
    return (
        prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
        and prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program.buffer_info()[0], 0, 0) == 0
    )


if __name__ == "__main__":
    _child(int(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
