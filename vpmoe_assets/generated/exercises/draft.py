"""What every exercise produces, and how it fits the length that was asked for."""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

LANGUAGES = ("en", "it", "pl", "fr", "es", "de", "nl")
LANGUAGE_NAMES = {
    "en": "English",
    "it": "Italian",
    "pl": "Polish",
    "fr": "French",
    "es": "Spanish",
    "de": "German",
    "nl": "Dutch",
}

BRIEF = 480
"""Below this budget the reasoning has no plan and no check."""

# Words in pieces of up to eight letters, digits in groups of up to three, the space before, signs, lines.
_PIECE = re.compile(r"[^\W\d_]{1,8}|\d{1,3}|[^\w\s]|\n+| (?=\d)")


@dataclass(frozen=True)
class Draft:
    """One conversation: what is asked, the working (in English), the answer in the asker's language."""

    query: str
    reasoning: str
    answer: str


@dataclass(frozen=True)
class Step:
    """One step of a worked problem: its line in the reasoning and its line in the answer."""

    working: str
    result: str


@dataclass(frozen=True)
class Exercise:
    """A kind of problem.

    Attributes:
        name: Value of the `exercise` column.
        make: Builds a draft of about `budget` tokens from a random source and a language.
        longest: Largest budget, in tokens, that the problem can fill with real work.
    """

    name: str
    make: Callable[[random.Random, str, int], Draft]
    longest: int


def size(text: str) -> int:
    """Estimated number of o200k tokens, within about a tenth for this generator's texts."""
    return len(_PIECE.findall(text))


def take(steps: Iterable[Step], budget: int, least: int = 3) -> list[Step]:
    """Return the first steps that fill `budget` estimated tokens; at least `least` of them."""
    taken: list[Step] = []
    used = 0
    for step in steps:
        if used >= budget and len(taken) >= least:
            break
        taken.append(step)
        used += size(step.working) + size(step.result) + 2
    return taken


def number(value: object, language: str) -> str:
    """Return a number as the language writes it: decimal point in English, decimal comma elsewhere."""
    text = str(value)
    return text if language == "en" else text.replace(".", ",")


def reasoning(
    task: str, plan: str, working: Iterable[str], check: str, language: str, closing: str, *, brief: bool
) -> str:
    """Return the working under headings and the language of the answer; `brief` leaves out plan and check."""
    parts = [
        ("Task", f"{task}\nAnswer language: {LANGUAGE_NAMES[language]}."),
        ("Plan", "" if brief else plan),
        ("Working", "\n".join(working)),
        ("Check", "" if brief else check),
        ("Conclusion", closing),
    ]
    present = [(heading, text) for heading, text in parts if text]
    return "\n\n".join(f"### {place}. {heading}\n{text}" for place, (heading, text) in enumerate(present, 1))


def answer(opening: str, lines: Iterable[str], closing: str, *, numbered: bool = False) -> str:
    """Return an opening sentence, a list, closing sentence."""
    listed = (f"{place}. {line}" if numbered else f"- {line}" for place, line in enumerate(lines, 1))
    return f"{opening}\n\n" + "\n".join(listed) + f"\n\n{closing}"
