"""The real trainer (`python -m slow_trainer train --job …`) with saves `SLOW_SAVE_S` seconds longer."""

import os
import sys
import time
from pathlib import Path
from typing import Any

from trainer.__main__ import main
from trainer.checkpoints.resume import Checkpoints, TorchDistSave


class SlowSave(TorchDistSave):
    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        time.sleep(float(os.environ["SLOW_SAVE_S"]))
        super().save(sharded_state_dict, checkpoint_dir)


Checkpoints.strategy = SlowSave

if __name__ == "__main__":
    sys.exit(main())
