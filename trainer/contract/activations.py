"""What a backend keeps of a forward pass for the backward pass, in bytes, by the config.

Counted tensor by tensor as the modules of `trainer.model` and `trainer.losses` save them; a test counts
the saved tensors of built models. T tokens of a micro-batch on a rank, c bytes of the model's dtype. Heads,
FFN widths and vocabulary are those of one tensor-parallel rank; a rank routes T / tp of the tokens, and an
even load over experts is assumed.

Of a backend that keeps attention, experts or the loss otherwise (`trainer.contract.keeping`) those are
counted so. What a compiler keeps of small operations is not known here: they are counted as the reference's.
The whole of `bench` on `fused` came out as measured.
"""

from dataclasses import dataclass
from typing import Literal

from trainer.contract.keeping import keeps
from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.schema.architecture import Architecture

Device = Literal["cpu", "cuda"]

GLOBAL_QUERY_BLOCK = 512
LOCAL_QUERY_BLOCK = 128
"""Queries that attention works off at a time: of a global layer, and at least of a local one."""
FUSED_LOSS_LOGITS = 1 << 26
"""256 MiB, with `small_loss_chunks`: a GPU that the model nearly fills has no gigabyte for them."""
LOSS_LOGITS: dict[Device, int] = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits of the loss alive at a time: 64 MiB and 1 GiB of float32."""


@dataclass(frozen=True)
class Pass:
    """One micro-batch on one rank.

    Attributes:
        arch: The architecture.
        length: Tokens of a row.
        rows: Rows of the micro-batch.
        width: Bytes of a number of the model's dtype: 2 or 4.
        device: Where it runs; the norm of a GPU is one kernel, that of a CPU several operations.
        tp: Tensor-parallel size.
        ep: Expert-parallel size.
        backend: Name of a module of `trainer.model.backends`.
    """

    arch: Architecture
    length: int
    rows: int
    width: int
    device: Device
    tp: int = 1
    ep: int = 1
    backend: str = "reference"

    @property
    def keeps(self) -> frozenset[str]:
        """What the backend keeps otherwise than the reference."""
        return keeps(self.backend)

    @property
    def tokens(self) -> int:
        """T."""
        return self.length * self.rows

    def saved(self) -> int:
        """Bytes that are kept from the embedding to the loss, whose own gradients are part of it."""
        arch = self.arch
        routed = set(moe_layers(arch))
        total = self._positions() + 8 * self.tokens
        for number, kind in enumerate(layer_kinds(arch), start=1):
            local = kind == "local"
            # The residual stream before each norm, and the norm's output for what reads it.
            total += 2 * self._norm(arch.model.hidden_size)
            total += self._projection(number, local) + self._core(local) + self._values(number)
            total += self._experts() if number in routed else self._ffn(dense_ffn_hidden_size(arch))
        return total + self._norm(arch.model.hidden_size) + self._loss()

    def loss_work(self) -> int:
        """Bytes of the loss beyond what it keeps: a chunk of logits, its gradient, copies of the head."""
        vocabulary, hidden = self.arch.vocab_size // self.tp, self.arch.model.hidden_size
        logits = FUSED_LOSS_LOGITS if "small_loss_chunks" in self.keeps else LOSS_LOGITS[self.device]
        chunk = min(max(1, logits // vocabulary), self.tokens) * vocabulary
        narrow_head = 0 if self.width == 4 else vocabulary * hidden
        if self.device == "cpu":  # multiplies in fp32
            forward = 4 * chunk + 4 * narrow_head
        else:
            forward = (4 + (self.width if self.width < 4 else 0)) * chunk
        backward = (4 + (self.width if self.width < 4 else 0)) * vocabulary * hidden
        return max(forward, backward)

    def _norm(self, size: int, heads: int = 1) -> int:
        """Count one norm over the last axis of `[T, heads, size]`."""
        elements, rows = self.tokens * heads * size, self.tokens * heads
        if self.device == "cpu":
            return 8 * elements + 4 * rows  # input and quotient, in fp32
        return self.width * elements + 4 * rows

    def _positions(self) -> int:
        """Count angles of a learnable rotation and, in fp32, their cosines and sines, once for all layers."""
        arch = self.arch
        half = arch.model.head_dim // 2
        heads = 1 if arch.grape.grapem_share_across_heads else arch.model.num_attention_heads // self.tp
        if arch.attention.position_embedding_type == "rope":
            return 8 * self.tokens * half if self.width == 4 else 0
        shared = 4 * self.tokens * half * heads + 4 * self.tokens
        return shared + (8 * self.tokens * half * heads if self.width == 4 else 0)

    def _projection(self, number: int, local: bool) -> int:
        """Count from the normed stream to q, k, v as the core takes them, and the projected result."""
        arch, c, tokens = self.arch, self.width, self.tokens
        model, tpa = arch.model, arch.tpa
        heads, groups = model.num_attention_heads // self.tp, model.num_query_groups // self.tp
        dim = model.head_dim
        total = c * tokens * model.hidden_size
        if tpa.use_tpa and local:
            rank, q_rank = tpa.tpa_rank or 0, tpa.tpa_q_rank or 0
            total += 4 * tokens * (heads * q_rank + 2 * groups * rank + (q_rank + 2 * rank) * dim)
        if model.qk_layernorm:
            if self.device == "cpu":
                total += self._norm(dim, heads) + self._norm(dim, groups)
                if c == 4:  # k and, before it is mixed, v are views that keep the whole projection
                    mixed = model.value_residual and number > 1
                    total += 4 * tokens * (heads + (groups if mixed else 0)) * dim
            else:
                copied = heads * dim if groups > 1 else 0
                total += c * tokens * (copied + (heads + 2 * groups) * dim) + 4 * tokens * (heads + groups)
        if arch.attention.position_embedding_type == "rope":
            total += 2 * c * tokens * dim if c < 4 else 0
        elif local:
            total += c * tokens * (heads + groups) * dim
            shared = 1 if arch.grape.grapem_share_across_heads else heads
            total += 2 * c * tokens * dim * shared if c < 4 else 0
        return total + c * tokens * heads * dim

    def _values(self, number: int) -> int:
        """Count both values of the value residual, in fp32."""
        model = self.arch.model
        if not model.value_residual or number == 1 or self.width == 4:
            return 0
        return 2 * 4 * self.tokens * model.num_query_groups // self.tp * model.head_dim

    def _core(self, local: bool) -> int:
        """Count scaled q, k and v in fp32, and for each block of queries its probabilities and mask."""
        model, window = self.arch.model, self.arch.attention.window_size
        heads, groups = model.num_attention_heads // self.tp, model.num_query_groups // self.tp
        if (
            "attention_sums" in self.keeps
        ):  # q, k, v (repeated where they carry a bias), the result, and log-sums
            alibi = self.arch.grape.grape_a and not local
            kept = 2 * heads + 2 * (heads if alibi else groups)
            return self.tokens * (self.width * kept * model.head_dim + 4 * heads)
        total = 4 * self.tokens * (heads + 2 * groups) * model.head_dim
        sink = 0 if model.softmax_type == "vanilla" else 1
        block = max(LOCAL_QUERY_BLOCK, 2 * window) if local else GLOBAL_QUERY_BLOCK
        for start in range(0, self.length, block):
            stop = min(start + block, self.length)
            keys = stop - (max(0, start - window + 1) if local else 0)
            queries = (stop - start) * self.rows
            total += queries * (4 * heads * (keys + sink) + keys)
        return total

    def _ffn(self, width: int) -> int:
        """Count a dense FFN: its input, ReLU and its square."""
        return self.width * self.tokens * (self.arch.model.hidden_size + 2 * width // self.tp)

    def _experts(self) -> int:
        """Count a mixture: router, sorted rows, what each expert keeps, the shared expert."""
        model, moe = self.arch.model, self.arch.moe
        assert moe is not None
        c, tokens, experts = self.width, self.tokens, moe.num_experts
        router = 4 * tokens * model.hidden_size  # its input in fp32
        router += 4 * experts * model.hidden_size if c < 4 else 0  # and its weight
        scores = 2 if moe.aux_loss_coeff and moe.router_load_balancing_type != "none" else 1
        router += 4 * tokens * experts * scores
        router += tokens * (12 * moe.topk + 9)
        pairs = tokens * moe.topk // self.tp
        if "unsorted_tokens" in self.keeps:  # weights, order, inverse and expert of each pair, and W₁ z + b₁
            shared = c * tokens * 2 * (moe.shared_expert_size or 0) // self.tp if moe.shared_expert else 0
            return router + pairs * (4 + 24 + c * model.ffn_hidden_size) + shared
        rows = pairs * (c * model.hidden_size + 4 + 16)
        rows += 16 * pairs if self.ep > 1 else 0
        inner = pairs * model.ffn_hidden_size * (c + 4 + c)
        biases = 0
        if c < 4 and model.add_bias_linear:
            biases = 4 * min(experts // self.ep, pairs) * model.hidden_size
        shared = 0
        if moe.shared_expert:
            width = (moe.shared_expert_size or 0) // self.tp
            shared = c * tokens * (2 * width + (model.hidden_size if c < 4 else 0))
        return router + rows + inner + biases + shared

    def _loss(self) -> int:
        """Count the gradients that the loss computes in its forward pass, in fp32."""
        hidden = self.arch.model.hidden_size
        return 4 * (self.tokens * hidden + self.arch.vocab_size // self.tp * hidden) + 8 * self.tokens
