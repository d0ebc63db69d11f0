"""Prefetching experts: the next one is read and copied while one computes.

On a GPU the next expert is read by a thread into pinned memory and copied on a stream
of its own, while the kernels of the one before it run. On a CPU nothing is gained:
experts are read when their turn comes.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from ..checkpoint.reader import Expert

Read = Callable[[int], Expert]


def read_ahead(
    numbers: Sequence[int], read: Read, device: torch.device
) -> Iterator[tuple[int, Expert]]:
    """Experts in the order of ``numbers``, on a GPU already there, in their own dtype.

    At most two are on the device and two in pinned memory. What follows on the current
    stream sees whole experts.

    Args:
        numbers: Which.
        read: Gives one; called once for each, in this order, by one thread.
        device: Where they are used.
    """
    if device.type != "cuda":
        for number in numbers:
            yield number, read(number)
        return

    def pinned(number: int) -> Expert:
        return Expert(
            *(
                matrix.pin_memory() if matrix.device.type == "cpu" else matrix
                for matrix in read(number)
            )
        )

    copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    computing = torch.cuda.current_stream(device)
    before_last: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    last: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    with ThreadPoolExecutor(1) as reader:
        coming = reader.submit(pinned, numbers[0]) if numbers else None
        for at, number in enumerate(numbers):
            assert coming is not None
            waiting = coming.result()
            if at + 1 < len(numbers):
                coming = reader.submit(pinned, numbers[at + 1])
            if at > 1:
                # Or a host that is faster than the device would fill its memory.
                before_last.synchronize()
            with torch.cuda.stream(copying):
                expert = Expert(
                    *(matrix.to(device, non_blocking=True) for matrix in waiting)
                )
            computing.wait_stream(copying)
            for matrix in expert:
                # Its memory was taken on the other stream.
                matrix.record_stream(computing)
            del waiting
            yield number, expert
            before_last, last = last, before_last
            last.record(computing)
            del expert
