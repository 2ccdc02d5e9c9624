"""The body of a training step as CUDA graphs: embedding to final norm, and the way back.

A step of the full model is some hundred thousand kernels of a few microseconds, launched one by one in more
time than they take. Captured once, they are launched by two calls. The loss is outside: whatever the
objective does with the hidden states runs as ever, between the replay of the one and of the other.

Graphs hold addresses. Inputs are therefore copied into tensors of their own, gradients go to `main_grad`,
whose place does not change, and weights are updated in place. The first micro-batch of a step replaces
gradients and the others add to them, so the way back has two graphs where a step has several. What would make
a graph wrong is looked at in every pass: another shape, more documents than it has room for, or other
parameters that train. The first two run as they are, without a graph; the third captures anew.
"""

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from trainer.model.document_mask import document_starts, fill_borders
from trainer.model.gpt import VPGPTModel
from trainer.model.parameters import is_written, mark_written, take_written

LOGGER = logging.getLogger(__name__)

DOCUMENTS_PER_ROW = 32
"""Room for runs of one document in the graph's list of borders, for each row of a micro-batch."""
_WARM_UP = 2
"""Passes before a capture: kernels compile and libraries set up in the first."""


class Body:
    """Runs a model up to its final norm for training, captured where its backend allows.

    Args:
        model: The model, whose optimizer has given its parameters their `main_grad`.
        several: Whether a step has several micro-batches.
        capture: Capture where the backend allows it; otherwise every pass runs operation by operation.
    """

    def __init__(self, model: VPGPTModel, *, several: bool = False, capture: bool = True) -> None:
        self._model, self._several = model, several
        self._wanted = capture and model.head_weight.is_cuda and model.backend.capturable
        self._graphs: _Graphs | None = None
        self._told: set[str] = set()

    def prepare(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        doc_id: Tensor,
        documents: int,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> bool:
        """Capture what a step will need and is not there, from its first micro-batch.

        Gradients and counts of tokens are garbage after a capture: whoever gets True forgets them.

        Args:
            tokens: int64 `[B, S]`.
            position_ids: int64 `[B, S]`.
            doc_id: int64 `[B, S]`.
            documents: Runs of one document in it, of `count_documents`.
            meanwhile: Called in a thread while the passes before a capture compile their kernels.

        Returns:
            Whether something was captured.
        """
        if not self._wanted:
            return False
        trained = tuple(p for p in self._model.parameters() if p.requires_grad)
        if self._graphs is not None and self._graphs.trained != trained:
            self.release()
        if self._graphs is not None or self._eager(tokens, documents) is not None:
            return False
        LOGGER.info("capturing CUDA graphs of a micro-batch of %s", list(tokens.shape))
        self._graphs = _Graphs(self._model, tokens, position_ids, doc_id, trained, self._several, meanwhile)
        return True

    def __call__(
        self, tokens: Tensor, position_ids: Tensor, doc_id: Tensor, documents: int
    ) -> tuple[Tensor, Tensor]:
        """Run forward; in training mode, after `prepare` for the step.

        Args:
            tokens: int64 `[B, S]`.
            position_ids: int64 `[B, S]`.
            doc_id: int64 `[B, S]`.
            documents: Runs of one document in it, of `count_documents`.

        Returns:
            Hidden states `[S, B, H]` and the routers' auxiliary loss, both to be back-propagated once.
        """
        reason = self._eager(tokens, documents)
        if reason is not None or self._graphs is None:
            if reason and reason not in self._told:
                self._told.add(reason)
                LOGGER.info("without a CUDA graph: %s", reason)
            hidden = self._model.forward_hidden(tokens, position_ids, doc_id)
            return hidden, self._model.pop_aux_loss(check_finite=False)
        hidden, aux = _Replay.apply(self._graphs, self._graphs.anchor, tokens, position_ids, doc_id)
        return hidden, aux

    @property
    def captured(self) -> bool:
        """Whether there are graphs that passes are replayed from."""
        return self._graphs is not None

    def release(self) -> None:
        """Let go of the graphs and their memory."""
        self._graphs = None

    def _eager(self, tokens: Tensor, documents: int) -> str | None:
        """Say why a pass runs without a graph; None where it runs with one, empty where none is wanted."""
        if not self._wanted:
            return ""
        if self._graphs is not None and self._graphs.tokens.shape != tokens.shape:
            return f"a micro-batch of {list(tokens.shape)}, captured are {list(self._graphs.tokens.shape)}"
        if documents > tokens.shape[0] * DOCUMENTS_PER_ROW:
            return f"more than {DOCUMENTS_PER_ROW} documents a row"
        return None


def count_documents(doc_id: Tensor) -> int:
    """Count the runs of one document in int64 `[B, S]` on the CPU, padding's among them."""
    return int(document_starts(doc_id).sum())


class _Graphs:
    """The graphs, the tensors that they read and write, and which parameters' gradients they hold."""

    def __init__(
        self,
        model: VPGPTModel,
        tokens: Tensor,
        position_ids: Tensor,
        doc_id: Tensor,
        trained: Sequence[torch.nn.Parameter],
        several: bool,
        meanwhile: Callable[[], None],
    ) -> None:
        self.trained = tuple(trained)
        self.tokens, self.position_ids, self.doc_id = (
            torch.empty_like(part).copy_(part) for part in (tokens, position_ids, doc_id)
        )
        self.borders = torch.empty(
            tokens.shape[0] * DOCUMENTS_PER_ROW + 1, dtype=torch.int32, device=tokens.device
        )
        fill_borders(self.doc_id, self.borders)
        # Hangs the replay on autograd: its inputs are integers, which have no gradients.
        self.anchor = torch.zeros((), device=tokens.device, requires_grad=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with ThreadPoolExecutor(1, "compile") as pool, torch.cuda.stream(stream):
            compiled = pool.submit(meanwhile)
            for _ in range(_WARM_UP):
                hidden, aux = self._forward(model)
                _backward((hidden, aux), (torch.zeros_like(hidden), torch.zeros_like(aux)))
                del hidden, aux
            compiled.result()
        torch.cuda.current_stream().wait_stream(stream)
        for parameter in self.trained:
            take_written(parameter)
        self.forward, self.first = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward):
            hidden, aux = self._forward(model)
        self.to_hidden, self.to_aux = torch.zeros_like(hidden), torch.zeros_like(aux)
        with torch.cuda.graph(self.first, pool=self.forward.pool()):
            _backward((hidden, aux), (self.to_hidden, self.to_aux), keep=several)
        self.further: torch.cuda.CUDAGraph | None = None
        if several:
            self.further = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.further, pool=self.forward.pool()):
                _backward((hidden, aux), (self.to_hidden, self.to_aux))
        self.hidden, self.aux = hidden.detach(), aux.detach()
        self.written = tuple(parameter for parameter in self.trained if take_written(parameter))

    def _forward(self, model: VPGPTModel) -> tuple[Tensor, Tensor]:
        hidden = model.forward_hidden(self.tokens, self.position_ids, self.doc_id, borders=self.borders)
        return hidden, model.pop_aux_loss(check_finite=False)

    def run_forward(self, tokens: Tensor, position_ids: Tensor, doc_id: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens.copy_(tokens)
        self.position_ids.copy_(position_ids)
        self.doc_id.copy_(doc_id)
        fill_borders(self.doc_id, self.borders)
        self.forward.replay()
        return self.hidden.clone(), self.aux.clone()

    def run_backward(self, to_hidden: Tensor, to_aux: Tensor) -> None:
        self.to_hidden.copy_(to_hidden)
        self.to_aux.copy_(to_aux)
        graph = self.further if any(map(is_written, self.written)) else self.first
        if graph is None:
            raise RuntimeError("a second backward pass of a step whose graphs were captured for one")
        graph.replay()
        mark_written(*self.written)


def _backward(
    outputs: tuple[Tensor, Tensor], gradients: tuple[Tensor, Tensor], *, keep: bool = False
) -> None:
    """Back-propagate; a dense model's auxiliary loss is a constant."""
    pairs = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad]
    torch.autograd.backward([pair[0] for pair in pairs], [pair[1] for pair in pairs], retain_graph=keep)


class _Replay(torch.autograd.Function):
    """A pass through the graphs, as autograd sees it: one operation without differentiable inputs."""

    @staticmethod
    def forward(
        ctx: Any, graphs: _Graphs, anchor: Tensor, tokens: Tensor, position_ids: Tensor, doc_id: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.graphs = graphs
        return graphs.run_forward(tokens, position_ids, doc_id)

    @staticmethod
    def backward(ctx: Any, to_hidden: Tensor, to_aux: Tensor) -> tuple[None, ...]:
        ctx.graphs.run_backward(to_hidden, to_aux)
        return None, None, None, None, None
