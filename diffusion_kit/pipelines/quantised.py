"""Linear layers with weights of 8 bits, by torchao."""

from __future__ import annotations

import importlib.util
from typing import Any

from torch import nn

SCHEMES = {  # what a layer computes with: weights of 8 bits, spread out first; or inputs of 8 bits as well
    "int8": "Int8WeightOnlyConfig",
    "int8_dynamic": "Int8DynamicActivationInt8WeightConfig",
}


def check_quantised(scheme: str) -> None:
    """
    Raises:
        ValueError: no such scheme, or torchao is not installed.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"quantised is {scheme!r}; it must be {' or '.join(SCHEMES)}")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError("quantised needs torchao: pip install 'diffusion_kit[quantised]'")


def quantise(pipe: Any, scheme: str) -> None:
    """The linear layers of the network that is denoised with, and of controls that are loaded with it, where they are not
    yet quantised."""
    from torchao import quantization
    from torchao.utils import TorchAOBaseTensor

    config = getattr(quantization, SCHEMES[scheme])()
    for net in (pipe.unet, *pipe.__dict__.get("_base_controls", {}).values()):
        if isinstance(net, nn.Module) and not any(isinstance(weight, TorchAOBaseTensor) for weight in net.parameters()):
            quantization.quantize_(net, config)
