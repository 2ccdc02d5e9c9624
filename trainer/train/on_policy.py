"""Opens what on-policy training needs beside its data: prompts, teacher, and the source of rollouts."""

from pathlib import Path

import torch

from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.job import Job
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.status import ROLLOUTS_NAME
from trainer.data.indexed import SpanDocuments, manifest_value
from trainer.job.distributed import Layout, together
from trainer.job.workdir import LOGGER, WorkDir
from trainer.rollouts.forms import HarmonyForm
from trainer.rollouts.history import History
from trainer.rollouts.scoring import Scorer
from trainer.rollouts.source import RolloutSource
from trainer.rollouts.stored import stored_prompts
from trainer.teacher.descriptor import DESCRIPTOR_NAME
from trainer.teacher.opening import open_teacher
from trainer.teacher.self_test import require_tokenizer, self_test
from trainer.teacher.teacher import Teacher
from trainer.train.inputs import KD_INPUT, TEACHER_INPUT

_TESTED = 4
"""Conversations that a teacher's self-test asks about."""


def open_rollouts(
    job: Job, recipe: TrainRecipe, layout: Layout, work: WorkDir, *, keeps: bool
) -> RolloutSource:
    """Open the source of a run's rollouts, with a teacher of its own. Collective.

    Prompts are the conversations of the train split of `synth_kd_v1`, scores the input `teacher`'s. Rounds
    are kept in `rollouts/` of the work directory, and a served teacher's answers in `teacher/` beside it.

    Args:
        job: The job.
        recipe: Its recipe, with `rollouts`.
        layout: Where this process stands.
        work: The job's work directory.
        keeps: Whether rounds are kept there, and the teacher is tested first.

    Raises:
        ConfigError: An input is missing, or the layout is one that rollouts cannot have.
        DataError: The conversations are of another tokenizer than the control tokens.
        TeacherError: The teacher is of another tokenizer, contradicts itself, or cannot be reached.
    """
    asked = recipe.rollouts
    assert asked is not None  # the mix has rollouts
    require_inputs(job, layout)
    documents = SpanDocuments(Path(job.inputs[KD_INPUT].path), "train")
    prompts = stored_prompts(documents, job.seed)
    teacher = together(lambda: _teacher(job, recipe, layout, work, documents, keeps), only_leader=False)
    assert teacher is not None  # it ran on every rank
    scorer = Scorer(
        teacher,
        topk=asked.baseline_topk if asked.baseline else 0,
        device=layout.device,
        threads=torch.get_num_threads(),
    )
    return RolloutSource(
        asked,
        prompts=prompts,
        scorer=scorer,
        form=HarmonyForm(),
        history=History(work.path / ROLLOUTS_NAME if keeps and layout.leads else None),
        layout=layout,
        seed=job.seed,
        steps=recipe.steps,
        seq_len=recipe.seq_len,
        eod=documents.eod,
    )


def require_inputs(job: Job, layout: Layout) -> None:
    """Refuse a job whose inputs or layout rollouts cannot be made with.

    Raises:
        ConfigError: Naming the input, or the key, its value and the remedy.
    """
    for name in (TEACHER_INPUT, KD_INPUT):
        if name not in job.inputs:
            raise ConfigError(
                f"inputs: {name} is missing; a training job with recipe.rollouts needs it, found "
                f"{', '.join(job.inputs) or 'none'}"
            )
    if layout.ep > 1:
        raise ConfigError(
            f"execution.ep = {layout.ep}: with experts spread over ranks the student cannot answer prompts, "
            "because sequences end at different steps on different ranks; set ep = 1"
        )
    served = (Path(job.inputs[TEACHER_INPUT].path) / DESCRIPTOR_NAME).is_file()
    if layout.tp > 1 and not served:
        raise ConfigError(
            f"execution.tp = {layout.tp}: a teacher in the process of the student is not spread over ranks; "
            "set tp = 1, or serve the teacher (sources.teacher.kind = 'server')"
        )


def _teacher(
    job: Job, recipe: TrainRecipe, layout: Layout, work: WorkDir, documents: SpanDocuments, tested: bool
) -> Teacher:
    given = job.inputs[TEACHER_INPUT]
    journal = work.path / "teacher" / f"journal.rank_{layout.rank:05d}.jsonl"
    teacher = open_teacher(
        Path(given.path),
        digest=given.digest,
        device=layout.device,
        dtype=recipe.training.dtype,
        backend=recipe.training.backend,
        journal=journal,
        url_env=job.execution.teacher_url_env,
    )
    tokenizer = str(manifest_value(documents.manifest, "tokenizer", "model_sha256"))
    require_tokenizer(teacher, tokenizer, recipe.architecture.vocab_size)
    if tested:
        numbers = range(min(_TESTED, len(documents)))
        tokens = [documents[number].tokens.tolist() for number in numbers]
        wanted = [documents[number].loss_mask.nonzero()[0].tolist() for number in numbers]
        found = self_test(teacher, tokens, wanted)
        LOGGER.info("teacher %s: %s", teacher.identity(), found)
    return teacher
