"""What a fastai notebook star-imports: `from gossamer.all import *`.

The criterion `random` is not among the names, since it would hide Python's module of that name; write 'random'.
"""

from gossamer.errors import ArgumentError, FileError, GossamerError, GossamerWarning, StateError, TargetError
from gossamer.integrations.fastai import PruneCallback, SaveSparseModelCallback, SparsifyCallback, SparsityMetric
from gossamer.lottery import find_ticket
from gossamer.plots import plot_lottery, plot_schedule, plot_sensitivity, plot_sparsity, plot_training
from gossamer.pruning import LayerPruning, Pruner, PruningReport, load_pruned, shrink, shrink_report
from gossamer.report import LayerSparsity, SparsityReport, report
from gossamer.rules.criteria import (
    CRITERIA,
    Criterion,
    large_final,
    large_init,
    large_init_large_final,
    magnitude,
    magnitude_increase,
    movement,
    movmag,
    small_final,
    small_init,
    small_init_small_final,
    squared_final,
    updating_magnitude_increase,
    updating_movement,
    updating_movmag,
)
from gossamer.rules.granularity import GRANULARITIES, Granularity
from gossamer.rules.schedules import SCHEDULES, Schedule, agp, cos, dsd, iterative, lin, one_cycle, one_shot
from gossamer.search import TicketSearch
from gossamer.sensitivity import LayerSensitivity, Sensitivity, sensitivity
from gossamer.sparsifier import Sparsifier
from gossamer.tickets import Lottery, Ticket, load_ticket
from gossamer.training import SparseTraining
from gossamer.trials import TicketRun

__all__ = [
    "ArgumentError",
    "CRITERIA",
    "GRANULARITIES",
    "SCHEDULES",
    "Criterion",
    "FileError",
    "GossamerError",
    "GossamerWarning",
    "Granularity",
    "LayerPruning",
    "LayerSensitivity",
    "LayerSparsity",
    "Lottery",
    "PruneCallback",
    "Pruner",
    "PruningReport",
    "SaveSparseModelCallback",
    "Schedule",
    "Sensitivity",
    "SparseTraining",
    "Sparsifier",
    "SparsifyCallback",
    "SparsityMetric",
    "SparsityReport",
    "StateError",
    "TargetError",
    "Ticket",
    "TicketRun",
    "TicketSearch",
    "agp",
    "cos",
    "dsd",
    "find_ticket",
    "iterative",
    "large_final",
    "large_init",
    "large_init_large_final",
    "lin",
    "load_pruned",
    "load_ticket",
    "magnitude",
    "magnitude_increase",
    "movement",
    "movmag",
    "one_cycle",
    "one_shot",
    "plot_lottery",
    "plot_schedule",
    "plot_sensitivity",
    "plot_sparsity",
    "plot_training",
    "report",
    "sensitivity",
    "shrink",
    "shrink_report",
    "small_final",
    "small_init",
    "small_init_small_final",
    "squared_final",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
]
