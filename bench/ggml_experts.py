"""llama.cpp's experts, called through the library that llama-cpp-python compiles.

A layer is a graph as llama.cpp builds it: ``mul_mat_id`` for gate and for up, SwiGLU,
``mul_mat_id`` for down, times the routing weights, added up. Weights lie where
llama.cpp puts them, in the buffer that lays them out anew for this processor, if there
is one for their type. E experts, N rows, K columns, T tokens.
"""

import ctypes
import importlib.util
import os
from ctypes import c_bool, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GROUP = 32
"""Weights that share a scale, in both formats."""
F32, Q4_0, Q8_0, I32 = 0, 2, 8, 26
POINTER_RESULTS = (
    *("ggml_init", "ggml_new_tensor_2d", "ggml_new_tensor_3d", "ggml_mul_mat_id"),
    *("ggml_swiglu_split", "ggml_mul", "ggml_add", "ggml_view_2d", "ggml_new_graph"),
    "ggml_backend_alloc_ctx_tensors_from_buft",
)


class _InitParams(ctypes.Structure):
    _fields_ = (("size", c_size_t), ("buffer", c_void_p), ("no_alloc", c_bool))


def find() -> Path | None:
    """The folder with ggml's libraries: GGML_LIB, or the installed llama-cpp-python."""
    if given := os.environ.get("GGML_LIB"):
        return Path(given)
    found = importlib.util.find_spec("llama_cpp")
    if found is None or found.origin is None:
        return None
    return Path(found.origin).parent / "lib"


def q4_0(values_NK: Tensor, scales_NG: Tensor) -> Tensor:
    """Blocks of a scale in fp16 and 32 values from -8 to 7, those 16 apart together."""
    low, high = (values_NK + 8).to(torch.uint8).unflatten(-1, (-1, 2, 16)).unbind(-2)
    return _blocks(scales_NG, low | (high << 4))


def q8_0(values_NK: Tensor, scales_NG: Tensor) -> Tensor:
    """Blocks of a scale in fp16 and 32 values of int8."""
    values = values_NK.to(torch.int8).view(torch.uint8)
    return _blocks(scales_NG, values.unflatten(-1, (-1, GROUP)))


def _blocks(scales_NG: Tensor, bytes_NGB: Tensor) -> Tensor:
    halves = scales_NG.half()[..., None].contiguous().view(torch.uint8)
    return torch.cat([halves, bytes_NGB], -1).contiguous()


