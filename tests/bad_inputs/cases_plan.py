"""Plans that do not fit, statistics that do not suffice, recipes that cannot be met."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.tiny import tiny_checkpoint

from .case import (
    CUT,
    PAPER,
    RUN,
    SMALL,
    Case,
    Spoil,
    both,
    deleted,
    holding,
    in_json,
    with_keys,
    without_key,
)

PLAN = "plan.json"
STATS = "stats.safetensors"
DECIDE = f"plan ckpt --stats {STATS} -o plan.json {PAPER} --json"

Arrays = dict[str, Any]


def layer(**values: Any) -> Spoil:
    """Change what a plan says of layer 1."""
    return in_json(PLAN, lambda plan: plan["layers"][1].update(values))


def plan(name: str, says: tuple[str, ...], spoil: Spoil) -> Case:
    """A case of a plan edited by hand."""
    return Case(f"plan: {name}", CUT, (PLAN, *says), spoil)


def of_another_model(folder: Path) -> None:
    """The same architecture with other weights."""
    shutil.rmtree(folder / "ckpt")
    tiny_checkpoint(folder / "ckpt", layers=2, experts=4, hidden=32, width=48, seed=5)


def in_stats(
    edit: Callable[[Arrays], object] = lambda arrays: None, **header: str
) -> Spoil:
    """Change arrays and header of the statistics file."""

    def spoil(folder: Path) -> None:
        with safe_open(folder / STATS, framework="numpy") as file:
            metadata = file.metadata() | header
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        edit(arrays)
        save_file(arrays, folder / STATS, metadata=metadata)

    return spoil


def truncated_stats(folder: Path) -> None:
    data = (folder / STATS).read_bytes()
    (folder / STATS).write_bytes(data[:-100])


def emptied(folder: Path) -> None:
    """A plan that keeps nothing of layer 1, clusters included."""
    layer(keep=[], clusters=[])(folder)


PLANS = [
    plan("missing", ("no such plan file",), deleted(PLAN)),
    plan("a folder", (), both(deleted(PLAN), lambda at: (at / PLAN).mkdir())),
    plan("not JSON", ("not valid JSON",), holding(PLAN, "{,}")),
    plan("not text", ("not valid JSON",), holding(PLAN, b"\xff\xfe")),
    plan("nested", ("not valid JSON",), holding(PLAN, "[" * 10**5)),
    plan("a long number", ("not valid JSON",), holding(PLAN, "1" + "0" * 6000)),
    plan("a list", ("JSON object",), holding(PLAN, "[]")),
    plan("empty", ("not valid JSON",), holding(PLAN, "")),
    plan("of another model", ("another model", "measure"), of_another_model),
    plan("of the future", ("format 2", "Install"), with_keys(PLAN, format_version=2)),
    plan("of format '1'", ("format", "Install"), with_keys(PLAN, format_version="1")),
    plan("without format", ("format",), without_key(PLAN, "format_version")),
    plan("unknown key", ("mood", "Extra inputs"), with_keys(PLAN, mood="good")),
    plan("unknown key in a layer", ("layers.1.keeps", "Extra"), layer(keeps=[1])),
    plan("unknown routing", ("routing",), with_keys(PLAN, routing="random")),
    plan("no layers", ("layers []", "0 to 1"), with_keys(PLAN, layers=[])),
    plan("layers a number", ("layers",), with_keys(PLAN, layers=2)),
    plan("layers null", ("layers",), with_keys(PLAN, layers=None)),
    plan("a layer missing", ("[0]", "0 to 1"), in_json(
        PLAN, lambda data: data["layers"].pop()
    )),
    plan("a layer twice", ("[0, 0]", "0 to 1"), layer(layer=0)),
    plan("a layer too many", ("[0, 1, 1]",), in_json(
        PLAN, lambda data: data["layers"].append(data["layers"][1])
    )),
    plan("experts miscounted", ("layer 1", "9", "4"), layer(experts=9)),
    plan("nothing kept", ("layer 1", "keeps no expert"), emptied),
    plan("an expert twice", ("layer 1", "[2]", "once"), layer(keep=[0, 2, 2])),
    plan("an unknown expert", ("layer 1", "[7]", "0 to 3"), layer(keep=[0, 7])),
    plan("a negative expert", ("layers.1.keep",), layer(keep=[0, -1])),
    plan("an expert of text", ("layers.1.keep",), layer(keep=["zero"])),
    plan("an expert as a fraction", ("layers.1.keep",), layer(keep=[0.5])),
    plan("an expert of 400 digits", ("401 digits",), layer(keep=[10**400])),
    plan("keep a number", ("layers.1.keep",), layer(keep=3)),
    plan("an unknown action", ("action", "melt"), layer(action="melt")),
    plan("dropped, but keeps", ("layer 1", "drop-moe"), layer(action="drop-moe")),
    plan("every block dropped", ("every block",), in_json(
        PLAN,
        lambda data: [
            item.update(action="drop-block", keep=[], clusters=None)
            for item in data["layers"]
        ],
    )),
    *(
        plan(f"sparsity {value}", ("layers.1.sparsity",), layer(sparsity=value))
        for value in (1.0, -0.1, 1.5, "half", None, True)
    ),
    plan("sparsity NaN", ("holds NaN",), layer(sparsity=float("nan"))),
    plan("sparsity infinite", ("holds Infinity",), layer(sparsity=float("inf"))),
    plan("clusters too few", ("layer 1", "1 clusters"), layer(clusters=[[0, 1, 2, 3]])),
    plan("clusters leave one out", ("layer 1", "leave out"), layer(
        keep=[0, 1], clusters=[[0, 2], [1]]
    )),
    plan("clusters overlap", ("layer 1", "[2]", "once"), layer(
        keep=[0, 1], clusters=[[0, 2], [1, 2, 3]]
    )),
    plan("clusters unknown", ("layer 1", "[9]"), layer(
        keep=[0, 1], clusters=[[0, 2], [1, 3, 9]]
    )),
    plan("a survivor in the wrong cluster", ("layer 1", "expert 0", "cluster"), layer(
        keep=[0, 1], clusters=[[1, 2], [0, 3]]
    )),
    plan("an empty cluster", ("layer 1",), layer(
        keep=[0, 1], clusters=[[0, 1, 2, 3], []]
    )),
    plan("redirect without clusters", ("layer", "clusters"), both(
        with_keys(PLAN, routing="redirect"), layer(clusters=None)
    )),
    plan("mean without clusters", ("layer 1", "clusters"), layer(
        clusters=None, reconstruct=True
    )),
    plan("its recipe impossible", ("recipe.experts.drop",), in_json(
        PLAN, lambda data: data["recipe"]["experts"].update(drop=7)
    )),
    plan("model unknown", ("model",), with_keys(PLAN, model="mixtral")),
]  # fmt: skip


def stats(name: str, says: tuple[str, ...], spoil: Spoil) -> Case:
    """A case of a bad statistics file."""
    return Case(f"stats: {name}", DECIDE, says, spoil)


def changed(name: str, value: Any) -> Spoil:
    """Put another array into the statistics of layer 1."""
    return in_stats(lambda arrays: arrays.update({f"layers.1.{name}": value}))


STATISTICS = [
    stats("missing", (STATS, "no such"), deleted(STATS)),
    stats("a folder", (STATS,), both(deleted(STATS), lambda at: (at / STATS).mkdir())),
    stats("truncated", (STATS, "damaged"), truncated_stats),
    stats("not safetensors", (STATS, "damaged"), holding(STATS, "counts: 1")),
    stats("empty", (STATS, "damaged"), holding(STATS, "")),
    stats("a shard", (STATS, "measure"), lambda at: shutil.copy(
        at / "ckpt/model-00001-of-00003.safetensors", at / STATS
    )),
    stats("of another model", ("another model", "measure"), of_another_model),
    stats("of the future", (STATS, "format 2"), in_stats(moe_prune_stats="3")),
    stats("layers not JSON", (STATS, "damaged"), in_stats(layers="all")),
    stats("layers a number", (STATS, "damaged"), in_stats(layers="2")),
    stats("layers null", (STATS, "damaged"), in_stats(layers="[null]")),
    stats("passes not a number", (STATS, "damaged"), in_stats(forward_passes="one")),
    stats("calibration not JSON", (STATS, "damaged"), in_stats(calibration="{")),
    stats("calibration a list", (STATS, "damaged"), in_stats(calibration="[1]")),
    stats("an unknown quantity", (STATS, "damaged"), changed("mood", np.ones(1))),
    stats("an unknown layer", (STATS, "damaged"), in_stats(
        lambda arrays: arrays.update({"layers.7.tokens": np.ones(())})
    )),
    stats("an odd name", (STATS, "damaged"), in_stats(
        lambda arrays: arrays.update(tokens=np.ones(()))
    )),
    stats("NaN", ("layer 1", "NaN"), changed(
        "coactivation_EE", np.full((4, 4), np.nan)
    )),
    stats("NaN distances", ("layer 1", "NaN"), changed(
        "weight_sqdist_EE", np.full((4, 4), np.nan)
    )),
    stats("of 3 experts", ("layer 1", "3", "4"), both(
        changed("coactivation_EE", np.ones((3, 3))),
        changed("router_sqdist_EE", np.ones((3, 3))),
    )),
    stats("counts of 3 experts", ("layer 1",), changed(
        "coactivation_EE", np.ones((3, 3))
    )),
    stats("distances of 3 experts", ("layer 1",), changed(
        "weight_sqdist_EE", np.ones((3, 3))
    )),
    stats("a norm of 2 numbers", ("layer 1",), changed("router_norm", np.ones(2))),
    stats("co-activation not measured", ("layer", "co-activation", "--calibration"),
        in_stats(lambda arrays: [
            arrays.pop(name) for name in list(arrays) if "coactivation" in name
        ])),
    stats("a layer not measured", ("layer 1", "measure"), in_stats(
        lambda arrays: [arrays.pop(name) for name in list(arrays) if ".1." in name],
        layers="[0]",
    )),
    Case("stats: none", "plan ckpt -o plan.json", ("statistics", "measure")),
    Case(
        "stats: of another model, run",
        f"{RUN} --stats {STATS}",
        ("another model",),
        of_another_model,
    ),
]  # fmt: skip


def asked(name: str, flags: str, *says: str) -> Case:
    """A case of flags that cannot be met."""
    return Case(f"asked: {name}", f"{DECIDE} {flags}", says)


def recipe(name: str, text: str | bytes, *says: str) -> Case:
    """A case of a bad recipe file."""
    return Case(
        f"recipe: {name}",
        f"{DECIDE} --recipe my.yaml",
        says,
        holding("my.yaml", text),
    )


def bomb(levels: int = 30) -> str:
    """Lists of lists that would unfold to ten to the power of ``levels`` items."""
    lines = ["l0: &l0 [boom]"]
    for level in range(1, levels):
        lines.append(f"l{level}: &l{level} [{', '.join([f'*l{level - 1}'] * 10)}]")
    return "\n".join([*lines, f"name: *l{levels - 1}"])


def merge_bomb(levels: int = 30) -> str:
    """The same by merging mappings."""
    lines = ["l0: &l0 {boom: 1}"]
    for level in range(1, levels):
        many = ", ".join([f"*l{level - 1}"] * 10)
        lines.append(f"l{level}: &l{level} {{<<: [{many}]}}")
    return "\n".join(lines)


ASKED = [
    asked("fewer than top-k", "--keep 1", "keep 1", "top-k is 2", "at least 2"),
    asked(
        "fewer than top-k per layer",
        "--keep 1 --budget per-layer",
        *("keep 1", "top-k is 2", "at least 2"),
    ),
    asked("more than there are", "--keep 5", "keep 5", "4"),
    asked(
        "more than there are per layer",
        "--keep 5 --budget per-layer",
        *("layer 0", "keep 5", "4"),
    ),
    asked("nearly all dropped", "--drop 0.99", "8 of 8", "at least 2"),
    asked(
        "nearly all dropped per layer",
        "--drop 0.99 --budget per-layer",
        *("layer 0", "keeps 0 of 4", "top-k is 2"),
    ),
    asked("less in total than dropped", "--drop 0.5 --total 0.1", "total_sparsity 0.1"),
    asked("a total by experts alone", "--slim none --total 0.6", "5 of 8", "only 4"),
    asked("a total of nearly all", "--total 0.9999", "total_sparsity"),
    asked("a total of all", "--total 1", "total_sparsity", "less than 1"),
    asked("a negative total", "--total -0.5", "total_sparsity", "-0.5"),
    asked("a total of NaN", "--total nan", "total_sparsity"),
    asked("to drop all", "--drop 1", "experts.drop", "less than 1"),
    asked("to drop infinitely many", "--drop inf", "experts.drop"),
    asked("to drop and to keep", "--drop 0.2 --keep 3", "drop or keep"),
    asked("to keep none", "--keep 0", "experts.keep"),
    asked("to keep half an expert", "--keep 1.5", "'--keep'", "plan --help"),
    asked("an unknown budget", "--budget lavish", "experts.budget", "lavish"),
    asked("an unknown method", "--slim fast", "slim.method", "fast"),
    asked("an unknown routing", "--routing random", "routing", "random"),
    asked("an unknown recipe", "--recipe stun99", "stun99", "stun40"),
    asked("a folder as recipe", "--recipe ckpt", "ckpt", "stun40"),
    *(
        asked(f"a shard size of {size}", f"--shard-size {size}", size, "size")
        for size in ("0", "-5GB", "5TBB", "lots", "nan", "inf", "1e999GB", "GB")
    ),
]

RECIPES = [
    recipe("not YAML", "experts: [", "my.yaml", "not valid YAML"),
    recipe("not text", b"\xff\xfe\x00name", "my.yaml", "not valid YAML"),
    recipe("a list", "- stun", "my.yaml", "dictionary"),
    recipe("empty", "", "my.yaml", "dictionary"),
    recipe("unknown key", "expert: {drop: 0.2}", "my.yaml", "expert", "Extra inputs"),
    recipe(
        "unknown key inside",
        "experts: {dropp: 0.2}",
        "my.yaml",
        "experts.dropp",
        "Extra",
    ),
    recipe("a Python object", "name: !!python/object/apply:os.getcwd []", "YAML"),
    recipe("a Python name", "name: !!python/name:os.system", "not valid YAML"),
    recipe("a bomb", bomb(), "not valid YAML", "aliases"),
    recipe("a bomb of merged keys", merge_bomb(), "not valid YAML", "aliases"),
    recipe("a loop", "name: &a [*a]", "not valid YAML", "aliases"),
    recipe("nested", "[" * 10**4, "not valid YAML"),
    recipe("an impossible date", "name: 2020-99-99", "not valid YAML"),
    recipe("a list as key", "? [a, b]\n: 1", "not valid YAML"),
    recipe("a number as key", "1: 2", "my.yaml"),
    recipe("a list for a number", "total_sparsity: [0.4]", "total_sparsity"),
    recipe("samples 0", "calibration: {samples: 0}", "samples", "1"),
    recipe("length 1", "calibration: {sequence_length: 1}", "sequence_length", "2"),
    recipe("negative weight", "experts: {router_weight: -1}", "router_weight"),
    recipe("no weights", "experts: {router_weight: 0, coactivation_weight: 0}", "zero"),
    recipe("two totals", "{total_sparsity: 0.4, slim: {sparsity: 0.2}}", "not both"),
    recipe(
        "too few removable",
        "experts: {drop: 0.5, max_removed: 1}",
        *("4 of 8", "at most 1", "only 2 can go"),
    ),
    recipe(
        "too few removable per layer",
        "experts: {drop: 0.5, max_removed: 1, budget: per-layer}",
        *("layer 0", "max_removed is 1"),
    ),
    recipe(
        "more kept than dropped",
        "experts: {drop: 0.75, min_experts: 3}",
        *("6 of 8", "at least 3", "only 2 can go"),
    ),
    recipe("an unknown layer", "layers: {drop_moe: [2]}", "layer 2", "0 to 1"),
    recipe("a negative layer", "layers: {drop_blocks: [-1]}", "-1"),
    recipe("a layer twice", "layers: {drop_moe: [1, 1]}", "layer 1", "once"),
    recipe("a layer in both", "layers: {drop_moe: [1], drop_blocks: [1]}", "both"),
    recipe("every block", "layers: {drop_blocks: [0, 1]}", "all 2 blocks"),
    recipe("every MoE sublayer", "layers: {drop_moe: [0, 1]}", "at least one"),
]

SPENT = [
    Case(
        "run: fewer than top-k",
        f"{RUN} --keep 1 --stats {STATS}",
        ("keep 1", "top-k is 2"),
    ),
    Case(
        "cut: text of the plan gone",
        "cut ckpt --plan plan.json -o new",
        ("text.txt",),
        deleted("text.txt"),
    ),
    Case("cut: no plan given", "cut ckpt -o new", ("--plan",)),
    Case(
        "run: a recipe that fails late",
        f"run ckpt out --overwrite --keep 1 --calibration text.txt {SMALL} {PAPER} "
        "--json",
        ("keep 1", "top-k is 2"),
    ),
]

CASES = [*PLANS, *STATISTICS, *ASKED, *RECIPES, *SPENT]
