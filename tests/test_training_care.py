"""What a training must not mistake, lose or be ended by: each was once wrong."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import diffusers
import numpy as np
import pytest
import torch
import training_models
from conftest import make_adapter, make_sd_unet, needs, picture
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from safetensors.torch import load_file

from diffusion_kit import cli
from diffusion_kit.training import bases, caching, checkpoints, memory, run, validation
from diffusion_kit.training.bases import tell_scheduler
from diffusion_kit.training.config import ObjectiveConfig
from diffusion_kit.training.data.cache import open_cache
from diffusion_kit.training.data.crops import make_crop
from diffusion_kit.training.data.samples import View, open_pictures, seen
from diffusion_kit.training.data.sources import open_folder, open_list
from diffusion_kit.training.group import join
from diffusion_kit.training.keyed import Place
from diffusion_kit.training.loop import Figures
from diffusion_kit.training.objective import make_objective
from diffusion_kit.training.targets import make_target
from diffusion_kit.training.train import build_cache, make_trainer, train, with_batch

CPU = torch.device("cpu")
EDGES = {"condition": {"detector": "canny"}}


def trainer(folder: Path, target: str = "t2i_adapter", **more: Any) -> Any:
    config = training_models.config(target, folder, **more)
    return make_trainer(config, join(config), lambda line: None)


def state(folder: Path) -> Any:
    return checkpoints.read(checkpoints.whole(folder / "checkpoints")[-1]).state


# Precision and objective


def test_the_autoencoder_is_left_out_of_autocast(tmp_path: Path) -> None:
    base = bases.load_base(training_models.config("t2i_adapter", tmp_path), CPU)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(base.encode(pixels, ["a", "b"]), base.encode(pixels, ["a", "b"]).float())
        inside = base.encode(pixels, ["a", "b"])
    assert torch.equal(inside, base.encode(pixels, ["a", "b"]))


@pytest.mark.parametrize(
    ("target", "family"), [("unet", "sdxl"), ("hint_decoder", "kandinsky"), ("prior", "kandinsky")]
)
def test_what_learns_begins_in_full_precision_and_the_rest_is_saved_as_it_was(
    target: str, family: str, tmp_path: Path
) -> None:
    """Although everything frozen is in bfloat16 during the training."""
    still = {"learning_rate": 1e-12, "weight_decay": 0.0}
    result = train(training_models.config(target, tmp_path, family, steps=1, precision="bf16", optimizer=still))
    assert result is not None
    source = training_models.base("prior" if target == "prior" else family)
    compared = 0
    for file in Path(source).rglob("*.safetensors"):
        before, after = load_file(file), load_file(result / file.relative_to(source))
        for name, value in before.items():
            if after[name].shape == value.shape and name not in ("clip_mean", "clip_std"):
                assert torch.allclose(after[name], value, rtol=0, atol=1e-9), f"{file.parent.name} {name}"
                compared += 1
    assert compared > 100


def test_the_scheduler_is_told_what_was_trained(tmp_path: Path) -> None:
    own = {"prediction": "v_prediction", "zero_terminal_snr": True}
    train(training_models.config("unet", tmp_path / "run", steps=1, objective=own))
    told = json.loads((tmp_path / "run/result/scheduler/scheduler_config.json").read_text())
    assert (told["prediction_type"], told["rescale_betas_zero_snr"]) == ("v_prediction", True)
    assert told["timestep_spacing"] == "trailing"
    with pytest.raises(ValueError, match="are the base's own where it is frozen"):
        make_target(training_models.config("t2i_adapter", tmp_path, objective=own), CPU)
    with pytest.raises(ValueError, match="not a prior's"):
        make_target(training_models.config("prior", tmp_path, "kandinsky", objective=own), CPU)


def test_a_mirrored_crop_is_told_from_the_side_that_is_seen(tmp_path: Path) -> None:
    data = {"crop": "random", "crops": 4, "flip": 1.0, "sources": [{"path": str(wide(tmp_path))}]}
    pictures = open_pictures(training_models.config("unet", tmp_path / "run", data=data), False)
    plain = open_pictures(training_models.config("unet", tmp_path / "run", data={**data, "flip": 0.0}), False)
    lefts = [[own[Place(0, 0, k), 0].time_ids[3].item() for k in range(8)] for own in (pictures, plain)]
    assert [a + b for a, b in zip(*lefts, strict=True)] == [64.0] * 8
    assert lefts[0] != lefts[1]


def wide(folder: Path) -> Path:
    (folder / "wide").mkdir()
    picture(0, 128).resize((128, 64)).save(folder / "wide" / "0.png")
    return folder / "wide"


def test_an_embedding_is_of_the_square_in_the_middle(tmp_path: Path) -> None:
    prior = bases.load_prior(training_models.config("unet", tmp_path, "kandinsky"), CPU)
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    made = bases.embed(prior, pixels)
    assert torch.equal(made, bases.embed(prior, pixels[..., 16:80]))
    assert not torch.allclose(made, bases.embed(prior, pixels[..., :64]), atol=1e-4)


def test_what_a_prior_has_measured_stays(tmp_path: Path) -> None:
    target = make_target(training_models.config("prior", tmp_path, "kandinsky"), CPU)
    new = type(target.prior).from_config(target.prior.config)
    target.prior.clip_mean.data, target.prior.clip_std.data = new.clip_mean.data, new.clip_std.data
    before = target.prior.clip_std.clone()
    batch = SimpleNamespace(
        samples=[SimpleNamespace(weight=1.0, embed=torch.randn(target.prior.clip_mean.shape[1])) for _ in "ab"]
    )
    target.begin(lambda: [batch])
    measured = target.prior.clip_std.clone()
    assert measured.isfinite().all()
    assert (measured > 0).all()
    assert (measured != before).any()
    target.begin(lambda: [SimpleNamespace(samples=batch.samples[:1] * 2)])
    assert torch.equal(target.prior.clip_std, measured)


# Data


@pytest.mark.parametrize("size", [(100, 80), (64, 200), (31, 97)])
def test_a_part_is_scaled_as_it_would_be_with_the_whole(size: tuple[int, int]) -> None:
    own = picture(1, 256).resize(size)
    crop = make_crop(size, (64, 64), 1, (0, 0))
    whole = own.resize(crop.scaled, Image.Resampling.LANCZOS).crop(crop.box)
    assert abs(np.asarray(whole, float) - np.asarray(seen(own, View(crop, False)), float)).max() <= 2


def test_a_strip_does_not_grow_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    crop, made = make_crop((4000, 1), (1024, 1024), None), []
    resize = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *more: made.append(size) or resize(self, size, *more))
    assert seen(Image.new("RGB", (4000, 1)), View(crop, False)).size == (1024, 1024)
    assert made == [(1024, 1024)]


def test_captions_with_any_characters(tmp_path: Path) -> None:
    settings = SimpleNamespace(image="image", condition="condition", caption="text")
    picture().save(tmp_path / "a.png")
    (tmp_path / "l.jsonl").write_text(json.dumps({"image": "a.png", "text": "one\u2028two\x0b"}, ensure_ascii=False))
    assert open_list(tmp_path / "l.jsonl", settings)[0].captions == ("one\u2028two\x0b",)  # type: ignore[arg-type]
    (tmp_path / "a.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert open_folder(tmp_path, settings)[0].captions == ("caf\ufffd",)  # type: ignore[arg-type]


def test_more_held_out_than_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data.holdout is 6, and there are 6 pictures"):
        trainer(tmp_path, data={"holdout": 6})


def test_a_cache_knows_how_latents_are_scaled_and_whose_weights_a_detector_has(tmp_path: Path) -> None:
    weights = tmp_path / "weights" / "a.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    condition = {"detector": "canny", "options": {"model": str(weights.parent)}}
    more = {"cache": {"folder": str(tmp_path / "cache")}, "data": {"condition": condition}}
    config = training_models.config("t2i_adapter", tmp_path / "run", **more)
    base = bases.load_base(config, CPU)
    folders = []
    for change in (
        lambda: None,
        lambda: base.vae.register_to_config(scaling_factor=0.7),
        lambda: base.pipe.tokenizer.add_tokens(["<new>"]),
        lambda: weights.write_bytes(b"other"),
    ):
        change()
        cache = open_cache(config, base.pictured, base.frozen_encoders, conditioned=True)
        folders.append([store.folder for store in cache.stores])
    assert [[a != b for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(folders)] == [
        [True, False, False],  # latents, conditions, texts
        [False, False, True],
        [False, True, False],
    ]


def test_embeddings_of_pictures_are_kept_by_how_the_image_encoder_sees_them(tmp_path: Path) -> None:
    config = training_models.config("unet", tmp_path / "run", "kandinsky", cache={"folder": str(tmp_path / "cache")})
    base = bases.load_base(config, CPU)
    folders = []
    for mean in ([0.5, 0.5, 0.5], [0.4, 0.5, 0.5]):
        base.prior.image_processor.image_mean = mean
        folders.append(open_cache(config, base.pictured, [], conditioned=False).latents.folder)  # type: ignore[union-attr]
    assert folders[0] != folders[1]


def test_a_full_cache_reads_no_picture_again_unless_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for k in range(3):
        picture(k).save(tmp_path / "data" / f"{k}.png")
    own = {**EDGES, "sources": [{"path": str(tmp_path / "data")}], "flip": 0.5}
    more = {"data": own, "cache": {"folder": str(tmp_path / "cache")}}
    read, reading = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read.append(self.name) or reading(self))
    for expected in (["0.png", "1.png", "2.png"], []):
        made = trainer(tmp_path / "run", **more)
        assert sorted(set(read)) == expected
        read.clear()
        assert all(made.pictures[Place(0, 0, k), k].moments is not None for k in range(3))
        assert not read
    before = made.pictures[Place(0, 0, 1), 1].moments
    picture(7).save(tmp_path / "data" / "1.png")
    after = trainer(tmp_path / "run", **more).pictures[Place(0, 0, 1), 1].moments
    assert set(read) == {"1.png"}
    assert not torch.equal(before, after)
    next((tmp_path / "cache").glob("files-*.jsonl")).write_text('["cut sho')
    assert trainer(tmp_path / "run", **more).pictures[Place(0, 0, 1), 1].problem is None


def test_in_a_log_the_cache_tells_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "EVERY", 0.0)
    monkeypatch.setattr(caching, "TOGETHER", (8 * 1024**2, 4))
    config, told = training_models.config("t2i_adapter", tmp_path, cache={"folder": str(tmp_path / "cache")}), []
    make_trainer(config, join(config), told.append)
    assert told[:2] == ["cache: 4 of 6 views", "cache: 6 of 6 views"]


def test_a_refiner_is_refused(tmp_path: Path) -> None:
    """One encoder and five numbers of its size: every step would fail."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(training_models.base())
    pipe.register_modules(text_encoder=None, tokenizer=None)
    pipe.save_pretrained(folder := tmp_path / "refiner")
    with pytest.raises(ValueError, match="is a refiner, which no target trains: take its base"):
        make_target(training_models.config("t2i_adapter", tmp_path, base={"model": str(folder)}), CPU)


