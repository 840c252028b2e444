"""A target without its weights: networks of their configurations alone, whose tensors have shapes and no values."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from diffusers import ModelMixin
from diffusers.utils import logging
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from diffusion_kit.models.sources import locate
from diffusion_kit.models.valueless import converted
from diffusion_kit.training.config import Config
from diffusion_kit.training.targets import make_target
from diffusion_kit.training.targets.target import Target

TOKENS = 77  # of CLIP's texts
NAMES = ("base.model", "base.vae", "base.prior", "init_from")  # of models


class Tokenizer:
    """Says how long texts are; a base without weights has no words either."""

    def __init__(self, folder: str) -> None:
        file = Path(folder) / "tokenizer_config.json"
        said = json.loads(file.read_text()) if file.is_file() else {}
        self.model_max_length = min(int(said.get("model_max_length", TOKENS)), TOKENS)

    def __call__(self, texts: Any, return_tensors: str | None = None, **_: Any) -> Any:
        if return_tensors is None:
            return SimpleNamespace(input_ids=[])
        ids = torch.zeros(len(texts), self.model_max_length, dtype=torch.long)
        return SimpleNamespace(input_ids=ids, attention_mask=torch.ones_like(ids))


def of_diffusers(cls: Any, folder: Any, **more: Any) -> Any:
    config = cls.load_config(folder, subfolder=more.get("subfolder"))
    return typed(cls.from_config(config), more)


def of_transformers(cls: Any, folder: Any, **more: Any) -> Any:
    return typed(cls(cls.config_class.from_pretrained(folder, subfolder=more.get("subfolder") or "")), more)


def typed(net: Any, more: dict[str, Any]) -> Any:
    dtype = more.get("torch_dtype") or more.get("dtype")
    return (net.to(dtype) if isinstance(dtype, torch.dtype) else net).eval()


@contextmanager
def quiet() -> Iterator[None]:
    """Without diffusers' lines and bars."""
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def weightless() -> Iterator[FakeTensorMode]:
    """Inside the block networks are made of their configurations, and tensors have no values (torch's FakeTensorMode):
    what would be computed with them can be counted, and takes no memory."""
    loaders: dict[Any, Any] = {
        ModelMixin: of_diffusers,
        PreTrainedModel: of_transformers,
        PreTrainedTokenizerBase: lambda cls, folder, **_: Tokenizer(folder),
    }
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of how weights are loaded
        stack.enter_context(quiet())
        for cls, loader in loaders.items():
            stack.enter_context(mock.patch.object(cls, "from_pretrained", classmethod(loader)))
        stack.enter_context(mock.patch.object(nn.Module, "_apply", converted))
        stack.enter_context(mock.patch("diffusion_kit.training.bases.fingerprint", return_value=""))  # of no weights
        yield stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))


def check_at_hand(config: Config) -> None:
    """
    Raises:
        FileNotFoundError: a model that is not on this disk.
    """
    for name in NAMES:
        node: Any = config
        for key in name.split("."):
            node = getattr(node, key)
        if node is not None and not isinstance(locate(node), Path):
            raise FileNotFoundError(
                f"{name} {node} is not on this disk: a plan needs its folder, of which the config.json files are enough"
            )


def make_weightless(config: Config) -> Target:
    """The target of a configuration, inside of `weightless`.

    Raises:
        FileNotFoundError, ValueError: no such base, or what does not fit together, in one line.
    """
    check_at_hand(config)
    local = config.base.model_copy(update={"variant": None, "revision": None})
    here = {"base": local, "deepspeed": None}  # however they will be spread, here they are in one process
    return make_target(config.model_copy(update=here), torch.device("cpu"))
