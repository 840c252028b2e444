"""A network that is spread over processes: all call it equally often, whatever work each has, and none hangs."""

from __future__ import annotations

import importlib.util
import json
import sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from conftest import unet
from test_control_lora import lora
from torch import nn

from diffusion_kit.training.parallel import inference

SCRIPTS = Path(__file__).parents[1] / "scripts"
CALLS = ((0, 3, 1), (2, 0, 0))  # of each process, in two rounds; the second begins with inputs that it has


class Collective(nn.Module):
    """Sums over the processes in its forward: it hangs, or fails, unless all call it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: torch.Tensor, added: dict[str, torch.Tensor]) -> torch.Tensor:
        self.calls += 1
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total == dist.get_world_size()
        return x + added["one"]


def process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", f"file://{folder}/group", world_size=3, rank=rank, timeout=timedelta(seconds=60))
    net = Collective()
    engine = SimpleNamespace(device="cpu")
    fake = SimpleNamespace(initialize=lambda **own: (engine, None, None, None))
    with mock.patch.dict(sys.modules, deepspeed=fake), mock.patch.object(inference, "settle"):
        together = inference.Together(net, {}, torch.float32)
    for own in CALLS:
        for call in range(own[rank]):
            answer = net(torch.full((rank + 1, 2), float(call)), added={"one": torch.ones(1)})
            assert torch.equal(answer, torch.full((rank + 1, 2), call + 1.0))
        together.accompany()
    Path(folder, f"calls-{rank}").write_text(str(net.calls))
    dist.destroy_process_group()


@pytest.mark.heavy
def test_processes_with_unequal_work_all_end(tmp_path: Path) -> None:
    mp.spawn(process, (str(tmp_path),), nprocs=3)
    counts = [int((tmp_path / f"calls-{rank}").read_text()) for rank in range(3)]
    assert counts == [sum(max(own) for own in CALLS)] * 3


def read(tmp_path: Path, tree: dict[str, Any]) -> dict[str, Any]:
    file = tmp_path / "zero.json"
    file.write_text(json.dumps(tree))
    return inference.read_inference(str(file))


def test_a_configuration_of_a_training_is_taken_too(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "stage3_prefetch_bucket_size": "auto"}
    own = {"optimizer": {"type": "AdamW"}, "train_batch_size": "auto", "bf16": {"enabled": "auto"}}
    tree = read(tmp_path, {"zero_optimization": zero, **own})
    assert inference.dtype_said(tree, "bfloat16") == "bfloat16"
    settled = inference.settle(tree, torch.bfloat16, unet())
    width = max(unet().config.block_out_channels)
    assert settled == {
        "zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": int(0.9 * width * width)},
        "bf16": {"enabled": True},
        "train_micro_batch_size_per_gpu": 1,
    }


def test_what_cannot_be_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero_optimization.stage is 2: only stage 3 spreads weights"):
        read(tmp_path, {"zero_optimization": {"stage": 2}})
    tree = read(tmp_path, {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}})
    assert inference.dtype_said(tree, None) == "bfloat16"
    with pytest.raises(ValueError, match="bf16.enabled is on, but --dtype is float32"):
        inference.dtype_said(tree, "float32")


def test_a_placeholder_in_place_of_a_weight_is_one_line() -> None:
    net = type(unet()).from_config(unet().config)
    net.load_state_dict(unet().state_dict())
    control = lora()
    for name, weight in net.named_parameters():
        weight.ds_id, weight.ds_numel = name, weight.numel()
        weight.data = torch.empty(0)
    line = r"the UNet's \S+ is spread over the processes \(ZeRO\), with a placeholder of 0 numbers here: load it whole"
    with pytest.raises(ValueError, match=line):
        control.network(net)


@pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed: scripts/verify scale installs it"
)
def test_two_processes_with_a_spread_network_make_what_one_makes(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import verify_shares

    verify_shares.prepare(tmp_path)
    passed = verify_shares.zero(tmp_path)["passed"]
    assert [what for what, ok in passed.items() if not ok] == []
