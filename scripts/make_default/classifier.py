"""Names what is on a picture: a small residual network (He et al., 2015, arXiv:1512.03385) over all words of captions.

It learns from the drawings of the three styles, laid anew on backgrounds each time and disturbed, and never sees a
generated picture. `python scripts/make_default/classifier.py` trains it, once, and says how well it names pictures that
no model made: of its own training drawings newly composed, and of a style that it never saw.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import conditions
import drawings
import numpy as np
import pictures
import torch
import torch.nn.functional as F
from conditions import Asked
from pictures import COLOURS, SIZE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusion_kit.evaluation.intervals import bootstrap

FILE = drawings.HERE.parents[1] / "runs/make_default/classifier.safetensors"
STEPS, BATCH, RATE = 4000, 64, 3e-3
BORDER = 3  # px around the picture that tell its background


def words() -> list[str]:
    """All that it can name."""
    return sorted(drawings.words().values())


class Block(nn.Module):
    """(n, i, h, w) to (n, o, h/2, w/2)."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.body = nn.Sequential(convolution(i, o, 2), nn.ReLU(), convolution(o, o, 1))
        self.skip = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(i, o, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def convolution(i: int, o: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o))


def network() -> nn.Module:
    """(n, 3, 64, 64) in [-1, 1] to (n, words) logits."""
    body = [convolution(3, 32, 2), nn.ReLU(), Block(32, 64), Block(64, 128), Block(128, 256)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(256, len(words())))


