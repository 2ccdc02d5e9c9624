"""Import closures: the modules of this project that a step is made of."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from trainer.contract.canonical import sha256_json


@dataclass(frozen=True)
class Closure:
    """The code of a step.

    Attributes:
        roots: Modules that make its bytes, and those that its recipe names.
        sources: Digest of what each file says, by its path in the project; the files of the roots and of all
            that they import, less the bystanders.
        packages: Version of each distribution that decides bytes there.
    """

    roots: tuple[str, ...]
    sources: Mapping[str, str]
    packages: Mapping[str, str]

    @cached_property
    def digest(self) -> str:
        """Of sources and packages together."""
        return sha256_json({"sources": dict(self.sources), "packages": dict(self.packages)})


def module_name(path: str) -> str:
    """Return the dotted name of a Python file of the project."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def with_parents(names: Iterable[str]) -> set[str]:
    """Return dotted names and those of all packages around them: importing one runs theirs."""
    found: set[str] = set()
    for name in names:
        while name and name not in found:
            found.add(name)
            name = name.rpartition(".")[0]
    return found
