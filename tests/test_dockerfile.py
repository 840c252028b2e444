"""The Dockerfile, as far as it can be checked without Docker."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from conftest import needs

from diffusion_kit.training.launching.config import KubernetesConfig

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, str]]:
    """Instruction and its arguments, with lines that go on joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined.splitlines() if line.strip()]


def test_a_parser_reads_the_same() -> None:
    parse = needs("dockerfile_parse")
    own = parse.DockerfileParser(str(ROOT))
    found = [(one["instruction"], one["value"]) for one in own.structure if one["instruction"] != "COMMENT"]
    assert [name for name, _ in found] == [name for name, _ in instructions()]
    assert own.baseimage == "python:3.11-slim-bookworm"


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [shlex.split(text)[:-1] for name, text in instructions() if name == "COPY"]
    sources = {source for one in copied for source in one}
    assert sources == kept
    assert all((ROOT / source).exists() for source in sources)
    assert {"pyproject.toml", "README.md", "LICENSE", "NOTICE"} <= sources, "which pyproject.toml names"


def test_commands_are_a_shells() -> None:
    for _, text in (one for one in instructions() if one[0] == "RUN"):
        assert subprocess.run(["sh", "-n", "-c", text], check=False).returncode == 0, text


def test_the_user_is_the_one_that_kubernetes_is_told() -> None:
    texts = dict(instructions())
    assert texts["USER"] == "kit"
    created = next(text for name, text in instructions() if name == "RUN" and "useradd" in text)
    assert f"--uid {KubernetesConfig().group} kit" in created
    assert texts["WORKDIR"] == KubernetesConfig().mount
    for value in (
        part.split("=")[1] for part in texts["ENV"].split() if part.startswith(("HF_", "DIFFUSION", "TORCH"))
    ):
        assert value.startswith("/cache/"), "which the user may write"
