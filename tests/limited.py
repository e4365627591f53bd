"""Calls in processes of their own that have little CPU time and memory, and what became of them.

`outcomes` starts one interpreter, which forks for each call: imports are paid once, and a limit
counts from there.
"""

import importlib
import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def outcomes(calls, seconds: int = 1, megabytes: int = 50) -> list[str]:
    """For each call (module, function, arguments): the text of what it returned, the name of the
    exception it raised, or of the signal that ended it. seconds: CPU time; megabytes: address
    space beyond what the imports took (Linux). A MemoryError is named even where it was the cause
    of another error.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.limited", str(seconds), str(megabytes)],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    return json.loads(done.stdout)


def _call(function, arguments, seconds, megabytes):
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (megabytes << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        return str(function(*arguments))[:200]
    except Exception as error:
        while isinstance(error.__cause__, MemoryError):
            error = error.__cause__
        return type(error).__name__


def _forked(module, name, arguments, seconds, megabytes):
    function = getattr(importlib.import_module(module), name)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, _call(function, arguments, seconds, megabytes).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        said = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return signal.Signals(-status).name if status < 0 else said


if __name__ == "__main__":
    limits = [int(text) for text in sys.argv[1:]]
    print(json.dumps([_forked(*call, *limits) for call in json.load(sys.stdin)]))
