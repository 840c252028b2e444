"""The `diffusion-kit` command: its parser, its errors of one line and its exit codes."""

from __future__ import annotations

import argparse
import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

from diffusion_kit import __version__

BAD_INPUT, FAILURE = 2, 1
COMMANDS = {  # name: line of help, and what it does
    "generate": (
        "make pictures from prompts",
        "Text-to-image; with --image image-to-image; with --mask too, inpainting. Controls work in all.",
    ),
    "detect": ("make control images from photos", "Runs a detector on images: edges, lines, depth, poses and more."),
    "evaluate": (
        "measure how faithfully a control is followed",
        "Makes pictures with and without a control, extracts its condition from them again and compares.",
    ),
    "show": ("print the recipe of a picture", "Prints what a picture was made from, as its file says."),
    "train": (
        "train a control, or a base",
        "What is trained, on what and how, stands in one configuration; KEY=VALUE changes it.",
    ),
    "launch": (
        "train in several processes, here or on a cluster",
        "Starts a training by torch's launcher, DeepSpeed's, MPI's, SLURM or Kubernetes; --dry-run prints what is started.",
    ),
    "runs": (
        "list trainings, and compare two",
        "Trainings that the history knows: their state and last figures; of two, which settings differ.",
    ),
    "history": (
        "search the pictures that were made",
        "Pictures by prompt, control and model, as the kit wrote them down; --rebuild makes the history again from files.",
    ),
    "studio": (
        "draw, generate, watch runs and look back, in a browser",
        "Web pages and an HTTP interface over one queue and one model, for this machine; or a dashboard over any table.",
    ),
    "models": ("say what a model is", "What is embedded; what a folder, a file or a hub id is."),
    "cache": (
        "prepare a training's latents, texts and conditions",
        "Makes what a training need not compute again in every epoch; goes on where it was stopped.",
    ),
    "data": (
        "check, export and import training data",
        "Looks through training data; moves it between folders and tars.",
    ),
    "weights": (
        "write controls for other programs, or of a checkpoint",
        "Writes a control in another program's layout; or of a training's checkpoint what diffusers loads.",
    ),
    "bench": (
        "time the kit's engines beside diffusers",
        "Levels and engines beside diffusers and other runtimes, with random weights, on this machine.",
    ),
    "doctor": ("say what is installed and what is missing", "Versions, devices, optional parts and how to get them."),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0; 2 for bad input; 1 for a failure. Errors are one line, with a traceback only under --debug."""
    options = _parser().parse_args(argv)
    from diffusion_kit.commands.console import show_warnings

    show_warnings(options.debug)
    try:
        importlib.import_module(f"diffusion_kit.commands.{options.command}").run(options)
    except KeyboardInterrupt:
        return _complain(options, "interrupted", FAILURE)
    except BrokenPipeError:
        return FAILURE
    except (ValueError, TypeError, FileNotFoundError, PermissionError) as error:
        return _complain(options, str(error), BAD_INPUT)
    except ImportError as error:  # a part that is not installed: the line says how to get it
        return _complain(options, str(error), FAILURE)
    except Exception as error:
        return _complain(options, f"{type(error).__name__}: {error}", FAILURE)
    return 0


def _complain(options: argparse.Namespace, message: str, code: int) -> int:
    from diffusion_kit.commands.console import note

    if options.debug:
        traceback.print_exc()
    note(message)
    return code


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line, with the nearest argument."""

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        if unknown:
            known = [name for action in self._actions for name in action.option_strings]
            near = difflib.get_close_matches(unknown[1].partition("=")[0], known, 1, 0.5)
            message = f"no argument {unknown[1]}" + (f"; did you mean {near[0]}?" if near else "")
        self.exit(BAD_INPUT, f"{self.prog}: {message}; {self.prog} --help lists what there is\n")

    def parse_known_args(self, args=None, namespace=None):
        """Unknown arguments are told by the command's own parser, which knows what is near; KEY=VALUE stands anywhere."""
        namespace, rest = super().parse_known_args(args, namespace)
        if hasattr(namespace, "overrides"):
            more = [part for part in rest if "=" in part and not part.startswith("-")]
            namespace.overrides, rest = namespace.overrides + more, [part for part in rest if part not in more]
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        return namespace, rest


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="diffusion-kit", description="Pictures from diffusion models under control.")
    parser.add_argument("--version", action="version", version=f"diffusion-kit {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command", parser_class=_Parser)
    for name, (line, description) in COMMANDS.items():
        command = commands.add_parser(name, help=line, description=description, allow_abbrev=False)
        importlib.import_module(f"diffusion_kit.commands.{name}").add_arguments(command)
        command.add_argument("--debug", action="store_true", help="show tracebacks and all warnings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
