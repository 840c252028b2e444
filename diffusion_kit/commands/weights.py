"""`diffusion-kit weights`: controls and adapters in files that other programs read; results of a run's checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION", dest="action")
    for name, (_, line) in ACTIONS.items():
        action = actions.add_parser(name, help=line, description=line, allow_abbrev=False)
        action.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        (_export_arguments if name == "export" else _consolidate_arguments)(action)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a file or a hub id of the control")
    parser.add_argument(
        "--layout",
        metavar="LAYOUT",
        help="tencentarc, of a T2I-Adapter; controlnet, of a ControlNet; control-lora, of a Control-LoRA or a ControlNet",
    )
    parser.add_argument(
        "--base", metavar="MODEL", help="the model that a ControlNet was made for, to make a Control-LoRA of it"
    )
    parser.add_argument("--rank", type=int, metavar="N", help="of the Control-LoRA that is made of a ControlNet; 64")
    parser.add_argument("--dtype", choices=("fp32", "fp16"), default="fp32", help="of the numbers in the file; fp32")
    parser.add_argument("--out", metavar="FILE", help="the .safetensors file to write; SOURCE-LAYOUT.safetensors here")
    parser.add_argument("--overwrite", action="store_true", help="write it even where a file of that name is")


def _consolidate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="the folder of a training, its `output`")
    parser.add_argument(
        "--checkpoint", metavar="WHICH", default="last", help="last (the default), best by fidelity, or a step's number"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the numbers that are written; fp32")
    parser.add_argument("--no-average", action="store_true", help="the weights themselves where the run averages them")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="a new folder")


def run(options: argparse.Namespace) -> None:
    ACTIONS[options.action][0](options)


def consolidate(options: argparse.Namespace) -> None:
    """Writes what diffusers loads of a checkpoint.

    Raises:
        FileNotFoundError, ValueError: no such run or checkpoint, or a place that cannot be written.
    """
    import torch

    from diffusion_kit.commands.outputs import writable
    from diffusion_kit.training.consolidate import consolidate as write

    out = Path(options.out)
    if out.exists():
        raise ValueError(f"--out {out} is there already: give a new folder")
    writable([out])
    dtype = getattr(torch, DTYPES[options.dtype])
    made = write(Path(options.run), out, which=options.checkpoint, averaged=not options.no_average, dtype=dtype)
    print(f"{out} is of {made}")


def export(options: argparse.Namespace) -> None:
    """Writes a control in another layout and says what was written.

    Raises:
        FileNotFoundError: no such model.
        ValueError: what the layout does not hold; a file that is there already or cannot be written.
    """
    import torch

    from diffusion_kit.commands.outputs import writable
    from diffusion_kit.models.formats import describe
    from diffusion_kit.training import export as layouts

    layout = options.layout
    if layout is None:
        raise ValueError(f"weights export needs --layout: {', '.join(layouts.LAYOUTS)}")
    name = Path(options.source).resolve().name.removesuffix(".safetensors")
    file = Path(options.out or f"{name}-{layout}.safetensors")
    if file.suffix != ".safetensors":
        raise ValueError(f"--out {file} must end in .safetensors")
    writable([file])
    if file.exists() and not options.overwrite:
        raise ValueError(f"{file} is there already: give another --out, or --overwrite")
    dtype = torch.float16 if options.dtype == "fp16" else torch.float32
    tensors, loss = layouts.export(options.source, layout, base=options.base, rank=options.rank, dtype=dtype)
    layouts.save(tensors, file, layout=layout)
    print(f"{file}: {describe(file)}")
    if loss is not None:
        print(
            f"relative error of the change from the base: {loss.error:.4f}; at most {loss.worst:.4f}, in {loss.layer}"
        )


ACTIONS = {
    "export": (export, "write a control in another program's layout"),
    "consolidate": (consolidate, "write what diffusers loads of a training's checkpoint"),
}
