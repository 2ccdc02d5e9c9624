"""Generated tokens per second: with the cache against whole rows, and in static slots against batches.

    python -m benchmarks.generate [--rows 4] [--prompt-tokens 512] [--new-tokens 32] [--record]
    python -m benchmarks.generate --slots [--layers 80] [--rows 64] [--prompt-tokens 128] [--new-tokens 256]

One line of JSON. Without `--slots`: the smoke student with random weights on this machine's CPU, fp32,
greedy. Both ways take the head at the last position only, and must give the same ids. They take turns; the
best of each counts, because other work on the machine only ever adds time.

With `--slots`: layers of the locked model with random weights on a GPU, backend `fused`, bf16, greedy; the
comparator is the same model in batches, operation by operation. Random weights have near ties everywhere, so
ids part soon; what is compared with `reference` in float32 is the log-probability of the tokens made in
slots, and that of a whole forward pass over them. `step_ms` is a step of all slots alone, kernels those of
one.
"""

import argparse
import gc
import json
import statistics
import time
from dataclasses import replace
from typing import Any

import torch

from benchmarks.record import record
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.decoding.generation import Generated, evaluating, generate
from trainer.decoding.sampling import GREEDY, Sampling
from trainer.decoding.slots import Slots, forget_slots, slots_of
from trainer.model.gpt import VPGPTModel, build_model
from trainer.model.init import require_filled
from trainer.model.positions import initial_log_freq


