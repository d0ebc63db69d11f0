"""Everything beside the weights goes along: all folders, tokenizers set right."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.reference import DROP_MOE, LayerCut, folder_bytes, write_plan
from tests.tiny import tiny_checkpoint
from tests.tokenizers_of import TEXTS, byte_level, ids_by_file, sentencepiece_only
from vllm_moe_prune import configs
from vllm_moe_prune.checkpoint import side_files
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.checkpoint.tokenizer import load_tokenizer
from vllm_moe_prune.cut.convert import convert
from vllm_moe_prune.cut.execute import execute_plan
from vllm_moe_prune.cut.verify import verify
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError
from vllm_moe_prune.recover.write import write_rest

TREE = {
    "LICENSE": b"free\r\n",
    "additional_chat_templates/tool_use.jinja": b"{{ tools }} {{ messages }}",
    "additional_chat_templates/rag.jinja": b"{{ documents }}",
    "1_Pooling/config.json": b"{}",
    "assets/deep/er/README.md": b"# Theirs",
    "assets/model.png": bytes(range(256)),
    "code/own.py": b"raise SystemExit\n",
}
LEFT = {
    "original/params.json": b"{}",
    "onnx/model.onnx": b"x",
    "assets/other.safetensors": b"x",
    "assets/pytorch_model.bin": b"x",
    ".cache/huggingface/download": b"x",
    "assets/.hidden": b"x",
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tiny_checkpoint(tmp_path / "model", layers=2, experts=4, vocab=512)
    for name, data in (TREE | LEFT).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def pruned(model: Path, out: Path) -> Path:
    checkpoint = open_checkpoint(model)
    cuts = {0: LayerCut(keep=(1, 3)), 1: DROP_MOE}
    plan = load_plan(write_plan(out.parent / "plan.json", checkpoint, cuts))
    execute_plan(checkpoint, plan, out)
    return out


def test_the_whole_tree_goes_through_cut_convert_and_recover(
    model: Path, tmp_path: Path
) -> None:
    out = pruned(model, tmp_path / "out")
    verify(out, open_checkpoint(model))
    convert(open_checkpoint(out), tmp_path / "again", "dense")
    (tmp_path / "recovered").mkdir()
    write_rest(open_checkpoint(out), tmp_path / "recovered")
    for folder in (out, tmp_path / "again", tmp_path / "recovered"):
        found = folder_bytes(folder)
        assert {name: found.get(name) for name in TREE} == TREE
        assert not LEFT.keys() & found.keys()
        assert found["tokenizer.json"] == (model / "tokenizer.json").read_bytes()


def test_prompts_with_tools_are_the_same_before_and_after(
    model: Path, tmp_path: Path
) -> None:
    tool = {"type": "function", "function": {"name": "weigh", "parameters": {}}}
    out = pruned(model, tmp_path / "out")
    messages = [{"role": "user", "content": "How heavy?"}]
    before, after = (
        AutoTokenizer.from_pretrained(folder).apply_chat_template(
            messages, tools=[tool], tokenize=False
        )
        for folder in (model, out)
    )
    assert "weigh" in before
    assert before == after


def test_verify_notices_files_that_changed_or_are_gone(
    model: Path, tmp_path: Path
) -> None:
    out = pruned(model, tmp_path / "out")
    path = out / "additional_chat_templates/tool_use.jinja"
    path.write_bytes(b"{{ tools }} {{ messages[0] }}")
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: differs"):
        verify(out, open_checkpoint(model))
    path.unlink()
    with pytest.raises(CheckpointError, match=r"tool_use\.jinja: missing"):
        verify(out, open_checkpoint(model))


def linked(target: str, name: str = "assets/link") -> Callable[[Path], None]:
    return lambda folder: (folder / name).symlink_to(target)


def far_down(folder: Path) -> None:
    path = folder.joinpath(*["d"] * 40)
    path.mkdir(parents=True)
    (path / "x").write_text("x")


TRAPS = {
    "a link out": (linked("/etc/passwd"), "is a link to"),
    "a folder link out": (linked("/etc"), "is a link to"),
    "a link to nothing": (linked("absent"), "link to nothing"),
    "a link out to nothing": (linked("/absent"), "leads nowhere"),
    "a link above": (linked(".."), "nested deeper"),
    "a link to itself": (linked("link"), "link"),
    "a device": (linked("/dev/zero"), "is a link to"),
    "a FIFO": (lambda folder: os.mkfifo(folder / "code/pipe"), "neither a file nor"),
    "far down": (far_down, "nested deeper"),
}


@pytest.mark.parametrize(("trap", "says"), TRAPS.values(), ids=TRAPS)
def test_traps_are_refused_before_anything_is_written(
    model: Path, tmp_path: Path, trap: Callable[[Path], None], says: str
) -> None:
    trap(model)
    with pytest.raises(CheckpointError, match=says):
        pruned(model, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "plan.json"}


def test_no_more_files_are_copied_than_a_checkpoint_has(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(side_files, "MAX_FILES", 8)
    with pytest.raises(CheckpointError, match="more than 8 files"):
        pruned(model, tmp_path / "out")


def test_links_within_the_folder_are_followed(model: Path, tmp_path: Path) -> None:
    (model / "again").symlink_to("additional_chat_templates")
    (model / "NOTICE").symlink_to("LICENSE")
    found = folder_bytes(pruned(model, tmp_path / "out"))
    assert found["NOTICE"] == TREE["LICENSE"]
    assert found["again/rag.jinja"] == TREE["additional_chat_templates/rag.jinja"]


def test_a_class_that_gives_other_ids_is_corrected_in_the_output(
    tmp_path: Path,
) -> None:
    """Everybody who loads the output tokenizes as it was measured."""
    configs.register()
    model = tiny_checkpoint(
        tmp_path / "model", model_type="deepseek", layers=2, experts=4, vocab=512
    )
    byte_level(model, "LlamaTokenizerFast")
    checkpoint = open_checkpoint(model)
    moe = checkpoint.moe_layers[0].index
    plan = load_plan(
        write_plan(tmp_path / "plan.json", checkpoint, {moe: LayerCut(keep=(1, 3))})
    )
    execute_plan(checkpoint, plan, tmp_path / "out")
    verify(tmp_path / "out", checkpoint)
    convert(open_checkpoint(tmp_path / "out"), tmp_path / "again", "bitmask")
    for text in TEXTS:
        expected = ids_by_file(model, text)
        for folder in (tmp_path / "out", tmp_path / "again"):
            after = AutoTokenizer.from_pretrained(folder)
            assert after(text, add_special_tokens=False).input_ids == expected
            assert after.decode(expected) == text
    before = json.loads((model / "tokenizer_config.json").read_text())
    after = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
    assert after == before | {"tokenizer_class": "PreTrainedTokenizerFast"}
    record = json.loads((tmp_path / "out/provenance.json").read_text())
    assert record["corrected_files"] == ["tokenizer_config.json"]


def test_a_class_that_gives_the_same_ids_stays(model: Path, tmp_path: Path) -> None:
    byte_level(model, "LlamaTokenizerFast")  # which transformers ignores for a Mixtral
    out = pruned(model, tmp_path / "out")
    settings = (model / "tokenizer_config.json").read_bytes()
    assert (out / "tokenizer_config.json").read_bytes() == settings
    assert "corrected_files" not in json.loads((out / "provenance.json").read_text())


def test_sentencepiece_alone_comes_with_a_tokenizer_json(
    model: Path, tmp_path: Path
) -> None:
    for path in model.glob("tokenizer*"):
        path.unlink()
    sentencepiece_only(model, {"tokenizer_class": "LlamaTokenizer"})
    out = pruned(model, tmp_path / "out")
    verify(out, open_checkpoint(model))
    before, after = load_tokenizer(model), AutoTokenizer.from_pretrained(out)
    for text in TEXTS:
        expected = before(text).input_ids
        assert after(text).input_ids == expected
        assert ids_by_file(out, text) == expected[1:]
    changed = json.loads((out / "provenance.json").read_text())["corrected_files"]
    assert changed == ["tokenizer.json", "tokenizer_config.json"]
    assert (out / "tokenizer.model").read_bytes() == (
        model / "tokenizer.model"
    ).read_bytes()
