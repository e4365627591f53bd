"""Shared by all tests: one thread, so that timings and float sums do not depend on the machine's
load; and no trace of the `make test` that runs them, for some tests run make themselves.
"""

import os

import torch

torch.set_num_threads(1)
for name in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS"):
    os.environ.pop(name, None)
