"""One network, every engine that this machine has: who is how fast, side by side. Knows nothing of training."""

from gossamer.bench.clock import alternating as alternating
from gossamer.bench.clock import median_ratio as median_ratio
from gossamer.bench.clock import quartiles as quartiles
from gossamer.bench.clock import seconds as seconds
from gossamer.bench.clock import settle as settle
from gossamer.bench.comparison import Comparison as Comparison
from gossamer.bench.comparison import EngineRow as EngineRow
from gossamer.bench.comparison import compare as compare
from gossamer.bench.engines import ENGINES as ENGINES
from gossamer.bench.engines import INT8 as INT8
from gossamer.bench.machine import is_installed as is_installed
from gossamer.bench.machine import machine as machine
from gossamer.bench.machine import version as version
