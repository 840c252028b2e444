"""DeepSpeed's engine: gradients, moments and weights are spread over the processes (ZeRO, Rajbhandari et al. 2020, arXiv
1910.02054), or held elsewhere than on the accelerator (ZeRO-Infinity, 2021, arXiv 2104.07857).

| stage | spread over the processes |
| --- | --- |
| 0 | nothing |
| 1 | moments, and float32 weights |
| 2 | gradients too |
| 3 | weights too |
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion_kit.training.targets.target import Target

from .parallel import Moments, Parallel

HELD = -1  # no module's number: stands for one that still needs a weight, which is then not let go of by those that ran


def require() -> None:
    """
    Raises:
        ImportError: DeepSpeed is not installed; says how to get it.
    """
    if importlib.util.find_spec("deepspeed") is None:
        raise ImportError('deepspeed is not installed: pip install "diffusion_kit[deepspeed]"')


class Network(nn.Module):
    """What the engine is given: the target, and the frozen networks that are to be spread with it."""

    def __init__(self, target: Target, frozen: list[nn.Module], accelerator: Accelerator) -> None:
        super().__init__()
        self.target, self.frozen = target, nn.ModuleList(frozen)
        self.autocast = accelerator.autocast

    def forward(self, batch: Any) -> tuple[Tensor, Tensor]:
        with self.autocast():
            loss, level = self.target(batch)
        return loss, level


class Zero(Parallel):
    """
    Attributes:
        stage: of ZeRO.
    """

    def __init__(
        self,
        settings: dict[str, Any],
        optimizer: Any,
        frozen: list[nn.Module],
        accelerator: Accelerator,
        target: Target,
    ) -> None:
        import deepspeed

        self.target, self.rank = target, accelerator.process_index
        self.named = {name: weight for name, weight in target.named_parameters() if weight.requires_grad}
        self.stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self.spread = self.stage == 3 and bool(frozen)
        engine, self.optimizer, _, scheduler = deepspeed.initialize(
            model=Network(target, frozen, accelerator),
            model_parameters=list(self.named.values()),
            optimizer=optimizer,
            config=settings,
        )
        self.module = self.engine = engine
        self.scheduler, self.scheduled = scheduler, scheduler is not None
        if hasattr(getattr(self.optimizer, "loss_scaler", None), "raise_error_at_min_scale"):
            self.optimizer.loss_scaler.raise_error_at_min_scale = False  # the trainer says what helps, and ends the run
        if self.stage in (1, 2):
            self.optimizer.check_grad_overflow = True  # a gradient that is not finite is left out in float32 too
        if not self.sharded:
            self.inner.state.clear()  # in half precision it has made a step without a gradient, which would be counted

    # A step

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self.engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)  # the trainer's loss is a mean over the whole step already

    def update(self) -> bool:
        scaled = self.engine.fp16_enabled()  # then the engine looks itself, and scales less the next time
        if not (self.sharded or scaled or self.finite()):  # else it steps down any gradient
            self.engine.zero_grad()
            return False
        falls = scaled and self.falls()
        self.engine.step()
        return bool(self.engine.was_step_applied()) or falls

    def falls(self) -> bool:
        """Whether a gradient that is too large makes the loss scale smaller, so that a later one may fit."""
        own = getattr(self.optimizer, "loss_scaler", None)
        if own is not None:
            return bool(own.dynamic and own.cur_scale > own.min_scale)
        own = self.optimizer.loss_scale_config
        return bool(own.dynamic_loss_scale and own.cur_scale > own.min_loss_scale)

    def finite(self) -> bool:
        gradients = [weight.grad for weight in self.named.values() if weight.grad is not None]
        return bool(torch.isfinite(torch.nn.utils.get_total_norm(gradients)))

    # Pieces

    @property
    def sharded(self) -> bool:
        """Whether every process holds a part of the moments only."""
        return any(hasattr(weight, "ds_id") or hasattr(weight, "_hp_mapping") for weight in self.named.values())

    def span(self, weight: Any) -> tuple[int, int]:
        """Where this process's piece of a weight, laid flat, begins and how long it is."""
        if hasattr(weight, "ds_id"):
            each = weight.ds_tensor.ds_numel
            start = min(each * self.rank, weight.ds_numel)
            return start, min(each, weight.ds_numel - start)
        own = weight._hp_mapping
        return (0, 0) if own is None else (own.lp_fragment_address.start, own.lp_fragment_address.numel)

    def master(self, weight: Any) -> Any:
        """A weight that every process holds, in float32: beside one in half precision the optimizer has its own."""
        pairs = zip(
            getattr(self.optimizer, "fp16_groups", ()), getattr(self.optimizer, "fp32_groups", ()), strict=False
        )
        found = (full for half, whole in pairs for own, full in zip(half, whole, strict=True) if own is weight)
        return next(found, weight)

    def piece(self, weight: Any, key: str | None = None) -> Tensor:
        """Of a weight in float32, or of one of its moments."""
        if not self.sharded:
            master = self.master(weight)
            return master if key is None else self.inner.state[master][key]
        if hasattr(weight, "ds_id"):
            found = weight._z3_optimizer.get_local_fp32_param(weight, key)
            return found[: self.span(weight)[1]]
        own = weight._hp_mapping
        return torch.empty(0) if own is None else own.get_hp_fragment(key)

    def pieces(self) -> Mapping[str, Tensor]:
        return {name: self.piece(weight) for name, weight in self.named.items()}

    def joined(self, pieces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.whole(self.named[name], piece) for name, piece in pieces.items()}

    def whole(self, weight: Any, piece: Tensor) -> Tensor:
        if not self.sharded:
            return piece
        shape = getattr(weight, "ds_shape", weight.shape)
        flat = torch.zeros(shape.numel(), dtype=torch.float32, device=piece.device)
        start, length = self.span(weight)
        flat[start : start + length] = piece
        dist.all_reduce(flat)
        return flat.view(shape)

    def cut(self, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.part(weight, whole[name]) for name, weight in self.named.items()}

    def part(self, weight: Any, whole: Tensor) -> Tensor:
        start, length = self.span(weight) if self.sharded else (0, whole.numel())
        return whole.flatten()[start : start + length] if self.sharded else whole

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """The target holds all of its weights; what the first process changes of them stays."""
        import deepspeed

        weights: list[Any] = list(self.target.parameters())
        with deepspeed.zero.GatheredParameters(weights, modifier_rank=0, enabled=self.stage == 3):
            held = [weight.ds_active_sub_modules for weight in weights if hasattr(weight, "ds_active_sub_modules")]
            for modules in held:
                modules.add(HELD)
            try:
                yield
            finally:
                for modules in held:
                    modules.discard(HELD)

    @contextmanager
    def worn(self, pieces: Mapping[str, Tensor] | None) -> Iterator[None]:
        whole = self.joined(pieces) if pieces is not None else {}
        with self.gathered(), torch.no_grad():
            own = {name: self.named[name].detach().clone() for name in whole}
            self.put(whole)
            try:
                yield
            finally:
                self.put(own)

    @contextmanager
    def started(self) -> Iterator[None]:
        """What the block changes of the weights, alike in every process, stands in float32 too."""
        with self.worn(None):
            before = {name: weight._version for name, weight in self.named.items()}
            yield
            changed = {
                name: weight.detach().float().clone()
                for name, weight in self.named.items()
                if weight._version != before[name]
            }
        with torch.no_grad():
            for name, whole in changed.items():
                self.lay(self.named[name], self.part(self.named[name], whole), None)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, value in tensors.items():
            self.named[name].data.copy_(value)

    # State

    def weights(self) -> dict[str, Tensor]:
        whole = self.joined(self.pieces())
        return {name: whole.get(name, value) for name, value in self.target.kept().items()}

    def moments(self) -> Moments:
        states = [state for state in self.inner.state.values() if state]
        keys = sorted(
            {key for state in states for key, value in state.items() if isinstance(value, Tensor) and value.ndim}
        )
        tensors = {
            f"{name}:{key}": self.whole(weight, self.piece(weight, key))
            for name, weight in self.named.items()
            for key in keys
        }
        step = next((float(state["step"]) for state in states if "step" in state), None)
        if step is not None:
            tensors |= {f"{name}:step": torch.tensor(step) for name in self.named}
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        return Moments(tensors, {"values": {}, "groups": groups, "scaler": self.scale(), "schedule": self.schedule()})

    @property
    def inner(self) -> Any:
        """The optimizer inside the engine's."""
        return getattr(self.optimizer, "optimizer", self.optimizer)

    def scale(self) -> dict[str, Any] | None:
        """Of a loss in half precision."""
        scaler = getattr(self.optimizer, "loss_scaler", None)
        if scaler is None:
            return None
        return {key: value for key, value in vars(scaler).items() if isinstance(value, (bool, int, float))}

    def schedule(self) -> dict[str, Any] | None:
        return self.scheduler.state_dict() if self.scheduler is not None else None

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], moments: Moments) -> None:
        with self.gathered():
            self.put({name: weights[name] for name in self.named})
            buffers = {name: buffer for name, buffer in self.target.named_buffers() if name in weights}
            for name, buffer in buffers.items():
                buffer.copy_(weights[name])
        self.fill(None, weights)  # in float32, beside those in half precision
        kinds = {full.rpartition(":")[2] for full, value in moments.tensors.items() if value.ndim}
        steps = [float(value) for full, value in moments.tensors.items() if full.endswith(":step")]
        self.prepare(kinds, steps[0] if steps else None)
        for kind in sorted(kinds):
            self.fill(kind, {name: moments.tensors[f"{name}:{kind}"] for name in self.named})
        if moments.values.get("scaler") is not None:
            vars(self.optimizer.loss_scaler).update(moments.values["scaler"])
        if self.scheduler is not None and moments.values.get("schedule") is not None:
            self.scheduler.load_state_dict(moments.values["schedule"])

    def fill(self, kind: str | None, whole: Mapping[str, Tensor]) -> None:
        """Lays this process's pieces of the weights, or of one kind of moments, where the engine holds them."""
        for name, weight in self.named.items():
            self.lay(weight, self.part(weight, whole[name]), kind)

    def lay(self, weight: Any, piece: Tensor, kind: str | None) -> None:
        if hasattr(weight, "ds_id"):
            padded = torch.zeros(weight.ds_tensor.numel(), dtype=torch.float32)
            padded[: piece.numel()] = piece
            weight._z3_optimizer.set_local_hp_param(padded, weight, kind)
        elif not self.sharded:
            self.piece(weight, kind).copy_(piece)
        elif weight._hp_mapping is not None:
            weight._hp_mapping.get_hp_fragment(kind).copy_(piece)

    def prepare(self, kinds: set[str], step: float | None) -> None:
        """Makes the optimizer's state, which it otherwise makes in its first step."""
        swaps = getattr(self.optimizer, "swap_optimizer", False)
        flats = getattr(self.optimizer, "fp32_partitioned_groups_flat", None)  # of stage 3
        for k, flat in enumerate(flats or [p for group in self.inner.param_groups for p in group["params"]]):
            if swaps:
                self.optimizer._optimizer_states_and_gradient_swap_in(k)
            state = self.inner.state[flat]
            state |= {kind: torch.zeros_like(flat, memory_format=torch.contiguous_format) for kind in kinds}
            if step is not None:
                counts = type(self.inner).__module__.startswith("deepspeed")  # in whole numbers
                state["step"] = int(step) if counts else torch.tensor(step)
            if swaps:
                self.optimizer._optimizer_states_and_gradient_swap_out(k)
        if hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._lazy_init_hp_params_optimizer_state()
