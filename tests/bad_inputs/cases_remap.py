"""Pruned checkpoints that were tampered with: the remap table against the weights."""

import hashlib
from pathlib import Path
from typing import Any

from .case import Case, Edit, Spoil, both, deleted, holding, in_json, with_keys

TABLE = "out/expert_remap.json"
CONFIG = "out/config.json"
VERIFY = "verify out --source ckpt --json"
SERVE = "serve out --dry-run"


def block(**values: Any) -> Spoil:
    """Change the ``moe_prune`` block of config.json."""
    return in_json(CONFIG, lambda config: config["moe_prune"].update(values))


def unblocked(key: str) -> Spoil:
    """Delete a key of the block."""
    return in_json(CONFIG, lambda config: config["moe_prune"].pop(key))


def resealed(edit: Edit) -> Spoil:
    """Change the table and put its new hash where the old one was."""

    def spoil(folder: Path) -> None:
        in_json(TABLE, edit)(folder)
        reseal(folder)

    return spoil


def reseal(folder: Path) -> None:
    digest = hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()
    block(remap_sha256=digest)(folder)


def table_of(text: str) -> Spoil:
    """Another text as table, its hash consistent."""

    def spoil(folder: Path) -> None:
        (folder / TABLE).write_text(text)
        reseal(folder)

    return spoil


def layer(**values: Any) -> Spoil:
    """Change what the table says of layer 1, consistently hashed."""
    return resealed(lambda table: table["layers"][1].update(values))


def flipped(folder: Path) -> None:
    """One bit of the table."""
    data = bytearray((folder / TABLE).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / TABLE).write_bytes(data)


def all_layers(**values: Any) -> Edit:
    """Change what the table says of every layer."""
    return lambda table: [item.update(values) for item in table["layers"]]


SPOILT: dict[str, tuple[tuple[str, ...], Spoil]] = {
    "table missing": (("expert_remap.json", "missing"), deleted(TABLE)),
    "bit flipped": (("expert_remap.json", "SHA-256", "changed"), flipped),
    "block a list": (("config.json", "moe_prune"), with_keys(CONFIG, moe_prune=[])),
    "hash missing": (("config.json", "moe_prune"), unblocked("remap_sha256")),
    "name missing": (("config.json", "moe_prune"), unblocked("remap")),
    "hash a number": (("SHA-256",), block(remap_sha256=7)),
    "format of the future": (("format 2", "install"), block(format_version=2)),
    "another file": (("../table.json", "expected"), block(remap="../table.json")),
    "table not JSON": (("expert_remap.json", "JSON"), table_of("{")),
    "table nested": (("expert_remap.json", "JSON"), table_of("[" * 10**5)),
    "table a list": (("expert_remap.json",), table_of("[]")),
    "table of the future": (
        ("expert_remap.json", "format"),
        resealed(lambda table: table.update(format_version=2)),
    ),
    "table without format": (
        ("expert_remap.json", "format"),
        resealed(lambda table: table.pop("format_version")),
    ),
    "unknown key": (("mood",), resealed(lambda table: table.update(mood="good"))),
    "an expert twice": (
        ("layer 1", "kept", "[0]", "more than once"),
        layer(kept=[0, 0, 2], router_rows=[0, 0, 2]),
    ),
    "an expert out of range": (
        ("layer 1", "kept", "[9]", "out of range"),
        layer(kept=[0, 1, 9], router_rows=[0, 1, 9]),
    ),
    "an expert missing": (
        ("layer 1", "3 experts", "lists 2", "too many"),
        layer(kept=[0, 1], router_rows=[0, 1], clusters=[[0, 2], [1, 3]]),
    ),
    "an expert too many": (
        ("layer 1", "3 experts", "lists 4", "[3]", "missing"),
        layer(kept=[0, 1, 2, 3], router_rows=[0, 1, 2, 3], clusters=None),
    ),
    "an expert negative": (("layers.1.kept",), layer(kept=[0, 1, -1])),
    "an expert as a boolean": (
        ("layers.1.kept",),
        layer(kept=[True, 0, 2], router_rows=[True, 0, 2]),
    ),
    "a router row too few": (("layer 1",), layer(router_rows=[0, 1])),
    "no expert": (("layer 1", "keeps no expert"), layer(kept=[], router_rows=[])),
    "no MoE": (
        ("layer 1",),
        layer(moe=False, kept=[], router_rows=[], clusters=None),
    ),
    "no MoE, but experts": (("layer 1", "lists experts"), layer(moe=False)),
    "redirected, but drop": (("layer 1", "drop"), layer(redirect=[0, 1, 2])),
    "redirect without targets": (
        ("layer 0", "redirect"),
        resealed(lambda table: table.update(routing="redirect")),
    ),
    "redirect out of range": (
        ("layer 0", "redirect", "[9]"),
        resealed(
            lambda table: (
                table.update(routing="redirect"),
                all_layers(redirect=[0, 1, 9])(table),
            )
        ),
    ),
    "clusters unknown": (("layer 1", "clusters"), layer(clusters=[[0, 9], [1], [2]])),
    "clusters too few": (("layer 1", "clusters"), layer(clusters=[[0, 1, 2, 3]])),
    "layers out of order": (
        ("layer 0", "layer 1"),
        resealed(lambda table: table["layers"].reverse()),
    ),
    "a layer missing": (
        ("1 layers", "2"),
        resealed(lambda table: table["layers"].pop()),
    ),
    "a layer too many": (
        ("3 layers", "2"),
        resealed(
            lambda table: table["layers"].append({**table["layers"][1], "layer": 2})
        ),
    ),
    "of another family": (
        ("model_type", "deepseek"),
        resealed(lambda table: table.update(model_type="deepseek")),
    ),
    "a survivor in the wrong cluster": (
        ("layer 1", "cluster"),
        resealed(lambda table: table["layers"][1]["clusters"].reverse()),
    ),
    "experts of a dropped sublayer": (
        (),
        both(
            layer(moe=False, moe_dropped=True, kept=[], router_rows=[], clusters=None),
            with_keys(CONFIG, per_layer_config={"1": {"num_local_experts": 0}}),
        ),
    ),
}

