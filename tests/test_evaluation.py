"""Evaluation: what its measures keep and lose, the protocol over small networks, and the report."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import components, distance, lines, make_adapter, picture, pipeline, randomise, tokenizer
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

from diffusion_kit import Control, StableDiffusionXLPipeline, detect
from diffusion_kit.adapters.detectors.pose import COLOURS, draw
from diffusion_kit.evaluation import MEASURES, Condition, evaluate, mse, quality_measures
from diffusion_kit.evaluation.depth import depth_mse, depth_rmse
from diffusion_kit.evaluation.edges import edge_f1, ods_f1, soft_counts
from diffusion_kit.evaluation.inception import network, resized
from diffusion_kit.evaluation.intervals import bootstrap, mean
from diffusion_kit.evaluation.mse import Mse
from diffusion_kit.evaluation.palette import colour_difference
from diffusion_kit.evaluation.pose import joints, pck
from diffusion_kit.evaluation.protocol import noise_of
from diffusion_kit.evaluation.quality import fid, kid
from diffusion_kit.evaluation.regions import mean_iou, region_iou
from diffusion_kit.evaluation.structure import ssim

RANDOM = np.random.default_rng(0)


def edges(seed: int = 0, size: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).uniform(size=(size, size)) > 0.97


# The metric card of MSE


def test_the_cards_examples() -> None:
    pairs: dict[str, Any] = {"predictions": [2.5, 0.0, 2, 8], "references": [3, -0.5, 2, 7]}
    assert mse.compute(**pairs) == {"mse": 0.375}
    assert mse.compute(**pairs, squared=False) == {"mse": 0.6123724356957945}
    many: dict[str, Any] = {"predictions": [[0.5, 1], [-1, 1], [7, -6]], "references": [[0, 2], [-1, 2], [8, -5]]}
    np.testing.assert_allclose(mse.compute(**many, multioutput="raw_values")["mse"], [0.41666667, 1.0])


def test_rmse_averages_the_roots() -> None:
    many: dict[str, Any] = {"predictions": [[0.0, 0.0]], "references": [[1.0, 3.0]]}
    assert mse.compute(**many, squared=False) == {"mse": 2.0}
    assert mse.compute(**many, multioutput=[0.25, 0.75], squared=False) == {"mse": 2.5}
    assert mse.compute(**many, multioutput=[0.25, 0.75]) == {"mse": 7.0}


def test_values_added_one_by_one_in_batches_and_at_once_are_the_same() -> None:
    found, true, weights = RANDOM.normal(size=(3, 7))
    whole = mse.compute(predictions=found, references=true, sample_weight=weights**2)
    metric = Mse()
    metric.add(prediction=found[0], reference=true[0])
    metric.add_batch(predictions=found[1:4], references=true[1:4])
    parts = metric.compute(predictions=found[4:], references=true[4:], sample_weight=weights**2)
    assert parts["mse"] == pytest.approx(whole["mse"])
    assert parts["mse"] == pytest.approx(np.average((found - true) ** 2, weights=weights**2))
    with pytest.raises(ValueError, match="^nothing to compute: give predictions"):
        metric.compute()
    metric.add(prediction=1.0, reference=0.0)
    with pytest.raises(ValueError, match="predictions have the shape"):
        metric.compute(predictions=[1.0, 2.0], references=[1.0])
    assert metric.compute(predictions=[5.0], references=[5.0]) == {"mse": 0.0}, "nothing is kept, after errors too"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"references": [1.0]}, r"predictions have the shape \(2,\), references \(1,\)"),
        ({"references": [1.0, "x"]}, "references must be numbers"),
        ({"references": [1.0, np.nan]}, "references must be finite numbers"),
        ({"references": [1.0, 2.0], "multioutput": "mean"}, "multioutput is 'mean'; it must be 'raw_values'"),
        ({"references": [1.0, 2.0], "sample_weight": [1.0]}, r"sample_weight has the shape \(1,\); it must be \(2,\)"),
        ({"references": [1.0, 2.0], "sample_weight": [0.0, 0.0]}, "sample_weight must be 0 or more, and some more"),
        ({"references": [1.0, 2.0], "sample_weight": [-1.0, 2.0]}, "sample_weight must be 0 or more, and some more"),
    ],
)
def test_bad_values_are_one_line(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Mse().compute(predictions=[1.0, 2.0], **more)
    assert "\n" not in str(caught.value)


# Measures


@pytest.mark.parametrize("seed", range(3))
def test_edge_f1(seed: int) -> None:
    a, b = edges(seed), edges(seed + 10)
    assert edge_f1(a, a) == 1
    assert edge_f1(a, b) == edge_f1(b, a) < 0.6
    inner = np.zeros_like(a)
    inner[16:48, 16:48] = edges(seed, 32)
    assert edge_f1(np.roll(inner, 1, 0), inner) == 1, "one pixel is within the tolerance"
    assert edge_f1(np.roll(inner, 5, 0), inner) < 0.7
    assert edge_f1(np.roll(inner, 5, 0), inner, tolerance=5) == 1


def test_edge_tolerance_grows_with_the_diagonal_and_empty_maps() -> None:
    line, empty = np.zeros((512, 512), bool), np.zeros((512, 512), bool)
    line[100] = True
    assert edge_f1(np.roll(line, 5, 0), line) == 1  # 0.0075 x 724 = 5.43
    assert edge_f1(np.roll(line, 6, 0), line) == 0
    assert edge_f1(empty, empty) == 1
    assert edge_f1(empty, line) == edge_f1(line, empty) == 0


def test_ods_takes_one_threshold_for_the_whole_set() -> None:
    """Two maps that need two thresholds: each alone has F1 1, both together have not."""
    wanted, noise = np.zeros((2, 64, 64))
    wanted[32], noise[::8] = 1, 1
    faint = np.maximum(0.3 * wanted, 0.1 * noise)
    strong = np.maximum(0.9 * wanted, 0.5 * noise)
    counts = np.stack([soft_counts(faint, wanted), soft_counts(strong, wanted)])
    assert ods_f1(counts[:1]) == ods_f1(counts[1:]) == 1
    assert ods_f1(counts) < 0.9


def test_ods_of_a_set_without_edges_is_no_praise_for_what_was_made() -> None:
    empty, noise = np.zeros((16, 16)), np.random.default_rng(0).random((16, 16))
    assert ods_f1(soft_counts(noise, empty)[None]) == 0
    assert ods_f1(soft_counts(empty, empty)[None]) == 1


def test_ssim() -> None:
    a = np.random.default_rng(1).uniform(size=(32, 32))
    assert ssim(a, a) == pytest.approx(1)
    assert ssim(a, 1 - a) < 0
    assert ssim(a, np.random.default_rng(2).uniform(size=(32, 32))) == pytest.approx(0, abs=0.1)


@pytest.mark.parametrize(("scale", "shift"), [(1, 0.5), (0.1, 0), (7, -3)])
def test_depth_is_measured_up_to_scale_and_shift(scale: float, shift: float) -> None:
    made, wanted = np.random.default_rng(3).uniform(size=(2, 16, 16))
    assert depth_rmse(scale * wanted + shift, wanted) == pytest.approx(0, abs=1e-7)
    assert depth_rmse(scale * made + shift, wanted) == pytest.approx(depth_rmse(made, wanted))
    assert depth_mse(made, wanted) == pytest.approx(depth_rmse(made, wanted) ** 2)
    assert 0 < depth_mse(wanted + 0.1 * made, wanted) < depth_mse(made, wanted) <= wanted.var()
    assert depth_mse(-wanted, wanted) == pytest.approx(wanted.var()), "near for far is no depth"


def test_regions() -> None:
    wanted = np.zeros((8, 8), int)
    wanted[:, 4:] = 1
    made = np.zeros((8, 8), int)
    made[:, 6:] = 1
    assert mean_iou(wanted, wanted) == 1
    assert mean_iou(made, wanted) == pytest.approx((32 / 48 + 16 / 32) / 2)
    assert mean_iou(made + 5, wanted + 5) == mean_iou(made, wanted)
    colours = np.array([[200, 30, 30], [30, 30, 200]], np.uint8)
    near = np.array([[180, 60, 40], [50, 10, 160]], np.uint8)
    assert region_iou(near[made], colours[wanted]) == mean_iou(made, wanted)
    with pytest.raises(ValueError, match=r"a map of regions has \d+ colours; at most 256"):
        region_iou(near[made], np.asarray(picture()))
    with pytest.raises(ValueError, match="one colour: there is nothing to follow"):
        region_iou(near[made], colours[np.zeros_like(wanted)])


def skeleton(shift: float = 0.0, scale: float = 1.0) -> np.ndarray:
    """(18, 2) joints on a circle in the middle of 256 pixels."""
    angles = np.arange(18) * 2 * np.pi / 18
    return np.stack([np.sin(angles), np.cos(angles)], 1) * 90 * scale + 128 + shift


def test_pck() -> None:
    person = skeleton()
    wanted = np.asarray(draw([person], (256, 256)))
    read = joints(wanted)
    assert [len(spots) for spots in read] == [1] * len(COLOURS)
    np.testing.assert_allclose([spots[0, ::-1] for spots in read], person, atol=1.5)
    assert pck(wanted, wanted) == 1
    assert pck(np.asarray(draw([skeleton(20)], (256, 256))), wanted) == 1  # 28 pixels of 0.2 x 184
    assert pck(np.asarray(draw([skeleton(30)], (256, 256))), wanted) < 0.3
    half = np.where(np.arange(18)[:, None] < 9, person, np.nan)
    assert pck(np.asarray(draw([half], (256, 256))), wanted) == 0.5
    assert pck(wanted, np.asarray(draw([half], (256, 256)))) == 1
    assert pck(np.zeros_like(wanted), wanted) == 0
    with pytest.raises(ValueError, match="a pose shows no joint"):
        pck(wanted, np.zeros_like(wanted))


def test_a_person_whose_neck_is_not_seen_is_one() -> None:
    """What was drawn without it falls apart; each part alone would have a small box."""
    person = np.where(np.arange(18)[:, None] == 1, np.nan, skeleton())  # joint 1 is the neck
    wanted = np.asarray(draw([person], (256, 256)))
    assert pck(np.asarray(draw([person + 20], (256, 256))), wanted) == 1


def test_pck_measures_each_person_by_their_own_size() -> None:
    small, large = skeleton(-80, 0.25), skeleton(40, 0.75)
    wanted = np.asarray(draw([small, large], (256, 256)))
    assert pck(np.asarray(draw([small + 5, large + 5], (256, 256))), wanted) == 1
    assert pck(np.asarray(draw([small + 11, large + 11], (256, 256))), wanted) == pytest.approx(0.5, abs=0.1)


def test_palette() -> None:
    grid = np.random.default_rng(4).integers(0, 256, (4, 4, 3)).astype(np.uint8)
    drawn = np.kron(grid, np.ones((16, 16, 1), np.uint8))
    other = np.roll(grid, 1, 0)
    assert colour_difference(grid, grid) == 0
    assert colour_difference(np.kron(other, np.ones((16, 16, 1), np.uint8)), drawn) == pytest.approx(
        colour_difference(other, grid)
    )
    black, white = np.zeros((2, 1, 1, 3), np.uint8)
    white += 255
    assert colour_difference(black, white) == pytest.approx(100, abs=0.01)
    assert 0 < colour_difference(np.minimum(grid, 250) + 2, grid) < 3


def test_bootstrap_covers_the_mean_of_conditions() -> None:
    """Seeds of one condition agree: an interval from single pictures would be far too narrow."""
    random, inside, widths = np.random.default_rng(5), 0, []
    for trial in range(100):
        rows = random.normal(size=(20, 1)) + 0.01 * random.normal(size=(20, 4))
        low, high = bootstrap(rows, resamples=200, seed=trial)
        assert low <= mean(rows) <= high
        inside += low <= 0 <= high
        widths.append(high - low)
    assert 84 <= inside <= 99
    assert np.mean(widths) == pytest.approx(2 * 1.96 / 20**0.5, rel=0.1)


def test_every_measure_is_best_on_the_condition_itself() -> None:
    random = np.random.default_rng(6)
    for name, measures in MEASURES.items():
        if name in ("pose", "openpose"):
            maps = [draw([skeleton(shift) / 2], (128, 128)) for shift in (0, 40)]
        elif name == "depth":
            maps = [Image.fromarray(values) for values in random.integers(0, 65536, (2, 64, 64)).astype(np.uint16)]
        elif name in ("palette", "regions"):
            maps = [detect(name, picture(seed)) for seed in (1, 2)]
        else:
            maps = [Image.fromarray((255 * edges(seed)).astype(np.uint8)) for seed in (1, 2)]
        for measure in measures:
            best, worse = (measure.figure(np.array([[measure.compare(m, maps[0])]])) for m in maps)
            assert best == pytest.approx(1.0 if measure.larger_is_better else 0.0, abs=1e-6), name
            assert (worse < best - 0.05) if measure.larger_is_better else (worse > best + 0.05), name


# The protocol


@pytest.fixture(scope="module")
def pipe() -> Any:
    return pipeline(StableDiffusionXLPipeline)


@pytest.fixture(scope="module")
def adapter() -> Any:
    return make_adapter()


def conditions(count: int = 3) -> list[Condition]:
    return [Condition(f"c{k}", f"prompt {k}", lines(k), photo=picture(k)) for k in range(count)]


def run(pipe: Any, adapter: Any, cases: list[Condition], **more: Any) -> Any:
    call = {"detector": "canny", "seeds": 2, "steps": 2, "guidance": 3.0, **more}
    return evaluate(pipe, lambda images, scale: [Control(adapter, images, scale=scale)], cases, **call)


def test_report_is_the_same_each_time_and_in_any_batch(pipe: Any, adapter: Any) -> None:
    one, three, again = (run(pipe, adapter, conditions(2), batch=b, scales=(0, 1), dropped=True) for b in (1, 3, 3))
    assert three.to_json() == again.to_json()
    assert [line.arm for line in three.lines] == ["without", "scale 1", "neutral"]
    assert len({line.own for line in three.lines}) == 3, "every arm makes other pictures"
    for line, single in zip(three.lines, one.lines, strict=True):
        assert line.own.value == pytest.approx(single.own.value, abs=0.02), "rounding may move an edge"
        assert line.own.low <= line.own.value <= line.own.high
        assert line.own != line.shuffled


def test_a_control_is_measured_under_a_guidance_of_its_own(pipe: Any, adapter: Any) -> None:
    report = run(pipe, adapter, conditions(2), control_guidance=2.0, dropped=True)
    assert [line.arm for line in report.lines] == ["without", "scale 1", "guidance 2", "neutral"]
    wanted = pipe(
        "prompt 1",
        controls=[Control(adapter, lines(1), guidance=2.0)],
        generator=noise_of(0, 1, 0),
        num_inference_steps=2,
        guidance_scale=3.0,
    )
    plain, guided = (np.asarray(report.gallery[1].made[k][1], int) for k in (1, 2))
    assert np.abs(guided - np.asarray(wanted.images[0], int)).max() <= 1
    assert np.abs(guided - plain).max() > 8


def test_a_guidance_that_could_do_nothing_is_refused_before_any_arm(pipe: Any, adapter: Any) -> None:
    with pytest.raises(ValueError, match="acts in guided steps, and there are none: guidance is 1"):
        run(pipe, adapter, conditions(2), guidance=1.0, control_guidance=2.0)
    with pytest.raises(ValueError, match="Control guidance is nan"):
        run(pipe, adapter, conditions(2), control_guidance=math.nan)


def test_a_control_that_does_not_fit_is_refused_before_pictures_are_made_without_it(pipe: Any) -> None:
    other, steps = make_adapter(channels=(8, 8, 8, 8)), []
    hook = pipe.unet.conv_out.register_forward_hook(lambda *_: steps.append(1))
    with hook, pytest.raises(ValueError, match="does not fit the base"):
        run(pipe, other, conditions(2), steps=7)
    assert not steps


def test_pck_is_not_measured_where_hands_are_drawn(pipe: Any, adapter: Any) -> None:
    posed = [Condition("a", "a man", draw([skeleton() / 4], (64, 64)))]
    report = run(pipe, adapter, posed, detector="openpose", settings={"hands": True}, scales=(), seeds=1)
    assert "hands are drawn in the colours of their joints" in report.not_measured["PCK"]


def test_inverted_controls_are_guided_away_from_white(pipe: Any, adapter: Any) -> None:
    light = [Condition(c.name, c.prompt, ImageOps.invert(c.image.convert("RGB"))) for c in conditions(1)]
    report = run(pipe, adapter, light, settings={"invert": True}, control_guidance=3.0, seeds=1)
    control = Control(adapter, light[0].image, guidance=3.0, background=1.0)
    generator = noise_of(0, 0, 0)
    wanted = pipe("prompt 0", controls=[control], generator=generator, num_inference_steps=2, guidance_scale=3.0)
    made = np.asarray(report.gallery[0].made[2][1], int)
    assert np.abs(made - np.asarray(wanted.images[0], int)).max() <= 1
    assert report.lines[-1].guidance == 3.0


@pytest.mark.parametrize("head", ["num_inference_steps:", "guidance_scale: much", "a: [1"])
def test_a_card_that_says_nothing_is_named(pipe: Any, adapter: Any, tmp_path: Path, head: str) -> None:
    pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n")
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the head of .*README.md says no steps and guidance: [^\n]+$"):
        run(saved, adapter, conditions(1), steps=None)


def test_no_two_pictures_have_the_same_noise() -> None:
    asked = [(seed, k, s) for seed in range(3) for k in range(5) for s in range(4)]
    first = {noise_of(*own).initial_seed() for own in asked}
    assert len(first) == len(asked)
    assert first == {noise_of(*own).initial_seed() for own in asked}


def test_pictures_are_those_of_single_calls_and_the_figures_theirs(pipe: Any, adapter: Any) -> None:
    cases = conditions(2)
    report = run(pipe, adapter, cases, seed=7, batch=3)
    own, shuffled = [], []
    for k, case in enumerate(cases):
        for s in range(2):
            generator = noise_of(7, k, s)
            call = {"num_inference_steps": 2, "guidance_scale": 3.0, "generator": generator}
            made = pipe(case.prompt, controls=[Control(adapter, case.image)], **call).images[0]
            if s == 0:
                assert np.abs(np.asarray(made, int) - np.asarray(report.gallery[k].made[1][1], int)).max() <= 1
            again = np.asarray(detect("canny", made))[..., 0] > 0
            maps = [np.asarray(other.image)[..., 0] > 0 for other in (case, cases[1 - k])]
            own.append(edge_f1(again, maps[0]))
            shuffled.append(edge_f1(again, maps[1]))
    line = report.lines[-1]
    assert line.own.value == pytest.approx(np.mean(own), abs=0.02)
    assert line.shuffled.value == pytest.approx(np.mean(shuffled), abs=0.02)


def test_one_condition_has_no_interval_and_no_shuffle(pipe: Any, adapter: Any) -> None:
    report = run(pipe, adapter, conditions(1), seeds=1)
    assert all(line.own.low is None and line.shuffled is None for line in report.lines)


def test_conditions_are_made_from_photos(pipe: Any, adapter: Any) -> None:
    photos = [Condition(f"p{k}", "", photo=picture(k, 90)) for k in range(2)]
    ready = [Condition(p.name, "", detect("canny", p.photo.resize((64, 64), Image.Resampling.LANCZOS))) for p in photos]
    made, given = (run(pipe, adapter, cases, seeds=1) for cases in (photos, ready))
    assert made.lines == given.lines


def test_regions_of_another_size_keep_their_colours(pipe: Any, adapter: Any) -> None:
    regions = Condition("regions", "", detect("regions", picture(3, 150).crop((0, 0, 150, 100))))
    report = run(pipe, adapter, [regions], detector="regions", seeds=1, scales=())
    kept = report.gallery[0].condition
    assert kept.size == (64, 64)
    assert set(kept.get_flattened_data()) <= set(regions.image.get_flattened_data())


def test_inverted_conditions_measure_the_same(pipe: Any) -> None:
    """A control that does nothing: only the maps differ."""
    cases = conditions(2)
    dark = [Condition(c.name, c.prompt, Image.eval(c.image, lambda v: 255 - v)) for c in cases]
    call = {"detector": "canny", "seeds": 1, "steps": 1, "guidance": 1.0}
    light = evaluate(pipe, lambda images, scale: [], cases, **call)
    turned = evaluate(pipe, lambda images, scale: [], dark, settings={"invert": True}, **call)
    assert light.lines == turned.lines


def test_without_its_weights_a_measure_is_not_measured(pipe: Any, adapter: Any) -> None:
    report = run(pipe, adapter, conditions(2), detector="hed", seeds=1)
    assert report.lines == []
    assert "ControlNetHED" in report.not_measured["SSIM"]
    assert report.not_measured["FID"] == "no weights were named for it"
    assert "SSIM: not measured: detector hed needs" in report.table()


def test_steps_and_guidance_are_the_cards(pipe: Any, adapter: Any, tmp_path: Path) -> None:
    call: dict[str, Any] = {"steps": None, "guidance": None, "seeds": 1, "scales": ()}
    assert {"steps": 20, "guidance": 7.5}.items() <= run(pipe, adapter, conditions(1), **call).about.items()
    pipe.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\nnum_inference_steps: 3\nguidance_scale: 2\n---\n# A model\n")
    saved = StableDiffusionXLPipeline.from_pretrained(tmp_path)
    saved.set_progress_bar_config(disable=True)
    assert {"steps": 3, "guidance": 2.0}.items() <= run(saved, adapter, conditions(1), **call).about.items()


@pytest.mark.parametrize(
    ("cases", "more", "message"),
    [
        ([], {}, "number of conditions is 0; it must be 1 or more"),
        (conditions(1) * 2, {}, "two conditions have the name 'c0'"),
        (conditions(1), {"scales": (0,), "control_guidance": 2.0}, "scales has none but 0"),
        (conditions(1), {"scales": (0,), "dropped": True}, "scales has none but 0"),
        (conditions(1), {"seeds": 0}, "seeds is 0; it must be 1 or more"),
        (conditions(1), {"detector": "cany"}, "no measure for detector 'cany'; did you mean 'canny'"),
        ([Condition("x", "")], {}, "condition x has neither a control image nor a photo"),
        ([Condition("x", "", Image.new("RGB", (64, 64)))], {"detector": "pose"}, "condition x: a pose shows no joint"),
    ],
)
def test_errors_are_one_line(pipe: Any, adapter: Any, cases: Any, more: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        run(pipe, adapter, cases, **more)
    assert "\n" not in str(caught.value)


def test_page_and_json(pipe: Any, adapter: Any, tmp_path: Path) -> None:
    case = Condition('<i>"x"</i>', "<script>alert(1)</script>", lines(1))
    report = run(pipe, adapter, [case, *conditions(1)], seeds=1)
    folder = tmp_path / "new" / "page"
    text = report.page(folder).read_text()
    assert "<script>" not in text
    assert "<i>" not in text
    assert "&lt;script&gt;" in text
    pictures = sorted(file.name for file in folder.glob("*.png"))
    assert len(pictures) == 2 * 5  # the condition, and of both arms what was made and extracted
    assert all(f'src="{name}"' in text for name in pictures)
    assert Image.open(folder / "000-00.png").size == (64, 64)
    read = json.loads(report.to_json())
    assert read["lines"][1]["own"]["value"] == report.lines[1].own.value
    assert read["not_measured"]["LPIPS"] == "no weights were named for it"


# Quality


def test_fid_and_kid_of_features() -> None:
    """Of Gaussians with known means and spreads."""
    random = np.random.default_rng(7)
    made, photos = random.normal(size=(400, 2, 4)), random.normal(size=(400, 4))
    rows = np.stack([made, np.repeat(photos[:, None], 2, 1)], 2)
    moved = rows + np.array([1.0, 0.0])[:, None]
    assert fid(rows) == pytest.approx(0, abs=0.05)
    assert fid(moved) == pytest.approx(4, abs=0.5)  # |mean|^2 = 4 x 1
    assert kid(rows) == pytest.approx(0, abs=0.05)
    assert kid(moved) > 0.5


@pytest.fixture(scope="module")
def weights(tmp_path_factory: Any) -> dict[str, Path]:
    """Files of random networks: Inception, AlexNet, and a folder of CLIP."""
    from torchvision.models import alexnet
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("weights")
    for name, net in (("inception", network()), ("lpips", alexnet())):
        net = randomise(net, 1)
        save_file(net.state_dict(), folder / f"{name}.safetensors")
    text = components()["text_encoder"].config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 32, "patch_size": 8}
    net = randomise(CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)), 2)
    net.save_pretrained(folder / "clip")
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), tokenizer()).save_pretrained(folder / "clip")
    return {name: folder / f"{name}.safetensors" for name in ("inception", "lpips")} | {"clip": folder / "clip"}


def test_quality_of_pictures(pipe: Any, adapter: Any, weights: dict[str, Path]) -> None:
    measures = {measure.name: measure for measure in quality_measures(**weights)}  # type: ignore[arg-type]
    near, far = Condition("near", "a red fox", photo=picture(1)), Condition("far", "another", photo=picture(2))
    assert measures["LPIPS"].compare(picture(1), near) == pytest.approx(0, abs=1e-6)
    assert measures["LPIPS"].compare(picture(1), far) > 1e-3
    pair = measures["FID"].compare(picture(1), near)
    assert pair.shape == (2, 2048)
    np.testing.assert_allclose(pair[0], pair[1], atol=1e-4)
    score = measures["CLIP score"].compare
    assert 0 <= score(picture(1), near) <= 100
    assert len({score(p, c) for p in (picture(1), picture(2)) for c in (near, far)}) > 1
    del measures["FID"]  # KID goes the same way, and faster
    report = run(pipe, adapter, conditions(2), seeds=1, scales=(), quality=list(measures.values()))
    assert report.not_measured == {}
    assert [line.measure for line in report.lines] == ["edge F1", "KID", "CLIP score", "LPIPS"]
    assert [line.own.low is None for line in report.lines] == [False, True, False, False]
    without = [Condition(c.name, c.prompt, c.image) for c in conditions(2)]
    lacking = run(pipe, adapter, without, seeds=1, scales=(), quality=list(measures.values())).not_measured
    assert set(lacking) == {"KID", "LPIPS"}
    assert "photos" in lacking["KID"]


def test_inception_is_tensorflows_and_not_torchvisions() -> None:
    """Pools over what is inside the picture, and corners of pixels that meet where it is resized."""
    from torchvision.models.inception import Inception3

    ours, plain = randomise(network(), 1), Inception3(1008, aux_logits=False, init_weights=False).eval()
    plain.load_state_dict(ours.state_dict())
    pixels = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0))
    assert distance(ours(pixels), plain(pixels)) > 1e-2
    even = torch.ones(1, 192, 9, 9)
    block = ours.Mixed_5b
    block.branch_pool = torch.nn.Identity()
    assert torch.equal(block(even)[:, -192:], even), "a mean of ones is one at the border too"
    assert torch.equal(resized(pixels), pixels)
    ramp = torch.arange(598.0).expand(1, 3, 100, 598)
    assert torch.equal(resized(ramp)[0, 0, 0], torch.arange(299.0) * 2)


def test_clip_score_is_the_cosine_of_the_embeddings(weights: dict[str, Path]) -> None:
    from transformers import CLIPModel, CLIPProcessor

    net, processor = (cls.from_pretrained(weights["clip"]) for cls in (CLIPModel, CLIPProcessor))
    score, found = quality_measures(clip=weights["clip"])[2].compare, []
    for seed, text in enumerate(("a fox", "xyz", "0123456789", "the sea at night")):
        inputs = processor(text=[text], images=[picture(seed)], return_tensors="pt")
        cosine = (net(**inputs).logits_per_image / net.logit_scale.exp()).item()
        found.append(score(picture(seed), Condition("x", text)))
        assert found[-1] == pytest.approx(100 * max(0, cosine), abs=1e-3)
    assert max(found) > 1


def part_of(folder: Path, place: Path) -> Path:
    """A CLIP model without the weights of its vision."""
    shutil.copytree(folder, place)
    file = place / "model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "vision_model" not in name}, file)
    return place


def typed(folder: Path, place: Path) -> Path:
    """The same, whose configuration says that it is a text encoder."""
    shutil.copytree(folder, place)
    said = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**said, "model_type": "clip_text_model"}))
    return place


def test_weights_of_another_network_and_pickles_are_one_line(weights: dict[str, Path], tmp_path: Path) -> None:
    pickle = tmp_path / "inception.pth"
    pickle.write_bytes(b"")
    for named, message in (
        ({"inception": weights["lpips"]}, "does not fit Inception3"),
        ({"lpips": weights["inception"]}, "does not fit AlexNet"),
        ({"inception": pickle}, "is a pickle"),
        ({"clip": tmp_path}, "is no CLIP model: it has no config.json"),
        ({"clip": part_of(weights["clip"], tmp_path / "part")}, "is no whole CLIP model: it has no vision_model"),
        ({"clip": typed(weights["clip"], tmp_path / "text")}, "is no CLIP model: its config.json says clip_text_model"),
        ({"lpips": tmp_path}, "is no .safetensors file of an AlexNet"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            quality_measures(**named)  # type: ignore[arg-type]
        assert "\n" not in str(caught.value)
