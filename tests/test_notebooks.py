"""The notebooks of the documentation run from their first cell to their last."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("name", ["pruning-tutorial", "sensitivity-tutorial"])
def test_a_notebook_runs(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import uses what torch and pandas have deprecated
        import fastai.vision.all  # noqa: F401
    notebook = json.loads((DOCS / f"{name}.ipynb").read_text("utf-8"))
    names: dict[str, object] = {"__name__": name}
    for i, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], f"cell {i} is stored with outputs; clear them"
            exec(compile("".join(cell["source"]), f"{name}, cell {i}", "exec"), names)
    said = capsys.readouterr().out
    if name == "pruning-tutorial":
        assert "outputs differ by less than 1e-4" in said
        assert names["learn"].model[1].conv1.out_channels == 32  # the masked one, of which `small` is the copy
        assert names["small"][1].conv1.out_channels == 16
    else:
        zeros = {line.rsplit(", ", 1)[1] for line in said.splitlines() if "accuracy 0." in line and "zeros" in line}
        # 90 % of all 37,152 weights, and of each layer by itself, rounded five times.
        assert zeros == {"33,437 zeros", "33,435 zeros"}
