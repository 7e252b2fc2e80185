"""fastai: callbacks that turn any `fit` into a sparse one. They translate events; the run below decides."""

from gossamer.integrations.fastai.callback import SparsifyCallback as SparsifyCallback
from gossamer.integrations.fastai.followers import SparsityMetric as SparsityMetric
from gossamer.integrations.fastai.keeper import KeepSparse as KeepSparse
from gossamer.integrations.fastai.pruning import PruneCallback as PruneCallback
from gossamer.integrations.fastai.saving import SaveSparseModelCallback as SaveSparseModelCallback
