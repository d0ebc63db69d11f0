"""The tokenizer of a checkpoint, as its files say, whatever class they name beside.

``tokenizer.json`` says everything about a tokenizer. transformers goes by the class
that tokenizer_config.json names, and by lists of model types; where that class builds a
pipeline of its own, ids differ silently. So here the file decides, and what others
would load is compared with it and corrected.

    tokenizer.json                 decides
    tokenizer.model                else, if it is SentencePiece; see sentencepiece_model
    code named in auto_map         else, if the user allows it to run
    a class of transformers        else, if it is one that splits text by itself
"""

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from ..errors import CalibrationError, OutputError
from ..files.json_file import parse_json, read_json
from ..files.regular import MIB, Kind, read_file
from .panics import tokenizer_errors

TOKENIZER = "tokenizer.json"
MODEL = "tokenizer.model"
SETTINGS = "tokenizer_config.json"
VOCABULARIES = ("vocab.json", "vocab.txt", "tekken.json")
FILES = (TOKENIZER, MODEL, SETTINGS)
# What a tokenizer is loaded from, beside those.
BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
TEMPLATES = "additional_chat_templates"
GENERIC = "PreTrainedTokenizerFast"
"""The class that takes tokenizer.json as it is; transformers 5 and 4 know this name."""
GENERIC_NAMES = {GENERIC, "TokenizersBackend"}
TRUST = "--trust-remote-code"
# The largest published tokenizer.json has 35 MB and 260,000 tokens, merged of two each.
FILE = Kind(
    name="tokenizer file",
    max_bytes=256 * MIB,
    error=CalibrationError,
    remedy="Download the tokenizer files again.",
)
MAX_VALUES = 16_000_000
MAX_ID = 1 << 24
"""Of a token; libraries make lists as long as the largest."""


class TokenizerKind(Enum):
    """What says how text is split."""

    JSON = "tokenizer.json"
    SENTENCEPIECE = "tokenizer.model"
    CODE = "code"
    CLASS = "class"


def load_tokenizer(folder: Path, *, trust_code: bool = False) -> Any:
    """A transformers tokenizer that gives the ids that the files say.

    Args:
        folder: The checkpoint.
        trust_code: Whether code in it may be run, where nothing else says them.

    Raises:
        CalibrationError: There is none; it is damaged; only code can tokenize and may
            not run.
    """
    kind = find_kind(folder)
    if kind is TokenizerKind.CODE and not trust_code:
        raise _untrusted(folder)
    with _loading(folder):
        if kind in (TokenizerKind.JSON, TokenizerKind.SENTENCEPIECE):
            with _copied(folder, _made(folder, kind)) as copy:
                tokenizer = _by_file(copy)
            tokenizer.name_or_path = str(folder)
            if kind is TokenizerKind.SENTENCEPIECE:
                _check_added(tokenizer, folder)
        else:
            tokenizer = _by_class(folder, trust_code=trust_code)
        tokenizer("a")  # some settings are only read then
    if kind is TokenizerKind.CLASS and type(tokenizer).__name__ in GENERIC_NAMES:
        raise CalibrationError(
            f"{folder}: nothing says how its tokenizer splits text: there is no "
            f"{TOKENIZER}, and {SETTINGS} names no class that knows. Copy {TOKENIZER} "
            "there."
        )
    return tokenizer


def _untrusted(folder: Path) -> CalibrationError:
    return CalibrationError(
        f"{folder}: only code in the checkpoint can tokenize ({_code(folder)}); there "
        f"is no {TOKENIZER}. Read the code, then allow it with {TRUST}."
    )


def needs_code(folder: Path, *, trust_code: bool) -> bool:
    """Whether only code in the checkpoint can tokenize; False without a tokenizer.

    Others load such a tokenizer silently as another one, if the code may not run.

    Raises:
        CalibrationError: It may not; or nothing says how text is split.
    """
    named = (*FILES, *VOCABULARIES, "tiktoken.model")
    if not any((folder / name).exists() for name in named):
        return False
    needed = find_kind(folder) is TokenizerKind.CODE
    if needed and not trust_code:
        raise _untrusted(folder)
    return needed


