"""How rows become training shards."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.contract.schema.base import Fraction, Frozen, PositiveInt, RowCap

_Text = Annotated[str, Field(min_length=1)]


class SynthHarmony(Frozen):
    """Rows to Harmony conversations: the scaffold around every row and the shape of the parquet shards."""

    num_shards: Annotated[int, Field(gt=0, le=100)]
    row_group_rows: PositiveInt = 2000
    model_identity: _Text
    reasoning_effort: Literal["Low", "Medium", "High"]
    conversation_start_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
    knowledge_cutoff: Annotated[str, Field(pattern=r"^\d{4}-\d{2}$")]
    instructions: _Text | None = None


class Pack(Frozen):
    """Packing of whole conversations: `block` documents of the shuffled order are packed together."""

    block: PositiveInt = 1024


class SynthKd(Frozen):
    """Conversations to tokens, masks and spans."""

    seq_len: PositiveInt = 2048
    valid_fraction: Fraction
    on_invalid: Literal["fail"] = "fail"
    max_rows: RowCap = -1
    pack: Pack = Pack()


class HealingText(Frozen):
    """Plain text to tokens."""

    valid_fraction: Fraction = 0.10
    max_tokens: RowCap = -1


class Data(Frozen):
    """The data group of the graph."""

    synth_harmony: SynthHarmony
    synth_kd_v1: SynthKd
    healing_text_v1: HealingText = HealingText()
