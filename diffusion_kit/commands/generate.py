"""`diffusion-kit generate`: pictures from prompts, controls and pictures, and the same again from a picture's recipe."""

from __future__ import annotations

import argparse
from functools import partial

from diffusion_kit.recipes import ForeignRecipe, Recipe, read

from . import workers
from .console import note
from .execution import add_execution
from .job_file import in_line
from .jobs import OPTIONS
from .outputs import is_chosen, output_files, saved
from .plan import Planned, files_read, plan_of_call, plan_of_file
from .remembering import add_history, remembering


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?")
    add("--prompts", metavar="PATH", help="a folder of .txt files, or a text file with a prompt a line")
    add(
        "--jobs",
        metavar="FILE",
        help="a JSON object a line, with the options of its pictures; goes on where it was stopped",
    )
    add("--again", metavar="PICTURE", help="make this picture again; every option that is given changes its recipe")
    add("--model", help="'default' or 'default-kandinsky' (embedded), a folder, a .safetensors file or a hub id")
    add("--negative-prompt", metavar="TEXT", help="what the picture should not be")
    add(
        "--control",
        action="append",
        default=[],
        metavar=f"KIND=IMAGE[,{'=..,'.join(OPTIONS)}=..]",
        help="repeatable; KIND is a control that comes with the model (canny), or an adapter's folder, file or hub id; "
        "a named kind runs its own detector on IMAGE unless detect=none; detect=NAME or NAME:MODEL runs another; "
        "IMAGE may be a folder",
    )
    add("--image", metavar="FILE", help="picture to start from, or a folder of them")
    add(
        "--strength",
        type=float,
        help="share of the steps that --image leaves to the model, 0 to 1; by default 0.3 for SDXL, 0.8 for Stable "
        "Diffusion, and all of them with --mask",
    )
    add("--mask", metavar="FILE", help="greyscale, white is repainted; or a folder of masks")
    add(
        "--fit", help="how pictures of another shape are brought to the output's: cover (the default), contain, stretch"
    )
    add("--steps", type=int, help="by default what the model's card says, else 30")
    add(
        "--guidance-scale",
        type=float,
        help="by default what the model's card says, else 5 for SDXL, 7.5 for Stable Diffusion",
    )
    add("--seed", type=int, help="random, and printed, if not given")
    add("--size", metavar="WxH", help="by default the model's area in the shape of the first picture given")
    add("--count", type=int, default=1, help="pictures of each prompt, with the seeds SEED, SEED + 1, ...")
    add("--out", metavar="FILE", help="PNG, JPEG or WEBP, numbered with --count; or a folder")
    add("--grid", metavar="FILE", help="all pictures side by side in one file too")
    add("--embed-controls", action="store_true", help="keep the pictures given in the recipe, not only their hashes")
    add("--scheduler", metavar="CLASS", help="a diffusers scheduler, for example EulerAncestralDiscreteScheduler")
    add_execution(parser)
    add_history(parser)
    workers.add_arguments(parser, "the lines of --jobs")
    add(
        "--deepspeed",
        metavar="FILE",
        help="spread the network over the processes, as this configuration of ZeRO stage 3 says; with --jobs",
    )


def run(options: argparse.Namespace) -> None:
    """Checks what can be checked, then loads, makes and saves."""
    from . import processes

    workers.check(options)
    if options.on is not None:
        on_workers(options)
    elif options.deepspeed is not None or processes.several():
        processes.run(options)
    else:
        alone(options)


def alone(options: argparse.Namespace) -> None:
    """In this process."""
    old = read(options.again) if options.again else None
    if isinstance(old, ForeignRecipe):
        _note_of_foreign(old, options)
    own = old if isinstance(old, Recipe) else None
    plan = planned(options, old)
    from diffusion_kit.making import loading, pictures

    from . import shares

    taken = [*(each.file for each in plan), *files_read(options, plan)]
    grid = output_files(options.grid, [""], taken=taken) if options.grid else []
    pipe = loading.load_pipeline(plan[0].settings, note, debug=options.debug)
    if own is not None:
        _note_of_versions(own)
    maker = shares.Maker(pipe, options.jobs, [*taken, *grid])
    found = [(each, *maker.recipe(each)) for each in plan]
    wanted = [(each, recipe) for each, recipe, is_there in found if not is_there]
    note_there(len(plan) - len(wanted), len(plan))
    made = []
    with pipe.sharing(), remembering(options) as recorder:
        for each, recipe in wanted:
            picture, file = maker.make(each, recipe)
            print(shares.told(file, recipe))
            recorder.picture(file, recipe)
            made += [picture] if grid else []
    for file in grid:
        columns = options.count if len(plan) > options.count > 1 else None
        print(saved(pictures.grid_of(made, columns=columns), file, chosen=is_chosen(options.grid)))


def planned(options: argparse.Namespace, old: Recipe | ForeignRecipe | None = None) -> list[Planned]:
    """The pictures that are asked for, checked as far as that goes without a model."""
    plan = plan_of_file(options) if options.jobs else plan_of_call(options, old)
    from diffusion_kit.making.check import check

    for each in plan:
        with in_line(options.jobs, each.line):
            check(each.job, each.settings, each.seed)
    return plan


def note_there(count: int, of: int) -> None:
    if count:
        note(f"{count} of {of} pictures are there")


def on_workers(options: argparse.Namespace) -> None:
    """By workers of Ray."""
    if not options.jobs:
        raise ValueError("--on ray shares the lines of a job file: give --jobs")
    from . import shares

    plan = planned(options)
    ready = partial(shares.ready, plan[0].settings, options.jobs, options.debug)
    gpu = options.device != "cpu"
    with remembering(options) as recorder:
        report = shares.Report(options.jobs, {each.file for each in plan if each.file.exists()}, recorder)
        for each, found in zip(plan, workers.shared(plan, ready, options.workers, gpu=gpu), strict=True):
            report.add(each, found)
    note_there(report.there, len(plan))
    if report.failures:
        raise SystemExit(workers.code_of(report.failures))


def _note_of_foreign(old: ForeignRecipe, options: argparse.Namespace) -> None:
    if options.model is None:
        model = f" with the model {old.model}" if old.model else ""
        raise ValueError(f"{options.again} was made by {old.software}{model}: give --model, it is not looked for")
    lacks = [name for name in ("prompt", "seed", "steps", "guidance_scale") if getattr(old, name) is None]
    lost = [f"its sampler ({old.sampler}) is not taken over" if old.sampler else "its sampler is not known"]
    lost += [f"it does not say {', '.join(lacks)}"] if lacks else []
    note(f"{options.again} was made by {old.software}: {'; '.join(lost)}")


def _note_of_versions(old: Recipe) -> None:
    from diffusion_kit.making.pictures import versions

    now = versions()
    others = [f"{name} {value} (now {now.get(name)})" for name, value in old.versions.items() if now.get(name) != value]
    if others:
        note(f"made with {', '.join(others)}: pixels may differ")
