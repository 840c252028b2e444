"""Compose varied pictures of every drawing once and encode them, so that trainings need no encoder.

`python scripts/make_default/latents.py` writes `pictures.npy`, `latents.npy` and `about.npz` into
the work folder: of each captioned drawing 24 variants moved about and 12 in the middle (these teach
what a thing looks like), of each other one 6 (for the adapter).
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import data
import numpy as np
import torch
from autoencoder import FOLDER, to_tensor
from data import WORK
from diffusers import AutoencoderKL

MOVED, PLAIN, OTHERS = 24, 12, 6


@dataclass(frozen=True)
class Cache:
    """`latents` is (n, 4, 16, 16) float16, `pictures` (n, 64, 64, 3) uint8 on disk."""

    icons: data.Icons
    latents: np.ndarray
    pictures: np.ndarray
    about: dict[str, np.ndarray]

    def caption(self, row: int, rng: np.random.Generator) -> str:
        about = self.about
        return data.caption(
            self.icons,
            data.Sample(
                self.pictures[row],
                int(about["index"][row]),
                str(about["background"][row]),
                str(about["colour"][row]) or None,
                bool(about["painted"][row]),
            ),
            rng,
        )

    def captioned(self) -> np.ndarray:
        """The rows whose drawing has a caption."""
        words = np.array([word is not None for word in self.icons.words])
        return np.flatnonzero(words[self.about["index"]])


def encode(vae: AutoencoderKL, pictures: np.ndarray) -> np.ndarray:
    """(n, 64, 64, 3) uint8 to (n, 4, 16, 16) float16 posterior means, scaled."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        latents = vae.encode(to_tensor(pictures)).latent_dist.mode()
    return (latents.float() * vae.config.scaling_factor).half().numpy()


def plan(icons: data.Icons) -> list[tuple[int, bool]]:
    """The drawing of each row and whether it is moved about."""
    skipped = set(data.held_out(icons))
    rows: list[tuple[int, bool]] = []
    for index, word in enumerate(icons.words):
        if word is not None:
            rows += [(index, True)] * MOVED + [(index, False)] * PLAIN
        elif index not in skipped:
            rows += [(index, True)] * OTHERS
    return rows


def write(icons: data.Icons, rows: list[tuple[int, bool]]) -> None:
    rng, vae = np.random.default_rng(0), AutoencoderKL.from_pretrained(FOLDER)
    samples: list[data.Sample] = []
    latents: list[np.ndarray] = []
    for start in range(0, len(rows), 64):
        part = rows[start : start + 64]
        new = [data.compose(icons, index, rng, moved=moved) for index, moved in part]
        latents.append(encode(vae, np.stack([sample.picture for sample in new])))
        samples += new
        if start % 6400 == 0:
            print(f"{start} of {len(rows)}", flush=True)
    np.save(WORK / "latents.npy", np.concatenate(latents))
    np.save(WORK / "pictures.npy", np.stack([sample.picture for sample in samples]))
    np.savez(
        WORK / "about.npz",
        index=[sample.index for sample in samples],
        background=[sample.background for sample in samples],
        colour=[sample.colour or "" for sample in samples],
        painted=[sample.painted for sample in samples],
        moved=[moved for _, moved in rows],
    )


def load() -> Cache:
    about = dict(np.load(WORK / "about.npz"))
    pictures = np.load(WORK / "pictures.npy", mmap_mode="r")
    return Cache(data.load(), np.load(WORK / "latents.npy"), pictures, about)


if __name__ == "__main__":
    cv2.setNumThreads(0)
    torch.set_num_threads(2)
    drawings = data.load()
    write(drawings, plan(drawings))
