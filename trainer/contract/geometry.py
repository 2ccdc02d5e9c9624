"""What two architectures must share so that one loads the other's weights: all but the fusions asked for."""

from trainer.contract.fusions import FUSIONS
from trainer.contract.schema.architecture import Architecture


def geometry(architecture: Architecture) -> Architecture:
    """Return the same architecture with no fusion asked for.

    Architectures are compared through this, and models that only read weights are built from it, so that
    published weights load whatever flags they were trained with.
    """
    if architecture.moe is None:
        return architecture
    plain = architecture.moe.model_copy(update=dict.fromkeys(FUSIONS, False))
    return architecture.model_copy(update={"moe": plain})
