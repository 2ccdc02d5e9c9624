"""A ladder of tiny architectures, recipes between them and jobs: what the tests of conversions share."""

import copy
import json
from pathlib import Path
from typing import Any

import torch

from tests.trainer.surgery.calibration_cases import VOCAB, compat, donor, morphed, publish, write_text
from tests.trainer.surgery.surgery_models import loaded, random_batch
from trainer.checkpoints.published import save_published
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.job import Job
from trainer.model.gpt import build_model
from trainer.surgery.tensors import TORCH_DTYPES

__all__ = [
    "VOCAB",
    "compat",
    "donor",
    "loaded",
    "morphed",
    "publish",
    "random_batch",
    "write_text",
]

MOE: dict[str, Any] = {
    "num_experts": 8,
    "topk": 2,
    "shared_expert": True,
    "shared_expert_size": 12,
    "first_layer_dense": True,
    "router_load_balancing_type": "seq_aux_loss",
    "aux_loss_coeff": 1e-4,
    "router_score_function": "sigmoid",
    "router_topk_scaling_factor": 2.5,
    "router_num_groups": 4,
    "router_group_topk": 2,
    "router_enable_expert_bias": True,
    "router_dtype": "fp32",
}


def routed(layers: int = 4, *, first: int = 12, **moe: Any) -> Architecture:
    """The result of upcycling ``morphed(num_layers=layers)``: experts of 3 neurons, a shared one of 12."""
    tables = plain(morphed(num_layers=layers))
    tables["model"] |= {"ffn_hidden_size": 3, "dense_ffn_hidden_size": first}
    return parse(Architecture, tables | {"moe": MOE | moe})


def expand_recipe(parent: int = 8, target: int = 16, **changes: Any) -> dict[str, Any]:
    """From ``morphed`` to a deeper ``morphed``."""
    return {
        "step": "expand",
        "source": "parent",
        "parent": plain(morphed(num_layers=parent)),
        "parent_dtype": "fp32",
        "architecture": plain(morphed(num_layers=target)),
        "dtype": "fp32",
        "surgery": {"init_new_layers": "zero_residual"},
    } | changes


def upcycle_recipe(architecture: Architecture | None = None, **surgery: Any) -> dict[str, Any]:
    """From ``morphed`` to ``routed``."""
    target = architecture or routed()
    return {
        "step": "upcycle",
        "source": "parent",
        "parent": plain(morphed(num_layers=target.model.num_layers)),
        "parent_dtype": "fp32",
        "architecture": plain(target),
        "dtype": "fp32",
        "surgery": {
            "init_experts": "copy_plus_noise",
            "expert_noise": 0.02,
            "routed_gain": 0.0,
            "init_router": "near_uniform",
        }
        | surgery,
    }


def vpdense_recipe(layers: int = 3, tied: bool = True, **surgery: Any) -> dict[str, Any]:
    """From ``calibration_cases.donor`` to ``compat``."""
    target = copy.deepcopy(plain(compat()))
    target["model"]["num_layers"] = layers
    return {
        "step": "vpdense",
        "source": "parent",
        "text": "text",
        "donor": {
            "model_type": "qwen3",
            "num_layers": layers,
            "hidden_size": 32,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 8,
            "intermediate_size": 24,
            "vocab_size": VOCAB,
            "tie_word_embeddings": tied,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-6,
        },
        "architecture": target,
        "dtype": "fp32",
        "surgery": {"o_proj_pool": "sum", "ffn_method": "A", "ffn_scale": 1.0, "calibration_tokens": 256}
        | surgery,
    }


def convert_job(base: Path, recipe: dict[str, Any], name: str = "run", **inputs: Path) -> Job:
    """A job with its work and output directories below ``base / name``."""
    return parse(
        Job,
        {
            "schema": "vpmoe.job/1",
            "command": "convert",
            "asset": "rung",
            "experiment": "smoke",
            "recipe": recipe,
            "recipe_fingerprint": "f" * 64,
            "seed": 1234,
            "inputs": {key: {"path": str(path), "digest": "d" * 64} for key, path in inputs.items()},
            "execution": {"device": "cpu", "wandb": "disabled"},
            "provenance": {
                "git_sha": "a" * 40,
                "git_dirty": False,
                "source_digest": "b" * 64,
                "lock_digest": "c" * 64,
            },
            "work_dir": str(base / name / "work"),
            "output_dir": str(base / name / "out"),
        },
    )


def run(job: Job) -> int:
    """Runs a job through the command line, in this process; returns the exit code."""
    from trainer.__main__ import main

    path = Path(job.work_dir).parent / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(job)))
    return main(["convert", "--job", str(path)])


def payload(job: Job) -> Path:
    return Path(job.output_dir) / "payload"


def summary(job: Job) -> dict[str, Any]:
    return dict(json.loads((Path(job.output_dir) / "summary.json").read_text()))


def status(job: Job) -> str:
    return (Path(job.work_dir) / "STATUS").read_text().strip()


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def publish_as(architecture: Architecture, directory: Path, dtype: str, seed: int = 5) -> Path:
    """``calibration_cases.publish`` in another type, sinks, ω and gains included."""
    torch.manual_seed(seed)
    model = build_model(architecture, seed=seed, dtype=TORCH_DTYPES[dtype])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 and not name.endswith("log_freq"):
                noise = torch.randn(parameter.shape, generator=generator)
                parameter += (0.3 * noise).to(parameter.dtype)
            elif parameter.ndim > 1:
                parameter *= 4.0
    save_published(model, architecture, directory)
    return directory
