"""Verifying an output: every kind of tampering is found, and named."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.reference import DROP_MOE, LayerCut, read_json, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens
from vllm_moe_prune.checkpoint.index import read_index
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.checkpoint.tensor_hashes import FILE_NAME as HASHES
from vllm_moe_prune.cli.output.show import show_verified
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, PlanError, RemapError
from vllm_moe_prune.progress import Progress

PER_EXPERT, PACKED = "block_sparse_moe.w1w2w3", "mlp.packed"
CUTS = {
    0: LayerCut(keep=(3, 0, 2), sparsity=0.5),
    1: LayerCut(keep=(1, 2), clusters=((0, 1), (2, 3)), reconstruct=True),
    2: DROP_MOE,
}
MOE = "model.layers.{}.block_sparse_moe."
COPIED = "model.layers.1.self_attn.q_proj.weight"
ROUTER = MOE.format(0) + "gate.weight"
SLIMMED = MOE.format(0) + "experts.1.w2.weight"
AVERAGED = MOE.format(1) + "experts.0.w3.weight"


def make_model(folder: Path, layout: str = PER_EXPERT) -> Path:
    """A model in one file."""
    return tiny_checkpoint(
        folder / "model",
        layout=layout,
        layers=3,
        experts=4,
        hidden=16,
        width=8,
        vocab=32,
        shards=1,
        tokenizer=False,
    )


def cut_model(folder: Path, slim: str = "magnitude") -> None:
    """Its cut, in one file."""
    checkpoint = open_checkpoint(folder / "model")
    plan = load_plan(write_plan(folder / "plan.json", checkpoint, CUTS, slim=slim))
    ids_ST = torch.arange(64).remainder(32).reshape(4, 16)
    tokens = Tokens(ids_ST=ids_ST, source="counting", sha256="0" * 64)
    execute_plan(checkpoint, plan, folder / "out", tokens=tokens)


def make_pair(folder: Path, layout: str = PER_EXPERT, slim: str = "magnitude") -> Path:
    """A model and its cut."""
    make_model(folder, layout)
    cut_model(folder, slim)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pair(tmp_path_factory.mktemp("verify"))


@pytest.fixture
def pair(made: Path, tmp_path: Path) -> Path:
    """A copy to tamper with."""
    shutil.copytree(made, tmp_path / "pair")
    return tmp_path / "pair"


def check(folder: Path) -> None:
    verify(folder / "out", open_checkpoint(folder / "model"))


def change(folder: Path, name: str, edit: Callable[[Tensor], Tensor | None]) -> None:
    """Put another tensor in a name's place, or none."""
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    changed = edit(tensors.pop(name).clone())
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, path, metadata={"format": "pt"})


def with_one_bit_flipped(tensor: Tensor) -> Tensor:
    tensor.view(torch.int16).flatten()[-1] ^= 1
    return tensor


def with_a_zero_more(tensor: Tensor) -> Tensor:
    flat = tensor.flatten()
    flat[flat.nonzero()[0]] = 0
    return flat.view_as(tensor)


def negated(tensor: Tensor) -> Tensor:
    return -tensor


@pytest.mark.parametrize("slim", ["magnitude", "wanda"])
@pytest.mark.parametrize("layout", [PER_EXPERT, PACKED])
def test_an_untouched_output_passes(tmp_path: Path, layout: str, slim: str) -> None:
    folder = make_pair(tmp_path, layout, slim)
    told: list[Progress] = []
    verified = verify(folder / "out", open_checkpoint(folder / "model"), told.append)
    assert (verified.layers, verified.experts) == (3, 5)
    weights = load_file(folder / "out" / "model.safetensors")
    assert verified.tensors_compared == len(weights)
    assert verified.bytes_compared == sum(tensor.nbytes for tensor in weights.values())
    zeros = sum(
        int((tensor == 0).sum())
        for name, tensor in weights.items()
        if ".experts." in name
    )
    assert verified.zeros == zeros >= 3 * 3 * 16 * 8 // 2
    assert told[-1].bytes_done == verified.bytes_compared


@pytest.mark.parametrize("name", [COPIED, ROUTER, SLIMMED, AVERAGED, "lm_head.weight"])
@pytest.mark.parametrize("edit", [with_one_bit_flipped, negated])
def test_a_changed_tensor_is_named(
    pair: Path, name: str, edit: Callable[[Tensor], Tensor]
) -> None:
    change(pair, name, edit)
    with pytest.raises(CheckpointError, match=rf"{name}: \d+ values differ"):
        check(pair)


@pytest.mark.parametrize("name", [COPIED, AVERAGED])
def test_a_zero_where_none_was_planned_is_found(pair: Path, name: str) -> None:
    change(pair, name, with_a_zero_more)
    with pytest.raises(CheckpointError, match=f"{name}: 1 values differ"):
        check(pair)


