"""What the embedded model can do, in figures, and whether they reach the bounds that were set before its training.

`python scripts/make_default/measure.py` (or `scripts/verify default`) measures part by part, keeps each part in
`runs/make_default/measured/` under the hash of the weights that it is about, and goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import classifier
import conditions
import cv2
import doodles
import drawings
import numpy as np
import pictures
import torch
import yaml
from assemble import GUIDANCE, STEPS
from classifier import verdict
from conditions import Asked
from PIL import Image

from diffusion_kit import AutoPipelineForText2Image, Control, detect
from diffusion_kit.cli import main as command
from diffusion_kit.evaluation.edges import edge_f1
from diffusion_kit.evaluation.measures import measures_of
from diffusion_kit.making.fingerprint import fingerprint
from diffusion_kit.models.sources import embedded
from diffusion_kit.models.vae import decode_latents
from diffusion_kit.training.bases import posterior

ROOT = drawings.HERE.parents[1]
STORE = ROOT / "runs/make_default/measured"
CONTROLS = ("canny", "canny_controlnet", "sketch", "regions", "palette")
DRAWN = ("canny", "canny_controlnet", "sketch")  # that take lines, as a doodle has
EDGES = ("canny", "canny_controlnet")
SCALES = (0.25, 0.5, 0.75, 1.0)
IMAGE_GUIDANCE = 2.0  # which is measured beside the plain control
BATCH = 8


class Model:
    """A model folder, its pipeline and the figures already measured of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.hash = folder, fingerprint(folder).removeprefix("sha256:")[:12]
        self.controls = [name for name in CONTROLS if (folder / "controls" / name).is_dir()]
        self.place = STORE / f"{self.hash}-{protocol_hash()}"
        self.place.mkdir(parents=True, exist_ok=True)

    @property
    def pipe(self) -> Any:
        return load(self.folder)

    def guides(self, control: str) -> bool:
        """Whether guidance over a control's image is measured, too; a hint has none of its own."""
        return control in EDGES and not hasattr(self.pipe, "movq")

    def part(self, name: str, work: Callable[[], dict[str, Any]], control: str | None = None) -> dict[str, Any]:
        """Figures of one part, measured now where they are not kept."""
        file = self.file(name, "json", control)
        if not file.exists():
            print(f"{file.stem} ...", flush=True)
            beside = file.with_name(f".{file.name}.part")
            beside.write_text(json.dumps(work(), indent=2) + "\n")
            beside.rename(file)
        return json.loads(file.read_text())

    def file(self, name: str, kind: str, control: str | None = None) -> Path:
        """Where something is kept that is about these weights, and those of a control."""
        own = "" if control is None else f"-{fingerprint(self.folder / 'controls' / control)[7:15]}"
        return self.place / f"{name.replace(' ', '_')}{own}.{kind}"


@cache
def protocol_hash() -> str:
    """Of all that figures depend on beside the weights: who measures, what is asked for, and how it is compared."""
    own, kit = drawings.HERE, ROOT / "diffusion_kit"
    files = [file for file in own.glob("*.py") if file.name not in ("sheets.py", "restore.py")]
    files += [*own.glob("*.txt"), *(own / "drawings").iterdir(), *(ROOT / "configs/default").glob("*.yaml")]
    for room in ("adapters", "evaluation", "models", "pipelines", "sampling"):
        files += (kit / room).rglob("*.py")
    files += [kit / "commands/evaluate.py", kit / "training/bases.py", conditions.VENDOR]
    files += [classifier.FILE] if classifier.FILE.exists() else []
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(files))).hexdigest()[:8]


@cache
def load(folder: Path) -> Any:
    pipe = AutoPipelineForText2Image.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def condition_of(control: str) -> tuple[str, dict[str, Any]]:
    """The detector and its options with which a control was trained."""
    said = yaml.safe_load((ROOT / "configs/default" / f"{control}.yaml").read_text())["data"]["condition"]
    return said["detector"], said.get("options", {})


def draw(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    control: str | None = None,
    images: Sequence[Any] = (),
    guidance: float | None = None,
) -> np.ndarray:
    """(n, 64, 64, 3) uint8: a picture for each prompt, with a control's images, and guidance over them, where given."""
    made = []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        out = pipe(
            list(prompts[part]),
            height=pictures.SIZE,
            width=pictures.SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            controls=[] if control is None else [Control(control, list(images[part]), guidance=guidance)],
        )
        made += [np.asarray(image) for image in out.images]
    return np.stack(made)


