"""Families pruned, served by ``vllm serve`` and asked by the ``openai`` client.

One that vLLM has and one that it dropped; ``test_plugin_families.py`` has all.
In float32, so that the answer can be held against the masked original in plain torch.
"""

from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from tests.engine import ROUNDING, TOKENS
from tests.family_cases import CASES, ENGINE, make_pruned
from tests.server import serving
from tests.tokenizers_of import TEXT, byte_level, ids_by_file

pytestmark = pytest.mark.vllm
NAMES = ("arctic-one-after-the-other", "v3-drops")


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_masked_originals(name: str, tmp_path: Path) -> None:
    from openai import OpenAI

    # The tokenizer has a token per byte, so the vocabulary must be larger.
    case = CASES[name]
    case = replace(case, config={**case.config, "vocab": 512})
    pruned, expected_TV, _ = make_pruned(tmp_path, case)
    # Where a class of another pipeline is named, the file decides in the server too.
    byte_level(pruned, "LlamaTokenizerFast")
    flags = ["--dtype", "float32", "--max-model-len", "128"]
    if backend := ENGINE[case.family].get("attention_backend"):
        flags += ["--attention-backend", backend]
    with serving(pruned, *flags) as address:
        client = OpenAI(base_url=address, api_key="none")
        answer = client.completions.create(
            model="demo", prompt=TOKENS, max_tokens=1, temperature=0, logprobs=5
        )
        best = answer.choices[0].logprobs
        assert best is not None
        assert best.token_logprobs is not None
        found = best.token_logprobs[0]
        chat = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Hello!"}],
            max_tokens=4,
        )
        tokens = client.post(
            address.removesuffix("/v1") + "/tokenize",
            body={"model": "demo", "prompt": TEXT, "add_special_tokens": False},
            cast_to=httpx.Response,
        ).json()["tokens"]
    assert tokens == ids_by_file(pruned, TEXT)
    assert found == pytest.approx(expected_TV[-1].max().item(), abs=ROUNDING)
    assert chat.usage is not None
    assert chat.usage.completion_tokens > 0
