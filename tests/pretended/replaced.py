"""What does not reach torch's dispatcher, on a device that is not there."""

import contextlib
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.pretended.dispatch import PINNED, OnCuda, copied, inner, is_pinned, waits

if TYPE_CHECKING:
    from tests.pretended.cuda import PretendedCuda


class Event:
    """Its time is the host's: everything has ended when it is recorded."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, *_: Any) -> None:
        self.at = time.perf_counter()

    def wait(self, *_: Any) -> None:
        pass

    def synchronize(self) -> None:
        waits("event")

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Stream:
    """All streams are one."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def wait_stream(self, _: "Stream") -> None:
        pass

    def wait_event(self, _: Event) -> None:
        pass

    def synchronize(self) -> None:
        waits("stream")


class Graph:
    """Operations, done again on the same memory: what the host knew stays as it was."""

    def __init__(self) -> None:
        self.steps: list[Callable[[], object]] = []

    def replay(self) -> None:
        with _disable_current_modes():
            for step in self.steps:
                step()


def of_torch() -> Iterator[tuple[Any, str, Any]]:
    """What does not reach the dispatcher."""
    numpy, tolist, pinned = Tensor.numpy, Tensor.tolist, Tensor.is_pinned
    address = Tensor.data_ptr

    def to_numpy(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(tensor, OnCuda):
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use "
                "Tensor.cpu() to copy the tensor to host memory first."
            )
        return numpy(tensor, *args, **kwargs)

    def to_list(tensor: Tensor) -> Any:
        if isinstance(tensor, OnCuda):
            waits("value read")
        return tolist(inner(tensor))

    def pin(tensor: Tensor, *_: Any) -> Tensor:
        made = tensor.clone()
        PINNED.add(made.untyped_storage().data_ptr())
        return made

    def made_on(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
            if device is None or torch.device(device).type != "cuda":
                return make(*args, device=device, **kwargs)
            if torch.is_tensor(args[0]):
                return args[0].to(device=device, **kwargs)
            found = make(*args, **kwargs)
            copied("to the device", found.nbytes, pinned=False, asynchronous=False)
            return OnCuda(found)

        return made

    def of_type(tensor: Tensor, data: Any, **kwargs: Any) -> Tensor:
        how = {"dtype": tensor.dtype, "device": tensor.device, **kwargs}
        return torch.tensor(data, **how)

    yield Tensor, "new_tensor", of_type
    yield Tensor, "numpy", to_numpy
    yield Tensor, "tolist", to_list
    yield Tensor, "pin_memory", pin
    yield Tensor, "is_pinned", lambda one, *_: is_pinned(one) or pinned(inner(one))
    yield Tensor, "data_ptr", lambda one: address(inner(one))
    yield Tensor, "record_stream", lambda *_: None
    yield torch, "tensor", made_on(torch.tensor)
    yield torch, "as_tensor", made_on(torch.as_tensor)


def of_cuda(device: "PretendedCuda") -> Iterator[tuple[Any, str, Any]]:
    """A device with streams, events and graphs."""
    about = SimpleNamespace(
        name="pretended",
        total_memory=64 << 30,
        multi_processor_count=4,
        L2_cache_size=1 << 12,
        shared_memory_per_block_optin=227 << 10,
        major=9,
        minor=0,
    )

    @contextlib.contextmanager
    def graph(made: Graph, **_: Any) -> Iterator[None]:
        device.capturing = made
        try:
            yield
        finally:
            device.capturing = None

    cuda = torch.cuda
    # Tensors of any mode ask for it in C++.
    yield cuda, "_lazy_init", lambda: None
    yield cuda, "is_available", lambda: True
    yield cuda, "device_count", lambda: 1
    yield cuda, "current_device", lambda: 0
    yield cuda, "get_device_name", lambda *_: about.name
    yield cuda, "get_device_capability", lambda *_: (about.major, about.minor)
    yield cuda, "get_device_properties", lambda *_: about
    yield cuda, "mem_get_info", lambda *_: (about.total_memory, about.total_memory)
    yield cuda, "memory_allocated", lambda *_: 0
    yield cuda, "max_memory_allocated", lambda *_: 0
    yield cuda, "reset_peak_memory_stats", lambda *_: None
    yield cuda, "empty_cache", lambda: None
    yield cuda, "synchronize", lambda *_: waits("synchronize")
    yield cuda, "current_stream", lambda *_: Stream()
    yield cuda, "stream", lambda _: contextlib.nullcontext()
    yield cuda, "is_current_stream_capturing", lambda: device.capturing is not None
    yield cuda, "Stream", Stream
    yield cuda, "Event", Event
    yield cuda, "CUDAGraph", Graph
    yield cuda, "graph", graph
