"""`weights export`: names in other programs' layouts, what comes back of a file, a ControlNet as a change of its base."""

from __future__ import annotations

import copy
import math
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from conftest import distance, make_adapter, make_controlnet, make_sd_unet, make_unet, randomise, seeds
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_kit.adapters.control import load_control_model
from diffusion_kit.adapters.control_lora import ControlLoRA
from diffusion_kit.cli import main
from diffusion_kit.models.formats import identify
from diffusion_kit.training import export

FOLDER = Path(__file__).parent / "formats"
sys.path.insert(0, str(FOLDER.parents[1] / "scripts"))
import make_format_lists as lists  # noqa: E402

HINT = {"conditioning_embedding_out_channels": (8, 8, 16, 16)}
# What shapes do not tell is as published models have it: 32 groups, heads of 64 (with linear projections) or 8 of them.
WIDE: dict[str, Any] = {"block_out_channels": (64, 128, 128), "norm_num_groups": 32}
XL = {"attention_head_dim": (1, 2, 2), "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 1568}
PLAIN = {"addition_embed_type": None, "projection_class_embeddings_input_dim": None}
BASES: dict[str, Any] = {
    "sd1": lambda: make_sd_unet(**WIDE, attention_head_dim=8),
    "sd2": lambda: make_unet(**WIDE, attention_head_dim=(1, 2, 2), **PLAIN),
    "sdxl": lambda: make_unet(**WIDE, **XL),
}
NARROW: dict[str, Any] = {"block_out_channels": (16, 32, 32)}
SMALL: dict[str, Any] = {"small sd1": lambda: make_sd_unet(**NARROW), "small sdxl": lambda: make_unet(**NARROW)}


@cache
def base(name: str) -> Any:
    return (BASES | SMALL)[name]()


@cache
def controlnet(name: str) -> Any:
    return randomise(diffusers.ControlNetModel.from_unet(base(name), **HINT), 8)


@cache
def sources() -> dict[str, tuple[Any, str]]:
    """Networks and the layout that holds them."""
    adapters = {
        "full": make_adapter(kind="full_adapter"),
        "light": make_adapter(kind="light_adapter", channels=(32, 64, 64)),
        "full_many": randomise(diffusers.T2IAdapter(1, [32, 64, 64, 96], 3, 8, "full_adapter"), 3),
        "xl": randomise(diffusers.T2IAdapter(3, [32, 64, 64, 64], 2, 16, "full_adapter_xl"), 3),
    }
    return {name: (net, "tencentarc") for name, net in adapters.items()} | {
        name: (controlnet(name), "controlnet") for name in BASES
    }


def exported(tmp_path: Path, net: Any, layout: str, *more: Any) -> Path:
    """The file that the command writes for a network, in a folder of its own."""
    net.save_pretrained(tmp_path / "source")
    (tmp_path / "out").mkdir(exist_ok=True)
    file = tmp_path / "out" / "net.safetensors"
    words = ["weights", "export", tmp_path / "source", "--layout", layout, "--out", file, "--overwrite", *more]
    assert main([str(word) for word in words]) == 0
    return file


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether the names are the same and the tensors bit for bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


# Names


def listed(name: str) -> tuple[dict[str, tuple[int, ...]], int]:
    """Shapes by name of a list, and the number of tensors of the whole of which it is a part."""
    head, *lines = (FOLDER / f"{name}.txt").read_text().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines)
    shapes = {key: () if text == "scalar" else tuple(map(int, text.split("x"))) for key, text in pairs}
    return shapes, int(head.split()[3])


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in tensors.items()}


