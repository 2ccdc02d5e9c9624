"""One step of all parts on a GPU, without a word to or from the host in between.

The norm of the gradients, the factor that clips them and whether the step is finite stay on the device, in
`gate`; learning rates, decays and bias corrections are sent ahead, in `rates`. Kernels read both, so all of a
step is launched before anyone waits, and a step that is not finite changes nothing. A few launches serve all
tensors: see `trainer.optim.small_matrices`, `trainer.optim.large_matrices` and
`trainer.optim.elementwise_kernels`. They read and write what stays where it is, so from the second step on
they are one CUDA graph where a rank is alone; the first compiles kernels.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from trainer.contract.schema.training import OptimizerConfig
from trainer.job.marks import Mark, unmarked
from trainer.optim.large_matrices import LargeMatrices
from trainer.optim.parts import Part
from trainer.optim.polar_express import Coefficients
from trainer.optim.routing import Route
from trainer.optim.small_matrices import TILING, SmallMatrices, Tiling, fits
from trainer.optim.tables import CHUNK, aligned, chunks, table
from trainer.optim.topology import Topology

CLIP_EPSILON = 1e-6
"""Added to the norm before dividing, as Megatron and torch do."""
_CHUNKS_PER_SUM = 16


class DeviceStep:
    """The parts that take part in a step, as kernels see them.

    Args:
        parts: The parts; their tensors stay where they are.
        counted: Those whose gradients this rank counts in the norm.
        settings: Of the optimizer.
        coefficients: Of Polar Express.
        orthogonalize: `[B, m, n] → [B, m, n]`, float32 out, for matrices without a short side.
        topology: Process groups.
        device: Where the parts are; there may be none.
        tiling: How the kernel of small matrices is cut.
        capture: Launch all of a step as a CUDA graph where one can be; otherwise kernel by kernel.

    Attributes:
        gate: fp32 `[2]`: the factor on the gradients; 1, or 0 where the step is not finite.
        rates: fp32 `[routes, 4]`: lr, decay factor 1 − lr·wd, lr / (1 − β₁ᵗ), √(1 − β₂ᵗ).
        mark: Told of the parts of a step as they are launched.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        counted: Sequence[Part],
        settings: OptimizerConfig,
        coefficients: Coefficients,
        orthogonalize: Callable[[Tensor], Tensor],
        topology: Topology,
        device: torch.device,
        *,
        tiling: Tiling = TILING,
        capture: bool = True,
    ) -> None:
        self._settings, self._topology = settings, topology
        self._capture = capture and device.type == "cuda" and topology.world.size == 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._recorded: tuple[float, bool] | None = None
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self.mark: Mark = unmarked
        self._routes = list(dict.fromkeys(part.route for part in parts))
        rows = {route: row for row, route in enumerate(self._routes)}
        self.gate = torch.ones(2, dtype=torch.float32, device=device)
        self.rates = torch.zeros((len(rows), 4), dtype=torch.float32, device=device)
        self._report = torch.zeros(2, dtype=torch.float64, device=device)
        self.squares = Squares(counted, device)
        small = {id(part) for part in parts if fits(part)}
        matrices = [part for part in parts if part.route.algorithm == "normuon"]
        self.small = SmallMatrices(
            [part for part in matrices if id(part) in small], rows, settings, coefficients, tiling=tiling
        )
        self.large = LargeMatrices(
            [part for part in matrices if id(part) not in small],
            rows,
            settings,
            orthogonalize,
            topology.tensor,
        )
        others = [part for part in parts if part.route.algorithm != "normuon"]
        self.elementwise = Elementwise(others, rows, settings)

    def run(
        self, rate: Callable[[Route], float], *, steps: int, clip_grad: float, loss: Tensor | None
    ) -> None:
        """Launch a step; collective.

        Args:
            rate: Learning rate of a route in this step.
            steps: Steps of the run, this one included.
            clip_grad: Largest norm of the gradients; 0 does not clip.
            loss: A number that must be finite too, on the device and the same on every rank.
        """
        self.prepare(rate, steps=steps)
        if loss is not None:
            self._loss.copy_(loss)
            loss = self._loss
        # Parts can be told apart only where they are launched one by one.
        if self._capture and self.mark is unmarked and self._recorded == (clip_grad, loss is not None):
            if self._graph is None:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):
                    self._launch(clip_grad, loss)
            self._graph.replay()
            return
        self._graph, self._recorded = None, (clip_grad, loss is not None)
        self._launch(clip_grad, loss)

    def _launch(self, clip_grad: float, loss: Tensor | None) -> None:
        self.mark("gradient norm")
        self.measure(clip_grad, loss)
        self.update()

    def compile(self) -> None:
        """Compile the kernels that take longest: launched behind a closed gate they write nothing."""
        closed = torch.zeros_like(self.gate)
        self.squares.total()
        self.small.step(self.rates, closed)
        self.elementwise.step(self.rates, closed)

    def prepare(self, rate: Callable[[Route], float], *, steps: int) -> None:
        """Send the numbers of a step; see `run`."""
        if not self._routes:
            return
        beta1, beta2 = self._settings.adam_beta1, self._settings.adam_beta2
        values = []
        for route in self._routes:
            lr, age = rate(route), steps - route.frozen_steps  # its averages are that old
            corrections = (lr / (1 - beta1**age), (1 - beta2**age) ** 0.5)
            values.append((lr, 1 - lr * route.weight_decay, *corrections))
        self.rates.copy_(torch.tensor(values, dtype=torch.float32), non_blocking=True)

    def measure(self, clip_grad: float, loss: Tensor | None) -> None:
        """Set the gate by the norm of the gradients; see `run`."""
        total = self.squares.total()
        self._topology.world.sum_(total)
        norm = total.sqrt()
        finite = norm.isfinite()
        if loss is not None:
            finite = finite & loss.isfinite()
        scale = (clip_grad / (norm + CLIP_EPSILON)).clamp_max(1.0) if clip_grad else torch.ones_like(norm)
        torch.stack((norm, scale), out=self._report)
        self.gate.copy_(torch.stack((scale, finite.double())))

    def update(self) -> None:
        """Launch the updates, by what `prepare` and `measure` left on the device."""
        self.mark("NorMuon, small matrices")
        self.small.step(self.rates, self.gate)
        self.mark("NorMuon, matrices")
        self.large.step(self.rates, self.gate)
        self.mark("AdamW")
        self.elementwise.step(self.rates, self.gate)

    def read(self) -> tuple[float, float]:
        """Wait for the step; return the norm of its gradients and the factor that clipped them."""
        norm, scale = self._report.tolist()
        return norm, scale


