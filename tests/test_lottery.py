"""A search for tickets: exact counts, survivors at the weights they began with, and rounds that can be gone on with."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor, nn

from gossamer import ArgumentError, FileError, GossamerError, Sparsifier, StateError, TargetError
from gossamer.comparing import KINDS
from gossamer.lottery import find_ticket
from gossamer.search import TicketSearch
from gossamer.storage.tensors import save_tensors
from gossamer.tickets import load_ticket
from gossamer.trials import TicketRun, random_mask, reinitialised

matplotlib.use("agg")

X = torch.randn(32, 12, generator=torch.Generator().manual_seed(0))
Y = X[:, :3].argmax(1)


def network(seed: int = 1) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 17), nn.BatchNorm1d(17), nn.ReLU(), nn.Linear(17, 3))


def conv_network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 10, 2), nn.BatchNorm2d(10), nn.Flatten(), nn.Linear(10, 3)
    )


class Trainer:
    """Trains for some steps, on batches drawn by the round, and remembers what it saw."""

    def __init__(self, steps: int = 6, stop_in: int | None = None) -> None:
        self.steps, self.stop_in = steps, stop_in
        self.starts: list[tuple[str, int, int, dict[str, Tensor]]] = []
        self.ends: list[dict[str, Tensor]] = []
        self.zeros_in_state: list[bool] = []

    def __call__(self, model: nn.Module, run: TicketRun) -> float:
        self.starts.append((run.kind, run.round, run.steps_done, copies(model)))
        generator = torch.Generator().manual_seed(run.round)
        run.optimizer = adam = torch.optim.Adam(model.parameters(), lr=0.05)
        while run.steps_done < self.steps:
            chosen = torch.randint(len(X), (16,), generator=generator)
            loss = nn.functional.cross_entropy(model(X[chosen]), Y[chosen])
            adam.zero_grad()
            loss.backward()
            adam.step()
            run.step()
            self.zeros_in_state += [
                not tensor[~mask].any()
                for parameter, mask in run._sparsifier.masked_parameters()
                for tensor in (parameter, adam.state[parameter]["exp_avg"], adam.state[parameter]["exp_avg_sq"])
            ]
            if run.round == self.stop_in and run.steps_done == 3:
                raise KeyboardInterrupt
        self.ends.append(copies(model))
        model.eval()
        score = -float(nn.functional.cross_entropy(model(X), Y).detach())
        model.train()
        return score


def copies(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def same(one: Any, other: Any) -> bool:
    return set(one) == set(other) and all(torch.equal(t, other[n]) for n, t in one.items())


def search_of(trainer: Callable[..., Any] | None = None, model: nn.Module | None = None, **more: Any) -> TicketSearch:
    settings: dict[str, Any] = {"rounds": 3, "rate": 30, "progress": False, **more}
    return find_ticket(model or network(), trainer or Trainer(), **settings)


def masked(search: TicketSearch, round: int) -> dict[str, int]:
    return {n: int((~m).sum()) for n, m in search.ticket(round).masks.items()}


def half_up(n: int, percent: float, rounds: int) -> int:
    return math.floor(n * (1 - (1 - Fraction(repr(percent)) / 100) ** rounds) + Fraction(1, 2))


@pytest.mark.parametrize("rates", [{}, {"3": 10}, {"*": 12.5, "0": 7.3}])
def test_every_round_masks_exactly_its_share_of_every_layer(rates: dict[str, float]) -> None:
    search = search_of(rates=rates, rounds=5, rate=30)
    percent = {"0": rates.get("0", 30), "3": rates.get("3", rates.get("*", 30))}
    for round, row in enumerate(search.rows):
        counts = {"0": half_up(204, percent["0"], round), "3": half_up(51, percent["3"], round)}
        assert masked(search, round) == counts
        assert row.round == round
        assert row.remaining == 100 * (255 - sum(counts.values())) / 255


def test_globally_the_layers_share_one_count() -> None:
    search = search_of(context="global", rounds=4)
    assert [sum(masked(search, k).values()) for k in range(5)] == [half_up(255, 30, k) for k in range(5)]


def test_masks_are_those_of_the_smallest_trained_weights_and_nested() -> None:
    trainer = Trainer()
    search = search_of(trainer)
    for before, after in zip(search.rows, search.rows[1:], strict=False):
        old, new = before.ticket.masks, after.ticket.masks
        for name, mask in new.items():
            assert not (mask & ~old[name]).any()
            weight = trainer.ends[before.round][f"{name}.weight"].abs()
            assert weight[mask].min() >= weight[old[name] & ~mask].max()


@pytest.mark.parametrize("rewind_step", [0, 2])
def test_survivors_go_back_bit_for_bit_and_the_masked_are_zero(rewind_step: int) -> None:
    trainer, model = Trainer(), network()
    first = copies(model)
    search = search_of(trainer, model, rewind_step=rewind_step)
    back = first
    if rewind_step:
        short = Trainer(steps=rewind_step)
        other = network()
        search_of(short, other, rounds=1)
        back = short.ends[0]
        assert not torch.equal(back["0.weight"], first["0.weight"])
    for (_, round, steps_done, start), row in zip(trainer.starts[1:], search.rows[1:], strict=True):
        assert (round, steps_done, row.steps) == (row.round, rewind_step, 6 - rewind_step)
        ticket = row.ticket
        assert same(ticket.weights, start)
        for name, tensor in start.items():
            mask = ticket.masks.get(name.removesuffix(".weight")) if name.endswith("weight") else None
            assert torch.equal(tensor, back[name] if mask is None else back[name] * mask), name
    assert same(search.rows[0].ticket.weights, back)


def test_the_masked_and_their_optimizer_state_are_zero_after_every_step() -> None:
    trainer = Trainer()
    search_of(trainer)
    assert len(trainer.zeros_in_state) == 4 * 6 * 2 * 3
    assert all(trainer.zeros_in_state)


def test_filters_die_with_what_belongs_to_them() -> None:
    trainer, model = Trainer(), conv_network()
    search = search_of(trainer, model, granularity="filter", layer_type=nn.Conv2d, rate=20, rounds=2)
    assert all(trainer.zeros_in_state)
    assert [int((~search.ticket(k).masks["1"]).sum()) for k in range(3)] == [0, 2 * 12, 4 * 12]
    ticket = search.ticket(2)
    dead = ~ticket.masks["1"].flatten(1).any(1)
    assert all(not ticket.weights[n][dead].any() for n in ("1.weight", "1.bias", "2.weight", "2.bias"))
    assert all(not trainer.ends[2][n][dead].any() for n in ("1.weight", "1.bias", "2.weight", "2.bias"))
    for kind in ("reinit", "random_mask"):
        search.compare([kind], [2], progress=False)
        channels = trainer.starts[-1][3]["1.weight"].flatten(1).any(1)
        assert int(channels.sum()) == 6
        assert not trainer.ends[-1]["2.bias"][~channels].any()


def test_the_network_keeps_its_weights_and_random_numbers_their_order() -> None:
    model = network()
    before, state = copies(model), torch.get_rng_state()
    search = search_of(model=model)
    search.compare(progress=False)
    assert same(before, copies(model))
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(KeyboardInterrupt):
        search_of(Trainer(stop_in=1), model)
    assert same(before, copies(model))


@pytest.mark.parametrize("stop_in", [0, 1, 3])
@pytest.mark.parametrize("criteria", ["large_final", "updating_movement"])
@pytest.mark.parametrize("rewind_step", [0, 2])
def test_an_interrupted_search_goes_on_as_if_it_had_not_been(
    tmp_path: Path, stop_in: int, criteria: str, rewind_step: int
) -> None:
    whole = search_of(rewind_step=rewind_step, criteria=criteria)
    model, folder = network(), tmp_path / "search"
    with pytest.raises(KeyboardInterrupt):
        search_of(Trainer(stop_in=stop_in), model, folder=folder, rewind_step=rewind_step, criteria=criteria)
    rest = Trainer()
    search = search_of(rest, model, folder=folder, rewind_step=rewind_step, criteria=criteria)
    assert [round for _, round, _, _ in rest.starts] == list(range(stop_in, 4))
    assert search.rows == whole.rows
    for k in range(4):
        assert same(search.ticket(k).weights, whole.ticket(k).weights)
        assert same(search.ticket(k).masks, whole.ticket(k).masks)
        assert same(load_ticket(folder / f"ticket_{k:02}.safetensors").weights, whole.ticket(k).weights)
    again = Trainer()
    assert search_of(again, network(), folder=folder, rewind_step=rewind_step, criteria=criteria).rows == whole.rows
    assert not again.starts


def test_a_finished_search_takes_further_rounds(tmp_path: Path) -> None:
    search_of(rounds=2, folder=tmp_path)
    rest = Trainer()
    assert search_of(rest, rounds=4, folder=tmp_path).rows == search_of(rounds=4).rows
    assert [round for _, round, _, _ in rest.starts] == [3, 4]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"rate": 20}, r"rate of '0' is 30 % there and 20 % here"),
        ({"rates": {"3": 10}}, r"rate of '3' is 30 % there and 10 % here"),
        ({"rewind_step": 1}, "rewind_step is 0 there and 1 here"),
        ({"granularity": "row"}, "granularity is 'weight' there and 'row' here"),
        ({"criteria": "movement"}, "criteria is 'large_final' there and 'movement' here"),
        ({"exclude": ["3"]}, "rate of '3' is 30 % there and missing here"),
        ({"rounds": 1}, "has 2 rounds of this search already"),
        ({"model": network(2)}, "began with other weights"),
        ({"model": conv_network()}, "network of '0.bias' is .* there and missing here"),
    ],
)
def test_the_folder_of_another_search_is_refused(tmp_path: Path, other: dict[str, Any], words: str) -> None:
    search_of(rounds=2, folder=tmp_path)
    trainer = Trainer()
    with pytest.raises(FileError, match=words):
        search_of(trainer, **{"rounds": 2, "folder": tmp_path, **other})
    assert not trainer.starts


def test_a_network_may_keep_more_than_tensors(tmp_path: Path) -> None:
    class Counting(nn.ReLU):
        def get_extra_state(self) -> dict[str, int]:
            return {"calls": 1}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"calls": 1}

    model = network()
    model[2] = Counting()
    assert search_of(model=model, folder=tmp_path).rows == search_of().rows


def test_files_that_are_no_search_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a file; name a folder"):
        search_of(folder=Path(__file__))
    search = search_of(rounds=1)
    search.ticket(1).save(tmp_path / "search.safetensors")
    with pytest.raises(FileError, match="no search of version 1"):
        search_of(folder=tmp_path)
    save_tensors(tmp_path / "search.safetensors", {}, {"format": "gossamer-ticket-search", "version": "1"})
    with pytest.raises(FileError, match="does not say what search it is"):
        search_of(folder=tmp_path)
    (tmp_path / "search.safetensors").write_bytes(b"short")
    with pytest.raises(FileError, match="no whole safetensors file"):
        search_of(folder=tmp_path)


def test_what_is_compared_has_the_counts_of_the_ticket() -> None:
    trainer = Trainer()
    search = search_of(trainer)
    found = search.compare(progress=False)
    assert [(c.round, c.kind) for c in found] == [(k, kind) for k in (1, 2, 3) for kind in KINDS]
    assert [c.score for c in found if c.kind == "ticket"] == [row.score for row in search.rows[1:]]
    assert [c.remaining for c in found if c.kind == "reinit"] == [row.remaining for row in search.rows[1:]]
    for kind, round, _, start in trainer.starts[4:]:
        ticket, dense = search.ticket(round), search.ticket(0).weights
        for name, mask in ticket.masks.items():
            kept = start[f"{name}.weight"] != 0
            assert int(kept.sum()) == int(mask.sum())
            assert torch.equal(kept, mask) == (kind == "reinit")
            again = torch.equal(start[f"{name}.weight"], dense[f"{name}.weight"] * kept)
            assert again == (kind == "random_mask")
    assert len(trainer.starts) == 4 + 2 * 3
    assert all(trainer.zeros_in_state)


def test_a_seed_gives_the_same_comparison_and_another_seed_another() -> None:
    search = search_of()
    one, two, other = (search.compare(seed=s, progress=False) for s in (0, 0, 1))
    assert one == two
    assert all(a.score != b.score for a, b in zip(one, other, strict=True) if a.kind != "ticket")


def test_an_interrupted_comparison_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = search_of(folder=tmp_path / "whole").compare(progress=False)
    trainer = Trainer()
    search = search_of(trainer, folder=tmp_path / "broken")
    trainer.stop_in = 2
    with pytest.raises(KeyboardInterrupt):
        search.compare(progress=False)
    rest = Trainer()
    again = search_of(rest, folder=tmp_path / "broken")
    assert again.compare(progress=False) == whole
    assert [(kind, round) for kind, round, *_ in rest.starts] == [
        (kind, round) for round in range(2, len(again.rows)) for kind in ("reinit", "random_mask")
    ]
    assert again.compare(progress=False) == whole
    assert again.compare(seed=1, rounds=1, progress=False) != whole[:3]
    assert len(rest.starts) == 2 * (len(again.rows) - 2) + 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format": 1}', b"\xff", b"[" * 100_000])
def test_comparisons_of_another_kind_are_refused(tmp_path: Path, content: bytes) -> None:
    search = search_of(rounds=2, folder=tmp_path)
    search.compare(progress=False)
    path = tmp_path / "comparisons.json"
    good = path.read_text()
    path.write_bytes(content)
    before = copies(search.model)
    with pytest.raises(FileError, match=r"comparisons\.json.* delete it"):
        search.compare(progress=False)
    path.write_text(good.replace('"seed": 0', '"seed": 3'))
    with pytest.raises(FileError, match="of another search: seed is 3 there and 0 here"):
        search.compare(progress=False)
    path.write_text(re.sub(r"-?\d+\.\d+", "NaN", good))
    with pytest.raises(FileError, match="holds no comparisons"):
        search.compare(progress=False)
    assert all(torch.equal(t, before[n]) for n, t in copies(search.model).items())


def test_fresh_weights_are_trained_from_step_0_the_others_from_where_the_search_goes_back_to() -> None:
    trainer = Trainer()
    search = search_of(trainer, rewind_step=2, rounds=1)
    search.compare(progress=False)
    assert [(kind, done) for kind, _, done, _ in trainer.starts[2:]] == [("reinit", 0), ("random_mask", 2)]


def test_the_seed_that_built_the_network_gives_other_weights_here() -> None:
    model = network(7)
    sparsifier = Sparsifier(model, layer_type=nn.Linear)
    fresh = reinitialised(sparsifier, search_of(model=model).ticket(1), seed=7).weights["0.weight"]
    assert not torch.equal(fresh, model[0].weight * (fresh != 0))


def test_initial_weights_can_be_ones_own() -> None:
    trainer = Trainer()
    search = search_of(trainer, rounds=1)

    def sevens(model: nn.Module) -> None:
        nn.init.constant_(model[0].weight, 7.0)

    search.compare(["reinit"], initialise=sevens, progress=False)
    assert trainer.starts[-1][3]["0.weight"].unique().tolist() == [0.0, 7.0]
    with pytest.raises(ArgumentError, match="left every weight as it was"):
        search.compare(["reinit"], initialise=lambda model: None, progress=False)


def test_a_module_that_cannot_initialise_itself_is_named() -> None:
    class Own(nn.Linear):
        reset_parameters = None  # type: ignore[assignment]

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 3))
    model.add_module("scale", nn.PReLU())
    model.scale.reset_parameters = None
    trainer = Trainer()
    search = search_of(trainer, model, rounds=1)
    with pytest.raises(ArgumentError, match=r"module 'scale' .PReLU. holds 'weight' .* give initialise="):
        search.compare(progress=False)
    assert len(trainer.starts) == 2


def test_a_round_can_be_trained_again() -> None:
    model, trainer = network(), Trainer()
    search = search_of(trainer, model)
    assert search.train(2) == search.rows[2].score
    assert same(copies(model), trainer.ends[2])
    assert int((model[0].weight != 0).sum()) == int(search.ticket(2).masks["0"].sum())


def test_a_ticket_from_a_file_can_be_trained_and_compared_alone(tmp_path: Path) -> None:
    search = search_of(folder=tmp_path)
    model, trainer = network(5), Trainer()
    sparsifier = Sparsifier(model, layer_type=nn.Linear)
    ticket, dense = (load_ticket(tmp_path / f"ticket_{k:02}.safetensors") for k in (3, 0))
    assert trainer(model, TicketRun(sparsifier, ticket, round=3)) == search.rows[3].score
    fresh = reinitialised(sparsifier, ticket, seed=1)
    shuffled = random_mask(sparsifier, ticket, dense.weights, seed=1)
    for other in (fresh, shuffled):
        assert other.sparsity == ticket.sparsity
        trainer(model, TicketRun(sparsifier, other))
        assert int((model[0].weight == 0).sum()) == int((~ticket.masks["0"]).sum())
    assert all(trainer.zeros_in_state)
    with pytest.raises(FileError, match="another network"):
        TicketRun(Sparsifier(nn.Linear(2, 2), layer_type=nn.Linear), ticket)


def test_the_best_round_and_the_rows_as_text() -> None:
    scores = [0.5, 0.75, 0.75, 0.25]

    def train(model: nn.Module, run: TicketRun) -> float:
        run.step()
        return torch.tensor(scores[run.round], requires_grad=True)

    search = search_of(train)
    assert search.best().round == 2
    assert search.best(at_most=40).round == 3
    with pytest.raises(ArgumentError, match="at_most=10: the last round has 34"):
        search.best(at_most=10)
    assert str(search).splitlines()[1].split() == ["0", "100.00", "0.5", "1"]
    assert [row["score"] for row in search.to_dict()] == scores


def test_a_plot_shows_every_round_and_kind() -> None:
    search = search_of()
    compared = [*search.compare(progress=False), *search.compare(seed=1, progress=False)]
    ax = search.plot(compared)
    assert [line.get_label() for line in ax.lines] == ["ticket", "reinit", "random mask"]
    assert [len(line.get_xdata()) for line in ax.lines] == [4, 3, 3]
    assert ax.get_xlim()[0] > ax.get_xlim()[1]
    assert len(ax.collections) == 2  # bands over two seeds


def test_a_bar_is_drawn_only_where_it_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    search_of()
    assert capsys.readouterr() == ("", "")
    search_of(progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "4/4" in shown.err


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"train": None}, ArgumentError, "train=None cannot be called"),
        ({"rounds": 0}, ArgumentError, "rounds=0 .* from 1 up"),
        ({"rounds": 2.5}, ArgumentError, "rounds=2.5 "),
        ({"rounds": True}, ArgumentError, "rounds=True "),
        ({"rewind_step": -1}, ArgumentError, "rewind_step=-1 .* from 0 up"),
        ({"rate": 0}, ArgumentError, "rate=0 .* above 0 and below 100"),
        ({"rate": 100}, ArgumentError, "rate=100 "),
        ({"rate": float("nan")}, ArgumentError, "rate=nan "),
        ({"rate": "20"}, ArgumentError, "rate='20' "),
        ({"rates": {"3": 0}}, ArgumentError, r"rates\['3'\]=0 "),
        ({"rates": 10}, ArgumentError, "rates=10 is no dict"),
        ({"rates": {"fc": 10}}, TargetError, "rates: no layer is called 'fc'"),
        ({"rates": {"3": 10}, "context": "global"}, ArgumentError, "rates cannot be used with context='global'"),
        ({"context": "2:4"}, ArgumentError, "context='2:4' fixes the sparsity"),
        ({"context": "everywhere"}, ArgumentError, "unknown context"),
        ({"granularity": "atom"}, ArgumentError, "atom"),
        ({"criteria": "largest"}, ArgumentError, "largest"),
        ({"layer_type": nn.Embedding}, TargetError, "no Embedding layer"),
        ({"exclude": ["nothing"]}, TargetError, "nothing"),
        ({"rounds": 60}, ArgumentError, "mask all 51 units of layer '3'; use at most 20 rounds"),
        ({"rounds": 60, "context": "global"}, ArgumentError, "mask all 255 units of all layers; use at most 27 rounds"),
        ({"rounds": 1, "rate": 0.1}, ArgumentError, "mask nothing, since layers have 204 units at most"),
    ],
)
def test_bad_arguments_are_told_before_anything_is_trained(
    tmp_path: Path, arguments: dict[str, Any], error: type[GossamerError], words: str
) -> None:
    model, trainer = network(), Trainer()
    before = copies(model)
    settings = {"train": trainer, "folder": tmp_path / "new", **arguments}
    with pytest.raises(error, match=words):
        find_ticket(model, **settings)
    assert not trainer.starts
    assert same(before, copies(model))
    assert not (tmp_path / "new").exists()


def test_weights_that_cannot_be_ranked_are_refused() -> None:
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    with pytest.raises(TargetError, match="nan or infinite"):
        search_of(model=model)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (None, "train returned None in round 0"),
        ("0.9", "train returned '0.9'"),
        ((1, 2), "train returned"),
        (True, "train returned True"),
        (float("nan"), "train returned nan in round 0; a score must be finite"),
        (torch.ones(2), "train returned tensor"),
    ],
)
def test_a_score_must_be_a_number(returned: Any, words: str) -> None:
    def train(model: nn.Module, run: TicketRun) -> Any:
        run.step()
        return returned

    model = network()
    before = copies(model)
    with pytest.raises(ArgumentError, match=words):
        search_of(train, model)
    assert same(before, copies(model))


def test_training_without_steps_is_refused() -> None:
    with pytest.raises(StateError, match=r"never called run.step\(\)"):
        search_of(lambda model, run: 1.0)


@pytest.mark.parametrize("rewind_step", [6, 7])
def test_going_back_to_the_end_of_training_is_refused(rewind_step: int) -> None:
    with pytest.raises(ArgumentError, match=f"rewind_step={rewind_step}, but training has 6 steps"):
        search_of(rewind_step=rewind_step)


def test_rounds_and_kinds_that_are_not_there() -> None:
    search = search_of(rounds=1)
    for call in (search.ticket, search.train, lambda k: search.compare(rounds=[k])):
        for round in (2, -1, True, "1"):
            with pytest.raises(ArgumentError, match="this search has rounds 0 to 1"):
                call(round)
    with pytest.raises(ArgumentError, match=r"unknown kind 'reinitialised'. Closest: reinit"):
        search.compare("reinitialised")


def test_layers_in_a_wrapped_network_have_their_own_names() -> None:
    search = search_of(Trainer(), nn.DataParallel(network()), rounds=1)
    assert search.rows == search_of(rounds=1).rows
    assert list(search.ticket(1).masks) == ["0", "3"]


def test_a_network_that_is_sparse_already_is_refused():
    net = nn.Linear(20, 2)
    with torch.no_grad():
        net.weight[:, :10] = 0
    with pytest.raises(ArgumentError, match=r"50.00 % zeros already"):
        find_ticket(net, lambda model, run: 0.0, progress=False)


def test_a_round_that_diverges_is_not_kept_and_the_search_goes_on_once_it_is_mended(tmp_path: Path) -> None:
    trainer = Trainer()

    def diverges(model: nn.Module, run: TicketRun) -> float:
        score = trainer(model, run)
        if run.round == 2:
            with torch.no_grad():
                model[0].weight[0, 0] = math.nan
        return score

    with pytest.raises(TargetError, match=r"nan or infinite weights in '0\.weight' in round 2, which is not kept"):
        search_of(diverges, folder=tmp_path)
    assert search_of(Trainer(), folder=tmp_path).rows == search_of(Trainer()).rows
