"""Files are whole or not there, and reading one runs nothing."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer import ArgumentError, FileError
from gossamer.storage import tensors as storage
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


def test_what_is_no_file_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"is a folder; name a file in it"):
        load_tensors(tmp_path)
    with pytest.raises(ArgumentError, match="a path, got 3"):
        load_tensors(3)


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="this user may read and write everything")
def test_a_file_or_a_folder_without_the_right_to_it_is_named_and_left_alone(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "x", {"a": torch.ones(2)}, {})
    path.chmod(0)
    with pytest.raises(FileError, match="cannot be read"):
        load_tensors(path)
    path.chmod(0o600)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            write_whole(path, b"new")
        assert list(load_tensors(path)[0]) == ["a"]
        assert os.listdir(tmp_path) == ["x"]
    finally:
        tmp_path.chmod(0o700)


def test_what_was_loaded_does_not_change_with_the_file(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "x", {"a": torch.ones(10_000)}, {})
    loaded = load_tensors(path)[0]["a"]
    with path.open("r+b") as file:  # in place, as a copy over it would
        file.seek(-40_000, os.SEEK_END)
        file.write(bytes(40_000))
        file.truncate(0)  # a tensor that were the file, mapped, would now kill the process
    assert bool((loaded == 1).all())


WRITER = """
import os, sys, time
from gossamer.storage import tensors
path, slow = sys.argv[1:]
os.fsync = lambda _: (print("writing", flush=True), time.sleep(float(slow)))
tensors.write_whole(path, b"from the other process")
"""


def writer(path: Path, slow: float) -> subprocess.Popen[str]:
    """A process that is in the middle of writing a file."""
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), str(slow)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_what_a_killed_writer_left_goes_with_the_next_write_and_what_is_being_written_stays(tmp_path: Path) -> None:
    path = tmp_path / "x[1]"  # a name that is a pattern too
    killed, busy = writer(path, 600), writer(path, 3)
    killed.kill()
    killed.wait()
    for process in (killed, busy):
        process.stdout.close()
    foreign = tmp_path / ".x[1].mine.txt"
    foreign.write_text("not ours")
    assert len(os.listdir(tmp_path)) == 3
    write_whole(path, b"mine")
    assert len([name for name in os.listdir(tmp_path) if name.endswith(".tmp")]) == 1
    assert path.read_bytes() == b"mine"
    assert busy.wait() == 0
    assert path.read_bytes() == b"from the other process"
    assert sorted(os.listdir(tmp_path)) == [".x[1].mine.txt", "x[1]"]


def test_writers_of_one_file_do_not_sweep_each_other_away(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: [write_whole(tmp_path / "x", bytes([i]) * 1000) for _ in range(40)], range(8)))
    assert os.listdir(tmp_path) == ["x"]
    assert len(set((tmp_path / "x").read_bytes())) == 1


# -- whatever happens, the old content or the new ---------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = save_tensors(tmp_path / "x", {"a": torch.ones(8)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for n in (2_000, 200_000):  # less and more than what is buffered before it is written
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))  # as a disk with room for so many bytes
        try:
            with pytest.raises(OSError, match="File too large"):
                save_tensors(path, {"a": torch.zeros(n)}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert torch.equal(load_tensors(path)[0]["a"], torch.ones(8))
        assert os.listdir(tmp_path) == ["x"]
    save_tensors(path, {"a": torch.zeros(2_000)}, {})
    assert torch.equal(load_tensors(path)[0]["a"], torch.zeros(2_000))


def test_a_name_that_cannot_be_taken_leaves_what_is_there_and_nothing_beside_it(tmp_path: Path) -> None:
    write_whole(tmp_path / "folder" / "x", b"old")
    with pytest.raises(FileError, match="is a folder"):
        write_whole(tmp_path / "folder", b"new")
    with pytest.raises(OSError):
        write_whole(tmp_path / "folder" / "x" / "y", b"new")
    assert os.listdir(tmp_path) == ["folder"]
    assert os.listdir(tmp_path / "folder") == ["x"]
    assert (tmp_path / "folder" / "x").read_bytes() == b"old"


KILLER = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from gossamer.storage.tensors import load_tensors, save_tensors, write_whole

torch.set_num_threads(1)
folder, kills = Path(sys.argv[1]), int(sys.argv[2])
rng = random.Random(0)
tensors = [{"a": torch.zeros(300_000)}, {"a": torch.ones(200_000), "b": torch.ones(3)}]
one = [save_tensors(folder / "expected", t, {"i": str(i)}).read_bytes() for i, t in enumerate(tensors)]
writers = {
    "x.bin": lambda path, i: write_whole(path, one[i]),
    "x.safetensors": lambda path, i: save_tensors(path, tensors[i], {"i": str(i)}),
}
(folder / "expected").unlink()
said = {"odd": 0, "failed": 0, "seen": [0, 0], "left x.bin": 0, "left x.safetensors": 0}
for name, write in writers.items():
    path = folder / name
    write(path, 0)
    for _ in range(kills):
        child = os.fork()
        if not child:
            i = 0
            try:
                while True:
                    i = 1 - i
                    write(path, i)
            finally:
                os._exit(1)
        time.sleep(rng.uniform(0.0, 0.01))
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        said["left " + name] += len([f for f in os.listdir(folder) if name in f]) - 1
        said["failed"] += not os.WIFSIGNALED(status)
        content = path.read_bytes()
        if content in one:
            said["seen"][one.index(content)] += 1
        else:
            said["odd"] += 1
    for i in (0, 1):  # what was left over is in nobody's way
        write(path, i)
        said["failed"] += path.read_bytes() != one[i] or load_tensors(path)[1] != {"i": str(i)}
print(json.dumps(said))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a writer is killed in a fork of a process that does nothing else")
def test_a_writer_that_is_killed_leaves_the_old_content_or_the_new(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLER, str(tmp_path), "110"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (said["odd"], said["failed"], sum(said["seen"])) == (0, 0, 220)
    # The test has seen both contents, and has killed in the midst of writing.
    assert min(said["seen"]) > 0
    assert min(said["left x.bin"], said["left x.safetensors"]) > 0
    assert sorted(os.listdir(tmp_path)) == ["x.bin", "x.safetensors"]  # what was left went with the next write


# -- mangled files: loaded or refused, nothing else -------------------------------------------------------------------


def parts(whole: bytes) -> tuple[dict[str, Any], bytes]:
    """A file's header and what follows it."""
    (n,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + n]), whole[8 + n :]


