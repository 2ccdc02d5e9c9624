"""Names of assets that the schema resolves recipes by, and that the graph is built from."""

from typing import Final

TEACHER: Final = "teacher"
TEACHER_TOPK: Final = "teacher_topk"
"""The store of a teacher's scores."""
