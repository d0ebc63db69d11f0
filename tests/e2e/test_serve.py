"""The main job as a user does it: prune the demo model, serve it, talk to it.

A real ``vllm serve`` (bf16; eager, since compiling takes minutes on two cores), started
through ``vllm-moe-prune serve``, and the real ``openai`` client.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.server import TOOL, serving
from vllm_moe_prune.checkpoint.source import open_checkpoint

pytestmark = pytest.mark.vllm
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("serve") / "default"
    text = ["--calibration", str(EXAMPLES / "calibration.txt")]
    few = ["--samples", "8", "--sequence-length", "256"]
    command = [*TOOL, "run", str(EXAMPLES / "demo-mixtral"), str(out), *text, *few]
    subprocess.run(command, check=True)
    return out


@pytest.fixture(scope="module")
def address(pruned: Path) -> Iterator[str]:
    with serving(pruned, "--max-model-len", "256", "--watch") as found:
        yield found


def test_the_demo_model_comes_out_uneven(pruned: Path) -> None:
    checkpoint = open_checkpoint(pruned)
    assert checkpoint.config["architectures"] == ["MoePruneMixtralForCausalLM"]
    assert sum(layer.num_experts for layer in checkpoint.layers) == 48


def test_a_pruned_model_answers_completions_and_streamed_chat(address: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none")
    assert [model.id for model in client.models.list()] == ["demo"]
    # One token: short prompts are what kills stock vLLM on CPUs with AMX.
    for prompt in ("a", "def read_lines(path):\n"):
        answer = client.completions.create(
            model="demo", prompt=prompt, max_tokens=8, temperature=0
        )
        assert answer.choices[0].text
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Hello!"}],
        max_tokens=8,
        temperature=0,
        stream=True,
    )
    pieces = [
        chunk.choices[0].delta.content
        for chunk in stream
        if chunk.choices and chunk.choices[0].delta.content
    ]
    assert "".join(pieces)


def test_the_server_tells_what_it_serves_and_where_tokens_go(
    pruned: Path, address: str
) -> None:
    base = address.removesuffix("/v1") + "/plugins/moe-prune"
    with httpx.Client(timeout=30) as http:
        for name in ("remap", "provenance"):
            answer = http.get(f"{base}/{name}")
            file = {"remap": "expert_remap.json"}.get(name, f"{name}.json")
            assert answer.headers["content-type"] == "application/json"
            assert answer.content == (pruned / file).read_bytes()
        report = http.get(f"{base}/report")
        assert report.headers["content-type"].startswith("text/html")
        assert "default" in report.text

        before, began = http.get(f"{base}/load").json(), time.time()
        words = {"model": "demo", "prompt": "one two three", "max_tokens": 5}
        answer = http.post(f"{address}/completions", json=words | {"temperature": 0})
        usage = answer.json()["usage"]
        after = http.get(f"{base}/load").json()
    assert before["enabled"]
    assert before["since"] == after["since"] < began
    assert before["top_k"] == 2
    # The last token that was generated is never fed back.
    slots = 2 * (usage["prompt_tokens"] + usage["completion_tokens"] - 1)
    table = open_checkpoint(pruned).remap
    assert table is not None
    for entry, old, new in zip(
        table.layers, before["layers"], after["layers"], strict=True
    ):
        assert (new["layer"], new["source_layer"]) == (entry.layer, entry.layer)
        assert new["source_experts"] == list(entry.kept)
        pairs = zip(old["experts"], new["experts"], strict=True)
        grown = [later - earlier for earlier, later in pairs]
        assert min(grown) >= 0
        assert sum(grown) == slots