def uniform(low: float, high: float, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(shape)


def disturbed(rgba: Tensor) -> Tensor:
    """Drawings (n, 4, 64, 64), premultiplied, to pictures (n, 3, 64, 64) in [-1, 1]: moved, bent, recoloured, on some
    ground, softened as by an autoencoder, noisy."""
    n = len(rgba)
    angle, size, stretch = uniform(-0.3, 0.3, n), uniform(0.95, 1.7, n), uniform(0.85, 1.18, n)
    mirror = torch.where(torch.rand(n) < 0.5, -1.0, 1.0)
    rows = [size * stretch * angle.cos() * mirror, -size * angle.sin(), size * angle.sin() * mirror, size * angle.cos()]
    matrix = torch.cat([torch.stack(rows, 1).view(n, 2, 2), uniform(-0.2, 0.2, n, 2, 1)], 2)
    bend = uniform(0, 0.1, n, 1, 1, 1) * torch.randn(n, 2, 4, 4)
    bent = F.interpolate(bend, (SIZE, SIZE), mode="bicubic").permute(0, 2, 3, 1)
    grid = F.affine_grid(matrix, [n, 4, SIZE, SIZE], align_corners=False) + bent
    drawn, alpha = F.grid_sample(rgba, grid, align_corners=False).split((3, 1), 1)
    turned = torch.einsum("noc,nchw->nohw", turn(torch.where(torch.rand(n) < 0.5, 1.0, 0.1) * torch.randn(n)), drawn)
    picture = turned.clamp(min=0) + ground(n) * (1 - alpha)
    small = F.interpolate(F.avg_pool2d(picture, 2), scale_factor=2.0, mode="bilinear")
    picture = picture.lerp(small, uniform(0, 1, n, 1, 1, 1))
    grain = F.interpolate(torch.randn(n, 3, 16, 16), (SIZE, SIZE), mode="bilinear") + 0.5 * torch.randn_like(picture)
    picture = picture + uniform(0, 0.1, n, 1, 1, 1) * grain
    picture = (picture - 0.5) * uniform(0.7, 1.3, n, 1, 1, 1) + 0.5 + uniform(-0.1, 0.1, n, 3, 1, 1)
    return picture.clamp(0, 1) * 2 - 1


def turn(angle: Tensor) -> Tensor:
    """(n, 3, 3) rotations of RGB about the greys, which turn every hue (Rodrigues, 1840)."""
    ones = torch.full((3, 3), 1 / 3)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    c, s = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    return c * torch.eye(3) + s * cross + (1 - c) * ones


def ground(n: int) -> Tensor:
    """(n, 3, 1, 1): a named colour, or any."""
    named = torch.tensor(list(COLOURS.values()))[torch.randint(len(COLOURS), (n,))] / 255
    return torch.where(torch.rand(n, 1) < 0.7, named, torch.rand(n, 3))[..., None, None]


def train(steps: int = STEPS) -> nn.Module:
    """Trains on the captioned drawings; the same call gives the same weights on the same machine."""
    torch.manual_seed(0)
    known = {slug: words().index(word) for slug, word in drawings.words().items()}
    pool = [drawing for drawing in conditions.pool() if drawing.slug in known]
    rgba = torch.from_numpy(np.stack([own.pixels for own in pool])).permute(0, 3, 1, 2) / 255
    rgba[:, :3] *= rgba[:, 3:]
    labels = torch.tensor([known[own.slug] for own in pool])
    net = network().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
    for step in range(steps):
        pick = torch.randint(len(pool), (BATCH,))
        seen = disturbed(rgba[pick]).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(seen)
        loss = F.cross_entropy(logits.float(), labels[pick], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            print(f"classifier, step {step + 1} of {steps}: loss {loss:.3f}", flush=True)
    return net.eval()


def load() -> nn.Module:
    """The trained network; trained now where it was not yet."""
    if not FILE.exists():
        save_file({key: value.contiguous() for key, value in train().state_dict().items()}, FILE)
    net = network().eval()
    net.load_state_dict(load_file(FILE))
    return net


@torch.no_grad()
def scores(net: nn.Module, made: np.ndarray) -> np.ndarray:
    """(n, words) of pictures (n, 64, 64, 3) uint8, seen as they are and mirrored."""
    pixels = torch.from_numpy(made).permute(0, 3, 1, 2) / 127.5 - 1
    return torch.cat([net(part) + net(part.flip(3)) for part in pixels.split(256)]).numpy()


def named(net: nn.Module, made: np.ndarray, wanted: Sequence[str], among: Sequence[str] | None = None) -> np.ndarray:
    """(n,): whether the best of all words, or of those in `among`, is the wanted one."""
    known = words()
    allowed = known if among is None else sorted(among)
    best = scores(net, made)[:, [known.index(word) for word in allowed]].argmax(1)
    return np.array([allowed[k] for k in best]) == np.array(wanted)


def background_colour(picture: np.ndarray) -> str:
    """The colour word nearest to the mean of the border of a picture (64, 64, 3) uint8."""
    frame = np.ones(picture.shape[:2], dtype=bool)
    frame[BORDER:-BORDER, BORDER:-BORDER] = False
    mean = picture[frame].mean(0)
    return min(COLOURS, key=lambda name: float(np.abs(mean - COLOURS[name]).sum()))


def wilson(right: int, of: int, z: float = 1.959964) -> tuple[float, float]:
    """Ends of the 95 % interval of a share (Wilson, 1927)."""
    share, extra = right / of, z * z / of
    middle = (share + extra / 2) / (1 + extra)
    reach = z / (1 + extra) * math.sqrt(share * (1 - share) / of + extra / (4 * of))
    return middle - reach, middle + reach


def accuracy(right: np.ndarray, slugs: Sequence[str]) -> dict[str, object]:
    """A share with its interval, of (n,) booleans, of each concept as many: a bootstrap over concepts, whose pictures are
    not independent; Wilson's over as many draws as there are concepts where each has one, or all are alike."""
    rows = np.stack([right[np.array(slugs) == slug] for slug in dict.fromkeys(slugs)])
    alone = rows.shape[1] == 1 or rows.all() or not rows.any()
    low, high = wilson(round(rows.mean() * len(rows)), len(rows)) if alone else bootstrap(rows.astype(float))
    ends = [round(low, 4), round(high, 4)]
    return {"value": round(float(right.mean()), 4), "interval": ends, "of": right.size, "concepts": len(rows)}


def measured_words() -> list[str]:
    return [drawings.words()[slug] for slug in drawings.measured()]


def verdict(net: nn.Module, made: np.ndarray, asked: Sequence[Asked]) -> dict[str, object]:
    """How many of the pictures (n, 64, 64, 3) uint8 show the word and the background that were asked for."""
    wanted = [own.word for own in asked]
    grounds = np.array([background_colour(own) for own in made]) == np.array([own.background for own in asked])
    slugs = [own.slug for own in asked]
    return {
        "word, of all 324": accuracy(named(net, made, wanted), slugs),
        "word, of the 100 measured": accuracy(named(net, made, wanted, measured_words()), slugs),
        "background": accuracy(grounds, slugs),
    }


def known(style: str) -> list[Asked]:
    """The measured concepts as one style draws them, newly composed: drawings that it was trained on."""
    asked = []
    for drawing in conditions.pool():
        if drawing.style == style and drawing.slug in drawings.measured():
            own = pictures.compose(drawing, pictures.rng_of("sanity", style, drawing.slug), moved=True)
            word = drawings.words()[drawing.slug]
            asked.append(Asked(drawing.slug, style, word, own.background, pixels=own.pixels))
    return asked


def ceiling() -> dict[str, object]:
    """Its verdict on drawings, not generated ones: by a vendor nobody trained on, and of the known styles."""
    net = load()
    sets = {"stranger": conditions.strange()[:: len(conditions.STYLES)]} | {
        style: known(style) for style in drawings.STYLES
    }
    return {name: verdict(net, np.stack([a.pixels for a in own]), own) for name, own in sets.items()}


if __name__ == "__main__":
    for name, figures in ceiling().items():
        print(name, figures)
