"""The graph of records as OpenLineage events, for a catalogue that collects them (Marquez and others).

https://openlineage.io/spec/2-0-2/OpenLineage.json: every materialisation is a run of the job that has the
asset's name, with a START and a COMPLETE event; what it made, and what it was made from, are datasets of that
name, with the version. The run's id is the UUID of version 5 of the record's digest, so that the same record
is the same run wherever it is told.
"""

import uuid
from typing import Any

from vpmoe_assets.lineage.graph import Edge, Graph, Node
from vpmoe_assets.lineage.heads import Head

_PRODUCER = "urn:vpmoe:lineage"
_SPEC = "https://openlineage.io/spec"
_EVENT = f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
_RUNS = uuid.uuid5(uuid.NAMESPACE_URL, "urn:vpmoe:record")


def run_id(record_digest: str) -> str:
    """Return the id of the run that a record tells of."""
    return str(uuid.uuid5(_RUNS, record_digest))


def events(graph: Graph) -> list[dict[str, Any]]:
    """Return two events for every record whose content is known, in the order in which it came about.

    A record that is unknown to store and ledger is told only as an input of others.
    """
    found: list[dict[str, Any]] = []
    for node in graph.ordered():
        if node.head is None:
            continue
        edges = graph.parents.get(node.record_digest, [])
        inputs = [_dataset(graph.nodes[edge.parent]) for edge in edges if edge.kind == "input"]
        common = {
            "run": {"runId": run_id(node.record_digest), "facets": _run_facets(node, node.head)},
            "job": {"namespace": _namespace(node), "name": node.asset, "facets": _job_facets(edges)},
            "producer": _PRODUCER,
            "schemaURL": _EVENT,
            "inputs": inputs,
        }
        found.append({"eventType": "START", "eventTime": node.head.started_utc, **common, "outputs": []})
        found.append(
            {
                "eventType": "COMPLETE",
                "eventTime": node.head.finished_utc,
                **common,
                "outputs": [_dataset(node) | {"outputFacets": _output_facets(node.head)}],
            }
        )
    return found


def _namespace(node: Node) -> str:
    return f"vpmoe/{node.experiment}"


def _dataset(node: Node) -> dict[str, Any]:
    version = _facet("1-0-1/DatasetVersionDatasetFacet", datasetVersion=node.version)
    content = {"_producer": _PRODUCER, "_schemaURL": "urn:vpmoe:content-facet:1", "digest": node.digest}
    return {
        "namespace": _namespace(node),
        "name": node.asset,
        "facets": {"version": version, "vpmoe_content": content},
    }


def _run_facets(node: Node, head: Head) -> dict[str, Any]:
    return {
        "vpmoe_record": {
            "_producer": _PRODUCER,
            "_schemaURL": "urn:vpmoe:record-facet:1",
            "record_digest": node.record_digest,
            "fingerprint": head.fingerprint,
            "sequence": head.sequence,
            "metrics": head.metrics,
            "state": node.state,
            "original": None if head.original is None else run_id(head.original.record_digest),
        }
    }


def _job_facets(edges: list[Edge]) -> dict[str, Any]:
    kind = "TRANSFORMATION" if edges else "SOURCE"
    return {
        "jobType": _facet("2-0-4/JobTypeJobFacet", processingType="BATCH", integration="VPMOE", jobType=kind)
    }


def _output_facets(head: Head) -> dict[str, Any]:
    rows = head.metrics.get("rows")
    counted = {"rowCount": rows} if type(rows) is int else {}
    return {"outputStatistics": _facet("1-0-2/OutputStatisticsOutputDatasetFacet", size=head.size, **counted)}


def _facet(name: str, **fields: Any) -> dict[str, Any]:
    release, _, kind = name.partition("/")
    return {
        "_producer": _PRODUCER,
        "_schemaURL": f"{_SPEC}/facets/{release}/{kind}.json#/$defs/{kind}",
        **fields,
    }