def test_more_zeros_than_planned_are_found(pair: Path) -> None:
    change(pair, SLIMMED, with_a_zero_more)
    with pytest.raises(
        CheckpointError, match=rf"{SLIMMED}: holds 65 zeros in a 16 x 8 matrix.* 64"
    ):
        check(pair)


def test_fewer_zeros_than_planned_are_found(pair: Path) -> None:
    source = load_file(pair / "model" / "model.safetensors")

    def restored(tensor: Tensor) -> Tensor:
        # New expert 1 is the model's expert 0.
        original = source[MOE.format(0) + "experts.0.w2.weight"]
        at = (tensor == 0).nonzero()[0]
        tensor[at[0], at[1]] = original[at[0], at[1]]
        return tensor

    change(pair, SLIMMED, restored)
    with pytest.raises(CheckpointError, match=f"{SLIMMED}: holds 63 zeros"):
        check(pair)


def test_zeros_of_the_source_come_on_top(tmp_path: Path) -> None:
    """A matrix of the source may hold more zeros than the plan asks for."""
    folder = make_pair(tmp_path)
    model = folder / "model" / "model.safetensors"
    tensors = load_file(model)
    for expert in range(4):
        tensors[MOE.format(0) + f"experts.{expert}.w1.weight"][:6] = 0
    save_file(tensors, model, metadata={"format": "pt"})
    shutil.rmtree(folder / "out")
    checkpoint = open_checkpoint(folder / "model")
    write_plan(folder / "plan.json", checkpoint, CUTS, slim="magnitude")
    execute_plan(checkpoint, load_plan(folder / "plan.json"), folder / "out")
    check(folder)


def set_head(file: Path, value: float) -> None:
    """One weight of the head, which a cut copies."""
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] = value
    save_file(tensors, file, metadata={"format": "pt"})


def test_negative_zero_is_not_zero(tmp_path: Path) -> None:
    """Copies are compared bit for bit."""
    set_head(make_model(tmp_path) / "model.safetensors", 0.0)
    cut_model(tmp_path)
    set_head(tmp_path / "out" / "model.safetensors", -0.0)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight: 1 values differ"):
        check(tmp_path)


def test_nan_that_was_there_before_is_no_difference(tmp_path: Path) -> None:
    set_head(make_model(tmp_path) / "model.safetensors", float("nan"))
    cut_model(tmp_path)
    check(tmp_path)


def test_a_missing_tensor_is_named(pair: Path) -> None:
    change(pair, COPIED, lambda _: None)
    with pytest.raises(CheckpointError, match=f"'{COPIED}' is missing"):
        check(pair)


def test_a_tensor_too_many_is_named(pair: Path) -> None:
    path = pair / "out" / "model.safetensors"
    tensors = load_file(path) | {"model.layers.1.extra.weight": torch.ones(3)}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model\.layers\.1\.extra\.weight'"):
        check(pair)


def test_a_missing_expert_is_named(pair: Path) -> None:
    change(pair, SLIMMED, lambda _: None)
    with pytest.raises(CheckpointError, match=f"{SLIMMED}"):
        check(pair)


def test_a_copy_of_another_shape_or_type_is_named(pair: Path) -> None:
    change(pair, COPIED, lambda tensor: tensor.float())
    with pytest.raises(CheckpointError, match=COPIED):
        check(pair)


def test_experts_in_another_order_are_found(pair: Path) -> None:
    path = pair / "out" / "model.safetensors"
    tensors = load_file(path)
    one, two = (MOE.format(1) + f"experts.{i}.w1.weight" for i in (0, 1))
    tensors[one], tensors[two] = tensors[two].clone(), tensors[one].clone()
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=one):
        check(pair)


