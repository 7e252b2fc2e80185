"""Where there is no C++ compiler the package installs all the same, says so once, and everything runs in PyTorch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import sys, warnings
import gossamer.native
gossamer.native.find_library = lambda folders: None
import torch
from torch import nn
import gossamer
from gossamer import Sparsifier, runtime

net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
Sparsifier(net.eval()).sparsify_model(90)
x = torch.randn(1, 3, 24, 24)

class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x * 2 if float(x.sum()) > 1e9 else x)

with warnings.catch_warnings(record=True) as said, torch.no_grad():
    warnings.simplefilter("always")
    fast = runtime.compile(net, x, tune=True)
    again = runtime.load(fast.save(sys.argv[1] + "/net.gossamer"))
    apart = runtime.compile(Branch().eval(), x)
    networks = fast, again, apart, torch.compile(net, backend="gossamer")
    assert all(torch.allclose(f(x), net(x), atol=1e-5) for f in networks)
    state = gossamer.load(gossamer.save(net, sys.argv[1] + "/net.safetensors"))
    assert all(torch.equal(state[n], t) for n, t in net.state_dict().items())
print(sum("installed without a C++ compiler" in str(w.message) for w in said))
for rows in (fast.explain(), fast.explain(x), again.explain(), apart.explain()):
    print({r.runs for r in rows}, {r.why for r in rows if r.sparsity is not None})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no compiled part there")
def test_all_of_it_runs_in_pytorch_and_says_so_once(tmp_path: Path) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    times, *plans = done.stdout.splitlines()
    assert times == "1"
    for plan in plans:
        assert "sparse" not in plan
        assert plan.endswith("{'Gossamer was installed without a C++ compiler'}")


@pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake here, and pip brings its own")
def test_a_build_without_a_compiler_builds_nothing_and_goes_on(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    done = subprocess.run(
        ["cmake", "-S", str(root), "-B", str(tmp_path)],
        env={**os.environ, "CXX": "/bin/false", "CC": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "No C++ compiler was found" in done.stderr
