"""The Python blocks of the README and of every page run, and print what the page says they print."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|^(?P<mark><!-- (?:skip|prints) -->)\s*$"
    r"|^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass
class Block:
    """Lines of Python on a page.

    Args:
        code: the lines, behind as many empty ones as stand before them on the page.
        prints: what they must print; None where the page does not say.
    """

    code: str
    prints: str | None = field(default=None)


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page that are run, in order."""
    blocks: list[Block] = []
    mark = ""
    for match in _BLOCK.finditer(text):
        if match["mark"]:
            mark = match["mark"]
            continue
        code = match["setup"] or match["code"]
        start = match.start("setup") if match["setup"] else match.start("code")
        if match["setup"] or (match["language"] == "python" and "skip" not in mark):
            blocks.append(Block("\n" * text.count("\n", 0, max(start, 0)) + code))
        elif match["language"] == "text" and "prints" in mark:
            blocks[-1].prints = code
        mark = ""
    return blocks


RUNNABLE = {str(path.relative_to(ROOT)): blocks for path in PAGES if (blocks := blocks_of(path.read_text("utf-8")))}


@pytest.mark.parametrize("page", RUNNABLE)
def test_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    for registry in ("CRITERIA", "GRANULARITIES", "SCHEDULES", "METHODS", "CONTEXTS"):
        _restore_after(registry, monkeypatch)
    if any("fastai" in block.code or "gossamer.all" in block.code for block in RUNNABLE[page]):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its import uses what torch and pandas have deprecated
            import fastai.vision.all  # noqa: F401
    names: dict[str, Any] = {"__name__": page}
    for block in RUNNABLE[page]:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(block.code, str(ROOT / page), "exec"), names)
        if block.prints is not None:
            assert _plain(printed.getvalue()) == _plain(block.prints), printed.getvalue()


def _restore_after(registry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # What a page registers must not be there for the next test.
    import gossamer

    table = getattr(gossamer, registry)
    monkeypatch.setattr(table, "_entries", dict(table._entries))


def _plain(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def test_blocks_are_found() -> None:
    page = "<!-- setup\na = 1\n-->\n```python\nprint(a)\n```\n\n<!-- prints -->\n```text\n1\n```\n"
    page += "<!-- skip -->\n```python\nb\n```\n"
    setup, shown = blocks_of(page)
    assert (setup.code.strip(), setup.prints) == ("a = 1", None)
    assert (shown.code.strip(), shown.prints) == ("print(a)", "1\n")
    assert shown.code.count("\n") == 5
