"""Pruned models shared by two ranks, by rows and columns (TP) and by experts (EP)."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e import test_plugin_mixtral as mixtral
from tests.e2e import test_quantized_serve as quantized
from tests.e2e import test_sparse_serve as sparse
from tests.engine import Job, check_two_ranks
from tests.family_cases import (
    CASES,
    COMPRESSED,
    ENGINE,
    EQUAL,
    UNEVEN,
    Case,
    make_pruned,
)
from tests.quantized import write_untrimmed
from tests.quantizing import ALL
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.convert import convert

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
EXPERTS = {"enable_expert_parallel": True}


# Parts of two ranks are whole blocks; 12 of 16 experts are left, in uneven groups.
FP8 = Case(
    "deepseek_v3",
    {1: UNEVEN, 2: EQUAL},
    config={
        **{"fp8": (128, 128), "dtype": "bfloat16", "layers": 3, "heads": 4},
        **{"hidden": 256, "width": 256, "moe_intermediate_size": 256},
        **{"q_lora_rank": 128, "qk_nope_head_dim": 64, "v_head_dim": 64},
    },
)


def mixtral_jobs(tmp_path: Path) -> Iterator[tuple[str, Job]]:
    """Dense, compressed and quantized experts."""
    for name, options in (("everything", {}), ("dropped MoE", EXPERTS)):
        case = mixtral.CASES[name]
        original = mixtral.make_original(tmp_path / name, case.layout)
        right = mixtral.expected(original, case), mixtral.expected_loads(original, case)
        yield name, Job(mixtral.make_pruned(original, case), *right, options)
    dense = sparse.make_dense(tmp_path)
    packed = sparse.make_packed(dense)
    whole = mixtral.Case({}, sparse.HALF.layout)
    right = mixtral.expected(dense), mixtral.expected_loads(dense, whole)
    yield "compressed experts", Job(packed, *right, EXPERTS)
    original = quantized.make_original(tmp_path / "original")
    integers = tmp_path / "integers"
    quantized.make_cut(original, integers, quantized.MIXTRAL, quantized.AWQ)
    case = mixtral.Case(quantized.MIXTRAL, "")
    dense = write_untrimmed(original, integers, tmp_path / "untrimmed")
    right = mixtral.expected(dense, case), mixtral.expected_loads(dense, case)
    yield "integer tensors", Job(integers, *right)
    yield "integer experts", Job(integers, *right, EXPERTS)
    yield "integers everywhere", integers_everywhere(tmp_path, original)


def integers_everywhere(tmp_path: Path, original: Path) -> Job:
    """Attention and the head as well."""
    made, case = tmp_path / "everywhere", mixtral.Case(quantized.MIXTRAL, "")
    stage = {"method": "rtn", "weights": "int8", "scope": ALL}
    quantized.make_cut(original, made, quantized.MIXTRAL, stage)
    dense = write_untrimmed(original, made, tmp_path / "everywhere-dense")
    return Job(made, mixtral.expected(dense, case), mixtral.expected_loads(dense, case))


# By rows and columns and by experts; V2 and V3 are the same classes of ours.
TENSORS = {
    name: CASES[name]
    for name in ("arctic-one-after-the-other", "olmoe-drops", "m2-drops")
}
BY_EXPERTS = {
    **{name: CASES[name] for name in ("deepseek-normalized", "v2-everything")},
    **{name: CASES[name] for name in ("qwen3-everything", "qwen2-drops")},
    **{name: CASES[name] for name in ("glm4-uneven-groups", "glm4-lite-everything")},
    **{"fp8": FP8},
}


def family_jobs(tmp_path: Path) -> Iterator[tuple[str, Job]]:
    cases = {f"{name}-tensors": case for name, case in TENSORS.items()}
    cases |= {f"{name}-experts": case for name, case in BY_EXPERTS.items()}
    # How blocks are split is the same for every family.
    packed = {"arctic-experts": COMPRESSED["arctic"], "v3-tensors": COMPRESSED["v3"]}
    for name, case in (cases | packed).items():
        (tmp_path / name).mkdir()
        pruned, *right = make_pruned(tmp_path / name, case)
        if name in packed:
            convert(open_checkpoint(pruned), tmp_path / name / "packed", "bitmask")
            pruned = tmp_path / name / "packed"
        by_experts = {"enable_expert_parallel": name.endswith("experts")}
        yield name, Job(pruned, *right, by_experts | ENGINE[case.family])


@pytest.mark.timeout(1200)
def test_two_ranks_compute_what_one_does(tmp_path: Path) -> None:
    """One pair of processes for all: each imports vLLM, for 10 s."""
    jobs = {}
    for make in (mixtral_jobs, family_jobs):
        (tmp_path / make.__name__).mkdir()
        jobs |= dict(make(tmp_path / make.__name__))
    check_two_ranks(tmp_path, jobs)