def asked_of(pipe: Any, asked: Sequence[Asked], control: str | None = None) -> np.ndarray:
    """(n, 64, 64, 3) uint8, with the condition that a control's detector finds in the pictures of what is asked."""
    found = [] if control is None else [seen(control, own.pixels) for own in asked]
    return draw(pipe, [own.prompt for own in asked], [own.seed for own in asked], control, found)


def seen(control: str, photo: Any) -> Image.Image:
    """A control's condition of a photo (64, 64, 3) uint8."""
    name, options = condition_of(control)
    return detect(name, Image.fromarray(photo), **options)


def rounded(value: Any) -> float:
    return round(float(value), 4)


def autoencoder(model: Model) -> dict[str, Any]:
    """PSNR on all held-out drawings; and how well each detector finds a held-out condition again in what the autoencoder
    makes of its own photo: about what a perfect control would reach."""
    pool = [drawing for drawing in conditions.pool() if drawing.slug in drawings.held_out()]
    photos = [conditions.lay(own.pixels, conditions.background_of(k, own.pixels)) for k, own in enumerate(pool)]
    there = through(model.pipe.vae, np.stack(photos))
    errors = ((there / 255.0 - np.stack(photos) / 255.0) ** 2).mean((1, 2, 3))
    shown = np.stack([own.pixels for own in conditions.held_out()])
    found = {name: again(name, through(model.pipe.vae, shown), shown) for name in CONTROLS}
    return {"dB": rounded((-10 * np.log10(errors)).mean()), "pictures": len(pool), "found again": found}


