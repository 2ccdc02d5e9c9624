"""Which neurons a narrower FFN keeps."""

import torch


def keep_largest(down: torch.Tensor, count: int) -> torch.Tensor:
    """Return the neurons with the largest output weights (method A).

    Args:
        down: The down projection `[H, F]`, in fp32: neuron i writes column i into the residual stream.
        count: Neurons to keep.

    Returns:
        int64 `[count]`, increasing. Of equal norms the lower index wins; the order of neurons does not
        Matter to the function.
    """
    norms = down.float().norm(dim=0)
    ranked = torch.sort(norms, descending=True, stable=True).indices
    return ranked[:count].sort().values
