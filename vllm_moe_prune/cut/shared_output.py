"""One output that several ranks write: rank 0's transaction, and who joins in it.

Rank 0 alone holds the lock, keeps the journal and renames. What it finds there, the
others are told; they go on once the output is in its place.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint.open import Checkpoint
from ..ranks.group import Ranks
from .transaction import Workspace, is_complete, output_transaction, partial_folder


@contextmanager
def shared_transaction(
    ranks: Ranks,
    out: Path,
    key: str,
    sources: Sequence[Checkpoint],
    *,
    resume: bool,
    overwrite: bool,
) -> Iterator[Workspace]:
    """``output_transaction`` for all ranks; see there.

    Raises:
        RanksError: Ranks would write different things, or into different folders.
        OutputError: Of rank 0.
    """
    ranks.agree(output=key)
    if ranks.rank:
        journal = ranks.first(list[dict[str, object]])
        partial = partial_folder(out)
        joined = Workspace(out=out, partial=partial, journal=journal, ranks=ranks)
        with _joining(joined) as space:
            yield space
    else:
        with output_transaction(
            out, key, sources, resume=resume, overwrite=overwrite
        ) as space:
            space.ranks = ranks
            ranks.first(lambda: space.journal)
            ranks.check_shared(space.partial)
            yield space
    ranks.wait()


@contextmanager
def _joining(space: Workspace) -> Iterator[Workspace]:
    space.ranks.check_shared(space.partial)
    try:
        yield space
    except BaseException:
        if space.writer is not None:
            space.writer.abort()
        raise


def is_complete_for(
    ranks: Ranks, out: Path, key: str, *, resume: bool, overwrite: bool
) -> bool:
    """``is_complete``, as rank 0 finds it."""
    return ranks.first(
        lambda: is_complete(out, key, resume=resume, overwrite=overwrite)
    )
