"""Order, crops, flips, captions, dropout, the store: what a network sees is a function of the place, and what was meant."""

from __future__ import annotations

import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import training_models
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from diffusion_kit.training.data.crops import bucket_sizes, make_crop, nearest_bucket
from diffusion_kit.training.data.order import Order, share
from diffusion_kit.training.data.samples import open_pictures, shuffled
from diffusion_kit.training.data.store import Store
from diffusion_kit.training.ema import Average
from diffusion_kit.training.keyed import Place
from diffusion_kit.training.loader import MicroBatches, Part
from diffusion_kit.training.optimizers import learning_rate
from diffusion_kit.training.parallel.replicated import Replicated


def opened(tmp_path: Path, **more):
    return open_pictures(training_models.config("t2i_adapter", tmp_path, **more), True)


def test_an_epoch_has_every_picture_as_often_as_its_weight_says():
    order = Order((0,) * 60, (1.0,) * 40 + (2.0,) * 10 + (0.5,) * 10, 10, 0)
    seen: Counter = Counter()
    for epoch in range(40):
        for batch, weight in order.epoch(epoch):
            for index in batch.tolist():
                seen[index] += weight
    assert [seen[k] for k in range(40)] == pytest.approx([40] * 40, rel=0.1)
    assert np.mean([seen[k] for k in range(40, 50)]) / np.mean([seen[k] for k in range(40)]) == pytest.approx(
        2, rel=0.05
    )
    assert np.mean([seen[k] for k in range(50, 60)]) / np.mean([seen[k] for k in range(40)]) == pytest.approx(
        0.5, rel=0.2
    )


def test_batches_are_of_one_shape_and_places_are_never_used_twice():
    shapes = tuple(np.random.default_rng(0).integers(0, 3, 50).tolist())
    order = Order(shapes, (1.0,) * 50, 4, 3)
    steps = [order.step(step) for step in range(3 * order.length(0))]
    assert all(len({shapes[index] for _, index, _ in step}) == 1 for step in steps)
    places = [place for step in steps for place, *_ in step]
    assert len(set(places)) == len(places)
    assert {place.epoch for place in places} == {0, 1, 2}
    assert [slot.picture for slot in order.step(0)] != [slot.picture for slot in order.step(order.length(0))]


def test_a_rare_shape_counts_no_more_than_its_pictures():
    """Of every shape, each epoch, weights add up to its number of pictures; in the long run so do each picture's."""
    shapes = (0,) * 21 + (1,) * 3 + (2,)
    order, counted = Order(shapes, (1.0,) * 25, 8, 0), np.zeros(25)
    for epoch in range(300):
        for batch, weight in order.epoch(epoch):
            assert len(batch) == 8
            np.add.at(counted, batch, weight)
    assert [counted[:21].sum(), counted[21:24].sum(), counted[24]] == pytest.approx([300 * 21, 300 * 3, 300])
    assert counted == pytest.approx([300] * 25, rel=0.05)


def test_fewer_pictures_than_a_batch_count_in_full():
    ((batch, weight),) = Order((0,) * 5, (1.0,) * 5, 16, 0).epoch(0)
    assert (len(batch), weight, set(batch.tolist())) == (16, 1.0, set(range(5)))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_step_is_the_same_over_any_number_of_processes(processes):
    order = Order((0, 1) * 20, (1.0,) * 40, 8, 0)

    def step(k: int, micro: int) -> list:
        parts = [MicroBatches(order, Part(rank, processes, micro), k, k + 1) for rank in range(processes)]
        return [sample for part in parts for batch in part for sample in batch]

    assert step(5, 1) == step(5, 2) == order.step(5)
    with pytest.raises(ValueError, match="cannot be split over 3"):
        share(order.step(0), 0, 3)


def test_buckets_have_the_same_area_and_the_nearest_shape_is_taken():
    sizes = bucket_sizes(1024, 8, 64)
    assert (1024, 1024) in sizes
    assert all(w % 64 == h % 64 == 0 and abs(w * h / 1024**2 - 1) < 0.1 for w, h in sizes)
    assert max(w / h for w, h in sizes) == pytest.approx(2, rel=0.1)
    assert sizes[nearest_bucket((1920, 1080), sizes)][0] > sizes[nearest_bucket((1080, 1920), sizes)][0]


@pytest.mark.parametrize("size", [(100, 60), (60, 100), (64, 64), (30, 20)])
@pytest.mark.parametrize("variant", [None, 0, 7])
def test_a_crop_is_inside_and_fills_the_bucket(size, variant):
    crop = make_crop(size, (64, 48), variant, (1,))
    left, top, right, bottom = crop.box
    assert 0 <= left <= right <= crop.scaled[0]
    assert 0 <= top <= bottom <= crop.scaled[1]
    assert (right - left, bottom - top) == (64, 48)
    assert crop.scaled[0] == 64 or crop.scaled[1] == 48


