"""What was made and trained: runs with their metrics, pictures with their controls, and evaluations, in a database.

`Ledger` opens it; `runs`, `pictures` and `evaluations` read and write its rows; `Recorder` writes for those who must not be
stopped by a database; `rebuild` makes it again from the files that it tells of.
"""

from .database import Ledger
from .recorder import Recorder

__all__ = ["Ledger", "Recorder"]
