"""Pruned models shared by two ranks, by rows and columns (TP) and by experts (EP)."""

from pathlib import Path

import pytest

from tests.e2e import test_plugin_mixtral as mixtral
from tests.e2e import test_quantized_serve as quantized
from tests.e2e import test_sparse_serve as sparse
from tests.engine import Job, check_two_ranks
from tests.family_cases import CASES, COMPRESSED, ENGINE, make_pruned
from tests.quantized import write_untrimmed
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
EXPERTS = {"enable_expert_parallel": True}


def test_mixtral_dense_compressed_and_quantized(tmp_path: Path) -> None:
    jobs = {}
    for name, options in (("everything", {}), ("dropped MoE", EXPERTS)):
        case = mixtral.CASES[name]
        original = mixtral.make_original(tmp_path / name, case.layout)
        right = mixtral.expected(original, case), mixtral.expected_loads(original, case)
        jobs[name] = Job(mixtral.make_pruned(original, case), *right, options)
    dense = sparse.make_dense(tmp_path)
    packed = sparse.make_packed(dense)
    whole = mixtral.Case({}, sparse.HALF.layout)
    right = mixtral.expected(dense), mixtral.expected_loads(dense, whole)
    jobs["compressed experts"] = Job(packed, *right, EXPERTS)
    original = quantized.make_original(tmp_path / "original")
    integers = tmp_path / "integers"
    quantized.make_cut(original, integers, quantized.MIXTRAL, quantized.AWQ)
    case = mixtral.Case(quantized.MIXTRAL, "")
    dense = write_untrimmed(original, integers, tmp_path / "untrimmed")
    right = mixtral.expected(dense, case), mixtral.expected_loads(dense, case)
    jobs["integer tensors"] = Job(integers, *right)
    jobs["integer experts"] = Job(integers, *right, EXPERTS)
    check_two_ranks(tmp_path, jobs)


def test_every_other_family(tmp_path: Path) -> None:
    """Every family by rows and columns and by experts, with at least two of them."""
    latent = ["v2-everything", "v3-uneven-groups"]
    tensors = ["arctic-one-after-the-other", "deepseek-normalized", *latent]
    experts = ["arctic-everything", "deepseek-normalized", *latent]
    made = {}
    for name in {*tensors, *experts}:
        (tmp_path / name).mkdir()
        made[name] = make_pruned(tmp_path / name, CASES[name])
    jobs = {}
    for names, by_experts in ((tensors, False), (experts, True)):
        for name in names:
            options = {"enable_expert_parallel": by_experts}
            options |= ENGINE[CASES[name].family]
            how = "experts" if by_experts else "tensors"
            jobs[f"{name}-{how}"] = Job(*made[name], options)
    for name, case in COMPRESSED.items():
        folder = tmp_path / f"compressed-{name}"
        folder.mkdir()
        zeros, *right = make_pruned(folder, case)
        convert(open_checkpoint(zeros), folder / "packed", "bitmask")
        # How blocks are split is the same for every family: time matters here.
        for how in ("tensors", "experts") if name in {"arctic", "v3"} else ("experts",):
            options = {
                "enable_expert_parallel": how == "experts",
                **ENGINE[case.family],
            }
            jobs[f"compressed-{name}-{how}"] = Job(folder / "packed", *right, options)
    check_two_ranks(tmp_path, jobs)
