"""Less memory: the same picture, weights that leave memory and are found again."""

from __future__ import annotations

import copy
import ctypes
import gc
import mmap
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import components, make_vae, pipeline, seeds
from safetensors.torch import load_file, save_file
from test_engines import Layers
from test_mixtures import run
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

from diffusion_kit import AutoPipelineForText2Image, SDXLPipeline
from diffusion_kit.models.packed import Packed
from diffusion_kit.models.vae import cut
from diffusion_kit.pipelines import memory
from diffusion_kit.sampling.engines.aoti import AOTI
from diffusion_kit.sampling.engines.pages import forget, forget_pages_of, page_out, without_pages_of
from diffusion_kit.sampling.engines.weights import content, is_parked, park

MEGABYTES = 64
linux = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")


def held() -> float:
    """Megabytes in memory."""
    return psutil.Process().memory_info().rss / 2**20


@linux
def test_parked_weights_leave_memory_and_come_back(tmp_path: Path) -> None:
    net = nn.Linear(1024, 256 * MEGABYTES, bias=False)  # of four bytes each
    net.weight.fill_(2.0)
    park([net], tmp_path)
    net.weight.sum()
    before = held()
    net.weight[5] = 3.0
    page_out([net])
    assert held() < before - 0.9 * MEGABYTES
    assert net.weight[5].eq(3).all(), "what was changed is kept"
    assert net.weight[7:].eq(2).all()


@linux
def test_weights_as_they_are_in_their_file_stay_there_and_leave_memory(tmp_path: Path) -> None:
    """Copies would leave the file's pages in memory, which whoever hashed the weights has read."""
    megabyte = torch.full((512, 512), 2.0)
    save_file(
        {str(k): megabyte + k for k in range(MEGABYTES)} | {"small": torch.ones(2)}, tmp_path / "weights.safetensors"
    )
    net = nn.ParameterDict(load_file(tmp_path / "weights.safetensors"))
    net["3"][5] = 7.0
    content([net])
    before = held()
    park([net], tmp_path)
    forget([net])
    assert held() < before - 0.9 * MEGABYTES
    assert [name for name, own in net.items() if is_parked(own)] == ["3"]
    assert net["3"][5].eq(7).all()
    assert net["3"][6:].eq(5).all()
    assert net["8"].eq(10).all()


@linux
def test_weights_made_of_others_are_left_alone(tmp_path: Path) -> None:
    net = nn.Linear(256, 256, bias=False)
    net.weight = nn.Parameter(TwoTensor(torch.ones(256, 256), torch.zeros(256, 256)))
    park([net], tmp_path)
    page_out([net])
    assert net.weight.a.eq(1).all()


def test_after_an_error_networks_leave_the_device(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    monkeypatch.setattr(small, "maybe_free_model_hooks", lambda: freed.append(1), raising=False)

    def fail(*_: Any) -> Any:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        run(pipe=small, callback_on_step_end=fail)
    run(pipe=small)
    assert freed == [1, 1]


@linux
def test_pages_of_a_file_are_given_back(tmp_path: Path) -> None:
    file = tmp_path / "weights.bin"
    file.write_bytes(bytes(MEGABYTES << 20))
    with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        before = held()
        with without_pages_of(file):
            pass
        assert held() < before - 0.9 * MEGABYTES
        assert sum(mapped[::4096]) == 0


@linux
def test_changed_pages_stay(tmp_path: Path) -> None:
    """As a library's are, to which its loader wrote before nobody could any more."""
    (tmp_path / "library").write_bytes(bytes(MEGABYTES << 20))
    with (tmp_path / "library").open("rb") as stream, mmap.mmap(stream.fileno(), 0, flags=mmap.MAP_PRIVATE) as mapped:
        mapped[5000] = 7
        assert sum(mapped[::4096]) == 0
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        forget_pages_of(tmp_path)
        before = held()
        assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), MEGABYTES << 20, mmap.PROT_READ) == 0
        forget_pages_of(tmp_path)
        assert held() < before - 0.9 * MEGABYTES
        assert mapped[5000] == 7


