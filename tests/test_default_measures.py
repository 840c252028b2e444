"""How the embedded model is measured: what it is asked for, that nobody trained on it, and the parts of the measures."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_kit.commands.evaluate import read_conditions

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts" / "make_default"))

import classifier  # noqa: E402
import conditions  # noqa: E402
import doodles  # noqa: E402
import drawings  # noqa: E402
import measure  # noqa: E402
import pictures  # noqa: E402


def test_wilson_interval() -> None:
    """Newcombe (1998), table I, method 3."""
    published = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (right, of), ends in published.items():
        assert classifier.wilson(right, of) == pytest.approx(ends, abs=1e-4)


def test_intervals_are_over_concepts() -> None:
    """Ten pictures of a concept that are all right, or all wrong, are one."""
    slugs = [f"{k}" for k in range(20) for _ in range(10)]
    right = np.repeat(np.arange(20) < 15, 10)
    own = classifier.accuracy(right, slugs)
    assert (own["value"], own["of"], own["concepts"]) == (0.75, 200, 20)
    assert own["interval"][0] < 0.6
    assert own["interval"][1] >= 0.9
    alone = classifier.accuracy(right[::10], slugs[::10])
    assert alone["interval"] == pytest.approx(classifier.wilson(15, 20), abs=1e-4)
    assert classifier.accuracy(np.ones(200, bool), slugs)["interval"][0] == pytest.approx(20 / (20 + 1.96**2), abs=1e-3)


@pytest.mark.parametrize("new", [True, False])
def test_neighbours_are_looked_for_of_both_kinds_of_pairs(new: bool) -> None:
    asked, chosen = conditions.measured(), measure.samples(new=new)
    assert len(set(chosen)) == 32
    assert {asked[k].new for k in chosen} == {new}
    assert len({asked[k].slug for k in chosen}) == 32


def test_conditions_are_of_concepts_in_no_training_set(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: set[str] = set()

    def note(pool: list[drawings.Drawing], *_: Any) -> Iterator[Any]:
        trained.update(own.slug for own in pool)
        return iter(())

    for name in ("base_pictures", "control_pictures", "scene"):
        monkeypatch.setattr(pictures, name, note)
    monkeypatch.setattr(drawings, "load", conditions.pool)
    monkeypatch.setattr(pictures, "write", lambda _, made: next(made, None))
    pictures.main()
    asked = conditions.held_out()
    assert len({own.slug for own in asked}) == 64
    assert len(trained) > 700
    assert not trained & {own.slug for own in asked}
    assert {own.word for own in asked} & set(classifier.words()) == {"pig", "whale"}  # words of other drawings


@pytest.mark.parametrize("made_by", [pictures.base_pictures, pictures.control_pictures])
def test_measured_concepts_never_stand_on_backgrounds_kept_from_them(made_by: Any) -> None:
    measured = drawings.measured()
    pool = [own for own in conditions.pool() if own.slug in measured][::60]
    made = [picture for _, picture in made_by(pool)]
    assert {own.drawing.slug for own in made} == {own.slug for own in pool}
    assert not [own for own in made if own.background in measured[own.drawing.slug]]


def test_half_of_what_is_asked_are_pairs_never_trained() -> None:
    asked, measured = conditions.measured(), drawings.measured()
    assert len({own.seed for own in asked}) == 1000
    assert Counter((own.style, own.background in measured[own.slug]) for own in asked) == {
        (style, new): 250 for style in ("noto", "3d") for new in (False, True)
    }
    assert set(Counter((own.slug, own.new) for own in asked).values()) == {5}


def test_conditions_are_read_by_the_command(tmp_path: Path) -> None:
    asked = conditions.held_out()
    listed = conditions.write(tmp_path, [(own.slug, own.prompt, Image.fromarray(own.pixels)) for own in asked])
    for case, own in zip(read_conditions(listed, photos=True), asked, strict=True):
        assert case["prompt"] == own.prompt
        assert np.array_equal(np.asarray(Image.open(case["photo"])), own.pixels)
        assert classifier.background_colour(own.pixels) == own.background


def test_doodles_are_lines_and_the_same_each_time() -> None:
    made = doodles.doodles()
    assert len({name for name, _, _ in made}) == 20
    for (name, prompt, one), (_, _, again) in zip(made, doodles.doodles(), strict=True):
        pixels = np.asarray(one)
        assert np.array_equal(pixels, np.asarray(again)), name
        assert set(np.unique(pixels)) == {0, 255}
        assert 0.02 < (pixels > 0).mean() < 0.3, name
        assert prompt.partition(" ")[2].partition(" on ")[0] in classifier.words()


def test_photos_are_square() -> None:
    assert [own.width for _, _, own in doodles.photos()] == [own.height for _, _, own in doodles.photos()]


def test_classifier() -> None:
    torch.manual_seed(0)
    net = classifier.network().eval()
    made = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), np.uint8)
    scores = classifier.scores(net, made)
    assert scores.shape == (5, 324)
    assert np.allclose(scores, classifier.scores(net, made[:, :, ::-1].copy()), atol=1e-4)
    best = [classifier.words()[k] for k in scores.argmax(1)]
    assert classifier.named(net, made, best).all()
    assert classifier.named(net, made, [best[0]] * 5, among=[best[0]]).all()
    assert not classifier.named(net, made, ["house"] * 5, among=["car", "cat"]).any()


def test_disturbed_drawings() -> None:
    """Nothing shows the ground, of many colours; opaque black covers it; both in range, and other each time."""
    torch.manual_seed(0)
    black = torch.tensor([0.0, 0, 0, 1]).view(1, 4, 1, 1).expand(64, 4, 64, 64)
    first, second, nothing = (classifier.disturbed(own) for own in (black, black, 0 * black))
    assert first.shape == (64, 3, 64, 64)
    assert first.abs().max() <= 1
    assert (first - second).abs().mean() > 0.05
    middle, covered = (own[:, :, 28:36, 28:36].mean((2, 3)) for own in (nothing, first))
    assert middle.std(0).min() > 0.3
    assert covered.mean() < middle.mean() - 0.3


def test_turned_hues() -> None:
    """A third of a turn makes red green and green blue; greys stay."""
    turned = classifier.turn(torch.tensor([2 * torch.pi / 3]))[0]
    assert torch.allclose(turned @ torch.eye(3), torch.eye(3)[[2, 0, 1]], atol=1e-6)
    assert torch.allclose(turned @ torch.ones(3), torch.ones(3), atol=1e-6)


def figures(course: list[float], versus: float) -> dict[str, Any]:
    arms = {f"{k / 4:g}": {"value": value, "another's": versus} for k, value in enumerate(course)}
    word = {"word, of all 324": {"value": 0.8}, "background": {"value": 1.0}}
    fewer = {"word, of all 324": {"value": 0.69}, "background": {"value": 0.89}}
    return {
        "autoencoder": {"dB": 26.0},
        "captions": {"all": word},
        "captions, strange": {"without": word, "canny": word, "palette": fewer},
        "controls": {"canny": {"measure": "edge F1"} | arms, "palette": {"measure": "CIEDE2000"} | arms},
        "doodles": {"canny": arms},
        "photos": {},
    }


def test_bounds() -> None:
    def failed(*of: Any) -> set[str]:
        rows = json.loads(json.dumps(measure.bounds(figures(*of))))
        return {row["what"] for row in rows if not row["passed"]}

    always = {f"palette, {what} lost under control" for what in ("words", "backgrounds")}
    rising = {"palette, CIEDE2000 over that without", "palette, largest step up over scale"} | always
    assert failed([0.5, 0.6, 0.7, 0.71, 0.75], 0.5) == rising
    assert failed([0.5, 0.6, 0.7, 0.76, 0.75], 0.56) == rising | {"canny, above another's condition"}
    assert failed([0.5, 0.6, 0.7, 0.77, 0.75], 0.5) == rising | {"canny, largest step down over scale"}
    assert "canny, share of the gap closed" in failed([0.51, 0.6, 0.7, 0.71, 0.75], 0.5)
    assert not failed([0.8, 0.7, 0.6, 0.5, 0.4], 0.1) & (rising - always)
    assert measure.bounds(figures([0.5] * 5, 0.5), ["canny", "sketch"])[-2]["what"] == "sketch is not there"
