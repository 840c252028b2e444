"""Every sampler as one small matrix a step.

A sampler's step is linear in the latents x, in what the sampler remembers (earlier predictions or samples), in the
network's prediction m and in fresh noise z; only clipping of the predicted clean sample is not. So with the state
S = (x, h_1, ..., h_r) stacked in one tensor, a step is

    S' = M_i [S; m; clip(x0) - x0; z]

and M_i, (1 + r) x (1 + r + 3), is known before the loop. It is read out of the scheduler itself: its step is given unit
vectors in place of x, of each tensor it remembers and of m, and what comes back is the matrix. So every option of a
scheduler (spacings, Karras sigmas, solver orders, final sigmas, prediction types, zero terminal SNR) is right here
because it is right there. The matrices are then replayed beside the scheduler on random numbers; where they differ
(thresholding, a non-linear solver) there is no table, and the loop uses the scheduler's own step.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PADS = 8  # coordinates in which only noise appears: its factor is measured there
TOLERANCE = 1e-3  # of the largest value of a call; replay differs from the scheduler by rounding only
LOUD = 100.0  # of the trial's numbers: a clamp inside a scheduler shows
Slot = tuple[str, int | None]  # where a scheduler keeps a tensor: attribute, index in a list


@dataclass(frozen=True)
class Transition:
    """The matrices of a schedule, on one device, and what their columns need.

    Attributes:
        matrix: (n, R, K, 1, 1, 1, 1); K = R + prediction [+ clip] [+ noise].
        draws: for each call, whether the sampler draws noise (it may do so and multiply by 0).
        clip_range: bound of the clipped clean sample, or None.
        variance: "learned", "learned_range" (half of the network's channels are a variance) or None.
        log_spread: (n, 2), log of the smallest and the largest noise factor of "learned_range".
    """

    matrix: Tensor
    draws: tuple[bool, ...]
    clip_range: float | None
    variance: str | None
    log_spread: Tensor

    @property
    def rows(self) -> int:
        return self.matrix.shape[1]

    def start(self, latents: Tensor) -> Tensor:
        """State (R, B, C, H, W) with empty memory."""
        return torch.cat([latents[None], latents.new_zeros(self.rows - 1, *latents.shape)])

    def to(self, device: torch.device) -> Transition:
        fields = dict(vars(self), matrix=self.matrix.to(device), log_spread=self.log_spread.to(device))
        return Transition(**fields)


def advance(
    state: Tensor,
    prediction: Tensor,
    matrix: Tensor,
    *,
    clean: tuple[Tensor, float] | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """S' = M [S; m; clip(x0) - x0; z], in float32.

    Args:
        state: (R, B, C, H, W).
        prediction: m, (B, C, H, W).
        matrix: (R, K, 1, 1, 1, 1).
        clean: predicted clean sample x0 and the bound it is clipped to, if the sampler clips.
        noise: z, (B, C, H, W), if the sampler draws any.
    """
    columns = [state, prediction[None].to(state.dtype)]
    if clean is not None:
        x0, bound = clean
        columns.append((x0.clamp(-bound, bound) - x0)[None])
    if noise is not None:
        columns.append(noise[None])
    return (matrix * torch.cat(columns)).sum(1)


def noise_factor(variance_output: Tensor, kind: str, log_spread: Tensor) -> Tensor:
    """Standard deviation of a step's noise from the network's variance channels (Nichol and Dhariwal 2021, eq. 15).

    Args:
        variance_output: (B, C, H, W); in [-1, 1] for "learned_range", a variance for "learned".
        log_spread: (2,) logs of the smallest and the largest standard deviation.
    """
    if kind == "learned":
        return variance_output.sqrt()
    low, high = log_spread.unbind(-1)
    return torch.exp(low + (variance_output + 1) / 2 * (high - low))


def read_transition(
    scheduler: Any, timesteps: Tensor, begin: int, eta: float, clean: list[tuple[float, float]]
) -> Transition | None:
    """The matrices of `scheduler` over `timesteps`, or None where its step is not linear.

    Args:
        scheduler: a diffusers scheduler after `set_timesteps` on the CPU; it is not changed.
        begin: index of `timesteps[0]` in the scheduler's own list.
        clean: for each call p and q of x0 = p x + q m.
    """
    config = scheduler.config
    if config.get("thresholding") or not len(timesteps):
        return None
    reader = _Reader(scheduler, timesteps, begin, eta, learns_variance(scheduler))
    clips = bool(config.get("clip_sample"))
    trial = reader.trial()
    if trial is None:
        return None
    plain = reader.matrices(clip_sample=False) if clips else reader.matrices()
    parts = [plain[:, :, :-1]]
    if clips:
        parts.append(_clip_column(plain, reader.matrices(clip_sample_range=0.0), clean))
    log_spread = torch.zeros(len(timesteps), 2)
    if any(reader.draws):
        noise = plain[:, :, -1:]
        if reader.variance == "learned_range":
            low, high = reader.matrices(variance=-1.0)[:, :, -1:], noise
            noise = (high > 0).float()
            log_spread = torch.cat([low, high], -1)[:, 0].log().nan_to_num(neginf=0.0)
        parts.append(noise)
    matrix = torch.cat(parts, -1)[..., None, None, None, None]
    bound = float(config["clip_sample_range"]) if clips else None
    transition = Transition(matrix, tuple(reader.draws), bound, reader.variance, log_spread)
    return transition if _replays(transition, trial, clean) else None


def told(scheduler: Any, timesteps: Tensor) -> Any:
    """The scheduler; where its step does not look up the timestep that follows (unCLIP's), it is told from now on."""
    step = scheduler.step
    if "prev_timestep" in inspect.signature(step).parameters:
        following = dict(zip(timesteps.tolist(), timesteps[1:].tolist(), strict=False))
        scheduler.step = lambda m, t, x, **more: step(m, t, x, prev_timestep=following.get(int(t)), **more)
    return scheduler


def learns_variance(scheduler: Any) -> str | None:
    """ "learned" or "learned_range" where half of the network's output channels are the variance, else None."""
    kind = scheduler.config.get("variance_type")
    return kind if kind in ("learned", "learned_range") else None


def takes_variance(scheduler: Any) -> bool:
    """Whether its step has a use for a variance beside the prediction: DDPM's and unCLIP's have. Others only carry the
    setting in their configuration, or take three channels for a prediction's."""
    takes = "variance_type" in inspect.signature(type(scheduler).__init__).parameters
    return takes and hasattr(scheduler, "_get_variance")


def _clip_column(plain: Tensor, clipped_to_zero: Tensor, clean: list[tuple[float, float]]) -> Tensor:
    """Factor of the clean sample in each row: what vanishes when the sampler clips it to nothing is C (p x + q m)."""
    lost = plain - clipped_to_zero  # (n, R, K)
    columns = []
    for row, (p, q) in zip(lost, clean, strict=True):
        columns.append(row[:, 0] / p if abs(p) > abs(q) else row[:, -2] / q)
    return torch.stack(columns)[..., None]


@dataclass
class _Trial:
    """A run of the scheduler on random numbers: predictions, noise and the latents after each call."""

    start: Tensor
    predictions: list[Tensor]
    variances: list[Tensor]
    noises: list[Tensor]
    latents: list[Tensor]


class _Reader:
    """Reads the matrices out of copies of a scheduler, whose memory it finds by the shape of the tensors in it."""

    def __init__(self, scheduler: Any, timesteps: Tensor, begin: int, eta: float, variance: str | None):
        self.scheduler, self.timesteps, self.begin = scheduler, timesteps, begin
        self.variance = variance
        self.takes = inspect.signature(scheduler.step).parameters
        self.eta = {"eta": eta} if "eta" in self.takes else {}
        self.slots: list[Slot] = []
        self.draws: list[bool] = []

    def trial(self) -> _Trial | None:
        """Runs the scheduler on random numbers and notes where it keeps tensors and when it draws noise."""
        source = torch.Generator().manual_seed(0)
        shape = (1, 1, 1, PADS + 1)
        x = LOUD * torch.randn(shape, generator=source)
        run = _Trial(x, [], [], [], [])
        scheduler = self._copy()
        for t in self.timesteps:
            m = LOUD * torch.randn(shape, generator=source)
            v = torch.rand(shape, generator=source)
            x, z, drawn = self._call(scheduler, t, x, m, v)
            if drawn is None:
                return None
            self.draws.append(drawn)
            self.slots += [slot for slot in _memory(scheduler, shape) if slot not in self.slots]
            run.predictions.append(m)
            run.variances.append(v)
            run.noises.append(z)
            run.latents.append(x)
        return run

    def matrices(self, variance: float = 1.0, **config: Any) -> Tensor:
        """(n, R, R + 2): columns are the state, the prediction and the noise."""
        scheduler = self._copy()
        scheduler.register_to_config(**config)
        rows = 1 + len(self.slots)
        unit = torch.eye(rows + 1, rows + 1 + PADS)[:, None, None, None]  # (R + 1, 1, 1, 1, R + 1 + PADS)
        result = torch.zeros(len(self.timesteps), rows, rows + 2)
        for k, t in enumerate(self.timesteps):
            for slot in _memory(scheduler, unit.shape[1:]):
                _remember(scheduler, slot, unit[1 + self.slots.index(slot)].clone())
            x, z, _ = self._call(scheduler, t, unit[0].clone(), unit[-1].clone(), torch.full_like(unit[0], variance))
            memory = _memory(scheduler, unit.shape[1:])
            outputs = [x] + [memory.get(slot, torch.zeros_like(x)) for slot in self.slots]
            result[k] = torch.stack([_split(out.flatten(), z.flatten()) for out in outputs])
        return result

    def _copy(self) -> Any:
        scheduler = copy.deepcopy(self.scheduler)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(self.begin)
        return told(scheduler, self.timesteps)

    def _call(self, scheduler: Any, t: Tensor, x: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, bool | None]:
        """One step: x', the noise that was drawn (or zeros), and whether any was; None if more than one draw."""
        output = torch.cat([m, v], 1) if self.variance else m
        generator, reference = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
        z = torch.randn(x.shape, generator=reference)
        kwargs = {"generator": generator} if "generator" in self.takes else {}
        scheduler.scale_model_input(x.clone(), t)
        after = scheduler.step(output, t, x, **self.eta, **kwargs, return_dict=False)[0]
        state = generator.get_state()
        if torch.equal(state, torch.Generator().manual_seed(7).get_state()):
            return after, torch.zeros_like(z), False
        return after, z, True if torch.equal(state, reference.get_state()) else None


def _memory(scheduler: Any, shape: tuple[int, ...]) -> dict[Slot, Tensor]:
    found: dict[Slot, Tensor] = {}
    for name, value in vars(scheduler).items():
        items = enumerate(value) if isinstance(value, list) else [(None, value)]
        found |= {(name, k): item for k, item in items if isinstance(item, Tensor) and item.shape == shape}
    return found


def _remember(scheduler: Any, slot: Slot, value: Tensor) -> None:
    name, index = slot
    if index is None:
        setattr(scheduler, name, value)
    else:
        getattr(scheduler, name)[index] = value


def _split(out: Tensor, noise: Tensor) -> Tensor:
    """Coefficients (R + 2,) of a row: the noise's factor is measured where nothing else is, then taken off."""
    pads = slice(-PADS, None)
    power = noise[pads].square().sum()
    factor = (out[pads] * noise[pads]).sum() / power if power > 0 else torch.zeros(())
    return torch.cat([out[:-PADS] - factor * noise[:-PADS], factor[None]])


def _replays(transition: Transition, run: _Trial, clean: list[tuple[float, float]]) -> bool:
    """Whether the matrices give the latents that the scheduler gave."""
    state = transition.start(run.start)
    for k, after in enumerate(run.latents):
        noise = run.noises[k] if any(transition.draws) else None
        if transition.variance and noise is not None:
            noise = noise * noise_factor(run.variances[k], transition.variance, transition.log_spread[k])
        p, q = clean[k]
        x0 = p * state[0] + q * run.predictions[k]
        clip = None if transition.clip_range is None else (x0, transition.clip_range)
        state = advance(state, run.predictions[k], transition.matrix[k], clean=clip, noise=noise)
        if not (state[0] - after).abs().max() <= TOLERANCE * after.abs().max().clamp(min=1e-6):
            return False
    return True
