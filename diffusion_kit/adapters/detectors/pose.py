"""Poses after BlazePose (Bazarevsky et al., 2020, arXiv:2006.10204), drawn as OpenPose draws them.

The networks are those of the npm package @mediapipe/pose (Apache-2.0). One finds people and how they stand, the other the
joints of one person in an upright square around them.
"""

from __future__ import annotations

import colorsys
import importlib.util
import json
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion_kit.adapters.detectors._networks import INSTALL

RESAMPLE = Image.Resampling.BILINEAR  # Lanczos would ring around the limbs
FOLDER = Path("node_modules/@mediapipe/pose")
VARIANTS = ("lite", "full", "heavy")

FINDER_SIDE, JOINTS_SIDE = 224, 256  # pixels of the networks' inputs
STRIDES = (8, 16, 32, 32, 32)  # of the finder's feature maps; each has two anchors a cell
SURE = 0.5  # of a person, of a joint
SAME = 0.3  # overlap from which two findings are one person
MARGIN = 1.25  # the square around a person over the circle that holds them

# BlazePose's landmarks for OpenPose's 18 joints (nose, neck, right arm, left arm, right leg, left leg, eyes, ears)
JOINTS = [(0,), (11, 12), (12,), (14,), (16,), (11,), (13,), (15,), (24,), (26,), (28,), (23,), (25,), (27,)]
JOINTS += [(5,), (2,), (8,), (7,)]
LIMBS = [(1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13)]
LIMBS += [(1, 0), (0, 14), (14, 16), (0, 15), (15, 17)]
COLOURS = [tuple(round(255 * c) for c in colorsys.hsv_to_rgb(k / 18, 1, 1)) for k in range(18)]


class Square(NamedTuple):
    """A turned square in a picture: centre and side in pixels, `angle` in radians, clockwise."""

    x: float
    y: float
    side: float
    angle: float = 0.0

    def to_picture(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) pixels of the picture from places in the square, whose corners are (0, 0) and (1, 1)."""
        return (points - 0.5) @ self._axes().T + (self.x, self.y)

    def from_picture(self, points: np.ndarray) -> np.ndarray:
        """The inverse of `to_picture`."""
        return (points - (self.x, self.y)) @ np.linalg.inv(self._axes()).T + 0.5

    def crop(self, picture: Image.Image, side: int) -> Image.Image:
        """The square, upright, as a picture of `side` pixels; black where it leaves the picture."""
        shrink = max(1, int(self.side / side))  # bilinear alone would skip pixels
        x, y = self.to_picture(np.zeros(2)) / shrink
        (a, b), (d, e) = self._axes() / (side * shrink)
        return picture.reduce(shrink).transform(
            (side, side), Image.Transform.AFFINE, (a, b, x, d, e, y), Image.Resampling.BILINEAR
        )

    def _axes(self) -> np.ndarray:
        cos, sin = np.cos(self.angle), np.sin(self.angle)
        return self.side * np.array([[cos, -sin], [sin, cos]])


def detect(image: Image.Image, *, model: Any = None, variant: str = "lite") -> Image.Image:
    """Coloured skeletons of 18 joints on black, RGB, of the picture's size; nobody found is a warning and all black.

    Args:
        model: the folder of the npm package @mediapipe/pose; by default node_modules/@mediapipe/pose.
        variant: "lite", "full" or "heavy": size of the network of joints.

    Raises:
        FileNotFoundError: no such package there. ImportError: ai-edge-litert is not installed.
        ValueError: no such variant, or a broken file.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(VARIANTS)}")
    people = find_people(image, _files(model, variant))
    if not people:
        warnings.warn("detector pose found nobody: its picture is black", stacklevel=3)  # the caller of detect("pose")
    return draw(people, image.size)


def missing(model: Any = None) -> str | None:
    if importlib.util.find_spec("ai_edge_litert") is None:
        return f"detector pose needs the package ai-edge-litert: {INSTALL}"
    try:
        _files(model, "lite")
    except FileNotFoundError as error:
        return str(error)
    return None


def find_people(image: Image.Image, files: tuple[Path, Path]) -> list[np.ndarray]:
    """(18, 2) pixels of each person's joints, in OpenPose's order, NaN where one is not seen; the surest person first."""
    finder, joints = (_network(file) for file in files)
    whole = Square(image.width / 2, image.height / 2, max(image.size))
    raw, scores = finder(_input(whole.crop(image, FINDER_SIDE)) * 2 - 1)
    people = []
    for found in merged(decoded(raw[0]), _sigmoid(scores[0, :, 0])):
        square = around(*whole.to_picture(found[2:].reshape(-1, 2))[:2])
        landmarks, certainty, *_ = joints(_input(square.crop(image, JOINTS_SIDE)))
        if certainty[0, 0] > SURE:
            people.append(openpose_joints(landmarks.reshape(-1, 5), square, image.size))
    return people


def anchors() -> np.ndarray:
    """(2254, 2) centres of the finder's anchors in the unit square (Liu et al., 2015, arXiv:1512.02325, section 2.2)."""
    centres = []
    for stride in dict.fromkeys(STRIDES):  # maps of one stride share their cells
        cells = FINDER_SIDE // stride
        y, x = np.mgrid[:cells, :cells].reshape(2, -1)
        centres.append(np.repeat((np.stack([x, y], 1) + 0.5) / cells, 2 * STRIDES.count(stride), 0))
    return np.concatenate(centres)


