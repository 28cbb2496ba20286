"""Settings of every test run: one thread, how many random networks hypothesis draws, no waiting for quiet moments."""

import os

import torch
from hypothesis import HealthCheck, settings

from graphprune.timing import quiet

torch.set_num_threads(1)
quiet.RETRIES = 0  # beside other tests no moment is quiet, and no test is about speed

_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("ci", max_examples=25, derandomize=True, **_COMMON)
settings.register_profile("nightly", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))