class Squares:
    """Sums the squares of gradients.

    Args:
        parts: Whose gradients are counted.
        device: Where they are.
    """

    def __init__(self, parts: Sequence[Part], device: torch.device) -> None:
        self._lists = []
        for whole in (True, False):
            grads = [part.grad for part in parts if aligned(part.grad) is whole]
            if grads:
                rows = [[grad.data_ptr(), grad.numel()] for grad in grads]
                cut = chunks([grad.numel() for grad in grads], device)
                self._lists.append((whole, table(rows, device), cut))
        programs = sum(-(-cut.size(0) // _CHUNKS_PER_SUM) for _, _, cut in self._lists)
        self._sums = torch.zeros(programs, dtype=torch.float32, device=device)

    def total(self) -> Tensor:
        """Return the sum, float64 without dimensions, on the device."""
        from trainer.optim.elementwise_kernels import sum_of_squares

        start = 0
        for whole, rows, cut in self._lists:
            count = cut.size(0)
            programs = -(-count // _CHUNKS_PER_SUM)
            sum_of_squares[(programs,)](
                rows,
                cut,
                self._sums[start : start + programs],
                count,
                CHUNK=CHUNK,
                PER_PROGRAM=_CHUNKS_PER_SUM,
                ALIGNED=whole,
                num_warps=8,
            )
            start += programs
        return self._sums.double().sum()


class Elementwise:
    """AdamW and SGD of all other tensors.

    Args:
        parts: The parts.
        rows: A route's row in the table of rates.
        settings: Of the optimizer.
    """

    def __init__(self, parts: Sequence[Part], rows: Mapping[Route, int], settings: OptimizerConfig) -> None:
        self._settings = settings
        members: dict[tuple[bool, bool, bool], list[Part]] = {}
        for part in parts:
            whole = aligned(part.grad, part.master, part.weight, *part.state.values())
            kind = (whole, part.low_half, part.route.algorithm == "adamw")
            members.setdefault(kind, []).append(part)
        self._lists = []
        for kind, found in members.items():
            device = found[0].weight.device
            addresses = table([_addresses(part, rows[part.route]) for part in found], device)
            self._lists.append((kind, addresses, chunks([part.weight.numel() for part in found], device)))

    def step(self, rates: Tensor, gate: Tensor) -> None:
        """One step of all of them, in place.

        Args:
            rates: fp32 `[routes, 4]`, see `DeviceStep`.
            gate: fp32 `[2]`, see `DeviceStep`.
        """
        from trainer.optim.elementwise_kernels import adamw_step

        for (whole, low_half, moments), addresses, cut in self._lists:
            adamw_step[(cut.size(0),)](
                addresses,
                cut,
                rates,
                gate,
                self._settings.adam_beta1,
                self._settings.adam_beta2,
                self._settings.adam_eps,
                CHUNK=CHUNK,
                ALIGNED=whole,
                LOW_HALF=low_half,
                MOMENTS=moments,
                num_warps=8,
            )


def _addresses(part: Part, row: int) -> list[int]:
    moments = [part.state[name].data_ptr() if name in part.state else 0 for name in ("exp_avg", "exp_avg_sq")]
    return [
        part.grad.data_ptr(),
        *moments,
        part.master.data_ptr(),
        part.weight.data_ptr(),
        row,
        part.weight.numel(),
    ]
