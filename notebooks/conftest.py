"""nbval compares every output but stderr (warnings, progress bars). Its kernels have sockets of
their own, and end with pytest however that ends.
"""

from contextlib import ExitStack

import nbval.kernel

from helpers.run.stopping import household, kernel_files

MANAGER, RUN = nbval.kernel.KernelManager, ExitStack()


def pytest_configure():
    folder = RUN.enter_context(household())
    nbval.kernel.KernelManager = lambda **names: MANAGER(**names, **kernel_files(folder))


def pytest_unconfigure():
    RUN.close()


def pytest_collectstart(collector):
    if getattr(collector, "path", None) and collector.path.suffix == ".ipynb":
        collector.skip_compare = (*collector.skip_compare, "stderr")