def test_another_remap_table_is_found_even_with_its_hash(pair: Path) -> None:
    path = pair / "out" / "expert_remap.json"
    text = path.read_text("utf-8")
    table = json.loads(text)
    layer = table["layers"][0]
    layer["kept"] = layer["router_rows"] = [0, 3, 2]
    path.write_text(json.dumps(table))
    with pytest.raises(RemapError, match=r"expert_remap\.json: SHA-256"):
        check(pair)
    config = read_json(pair / "out" / "config.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    config["moe_prune"]["remap_sha256"] = digest
    (pair / "out" / "config.json").write_text(json.dumps(config))
    with pytest.raises(RemapError, match=r"is not the table of plan\.json"):
        check(pair)


@pytest.mark.parametrize(
    ("key", "value"), [("rope_theta", 1.0), ("architectures", ["MixtralForCausalLM"])]
)
def test_a_changed_config_is_found(pair: Path, key: str, value: object) -> None:
    path = pair / "out" / "config.json"
    path.write_text(json.dumps(read_json(path) | {key: value}))
    with pytest.raises(CheckpointError, match=r"config\.json is not the one"):
        check(pair)


def test_another_plan_is_found(pair: Path) -> None:
    path = pair / "out" / "plan.json"
    plan = read_json(path)
    plan["layers"][0]["keep"] = [0, 3, 2]
    path.write_text(json.dumps(plan))
    with pytest.raises(RemapError, match=r"plan\.json"):
        check(pair)


def test_a_plan_with_another_sparsity_is_found(pair: Path) -> None:
    path = pair / "out" / "plan.json"
    plan = read_json(path)
    plan["layers"][0]["sparsity"] = 0.6
    path.write_text(json.dumps(plan))
    with pytest.raises(CheckpointError, match="zeros in a"):
        check(pair)


def test_another_source_is_refused(pair: Path, tmp_path: Path) -> None:
    other = tiny_checkpoint(tmp_path / "other", layers=3, experts=4, seed=9)
    with pytest.raises(PlanError, match="another model"):
        verify(pair / "out", open_checkpoint(other))


def test_an_older_output_without_hashes_is_checked_by_its_headers(
    pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(pair, COPIED, negated)
    (pair / "out" / HASHES).unlink()
    verified = verify(pair / "out")
    show_verified(verified, as_json=False)
    assert "hashes       none kept" in capsys.readouterr().out
    assert (verified.layers, verified.experts) == (3, 5)
    assert verified.tensors_hashed is None
    assert verified.tensors_compared == verified.bytes_compared == 0
    assert verified.expert_sparsity is verified.total_sparsity is None


def swapped(folder: Path, *pairs: tuple[str, str], both: bool = True) -> None:
    """Put some tensors into the place of others; into each other's, if both."""
    path = folder / "out" / "model.safetensors"
    tensors = load_file(path)
    for one, two in pairs:
        first = tensors[one].clone()
        tensors[one] = tensors[two].clone()
        if both:
            tensors[two] = first
    save_file(tensors, path, metadata={"format": "pt"})


def experts(*ids: int) -> list[tuple[str, ...]]:
    names = [MOE.format(0) + f"experts.{{}}.w{number}.weight" for number in (1, 2, 3)]
    return [tuple(name.format(each) for each in ids) for name in names]


@pytest.mark.parametrize(("both", "count"), [(True, 6), (False, 3)])
def test_experts_that_changed_places_are_found_without_a_source(
    pair: Path, both: bool, count: int
) -> None:
    """Each fits by shape and type: only the hashes know."""
    assert verify(pair / "out").tensors_hashed == len(read_index(pair / "out"))
    swapped(pair, *experts(0, 2), both=both)
    one, two = experts(0, 2)[0]
    said = rf"'{one}' holds what '{two}' held; .*\({count} such tensors\)"
    with pytest.raises(CheckpointError, match=said):
        verify(pair / "out")


def test_one_changed_bit_is_found_without_a_source(pair: Path) -> None:
    change(pair, COPIED, with_one_bit_flipped)
    with pytest.raises(CheckpointError, match=rf"'{COPIED}' has other values \(1 "):
        verify(pair / "out")


def test_the_same_bytes_of_another_type_are_found(pair: Path) -> None:
    change(pair, COPIED, lambda tensor: tensor.view(torch.float16))
    said = rf"'{COPIED}' is F16 \[16, 16\], was BF16 \[16, 16\]"
    with pytest.raises(CheckpointError, match=said):
        verify(pair / "out")


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (lambda data: data["tensors"].pop(COPIED), f"'{COPIED}' is in the weights"),
        (
            lambda data: data["tensors"].update(new=data["tensors"][COPIED]),
            "'new' is in tensor_hashes.json",
        ),
        (lambda data: data.pop("format_version"), "format_version is missing"),
        (lambda data: data.update(format_version=2), "format_version"),
        (lambda data: data["tensors"][COPIED].pop("sha256"), "sha256"),
        (lambda data: data["tensors"][COPIED].update(shape=[-1, 1]), "shape"),
        (lambda data: data["tensors"][COPIED].update(sha256="0" * 63), "sha256"),
    ],
)
def test_hashes_that_do_not_fit_are_refused(
    pair: Path, edit: Callable[[dict[str, Any]], object], said: str
) -> None:
    path = pair / "out" / HASHES
    data = read_json(path)
    edit(data)
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=said):
        verify(pair / "out")


def test_what_was_never_cut_is_refused(pair: Path) -> None:
    with pytest.raises(RemapError, match="has no moe_prune block"):
        verify(pair / "model")
