"""What is signed of an artifact: its bytes, and how they came about.

Two in-toto statements (https://in-toto.io/Statement/v1), each in a bundle of its own:

* the **payload**, as model-signing has it (predicate `https://model_signing/signature/v1.0`): every file with
  its sha256. Its tool checks it, and the files, without this program. Two further keys, which it passes over,
  bind the record's digest and the sha256 of the second statement.
* the **provenance** (predicate `https://slsa.dev/provenance/v1`): recipe, seed and fingerprint, the artifacts
  that it was made from, commit, sources and packages, machine and times, all from the record.

Bundles and public key are objects of the store; the statement `signed` names them. Payloads never change.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.adoption import is_adopted
from vpmoe_assets.lineage.digest import FileEntry
from vpmoe_assets.lineage.errors import ArtifactDamaged, ObjectDamaged, ObjectMissing, SignatureError
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.signing import Signer, Verifier
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store

STATEMENT: Final = "https://in-toto.io/Statement/v1"
MODEL_SIGNING: Final = "https://model_signing/signature/v1.0"
PROVENANCE: Final = "https://slsa.dev/provenance/v1"
BUILD_TYPE: Final = "urn:vpmoe:step:1"
ADOPTED_TYPE: Final = "urn:vpmoe:adopted:1"
"""Of what was made elsewhere: the predicate says who took it in, and from where."""
_GIT_NAMES = frozenset({".git", ".gitattributes", ".github", ".gitignore"})
"""At the top of a payload, model-signing passes these over unless it is told not to."""


def provenance_statement(record: Record) -> dict[str, Any]:
    """Return the SLSA provenance of an artifact; it says nothing that its record does not."""
    recipe = record.fingerprint_payload
    return {
        "_type": STATEMENT,
        "subject": [{"name": each.path, "digest": {"sha256": each.sha256}} for each in _sorted(record.files)],
        "predicateType": PROVENANCE,
        "predicate": {
            "buildDefinition": {
                "buildType": ADOPTED_TYPE if is_adopted(record) else BUILD_TYPE,
                "externalParameters": {
                    "artifact": version_name(record),
                    "recipe": recipe.get("recipe", {}),
                    "seed": record.seed,
                },
                "internalParameters": {
                    "fingerprint": record.fingerprint,
                    "command": list(record.command),
                    "execution": record.execution,
                    "sources": recipe.get("sources", {}),
                    "packages": recipe.get("packages", {}),
                },
                "resolvedDependencies": list(_dependencies(record)),
            },
            "runDetails": {
                "builder": {"id": BUILD_TYPE, "version": _versions(record.environment)},
                "metadata": {
                    **({"invocationId": record.dagster_run_id} if record.dagster_run_id else {}),
                    "startedOn": record.started_utc,
                    "finishedOn": record.finished_utc,
                },
                "byproducts": [
                    {
                        "name": "record",
                        "digest": {"vpmoeRecord": record.record_digest, "vpmoeContent": record.digest},
                        "annotations": {
                            "published": record.published_utc,
                            **({"adopted": record.details["adopted"]} if "adopted" in record.details else {}),
                        },
                    }
                ],
            },
        },
    }


def payload_statement(record: Record, provenance: Mapping[str, Any], *, links: bool) -> dict[str, Any]:
    """Return what model-signing says of a payload.

    Args:
        record: Of the artifact.
        provenance: Its `provenance_statement`.
        links: Whether the payload holds symbolic links.
    """
    import hashlib

    files = _sorted(record.files)
    root = hashlib.sha256(b"".join(bytes.fromhex(each.sha256) for each in files)).hexdigest()
    return {
        "_type": STATEMENT,
        "subject": [{"name": record.asset, "digest": {"sha256": root}}],
        "predicateType": MODEL_SIGNING,
        "predicate": {
            "serialization": {"method": "files", "hash_type": "sha256", "allow_symlinks": links},
            "resources": [
                {"name": each.path, "algorithm": "sha256", "digest": each.sha256} for each in files
            ],
            "vpmoe_record": {"artifact": version_name(record), "digest": record.record_digest},
            "vpmoe_provenance": {"sha256": sha256_json(provenance)},
        },
    }


def attest(store: Store, record: Record, signer: Signer) -> tuple[Statement, bool]:
    """Sign an artifact, unless this key has signed it already.

    Args:
        store: Where it is.
        record: Of the artifact.
        signer: The key.

    Returns:
        The statement `signed`, and whether it is new.

    Raises:
        ArtifactDamaged: The files are not what was published: there is nothing to be signed.
    """
    if problems := payload_problems(store.directory(record), record, store.hasher):
        raise ArtifactDamaged(f"{version_name(record)} is damaged, so it is not signed: {problems[0]}")
    objects = ObjectStore(store.root)
    for said in signed(store.statements.about(record)):
        if said.body["key"] == signer.key and not signature_fault(objects, record, said):
            return said, False
    provenance = provenance_statement(record)
    links = any(path.is_symlink() for path in store.payload(record).rglob("*"))
    payload = payload_statement(record, provenance, links=links)
    body = {
        "key": signer.key,
        "links": links,
        "public_key": objects.put(signer.public_pem, "the public key"),
        "payload": objects.put(signer.sign(payload), "the signature of the payload"),
        "provenance": objects.put(signer.sign(provenance), "the signature of the provenance"),
    }
    return store.statements.append(Statement.about(record, "signed", body)), True


def signed(said: Sequence[Statement]) -> list[Statement]:
    """Return the signatures among the statements about a record, oldest first."""
    return [each for each in said if each.kind == "signed"]


def signature_line(statement: Statement) -> str:
    """Return a signature for people; whether it holds, `signature_fault` says."""
    return f"signed with key {statement.body['key'][:12]} by {statement.author} on {statement.time[:10]}"


def signature_objects(statement: Statement) -> dict[str, str]:
    """Return the objects that a signature names, by role."""
    return {role: statement.body[role] for role in ("public_key", "payload", "provenance")}


def signature_fault(objects: ObjectStore, record: Record, statement: Statement) -> str:
    """Say what is wrong with a signature of an artifact; nothing where it holds.

    It holds where both bundles verify with the key that is named, and say of the artifact what its record
    says: its files, its record digest, and the provenance that was signed beside them.
    """
    try:
        key = Verifier.of(objects.get(statement.body["public_key"]), "the public key of the signature")
        if key.key != statement.body["key"]:
            return f"names key {statement.body['key'][:12]}, and its public key is {key.key[:12]}"
        parts: dict[str, tuple[dict[str, Any], str]] = {}
        for role in ("payload", "provenance"):
            try:
                parts[role] = key.opened(objects.get(statement.body[role]))
            except SignatureError as error:
                return f"the signature of the {role} {error}"
    except (ObjectMissing, ObjectDamaged, SignatureError) as error:
        return str(error)
    (payload, _), (provenance, provenance_sha256) = parts["payload"], parts["provenance"]
    listed = {each.path: each.sha256 for each in record.files}
    try:
        predicate = payload["predicate"]
        if {each["name"]: each["digest"] for each in predicate["resources"]} != listed:
            return "signs other files than the record has"
        if {each["name"]: each["digest"]["sha256"] for each in provenance["subject"]} != listed:
            return "its provenance is of other files than the record has"
        if predicate["vpmoe_record"]["digest"] != record.record_digest:
            return f"signs record {predicate['vpmoe_record']['digest'][:12]}, not {record.record_digest[:12]}"
        if predicate["vpmoe_provenance"]["sha256"] != provenance_sha256:
            return "its provenance is another one than was signed with the payload"
    except (KeyError, TypeError, AttributeError):
        return "signs another kind of statement"
    return ""


def strangers_command(store: Store, record: Record, statement: Statement) -> list[str]:
    """Return the command that checks a payload with its signature, without this program."""
    objects = ObjectStore(store.root)
    flags = []
    if any(each.path.split("/")[0] in _GIT_NAMES for each in record.files):
        flags.append("--no-ignore-git-paths")
    if statement.body["links"]:
        flags.append("--allow_symlinks")
    return [
        *("model_signing", "verify", "key", str(store.payload(record)), *flags),
        *("--signature", str(objects.path(statement.body["payload"]))),
        *("--public_key", str(objects.path(statement.body["public_key"]))),
    ]


def _sorted(files: Sequence[FileEntry]) -> list[FileEntry]:
    return sorted(files, key=lambda each: PurePosixPath(each.path))


def _dependencies(record: Record) -> Iterator[dict[str, Any]]:
    """Yield what an artifact was made from: artifacts, code, packages; nothing of one that was adopted."""
    if is_adopted(record):
        return
    for reference in record.inputs:
        yield {
            "name": reference.role,
            "uri": f"urn:vpmoe:artifact:{record.experiment}/{reference.asset}/{reference.version}",
            "digest": {"vpmoeContent": reference.digest, "vpmoeRecord": reference.record_digest},
        }
    dirty = {"modified": record.code.git_dirty, "patch": record.code.patch_digest}
    yield {
        "name": "commit",
        "digest": {"gitCommit": record.code.git_sha},
        "annotations": {key: value for key, value in dirty.items() if value is not None},
    }
    for role, sha256 in record.objects.model_dump(exclude_none=True).items():
        yield {"name": role, "digest": {"sha256": sha256}}
    if lock := record.environment.get("lock_digest"):
        yield {"name": "requirements.lock", "digest": {"sha256": lock}}


def _versions(environment: Mapping[str, Any]) -> dict[str, str]:
    packages = environment.get("packages") or {}
    named = {"python": environment.get("python"), **packages, "platform": environment.get("platform")}
    return {name: str(value) for name, value in named.items() if value is not None}
