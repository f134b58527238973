"""What the TensorRT engines of one device share: working memory, and a stream on which TensorRT does not wait."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from engines.base import as_device
from engines.errors import EngineError

_DEFAULT_STREAM = 0


class Scratch:
    """One block of device memory that holds the intermediate tensors of whichever engine is running.

    The engines of a step run one after the other, so together they need only as much as the hungriest of them. All
    engines that are given the same object must run on one stream, or on streams that wait for each other.

    Args:
        device: device where the memory lies.
    """

    def __init__(self, device: str | torch.device = "cuda") -> None:
        self.device = as_device(device)
        self._memory = torch.empty(0, dtype=torch.uint8, device=self.device)
        self._captured: list[Tensor] = []

    @property
    def nbytes(self) -> int:
        """Size of the memory that new calls use, in bytes."""
        return self._memory.numel()

    def address(self, size: int) -> int:
        """Return the address of at least ``size`` bytes, valid until the next call; the memory grows if it is smaller.

        Memory that is asked for while a CUDA graph is being captured is kept for the life of this object, because the
        CUDA graph has its address.

        Raises:
            EngineError: if the memory would have to grow during a capture.
        """
        in_capture = capturing()
        if size > self.nbytes:
            if in_capture:
                raise EngineError(
                    f"an engine needs {size} bytes of scratch memory during the capture of a CUDA graph, but there "
                    f"are {self.nbytes}. Run everything once with the same shapes before the capture."
                )
            # Kernels that are queued may still use the old memory: torch reuses memory in the order of the stream.
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.device)
        if in_capture and not any(self._memory is kept for kept in self._captured):
            self._captured.append(self._memory)
        return self._memory.data_ptr()


@contextmanager
def launch_stream(device: torch.device) -> Iterator[int]:
    """Make a CUDA device current, and give the handle of a stream that continues torch's current one.

    On CUDA's default stream TensorRT waits for the GPU in every call. So it never gets that one, but a stream of its
    own between two events, which the GPU waits for and the CPU does not.
    """
    with torch.cuda.device(device):
        current = torch.cuda.current_stream()
        if current.cuda_stream != _DEFAULT_STREAM:
            yield current.cuda_stream
            return
        own = _own_stream(device)
        own.wait_stream(current)
        try:
            yield own.cuda_stream
        finally:
            current.wait_stream(own)


def capturing() -> bool:
    """Tell whether torch's current stream is being captured in a CUDA graph."""
    # The first question keeps a torch without CUDA from failing at the second.
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


@functools.cache
def _own_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
