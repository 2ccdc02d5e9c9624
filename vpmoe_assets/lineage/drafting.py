"""What the maker of an artifact states, held against the work area that it describes, without credentials."""

from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.credentials import find_credential, redact, redact_command, secret_values
from vpmoe_assets.lineage.errors import PublishError, SecretFoundError
from vpmoe_assets.lineage.record import Draft
from vpmoe_assets.lineage.workarea import WorkArea


def checked(work: WorkArea, draft: Draft) -> Draft:
    """Return the draft without secrets, after comparing it with the work area it claims to describe.

    Raises:
        PublishError: It is of another recipe, or names an input that its fingerprint does not cover.
        SecretFoundError: The recipe itself holds a credential.
    """
    if sha256_json(draft.fingerprint_payload) != work.fingerprint:
        raise PublishError(
            f"{work.experiment}/{work.asset}: the draft's fingerprint payload hashes to "
            f"{sha256_json(draft.fingerprint_payload)}, the work area is of {work.fingerprint}"
        )
    fingerprinted = set(draft.fingerprint_payload.get("inputs", {}).values())
    for reference in draft.inputs:
        if reference.digest not in fingerprinted:
            raise PublishError(
                f"{work.experiment}/{work.asset}: input {reference.asset}@{reference.version} (digest "
                f"{reference.digest}) is not among the inputs of the recipe fingerprint"
            )
    secrets = secret_values()
    if where := find_credential(draft.fingerprint_payload, secrets):
        raise SecretFoundError(
            f"{work.experiment}/{work.asset}: the recipe holds a credential at {where}; pass credentials "
            "in environment variables, never in an experiment's TOML"
        )
    fields: dict[str, Any] = draft.model_dump()
    kept = {"fingerprint_payload", "code", "inputs", "command"}
    safe = {key: value if key in kept else redact(value, secrets) for key, value in fields.items()}
    return Draft.model_validate({**safe, "command": redact_command(draft.command, secrets)})