def names_code(folder: Path) -> bool:
    """Whether there is a tokenizer whose settings name code beside it."""
    return (folder / SETTINGS).exists() and _code(folder) is not None


def find_kind(folder: Path) -> TokenizerKind:
    """What says how text is split.

    Raises:
        CalibrationError: There is no tokenizer, or nothing that says it.
    """
    if (folder / TOKENIZER).exists():
        return TokenizerKind.JSON
    model = folder / MODEL
    if model.exists():
        from .sentencepiece_model import is_sentencepiece

        if is_sentencepiece(_read(model)):
            return TokenizerKind.SENTENCEPIECE
    if names_code(folder):
        return TokenizerKind.CODE
    ranks = [model, folder / "tiktoken.model", *sorted(folder.glob("*.tiktoken"))]
    if found := [path for path in ranks if path.exists()]:
        raise CalibrationError(
            f"{found[0]}: holds pieces, but nothing there says how text is split "
            f"before: no {TOKENIZER}, no code. Copy {TOKENIZER} there."
        )
    if not any((folder / name).exists() for name in (*FILES, *VOCABULARIES)):
        raise CalibrationError(
            f"{folder}: has no tokenizer (none of {', '.join(FILES)}), which turning "
            "text into tokens needs. Copy the model's tokenizer there."
        )
    return TokenizerKind.CLASS


def corrections(folder: Path) -> dict[str, bytes]:
    """Files with which everybody loads the tokenizer that ``load_tokenizer`` loads.

    They are ``tokenizer.json`` where there is only SentencePiece, and
    ``tokenizer_config.json`` where it names a class that gives other ids.

    Returns:
        Contents by name; empty where nothing is to be corrected, and where nothing can
        be: no tokenizer, a damaged one, one that only code knows.
    """
    try:
        kind = find_kind(folder)
        settings = _settings(folder)
        if kind not in (TokenizerKind.JSON, TokenizerKind.SENTENCEPIECE):
            return {}
        with _loading(folder):
            named = settings.get("tokenizer_class")
            plain = named in GENERIC_NAMES and _code(folder) is None
            # The generic class takes tokenizer.json as it is: nothing to compare.
            if kind is TokenizerKind.JSON and plain:
                return {}
            files = _made(folder, kind)
            with _copied(folder, files) as copy:
                if _loads_alike(copy):
                    return files
    except CalibrationError:
        return {}
    fixed = {**_settings_of(files, settings), "tokenizer_class": GENERIC}
    # Readers that see it would ask for the code, or run it.
    fixed.pop("auto_map", None)
    return files | {SETTINGS: _dump(fixed)}


@contextmanager
def tokenizer_folder(folder: Path, *, trust_code: bool) -> Iterator[Path]:
    """A folder from which other programs load the right tokenizer: a copy if need be.

    Raises:
        CalibrationError: As ``needs_code``.
    """
    needs_code(folder, trust_code=trust_code)
    files = corrections(folder)
    if not files:
        yield folder
        return
    with _copied(folder, files) as copy:
        yield copy


def _by_file(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)


def _by_class(folder: Path, *, trust_code: bool = False) -> Any:
    """What transformers picks."""
    from transformers import AutoTokenizer

    from .. import configs

    # AutoTokenizer reads config.json through AutoConfig.
    configs.register()
    return AutoTokenizer.from_pretrained(
        folder, local_files_only=True, trust_remote_code=trust_code
    )


def _loads_alike(folder: Path) -> bool:
    """Whether transformers picks a tokenizer that works as the file says."""
    # All that the library knows of one: vocabulary, merges, every step around them.
    ours = _by_file(folder).backend_tokenizer.to_str()
    try:
        theirs = _by_class(folder).backend_tokenizer.to_str()
    except Exception:  # it has many ways to say that it cannot
        return False
    return bool(ours == theirs)


def _loading(folder: Path) -> AbstractContextManager[None]:
    return tokenizer_errors(
        f"{folder}: its tokenizer cannot be loaded",
        "Download the tokenizer files again.",
    )


