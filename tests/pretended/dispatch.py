"""Operations on tensors that say cuda:0 and hold values on the CPU.

They compute, fail where devices are mixed, and tell ``ACTIVE`` what they would start,
copy and wait for.
"""

import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from tests.pretended.cuda import PretendedCuda

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")
WAITING = {
    "aten::_local_scalar_dense": "value read",
    "aten::_unique2": "unique",
    "aten::bincount": "bincount",
    "aten::equal": "equal",
    "aten::masked_select": "mask as an index",
    "aten::nonzero": "nonzero",
    "aten::unique_consecutive": "unique",
    # Those without _ex raise when they fail, and so have to know.
    "aten::linalg_cholesky": "errors read",
    "aten::linalg_inv": "errors read",
    "aten::linalg_solve": "errors read",
}
"""Operations whose result the host has to see, by why."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}
FREE = {
    *("aten::_reshape_alias", "aten::_unsafe_view", "aten::alias", "aten::as_strided"),
    *("aten::detach", "aten::diagonal", "aten::empty", "aten::empty_like"),
    *("aten::empty_strided", "aten::expand", "aten::new_empty", "aten::permute"),
    *("aten::select", "aten::slice", "aten::split", "aten::split_with_sizes"),
    *("aten::squeeze", "aten::t", "aten::transpose", "aten::unbind"),
    *("aten::unsqueeze", "aten::view", "aten::new_empty_strided"),
}
"""Operations that start nothing on a device: views, and memory that is not filled."""


class OnCuda(Tensor):
    """A tensor that says it is on a CUDA device."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "OnCuda":
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
        )
        made.inner = inner
        return made

    def __repr__(self) -> str:
        return f"OnCuda({self.inner!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


ACTIVE: "PretendedCuda | None" = None


def inner(value: Any) -> Any:
    """What the CPU computes with."""
    return value.inner if isinstance(value, OnCuda) else value


def mapped(function: Callable[[Any], Any], value: Any) -> Any:
    """Arguments or results, changed one by one; faster than torch's own trees."""
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)([mapped(function, one) for one in value])
    return function(value)


def flat(value: Any) -> Iterator[Any]:
    """The same, one by one."""
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        for one in value:
            yield from flat(one)
    else:
        yield value


def line() -> str:
    """The innermost line of the product or of a bench that is running."""
    for frame, number in traceback.walk_stack(None):
        name = frame.f_code.co_filename
        for folder in ("/vllm_moe_prune/", "/bench/"):
            if folder in name:
                return f"{name.rsplit(folder, 1)[1]}:{number}"
    return "elsewhere"


def waits(why: str) -> None:
    """The host waits for the device."""
    if ACTIVE is None:
        return
    where = f"{line()} {why}"
    if ACTIVE.capturing is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {where}")
    ACTIVE.waits[where] += 1


def copied(name: str, nbytes: int, *, pinned: bool, asynchronous: bool) -> None:
    """The host copies, and waits unless its memory is pinned and it need not."""
    if ACTIVE is None or nbytes == 0:
        return
    ACTIVE.copies[name] += nbytes
    if not (pinned and asynchronous):
        waits(f"{name} copy")
    else:
        ACTIVE.overlapped[line()] += 1


