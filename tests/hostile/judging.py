"""What a parser may do with hostile input: return, or raise what it says that it raises."""

import tempfile
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.hostile.parsers import Parser
from tests.sittings import in_memory


def judge(parser: Parser, examples: int, number: int = 0) -> None:
    """Give a parser so many inputs; raise what it raises at the first one that it neither reads nor refuses.

    Args:
        parser: Which.
        examples: How many.
        number: Seed of the inputs.
    """
    with tempfile.TemporaryDirectory(prefix="vpmoe-hostile-", dir=in_memory()) as where:

        @seed(number)
        @settings(
            max_examples=examples,
            database=None,
            deadline=None,
            phases=(Phase.generate,),
            report_multiple_bugs=False,
            suppress_health_check=list(HealthCheck),
        )
        @given(parser.inputs())
        def holds(content: Any) -> None:
            try:
                parser.read(content, Path(where))
            except parser.errors as error:
                said = str(error)
            else:
                return
            assert said

        holds()
