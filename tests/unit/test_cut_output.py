"""The output folder: what is copied, what is replaced, what is left alone."""

import fcntl
import json
import logging
import os
from pathlib import Path

import pytest

from tests.reference import DROP_MOE, LayerCut, folder_bytes, read_json, write_plan
from tests.tiny import tiny_checkpoint
from vllm_moe_prune.checkpoint.source import open_checkpoint
from vllm_moe_prune.cut.execute import CutResult, execute_plan
from vllm_moe_prune.decide.cut_plan import load_plan
from vllm_moe_prune.errors import CheckpointError, OutputError, PlanError
from vllm_moe_prune.progress import Progress, Report, ignore

TRIMMED = {0: LayerCut(keep=(1, 3))}
BLOB = bytes(range(256)) * 3


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_checkpoint(
        tmp_path / "model",
        layers=2,
        experts=4,
        hidden=16,
        width=8,
        vocab=32,
        shards=1,
        tokenizer=False,
    )


def pruned(
    source: Path,
    out: Path,
    cuts: dict[int, LayerCut] = TRIMMED,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: Report = ignore,
    **how: str,
) -> CutResult:
    checkpoint = open_checkpoint(source)
    plan = load_plan(write_plan(source.parent / "plan.json", checkpoint, cuts, **how))
    return execute_plan(
        checkpoint, plan, out, resume=resume, overwrite=overwrite, report=report
    )


def stray_files(folder: Path) -> set[str]:
    """What lies beside the model and the plan."""
    return {path.name for path in folder.iterdir()} - {"model", "plan.json"}


def test_everything_that_is_no_weight_is_copied_byte_for_byte(
    model: Path, tmp_path: Path
) -> None:
    files = {
        "LICENSE": b"Apache\r\n\xff",
        "merges.txt": BLOB,
        "tokenizer.model": BLOB,
        "chat_template.jinja": b"{{ x }}\n",
        "modeling_own.py": b"raise SystemExit\n",
        "preprocessor_config.json": b"not even JSON",
    }
    for name, data in files.items():
        (model / name).write_bytes(data)
    pruned(model, tmp_path / "out")
    for name, data in files.items():
        assert (tmp_path / "out" / name).read_bytes() == data


def test_other_copies_of_the_weights_stay_behind(model: Path, tmp_path: Path) -> None:
    others = [
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "consolidated.00.pth",
        "model.gguf",
        "training.pt",
        ".gitattributes",
    ]
    for name in others:
        (model / name).write_bytes(BLOB)
    (model / "original").mkdir()
    (model / "original" / "params.json").write_bytes(b"{}")
    pruned(model, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "config.json",
        "expert_remap.json",
        "generation_config.json",
        "model.safetensors",
        "moe_prune.yaml",
        "plan.json",
        "provenance.json",
        "run.json",
        "tensor_hashes.json",
    ]


@pytest.mark.parametrize("name", ["journal.jsonl", "work"])
def test_a_file_named_like_one_that_exists_only_meanwhile_is_copied(
    model: Path, tmp_path: Path, name: str
) -> None:
    (model / name).write_bytes(b"theirs")
    pruned(model, tmp_path / "out")
    assert (tmp_path / "out" / name).read_bytes() == b"theirs"


@pytest.mark.parametrize("name", ["run.json", "plan.json", "tensor_hashes.json"])
def test_a_file_of_the_input_named_like_one_of_ours_does_no_harm(
    model: Path, tmp_path: Path, name: str
) -> None:
    (model / name).write_bytes(b"theirs")
    pruned(model, tmp_path / "out")
    path = tmp_path / "out" / name
    assert not path.exists() or path.read_bytes() != b"theirs"


