"""What the gateway reads of backends, and the tasks that ask them."""

import asyncio
import json
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_prune_gateway.backend_reports import (
    InvalidReport,
    read_models,
    read_provenance,
)
from moe_prune_gateway.background import BackgroundTasks
from moe_prune_gateway.metrics import Metrics

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@pytest.mark.slow
@given(st.dictionaries(st.sampled_from(["id", "x"]), values) | values)
def test_models_that_are_read_can_be_passed_on(entry: object) -> None:
    try:
        models = read_models(json.dumps({"data": [entry]}).encode())
    except InvalidReport:
        return
    (model,) = models
    again = json.loads(model.json)
    assert again["id"] == model.id
    assert json.dumps(again, allow_nan=False).encode("utf-8")


@given(st.binary() | values.map(lambda value: json.dumps(value).encode()))
def test_anything_is_a_report_or_none(data: bytes) -> None:
    for read in (read_models, read_provenance):
        with suppress(InvalidReport):
            read(data)


def test_an_entry_keeps_what_its_backend_says() -> None:
    entry = {"id": "a/b", "max_model_len": 2**53, "permission": [{"x": 0.1}], "ü": None}
    (model,) = read_models(json.dumps({"data": [entry]}).encode())
    assert json.loads(model.json) == entry


@pytest.mark.parametrize("counts", [{"of_experts": 1.5}, {"parameters_after": -1}])
def test_impossible_numbers_are_not_shown(counts: dict[str, float]) -> None:
    with pytest.raises(InvalidReport):
        read_provenance(json.dumps({"sparsity_achieved": counts}).encode())


def test_numbers_go_when_the_model_behind_a_backend_changes() -> None:
    metrics = Metrics()
    metrics.show_model("a", read_provenance(b'{"source_bytes": 7}'))
    find = metrics.registry.get_sample_value
    labels = {"backend": "a"}
    assert find("moe_prune_model_source_bytes", labels) == 7
    metrics.show_model("a", None)
    assert find("moe_prune_model_source_bytes", labels) is None


def test_a_background_task_that_ends_is_logged_and_started_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runs = 0

    async def job() -> None:
        nonlocal runs
        runs += 1
        if runs == 1:
            raise ZeroDivisionError
        if runs == 2:
            raise asyncio.CancelledError
        if runs > 3:
            await asyncio.sleep(60)

    async def run() -> None:
        tasks = BackgroundTasks(restart_s=0.01)
        tasks.start("the job", job)
        async with asyncio.timeout(5):
            while runs < 4:
                await asyncio.sleep(0.01)
        await tasks.close()

    asyncio.run(run())
    assert runs == 4
    said = [record for record in caplog.records if "the job" in record.getMessage()]
    assert len(said) == 3
    assert said[0].exc_info
