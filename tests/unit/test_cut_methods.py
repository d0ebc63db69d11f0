"""Every slimming method and every kind of mean, through a real cut."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import Tokens, sha256_of
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.reader import Expert, read_expert, read_router
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import CutPlan, LayerPlan, ModelId
from vllm_moe_prune.recipes.schema import Recipe
from vllm_moe_prune.slim.magnitude import magnitude
from vllm_moe_prune.slim.sparsegpt import sparsegpt
from vllm_moe_prune.slim.wanda import wanda
from vllm_moe_prune.slim.wanda_variant import wanda_variant

EXPERTS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("methods") / "model"
    return open_checkpoint(
        tiny_checkpoint(folder, layers=2, experts=EXPERTS, dtype="float32")
    )


@pytest.fixture(scope="module")
def tokens() -> Tokens:
    ids = torch.randint(4, 500, (4, 16), generator=torch.Generator().manual_seed(2))
    return Tokens(ids_ST=ids, source="random", sha256=sha256_of(ids))


def plan_for(checkpoint: Checkpoint, first: LayerPlan, **fields: object) -> CutPlan:
    """A plan that does something to layer 0 and nothing to the other."""
    everyone = tuple(range(EXPERTS))
    other = LayerPlan(
        layer=1,
        experts=EXPERTS,
        keep=everyone,
        clusters=tuple((expert,) for expert in everyone),
    )
    model = ModelId(
        model_type="mixtral", fingerprint=checkpoint.fingerprint, source="test"
    )
    return CutPlan.model_validate(
        {
            "tool_version": "0",
            "model": model,
            "recipe": Recipe(),
            "layers": (first, other),
            **fields,
        }
    )


def everyone_at(sparsity: float) -> LayerPlan:
    keep = tuple(range(EXPERTS))
    return LayerPlan(layer=0, experts=EXPERTS, keep=keep, sparsity=sparsity)


def inputs_of(
    checkpoint: Checkpoint, tokens: Tokens, expert: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What enters an expert of layer 0, what enters its down matrix, the weights."""
    model = StreamingModel(checkpoint)
    _, x = model.enter(0, model.embed(tokens.ids_ST))
    assert x is not None
    routing = model.route(checkpoint.layers[0], x)
    chosen = routing.ids_NK == expert
    rows = chosen.any(dim=1)
    weights = (routing.weights_NK * chosen).sum(dim=1)[rows]
    gate, up, _ = read_expert(checkpoint, checkpoint.layers[0], expert)
    inner = torch.nn.functional.silu(x[rows] @ gate.T) * (x[rows] @ up.T)
    return x[rows], inner, weights


def naive(
    method: str, group: int | None, weight: torch.Tensor, inputs: torch.Tensor
) -> torch.Tensor:
    squares = inputs.double().square().sum(dim=0)
    if method == "wanda":
        return wanda(weight, squares, 0.5, group)
    if method == "wanda-variant":
        return wanda_variant(weight, squares, 0.5)
    if method == "sparsegpt":
        return sparsegpt(weight, inputs.T @ inputs, 0.5, group)
    return magnitude(weight, 0.5, group)


