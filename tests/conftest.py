"""What every test begins with: the same random numbers, and a hypothesis that neither hurries nor forgets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# A busy machine is no failure, so no deadline; a failure that shows today must show tomorrow, so derandomized.
settings.register_profile(
    "gossamer",
    deadline=None,
    derandomize=True,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gossamer")

# Workers of one test run, and whatever else the machine does, shall not fight for its cores.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_random_numbers() -> None:
    torch.manual_seed(0)
