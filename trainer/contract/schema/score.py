"""The recipe of a top-K store: what is scored, in which mode, and what is kept, all resolved."""

from trainer.contract.schema.distillation import TeacherTopk
from trainer.contract.schema.evaluate import Dtype
from trainer.contract.schema.sources import ReasoningMode
from trainer.contract.schema.words import BackendName


class ScoreRecipe(TeacherTopk):
    """One store, complete: nothing that can change its bytes is decided anywhere else.

    Attributes:
        reasoning_mode: Mode that the teacher is asked in.
        stored_mode: Mode that the stored conversations say. Where it is another, the system message is
            written anew for the teacher, with the input `o200k_tokenizer`.
        dtype: Type that a teacher with weights computes in.
        backend: Backend of a teacher that is one of our checkpoints; no fusion is asked of it.
    """

    reasoning_mode: ReasoningMode
    stored_mode: ReasoningMode
    dtype: Dtype = "fp32"
    backend: BackendName = "reference"
