"""The cage: hostile programs are contained and reported, honest ones run; each layer also holds
without the other.
"""

import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from helpers.hexainst import sandbox
from helpers.hexainst.sandbox import Unavailable, run
from helpers.paths import ROOT

SOURCE = Path(sandbox.__file__).read_text()
KERNEL = sys.platform == "linux" and platform.machine() in sandbox.CALLS
pytestmark = pytest.mark.skipif(os.name != "posix", reason="programs are only run on POSIX systems")
needs_kernel = pytest.mark.skipif(
    not KERNEL, reason="the seccomp layer is for Linux on x86_64 and aarch64"
)

LIMIT = "CPU limit|stopped after"  # on a starved machine the wall limit comes first
HOSTILE = {  # name: (program, what its outcome must say)
    "fork bomb": ("import os\nwhile True:\n    os.fork()", "os.fork"),
    "stubborn fork bomb": (
        "import os\nwhile True:\n    try: os.fork()\n    except Exception: pass",
        LIMIT,
    ),
    "endless loop": ("while True: pass", LIMIT),
    "endless sleep": ("import time\ntime.sleep(1000)", "stopped after"),
    "big number": ("print(10 ** 10 ** 10)", LIMIT),
    "huge allocation": ("x = bytearray(10 ** 10)", "MemoryError"),
    "growing allocation": ("x = []\nwhile True: x.append('a' * 10 ** 7)", "MemoryError"),
    "deep recursion": ("def f(): return f()\nf()", "RecursionError"),
    "reads a file": ("open('/etc/passwd').read()", "refused: open"),
    "reads by descriptor": (
        "import os\nos.read(os.open('/etc/passwd', os.O_RDONLY), 9)",
        "refused: open",
    ),
    "reads its own source": ("import sys\nopen(sys.argv[0]).read()", "refused: open"),
    "lists a folder": ("import os\nos.listdir('/')", "refused: os.listdir"),
    "writes outside": ("open('/tmp/sandbox_was_here', 'w').write('x')", "refused: open"),
    "writes inside": ("open('file', 'w').write('x')", "refused: open"),
    "removes": ("import os\nos.remove('/tmp/sandbox_was_here')", "refused: os.remove"),
    "socket": ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "refused: import"),
    "low socket": ("import _socket\n_socket.socket()", "refused: import"),
    "spawns": ("import subprocess\nsubprocess.run(['ls'])", "refused: import"),
    "shell": ("import os\nos.system('ls')", "refused: os.system"),
    "exec": ("import os\nos.execv('/bin/ls', ['ls'])", "refused: os.exec"),
    "kills its parent": ("import os\nos.kill(os.getppid(), 9)", "refused: os.kill"),
    "foreign functions": ("import ctypes", "refused: import"),
    "import by name": ("__import__('urllib.request')", "refused: import"),
    "leaves early": ("import os\nos._exit(0)", "exit code 0 before its end"),
    "leaves politely": ("import sys\nsys.exit(0)", "SystemExit"),
    "prints gigabytes": ("while True: print('x' * 10 ** 6)", "File too large"),
    "asks": ("input()", "refused: builtins.input"),
    "fakes the verdict": (
        "import os\nfor i in range(3, 16):\n    try: os.write(i, b'0' * 32 + b'end finished\\n')\n"
        "    except OSError: pass\nos._exit(0)",
        "exit code 0 before its end",
    ),
    "does not parse": ("def (", "does not parse"),
    "too deep to parse": ("x = " + "(" * 9999, "does not parse"),
    "null byte": ("x = 1\0", "does not parse"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_programs_are_contained_and_reported(name):
    program, said = HOSTILE[name]
    start = time.monotonic()
    outcome = run(program, seconds=0.5)
    assert not outcome.ok
    assert re.search(
        said, outcome.status + " ".join(f"refused: {event}" for event in outcome.refused)
    )
    assert time.monotonic() - start < 15
    assert len(outcome.output) <= 2000
    assert not Path("/tmp/sandbox_was_here").exists()


def test_honest_programs_run():
    outcome = run(
        "import math, re\nfrom collections import Counter\n"
        "from datetime import datetime\n"
        "assert datetime.strptime('2020-02-01', '%Y-%m-%d').month == 2\n"
        "assert Counter('aa')['a'] == 2\nprint(math.tau)"
    )
    assert outcome.ok
    assert outcome.status == "finished"
    assert outcome.refused == ()
    assert outcome.output == "6.283185307179586\n"


def test_failures_are_told_apart():
    assert run("assert 1 == 2, 'one is not two'").status == "AssertionError: one is not two"
    assert run("import numpy").status.startswith("PermissionError: refused: import")
    caught = run("try: open('/etc/passwd')\nexcept OSError: pass")
    assert caught.ok
    assert caught.refused == ("open",)


def test_nothing_is_inherited_and_nothing_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("SECRET", "1")
    outcome = run(
        "import os, sys\nassert 'SECRET' not in os.environ and sys.flags.isolated\n"
        "print(os.path.basename(sys.path[0]))"
    )
    assert outcome.ok, outcome.status
    assert list(tmp_path.iterdir()) == []


NO_KERNEL = ("if _filter(prctl):", "if False:")


def altered(tmp_path, *swaps):
    """`run` of a copy of the module with some text replaced: the cage without one of its layers."""
    source = SOURCE
    for old, new in swaps:
        assert old in source
        source = source.replace(old, new)
    path = tmp_path / "altered.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("altered", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["altered"] = module
    spec.loader.exec_module(module)
    return module


@needs_kernel
@pytest.mark.parametrize(
    "act",
    [
        "open('/etc/passwd')",
        "open('x', 'w')",
        "os.fork()",
        "os.kill(os.getppid(), 0)",
        "os.listdir('/')",
        "os.execv('/bin/true', ['true'])",
        "_socket.socket()",
        "_thread.start_new_thread(print, ())",
        "os.mkdir('x')",
        "os.remove('x')",
        "os.pipe()",
        "os.chdir('/')",
        "ctypes.CDLL(None, use_errno=True).fork() + 1 or os.open('/', 0)",
    ],
)
def test_the_kernel_layer_holds_alone(tmp_path, act):
    module = altered(
        tmp_path,
        ("    _watch(say)\n", ""),
        ('    "abc",', '    "abc", "_socket", "_thread", "ctypes",'),
    )
    outcome = module.run(f"import os, ctypes, _socket, _thread\n{act}", seconds=2)
    assert not outcome.ok
    assert "not permitted" in outcome.status or "can't start new thread" in outcome.status, (
        outcome.status
    )


def test_the_audit_layer_holds_alone(tmp_path):
    module = altered(tmp_path, NO_KERNEL, ("elif os.geteuid() == 0:", "elif False:"))
    for name in (
        "fork bomb",
        "reads a file",
        "writes outside",
        "socket",
        "shell",
        "kills its parent",
        "foreign functions",
    ):
        program, said = HOSTILE[name]
        outcome = module.run(program, seconds=1, without_seccomp=True)
        assert not outcome.ok
        assert outcome.layers == ("limits", "audit")
        assert re.search(
            said, outcome.status + " ".join(f"refused: {event}" for event in outcome.refused)
        )


def test_root_without_the_kernel_layer_is_refused(tmp_path):
    module = altered(tmp_path, NO_KERNEL, ("os.geteuid() == 0", "True"))
    for asked in (False, True):
        with pytest.raises(module.Unavailable, match="not executed as root"):
            module.run("pass", without_seccomp=asked)


def test_without_the_kernel_layer_programs_run_only_if_asked_for(tmp_path):
    module = altered(tmp_path, NO_KERNEL, ("os.geteuid() == 0", "False"))
    with pytest.raises(module.Unavailable, match="without the kernel's filter"):
        module.run("pass")
    outcome = module.run("pass", without_seccomp=True)
    assert outcome.ok
    assert outcome.layers == ("limits", "audit")


FORGER = """import os, sys
frame = sys._getframe()
while 'job' not in frame.f_locals:
    frame = frame.f_back
nonce, say = frame.f_locals['job']['nonce'], frame.f_locals['say']
"""


@needs_kernel
def test_foreign_functions_that_a_program_finds_in_frames_do_nothing():
    """ctypes' functions are there, as the cage was built with them: the kernel refuses their
    calls, the audit new ones.
    """
    outcome = run(
        FORGER + "prctl = frame.f_locals['prctl']\nprint(prctl(4, 1, 0, 0, 0))\n"
        "(CDLL,) = [c for c in object.__subclasses__() if c.__name__ == 'CDLL']\n"
        "CDLL(None).open(b'/etc/passwd', 0)"
    )
    assert outcome.output == "-1\n"
    assert not outcome.ok
    assert outcome.refused == ("ctypes.dlopen",)


@needs_kernel
@pytest.mark.parametrize(
    "act",
    [
        "say('unsafe', 'forged')",
        "say('layers', 'forged')",
        "say('nonsense', 'forged')",
        "say('unsafe', ''); say('end', 'finished'); os._exit(0)",
        "for i in range(3, 256):\n    try: os.write(i, f'{nonce}unsafe x\\n'.encode())\n"
        "    except OSError: pass",
        "while True: say('unsafe', 'x' * 9999)",
        "say('end', 'a \\ud800 surrogate'); os._exit(0)",
    ],
)
def test_a_forged_word_of_the_cage_fails_that_answer_and_nothing_else(act):
    outcome = run(FORGER + act, seconds=0.5)
    assert not outcome.ok
    assert outcome.layers == ("limits", "audit", "kernel")


@needs_kernel
def test_the_child_dies_with_a_killed_parent_and_nothing_stays_on_disk(tmp_path):
    code = (
        "from helpers.hexainst.sandbox import run; run('import time; time.sleep(99)', seconds=99)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}
    )
    try:
        (child,) = wait_for(lambda: children(parent.pid))
        assert list(tmp_path.iterdir()) == []
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert wait_for(lambda: not Path(f"/proc/{child}").exists())
    assert list(tmp_path.iterdir()) == []


def children(pid):
    """Processes that `pid` started and that have sealed themselves, as texts."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [n for n in found if "Seccomp:\t2" in Path(f"/proc/{n}/status").read_text()]


def wait_for(seen, seconds=30):
    end = time.monotonic() + seconds
    while not (found := seen()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def test_a_child_whose_parent_died_before_it_could_follow_runs_nothing():
    reader, writer = os.pipe()
    job = {"program": "print('ran')", "nonce": "n", "seconds": 1, "megabytes": 512}
    done = subprocess.run(
        [sys.executable, "-I", "-S", sandbox.__file__, str(writer)],
        input=json.dumps(job | {"parent": os.getpid() + 1, "without_seccomp": False}),
        capture_output=True,
        text=True,
        pass_fds=[writer],
    )
    os.close(writer)
    with os.fdopen(reader) as said:
        assert (said.read(), done.stdout, done.returncode) == ("", "", 1)


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.os, "name", "nt")
    with pytest.raises(Unavailable, match="not executed on"):
        run("pass")
