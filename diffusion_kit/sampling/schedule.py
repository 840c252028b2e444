"""A schedule: everything about time that a run needs, made once from a scheduler, before the loop."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .transition import Transition, learns_variance, read_transition, takes_variance, told


@dataclass(frozen=True)
class Schedule:
    """n calls of the network, which make up `steps` sampling steps (a second-order sampler calls twice a step).

    Attributes:
        timesteps: (n,) what the network is told.
        input_scale: (n,) the network sees input_scale x latents; `scaled` says whether one of them is not 1.
        noise_level: (n + 1, 2) a and b of x = a image + b noise at each call and after the last, (1, 0).
        clean: (n, 2) p and q of the predicted clean sample x0 = p x + q m.
        init_scale: standard deviation of the latents at the start of text-to-image.
        step_of_call: for each call the sampling step it belongs to.
        transition: the sampler as matrices, or None: then `scheduler.step` is used.
        scheduler: a copy that is this schedule's own.
        step_kwargs: what `scheduler.step` takes beside its three arguments and the generator.
        takes_generator: whether it takes one.
        full_steps: the number of steps before `denoising_end` cut them.
    """

    timesteps: Tensor
    input_scale: Tensor
    scaled: bool
    noise_level: Tensor
    clean: Tensor
    init_scale: float
    step_of_call: tuple[int, ...]
    transition: Transition | None
    scheduler: Any
    step_kwargs: dict[str, Any]
    takes_generator: bool
    full_steps: int

    @property
    def calls(self) -> int:
        return len(self.step_of_call)

    @property
    def learns_variance(self) -> bool:
        return learns_variance(self.scheduler) is not None

    @property
    def steps(self) -> int:
        return self.step_of_call[-1] + 1

    def ends_step(self, call: int) -> bool:
        """Whether a sampling step is done after this call."""
        return call + 1 == self.calls or self.step_of_call[call + 1] != self.step_of_call[call]

    def draws(self, call: int) -> bool:
        return self.transition is not None and self.transition.draws[call]


def make_schedule(
    scheduler: Any,
    steps: int,
    *,
    timesteps: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
    strength: float | None = None,
    denoising_start: float | None = None,
    denoising_end: float | None = None,
    eta: float = 0.0,
    device: torch.device | str = "cpu",
) -> Schedule:
    """The schedule of one run.

    Args:
        scheduler: any diffusers scheduler; it is copied.
        steps: number of sampling steps over the whole range.
        timesteps, sigmas: one of them may replace the scheduler's own spacing.
        strength: image-to-image runs the last int(steps x strength) steps only.
        denoising_start, denoising_end: fractions of the training timesteps between which this run works.
        eta: of DDIM, 0 deterministic, 1 like DDPM.

    Raises:
        ValueError: no step would be left, or the scheduler does not take custom timesteps or sigmas.
    """
    scheduler = copy.deepcopy(scheduler)
    if learns_variance(scheduler) and not takes_variance(scheduler):
        scheduler.register_to_config(variance_type=None)  # what `from_config` has kept of another scheduler's
    asked = _set_timesteps(scheduler, steps, timesteps, sigmas)
    begin = _begin(scheduler, asked, strength, denoising_start)
    times = scheduler.timesteps[begin:]
    if len(times) == 0:
        raise ValueError(f"no step is left: {asked} steps x strength {strength} is less than one step")
    of_call = _steps_of_calls(scheduler)[begin:]
    of_call = [step - of_call[0] for step in of_call]
    full_steps = of_call[-1] + 1

    levels = _noise_levels(scheduler, begin, len(times))
    scales = _input_scales(scheduler, times, begin)
    clean = _clean_coefficients(levels, scales, scheduler.config.get("prediction_type", "epsilon"))
    transition = read_transition(scheduler, times, begin, eta, clean)

    n = _calls_before(scheduler, times, denoising_end)
    if n == 0:
        raise ValueError(f"no step is left before denoising_end={denoising_end}")
    if transition is not None:
        cut = dict(
            vars(transition),
            matrix=transition.matrix[:n],
            draws=transition.draws[:n],
            log_spread=transition.log_spread[:n],
        )
        transition = Transition(**cut).to(torch.device(device))
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    takes = inspect.signature(scheduler.step).parameters
    return Schedule(
        timesteps=times[:n].to(device),
        input_scale=torch.tensor(scales[:n]).to(device),
        scaled=any(scale != 1 for scale in scales[:n]),
        noise_level=torch.tensor(levels[:n] + [(1.0, 0.0)]).to(device),
        clean=torch.tensor(clean[:n]).to(device),
        init_scale=float(scheduler.init_noise_sigma),
        step_of_call=tuple(of_call[:n]),
        transition=transition,
        scheduler=told(scheduler, times),
        step_kwargs={"eta": eta} if "eta" in takes else {},
        takes_generator="generator" in takes,
        full_steps=full_steps,
    )


def _set_timesteps(scheduler: Any, steps: int, timesteps: Any, sigmas: Any) -> int:
    """Sets the scheduler's timesteps on the CPU and returns the number of steps, custom ones counted."""
    if timesteps is not None and sigmas is not None:
        raise ValueError("give timesteps or sigmas, not both")
    custom = {"timesteps": timesteps} if timesteps is not None else {"sigmas": sigmas} if sigmas is not None else {}
    for name, value in custom.items():
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{type(scheduler).__name__} does not take custom {name}")
        scheduler.set_timesteps(**{name: list(value)}, device="cpu")
        return len(scheduler.timesteps)
    if not isinstance(steps, Integral) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"num_inference_steps is {steps!r}; it must be a whole number from 1 on")
    try:
        scheduler.set_timesteps(int(steps), device="cpu")
    except ZeroDivisionError:  # unCLIP's spacing has both ends of the range
        raise ValueError(f"{type(scheduler).__name__} needs 2 steps or more, not {steps}") from None
    return int(steps)


