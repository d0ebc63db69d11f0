"""One record of a data set as text: the forms in which people publish it.

A record is a text, an object with a field ``text``, a conversation, or a question with
its answer. A conversation is rendered by the checkpoint's chat template.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ..errors import CalibrationError

TEXT = "text"
CONVERSATIONS = ("messages", "conversations", "conversation")
SYSTEM = ("system", "system_prompt")
# The first that is there counts: Alpaca has `input` beside `instruction`, as context.
QUESTIONS = ("instruction", "prompt", "question", "input")
CONTEXTS = ("input", "context")
ANSWERS = ("output", "response", "completion", "answer", "chosen")
TOOLS = "tools"
READ_FIELDS = frozenset(
    {TEXT, *CONVERSATIONS, *SYSTEM, *QUESTIONS, *CONTEXTS, *ANSWERS, TOOLS}
)
ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "function", "observation", "function_response"), "tool"),
}
"""What data sets call speakers, and what chat templates do."""
FORMS = (
    "neither 'text' nor 'messages' (or 'conversations'), nor 'instruction' (or "
    "'prompt', 'question') with 'output' (or 'response', 'completion', 'answer')"
)
PROMPTS = (
    "A prompt is a line of text, or an object with 'prompt', 'messages', or 'text' to "
    "be continued."
)
MAX_NAMED = 12


class Document(NamedTuple):
    """A piece of text."""

    text: str
    ends: bool
    """Whether unrelated text follows, so that an end-of-text token fits between."""


def as_prompt(record: Any, where: str, tokenizer: Any) -> Document:
    """What a model is to answer: a record without its answer, as the model is used.

    Args:
        record: ``text`` (continued as it is), a question, or a conversation, of which a
            last turn of the assistant is left out.
        where: How errors name it.
        tokenizer: Renders questions and conversations with its chat template; without
            one a question is continued like a text.

    Returns:
        ``ends``: whether special tokens, such as BOS, are to be added to it.

    Raises:
        CalibrationError: Its form is none of those known; the fields found are named.
    """
    fields = {"prompt": record} if isinstance(record, str) else record
    if not isinstance(fields, dict):
        raise CalibrationError(f"{where}: is {kind_of(record)}. {PROMPTS}")
    if isinstance(fields.get(TEXT), str):
        return Document(fields[TEXT], ends=True)
    messages = _first(fields, CONVERSATIONS)
    question = _first(fields, QUESTIONS)
    if messages is None and isinstance(question, str):
        messages = _question(fields, question, where)
        if not getattr(tokenizer, "chat_template", None):
            return Document(_plain(messages), ends=True)
    elif messages is None:
        messages = question
    if messages is None:
        raise CalibrationError(
            f"{where}: has only {', '.join(map(str, fields)) or 'nothing'}. {PROMPTS}"
        )
    _need_template(where, tokenizer)
    conversation = _messages(messages, where)
    if conversation and conversation[-1]["role"] == "assistant":
        conversation.pop()
    rendered = _render(conversation, fields, where, tokenizer, to_answer=True)
    return Document(rendered, ends=False)


def as_document(record: Any, where: str, tokenizer: Any) -> Document:
    """The text of a record.

    Args:
        record: As a JSON or Parquet file has it.
        where: How errors name it.
        tokenizer: Renders conversations with its chat template.

    Raises:
        CalibrationError: Its form is none of those known; the fields found are named.
    """
    if isinstance(record, str):
        return Document(record, ends=True)
    if not isinstance(record, dict):
        raise CalibrationError(
            f"{where}: has {FORMS}, but is {kind_of(record)}, not an object."
        )
    text = record.get(TEXT)
    if isinstance(text, str):
        return Document(text, ends=True)
    conversation = _first(record, CONVERSATIONS)
    if conversation is not None:
        _need_template(where, tokenizer)
        messages = _messages(conversation, where)
        return Document(_render(messages, record, where, tokenizer), ends=False)
    question, answer = _first(record, QUESTIONS), _first(record, ANSWERS)
    # A `text` that is no string is reported below, not passed over.
    if text is None and question is not None and answer is not None:
        return _answered(record, question, answer, where, tokenizer)
    kinds = {str(name): kind_of(value) for name, value in record.items()}
    raise CalibrationError(found_in(where, record, kinds))


def found_in(where: str, fields: Iterable[Any], kinds: Mapping[str, str]) -> str:
    """What to say of a record without text: which fields it has, and of what kind."""
    named = [str(name) for name in fields]
    told = [f"{name[:40]!r} ({kinds[name]})" for name in named[:MAX_NAMED]]
    if len(named) > MAX_NAMED:
        told.append(f"{len(named) - MAX_NAMED} more")
    return f"{where}: has {FORMS}, but {', '.join(told) or 'no field at all'}."


def kind_of(value: Any) -> str:
    """What a value is, in JSON's words."""
    if value is None:
        return "null"
    # By type(), not isinstance: bool is an int in Python.
    kinds = {bool: "a truth value", str: "text", list: "a list", dict: "an object"}
    return kinds.get(type(value), "a number")


