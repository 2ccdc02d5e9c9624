"""Speed measurements: each against a comparator in the same run; `record` remembers, `render` shows."""
