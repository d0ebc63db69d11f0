"""Damaged and hostile checkpoint files: shards, headers, the index, the weights."""

import json
import struct
from pathlib import Path
from typing import Any

import torch

from .case import (
    CUT,
    INDEX,
    PAPER,
    RUN,
    SHARD,
    SMALL,
    Case,
    Edit,
    Spoil,
    both,
    deleted,
    holding,
    in_header,
    in_json,
    in_tensor,
    split_header,
    with_keys,
    with_tensor,
    without_tensor,
)

NAME = Path(SHARD).name
ROUTER = "model.layers.1.block_sparse_moe.gate.weight"
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
AGAIN = "Download it again"


def cut_short(by: int) -> Spoil:
    """Take bytes off the end of a shard, or add some where ``by`` is negative."""

    def spoil(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        kept = data[:-by] if by > 0 else data + b"\0" * -by
        (folder / SHARD).write_bytes(kept)

    return spoil


def halved(folder: Path) -> None:
    """A download that stopped half-way."""
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: len(data) // 2])


def header_of_length(length: int) -> Spoil:
    """Claim another header length; the bytes stay."""

    def spoil(folder: Path) -> None:
        data = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(struct.pack("<Q", length) + data[8:])

    return spoil


def header_text(text: str) -> Spoil:
    """Put another text where the header is."""

    def spoil(folder: Path) -> None:
        _, rest = split_header(folder / SHARD)
        data = text.encode()
        (folder / SHARD).write_bytes(struct.pack("<Q", len(data)) + data + rest)

    return spoil


def name_twice(folder: Path) -> None:
    """A header that describes a tensor twice, each time differently."""
    header, _ = split_header(folder / SHARD)
    first, entry = next(item for item in header.items() if item[0] != "__metadata__")
    text = json.dumps(header)
    double = json.dumps({first: entry | {"shape": [1, entry["data_offsets"][1] // 2]}})
    header_text(double[:-1] + "," + text[1:])(folder)


def entry(position: int, **values: Any) -> Edit:
    """Change what a header says of one tensor."""

    def edit(header: dict[str, Any]) -> None:
        names = sorted(name for name in header if name != "__metadata__")
        header[names[position]].update(values)

    return edit


def beyond_the_file(header: dict[str, Any]) -> None:
    last = max(
        (item for name, item in header.items() if name != "__metadata__"),
        key=lambda item: item["data_offsets"][1],
    )
    last["data_offsets"][1] += 1 << 40
    last["shape"] = [1 << 39]


def overlapping(header: dict[str, Any]) -> None:
    one, two = sorted(
        (item for name, item in header.items() if name != "__metadata__"),
        key=lambda item: item["data_offsets"][0],
    )[:2]
    two["data_offsets"] = one["data_offsets"]
    two["shape"] = one["shape"]


def moved(target: str) -> Spoil:
    """Let the index look for a shard elsewhere; the file is really there."""

    def spoil(folder: Path) -> None:
        goal = folder / "elsewhere"
        goal.mkdir()
        (folder / SHARD).rename(goal / NAME)
        goto = str(goal / NAME) if target == "absolute" else target

        def edit(index: dict[str, Any]) -> None:
            index["weight_map"] = {
                name: goto if at == NAME else at
                for name, at in index["weight_map"].items()
            }

        in_json(INDEX, edit)(folder)

    return spoil


def shard_named(value: Any) -> Spoil:
    """Put something else where the index names a file."""
    return in_json(INDEX, lambda index: index["weight_map"].update({EXPERT: value}))


def linked(name: str, to: str) -> Spoil:
    """Replace a file by a link to what is moved out of the checkpoint folder."""

    def spoil(folder: Path) -> None:
        (folder / name).rename(folder / to)
        (folder / name).symlink_to(folder / to)

    return spoil


def single_file_linked(folder: Path) -> None:
    """A checkpoint of one file that is a link to a file elsewhere."""
    (folder / INDEX).unlink()
    linked(SHARD, "model.safetensors")(folder)
    (folder / SHARD).rename(folder / "ckpt/model.safetensors")


def linked_in_a_circle(folder: Path) -> None:
    (folder / SHARD).unlink()
    (folder / SHARD).symlink_to(folder / SHARD)


def is_a_folder(name: str) -> Spoil:
    """A folder where a file should be."""

    def spoil(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).mkdir()

    return spoil


def only_pickles(folder: Path) -> None:
    """A checkpoint from before safetensors."""
    (folder / INDEX).unlink()
    for path in (folder / "ckpt").glob("*.safetensors"):
        path.rename(path.with_suffix(".bin"))


def fill(value: float, row: int = 0) -> Any:
    """Set one weight of a matrix."""
    return lambda tensor: tensor[row, 3].fill_(value)


SHARDS = [
    Case("shard missing", RUN, (NAME, "missing", "again"), deleted(SHARD)),
    Case("shard missing, inspect", "inspect ckpt", (NAME, "missing"), deleted(SHARD)),
    Case("shard cut in half", RUN, (NAME, "27552 bytes", "55104", AGAIN), halved),
    Case("shard one byte short", RUN, (NAME, "55103", "55104"), cut_short(1)),
    Case("shard one byte long", RUN, (NAME, "55105", "55104"), cut_short(-1)),
    Case("shard empty", RUN, (NAME, "(0 bytes)", AGAIN), holding(SHARD, b"")),
    Case("shard of four bytes", RUN, (NAME, "(4 bytes)"), holding(SHARD, b"abcd")),
    Case("shard a folder", RUN, (NAME, "missing"), is_a_folder(SHARD)),
    Case("shard a link to itself", RUN, (NAME,), linked_in_a_circle),
    Case("shard a web page", RUN, (NAME, AGAIN), holding(SHARD, "<html>404</html>")),
]

HEADERS = [
    Case(f"header: {name}", RUN, (NAME, "damaged", AGAIN), spoil)
    for name, spoil in {
        "offsets beyond the file": in_header(SHARD, beyond_the_file),
        "overlapping tensors": in_header(SHARD, overlapping),
        "a hole": in_header(SHARD, lambda header: header.pop(sorted(header)[-1])),
        "shape and bytes differ": in_header(SHARD, entry(1, shape=[3, 5])),
        "type and bytes differ": in_header(SHARD, entry(1, dtype="F64")),
        "a shape that overflows": in_header(SHARD, entry(1, shape=[1 << 62, 1 << 62])),
        "a negative size": in_header(SHARD, entry(1, shape=[-1, 8])),
        "offsets reversed": in_header(SHARD, entry(1, data_offsets=[8, 0])),
        "offsets of text": in_header(SHARD, entry(1, data_offsets="all")),
        "no offsets": in_header(SHARD, lambda header: header.update(x={"dtype": "I8"})),
        "an unknown type": in_header(SHARD, entry(1, dtype="BF17")),
        "an enormous length": header_of_length((1 << 64) - 1),
        "a length beyond the file": header_of_length(1 << 20),
        "a length of zero": header_of_length(0),
        "not JSON": header_text("{'model': none}"),
        "a list": header_text("[]"),
        "deeply nested": header_text("[" * 5000 + "]" * 5000),
        "a name twice": name_twice,
        "not UTF-8": holding(SHARD, struct.pack("<Q", 4) + b"\xff\xfe{}"),
    }.items()
]

INDEXES = [
    Case(
        "index names an absent tensor",
        RUN,
        ("index.json", "'model.layers.9.extra.weight'", NAME, "does not hold it"),
        in_json(
            INDEX,
            lambda index: index["weight_map"].update(
                {"model.layers.9.extra.weight": NAME}
            ),
        ),
    ),
    Case(
        "index leaves a tensor out",
        RUN,
        ("index", "does not list", repr(EXPERT)),
        in_json(INDEX, lambda index: index["weight_map"].pop(EXPERT)),
    ),
    *(
        Case(f"index names {name}", RUN, ("index.json", "not inside the folder"), spoil)
        for name, spoil in {
            "a file above": moved(f"../elsewhere/{NAME}"),
            "an absolute path": moved("absolute"),
            "the folder": shard_named("."),
            "nothing": shard_named(""),
            "a NUL": shard_named("model\0.safetensors"),
        }.items()
    ),
    Case(
        "index names a link out",
        RUN,
        (NAME, "is a link to", "not inside the folder", "--allow-links"),
        linked(SHARD, "away.safetensors"),
    ),
    Case("index names a number", RUN, ("weight_map", "7"), shard_named(7)),
    Case("index names 500 letters", RUN, ("too long",), shard_named("m" * 500)),
    Case(
        "index names escape codes",
        RUN,
        ("index.json", "x1b[31m"),
        shard_named("\x1b[31mmodel.safetensors"),
    ),
    Case("index without a map", RUN, ("weight_map",), holding(INDEX, "{}")),
    Case("index with a list", RUN, ("weight_map",), with_keys(INDEX, weight_map=["a"])),
    Case(
        "index with an empty map", RUN, ("weight_map",), with_keys(INDEX, weight_map={})
    ),
    Case("index not JSON", RUN, ("not valid JSON",), holding(INDEX, "weight_map: a")),
    Case("index a list", RUN, ("JSON object", "list"), holding(INDEX, "[]")),
    Case("index not text", RUN, ("not valid JSON",), holding(INDEX, b"\xff\xfe\0")),
    Case("single file a link out", RUN, ("not inside the folder",), single_file_linked),
    Case("only pickles", RUN, ("ckpt", "Only safetensors"), only_pickles),
    Case("shards without an index", RUN, ("index.json", "3 shards"), deleted(INDEX)),
    Case("no such folder", "inspect nowhere", ("nowhere", "no such folder")),
    Case("a file as checkpoint", "inspect text.txt", ("text.txt", "no such folder")),
    Case("not a Hub id", "inspect a/b/c", ("a/b/c", "owner/name")),
    Case(
        "revision of a folder",
        "inspect ckpt --revision main",
        ("--revision", "Hub"),
    ),
]

WEIGHTS = [
    Case(
        f"{what} in a router, {command.split()[0]}",
        command,
        (ROUTER, "NaN or infinity", "experts [2]", "download it again"),
        in_tensor(ROUTER, fill(value, row=2)),
    )
    for what, value in {"NaN": float("nan"), "infinity": float("inf")}.items()
    for command in (
        RUN,
        f"measure ckpt -o new.safetensors --calibration text.txt {SMALL} {PAPER}",
    )
] + [
    Case(
        "NaN in a router, bytes copied",
        "run ckpt out --overwrite --recipe copy.yaml --json",
        (ROUTER, "NaN or infinity"),
        both(
            in_tensor(ROUTER, fill(float("nan"))),
            holding("copy.yaml", "{experts: {method: none}, slim: {method: none}}"),
        ),
    ),
    Case(
        "NaN in an expert, measured",
        RUN,
        ("layer 1", "NaN or infinity", "experts [2]"),
        in_tensor(EXPERT, fill(float("nan"))),
        leaves=("out.partial/*",),
    ),
    *(
        Case(
            f"{what} in an expert, {method}",
            f"{RUN} --recipe slim.yaml",
            ("ckpt", "layer 1", "expert 2", "NaN or infinit"),
            both(
                in_tensor(EXPERT, fill(value)),
                holding(
                    "slim.yaml",
                    "{experts: {method: none}, "
                    f"slim: {{method: {method}, sparsity: 0.5}}}}",
                ),
            ),
            leaves=("out.partial/*",),
        )
        for method in ("wanda", "magnitude")
        for what, value in {"NaN": float("nan"), "infinity": float("inf")}.items()
    ),
    Case(
        "NaN in the attention",
        RUN,
        ("layer 0", "NaN or infinit"),
        in_tensor(QUERY, fill(float("nan"))),
    ),
    Case("router missing", RUN, ("layer 1", ROUTER), without_tensor(ROUTER)),
    Case("expert missing", RUN, ("layer 1", EXPERT), without_tensor(EXPERT)),
    Case("attention missing", RUN, (QUERY, "missing"), without_tensor(QUERY)),
    Case(
        "attention missing, slimmed only",
        f"{RUN} --recipe slim.yaml",
        (QUERY, "missing"),
        both(
            without_tensor(QUERY),
            holding("slim.yaml", "{experts: {method: none}, slim: {sparsity: 0.5}}"),
        ),
    ),
    Case(
        "attention missing, cut",
        CUT,
        ("another model",),
        without_tensor(QUERY),
    ),
    Case(
        "embedding missing",
        RUN,
        ("embed_tokens", "missing"),
        without_tensor("model.embed_tokens.weight"),
    ),
    Case("head missing", RUN, ("lm_head", "missing"), without_tensor("lm_head.weight")),
    Case(
        "norm missing",
        RUN,
        ("post_attention_layernorm", "missing"),
        without_tensor("model.layers.0.post_attention_layernorm.weight"),
    ),
    Case(
        "attention misshapen",
        RUN,
        (QUERY, "[8, 32]", "[32, 32]"),
        with_tensor(QUERY, torch.ones(8, 32, dtype=torch.bfloat16)),
    ),
    Case(
        "router misshapen",
        RUN,
        (ROUTER, "[4, 8]", "[4, 32]"),
        with_tensor(ROUTER, torch.ones(4, 8, dtype=torch.bfloat16)),
    ),
    Case(
        "router with a row too many",
        RUN,
        (ROUTER, "5 rows", "4 experts"),
        with_tensor(ROUTER, torch.ones(5, 32, dtype=torch.bfloat16)),
    ),
    Case(
        "router of one number",
        RUN,
        (ROUTER, "[]"),
        with_tensor(ROUTER, torch.ones((), dtype=torch.bfloat16)),
    ),
    Case(
        "expert misshapen",
        RUN,
        (EXPERT, "[48, 32]", "[32, 48]"),
        with_tensor(EXPERT, torch.ones(48, 32, dtype=torch.bfloat16)),
    ),
    Case(
        "expert of integers",
        RUN,
        (EXPERT, "I8", "BF16"),
        with_tensor(EXPERT, torch.ones(32, 48, dtype=torch.int8)),
    ),
    Case(
        "an expert of another type",
        RUN,
        (EXPERT, "F32", "BF16"),
        with_tensor(EXPERT, torch.ones(32, 48, dtype=torch.float32)),
    ),
    Case(
        "an expert too many",
        RUN,
        ("layer 1", "expert 4", "num_local_experts is 4"),
        with_tensor(
            "model.layers.1.block_sparse_moe.experts.4.w2.weight",
            torch.ones(32, 48, dtype=torch.bfloat16),
        ),
    ),
    Case(
        "a layer too many",
        RUN,
        ("layer 2", "num_hidden_layers is 2"),
        with_tensor("model.layers.2.self_attn.q_proj.weight", torch.ones(2, 2)),
    ),
]

CASES = [*SHARDS, *HEADERS, *INDEXES, *WEIGHTS]
