"""The one schema of ``configs/*.toml`` and ``job.json``: typed, frozen, torch-free, unknown keys refused."""

from trainer.config.architecture import (
    Architecture,
    AttentionConfig,
    GrapeConfig,
    LayerKind,
    ModelConfig,
    MoeConfig,
    TpaConfig,
)
from trainer.config.base import ConfigError, Frozen, parse, plain
from trainer.config.data import Data, HealingText, Pack, SynthHarmony, SynthKd
from trainer.config.experiment import (
    CONFIGS_DIR,
    Evaluation,
    Experiment,
    Profiling,
    StageConfig,
    Stages,
    load_experiment,
)
from trainer.config.job import Execution, Job, JobInput, Provenance, load_job
from trainer.config.rungs import Healing, RungConfig, Rungs
from trainer.config.sources import Sources
from trainer.config.training import (
    BACKEND_FUSIONS,
    KDConfig,
    OptimizerConfig,
    Rescored,
    RolloutConfig,
    ScheduleConfig,
    TrainingConfig,
    TrainRecipe,
)

__all__ = [
    "BACKEND_FUSIONS",
    "CONFIGS_DIR",
    "Architecture",
    "AttentionConfig",
    "ConfigError",
    "Data",
    "Evaluation",
    "Execution",
    "Experiment",
    "Frozen",
    "GrapeConfig",
    "Healing",
    "HealingText",
    "Job",
    "JobInput",
    "KDConfig",
    "LayerKind",
    "ModelConfig",
    "MoeConfig",
    "OptimizerConfig",
    "Pack",
    "Profiling",
    "Provenance",
    "Rescored",
    "RolloutConfig",
    "RungConfig",
    "Rungs",
    "ScheduleConfig",
    "Sources",
    "StageConfig",
    "Stages",
    "SynthHarmony",
    "SynthKd",
    "TpaConfig",
    "TrainRecipe",
    "TrainingConfig",
    "load_experiment",
    "load_job",
    "parse",
    "plain",
]
