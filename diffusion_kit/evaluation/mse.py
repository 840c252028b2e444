"""Mean squared error, as its metric card has it: `compute` with all values, or `add` and `add_batch` before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


class Mse:
    """Gathers values, each added once, and computes the error of all of them."""

    def __init__(self) -> None:
        self._predictions: list[np.ndarray] = []
        self._references: list[np.ndarray] = []

    def add(self, *, prediction: Any, reference: Any) -> None:
        """One sample: a number, or one for each output.

        Raises:
            ValueError: see `add_batch`.
        """
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Any, references: Any) -> None:
        """Samples (n,), or (n, outputs).

        Raises:
            ValueError: not finite numbers, shapes that differ from each other or from those added before.
        """
        found, true = _numbers("predictions", predictions), _numbers("references", references)
        if found.shape != true.shape:
            raise ValueError(f"predictions have the shape {found.shape}, references {true.shape}; they must be equal")
        if self._predictions and found.shape[1:] != self._predictions[0].shape[1:]:
            raise ValueError(
                f"samples of shape {found.shape[1:]} after samples of shape {self._predictions[0].shape[1:]}"
            )
        self._predictions.append(found)
        self._references.append(true)

    def compute(
        self,
        *,
        predictions: Any = None,
        references: Any = None,
        sample_weight: Sequence[float] | None = None,
        multioutput: str | Sequence[float] = "uniform_average",
        squared: bool = True,
    ) -> dict[str, Any]:
        """The error of what was added and of what is given here; afterwards nothing is kept.

        Args:
            sample_weight: (n,).
            multioutput: "raw_values", one error for each output; "uniform_average"; or weights of the outputs.
            squared: False takes the root of each output's error, before outputs are averaged.

        Returns:
            {"mse": a float, or an array (outputs,) for "raw_values"}.

        Raises:
            ValueError: no values, unknown `multioutput`, weights of another length or of sum 0; see also `add_batch`.
        """
        try:
            if predictions is not None or references is not None:
                self.add_batch(predictions=predictions, references=references)
            if not self._predictions:
                raise ValueError("nothing to compute: give predictions and references, or add them before")
            difference = np.concatenate(self._predictions) - np.concatenate(self._references)
        finally:
            self._predictions, self._references = [], []
        errors = _average("sample_weight", difference**2, sample_weight)
        errors = errors if squared else np.sqrt(errors)
        if isinstance(multioutput, str):
            if multioutput == "raw_values":
                return {"mse": np.atleast_1d(errors)}
            if multioutput != "uniform_average":
                raise ValueError(
                    f"multioutput is {multioutput!r}; it must be 'raw_values', 'uniform_average' or weights"
                )
            return {"mse": float(np.mean(errors))}
        return {"mse": float(_average("multioutput", np.atleast_1d(errors), multioutput))}


def _average(what: str, values: np.ndarray, weights: Any) -> np.ndarray:
    """Over the first axis."""
    if weights is None:
        return values.mean(0)
    weights = _numbers(what, weights)
    if weights.shape != values.shape[:1]:
        raise ValueError(f"{what} has the shape {weights.shape}; it must be {values.shape[:1]}")
    if (weights < 0).any() or not weights.sum():
        raise ValueError(f"{what} must be 0 or more, and some more than 0")
    return np.average(values, 0, weights)


def _numbers(what: str, values: Any) -> np.ndarray:
    try:
        numbers = np.asarray(values, np.float64)
    except (TypeError, ValueError, RuntimeError):  # the last of a tensor with a gradient
        raise ValueError(f"{what} must be numbers, all samples of one shape") from None
    if numbers.ndim not in (1, 2) or not numbers.size or not np.isfinite(numbers).all():
        raise ValueError(f"{what} must be finite numbers of shape (n,) or (n, outputs), one or more")
    return numbers


_shared = Mse()
add, add_batch, compute = _shared.add, _shared.add_batch, _shared.compute