class Ggml:
    """One layer's experts."""

    def __init__(self, folder: Path, kind: int) -> None:
        """No weights yet.

        Args:
            folder: What ``find`` found.
            kind: ``Q4_0`` or ``Q8_0``.
        """
        self._base = ctypes.CDLL(str(folder / "libggml-base.so"))
        self._cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for name in POINTER_RESULTS:
            getattr(self._base, name).restype = c_void_p
        self._base.ggml_init.argtypes = [_InitParams]
        self._kind = kind
        self._cpu.ggml_backend_cpu_init.restype = c_void_p
        self._backend = c_void_p(self._cpu.ggml_backend_cpu_init())
        self._plain = self._base.ggml_backend_get_default_buffer_type
        self._plain.restype = c_void_p
        self._graphs: dict[int, Any] = {}

    def set_threads(self, threads: int) -> None:
        """To compute with."""
        self._cpu.ggml_backend_cpu_set_n_threads(self._backend, c_int(threads))

    def load(
        self, gate: Tensor, up: Tensor, down: Tensor, *, experts: int, repacked: bool
    ) -> None:
        """Take weights as ``q4_0`` or ``q8_0`` gives them; all experts have the same.

        Args:
            gate: Of one expert.
            up: .
            down: .
            experts: How many copies.
            repacked: Laid out anew, as llama.cpp does by default.
        """
        context = self._context()
        self._weights = [
            self._matrix(context, part, experts) for part in (gate, up, down)
        ]
        kind = self._repacking() if repacked else self._plain(self._backend)
        buffer = self._base.ggml_backend_alloc_ctx_tensors_from_buft(
            context, c_void_p(kind)
        )
        assert buffer, "ggml cannot allocate the weights"
        for tensor, part in zip(self._weights, (gate, up, down), strict=True):
            self._set(tensor, part.expand(experts, *part.shape).contiguous())

    def _repacking(self) -> int:
        """The type of buffer that lays weights out anew."""
        base = self._base
        for name in ("ggml_backend_get_device", "ggml_backend_dev_backend_reg"):
            getattr(base, name).restype = c_void_p
        device = base.ggml_backend_get_device(self._backend)
        registry = base.ggml_backend_dev_backend_reg(c_void_p(device))
        base.ggml_backend_reg_get_proc_address.restype = c_void_p
        address = base.ggml_backend_reg_get_proc_address(
            c_void_p(registry), b"ggml_backend_dev_get_extra_bufts"
        )
        base.ggml_backend_buft_name.restype = c_char_p
        kinds = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)(address)(device)
        at = 0
        while kinds[at]:
            name = base.ggml_backend_buft_name(c_void_p(kinds[at]))
            if name == b"CPU_REPACK":
                return int(kinds[at])
            at += 1
        raise RuntimeError("this ggml was compiled without other layouts of weights")

    def _context(self) -> c_void_p:
        params = _InitParams(1 << 24, None, True)
        return c_void_p(self._base.ggml_init(params))

    def _matrix(self, context: c_void_p, blocks: Tensor, experts: int) -> c_void_p:
        rows, groups, _ = blocks.shape
        sizes = (c_int64(groups * GROUP), c_int64(rows), c_int64(experts))
        return c_void_p(
            self._base.ggml_new_tensor_3d(context, c_int(self._kind), *sizes)
        )

    def _set(self, tensor: c_void_p, data: Tensor) -> None:
        self._base.ggml_backend_tensor_set(
            tensor, c_void_p(data.data_ptr()), c_size_t(0), c_size_t(data.nbytes)
        )

    def _graph(self, x: Tensor, ids: Tensor) -> Any:
        """For as many tokens; made once."""
        base, context = self._base, self._context()
        (tokens, hidden), top_k = x.shape, ids.shape[1]

        def op(name: str, *args: object) -> c_void_p:
            return c_void_p(getattr(base, name)(context, *args))

        sizes = (c_int64(hidden), c_int64(1), c_int64(tokens))
        given = op("ggml_new_tensor_3d", c_int(F32), *sizes)
        chosen = op("ggml_new_tensor_2d", c_int(I32), c_int64(top_k), c_int64(tokens))
        sizes = (c_int64(1), c_int64(top_k), c_int64(tokens))
        factors = op("ggml_new_tensor_3d", c_int(F32), *sizes)
        gate, up, down = self._weights
        inner = op(
            "ggml_swiglu_split",
            op("ggml_mul_mat_id", gate, given, chosen),
            op("ggml_mul_mat_id", up, given, chosen),
        )
        found = op("ggml_mul", op("ggml_mul_mat_id", down, inner, chosen), factors)
        row = 4 * hidden
        total = None
        for slot in range(top_k):
            one = op(
                *("ggml_view_2d", found, c_int64(hidden), c_int64(tokens)),
                *(c_size_t(top_k * row), c_size_t(slot * row)),
            )
            total = one if total is None else op("ggml_add", total, one)
        graph = op("ggml_new_graph")
        base.ggml_build_forward_expand(graph, total)
        base.ggml_backend_alloc_ctx_tensors_from_buft(
            context, c_void_p(self._plain(self._backend))
        )
        return graph, given, chosen, factors, total

    def __call__(self, x: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
        """Like the other ways of a layer [T, D]; in float32."""
        if len(x) not in self._graphs:
            self._graphs[len(x)] = self._graph(x, ids)
        graph, given, chosen, factors, total = self._graphs[len(x)]
        self._set(given, x.float().contiguous())
        self._set(chosen, ids.to(torch.int32).contiguous())
        self._set(factors, weights.float().contiguous())
        status = self._base.ggml_backend_graph_compute(self._backend, graph)
        assert status == 0, f"ggml failed with status {status}"
        out = torch.empty(x.shape)
        self._base.ggml_backend_tensor_get(
            total, c_void_p(out.data_ptr()), c_size_t(0), c_size_t(out.nbytes)
        )
        return out
