"""What an engine that makes copies of weights has to know of them: whether they changed, which they are, where to lay the
originals meanwhile."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Hashable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .pages import FilePages

PLAIN = (bool, int, float, str, torch.dtype)
OF_LORAS = ("scaling", "_active_adapter", "merged_adapters", "_disable_adapters")  # what peft sets on a layer
IDLE = {"extra_repr", "to", "cuda", "npu", "xpu", "mlu", "sdaa", "musa", "neuron"}  # methods that compute nothing
PLACE = "name_or_path"  # what transformers calls where a network came from
LIBRARIES = ("diffusers", "diffusion_kit", "transformers")
SAMPLES = 8  # of a weight
SMALL = 2**14  # bytes of a weight, below which a file of its own gains nothing


def state(nets: Iterable[nn.Module], *, moved: bool = True) -> Hashable:
    """Differs where anybody has put other weights into a module, edited them in place, or changed what is added to them;
    without `moved` not where they only lie elsewhere than before."""
    modules = [module for net in nets for module in net.modules()]
    return tuple((type(own).__qualname__, *_versions(own, moved), *_set_on(own)) for own in modules)


def places(nets: Iterable[nn.Module]) -> Hashable:
    """Differs where a weight lies elsewhere in memory than before."""
    return tuple(value.data_ptr() for net in nets for module in net.modules() for value in _own(module))


def settings(net: nn.Module) -> Hashable:
    """What is set on a network, which is no tensor: a graph of it has it as a constant."""
    return tuple(tuple(_set_on(own)) for own in net.modules())


def meddled(nets: Iterable[nn.Module]) -> str | None:
    """What was done to a part of a network that a copy of it would not do, or would do for ever; None if nothing."""
    return next((what for what, _ in meddling(nets)), None)


def meddling(nets: Iterable[nn.Module]) -> Iterator[tuple[str, Any]]:
    """All that was done, and who does it."""
    for module in (module for net in nets for module in net.modules()):
        held = vars(module)
        for hook in filter(_foreign, (*module._forward_hooks.values(), *module._forward_pre_hooks.values())):
            yield "a part of it has hooks", hook
        if (name := replaced(module)) is not None:
            yield f"the {name} of a part of it was replaced", held[name]
        processor = held.get("processor")
        if processor is not None and _foreign(type(processor)):
            yield "it has attention processors of its own", processor


def replaced(module: nn.Module) -> str | None:
    """The method of a module in whose place somebody has put another function; None if there is none. accelerate's hooks,
    which bring weights and leave the result as it is, do not count, nor does the class's own that was put back."""
    held, cls = vars(module), type(module)
    for name, value in held.items():
        own = getattr(cls, name, None) if callable(value) and name not in IDLE else None
        hook = name == "forward" and "_hf_hook" in held
        if callable(own) and getattr(value, "__func__", None) is not own and not hook:
            return name
    return None


def elsewhere(nets: Iterable[nn.Module]) -> bool:
    """Whether weights come to the network only while it runs (accelerate's sequential offload)."""
    return any(value.is_meta for net in nets for module in net.modules() for value in _held(module))


def _foreign(function: Any) -> bool:
    """Whether a function or class is none of the libraries that networks are made of, whose own a conversion follows:
    transformers takes hidden states by hooks."""
    return str(getattr(function, "__module__", "")).partition(".")[0] not in LIBRARIES


@torch.no_grad()
def sampled(nets: Iterable[nn.Module]) -> list[int]:
    """Sums of some of the bits of every weight: who edits `.data` leaves no trace in `state`. Of weights that lie in a file
    no page stays in memory, although the system brings many where one is looked at; packed ones are not looked at."""
    pages = FilePages()
    return [_some_bits(value, pages) for net in nets for module in net.modules() for value in _held(module)]


