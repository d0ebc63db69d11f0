"""Hidden states saved between layers, so that a killed pass continues where it was.

A folder holds one file per saved boundary: the hidden states entering a layer, and
the statistics of the layers before it if there are any. Saving takes at most about a
tenth of the time: boundaries that come sooner are skipped.
"""

import logging
import re
import time
from pathlib import Path

import torch

from ..checkpoint.config_values import FLOATS
from ..checkpoint.index import TensorInfo, read_header
from ..checkpoint.reader import DTYPES, read_tensor
from ..errors import CheckpointError, OutputError
from .container import TensorBytes, write_safetensors
from .stats import Stats
from .stats_file import load_stats, save_stats

log = logging.getLogger(__name__)

NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Share of the time that saving may take.
MAX_OVERHEAD = 0.1
PATTERN = re.compile(r"hidden-(\d+)\.safetensors")
HIDDEN = "hidden"
ORIGINAL = "original"


class BoundaryStore:
    """The saved boundaries of one pass."""

    def __init__(
        self, folder: Path, key: str, *, overhead: float | None = None
    ) -> None:
        """Nothing is made until something is saved.

        Args:
            folder: Where the files go.
            key: Identifies model, tokens and plan; files of another are refused.
            overhead: Instead of ``MAX_OVERHEAD``; ``inf`` saves every boundary.
        """
        self.folder = folder
        self.key = key
        self._overhead = MAX_OVERHEAD if overhead is None else overhead
        self._not_before = 0.0

    def save(
        self,
        layer: int,
        hidden_STD: torch.Tensor,
        stats: Stats | None = None,
        original_WTD: torch.Tensor | None = None,
    ) -> None:
        """Save what enters a layer, unless the last save was too short ago.

        Args:
            layer: Which.
            hidden_STD: The hidden states.
            stats: The statistics of the layers before it.
            original_WTD: Those of the intact model, where it runs beside a pruned one.
        """
        start = time.monotonic()
        if start < self._not_before:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if stats is not None:
                save_stats(stats, self._stats_path(layer))
            # Its rename is what makes the boundary count, so it comes last.
            self._write(self._path(layer), hidden_STD, original_WTD)
        except OSError as error:
            raise OutputError(
                f"{self.folder}: cannot save the state before layer {layer}: "
                f"{error.strerror or error}. Free some space and resume."
            ) from error
        now = time.monotonic()
        # What took t seconds is not done again before t / overhead seconds of work.
        self._not_before = now + (now - start) / self._overhead

    def load(
        self, shape_STD: tuple[int, ...], not_after: int | None = None
    ) -> tuple[int, torch.Tensor] | None:
        """The newest saved boundary, as (layer, hidden states on the CPU).

        Args:
            shape_STD: What it should have; [0] where no text runs through the model.
            not_after: Only boundaries up to this layer.

        Raises:
            OutputError: It was saved by another run, or is damaged.
        """
        layer = self._newest(not_after)
        if layer is None:
            return None
        path = self._path(layer)
        try:
            header = read_header(path)
            hidden = None
            # The key first: of another run's file no data is read.
            if header.metadata.get("key") == self.key:
                hidden = _hidden(header.tensors.get(HIDDEN), shape_STD)
        except (CheckpointError, ValueError, OSError) as error:
            raise self._damaged(path, error) from error
        if hidden is None:
            raise OutputError(
                f"{path}: belongs to a run of another model, plan or calibration text, "
                "or the model's files were changed or copied since. "
                f"Delete {self.folder}, or resume with what that run was started with."
            )
        log.info("continuing before layer %s", layer)
        return layer, hidden

    def load_original(self, layer: int, shape_WTD: tuple[int, ...]) -> torch.Tensor:
        """The intact model's hidden states of a boundary that ``load`` found.

        Raises:
            OutputError: There are none of this shape.
        """
        path = self._path(layer)
        try:
            return _hidden(read_header(path).tensors.get(ORIGINAL), shape_WTD)
        except (CheckpointError, ValueError, OSError) as error:
            raise self._damaged(path, error) from error

    def load_stats(self, layer: int) -> Stats | None:
        """The statistics saved with a boundary."""
        path = self._stats_path(layer)
        return load_stats(path) if path.is_file() else None

    def keep_from(self, layer: int) -> None:
        """Delete what continuing at ``layer`` would not need."""
        needed = self._newest(layer)
        if needed is None:
            return
        for saved in self._saved():
            # States before statistics: after a kill in between it does not count.
            if saved < needed:
                self._path(saved).unlink(missing_ok=True)
                self._stats_path(saved).unlink(missing_ok=True)

    def clear(self) -> None:
        """Delete what was saved, states before their statistics: the pass is done."""
        for saved in self._saved():
            self._path(saved).unlink(missing_ok=True)
            self._stats_path(saved).unlink(missing_ok=True)

    def _damaged(self, path: Path, error: Exception) -> OutputError:
        return OutputError(
            f"{path}: damaged: {error} Delete {self.folder} and start again."
        )

    def _saved(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        matches = (PATTERN.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def _newest(self, not_after: int | None) -> int | None:
        return max(
            (
                saved
                for saved in self._saved()
                if not_after is None or saved <= not_after
            ),
            default=None,
        )

    def _path(self, layer: int) -> Path:
        return self.folder / f"hidden-{layer:05d}.safetensors"

    def _stats_path(self, layer: int) -> Path:
        return self.folder / f"stats-{layer:05d}.safetensors"

    def _write(
        self, path: Path, hidden_STD: torch.Tensor, original_WTD: torch.Tensor | None
    ) -> None:
        parts = {HIDDEN: _bytes(hidden_STD)}
        if original_WTD is not None:
            parts[ORIGINAL] = _bytes(original_WTD)
        write_safetensors(path, parts, {"key": self.key})


def _bytes(hidden_STD: torch.Tensor) -> TensorBytes:
    data = hidden_STD.detach().cpu().contiguous()
    # As bytes: NumPy has no bf16.
    view = data.flatten().view(torch.uint8).numpy().data
    return TensorBytes(NAMES[data.dtype], tuple(data.shape), view)


def _hidden(info: TensorInfo | None, shape_STD: tuple[int, ...]) -> torch.Tensor:
    """Hidden states as a file has them.

    Raises:
        ValueError: There are none, or they cannot be of this run.
    """
    if info is None or info.dtype not in FLOATS:
        raise ValueError("it holds no hidden states.")
    # Layers that predict further tokens are entered by fewer of them.
    wanted = (*shape_STD[:1], *info.shape[1:2], *shape_STD[2:])
    if info.shape != wanted or any(
        found > most for found, most in zip(info.shape, shape_STD, strict=True)
    ):
        raise ValueError(
            f"its hidden states have shape {list(info.shape)}, those of this run "
            f"{list(shape_STD)}."
        )
    hidden_STD = read_tensor(info)
    # Else the next router would call the weights damaged, not this file.
    if not bool(hidden_STD.isfinite().all()):
        raise ValueError("its hidden states are not finite numbers.")
    return hidden_STD
