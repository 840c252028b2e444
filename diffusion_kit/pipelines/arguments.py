"""Call arguments: one list for a family, a line for each peer-named class, and errors that name the nearest argument."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

# Accepted by every class, whether its signature lists them or not: the peer's old callback, and what the kit adds.
EVERYWHERE = ("callback", "callback_steps", "controls", "fit", "guidance_interval", "prompt_syntax")


def signature_of(call: type, names: Sequence[str], defaults: Mapping[str, Any]) -> inspect.Signature:
    """Signature (self, names...) with the defaults of the dataclass `call`, unless `defaults` has another."""
    own = {field.name: field.default for field in dataclasses.fields(call)}
    for field in dataclasses.fields(call):
        if field.default_factory is not dataclasses.MISSING:
            own[field.name] = field.default_factory()
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, default=defaults.get(name, own.get(name))) for name in names]
    return inspect.Signature([inspect.Parameter("self", kind), *parameters])


def bind(signature: inspect.Signature, who: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Names and values of a call, defaults filled in.

    Raises:
        TypeError: an argument that the class does not take, with the nearest that it takes.
    """
    known = list(signature.parameters)[1:]
    unknown = [name for name in kwargs if name not in known and name not in EVERYWHERE]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [*known, *EVERYWHERE], 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise TypeError(f"{who} takes no argument {unknown[0]!r}{hint}")
    more = {name: value for name, value in kwargs.items() if name not in known}
    bound = signature.bind(None, *args, **{name: value for name, value in kwargs.items() if name in known})
    bound.apply_defaults()
    values = dict(bound.arguments, **more)
    del values["self"]
    return values