def joined(header: object, body: bytes) -> bytes:
    """A file of a header (bytes as they are) and what follows it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def flips(whole: bytes) -> Iterator[bytes]:
    """Bits turned round, most of them in the header."""
    rng, start = random.Random(0), len(whole) - len(parts(whole)[1])
    for _ in range(3_000):
        mangled = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            mangled[rng.randrange(len(whole) if rng.random() < 0.3 else start)] ^= 1 << rng.randrange(8)
        yield bytes(mangled)


def cuts(whole: bytes) -> Iterator[bytes]:
    """Every truncation, and a little more at the end."""
    yield from (whole[:n] for n in range(len(whole)))
    yield from (whole + bytes(n) for n in (1, 8, 1_000))


def lengths(whole: bytes) -> Iterator[bytes]:
    """Other lengths of the header."""
    n = len(whole) - len(parts(whole)[1]) - 8
    for length in (0, 1, n - 1, n + 1, len(whole), 2**20, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, 2**64 - 1):
        yield struct.pack("<Q", length) + whole[8:]


def depths(whole: bytes) -> Iterator[bytes]:
    """A header nested deeper than a parser's stack may be."""
    body = parts(whole)[1]
    for n in (10, 127, 128, 1_000, 100_000):
        yield joined(b"[" * n, body)
        yield joined(b"[" * n + b"]" * n, body)
        yield joined(b'{"a":' * n + b"1" + b"}" * n, body)
        yield joined(b'{"__metadata__":{"a":' + b"[" * n + b"]" * n + b"}}", body)


