"""The engines that a network can be run by on this machine, each ready to call."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gossamer.bench.machine import is_installed, version
from gossamer.errors import StateError
from gossamer.export import export_onnx, hushed
from gossamer.runtime import CompiledModel
from gossamer.storage.files import save


@dataclass(frozen=True)
class Job:
    """What every engine is given.

    Args:
        model: in plain PyTorch, in eval mode.
        fast: the same, compiled.
        examples: the arguments.
        threads: to use.
        folder: for files.
    """

    model: nn.Module
    fast: CompiledModel
    examples: tuple[Any, ...]
    threads: int
    folder: Path

    @property
    def tensors(self) -> list[Tensor]:
        """The arguments that are tensors: an ONNX file's inputs."""
        return [e for e in tree_leaves(self.examples) if isinstance(e, Tensor)]


@dataclass(frozen=True)
class Engine:
    """One that is ready.

    Args:
        version: of the distribution.
        call: gives the outputs.
        nbytes: of the file that it needs.
    """

    version: str
    call: Callable[[], Any]
    nbytes: int


class UnavailableError(Exception):
    """An engine is not there, for the reason that it says."""


def _eager(job: Job) -> Engine:
    return Engine(str(version("torch")), lambda: job.model(*job.examples), _weights(job))


def _channels_last(job: Job) -> Engine:
    if not any(t.ndim == 4 for t in job.tensors):
        raise UnavailableError("no input has four axes")
    model: Any = copy.deepcopy(job.model).to(memory_format=torch.channels_last)
    examples = [
        e.contiguous(memory_format=torch.channels_last) if isinstance(e, Tensor) and e.ndim == 4 else e
        for e in job.examples
    ]
    return Engine(str(version("torch")), lambda: model(*examples), _weights(job))


def _inductor(job: Job) -> Engine:
    model = torch.compile(copy.deepcopy(job.model), options={"freezing": True})  # weights packed, as for inference
    with hushed():
        model(*job.examples)
    return Engine(str(version("torch")), lambda: model(*job.examples), _weights(job))


def _gossamer(job: Job) -> Engine:
    try:
        path = job.fast.save(job.folder / "model.gossamer")
    except StateError:  # its layers run one by one, in its own code
        path = save(job.model, job.folder / "model.safetensors")
    return Engine(str(version("gossamer")), lambda: job.fast(*job.examples), path.stat().st_size)


def _onnxruntime(job: Job) -> Engine:
    _need("onnxruntime")
    return _in_onnxruntime(job, _onnx_file(job))


def _onnxruntime_int8(job: Job) -> Engine:
    return _in_onnxruntime(job, _int8_file(job))


def _in_onnxruntime(job: Job, path: Path) -> Engine:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = job.threads
    options.log_severity_level = 3
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = {i.name: t.numpy() for i, t in zip(session.get_inputs(), job.tensors, strict=True)}
    return Engine(str(version("onnxruntime")), lambda: session.run(None, given), _size(path))


def _openvino(job: Job) -> Engine:
    _need("openvino")
    ov: Any = importlib.import_module("openvino")

    return _in_openvino(job, ov.Core().read_model(str(_onnx_file(job))), _size(_onnx_file(job)))


def _openvino_int8(job: Job) -> Engine:
    _need("openvino")
    ov: Any = importlib.import_module("openvino")

    if not is_installed("nncf"):
        return _in_openvino(job, ov.Core().read_model(str(_int8_file(job))), _size(_int8_file(job)))
    with hushed():
        nncf: Any = importlib.import_module("nncf")  # which is no part of the development environment
        data = nncf.Dataset([[t.numpy() for t in job.tensors]])
        model = nncf.quantize(ov.Core().read_model(str(_onnx_file(job))), data, subset_size=1)
        path = job.folder / "int8.xml"
        ov.save_model(model, str(path))
    return _in_openvino(job, model, _size(path, path.with_suffix(".bin")))


def _in_openvino(job: Job, model: Any, nbytes: int) -> Engine:
    ov: Any = importlib.import_module("openvino")

    settings = {"INFERENCE_NUM_THREADS": job.threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request, data = compiled.create_infer_request(), [t.numpy() for t in job.tensors]

    def call() -> list[Any]:
        found = request.infer(data, share_inputs=True, share_outputs=True)
        return [found[o] for o in compiled.outputs]

    return Engine(str(version("openvino")), call, nbytes)


def _onnx_file(job: Job) -> Path:
    path = job.folder / "model.onnx"
    if not path.exists():
        export_onnx(job.model, job.examples, path, batch=False, check=False)  # a fixed shape, which suits engines best
    return path


def _int8_file(job: Job) -> Path:
    """Weights a channel, activations a tensor, in 8 bits, calibrated on the example inputs."""
    _need("onnxruntime")
    path = job.folder / "int8.onnx"
    if path.exists():
        return path
    with hushed():
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.shape_inference import quant_pre_process

        inputs = {i.name: t.numpy() for i, t in zip(_inputs(_onnx_file(job)), job.tensors, strict=True)}

        given = iter([inputs])

        class Once(CalibrationDataReader):
            def get_next(self) -> Any:
                return next(given, None)

        ready = job.folder / "ready.onnx"
        quant_pre_process(str(_onnx_file(job)), str(ready), skip_symbolic_shape=True)
        quantize_static(
            str(ready),
            str(path),
            Once(),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    return path


def _inputs(path: Path) -> Any:
    import onnx

    return onnx.load(str(path), load_external_data=False).graph.input


def _need(distribution: str) -> None:
    if not is_installed(distribution):
        raise UnavailableError(f"not installed: pip install {distribution}")


def _size(*paths: Path) -> int:
    return sum(p.stat().st_size for p in paths)


def _weights(job: Job) -> int:
    tensors = {t.data_ptr(): t for t in (*job.model.parameters(), *job.model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


ENGINES: Mapping[str, Callable[[Job], Engine]] = MappingProxyType(
    {
        "eager": _eager,
        "channels_last": _channels_last,
        "inductor": _inductor,
        "onnxruntime": _onnxruntime,
        "openvino": _openvino,
        "onnxruntime int8": _onnxruntime_int8,
        "openvino int8": _openvino_int8,
        "gossamer": _gossamer,
    }
)
"""Name → what makes an engine ready. Those in int8 run the same network, rounded."""

INT8 = ("onnxruntime int8", "openvino int8")
"""The engines whose outputs are rounded to eight bits on the way."""
