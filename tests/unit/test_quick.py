"""Losses with the intact model's zeros: where they are exact, and where estimates."""

from pathlib import Path

import pytest
import torch

from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune import pipeline
from vllm_moe_prune.calibrate.data import Tokens, load_heldout, load_tokens
from vllm_moe_prune.calibrate.forward import StreamingModel
from vllm_moe_prune.checkpoint.open import Checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut import losses
from vllm_moe_prune.cut.losses import LossJournal, Text
from vllm_moe_prune.cut.planned import planned_losses
from vllm_moe_prune.cut.quick import quick_losses
from vllm_moe_prune.decide.cut_plan import CutPlan
from vllm_moe_prune.errors import CalibrationError, RecipeError
from vllm_moe_prune.recipes.schema import parse_recipe
from vllm_moe_prune.slim.wanda import ranked, wanda

LAYERS = 3
NONE = {"method": "none"}
# Of these plans nothing is estimated: no zeros, or zeros that no data decides.
EXACT = [
    {"experts": NONE, "slim": NONE},
    {"experts": {"drop": 0.3}, "slim": NONE},
    {"experts": {"drop": 0.3}, "slim": NONE, "routing": "redirect"},
    {"experts": {"drop": 0.4, "reconstruct": "always"}, "slim": NONE},
    {"experts": NONE, "slim": NONE, "layers": {"drop_blocks": [1]}},
    {"experts": NONE, "slim": NONE, "layers": {"drop_moe": [1]}},
    {"experts": NONE, "slim": NONE, "layers": {"drop_moe": [1], "moe_norm": "keep"}},
    {"experts": NONE, "slim": {"method": "magnitude", "sparsity": 0.4}},
]
ZEROS = [
    {"total_sparsity": total, "experts": {"drop": 0.2}, "slim": {"method": method}}
    for method in ("wanda", "wanda-variant", "sparsegpt")
    for total in (0.4, 0.5)
]


class Given:
    """A checkpoint, its texts and plans."""

    def __init__(self, folder: Path) -> None:
        tiny_text(folder)
        model = tiny_checkpoint(folder / "model", layers=LAYERS, dtype="float32")
        self.checkpoint: Checkpoint = open_checkpoint(model)
        self.model = StreamingModel(self.checkpoint)
        text = {"source": str(folder / "text.txt"), "samples": 3, "heldout": 2}
        self.calibration = {**text, "sequence_length": 24}
        asked = parse_recipe({"calibration": self.calibration}, "")
        self.tokens: Tokens = load_tokens(self.checkpoint, asked.calibration)
        self.heldout: Tokens = load_heldout(self.checkpoint, asked.calibration)
        self.exact = [self.plan(data) for data in EXACT]
        self.zeros = [self.plan(data) for data in ZEROS]

    def plan(self, data: dict[str, object]) -> CutPlan:
        recipe = parse_recipe({**data, "calibration": self.calibration}, "test")
        options = pipeline.RunOptions()
        stats = pipeline.measure(self.checkpoint, recipe, self.tokens, options)
        return pipeline.plan(self.checkpoint, recipe, stats)

    def quick(
        self, plans: list[CutPlan], journal: LossJournal | None = None
    ) -> list[float]:
        # In two parts, as sources are judged apart.
        texts = [Text(self.heldout.ids_ST[:1]), Text(self.heldout.ids_ST[1:])]
        calibration_ST = self.tokens.ids_ST
        found = quick_losses(self.model, plans, texts, calibration_ST, journal=journal)
        return [one.nll + two.nll for one, two in found]

    def planned(self, plans: list[CutPlan]) -> list[float]:
        texts, calibration_ST = [Text(self.heldout.ids_ST)], self.tokens.ids_ST
        found = planned_losses(self.model, plans, texts, calibration_ST)
        return [loss.nll for (loss,) in found]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("quick"))


def test_without_calibrated_zeros_the_losses_are_the_true_ones(given: Given) -> None:
    found = given.quick(given.exact)
    assert found == pytest.approx(given.planned(given.exact), rel=1e-6)
    assert len({round(nll, 4) for nll in found}) == len(found)


def test_the_first_layer_sees_what_every_plan_sees(given: Given) -> None:
    """Before any change streams agree, so zeros there are the plan's own."""
    plans = []
    for method in ("wanda", "wanda-variant", "sparsegpt"):
        whole = given.plan(
            {"experts": NONE, "slim": {"method": method, "sparsity": 0.6}}
        )
        first, *rest = whole.layers
        kept = [layer.model_copy(update={"sparsity": 0.0}) for layer in rest]
        plans.append(whole.model_copy(update={"layers": (first, *kept)}))
    whole = given.plan({"experts": NONE, "slim": NONE, "narrow": {"share": 0.3}})
    first, *rest = whole.layers
    kept = [layer.model_copy(update={"width": None}) for layer in rest]
    plans.append(whole.model_copy(update={"layers": (first, *kept)}))
    assert plans[-1].is_narrowed
    found = given.quick(plans)
    assert found == pytest.approx(given.planned(plans), rel=1e-6)
    assert len(set(found)) == len(plans)


@pytest.mark.slow
def test_neither_company_nor_threads_nor_memory_change_a_loss(
    given: Given, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = [*given.exact, *given.zeros]
    together = given.quick(plans)
    assert [given.quick([plan])[0] for plan in plans] == together
    true = given.planned(plans)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert given.quick(plans) == together
        assert given.planned(plans) == true
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr(losses, "STATE_BYTES", 1)
    monkeypatch.setattr(Checkpoint, "tensor_bytes", 0)
    assert given.quick(plans) == together


def test_a_journal_knows_estimates_from_true_losses(given: Given) -> None:
    journal = LossJournal()
    plans = [given.zeros[0], given.zeros[0], given.exact[1]]
    found = given.quick(plans, journal)
    assert found[0] == found[1]
    assert len(journal.losses) == 2
    run = given.model.layers_run
    assert given.quick(plans, journal) == found
    assert given.model.layers_run == run
    texts = [Text(given.heldout.ids_ST)]
    args = (given.model, plans[:1], texts, given.tokens.ids_ST)
    planned_losses(*args, journal=journal)
    assert given.model.layers_run > run


def test_it_refuses_what_it_cannot_estimate(given: Given) -> None:
    texts = [Text(given.heldout.ids_ST)]
    with pytest.raises(CalibrationError, match="calibration tokens are needed"):
        quick_losses(given.model, given.zeros, texts)
    more = given.zeros[0].model_copy(update={"slim_parts": ("attention",)})
    with pytest.raises(RecipeError, match="experts alone"):
        quick_losses(given.model, [more], texts, given.tokens.ids_ST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ranked_once_is_pruned_as_ever(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    # Few values, so that there are ties; some inputs that never fired.
    weight_RD = (torch.randn(6, 20) * 4).round().to(dtype)
    for sums_D in (torch.rand(20) * (torch.arange(20) % 3 > 0), torch.zeros(20)):
        once = ranked(weight_RD, sums_D)
        for sparsity in (0.0, 0.01, 0.3, 0.5, 0.95):
            expected = wanda(weight_RD, sums_D, sparsity)
            found = once.at(sparsity)
            assert found.dtype == dtype
            bits = torch.int32 if dtype == torch.float32 else torch.int16
            assert torch.equal(found.view(bits), expected.view(bits))
