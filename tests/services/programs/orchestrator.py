"""An orchestrator that runs one job of the stand-in trainer and can be killed: `python -m … WORK SETTINGS`.

SETTINGS is JSON: `recipe`, and settings of the trainer resource.
"""

import json
import sys
from pathlib import Path

import dagster as dg

from tests.resources.launched import PROVENANCE, ROOT
from vpmoe_assets.resources import launcher
from vpmoe_assets.resources.trainer import TrainerResource

launcher.PROGRAM = "stand_in_trainer"
work, asked = Path(sys.argv[1]), json.loads(sys.argv[2])


@dg.asset
def made(context: dg.AssetExecutionContext, trainer: TrainerResource) -> None:
    trainer.run(
        context,
        command="evaluate",
        asset="made",
        experiment="test",
        recipe=asked.pop("recipe"),
        recipe_fingerprint="a" * 64,
        seed=1,
        inputs={"donor": (work.parent / "donor", "d")},
        provenance=PROVENANCE,
        sources=ROOT,
        work_dir=work,
        output_dir=work / "output",
    )


if __name__ == "__main__":
    settings = {name: value for name, value in asked.items() if name != "recipe"}
    done = dg.materialize([made], resources={"trainer": TrainerResource(**settings)}, raise_on_error=False)
    sys.exit(not done.success)