def test_a_companion_that_links_out_of_the_checkpoint_is_refused(
    model: Path, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("private")
    (model / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(CheckpointError, match=r"notes\.txt: is a link to "):
        pruned(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_links_that_are_trusted_gives_the_same_output(
    model: Path, tmp_path: Path
) -> None:
    (model / "README.md").write_text("---\nlicense: mit\n---\n")
    links = tmp_path / "links" / "model"
    links.mkdir(parents=True)
    for path in model.iterdir():
        (links / path.name).symlink_to(path)
    with pytest.raises(CheckpointError, match="--allow-links"):
        open_checkpoint(links)
    plan = load_plan(
        write_plan(tmp_path / "plan.json", open_checkpoint(model), TRIMMED)
    )
    execute_plan(open_checkpoint(model), plan, tmp_path / "out")
    execute_plan(open_checkpoint(links, allow_links=True), plan, tmp_path / "same")
    assert folder_bytes(tmp_path / "same") == folder_bytes(tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "same").iterdir())


def test_the_card_inherits_the_licence_of_the_source(
    model: Path, tmp_path: Path
) -> None:
    (model / "README.md").write_text(
        "---\nlicense: mit\nlanguage: [en]\n---\n# Theirs\n"
    )
    pruned(model, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license: mit" in front
    assert "# Theirs" not in body
    assert "# model, pruned" in body


@pytest.mark.parametrize(
    "text",
    [
        "---\nlicense: [mit\n---\n",
        f"---\nlicense: {'[' * 600}\n---\n",
        "---\n- a\n- b\n---\n",
        "---\nlicense: mit\nlicense: apache\n---\n",
        "---\nmodel-index: 7\n---\n",
        "---\nlicense: {a: 1}\nlanguage: 7\n---\n",
        "no front matter",
        "",
    ],
)
def test_a_source_card_that_cannot_be_read_costs_only_its_licence(
    model: Path,
    tmp_path: Path,
    text: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Which otherwise goes to the user's screen.
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    (model / "README.md").write_text(text)
    pruned(model, tmp_path / "out")
    assert "# model, pruned" in (tmp_path / "out" / "README.md").read_text("utf-8")
    assert caplog.messages == []


def test_a_source_card_that_is_not_text_costs_only_its_licence(
    model: Path, tmp_path: Path
) -> None:
    (model / "README.md").write_bytes(b"---\nlicense: \xff\xfe\n---\n")
    pruned(model, tmp_path / "out")
    assert "# model, pruned" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_earlier_output_is_refused_and_left_alone(
    model: Path, tmp_path: Path
) -> None:
    pruned(model, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    with pytest.raises(OutputError, match=r"not empty.*--overwrite"):
        pruned(model, tmp_path / "out", {1: DROP_MOE})
    assert folder_bytes(tmp_path / "out") == before
    assert stray_files(tmp_path) == {"out"}


def test_overwriting_replaces_the_whole_folder(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "out")
    (tmp_path / "out" / "leftover.txt").write_text("old")
    pruned(model, tmp_path / "out", {1: DROP_MOE}, overwrite=True)
    pruned(model, tmp_path / "fresh", {1: DROP_MOE})
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")
    assert stray_files(tmp_path) == {"out", "fresh"}


def test_overwriting_leaves_the_old_output_where_the_new_one_fails(
    model: Path, tmp_path: Path
) -> None:
    pruned(model, tmp_path / "out")
    before = folder_bytes(tmp_path / "out")
    (model / "notes.txt").symlink_to(tmp_path / "plan.json")
    with pytest.raises(CheckpointError, match="is a link to"):
        pruned(model, tmp_path / "out", {1: DROP_MOE}, overwrite=True)
    assert folder_bytes(tmp_path / "out") == before


def test_overwriting_does_not_touch_a_folder_that_somebody_named_old(
    model: Path, tmp_path: Path
) -> None:
    pruned(model, tmp_path / "out")
    (tmp_path / "out.old").mkdir()
    (tmp_path / "out.old" / "precious.txt").write_text("a backup")
    pruned(model, tmp_path / "out", {1: DROP_MOE}, overwrite=True)
    assert (tmp_path / "out.old" / "precious.txt").read_text() == "a backup"
    assert stray_files(tmp_path) == {"out", "out.old"}


def test_overwriting_refuses_a_folder_that_is_no_checkpoint(
    model: Path, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"home: is not a checkpoint"):
        pruned(model, home, overwrite=True)
    assert folder_bytes(home) == {"thesis.tex": b"years of work"}
    assert stray_files(tmp_path) == {"home"}


def test_an_empty_output_folder_is_filled(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pruned(model, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()
    assert stray_files(tmp_path) == {"out"}


def test_a_second_run_beside_a_living_one_is_refused(
    model: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "journal.jsonl").write_text('{"key": "theirs"}\n')
    before = folder_bytes(partial)
    living = os.open(partial, os.O_RDONLY)
    fcntl.flock(living, fcntl.LOCK_EX)
    for resume, overwrite in ((True, False), (False, True)):
        with pytest.raises(OutputError, match="another run is writing"):
            pruned(model, tmp_path / "out", resume=resume, overwrite=overwrite)
        assert folder_bytes(partial) == before
    os.close(living)
    pruned(model, tmp_path / "out", overwrite=True)
    assert stray_files(tmp_path) == {"out"}


def test_a_failed_run_lets_the_next_one_in(model: Path, tmp_path: Path) -> None:
    def fail_at_the_end(progress: Progress) -> None:
        if progress.layer == progress.layers:
            raise CheckpointError("as if the disk had gone")

    with pytest.raises(CheckpointError, match="as if"):
        pruned(model, tmp_path / "out", report=fail_at_the_end)
    result = pruned(model, tmp_path / "out", resume=True)
    assert result.bytes_written == 0
    pruned(model, tmp_path / "fresh")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_resuming_without_a_journal_starts_again_and_adopts_nothing(
    model: Path, tmp_path: Path
) -> None:
    partial = tmp_path / "out.partial"
    (partial / "work").mkdir(parents=True)
    (partial / "model-00001-of-00009.safetensors").write_bytes(BLOB)
    (partial / "work" / "hidden-00001.safetensors").write_bytes(BLOB)
    pruned(model, tmp_path / "out", resume=True)
    pruned(model, tmp_path / "fresh")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "fresh")


def test_a_plan_without_any_experts_left_is_refused(
    model: Path, tmp_path: Path
) -> None:
    """Nothing could open such an output again."""
    with pytest.raises(PlanError, match="no layer of model with experts"):
        pruned(model, tmp_path / "out", {0: DROP_MOE, 1: DROP_MOE})
    assert not stray_files(tmp_path)


def test_what_redirects_cannot_be_cut_again(model: Path, tmp_path: Path) -> None:
    """Its router rows are not its experts: rows of the wrong ones would survive."""
    cuts = {0: LayerCut(keep=(1, 3), clusters=((0, 1), (2, 3)))}
    pruned(model, tmp_path / "redirected", cuts, routing="redirect")
    with pytest.raises(PlanError, match="layer 0: its router still has rows"):
        pruned(tmp_path / "redirected", tmp_path / "out", {})
    assert not (tmp_path / "out.partial").exists()


def test_a_redirecting_table_tells_where_every_row_leads(
    model: Path, tmp_path: Path
) -> None:
    cuts = {
        0: LayerCut(keep=(3, 1), clusters=((2, 3), (0, 1))),
        1: LayerCut(keep=(2, 0, 1, 3), clusters=((2,), (0,), (1,), (3,))),
    }
    pruned(model, tmp_path / "out", cuts, routing="redirect")
    remap = read_json(tmp_path / "out" / "expert_remap.json")
    first, second = remap["layers"]
    assert remap["routing"] == "redirect"
    assert first["kept"] == [3, 1]
    assert first["router_rows"] == [0, 1, 2, 3]
    assert first["redirect"] == [1, 1, 0, 0]
    assert second["kept"] == second["router_rows"] == [2, 0, 1, 3]
    assert second["redirect"] == [0, 1, 2, 3]
    open_checkpoint(tmp_path / "out")


def test_original_ids_and_places_survive_two_cuts(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "between", {0: DROP_MOE, 1: LayerCut(keep=(3, 1, 0))})
    cuts = {1: LayerCut(keep=(2, 0))}
    pruned(tmp_path / "between", tmp_path / "out", cuts)
    remap = read_json(tmp_path / "out" / "expert_remap.json")
    assert remap["source"]["name"] == "model"
    assert remap["source"]["fingerprint"] == open_checkpoint(model).fingerprint
    first, second = remap["layers"]
    assert (first["moe"], first["moe_dropped"], first["kept"]) == (False, True, [])
    assert (second["moe"], second["kept"]) == (True, [0, 3])
    assert [first["experts_before"], second["experts_before"]] == [4, 4]
    provenance = read_json(tmp_path / "out" / "provenance.json")
    assert provenance["earlier"] == read_json(tmp_path / "between" / "provenance.json")


def test_layers_of_the_table_remember_where_they_were(
    model: Path, tmp_path: Path
) -> None:
    pruned(model, tmp_path / "out", {0: LayerCut(action="drop-block")})
    remap = read_json(tmp_path / "out" / "expert_remap.json")
    assert remap["dropped_blocks"] == [0]
    assert remap["original_layers"] == 2
    (layer,) = remap["layers"]
    assert (layer["layer"], layer["original_layer"]) == (0, 1)


def test_provenance_counts_forward_passes(model: Path, tmp_path: Path) -> None:
    pruned(model, tmp_path / "out")
    text = (tmp_path / "out" / "provenance.json").read_text("utf-8")
    provenance = json.loads(text)
    assert provenance["forward_passes"] == {"measure": 0, "cut": 0}
    assert provenance["calibration"] is None
    assert provenance["source"]["source"] == "model"
