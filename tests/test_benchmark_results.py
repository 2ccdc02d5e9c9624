import json
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks import record as recording
from benchmarks.record import record
from benchmarks.render import FIELDS, read, render


@pytest.fixture
def results(tmp_path):
    return tmp_path / "results.jsonl"


def line(name, value=1.0, time="2026-01-01T00:00:00+00:00", machine="A", gpu=None, **more):
    return {
        "name": name,
        "value": value,
        "unit": "rows/s",
        "comparator": None,
        "ratio": None,
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "machine": machine,
        "gpu": gpu,
        "versions": {"python": "3.12.1"},
        "time": time,
        "details": {},
        **more,
    }


def test_a_result_is_one_json_line_with_commit_machine_gpu_and_versions(results):
    written = record("encode", 123.5, "rows/s", comparator="tiktoken loop", ratio=0.93, path=results)
    lines = results.read_text().splitlines()
    assert [json.loads(text) for text in lines] == [written]
    assert set(FIELDS) <= written.keys()
    head = subprocess.run(
        ["git", "-C", recording.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert written["commit"].rstrip("+") == head.stdout.strip()
    assert written["versions"]["python"].startswith("3.")
    assert written["versions"]["numpy"]
    assert "cores" in written["machine"]


def test_results_written_side_by_side_stay_whole_lines(results):
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda n: record(f"bench {n}", n, "s", path=results, details={"pad": "x" * 5000}), range(24)
            )
        )
    assert sorted(json.loads(text)["value"] for text in results.read_text().splitlines()) == list(range(24))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": float("nan")}, "finite"),
        ({"value": 1.0, "comparator": "x"}, "come together"),
        ({"value": 1.0, "ratio": 2.0}, "come together"),
        ({"value": 1.0, "unit": ""}, "unit"),
    ],
)
def test_what_is_not_a_result_is_refused_and_leaves_no_line(results, arguments, message):
    with pytest.raises(ValueError, match=message):
        record("b", **{"unit": "s", **arguments}, path=results)
    assert not results.exists()


def test_without_git_the_commit_comes_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(recording, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("VPMOE_GIT_SHA", "f" * 40)
    assert recording.commit() == "f" * 40
    monkeypatch.delenv("VPMOE_GIT_SHA")
    with pytest.raises(RuntimeError, match="VPMOE_GIT_SHA"):
        recording.commit()


def test_the_report_shows_the_newest_result_of_each_machine_and_counts_the_history():
    text = render(
        [
            line("encode", 2000.0, "2026-01-02T00:00:00+00:00", ratio=0.9, comparator="a|b"),
            line("encode", 1000.0, "2026-01-01T00:00:00+00:00"),
            line("encode", 3000.0, "2026-01-03T00:00:00+00:00", machine="B", gpu="1 × H100"),
        ]
    )
    rows = [row for row in text.splitlines() if row.startswith("| encode")]
    assert len(rows) == 2
    assert "2,000 rows/s" in rows[0]
    assert "0.9×" in rows[0]
    assert "a\\|b" in rows[0]
    assert rows[0].endswith("| 2 |")
    assert "3,000 rows/s" in rows[1]
    assert "## B, 1 × H100" in text


def test_of_equal_times_the_later_line_counts_and_the_report_is_the_same_in_any_machine_order():
    first, second = line("a", 1.0), line("a", 5.0)
    assert "| 5 rows/s |" in render([first, second])
    mixed = [line("a", machine="B"), line("b"), line("a")]
    assert render(mixed) == render([mixed[1], mixed[2], mixed[0]])


def test_a_damaged_results_file_names_the_line(results):
    results.write_text(json.dumps(line("a")) + "\n{broken\n")
    with pytest.raises(ValueError, match="line 2"):
        read(results)
    results.write_text('{"name": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1: no value, unit"):
        read(results)


def test_no_results_are_a_report_that_says_so(results):
    assert "No results yet" in render(read(results))
