"""How an answer is read out of what servers and small models really send.

A call or a proposal that is in an answer is taken, however it is written: as arguments that are
an object or JSON in JSON, in Markdown fences, between words, after thinking, or as text where a
call of a tool should be. Of two submissions the first counts. What is not there is not made up:
`fault` says why an answer holds nothing.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage

from agents.answer import LONGEST_CODE, LONGEST_TEXT, MOST_CALLS, REASONING, SUBMIT, Answer, Ending
from tools.syntax import parse

SUBMITTING = (SUBMIT, "propose")
"""tools of which one call in an answer counts: that of a search, and the refiner's"""
NO_THOUGHT = "The model gave no reason."
REFUSAL = "refusal"
"""Under this name a server gives the words of a model that refuses."""
NOTES = "notes"
"""Under this name a message has in its metadata what the user is to know of how it was asked for."""
_ENDINGS: dict[str, Ending] = {
    **dict.fromkeys(("length", "max_tokens", "max_output_tokens", "model_length"), "cut"),
    **dict.fromkeys(("content_filter", "safety", "recitation", "sensitive", "blocklist"), "filtered"),
    "refusal": "refused",
}
_BROKEN = ("error", "abort", "network_error", "insufficient_system_resource")
_FAULTS: dict[Ending, str] = {
    "cut": "the answer was cut off at the most tokens that it may have: reason less, or raise answer_tokens "
    "(of a local server, its own limit).",
    "filtered": "the server's content filter withheld the answer: if it often does, take another model.",
}
_MOST_TOKENS = 2**31
_UNREADABLE = "no object: "
"""begins arguments that LangChain is not to read: it would take any JSON"""
_TRIES = 8  # braces at which JSON may begin
_THINKING = re.compile(r"(</?think(?:ing)?>|\[/?THINK\])")
_OPENINGS, _CLOSINGS = ("<think>", "<thinking>", "[THINK]"), ("</think>", "</thinking>", "[/THINK]")
_JSON = re.compile(r"\s*(?:(?:```|~~~)\w*\s*)?(?=\{)")
_FENCE = re.compile(r"(```|~~~)[^\n`]{0,99}\n(.*?)(\1|\Z)", re.S)
_TAGGED = re.compile(
    r"(?:<(?:tool_call|function_call)>|\[TOOL_CALLS\]|<\|python_tag\|>)(.*?)"
    r"(?:</(?:tool_call|function_call)>|(?=<tool_call>)|\Z)",
    re.S,
)
_NAMED = re.compile(r'<(?:function=|invoke name=)"?([\w.:-]+)"?>(.*?)(</(?:function|invoke)>|\Z)', re.S)
_PARAMETER = re.compile(r'<parameter(?:=| name=)"?(\w+)"?>\n?(.*?)\n?(?:</parameter>|\Z)', re.S)
_WRAPPING = re.compile(r"</?(?:tool_call|function_call)>|(```|~~~)\w*\s*\1")
_DEFINES = re.compile(r"^[ \t]*def sensitivity\(", re.M)
_Written = Iterator[tuple[int, int, str, dict[str, Any]]]
"""calls: where each begins and ends, the tool's name, and the arguments"""


class Garbled(Exception):
    """What a server sent is no answer."""


def read(message: AIMessage, tools: Collection[str] = ()) -> Answer:
    """The record of `message`, the answer of a model that could call `tools`; raises `Garbled`."""
    facts = message.response_metadata
    reason = str(facts.get("finish_reason") or (facts.get("incomplete_details") or {}).get("reason") or "").lower()
    ending = _ENDINGS.get(reason, "")
    said, calls = [without_thinking(str(message.text))], []
    for name, given, identity in _given(message):
        args = arguments(given)
        if args is None:
            said.append(str(given))
        else:
            calls.append({"name": name, "args": args, "id": identity})
    text = "\n".join(filter(None, said))[: LONGEST_TEXT + 1]  # which shows that it is cut
    if not calls:
        text, calls = written(text, tools, whole=ending != "cut")
    if reason in _BROKEN and not calls:
        raise Garbled(f"the server broke the answer off ({reason})")
    kept = [_tidy(call, tools, text) for call in _kept(calls, tools)]
    identities = [call["id"] for call in kept]
    for place, call in enumerate(kept):
        if not call["id"] or call["id"] in identities[:place]:
            call["id"] = f"call-{place}"
    if len(kept) < len(calls):
        text = f"{text}\n({len(calls) - len(kept)} more calls were left out.)".strip()
    if refusal := "" if text or calls else _refusal(message):
        text, ending = refusal, "refused"
    usage = message.usage_metadata
    counted = usage and 0 < usage["input_tokens"] < _MOST_TOKENS and 0 <= usage["output_tokens"] < _MOST_TOKENS
    return Answer.model_validate(
        {
            "content": text,
            "tool_calls": kept,
            "reasoning": str(message.additional_kwargs.get(REASONING) or ""),
            "tokens": (usage["input_tokens"], usage["output_tokens"]) if usage and counted else None,
            "ending": ending,
        }
    )