def test_a_base_that_sees_more_than_latents_is_refused(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel

    pipe = StableDiffusionXLPipeline.from_pretrained(training_models.base())
    pipe.register_modules(unet=UNet2DConditionModel.from_config({**pipe.unet.config, "in_channels": 9}))
    pipe.save_pretrained(folder := tmp_path / "inpainting")
    with pytest.raises(
        ValueError, match="for inpainting or editing: its UNet takes 9 channels; .* the 4 of the latents"
    ):
        trainer(tmp_path / "run", base={"model": str(folder)})


def test_a_network_without_gradient_checkpointing_is_named(tmp_path: Path) -> None:
    config = training_models.config("prior", tmp_path, "kandinsky", gradient_checkpointing=True)
    with pytest.raises(ValueError, match="gradient_checkpointing: a PriorTransformer has none"):
        make_trainer(config, join(config), lambda line: None)


def test_conditions_of_pictures_that_are_always_mirrored_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_kit.training.data import samples

    own = trainer(tmp_path, data={**EDGES, "flip": 1.0}, cache={"folder": str(tmp_path / "cache")})
    assert len(own.pictures.cache.conditions) == len(own.pictures)
    monkeypatch.setattr(samples, "detect", None)  # is not asked again
    assert own.pictures[Place(0, 0, 0), 0].problem is None


# The loop


def test_pictures_left_out_do_not_lower_the_loss(tmp_path: Path) -> None:
    whole, broken = (trainer(tmp_path / name, data={**EDGES}, batch=6, steps=1) for name in ("a", "b"))
    getitem = type(broken.pictures).__getitem__

    class Broken(type(broken.pictures)):  # type: ignore[misc]
        def __getitem__(self, key: Any) -> Any:
            made = getitem(self, key)
            return self._blank(key[0], made.name, (64, 64), "broken") if key[1] < 3 else made

    broken.pictures.__class__ = Broken
    for own in (whole, broken):
        own.run(lambda _: False)
    bands = [sum(own.figures.band_counts) for own in (whole, broken)]
    assert bands == [6, 3]
    assert broken.figures.losses[0] == pytest.approx(sum(broken.figures.band_sums) / 3)


def test_a_gradient_that_is_not_finite_is_told_and_ends_a_run(tmp_path: Path) -> None:
    own = trainer(tmp_path, steps=40)
    told: list[str] = []
    own.say = told.append
    first, second, *_ = own.parallel.pieces().values()
    first.register_hook(lambda gradient: gradient * float("nan"))
    before = second.detach().clone()
    with pytest.raises(RuntimeError, match="the gradient was not finite in 20 steps"):
        own.run(lambda _: False)
    assert told[0].startswith("step 1: the gradient is not finite, the step is left out: ")
    assert torch.equal(second, before)


def test_a_schedule_free_average_is_worn_and_taken_off_bit_for_bit(tmp_path: Path) -> None:
    needs("schedulefree")
    own = trainer(tmp_path, optimizer={"name": "schedule_free"})
    own.run(lambda _: False)
    weights = list(own.parallel.pieces().values())
    before = [weight.detach().clone() for weight in weights]
    with own.averaged():
        assert any(not torch.equal(a, b) for a, b in zip(before, weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, weights, strict=True))


def test_an_optimizer_may_nest_its_state() -> None:
    class Nesting(torch.optim.AdamW):
        def state_dict(self) -> Any:
            found = super().state_dict()
            return {**found, "state": {n: {"nested": entry} for n, entry in found["state"].items()}}

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = Nesting([weight])
    weight.grad = torch.ones(3)
    optimizer.step()
    tensors, values = checkpoints.flat_optimizer(optimizer, ["w"])
    assert {"w:exp_avg", "w:exp_avg_sq"} <= tensors.keys()
    json.dumps(values)


def test_a_batch_that_processes_cannot_share(tmp_path: Path) -> None:
    config = training_models.config("t2i_adapter", tmp_path, batch=3)
    accelerator = join(config)
    accelerator.state.num_processes = 2
    try:
        with pytest.raises(ValueError, match="batch is 3, which 2 processes cannot share"):
            make_trainer(config, accelerator, lambda line: None)
    finally:
        accelerator.state.num_processes = 1


# A run


def test_a_change_that_is_allowed_is_made(tmp_path: Path) -> None:
    train(training_models.config("t2i_adapter", tmp_path, steps=1))
    more = {"steps": 2, "optimizer": {"weight_decay": 0.5, "betas": (0.5, 0.6)}, "ema": 0.9}
    train(training_models.config("t2i_adapter", tmp_path, **more), resume=True, allow=["optimizer", "ema"])
    (group,) = state(tmp_path)["optimizer"]["groups"]
    assert (group["weight_decay"], tuple(group["betas"])) == (0.5, (0.5, 0.6))
    other = training_models.config("t2i_adapter", tmp_path, **{**more, "optimizer": {"name": "schedule_free"}})
    with pytest.raises(ValueError, match="optimizer.name is 'schedule_free', .* begin a new run"):
        train(other, resume=True, allow=["optimizer", "ema"])


def test_checkpoints_without_their_configuration(tmp_path: Path) -> None:
    train(training_models.config("t2i_adapter", tmp_path, steps=1))
    (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError, match="has checkpoints and no config.yaml"):
        train(training_models.config("t2i_adapter", tmp_path, steps=2), resume=True)


def test_the_line_that_says_how_to_go_on_names_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["diffusion-kit", "train", "a.yaml", "steps=3"]
    assert run.resume_command(command) == "diffusion-kit train a.yaml steps=3 --resume"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    launched = "torchrun --nproc_per_node 2 -m diffusion_kit.cli train a.yaml steps=3 --resume"
    assert run.resume_command(command) == launched
    monkeypatch.setenv("DIFFUSION_KIT_PROCESSES", "2")
    assert run.resume_command(command) == "diffusion-kit launch a.yaml steps=3 --resume"
    assert run.resume_command([]) == "train(config, resume=True)", "in a notebook nobody typed a command"


def test_an_autoencoder_learns_from_pictures_of_several_shapes(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for k, size in enumerate([(64, 64), (64, 128), (64, 64), (128, 64)]):
        picture(k, 128).resize(size).save(tmp_path / "data" / f"{k}.png")
    data = {"sources": [{"path": str(tmp_path / "data")}], "buckets": 2, "bucket_step": 16}
    assert train(training_models.config("autoencoder", tmp_path / "run", data=data, steps=4)) is not None
    with pytest.raises(ValueError, match="network.class is 'VAE'; it must be AutoencoderKL or VQModel"):
        make_target(training_models.config("autoencoder", tmp_path, network={"class": "VAE"}), CPU)


def pictures_of(count: int) -> Any:
    """Samples, as targets see them, of random pictures."""
    pixels = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    samples = [SimpleNamespace(pixels=own, weight=1.0, place=Place(0, 0, k)) for k, own in enumerate(pixels)]
    return SimpleNamespace(samples=samples, places=[own.place for own in samples])


def one_of(batch: Any, k: int) -> Any:
    return SimpleNamespace(samples=batch.samples[k : k + 1], places=batch.places[k : k + 1])


def test_codes_of_a_new_movq_begin_among_its_latents(tmp_path: Path) -> None:
    """Far from them nearly all stay unused; those of a trained one stay where they are."""
    config = training_models.config("autoencoder", tmp_path, network=training_models.MOVQ)
    own, batch = make_target(config, CPU), pictures_of(4)
    latents = own.vae.encode(torch.stack([sample.pixels for sample in batch.samples])).latents
    used = len(own.vae.quantize(latents)[2][2].unique())
    own.begin(lambda: [batch])
    codes = own.vae.quantize.embedding.weight.detach().clone()
    rows = latents.transpose(0, 1).flatten(1).T
    assert (codes[:, None] - rows).abs().amax(2).amin(1).max() < 1e-6
    assert len(own.vae.quantize(latents)[2][2].unique()) > max(used, 0.9 * len(codes.unique(dim=0)))
    own.begin(lambda: [pictures_of(2)])
    assert torch.equal(own.vae.quantize.embedding.weight, codes)


def test_a_movq_learns_of_each_picture_by_itself(tmp_path: Path) -> None:
    """Its codes' loss was once a mean over the batch, blanks too. Some pictures are made of their codes, others of their
    latents, as the pipelines make them."""
    config = training_models.config("autoencoder", tmp_path, network=training_models.MOVQ)
    own, batch = make_target(config, CPU), pictures_of(8)
    own.begin(lambda: [batch])
    alone = [own.forward(one_of(batch, k)).loss for k in range(8)]
    torch.testing.assert_close(own.forward(batch).loss, torch.cat(alone), rtol=1e-5, atol=1e-6)
    own.weights = dict.fromkeys(own.weights, 0.0) | {"squared": 1.0}
    pixels = torch.stack([sample.pixels for sample in batch.samples])
    latents = own.vae.encode(pixels).latents
    errors = torch.stack(
        [
            (own.vae.decode(latents, force_not_quantize=plain).sample - pixels).square().mean((1, 2, 3))
            for plain in (True, False)
        ]
    )
    near = (own.forward(batch).loss - errors).abs() < 1e-6
    assert near.any(0).all(), "each is one of the two"
    assert near.any(1).all(), "both occur"


def test_a_validation_that_is_broken_off_at_resume_is_made_the_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no step is made of what it may have left."""
    own = {"every": 2, "pictures": 1, "steps": 1}
    config = training_models.config("t2i_adapter", tmp_path, data=EDGES, steps=4, validation=own)
    validate, broken = validation.validate, [True, True, False]

    def signalled(*args: Any) -> Any:
        if broken.pop(0):
            os.kill(os.getpid(), signal.SIGTERM)
        return validate(*args)

    monkeypatch.setattr(validation, "validate", signalled)
    for _ in range(2):
        assert train(config, resume=(tmp_path / "checkpoints").exists()) is None
        assert checkpoints.step_of(checkpoints.whole(tmp_path / "checkpoints")[-1]) == 2
        assert not run.Run(tmp_path).validations()
    broken.append(False)
    assert train(config, resume=True) == tmp_path / "result"
    assert list(run.Run(tmp_path).validations()) == [2, 4]


def test_fewer_steps_than_were_made_end_the_run(tmp_path: Path) -> None:
    train(training_models.config("t2i_adapter", tmp_path, data=EDGES, steps=2))
    shutil.rmtree(tmp_path / "result")
    fewer = training_models.config("t2i_adapter", tmp_path, data=EDGES, steps=1)
    assert train(fewer, resume=True) == tmp_path / "result"


def test_a_scheduler_that_knows_no_zero_snr_gives_way() -> None:
    """The base would be sampled on another schedule than it learned."""
    scheduler = diffusers.PNDMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    pipe = conftest.sd_pipeline(diffusers.StableDiffusionPipeline, scheduler=scheduler)
    told = ObjectiveConfig(prediction="v_prediction", zero_terminal_snr=True)
    objective = make_objective(scheduler, told)
    tell_scheduler(pipe, objective, learns=True)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    torch.testing.assert_close(pipe.scheduler.alphas_cumprod, objective.alphas)


def test_what_is_asked_of_a_detector_is_checked_before_the_pictures(tmp_path: Path) -> None:
    data = {**EDGES, "condition": {"detector": "canny", "options": {"lo": 3}}}
    config = training_models.config("t2i_adapter", tmp_path, data=data, cache={"folder": str(tmp_path / "cache")})
    for call in (lambda: train(config), lambda: build_cache(config, (0, 1), print)):
        with pytest.raises(TypeError, match="detector 'canny' takes no option 'lo'"):
            call()
    assert not (tmp_path / "cache").exists()


def test_the_line_about_memory_knows_what_was_settled() -> None:
    config = training_models.config("t2i_adapter", "x", batch=8)

    def short() -> None:
        with memory.explained(config) as told:
            told.micro = 2
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(MemoryError, match="2 pictures at once do not fit into memory; try micro_batch=1 "):
        short()
    assert "gradient_checkpointing" not in memory.levers(config.model_copy(update={"target": "prior"}), 1)


def test_a_step_that_is_left_out_has_no_loss() -> None:
    assert Figures().line()["loss"] is None


def test_a_validation_that_cannot_measure_ends_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from diffusion_kit.training import validation

    def no_joint(*_: Any, **__: Any) -> None:
        raise ValueError("a pose shows no joint")

    monkeypatch.setattr(validation, "evaluate", no_joint)
    own = {"every": 1, "pictures": 1, "steps": 1}
    assert train(training_models.config("t2i_adapter", tmp_path / "a", data=EDGES, steps=1, validation=own)) is not None
    assert "validation of seen pictures: a pose shows no joint" in capsys.readouterr().out
    assert run.Run(tmp_path / "a").best() is None, "a loss is no fidelity"
    monkeypatch.setattr(
        validation, "evaluate", lambda *_, **__: SimpleNamespace(lines=[], gallery=[], page=lambda _: None)
    )
    monkeypatch.setattr(validation, "grid", lambda _: Image.new("RGB", (8, 8)))
    assert train(training_models.config("t2i_adapter", tmp_path / "b", data=EDGES, steps=1, validation=own)) is not None
    config = training_models.config("t2i_adapter", tmp_path / "c", validation={**own, "measure": "openpose"})
    with pytest.raises(ValueError, match=r"^validation.measure: [^\n]+$"):
        make_trainer(config, join(config), print)


def test_a_validation_that_overflows_ends_no_training_and_one_without_memory_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from diffusion_kit.training import validation

    errors: list[Exception] = [RuntimeError("the latents are not finite"), torch.OutOfMemoryError("CUDA out of memory")]

    def failing(*_: Any, **__: Any) -> None:
        raise errors[0]

    monkeypatch.setattr(validation, "evaluate", failing)
    own = {"every": 1, "pictures": 1, "steps": 1}
    assert train(training_models.config("t2i_adapter", tmp_path / "a", data=EDGES, steps=1, validation=own)) is not None
    assert "validation of seen pictures: the latents are not finite" in capsys.readouterr().out
    errors.reverse()
    with pytest.raises(MemoryError, match="2 pictures at once do not fit into memory; try micro_batch=1"):
        train(training_models.config("t2i_adapter", tmp_path / "b", data=EDGES, steps=1, validation=own))


def test_a_validation_shows_as_many_as_were_asked_for(tmp_path: Path, capsys: Any) -> None:
    """Of pictures of several shapes, and for every prompt; one that cannot be read is named."""
    from diffusion_kit.training import validation

    (tmp_path / "data").mkdir()
    for k, size in enumerate([(64, 64), (128, 64), (128, 64), (64, 64), (128, 64), (128, 64)]):
        picture(k, 128).resize(size).save(tmp_path / "data" / f"{k}.png")
    data = {**EDGES, "sources": [{"path": str(tmp_path / "data")}], "buckets": 2, "bucket_step": 16, "holdout": 1}
    told: list[str] = []
    config = training_models.config("t2i_adapter", tmp_path / "run", data=data, validation={"pictures": 3})
    own = make_trainer(config, join(config), told.append)
    seen, unseen = validation.groups(own)
    assert [(group.name, len(group.indices)) for group in (seen, unseen)] == [("seen", 3), ("unseen", 1)]
    assert {own.pictures.shapes[k] for k in seen.indices} == {own.pictures.shapes[1]}
    (tmp_path / "data" / f"{seen.indices[0]}.png").write_bytes(b"")
    assert len(validation.usable(own, seen)) == 2
    assert "validation of seen pictures, left out: " in told[-1]
    prompts = tuple("abcdefg")
    config = training_models.config("t2i_adapter", tmp_path / "run", data=data, validation={"prompts": prompts})
    assert [len(group.indices) for group in validation.groups(make_trainer(config, own.accelerator, print))] == [7, 7]


def test_a_validation_has_the_size_of_the_training(tmp_path: Path) -> None:
    own = {"every": 1, "pictures": 1, "steps": 1}
    data = {**EDGES, "resolution": 96}
    train(training_models.config("t2i_adapter", tmp_path, data=data, steps=1, validation=own))
    page = next((tmp_path / "validation").glob("*/seen"))
    assert {Image.open(file).size for file in page.glob("*.png")} == {(96, 96)}


def test_batch_auto_leaves_nothing_of_its_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    probes, find = [], memory.fitting_batch

    def watched(trainer: Any, say: Any) -> int:
        probes.append(weakref.ref(trainer.target))
        before = [weight.detach().clone() for weight in trainer.parallel.pieces().values()]
        found = find(trainer, say)
        assert trainer.parallel.optimizer.state, "a step of the optimizer is part of what has to fit"
        assert all(torch.equal(a, b) for a, b in zip(before, trainer.parallel.pieces().values(), strict=True))
        return found

    monkeypatch.setattr(memory, "fitting_batch", watched)
    monkeypatch.setattr(memory, "LARGEST", 2)
    config = training_models.config("t2i_adapter", tmp_path, steps=1, batch="auto")
    assert int(with_batch(config, join(config), lambda line: None).batch) >= 1
    assert probes[0]() is None


def test_a_control_may_lie_in_a_folder_without_a_slash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from diffusion_kit.adapters.maps import detector_of

    assert [detector_of(name) for name in ("canny", "canny_controlnet", "mine")] == ["canny", "canny", None]
    monkeypatch.chdir(tmp_path)
    picture().save("0.png")
    Path("0.txt").write_text("a fox")
    Path("edges").mkdir()
    arguments = ["--detector", "canny", "--conditions", ".", "--photos", "--seeds", "1", "--steps", "1"]
    assert cli.main(["evaluate", "--control", "mine=edges", *arguments]) == 2
    assert f"{tmp_path / 'edges'} is no network" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (
            {"target": "controlnet", "init_from": "adapter"},
            "adapter is a T2IAdapter; controlnet starts from a ControlNet",
        ),
        ({"init_from": "grey"}, "grey sees 1 channels: set data.condition.channels=1"),
        ({"target": "controlnet", "init_from": "other"}, "other is for another base: its .* has another shape"),
        ({"data": {"resolution": 100}}, "a side of 100 pixels is no multiple of"),
    ],
)
def test_what_does_not_fit_the_base_is_one_line(more: dict[str, Any], line: str, tmp_path: Path) -> None:
    make_adapter().save_pretrained(tmp_path / "adapter")
    T2IAdapter(1, [8], 1, 8, "full_adapter_xl").save_pretrained(tmp_path / "grey")
    ControlNetModel.from_unet(make_sd_unet()).save_pretrained(tmp_path / "other")
    if "init_from" in more:
        more = {**more, "init_from": str(tmp_path / more["init_from"])}
    with pytest.raises(ValueError, match=line):
        trainer(tmp_path / "run", **{"target": "t2i_adapter", **more})
