"""In a process of vLLM's the plugin loads tokenizers as their files say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tokenizers_of import (
    TEXTS,
    byte_level,
    ids_by_file,
    ids_by_sentencepiece,
    model_type,
    sentencepiece_only,
    tiktoken_with_code,
)

pytestmark = pytest.mark.vllm
LOAD = """
import json, sys
from vllm_moe_prune.errors import CalibrationError
from vllm_moe_prune.plugin import register

register()
from vllm.tokenizers.registry import get_tokenizer

folders, texts = json.load(sys.stdin)
found = {}
for folder, trusted in folders:
    try:
        tokenizer = get_tokenizer(folder, trust_remote_code=trusted)
    except CalibrationError as error:
        found[f"{folder} {trusted}"] = str(error)
        continue
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    said = [tokenizer.decode(one) for one in ids]
    found[f"{folder} {trusted}"] = [tokenizer.truncation_side, ids, said]
print(json.dumps(found))
"""


def test_the_plugin_loads_originals_by_their_files(tmp_path: Path) -> None:
    own = {"auto_map": {"AutoTokenizer": ["own.Own", None]}}
    plain = model_type(byte_level(tmp_path / "a", "LlamaTokenizerFast"), "deepseek")
    named = byte_level(tmp_path / "b", "LlamaTokenizerFast", **own)
    model_type(named, "deepseek_v3")
    alone = sentencepiece_only(tmp_path / "c", {"tokenizer_class": "LlamaTokenizer"})
    model_type(alone, "mixtral")
    code = model_type(tiktoken_with_code(tmp_path / "d"), "deepseek_v3")
    other = model_type(byte_level(tmp_path / "e", "LlamaTokenizerFast"), "llama")
    asked = [(str(one), False) for one in (plain, named, alone, code, other)]
    asked += [(str(named), True), (str(code), True)]
    ran = subprocess.run(
        [sys.executable, "-c", LOAD],
        input=json.dumps([asked, TEXTS]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    for folder, trusted, expect in (
        (plain, False, ids_by_file),
        (named, False, ids_by_file),
        (named, True, ids_by_file),
        (alone, False, ids_by_sentencepiece),
    ):
        side, ids, said = found[f"{folder} {trusted}"]
        assert side == "left"
        assert ids == [expect(folder, text) for text in TEXTS]
        assert said == list(TEXTS)
    assert "--trust-remote-code" in found[f"{code} False"]
    assert found[f"{code} True"][1][-2] == [ord("x") * 7 % 256]
    # A family that is none of ours is vLLM's own business.
    assert found[f"{other} False"][1] != [ids_by_file(other, text) for text in TEXTS]
