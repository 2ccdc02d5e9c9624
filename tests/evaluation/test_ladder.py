"""The page of the whole ladder."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from vpmoe_assets.evaluation.ladder import Rung, markdown, page, write_ladder


def rung(name: str, mean: float | None = 0.25, **metrics: float) -> Rung:
    report: dict[str, Any] = {"metrics": dict(metrics), "refused": {}}
    if mean is not None:
        report |= {"core8_centered_mean": mean}
        report["metrics"] |= {"core8/centered_mean": mean, "core8/centered_mean_stderr": 0.05}
    return Rung(name, report, parameters=1_234_567, layers=28, tokens=0, link=f"../{name}/.artifact.json")


def test_the_table_has_a_row_a_checkpoint_and_a_dash_for_what_was_not_measured() -> None:
    first, second = (
        rung("donor", **{"ppl/text/nll": 3.25}),
        rung("student", None, **{"harmony/valid_rate": 0.5}),
    )
    lines = markdown([first, second], links=False).splitlines()
    assert lines[0].startswith("| checkpoint | layers | parameters | tokens | CORE-8 |")
    assert lines[2] == "| donor | 28 | 1,234,567 | 0 | +0.250 ± 0.050 | – | 3.250 | – | – | – |"
    assert lines[3] == "| student | 28 | 1,234,567 | 0 | – | – | – | – | – | 50% |"
    assert "[donor](../donor/.artifact.json)" in markdown([first], links=True)


def test_the_change_against_the_checkpoint_before_is_shown() -> None:
    worse = rung("student", 0.1)
    worse = Rung(worse.name, worse.report, None, None, tokens=20_480, delta={"core8_centered_mean": -0.15})
    assert (
        markdown([worse], links=False)
        .splitlines()[2]
        .startswith("| student | – | – | 20,480 | +0.100 ± 0.050 | -0.150 |")
    )


def test_equal_rungs_give_equal_bytes_and_links_stay_outside(tmp_path: Path) -> None:
    metrics = {
        "core8/piqa/centered": 0.2,
        "ppl/text/nll": 3.0,
        "ppl/text/stderr": 0.1,
        "harmony/valid_rate": 0.9,
    }
    found = []
    for place in ("a", "b"):
        directory = tmp_path / place
        directory.mkdir()
        one = rung("donor", **metrics)
        rungs = [Rung(one.name, one.report, 1, 2, 3, link=f"../{place}/record")]
        assert write_ladder(rungs, directory) == ["core8.png", "nll.png", "checks.png"]
        found.append({path.name: path.read_bytes() for path in directory.iterdir()})
    assert found[0] == found[1]
    assert set(found[0]) == {"ladder.json", "ladder.md", "core8.png", "nll.png", "checks.png"}
    (row,) = json.loads(found[0]["ladder.json"])["checkpoints"]
    assert (row["checkpoint"], row["core8"], row["core8_stderr"]) == ("donor", 0.25, 0.05)


def test_a_plot_of_nothing_is_not_drawn(tmp_path: Path) -> None:
    assert write_ladder([rung("donor", None, **{"ppl/final/nll": 2.0})], tmp_path) == ["nll.png"]


def test_a_ladder_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint has been evaluated yet"):
        write_ladder([], tmp_path)
    assert not any(tmp_path.iterdir())


def test_the_page_is_html_that_escapes_names_and_closes_its_tables() -> None:
    class Tags(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[str, dict[str, str | None]]] = []
            self.text: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            self.seen.append((tag, dict(attrs)))

        def handle_data(self, data: str) -> None:
            self.text.append(data)

    tags = Tags()
    tags.feed(page([rung("a<b")], {"core8.png": "data:image/png;base64,AAAA"}, "smoke: the ladder"))
    assert ("a", {"href": "../a<b/.artifact.json"}) in tags.seen
    assert ("img", {"src": "data:image/png;base64,AAAA", "alt": "core8.png"}) in tags.seen
    assert "a<b" in tags.text
    assert [tag for tag, _ in tags.seen].count("tr") == 2
