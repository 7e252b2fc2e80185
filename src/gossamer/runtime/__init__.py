"""The sparse CPU engine: networks with zeros in them, run fast. Knows nothing of training."""

from gossamer.runtime.model import CompiledModel as CompiledModel
from gossamer.runtime.model import PlanRow as PlanRow
from gossamer.runtime.model import compile as compile