def refuse_mixed(name: str, args: Any, others: list[Tensor]) -> None:
    """Fail where CUDA does: only numbers may come from the CPU, and indices."""
    if name in INDEXING:
        if not isinstance(args[0], OnCuda):
            raise RuntimeError(
                "indices should be either on cpu or on the same device as the indexed "
                "tensor (cpu)"
            )
        if others:
            waits("index on the CPU")
        return
    strict = ("aten::index_add", "aten::index_copy", "aten::scatter", "aten::gather")
    if any(one.dim() > 0 for one in others) or (others and name.startswith(strict)):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two "
            f"devices, cuda:0 and cpu! ({name})"
        )


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation, with any arguments."""
    name = func._schema.name
    given = flat((args, list(kwargs.values())))
    tensors = [one for one in given if isinstance(one, Tensor)]
    on = [one for one in tensors if isinstance(one, OnCuda)]
    device = kwargs.get("device")
    device = None if device is None else torch.device(device)
    to_cuda = device is not None and device.type == "cuda"
    if name == "aten::_fused_sdp_choice":
        return 0  # plain mathematics
    there = name == "aten::_to_copy" and to_cuda and isinstance(args[0], OnCuda)
    if there and kwargs.get("dtype") in (None, args[0].dtype):
        # "cuda" is where it is, which the guard does not know: nothing is copied.
        return args[0]
    if ACTIVE is not None and (on or to_cuda) and name not in FREE:
        ACTIVE.launches[name] += 1
        ACTIVE.lines[line()] += 1
    if name in ("aten::_to_copy", "aten::to"):
        return moved(func, args, kwargs, device)
    plain_args = mapped(inner, args)
    plain_kwargs = {key: mapped(inner, value) for key, value in kwargs.items()}
    if device is not None and to_cuda:
        plain_kwargs["device"] = CPU
    if name == "aten::copy_":
        copy_(func, args, plain_args, plain_kwargs)
        return args[0]
    if not on:
        found = func(*plain_args, **plain_kwargs)
        if not to_cuda:
            return found
        if name not in FREE:
            capture(func, plain_args, plain_kwargs, found)
        return mapped(outer_of({}), found)
    if device is not None and not to_cuda:
        return func(*plain_args, **plain_kwargs)
    others = [one for one in tensors if not isinstance(one, OnCuda)]
    refuse_mixed(name, args, others)
    if name in WAITING:
        waits(WAITING[name])
    if name in INDEXING and any(
        one is not None and one.dtype == torch.bool for one in args[1]
    ):
        waits("mask as an index")
    found = func(*plain_args, **plain_kwargs)
    if name not in FREE:
        capture(func, plain_args, plain_kwargs, found)
    # Operations in place return what they were given.
    return mapped(outer_of({id(one.inner): one for one in on}), found)


def outer_of(known: dict[int, OnCuda]) -> Callable[[Any], Any]:
    """Puts results on the device, but for those that were there already."""

    def outer(one: Any) -> Any:
        if not isinstance(one, Tensor):
            return one
        return known[id(one)] if id(one) in known else OnCuda(one)

    return outer


def moved(
    func: Any, args: Any, kwargs: dict[str, Any], device: torch.device | None
) -> Tensor:
    """A copy in another place, of another type, or both."""
    source = args[0]
    if device is not None:
        kwargs = {**kwargs, "device": CPU}
    asynchronous = bool(kwargs.pop("non_blocking", False))
    plain = (inner(source), *args[1:])
    found = func(*plain, **kwargs)
    capture(func, plain, kwargs, found)
    was_on = isinstance(source, OnCuda)
    is_on = was_on if device is None else device.type == "cuda"
    if was_on != is_on:
        pinned = not was_on and is_pinned(source)
        copied(
            "to the device" if is_on else "to the host",
            found.nbytes,
            pinned=pinned,
            asynchronous=asynchronous,
        )
    return OnCuda(found) if is_on else found


def copy_(func: Any, args: Any, plain_args: Any, plain_kwargs: dict[str, Any]) -> None:
    target, source = args[:2]
    asynchronous = bool(plain_kwargs.get("non_blocking", False) or args[2:3] == (True,))
    if isinstance(target, OnCuda) != isinstance(source, OnCuda):
        to_device = isinstance(target, OnCuda)
        copied(
            "to the device" if to_device else "to the host",
            target.nbytes,
            pinned=is_pinned(source if to_device else target),
            asynchronous=asynchronous,
        )
    func(*plain_args, **plain_kwargs)
    capture(func, plain_args, plain_kwargs, plain_args[0])


def capture(
    func: Callable[..., Any], args: Any, kwargs: Any, found: Any = None
) -> None:
    """Have a graph do this again, into the same results, if one is being captured."""
    if ACTIVE is None or ACTIVE.capturing is None:
        return

    def again() -> None:
        made = func(*args, **kwargs)
        for old, new in zip(flat(found), flat(made), strict=True):
            if isinstance(old, Tensor) and old is not new:
                old.copy_(new)

    ACTIVE.capturing.steps.append(again)


PINNED: set[int] = set()
"""Addresses of memory that was pinned."""


def is_pinned(tensor: Tensor) -> bool:
    return (
        not isinstance(tensor, OnCuda) and tensor.untyped_storage().data_ptr() in PINNED
    )
