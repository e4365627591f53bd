"""nbval compares every output but stderr (warnings, progress bars). Its kernels have sockets of
their own.
"""

from contextlib import ExitStack

import nbval.kernel

from helpers.run.chain import private_sockets

MANAGER, SOCKETS = nbval.kernel.KernelManager, ExitStack()


def pytest_configure():
    nbval.kernel.KernelManager = lambda **names: MANAGER(
        **names, **SOCKETS.enter_context(private_sockets())
    )


def pytest_unconfigure():
    SOCKETS.close()


def pytest_collectstart(collector):
    if getattr(collector, "path", None) and collector.path.suffix == ".ipynb":
        collector.skip_compare = (*collector.skip_compare, "stderr")
