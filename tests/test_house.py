"""The house: directions of imports, public names, signatures of the peer-named classes."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path

import diffusers
import pytest

import diffusion_kit

ROOT = Path(diffusion_kit.__file__).parent
ORDER = [
    "cli",
    "commands",
    "studio",
    "benchmark",
    "training",
    "evaluation",
    "ledger",
    "making",
    "pipelines",
    "adapters",
    "models",
    "sampling",
    "recipes",
]  # a room imports from those after it
PEER_NAMED = sorted(name for name in diffusion_kit.__all__ if name.startswith("StableDiffusion"))


def imports(file: Path) -> set[str]:
    """Modules that a file imports, relative ones spelled out."""
    package = [ROOT.name, *file.relative_to(ROOT).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            found.add(".".join([*base, *(node.module or "").split(".")]).rstrip("."))
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("file", sorted(ROOT.rglob("*.py")), ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_run_downwards(file: Path) -> None:
    own = room(".".join(file.relative_to(ROOT.parent).with_suffix("").parts))
    for module in imports(file):
        if own == "sampling":
            assert module.split(".")[0] not in ("diffusers", "transformers", "accelerate", "peft")
        if module.startswith("diffusion_kit.") and own in ORDER and room(module) in ORDER:
            assert ORDER.index(room(module)) >= ORDER.index(own), f"{file} imports {module}"
        assert module.split(".")[0] not in ("pipelines", "adapters"), "import diffusion_kit.pipelines instead"


@pytest.mark.parametrize("name", PEER_NAMED)
def test_peer_named_classes_have_the_peers_signatures(name: str) -> None:
    ours, theirs = getattr(diffusion_kit, name), getattr(diffusers, name)
    assert not issubclass(ours, theirs)
    assert issubclass(ours, diffusers.DiffusionPipeline)
    call, peer_call = (inspect.signature(cls.__call__).parameters for cls in (ours, theirs))
    listed = {key: value.default for key, value in peer_call.items() if key not in ("self", "kwargs")}
    assert list(call) == ["self", *listed]
    assert {key: call[key].default for key in listed} == listed
    init, peer_init = (inspect.signature(cls.__init__).parameters for cls in (ours, theirs))
    assert set(peer_init) <= set(init)


def test_public_names_can_all_be_imported() -> None:
    for name in diffusion_kit.__all__:
        assert getattr(diffusion_kit, name).__name__ == name


def test_model_classes_and_schedulers_are_handed_on_and_pipelines_are_not() -> None:
    for name in ("T2IAdapter", "MultiAdapter", "ControlNetModel", "EulerAncestralDiscreteScheduler", "AutoencoderKL"):
        assert getattr(diffusion_kit, name) is getattr(diffusers, name)
    assert diffusion_kit.DiffusionPipeline is diffusers.DiffusionPipeline
    with pytest.raises(AttributeError, match="no 'FluxPipeline'"):
        _ = diffusion_kit.FluxPipeline
    from diffusion_kit.models.attention_processor import AttnProcessor2_0
    from diffusion_kit.utils import make_image_grid

    assert make_image_grid is diffusers.utils.make_image_grid
    assert AttnProcessor2_0 is diffusers.models.attention_processor.AttnProcessor2_0


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = "import sys, diffusion_kit; print(sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_links_at_the_root_lead_to_the_rooms() -> None:
    for name in ("pipelines", "adapters"):
        link = ROOT.parent / name
        if link.exists():  # an installed package has no root
            assert link.resolve() == ROOT / name


@pytest.mark.parametrize("file", sorted(ROOT.parent.glob("benchmarks/*.py")), ids=lambda file: file.stem)
def test_no_script_has_the_name_of_a_package(file: Path) -> None:
    """A script's folder is the first that is searched: torch, asking for `cuda`, once found a benchmark."""
    elsewhere = [folder for folder in sys.path if Path(folder).resolve() != file.parent]  # where other tests left it
    assert PathFinder.find_spec(file.stem, elsewhere) is None
