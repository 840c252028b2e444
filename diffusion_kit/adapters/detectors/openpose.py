"""Poses after Cao et al. (OpenPose, 2018, arXiv:1812.08008), by controlnet_aux.

These networks are licensed by CMU for non-commercial use only; detector `pose` draws the same skeletons without them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from diffusion_kit.adapters.detectors._networks import absence, annotator, fill, find, look

RESOLUTION, MULTIPLE = 512, 64
BODY, HANDS, FACE = "body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"
RESAMPLE = Image.Resampling.BILINEAR  # Lanczos would ring around the limbs


def detect(image: Image.Image, *, model: Any = None, hands: bool = False, face: bool = False) -> Image.Image:
    """Coloured skeletons on black, RGB, of the picture's size.

    Args:
        model: a folder with body_pose_model.safetensors (hand_pose_model.safetensors and facenet.safetensors for `hands`
            and `face`), the first of these files with the others beside it, or a hub id.
        hands: draw fingers.
        face: draw the outlines of the face.

    Raises:
        FileNotFoundError, ValueError: weights missing or unfit, in one line that says what to do.
        ImportError: controlnet_aux is not installed.
    """
    body = find("openpose", BODY, model)
    rest = body.parent if Path(str(model)).is_file() else model
    hand_file = find("openpose", HANDS, rest) if hands else None
    face_file = find("openpose", FACE, rest) if face else None
    return look(image, _build, body, hand_file, face_file, include_hand=hands, include_face=face)


def missing(model: Any = None) -> str | None:
    return absence("openpose", BODY, model)


def _build(body: Path, hand: Path | None, face: Path | None) -> Any:
    aux, nets = annotator("open_pose"), annotator("open_pose.model")
    return aux.OpenposeDetector(
        _estimator(aux.Body, fill(nets.bodypose_model, body)),
        hand and _estimator(aux.Hand, fill(nets.handpose_model, hand)),
        face and _estimator(aux.Face, fill(annotator("open_pose.face").FaceNet, face)),
    )


def _estimator(cls: Any, net: Any) -> Any:
    """One of OpenPose's estimators around its network: `cls(file)` would unpickle."""
    estimator = cls.__new__(cls)
    estimator.model = net
    return estimator
