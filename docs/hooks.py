"""What the site draws from the package itself, so that no page can go stale.

Tables and pictures of everything that is registered, and the tutorial, executed.
"""

from __future__ import annotations

import base64
import hashlib
import html
import inspect
import io
import json
import math
import os
import re
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")

import torch
from matplotlib.figure import Figure
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.utils import get_relative_url
from torch import nn

from gossamer import (
    ACDC,
    CONTEXTS,
    CRITERIA,
    DSD,
    GRANULARITIES,
    METHODS,
    NORMALIZATIONS,
    REDUCTIONS,
    SCHEDULES,
    SET,
    Method,
    RigL,
    Schedule,
    Sparsifier,
)
from gossamer.methods import CosineDecay
from gossamer.plots import plot_schedule
from gossamer.rules.criteria import EVIDENCE, OF_DATA, OF_LOSS
from gossamer.rules.granularity import as_granularity, fits
from gossamer.targets import AXES

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "docs"
INK, SOFT, ACCENT = "#1f3a5f", "#dfe5ec", "#d1495b"
AXIS_WORDS = {
    "o": "output channels",
    "i": "input channels",
    "d": "kernel depth",
    "h": "kernel height",
    "w": "kernel width",
    "s": "the kernel",
}

TUTORIALS = ("tutorial", "pruning-tutorial", "sensitivity-tutorial")
"""Notebooks that are executed for their pages."""

pictures: dict[str, bytes] = {}


# -- MkDocs' events ---------------------------------------------------------------------------------------------------


