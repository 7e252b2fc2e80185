"""The walls: imports run downward only, and a plain import stays light. Both tests are shown to be able to fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import gossamer

ROOT = Path(__file__).parents[1]
PACKAGE = Path(gossamer.__file__).parent
LINT = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
WATCHED = ("fastai", "matplotlib", "pandas", "fastcore", "gossamer.runtime", "gossamer.integrations", "gossamer.plots")
LOADED = f"import sys, gossamer; print(*[m for m in {WATCHED!r} if m in sys.modules])"


def run(code: str, src: Path, where: Path) -> subprocess.CompletedProcess[str]:
    """Runs a line of Python in a fresh process that sees the package under `src`."""
    # An editable install's own finder would find the package where it was installed from.
    code = f"import sys; sys.meta_path[:] = [f for f in sys.meta_path if '_editable' not in type(f).__module__]\n{code}"
    environment = {**os.environ, "PYTHONPATH": str(src), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=where, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the package to break."""
    shutil.copytree(PACKAGE, tmp_path / "src" / "gossamer", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_imports_run_downward_only():
    pytest.importorskip("importlinter")
    result = run(LINT, PACKAGE.parent, ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("rules/criteria.py", "import gossamer.masks", "imports run downward only"),
        ("rules/selection.py", "import gossamer.rules.allocation", "the rules do not know each other"),
        ("storage/__init__.py", "import gossamer.masks", "storage and the engine stand apart"),
        ("runtime/layers.py", "import gossamer.sparsifier", "storage and the engine stand apart"),
    ],
)
def test_an_import_through_a_wall_is_noticed(copy, file, line, contract):
    pytest.importorskip("importlinter")
    path = copy / "src" / "gossamer" / file
    path.write_text(path.read_text() + f"\n{line}\n")
    result = run(LINT, copy / "src", copy)
    assert result.returncode != 0
    assert f"{contract} BROKEN" in " ".join(result.stdout.split())


def test_importing_gossamer_loads_neither_fastai_nor_matplotlib():
    result = run(LOADED, PACKAGE.parent, ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_a_heavy_import_is_noticed(copy):
    pytest.importorskip("matplotlib")
    path = copy / "src" / "gossamer" / "sparsifier.py"
    path.write_text(path.read_text() + "\nimport matplotlib\n")
    result = run(LOADED, copy / "src", copy)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["matplotlib"]


def test_the_star_import_brings_what_it_lists_and_hides_no_module_of_python():
    code = (
        "import random\nfrom fastai.vision.all import *\nfrom gossamer.all import *\nimport gossamer.all as names\n"
        "assert callable(random.seed) and SparsifyCallback and sched_cos\n"
        "public = {n for n in vars(names) if not n.startswith('_') and n != 'annotations'}\n"
        "assert public == set(names.__all__), public ^ set(names.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_names_of_other_modules_are_found_when_asked_for():
    from gossamer import SparsifyCallback, find_ticket, load_ticket
    from gossamer.integrations.fastai import SparsifyCallback as same

    assert SparsifyCallback is same
    assert callable(find_ticket)
    assert callable(load_ticket)
    for name, module in gossamer._ELSEWHERE.items():
        assert getattr(gossamer, name).__module__.startswith(module)
    with pytest.raises(AttributeError, match="'sparsify'"):
        _ = gossamer.sparsify
    assert not hasattr(gossamer, "__path_to_nothing__")