@linux
@pytest.mark.heavy
def test_compiled_weights_are_in_memory_once(tmp_path: Path) -> None:
    network = Layers(nn.Linear(4096, 64 * MEGABYTES, bias=False).eval())  # of four bytes each
    x = torch.randn(2, 4096)
    wanted = network(x)
    torch.testing.assert_close(AOTI(tmp_path).network(network)(x), wanted)
    gc.collect()
    before = held()
    engine = AOTI(tmp_path)
    torch.testing.assert_close(engine.network(network)(x), wanted)
    assert held() < before + 1.3 * MEGABYTES


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(tmp_path))
    return pipeline(SDXLPipeline, **copy.deepcopy({**components(), "vae": make_vae(4)}))


def test_the_same_picture(small: Any) -> None:
    before = run(pipe=small)
    told = small.optimize(engine="eager", low_memory=True)
    assert "encoders leave memory" in told
    assert torch.equal(run(pipe=small), before)
    assert torch.equal(run(pipe=small), before)
    next(small.text_encoder.parameters()).mul_(2)
    assert not torch.equal(run(pipe=small), before)
    assert "encoders leave" not in small.optimize(engine="eager")


def test_encoders_leave_memory_in_every_call(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As soon as the prompt is encoded, and once more after controls, some of which have encoders."""
    gone: list[Any] = []
    monkeypatch.setattr(memory, "page_out", lambda nets: gone.append([*nets]))
    run(pipe=small)
    assert not gone
    small.optimize(engine="eager", low_memory=True)
    gone.clear()
    run(pipe=small)
    assert gone == [[small.text_encoder, small.text_encoder_2]] * 2


def test_without_room_for_a_file_encoders_stay_in_memory(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run(pipe=small)
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", "/proc/nowhere")
    assert "encoders stay in memory: /proc/nowhere takes no file" in small.optimize(engine="eager", low_memory=True)
    assert torch.equal(run(pipe=small), before)


def test_tiles_that_the_user_asked_for_stay(small: Any) -> None:
    small.vae.enable_tiling()
    small.vae.enable_slicing()
    small.optimize(engine="eager")
    assert small.vae.use_tiling
    assert small.vae.use_slicing
    small.optimize(engine="eager", low_memory=True)
    small.optimize(engine="eager")
    assert not small.vae.use_tiling


def test_a_kandinsky_whose_autoencoder_has_no_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSION_KIT_CACHE", str(tmp_path))
    pipe = AutoPipelineForText2Image.from_pretrained("default-kandinsky")
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red apple", "num_inference_steps": 2, "prior_num_inference_steps": 2, "output_type": "pt"}
    before = pipe(**call, generator=seeds(1)).images
    told = pipe.optimize(engine="packed", low_memory=True)
    assert "note       VQModel has no tiling" in told
    assert "prior_prior by eager: PriorTransformer" in told
    assert torch.allclose(pipe(**call, generator=seeds(1)).images, before, atol=1e-4)
    assert not any(isinstance(part, Packed) for part in pipe.prior_prior.modules())


def test_only_what_is_large_is_decoded_in_pieces(small: Any) -> None:
    vae, side = small.vae, small.vae.tile_latent_min_size
    one, two = torch.zeros(1, 4, side, side), torch.zeros(2, 4, side, side)
    assert not cut(vae, two)
    small.optimize(engine="eager", low_memory=True)
    assert not cut(vae, one)
    assert cut(vae, two)
    assert cut(vae, torch.zeros(1, 4, side, side + 1))


@pytest.mark.parametrize("kind", ["leaf_level", "block_level"])
def test_group_offload(kind: str, small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' own; here a weight that is offloaded is not a number, so that whoever uses it without its hook is seen."""
    from diffusers.hooks.group_offloading import ModuleGroup

    before = run(pipe=small)
    home: dict[int, torch.Tensor] = {}

    def weights(group: Any) -> list[Any]:
        return [*(p for module in group.modules for p in module.parameters()), *group.parameters]

    def offload(group: Any) -> None:
        for weight in weights(group):
            home.setdefault(id(weight), weight.data)
            weight.data = torch.full_like(weight, torch.nan)

    def onload(group: Any) -> None:
        for weight in weights(group):
            weight.data = home.get(id(weight), weight.data)

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    cpu, blocks = torch.device("cpu"), {"num_blocks_per_group": 1} if kind == "block_level" else {}
    small.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type=kind, **blocks)
    assert torch.allclose(run(pipe=small), before, rtol=1e-4, atol=1e-3)
    assert small.unet.down_blocks[0].resnets[0].conv1.weight.isnan().all()
