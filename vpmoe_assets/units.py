"""Sizes for people."""


def human_bytes(size: int) -> str:
    """Return a size in the unit that keeps it short, e.g. `3.4 MB`."""
    value, units = float(size), iter(("B", "kB", "MB", "GB", "TB", "PB"))
    unit = next(units)
    while value >= 999.5 and unit != "PB":
        value, unit = value / 1000, next(units)
    return f"{value:.0f} {unit}" if unit == "B" or value >= 99.5 else f"{value:.1f} {unit}"
