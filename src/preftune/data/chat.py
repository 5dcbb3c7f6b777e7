"""Conversations to text, and which of it an assistant wrote. Templates are run by the tokenizer, in Jinja's sandbox.

The prompt is rendered as at inference, with the generation prompt. A completion is what the template writes behind it
(``prefix`` form). Thinking templates break that: some put an empty reasoning block before the answer, some end the
generation prompt inside a block, some take reasoning out of answers. Then the answer as it stands in the data is put
behind the generation prompt, with the turn's end as the template writes it behind a sentinel (``appended`` form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, TypeAlias

from jinja2 import TemplateError

from preftune.core.errors import BadRow
from preftune.core.ports import ChatTokenizer
from preftune.core.records import Message, Messages

Tools: TypeAlias = Sequence[Mapping[str, Any]]

CHATML: Final = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)

PLAIN: Final = (
    "{%- if bos_token -%}{{- bos_token -}}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{- '\\n' -}}{%- endif -%}"
    "{{- message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '\\n' -}}{%- endif -%}"
)

BUILTIN_TEMPLATES: Final[Mapping[str, str]] = {"chatml": CHATML, "plain": PLAIN}
"""Templates for models that have none.

``chatml``: roles in ``<|im_start|>`` frames. ``plain``: contents joined by newlines, the end token after each assistant
turn; it works with any tokenizer that has an end token.
"""

SENTINEL: Final = "preftune-sentinel-answer"
OPENINGS: Final = ("<think>\n", "<think>")


@dataclass(frozen=True, slots=True)
class AssistantTurn:
    """Where an assistant turn lies in a completion's text (characters): its first, and the end of its content.

    ``limit`` is where the next assistant turn starts, or the end of the text: the turn's end is written between.
    """

    start: int
    content_end: int
    limit: int


@dataclass(frozen=True, slots=True)
class RenderedCompletion:
    """The text behind the generation prompt, with the assistant turns in it and the form in which it was made."""

    text: str
    turns: tuple[AssistantTurn, ...]
    form: Literal["prefix", "appended"]


def render(tokenizer: ChatTokenizer, messages: Messages, tools: Tools, *, add_generation_prompt: bool) -> str:
    """The template's text; whatever the template refuses becomes ``BadRow("template_error")`` with its message."""
    try:
        return tokenizer.render(messages, add_generation_prompt=add_generation_prompt, tools=tools)
    except BadRow as bad:
        raise BadRow("template_error", bad.detail, field=bad.field) from None
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        raise BadRow("template_error", f"the chat template refuses the row: {message}") from None


def render_prompt(tokenizer: ChatTokenizer, prompt: Messages, tools: Tools = ()) -> str:
    """The text that a model is given at inference."""
    return render(tokenizer, prompt, tools, add_generation_prompt=True)


def render_completion(
    tokenizer: ChatTokenizer, prompt_text: str, prompt: Messages, completion: Messages, tools: Tools = ()
) -> RenderedCompletion:
    """The text of a completion behind ``prompt_text``, which is the prompt's as ``render_prompt`` gives it.

    Raises
        BadRow: ``template_error`` where the template refuses the turns or leaves an answer out.
    """
    whole = render(tokenizer, (*prompt, *completion), tools, add_generation_prompt=False)
    places = [place for place, message in enumerate(completion) if message.role == "assistant"]
    spans: list[tuple[int, int]] = []
    for place in places:
        before = (
            prompt_text if place == 0 else render(tokenizer, (*prompt, *completion[:place]), tools, add_generation_prompt=True)
        )
        content = completion[place].content.strip()
        if not whole.startswith(before):
            break
        at = len(before)
        # A template may trim the content or part it from the header by a blank; anything else is not the answer.
        leading = len(whole[at:]) - len(whole[at:].lstrip())
        if not whole.startswith(content, at + leading):
            break
        spans.append((at, at + leading + len(content) if content else at))
    else:
        return _prefix_form(whole, prompt_text, spans)
    return _appended_form(tokenizer, prompt_text, prompt, completion, tools)


def _prefix_form(whole: str, prompt_text: str, spans: list[tuple[int, int]]) -> RenderedCompletion:
    offset = len(prompt_text)
    limits = [start for start, _ in spans[1:]] + [len(whole)]
    turns = tuple(
        AssistantTurn(start - offset, end - offset, limit - offset) for (start, end), limit in zip(spans, limits, strict=True)
    )
    return RenderedCompletion(whole[offset:], turns, "prefix")


def _appended_form(
    tokenizer: ChatTokenizer, prompt_text: str, prompt: Messages, completion: Messages, tools: Tools
) -> RenderedCompletion:
    places = [place for place, message in enumerate(completion) if message.role == "assistant"]
    text = ""
    turns: list[AssistantTurn] = []
    for place, following in zip(places, [*places[1:], None], strict=True):
        message = completion[place]
        content = _without_opening(message.content, prompt_text + text)
        after = _after_answer(
            tokenizer, (*prompt, *completion[:place]), message, completion[place + 1 : following], tools, following
        )
        start = len(text)
        text += content + after
        turns.append(AssistantTurn(start, start + len(content), len(text)))
    return RenderedCompletion(text, tuple(turns), "appended")


def _after_answer(
    tokenizer: ChatTokenizer, before: Messages, answer: Message, context: Messages, tools: Tools, following: int | None
) -> str:
    """What the template writes behind an answer: the turn's end, then the context up to the next generation prompt."""
    stand_in = replace(answer, content=SENTINEL)
    shown = render(tokenizer, (*before, stand_in, *context), tools, add_generation_prompt=following is not None)
    _, found, after = shown.rpartition(SENTINEL)
    if not found:
        raise BadRow("template_error", "the chat template leaves the assistant's answer out")
    return after


def _without_opening(content: str, before: str) -> str:
    """The answer without the reasoning mark that the generation prompt has already opened."""
    for opening in OPENINGS:
        if before.endswith(opening) and content.startswith(opening):
            return content[len(opening) :]
    return content
