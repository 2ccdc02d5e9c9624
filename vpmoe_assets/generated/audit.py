"""Generated rows read again: that all of them are there, in order, and a sample generated anew."""

from pathlib import Path

import numpy as np

from vpmoe_assets.generated.generator import GENERATOR, GENERATOR_VERSION, generate_row, schema
from vpmoe_assets.verdict import Verdict


def rows_as_generated(payload_dir: Path, *, seed: int, rows: int, sample: int) -> Verdict:
    """Check columns, number and order of the rows in the files, and all of a sample.

    Args:
        payload_dir: Directory of the parquet files, whose names are in the order of the rows.
        seed: The experiment's.
        rows: That there must be.
        sample: How many of them are generated again, drawn by the seed.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    picked = set(np.random.Generator(np.random.PCG64(seed)).choice(rows, min(sample, rows), replace=False))
    faults: list[str] = []
    number = 0
    for path in sorted(payload_dir.iterdir()):
        try:
            file = pq.ParquetFile(path, page_checksum_verification=True)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            faults.append(f"{path.name} is no parquet file: {error}")
            continue
        if not file.schema_arrow.equals(schema()):
            faults.append(f"{path.name} has other columns than generated rows: {file.schema_arrow.names}")
            continue
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                expected = f"{GENERATOR}-{GENERATOR_VERSION}-{seed}-{number:08d}"
                if row["synth_id"] != expected:
                    faults.append(f"{path.name}: row {number} is {row['synth_id']}, expected {expected}")
                elif number in picked and row != (made := generate_row(seed, number)):
                    wrong = ", ".join(name for name in row if row[name] != made[name])
                    faults.append(f"{path.name}: row {number} is not what the generator makes: {wrong}")
                number += 1
    if number != rows:
        faults.append(f"{number} rows in the files, the experiment asks for {rows}")
    metadata = {"rows": number, "generated_again": len(picked)}
    return Verdict.of(faults, f"{number} rows in order, {len(picked)} generated again alike", metadata)
