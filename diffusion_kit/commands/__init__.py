"""The commands of `diffusion-kit`: each module has `add_arguments(parser)` and `run(options)`.

Nothing here imports torch before a command runs, so that `--help` answers at once.
"""
