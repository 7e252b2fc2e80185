"""The sparse CPU engine: networks with zeros in them, run fast. Knows nothing of training."""

from gossamer.runtime.explain import PlanRow as PlanRow
from gossamer.runtime.model import CompiledModel as CompiledModel
from gossamer.runtime.model import compile as compile
from gossamer.runtime.model import load as load
