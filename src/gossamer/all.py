"""What a fastai notebook star-imports: `from gossamer.all import *`.

The criterion `random` is not among the names, since it would hide Python's module of that name; write 'random'.
"""

from gossamer.calibration import Calibration
from gossamer.errors import ArgumentError, FileError, GossamerError, GossamerWarning, StateError, TargetError
from gossamer.integrations.fastai import SaveSparseModelCallback, SparsifyCallback, SparsityMetric
from gossamer.lottery import find_ticket
from gossamer.methods import ACDC, DSD, METHODS, SET, Method, RigL
from gossamer.plots import plot_lottery, plot_schedule, plot_sparsity, plot_training
from gossamer.reconstruction import sparsegpt
from gossamer.report import LayerSparsity, SparsityReport, report
from gossamer.rules.allocation import CONTEXTS, Context
from gossamer.rules.criteria import (
    CRITERIA,
    Criterion,
    fisher,
    grasp,
    large_final,
    large_init,
    large_init_large_final,
    magnitude,
    magnitude_increase,
    movement,
    movmag,
    sanh_movement,
    small_final,
    small_init,
    small_init_small_final,
    snip,
    squared_final,
    synflow,
    taylor,
    taylor_squared,
    updating_magnitude_increase,
    updating_movement,
    updating_movmag,
    wanda,
    wanda_l1,
    wanda_max,
)
from gossamer.rules.granularity import GRANULARITIES, REDUCTIONS, Granularity
from gossamer.rules.normalization import NORMALIZATIONS
from gossamer.rules.schedules import (
    SCHEDULES,
    Schedule,
    agp,
    constant,
    cos,
    dsd,
    exponential,
    iterative,
    lin,
    one_cycle,
    one_shot,
    polynomial,
    steps,
)
from gossamer.search import TicketSearch
from gossamer.sparsifier import Sparsifier
from gossamer.tickets import Lottery, Ticket, load_ticket
from gossamer.training import SparseTraining
from gossamer.trials import TicketRun

__all__ = [
    "ACDC",
    "ArgumentError",
    "CONTEXTS",
    "CRITERIA",
    "Calibration",
    "Context",
    "Criterion",
    "DSD",
    "FileError",
    "GRANULARITIES",
    "GossamerError",
    "GossamerWarning",
    "Granularity",
    "LayerSparsity",
    "Lottery",
    "METHODS",
    "Method",
    "NORMALIZATIONS",
    "REDUCTIONS",
    "RigL",
    "SCHEDULES",
    "SET",
    "SaveSparseModelCallback",
    "Schedule",
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
    "constant",
    "cos",
    "dsd",
    "exponential",
    "find_ticket",
    "fisher",
    "grasp",
    "iterative",
    "large_final",
    "large_init",
    "large_init_large_final",
    "lin",
    "load_ticket",
    "magnitude",
    "magnitude_increase",
    "movement",
    "movmag",
    "one_cycle",
    "one_shot",
    "plot_lottery",
    "plot_schedule",
    "plot_sparsity",
    "plot_training",
    "polynomial",
    "report",
    "sanh_movement",
    "small_final",
    "small_init",
    "small_init_small_final",
    "snip",
    "sparsegpt",
    "squared_final",
    "steps",
    "synflow",
    "taylor",
    "taylor_squared",
    "updating_magnitude_increase",
    "updating_movement",
    "updating_movmag",
    "wanda",
    "wanda_l1",
    "wanda_max",
]