def whole_rows(model: VPGPTModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy generation without a cache: prompts of one length, so no padding either."""
    rows = torch.tensor(prompts)
    with evaluating(model):
        for _ in range(new_tokens):
            positions = torch.arange(rows.shape[1]).expand_as(rows)
            hidden = model.forward_hidden(rows, positions, torch.zeros_like(rows))
            logits = torch.nn.functional.linear(hidden[-1], model.head_weight)
            rows = torch.cat((rows, logits.argmax(dim=1, keepdim=True)), dim=1)
    made: list[list[int]] = rows[:, len(prompts[0]) :].tolist()
    return made


def measure(rows: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Time both ways, the prompt's own pass included."""
    architecture = load_experiment("smoke").architecture("vpmoe")
    model = build_model(architecture)
    generator = torch.Generator().manual_seed(0)
    shape = (rows, prompt_tokens)
    prompts = torch.randint(0, architecture.vocab_size, shape, generator=generator).tolist()
    best = {"cached": float("inf"), "whole rows": float("inf")}
    for _ in range(repeats):
        start = time.perf_counter()
        cached = [list(one.ids) for one in generate(model, prompts, max_new_tokens=new_tokens)]
        middle = time.perf_counter()
        whole = whole_rows(model, prompts, new_tokens)
        end = time.perf_counter()
        if cached != whole:
            raise AssertionError("the two ways gave different ids: this is no comparison of speed")
        best["cached"] = min(best["cached"], middle - start)
        best["whole rows"] = min(best["whole rows"], end - middle)
    return {
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_s": rows * new_tokens / best["cached"],
        "whole_rows_tokens_per_s": rows * new_tokens / best["whole rows"],
        "speed_ratio": best["whole rows"] / best["cached"],
    }


def architecture_of(layers: int) -> Architecture:
    """Return the locked model's architecture with some of its layers."""
    experiment = plain(load_experiment("bench").architecture("vpmoe"))
    experiment["model"]["num_layers"] = layers
    return parse(Architecture, experiment)


def locked(layers: int, seed: int = 0) -> VPGPTModel:
    """Make layers of the locked model on the GPU, filled there as `trainer.model.init` fills."""
    model = build_model(
        architecture_of(layers), dtype=torch.bfloat16, device="cuda", seed=None, backend="fused"
    )
    generator = torch.Generator("cuda").manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("value_residual_logit"):
                parameter.fill_(2.0)
            elif name.endswith("log_freq"):
                parameter.copy_(initial_log_freq(2 * parameter.shape[-1], 1e4, 16.0))
            elif parameter.dim() < 2 or name.endswith(("bias1", "bias2")):
                parameter.fill_(1.0 if "layernorm" in name and name.endswith("weight") else 0.0)
            else:
                down = name.endswith(("linear_proj.weight", "linear_fc2.weight", "weight2"))
                parameter.normal_(0.0, 0.02 / (2 * layers) ** 0.5 if down else 0.02, generator=generator)
        for layer in model.moe_layers:
            if layer.router.expert_bias is not None:
                layer.router.expert_bias.zero_()
    require_filled(model, "random weights")
    return model.eval().requires_grad_(False)


def whole_logprobs(model: VPGPTModel, prompts: list[list[int]], made: list[Generated]) -> torch.Tensor:
    """Log-probabilities of what was made, float32 `[made]`, by one pass over whole rows of one length."""
    rows = torch.tensor([[*prompt, *one.ids] for prompt, one in zip(prompts, made, strict=True)]).cuda()
    places = torch.arange(rows.shape[1], device="cuda").expand_as(rows)
    found = []
    with evaluating(model):
        hidden = model.forward_hidden(rows, places, torch.zeros_like(rows))[len(prompts[0]) - 1 : -1]
        for number in range(len(prompts)):
            head = model.head_weight
            wide = torch.float32 if head.dtype == torch.bfloat16 else head.dtype
            logits = torch.mm(hidden[:, number], head.t(), out_dtype=wide)
            chosen = logits.gather(1, rows[number, len(prompts[0]) :, None])[:, 0]
            found.append(chosen - logits.logsumexp(dim=1))
    return torch.cat(found)


def distances(model: VPGPTModel, layers: int, prompts: list[list[int]]) -> dict[str, dict[str, float]]:
    """How far log-probabilities in slots, and those of a whole pass in bf16, are from float32 (rms).

    The comparator is `reference` in float32 with the same weights. Tokens are drawn: the likeliest of slots
    would be chosen for its error. Routing is a choice too: where two experts are nearly equal any rounding
    takes another one, with random weights in every layer, and what follows is another model's. So it is
    measured once more with routed experts that return nothing, where errors are those of rounding alone.
    """
    found = {}
    for name in ("as it is", "routed experts return nothing"):
        if name != "as it is":
            for layer in model.moe_layers:
                for parameter in (layer.experts.weight2, layer.experts.bias2):
                    if isinstance(parameter, torch.Tensor):
                        parameter.zero_()
        made = generate(
            model,
            prompts,
            max_new_tokens=64,
            sampling=Sampling(temperature=1.0),
            seeds=range(len(prompts)),
            rows=len(prompts),
        )
        forget_slots(model)
        slots = torch.tensor([value for one in made for value in one.logprobs], device="cuda")
        narrow = whole_logprobs(model, prompts, made)
        exact = build_model(
            architecture_of(layers), dtype=torch.float32, device="cuda", seed=None, backend="reference"
        )
        weights = {name: value for name, value in model.state_dict().items() if value is not None}
        missing = set(dict(exact.named_parameters())) & set(exact.load_state_dict(weights, strict=False)[0])
        if missing:
            raise AssertionError(f"not in the weights: {sorted(missing)[:3]}")
        wanted = whole_logprobs(exact.eval().requires_grad_(False), prompts, made)
        del exact
        gc.collect()
        torch.cuda.empty_cache()
        found[name] = {
            "slots from float32": rms(slots - wanted),
            "whole pass in bf16 from float32": rms(narrow - wanted),
            "slots from whole pass in bf16": rms(slots - narrow),
            "spread of float32": round(float(wanted.std()), 4),
        }
    return found


def rms(values: torch.Tensor) -> float:
    """Root of the mean square."""
    return round(float(values.square().mean().sqrt()), 5)


def kernels_of_a_step(slots: Slots) -> dict[str, Any]:
    """Kernels of one step, their time, and the dearest of them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        slots.step(1)
        torch.cuda.synchronize()
    found = [event for event in profiler.key_averages() if event.self_device_time_total > 0]
    found.sort(key=lambda event: -event.self_device_time_total)
    return {
        "kernels": sum(event.count for event in found),
        "kernels_ms": round(sum(event.self_device_time_total for event in found) / 1000, 3),
        "dearest": {
            event.key[:80]: [event.count, round(event.self_device_time_total / 1000, 3)]
            for event in found[:25]
        },
    }


def measure_slots(layers: int, rows: int, prompt_tokens: int, new_tokens: int, few: int) -> dict[str, Any]:
    """Time slots, the prompts' pass included, and batches of the same prompts over `few` tokens."""
    model = locked(layers)
    generator = torch.Generator().manual_seed(0)
    shape = (rows, prompt_tokens)
    prompts = torch.randint(0, model.vocab_size, shape, generator=generator).tolist()

    def timed(tokens: int) -> tuple[float, list[Generated]]:
        torch.cuda.synchronize()
        start = time.perf_counter()
        made = generate(model, prompts, max_new_tokens=tokens, rows=rows)
        torch.cuda.synchronize()
        return time.perf_counter() - start, made

    first, _ = timed(new_tokens)
    seconds, _ = timed(new_tokens)
    longest = prompt_tokens + new_tokens
    with evaluating(model):
        slots = slots_of(model, count=rows, capacity=longest, room=new_tokens, sampling=GREEDY)
        steps = []
        for place in (1, new_tokens // 2):
            slots.begin((), new_tokens)
            slots.admit(range(rows), prompts, None)
            slots.step(place)
            torch.cuda.synchronize()
            start = time.perf_counter()
            slots.step(20)
            torch.cuda.synchronize()
            steps.append(1000 * (time.perf_counter() - start) / 20)
        kernels = kernels_of_a_step(slots)
    found = {
        "layers": layers,
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "tokens_per_s": round(rows * new_tokens / seconds, 1),
        "first_call_s": round(first, 1),
        "step_ms": [round(step, 3) for step in steps],
        "steps_tokens_per_s": [round(1000 * rows / step, 1) for step in steps],
        "allocated_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        **kernels,
    }
    forget_slots(model)
    del slots
    gc.collect()
    torch.cuda.empty_cache()
    model.backend = replace(model.backend, slots=False)
    timed(2)
    one, _ = timed(1)
    several, _ = timed(1 + few)
    found["batches_step_ms"] = round(1000 * (several - one) / few, 2)
    found["speed_ratio"] = found["batches_step_ms"] / statistics.mean(steps)
    model.backend = replace(model.backend, slots=True)
    found["rms_of_log_probabilities"] = distances(model, layers, prompts[:8])
    apart = found["rms_of_log_probabilities"]["routed experts return nothing"]
    if apart["slots from float32"] > 1.5 * apart["whole pass in bf16 from float32"] + 1e-4:
        raise SystemExit(f"slots are further from float32 than a whole pass in bf16: {apart}")
    return found


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, help="default: 4, in slots 64")
    parser.add_argument("--prompt-tokens", type=int, help="default: 512, in slots 128")
    parser.add_argument("--new-tokens", type=int, help="default: 32, in slots 256")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slots", action="store_true", help="static slots of the locked model on a GPU")
    parser.add_argument("--layers", type=int, default=80, help="of the locked model (default: all 80)")
    parser.add_argument("--record", action="store_true", help="append the result to results.jsonl")
    arguments = parser.parse_args()
    rows, prompt_tokens, new_tokens = (
        given or default
        for given, default in zip(
            (arguments.rows, arguments.prompt_tokens, arguments.new_tokens),
            (64, 128, 256) if arguments.slots else (4, 512, 32),
            strict=True,
        )
    )
    if arguments.slots:
        found = measure_slots(arguments.layers, rows, prompt_tokens, new_tokens, few=12)
        print(json.dumps(found))
        if arguments.record:
            record(
                f"generate in slots, {arguments.layers} layers of the locked model",
                found["tokens_per_s"],
                "tokens/s",
                comparator="a step of the same model and batch, operation by operation",
                ratio=found["speed_ratio"],
                details=found,
            )
        return
    found = measure(rows, prompt_tokens, new_tokens, arguments.repeats)
    print(json.dumps(found))
    if arguments.record:
        record(
            "generate, smoke student on a CPU",
            found["tokens_per_s"],
            "tokens/s",
            comparator="the whole row run again for every token",
            ratio=found["speed_ratio"],
            details=found,
        )


if __name__ == "__main__":
    main()