def fault(messages: Sequence[BaseMessage]) -> str:
    """Why the last answer of a conversation holds nothing, in a sentence; nothing where it does."""
    answers = [message for message in messages if isinstance(message, AIMessage)]
    if not answers or answers[-1].tool_calls:
        return ""
    ending, text = answers[-1].response_metadata.get("ending", ""), str(answers[-1].text).strip()
    if ending == "refused":
        return f"the model refused: {text or 'it does not say why.'}"
    return _FAULTS.get(ending) or ("" if text else "the model's answer was empty.")


def notes(messages: Sequence[BaseMessage]) -> list[str]:
    """What the user is to know of how `messages` were asked for."""
    return [note for message in messages for note in message.response_metadata.get(NOTES, ())]


def regular(message: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """A message of a chat completion, or where it is not `whole` a piece of one, as LangChain can read it."""
    calls = list(message.get("tool_calls") or ())
    if message.get("function_call"):  # of the days of one call an answer
        calls.append({"function": message["function_call"]})
    found = []
    for place, call in enumerate(calls):
        function = call.get("function") or call
        given = function.get("arguments")
        if whole:
            args = arguments(given)
            given = f"{_UNREADABLE}{given}" if args is None else args
        text = given if isinstance(given, str) else "" if given is None else json.dumps(given)
        index = place if call.get("index") is None else call["index"]
        named = {"name": function.get("name"), "arguments": text}
        found.append({"id": call.get("id"), "index": index, "type": "function", "function": named})
    return {**message, "role": "assistant", "tool_calls": found or None, "function_call": None}


def without_thinking(text: str) -> str:
    """`text` without what stands in tags of thinking, or before the end of thinking that the prompt began."""
    parts = _THINKING.split(text)
    if len(parts) == 1:
        return text
    kept: list[str] = []
    inside = False
    for place, part in enumerate(parts):
        if place % 2 == 0:
            kept += [] if inside else [part]
        else:
            kept = [] if "/" in part and not inside else kept
            inside = "/" not in part
    return "".join(kept).lstrip()


def spoken(head: str) -> str | None:
    """What may be shown of an answer that begins with `head`; None while that is thinking, or may become it."""
    begins = head.lstrip()
    if not begins.startswith(_OPENINGS):
        return None if any(opening.startswith(begins) for opening in _OPENINGS) else head
    return without_thinking(head) if any(closing in head for closing in _CLOSINGS) else None


def arguments(given: object) -> dict[str, Any] | None:
    """The arguments of a call: an object, JSON, or JSON in JSON; None where they are no object."""
    given = {} if given is None else given
    if isinstance(given, str) and given.strip().startswith('"'):
        given = _decoded(given.strip(), 0)[0]
    if isinstance(given, str):
        begins = _JSON.match(given)
        given = _decoded(given, begins.end())[0] if begins else None if given.strip() else {}
    try:
        json.dumps(given)  # JSON may be nested deeper than it can be written again
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def code(given: object) -> str:
    """The code in what was given as such, out of its fence, words, thinking, and escapes that stand for line ends."""
    text = ("\n".join(map(str, given)) if isinstance(given, list) else str(given))[:LONGEST_TEXT]
    if _parses(text):
        return text
    text = without_thinking(text)
    if "\n" not in text.strip():
        for escape, letter in (("\\n", "\n"), ("\\t", "\t"), ('\\"', '"'), ("\\'", "'")):
            text = text.replace(escape, letter)
    blocks = [textwrap.dedent(found[2]) for found in _FENCE.finditer(text)]
    return next(filter(_DEFINES.search, blocks), blocks[0] if blocks else text)


def written(text: str, tools: Collection[str], *, whole: bool = True) -> tuple[str, list[dict[str, Any]]]:
    """What `text` says, and the calls of `tools` that stand in it.

    Code alone is a submission in a search, where there is nobody to read it. Of a text that is
    not `whole` what has no end is no call.
    """
    for kind in (_by_tags, _tagged, _bare):
        found = [each for each in kind(text, whole) if _tool(each[2], tools)]
        if found:
            calls = [{"name": name, "args": args} for _, _, name, args in found]
            return _besides(text, [(begin, end) for begin, end, _, _ in found]), calls
    if SUBMIT not in tools:
        return text, []
    for block in _FENCE.finditer(text):
        if _DEFINES.search(block[2]) and (whole or block[3]):
            return _besides(text, [block.span()]), [{"name": SUBMIT, "args": {"code": block[2]}}]
    if whole and _DEFINES.search(text) and _parses(text):
        return "", [{"name": SUBMIT, "args": {"code": text}}]
    return text, []


def _by_tags(text: str, whole: bool) -> _Written:
    """<function=NAME> or <invoke name="NAME">, with a tag a parameter or with JSON."""
    for found in _NAMED.finditer(text):
        if whole or found[3]:
            values: dict[str, Any] = {each[1]: each[2] for each in _PARAMETER.finditer(found[2])}
            yield found.start(), found.end(), found[1], values or arguments(found[2]) or {}


def _tagged(text: str, whole: bool) -> _Written:
    """JSON between tags, as in <tool_call>."""
    for found in _TAGGED.finditer(text):
        yield from ((found.start(), found.end(), name, args) for _, _, name, args in _bare(found[1], whole))


def _bare(text: str, whole: bool) -> _Written:
    """JSON, whatever is around it: a call with its name, or what a submission holds."""
    end = failures = 0
    while (begin := text.find("{", end)) >= 0 and failures < _TRIES:
        value, end = _decoded(text, begin)
        failures += value is None
        call = value.get("function") if isinstance(value, dict) else None
        call = call if isinstance(call, dict) else value if isinstance(value, dict) else {}
        name = next((call[word] for word in ("name", "function", "tool") if isinstance(call.get(word), str)), None)
        given = next((call[word] for word in ("arguments", "parameters", "args") if word in call), None)
        if name is not None and (args := arguments(given or {})) is not None:
            yield begin, end, name, args
        elif isinstance(call.get("code"), str) and arguments(call) is not None:
            yield begin, end, SUBMIT, call


def _decoded(text: str, begin: int) -> tuple[Any, int]:
    """The JSON that begins there, and where it ends; None and the next place where there is none."""
    try:
        return json.JSONDecoder(strict=False).raw_decode(text, begin)
    except (ValueError, RecursionError):
        return None, begin + 1


def _besides(text: str, spans: Sequence[tuple[int, int]]) -> str:
    """`text` without what stands there, and without the tags and fences that are empty then."""
    ends = [0, *(end for _, end in spans)]
    begins = [*(begin for begin, _ in spans), len(text)]
    rest = "".join(text[end:begin] for end, begin in zip(ends, begins, strict=True))
    return _WRAPPING.sub("", rest).strip()


def _given(message: AIMessage) -> list[tuple[str, object, str | None]]:
    """The calls as the server gave them: name, arguments and id; LangChain makes whole what was cut off in pieces."""
    if isinstance(message, AIMessageChunk):
        return [(call["name"] or "", call["args"], call["id"]) for call in message.tool_call_chunks]
    readable = [(call["name"], call["args"], call["id"]) for call in message.tool_calls]
    return readable + [
        (call["name"] or "", str(call["args"]).removeprefix(_UNREADABLE), call["id"])
        for call in message.invalid_tool_calls
    ]


def _refusal(message: AIMessage) -> str:
    """The words of a model that refuses."""
    blocks = message.content if isinstance(message.content, list) else []
    found = [block.get(REFUSAL) for block in blocks if isinstance(block, dict)]
    return str(message.additional_kwargs.get(REFUSAL) or next(filter(None, found), ""))


def _tool(name: str, tools: Collection[str]) -> str | None:
    """The tool that is meant: models change the case, and put a namespace before and a number after the name."""
    plain = name.rpartition(".")[2].partition(":")[0].casefold()
    return next((tool for tool in tools if tool.casefold() == plain), None)


def _kept(calls: Sequence[dict[str, Any]], tools: Collection[str]) -> list[dict[str, Any]]:
    """The calls that count: as many as an answer may have, and of submissions the first, wherever it stands."""
    submits = [_tool(call["name"], tools) in SUBMITTING for call in calls]
    first = submits.index(True) if True in submits else -1
    kept = [call for place, call in enumerate(calls) if place == first or not submits[place]]
    return kept[:MOST_CALLS] if first < MOST_CALLS else [*kept[: MOST_CALLS - 1], calls[first]]


def _tidy(call: dict[str, Any], tools: Collection[str], said: str) -> dict[str, Any]:
    """A call of a tool by its own name, with the code of its code, and of a submission the thought."""
    name, args = _tool(call["name"], tools) or str(call["name"]), dict(call["args"])
    if name in SUBMITTING:
        thought = args.get("thought") or ""
        thought = "\n".join(map(str, thought)) if isinstance(thought, list) else str(thought)
        blocks = [found[2] for text in (thought, said) for found in _FENCE.finditer(text) if _DEFINES.search(found[2])]
        args = dict(zip(["code"], blocks, strict=False)) | args
        args["thought"] = without_thinking(thought).strip() or said.strip() or NO_THOUGHT
    if "code" in args:
        args["code"] = code(args["code"])
    return {"name": name, "args": args, "id": str(call.get("id") or "")}


def _parses(text: str) -> bool:
    try:
        return len(text) <= LONGEST_CODE and bool(parse(text))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
