"""Files that strangers made are read in one place, and nowhere else."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.contract.test_project import PACKAGE, modules, name_of, tree_of

READERS = {
    # JSON, YAML and pickle.
    *("json.load", "json.loads", "json.JSONDecoder", "pickle.load", "pickle.loads"),
    *("yaml.load", "yaml.load_all", "yaml.safe_load", "yaml.full_load"),
    *("yaml.unsafe_load", "tomllib.load", "tomllib.loads", "ast.literal_eval"),
    # Whole files, or files of libraries' own.
    *("safe_open", "load_file", "torch.load", "np.load", "np.fromfile", "np.loadtxt"),
    *("mmap.mmap", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree"),
}
METHODS = {
    *("read_text", "read_bytes", "model_validate_json", "model_validate_strings"),
    *("validate_json", "parse_raw", "parse_file", "raw_decode", "readlines"),
}
KNOWN = {
    "checkpoint/index.py": {"safe_open"},  # behind read_head, which bounds the header
    "calibrate/record_files.py": {  # records, each bounded
        *("json.loads", "json.JSONDecoder")
    },
    "ranks/group.py": {"json.loads"},  # what ranks of one job say, infinity included
    # Files of this package itself.
    "recipes/loading.py": {"read_bytes"},
    "plugin/symbols/sources.py": {"read_text"},  # of the vLLM that is installed
    "report/page.py": {"read_text"},
    "report/svg.py": {"read_text"},
    "cut/card.py": {"read_text"},
    "cut/transaction.py": {"os.open"},  # a folder, to lock it
    "checkpoint/writer.py": {"os.open"},  # the shard being written
}


def calls(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """What is called that reads a file or parses one, and in which line."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        last = called.rpartition(".")[2]
        if called in READERS:
            yield called, node.lineno
        elif last in METHODS and isinstance(node.func, ast.Attribute):
            yield last, node.lineno
        elif called == "os.open" or (last == "open" and reads(node)):
            yield ("os.open" if called == "os.open" else "open"), node.lineno


def reads(node: ast.Call) -> bool:
    """Whether a call of ``open`` or ``Path.open`` is for reading."""
    place = 1 if isinstance(node.func, ast.Name) else 0
    found = [word.value for word in node.keywords if word.arg == "mode"]
    found += node.args[place : place + 1]
    if not found:
        # Path.open() reads; other things that are opened take arguments.
        return isinstance(node.func, ast.Name) or not node.args
    mode = found[0]
    if not isinstance(mode, ast.Constant) or not isinstance(mode.value, str):
        return isinstance(node.func, ast.Name)
    return "r" in mode.value


def test_nobody_else_reads_files_or_parses_them() -> None:
    wrong = [
        f"{name_of(path)}:{line}: {called}"
        for path in modules()
        if path.parent != PACKAGE / "files"
        for called, line in calls(tree_of(path))
        if called not in KNOWN.get(path.relative_to(PACKAGE).as_posix(), set())
    ]
    assert not wrong, "use vllm_moe_prune/files:\n" + "\n".join(wrong)


def test_every_exception_is_still_needed() -> None:
    used = {
        (name, called) for name in KNOWN for called, _ in calls(tree_of(PACKAGE / name))
    }
    assert used >= {(name, one) for name, many in KNOWN.items() for one in many}


@pytest.mark.parametrize(
    ("code", "called"),
    [
        ("json.loads(x)", "json.loads"),
        ("path.read_text('utf-8')", "read_text"),
        ("open(path)", "open"),
        ("open(path, 'rb')", "open"),
        ("path.open()", "open"),
        ("path.open('rb')", "open"),
        ("path.open(mode='r')", "open"),
        ("Model.model_validate_json(data)", "model_validate_json"),
        ("os.open(path, flags)", "os.open"),
        ("path.open('wb')", None),
        ("path.open('a', encoding='utf-8')", None),
        ("loader.open(config)", None),
        ("read_bytes(info)", None),
    ],
)
def test_readers_are_told_from_others(code: str, called: str | None) -> None:
    found = [name for name, _ in calls(ast.parse(code))]
    assert found == ([] if called is None else [called])


def test_the_list_is_of_files_that_exist() -> None:
    assert all(Path(PACKAGE / name).is_file() for name in KNOWN)