ADAPTERS: dict[str, dict[str, Any]] = {
    "sd1_full": {"adapter_type": "full_adapter"},
    "sd1_light": {"adapter_type": "light_adapter", "num_res_blocks": 4, "channels": (320, 640, 1280)},
    "sd1_grey": {"adapter_type": "full_adapter", "in_channels": 1},
    "sdxl_full": {"adapter_type": "full_adapter_xl", "downscale_factor": 16},
}
FULL_SIZE = {f"t2i_adapter_{key}_tencent": (diffusers.T2IAdapter, config) for key, config in ADAPTERS.items()} | {
    f"controlnet_{key}_original": (diffusers.ControlNetModel, config)
    for key, config in (("sd1", lists.SD1), ("sd2", lists.SD2), ("sdxl", lists.XL))
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_names_and_shapes_at_full_size_are_those_of_the_lists(name: str) -> None:
    cls, config = FULL_SIZE[name]
    with torch.device("meta"):
        net = cls(**config)
    write = export.tencentarc if cls is diffusers.T2IAdapter else export.controlnet
    shapes, (kept, number) = shapes_of(write(net)), listed(name)
    assert {key: shape for key, shape in shapes.items() if not lists.REPEATED.search(key)} == kept
    assert len(shapes) == number
    assert not export.guesses(net, "tencentarc" if cls is diffusers.T2IAdapter else "controlnet")
    whole = (
        lists.tencent(lists.shapes_of(cls, **config), net.config.num_res_blocks)
        if cls is diffusers.T2IAdapter
        else lists.renamed(lists.shapes_of(cls, **config), "control_model.")
    )
    assert shapes == whole


def stability(shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, tuple[int, ...]]:
    """A Control-LoRA's names and shapes, of those of a ControlNet in diffusers' layout."""
    renamed = lists.renamed(shapes)
    own = {name: shape for name, shape in renamed.items() if re.match("zero_convs|middle_block_out|input_hint", name)}
    pairs = lists.low_rank({name: shape for name, shape in renamed.items() if name not in own}, "control", rank)
    return pairs | own | {"lora_controlnet": (0,)}


@pytest.mark.parametrize("key", ["sd1", "sdxl"])
def test_a_control_lora_at_full_size_has_the_names_of_its_list(key: str) -> None:
    """But for the marker, which is empty in Stability's files, and the last convolution, which no base has."""
    config = {"sd1": lists.SD1, "sdxl": lists.XL}[key]
    whole = stability(lists.shapes_of(diffusers.ControlNetModel, **config), 16)
    lora = ControlLoRA({name: torch.empty(shape, device="meta") for name, shape in whole.items()})
    shapes, (kept, _) = shapes_of(export.control_lora(lora)), listed(f"control_lora_{key}")
    assert shapes == whole
    apart = re.compile(f"lora_controlnet|middle_block_out|{lists.REPEATED.pattern}")
    ours, theirs = ({n: s for n, s in some.items() if not apart.search(n)} for some in (shapes, kept))
    assert ours == theirs


@pytest.mark.parametrize("name", SMALL)
def test_a_controlnet_becomes_a_control_lora_of_those_names(name: str) -> None:
    tensors, _ = export.control_lora_of(controlnet(name), export.original(encoder(name)), 4)
    assert shapes_of(tensors) == stability(shapes_of(controlnet(name).state_dict()), 4)


# What comes back


@pytest.mark.parametrize("name", sources())
def test_a_file_comes_back_bit_for_bit(name: str, tmp_path: Path, capsys: Any) -> None:
    net, layout = sources()[name]
    file = exported(tmp_path, net, layout)
    out, err = capsys.readouterr()
    assert out.startswith(f"{file}: a ")
    assert out.count("\n") == 1
    assert not err, "nothing of these is left to readers' guesses"
    found = identify(file)
    assert found[:2] == (("t2i_adapter", "TencentARC") if layout == "tencentarc" else ("controlnet", "original"))
    loaded = load_control_model(file)
    assert same(dict(loaded.state_dict()), dict(net.state_dict()))
    image = torch.rand(2, net.config.get("in_channels", 3), 64, 64, generator=seeds(1))
    if layout == "tencentarc":
        made = zip(loaded(image), net(image), strict=True)
    else:
        made = zip(residuals(loaded), residuals(net), strict=True)
    assert all(distance(a, b) < 1e-6 for a, b in made)  # where tensors lie in memory decides about the last bit


def residuals(net: Any) -> list[torch.Tensor]:
    """What a ControlNet answers to fixed random inputs."""
    added = {"text_embeds": torch.randn(2, 32, generator=seeds(5)), "time_ids": torch.rand(2, 6, generator=seeds(6))}
    noise, text = torch.randn(2, 4, 16, 16, generator=seeds(1)), torch.randn(2, 7, 48, generator=seeds(2))
    image = torch.rand(2, 3, 128, 128, generator=seeds(3))
    down, mid = net(noise, torch.tensor([10, 700]), text, image, added_cond_kwargs=added, return_dict=False)
    return [*down, mid]


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_the_peer_reads_a_controlnet_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Not SDXL's: of those the peer leaves out `label_emb`, as it does of anybody's file."""
    file = exported(tmp_path, controlnet(name), "controlnet")
    loaded = diffusers.ControlNetModel.from_single_file(str(file), config=str(tmp_path / "source"))
    assert same(dict(loaded.state_dict()), dict(controlnet(name).state_dict()))


@pytest.mark.parametrize("name", SMALL)
def test_a_control_lora_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    tensors, _ = export.control_lora_of(controlnet(name), export.original(encoder(name)), 4)
    export.save(tensors, tmp_path / "lora.safetensors", layout="control-lora")
    words = ["weights", "export", tmp_path / "lora.safetensors", "--layout", "control-lora"]
    assert main([str(word) for word in [*words, "--out", tmp_path / "again.safetensors"]]) == 0
    assert same(load_file(tmp_path / "again.safetensors"), tensors)


def test_the_header_says_who_wrote_it_and_half_precision_is_half(tmp_path: Path) -> None:
    import diffusion_kit

    file = exported(tmp_path, controlnet("sd1"), "controlnet", "--dtype", "fp16")
    with safe_open(file, "pt") as opened:
        said = opened.metadata()
    assert said == {"format": "pt", "layout": "controlnet", "diffusion_kit": diffusion_kit.__version__}
    halves = {name: value.half() for name, value in controlnet("sd1").state_dict().items()}
    assert same(dict(load_control_model(file).state_dict()), halves)


def test_the_file_is_named_for_its_source_and_layout(tmp_path: Path, monkeypatch: Any) -> None:
    make_adapter(kind="full_adapter").save_pretrained(tmp_path / "edges-1.1")
    monkeypatch.chdir(tmp_path)
    assert main(["weights", "export", "edges-1.1", "--layout", "tencentarc"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"edges-1.1", "edges-1.1-tencentarc.safetensors"}


def test_what_readers_would_guess_wrong_is_said(tmp_path: Path, capsys: Any) -> None:
    pooled = make_controlnet(global_pool_conditions=True, controlnet_conditioning_channel_order="bgr")
    cases = [
        (make_adapter(), "tencentarc", ["adapter_type is full_adapter_xl; readers take it for full_adapter"]),
        (make_adapter(kind="full_adapter", channels=(32, 64, 64)), "tencentarc", ["levels is 3"]),
        (pooled, "controlnet", ["global_pool_conditions is True", "order is bgr", "norm_num_groups is 8", "heads is"]),
    ]
    for net, layout, parts in cases:
        exported(tmp_path, net, layout)
        err = capsys.readouterr().err
        assert err.count("\n") == len(parts)
        assert all(part in err for part in parts), err


def test_other_numbers_of_layers_are_named_right_and_said(tmp_path: Path, capsys: Any) -> None:
    unet = make_unet(**NARROW, layers_per_block=1)
    unet.save_pretrained(tmp_path / "base" / "unet")
    net = diffusers.ControlNetModel.from_unet(unet, **HINT)
    own = [name for name in net.state_dict() if re.match("down_blocks.*(norm1.bias|conv.bias)", name)]
    names, more = {lists.original(name, 1) for name in own}, ["--base", tmp_path / "base"]
    for layout, prefix, given in (("controlnet", "control_model.", []), ("control-lora", "", more)):
        file = exported(tmp_path, net, layout, *given)
        assert {prefix + name for name in names} <= load_file(file).keys()
        assert "layers_per_block is 1; readers take it for 2" in capsys.readouterr().err


@pytest.mark.parametrize("layers", [1, 2])
def test_a_control_lora_under_diffusers_names_is_renamed(layers: int, tmp_path: Path, capsys: Any) -> None:
    net = diffusers.ControlNetModel.from_unet(make_unet(**NARROW, layers_per_block=layers), **HINT)
    tensors = {"lora_controlnet": torch.tensor([])}
    for name, value in net.state_dict().items():
        if value.ndim < 2 or name.startswith("controlnet_"):
            tensors[name] = value
        else:
            stem = name.removesuffix(".weight")
            tensors[f"{stem}.lora_B.weight"], tensors[f"{stem}.lora_A.weight"] = export.low_rank(value, 2)
    export.save(tensors, tmp_path / "lora.safetensors", layout="diffusers")
    words = ["weights", "export", tmp_path / "lora.safetensors", "--layout", "control-lora"]
    assert main([str(word) for word in [*words, "--out", tmp_path / "again.safetensors"]]) == 0
    halves = {".lora_B.weight": ".up", ".lora_A.weight": ".down"}
    names = {name: next((name.replace(*half) for half in halves.items() if half[0] in name), name) for name in tensors}
    renamed = {
        name if name == "lora_controlnet" else lists.original(names[name], layers): value
        for name, value in tensors.items()
    }
    assert same(load_file(tmp_path / "again.safetensors"), renamed)
    assert ("layers_per_block is 1" in capsys.readouterr().err) == (layers == 1)


# A ControlNet as a change of its base


def encoder(name: str) -> dict[str, torch.Tensor]:
    """Of a base, what a ControlNet has too."""
    wanted = controlnet(name).state_dict().keys()
    return {key: value for key, value in base(name).state_dict().items() if key in wanted}


def lora_file(tmp_path: Path, net: Any, name: str, rank: int, *more: str) -> Path:
    if not (tmp_path / "base").exists():
        base(name).save_pretrained(tmp_path / "base" / "unet")
    return exported(tmp_path, net, "control-lora", "--base", tmp_path / "base", "--rank", rank, *more)


def left_of(lora: ControlLoRA, net: Any, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What a Control-LoRA leaves of the change of each matrix and convolution of the base, and the change: (out, rest)."""
    weights, base = net.state_dict(), encoder(name)
    assert lora.pairs.keys() == {key for key, own in base.items() if own.ndim > 1}
    changes = {key: (weights[key] - base[key]).flatten(1) for key in lora.pairs}
    made = {key: up.float().flatten(1) @ down.float().flatten(1) for key, (up, down) in lora.pairs.items()}
    return {key: (change - made[key], change) for key, change in changes.items()}


@pytest.mark.parametrize("name", SMALL)
def test_of_full_rank_it_is_the_controlnet(name: str, tmp_path: Path) -> None:
    file = lora_file(tmp_path, controlnet(name), name, 10**6)
    net = load_control_model(file).network(base(name))
    theirs = residuals(controlnet(name))
    assert all(distance(a, b) < 1e-4 for a, b in zip(residuals(net), theirs, strict=True))
    plain = copy.deepcopy(controlnet(name))
    plain.load_state_dict(encoder(name), strict=False)
    assert distance(residuals(plain)[-1], theirs[-1]) > 1e-2, "the change does nothing"


@pytest.mark.parametrize("name", SMALL)
def test_a_change_of_low_rank_is_found_exactly(name: str, tmp_path: Path, capsys: Any) -> None:
    net, generator = copy.deepcopy(controlnet(name)), seeds(7)
    weights = net.state_dict()
    for key, own in encoder(name).items():
        if own.ndim > 1:
            pair = (torch.randn(*shape, generator=generator) for shape in ((len(own), 3), (3, own[0].numel())))
            weights[key].copy_(own + 0.02 * torch.matmul(*pair).view_as(own))
    left = left_of(load_control_model(lora_file(tmp_path, net, name, 3)), net, name)
    assert all(rest.abs().max() < 1e-5 * change.abs().max() for rest, change in left.values())
    assert "relative error of the change from the base: 0.0000;" in capsys.readouterr().out


@cache
def squares(name: str) -> list[torch.Tensor]:
    """Of the singular values of what a ControlNet changes in each matrix and convolution of its base."""
    weights = controlnet(name).state_dict()
    changes = [weights[key] - own for key, own in encoder(name).items() if own.ndim > 1]
    return [torch.linalg.svdvals(change.flatten(1)).square() for change in changes]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_error_that_is_said_is_that_of_the_file(dtype: str, tmp_path: Path, capsys: Any) -> None:
    """And it is as small as its rank allows: what is left are the singular values that are left out."""
    name, errors = "small sd1", []
    net = controlnet(name)
    for rank in (1, 20, 10**6):  # at full rank, what rounding takes
        file = lora_file(tmp_path, net, name, rank, "--dtype", f"fp{dtype[5:]}")
        assert {value.dtype for value in load_file(file).values()} == {getattr(torch, dtype)}
        errors.append(float(capsys.readouterr().out.split("the base: ")[1].split(";")[0]))
        left = left_of(load_control_model(file), net, name).values()
        actual, whole = (math.sqrt(sum(pair[k].square().sum().item() for pair in left)) for k in (0, 1))
        assert abs(errors[-1] - actual / whole) < 1e-4
        least = math.sqrt(
            sum(s[rank:].sum().item() for s in squares(name)) / sum(s.sum().item() for s in squares(name))
        )
        assert abs(errors[-1] - least) < (1e-4 if dtype == "float32" else 1e-3)
    assert 1 > errors[0] > errors[1] > 0.1 > errors[2]


def test_what_has_not_changed_has_no_error_and_the_worst_layer_is_named() -> None:
    net, weights = diffusers.ControlNetModel.from_unet(base("small sd1"), **HINT), export.original(encoder("small sd1"))
    tensors, loss = export.control_lora_of(net, weights, 4)
    assert loss[:2] == (0.0, 0.0)
    assert all(not value.any() for name, value in tensors.items() if name.endswith((".up", ".down")))
    randomise(net.mid_block.resnets[1].conv1, 3)
    _, loss = export.control_lora_of(net, weights, 4)
    assert loss.layer == "middle_block.2.in_layers.2"
    assert loss.error == loss.worst > 0.1


def test_a_base_of_one_file_is_the_base_of_a_folder(tmp_path: Path) -> None:
    unet = lists.renamed(base("small sdxl").state_dict(), export.UNET)
    save_file(unet | {"first_stage_model.quant_conv.weight": torch.zeros(1)}, tmp_path / "base.safetensors")
    ours = export.base_tensors(tmp_path / "base.safetensors")
    base("small sdxl").save_pretrained(tmp_path / "base" / "unet")
    theirs = export.base_tensors(tmp_path / "base")
    assert len(theirs) > 100
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


# What is wrong is one line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    make_adapter(kind="full_adapter").save_pretrained(folder / "adapter")
    controlnet("small sdxl").save_pretrained(folder / "net")
    base("small sdxl").save_pretrained(folder / "base" / "unet")
    base("small sd1").save_pretrained(folder / "sd1" / "unet")
    union = diffusers.ControlNetUnionModel.from_unet(base("small sdxl"), **HINT)
    union.save_pretrained(folder / "union")
    tensors, _ = export.control_lora_of(controlnet("small sdxl"), export.original(encoder("small sdxl")), 2)
    export.save(tensors, folder / "lora.safetensors", layout="control-lora")
    (folder / "there.safetensors").write_text("somebody's")
    return folder


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("adapter", "weights export needs --layout: tencentarc, controlnet, control-lora"),
        ("adapter --layout tencent", "no layout 'tencent': the layouts are tencentarc, controlnet, control-lora"),
        (
            "adapter --layout controlnet",
            "is a T2IAdapter, which layout controlnet does not hold: take --layout tencentarc",
        ),
        ("net --layout tencentarc", "ControlNetModel, .* take --layout controlnet or control-lora"),
        ("lora.safetensors --layout controlnet", "is a ControlLoRA, .* take --layout control-lora$"),
        ("union --layout controlnet", "is a ControlNetUnionModel, .* there is no layout for it here"),
        (
            "base/unet --layout controlnet",
            "a UNet2DConditionModel, which layout controlnet does not hold: there is no layout",
        ),
        ("none.safetensors --layout controlnet", "no model 'none.safetensors'"),
        ("net --layout control-lora", r"net is a ControlNet: .* so name that \(--base\)"),
        ("net --layout controlnet --base base", "is only renamed for layout controlnet: leave out --base and --rank"),
        ("lora.safetensors --layout control-lora --rank 4", "is only renamed for layout control-lora: leave out"),
        ("net --layout control-lora --base base --rank 0", "--rank is 0; it must be 1 or more"),
        ("net --layout control-lora --base sd1", r"not made for the base: its label_emb\S+ is .*, the base has none"),
        ("net --layout control-lora --base lora.safetensors", "lora.safetensors is no base: it is a Control-LoRA"),
        ("net --layout control-lora --base ./none", "no model './none'"),
        ("net --layout control-lora --base adapter", "no model '.*adapter/unet'"),
        ("net --layout controlnet --out there.safetensors", "there.safetensors is there already: .* or --overwrite"),
        ("net --layout controlnet --out net.ckpt", "--out net.ckpt must end in .safetensors"),
        ("net --layout controlnet --out no/net.safetensors", "there is no folder no"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(
    words: str, message: str, place: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.stat().st_mtime_ns for path in place.rglob("*")}
    assert main(["weights", "export", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.count("\n") == 1
    assert re.search(message, err.rstrip()), err
    assert before == {path: path.stat().st_mtime_ns for path in place.rglob("*")}


def test_an_unknown_action_is_one_line(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["weights", "exprot", "net"])
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "export" in err


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    file = exported(tmp_path, make_adapter(kind="full_adapter"), "tencentarc")
    old = file.read_bytes()

    def fails(tensors: Any, beside: Path, metadata: Any) -> None:
        beside.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(export, "save_file", fails)
    with pytest.raises(OSError, match="no space"):
        export.save({"a": torch.zeros(1)}, file, layout="tencentarc")
    assert file.read_bytes() == old
    assert [path.name for path in file.parent.iterdir()] == [file.name]