def decoded(raw: np.ndarray) -> np.ndarray:
    """(2254, 12) in the unit square from the finder's output: top left, bottom right, and four points.

    The points are the middle of the hips, one on the circle that holds the body, above its head, and the same two of the
    shoulders and the upper body.
    """
    values = raw.reshape(-1, 6, 2) / FINDER_SIDE
    points = values + anchors()[:, None]
    centre, half = points[:, 0], values[:, 1] / 2
    return np.concatenate([np.stack([centre - half, centre + half], 1), points[:, 2:]], 1).reshape(-1, 12)


def merged(found: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """One finding (6, 2) a person: the mean, weighted by score, of those that overlap with the best of them."""
    left = np.flatnonzero(scores > SURE)
    left = left[np.argsort(-scores[left])]
    people = []
    while len(left):
        same = _overlap(found[left, :4], found[left[0], :4]) >= SAME
        same[0] = True  # even a box without area is itself
        people.append(np.average(found[left[same]], 0, scores[left[same]]).reshape(6, 2))
        left = left[~same]
    return people


def around(hips: np.ndarray, rim: np.ndarray) -> Square:
    """The square around a person, turned so that they stand upright: from the circle around the hips through `rim`."""
    right, down = rim - hips
    return Square(hips[0], hips[1], 2 * MARGIN * np.hypot(right, down), np.arctan2(right, -down))


def openpose_joints(landmarks: np.ndarray, square: Square, size: tuple[int, int]) -> np.ndarray:
    """(18, 2) pixels of the picture from BlazePose's landmarks (39, 5), NaN where a joint is hidden or out of the picture.

    A landmark is x, y, z in pixels of the crop and the logits of being visible and of being there.
    """
    places = square.to_picture(landmarks[:, :2] / JOINTS_SIDE)
    seen = (_sigmoid(landmarks[:, 3:]) > SURE).all(1) & (places >= 0).all(1) & (places < size).all(1)
    places[~seen] = np.nan
    return np.stack([places[list(joint)].mean(0) for joint in JOINTS])


def draw(people: Sequence[np.ndarray], size: tuple[int, int]) -> Image.Image:
    """Skeletons as control networks for OpenPose know them, RGB; limbs are 8 pixels wide where the shorter side has 512."""
    import cv2

    canvas = np.zeros((size[1], size[0], 3), np.uint8)
    thick = max(1.0, min(size) / 128)
    for joints in people:
        for (one, other), colour in zip(LIMBS, COLOURS, strict=False):
            ends = joints[[one, other]]
            if np.isfinite(ends).all():
                right, down = ends[1] - ends[0]
                shape = (float(np.hypot(right, down)), 2 * thick)
                dim = [int(0.6 * c) for c in colour]
                cv2.ellipse(canvas, (ends.mean(0).tolist(), shape, np.degrees(np.arctan2(down, right))), dim, -1)
        for joint, colour in zip(joints, COLOURS, strict=True):
            if np.isfinite(joint).all():
                cv2.circle(canvas, joint.astype(int).tolist(), round(thick), colour, -1)
    return Image.fromarray(canvas)


def _overlap(boxes: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes (N, 4) with one."""
    low, high = np.maximum(boxes[:, :2], box[:2]), np.minimum(boxes[:, 2:], box[2:])
    common = (high - low).clip(0).prod(1)
    areas = (boxes[:, 2:] - boxes[:, :2]).clip(0).prod(1)
    return common / np.maximum(areas + (box[2:] - box[:2]).clip(0).prod() - common, 1e-12)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-logits.clip(-80, 80)))


def _input(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, np.float32)[None] / 255


def _files(model: Any, variant: str) -> tuple[Path, Path]:
    """The package's archive with the finder, and its network of joints."""
    folder = FOLDER if model is None else Path(model).expanduser()
    files = folder / "pose_solution_packed_assets.data", folder / f"pose_landmark_{variant}.tflite"
    for file in (*files, _listing(files[0])):
        if not file.is_file():
            raise FileNotFoundError(
                f"detector pose needs {file.name}: {folder.absolute()} has none; npm install @mediapipe/pose brings it"
            )
    return files


def _listing(archive: Path) -> Path:
    return archive.with_name(f"{archive.stem}_loader.js")


@lru_cache(maxsize=4)
def _network(file: Path) -> Callable[[np.ndarray], list[np.ndarray]]:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        raise ImportError(f"detector pose needs the package ai-edge-litert: {INSTALL}") from None
    try:
        interpreter = Interpreter(model_content=_unpacked(file) if file.suffix == ".data" else file.read_bytes())
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file} holds no network: {' '.join(str(error).split())[:200]}") from None

    def run(values: np.ndarray) -> list[np.ndarray]:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], values)
        interpreter.invoke()
        return [interpreter.get_tensor(output["index"]) for output in interpreter.get_output_details()]

    return run


def _unpacked(archive: Path) -> bytes:
    """The finder's network in the package's archive; the script beside it says which bytes are which file."""
    listing = re.search(r'\{"files".*\}', _listing(archive).read_text())
    entries = json.loads(listing[0])["files"] if listing else []
    for entry in entries:
        if entry["filename"].endswith("/pose_detection.tflite"):
            return archive.read_bytes()[entry["start"] : entry["end"]]
    raise ValueError(f"{_listing(archive).name} names no pose_detection.tflite")
