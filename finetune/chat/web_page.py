"""A page in the browser: one question, answered by every adapter and by the base side by side."""

from __future__ import annotations

import html
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.chat.conversation_state import ConversationState
from finetune.chat.pipeline import ChatPromptOptions, SamplingOptions
from finetune.chat.session import OFF, ChatSession
from finetune.utils.errors import ArgumentError, UserError

Turns = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Page:
    """What the page does, without the page.

    Attributes:
        room: the base and its adapters.
        prompting: how prompts are written.
        decoding: how tokens are chosen.
        system_prompt: text of a system turn.
    """

    room: ChatSession
    prompting: ChatPromptOptions
    decoding: SamplingOptions
    system_prompt: str | None = None

    @property
    def voices(self) -> tuple[str, ...]:
        """Who answers: the adapters, then the base."""
        return (*self.room.adapters, OFF)

    def start(self) -> list[ConversationState]:
        """A conversation per voice, each with its own answers."""
        return [ConversationState(self.system_prompt) for _ in self.voices]

    def ask(self, question: str, picture: str | None, dialogues: Sequence[ConversationState]) -> Iterator[list[Turns]]:
        """Answers a question by one voice after another.

        Args:
            question: text of the user.
            picture: file shown with it, or None.
            dialogues: the conversation of every voice, which are continued.

        Yields:
            What is to be seen per voice, again for every piece.

        Raises:
            UserError: the question or the picture cannot be used; voices that have not answered forget it.
        """
        if not question.strip():
            raise ArgumentError("write a question first")
        waiting = list(dialogues)
        try:
            samples = []
            for dialogue in dialogues:
                if picture:
                    dialogue.show(picture)
                samples.append(dialogue.ask(question.strip()))
            for voice, sample, dialogue in zip(self.voices, samples, dialogues, strict=True):
                said = ""
                for piece in self.room.stream(sample, self.prompting, self.decoding, voice):
                    said += piece
                    yield [
                        [*shown(other), *([_bubble("assistant", said)] if other is dialogue else [])]
                        for other in dialogues
                    ]
                dialogue.answered(said)
                waiting.remove(dialogue)
                yield [shown(other) for other in dialogues]
        finally:
            # Also when the reader has gone away in the middle.
            for dialogue in waiting:
                dialogue.files = []
                if dialogue.turns and dialogue.turns[-1][0] == "user":
                    dialogue.take_back()


def shown(dialogue: ConversationState) -> Turns:
    """A conversation in the form of gradio's Chatbot."""
    turns: Turns = []
    for role, text, files in dialogue.turns:
        turns += [{"role": role, "content": {"path": str(path)}} for _, path in files]
        turns.append(_bubble(role, text))
    return turns


def _bubble(role: str, text: str) -> dict[str, Any]:
    # Words of the user and of the model are text, also where they look like HTML.
    return {"role": role, "content": html.escape(text, quote=False)}


def gradio() -> Any:
    """The library.

    Raises:
        ArgumentError: it is not installed.
    """
    try:
        return importlib.import_module("gradio")  # an extra; type checkers need not have it
    except ImportError as error:
        raise ArgumentError(f"--web needs gradio ({error}): pip install -e '.[web]'") from error


def build(page: Page) -> Any:
    """The page as gradio Blocks.

    Raises:
        ArgumentError: gradio is not installed.
    """
    gr = gradio()

    def ask(question: str, picture: str | None, dialogues: list[ConversationState]) -> Iterator[list[Any]]:
        try:
            for columns in page.ask(question, picture, dialogues):
                yield [*columns, "", None, dialogues]
        except UserError as error:
            raise gr.Error(str(error)) from error

    def reset() -> list[Any]:
        return [*([] for _ in page.voices), "", None, page.start()]

    title = page.room.talker.family.title
    with gr.Blocks(title=title, analytics_enabled=False) as blocks:
        gr.Markdown(f"## {title}")
        dialogues = gr.State(page.start())
        with gr.Row():
            # Marks such as <box> are part of an answer, not of the page.
            columns = [
                gr.Chatbot(
                    label="base" if voice == OFF else voice,
                    render_markdown=False,
                    buttons=["copy"],
                    height=420,
                    elem_id=f"v{place}",
                )
                for place, voice in enumerate(page.voices)
            ]
        with gr.Row():
            picture = gr.Image(type="filepath", label="picture", height=180, sources=["upload", "clipboard"])
            with gr.Column(scale=3):
                question = gr.Textbox(label="question", lines=3, submit_btn=True, elem_id="question")
                forget = gr.Button("forget the conversation")
        seen = [*columns, question, picture, dialogues]
        question.submit(ask, [question, picture, dialogues], seen)
        forget.click(reset, None, seen)
        for column in columns:
            column.clear(reset, None, seen)
    return blocks


def serve(page: Page, port: int) -> None:
    """Shows the page on this machine until interrupted.

    Raises:
        ArgumentError: gradio is not installed, or the port is taken.
    """
    blocks = build(page)
    try:
        blocks.launch(server_name="127.0.0.1", server_port=port, share=False)
    except OSError as error:
        raise ArgumentError(f"--port {port}: {error}") from error
