"""Tiny teachers, made from seeds."""

from pathlib import Path

import pytest
import torch

from tests.trainer.evaluate.evaluation_inputs import write_llama, write_ranks
from tests.trainer.teacher.teachers import published, write_gpt_oss
from trainer.checkpoints.tokenizers import O200kTokenizer
from trainer.teacher.checkpoint import CheckpointTeacher
from trainer.teacher.transformers_teacher import TransformersTeacher

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Path:
    return write_ranks(tmp_path_factory.mktemp("o200k_tokenizer"))


@pytest.fixture(scope="session")
def o200k(ranks) -> O200kTokenizer:
    return O200kTokenizer(ranks)


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def gpt_oss_dir(tmp_path_factory) -> Path:
    return write_gpt_oss(tmp_path_factory.mktemp("gpt_oss"))


@pytest.fixture(scope="session")
def student_dir(tmp_path_factory) -> Path:
    return published(tmp_path_factory.mktemp("student") / "payload")


@pytest.fixture(scope="session")
def llama(llama_dir) -> TransformersTeacher:
    return TransformersTeacher(llama_dir, digest="llama", device=CPU, dtype=torch.float32)


@pytest.fixture(scope="session")
def gpt_oss(gpt_oss_dir) -> TransformersTeacher:
    return TransformersTeacher(gpt_oss_dir, digest="gpt-oss", device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def student(student_dir) -> CheckpointTeacher:
    return CheckpointTeacher(student_dir, digest="student", device=CPU, dtype=torch.float32)