def on_files(files: Files, config: Any) -> Files:
    """Adds the pictures, and the tutorials as pages."""
    if not pictures:
        draw_everything()
    generated: dict[str, str | bytes] = {f"pictures/{name}": content for name, content in pictures.items()}
    for name in TUTORIALS:
        markdown, images, executed = tutorial(name)
        generated |= {f"pictures/{picture}": content for picture, content in images.items()}
        generated |= {f"{name}.md": markdown, f"{name}.ipynb": executed}
    for name, content in generated.items():
        old = files.get_file_from_path(name)
        if old is not None:
            files.remove(old)
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Puts tables where a page asks for them, and takes out what is there for the tests alone."""
    markdown = re.sub(r"<!-- setup\n.*?-->\n?", "", markdown, flags=re.DOTALL)
    markdown = re.sub(r"<!-- (?:skip|prints) -->\n?", "", markdown)

    def picture(name: str, alt: str = "", width: int | None = None) -> str:
        if name not in pictures:
            raise PluginError(f"{page.file.src_uri}: there is no picture {name!r}; there are {', '.join(pictures)}")
        url = get_relative_url(f"pictures/{name}", page.url)
        size = f' width="{width}"' if width else ""
        return f'<img class="picture" src="{url}" alt="{html.escape(alt)}"{size}>'

    def table(match: re.Match[str]) -> str:
        if match[1] not in TABLES:
            raise PluginError(f"{page.file.src_uri}: there is no table {match[1]!r}; there are {', '.join(TABLES)}")
        return TABLES[match[1]](picture)

    markdown = re.sub(r"<!-- table: ([\w-]+) -->", table, markdown)
    return re.sub(r"<!-- picture: ([\w.-]+) (.*?) -->", lambda m: picture(m[1], m[2]), markdown)


# -- tables -----------------------------------------------------------------------------------------------------------

Picture = Callable[..., str]


def rows(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    """An HTML table, since cells hold pictures and bars."""
    lines = ["<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in body]
    title = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<table class="rules"><thead><tr>{title}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def first_line(func: Callable[..., Any]) -> str:
    """The first sentence of a docstring, as HTML."""
    text = html.escape((inspect.getdoc(func) or "").split("\n\n")[0].replace("\n", " "), quote=False)
    text = re.sub(r"arXiv:(\d+\.\d+)", r'<a href="https://arxiv.org/abs/\1">arXiv:\1</a>', text)
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text)


def spanned(letters: str | None) -> str:
    """What a unit spans, in words."""
    if letters is None:
        return "does not fit"
    return " × ".join(AXIS_WORDS[letter] for letter in letters) or "one weight"


def granularities(picture: Picture) -> str:
    """One row a granularity."""
    body: list[list[str]] = []
    for name, rule in GRANULARITIES.items():
        drawn = f"granularity-{name}.svg"
        image = picture(drawn, f"mask of granularity {name}", 150) if drawn in pictures else "<em>Conv3d only</em>"
        if rule.block is not None:
            o, i = rule.block
            words = f"{o} output channel{'s' * (o > 1)} × {i} input channel{'s' * (i > 1)}"
            body.append([f"<code>{name}</code>", f"{words}, at one place in the kernel", words, image])
            continue
        body.append([f"<code>{name}</code>", spanned(rule.conv), spanned(rule.matrix), image])
    return rows(["Name", "A unit spans, in a convolution", "in Linear, Embedding", "Half of a Conv2d"], body)


def fitting(picture: Picture) -> str:
    """One row a layer type: which granularities fit."""
    del picture
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, axes in AXES.items():
        names = tuple(name for name, rule in GRANULARITIES.items() if fits(rule, axes))
        kinds.setdefault(names, []).append(kind.__name__)
    body = [
        [", ".join(f"<code>{k}</code>" for k in layer), ", ".join(f"<code>{n}</code>" for n in names)]
        for names, layer in kinds.items()
    ]
    return rows(["Layer", "Granularities that fit"], body)


def layer_types(picture: Picture) -> str:
    """One row a layer type: its axes."""
    del picture
    body = [
        [f"<code>nn.{kind.__name__}</code>", ", ".join(AXIS_WORDS[a] for a in axes)]
        for kind, axes in AXES.items()
        if kind is not nn.Embedding
    ]
    body.append(["<code>nn.Embedding</code>", "entries (as output channels), dimensions (as input channels)"])
    return rows(["Layer", "Axes of its weight, in order"], body)


def criteria(picture: Picture) -> str:
    """One row a criterion."""
    body = [
        [
            f"<code>{name}</code>",
            first_line(rule.func),
            ", ".join(f"<code>{need}</code>" for need in rule.needs),
            takes(rule.needs),
            picture(f"criterion-{name}.svg", f"what {name} keeps", 110),
        ]
        for name, rule in CRITERIA.items()
    ]
    return rows(["Name", "Score", "Evidence", "Takes", "Keeps"], body)


def takes(needs: tuple[str, ...]) -> str:
    """What has to be given for evidence."""
    if OF_LOSS & set(needs):
        return "data and a loss"
    if OF_DATA & set(needs):
        return "data"
    return "training steps" if "accumulated" in needs else ""


def contexts(picture: Picture) -> str:
    """One row a context, and one for patterns."""
    body = [
        [f"<code>{name}</code>", CONTEXT_WORDS[name], picture(f"context-{name}.svg", f"masks of context {name}", 330)]
        for name in CONTEXTS
    ]
    body.append(["<code>2:4</code>, any <code>N:M</code>", CONTEXT_WORDS["n:m"], picture("context-2-4.svg", "", 330)])
    return rows(["Name", "Counts, and who competes", "Half of two layers, masked"], body)


def simple(rules: Any, picture: Picture) -> str:
    """One row a function."""
    del picture
    return rows(["Name", "What it is"], [[f"<code>{n}</code>", first_line(func)] for n, func in rules.items()])


def methods(picture: Picture) -> str:
    """One row a method."""
    body = [
        [
            f"<code>{name}</code>",
            METHOD_WORDS[name],
            moves(rule),
            picture(f"method-{name}.svg", f"{name} over time", 190),
        ]
        for name, rule in METHODS.items()
    ]
    return rows(["Name", "What it does", "Weights that change places", "Sparsity over training"], body)


def moves(method: Method) -> str:
    """What a method exchanges, in words."""
    if not isinstance(method.exchange, CosineDecay):
        return "none"
    decay = method.exchange
    return (
        f"{decay.fraction:.0%} of the kept ones at first, every {decay.every_n_steps} steps, up to {decay.end_pct:.0%} "
        f"of training; grow by <code>{method.grow.name}</code>"
    )


def everything(picture: Picture) -> str:
    """All names that the registries hold, an axis a row."""
    del picture
    axes: dict[str, tuple[str, Iterable[str]]] = {
        "<a href='../granularity/'>granularity</a>": ("granularity=", [*GRANULARITIES, "8x1, any A×B"]),
        "<a href='../context/'>context</a>": ("context=", [*CONTEXTS, "2:4, any N:M"]),
        "<a href='../criteria/'>criterion</a>": ("criteria=", CRITERIA),
        "<a href='../criteria/#over-a-unit'>reduction over a unit</a>": ("reduction=", REDUCTIONS),
        "<a href='../criteria/#between-layers'>normalization across layers</a>": ("normalization=", NORMALIZATIONS),
        "<a href='../schedules/'>schedule</a>": ("schedule=", SCHEDULES),
        "<a href='../methods/'>method</a>": ("method=", METHODS),
    }
    body = [
        [axis, f"<code>{argument}</code>", ", ".join(f"<code>{n}</code>" for n in names)]
        for axis, (argument, names) in axes.items()
    ]
    return rows(["Axis", "Argument", "Registered"], body)


def evidence(picture: Picture) -> str:
    """One row a kind of evidence."""
    del picture
    return rows(["Evidence", "What it is"], [[f"<code>{k}</code>", html.escape(v)] for k, v in EVIDENCE.items()])


def schedules(picture: Picture) -> str:
    """One row a schedule."""
    body = [
        [
            f"<code>{name}</code>",
            first_line(rule.func),
            f"{rule.start_pct:.0%}",
            "in steps" if rule.stepwise else "at every batch",
            picture(f"schedule-{name}.svg", f"the curve of {name}", 170),
        ]
        for name, rule in SCHEDULES.items()
    ]
    return rows(["Name", "Curve", "Starts at", "Moves", ""], body)


TABLES: dict[str, Callable[[Picture], str]] = {
    "granularities": granularities,
    "fitting": fitting,
    "layer-types": layer_types,
    "criteria": criteria,
    "evidence": evidence,
    "schedules": schedules,
    "contexts": contexts,
    "reductions": lambda picture: simple(REDUCTIONS, picture),
    "normalizations": lambda picture: simple(NORMALIZATIONS, picture),
    "methods": methods,
    "everything": everything,
}

CONTEXT_WORDS = {
    "local": "Every layer meets the target by itself; all of its units compete.",
    "global": "All units of all layers compete; no layer is emptied while others have something to give.",
    "output": "Every layer meets the target, and the units of each output channel compete among themselves (Wanda).",
    "lamp": "As <code>global</code>, with scores made comparable by " + first_line(NORMALIZATIONS["lamp"]),
    "er": first_line(CONTEXTS["er"].densities),
    "erk": first_line(CONTEXTS["erk"].densities),
    "uniform_plus": first_line(CONTEXTS["uniform_plus"].densities),
    "n:m": "Every M units in a row along the inputs keep N.",
}
METHOD_WORDS = {
    "gradual": "Masks grow along the schedule; what is masked stays masked.",
    "static": "Masks at the start, by any criterion, and never moved: SNIP, GraSP, SynFlow, or the random baseline.",
    "rigl": first_line(RigL),
    "set": first_line(SET),
    "acdc": first_line(ACDC),
    "dsd": first_line(DSD),
}


# -- pictures ---------------------------------------------------------------------------------------------------------


def save(name: str, figure: Figure, **options: Any) -> None:
    """Keeps a figure as SVG, the same bytes for the same figure."""
    out = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, **options)
    pictures[f"{name}.svg"] = out.getvalue()


def draw_everything() -> None:
    """Every picture of the site but the tutorial's."""
    for name, rule in GRANULARITIES.items():
        if fits(rule, AXES[nn.Conv2d]):
            draw_granularity(name)
    for name in CRITERIA:
        draw_criterion(name)
    for name, schedule in SCHEDULES.items():
        draw_schedule(name, schedule)
    for name, method in METHODS.items():
        draw_schedule(name, method.schedule or SCHEDULES["one_cycle"], "method")
    draw_all_schedules()
    draw_contexts()


