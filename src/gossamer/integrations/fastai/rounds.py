"""What happens when a round of pruning ends? Tickets are saved and weights rewound, as was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.integrations.fastai.place import Place
from gossamer.integrations.fastai.request import Request
from gossamer.integrations.fastai.voice import Voice
from gossamer.tickets import Lottery
from gossamer.training import SparseTraining


class Rounds:
    """The rounds of pruning of a run, which are the steps of its schedule, or epochs.

    Args:
        asked: what was asked for.
        run: whose rounds they are.
        voice: tells of them.
    """

    def __init__(self, asked: Request, run: SparseTraining, voice: Voice) -> None:
        self.tickets: list[Path] = []  # that were saved
        self.lottery = Lottery(run, asked.rewind_epoch) if asked.lth or asked.reset_end or asked.save_tickets else None
        self._asked, self._voice = asked, voice

    def check(self, epochs: int) -> None:
        """Makes sure that there will be weights to rewind to.

        Args:
            epochs: of the whole training.

        Raises:
            ArgumentError: pruning starts before they are saved.
        """
        if self.lottery is not None:
            self.lottery.check(epochs)

    def begin_epoch(self, epoch: int) -> None:
        """Rewinds what is due, and saves the weights to rewind to.

        Args:
            epoch: counted over all of the training.
        """
        if self.lottery is not None and self.lottery.begin_epoch(epoch):
            self._voice.say(f"Saving Weights at epoch {epoch}")

    def moved(self, place: Place, folder: Path) -> None:
        """Ends a round, where the masks have moved for the last time in it.

        Args:
            place: where they have moved to.
            folder: takes the ticket.
        """
        lottery = self.lottery
        if lottery is None or not lottery.ends_round(is_epoch_end=place.position == place.epoch_end):
            return
        if self._asked.save_tickets:
            folder.mkdir(parents=True, exist_ok=True)
            path = lottery.ticket().save(folder)
            self.tickets.append(path)
            self._voice.say(f"Saving ticket {path}")
        if self._asked.lth:
            if lottery.rounds_are_epochs:
                name = self._asked.schedule.name
                self._voice.say_once(f"{name!r} moves at every batch, so each epoch is one round of pruning")
            lottery.end_round(is_last=place.position >= 1)

    def end(self) -> None:
        """Puts the saved weights back where the supermask network was asked for."""
        if self._asked.reset_end and self.lottery is not None and self.lottery.has_snapshot:
            self.lottery.rewind()
            self._voice.say(f"Weights reset to those of epoch {self.lottery.epoch}")

    def state_dict(self) -> dict[str, Any]:
        """The weights to rewind to, what is done, and the tickets."""
        lottery = None if self.lottery is None else self.lottery.state_dict()
        return {"lottery": lottery, "tickets": [str(path) for path in self.tickets]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave.

        Raises:
            FileError: it is of another network.
        """
        if self.lottery is not None:
            self.lottery.load_state_dict(state["lottery"])
        self.tickets[:] = [Path(path) for path in state["tickets"]]
