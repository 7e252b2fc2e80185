"""Files are whole or not there, and reading one runs nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import FileError
from gossamer.storage.tensors import load_tensors, save_tensors, write_whole


def test_tensors_and_metadata_come_back(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": shared, "b": shared[1], "t": shared.t(), "half": torch.ones(2, dtype=torch.bfloat16)}
    path = save_tensors(tmp_path / "deep" / "x.safetensors", tensors, {"kind": "test"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"kind": "test"}
    assert {n: t.dtype for n, t in loaded.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(loaded[n], tensors[n]) for n in tensors)


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_whole(tmp_path / "x", b"old")

    def fails(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


def test_a_new_file_has_the_mode_that_the_user_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        assert write_whole(tmp_path / "x", b"").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(before)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"there is no file .*nowhere"):
        load_tensors(tmp_path / "nowhere")


@given(cut=st.floats(0, 0.99), flip=st.integers(0, 7))
def test_a_truncated_file_is_refused(tmp_path_factory: pytest.TempPathFactory, cut: float, flip: int) -> None:
    path = save_tensors(tmp_path_factory.mktemp("t") / "x", {"a": torch.ones(64)}, {})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(cut * len(whole))])
    with pytest.raises(FileError, match="no whole safetensors file"):
        load_tensors(path)
    header = bytearray(whole)
    header[flip] ^= 0xFF  # the length of the header
    path.write_bytes(header)
    with pytest.raises(FileError, match="no whole safetensors file"):
        load_tensors(path)
