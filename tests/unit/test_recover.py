"""Recovery from a pruned folder to the trained one, for every family and method."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import MixtralForCausalLM

from tests.family_cases import CASES, COMPRESSED, EQUAL, Case, keep, make_plan
from tests.recovering import MIXTRAL, ask, go, make, text
from tests.reference import DROP_BLOCK, DROP_MOE, raw_bytes, read_tensors, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.calibrate.data import load_heldout, load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.calibrate.perplexity import summed_loss
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, RecipeError
from vllm_moe_prune.pipeline import RunOptions, convert, recover, verify
from vllm_moe_prune.recipes.schema import Calibration
from vllm_moe_prune.recover.model import TrainableModel
from vllm_moe_prune.recover.options import Training, training
from vllm_moe_prune.recover.router_distillation import Distillation

# Family, what is cut, method and targets: together every target, and every family.
WAYS = {
    "mixtral": (MIXTRAL, "lora", "attention,experts,router"),
    "arctic": (COMPRESSED["arctic"], "full", "experts,dense"),
    "deepseek": (COMPRESSED["deepseek"], "full", None),
    "deepseek_v2": (COMPRESSED["v2"], "lora", None),
    "deepseek_v3": (COMPRESSED["v3"], "lora", "experts,dense"),
    "olmoe": (Case("olmoe", {1: keep(0, 2, 5)}), "lora", "attention,experts"),
    "minimax_m2": (CASES["m2-drops"], "full", None),
    "qwen2_moe": (CASES["qwen2-drops"], "full", "attention,dense"),
    "glm4_moe": (CASES["glm4-drops"], "full", None),
    "glm4_moe_lite": (CASES["glm4-lite-equal"], "lora", None),
    "qwen3_moe": (CASES["qwen3-everything"], "full", "attention,dense"),
}
LESSONS = {
    "mixtral": Case("mixtral", {0: keep(1, 4, 6), 1: DROP_MOE, 2: DROP_BLOCK}),
    "arctic": Case("arctic", {1: keep(0, 2, 5), 2: DROP_BLOCK}),
    "deepseek": Case("deepseek", {1: keep(0, 2, 5), 2: DROP_MOE}),
    "deepseek_v2": Case("deepseek_v2", {1: EQUAL, 2: DROP_BLOCK}),
    "deepseek_v3": Case("deepseek_v3", {1: EQUAL, 2: keep(0, 1, 4, 5, 8, 9, 12, 13)}),
    "olmoe": Case("olmoe", {0: DROP_MOE, 1: keep(0, 2, 5)}),
    "minimax_m2": Case("minimax_m2", {1: keep(0, 2, 5), 2: DROP_BLOCK}),
    "qwen2_moe": Case("qwen2_moe", {1: keep(0, 2, 5), 2: DROP_BLOCK}),
    "glm4_moe": Case("glm4_moe", {1: keep(0, 2, 5), 2: DROP_BLOCK}),
    "qwen3_moe": Case("qwen3_moe", {1: keep(0, 2, 5), 2: DROP_BLOCK}),
}


OTHERS = ("provenance.json", "README.md", "run.json", "tensor_hashes.json")


def check_same_but(pruned: Path, out: Path, targets: str) -> int:
    """Files, names and zeros are the same; only tensors of ``targets`` changed."""
    before, after = read_tensors(pruned), read_tensors(out)
    assert before.keys() == after.keys()
    changed = 0
    for name, tensor in before.items():
        if raw_bytes(tensor) == raw_bytes(after[name]):
            continue
        assert re.search(targets, name), name
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor == 0, after[name] == 0), name
        changed += 1
    for path in pruned.iterdir():
        other = out / path.name
        if path.suffix == ".safetensors":
            assert path.stat().st_size == other.stat().st_size
            with safe_open(path, "pt") as one, safe_open(other, "pt") as two:
                assert one.metadata() == two.metadata()
        elif path.name not in OTHERS:
            assert path.read_bytes() == other.read_bytes(), path.name
    return changed


# What names of the checkpoint hold, by target.
HOLDS = {
    "attention": r"self_attn\.\w*_proj",
    "experts": r"\.experts\.",
    "dense": r"shared_experts?\.|residual_mlp|\.mlp\.\w+_proj|block_sparse_moe\.mlp",
    "router": r"\.gate\.weight",
    "norms": r"norm",
    "embeddings": r"embed_tokens|lm_head",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", WAYS)
def test_only_targets_change_and_zeros_stay(family: str, tmp_path: Path) -> None:
    case, method, targets = WAYS[family]
    _, pruned = make(tmp_path, case)
    asked = ask(pruned, method, targets=targets, learning_rate=5e-3)
    record = go(tmp_path, pruned, asked)
    holds = "|".join(HOLDS[name] for name in asked.targets)
    changed = check_same_but(pruned, tmp_path / "out", holds)
    # An expert that no window reached has no gradient.
    assert 0.6 * record["tensors"] <= changed <= record["tensors"]
    hashed = verify(tmp_path / "out").tensors_hashed
    assert hashed == len(read_tensors(pruned))
    assert record["method"] == method
    assert record["steps"] == 2
    assert record["calibration"]["source"] == "text.txt"
    assert record["calibration"]["samples"] == 100
    # What it says of the loss is what the output shows.
    found = loss_of(open_checkpoint(tmp_path / "out"), text(tmp_path))
    assert record["loss"]["after"] == pytest.approx(found, rel=1e-6)
    before = loss_of(open_checkpoint(pruned), text(tmp_path))
    assert record["loss"]["before"] == pytest.approx(before, rel=1e-6)
    assert found != before
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith((pruned / "README.md").read_text())
    assert f"{found:.4f} nats" in card


def loss_of(checkpoint: Checkpoint, calibration: Calibration) -> float:
    heldout = load_heldout(checkpoint, calibration)
    total, count = summed_loss(StreamingModel(checkpoint), heldout.ids_ST, "text")
    return total / count


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(one, marks=[pytest.mark.slow] if "deepseek" in one else [])
        for one in LESSONS
    ],
)
def test_distillation_brings_layers_nearer(family: str, tmp_path: Path) -> None:
    original, pruned = make(tmp_path, LESSONS[family])
    asked = ask(pruned, "router", steps=12, batch_size=8, learning_rate=5e-3)
    record = go(tmp_path, pruned, asked, original)
    assert check_same_but(pruned, tmp_path / "out", HOLDS["router"])
    verify(tmp_path / "out")
    remap = open_checkpoint(pruned).remap
    assert remap is not None
    moe = [entry for entry in remap.layers if entry.moe]
    assert [layer["layer"] for layer in record["layers"]] == [one.layer for one in moe]
    pairs = zip(record["layers"], moe, strict=True)
    assert all(one["original_layer"] == entry.original_layer for one, entry in pairs)
    assert all(one["after"] <= one["before"] for one in record["layers"])
    assert any(one["after"] < 0.99 * one["before"] for one in record["layers"])


def test_nothing_lost_is_nothing_to_learn(tmp_path: Path) -> None:
    original, pruned = make(tmp_path, Case("mixtral", {3: DROP_MOE}), "float32")
    record = go(tmp_path, pruned, ask(pruned, "router", steps=2), original)
    assert [layer["before"] for layer in record["layers"]] == [0.0, 0.0, 0.0]


def test_distillation_is_the_naive_loop(tmp_path: Path) -> None:
    """Against transformers' two models, dense sums over experts, and Adam by hand."""
    original = tiny_checkpoint(
        tmp_path / "original", layers=2, experts=6, dtype="float32"
    )
    path = tmp_path / "original"
    plan = make_plan(path, Case("mixtral", {0: keep(0, 2, 5), 1: keep(1, 2, 4)}))
    execute_plan(open_checkpoint(original), load_plan(plan), tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    asked = training(pruned.arch, "router", steps=12, batch_size=16, learning_rate=1e-2)
    ids_ST = load_tokens(pruned, text(tmp_path)).ids_ST
    lesson = Distillation(
        StreamingModel(open_checkpoint(original)),
        StreamingModel(pruned),
        asked,
        ids_ST,
        4,
    )
    found = [lesson.layer(layer) for layer in pruned.decoder_layers]
    expected = naive(original, tmp_path / "pruned", asked, ids_ST, 4)
    for one, (rows_ED, before, after) in zip(found, expected, strict=True):
        assert one is not None
        torch.testing.assert_close(one[0], rows_ED, rtol=1e-3, atol=2e-4)
        assert one[1].before == pytest.approx(before, rel=1e-4)
        assert one[1].after == pytest.approx(after, rel=1e-3)
        assert after < before


def naive(
    original: Path, pruned: Path, asked: Training, ids_ST: Tensor, heldout: int
) -> list[tuple[Tensor, float, float]]:
    """What each router becomes, and the errors on the last windows."""
    models = [
        MixtralForCausalLM.from_pretrained(
            folder, dtype="float32", experts_implementation="eager"
        ).eval()
        for folder in (original, pruned)
    ]
    tokens = (len(ids_ST) - heldout) * ids_ST.shape[1]
    results = []
    for index in range(2):
        seen: list[tuple[Tensor, Tensor]] = []
        for model in models:

            def note(
                _module: Any, inputs: Any, output: Tensor, seen: Any = seen
            ) -> None:
                seen.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))

            handle = model.model.layers[index].mlp.register_forward_hook(note)
            with torch.no_grad():
                model(ids_ST)
            handle.remove()
        (_, target_ND), (x_ND, _) = seen
        mlp = models[1].model.layers[index].mlp
        outputs = []
        for gate_up, down in zip(
            mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True
        ):
            gate_NF, up_NF = (x_ND @ gate_up.T).chunk(2, dim=-1)
            outputs.append((functional.silu(gate_NF) * up_NF) @ down.T)
        outputs_END = torch.stack(outputs).detach()
        rows_ED = mlp.gate.weight.detach().clone().requires_grad_()

        def error(
            at_n: Tensor,
            rows_ED: Tensor = rows_ED,
            x_ND: Tensor = x_ND,
            outputs_END: Tensor = outputs_END,
            target_ND: Tensor = target_ND,
        ) -> Tensor:
            probs_nE = (x_ND[at_n] @ rows_ED.T).softmax(dim=-1)
            best, ids = probs_nE.topk(2, dim=-1)
            weights_nE = torch.zeros_like(probs_nE).scatter(
                1, ids, best / best.sum(dim=-1, keepdim=True)
            )
            out_nD = torch.einsum("te,etd->td", weights_nE, outputs_END[:, at_n])
            return (out_nD - target_ND[at_n]).square().sum() / (
                target_ND[at_n].square().sum()
            )

        held = torch.arange(tokens, len(x_ND))
        before = float(error(held).detach())
        order = torch.Generator().manual_seed(asked.seed)
        mean, power = torch.zeros_like(rows_ED), torch.zeros_like(rows_ED)
        rising = round(asked.warmup * asked.steps)
        for step in range(asked.steps):
            at_n = torch.randperm(tokens, generator=order)
            at_n = at_n[: asked.batch_size * ids_ST.shape[1]]
            (slope,) = torch.autograd.grad(error(at_n), rows_ED)
            mean = 0.9 * mean + 0.1 * slope
            power = 0.999 * power + 0.001 * slope.square()
            way = (step - rising) / (asked.steps - rising)
            rate = step / rising if step < rising else (1 + math.cos(math.pi * way)) / 2
            with torch.no_grad():
                corrected = mean / (1 - 0.9 ** (step + 1))
                spread = (power / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
                rows_ED -= asked.learning_rate * rate * corrected / spread
        mlp.gate.weight.data = rows_ED.detach()
        results.append((rows_ED.detach(), before, float(error(held).detach())))
    return results


@pytest.mark.slow
def test_what_is_stored_without_zeros(tmp_path: Path) -> None:
    """Routers and attention can be trained; experts are refused elsewhere."""
    original, pruned = make(tmp_path, MIXTRAL)
    packed = tmp_path / "packed"
    convert(open_checkpoint(pruned), packed, RunOptions(storage="bitmask"))
    assert open_checkpoint(packed).storage is not None
    record = go(tmp_path, packed, ask(packed, "lora", learning_rate=5e-3))
    assert check_same_but(packed, tmp_path / "out", HOLDS["attention"]) == 16
    assert record["tensors"] == 16
    go(tmp_path, packed, ask(packed, "router"), original, "routed")
    assert check_same_but(packed, tmp_path / "routed", HOLDS["router"])


@pytest.mark.slow
def test_shards_in_a_folder_below_stay_there(tmp_path: Path) -> None:
    original, pruned = make(tmp_path, MIXTRAL)
    go(tmp_path, pruned, ask(pruned, "router"), original, "flat")
    below = pruned / "sub" / "model.safetensors"
    below.parent.mkdir()
    (pruned / "model.safetensors").rename(below)
    index = {"weight_map": dict.fromkeys(load_file(below), "sub/model.safetensors")}
    (pruned / "model.safetensors.index.json").write_text(json.dumps(index))
    assert verify(pruned, open_checkpoint(original)).tensors_hashed == len(
        index["weight_map"]
    )
    go(tmp_path, pruned, ask(pruned, "router"), original)
    written = tmp_path / "out" / "sub" / "model.safetensors"
    flat = tmp_path / "flat" / "model.safetensors"
    assert written.read_bytes() == flat.read_bytes()
    assert verify(tmp_path / "out").tensors_hashed
    convert(open_checkpoint(tmp_path / "out"), tmp_path / "again", RunOptions())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == flat.read_bytes()


@pytest.mark.slow
def test_fp8_routers_can_be_trained(tmp_path: Path) -> None:
    case = Case("deepseek_v3", {1: EQUAL}, config={"fp8": (32, 32), "layers": 3})
    original, pruned = make(tmp_path, case)
    assert open_checkpoint(pruned).blocks is not None
    record = go(
        tmp_path,
        pruned,
        ask(pruned, "router", steps=12, batch_size=8, learning_rate=5e-3),
        original,
    )
    assert check_same_but(pruned, tmp_path / "out", HOLDS["router"])
    assert record["layers"][0]["after"] < record["layers"][0]["before"]


@pytest.mark.slow
def test_a_second_recovery_is_added_to_the_first(tmp_path: Path) -> None:
    original, pruned = make(tmp_path, MIXTRAL)
    go(tmp_path, pruned, ask(pruned, "router"), original)
    go(tmp_path, tmp_path / "out", ask(pruned, "lora"), out="again")
    history = json.loads((tmp_path / "again" / "provenance.json").read_text())
    assert [one["method"] for one in history["recovered"]] == ["router", "lora"]
    assert history["recipe"]
    with pytest.raises(CheckpointError, match="trained after the cut"):
        verify(tmp_path / "again", open_checkpoint(original))


@pytest.mark.slow
@pytest.mark.parametrize(("method", "rate"), [("lora", 2e-3), ("full", 3e-4)])
def test_the_demo_model_gets_better(method: str, rate: float, tmp_path: Path) -> None:
    examples = Path(__file__).parents[2] / "examples"
    source = open_checkpoint(examples / "demo-mixtral")
    cuts = {layer: keep(*range(0, 16, 2)) for layer in range(4)}
    plan = write_plan(tmp_path / "plan.json", source, cuts)
    execute_plan(source, load_plan(plan), tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    asked = training(pruned.arch, method, steps=15, learning_rate=rate)
    found = recover(
        pruned,
        None,
        tmp_path / "out",
        asked,
        Calibration(
            source=str(examples / "calibration.txt"),
            samples=64,
            sequence_length=128,
            heldout=8,
        ),
        RunOptions(),
    )
    assert found.loss_after < found.loss_before - 0.3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["router", "lora", "full"])
def test_a_teacher_is_approached(method: str, tmp_path: Path) -> None:
    original, pruned = make(tmp_path, LESSONS["mixtral"], "float32")
    values = {"steps": 12, "batch_size": 16, "learning_rate": 1e-2}
    asked = ask(pruned, method, taught=True, **values)
    record = go(tmp_path, pruned, asked, original)
    assert record["objective"] == "teacher"
    heldout = load_heldout(open_checkpoint(pruned), text(tmp_path))
    expected = [
        naive_divergence(original, folder, heldout.ids_ST)
        for folder in (pruned, tmp_path / "out")
    ]
    found = record["divergence"]
    assert [found["before"], found["after"]] == pytest.approx(expected, rel=1e-4)
    assert found["after"] < found["before"]
    holds = "|".join(HOLDS[name] for name in asked.targets)
    assert check_same_but(pruned, tmp_path / "out", holds) > 0


def naive_divergence(original: Path, folder: Path, ids_ST: Tensor) -> float:
    """KL of whole distributions, by the models that training uses."""
    with torch.no_grad():
        aim_STV, found_STV = (
            TrainableModel(open_checkpoint(one)).logits(ids_ST).double().log_softmax(-1)
            for one in (original, folder)
        )
    each_STV = aim_STV.exp() * (aim_STV - found_STV)
    return float(each_STV.sum(-1).mean())


def test_teachers_are_asked_for_in_one_way(tmp_path: Path) -> None:
    original, pruned = make(tmp_path, MIXTRAL)
    with pytest.raises(RecipeError, match=r"layer by layer\) or --teacher"):
        go(tmp_path, pruned, ask(pruned, "router", taught=True))
    with pytest.raises(RecipeError, match="or from --teacher"):
        go(tmp_path, pruned, ask(pruned, "lora"), original)
