"""The one denoising loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .cache import Kept, Repeat, StepCache
from .doors import Conditioning, Denoiser, Encoded, LatentRule, Tree, branched, in_every, inside
from .engines import Engine, eager
from .noise import Generators, draw
from .schedule import Schedule
from .step import Step

# What `Run.done` counts.
CALLS, GUIDED, OFFSET, DEEP = "calls of the network", "guidance", "guidance reused", "deep features reused"


@dataclass
class Run:
    """One run of the loop. What `on_call` may change on the way: `conditioning`, `guidance_scale`, `stop`.

    Attributes:
        conditioning: named tensors; (unconditional, conditional) along the batch where guidance may be on, else the
            conditional half only.
        controls: encoded controls; only those whose window holds the step are run.
        channels: (B, C, H, W) extra input channels, or None.
        rule: applied to the latents after every step, with its tensors, or None.
        guidance_scale: w; guidance is off at 1 and below.
        guidance_interval: fractions of the steps in which guidance is on.
        cache: deep features that some steps reuse; for a denoiser that gives them.
        dtype: of the network's input; latents, guidance and sampler stay in float32.
        done: how many calls of the network there were, and in how many of them what else ran or was reused.
    """

    schedule: Schedule
    denoiser: Denoiser
    conditioning: Conditioning
    controls: Sequence[Encoded] = ()
    channels: Tensor | None = None
    rule: tuple[LatentRule, Tree] | None = None
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    generator: Generators = None
    engine: Engine = eager
    dtype: torch.dtype = torch.float32
    stop: bool = False
    cache: StepCache | None = None
    done: Counter[str] = field(default_factory=Counter)
    _prepared: dict[Any, Tree] = field(default_factory=dict)

    def guided(self, step: int) -> bool:
        return self.guidance_scale > 1 and inside(step, self.schedule.steps, self.guidance_interval)

    def forget(self) -> None:
        """What was prepared from the conditioning is made again before the next step."""
        self._prepared.clear()
        if self.cache is not None:
            self.cache.forget()

    def prepared(self, name: Any, make: Callable[[], Tree]) -> Tree:
        if name not in self._prepared:
            self._prepared[name] = make()
        return self._prepared[name]


@torch.no_grad()
def sample(run: Run, latents: Tensor, on_call: Callable[[int, Tensor, Tensor, Tensor], Tensor] | None = None) -> Tensor:
    """Denoises latents (B, C, H, W), which are at the noise level of the schedule's first call.

    Args:
        on_call: called after every call of the network with its index, the latents before it, the prediction, and the
            latents after it; returns the latents to go on with.

    Returns:
        (B, C, H, W) float32.
    """
    schedule, device = run.schedule, latents.device
    latents = latents.float()
    noise = _draw_noise(run, latents)
    transition = schedule.transition
    state = latents[None] if transition is None else transition.start(latents)
    calls = torch.arange(schedule.calls, device=device)
    for k in range(schedule.calls):
        if run.stop:
            break
        step, tensors = _step(run, k, noise, latents.shape[0], device)
        before = state[0]
        state, prediction, *kept = run.engine(step, state, tensors)(state, calls[k : k + 1], tensors)
        if run.cache is not None and kept:
            run.cache.keep(*kept)
        if transition is None:
            state = _own_step(run, k, state, prediction, calls[k : k + 1], tensors)
        if on_call is not None:
            given = state[0]
            after = on_call(k, before, prediction, given)
            if after is not given:
                state = torch.cat([after[None].to(state), state[1:]])
                if run.cache is not None:
                    run.cache.forget()
    return state[0]


def _draw_noise(run: Run, latents: Tensor) -> Tensor | None:
    """(n, B, C, H, W) of every step that draws noise, in the sampler's order; zeros for the others."""
    schedule = run.schedule
    if not any(schedule.draws(k) for k in range(schedule.calls)):
        return None
    zero = torch.zeros_like(latents)
    return torch.stack(
        [
            draw(latents.shape, run.generator, latents.device, run.dtype).float() if schedule.draws(k) else zero
            for k in range(schedule.calls)
        ]
    )


