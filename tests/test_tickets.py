"""A ticket is the masks on the weights that were saved, and a file that says what it is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from gossamer import FileError, SparseTraining, Sparsifier, StateError
from gossamer.storage.tensors import load_tensors, save_tensors
from gossamer.tickets import Lottery, Ticket, load_ticket


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4, 3))


def train(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.randn(4, 2, 4, 4)).square().sum().backward()
    optimizer.step()


def lottery(granularity: str = "weight", **adam: object) -> tuple[nn.Sequential, torch.optim.Optimizer, Lottery]:
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    run = SparseTraining(Sparsifier(net, granularity), optimizer, 50, "lin", total_steps=4)
    return net, optimizer, Lottery(run)


class AtLine:
    """Raises what Ctrl-C does at the nth line of what rewinds."""

    def __init__(self, n: int) -> None:
        self.left = n

    def __call__(self, frame: Any, event: str, _: Any) -> Any:
        if event == "call" and frame.f_code.co_name not in ("put_weights", "forget"):
            return None
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self


def test_a_rewind_that_is_broken_off_leaves_zeros_and_is_made_whole_when_the_next_epoch_begins() -> None:
    n, whole = 0, False
    while not whole:
        n += 1
        net, optimizer, tickets = lottery()
        tickets.begin_epoch(0)
        start = {n: t.clone() for n, t in net.state_dict().items()}
        for _ in range(4):
            train(net, optimizer)
            tickets.run.step()
        mask = tickets.run.sparsifier.masks["0"]
        sys.settrace(AtLine(n))
        try:
            tickets.rewind()
            whole = True
        except KeyboardInterrupt:
            assert not net[0].weight.detach()[~mask].any(), n
        finally:
            sys.settrace(None)
            torch.set_grad_enabled(True)  # torch's own `with` does not end where it is broken off as it begins
        tickets.begin_epoch(1)
        for name, tensor in net.state_dict().items():
            assert torch.equal(tensor, start[name] * mask if name == "0.weight" else start[name]), (n, name)
        assert not any(optimizer.state[p] for p in net.parameters()), n
    assert n > 20


@pytest.mark.parametrize("granularity", ["weight", "filter"])
def test_rewind_brings_everything_back_but_the_masked(granularity: str) -> None:
    net, optimizer, tickets = lottery(granularity)
    tickets.snapshot(epoch=3)
    start = {n: t.clone() for n, t in net.state_dict().items()}
    for _ in range(4):
        train(net, optimizer)
        tickets.run.step()
    zero = {n: t == 0 for n, t in net.state_dict().items() if n in ("0.weight", "0.bias", "1.weight", "1.bias")}
    tickets.rewind()
    for name, tensor in net.state_dict().items():
        dead = zero.get(name, torch.zeros_like(tensor, dtype=torch.bool))
        assert torch.equal(tensor, torch.where(dead, torch.zeros_like(tensor), start[name])), name
    assert (net[0].weight == 0).sum() == 72
    assert int(zero["1.weight"].sum()) == (4 if granularity == "filter" else 0)
    assert not any(optimizer.state[p] for p in net.parameters())
    train(net, optimizer)  # and the optimizer starts anew


def test_the_ticket_is_what_rewinding_would_give() -> None:
    net, optimizer, tickets = lottery("filter")
    tickets.snapshot()
    for _ in range(4):
        train(net, optimizer)
        tickets.run.step()
    ticket = tickets.ticket()
    tickets.rewind()
    assert all(torch.equal(ticket.weights[n], t) for n, t in net.state_dict().items())


def test_only_the_part_that_was_given_is_touched() -> None:
    net = network()
    body = net[:2]
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    run = SparseTraining(Sparsifier(body), optimizer, 50, "lin", total_steps=1)
    tickets = Lottery(run)
    tickets.snapshot()
    train(net, optimizer)
    run.step()
    head = net[4].weight.detach().clone()
    tickets.rewind()
    assert torch.equal(net[4].weight, head)
    assert optimizer.state[net[4].weight]


def test_without_a_snapshot_there_is_nothing_to_go_back_to() -> None:
    for call in (lottery()[2].rewind, lottery()[2].ticket):
        with pytest.raises(StateError, match="snapshot"):
            call()


def a_ticket() -> Ticket:
    net, optimizer, tickets = lottery()
    tickets.snapshot(epoch=2)
    train(net, optimizer)
    tickets.run.move_to(1.0)
    return tickets.ticket()


def test_a_file_holds_the_ticket_and_says_what_it_is(tmp_path: Path) -> None:
    ticket = a_ticket()
    path = ticket.save(tmp_path)
    assert path.name == "ticket_50.00.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {
            "format": "gossamer-ticket",
            "version": "1",
            "sparsity": "50.0000",
            "epoch": "2",
            "layers": '{"0": {"shape": [8, 2, 3, 3], "kept": 72}}',
        }
    loaded = load_ticket(path)
    assert loaded.epoch == 2
    assert loaded.sparsity == 50
    assert all(torch.equal(loaded.weights[n], t) for n, t in ticket.weights.items())
    assert all(torch.equal(loaded.masks[n], m) for n, m in ticket.masks.items())
    net = network()
    loaded.apply_to(net)
    assert int((net[0].weight == 0).sum()) == 72


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(2, 2), "another network: '0.bias'"),
        (nn.Sequential(nn.Conv2d(2, 9, 3), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(), nn.Linear(32, 3)), "has shape"),
    ],
)
def test_another_network_is_refused_and_not_touched(other: nn.Module, words: str) -> None:
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(FileError, match=words):
        a_ticket().apply_to(other)
    assert all(torch.equal(before[n], t) for n, t in other.state_dict().items())


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = a_ticket().save(tmp_path / "a.safetensors")
    tensors, metadata = load_tensors(path)

    def refused(words: str, tensors: dict = tensors, **changes: str) -> None:
        other = save_tensors(tmp_path / "b.safetensors", tensors, {**metadata, **changes})
        with pytest.raises(FileError, match=words):
            load_ticket(other)

    refused("no ticket", format="something")
    refused("version 2.*install a newer one", version="2")
    refused("epoch 'x' is no number", epoch="x")
    refused("'gone' has a mask but no weight", {**tensors, "mask/gone": tensors["mask/0"]})
    refused("holds 1 bytes", {**tensors, "mask/0": tensors["mask/0"][:1]})


def test_another_ticket_of_the_same_name_is_not_overwritten(tmp_path: Path) -> None:
    masks = {"": torch.tensor([[True, False]])}
    first = Ticket({"weight": torch.tensor([[1.0, 0.0]])}, masks)
    second = Ticket({"weight": torch.tensor([[2.0, 0.0]])}, masks)
    names = [ticket.save(tmp_path).name for ticket in (first, second, first, second)]
    assert names == [f"ticket_50.00{end}.safetensors" for end in ("", "_2", "", "_2")]
    (tmp_path / names[0]).write_text("no ticket")
    assert first.save(tmp_path).name == "ticket_50.00_3.safetensors"
    assert (tmp_path / names[0]).read_text() == "no ticket"


def test_a_network_that_keeps_more_than_tensors_can_be_rewound() -> None:
    class Counts(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"count": 1}

        def set_extra_state(self, state: Any) -> None: ...

    net = nn.Sequential(Counts(4, 4))
    run = SparseTraining(Sparsifier(net, layer_type=nn.Linear), None, 50, "one_shot", total_steps=2)
    lottery = Lottery(run)
    lottery.snapshot()
    before = net[0].weight.detach().clone()
    run.move_to(1.0)
    with torch.no_grad():
        net[0].weight += 1
    lottery.rewind()
    mask = run.sparsifier.masks["0"]
    assert torch.equal(net[0].weight.detach()[mask], before[mask])
    lottery.ticket().apply_to(net)
    for state in (None, {}, {"weights": 5}):
        with pytest.raises(FileError):
            lottery.load_state_dict(state)  # pyright: ignore[reportArgumentType]
