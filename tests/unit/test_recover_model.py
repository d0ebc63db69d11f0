"""The model that is trained, against the streaming forward; adapters against peft."""

import re
from pathlib import Path

import pytest
import torch
from peft.tuners import lora
from torch import nn

from tests.family_cases import CASES, Case, make_original, make_plan
from tests.reference import DROP_BLOCK, DROP_MOE_KEEP_NORM, LayerCut
from tests.streamed import streamed_loss
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import read_tensor
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.recover.lora import MaskedLinear, merged, with_adapters
from vllm_moe_prune.recover.model import TrainableModel
from vllm_moe_prune.recover.options import patterns

MIXTRAL = Case(
    "mixtral",
    {
        0: LayerCut(keep=(1, 4, 6)),
        1: DROP_MOE_KEEP_NORM,
        2: DROP_BLOCK,
        3: LayerCut(sparsity=0.5),
    },
    layout="mlp.packed",
)
NAMES = (
    *("arctic-everything", "arctic-one-after-the-other", "deepseek-everything"),
    *("v2-everything", "v3-uneven-groups", "v3-redirect"),
)
SHAPES = {"mixtral": MIXTRAL} | {name: CASES[name] for name in NAMES}


def pruned(folder: Path, case: Case) -> Checkpoint:
    original = make_original(folder / "original", case)
    out = folder / "pruned"
    execute_plan(open_checkpoint(original), load_plan(make_plan(original, case)), out)
    return open_checkpoint(out)


@pytest.fixture(scope="module", params=SHAPES)
def shape(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Checkpoint:
    return pruned(tmp_path_factory.mktemp(request.param), SHAPES[request.param])


def test_it_computes_what_the_streaming_forward_does(shape: Checkpoint) -> None:
    draw = torch.Generator().manual_seed(0)
    ids_ST = torch.randint(0, 128, (3, 24), generator=draw)
    found = streamed_loss(shape.folder, ids_ST)
    loss = TrainableModel(shape)(ids_ST, ids_ST)["loss"].detach()
    assert float(loss) == pytest.approx(found.nll / found.tokens, rel=1e-5)


def test_every_weight_has_a_place_and_one_kind(shape: Checkpoint) -> None:
    model = TrainableModel(shape)
    weights = dict(model.named_parameters())
    assert weights.keys() == model.places.keys()
    for at, place in model.places.items():
        stored = read_tensor(shape.tensors[place.tensor])
        if place.row is not None:
            stored = stored[place.row]
        if place.half is not None:
            stored = stored.chunk(2)[place.half]
        assert torch.equal(weights[at], stored), at
    kinds = patterns(shape.arch)
    for at in weights:
        module = at.rpartition(".")[0]
        hit = [kind for kind, one in kinds.items() if re.fullmatch(one, module)]
        assert len(hit) == 1, f"{at}: {hit}"
    # All of the attention's matrices, so that no family's table forgets one.
    linears = {
        f"blocks.0.attention.{at}"
        for at, module in model.blocks[0].get_submodule("attention").named_modules()
        if isinstance(module, nn.Linear)
    }
    assert {at for at in linears if re.fullmatch(kinds["attention"], at)} == linears


@pytest.fixture
def model(tmp_path: Path) -> TrainableModel:
    folder = tiny_checkpoint(
        tmp_path, layers=2, experts=4, hidden=32, width=48, dtype="float32"
    )
    return TrainableModel(open_checkpoint(folder))


def adapted(model: TrainableModel) -> nn.Module:
    """With adapters on all that can have them, that do something."""
    kinds = patterns(
        open_checkpoint(Path(model.blocks[0].moe.where.split(":")[0])).arch
    )
    names = ("attention", "experts", "router")
    pattern = "|".join(f"({kinds[name]})" for name in names)
    torch.manual_seed(0)
    found = with_adapters(model, pattern, 4)
    for name, weight in found.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.05)
    return found


def test_merged_adapters_compute_what_those_of_peft_do(model: TrainableModel) -> None:
    ids_ST = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = model.logits(ids_ST)
        trained = adapted(model)
        layers = [one for one in trained.modules() if isinstance(one, lora.Linear)]
        # Four of the attention, three of each expert, and the router, in both layers.
        assert len(layers) == 2 * (4 + 4 * 3 + 1)
        assert not any(isinstance(one, MaskedLinear) for one in layers)
        expected = model.logits(ids_ST)
        found = merged(trained).logits(ids_ST)
    assert not torch.allclose(plain, expected, atol=1e-2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_leave_zeros_alone_and_say_what_merging_will(
    model: TrainableModel,
) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight[torch.rand(weight.shape) < 0.5] = 0
    zeros = {at: weight == 0 for at, weight in model.named_parameters()}
    ids_ST = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        trained = adapted(model)
        expected = model.logits(ids_ST)
        plain = merged(trained)
        assert torch.equal(plain.logits(ids_ST), expected)
    for at, weight in plain.named_parameters():
        assert torch.equal(weight == 0, zeros[at]), at