CASES = [
    *(
        Case(f"remap: {name}, verify", VERIFY, ("out", *says), spoil)
        for name, (says, spoil) in SPOILT.items()
    ),
    *(
        Case(f"remap: {name}, serve", SERVE, ("out", *says), spoil)
        for name, (says, spoil) in SPOILT.items()
    ),
    Case(
        "remap: block missing",
        VERIFY,
        ("moe_prune block", "not an output"),
        in_json(CONFIG, lambda config: config.pop("moe_prune")),
    ),
    Case("remap: block missing, original", "verify ckpt", ("ckpt", "not an output")),
    Case(
        "remap: another order than the plan's",
        VERIFY,
        ("expert_remap.json", "plan.json"),
        layer(kept=[3, 1, 2], router_rows=[3, 1, 2], clusters=None),
    ),
    Case("verify: nothing there", "verify nowhere", ("nowhere", "no such folder")),
    Case(
        "verify: plan gone",
        VERIFY,
        ("plan.json", "no such"),
        deleted("out/plan.json"),
    ),
    Case(
        "verify: plan damaged",
        VERIFY,
        ("plan.json", "JSON"),
        holding("out/plan.json", "{"),
    ),
    Case("verify: against itself", "verify out --source out", ("another model",)),
    Case("serve: no such folder", "serve nowhere --dry-run", ("nowhere",)),
    Case(
        "serve: plan of another model",
        "serve ckpt --plan plan.json --dry-run",
        ("plan.json", "another model"),
        in_json("plan.json", lambda plan: plan["model"].update(fingerprint="0" * 64)),
    ),
    Case(
        "serve: plugin left out",
        "serve uneven --dry-run",
        ("VLLM_PLUGINS", "'other'", "moe_prune"),
        env={"VLLM_PLUGINS": "other"},
    ),
    Case(
        "serve: plugins switched off",
        "serve uneven --dry-run",
        ("VLLM_PLUGINS", "moe_prune"),
        env={"VLLM_PLUGINS": ""},
    ),
    Case(
        "serve: plugin left out, plan given",
        "serve ckpt --plan plan.json --dry-run",
        ("VLLM_PLUGINS",),
        env={"VLLM_PLUGINS": "other"},
    ),
    Case(
        "serve: shard truncated",
        SERVE,
        ("model.safetensors", "truncated"),
        lambda at: (at / "out/model.safetensors").write_bytes(
            (at / "out/model.safetensors").read_bytes()[:-7]
        ),
    ),
    Case(
        "serve: architectures a number",
        SERVE,
        ("architectures",),
        with_keys(CONFIG, architectures=7),
    ),
]
