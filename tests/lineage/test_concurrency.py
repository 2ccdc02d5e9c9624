"""Many processes publish, link and state at once: nothing is lost, nothing is there twice."""

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record

pytestmark = pytest.mark.slow

PROCESSES, EACH = 10, 10

WORKER = """
import json, sys
from pathlib import Path
from tests.lineage.fabricate import draft, fill, recipe
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store

root, worker = Path(sys.argv[1]), int(sys.argv[2])
store = Store(root)


def made(experiment, asset, **keys):
    fingerprint, payload = recipe(asset, **keys)
    with store.work_area(experiment, asset, fingerprint, wait_s=120) as work:
        record = store.reusable(experiment, asset, fingerprint)
        if record is not None:
            return store.renew(work, record, inputs=[], blocking_checks=[], run=None), False
        fill(work, {"data.bin": json.dumps(keys).encode()}, manifest=keys)
        return store.publish(work, draft(payload)), True


print("ready", flush=True)
sys.stdin.readline()
for n in range(int(sys.argv[3])):
    if n % 5 == 0:  # an asset of one's own
        record, new = made("smoke", f"own{worker}", n=n)
    elif n % 5 == 1:  # the same recipe as everyone
        record, new = made("smoke", "equal", n=n)
    elif n % 5 == 2:  # the same recipe as everyone, in an experiment of a few
        record, new = made(f"variant{worker % 3}", "equal", n=n - 1)
    else:  # an asset of all, each with a recipe of its own
        record, new = made("smoke", "shared", worker=worker, n=n)
    store.statements.append(Statement.about(record, "verified", {"by": worker, "n": n}))
    print(json.dumps([record.asset, record.record_digest, new]), flush=True)
"""


def test_a_hundred_artifacts_from_ten_processes_no_record_is_lost_and_no_version_is_there_twice(tmp_path):
    answers = publish_at_once([tmp_path] * PROCESSES)
    assert_whole(tmp_path, answers)


def publish_at_once(roots: Sequence[Path]) -> list[tuple[str, str, bool]]:
    """Let processes publish at the same time, each in the store by the path that it has.

    Returns:
        Of each publication: the asset, the record's digest, and whether it was made there.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(root), str(n), str(EACH)],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for n, root in enumerate(roots)
    ]
    for worker in workers:
        assert worker.stdout.readline() == "ready\n"
    for worker in workers:  # all are imported: now at once
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = []
    for worker in workers:
        answers += [tuple(json.loads(line)) for line in worker.communicate(timeout=280)[0].splitlines()]
        assert worker.returncode == 0
    assert len(answers) == PROCESSES * EACH
    return answers


def assert_whole(root: Path, answers: Sequence[tuple[str, str, bool]]) -> None:
    """Every publication is in the store, once, intact, and nothing else is."""
    store = Store(root)
    records = {record.record_digest: record for record in store.records()}
    assert {answer[1] for answer in answers} <= records.keys()
    assert list(store.damaged()) == []
    names = Counter((record.experiment, record.asset, record.version) for record in records.values())
    assert set(names.values()) == {1}
    sequences = Counter((record.experiment, record.asset, record.sequence) for record in records.values())
    assert set(sequences.values()) == {1}
    shared = [record.sequence for record in records.values() if record.asset == "shared"]
    assert sorted(shared) == list(range(1, PROCESSES * 4 + 1))
    assert sum(answer[2] for answer in answers if answer[0] == "shared") == PROCESSES * 4
    # Equal recipes were made once, wherever they were asked for.
    equal = [answer for answer in answers if answer[0] == "equal"]
    for n in (1, 6):
        of_recipe = [
            record for record in records.values() if record.asset == "equal" and record.recipe["n"] == n
        ]
        assert len({record.digest for record in of_recipe}) == 1
    assert 2 <= sum(answer[2] for answer in equal) <= 8, "at most once in each experiment"
    seen: set[str] = set()
    for record in records.values():
        assert verify_record(store, record, seen=seen) == []
        assert store.ledger.get(record.record_digest) == record
    assert sorted(store.ledger.digests()) == sorted(records)
    said = Counter(
        (statement.body["by"], statement.body["n"])
        for record in records.values()
        for statement in store.statements.about(record)
        if statement.kind == "verified"
    )
    assert set(said.values()) == {1}
    assert len(said) == PROCESSES * EACH
    for experiment in store.experiments():
        work = root / ".work" / experiment
        assert [path.name for path in work.iterdir() if path.name != ".locks"] == []
