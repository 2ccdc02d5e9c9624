"""The experiment that faults are made in: the whole graph with all stages, in less than a minute.

Everything of `tests.codebase.small_ladder`, narrower still, and its teacher is a server.
"""

from pathlib import Path

from tests.assets.graphs import write_experiment
from tests.codebase.small_ladder import EXPERIMENT
from tests.faults.teacher import MODEL, REVISION, URL_ENV

NAME = "faults"
CHANGES = {
    **EXPERIMENT,
    'name = "smoke"': f'name = "{NAME}"',
    "intermediate_size = 192": "intermediate_size = 48",
    'kind = "artifact"                        # a stand-in: our own stage 1, trained longer\n'
    'asset = "vpmoe_stage1"\nextra_steps = 8\n': (
        f'kind = "server"\nmodel = "{MODEL}"\nrevision = "{REVISION}"\nurl_env = "{URL_ENV}"\n'
    ),
    'o_proj_pool = "sum"\nffn_method = "A+lsq"\nffn_scale = 1.0\ncalibration_tokens = 4096': (
        'o_proj_pool = "sum"\nffn_method = "A+lsq"\nffn_scale = 1.0\ncalibration_tokens = 256'
    ),
    "softmax_offset_init = -4.0\ncalibration_tokens = 4096": (
        "softmax_offset_init = -4.0\ncalibration_tokens = 256"
    ),
    "max_sequence_length = 1024": "max_sequence_length = 256",
    "tail_draws = 8": "tail_draws = 0",
    "save_interval = 5": "save_interval = 2",
    "eval_interval = 5": "eval_interval = 3",
    "[stages.vpmoe_stage1]\nsteps = 8": "[stages.vpmoe_stage1]\nsteps = 6",
    "[stages.vpmoe_stage2]\nsteps = 6": "[stages.vpmoe_stage2]\nsteps = 4",
    "[stages.vpmoe_stage3]\nsteps = 4": "[stages.vpmoe_stage3]\nsteps = 3",
}
del CHANGES["extra_steps = 8"]
ORDER = (
    *("o200k_tokenizer", "synth", "healing_corpus", "core8_bundle", "qwen3_0_6b", "gpt_oss_20b"),
    *("synth_harmony", "synth_kd_v1", "healing_text_v1"),
    *("qwen3_0_6b_o200k", "vpdense0_5_28", "vpdense_28", "vpdense_80", "vpdense_80_healed", "vpmoe"),
    *("vpmoe_stage1", "teacher", "teacher_topk", "vpmoe_stage2", "vpmoe_stage3"),
    *("eval_vpmoe_stage1", "ladder_report"),
)
"""What is made, in an order in which it can be made."""
SHORT = (
    *("o200k_tokenizer", "synth", "healing_corpus", "core8_bundle"),
    *("synth_harmony", "synth_kd_v1", "healing_text_v1", "vpmoe_stage1"),
)
"""What is made where there is little time: the data, and a stage that trains on them from noise."""
_FROM_NOISE = {"[stages.vpmoe_stage1]\nsteps = 8": '[stages.vpmoe_stage1]\nsteps = 6\ninit = "fresh"'}


def write(path: Path, *, short: bool = False) -> Path:
    """Write the experiment to a file; the short one makes `SHORT` of it."""
    return write_experiment(path, CHANGES | (_FROM_NOISE if short else {}))