def test_picture_and_condition_are_cut_and_mirrored_alike(tmp_path):
    """A picture that is its own condition stays its own condition, wherever it is cut and whichever way it is turned."""
    Image.effect_noise((96, 64), 90).convert("RGB").save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"image": "a.png", "conditioning_image": "a.png", "text": "x"}')
    own = {"sources": [{"path": str(tmp_path)}], "flip": 0.5, "crop": "random", "crops": 9, "resolution": 48}
    pictures = opened(tmp_path, data=own, dropout={"condition": 0.0})
    samples = [pictures[Place(0, 0, k), 0] for k in range(30)]
    for sample in samples:
        torch.testing.assert_close(sample.pixels / 2 + 0.5, sample.condition)
    views = {tuple(sample.pixels.flatten()[:50].tolist()) for sample in samples}
    assert len(views) > 10
    height, width, _, left, h, w = samples[0].time_ids.tolist()
    assert (height, width, h, w) == (64, 96, 48, 48)
    assert {sample.time_ids[3].item() for sample in samples} > {left}


def test_what_is_dropped_is_the_neutral_image_and_an_empty_caption(tmp_path):
    own = {"condition": {"background": 1.0}}
    drop = {"caption": 0.5, "condition": 0.5, "zeros": 0.5}
    samples = [opened(tmp_path, data=own, dropout=drop)[Place(0, 0, k), k % 6] for k in range(120)]
    neutral = [bool((sample.condition == 1).all()) for sample in samples]
    empty = [sample.caption == "" for sample in samples]
    zeros = [sample.zeros for sample in samples]
    assert 40 < sum(neutral) < 80
    assert 40 < sum(empty) < 80
    assert [sample.dropped for sample in samples] == empty
    assert 10 < sum(zeros) < 50
    assert not any(zero and not none for zero, none in zip(zeros, empty, strict=True))
    assert 15 < sum(a and b for a, b in zip(neutral, empty, strict=True)) < 45  # drawn independently
    again = opened(tmp_path, data=own, dropout=drop)[Place(0, 0, 7), 1]
    assert torch.equal(again.condition, samples[7].condition)


def test_captions_are_drawn_and_tags_shuffled(tmp_path):
    pictures = opened(tmp_path, dropout={"caption": 0.0})
    assert {pictures[Place(0, 0, k), 0].caption for k in range(20)} == {"a 0", "picture 0"}
    config = pictures.config.data.caption.model_copy(update={"keep_tags": 1})
    found = {shuffled("fox, red, small, sitting", config, np.random.default_rng(k)) for k in range(60)}
    assert len(found) == 6
    assert all(
        text.startswith("fox, ") and sorted(text.split(", ")) == ["fox", "red", "sitting", "small"] for text in found
    )


def test_a_flip_of_poses_is_refused(tmp_path):
    with pytest.raises(ValueError, match="flip must be 0 for openpose"):
        opened(tmp_path, data={"flip": 0.5, "condition": {"detector": "openpose"}})


def test_a_store_keeps_what_several_writers_put_at_once(tmp_path):
    def write(n: int) -> None:
        store = Store(tmp_path)
        for k in range(20):
            store.put({f"{k}": {"x": torch.tensor([k]), "y": torch.tensor([n])}})
            if k % 5 == 4:
                store.flush()

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write, range(3)))  # raises what a writer raises
    store = pickle.loads(pickle.dumps(Store(tmp_path)))
    assert len(store) == 20
    assert all(store.get(f"{k}")["x"].item() == k for k in range(20))
    assert len({store.get("3")["y"].item()}) == 1
    assert store.get("99") is None


def test_of_two_copies_the_same_counts_for_everybody(tmp_path):
    """Whoever reads the folder later, or wrote first, finds the shard whose name comes first."""
    stores = [Store(tmp_path) for _ in range(6)]
    for n, store in enumerate(stores):
        store.put({"a": {"x": torch.tensor([n])}})
        store.flush()
    for store in (*stores, Store(tmp_path)):
        store.refresh()
    first = load_file(min(tmp_path.glob("*.safetensors")))["a/x"]
    assert {store.get("a")["x"].item() for store in (*stores, Store(tmp_path))} == {first.item()}


def test_a_store_goes_on_after_a_kill(tmp_path):
    """A shard that was being written is not there; one that is damaged counts as missing."""
    store = Store(tmp_path)
    store.put({"a": {"x": torch.ones(2)}})
    store.flush()
    save_file({"b/x": torch.ones(2)}, tmp_path / ".half.part")
    (tmp_path / "damaged.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    os.utime(tmp_path / ".half.part", (0, 0))
    again = Store(tmp_path)
    assert not (tmp_path / ".half.part").exists(), "nobody writes it any more"
    assert "a" in again
    assert "b" not in again


def test_the_average_follows_and_is_worn():
    net = torch.nn.Linear(3, 2)
    parallel = Replicated(training_models.config("unet", "x").optimizer, Accelerator(cpu=True), net)
    average = Average(parallel.pieces(), 0.9)
    first = net.weight.detach().clone()
    net.weight.data += 1
    for step in range(400):
        average.update(parallel.pieces(), step + 1000)
    torch.testing.assert_close(average.means["weight"], first + 1, rtol=0, atol=1e-4)
    net.weight.data += 1
    own = net.weight.detach().clone()
    with parallel.worn(average.means):
        torch.testing.assert_close(net.weight.detach(), first + 1, rtol=0, atol=1e-4)
    assert torch.equal(net.weight.detach(), own)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates(schedule):
    own = training_models.config("unet", "x", optimizer={"schedule": schedule, "warmup_steps": 9, "learning_rate": 1.0})
    rates = [learning_rate(own.optimizer, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == pytest.approx(1.0)
    assert all(a >= b for a, b in zip(rates[9:], rates[10:], strict=False))
    assert rates[-1] == 1.0 if schedule == "constant" else rates[-1] < 0.02
