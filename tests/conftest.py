"""Settings every test runs under: no hub, no window, one thread, the same random examples on every machine."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# A shared two-core machine has no steady clock, so examples get no deadline.
settings.register_profile("titans", deadline=None, derandomize=True)
# New examples every night, and many more of them; a failure prints how to repeat it.
number = int(os.environ.get("HYPOTHESIS_EXAMPLES", "2000"))
settings.register_profile("nightly", deadline=None, max_examples=number, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "titans"))


@pytest.fixture
def not_under_nohup():
    """A hang-up is not ignored, whatever the tests were started from."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)
