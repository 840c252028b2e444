"""A plan says what a run takes: beside the real trainer's bytes, a communication hook, and its own rules."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import planning_toy
import pytest
import torch
import training_models
from conftest import light, needs
from torch import nn

from diffusion_kit.cli import main
from diffusion_kit.training import group, train
from diffusion_kit.training.config import Config, read
from diffusion_kit.training.launching import machine
from diffusion_kit.training.planning import guard, scaling
from diffusion_kit.training.planning.footprint import Sizes, Way, footprint, moment, nbytes, overlap, sizes
from diffusion_kit.training.planning.ladder import Rung, ladder, way_of
from diffusion_kit.training.planning.plan import Networks, plan
from diffusion_kit.training.planning.trace import Rising, Trace, networks, trace
from diffusion_kit.training.planning.traffic import traffic
from diffusion_kit.training.planning.weightless import make_weightless, weightless

PLAN = "diffusion_kit.training.planning.plan"
TARGETS = {
    "t2i_adapter": "sdxl",
    "controlnet": "sd15",
    "control_lora": "sdxl",
    "unet": "sdxl",
    "hint_decoder": "kandinsky",
    "prior": "kandinsky",
    "autoencoder": "sdxl",
}
HEAVY = TARGETS.keys() - {"t2i_adapter", "prior"}


def config(target: str, output: Path | str = "runs/none", **more: Any) -> Config:
    own = {"network": {"class": "AutoencoderKL"}} if target == "autoencoder" else {}
    return training_models.config(target, output, TARGETS[target], **{**own, "batch": 8, **more})


@cache
def measured(target: str) -> Networks:
    return Networks(config(target), cpu=True)


def rungs(target: str, processes: int, **more: Any) -> list[Rung]:
    own = measured(target)
    return list(ladder(config(target, **more), own.sizes(), processes, own.trace, cpu=False))


# What networks take


@pytest.mark.parametrize("target", light(["t2i_adapter", "prior", *sorted(HEAVY)], "t2i_adapter"))
def test_sizes_are_those_of_the_real_trainer(target: str, tmp_path: Path) -> None:
    """Weights that it holds, and the optimizer's state after a step."""
    own = config(target, tmp_path, steps=1, batch=1)
    trainer = train.make_trainer(own, group.join(own), lambda line: None)
    trainer.run(lambda _: True)
    state = trainer.parallel.optimizer.state.values()
    moments = sum(nbytes(v) for own in state for v in own.values() if isinstance(v, torch.Tensor) and v.ndim)
    held = {id(p): nbytes(p) for net in networks(trainer.target) for p in (*net.parameters(), *net.buffers())}
    found = measured(target).sizes()
    assert found.trained == sum(p.numel() for p in trainer.target.parameters() if p.requires_grad) > 0
    assert found.trained * 4 + found.spread * found.width + found.frozen == sum(held.values())
    assert found.moment * found.trained == moments


