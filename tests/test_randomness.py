"""Random numbers go on from where they stood, whichever library draws them."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch

from gossamer.randomness import generator_state, random_state, restore_generator, restore_random_state
from gossamer.storage.states import load_state, save_state


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        float(np.random.randn()),
        float(np.random.rand()),
        *torch.randn(3).tolist(),
    ]


def test_all_global_generators_go_on_after_a_file(tmp_path: Path) -> None:
    draw()  # Python's and NumPy's keep a second normal number for the next call
    path = save_state(tmp_path / "s", random_state())
    first = draw()
    draw()
    restore_random_state(load_state(path))
    assert draw() == first


def test_a_generator_of_ones_own_goes_on(tmp_path: Path) -> None:
    own = random.Random(5)
    own.gauss(0, 1)
    state = load_state(save_state(tmp_path / "s", generator_state(own)))
    first = [own.gauss(0, 1), own.random()]
    restore_generator(own, state)
    assert [own.gauss(0, 1), own.random()] == first
