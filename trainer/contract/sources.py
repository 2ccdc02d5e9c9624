"""Where the code of a job comes from: the trainer that was meant is the one that runs.

Whoever starts a job may lay out the sources that it is to run from and name their directory in
`VPMOE_SOURCES`. Python finds packages in many ways (working directory, `PYTHONPATH`, `.pth` files of editable
installs, hooks of site packages), and any of them may put another checkout first. So the job looks where it
was loaded from before it does anything. Without the variable, as when it is started by hand, it runs from
wherever it was found.
"""

import os
from collections.abc import Mapping

SOURCES_ENV = "VPMOE_SOURCES"


class ForeignSourcesError(RuntimeError):
    """The code that was loaded is not the code that was meant; the message names both places."""


def require_meant(package: str, file: str | None, environment: Mapping[str, str] | None = None) -> None:
    """Refuse to run where `VPMOE_SOURCES` names a directory and a package was loaded from elsewhere.

    Args:
        package: Name of the package.
        file: Its `__file__`.
        environment: In place of the process's own.

    Raises:
        ForeignSourcesError: It was.
    """
    meant = (os.environ if environment is None else environment).get(SOURCES_ENV)
    if not meant:
        return
    expected = os.path.join(os.path.realpath(meant), *package.split("."), "__init__.py")
    if file is None or os.path.realpath(file) != expected:
        raise ForeignSourcesError(
            f"{package} was loaded from {file}, and {SOURCES_ENV} says that this job runs from {meant}. "
            "Something puts another copy first: look at PYTHONPATH, at .pth files and at sitecustomize in "
            f"site-packages. To run that copy by hand, unset {SOURCES_ENV}."
        )