def _step(run: Run, k: int, noise: Tensor | None, rows: int, device: torch.device) -> tuple[Step, Tree]:
    """The step of call k and all its tensors."""
    schedule, transition = run.schedule, run.schedule.transition
    number = schedule.step_of_call[k]
    guided = run.guided(number)
    if guided and any(len(value) != 2 * rows for value in run.conditioning.values()):
        raise ValueError(f"guidance is on, so embeddings need {2 * rows} rows (unconditional, conditional)")
    active = [c for c in run.controls if c.active(number, schedule.steps)]
    silent = [c for c in run.controls if run.engine.copies and not c.active(number, schedule.steps)]
    scales = (*(c.guidance for c in active if c.guidance is not None), run.guidance_scale) if guided else ()
    branches = 1 + len(scales)
    reused = scales if run.cache is not None and run.cache.guidance == "reuse" else ()  # an offset is of its scales
    kept = None if run.cache is None else run.cache.recall(number, (branches, reused, *map(id, active)), rows)
    offset = None if kept is None else kept.offset
    run.done.update(_parts(run, active, guided, kept))
    if offset is not None:  # in place of the other branches
        scales, branches = (), 1
    conditioning = branched(run.conditioning, rows, branches)
    step = Step(
        denoiser=run.denoiser,
        injections=(*(c.injection for c in active), *(Repeat() for _ in silent)),
        rule=run.rule[0] if run.rule is not None and transition is not None else None,
        branches=branches,
        offset=offset is not None,
        rescaled=branches > 1 and run.guidance_rescale > 0,
        scaled=schedule.scaled,
        dtype=run.dtype,
        noise=noise is not None,
        clip_range=None if transition is None else transition.clip_range,
        variance=None if transition is None else transition.variance,
        linear=transition is not None,
        learned=schedule.learns_variance,
    )
    tensors = {
        "denoiser": run.prepared(
            ("denoiser", branches), lambda: run.denoiser.prepare(schedule.timesteps, conditioning)
        ),
        "controls": (
            *(run.prepared((id(c), branches), lambda c=c: c.tensors(conditioning, branches)) for c in active),
            *(run.prepared(("silence", id(c), branches), lambda c=c: c.silence(branches)) for c in silent),
        ),
        "offset": offset,
        "channels": run.prepared(("channels", branches), lambda: _channels(run, branches)),
        "guidance": run.prepared(("guidance", scales), lambda: torch.tensor(scales).view(-1, 1, 1, 1, 1).to(device)),
        "rescale": run.prepared("rescale", lambda: torch.tensor(run.guidance_rescale).to(device)),
        "rule": None if run.rule is None else run.rule[1],
        "input_scale": schedule.input_scale,
        "clean": schedule.clean,
        "noise": noise,
        "matrix": None if transition is None else transition.matrix,
        "log_spread": None if transition is None else transition.log_spread,
    }
    if run.cache is not None and kept is not None:
        tensors["denoiser"] = {**tensors["denoiser"], "deep": kept.deep}
        if run.cache.controls == "reuse":
            step, tensors["controls"] = replace(step, injections=(Repeat(),)), (kept.answer,)
    return step, tensors


def _parts(run: Run, active: Sequence[Encoded], guided: bool, kept: Kept | None) -> list[str]:
    """What runs in a call of the network, by names to read."""
    reused = run.cache if kept is not None else None
    parts = [CALLS, *([DEEP] if reused is not None else [])]
    if guided:
        parts.append(GUIDED if kept is None or kept.offset is None else OFFSET)
    return parts + ([] if reused is not None and reused.controls == "reuse" else [own.name for own in active])


def _channels(run: Run, branches: int) -> Tensor | None:
    return None if run.channels is None else in_every(run.channels.to(run.dtype), branches)


def _own_step(run: Run, k: int, state: Tensor, prediction: Tensor, call: Tensor, tensors: Tree) -> Tensor:
    """A step by the scheduler itself, for samplers that are no matrix."""
    scheduler, t = run.schedule.scheduler, run.schedule.timesteps[k].cpu()  # where its own timesteps are
    kwargs = dict(run.schedule.step_kwargs)
    if run.schedule.takes_generator:
        kwargs["generator"] = run.generator
    scheduler.scale_model_input(state[0], t)
    latents = scheduler.step(prediction, t, state[0], **kwargs, return_dict=False)[0]
    if run.rule is not None:
        latents = run.rule[0](tensors["rule"], latents, call)
    return latents[None]
