"""Structured pruning: filters and channels that are really removed, and a network that is smaller and dense."""

from gossamer.pruning.pruner import Pruner as Pruner
from gossamer.pruning.report import LayerPruning as LayerPruning
from gossamer.pruning.report import PruningReport as PruningReport
from gossamer.pruning.shapes import load_pruned as load_pruned
from gossamer.pruning.shrinking import shrink as shrink
from gossamer.pruning.shrinking import shrink_report as shrink_report
