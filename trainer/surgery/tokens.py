"""What a `tokenizer.json` says of its vocabulary, read without any tokenizer library."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from trainer.contract.json_text import parse_json
from trainer.surgery.tensorfile import WeightsError

TOKENIZER_NAME = "tokenizer.json"
TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
ROLES = ("bos", "eos", "unk", "pad")
"""Special roles that two tokenizers can share under different names; a token in two counts for the first."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer.

    Attributes:
        content: The parsed `tokenizer.json`.
        ids: Id of every token by its text in byte-level characters; added tokens by their own text.
        added: Texts of the added tokens.
        roles: Text of the token in each special role that is filled.
    """

    content: dict[str, Any]
    ids: dict[str, int]
    added: frozenset[str]
    roles: dict[str, str]

    @property
    def rows(self) -> int:
        """Rows that an embedding of this vocabulary has at least."""
        return max(self.ids.values()) + 1

    def role_id(self, role: str) -> int | None:
        """Id of the token in a special role, None where there is none."""
        return self.ids.get(self.roles[role]) if role in self.roles else None


def read_vocabulary(directory: Path, config: Mapping[str, Any]) -> Vocabulary:
    """Read the tokenizer of a Hugging Face checkpoint.

    Roles are those of `tokenizer_config.json`; where that file is absent, of the model's configuration.

    Args:
        directory: The checkpoint.
        config: Its `config.json`.

    Raises:
        WeightsError: A file is missing or is no byte-level BPE tokenizer.
    """
    content = _read(directory / TOKENIZER_NAME)
    model = content.get("model", {})
    if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict):
        raise WeightsError(
            f"{directory / TOKENIZER_NAME}: model type 'BPE' expected, {model.get('type')!r} found"
        )
    added = {token["content"]: int(token["id"]) for token in content.get("added_tokens", [])}
    ids = {**model["vocab"], **added}
    if len(set(ids.values())) != len(ids):
        raise WeightsError(f"{directory / TOKENIZER_NAME}: two tokens have the same id")
    return Vocabulary(content, ids, frozenset(added), _roles(directory, config, ids))


def shared_rows(source: Vocabulary, target: Vocabulary) -> dict[int, int]:
    """Row of the source for each row of the target whose token both vocabularies have.

    A token is shared when both have the same bytes (the same text, for an added token), or when both use it
    in the same special role, whatever it is called.
    """
    special = {source.roles[role]: role for role in reversed(ROLES) if role in source.roles}
    by_role = {role: source.ids[text] for text, role in special.items()}
    in_role = {target.roles[role]: role for role in reversed(ROLES) if role in target.roles}
    rows = {}
    for text, row in target.ids.items():
        if text in in_role:
            if (role := in_role[text]) in by_role:
                rows[row] = by_role[role]
        elif text in source.ids and text not in special:
            rows[row] = source.ids[text]
    return rows


def piece_ids(source: Vocabulary, text: str) -> list[int]:
    """Return the source's tokens for another vocabulary's token: byte-pair merges in order of rank.

    Args:
        source: A vocabulary whose merges are ordered as its ids are, as in every rank-based tokenizer.
        text: In byte-level characters.

    Raises:
        WeightsError: A single byte is no token.
    """
    ids, parts = source.ids, list(text)
    while len(parts) > 1:
        found = [ids.get(left + right, 1 << 62) for left, right in pairwise(parts)]
        if (lowest := min(found)) == 1 << 62:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    if unknown := [part for part in parts if part not in ids]:
        raise WeightsError(f"the byte-level character {unknown[0]!r} is no token of the donor")
    return [ids[part] for part in parts]


def _roles(directory: Path, config: Mapping[str, Any], ids: Mapping[str, int]) -> dict[str, str]:
    path = directory / TOKENIZER_CONFIG_NAME
    if path.is_file():
        stated = _read(path)
        texts = {role: stated.get(f"{role}_token") for role in ROLES}
        return {
            role: text["content"] if isinstance(text, dict) else text for role, text in texts.items() if text
        }
    by_id = {number: text for text, number in ids.items()}
    found = {}
    for role in ROLES:
        number = config.get(f"{role}_token_id")
        number = number[0] if isinstance(number, list) and number else number
        if number is not None and number in by_id:
            found[role] = by_id[number]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        return dict(parse_json(path.read_text(encoding="utf-8-sig")))
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; a donor comes with its tokenizer") from None
    except (ValueError, TypeError) as error:
        raise WeightsError(f"{path}: no JSON object: {error}") from error