def _cutoff(scheduler: Any, fraction: float) -> int:
    trained = scheduler.config["num_train_timesteps"]
    return int(round(trained - fraction * trained))


def _begin(scheduler: Any, steps: int, strength: float | None, denoising_start: float | None) -> int:
    """Index of the first call: of a hand-over between base and refiner, of image-to-image, or 0."""
    if denoising_start is not None and 0 < denoising_start < 1:
        calls = int((scheduler.timesteps < _cutoff(scheduler, denoising_start)).sum())
        if _order(scheduler) == 2 and calls % 2 == 0:  # never begin in the middle of a step of two calls
            calls += 1
        return len(scheduler.timesteps) - calls
    if strength is None:
        return 0
    if not 0 <= strength <= 1:
        raise ValueError(f"strength is {strength}; it must lie in [0, 1]")
    return max(steps - min(int(steps * strength), steps), 0) * _order(scheduler)


def _order(scheduler: Any) -> int:
    """Calls of the network in a step; unCLIP's scheduler does not say it."""
    return getattr(scheduler, "order", 1)


def _calls_before(scheduler: Any, times: Tensor, denoising_end: float | None) -> int:
    if denoising_end is None or not 0 < denoising_end < 1:
        return len(times)
    return int((times >= _cutoff(scheduler, denoising_end)).sum())


def _steps_of_calls(scheduler: Any) -> list[int]:
    """The sampling step that each call belongs to: a call a step, but for Heun-like samplers (two calls, the last step
    one), PNDM's Runge-Kutta start (three steps of four) and its start without (a first step of two)."""
    calls = range(len(scheduler.timesteps))
    if _order(scheduler) == 2:
        return [k // 2 for k in calls]
    if hasattr(scheduler, "prk_timesteps"):
        warm = len(scheduler.prk_timesteps)
        return [k // 4 if k < warm else k - warm + warm // 4 for k in calls] if warm else [max(k - 1, 0) for k in calls]
    return list(calls)


def _noise_levels(scheduler: Any, begin: int, n: int) -> list[tuple[float, float]]:
    """a and b of x = a image + b noise at each call, as the scheduler's `add_noise` mixes them.

    A scheduler without it makes pictures from noise only: (1, 0), which `starts` refuses to use.
    """
    if not hasattr(scheduler, "add_noise"):
        return [(1.0, 0.0)] * n
    probe = copy.deepcopy(scheduler)
    image, noise = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    levels = []
    for k in range(begin, begin + n):
        if hasattr(probe, "set_begin_index"):
            probe.set_begin_index(k)
        a, b = probe.add_noise(image, noise, probe.timesteps[k : k + 1])[0].tolist()
        levels.append((a, b))
    return levels


def _input_scales(scheduler: Any, times: Tensor, begin: int) -> list[float]:
    """What each call multiplies the latents with; the scheduler is stepped along, because some of them count calls."""
    probe = copy.deepcopy(scheduler)
    if hasattr(probe, "set_begin_index"):
        probe.set_begin_index(begin)
    one = torch.ones(1, 1, 1, 1)
    output = torch.ones(1, 2, 1, 1) if learns_variance(scheduler) else one
    takes = inspect.signature(probe.step).parameters
    own = {"generator": torch.Generator()} if "generator" in takes else {}  # never the caller's random numbers
    scales = []
    for t in times:
        scales.append(float(probe.scale_model_input(one.clone(), t)))
        probe.step(output, t, one, **own, return_dict=False)
    return scales


def _clean_coefficients(
    levels: list[tuple[float, float]], scales: list[float], prediction_type: str
) -> list[tuple[float, float]]:
    """p and q of x0 = p x + q m, where x = a x0 + b e and the network sees s x with (s a)^2 + (s b)^2 = 1.

    epsilon: m = e; v_prediction: m = (s a) e - (s b) x0 (Salimans and Ho 2022, arXiv 2202.00512); sample: m = x0.
    """
    result = []
    for (a, b), s in zip(levels, scales, strict=True):
        if prediction_type == "sample":
            result.append((0.0, 1.0))
        elif prediction_type == "v_prediction":
            result.append((s * a * s, -s * b))
        else:
            result.append((1 / a if a else 0.0, -b / a if a else 0.0))
    return result
