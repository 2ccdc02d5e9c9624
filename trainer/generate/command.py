"""`python -m trainer generate`: continue a prompt, or answer in a conversation, from the command line."""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.json_text import parse_json
from trainer.contract.printed import exact_json, print_refusal
from trainer.contract.words import BACKENDS, require_word

if TYPE_CHECKING:
    from trainer.decoding.generation import Generated
    from trainer.evaluate.models import LanguageModel

DESCRIPTION = """Continues prompts with a published checkpoint of ours or a Hugging Face directory.

A single continuation is written as it is made when the output is a terminal. Speed and endings go to stderr.
"""

EXAMPLES = """examples:
  python -m trainer generate --checkpoint PAYLOAD --tokenizer O200K --prompt "The sea is" --max-new-tokens 40
  python -m trainer generate --checkpoint PAYLOAD --tokenizer O200K --conversation --prompt "What is 2+2?"
  python -m trainer generate --checkpoint PAYLOAD --tokenizer O200K --conversation --effort medium \\
      --prompt "Name a prime." --temperature 0.8 --top-p 0.95 --samples 4 --seed 7 --json
  echo "A long prompt" | python -m trainer generate --checkpoint HF_DIRECTORY --prompt -

exit codes:
  0    done
  130  interrupted
  1    failed: the message says why
  2    wrong arguments
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; imports nothing heavy."""
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="DIR",
        help="payload of a checkpoint, or HF directory",
    )
    parser.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="payload of o200k_tokenizer; needed for our checkpoints, a Hugging Face one has its own",
    )
    parser.add_argument(
        "--prompt", action="append", required=True, metavar="TEXT", help="may be repeated; - reads stdin"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    talk = parser.add_argument_group("conversation")
    talk.add_argument(
        "--conversation",
        action="store_true",
        help="the prompt is the user's message of a Harmony conversation",
    )
    talk.add_argument(
        "--experiment",
        metavar="NAME",
        help="whose system and developer message are used (default: $VPMOE_EXPERIMENT, else smoke)",
    )
    talk.add_argument("--effort", choices=("low", "medium", "high"), help="instead of the experiment's")
    chance = parser.add_argument_group("sampling")
    chance.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 is greedy (default)")
    chance.add_argument("--top-k", type=int, default=0, metavar="K", help="0: all tokens (default)")
    chance.add_argument("--top-p", type=float, default=1.0, metavar="P", help="1: all tokens (default)")
    chance.add_argument("--samples", type=int, default=1, metavar="N", help="continuations of each prompt")
    chance.add_argument("--seed", type=int, default=1234, metavar="N", help="default: 1234")
    plain = parser.add_argument_group("plain prompts")
    plain.add_argument("--bos", action="store_true", help="begin with the tokenizer's BOS")
    plain.add_argument(
        "--stop", type=int, action="append", metavar="ID", help="end at this id too; may be repeated"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="default: fp32")
    parser.add_argument(
        "--backend",
        default="reference",
        metavar="NAME",
        help="of a checkpoint of ours (default: reference); fused: bf16 on a GPU, the prompts side by side",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object with ids and log-probabilities")


class TextStream:
    """Text of a growing list of ids, piece by piece: never half a character.

    Decodes from the last token that ended on a whole character, so that tokenizers which treat a first token
    differently are served too.

    Args:
        decode: Ids to text, broken UTF-8 as U+FFFD.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []  # from the window's first
        self._shown = 0  # characters of the window's text

    def add(self, token: int) -> str:
        """Return the text that became certain."""
        self._ids.append(token)
        text = self._decode(self._ids)
        certain = text.rstrip("\ufffd")  # what follows may be the beginning of a character
        piece = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        if certain == text:
            self._ids = self._ids[-1:]
            self._shown = len(self._decode(self._ids))
        return piece

    def rest(self) -> str:
        """Return the text that never became certain."""
        return self._decode(self._ids)[self._shown :]


def main(options: argparse.Namespace) -> int:
    """Run the command."""
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # "No CUDA runtime is found"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what libraries say about each other is not the user's business
            _refuse(options)
            prompts = [_standard_input() if text == "-" else text for text in options.prompt]
            return _generate(options, prompts)
    except (ValueError, FloatingPointError, NotImplementedError, OSError) as error:
        print_refusal(error)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt -: standard input is not {error.encoding} (byte {error.start}); give it as UTF-8"
        ) from error


def _refuse(options: argparse.Namespace) -> None:
    """Return what can be seen to be wrong before anything heavy is loaded."""
    if not (options.checkpoint / "config.json").is_file():
        raise ValueError(
            f"--checkpoint {options.checkpoint} holds no config.json; give a directory that does, such as "
            "the payload of an artifact"
        )
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: at least 1")
    if options.samples > 1 and options.temperature == 0.0:
        raise ValueError(
            f"--samples {options.samples} at temperature 0 would give equal texts; set --temperature"
        )
    require_word(BACKENDS, options.backend, "--backend")
    if not options.conversation and (options.effort or options.experiment):
        raise ValueError("--effort and --experiment describe a conversation; add --conversation")
    if options.conversation and options.bos:
        raise ValueError("--bos begins plain prompts; a conversation has a beginning of its own")
    if options.prompt.count("-") > 1:
        raise ValueError("--prompt - reads all of stdin, so it can be given once")


def _generate(options: argparse.Namespace, texts: list[str]) -> int:
    from trainer.checkpoints.format import SCHEMA
    from trainer.decoding.generation import generate
    from trainer.decoding.sampling import Sampling
    from trainer.evaluate.opening import open_model

    sampling = Sampling(options.temperature, options.top_k, options.top_p)
    path = options.checkpoint / "config.json"
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); restore it") from error
    ours = isinstance(config, dict) and config.get("schema") == SCHEMA
    if ours and options.tokenizer is None:
        raise ValueError(
            f"--tokenizer is missing: {options.checkpoint} has token ids of o200k; give the payload of "
            "o200k_tokenizer"
        )
    if not ours and options.backend != "reference":
        raise ValueError(
            f"--backend {options.backend}: {options.checkpoint} is no checkpoint of ours; leave it out"
        )
    if not ours and options.tokenizer is not None:
        raise ValueError(
            f"--tokenizer: {options.checkpoint} is no checkpoint of ours and brings its own; leave it out"
        )
    model = open_model(
        options.checkpoint,
        name=options.checkpoint.name,
        device=options.device,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        backend=options.backend,
    )
    asked = [text for text in texts for _ in range(options.samples)]
    ids = [_encode(options, model, text) for text in asked]
    seeds = [options.seed + number % options.samples for number in range(len(asked))]
    streams = len(asked) == 1 and sys.stdout.isatty() and not options.json
    stream = TextStream(model.tokenizer.decode)

    def show(_number: int, token: int) -> None:
        print(stream.add(token), end="", flush=True)

    started = time.perf_counter()
    made = generate(
        model.module,
        ids,
        max_new_tokens=options.max_new_tokens,
        stop=_stop_ids(model, options.stop or []),
        sampling=sampling,
        seeds=seeds,
        watch=show if streams else None,
    )
    seconds = time.perf_counter() - started
    if options.json:
        print(exact_json(_document(options, model, asked, ids, seeds, made)))
    elif streams:
        print(stream.rest())
    else:
        for number, one in enumerate(made):
            if len(made) > 1:
                print(f"--- prompt {number // options.samples + 1}, sample {number % options.samples + 1}")
            print(model.tokenizer.decode(one.ids))
    tokens = sum(len(one.ids) for one in made)
    ended = sum(one.finish == "stop" for one in made)
    print(
        f"{tokens} tokens in {seconds:.1f} s ({tokens / seconds:.1f} tokens/s); {ended} of {len(made)} ended "
        f"with a stop id, {len(made) - ended} at --max-new-tokens",
        file=sys.stderr,
    )
    return 0


def _encode(options: argparse.Namespace, model: "LanguageModel", text: str) -> list[int]:
    if not options.conversation:
        ids = [model.tokenizer.bos] if options.bos else []
        ids += model.tokenizer.encode(text)
        if not ids:
            raise ValueError("--prompt is empty: add --bos to start from nothing")
        return ids
    from trainer.contract.schema.experiment import load_experiment
    from trainer.decoding.conversation import conversation_prompt

    experiment = load_experiment(options.experiment or os.environ.get("VPMOE_EXPERIMENT") or "smoke")
    return conversation_prompt(model.tokenizer, experiment.data.synth_harmony, text, effort=options.effort)


def _stop_ids(model: "LanguageModel", extra: Sequence[int]) -> list[int]:
    """Return what ends a sequence for this checkpoint, and what the user adds."""
    from trainer.decoding.conversation import ENDOFTEXT, STOP_IDS, speaks_harmony

    found = {*extra}
    if speaks_harmony(model.tokenizer):
        found |= {*STOP_IDS, ENDOFTEXT}
    if model.tokenizer.eos is not None:
        found.add(model.tokenizer.eos)
    configured: Any = getattr(getattr(model.module, "generation_config", None), "eos_token_id", None)
    if configured is not None:
        found |= {configured} if isinstance(configured, int) else set(configured)
    return sorted(found)


def _document(
    options: argparse.Namespace,
    model: "LanguageModel",
    asked: Sequence[str],
    ids: Sequence[Sequence[int]],
    seeds: Sequence[int],
    made: Sequence["Generated"],
) -> dict[str, Any]:
    greedy = options.temperature == 0.0
    return {
        "checkpoint": str(options.checkpoint),
        "sampling": {
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
        },
        "max_new_tokens": options.max_new_tokens,
        "sequences": [
            {
                "prompt": text,
                "prompt_ids": list(prompt),
                "seed": None if greedy else seed,
                "ids": list(one.ids),
                "logprobs": list(one.logprobs),
                "text": model.tokenizer.decode(one.ids),
                "finish": one.finish,
            }
            for text, prompt, seed, one in zip(asked, ids, seeds, made, strict=True)
        ],
    }