def cells(ax: Any, mask: torch.Tensor, x0: float = 0, y0: float = 0) -> None:
    """A matrix of squares: dark where it is kept."""
    for y, line in enumerate(mask.tolist()):
        for x, kept in enumerate(line):
            ax.add_patch(
                matplotlib.patches.Rectangle(
                    (x0 + x + 0.06, y0 + y + 0.06), 0.88, 0.88, color=INK if kept else SOFT, lw=0
                )
            )


def draw_granularity(name: str) -> None:
    """Half of a Conv2d of 4 filters with 4 channels of 3 × 3, masked."""
    if max(as_granularity(name).block or (0,)) > 4:  # a picture of a single block would say nothing
        draw_large_blocks(name)
        return
    conv = nn.Conv2d(4, 4, 3, bias=False)
    with torch.no_grad():
        conv.weight.copy_(torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(5)) + 0.1)
    Sparsifier(conv, name).sparsify_model(50)
    kept = (conv.weight != 0).detach()
    figure = Figure(figsize=(2.2, 2.2))
    ax = figure.add_axes((0, 0, 1, 1))
    for o in range(4):
        for i in range(4):
            cells(ax, kept[o, i], i * 3.8, o * 3.8)
    ax.set(xlim=(-0.2, 14.6), ylim=(14.6, -0.2))
    ax.set_axis_off()
    save(f"granularity-{name}", figure)


