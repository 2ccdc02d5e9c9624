"""Words of a recipe that are names of modules, found by listing a package, not by importing what is in it.

`training.backend` names a module of `trainer.model.backends`, `objective` one of `trainer.losses`. There is
no table of them: a new module is a new word, and it is imported when a recipe uses it. Sub-packages and names
with an underscore in front are no words.
"""

from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

BACKENDS = "trainer.model.backends"
OBJECTIVES = "trainer.losses"


def words(package: str) -> dict[str, Path]:
    """List the words that a package has.

    Args:
        package: Its dotted name; its `__init__` is imported, which holds a docstring only.

    Returns:
        The file of each word, by word, sorted.
    """
    found: dict[str, Path] = {}
    for folder in import_module(package).__path__:
        for module in iter_modules([folder]):
            if not module.ispkg and not module.name.startswith("_"):
                found.setdefault(module.name, Path(folder) / f"{module.name}.py")
    return dict(sorted(found.items()))


def require_word(package: str, word: str, key: str = "") -> None:
    """Refuse a word that no module of the package answers to.

    Args:
        package: Dotted name.
        word: As the config has it.
        key: Where the config has it, for the message; empty where the caller names it.

    Raises:
        ValueError: Naming key, value and the words that there are.
    """
    if word not in (known := words(package)):
        allowed = ", ".join(map(repr, known))
        raise ValueError(f"{f'{key}: ' if key else ''}found {word!r}; allowed: {allowed}")
