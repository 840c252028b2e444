"""Networks run by OpenVINO, on a CPU: each is converted once for the shapes of what it is given, and kept on disk.

Keys and values of the text and residuals of controls are inputs. What cannot be converted runs as it is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusion_kit.sampling.doors import Tree, shapes
from diffusion_kit.sampling.step import Step

from .engine import Engine, StepFunction
from .exported import Flat, filled, leaves, outputs_of, version, wide
from .files import whole_folder
from .weights import content, park, sampled, state

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class OpenVINO(Engine):
    """
    Args:
        folder: where converted networks are kept.
        precision: in which OpenVINO computes; None is that of the weights.
        parks: weights of converted networks lie in a file meanwhile (see `weights.park`).
    """

    name = "openvino"
    copies = True

    def __init__(self, folder: Path, precision: torch.dtype | None = None, *, parks: bool = True) -> None:
        super().__init__()
        import openvino

        self.core = openvino.Core()
        self.folder, self.precision, self.parks = folder, precision, parks
        self.made: dict[Any, Made] = {}
        self.used: set[Hashable] = set()

    def renew(self) -> None:
        self.used = set()
        self.made = {key: own for key, own in self.made.items() if own.bits == sampled(key[0].executed)}

    def __call__(self, step: Step, state: Tensor, tensors: Tree) -> StepFunction:
        injections = tuple(self.network(own) for own in step.injections)
        return replace(step, denoiser=self.network(step.denoiser), injections=injections)

    def network(self, network: Any) -> Any:
        return Converted(network, self) if network.executed else network

    def runner(self, network: Any, inputs: Tree) -> Any:
        """The network as OpenVINO runs it for inputs of these shapes, or as it is where that cannot be."""
        key = (network, shapes(inputs), torch.get_num_threads())
        self.used.add(key)
        known = self.made.get(key)
        if known is None or known.state != state(network.executed):
            # A call needs the memory of what it uses; what was made for another size is on disk.
            self.made = {k: own for k, own in self.made.items() if k in self.used and k != key}
            runner = self._make(network, inputs)
            known = self.made[key] = Made(runner, state(network.executed), sampled(network.executed))
        return known.runner

    def _make(self, network: Any, inputs: Tree) -> Any:
        try:
            request = self.core.compile_model(self._converted(network, inputs), "CPU", self._options(network))
            runner = Request(request.create_infer_request(), outputs_of(network, inputs))
        except Exception as error:  # a converter may raise anything
            told = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            self.note(f"{type(network).__name__} runs as it is, OpenVINO cannot: {told[0].strip()[:200]}")
            return network
        if self.parks:
            park(network.executed, self.folder)
        return runner

    def _options(self, network: Any) -> dict[str, Any]:
        dtype = self.precision or next(network.executed[0].parameters()).dtype
        return {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}

    def _converted(self, network: Any, inputs: Tree) -> Path:
        """The file of the converted network, made where it is not there."""
        import openvino

        versions = [importlib.metadata.version(name) for name in ("openvino", "torch", "diffusers", "diffusion_kit")]
        about = f"{versions}{network}{shapes(inputs)}{content(network.executed)}"
        folder = self.folder / f"openvino-{hashlib.sha256(about.encode()).hexdigest()[:32]}"
        with whole_folder(folder) as new:
            if new is not None:
                flat = Flat(network, inputs).eval()
                with torch.no_grad():
                    exported = torch.export.export(flat, tuple(map(wide, leaves(inputs))))
                openvino.save_model(openvino.convert_model(exported), new / "model.xml", compress_to_fp16=False)
        return folder / "model.xml"


class Made(NamedTuple):
    """What runs in place of a network, and the weights of which it was made."""

    runner: Any
    state: Hashable
    bits: list[int]


@dataclass(frozen=True)
class Converted:
    """Stands for a network: for what its engine makes of it when it is called."""

    network: Any
    engine: OpenVINO

    @property
    def executed(self) -> tuple[nn.Module, ...]:
        return self.network.executed

    def __call__(self, *inputs: Tree) -> Tree:
        return self.engine.runner(self.network, inputs)(*inputs)


class Request:
    """A compiled network and what it was given last; `outputs` are tensors like those that it gives."""

    def __init__(self, request: Any, outputs: Tree) -> None:
        self.request, self.outputs = request, outputs
        self.given: dict[int, tuple[Tensor, Hashable, Tensor]] = {}

    def __call__(self, *inputs: Tree) -> Tree:
        for k, value in enumerate(leaves(inputs)):
            self._give(k, value)
        self.request.infer()
        return filled(self.outputs, [self._result(k, like) for k, like in enumerate(leaves(self.outputs))])

    def _give(self, k: int, value: Tensor) -> None:
        """Hands a tensor over; what is the same in every step is there already."""
        import openvino

        known, before, _ = self.given.get(k, (None, None, None))
        now = version(value)
        if known is not value or before != now:
            held = wide(value).contiguous()  # the request reads it where it lies
            self.request.set_input_tensor(k, openvino.Tensor(held.numpy(), shared_memory=True))
            self.given[k] = (value, now, held)

    def _result(self, k: int, like: Tensor) -> Tensor:
        return torch.from_numpy(self.request.get_output_tensor(k).data).to(like.dtype, copy=True)
