"""Small files: exact, of the size that was promised, and safe to read whatever is in them."""

from __future__ import annotations

import copy
import json
import random
import struct
import subprocess
import sys
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import resnet18

from gossamer import ArgumentError, FileError, Sparsifier, contents, load, save, save_state
from gossamer.native import native
from gossamer.storage.encoding import Encoded, _bits, _gaps, _Native, _Plain, decode, encode
from gossamer.storage.layout import DTYPES

BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def same_bits(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.contiguous().view(-1).view(BYTES[t.element_size()]) for t in (a, b)))


def sparse(n: int, zeros: float, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Any bits at all, nan and -0.0 among them, in some of the places."""
    rng = np.random.default_rng(seed)
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool or not n:
        return torch.from_numpy(rng.random(n) >= zeros).to(dtype)
    raw = torch.from_numpy(rng.integers(0, 256, n * size, np.uint8)).view(BYTES[size])
    raw[torch.from_numpy(rng.random(n) < zeros)] = 0
    return raw.view(dtype)


# -- the encodings ----------------------------------------------------------------------------------------------------

TABLE = [
    # elements, kind, index, values
    ([], "bits", [], []),
    ([0.0, 0.0], "gaps", [], []),
    ([0.0, 5.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -0.0], "bits", [2, 1], [5.0, -0.0]),
    ([1.0, 2.0], "bits", [3], [1.0, 2.0]),
    ([0.0] * 20 + [7.0], "gaps", [20], [7.0]),
    ([0.0] * 254 + [7.0], "gaps", [254], [7.0]),
    ([0.0] * 255 + [7.0], "gaps", [255, 0], [7.0]),
    ([0.0] * 256 + [7.0] + [0.0] * 254, "gaps", [255, 1], [7.0]),
    ([0.0] * 3 + [7.0] + [0.0] * 510, "gaps", [3, 255, 255], [7.0]),
]


@pytest.mark.parametrize(("elements", "kind", "index", "values"), TABLE)
def test_a_tensor_becomes_these_bytes_and_comes_back(
    elements: list[float], kind: str, index: list[int], values: list[float]
) -> None:
    tensor = torch.tensor(elements)
    encoded = encode(tensor)
    assert (encoded.kind, encoded.index.tolist()) == (kind, index)
    assert same_bits(encoded.values, torch.tensor(values))
    assert same_bits(decode(encoded, (len(elements),), torch.float32), tensor)


@given(
    n=st.integers(0, 3000),
    zeros=st.sampled_from([0, 0.3, 0.8, 0.9, 0.97, 0.998, 1]),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
def test_any_bits_of_any_dtype_come_back_by_the_smaller_way(n: int, zeros: float, dtype: str, seed: int) -> None:
    tensor = sparse(n, zeros, DTYPES[dtype], seed)
    encoded = encode(tensor)
    assert same_bits(decode(encoded, (n,), tensor.dtype), tensor)
    assert encoded.index.nbytes <= -(-n // 8)  # gaps only where they take less than bits


@pytest.mark.skipif(native() is None, reason="the compiled library was not built")
@given(
    n=st.integers(0, 3000),
    zeros=st.sampled_from([0, 0.3, 0.8, 0.97, 0.998, 1]),
    dtype=st.sampled_from(["float64", "float32", "float16", "int8"]),
    seed=st.integers(0, 99),
)
def test_compiled_and_plain_readers_agree(n: int, zeros: float, dtype: str, seed: int) -> None:
    tensor = sparse(n, zeros, DTYPES[dtype], seed)
    bits = tensor.view(BYTES[tensor.element_size()])
    alive = bits != 0
    indexes = {"bits": _bits(alive), "gaps": _gaps(np.flatnonzero(alive.numpy()), n)}
    for kind, index in indexes.items():
        for reader in (_Plain(index, n), _Native(native(), index, n)):
            assert getattr(reader, f"count_{kind}")() == int(alive.sum())
            out = torch.full_like(bits, 1)
            getattr(reader, f"expand_{kind}")(bits[alive], out)
            assert torch.equal(out, bits)


@pytest.mark.parametrize("reader", [_Plain, partial(_Native, native())])
@pytest.mark.parametrize(
    ("kind", "index", "n"), [("bits", [3, 0], 8), ("bits", [131], 7), ("gaps", [2, 3], 6), ("gaps", [2], 258)]
)
def test_both_readers_refuse_what_does_not_fit(reader: Any, kind: str, index: list[int], n: int) -> None:
    if native() is None:
        pytest.skip("the compiled library was not built")
    with pytest.raises(FileError):
        getattr(reader(torch.tensor(index, dtype=torch.uint8), n), f"count_{kind}")()


PARTS = [
    ("bits", [3, 0], [1.0, 2.0], (8,), "2 bytes of bits for 8 elements"),
    ("bits", [3], [1.0], (8,), "an index of 2 values, and 1 of them"),
    ("bits", [131], [1.0, 1.0, 1.0], (7,), "bits that are set beyond 7"),
    ("gaps", [2, 3], [1.0, 1.0], (6,), "cover 7 of 6"),
    ("gaps", [2], [1.0], (258,), "cover 3 of 258"),
    ("gaps", [], [], (2**40,), "cover 0 of 1099511627776"),
    ("bits", [], [], (2**40, 2**40), "0 bytes of bits"),
    ("gaps", [255], [1.0], (255,), "an index of 0 values, and 1"),
]


@pytest.mark.parametrize(("kind", "index", "values", "shape", "words"), PARTS)
def test_parts_that_do_not_fit_are_refused_before_memory_is_asked_for(
    kind: str, index: list[int], values: list[float], shape: tuple[int, ...], words: str
) -> None:
    encoded = Encoded(kind, torch.tensor(index, dtype=torch.uint8), torch.tensor(values))
    tracemalloc.start()
    with pytest.raises(FileError, match=words):
        decode(encoded, shape, torch.float32)
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


# -- files ------------------------------------------------------------------------------------------------------------


PROMISED = [(80, 23.1, 13.1), (90, 12.5, 7.5), (95, 6.3, 3.8), (98, 2.5, 1.5)]


@pytest.mark.parametrize(("sparsity", "share", "half"), PROMISED)
def test_resnet18s_convolutions_take_what_was_promised(
    sparsity: int, share: float, half: float, tmp_path: Path
) -> None:
    model = resnet18()
    Sparsifier(model).sparsify_model(sparsity)
    convs = {k: v for k, v in model.state_dict().items() if v.ndim == 4}
    path = save(convs, tmp_path / "a")
    assert round(contents(path).share, 1) <= share
    loaded = load(path)
    assert list(loaded) == list(convs)
    assert all(same_bits(loaded[k], v) for k, v in convs.items())
    path = save(convs, tmp_path / "b", values="fp16")
    assert round(contents(path).share, 1) <= half
    assert all(same_bits(load(path)[k], v.half().float()) for k, v in convs.items())


def test_a_network_comes_back_bit_for_bit_where_gossamer_is_not_needed_to_run_it(tmp_path: Path) -> None:
    model = resnet18(num_classes=10)
    Sparsifier(model).sparsify_model(90)
    path = save(model, tmp_path / "deep" / "model.safetensors")
    fresh = resnet18(num_classes=10)
    fresh.load_state_dict(load(path))
    assert all(same_bits(a, b) for a, b in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True))
    for wrapped in (nn.DataParallel(model), torch.compile(model)):
        assert list(load(save(wrapped, tmp_path / "w"))) == list(model.state_dict())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zeros", [0.0, 0.95])
def test_every_dtype_and_layout_comes_back(dtype: str, zeros: float, tmp_path: Path) -> None:
    tensor = sparse(24 * 40, zeros, DTYPES[dtype]).view(24, 40)
    given = {
        "plain": tensor,
        "turned": tensor.t(),
        "every second": tensor[::2],
        "scalar": tensor[0, 0],
        "none": tensor[:0],
    }
    loaded = load(save(given, tmp_path / "x"))
    assert all(same_bits(loaded[name], t) for name, t in given.items())


def test_tensors_that_share_memory_are_stored_once_and_shared_again(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(50, 30), nn.Linear(30, 50, bias=False))
    model[1].weight = model[0].weight
    found = contents(save(model, tmp_path / "x"))
    assert [(r.stored, r.dense_bytes, r.nbytes) for r in found.rows] == [
        ("dense", 6000, 6000),
        ("same as 0.weight", 0, 0),
    ]
    loaded = load(tmp_path / "x")
    assert loaded["0.weight"] is loaded["1.weight"]
    # A view of the same memory is another tensor.
    views = {
        "a": model[0].weight.detach(),
        "b": model[0].weight.detach()[:20],
        "c": model[0].weight.detach().view(30, 50),
    }
    assert all(same_bits(load(save(views, tmp_path / "y"))[k], v) for k, v in views.items())


def test_halves_are_for_weights_only_and_come_back_in_their_own_dtype(tmp_path: Path) -> None:
    given = {
        "sparse": sparse(4000, 0.9).nan_to_num(0, 1, -1).clamp(-1, 1).view(40, 100),
        "dense": torch.randn(40, 100),
        "double": torch.randn(40, 100, dtype=torch.float64),
        "vector": torch.randn(4000),
        "whole": torch.arange(4000).view(40, 100),
        "half": torch.randn(40, 100).half(),
    }
    for values, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        path = save(given, tmp_path / "x", values=values)
        loaded = load(path)
        for name, tensor in given.items():
            rounded = tensor.to(dtype).to(tensor.dtype) if name in ("sparse", "dense", "double") else tensor
            assert same_bits(loaded[name], rounded), name
        how = {r.name: r.stored for r in contents(path).rows}
        assert how["dense"] == f"dense, {str(dtype).removeprefix('torch.')}"
        assert how["vector"] == how["whole"] == how["half"] == "dense"


BAD: list[tuple[Any, dict[str, Any], str]] = [
    (3, {}, "a network or its state_dict, got a int"),
    ({"a": 3}, {}, "'a' is a int, and the file holds tensors only.*save_state"),
    ({1: torch.ones(2)}, {}, "names must be strings"),
    ({"a": torch.eye(3).to_sparse()}, {}, r"'a' is a torch.sparse_coo tensor.*make it dense"),
    ({"a": torch.ones(3, device="meta")}, {}, "'a' is a meta tensor"),
    ({"a": torch.ones(3, dtype=torch.complex128)}, {}, "'a' is of torch.complex128, which safetensors cannot hold"),
    (
        {"a": torch.full((2, 2), 1e6)},
        {"values": "fp16"},
        "'a' has the value 1e.06, which is beyond torch.float16.*bf16",
    ),
    ({"a": torch.ones(2)}, {"values": "int8"}, "values='int8'.*bf16, fp16"),
]


@pytest.mark.parametrize(("model", "kwargs", "words"), BAD)
def test_what_cannot_be_saved_is_named_and_no_file_is_there(
    model: Any, kwargs: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ArgumentError, match=words):
        save(model, tmp_path / "x", **kwargs)
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_quantized_tensor_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="'a' is a quantized tensor"):
        save({"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)}, tmp_path / "x")


def test_names_that_look_like_ours_are_kept_apart(tmp_path: Path) -> None:
    given = {"w": sparse(4000, 0.95), "w:gaps": torch.ones(3), "w:values": torch.zeros(2), "w:values:": torch.ones(1)}
    loaded = load(save(given, tmp_path / "x"))
    assert list(loaded) == list(given)
    assert all(same_bits(loaded[k], v) for k, v in given.items())


def test_other_files_are_read_or_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "foreign", {"format": "pt"})
    assert load(tmp_path / "foreign")["a"].tolist() == [1, 1]
    assert [r.zeros for r in contents(tmp_path / "foreign").rows] == [0, 3]
    save_state(tmp_path / "state", {"a": torch.ones(2)})
    with pytest.raises(FileError, match=r"holds a state.*use load_state"):
        load(tmp_path / "state")
    torch.save({"a": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(FileError, match=r"looks like one of torch.save, which torch.load reads"):
        load(tmp_path / "a.pt")
    with pytest.raises(FileError, match="is a folder; name a file in it"):
        save({"a": torch.ones(2)}, tmp_path)
    with pytest.raises(ArgumentError, match="must be a path, got None"):
        save({"a": torch.ones(2)}, None)
    with pytest.raises(FileError, match="there is no file"):
        load(tmp_path / "nowhere")
    save_file({"a": torch.ones(2)}, tmp_path / "newer", {"gossamer": json.dumps({"version": 2, "tensors": {}})})
    with pytest.raises(FileError, match=r"version 2 of the format; this Gossamer reads version 1.*newer"):
        load(tmp_path / "newer")


GOLDEN = (
    '{"__metadata__":{"gossamer":"{\\"version\\":1,\\"tensors\\":{'
    '\\"bits\\":{\\"as\\":\\"bits\\",\\"dtype\\":\\"float32\\",\\"shape\\":[2,256],'
    '\\"index\\":\\"bits:bits\\",\\"values\\":\\"bits:values\\"},'
    '\\"gaps\\":{\\"as\\":\\"gaps\\",\\"dtype\\":\\"float32\\",\\"shape\\":[600],'
    '\\"index\\":\\"gaps:gaps\\",\\"values\\":\\"gaps:values\\"},'
    '\\"dense\\":{\\"as\\":\\"dense\\",\\"dtype\\":\\"int16\\",\\"values\\":\\"dense\\"},'
    '\\"same\\":{\\"as\\":\\"same\\",\\"of\\":\\"dense\\"}}}"},'
    '"bits:values":{"dtype":"F32","shape":[128],"data_offsets":[0,512]},'
    '"gaps:values":{"dtype":"F32","shape":[2],"data_offsets":[512,520]},'
    '"dense":{"dtype":"I16","shape":[3],"data_offsets":[520,526]},'
    '"bits:bits":{"dtype":"U8","shape":[64],"data_offsets":[526,590]},'
    '"gaps:gaps":{"dtype":"U8","shape":[4],"data_offsets":[590,594]}}'
)


def golden() -> dict[str, Tensor]:
    bits, gaps, dense = torch.zeros(2, 256), torch.zeros(600), torch.tensor([1, 0, -2], dtype=torch.int16)
    bits.view(-1)[::4] = 1.5
    gaps[3], gaps[300] = -0.0, 2.0
    return {"bits": bits, "gaps": gaps, "dense": dense, "same": dense}


def test_the_bytes_are_those_of_the_format_page(tmp_path: Path) -> None:
    whole = save(golden(), tmp_path / "x").read_bytes()
    n = struct.unpack("<Q", whole[:8])[0]
    assert whole[8 : 8 + n].decode().rstrip() == GOLDEN
    body = struct.pack("<128f", *[1.5] * 128) + struct.pack("<2f", -0.0, 2.0) + struct.pack("<3h", 1, 0, -2)
    assert whole[8 + n :] == body + bytes([0x11] * 64) + bytes([3, 255, 41, 255])
    assert save(golden(), tmp_path / "y").read_bytes() == whole


# -- mangled files ----------------------------------------------------------------------------------------------------


def split(whole: bytes) -> tuple[dict[str, Any], bytes]:
    (n,) = struct.unpack("<Q", whole[:8])
    return json.loads(whole[8 : 8 + n]), whole[8 + n :]


def joined(ours: Any, header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps({**header, "__metadata__": {"gossamer": ours if isinstance(ours, str) else json.dumps(ours)}})
    return struct.pack("<Q", len(text)) + text.encode() + body


def flipped(whole: bytes) -> Iterator[bytes]:
    """Bits turned round, in the header and in what follows."""
    rng = random.Random(1)
    for _ in range(6000):
        mangled = bytearray(whole)
        for _ in range(rng.choice([1, 1, 2, 8])):
            mangled[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        yield bytes(mangled)


def cut(whole: bytes) -> Iterator[bytes]:
    yield from (whole[:n] for n in range(len(whole)))


VALUES: list[Any] = [None, True, -1, 0, 1, 3, 2**31, 2**40, 2**63, 2**80, 1.5, "", "x", "dense", "bits", "gaps", "same"]
VALUES += ["float64", "bool", "gaps:gaps", "bits:values", [], [2**62], [-1], [1] * 70, [2**40, 2**40], [0, 2**47], {}]
VALUES += [[2, 256.0], [True, 512], ["2", 256], {"as": "same", "of": "same"}]


def rewritten(whole: bytes) -> Iterator[bytes]:
    """Each thing that our header says, said otherwise; one, and two at once."""
    header, body = split(whole)
    ours = json.loads(header.pop("__metadata__")["gossamer"])
    places = [(name, key) for name, entry in ours["tensors"].items() for key in entry]
    for value in VALUES:
        for name, key in places:
            other = copy.deepcopy(ours)
            other["tensors"][name][key] = value
            yield joined(other, header, body)
        for name in ours["tensors"]:
            yield joined({**ours, "tensors": {**ours["tensors"], name: value}}, header, body)
        yield joined({**ours, "version": value}, header, body)
        yield joined({**ours, "tensors": value}, header, body)
        yield joined(value, header, body)
    for name, key in places:
        other = copy.deepcopy(ours)
        del other["tensors"][name][key]
        yield joined(other, header, body)
    rng = random.Random(2)
    for _ in range(3000):
        other = copy.deepcopy(ours)
        for name, key in rng.sample(places, 2):
            other["tensors"][name][key] = rng.choice(VALUES)
        yield joined(other, header, body)
    for text in ("[" * 100_000, "{}", '{"version":1}', '{"version":1,"tensors":[]}', "nan", '{"a":' * 5000):
        yield joined(text, header, body)


@pytest.mark.parametrize("mangle", [flipped, cut, rewritten])
def test_a_mangled_file_is_loaded_or_refused_and_nothing_else_happens(mangle: Any, tmp_path: Path) -> None:
    path = save(golden(), tmp_path / "x")
    whole, refused = path.read_bytes(), 0
    for mangled in mangle(whole):
        path.write_bytes(mangled)
        try:
            loaded = load(path)
        except FileError:
            refused += 1
            continue
        # 255 elements a byte of gaps, of 8 bytes each at most, and each index may be used by every entry.
        assert sum(t.untyped_storage().nbytes() for t in loaded.values()) <= 4 * 255 * 8 * len(mangled)
    assert refused > 0


def test_a_file_that_claims_a_gigantic_tensor_takes_no_memory(tmp_path: Path) -> None:
    path = save(golden(), tmp_path / "x")
    header, body = split(path.read_bytes())
    ours = json.loads(header.pop("__metadata__")["gossamer"])
    ours["tensors"]["gaps"]["shape"] = [2**37]
    path.write_bytes(joined(ours, header, body))
    code = (
        "import resource, sys, torch\nfrom gossamer import load, FileError\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))\n"
        "try: load(sys.argv[1])\nexcept FileError as e: print(e)"
    )
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is limited through /proc")
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=False)
    assert "cover 556 of 137438953472 elements" in done.stdout, done.stderr


# -- what a file holds ------------------------------------------------------------------------------------------------


def test_contents_count_zeros_and_bytes(tmp_path: Path) -> None:
    found = contents(save({**golden(), "f8": torch.zeros(4).to(torch.float8_e4m3fn)}, tmp_path / "x"))
    rows = {r.name: (r.stored, r.zeros, r.dense_bytes, r.nbytes) for r in found.rows}
    assert rows == {
        "bits": ("bits", 384, 2048, 576),
        "gaps": ("gaps", 599, 2400, 12),
        "dense": ("dense", 1, 6, 6),
        "same": ("same as dense", 1, 0, 0),
        "f8": ("dense", 4, 4, 4),
    }
    assert found.dense_bytes == 4458
    assert found.file_bytes == (tmp_path / "x").stat().st_size
    text = str(found).splitlines()
    assert text[2].split() == ["bits", "2×256", "bits", "75.00%", "2,048", "576", "28.12%"]
    assert text[-1].split()[-3] == "4,458"
    assert len({len(line) for line in text}) == 1
    assert json.loads(found.to_json())["tensors"][1]["nbytes"] == 12
    with pytest.raises(ArgumentError, match=r"no tensor 'gap'.*Closest: gaps"):
        found["gap"]


@settings(deadline=None, max_examples=30)
@given(shape=st.lists(st.integers(0, 9), max_size=4), zeros=st.floats(0, 1), seed=st.integers(0, 9))
def test_any_shape_comes_back(
    tmp_path_factory: pytest.TempPathFactory, shape: list[int], zeros: float, seed: int
) -> None:
    tensor = sparse(int(np.prod(shape)), zeros, seed=seed).view(shape)
    assert same_bits(load(save({"a": tensor}, tmp_path_factory.mktemp("s") / "x"))["a"], tensor)
