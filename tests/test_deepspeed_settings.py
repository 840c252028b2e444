"""DeepSpeed's configuration beside the kit's: one value for what both say, and nothing overlooked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import needs

from diffusion_kit.training.config import Config, parse
from diffusion_kit.training.parallel import keys
from diffusion_kit.training.parallel.settings import derived, precise, read, settings, width_of

AUTO = "auto"
DOCUMENT: dict[str, Any] = {  # the ZeRO-3 configuration that the guide gives, with what it leaves to the trainer
    "fp16": {"enabled": AUTO, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2},
    "bf16": {"enabled": AUTO},
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "total_num_steps": AUTO,
            "warmup_min_lr": AUTO,
            "warmup_max_lr": AUTO,
            "warmup_num_steps": AUTO,
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "wall_clock_breakdown": False,
}


def config(deepspeed: Any = None, **more: Any) -> Config:
    """As a user's file says it, without the defaults."""
    tree = {"target": "t2i_adapter", "output": "x", "steps": 100, "deepspeed": deepspeed, **more}
    return parse(tree, "test")


def final(own: Config, processes: int = 2, width: int | None = 320) -> dict[str, Any]:
    return settings(derived(own, processes), processes, width, lambda line: None)


def test_every_auto_of_the_guide_is_filled_from_the_kits_configuration() -> None:
    own = config(
        DOCUMENT,
        batch=16,
        micro_batch=2,
        precision="bf16",
        optimizer={"learning_rate": 3e-5, "betas": [0.8, 0.99], "warmup_steps": 7, "schedule": "linear", "clip": 0.5},
    )
    made = final(own)
    assert AUTO not in json.dumps(made)
    assert made["train_batch_size"] == 16
    assert made["train_micro_batch_size_per_gpu"] == 2
    assert made["gradient_accumulation_steps"] == 4  # 16 pictures, two processes, two at once
    assert made["gradient_clipping"] == 0.5
    assert made["optimizer"]["params"] == {"lr": 3e-5, "betas": [0.8, 0.99], "eps": 1e-8, "weight_decay": 1e-2}
    rates = {"total_num_steps": 100, "warmup_min_lr": 0.0, "warmup_max_lr": 3e-5, "warmup_num_steps": 7}
    assert made["scheduler"]["params"] == rates
    assert (made["fp16"]["enabled"], made["bf16"]["enabled"]) == (False, True)
    zero = made["zero_optimization"]
    assert zero["reduce_bucket_size"] == 320**2
    assert zero["stage3_prefetch_bucket_size"] == int(0.9 * 320**2)
    assert zero["stage3_param_persistence_threshold"] == 3200


@pytest.mark.parametrize(
    ("theirs", "name", "value"),
    [
        ({"train_batch_size": 24}, "batch", 24),
        ({"train_micro_batch_size_per_gpu": 3}, "micro_batch", 3),
        ({"train_micro_batch_size_per_gpu": 3, "gradient_accumulation_steps": 5}, "batch", 30),
        ({"train_batch_size": 24, "gradient_accumulation_steps": 3}, "micro_batch", 4),
        ({"gradient_clipping": 0.3}, "optimizer.clip", 0.3),
        ({"gradient_clipping": 0.0}, "optimizer.clip", None),
        ({"bf16": {"enabled": True}}, "precision", "bf16"),
        ({"fp16": {"enabled": True}}, "precision", "fp16"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 0.001}}}, "optimizer.learning_rate", 0.001),
        ({"optimizer": {"type": "Adam", "params": {"betas": [0.8, 0.999]}}}, "optimizer.betas", (0.8, 0.999)),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 9}}}, "optimizer.warmup_steps", 9),
    ],
)
def test_deepspeeds_configuration_may_be_the_master(theirs: dict[str, Any], name: str, value: Any) -> None:
    made: Any = derived(config(theirs), 2)
    for key in name.split("."):
        made = getattr(made, key)
    assert made == value


@pytest.mark.parametrize(
    ("theirs", "own", "line"),
    [
        (
            {"train_batch_size": 16},
            {"batch": 8},
            r"train_batch_size makes batch 16, but it is 8: leave one of them out",
        ),
        ({"gradient_clipping": 0.5}, {"optimizer": {"clip": 1.0}}, r"gradient_clipping makes optimizer.clip 0.5"),
        ({"fp16": {"enabled": True}}, {"precision": "bf16"}, r'fp16.enabled makes precision "fp16", but it is "bf16"'),
        (
            {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3}}},
            {"optimizer": {"learning_rate": 1e-4}},
            r"optimizer.params.lr makes optimizer.learning_rate 0.001",
        ),
        (
            {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3},
            {},
            r"gradient_accumulation_steps makes batch 12",
        ),
        (
            {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 70}}},
            {},
            "scheduler.params.total_num_st",
        ),
        (
            {"scheduler": {"type": "WarmupLR"}},
            {"optimizer": {"schedule": "cosine"}},
            r"scheduler.type makes optimizer.s",
        ),
    ],
)
def test_what_both_say_must_be_the_same(theirs: dict[str, Any], own: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^deepspeed: {line}[^\n]*$"):
        derived(config(theirs, **own), 2)


@pytest.mark.parametrize(
    ("tree", "line"),
    [
        ({"zero_optimisation": {}}, "no key zero_optimisation; did you mean zero_optimization?"),
        ({"zero_optimization": {"stage3_max_live_params": 1}}, "did you mean stage3_max_live_parameters?"),
        ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "did you mean device?"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}}, "did you mean warmup_num_steps?"),
        ({"scheduler": {"type": "Cosine"}}, "there are LRRangeTest, OneCycle, WarmupLR"),
        ({"optimizer": {"params": {}}}, "optimizer.type is missing"),
        ({"zero_optimization": 2}, "zero_optimization is 2: it must be a tree of keys"),
        ({"communication_data_type": "fp8"}, "there are fp16, bfp16, bf16, fp32"),
    ],
)
def test_a_misspelt_key_is_an_error(tree: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match="^deepspeed: ") as told:
        read(tree)
    assert line in str(told.value)
    assert "\n" not in str(told.value)


