import json

import pytest

from tests.trainer.metric_rows import read_metrics
from trainer.job.metrics import MetricsLog


def test_every_line_is_one_object_visible_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, {"loss": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 1, "loss": 1.5}
    log.close()


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(path, resume_step=2)
    log.write(3, {"again": True})
    log.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]


def test_a_new_run_starts_the_file_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 7}\n')
    MetricsLog(path).close()
    assert path.read_text() == ""


def test_a_non_finite_value_is_not_written(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON compliant"):
        log.write(1, {"loss": float("nan")})
    log.close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
