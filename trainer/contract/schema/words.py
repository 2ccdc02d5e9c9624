"""Keys whose values are names of modules: checked against what there is, when a config loads."""

from typing import Annotated

from pydantic import AfterValidator

from trainer.contract.words import BACKENDS, OBJECTIVES, require_word


def _backend(word: str) -> str:
    require_word(BACKENDS, word)
    return word


def _objective(word: str) -> str:
    require_word(OBJECTIVES, word)
    return word


BackendName = Annotated[str, AfterValidator(_backend)]
"""A module of `trainer.model.backends`."""

ObjectiveName = Annotated[str, AfterValidator(_objective)]
"""A module of `trainer.losses`."""
