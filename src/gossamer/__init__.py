"""Gossamer makes neural networks sparse while they train, and makes the sparsity pay."""

from gossamer.errors import ArgumentError as ArgumentError
from gossamer.errors import FileError as FileError
from gossamer.errors import GossamerError as GossamerError
from gossamer.errors import GossamerWarning as GossamerWarning
from gossamer.errors import StateError as StateError
from gossamer.errors import TargetError as TargetError
from gossamer.randomness import random_state as random_state
from gossamer.randomness import restore_random_state as restore_random_state
from gossamer.report import LayerSparsity as LayerSparsity
from gossamer.report import SparsityReport as SparsityReport
from gossamer.report import report as report
from gossamer.rules.criteria import CRITERIA as CRITERIA
from gossamer.rules.criteria import Criterion as Criterion
from gossamer.rules.granularity import GRANULARITIES as GRANULARITIES
from gossamer.rules.granularity import Granularity as Granularity
from gossamer.rules.schedules import SCHEDULES as SCHEDULES
from gossamer.rules.schedules import Schedule as Schedule
from gossamer.sparsifier import Sparsifier as Sparsifier
from gossamer.storage.states import load_state as load_state
from gossamer.storage.states import save_state as save_state
from gossamer.training import SparseTraining as SparseTraining

__version__ = "0.1.0"
