"""torch's elastic launcher, which ends in one line: `python -m diffusion_kit.training.launching.elastic`, as torchrun.

A process that fails has said why; torchrun puts a traceback of its own behind it, in which that line is lost.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """The exit code: of the process that failed first; 1 where a signal ended it."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if "LOGLEVEL" not in os.environ:  # the end is told below; that a process is started again, only by torch
        logging.disable(logging.WARNING if "--max-restarts" in argv else logging.ERROR)
    try:
        run.run(run.parse_args(argv))
    except SignalException as end:
        return ended(f"ended by {signal.Signals(end.sigval).name}", 1)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        killer = signal.Signals(-failure.exitcode).name
        return ended(f"process {rank} was killed by {killer}; --resume goes on from the last checkpoint", 1)
    return 0


def ended(told: str, code: int) -> int:
    print(f"diffusion-kit: {told}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
