"""The objective against what its papers say, and against diffusers' own schedulers and networks."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import training_models
from conftest import SCHEDULE, distance, randomise

from diffusion_kit.models.attention import installed
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.training.config import ObjectiveConfig
from diffusion_kit.training.data.samples import collate, open_pictures
from diffusion_kit.training.keyed import Place, draws
from diffusion_kit.training.objective import make_objective
from diffusion_kit.training.targets import make_target
from diffusion_kit.training.validation import quiet_samples

PLACES = [Place(0, 0, k) for k in range(2000)]


def objective(prediction: str = "epsilon", zero: bool = False, **more):
    scheduler = diffusers.DDPMScheduler(**SCHEDULE, prediction_type=prediction, rescale_betas_zero_snr=zero)
    return make_objective(scheduler, ObjectiveConfig(**more)), scheduler


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero", [False, True])
def test_noisy_latents_and_targets_are_the_schedulers(prediction, zero):
    if zero and prediction == "epsilon":
        with pytest.raises(ValueError, match="pure noise tells nothing"):
            objective(prediction, zero)
        return
    own, scheduler = objective(prediction, zero)
    x, noise, t = torch.randn(4, 4, 8, 8), torch.randn(4, 4, 8, 8), torch.tensor([0, 300, 700, 999])
    torch.testing.assert_close(own.add_noise(x, noise, t), scheduler.add_noise(x, noise, t))
    target = noise if prediction == "epsilon" else scheduler.get_velocity(x, noise, t)
    torch.testing.assert_close(own.target(x, noise, t), target)
    if zero:
        assert torch.equal(own.add_noise(x, noise, t)[3], noise[3])


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_makes_both_predictions_the_same_loss_of_x0(prediction):
    """min(SNR, g) |x0 error|^2 (arXiv 2303.09556, section 3.4), whatever is predicted."""
    gamma = 5.0
    own, _ = objective(prediction, min_snr_gamma=gamma)
    t = torch.tensor([1, 100, 400, 800, 990])
    a = own.alphas[t].double()
    x, noise, guess = (torch.randn(5, 4, 8, 8, dtype=torch.double) for _ in range(3))
    noisy = own.add_noise(x, noise, t)
    root, rest = a.sqrt().view(-1, 1, 1, 1), (1 - a).sqrt().view(-1, 1, 1, 1)
    x0 = (noisy - rest * guess) / root if prediction == "epsilon" else root * noisy - rest * guess
    error = (guess - own.target(x, noise, t)).square().mean((1, 2, 3))
    wanted = torch.minimum(a / (1 - a), torch.tensor(gamma)) * (x0 - x).square().mean((1, 2, 3))
    torch.testing.assert_close(error * own.weights(t).double(), wanted, rtol=1e-4, atol=1e-9)


def test_min_snr_of_pure_noise_is_finite():
    own, _ = objective("v_prediction", True, min_snr_gamma=5.0)
    assert torch.isfinite(own.weights(torch.arange(1000))).all()
    assert own.weights(torch.tensor([999])) == 0


def test_cubic_timesteps_are_distributed_as_said():
    """P(t <= s T) = 1 - (1 - s)^(1/3) for t = (1 - u^3) T."""
    own, _ = objective(timesteps="cubic")
    t = own.timesteps(PLACES).double() / 1000
    for share in (0.2, 0.5, 0.8):
        assert abs((t < share).double().mean().item() - (1 - (1 - share) ** (1 / 3))) < 0.03
    uniform, _ = objective()
    assert abs((uniform.timesteps(PLACES).double() / 1000).mean().item() - 0.5) < 0.02


def test_the_offset_is_constant_in_a_channel():
    own, _ = objective(noise_offset=0.5)
    plain, _ = objective()
    added = own.noise(PLACES[:50], (4, 8, 8)) - plain.noise(PLACES[:50], (4, 8, 8))
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), rtol=0, atol=1e-6)
    assert abs(added[:, :, 0, 0].std().item() - 0.5) < 0.08


def test_draws_belong_to_place_and_purpose():
    values = {
        (seed, epoch, k, purpose): draws(Place(seed, epoch, k), purpose).random()
        for seed in (0, 1)
        for epoch in (0, 1)
        for k in (0, 1)
        for purpose in ("noise", "crop")
    }
    assert len(set(values.values())) == len(values)
    assert draws(Place(1, 2, 3), "noise").random() == draws(Place(1, 2, 3), "noise").random()
    assert (
        np.corrcoef(draws(Place(0, 0, 0), "noise").random(9000), draws(Place(0, 0, 1), "noise").random(9000))[0, 1]
        < 0.05
    )


@pytest.mark.parametrize(
    ("target", "family"), [("t2i_adapter", "sdxl"), ("controlnet", "sd15"), ("controlnet", "sdxl")]
)
def test_losses_and_gradients_are_those_of_the_peers_forward(tmp_path: Path, target, family):
    """The same adapter, base, noise and text through diffusers' own forward: the same loss and the same gradients."""
    own = make_target(training_models.config(target, tmp_path, family), torch.device("cpu"))
    net = own.adapter if target == "t2i_adapter" else own.controlnet
    randomise(net, 5).train()
    base = own.base
    batch = collate(quiet_samples(pictures(tmp_path, target, family), (0, 1, 2)))
    with torch.enable_grad():
        with installed(*own.executed):
            losses, _ = own(batch)
            losses.mean().backward()
        gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
        net.zero_grad()
        x = base.latents(batch)
        noise, t = base.objective.noise(batch.places, x.shape[1:]), base.objective.timesteps(batch.places)
        noisy, text = base.objective.add_noise(x, noise, t), base.conditioning(batch)
        added = {"text_embeds": text["add_text_embeds"], "time_ids": text["add_time_ids"]} if family == "sdxl" else None
        states = text["prompt_embeds"]
        if target == "t2i_adapter":
            residuals = {"down_intrablock_additional_residuals": net(batch.condition)}
        else:
            down, mid = net(noisy, t, states, batch.condition, added_cond_kwargs=added, return_dict=False)
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
        made = base.unet(noisy, t, states, added_cond_kwargs=added, **residuals).sample
        wanted = (made - base.objective.target(x, noise, t)).square().mean((1, 2, 3))
        wanted.mean().backward()
    torch.testing.assert_close(losses, wanted, rtol=1e-5, atol=1e-6)
    for name, p in net.named_parameters():
        assert distance(gradients[name], p.grad) < 1e-4, name
        assert p.grad.abs().max() > 0
    assert all(p.grad is None for p in base.unet.parameters())


def pictures(tmp_path: Path, target: str, family: str):
    return open_pictures(training_models.config(target, tmp_path, family), True)


def test_a_controlnet_begins_as_the_base_without_it(tmp_path: Path):
    """Its output convolutions are zero, so the loss is the base's own."""
    own = make_target(training_models.config("controlnet", tmp_path, "sdxl"), torch.device("cpu"))
    batch = collate(quiet_samples(pictures(tmp_path, "controlnet", "sdxl"), (0, 1)))
    with installed(*own.executed):
        begin, _ = own(batch)
        randomise(own.controlnet, 4)
        moved, _ = own(batch)
        own.answer = lambda *_: Answer()
        without, _ = own(batch)
    assert torch.equal(begin, without)
    assert distance(moved, without) > 1e-2
