"""A data set's card in Croissant 1.1 (http://mlcommons.org/croissant/1.1), JSON-LD that data tools read.

Every file with its sha256 and size, the rows in record sets with their fields and their number, whose they
are, and what they were made from (PROV). Paths are relative to the payload: the card is read from there.
"""

from collections.abc import Sequence
from glob import escape
from pathlib import PurePosixPath
from typing import Any, Final

from vpmoe_assets.lineage.adoption import is_adopted, origin
from vpmoe_assets.lineage.errors import ComparisonError
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.origins import Origin, origins
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.row_files import TYPES, RowField, RowFiles, holds_rows, row_files
from vpmoe_assets.lineage.store import Store

CONFORMS_TO: Final = "http://mlcommons.org/croissant/1.1"
FILE_NAME: Final = "croissant.json"
_COUNT = "http://www.wikidata.org/entity/Q4049983"
"""Cardinality: the type that the specification gives the number of records."""
_FORMATS = {
    ".parquet": "application/x-parquet",
    ".jsonl": "application/jsonlines",
    ".json": "application/json",
    ".txt": "text/plain",
    ".md": "text/markdown",
}
_FORM_FORMATS = {"parquet": _FORMATS[".parquet"], "json lines": _FORMATS[".jsonl"]}
_BYTES = "application/octet-stream"
_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    **{
        term: f"cr:{term}"
        for term in (
            *("arrayShape", "citeAs", "column", "containedIn", "equivalentProperty", "extract", "field"),
            *("fileObject", "fileProperty", "fileSet", "format", "includes", "isArray", "isLiveDataset"),
            *(
                "jsonPath",
                "key",
                "md5",
                "parentField",
                "path",
                "recordSet",
                "references",
                "regex",
                "repeated",
            ),
            *("replace", "samplingRate", "separator", "source", "subField", "transform"),
        )
    },
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "description": {"@container": "@language"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "name": {"@container": "@language"},
    "prov": "http://www.w3.org/ns/prov#",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}


def croissant(store: Store, record: Record) -> dict[str, Any]:
    """Return the card of a data set.

    Raises:
        ComparisonError: It is no data set, or its rows cannot be read.
    """
    if not holds_rows(record):
        raise ComparisonError(f"{version_name(record)} is no data set; Croissant tells of rows alone")
    sources = origins(store, record)
    groups = row_files(record, store.payload(record))
    day, _, rest = record.version.partition(".")
    licenses = list(dict.fromkeys(each.license for each in sources if each.license))
    own = f"{version_name(record)}, record {record.record_digest}, made with vpMoE"
    cited = [each.citation for each in sources if each.citation]
    card: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": CONFORMS_TO,
        "name": f"{record.experiment}/{record.asset}",
        "description": describe(record, groups, sources),
        "url": next((each.url for each in sources if each.url), _urn(record.record_digest)),
        "identifier": [version_name(record), f"content:{record.digest}", f"record:{record.record_digest}"],
        "citeAs": "; made from: ".join(filter(None, (own, "; ".join(cited)))),
        "datePublished": record.published_utc[:10],
        "version": f"{int(day)}.{int(rest.partition('-')[0])}.0",
        "distribution": [*_file_objects(record), *(_file_set(group, record) for group in groups)],
        "recordSet": [_record_set(group) for group in groups],
        "prov:wasDerivedFrom": [
            {
                "@id": _urn(reference.record_digest),
                "@type": "prov:Entity",
                "name": f"{reference.asset}@{reference.version}",
                "identifier": f"content:{reference.digest}",
            }
            for reference in record.inputs
        ]
        or [{"@id": each.url, "@type": "prov:Entity"} for each in sources if each.url],
        "prov:wasGeneratedBy": {
            "@type": "prov:Activity",
            "name": origin(record) if is_adopted(record) else f"vpMoE, commit {record.code.git_sha}",
            "identifier": f"fingerprint:{record.fingerprint}",
            "prov:startedAtTime": record.started_utc,
            "prov:endedAtTime": record.finished_utc,
        },
    }
    if licenses:
        card["license"] = licenses[0] if len(licenses) == 1 else licenses
    return {key: value for key, value in card.items() if value != []}


def describe(record: Record, groups: Sequence[RowFiles], sources: Sequence[Origin]) -> str:
    """Say in a few sentences what a data set is, whose, and under which terms."""
    counts = ", ".join(f"{group.rows} {_unit(group)} in {group.name}" for group in groups)
    parts = [f"{version_name(record)}: {counts}."]
    parts += [f"From {each.asset}: {each.description.rstrip('.')}." for each in sources]
    if any(each.citation and each.citation.startswith("PleIAs/SYNTH,") for each in sources):
        parts.append("The terms of a row's seed are in its column seed_license.")
    if unknown := [each.asset for each in sources if each.license is None]:
        parts.append(f"No licence is known of {', '.join(unknown)}.")
    return " ".join(parts)


def _unit(group: RowFiles) -> str:
    return {"IndexedDataset": "sequences", "top-K": "positions"}.get(group.form, "rows")


def _urn(record_digest: str) -> str:
    return f"urn:vpmoe:record:{record_digest}"


def _file_objects(record: Record) -> list[dict[str, Any]]:
    return [
        {
            "@type": "cr:FileObject",
            "@id": f"file/{entry.path}",
            "name": entry.path,
            "contentUrl": entry.path,
            "contentSize": f"{entry.size} B",
            "encodingFormat": _FORMATS.get(PurePosixPath(entry.path).suffix, _BYTES),
            "sha256": entry.sha256,
        }
        for entry in record.files
    ]


def _file_set(group: RowFiles, record: Record) -> dict[str, Any]:
    return {
        "@type": "cr:FileSet",
        "@id": f"files/{group.name}",
        "name": f"files of {group.name}",
        "encodingFormat": _FORM_FORMATS.get(group.form, _BYTES),
        "includes": _patterns(group, record),
    }


def _patterns(group: RowFiles, record: Record) -> list[str]:
    """Return globs that match the files of a group and no others; their names, where there are none."""
    every = [entry.path for entry in record.files]
    globs = sorted(
        {str(PurePosixPath(path).parent / f"*{PurePosixPath(path).suffix}") for path in group.paths}
    )
    matched = [path for path in every for each in globs if PurePosixPath(path).match(each)]
    same_depth = [path for path in matched if path.count("/") == group.paths[0].count("/")]
    return (
        globs
        if sorted(same_depth) == sorted(matched) == sorted(group.paths)
        else sorted(map(escape, group.paths))
    )


def _record_set(group: RowFiles) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": group.name,
        "name": group.name,
        "cr:annotation": {
            "@type": "cr:Field",
            "@id": f"{group.name}/count",
            "name": f"{group.name}/count",
            "value": group.rows,
            "dataType": _COUNT,
        },
        "field": [_field(group, each) for each in group.fields],
    }


def _field(group: RowFiles, field: RowField) -> dict[str, Any]:
    columns = group.form in _FORM_FORMATS
    return {
        "@type": "cr:Field",
        "@id": f"{group.name}/{field.name}",
        "name": field.name,
        "dataType": TYPES[field.type],
        **({"description": field.description} if field.description else {}),
        **({"isArray": True, "arrayShape": "-1"} if field.many else {}),
        "source": {
            "fileSet": {"@id": f"files/{group.name}"},
            "extract": {"column": field.name} if columns else {"fileProperty": "content"},
        },
    }
