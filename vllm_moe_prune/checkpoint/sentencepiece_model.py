"""A SentencePiece model (``tokenizer.model``) as a tokenizer of the tokenizers library.

transformers builds one too, but without the space that SentencePiece puts in front of a
text, and with merges in another order. This one is compared with SentencePiece itself.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CalibrationError

SPACE = "▁"
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
UNIGRAM, BPE, CHAR = 1, 2, 4
# What both must agree on; the model's whole vocabulary is added.
PROBES = (
    "CamelCase HTTPServer getElementById",
    "  two spaces in front,  two within, two behind  ",
    "一行中文\uff0c没有空格。 日本語 한국어",
    "def f(x):\n\n    return {x: [1, 2.5]}\t# tab\r\n",
    "Ünïcödé ﬁ \uff21 ½ e\u0301 😀🏽 \u200d \u00a0 ▁ don't 1234567",
    "",
    " ",
)


def is_sentencepiece(data: bytes) -> bool:
    """Whether a file holds a SentencePiece model; others use its name too."""
    from google.protobuf.message import DecodeError

    try:
        model = _parsed(data)
    except DecodeError:
        return False
    return len(model.pieces) > 0


def _parsed(data: bytes) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2.ModelProto.FromString(data)


def special_tokens(data: bytes) -> dict[str, str]:
    """The names of the special tokens in a SentencePiece model."""
    spec = _parsed(data).trainer_spec
    named = {
        "bos_token": (spec.bos_id, spec.bos_piece),
        "eos_token": (spec.eos_id, spec.eos_piece),
        "unk_token": (spec.unk_id, spec.unk_piece),
    }
    return {name: piece for name, (at, piece) in named.items() if at >= 0}


def build_tokenizer(data: bytes, settings: Mapping[str, Any], path: Path) -> Any:
    """A ``tokenizers.Tokenizer`` that gives the ids SentencePiece gives.

    Args:
        data: The SentencePiece model.
        settings: tokenizer_config.json: which special tokens are put around a text, and
            which pieces have other names (``added_tokens_decoder``).
        path: Where the model is, for errors.

    Raises:
        CalibrationError: It cannot be built to give the same ids.
    """
    from tokenizers import AddedToken, Tokenizer

    model = _parsed(data)
    _rename(model, settings)
    tokenizer = Tokenizer(_algorithm(model, path))
    _assemble(tokenizer, model)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=True)
            for piece in model.pieces
            if piece.type == CONTROL
        ]
    )
    _check(tokenizer, model, path)
    if around := _surrounded(tokenizer, settings, special_tokens(data)):
        tokenizer.post_processor = around
    return tokenizer


def _rename(model: Any, settings: Mapping[str, Any]) -> None:
    """Give pieces the names that tokenizer_config.json has for them."""
    known = {piece.piece for piece in model.pieces}
    given = settings.get("added_tokens_decoder")
    for index, token in given.items() if isinstance(given, dict) else ():
        name = token.get("content") if isinstance(token, dict) else token
        # No vocabulary has 100 million pieces.
        place = int(index) if str(index).isdecimal() and len(str(index)) < 9 else -1
        if not isinstance(name, str) or name in known:
            continue
        if 0 <= place < len(model.pieces):
            model.pieces[place].piece = name
            # SentencePiece never finds a control piece in a text.
            model.pieces[place].type = CONTROL


def _algorithm(model: Any, path: Path) -> Any:
    from tokenizers import models

    spec = model.trainer_spec
    if spec.model_type == UNIGRAM:
        return models.Unigram(
            [(piece.piece, piece.score) for piece in model.pieces],
            unk_id=spec.unk_id,
            byte_fallback=spec.byte_fallback,
        )
    if spec.model_type not in (BPE, CHAR):
        raise CalibrationError(
            f"{path}: a SentencePiece model of type {spec.model_type}; only unigram, "
            "BPE and characters are read. Save the tokenizer as tokenizer.json."
        )
    return models.BPE(
        {piece.piece: place for place, piece in enumerate(model.pieces)},
        _merges(model),
        unk_token=model.pieces[spec.unk_id].piece,
        fuse_unk=True,
        byte_fallback=spec.byte_fallback,
        # A symbol of the user is one piece, though no merges lead to it.
        ignore_merges=any(piece.type == USER_DEFINED for piece in model.pieces),
    )


def _merges(model: Any) -> list[tuple[str, str]]:
    """Every way to make a piece of two, in the order in which SentencePiece prefers."""
    places = {
        piece.piece: (-piece.score, place)
        for place, piece in enumerate(model.pieces)
        # Control, unknown and byte pieces take no part in merges.
        if piece.type in (NORMAL, USER_DEFINED, UNUSED)
    }
    found = []
    for whole, rank in places.items():
        for cut in range(1, len(whole)):
            left, right = whole[:cut], whole[cut:]
            if left in places and right in places:
                found.append((rank, places[left][1], places[right][1], left, right))
    # The higher score first, then the lower id of the piece, then of its halves.
    return [(left, right) for *_, left, right in sorted(found)]


def _assemble(tokenizer: Any, model: Any) -> None:
    """What SentencePiece does to a text before it looks for pieces, and after."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    spec = model.normalizer_spec
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # \A, as ^ of the Oniguruma library also matches behind each newline.
        steps.append(normalizers.Replace(Regex(r"\A +"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    suffix = model.trainer_spec.treat_whitespace_as_suffix
    after: list[Any] = [decoders.Replace(SPACE, " "), decoders.ByteFallback()]
    after.append(decoders.Fuse())
    if spec.add_dummy_prefix and suffix:
        # Behind any text but an empty one; (?m) lets "." match a newline here.
        steps.append(normalizers.Replace(Regex(r"(?m)(?<=.)\z"), SPACE))
        after.append(decoders.Strip(" ", 0, 1))
    elif spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
        after.append(decoders.Strip(" ", 1, 0))
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    own = [piece.piece for piece in model.pieces if piece.type == USER_DEFINED]
    if own:
        # The longest first, as SentencePiece takes them.
        either = "|".join(_quoted(name) for name in sorted(own, key=len, reverse=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(either), "isolated")
    tokenizer.decoder = decoders.Sequence(after)


def _quoted(name: str) -> str:
    """A pattern that matches a name and nothing else."""
    # By code point, so that no character means something else in a pattern.
    return "".join(f"\\x{{{ord(sign):X}}}" for sign in name)


def _surrounded(
    tokenizer: Any, settings: Mapping[str, Any], named: Mapping[str, str]
) -> Any:
    """Puts special tokens around a text; a Llama tokenizer puts one in front."""
    from tokenizers import processors

    used = {}
    for side, asked in (("bos", True), ("eos", False)):
        name = settings.get(f"{side}_token", named.get(f"{side}_token"))
        name = name.get("content") if isinstance(name, dict) else name
        place = tokenizer.token_to_id(name) if isinstance(name, str) else None
        if place is not None and settings.get(f"add_{side}_token", asked):
            used[side] = (name, place)
    if not used:
        return None
    single, pair = ["$A:0"], ["$B:1"]
    if "bos" in used:
        single.insert(0, f"{used['bos'][0]}:0")
        pair.insert(0, f"{used['bos'][0]}:1")
    if "eos" in used:
        single.append(f"{used['eos'][0]}:0")
        pair.append(f"{used['eos'][0]}:1")
    return processors.TemplateProcessing(
        single=single, pair=single + pair, special_tokens=list(used.values())
    )


def _check(tokenizer: Any, model: Any, path: Path) -> None:
    """Compare with SentencePiece itself, on every piece and on texts of all kinds."""
    from sentencepiece import SentencePieceProcessor

    original = SentencePieceProcessor()
    # Not the file's bytes: pieces may have been renamed.
    original.LoadFromSerializedProto(model.SerializeToString())
    every = "".join(piece.piece for piece in model.pieces if piece.type == NORMAL)
    for text in (*PROBES, every.replace(SPACE, " ")):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        expected = original.EncodeAsIds(text)
        if found != expected:
            raise CalibrationError(
                f"{path}: its SentencePiece model cannot be read exactly: of "
                f"{text[:40]!r} it makes {expected[:8]}, this tool {found[:8]}. Save "
                "the tokenizer as tokenizer.json, with the tool it comes from."
            )
