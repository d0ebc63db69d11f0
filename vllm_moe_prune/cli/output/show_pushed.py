"""What ``push`` prints."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from ...progress import gib
from .draw import facts, hint, print_json, table

if TYPE_CHECKING:
    from ...cut.verify import Verified
    from ...publish import Parcel, Pushed


def show_pushed(
    parcel: "Parcel", verified: "Verified", pushed: "Pushed | None", as_json: bool
) -> None:
    """What was uploaded, or would be."""
    if as_json:
        print_json(
            {
                "repo": parcel.repo,
                "private": parcel.private,
                "bytes": parcel.size,
                "files": parcel.files,
                "card": parcel.card,
                "tensors_hashed": verified.tensors_hashed,
                "pushed": asdict(pushed) if pushed else None,
            }
        )
        return
    if pushed is None:
        rows = [[name, gib(size)] for name, size in parcel.files.items()]
        table("Would be uploaded", ["file", "size"], rows)
    facts(
        f"{'Pushed' if pushed else 'Would push'} {parcel.folder.name}",
        [
            ("to", pushed.url if pushed else parcel.repo),
            ("seen by", "its owner" if parcel.private else "everyone"),
            ("files", f"{len(parcel.files)}, {gib(parcel.size)}"),
            ("verified", f"{verified.tensors_hashed or 0:,} tensors by their hashes"),
        ],
    )
    if "\nbase_model:" not in parcel.card:
        hint("The card names no base model: add --base-model OWNER/NAME.")