def draw_large_blocks(name: str) -> None:
    """Half of a Linear layer of 48 × 48 weights, masked."""
    layer = nn.Linear(48, 48, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(6)) + 0.1)
    Sparsifier(layer, name, layer_type=nn.Linear).sparsify_model(50)
    figure = Figure(figsize=(2.2, 2.2))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.imshow((layer.weight != 0).detach().numpy(), cmap=matplotlib.colors.ListedColormap([SOFT, INK]), vmin=0, vmax=1)
    ax.set_axis_off()
    save(f"granularity-{name}", figure)


def draw_criterion(name: str) -> None:
    """The half that a criterion keeps, over where weights began, or what else it looks at, and where they are now."""
    rule = CRITERIA[name]
    other = next((need for need in rule.needs if need not in ("weight", "noise")), "initial")
    n, most = 241, 2.4
    line = torch.linspace(-most, most, n)
    now, began = torch.meshgrid(line, line, indexing="ij")
    noise = torch.rand((n, n), generator=torch.Generator().manual_seed(0))
    positive = other in ("gradient_squared", "flow", "input_norm", "input_mean", "input_max")
    evidence = dict.fromkeys(EVIDENCE, (began + most) / 2 if positive else began) | {"weight": now, "noise": noise}
    scores = rule.score(evidence).expand(n, n)
    density = torch.exp(-(now**2 + began**2) / 2).reshape(-1)
    order = scores.reshape(-1).argsort()
    threshold = scores.reshape(-1)[order][int((density[order].cumsum(0) < density.sum() / 2).sum())]
    figure = Figure(figsize=(1.7, 1.7), layout="constrained")
    ax = figure.subplots()
    colours = matplotlib.colors.ListedColormap([SOFT, INK])
    step = 1 if rule.needs != ("noise",) else 8
    ax.imshow(
        (scores >= threshold)[::step, ::step].numpy(),
        cmap=colours,
        vmin=0,
        vmax=1,
        origin="lower",
        extent=(-1, 1, -1, 1),
    )
    ax.axhline(0, color=ACCENT, lw=0.6)
    ax.axvline(-1 if positive else 0, color=ACCENT, lw=0.6)
    ax.set_xlabel(SIGNS[other], fontsize=9, labelpad=1)
    ax.set_ylabel("w", fontsize=9, labelpad=1, rotation=0)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    save(f"criterion-{name}", figure)


