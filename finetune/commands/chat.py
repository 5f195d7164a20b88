"""``python -m finetune chat``: talk to a checkpoint, with and without its adapters.

Every line is a question; lines that begin with / are commands (/help lists them). With input from a pipe only the
answers go to standard output.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import add_mode_flag, add_video_flags, data_arguments
from finetune.utils.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from finetune.chat.conversation_state import ConversationState
    from finetune.chat.pipeline import ChatPromptOptions, SamplingOptions
    from finetune.chat.session import ChatSession
    from finetune.sample import MediaKind

HELP = """/image PATH        put a picture in front of the next question; may be given several times
/video PATH        put a video there, a file or a folder of frames; only for models that take videos
/audio PATH        put a sound file there; only for models that hear
/adapter           list the adapters
/adapter off|NAME  let the base, or this adapter, speak from now on
/save FILE         write the conversation as a record that training reads
/reset             forget the conversation
/help              this list
/quit              leave (so does the end of the input)"""


def main(argv: list[str]) -> int:
    """Talks until the input ends; returns 2 when something in piped input could not be used, else 0."""
    args = _parser().parse_args(argv)

    import torch

    from finetune.chat.conversation_state import ConversationState
    from finetune.chat.pipeline import read_options
    from finetune.chat.session import ChatSession
    from finetune.chat.web_page import Page, gradio, serve

    if args.web:
        gradio()  # missing, it is missed before a model is loaded
    if args.seed is not None:
        torch.manual_seed(args.seed)
    names = ("temperature", "top_p", "top_k", "repetition_penalty", "max_new_tokens", "max_slice_nums")
    options = {name: getattr(args, name) for name in names}
    options |= {
        "sampling": not args.greedy,
        "enable_thinking": args.thinking,
        "video": data_arguments(args).video_options,
    }
    prompting, decoding = read_options(options)
    dialogue = ConversationState(args.system)
    for path in args.image:
        dialogue.show(path)
    for path in args.video:
        dialogue.show(path, "video")
    for path in args.audio:
        dialogue.show(path, "audio")
    device = None if args.device == "auto" else args.device
    room = ChatSession(args.model, args.adapter, device=device, dtype=args.dtype, downsample_mode=args.downsample_mode)
    for name, mode in room.modes.items():
        if mode is not None:
            print(f"{'base' if name not in room.adapters else name}: {mode}", file=sys.stderr, flush=True)
    room.talker.encoder(prompting)  # settings that do not fit are refused now
    if args.web:
        serve(Page(room, prompting, decoding, args.system), args.port)
        return 0
    return Terminal(room, dialogue, prompting, decoding).run()


def _parser() -> CommandParser:
    parser = CommandParser(
        prog="python -m finetune chat",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder of a checkpoint or hub id; left out, the base that the adapter names")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]PATH", help="adapter folder; the first one speaks"
    )
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="picture of the first question")
    parser.add_argument("--video", action="append", default=[], metavar="PATH", help="video of the first question")
    parser.add_argument("--audio", action="append", default=[], metavar="PATH", help="sound of the first question")
    parser.add_argument("--system", help="text of a system turn")
    parser.add_argument("--greedy", action="store_true", help="the most likely token each time, nothing is drawn")
    parser.add_argument("--temperature", type=float, help="default 0.7")
    parser.add_argument("--top_p", type=float, help="default 0.8")
    parser.add_argument("--top_k", type=int, help="default 100")
    parser.add_argument("--repetition_penalty", type=float, help="default 1.05; none with --greedy")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer (%(default)s)")
    parser.add_argument("--max_slice_nums", type=int, help="most slices per picture; default: the checkpoint's")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="let the model think first, where it can"
    )
    add_mode_flag(parser)
    add_video_flags(parser)
    parser.add_argument("--web", action="store_true", help="a page in the browser, adapters and base side by side")
    parser.add_argument("--port", type=int, default=7860, help="of the page, on this machine only (%(default)s)")
    parser.add_argument("--seed", type=int, help="of the drawing")
    parser.add_argument("--device", default="auto", help="auto (the best there is), cpu, cuda, mps, ...")
    parser.add_argument("--dtype", default="auto", help="auto (the file's), bfloat16, float16, float32")
    return parser


class Terminal:
    """Reads lines, prints answers as they are made."""

    def __init__(
        self, room: ChatSession, dialogue: ConversationState, prompting: ChatPromptOptions, decoding: SamplingOptions
    ) -> None:
        self.room = room
        self.dialogue = dialogue
        self.prompting = prompting
        self.decoding = decoding
        self.interactive = sys.stdin.isatty()
        self.failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._show("image"),
            "/video": self._show("video"),
            "/audio": self._show("audio"),
            "/adapter": self._adapter,
            "/save": lambda path: self._note(f"saved {self.dialogue.save(_needed(path, '/save FILE'))}"),
            "/reset": self._reset,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> int:
        """Answers until the input ends."""
        if self.interactive:
            _edit_lines()
        adapters = f", adapters {', '.join(self.room.adapters)}" if self.room.adapters else ""
        self._note(f"{self.room.talker.family.title} on {self.room.model.device}{adapters}; /help lists the commands")
        while (line := self._read()) is not None:
            words = line.strip()
            if words in ("/quit", "/exit"):
                break
            try:
                self._take(words)
            except UserError as error:
                self.failed = True
                print(f"error: {error}", file=sys.stderr, flush=True)
        return 2 if self.failed and not self.interactive else 0

    def _read(self) -> str | None:
        if not self.interactive:
            return sys.stdin.readline() or None
        try:
            return input(f"[{self.room.active}] > " if self.room.adapters else "> ")
        except EOFError:
            print()
            return None

    def _take(self, words: str) -> None:
        if not words.startswith("/"):
            if words:
                self._answer(words)
            return
        name, _, rest = words.partition(" ")
        if name not in self._commands:
            near = difflib.get_close_matches(name, self._commands, n=1)
            raise ArgumentError(f"no command {name}; " + (f"did you mean {near[0]}?" if near else "/help lists them"))
        self._commands[name](rest.strip())

    def _answer(self, question: str) -> None:
        said: list[str] = []
        try:
            sample = self.dialogue.ask(question)
            for piece in self.room.stream(sample, self.prompting, self.decoding):
                said.append(piece)
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print(" [stopped]", end="")
        except UserError:
            self.dialogue.take_back()
            raise
        print(flush=True)
        self.dialogue.answered("".join(said))

    def _show(self, kind: MediaKind) -> Callable[[str], None]:
        def show(path: str) -> None:
            self.dialogue.show(_needed(path, f"/{kind} PATH"), kind)
            self._note(f"{len(self.dialogue.files)} in front of the next question")

        return show

    def _adapter(self, name: str) -> None:
        if name:
            self.room.choose(name)
        listed = [f"{'*' if known == self.room.active else ' '} {known}" for known in (*self.room.adapters, "off")]
        self._note("\n".join(listed))

    def _reset(self, _: str) -> None:
        self.dialogue.reset()
        self._note("forgotten")

    def _note(self, text: str) -> None:
        """What is no answer: beside the answers only for people."""
        print(text, file=sys.stdout if self.interactive else sys.stderr, flush=True)


def _needed(value: str, usage: str) -> str:
    if not value:
        raise ArgumentError(f"usage: {usage}")
    return value


def _edit_lines() -> None:
    """Earlier lines with the arrow keys, where Python has readline."""
    try:
        import readline  # noqa: F401  importing it is what does it
    except ImportError:
        return
