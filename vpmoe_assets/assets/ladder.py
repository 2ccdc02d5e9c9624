"""The ladder's page: all that was evaluated, drawn together."""

import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published

if TYPE_CHECKING:
    from vpmoe_assets.evaluation.comparison import Report
    from vpmoe_assets.evaluation.ladder import Rung


def ladder_report(experiment: Experiment, evaluations: Mapping[str, str]) -> Produced:
    """Return the asset that draws the ladder.

    Args:
        experiment: The experiment.
        evaluations: The asset that measures each checkpoint, in the order of the ladder.
    """

    @produced_asset(
        experiment,
        group="evals",
        kinds={"markdown"},
        recipe={"checkpoints": list(evaluations)},
        roots=["vpmoe_assets.evaluation.comparison", "vpmoe_assets.evaluation.ladder"],
        metadata=_metadata,
        partial=list(evaluations.values()),
    )
    def ladder_report(build: Build, **evals: Published) -> Built:
        """The whole ladder on one page: scores with error bars, losses by span, format validity, cost.

        It draws what has been evaluated so far, each checkpoint with what changed since the one before.
        `run/ladder.html` is the page, with links to every record.
        """
        from vpmoe_assets.evaluation.comparison import before
        from vpmoe_assets.evaluation.ladder import images, page, write_ladder

        shutil.rmtree(build.payload)
        build.payload.mkdir()
        reports = {name: _report(evals[of]) for name, of in evaluations.items() if of in evals}
        rungs = [
            _rung(build, evals[evaluations[name]], report, reports.get(before(list(evaluations), name) or ""))
            for name, report in reports.items()
        ]
        write_ladder(rungs, build.payload)
        text = page(rungs, images(build.payload), f"{build.experiment.name}: the ladder")
        (build.work.run / "ladder.html").write_text(text, encoding="utf-8")
        return Built(metrics={"checkpoints": len(rungs)})

    return ladder_report


def _report(evaluation: Published) -> "Report":
    from vpmoe_assets.evaluation.comparison import read_report

    return read_report(evaluation.payload, evaluation.record.details["object"])


def _rung(build: Build, evaluation: Published, report: "Report", baseline: "Report | None") -> "Rung":
    from vpmoe_assets.evaluation.comparison import delta
    from vpmoe_assets.evaluation.ladder import Rung

    measured = next(given for given in evaluation.record.inputs if given.asset == report.name)
    record = build.store.find(build.experiment.name, report.name, measured.version)
    return Rung.of(
        report.name,
        report.content,
        record,
        None if baseline is None else delta(report, baseline),
        None if record is None else f"../../../{report.name}/{measured.version}/.artifact.json",
    )


def _metadata(item: Published) -> Mapping[str, Any]:
    from vpmoe_assets.evaluation.ladder import images

    plots = "\n\n".join(f"![{name}]({source})" for name, source in images(item.payload).items())
    return {
        "page": dg.MetadataValue.path(item.directory / "run" / "ladder.html"),
        "ladder": dg.MetadataValue.md((item.payload / "ladder.md").read_text(encoding="utf-8")),
        "plots": dg.MetadataValue.md(plots),
    }