SIGNS = {
    "initial": "w₀",
    "previous": "w'",
    "accumulated": "-Σ w·∂L/∂w",
    "gradient": "∂L/∂w",
    "gradient_squared": "(∂L/∂w)²",
    "hessian_gradient": "H·g",
    "flow": "∂R/∂|w|",
    "input_norm": "‖x‖₂",
    "input_mean": "mean |x|",
    "input_max": "max |x|",
}


def draw_schedule(name: str, schedule: Schedule, what: str = "schedule") -> None:
    """One small curve."""
    figure = Figure(figsize=(2.4, 1.3), layout="constrained")
    ax = figure.subplots()
    at = [i / 400 for i in range(401)]
    ax.plot(at, [schedule(x) for x in at], color=INK, lw=2)
    ax.set(xlim=(0, 1.01), ylim=(-0.04, 1.06), xticks=[0, 0.5, 1], yticks=[0, 1])
    ax.tick_params(labelsize=8, length=2)
    ax.spines[["top", "right"]].set_visible(False)
    save(f"{what}-{name}", figure)


def draw_all_schedules() -> None:
    """All of them over each other, drawn by the package's own plot."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    ax = figure.subplots()
    plot_schedule(*SCHEDULES, sparsity=50, ax=ax)
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    save("schedules", figure)


def draw_contexts() -> None:
    """The same two layers, half masked, under each kind of context."""
    for context in (*CONTEXTS, "2:4"):
        shapes = [(16, 8), (16, 8)] if context not in ("er", "erk", "uniform_plus") else [(8, 8), (20, 8)]
        net = nn.ModuleList([nn.Linear(*shape, bias=False) for shape in shapes])
        with torch.no_grad():
            for layer, scale in zip(net, (1.0, 0.45), strict=True):
                random = torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(3))
                layer.weight.copy_((random + 0.05) * scale)
        Sparsifier(net, "weight", context, layer_type=nn.Linear).sparsify_model(50)
        figure = Figure(figsize=(6.4, 1.75))
        ax = figure.add_axes((0, 0, 1, 1))
        for n, layer in enumerate(net):
            kept = (layer.weight != 0).detach()
            left = n * (shapes[0][0] + 2)
            cells(ax, kept, left, 1.5)
            share = 100 * (1 - kept.float().mean().item())
            words = ("large weights", "small weights") if shapes[0] == shapes[1] else ("8 × 8", "8 × 20")
            text = (
                f"{words[n]}: {share:.0f} % masked"
                if shapes[0] != shapes[1]
                else f"a layer of {words[n]}: {share:.0f} % masked"
            )
            ax.text(left, 0.9, text, fontsize=9, color="#333333", va="baseline")
        ax.set(xlim=(-0.3, 34.5), ylim=(9.7, -0.2))
        ax.set_axis_off()
        save(f"context-{context.replace(':', '-')}", figure)


# -- the tutorial -----------------------------------------------------------------------------------------------------


def tutorial(name: str) -> tuple[str, dict[str, bytes], str]:
    """A tutorial as a page, its pictures, and the executed notebook; executed anew when it or the package changed."""
    source = ROOT / "docs" / f"{name}.ipynb"
    digest = hashlib.sha256()
    cell_sources = [(cell["cell_type"], cell["source"]) for cell in json.loads(source.read_text())["cells"]]
    digest.update(json.dumps(cell_sources).encode())
    for path in sorted((ROOT / "src" / "gossamer").rglob("*.py")):
        digest.update(path.read_bytes())
    kept = CACHE / f"{name}-{digest.hexdigest()[:16]}.ipynb"
    if not kept.exists():
        text = execute(source)
        CACHE.mkdir(parents=True, exist_ok=True)
        for old in CACHE.glob(f"{name}-*.ipynb"):
            old.unlink()
        kept.write_text(text)
    text = kept.read_text()
    return *as_markdown(json.loads(text), name), text


def execute(path: Path) -> str:
    """Runs a notebook from its first cell to its last.

    Raises:
        PluginError: a cell fails, or writes to stderr (a warning, that is).
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError

    notebook = nbformat.read(path, as_version=4)
    # What fastai's own import says of torch and pandas is not the reader's concern.
    quiet = ",".join(f"ignore:{start}" for start in ("`torch.jit.script` is", "The 'mode.chained_assignment' option"))
    # One thread: a network this small gains little from more, and loses much where other work holds the cores.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONWARNINGS": quiet}
    with tempfile.TemporaryDirectory() as folder:
        metadata = {"metadata": {"path": folder}}  # where it runs, so that its files do not stay
        client = NotebookClient(notebook, timeout=1800, startup_timeout=300, kernel_name="python3", resources=metadata)
        client.extra_arguments = ["--log-level=40"]
        try:
            client.execute(env=environment)
        except CellExecutionError as error:
            raise PluginError(f"{path.name}: a cell fails\n{error}") from None
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise PluginError(f"{path.name}: a cell writes to stderr\n{cell.source}\n{output.text}")
    return nbformat.writes(notebook)


