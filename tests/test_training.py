"""The trainer: every target learns and writes what diffusers loads."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import conftest
import diffusers
import pytest
import torch
import training_models
from conftest import distance, light
from safetensors.torch import load_file

from diffusion_kit import AutoPipelineForText2Image, Control, ControlLoRA
from diffusion_kit.models.attention import installed
from diffusion_kit.sampling.doors import Answer
from diffusion_kit.training import checkpoints
from diffusion_kit.training.bases import load_base
from diffusion_kit.training.data.samples import collate, open_pictures
from diffusion_kit.training.group import join
from diffusion_kit.training.keyed import Place
from diffusion_kit.training.memory import first_batch
from diffusion_kit.training.targets import make_target
from diffusion_kit.training.targets.t2i_adapter import times
from diffusion_kit.training.train import build_cache, make_trainer, train

TARGETS = [
    ("t2i_adapter", "sdxl"),
    ("t2i_adapter", "sd15"),
    ("t2i_adapter", "kandinsky"),
    ("controlnet", "sdxl"),
    ("controlnet", "sd15"),
    ("control_lora", "sdxl"),
    ("unet", "sdxl"),
    ("unet", "kandinsky"),
    ("hint_decoder", "kandinsky"),
    ("prior", "kandinsky"),
    ("autoencoder", "sdxl"),
    ("autoencoder", "kandinsky"),
]
ONCE = list({target: (target, family) for target, family in reversed(TARGETS)}.values())  # each target, of one family


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("target", "family"), light(TARGETS, *ONCE))
def test_every_target_learns_one_batch(tmp_path, target, family):
    """The same two pictures again and again, nothing dropped: the loss falls."""
    more = {"network": {"rank": 4}} if target == "control_lora" else {}
    own = {"sources": [{"path": training_models.data(2)}]}
    off = {"caption": 0.0, "condition": 0.0}
    config = training_models.config(target, tmp_path, family, data=own, dropout=off, steps=12, **more)
    result = train(config)
    losses = [row["loss"] for row in metrics(tmp_path)]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert list(result.rglob("*.safetensors"))
    first = load_file(next(iter(sorted((tmp_path / "checkpoints").glob("*/weights.safetensors")))))
    assert all(value.dtype == torch.float32 for value in first.values())


@pytest.mark.parametrize(
    ("target", "family"), light(TARGETS, ("t2i_adapter", "sdxl"), ("hint_decoder", "kandinsky"), ("prior", "kandinsky"))
)
def test_validation_shows_and_measures(tmp_path, target, family):
    config = training_models.config(
        target,
        tmp_path,
        family,
        steps=2,
        network={"rank": 4} if target == "control_lora" else {},
        data={"holdout": 2, "condition": {"detector": "canny"}},
        validation={"every": 1, "pictures": 2, "steps": 2},
        checkpoints={"every": 1, "keep": 1},
    )
    train(config)
    rows = [row["validation"] for row in metrics(tmp_path) if "validation" in row]
    assert len(rows) == 2
    assert {"loss_seen", "loss_unseen", "fidelity"} <= rows[0].keys()
    kept = sorted(folder.name for folder in (tmp_path / "checkpoints").iterdir())
    best = max((row["fidelity"], -k) for k, row in enumerate(rows))
    assert kept == sorted({"step-00000002", f"step-0000000{1 - best[1]}"})
    if target != "prior":
        assert (tmp_path / "validation" / "step-00000002" / "unseen.png").is_file()


@pytest.mark.parametrize(
    ("target", "family"), [("t2i_adapter", "sdxl"), ("controlnet", "sd15"), ("hint_decoder", "kandinsky")]
)
def test_a_cache_changes_no_loss(tmp_path, target, family):
    """Random crops, flips, detected conditions, several captions: the same losses, and nothing is computed twice."""
    own = {"flip": 0.5, "crop": "random", "crops": 2, "resolution": 48, "condition": {"detector": "canny"}}
    own |= {"resolution": 64} if family == "kandinsky" else {}
    plain = training_models.config(target, tmp_path / "plain", family, data=own)
    cached = training_models.config(
        target, tmp_path / "cached", family, data=own, cache={"folder": str(tmp_path / "c")}
    )
    train(plain)
    train(cached)
    losses = [[row["loss"] for row in metrics(tmp_path / name)] for name in ("plain", "cached")]
    assert torch.allclose(*map(torch.tensor, losses), rtol=1e-6, atol=0)
    shards = {file: file.stat().st_mtime_ns for file in (tmp_path / "c").rglob("*.safetensors")}
    assert len(shards) >= (2 if family == "kandinsky" else 3)
    build_cache(cached, (0, 1), lambda line: None)
    assert shards == {file: file.stat().st_mtime_ns for file in (tmp_path / "c").rglob("*.safetensors")}


LOADERS = {
    "t2i_adapter": diffusers.T2IAdapter,
    "controlnet": diffusers.ControlNetModel,
    "unet": diffusers.StableDiffusionXLPipeline,
    "autoencoder": diffusers.AutoencoderKL,
    "prior": diffusers.KandinskyV22PriorPipeline,
    "hint_decoder": diffusers.KandinskyV22ControlnetPipeline,
    "control_lora": ControlLoRA,
}


@pytest.mark.parametrize("target", light(LOADERS, "t2i_adapter", "controlnet"))
def test_plain_diffusers_loads_the_averaged_weights(tmp_path, target):
    family = "kandinsky" if target in ("prior", "hint_decoder") else "sdxl"
    more = {"network": {"rank": 4}} if target == "control_lora" else {}
    own = {"data": {"condition": {"detector": "canny"}}, "validation": {"every": 2, "pictures": 2, "steps": 2}}
    result = train(training_models.config(target, tmp_path, family, steps=2, ema=0.5, **own, **more))
    loaded = LOADERS[target].from_pretrained(str(result))
    if target == "control_lora":
        given = {name: pair[0] for name, pair in loaded.pairs.items()} | loaded.whole
    else:
        net = {"unet": "unet", "prior": "prior", "hint_decoder": "unet"}.get(target)
        given = (getattr(loaded, net) if net else loaded).state_dict()
    averaged = load_file(checkpoints.whole(tmp_path / "checkpoints")[-1] / "ema.safetensors")
    means = {name.partition(".")[2].replace(".lora_B.default", ""): value for name, value in averaged.items()}
    shared = [name for name in given if name in means]
    assert len(shared) > 0.4 * len(given)
    assert all(torch.equal(given[name], means[name]) for name in shared)
    card = (result / "README.md").read_text()
    assert "## Last validation" in card
    assert "base_model:" in card
    assert (result / "training.yaml").is_file()


def test_a_trained_control_makes_the_same_picture_in_plain_diffusers(tmp_path):
    result = train(training_models.config("t2i_adapter", tmp_path, data={"condition": {"detector": "canny"}}))
    adapter = diffusers.T2IAdapter.from_pretrained(result)
    edges = conftest.lines(0)
    call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    base = training_models.base("sdxl")
    theirs = diffusers.StableDiffusionXLAdapterPipeline.from_pretrained(base, adapter=adapter)
    a = theirs("a fox", image=edges, height=64, width=64, **call).images
    ours = AutoPipelineForText2Image.from_pretrained(base)
    b = ours(
        "a fox", controls=[Control(str(result), edges)], **{**call, "generator": torch.Generator().manual_seed(0)}
    ).images
    assert abs(a - b).max() < 1e-3


@pytest.mark.parametrize(
    ("target", "family"),
    light(
        [("t2i_adapter", "sdxl"), ("controlnet", "sdxl"), ("unet", "kandinsky"), ("autoencoder", "sdxl")],
        ("t2i_adapter", "sdxl"),
        ("unet", "kandinsky"),
    ),
)
def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, target, family):
    weights = []
    for on in (False, True):
        folder = tmp_path / str(on)
        train(training_models.config(target, folder, family, steps=2, gradient_checkpointing=on))
        weights.append(checkpoints.read(checkpoints.whole(folder / "checkpoints")[-1]).tensors["weights"])
    assert all(torch.allclose(weights[0][name], weights[1][name], rtol=1e-4, atol=1e-6) for name in weights[0])


def test_gradient_checkpointing_runs_blocks_again(tmp_path):
    config = training_models.config("controlnet", tmp_path, gradient_checkpointing=True)
    trainer = make_trainer(config, join(config), print)
    blocks = [
        block for net in trainer.target.executed for block in net.modules() if hasattr(block, "gradient_checkpointing")
    ]
    calls = []
    for block in blocks:
        for resnet in getattr(block, "resnets", ()):
            resnet.register_forward_pre_hook(lambda *_: calls.append(1))
    forward = None
    batch = first_batch(trainer, 2)
    with torch.enable_grad(), trainer.executing():
        loss = trainer.parallel.module(batch).loss.sum()
        forward = len(calls)
        loss.backward()
    assert len(calls) > 1.5 * forward


def test_a_schedule_free_run_goes_on_where_it_was(tmp_path):
    own = {"optimizer": {"name": "schedule_free", "learning_rate": 1e-3}, "checkpoints": {"every": 2}}
    train(training_models.config("t2i_adapter", tmp_path / "whole", steps=4, **own))
    train(training_models.config("t2i_adapter", tmp_path / "parts", steps=2, **own))
    train(training_models.config("t2i_adapter", tmp_path / "parts", steps=4, **own), resume=True)
    a, b = (load_file(tmp_path / name / "result/diffusion_pytorch_model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_is_refused_without_a_gpu(tmp_path):
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        train(training_models.config("t2i_adapter", tmp_path, precision="fp16"))


def test_a_decoder_that_is_given_a_hint_begins_as_it_was(tmp_path):
    own = make_target(training_models.config("hint_decoder", tmp_path, "kandinsky"), torch.device("cpu"))
    plain = make_target(training_models.config("unet", tmp_path, "kandinsky"), torch.device("cpu"))
    x, embeds = torch.randn(1, 4, 8, 8), {"image_embeds": torch.randn(1, 32)}
    hint = Answer(channels=torch.randn(1, 4, 8, 8))
    made = []
    for target, answer in ((own, hint), (plain, Answer())):
        with installed(*target.executed):
            made.append(target.base.predict(x, torch.tensor([500]), embeds, answer))
    torch.testing.assert_close(*made)


def test_encoders_learn_along(tmp_path):
    """Text encoders of SDXL, the image encoder of Kandinsky: written with the result, and moved."""
    for family, file in (("sdxl", "text_encoder_2"), ("kandinsky", "prior/image_encoder")):
        folder = tmp_path / family
        result = train(training_models.config("unet", folder, family, network={"encoders": True}))
        before = Path(training_models.base("prior" if family == "kandinsky" else family)) / file.removeprefix("prior/")
        a, b = (load_file(place / "model.safetensors") for place in (before, result / file))
        assert any(not torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("target", "family"), light(TARGETS, *ONCE))
def test_a_loss_needs_no_number_of_the_device(tmp_path, target, family):
    """On tensors without numbers: what reads one on the host, or mixes devices, raises."""
    more = {"control_lora": {"network": {"rank": 4}}, "unet": {"network": {"encoders": True}}}.get(target, {})
    device = torch.device("meta")
    config = training_models.config(target, tmp_path, family, **more)
    own = make_target(config, torch.device("cpu"))
    nets = [own, *(part for part in vars(own).values() if hasattr(part, "components"))]
    nets += [pipe for pipe in (own.base.pipe, own.base.prior) if pipe is not None] if own.base is not None else []
    for net in nets:
        net.to(device)
    batch = collate([open_pictures(config, own.conditioned)[Place(0, 0, k), k] for k in range(2)]).to(device)
    with torch.enable_grad(), installed(*own.executed):
        losses, levels = own(batch)
        losses.sum().backward()
    assert losses.device == device
    trained = [p for p in own.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.device == device for p in trained)  # processes wait for every gradient


def test_a_latent_that_overflows_in_half_precision_is_made_again_and_named(tmp_path, recwarn):
    base = load_base(training_models.config("t2i_adapter", tmp_path), torch.device("cpu"))
    first = next(iter(base.vae.parameters()))
    first.data = first.data.abs() * (3e4 / first.data.abs().max())  # products beyond what float16 holds
    pixels = torch.stack([torch.zeros(3, 64, 64), torch.ones(3, 64, 64)])
    wanted = base.encode(pixels, ["dark.png", "bright.png"])
    base.vae.half()
    made = base.encode(pixels, ["dark.png", "bright.png"])
    assert torch.isfinite(made).all()
    told = [str(warning.message) for warning in recwarn if "overflowed" in str(warning.message)]
    assert len(told) == 1
    assert "bright.png" in told[0]
    assert distance(made, wanted) < 1e-2
    assert base.vae.dtype == torch.float16
    base.encode(pixels, ["dark.png", "bright.png"])
    assert len([w for w in recwarn if "overflowed" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("target", "family"), light(TARGETS, ("t2i_adapter", "sdxl"), ("unet", "kandinsky"), ("autoencoder", "sdxl"))
)
def test_a_run_in_bfloat16(tmp_path, target, family):
    """What is trained stays in float32, what is frozen is in bfloat16 but for the autoencoder; validation runs too."""
    more = {"network": {"rank": 4}} if target == "control_lora" else {}
    own = {"data": {"condition": {"detector": "canny"}}, "validation": {"every": 2, "pictures": 1, "steps": 1}}
    config = training_models.config(target, tmp_path, family, steps=2, precision="bf16", **own, **more)
    train(config)
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in metrics(tmp_path) if "loss" in row)
    made = make_target(config, torch.device("cpu"))
    assert all(p.dtype == torch.float32 for p in made.parameters() if p.requires_grad)
    if made.base is not None:
        frozen = {p.dtype for p in made.base.unet.parameters() if not p.requires_grad}
        assert frozen <= {torch.bfloat16}
        assert made.base.vae.dtype == torch.float32


@pytest.mark.parametrize(("target", "family"), [("t2i_adapter", "sdxl"), ("prior", "kandinsky")])
def test_a_run_in_bfloat16_with_a_cache_in_float16(tmp_path, target, family):
    own = {
        "cache": {"folder": str(tmp_path / "cache"), "dtype": "float16"},
        "data": {"condition": {"detector": "canny"}},
    }
    train(training_models.config(target, tmp_path / "run", family, steps=2, precision="bf16", **own))
    assert all(torch.isfinite(torch.tensor(row["loss"])) for row in metrics(tmp_path / "run") if "loss" in row)


@pytest.mark.parametrize(
    ("target", "family"), [("controlnet", "sdxl"), ("control_lora", "sdxl"), ("hint_decoder", "kandinsky")]
)
def test_a_control_image_arrives_where_the_network_learns_from_it(tmp_path, target, family):
    """A fresh embedding neither swallows what differs between two images nor blows it up."""
    own = make_target(training_models.config(target, tmp_path, family), torch.device("cpu"))
    if target == "hint_decoder":
        embed, last = own.unet.add_embedding.input_hint_block, own.unet.add_embedding.input_hint_block[-1]
    else:
        embed = own.controlnet.controlnet_cond_embedding
        last = embed.conv_out
    seen = []
    last.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    with torch.no_grad():
        for image in (torch.rand(1, 3, 64, 64) > 0.9).float(), torch.zeros(1, 3, 64, 64):
            embed(image)
    assert 0.03 < float((seen[0] - seen[1]).std()) < 3


@pytest.mark.parametrize("kind", ["full_adapter", "full_adapter_xl", "light_adapter"])
def test_a_gain_is_in_the_weights(kind):
    adapter = diffusers.T2IAdapter(adapter_type=kind, channels=[32, 64, 96, 96], num_res_blocks=1)
    sketch = torch.rand(2, 3, 128, 128)
    for feature, grown in zip(adapter(sketch), times(30.0, adapter)(sketch), strict=True):
        torch.testing.assert_close(grown, 30 * feature, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("gain", [0, -2, float("nan"), float("inf"), True, "much"])
def test_a_gain_that_is_no_positive_number_is_refused_before_the_training(tmp_path, gain):
    with pytest.raises(ValueError, match=r"network\.gain is .*: a positive number"):
        make_target(training_models.config("t2i_adapter", tmp_path, network={"gain": gain}), torch.device("cpu"))


def test_a_training_with_a_gain_goes_on_from_its_result(tmp_path):
    """The same features whether the gain is in the weights or beside them."""
    first = train(training_models.config("t2i_adapter", tmp_path / "first", network={"gain": 20}))
    own = {"init_from": str(first), "optimizer": {"learning_rate": 1e-12}, "steps": 1}
    for gain in (1, 7):
        train(training_models.config("t2i_adapter", tmp_path / str(gain), network={"gain": gain}, **own))
    losses = [metrics(tmp_path / gain)[0]["loss"] for gain in ("1", "7")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = train(
        training_models.config("t2i_adapter", tmp_path / "plain", steps=1, optimizer={"learning_rate": 1e-12})
    )
    assert losses[0] != pytest.approx(metrics(plain.parent)[0]["loss"], rel=1e-4)


@pytest.mark.parametrize("target", ["t2i_adapter", "controlnet", "control_lora"])
def test_a_training_starts_from_given_weights(tmp_path, target):
    """Of an earlier run; files in published layouts come through the same loader, see test_weights_export."""
    more = {"network": {"rank": 4}} if target == "control_lora" else {}
    result = train(training_models.config(target, tmp_path / "first", **more))
    source = result / "control_lora.safetensors" if target == "control_lora" else result
    again = make_target(training_models.config(target, tmp_path, init_from=str(source), **more), torch.device("cpu"))
    before = load_file(checkpoints.whole(tmp_path / "first" / "checkpoints")[-1] / "weights.safetensors")
    assert before.keys() == again.kept().keys()
    assert all(torch.equal(before[name], value) for name, value in again.kept().items())


def test_latents_of_a_movq_are_normalised_by_its_weights(tmp_path):
    own = make_target(training_models.config("autoencoder", tmp_path, "kandinsky"), torch.device("cpu"))
    pixels = torch.rand(4, 3, 64, 64) * 2 - 1
    before = own.reconstruct(pixels)
    codes = own.vae.decode(own.vae.encode(pixels).latents).sample
    batch = SimpleNamespace(samples=[SimpleNamespace(pixels=row, weight=1.0) for row in pixels])
    own.finish(lambda: [batch])
    latents = own.vae.encode(pixels).latents
    std, mean = torch.std_mean(latents, (0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(std, torch.ones(4), rtol=0, atol=1e-4)
    assert distance(own.reconstruct(pixels), before) < 1e-3
    assert distance(codes, before) > 1e-2


def test_a_cache_keeps_nothing_of_what_is_trained(tmp_path):
    own = {"cache": {"folder": str(tmp_path / "cache")}, "network": {"encoders": True}}
    with pytest.raises(ValueError, match="cache.latents cannot keep what a network in training makes"):
        train(training_models.config("unet", tmp_path / "run", "kandinsky", **own))
    train(training_models.config("unet", tmp_path / "sdxl", "sdxl", **own))
    kept = [folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir()]
    assert [folder.name.partition("-")[0] for folder in kept] == ["latents"]
