"""The processes that torchrun started for one job, or the only one there is.

Stages take ``Ranks`` as a value. What belongs to expert e is computed by rank
e % size, from the tokens that one process would take, in the same order.
"""

import hashlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import RanksError
from ..files.atomic import REPEAT, writing
from .launched import launched

if TYPE_CHECKING:
    from .watch import Watch

# Never reached: who waits is freed by the watch, which sees whether others get on.
TIMEOUT = timedelta(days=30)
Made = TypeVar("Made")


class LostConnection(RanksError):
    """An exchange failed: some rank is gone; ``Watch.explain`` finds out which."""


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this one is; without arguments, the only one."""

    rank: int = 0
    size: int = 1
    watch: "Watch | None" = field(default=None, compare=False, repr=False)
    """None: it is alone."""

    def owner(self, item: int) -> int:
        """The rank that computes what belongs to an item."""
        return item % self.size

    def owns(self, item: int) -> bool:
        """Whether this rank computes it."""
        return self.owner(item) == self.rank

    def broadcast(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """The tensor of one rank, of any dtype and device, on all of them.

        Args:
            tensor: On ``source`` what is sent; elsewhere its shape, dtype and device.
            source: Who sends.

        Raises:
            LostConnection: A rank ended.
        """
        if self.watch is None or tensor.numel() == 0:
            return tensor
        import torch.distributed

        # As bytes: gloo knows few dtypes.
        data = tensor.detach().cpu().contiguous()
        if self.rank != source:
            data = torch.empty_like(data)
        try:
            with self.watch.waiting():
                torch.distributed.broadcast(data.flatten().view(torch.uint8), source)
        except RuntimeError as error:
            raise LostConnection(f"rank {self.rank}: {error}") from error
        return data.to(tensor.device)

    def everyones(self, value: object) -> list[Any]:
        """What each rank passes, in the order of ranks, as JSON gives it back.

        Numbers keep their bits in it.
        """
        if self.size == 1:
            return [value]
        data = json.dumps(value).encode()
        return [json.loads(self._bytes(data, rank)) for rank in range(self.size)]

    def first(self, make: Callable[[], Made]) -> Made:
        """What ``make`` returns on rank 0, as JSON gives it back; others wait."""
        if self.size == 1:
            return make()
        data = json.dumps(make()).encode() if self.rank == 0 else b""
        found: Made = json.loads(self._bytes(data, 0))
        return found

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.everyones(None)

    def _bytes(self, data: bytes, source: int) -> bytes:
        """Bytes of one rank; what others pass counts for nothing."""
        size = int(self.broadcast(torch.tensor([len(data)]), source))
        if self.rank != source:
            data = bytes(size)
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        return self.broadcast(sent, source).numpy().tobytes()

    def agree(self, **what: object) -> None:
        """Refuse ranks that were not given the same.

        Args:
            what: By the names that errors use, with ``_`` for a space.

        Raises:
            RanksError: Naming the first rank that differs from rank 0, and in what.
        """
        for name, value in what.items():
            own = hashlib.sha256(repr(value).encode()).digest()
            mine = torch.frombuffer(bytearray(own), dtype=torch.uint8)
            sent = [self.broadcast(mine, rank) for rank in range(self.size)]
            for rank, other in enumerate(sent):
                if not torch.equal(other, sent[0]):
                    raise RanksError(
                        f"rank {rank} has another {name.replace('_', ' ')} than rank "
                        "0. Start all ranks on the same files with the same flags, on "
                        "machines of one kind."
                    )

    def check_shared(self, folder: Path) -> None:
        """Refuse a folder that is not the same one for all ranks.

        Raises:
            RanksError: A rank does not see what rank 0 wrote there.
            OutputError: Rank 0 cannot write there.
        """
        if self.size == 1:
            return
        token = torch.frombuffer(bytearray(secrets.token_bytes(16)), dtype=torch.uint8)
        drawn = self.broadcast(token, 0)
        probe = folder / f".ranks-{bytes(drawn.tolist()).hex()}"
        try:
            if self.rank == 0:
                with writing(probe, REPEAT):
                    folder.mkdir(exist_ok=True)
                    probe.touch()
            # Nobody looks before rank 0 has written, nor does it remove before all did.
            self.broadcast(token, 0)
            seen = torch.tensor([probe.is_file()])
            missing = [
                rank
                for rank in range(self.size)
                if not bool(self.broadcast(seen, rank))
            ]
        finally:
            if self.rank == 0:
                probe.unlink(missing_ok=True)
        if missing:
            raise RanksError(
                f"rank {missing[0]} does not see what rank 0 wrote into {folder}. All "
                "ranks need one shared folder."
            )

    def by_owner(self, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors [Q, E, ...] with what each expert's owner found for it."""
        whole = {name: value.clone() for name, value in sums.items()}
        for rank in range(self.size):
            # Sets have another order in each process; sums may come from one.
            for name, value in sorted(sums.items(), key=lambda item: item[0]):
                part = value[:, rank :: self.size].contiguous()
                whole[name][:, rank :: self.size] = self.broadcast(part, rank)
        return whole


ALONE = Ranks()
"""A process that torchrun did not start."""


@contextmanager
def joined() -> Iterator[Ranks]:
    """Meet the other ranks, if torchrun started any.

    Raises:
        RanksError: One did not come, ended or hangs.
        SystemExit: Another rank has said why the job ends.
    """
    if not launched():
        yield ALONE
        return
    import torch.distributed
    from torch.distributed.rendezvous import rendezvous

    from .watch import Watch

    try:
        store, rank, size = next(rendezvous("env://"))
        watch = Watch(store, rank, size)
        watch.meet()
        torch.distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT
        )
    except RuntimeError as error:
        raise RanksError(f"ranks do not find each other: {error}") from error
    try:
        yield Ranks(rank, size, watch)
    except BaseException as error:
        raise watch.explain(error) from error
    watch.close()
    torch.distributed.destroy_process_group()
