"""Gradio page that compares the answers of all adapters and the base model side by side."""

from __future__ import annotations

import html
import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from finetune.chat.conversation_state import ConversationState
from finetune.chat.pipeline import ChatPromptOptions, SamplingOptions
from finetune.chat.session import OFF, ChatSession
from finetune.runtime.out_of_memory import explaining
from finetune.sample import Sample
from finetune.utils.errors import ArgumentError, UserError

Turns = list[dict[str, Any]]

MAX_FILES = 8
MAX_FILE_MB = 20
# Uploads older than a day are deleted, once an hour.
_DELETE_CACHE = (3600, 24 * 3600)


@dataclass(frozen=True, slots=True)
class Page:
    """The logic of the page, independent of gradio.

    Attributes:
        session: the base and its adapters.
        prompting: prompt options.
        decoding: sampling options.
        system_prompt: text of a system turn.
        max_files: maximum number of images in a conversation.
    """

    session: ChatSession
    prompting: ChatPromptOptions
    decoding: SamplingOptions
    system_prompt: str | None = None
    max_files: int = MAX_FILES

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the models that answer: the adapters, then the base."""
        return (*self.session.adapters, OFF)

    def start(self) -> list[ConversationState]:
        """An empty conversation per model."""
        return [ConversationState(self.system_prompt) for _ in self.models]

    def ask(
        self, question: str, image: str | None, conversations: Sequence[ConversationState]
    ) -> Iterator[list[Turns]]:
        """Answers a question with one model after another.

        Args:
            question: text of the user.
            image: file attached to it, or None.
            conversations: that of each model; they are continued.

        Yields:
            The chat history to show per model, updated for every text chunk.

        Raises:
            UserError: the question or the image cannot be used; it is removed from conversations without an answer.
        """
        if not question.strip():
            raise ArgumentError("write a question first")
        if image and sum(len(files) for _, _, files in conversations[0].turns) >= self.max_files:
            raise ArgumentError(
                f"this conversation has {self.max_files} images, as many as --max_files allows: clear the conversation"
            )
        waiting = list(conversations)
        try:
            samples = [_put(conversation, question.strip(), image) for conversation in conversations]
            for name, sample, conversation in zip(self.models, samples, conversations, strict=True):
                said = ""
                with explaining(lambda: ["a new conversation, or a smaller image"], "the question is taken back"):
                    for chunk in self.session.stream(sample, self.prompting, self.decoding, name):
                        said += chunk
                        yield [
                            [*shown(other), *([_bubble("assistant", said)] if other is conversation else [])]
                            for other in conversations
                        ]
                conversation.answered(said)
                waiting.remove(conversation)
                yield [shown(other) for other in conversations]
        finally:
            # Also when the client disconnects in the middle.
            for conversation in waiting:
                _take_back(conversation)


def _put(conversation: ConversationState, question: str, image: str | None) -> Sample:
    """Adds a question, with its image, to a conversation; returns the conversation up to it."""
    if image:
        conversation.show(image)
    return conversation.ask(question)


def _take_back(conversation: ConversationState) -> None:
    """Removes a question without an answer."""
    conversation.files = []
    if conversation.turns and conversation.turns[-1][0] == "user":
        conversation.take_back()


def shown(conversation: ConversationState) -> Turns:
    """A conversation in the format of gradio's Chatbot."""
    turns: Turns = []
    for role, text, files in conversation.turns:
        turns += [{"role": role, "content": {"path": str(path)}} for _, path in files]
        turns.append(_bubble(role, text))
    return turns


def _bubble(role: str, text: str) -> dict[str, Any]:
    # Text of the user and of the model is escaped, also where it looks like HTML.
    return {"role": role, "content": html.escape(text, quote=False)}


def gradio() -> Any:
    """The gradio module.

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

    def ask(question: str, image: str | None, conversations: list[ConversationState]) -> Iterator[list[Any]]:
        try:
            for columns in page.ask(question, image, conversations):
                yield [*columns, "", None, conversations]
        except UserError as error:
            raise gr.Error(str(error)) from error

    def reset() -> list[Any]:
        return [*([] for _ in page.models), "", None, page.start()]

    title = page.session.pipeline.family.title
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=_DELETE_CACHE) as blocks:
        gr.Markdown(f"## {title}")
        conversations = gr.State(page.start())
        with gr.Row():
            # Tags such as <box> are part of an answer, not HTML.
            columns = [
                gr.Chatbot(
                    label="base" if name == OFF else name,
                    render_markdown=False,
                    buttons=["copy"],
                    height=420,
                    elem_id=f"v{place}",
                )
                for place, name in enumerate(page.models)
            ]
        with gr.Row():
            image = gr.Image(type="filepath", label="image", height=180, sources=["upload", "clipboard"])
            with gr.Column(scale=3):
                question = gr.Textbox(label="question", lines=3, submit_btn=True, elem_id="question")
                forget = gr.Button("clear the conversation")
        seen = [*columns, question, image, conversations]
        question.submit(ask, [question, image, conversations], seen)
        forget.click(reset, None, seen)
        for column in columns:
            column.clear(reset, None, seen)
    return blocks


def serve(page: Page, port: int, max_file_mb: int = MAX_FILE_MB) -> None:
    """Serves the page on localhost until interrupted.

    Args:
        page: the page.
        port: on localhost.
        max_file_mb: maximum size of an upload in MB.

    Raises:
        ArgumentError: gradio is not installed, or the port is taken.
    """
    blocks = build(page)
    try:
        blocks.launch(server_name="127.0.0.1", server_port=port, share=False, max_file_size=f"{max_file_mb}mb")
    except OSError as error:
        raise ArgumentError(f"--port {port}: {error}") from error