def _some_bits(value: Tensor, pages: FilePages) -> int:
    if value.is_meta:
        return 0
    flat = value.detach().flatten()
    found = hash(flat[:: max(1, flat.numel() // SAMPLES)].double().sum().item())
    if value.device.type == "cpu":
        pages.forget(value)
    return found


def _own(module: nn.Module) -> Iterator[Tensor]:
    held = (*module._parameters.values(), *module._buffers.values())
    return (part for value in held if value is not None for part in plain_parts(value))


def _held(module: nn.Module) -> Iterator[Tensor]:
    """The same without a look at it: a packed layer stays packed, and its weight is left out."""
    held = (*vars(module)["_parameters"].values(), *vars(module)["_buffers"].values())
    return (part for value in held if value is not None for part in plain_parts(value))


def plain_parts(value: Any) -> Iterator[Tensor]:
    """The tensors that a tensor is made of: one, or of a quantised one its numbers and scales."""
    if not is_traceable_wrapper_subclass(value):
        yield value
        return
    for name in value.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(value, name))


def _versions(module: nn.Module, moved: bool) -> Iterator[Hashable]:
    """Of each tensor; of a weight in a layout of its own the number of that layout (see `models.packed`), since to look at
    the weight would end it."""
    for part in _held(module):
        yield (
            None if part.is_inference() else part._version,
            part.dtype,
            *((part.data_ptr(), part.device) if moved else ()),
        )
    if "_packed" in vars(module):
        yield vars(module)["_packed"].number


def _set_on(module: nn.Module) -> Iterator[Hashable]:
    """Numbers and words that are set on a module, such as a scale, how a convolution pads, FreeU's, and what peft sets."""
    held = vars(module)
    yield from ((name, own) for name, own in held.items() if name[0] != "_" and name != PLACE and _is_plain(own))
    yield from ((name, str(held[name])) for name in OF_LORAS if held.get(name) is not None)


def _is_plain(value: Any) -> bool:
    return type(value) in PLAIN or (type(value) is tuple and all(type(part) in PLAIN for part in value))


def content(nets: Iterable[nn.Module]) -> str:
    """A hash of what the modules are and of their weights: the same on every machine and in every run."""
    digest = hashlib.sha256()
    for net in nets:
        for name, module in net.named_modules():
            digest.update(f"{name}{sorted(map(str, _set_on(module)))}".encode())
            for value in _own(module):
                digest.update(f"{value.dtype}{tuple(value.shape)}".encode())
                digest.update(content_of(value))
        digest.update(f"{net}{_settings(net)}".encode())  # last: packed layers that were looked at are plain ones
    return digest.hexdigest()


def _settings(net: nn.Module) -> str:
    """Of a network's configuration what is about the network: no places, no versions."""
    config: Any = getattr(net, "config", {})
    pairs = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    own = {name: value for name, value in pairs.items() if name[0] != "_" and "version" not in name}
    return json.dumps(own, sort_keys=True, default=str)


def park(nets: Iterable[nn.Module], folder: Path) -> None:
    """Lays weights that nobody else holds into files without names, from which the system reads what is looked at: they
    stay as they are for whoever uses them, and take no memory until then. Each has a file, and so a storage, of its own, by
    which libraries tell weights apart. Those that are as in the file from which they were loaded stay in that."""
    pages = FilePages()
    held = (p for net in nets for p in net.parameters() if p.device.type == "cpu")
    found = {id(p): p for p in held if _alone(p) and not pages.hold_unchanged(p)}
    with torch.inference_mode(False):
        for parameter in found.values():
            parameter.data = _in_a_file(parameter, folder)
            vars(parameter)["_parked_at"] = parameter.data_ptr()


def _in_a_file(value: Tensor, folder: Path) -> Tensor:
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        file.write(content_of(value))
        file.flush()
        raw = torch.from_file(file.name, shared=False, size=value.nbytes, dtype=torch.uint8)
    return raw.view(value.dtype).view(value.shape)


def is_parked(parameter: Any) -> bool:
    """Whether it lies in a file."""
    return getattr(parameter, "_parked_at", None) == parameter.data_ptr()


def content_of(value: Tensor) -> Any:
    """Its memory, of a CPU not a copy."""
    return value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def _alone(parameter: Any) -> bool:
    """Whether a weight fills a storage that is no one else's and not a file's already. Small ones do not matter."""
    if is_traceable_wrapper_subclass(parameter) or parameter.is_inference() or parameter.nbytes < SMALL:
        return False
    storage = parameter.untyped_storage()
    whole = parameter.nbytes == storage.nbytes() and torch._C._storage_Use_Count(storage._cdata) <= 2
    return whole and not is_parked(parameter)