def test_configurations_without_weights_are_enough(tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(training_models.base(), bare, ignore=shutil.ignore_patterns("*.safetensors", "vocab*", "merges*"))
    own = Networks(config("t2i_adapter", base={"model": str(bare)}), cpu=True)
    assert own.measured(False) == measured("t2i_adapter").measured(False)


def test_sdxl_without_its_weights() -> None:
    """The published counts: UNet 2.57 B, T2I-Adapter 79 M, CLIP ViT-L 123 M, OpenCLIP bigG 695 M, autoencoder 84 M."""
    folder = Path(__file__).parents[1] / "examples" / "sdxl_plan"
    own = read(folder / "t2i_adapter.yaml", [f"base.model={folder / 'base'}"])
    with weightless():
        target = make_weightless(own)
        found = sizes(target, own, cpu=False)
    assert target.base is not None
    parts = {
        name: sum(p.numel() for p in net.parameters())
        for name, net in target.base.pipe.components.items()
        if isinstance(net, nn.Module)
    }
    assert found.spread == parts["unet"] == 2_567_463_684
    assert found.trained == pytest.approx(79e6, rel=0.01)
    assert [round(parts[name] / 1e6) for name in ("text_encoder", "text_encoder_2", "vae")] == [123, 695, 84]


def test_a_base_that_is_not_on_this_disk() -> None:
    with pytest.raises(FileNotFoundError, match=r"^base.model owner/none is not on this disk[^\n]*$"):
        Networks(config("unet", base={"model": "owner/none"}), cpu=True).sizes()


def test_the_optimizers_own_state() -> None:
    own = config("unet").optimizer
    assert moment(own) == 8
    needs("schedulefree")
    assert moment(own.model_copy(update={"name": "schedule_free"})) == 8


# Activations and operations


def test_live_bytes_of_a_chain() -> None:
    """x -> x^2 -> sin: each keeps what it was given, and the last step back has three of them at once."""
    x = torch.ones(1000, requires_grad=True)
    live = Rising([x])
    with torch.enable_grad(), live:
        y = x.square().sin()
        assert live.now == 2 * 4000
        del y
        assert live.now == 0, "with the graph goes what it kept"
    weight = nn.Parameter(torch.ones(1000))
    live = Rising([weight])
    weight.register_post_accumulate_grad_hook(live.aside)
    with torch.enable_grad(), live:
        (weight * 2).sum().backward()
        assert (live.now, live.gradients) == (4000, 4000)


@pytest.mark.heavy
def test_checkpointing_trades_operations_for_memory() -> None:
    plain, lean = (measured("unet").trace(flag, 4) for flag in (False, True))
    assert plain is not None
    assert lean is not None
    assert lean.activations < plain.activations
    assert lean.flops > plain.flops
    assert plain.activations <= plain.rising <= plain.activations + 4 * measured("unet").sizes().trained


@pytest.mark.heavy
def test_a_micro_batch_is_a_straight_line() -> None:
    own = config("t2i_adapter")
    with weightless():
        found = trace(make_weightless(own), own, 5, cpu=True)
    line = measured("t2i_adapter").trace(False, 5)
    assert line is not None
    assert line.flops == pytest.approx(found.flops, rel=1e-3)
    assert line.activations == pytest.approx(found.activations, rel=0.02)


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Of a real micro-batch."""
    from torch.utils.flop_counter import FlopCounterMode

    from diffusion_kit.training.planning.trace import FLASH

    own = config("t2i_adapter", tmp_path, batch=2)
    trainer = train.make_trainer(own, group.join(own), lambda line: None)
    with FlopCounterMode(display=False, custom_mapping=FLASH) as counter:
        trainer.run(lambda _: True)
    found = measured("t2i_adapter").trace(False, 2)
    assert found is not None
    assert found.flops == pytest.approx(counter.get_total_flops(), rel=1e-3)


# The ladder


@pytest.mark.parametrize("target", light(["unet", "t2i_adapter"], "t2i_adapter"))
def test_rungs_become_leaner_and_keep_the_batch(target: str) -> None:
    found = rungs(target, 2)
    assert [own.name for own in found][3:6] == ["ZeRO-2", "+ optimizer offload", "ZeRO-3"]
    for own in found:
        assert own.way.micro * own.way.count * own.way.processes == 8
    device = [own.need.sums[0] for own in found]
    assert device[0] > device[1] > device[2], "one picture at once, then checkpointing"
    states = [sum(own.need.device.get(name, 0) for name in ("weights", "masters", "moments")) for own in found]
    assert states[3] > states[4], "an offloaded optimizer is not on the device"
    assert states[3] > states[5] >= states[6] > states[7], "these networks' weights are so small that they stay whole"
    assert found[4].need.sums[1] > 0
    assert found[8].need.sums[2] > 0
    assert found[3].overlap > 0


BUCKETS = {"deepspeed": {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}}


@pytest.mark.parametrize("more", light([{}, BUCKETS], BUCKETS))
def test_what_is_said_gives_the_rung(more: dict[str, Any], tmp_path: Path) -> None:
    """Typed behind the configuration's name."""
    file, own = tmp_path / "config.yaml", config("t2i_adapter", **more)
    file.write_text(own.dump())
    for rung in rungs("t2i_adapter", 2, **more):
        again = read(file, shlex.split(rung.arguments))
        assert way_of(again, {}, 2, cpu=False) == rung.way
        assert again.batch == own.batch
        if more and rung.way.stage is not None:
            assert rung.way.setting("reduce_bucket_size") == 1000


def test_overlap_is_what_the_document_says() -> None:
    way = Way(2, 1, 1, False, stage=2)
    assert overlap(way) == 9e9
    assert overlap(replace(way, zero={"reduce_bucket_size": 2e8, "allgather_bucket_size": 2e8})) == 3.6e9


def test_it_stops_at_the_first_that_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PLAN + ".Networks", lambda config, cpu: replace(measured("t2i_adapter"), cpu=cpu))
    file = tmp_path / "config.yaml"
    file.write_text(config("t2i_adapter").dump())
    device = [own.need.sums[0] for own in rungs("t2i_adapter", 2)]
    told = f"{(device[1] + device[2]) / 2 / 1e9}"
    assert main(["launch", str(file), "--plan", "--devices", "2", "--memory", told]) == 0
    printed = capsys.readouterr().out
    assert "use: micro_batch=1 gradient_checkpointing=true\n" in printed
    assert "ZeRO-2 |" not in printed.partition("## 2 devices")[0]
    assert main(["launch", str(file), "--plan", "--devices", "2", "--memory", "1e-6"]) == 2
    captured = capsys.readouterr()
    assert "NVMe" in captured.out
    assert captured.err.count("\n") == 1
    assert "no rung of the ladder fits" in captured.err
    for wrong in (["--plan", "--memory", "-1"], ["--memory", "8"], ["--plan", "--rate", "9"]):
        assert main(["launch", str(file), *wrong]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_processes_on_cpus_share_their_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is offloaded lies in the same memory."""
    monkeypatch.setattr(machine, "memory", lambda: 8e12)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(PLAN + ".Networks", lambda config, cpu: replace(measured("t2i_adapter"), cpu=cpu))
    said: list[str] = []
    found = plan(config("t2i_adapter", launch={"processes": 4}), said.append)
    assert found is not None
    assert any("each of 4 processes may take 2000 GB" in line for line in said)
    own = found.need
    held = sum(own.sums[:2])
    assert found.fits(held, None)
    assert not found.fits(held - 1, None)


# What is sent


def sized(trained: int, spread: int = 0, **more: Any) -> Sizes:
    weights = {"weights": (trained, spread), "count": 1, "width": 2, "half": 2, "frozen": 0, "away": 0}
    return Sizes(trained=trained, spread=spread, **{**weights, "moment": 8.0, "average": 0, **more})


@pytest.mark.heavy
def test_bytes_of_a_step_in_a_communication_hook(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(planning_toy.hooked, (str(tmp_path),), nprocs=2)
    own = sized(sum(p.numel() for p in planning_toy.net().parameters()))
    sent = traffic(own, Way(2, 1, 1, False))
    for rank in range(2):
        reduced = int(Path(tmp_path, str(rank)).read_text())
        assert sent.bytes == pytest.approx(2 * (2 - 1) / 2 * reduced, rel=0.05)  # of a ring of two


@pytest.mark.heavy
def test_a_base_that_will_be_spread_is_planned_in_one_process() -> None:
    """Without DeepSpeed, and without its processes."""
    own = config("t2i_adapter", deepspeed={"zero_optimization": {"stage": 3}})
    assert Networks(own, cpu=True).sizes() == measured("t2i_adapter").sizes()


def test_gradients_of_micro_batches_that_are_not_sent_lie_beside_the_buckets() -> None:
    own, none = sized(10**8), Trace(0, 0, 0)
    found = [footprint(own, Way(2, 1, count, False), none).device["gradients"] for count in (1, 2, 4)]
    assert found == [4e8, 8e8, 8e8]


def test_a_ring_sends_what_the_paper_says() -> None:
    """In units of 2 bytes a number (arXiv 1910.02054, section 7), of so many devices that (N - 1) / N is 1."""
    many, own = 10**6, sized(10**9, spread=3 * 10**9)
    unit = 2 * own.trained
    plain = {"use_multi_rank_bucket_allreduce": False}
    for stage in (1, 2):
        assert traffic(own, Way(many, 1, 1, False, stage, zero=plain)).bytes == pytest.approx(2 * unit, rel=1e-3)
        assert traffic(own, Way(many, 1, 1, False, stage)).bytes == pytest.approx(3 * unit, rel=1e-3)
    zero = {"stage3_max_reuse_distance": 0}
    whole, spread = (traffic(own, Way(many, 1, 1, False, 3, spread=flag, zero=zero)) for flag in (False, True))
    assert whole.bytes == pytest.approx(3 * unit, rel=1e-3)
    assert spread.gradients == whole.gradients, "a frozen base has none"
    assert spread.weights - whole.weights == pytest.approx(2 * 2 * own.spread, rel=1e-3)
    assert traffic(own, Way(1, 1, 1, False)).bytes == 0


def test_only_accumulation_of_zero_2_and_3_sends_more() -> None:
    own = sized(10**8)
    for stage in (None, 1):
        assert traffic(own, Way(8, 1, 4, False, stage)).bytes == traffic(own, Way(8, 1, 1, False, stage)).bytes
    for stage in (2, 3):
        assert traffic(own, Way(8, 1, 4, False, stage)).bytes > 2 * traffic(own, Way(8, 1, 1, False, stage)).bytes


def test_many_devices() -> None:
    own, line = sized(10**8, spread=10**9), Trace(1e9, 1e9, 1e13)
    machines = scaling.Machines(memory=80e9)
    for devices in (8, 64, 1024):
        for batch in (1024, 16384):
            found = list(scaling.steps(batch, devices, own, lambda size: line.times(line, size), machines, {}))
            assert [step.name for step in found] == list(scaling.WAYS)
            for step in found:
                assert step.way.micro * step.way.count * devices == batch
                assert step.memory <= machines.memory
            assert scaling.best(found).seconds <= 1.02 * min(step.seconds for step in found)
    slow = replace(machines, between=1e6)
    assert {own.bound for own in scaling.steps(64, 64, own, lambda size: line, slow, {})} == {"sending"}


# What is not started


def offloads() -> Iterator[dict[str, Any] | None]:
    yield None
    for stage in (1, 2, 3):
        yield {"stage": stage}
        yield {"stage": stage, "offload_optimizer": {"device": "cpu"}}
    yield {"stage": 3, "offload_param": {"device": "nvme"}, "offload_optimizer": {"device": "nvme"}}


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("target", light(["unet", "t2i_adapter", "prior"], "t2i_adapter"))
def test_what_is_refused_needs_more_than_there_is(target: str, precision: str) -> None:
    """The quick bound is never above what a plan finds."""
    for zero in offloads():
        more = {"deepspeed": {"zero_optimization": zero}} if zero else {}
        own = config(target, precision=precision, **more)
        own_sizes = replace(measured(target).sizes(), **({"half": 2, "width": 2} if precision == "bf16" else {}))
        way = way_of(own, {}, 2, cpu=False)
        assert guard.least(own, 2) <= sum(footprint(own_sizes, way, Trace(0, 0, 0)).sums[:2])


def test_a_run_that_would_be_killed_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    started: list[Any] = []
    monkeypatch.setattr("diffusion_kit.training.launching.process.Process.run", lambda self: started.append(self) or 0)
    file = tmp_path / "config.yaml"
    own = config("unet")
    file.write_text(own.dump())
    need = 2 * guard.least(own, 2)
    assert need == 2 * 16 * measured("unet").sizes().trained
    monkeypatch.setattr(machine, "memory", lambda: need - 1)
    assert main(["launch", str(file), "launch.processes=2"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "--plan" in told
    assert not started
    for arguments in (["launch.processes=2", "--on", "slurm"], ["launch.processes=1"]):
        assert main(["launch", str(file), *arguments]) == 0
    assert len(started) == 2
    monkeypatch.setattr(machine, "memory", lambda: need)
    assert main(["launch", str(file), "launch.processes=2"]) == 0
    assert len(started) == 3
