"""Gossamer makes neural networks sparse while they train, and makes the sparsity pay."""

from importlib import import_module
from types import MappingProxyType
from typing import Any

from gossamer.calibration import Calibration as Calibration
from gossamer.errors import ArgumentError as ArgumentError
from gossamer.errors import FileError as FileError
from gossamer.errors import GossamerError as GossamerError
from gossamer.errors import GossamerWarning as GossamerWarning
from gossamer.errors import StateError as StateError
from gossamer.errors import TargetError as TargetError
from gossamer.methods import ACDC as ACDC
from gossamer.methods import DSD as DSD
from gossamer.methods import METHODS as METHODS
from gossamer.methods import SET as SET
from gossamer.methods import Method as Method
from gossamer.methods import RigL as RigL
from gossamer.randomness import random_state as random_state
from gossamer.randomness import restore_random_state as restore_random_state
from gossamer.reconstruction import sparsegpt as sparsegpt
from gossamer.report import LayerSparsity as LayerSparsity
from gossamer.report import SparsityReport as SparsityReport
from gossamer.report import report as report
from gossamer.rules.allocation import CONTEXTS as CONTEXTS
from gossamer.rules.allocation import Context as Context
from gossamer.rules.criteria import CRITERIA as CRITERIA
from gossamer.rules.criteria import Criterion as Criterion
from gossamer.rules.granularity import GRANULARITIES as GRANULARITIES
from gossamer.rules.granularity import REDUCTIONS as REDUCTIONS
from gossamer.rules.granularity import Granularity as Granularity
from gossamer.rules.normalization import NORMALIZATIONS as NORMALIZATIONS
from gossamer.rules.schedules import SCHEDULES as SCHEDULES
from gossamer.rules.schedules import Schedule as Schedule
from gossamer.rules.schedules import exponential as exponential
from gossamer.rules.schedules import polynomial as polynomial
from gossamer.rules.schedules import steps as steps
from gossamer.sensitivity import LayerSensitivity as LayerSensitivity
from gossamer.sensitivity import Sensitivity as Sensitivity
from gossamer.sensitivity import sensitivity as sensitivity
from gossamer.sparsifier import Sparsifier as Sparsifier
from gossamer.storage.files import FileContents as FileContents
from gossamer.storage.files import StoredTensor as StoredTensor
from gossamer.storage.files import contents as contents
from gossamer.storage.files import load as load
from gossamer.storage.files import save as save
from gossamer.storage.states import load_state as load_state
from gossamer.storage.states import save_state as save_state
from gossamer.training import SparseTraining as SparseTraining

_ELSEWHERE = MappingProxyType(
    {
        "LayerPruning": "gossamer.pruning",
        "PruneCallback": "gossamer.integrations.fastai",
        "Pruner": "gossamer.pruning",
        "PruningReport": "gossamer.pruning",
        "SaveSparseModelCallback": "gossamer.integrations.fastai",
        "SparsifyCallback": "gossamer.integrations.fastai",
        "SparsityMetric": "gossamer.integrations.fastai",
        "Lottery": "gossamer.tickets",
        "Ticket": "gossamer.tickets",
        "TicketRun": "gossamer.trials",
        "TicketSearch": "gossamer.search",
        "find_ticket": "gossamer.lottery",
        "load_pruned": "gossamer.pruning",
        "load_ticket": "gossamer.tickets",
        "shrink": "gossamer.pruning",
        "shrink_report": "gossamer.pruning",
    }
)
"""Names that are found when they are asked for, so that `import gossamer` loads no more than it needs, nor fastai."""


def __getattr__(name: str) -> Any:
    if name not in _ELSEWHERE:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(import_module(_ELSEWHERE[name]), name)


__version__ = "0.1.0"