def test_a_file_and_a_tree_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "zero3.json"
    file.write_text(json.dumps(DOCUMENT))
    assert read(str(file)) == read(DOCUMENT) == DOCUMENT
    file.write_text("{,}")
    with pytest.raises(ValueError, match="is no JSON"):
        read(str(file))
    with pytest.raises(FileNotFoundError, match="no configuration"):
        read(str(tmp_path / "none.json"))


def test_an_older_name_is_not_lost() -> None:
    assert read({"aio": {"thread_count": 2}})["aio"] == {"intra_op_parallelism": 2}


def test_whose_optimizer_steps() -> None:
    offload = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert "optimizer" not in final(config({"zero_optimization": {"stage": 2}})), "the kit's own"
    assert final(config(offload))["optimizer"]["type"] == "AdamW", "DeepSpeed's for the CPU"
    assert "optimizer" not in final(config({**offload, "zero_force_ds_cpu_optimizer": False}))
    free, small = {"name": "schedule_free"}, {"name": "adamw8bit"}
    with pytest.raises(ValueError, match="keeps an average that DeepSpeed's engine does not know"):
        final(config({"zero_optimization": {"stage": 2}}, optimizer=free))
    with pytest.raises(ValueError, match="zero_allow_untested_optimizer"):
        final(config({"zero_optimization": {"stage": 2}}, optimizer=small))
    tested = {"zero_optimization": {"stage": 2}, "zero_allow_untested_optimizer": True}
    assert "optimizer" not in final(config(tested, optimizer=small))
    with pytest.raises(ValueError, match="optimizer.type is Lamb, optimizer.name is schedule_free"):
        final(config({"optimizer": {"type": "Lamb"}}, optimizer=free))
    assert final(config({"optimizer": {"type": "SGD"}}))["optimizer"]["params"] == {"lr": 1e-5}


def test_what_has_no_effect_is_told() -> None:
    told: list[str] = []
    tree = {"activation_checkpointing": {"profile": True}, "zero_optimization": {"stage": 3, "reduce_scatter": True}}
    settings(config(tree), 1, 320, told.append)
    assert any("gradient_checkpointing=true" in line for line in told)
    assert any("stage 3 does not use reduce_scatter" in line for line in told)


def test_auto_that_nothing_says() -> None:
    with pytest.raises(ValueError, match=r'wall_clock_breakdown is "auto", which nothing'):
        final(config({"wall_clock_breakdown": AUTO}))
    with pytest.raises(ValueError, match="needs a network whose width is known"):
        final(config({"zero_optimization": {"reduce_bucket_size": AUTO}}), width=None)
    with pytest.raises(ValueError, match="equal micro-batches"):
        final(config({}, batch=10, micro_batch=3))


def test_apex_is_used_where_it_is_named_only() -> None:
    assert final(config({"amp": {"enabled": AUTO, "opt_level": AUTO}}))["amp"] == {"enabled": False, "opt_level": "O1"}
    assert final(config({"amp": {"enabled": True, "opt_level": "O2"}}))["amp"] == {"enabled": True, "opt_level": "O2"}


def test_the_width_of_networks() -> None:
    import diffusers

    adapter = diffusers.T2IAdapter(3, [8, 16, 24, 24], 1, 8, "full_adapter_xl")
    assert width_of([adapter]) == 24
    assert width_of([object()]) is None


def test_the_keys_are_those_of_deepspeed() -> None:
    """A new DeepSpeed is a red test here, and not a key that is refused, or overlooked."""
    needs("deepspeed", "scale")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    pairs = {
        DeepSpeedZeroConfig: keys.ZERO,
        DeepSpeedZeroOffloadParamConfig: keys.OFFLOAD_PARAM,
        DeepSpeedZeroOffloadOptimizerConfig: keys.OFFLOAD_OPTIMIZER,
        DeepSpeedFP16Config: keys.TREES["fp16"],
        DeepSpeedBF16Config: keys.TREES["bf16"],
    }
    for theirs, own in pairs.items():
        assert {field.alias or name for name, field in theirs.model_fields.items()} == set(own), theirs.__name__


def test_processes_are_joined_in_deepspeeds_precision() -> None:
    assert precise(config({"bf16": {"enabled": True}})).precision == "bf16"
    assert precise(config({"bf16": {"enabled": AUTO}})).precision == "no"
    own = config({"bf16": {"enabled": True}}, precision="no")
    assert precise(own) is own, "where both say something, and not the same, there is an error later"
    with pytest.raises(ValueError, match="bf16.enabled makes precision"):
        derived(own, 1)
    assert derived(precise(config({"bf16": {"enabled": True}})), 1).precision == "bf16"


@pytest.mark.parametrize(("steps", "told"), [(0, 1), (5, 5)])
def test_a_warm_up_of_deepspeed_has_a_step_at_least(steps: int, told: int) -> None:
    """It knows none of no steps."""
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": AUTO}}
    own = final(config({"scheduler": scheduler}, optimizer={"warmup_steps": steps}))
    assert own["scheduler"]["params"]["warmup_num_steps"] == told
