"""Detectors with networks, on random weights: against controlnet_aux's own classes, and what they say of unfit weights."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import transformers
from conftest import needs, picture, randomise
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.modeling_outputs import DepthEstimatorOutput

from diffusion_kit.adapters.detectors import _networks, depth, detect, missing, normal, openpose, pose

needs("controlnet_aux")
NPM = Path("node_modules/@mediapipe/pose")
ODD_SIZES = [(70, 53), (1, 400), (200, 37)]
Tensors = dict[str, torch.Tensor]


def aux(package: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _networks.annotator(package)


def anime() -> torch.nn.Module:
    norm = partial(torch.nn.InstanceNorm2d, affine=False, track_running_stats=False)
    return aux("lineart_anime").UnetGenerator(3, 1, 8, 64, norm_layer=norm)


def parallel(tensors: Tensors) -> Tensors:
    return {f"module.{key}": value for key, value in tensors.items()}


def shortened(tensors: Tensors) -> Tensors:
    return {key.partition(".")[2]: value for key, value in tensors.items()}


# the published pickles: their networks, and how they have the tensors
PICKLES: dict[str, tuple[Callable[[], torch.nn.Module], Callable[[Tensors], dict[str, Any]]]] = {
    "ControlNetHED.pth": (lambda: aux("hed").ControlNetHED_Apache2(), dict),
    "table5_pidinet.pth": (lambda: aux("pidi").pidinet(), lambda tensors: {"state_dict": parallel(tensors)}),
    "mlsd_large_512_fp32.pth": (lambda: aux("mlsd").MobileV2_MLSD_Large(), dict),
    "scannet.pt": (lambda: aux("normalbae").NNET(normal.SETTINGS), lambda tensors: {"model": parallel(tensors)}),
    "netG.pth": (anime, parallel),
    "sk_model.pth": (lambda: aux("lineart").Generator(3, 1, 3), dict),
    "sk_model2.pth": (lambda: aux("lineart").Generator(3, 1, 3), dict),
    "body_pose_model.pth": (lambda: aux("open_pose.model").bodypose_model(), shortened),
    "hand_pose_model.pth": (lambda: aux("open_pose.model").handpose_model(), shortened),
    "facenet.pth": (lambda: aux("open_pose.face").FaceNet(), dict),
}
PEERS = {
    "hed": ("hed", "HEDdetector", ["ControlNetHED.pth"]),
    "pidinet": ("pidi", "PidiNetDetector", ["table5_pidinet.pth"]),
    "mlsd": ("mlsd", "MLSDdetector", ["mlsd_large_512_fp32.pth"]),
    "normal": ("normalbae", "NormalBaeDetector", ["scannet.pt"]),
    "lineart_anime": ("lineart_anime", "LineartAnimeDetector", ["netG.pth"]),
    "learned_lineart": ("lineart", "LineartDetector", ["sk_model.pth", "sk_model2.pth"]),
    "openpose": ("open_pose", "OpenposeDetector", ["body_pose_model.pth", "hand_pose_model.pth", "facenet.pth"]),
}
DETECTORS = [name for name in PEERS if name != "learned_lineart"]


def pickled(file: str) -> dict[str, Any]:
    """Random weights in the form of a published pickle; half precision, for the sake of the disk."""
    build, form = PICKLES[file]
    net = build()
    torch.manual_seed(len(file))
    for parameter in net.parameters():
        if (
            parameter.ndim > 1
        ):  # so that signals neither die nor grow: then there are edges, lines and bodies to be found
            parameter.data = torch.randn(parameter.shape) * (2 / parameter[0].numel()) ** 0.5
    state = net.state_dict().items()
    return form({key: value.half() if value.is_floating_point() else value.clone() for key, value in state})


def safe(file: str) -> str:
    return Path(file).with_suffix(".safetensors").name


@pytest.fixture(scope="module", params=PEERS)
def learned(request: Any) -> Iterator[tuple[str, Path, Any]]:
    """A detector's name, the folder of its weights, and the peer's detector as made from the pickles of the same."""
    package, cls, files = PEERS[request.param]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        pickles = {file: pickled(file) for file in files}
        for file, pickle in pickles.items():
            save_file(pickle.get("state_dict", pickle.get("model", pickle)), Path(folder) / safe(file))
        patch.setattr(torch, "load", lambda file, **_: pickles[Path(file).name])
        peer = getattr(aux(package), cls).from_pretrained(folder)
        pickles.clear()
        yield request.param, Path(folder), peer
    _networks._built.cache_clear()


def run(name: str, photo: Image.Image, model: Any) -> Image.Image:
    if name == "learned_lineart":
        return _networks.learned_lineart(photo, model)
    return detect(name, photo, model=model, detect_resolution=min(photo.size))


def one_line(error: Any) -> str:
    text = str(error.value)
    assert text
    assert "\n" not in text
    assert len(text) < 500
    return text


def test_draws_what_controlnet_aux_draws(learned: Any, capsys: Any) -> None:
    name, folder, peer = learned
    photo = picture(4, 192).resize((128, 192))
    drawn = np.asarray(run(name, photo, folder))
    assert capsys.readouterr().out == ""
    assert np.array_equal(drawn, np.asarray(peer(photo, detect_resolution=128, image_resolution=128)))
    assert len(np.unique(drawn)) > 1


def test_result_has_the_photos_size(learned: Any) -> None:
    name, folder, _ = learned
    for size in ODD_SIZES:
        drawn = run(name, picture(0, 64).resize(size), folder)
        assert (drawn.size, drawn.mode) == (size, "RGB")


def test_a_file_is_as_good_as_its_folder_and_built_once(learned: Any) -> None:
    name, folder, _ = learned
    photo, file = picture(4), folder / safe(PEERS[name][2][0])
    assert run(name, photo, folder).tobytes() == run(name, photo, file).tobytes()
    built = _networks._built.cache_info().misses
    run(name, photo, str(folder))
    assert _networks._built.cache_info().misses == built
    if name in DETECTORS:
        assert missing(name, folder) is None
        assert missing(name, file) is None


@pytest.mark.parametrize("learned", ["learned_lineart"], indirect=True)
def test_coarse_lineart_has_its_own_network(learned: Any) -> None:
    _, folder, peer = learned
    coarse = np.asarray(_networks.learned_lineart(picture(), folder, coarse=True))
    sizes = dict(detect_resolution=64, image_resolution=64)
    assert np.array_equal(coarse, np.asarray(peer(picture(), coarse=True, **sizes)))
    assert not np.array_equal(coarse, np.asarray(peer(picture(), **sizes)))


@pytest.mark.parametrize("learned", ["pidinet"], indirect=True)
def test_sketch_is_pidinets_edges_above_one_half(learned: Any) -> None:
    _, folder, peer = learned
    sketch = np.asarray(_networks.learned_sketch(picture(), folder))
    edges = np.asarray(detect("pidinet", picture(), model=folder, detect_resolution=64))
    assert np.array_equal(np.unique(sketch), [0, 255])
    assert ((sketch == 255) == (edges > 127)).mean() > 0.99  # a value of 127.6 is above one half and rounded down


@pytest.mark.parametrize("learned", ["mlsd"], indirect=True)
def test_mlsd_has_two_thresholds(learned: Any) -> None:
    _, folder, peer = learned
    drawn = {}
    for options in ({}, {"thr_v": 0.6}, {"thr_d": 8.0}):
        ours = np.asarray(detect("mlsd", picture(4), model=folder, detect_resolution=64, **options))
        assert np.array_equal(ours, np.asarray(peer(picture(4), detect_resolution=64, image_resolution=64, **options)))
        drawn[str(options)] = ours.sum()
    assert len(set(drawn.values())) == 3


@pytest.mark.parametrize("learned", ["openpose"], indirect=True)
def test_openpose_draws_hands_and_faces_when_asked(learned: Any, monkeypatch: Any) -> None:
    _, folder, peer = learned
    photo, sizes = picture(4, 128), dict(detect_resolution=128)
    # the networks themselves take seconds for each hand: they are compared below, on a small picture
    places = np.random.default_rng(0).integers(1, 60, (70, 2))
    monkeypatch.setattr(aux("open_pose.util"), "handDetect", lambda body, photo: [(20, 30, 60, True)])
    monkeypatch.setattr(aux("open_pose.util"), "faceDetect", lambda body, photo: (40, 10, 60))
    monkeypatch.setattr(aux("open_pose").Hand, "__call__", lambda self, crop: places[:21])
    monkeypatch.setattr(aux("open_pose").Face, "__call__", lambda self, crop: crop)
    monkeypatch.setattr(aux("open_pose").Face, "compute_peaks_from_heatmaps", lambda self, maps: places)
    drawn = {}
    for asked in ({"hands": True}, {"hands": True, "face": True}):
        drawn[len(asked)] = detect("openpose", photo, model=folder, **asked, **sizes).tobytes()
        include = {"include_hand": "hands" in asked, "include_face": "face" in asked}
        assert drawn[len(asked)] == peer(photo, **include, **sizes, image_resolution=128).tobytes()
    assert drawn[1] != drawn[2]
    ours = _networks._built(openpose._build, *(folder / safe(file) for file in PEERS["openpose"][2]))
    crop = torch.rand(1, 3, 48, 48)
    for part in ("hand_estimation", "face_estimation"):
        one, other = (np.ravel(getattr(d, part).model(crop)[-1]) for d in (ours, peer))
        assert np.array_equal(one, other)
        assert one.std() > 0


@pytest.mark.parametrize("name", DETECTORS)
def test_missing_weights_are_one_line_that_says_what_to_do(name: str, tmp_path: Path) -> None:
    published = PEERS[name][2][0]

    def error(kind: type[Exception], model: Any) -> str:
        with pytest.raises(kind) as found:
            detect(name, picture(), model=model)
        return one_line(found)

    assert f"detector {name} needs {safe(published)}: {tmp_path} has none" == error(FileNotFoundError, tmp_path)
    assert missing(name, tmp_path) == error(FileNotFoundError, tmp_path)
    recipe = error(FileNotFoundError, None)
    assert recipe == missing(name) == error(FileNotFoundError, "lllyasviel/Annotators")
    assert f"hf download lllyasviel/Annotators {published} --local-dir detectors" in recipe
    assert f"diffusion-kit models --convert detectors/{published}" in recipe
    assert "owner/name" in error(FileNotFoundError, "owner/name")
    assert "owner/name" in str(missing(name, "owner/name"))
    assert "nowhere" in error(FileNotFoundError, tmp_path / "nowhere")

    (tmp_path / published).write_bytes(b"pickle")
    assert f"--convert {tmp_path / published}" in error(ValueError, tmp_path)
    assert missing(name, tmp_path) == error(ValueError, tmp_path)
    assert "pickle" in error(ValueError, tmp_path / published)

    file = tmp_path / safe(published)
    save_file({"foreign": torch.ones(1000)}, file)
    assert str(file) in error(ValueError, tmp_path)
    file.write_bytes(file.read_bytes()[:900])
    assert f"{file} is no whole safetensors file" in error(ValueError, tmp_path)
    file.write_bytes(b"")
    assert str(file) in error(ValueError, tmp_path)


def test_hands_want_their_own_file(tmp_path: Path) -> None:
    for file in ("body_pose_model.safetensors", "facenet.safetensors"):
        save_file({"foreign": torch.ones(1)}, tmp_path / file)
    for model in (tmp_path, tmp_path / "body_pose_model.safetensors"):
        with pytest.raises(FileNotFoundError, match=r"needs hand_pose_model.safetensors: .* has none"):
            detect("openpose", picture(), model=model, hands=True, face=True)


@pytest.mark.parametrize(("name", "package"), [("hed", "controlnet_aux"), ("pose", "ai_edge_litert")])
def test_a_missing_package_is_one_line_that_says_what_to_install(
    name: str, package: str, tmp_path: Path, monkeypatch: Any
) -> None:
    for module in [module for module in sys.modules if module.startswith(package)]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    for file in ("ControlNetHED.safetensors", *(file.name for file in fake_npm(tmp_path))):
        (tmp_path / file).touch()
    with pytest.raises(ImportError) as found:
        detect(name, picture(), model=tmp_path)
    assert "pip install 'diffusion_kit[detectors]'" in one_line(found)
    assert "pip install 'diffusion_kit[detectors]'" in str(missing(name, tmp_path))


# depth


SMALL = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2)
STAGES = dict(out_features=["stage1", "stage2", "stage3", "stage4"], reshape_hidden_states=False)
NECK = dict(neck_hidden_sizes=[4, 4, 8, 8], fusion_hidden_size=8)


def depth_anything(kind: str = "relative") -> tuple[Any, Any]:
    backbone = transformers.Dinov2Config(**SMALL, **STAGES, image_size=28, patch_size=14)
    config = transformers.DepthAnythingConfig(
        backbone_config=backbone, reassemble_hidden_size=16, head_hidden_size=4, depth_estimation_type=kind, **NECK
    )
    processor = transformers.DPTImageProcessor(
        size={"height": 56, "width": 56}, keep_aspect_ratio=True, ensure_multiple_of=14
    )
    return transformers.DepthAnythingForDepthEstimation(config), processor


def dpt() -> tuple[Any, Any]:
    config = transformers.DPTConfig(
        **SMALL, **NECK, intermediate_size=16, image_size=32, backbone_out_indices=[0, 1, 2, 3]
    )
    return transformers.DPTForDepthEstimation(config), transformers.DPTImageProcessor(size={"height": 64, "width": 64})


def glpn() -> tuple[Any, Any]:
    config = transformers.GLPNConfig(
        hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 2], decoder_hidden_size=8
    )
    return transformers.GLPNForDepthEstimation(config), transformers.GLPNImageProcessor()


def zoe() -> tuple[Any, Any]:
    backbone = transformers.BeitConfig(**SMALL, **STAGES, intermediate_size=16, image_size=32)
    config = transformers.ZoeDepthConfig(
        backbone_config=backbone,
        backbone_hidden_size=16,
        bottleneck_features=8,
        num_relative_features=8,
        bin_embedding_dim=8,
        num_attractors=[4, 2, 2, 1],
        bin_configurations=[{"n_bins": 8, "min_depth": 0.001, "max_depth": 10.0}],
        **NECK,
    )
    processor = transformers.ZoeDepthImageProcessor(size={"height": 64, "width": 64}, ensure_multiple_of=32)
    return transformers.ZoeDepthForDepthEstimation(config), processor


DEPTHS: dict[str, tuple[Callable[[], tuple[Any, Any]], bool]] = {  # and whether large is near
    "relative": (depth_anything, True),
    "dpt": (dpt, True),
    "metric": (partial(depth_anything, "metric"), False),
    "glpn": (glpn, False),
    "zoe": (zoe, False),
}


@pytest.fixture(scope="module")
def depths(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("depth")
    for name, (build, _) in DEPTHS.items():
        torch.manual_seed(0)
        net, processor = build()
        randomise(net, 0).save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize("name", DEPTHS)
def test_depth_has_sixteen_bits_and_the_photos_size(name: str, depths: Path) -> None:
    drawn = detect("depth", picture(2, 128), model=depths / name, detect_resolution=128)
    values = np.asarray(drawn)
    assert drawn.mode.startswith("I;16")
    assert (values.min(), values.max()) == (0, 65535)
    assert len(np.unique(values)) > 2048
    for size in ODD_SIZES:
        assert detect("depth", picture(2).resize(size), model=depths / name).size == size
    assert missing("depth", depths / name) is None


@pytest.mark.parametrize("name", DEPTHS)
def test_near_is_white(name: str, depths: Path, monkeypatch: Any) -> None:
    processor, net = depth._network(depths / name)
    ramp = torch.linspace(1, 9, 64).expand(1, 64, 64)  # larger to the right
    monkeypatch.setattr(net, "forward", lambda **_: DepthEstimatorOutput(predicted_depth=ramp))
    row = np.asarray(detect("depth", picture(), model=depths / name, detect_resolution=64)).astype(int)[32]
    near = row if DEPTHS[name][1] else row[::-1]
    assert (np.diff(near) >= 0).all()
    assert near[-1] - near[0] > 60000
    ramp = torch.ones(1, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = detect("depth", picture(), model=depths / name, detect_resolution=64)
    assert np.asarray(flat).max() == 0


def test_one_far_sky_leaves_greys_to_the_rest(depths: Path, monkeypatch: Any) -> None:
    _, net = depth._network(depths / "zoe")
    scene = torch.linspace(1, 3, 64).repeat(64, 1)[None]
    scene[:, :14] = 10000  # much of which is in the margin that ZoeDepth adds
    monkeypatch.setattr(net, "forward", lambda **_: DepthEstimatorOutput(predicted_depth=scene))
    row = np.asarray(detect("depth", picture(), model=depths / "zoe", detect_resolution=64))[40].astype(int)
    assert row[4] - row[-12] > 40000


def test_depth_is_transformers_own(depths: Path) -> None:
    photo = picture(2, 128)
    net, processor = (
        cls.from_pretrained(depths / "dpt")
        for cls in (transformers.DPTForDepthEstimation, transformers.DPTImageProcessor)
    )
    outputs = net(**processor(images=photo, return_tensors="pt"))
    theirs = processor.post_process_depth_estimation(outputs, [(128, 128)])[0]["predicted_depth"].numpy()
    ours = np.asarray(detect("depth", photo, model=depths / "dpt", detect_resolution=128)) / 65535
    assert np.abs(ours - (theirs - theirs.min()) / np.ptp(theirs)).max() < 1e-4


def test_unfit_depth_models_are_one_line(depths: Path, tmp_path: Path) -> None:
    def error(change: Callable[[Path], Any], seen_beforehand: bool) -> str:
        folder = tmp_path / change.__name__
        shutil.copytree(depths / "relative", folder)
        change(folder)
        with pytest.raises((FileNotFoundError, ValueError)) as found:
            detect("depth", picture(), model=folder)
        assert str(folder) in one_line(found)
        assert missing("depth", folder) == (str(found.value) if seen_beforehand else None)
        return str(found.value)

    def no_config(folder: Path) -> None:
        (folder / "config.json").unlink()

    def no_processor(folder: Path) -> None:
        (folder / "preprocessor_config.json").unlink()

    def no_weights(folder: Path) -> None:
        (folder / "model.safetensors").unlink()

    def pickle(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")

    def other_kind(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps({"model_type": "bert"}))

    def cut_short(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])

    def foreign(folder: Path) -> None:
        save_file({"foreign": torch.ones(3)}, folder / "model.safetensors")

    def other_shape(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors["head.conv1.weight"] = tensors["head.conv1.weight"][:, :1].clone()
        save_file(tensors, folder / "model.safetensors")

    def odd_processor(folder: Path) -> None:
        (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "Foreign"}))

    assert "config.json" in error(no_config, True)
    assert "preprocessor_config.json" in error(no_processor, True)
    assert "model.safetensors" in error(no_weights, True)
    assert "pytorch_model.bin, a pickle" in error(pickle, True)
    assert "'bert'" in error(other_kind, True)
    for change in (cut_short, foreign, other_shape, odd_processor):
        error(change, False)


def test_depth_runs_no_foreign_code_and_goes_without_what_is_never_used(depths: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(depths / "relative", folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "code.Config", "AutoModelForDepthEstimation": "code.Net"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('foreign code was run')")
    tensors = load_file(folder / "model.safetensors")
    unused = [key for key in tensors if "fusion_stage.layers.0.residual_layer1" in key]
    assert unused
    save_file({key: value for key, value in tensors.items() if key not in unused}, folder / "model.safetensors")
    drawn = detect("depth", picture(), model=folder, detect_resolution=64)
    assert drawn.tobytes() == detect("depth", picture(), model=depths / "relative", detect_resolution=64).tobytes()


@pytest.mark.parametrize("model", [None, "midas", "zoe", "dpt", "depth_anything", "owner/name"])
def test_depth_without_the_hub_is_one_line(model: str | None) -> None:
    repository = depth.MODELS.get(model or "depth_anything", model)
    with pytest.raises(FileNotFoundError, match=str(repository)) as found:
        detect("depth", picture(), model=model)
    one_line(found)
    assert str(repository) in str(missing("depth", model))


# pose


def fake_npm(folder: Path) -> list[Path]:
    listing = {"files": [{"filename": "/modules/pose_detection.tflite", "start": 3, "end": 9}], "size": 12}
    (folder / "pose_solution_packed_assets_loader.js").write_text(f"load({json.dumps(listing)});\n")
    (folder / "pose_solution_packed_assets.data").write_bytes(b"abcdefghijkl")
    (folder / "pose_landmark_lite.tflite").write_bytes(b"no network")
    return list(folder.iterdir())


def random_squares(count: int = 20) -> list[pose.Square]:
    random = np.random.default_rng(0)
    return [
        pose.Square(*random.uniform(20, 180, 2), random.uniform(30, 900), random.uniform(-7, 7)) for _ in range(count)
    ]


def test_anchors_tile_the_picture() -> None:
    centres = pose.anchors()
    assert centres.shape == (2254, 2)
    places, counts = np.unique(centres.round(9), axis=0, return_counts=True)
    assert dict(zip(*np.unique(counts, return_counts=True), strict=True)) == {2: 28**2 + 14**2, 6: 7**2}
    assert np.allclose(np.sort(centres, 0), np.sort(1 - centres, 0))
    assert np.allclose(centres[:3], [(0.5 / 28,) * 2] * 2 + [(1.5 / 28, 0.5 / 28)])  # rows of the picture, from its top


def test_places_into_a_square_and_back_are_the_same() -> None:
    points = np.random.default_rng(1).uniform(-300, 300, (50, 2))
    for square in random_squares():
        assert np.allclose(square.to_picture(square.from_picture(points)), points)
        lengths = np.linalg.norm(np.diff(square.from_picture(points), axis=0), axis=1) * square.side
        assert np.allclose(lengths, np.linalg.norm(np.diff(points, axis=0), axis=1))


@pytest.mark.parametrize("side", [64, 256])
def test_a_crop_shows_things_where_the_square_says(side: int) -> None:
    for square in random_squares():
        canvas = np.zeros((200, 260, 3), np.uint8)
        canvas[60:70, 100:110] = 255
        crop = np.asarray(square.crop(Image.fromarray(canvas), side)).mean(2)
        there = square.from_picture(np.array([105.0, 65.0])) * side
        margin = 8 * side / square.side
        if (there < margin).any() or (there > side - margin).any():
            continue
        y, x = np.mgrid[:side, :side] + 0.5
        seen = np.array([(crop * x).sum(), (crop * y).sum()]) / crop.sum()
        assert np.abs(seen - there).max() < 0.1 + 0.5 * side / square.side


def test_a_person_stands_upright_in_their_square() -> None:
    random = np.random.default_rng(2)
    for _ in range(20):
        hips, rim = random.uniform(0, 500, (2, 2))
        square = pose.around(hips, rim)
        assert np.allclose(square.from_picture(np.stack([hips, rim])), [(0.5, 0.5), (0.5, 0.1)])


def test_findings_of_one_person_are_merged_by_score() -> None:
    person = np.array([0.1, 0.1, 0.3, 0.3, *np.linspace(0, 1, 8)])
    other = person + 0.4
    found = np.stack([person, other, person + 0.02, person + 5])
    merged = pose.merged(found, np.array([0.9, 0.95, 0.6, 0.4]))
    assert len(merged) == 2  # the last one is not sure enough
    assert np.allclose(merged[0].ravel(), other)
    assert np.allclose(merged[1].ravel(), (0.9 * person + 0.6 * (person + 0.02)) / 1.5)


def landmarks(places: np.ndarray) -> np.ndarray:
    """(39, 5) of the network of joints, all of them seen, from places in the unit square."""
    return np.concatenate([places * 256, np.zeros((39, 1)), np.full((39, 2), 5.0)], 1)


def test_joints_are_those_of_openpose() -> None:
    places = np.random.default_rng(3).uniform(0.1, 0.9, (39, 2))
    square = pose.Square(100, 100, 150, 0.7)
    values = landmarks(places)
    joints = pose.openpose_joints(values, square, (200, 200))
    picture_places = square.to_picture(places)
    inside = ((picture_places > 0) & (picture_places < 200)).all(1)
    assert np.allclose(joints[[0, 2, 14, 17]], picture_places[[0, 12, 5, 7]], equal_nan=True)
    assert inside[[0, 5, 7, 11, 12]].all()
    assert np.allclose(joints[1], picture_places[[11, 12]].mean(0))
    for hidden, column in ((12, 3), (12, 4)):
        changed = values.copy()
        changed[hidden, column] = -5
        assert np.isnan(pose.openpose_joints(changed, square, (200, 200))[[1, 2]]).all()
    assert np.isnan(pose.openpose_joints(values, square._replace(x=5000), (200, 200))).all()


def test_skeletons_are_drawn_as_openpose_draws_them() -> None:
    util = aux("open_pose.util")
    random = np.random.default_rng(4)
    for _ in range(5):
        joints = random.uniform(150, 300, (18, 2))
        joints[random.integers(18)] = np.nan
        drawn = np.asarray(pose.draw([joints], (512, 512)))
        points = [None if np.isnan(x) else util.Keypoint(x / 512, y / 512) for x, y in joints]
        theirs = util.draw_bodypose(np.zeros((512, 512, 3), np.uint8), points)
        around = np.ones((3, 3))  # they cut places and angles to whole numbers
        for one, other in ((drawn, theirs), (theirs, drawn)):
            assert (one > cv2.dilate(other, around)).sum() < 0.01 * (other > 0).sum()
        assert np.isclose((drawn > 0).sum(), (theirs > 0).sum(), rtol=0.03)
        x, y = joints[np.isfinite(joints).all(1)].astype(int).T
        assert np.array_equal(drawn[y, x], theirs[y, x])


@pytest.fixture
def people(monkeypatch: Any) -> Callable[[np.ndarray, tuple[int, int]], None]:
    """Networks that find people with the hips and rims (N, 2, 2), in pixels of a picture of a size."""

    def install(places: np.ndarray, size: tuple[int, int], certainty: float = 1.0) -> None:
        raw, scores = np.zeros((1, 2254, 12), np.float32), np.full((1, 2254, 1), -9.0)
        whole = pose.Square(size[0] / 2, size[1] / 2, max(size))
        for person, pair in enumerate(places):
            cell = 600 * person + 17
            raw[0, cell, 2:4] = 10
            raw[0, cell, 4:8] = ((whole.from_picture(pair) - pose.anchors()[cell]) * 224).ravel()
            scores[0, cell] = 3 - person
        upright = np.tile([0.5, 0.3], (39, 1))  # half the way from the hips to the rim

        def finder(values: np.ndarray) -> list[np.ndarray]:
            assert values.shape == (1, 224, 224, 3)
            assert (values.min(), values.max()) == (-1, 1)  # a white picture, and black where the square leaves it
            return [raw, scores]

        def joints(values: np.ndarray) -> list[np.ndarray]:
            assert values.shape == (1, 256, 256, 3)
            assert (values.min(), values.max()) == (0, 1)
            return [landmarks(upright).reshape(1, -1), np.full((1, 1), certainty)]

        monkeypatch.setattr(pose, "_network", lambda file: finder if file.suffix == ".data" else joints)

    return install


@pytest.mark.parametrize("size", [(300, 200), (200, 300)])
def test_everybody_is_found_where_they_stand(size: tuple[int, int], people: Any, tmp_path: Path) -> None:
    fake_npm(tmp_path)
    hips = np.array([[50.0, 150], [150, 60], [100, 100]])
    rims = hips + [[0, -60], [60, 0], [-70, 70]]
    people(np.stack([hips, rims], 1), size)
    found = pose.find_people(Image.new("RGB", size, "white"), pose._files(tmp_path, "lite"))
    for joints, hip, rim in zip(found, hips, rims, strict=True):
        assert np.allclose(joints, hip + (rim - hip) / 2, atol=1e-3)
    drawn = detect("pose", Image.new("RGB", size, "white"), model=tmp_path)
    assert (drawn.size, drawn.mode) == (size, "RGB")
    assert all(drawn.getpixel(tuple(joints[0].astype(int).tolist())) != (0, 0, 0) for joints in found)


def test_nobody_is_a_black_picture_and_a_warning(people: Any, tmp_path: Path) -> None:
    fake_npm(tmp_path)
    somebody = np.array([[[30.0, 40], [30, 10]]])
    for places, certainty in ((somebody[:0], 1.0), (somebody, 0.1)):
        people(places, (70, 53), certainty)
        with pytest.warns(UserWarning, match="found nobody"):
            drawn = detect("pose", Image.new("RGB", (70, 53), "white"), model=tmp_path)
        assert drawn.size == (70, 53)
        assert np.asarray(drawn).max() == 0


def test_unfit_pose_packages_are_one_line(tmp_path: Path, monkeypatch: Any) -> None:
    needs("ai_edge_litert")
    monkeypatch.chdir(tmp_path)
    for model in (None, tmp_path):
        with pytest.raises(FileNotFoundError, match="npm install @mediapipe/pose") as found:
            detect("pose", picture(), model=model)
        assert one_line(found) == missing("pose", model)
    fake_npm(tmp_path)
    assert missing("pose", tmp_path) is None
    assert pose._unpacked(tmp_path / "pose_solution_packed_assets.data") == b"defghi"
    with pytest.raises(ValueError, match="holds no network") as broken:
        detect("pose", picture(), model=tmp_path)
    one_line(broken)
    with pytest.raises(ValueError, match="lite, full, heavy"):
        detect("pose", picture(), model=tmp_path, variant="huge")


@pytest.mark.skipif(not NPM.is_dir(), reason="needs npm install @mediapipe/pose; scripts/verify detectors brings it")
@pytest.mark.parametrize("variant", pose.VARIANTS)
def test_pose_of_a_photo(variant: str) -> None:
    needs("ai_edge_litert")
    data = pytest.importorskip("skimage.data")
    photo = Image.fromarray(data.astronaut())
    for image, scale in ((photo, 1), (photo.resize((1024, 1024)), 2), (photo.rotate(-90), 1)):
        (joints,) = pose.find_people(image, pose._files(NPM, variant))
        if image.tobytes() == photo.rotate(-90).tobytes():
            joints = np.stack([joints[:, 1], 512 - joints[:, 0]], 1)
        for joint, place in ((0, (223, 125)), (2, (112, 218)), (5, (303, 246)), (14, (203, 101)), (15, (246, 107))):
            assert np.abs(joints[joint] / scale - place).max() < 25