def as_markdown(notebook: dict[str, Any], page: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures."""
    parts: list[str] = []
    images: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        if cell["cell_type"] != "code" or not text.strip():
            continue
        parts.append(f"```python\n{text}\n```")
        shown = [part for output in joined(cell["outputs"]) if (part := as_output(output, images, page))]
        if shown:
            parts.append('<div class="output" markdown>\n\n' + "\n\n".join(shown) + "\n\n</div>")
    first, *others = parts
    link = f'[The notebook]({page}.ipynb){{ download="{page}.ipynb" }}, as it was executed for this page.'
    return "\n\n".join([first, link, *others]) + "\n", images


def joined(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a cell gives, with the lines that it printed one after the other as one output."""
    result: list[dict[str, Any]] = []
    for output in outputs:
        if output["output_type"] == "stream":
            text = "".join(output["text"])
            if result and result[-1]["output_type"] == "stream":
                text = result.pop()["text"] + text
            output = {"output_type": "stream", "text": text}
        elif not as_output(output, {}, ""):
            continue
        result.append(output)
    return result


def as_output(output: dict[str, Any], images: dict[str, bytes], page: str) -> str:
    """One output of a cell as Markdown; nothing where there is nothing to see."""
    if output["output_type"] == "stream":
        text = re.sub(r"\n\n+", "\n", "".join(output["text"])).strip()
        return f"```text\n{text}\n```" if text.strip() else ""
    data = output.get("data", {})
    if "image/png" in data:
        name = f"{page}-{len(images) + 1}.png"
        images[name] = base64.b64decode("".join(data["image/png"]))
        width = math.ceil(int.from_bytes(images[name][16:20], "big") / 1.25)
        return f'<img class="picture" src="../pictures/{name}" alt="" width="{width}">'
    if "text/html" in data:
        page = "".join(data["text/html"])
        page = re.sub(r"<style>.*?</style>|<progress.*?</progress>|<!--.*?-->", "", page, flags=re.DOTALL)
        table = re.search(r"<table.*</table>", page, flags=re.DOTALL)
        return re.sub(r"\n\s*", "", table[0]) if table else ""
    text = "".join(data.get("text/plain", "")).strip()
    return f"```text\n{text}\n```" if text and not re.fullmatch(r"<.*>", text) else ""