def numbers(whole: bytes) -> Iterator[bytes]:
    """Sizes and offsets that are huge, negative or no numbers, with the bytes that there are and without."""
    odd = [-1, 0, 1, 8, 2**31, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**30, 1.5, "8", None, True, [8]]
    for body in (bytes(256), b""):
        for a in odd:
            for b in (-1, 0, 1, 8, 256, a):
                for shape, offsets in (([a, b], [0, len(body)]), ([8, 8], [a, b]), ([8, 8], [b, a]), ([0, a], [b, b])):
                    yield joined({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}, body)


def kinds(whole: bytes) -> Iterator[bytes]:
    """Every dtype of the format, some of which torch may lack, and some that there are not; with fitting sizes."""
    known = "BOOL F4 F6_E2M3 F6_E3M2 F8_E8M0 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ C64 C128 I8 U8 I16 U16 F16 BF16"
    for dtype in [*known.split(), "I32", "U32", "F32", "F64", "I64", "U64", "F99", "f32", "", "\0", None, 3, ["F32"]]:
        for n in (0, 16, 32, 64, 128, 256, 512):
            yield joined({"a": {"dtype": dtype, "shape": [n], "data_offsets": [0, 256]}}, bytes(256))
        yield joined({"a": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}, b"")


def headers(whole: bytes) -> Iterator[bytes]:
    """Other things where the metadata, a tensor or the whole header should be."""
    header, body = parts(whole)
    for odd in ({}, {"x": "1"}, {"x": 1}, {"x": None}, {"x": {"y": "z"}}, {"\ud800": "1"}, [], "x", None, 3):
        yield joined({**header, "__metadata__": odd}, body)
        yield joined({**header, "a": odd}, body)
        yield joined(odd, body)
    yield joined({**header, "b": header["a"]}, body)  # two tensors in one place
    yield joined({"a": header["a"]}, body)  # bytes of none
    yield joined(json.dumps(header).encode()[:-1] + b',"a":' + json.dumps(header["a"]).encode() + b"}", body)
    yield joined(b"\xff\xfe{}", body)


@pytest.mark.parametrize("mangle", [flips, cuts, lengths, depths, numbers, kinds, headers])
def test_a_mangled_file_is_loaded_or_refused_and_nothing_else_happens(mangle: Any, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(64.0), "b": torch.ones(5, dtype=torch.uint8), "c": torch.ones(3, dtype=torch.bfloat16)}
    path = save_tensors(tmp_path / "x", tensors, {"format": "x"})
    refused = 0
    for mangled in mangle(path.read_bytes()):
        path.write_bytes(mangled)
        try:
            loaded, metadata = load_tensors(path)
        except FileError:
            refused += 1
            continue
        assert sum(t.untyped_storage().nbytes() for t in loaded.values()) <= len(mangled)
        assert all(isinstance(text, str) for pair in metadata.items() for text in pair)
    assert refused > 0


def test_where_there_are_no_locks_age_tells_what_a_killed_writer_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "fcntl", None)
    old, fresh, foreign = (tmp_path / name for name in (".a.bin.x1.tmp", ".a.bin.x2.tmp", ".b.bin.x1.tmp"))
    for path in (old, fresh, foreign):
        path.write_bytes(b"half")
    for path in (old, foreign):
        os.utime(path, (0, 0))
    write_whole(tmp_path / "a.bin", b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == [fresh.name, foreign.name, "a.bin"]


def test_a_link_stays_a_link_and_what_it_points_to_is_written(tmp_path: Path) -> None:
    target, link = tmp_path / "deep" / "real.bin", tmp_path / "link.bin"
    target.parent.mkdir()
    target.write_bytes(b"old")
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"
    assert [p.name for p in target.parent.iterdir()] == ["real.bin"]