@torch.no_grad()
def through(vae: Any, photos: np.ndarray) -> np.ndarray:
    """Photos (n, 64, 64, 3) uint8 encoded and decoded."""
    pixels = torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1
    moments = torch.cat([posterior(vae, part) for part in pixels.split(64)])
    parts = [decode_latents(vae, mean) for mean in moments.chunk(2, 1)[0].split(64)]
    return ((torch.cat(parts).clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()


def again(control: str, made: np.ndarray, photos: np.ndarray) -> float:
    """The measure of a control, of the conditions of two stacks of pictures."""
    compare = measures_of(condition_of(control)[0])[0].compare
    return rounded(np.mean([compare(seen(control, a), seen(control, b)) for a, b in zip(made, photos, strict=True)]))


def captions(model: Model) -> dict[str, Any]:
    """1,000 pictures of the measured concepts, which are kept, as the classifier sees them."""
    asked, net = conditions.measured(), classifier.load()
    made = asked_of(model.pipe, asked)
    np.save(model.file("captions", "npy"), made)
    right = classifier.named(net, made, [own.word for own in asked]).reshape(len(drawings.measured()), -1)
    shares = dict(zip(classifier.measured_words(), right.mean(1).tolist(), strict=True))

    def of(chosen: Callable[[Asked], bool]) -> dict[str, Any]:
        kept = [k for k, own in enumerate(asked) if chosen(own)]
        return verdict(net, made[kept], [asked[k] for k in kept])

    return {
        "all": verdict(net, made, asked),
        "pairs never trained": of(lambda own: own.new),
        "pairs trained": of(lambda own: not own.new),
        **{style: of(lambda own, style=style: own.style == style) for style in conditions.STYLES},
        "words below a half": {word: share for word, share in shares.items() if share < 0.5},
    }


def nearest(model: Model) -> dict[str, Any]:
    """How far generated pictures, 32 of pairs of concept and background that were trained and 32 of others, and as many
    that no training saw, are from the nearest training picture."""
    made = np.load(model.file("captions", "npy"))
    sets = {"pairs trained": made[samples(new=False)], "pairs never trained": made[samples(new=True)]}
    sets["held out"] = np.stack([own.pixels for own in conditions.held_out()])[::2]
    result: dict[str, Any] = {"training pictures": len(trained())}
    for name, own in sets.items():
        _, distances = neighbours(own)
        result[name] = {"median": rounded(np.median(distances)), "least": rounded(distances.min())}
    return result


def samples(*, new: bool) -> list[int]:
    """Which 32 of the measured pictures: of every third concept, styles by turns, on a background that was never trained
    with it or on one that was."""
    asked, each = conditions.measured(), len(conditions.STYLES) * conditions.SEEDS
    firsts = [3 * k * each + k % 2 * conditions.SEEDS for k in range(32)]
    return [next(first + s for s in range(conditions.SEEDS) if asked[first + s].new == new) for first in firsts]


def trained() -> list[Path]:
    """The pictures that the base saw."""
    return sorted(file for part in ("base", "controls") for file in (pictures.DATA / part / "images").iterdir())


def neighbours(made: np.ndarray) -> tuple[list[Path], np.ndarray]:
    """For pictures (n, 64, 64, 3) uint8 the nearest training picture, and the root mean square between them, both halved to
    32 px, in [0, 1]."""
    files = trained()
    wanted, best, nearest = small(made), np.full(len(made), np.inf), np.zeros(len(made), int)
    for start in range(0, len(files), 2048):
        known = small(np.stack([np.asarray(Image.open(file)) for file in files[start : start + 2048]]))
        squares = (wanted**2).sum(1)[:, None] + (known**2).sum(1) - 2 * wanted @ known.T
        nearest = np.where(squares.min(1) < best, start + squares.argmin(1), nearest)
        best = np.minimum(best, squares.min(1))
    return [files[k] for k in nearest], np.sqrt(best.clip(0) / wanted.shape[1])


def small(many: np.ndarray) -> np.ndarray:
    n, side = len(many), pictures.SIZE // 2
    return many.reshape(n, side, 2, side, 2, 3).mean((2, 4), dtype=np.float32).reshape(n, -1) / 255


def followed(
    model: Model, control: str, name: str, listed: Path, scales: Sequence[float], *more: str
) -> dict[str, Any]:
    """What `diffusion-kit evaluate` says: the measure against the own and another's condition, by scale."""
    detector, options = condition_of(control)
    out = model.file(f"{control} {name}", "page", control)
    if not out.exists():
        asked = ["--control", control, "--detector", detector, "--conditions", str(listed), *more]
        asked += [part for key, value in options.items() for part in ("--option", f"{key}={value}")]
        asked += ["--model", str(model.folder), "--scales", ",".join(map(str, scales)), "--out", str(out)]
        asked += ["--steps", str(STEPS), "--guidance", str(GUIDANCE)]
        if command(["evaluate", *asked]):
            raise SystemExit(f"diffusion-kit evaluate {' '.join(asked)}")
    lines = json.loads((out / "report.json").read_text())["lines"]
    first = [line for line in lines if line["measure"] == lines[0]["measure"]]

    def figures(line: dict[str, Any]) -> dict[str, Any]:
        own = line["own"]
        ends = [rounded(own["low"]), rounded(own["high"])]
        return {"value": rounded(own["value"]), "interval": ends, "another's": rounded(line["shuffled"]["value"])}

    def key(line: dict[str, Any]) -> str:
        return f"{line['scale']:g}" if line["guidance"] is None else line["arm"]

    return {"measure": lines[0]["measure"]} | {key(line): figures(line) for line in first}


def with_diagonals(page: Path) -> dict[str, float]:
    """Edge F1 of the first seeds as others count a pixel's tolerance: diagonal neighbours are near, too."""

    def maps(which: int) -> list[np.ndarray]:
        return [np.asarray(Image.open(file).convert("L")) > 0 for file in sorted(page.glob(f"*-{which:02}.png"))]

    wanted, last = maps(0), 2 * (1 + len(SCALES))  # two pictures an arm: what was made, and its edges
    return {
        key: rounded(np.mean([edge_f1(made, own, 1.5) for made, own in zip(maps(which), wanted, strict=True)]))
        for key, which in (("0", 2), ("1", last))
    }


def under(model: Model, control: str | None) -> dict[str, Any]:
    """Whether the captions are followed while a stranger's drawing of the same thing is the condition."""
    asked = conditions.strange()
    return verdict(classifier.load(), asked_of(model.pipe, asked, control), asked)


def figures_of(model: Model) -> dict[str, Any]:
    """All parts."""
    listed, folder = conditions.write_held_out(), conditions.FOLDER
    drawn = conditions.write(folder.with_name("doodles"), doodles.doodles())
    photos = conditions.write(folder.with_name("photos"), doodles.photos())
    figures: dict[str, Any] = {
        "autoencoder": model.part("autoencoder", lambda: autoencoder(model)),
        "ceiling": model.part("ceiling", classifier.ceiling),
        "captions": model.part("captions", lambda: captions(model)),
        "nearest": model.part("nearest", lambda: nearest(model)),
        "captions, strange": {"without": model.part("under nothing", lambda: under(model, None))},
        "controls": {},
        "with diagonals": {},
        "doodles": {},
        "photos": {},
    }
    for name in model.controls:
        seen = model.part(f"under {name}", lambda name=name: under(model, name), name)
        figures["captions, strange"][name] = seen
        guided = ("--control-guidance", str(IMAGE_GUIDANCE)) if model.guides(name) else ()
        figures["controls"][name] = followed(model, name, "held out", listed, SCALES, "--photos", *guided)
        if name in EDGES:
            figures["with diagonals"][name] = with_diagonals(model.file(f"{name} held out", "page", name))
        if name in DRAWN:
            figures["doodles"][name] = followed(model, name, "doodles", drawn, [1.0], *guided)
            figures["photos"][name] = followed(model, name, "photos", photos, [1.0], "--photos", *guided)
    return figures


def bounds(figures: dict[str, Any], wanted: Sequence[str] = ()) -> list[dict[str, Any]]:
    """What was to be reached, and whether it was; a control of `wanted` that is not there is a miss. Guidance over the
    image is held to the bounds of the plain control, too, which was not said beforehand."""
    rows: list[dict[str, Any]] = []

    def row(what: str, value: float, bound: float, *, most: bool = False) -> None:
        passed = bool(value <= bound + 1e-9 if most else value >= bound - 1e-9)
        rows.append({"what": what, "value": rounded(value), "at most" if most else "at least": bound, "passed": passed})

    row("autoencoder, dB on held-out drawings", figures["autoencoder"]["dB"], 26)
    row("captions, words named of all 324", figures["captions"]["all"]["word, of all 324"]["value"], 0.7)
    least, gaps = {"canny": 0.75, "canny_controlnet": 0.8}, {"sketch": 0.4, "regions": 0.4}
    for name, own in figures["controls"].items():
        course = [arm["value"] for key, arm in own.items() if key[0].isdigit()]  # by scale, 0 first
        without, with_, versus = course[0], course[-1], own["1"]["another's"]
        steps = np.diff(course)
        if name == "palette":
            row("palette, CIEDE2000 over that without", with_ / without, 0.5, most=True)
            row("palette, largest step up over scale", steps.max(), 0.01, most=True)
        else:
            if name in least:
                row(f"{name}, {own['measure']}", with_, least[name])
                for arm in (key for key in own if key.startswith("guidance")):
                    row(f"{name} with {arm} over its image, {own['measure']}", own[arm]["value"], least[name])
            row(f"{name}, share of the gap closed", (with_ - without) / (1 - without), gaps.get(name, 0.5))
            row(f"{name}, above another's condition", with_ - versus, 0.2)
            row(f"{name}, largest step down over scale", -steps.min(), 0.01, most=True)
        for what, told in (("word, of all 324", "words"), ("background", "backgrounds")):
            seen = [figures["captions, strange"][key][what]["value"] for key in ("without", name)]
            row(f"{name}, {told} lost under control", seen[0] - seen[1], 0.1, most=True)
    for name in wanted:
        if name not in figures["controls"]:
            rows.append({"what": f"{name} is not there", "value": 0, "at least": 1, "passed": False})
    for kind in ("doodles", "photos"):
        for name, own in figures[kind].items():
            row(f"{kind}, {name}, edge F1", own["1"]["value"], 0.5)
    return rows


def main(folder: Path) -> dict[str, Any]:
    """Figures and bounds of a model folder."""
    cv2.setNumThreads(0)
    classifier.load()  # is trained where it is not there, and its file is in the hash
    model = Model(folder)
    figures = figures_of(model)
    wanted = ("canny",) if hasattr(model.pipe, "movq") else CONTROLS
    result = {"weights": model.hash, "bounds": bounds(figures, wanted), **figures}
    (model.place / "all.json").write_text(json.dumps(result, indent=2) + "\n")
    for row in result["bounds"]:
        limit = next(f"{key} {row[key]}" for key in ("at least", "at most") if key in row)
        print(f"{'passed' if row['passed'] else 'FAILED':8}{row['value']:<9g}{limit:16}{row['what']}")
    print(model.place / "all.json")
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=embedded(), help="folder; by default the embedded model")
    main(parser.parse_args().model)
