"""docs/training.md: the keys that it names are there, no argument of the reference scripts is missing."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from diffusion_kit.cli import _parser
from diffusion_kit.training.config import keys_at, read

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "training.md").read_text()
TABLES = PAGE.split("## Coming from diffusers' scripts")[1]
ROWS = [[cell.strip() for cell in row[1:-1].split("|")] for row in re.findall(r"^\| `.*\|$", TABLES, re.M)]
T2I_ADAPTER = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path adapter_model_name_or_path revision variant
tokenizer_name output_dir cache_dir seed resolution detection_resolution crops_coords_top_left_h
crops_coords_top_left_w train_batch_size num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit
resume_from_checkpoint gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler
lr_warmup_steps lr_num_cycles lr_power use_8bit_adam dataloader_num_workers adam_beta1 adam_beta2 adam_weight_decay
adam_epsilon max_grad_norm push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision
enable_xformers_memory_efficient_attention set_grads_to_none dataset_name dataset_config_name train_data_dir
image_column conditioning_image_column caption_column max_train_samples proportion_empty_prompts validation_prompt
validation_image num_validation_images validation_steps tracker_project_name
"""
OTHERS = """
controlnet_model_name_or_path enable_npu_flash_attention pretrained_decoder_model_name_or_path
pretrained_prior_model_name_or_path snr_gamma use_ema validation_prompts validation_epochs local_rank
"""


def known(key: str) -> bool:
    *nodes, leaf = key.split(".")
    return all(node in keys_at(nodes[:k]) for k, node in enumerate(nodes)) and leaf in keys_at(nodes)


def test_known_tells_keys_from_others():
    assert known("data.sources.image")
    assert known("steps")
    assert not any(known(key) for key in ("data.source.image", "data.sources.picture", "step", "steps.every", "none"))


def test_every_argument_has_a_row_with_a_key_or_a_reason():
    named = {argument for row in ROWS for argument in re.findall(r"`(\w+)`", row[0])}
    assert named == {*T2I_ADAPTER.split(), *OTHERS.split()}
    for argument, key, why in ROWS:
        assert known(key.strip("`")) or (key == "none" and why), f"{argument}: {key}"


def test_every_key_that_the_page_names_is_there():
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)+)", PAGE)
    keys = [key for key in named if key.split(".")[0] in keys_at([])]
    assert len(keys) > 40
    assert not [key for key in keys if not known(key)]


@pytest.mark.parametrize("line", [x for x in re.findall(r"^(diffusion-kit .*|torchrun .*)$", PAGE, re.M)])
def test_every_command_of_the_page_can_be_typed(line):
    words = shlex.split(line)
    options: argparse.Namespace = _parser().parse_args(
        words[words.index("train" if words[0] == "torchrun" else words[1]) :]
    )
    if "config" in vars(options):
        read(ROOT / options.config, options.overrides)


def test_the_example_holds_out_what_is_not_trained_on():
    config = read(ROOT / "examples" / "photo_edges.yaml")
    assert config.data.sources[-1].path == "photos/held_out"
    assert config.data.holdout == 16