@pytest.mark.parametrize(
    ("method", "pattern", "router_weighted"),
    [
        ("wanda", "unstructured", False),
        ("wanda", "2:4", False),
        ("wanda", "unstructured", True),
        ("wanda-variant", "unstructured", False),
        ("sparsegpt", "unstructured", False),
        ("sparsegpt", "4:8", False),
        ("magnitude", "unstructured", False),
        ("magnitude", "2:4", False),
    ],
)
def test_a_cut_slims_as_the_method_does_on_what_reaches_each_expert(
    checkpoint: Checkpoint,
    tokens: Tokens,
    tmp_path: Path,
    method: str,
    pattern: str,
    router_weighted: bool,
) -> None:
    plan = plan_for(
        checkpoint,
        everyone_at(0.5),
        slim=method,
        pattern=pattern,
        router_weighted=router_weighted,
    )
    execute_plan(checkpoint, plan, tmp_path / "out", tokens=tokens)
    verify(tmp_path / "out", checkpoint)
    output = open_checkpoint(tmp_path / "out")
    for expert in range(EXPERTS):
        x, inner, weights = inputs_of(checkpoint, tokens, expert)
        if router_weighted:
            x, inner = x * weights[:, None], inner * weights[:, None]
        before = read_expert(checkpoint, checkpoint.layers[0], expert)
        found = read_expert(output, output.layers[0], expert)
        expected = Expert(
            *(
                naive(method, plan.group, matrix, entering)
                for matrix, entering in zip(before, (x, x, inner), strict=True)
            )
        )
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
            if pattern != "unstructured":
                assert plan.group is not None
                zeros = (mine.view(-1, plan.group) == 0).sum(dim=1)
                assert (zeros == plan.group // 2).all()


@pytest.mark.parametrize("method", ["sparsegpt", "wanda"])
def test_down_makes_up_for_what_slimmed_gates_and_ups_lose(
    checkpoint: Checkpoint, tokens: Tokens, tmp_path: Path, method: str
) -> None:
    plan = plan_for(checkpoint, everyone_at(0.5), slim=method, compensate=True)
    execute_plan(checkpoint, plan, tmp_path / "out", tokens=tokens)
    output = open_checkpoint(tmp_path / "out")
    for expert in range(EXPERTS):
        x, inner, _ = inputs_of(checkpoint, tokens, expert)
        before = read_expert(checkpoint, checkpoint.layers[0], expert)
        found = read_expert(output, output.layers[0], expert)
        gate, up = (naive(method, None, one, x) for one in before[:2])
        own = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        # The normal equations of |down inner' - new own'|^2 + pull |new - down|^2.
        down, g = before.down_DF.double(), own.double()
        gram = g.T @ g
        pull = 0.05 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        new = torch.linalg.solve(
            gram + pull, g.T @ inner.double() @ down.T + pull @ down.T
        )
        expected = naive(method, None, new.T.float(), own)
        for mine, theirs in zip(found, (gate, up, expected), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_merge_weights_give_the_weighted_mean_of_experts_and_router_rows(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = LayerPlan(
        layer=0,
        experts=EXPERTS,
        keep=(1, 3),
        clusters=((0, 1), (2, 3)),
        reconstruct=True,
        merge_weights=((0.25, 0.75), (0.9, 0.1)),
    )
    execute_plan(checkpoint, plan_for(checkpoint, first), tmp_path / "out")
    verify(tmp_path / "out", checkpoint)
    output = open_checkpoint(tmp_path / "out")
    layer = checkpoint.layers[0]
    old = [read_expert(checkpoint, layer, expert) for expert in range(EXPERTS)]
    router = read_router(checkpoint, layer)
    found_router = read_router(output, output.layers[0])
    for new, (a, b, one, two) in enumerate([(0, 1, 0.25, 0.75), (2, 3, 0.9, 0.1)]):
        found = read_expert(output, output.layers[0], new)
        for mine, left, right in zip(found, old[a], old[b], strict=True):
            torch.testing.assert_close(mine, one * left + two * right)
        torch.testing.assert_close(found_router[new], one * router[a] + two * router[b])


def test_unserved_experts_keep_their_router_rows_and_lose_their_tokens(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    first = LayerPlan(
        layer=0,
        experts=EXPERTS,
        keep=(0, 2, 3),
        clusters=((0,), (2,), (3,)),
        unserved=(1,),
    )
    execute_plan(
        checkpoint, plan_for(checkpoint, first, routing="redirect"), tmp_path / "out"
    )
    output = open_checkpoint(tmp_path / "out")
    assert output.layers[0].redirect == (0, None, 1, 2)
    before = read_router(checkpoint, checkpoint.layers[0])
    assert torch.equal(read_router(output, output.layers[0]), before)
