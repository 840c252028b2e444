"""Every process holds all weights: one process, or several whose gradients torch averages (DistributedDataParallel)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from diffusion_kit.training import checkpoints
from diffusion_kit.training.config import OptimizerConfig
from diffusion_kit.training.optimizers import make_optimizer
from diffusion_kit.training.targets.target import Target

from .parallel import Moments, Parallel


class Replicated(Parallel):
    def __init__(self, config: OptimizerConfig, accelerator: Accelerator, target: Target) -> None:
        self.accelerator, self.target, self.clip = accelerator, target, config.clip or math.inf
        self.named = {name: weight for name, weight in target.named_parameters() if weight.requires_grad}
        self.optimizer: Any = make_optimizer(config, self.named.values())
        self.free = hasattr(self.optimizer, "eval")  # of a schedule: then it keeps an average of its own
        if hasattr(self.optimizer, "train"):
            self.optimizer.train()
        self.module = accelerator.prepare_model(target)
        self.scaler = accelerator.scaler

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        (self.scaler.scale(loss) if self.scaler is not None else loss).backward()

    def update(self) -> bool:
        if self.scaler is not None:
            self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.clip)
        finite = bool(torch.isfinite(norm))
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
            finite = finite or self.scaler.get_scale() >= 1  # a scale that was too large has fallen
        elif finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def pieces(self) -> Mapping[str, Tensor]:
        return self.named

    def joined(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(pieces)

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: whole[name] for name in self.named}

    @contextmanager
    def worn(self, pieces: Mapping[str, Tensor] | None) -> Iterator[None]:
        before = {name: weight.detach().clone() for name, weight in self.named.items()} if self.free else {}
        own = {name: weight.data for name, weight in self.named.items()}
        try:
            if self.free:
                self.optimizer.eval()
            for name, piece in (pieces or {}).items():
                self.named[name].data = piece
            yield
        finally:
            for name, weight in self.named.items():
                weight.data = own[name]
            if self.free:
                self.optimizer.train()
                with torch.no_grad():  # bit for bit: there and back it rounds
                    torch._foreach_copy_(list(self.named.values()), list(before.values()))

    def started(self) -> AbstractContextManager[None]:
        return nullcontext()

    def weights(self) -> dict[str, Tensor]:
        return self.target.kept()

    def moments(self) -> Moments:
        tensors, values = checkpoints.flat_optimizer(self.optimizer, list(self.named))
        return Moments(tensors, {**values, "scaler": self.scaler.state_dict() if self.scaler is not None else None})

    def load(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        self.target.load_state_dict(weights, strict=False)  # `kept` may be less than all
        checkpoints.load_optimizer(self.optimizer, list(self.named), moments.tensors, moments.values)
        if self.scaler is not None and moments.values.get("scaler") is not None:
            self.scaler.load_state_dict(moments.values["scaler"])
