"""Whether the code that a process works with is still the code that it read.

Steps that run in the orchestrator import from the checkout, some of it late and in worker processes. An edit
meanwhile could come between the code that is hashed and the code that runs, so whoever publishes looks again.
Jobs run from a snapshot: no edit reaches them.
"""

from collections.abc import Iterable

from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.errors import DataError

_SHOWN = 5


class SourcesChangedError(DataError):
    """Source files were saved while a step worked with them; the message names them."""


def loaded_here(closure: Closure) -> list[str]:
    """Return the files of a step's code that run in the orchestrator; none where a job does all the work.

    The orchestrator loads its own package, and of the trainer the contract alone.
    """
    own = [path for path in closure.sources if path.startswith("vpmoe_assets/")]
    return own and [*own, *(path for path in closure.sources if path.startswith("trainer/contract/"))]


def require_unchanged(tree: SourceTree, paths: Iterable[str]) -> None:
    """Refuse what was made with files that are not, or may not have stayed, as they were read.

    Raises:
        SourcesChangedError: Names the files.
    """
    if changed := tree.changed(paths):
        more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
        raise SourcesChangedError(
            f"{', '.join(changed[:_SHOWN])}{more}: saved while this process worked with it, so what was made "
            "may be of the code before or after. Nothing was published or kept of it. Run it again."
        )
