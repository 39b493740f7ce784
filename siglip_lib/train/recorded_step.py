"""A step of a training that a GPU replays from a CUDA graph, without the time that Python needs to launch it."""

from collections.abc import Callable

import torch
from torch import Tensor


class RecordedStep:
    """Run a step as it is a few times, then record it as a CUDA graph, and replay that; elsewhere always run it.

    Args:
        optimizer: of the step, capturable on a GPU. Its gradients are freed before the recording, so that they lie in
            the graph's memory.
        device: of the step's tensors.
        eager: calls before it is recorded: libraries set themselves up in the first ones. ``math.inf`` for never.
        stream: that it is recorded on; a new one if None.

    Attributes:
        recorded: whether the next call replays a graph. The call that records it replays it, too.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        eager: float = 3,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._eager = eager if device.type == "cuda" else float("inf")
        self._stream = stream
        self.release()

    def __call__(self, step: Callable[[], Tensor]) -> Tensor:
        """Do one step and return its result; a replay's lies where the next one's will.

        Args:
            step: the same in every call. It reads tensors that stay where they are, and updates weights.
        """
        if not self.recorded:
            if self._done < self._eager:
                self._done += 1
                return step()
            graph = torch.cuda.CUDAGraph()
            self._optimizer.zero_grad(set_to_none=True)
            # what other threads do, such as the one that watches over NCCL, must not spoil the recording
            with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
                self._result = step()
            self._graph = graph  # recording ran nothing
        self._graph.replay()
        return self._result

    @property
    def recorded(self) -> bool:
        return self._graph is not None

    def release(self) -> None:
        """Free the graph; further calls run as they are, then record a new one."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._result: Tensor | None = None
        self._done = 0
