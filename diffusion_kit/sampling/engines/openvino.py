"""Networks run by OpenVINO, on a CPU."""

from __future__ import annotations

from collections.abc import Hashable
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffusion_kit.sampling.doors import Tree

from .converting import PACKAGES, Converting
from .exported import Flat, filled, leaves, outputs_of, plain, version
from .pages import without_pages_of

PRECISIONS = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


class OpenVINO(Converting):
    """
    Args:
        precision: in which OpenVINO computes; None is that of the weights.
    """

    name = "openvino"
    runtime = "OpenVINO"
    packages: ClassVar[tuple[str, ...]] = ("openvino", *PACKAGES)

    def __init__(self, folder: Path, precision: torch.dtype | None = None, *, parks: bool = True) -> None:
        super().__init__(folder, parks=parks)
        self.precision = precision

    @cached_property
    def core(self) -> Any:
        import openvino

        return openvino.Core()

    def __getstate__(self) -> dict[str, Any]:
        return {name: own for name, own in super().__getstate__().items() if name != "core"}

    def convert(self, flat: Flat, example: tuple[Tensor, ...], new: Path) -> None:
        import openvino

        model = openvino.convert_model(torch.export.export(flat, example))
        openvino.save_model(model, new / "model.xml", compress_to_fp16=False)

    def load(self, folder: Path, network: Any, inputs: Tree) -> Any:
        dtype = self.precision or next(network.executed[0].parameters()).dtype
        options = {"INFERENCE_PRECISION_HINT": PRECISIONS[dtype], "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        with without_pages_of(folder / "model.bin"):  # it keeps the file beside what it makes of it
            compiled = self.core.compile_model(folder / "model.xml", "CPU", options)
        return Request(compiled.create_infer_request(), outputs_of(network, inputs))


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
            held = plain(value)  # the request reads it where it lies
            self.request.set_input_tensor(k, openvino.Tensor(held.numpy(), shared_memory=True))
            self.given[k] = (value, now, held)

    def _result(self, k: int, like: Tensor) -> Tensor:
        return torch.from_numpy(self.request.get_output_tensor(k).data).to(like.dtype, copy=True)
