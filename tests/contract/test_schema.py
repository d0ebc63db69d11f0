"""The JSON Schemas of the files that others read: fresh, and true of what we write."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator
from jsonschema.exceptions import ValidationError

from tests.bad_inputs.case import run_cli
from tests.contract.test_cli import ROOT, load_generator
from tests.tiny import tiny_checkpoint, tiny_text
from vllm_moe_prune.recipes.loading import shipped_recipes

SCHEMAS = ROOT / "docs" / "reference" / "schema"
FILES = {
    "recipe": "moe_prune.yaml",
    "plan": "plan.json",
    "expert_remap": "expert_remap.json",
    "tensor_hashes": "tensor_hashes.json",
}
# A block inside config.json, not a file of its own.
BLOCK = "quantization_config"
RUN = (
    "run ckpt {} --calibration text.txt --samples 2 --sequence-length 32 "
    "--recipe stun40-paper --json {}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a text."""
    folder = tmp_path_factory.mktemp("schema")
    tiny_checkpoint(folder / "ckpt", layers=2, experts=4, hidden=32, width=48)
    tiny_text(folder, 8000)
    return folder


def validator(name: str) -> Draft202012Validator:
    """The published schema."""
    schema = json.loads((SCHEMAS / f"{name}.schema.json").read_text("utf-8"))
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def read(path: Path) -> Any:
    """The content of a JSON or YAML file."""
    text = path.read_text("utf-8")
    return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)


@pytest.mark.parametrize("name", [*FILES, BLOCK])
def test_a_published_schema_is_that_of_the_code(name: str) -> None:
    path = SCHEMAS / f"{name}.schema.json"
    fresh = load_generator().generated()
    assert fresh[path] == path.read_text("utf-8"), "run scripts/generate_docs"


@pytest.mark.parametrize("page", ["reference/recipe", "contributing/architecture"])
def test_generated_pages_are_fresh(page: str) -> None:
    path = ROOT / "docs" / f"{page}.md"
    assert load_generator().generated()[path] == path.read_text("utf-8"), (
        "run scripts/generate_docs"
    )


def test_there_is_a_schema_for_each_file_and_no_other() -> None:
    found = sorted(path.name for path in SCHEMAS.iterdir())
    assert found == sorted(f"{name}.schema.json" for name in [*FILES, BLOCK])


def test_a_compressed_checkpoint_is_what_the_schema_promises(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    ran = run_cli("convert ckpt packed --storage bitmask", monkeypatch, capsys)
    assert ran.status == 0, ran
    validator(BLOCK).validate(read(folder / "packed/config.json")[BLOCK])


@pytest.mark.parametrize(
    ("output", "flags"),
    [
        ("uneven", "--drop 0.25"),
        ("uniform", "--keep 3 --budget per-layer --slim none"),
        ("redirected", "--keep 3 --routing redirect"),
    ],
)
def test_every_output_is_what_the_schemas_promise(
    output: str,
    flags: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    ran = run_cli(RUN.format(output, flags), monkeypatch, capsys)
    assert ran.status == 0, ran
    for name, file_name in FILES.items():
        validator(name).validate(read(folder / output / file_name))


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_are_what_the_schema_promises(name: str) -> None:
    validator("recipe").validate(
        read(ROOT / "vllm_moe_prune" / "recipes" / f"{name}.yaml")
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("recipe", {"experts": {"drop": 1.0}}),
        ("recipe", {"expert": {}}),
        ("plan", {"format_version": 2}),
        ("expert_remap", {"layers": [{"kept": [-1]}]}),
        ("tensor_hashes", {"tensors": {"a": {"dtype": "BF16", "shape": [1]}}}),
        (BLOCK, {"quant_method": "moe_prune", "format_version": 2}),
    ],
)
def test_a_schema_refuses_what_the_code_refuses(name: str, value: object) -> None:
    with pytest.raises(ValidationError):
        validator(name).validate(value)


def test_the_generator_says_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = load_generator()
    monkeypatch.setattr(generator, "DOCS", tmp_path)
    page = tmp_path / "contributing" / "architecture.md"
    page.parent.mkdir()
    page.write_text(f"Before.\n{generator.IMPORTS}\n{generator.IMPORTS_END}\n", "utf-8")
    for arguments, word, status in (
        (["--check"], "stale", 1),
        ([], "wrote", 0),
        (["--check"], "", 0),
    ):
        monkeypatch.setattr(sys, "argv", ["generate_docs", *arguments])
        with pytest.raises(SystemExit) as done:
            generator.main()
        lines = capsys.readouterr().out.splitlines()
        assert done.value.code == status
        assert len(lines) == (len(FILES) + 5 if word else 0)
        assert all(line.startswith(word) for line in lines)
