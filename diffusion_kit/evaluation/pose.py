"""PCK, the share of correct keypoints (Yang and Ramanan, 2013, section 6), of drawn skeletons.

Joints are read from the drawing by their colours. A wanted joint is correct where a made one of its kind lies within 0.2
of the longer side of its person's box; a person is what hangs together in the drawing, or all of it where no joint is there
twice (one whose neck is not seen falls apart).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import center_of_mass, find_objects, label

from diffusion_kit.adapters.detectors.pose import COLOURS

ALPHA = 0.2
SAME = 25  # levels of 255 in each channel; joints' colours are 85 apart, limbs have 0.6 of them
AROUND = np.ones((3, 3), bool)  # diagonal neighbours hang together


def pck(made: np.ndarray, wanted: np.ndarray) -> float:
    """Of two drawings (H, W, 3) of bytes, in the colours that detectors `pose` and `openpose` draw with.

    Raises:
        ValueError: `wanted` shows no joint.
    """
    kinds = joints(wanted)
    drawn = wanted.any(2)
    people = drawn.astype(int) if all(len(own) < 2 for own in kinds) else label(drawn, AROUND)[0]
    sides = [0, *(max(part.stop - part.start for part in box) for box in find_objects(people))]
    there, right = 0, 0
    for ours, theirs in zip(joints(made), kinds, strict=True):
        for joint in theirs:
            person = people[tuple(joint.round().astype(int))]
            reach = ALPHA * sides[person]
            there += 1
            right += bool((np.hypot(*(ours - joint).T) <= reach).any())
    if not there:
        raise ValueError("a pose shows no joint: it must be a skeleton in OpenPose's colours, on black")
    return right / there


def joints(drawing: np.ndarray) -> list[np.ndarray]:
    """Rows and columns (N, 2) of the joints of each of the 18 kinds."""
    found = []
    for colour in COLOURS:
        spots, count = label((np.abs(drawing.astype(int) - colour) <= SAME).all(2), AROUND)
        found.append(np.array(center_of_mass(spots > 0, spots, range(1, count + 1))).reshape(-1, 2))
    return found
