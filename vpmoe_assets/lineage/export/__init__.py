"""The graph of records in forms that others read: a picture, mermaid, OpenLineage events."""
