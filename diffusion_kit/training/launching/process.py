"""What is started: one description, which is run or printed."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn


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

    def run(self) -> NoReturn:
        """Becomes it: so signals are heard by the launcher alone, and its exit code is that of this process.

        Raises:
            FileNotFoundError: the program is not installed.
        """
        for path, text in self.files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        if shutil.which(self.argv[0]) is None:
            raise FileNotFoundError(f"{self.argv[0]} is not here: install it, or look with --dry-run")
        sys.stdout.flush()
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # which Python ignores, and others do not expect to be
        os.execvpe(self.argv[0], self.argv, {**os.environ, **self.environment})
