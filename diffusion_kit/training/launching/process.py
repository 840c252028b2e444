"""What is started: one description, which is run or printed."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """
    Attributes:
        argv: the command line.
        environment: what is put into its environment.
        files: texts that are written before.
    """

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[Path, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """As a shell takes it."""
        texts = [f"# {path}\n{text.rstrip()}\n" for path, text in self.files.items()]
        own = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return "\n".join([*texts, " ".join([*own, shlex.join(self.argv)])])

    def run(self) -> int:
        """Its exit code.

        Raises:
            FileNotFoundError: the program is not installed.
        """
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        try:
            return subprocess.run(self.argv, env={**os.environ, **self.environment}, check=False).returncode
        except FileNotFoundError:
            raise FileNotFoundError(f"{self.argv[0]} is not here: install it, or look with --dry-run") from None