def _made(folder: Path, kind: TokenizerKind) -> dict[str, bytes]:
    """tokenizer.json of a SentencePiece model, and settings that name its tokens."""
    if kind is TokenizerKind.JSON:
        _check_ids(folder / TOKENIZER)
        return {}
    from .sentencepiece_model import build_tokenizer, special_tokens

    data = _read(folder / MODEL)
    settings = _settings(folder)
    known = settings | _object(folder / BESIDE[0])
    built = build_tokenizer(data, known, folder / MODEL)
    files = {TOKENIZER: built.to_str(pretty=True).encode()}
    named = {
        key: name for key, name in special_tokens(data).items() if key not in known
    }
    if named:
        files[SETTINGS] = _dump(settings | named)
    return files


def _settings_of(
    files: Mapping[str, bytes], settings: dict[str, Any]
) -> dict[str, Any]:
    changed: dict[str, Any] = parse_json(files.get(SETTINGS, b"{}"))
    return settings | changed


@contextmanager
def _copied(folder: Path, files: Mapping[str, bytes]) -> Iterator[Path]:
    """A folder with the tokenizer's files, some of them others."""
    names = {TOKENIZER, SETTINGS, *BESIDE} | {
        f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")
    }
    contents = {
        name: files.get(name) or _read(folder / name)
        for name in sorted(names)
        if name in files or (folder / name).exists()
    }
    config = _object(folder / "config.json")
    # Which class is picked depends on no more of it.
    model_type = {key: config[key] for key in ("model_type",) if key in config}
    contents["config.json"] = json.dumps(model_type).encode()
    with ExitStack() as stack:
        try:
            temporary = tempfile.TemporaryDirectory(prefix="moe-prune-tokenizer-")
            copy = Path(stack.enter_context(temporary))
            for name, data in contents.items():
                path = copy / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
        except OSError as error:
            raise OutputError(
                f"{tempfile.gettempdir()}: a copy of the tokenizer cannot be written: "
                f"{error.strerror or error}. Free space there, or set TMPDIR."
            ) from error
        yield copy


def _check_added(tokenizer: Any, folder: Path) -> None:
    """Refuse tokens that would get other ids than the settings say: they leave gaps."""
    given = _settings(folder).get("added_tokens_decoder")
    for place, token in given.items() if isinstance(given, dict) else ():
        name = token.get("content") if isinstance(token, dict) else token
        found = tokenizer.convert_tokens_to_ids(str(name))
        if str(found) != place:
            raise CalibrationError(
                f"{folder / SETTINGS}: gives {str(name)[:40]!r} the id {place[:20]}, "
                f"but it would get {found}. Save the tokenizer as {TOKENIZER}."
            )


def _check_ids(path: Path) -> None:
    """Refuse ids of which a library would make lists as long as memory."""
    content = _object(path)
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    ids = dict(vocabulary) if isinstance(vocabulary, dict) else {}
    for token in content.get("added_tokens") or ():
        if isinstance(token, dict):
            ids[str(token.get("content"))] = token.get("id")
    for name, number in ids.items():
        if not isinstance(number, int) or not 0 <= number < MAX_ID:
            raise CalibrationError(
                f"{path}: token {name[:40]!r} has id {str(number)[:20]}, which is none "
                f"(0 to {MAX_ID - 1}). Download the tokenizer files again."
            )


def _code(folder: Path) -> str | None:
    """The class of the checkpoint's own code that tokenizes, if one is named."""
    named = _settings(folder).get("auto_map")
    if isinstance(named, dict):
        named = named.get("AutoTokenizer")
    names = named if isinstance(named, list | tuple) else [named]
    return next((name for name in names if isinstance(name, str)), None)


def _settings(folder: Path) -> dict[str, Any]:
    return _object(folder / SETTINGS)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file."""
    if not path.exists():
        return {}
    try:
        return read_json(path, FILE, MAX_VALUES)
    except CalibrationError as error:
        raise CalibrationError(
            f"{path.parent}: its tokenizer cannot be loaded: {error}"
        ) from error


def _read(path: Path) -> bytes:
    return read_file(path, FILE)


def _dump(settings: Mapping[str, Any]) -> bytes:
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()
