"""Small arrays between host and device without waiting for the device: pinned copies in stream order."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def upload(device: torch.device, array: npt.NDArray[Any]) -> Tensor:
    """The array as a tensor on the device. On the CPU it shares the array's memory."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def upload_into(target: Tensor, array: npt.NDArray[Any]) -> None:
    """Write the array into a tensor of its shape, dtype converted by the copy."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    target.copy_(host.pin_memory() if target.is_cuda else host, non_blocking=True)


def download(tensor: Tensor) -> Tensor:
    """A pinned host copy that is complete once an event recorded after this call has passed."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
