"""Plain PyTorch on any device: the oracle that every other backend is measured against."""

from trainer.model.backend import Backend
from trainer.model.core_attention import ReferenceCoreAttention
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.experts import StackedExperts
from trainer.model.support_loss import chunked_support_loss

FUSIONS = ()
KEEPS = ()

BACKEND = Backend(
    core_attention=ReferenceCoreAttention,
    experts=StackedExperts,
    loss=chunked_cross_entropy,
    support_loss=chunked_support_loss,
)
