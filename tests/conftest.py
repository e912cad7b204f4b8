"""Settings that must be there before torch is loaded: tiny models are fastest on one thread, and no hub is asked."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# a loaded machine is slow, not wrong: the limit of each example's time is the test's own
settings.register_profile("nemo-rl", deadline=None)
settings.load_profile("nemo-rl")