def _first(record: dict[str, Any], names: Iterable[str]) -> Any:
    """The first of some fields that is there and not null."""
    found = (record[name] for name in names if record.get(name) is not None)
    return next(found, None)


def _answered(
    record: dict[str, Any], question: Any, answer: Any, where: str, tokenizer: Any
) -> Document:
    """A question with its answer, as a conversation where the tokenizer knows those."""
    if isinstance(question, list) or isinstance(answer, list):
        _need_template(where, tokenizer)
        # Messages, or of preferences the whole conversation that was preferred.
        asked = _messages(question, where) if isinstance(question, list) else []
        given = _messages(answer, where) if isinstance(answer, list) else None
        if given is None:
            given = [{"role": "assistant", "content": _text(answer, "answer", where)}]
        if given[: len(asked)] == asked:
            asked = []
        if isinstance(question, str) and given[:1] and given[0]["role"] == "assistant":
            asked = [{"role": "user", "content": question}]
        return Document(_render(asked + given, record, where, tokenizer), ends=False)
    messages = _question(record, question, where)
    said = _text(answer, "answer", where)
    messages.append({"role": "assistant", "content": said})
    if getattr(tokenizer, "chat_template", None) is None:
        return Document(_plain(messages), ends=True)
    return Document(_render(messages, record, where, tokenizer), ends=False)


def _question(
    record: dict[str, Any], question: Any, where: str
) -> list[dict[str, Any]]:
    """A question with its context, behind its system prompt if it has one."""
    parts = [_text(question, "question", where)]
    context = _first(record, CONTEXTS)
    # `input` may be either; what is the question already is not its context too.
    if context not in (None, "") and context is not question:
        parts.append(_text(context, "context", where))
    messages = [{"role": "user", "content": "\n\n".join(parts)}]
    if system := _first(record, SYSTEM):
        content = _text(system, "system", where)
        messages.insert(0, {"role": "system", "content": content})
    return messages


def _plain(messages: list[dict[str, Any]]) -> str:
    """Messages as text, for tokenizers without a chat template."""
    return "\n\n".join(message["content"] for message in messages)


def _need_template(where: str, tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise CalibrationError(
            f"{where}: holds messages, but the checkpoint's tokenizer has no chat "
            "template. Pass records with 'text', or another file."
        )


def _messages(conversation: Any, where: str) -> list[dict[str, Any]]:
    """A conversation as chat templates take it: ``role`` and ``content``, a text."""
    if not isinstance(conversation, list):
        raise CalibrationError(
            f"{where}: the conversation is {kind_of(conversation)}, not a list of "
            "messages."
        )
    return [
        _message(message, f"{where}: message {number}")
        for number, message in enumerate(conversation)
    ]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise CalibrationError(f"{where}: is {kind_of(message)}, not an object.")
    names = ("role", "content") if "role" in message else ("from", "value")
    speaker, said = (message.get(name) for name in names)
    if not isinstance(speaker, str):
        kinds = {str(name): kind_of(value) for name, value in message.items()}
        told = ", ".join(f"{name[:40]!r} ({kind})" for name, kind in kinds.items())
        raise CalibrationError(
            f"{where}: has neither 'role' and 'content' nor 'from' and 'value', but "
            f"{told[:300] or 'nothing'}."
        )
    others = {key: value for key, value in message.items() if key not in names}
    content = _said(said, where)
    missing = names[1] not in message
    # A template may know messages that lack content, and names unknown here.
    allowed = names[0] == "role" and (missing or others.get("tool_calls"))
    if content is None and not allowed:
        raise CalibrationError(f"{where}: has no {names[1]!r}.")
    if names[0] == "role":
        whole = {} if missing else {"content": content}
        return {"role": ROLES.get(speaker, speaker), **whole, **others}
    if speaker.lower() not in ROLES:
        raise CalibrationError(
            f"{where}: is from {speaker[:40]!r}, who is none of {', '.join(ROLES)}."
        )
    return {"role": ROLES[speaker.lower()], "content": content}


def _said(content: Any, where: str) -> str | None:
    """The text of a message's content, which may come in parts."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise CalibrationError(f"{where}: its content is {kind_of(content)}, not text.")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, dict) else part
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind not in ("text", "input_text", "output_text") or not isinstance(
            text, str
        ):
            found = f"of type {str(kind)[:40]!r}" if kind != "text" else kind_of(part)
            raise CalibrationError(
                f"{where}: a part of its content is {found}; only text is read."
            )
        texts.append(text)
    return "".join(texts)


def _text(value: Any, what: str, where: str) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: its {what} is {kind_of(value)}, not text.")
    return value


def _render(
    messages: list[dict[str, Any]],
    record: dict[str, Any],
    where: str,
    tokenizer: Any,
    *,
    to_answer: bool = False,
) -> str:
    tools = record.get(TOOLS) or None
    if tools is not None and not isinstance(tools, list):
        raise CalibrationError(f"{where}: its tools are {kind_of(tools)}, not a list.")
    try:
        rendered = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=to_answer
        )
    except Exception as error:  # a template can raise anything
        reason = " ".join(str(error).split())[:300]
        raise CalibrationError(
            f"{where}: the chat template refuses the messages: {reason}."
        ) from error
    return str(rendered)
