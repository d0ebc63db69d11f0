"""The custom op that counts routed tokens; opaque to torch.compile, fit for graphs.

It adds to a tensor that stays where it is and never asks the device anything.
T tokens, K slots of a token, E experts.
"""

import torch
from torch import Tensor
from torch.library import Library
from vllm.forward_context import get_forward_context, is_forward_context_available

NAMESPACE = "vllm_moe_prune"
# A fragment: sparse_op.py defines the namespace, but may not be loaded.
LIBRARY = Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
LIBRARY.define("count_routed(Tensor(a!) load, Tensor ids) -> ()")  # type: ignore[no-untyped-call]


def count_all(load: Tensor, ids_TK: Tensor) -> None:
    """Add one for each slot; ``load`` [E + 1] int64 ends in slots that do not count.

    For CPUs, where vLLM fills no batch up: there are no graphs of fixed size.
    """
    ids = ids_TK.flatten()
    # Not bincount: on a device it makes the host wait for the largest id.
    # new_ones: a fill, which graphs replay. A constant kept from the first
    # call would lie in the memory of the graph that was captured then.
    load.index_add_(0, ids, load.new_ones(()).expand(len(ids)))


def count_real(load: Tensor, ids_TK: Tensor) -> None:
    """The same, but for tokens that only fill a batch up to the size of a graph."""
    padding_T1 = _padding(len(ids_TK))
    if padding_T1 is not None:
        ids_TK = ids_TK.masked_fill(padding_T1, -1)
    # -1, which vLLM's routers may say of padding too, becomes E.
    count_all(load, ids_TK.remainder(len(load)))


def _padding(tokens: int) -> Tensor | None:
    """True for tokens that no request sent [T, 1]; None: vLLM does not say."""
    if not is_forward_context_available():
        return None
    # Where vLLM will keep a token's keys and values: nowhere, if it is not a real one.
    # Any decoder layer's will do: vLLM fills up the mapping of each with -1.
    for slots in dict(get_forward_context().slot_mapping).values():
        return (slots[:tokens] < 0).unsqueeze(1)
    return None


def _fake(load: Tensor, ids_TK: Tensor) -> None:
    return None


for _device, _count in (("CPU", count_all), ("CUDA", count_real)):
    # By device: only CUDA batches are filled up to the size of a graph.
    torch.library.impl(f"{NAMESPACE}::count_routed", _device, _count, lib=LIBRARY)
torch.library.register_fake(f"{NAMESPACE}::count_routed", _fake, lib=LIBRARY)
count_routed = torch.ops.vllm_moe_prune.count_routed.default
