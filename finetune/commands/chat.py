"""``python -m finetune chat``: chat with a checkpoint, with and without its adapters.

Every line is a question; lines that begin with / are commands (/help lists them). With piped input only the
answers are written to standard output.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from finetune.commands.parser import CommandParser
from finetune.commands.shared_flags import add_prompt_flags, add_video_flags, data_arguments, positive
from finetune.runtime.out_of_memory import explaining, fewer_slices
from finetune.utils.errors import ArgumentError, UserError

if TYPE_CHECKING:
    from finetune.chat.conversation_state import ConversationState
    from finetune.chat.pipeline import ChatPromptOptions, SamplingOptions
    from finetune.chat.session import ChatSession
    from finetune.sample import MediaKind

HELP = """/image PATH        attach an image to the next question; may be given several times
/video PATH        attach a video, a file or a folder of frames; only for models with video input
/audio PATH        attach an audio file; only for models with audio input
/adapter           list the adapters
/adapter off|NAME  switch to the base, or to this adapter
/save FILE         write the conversation as a training record
/reset             clear the conversation
/help              this list
/quit              quit (also at the end of the input)"""


def main(argv: list[str]) -> int:
    """Chats until the input ends; returns 2 when a line of piped input could not be used, else 0."""
    args = build_parser().parse_args(argv)

    import torch

    import finetune.models  # noqa: F401  hides bitsandbytes from peft, and so comes first
    from finetune.chat.conversation_state import ConversationState
    from finetune.chat.pipeline import read_options
    from finetune.chat.web_page import MAX_FILE_MB, MAX_FILES, Page, gradio, serve

    if args.web:
        gradio()  # raises before a model is loaded where it is not installed
    elif args.max_files is not None or args.max_file_mb is not None:
        raise ArgumentError("--max_files and --max_file_mb limit the uploads of the page: add --web, or remove them")
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
    conversation = ConversationState(args.system)
    for path in args.image:
        conversation.show(path)
    for path in args.video:
        conversation.show(path, "video")
    for path in args.audio:
        conversation.show(path, "audio")
    session = _session(args)
    session.check(prompting)  # refuses invalid settings now
    if args.web:
        page = Page(session, prompting, decoding, args.system, args.max_files or MAX_FILES)
        serve(page, args.port, args.max_file_mb or MAX_FILE_MB)
        return 0
    return Terminal(session, conversation, prompting, decoding).run()


def _session(args: argparse.Namespace) -> ChatSession:
    """The loaded models; settings that they choose themselves are said."""
    from finetune.chat.session import ChatSession

    device = None if args.device == "auto" else args.device
    with explaining(lambda: ["--dtype bfloat16", "--device cpu"], "the model was not loaded"):
        session = ChatSession(
            args.model,
            args.adapter,
            device=device,
            dtype=args.dtype,
            downsample_mode=args.downsample_mode,
            use_image_id=args.use_image_id,
        )
    for name, checkpoint in session.checkpoints.items():
        for line in checkpoint.choices:
            print(f"{'base' if name not in session.adapters else name}: {line}", file=sys.stderr, flush=True)
    return session


def build_parser() -> CommandParser:
    """The options of the command."""
    parser = CommandParser(
        prog="python -m finetune chat",
        description=__doc__,
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder of a checkpoint or hub id (default: the base that the adapter names)")
    parser.add_argument(
        "--adapter", action="append", default=[], metavar="[NAME=]PATH", help="adapter folder; the first one is active"
    )
    parser.add_argument("--image", action="append", default=[], metavar="PATH", help="image of the first question")
    parser.add_argument("--video", action="append", default=[], metavar="PATH", help="video of the first question")
    parser.add_argument("--audio", action="append", default=[], metavar="PATH", help="audio of the first question")
    parser.add_argument("--system", help="text of a system turn")
    parser.add_argument("--greedy", action="store_true", help="greedy decoding instead of sampling")
    parser.add_argument("--temperature", type=float, help="default 0.7")
    parser.add_argument("--top_p", type=float, help="default 0.8")
    parser.add_argument("--top_k", type=int, help="default 100")
    parser.add_argument("--repetition_penalty", type=float, help="default 1.05; none with --greedy")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="maximum tokens of an answer (%(default)s)")
    parser.add_argument("--max_slice_nums", type=int, help="maximum slices per image (default: the checkpoint's)")
    parser.add_argument(
        "--thinking", action=argparse.BooleanOptionalAction, help="thinking mode, for models that have it"
    )
    add_prompt_flags(parser)
    add_video_flags(parser)
    parser.add_argument("--web", action="store_true", help="a page in the browser that compares adapters and base")
    parser.add_argument("--port", type=int, default=7860, help="port of the page, on localhost only (%(default)s)")
    parser.add_argument("--max_files", type=positive, help="maximum images per conversation of the page (default: 8)")
    parser.add_argument(
        "--max_file_mb", type=positive, help="maximum size of an upload to the page in MB (default: 20)"
    )
    parser.add_argument("--seed", type=int, help="seed of sampling")
    parser.add_argument("--device", default="auto", help="auto (the best available), cpu, cuda, mps, ...")
    parser.add_argument("--dtype", default="auto", help="auto (the file's), bfloat16, float16, float32")
    return parser


class Terminal:
    """Reads lines and streams the answers."""

    def __init__(
        self,
        session: ChatSession,
        conversation: ConversationState,
        prompting: ChatPromptOptions,
        decoding: SamplingOptions,
    ) -> None:
        self.session = session
        self.conversation = conversation
        self.prompting = prompting
        self.decoding = decoding
        self.interactive = sys.stdin.isatty()
        self.failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/image": self._show("image"),
            "/video": self._show("video"),
            "/audio": self._show("audio"),
            "/adapter": self._adapter,
            "/save": lambda path: self._note(f"saved {self.conversation.save(_needed(path, '/save FILE'))}"),
            "/reset": self._reset,
            "/help": lambda _: self._note(HELP),
        }

    def run(self) -> int:
        """Answers until the input ends."""
        if self.interactive:
            _edit_lines()
        adapters = f", adapters {', '.join(self.session.adapters)}" if self.session.adapters else ""
        self._note(
            f"{self.session.pipeline.family.title} on {self.session.model.device}{adapters}; /help lists the commands"
        )
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
            return input(f"[{self.session.active}] > " if self.session.adapters else "> ")
        except EOFError:
            print()
            return None

    def _take(self, words: str) -> None:
        from finetune.chat.conversation_state import found
        from finetune.chat.media_inputs import is_audio

        # A file dragged into the terminal; commands are no files.
        if words[:1] in ("/", "'", '"') and (file := found(words, "image")) is not None:
            self._show("audio" if is_audio(file) else "image")(words)
            return
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
            sample = self.conversation.ask(question)
            with explaining(lambda: _smaller(self.prompting), "the question is taken back"):
                for chunk in self.session.stream(sample, self.prompting, self.decoding):
                    said.append(chunk)
                    print(chunk, end="", flush=True)
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            print(" [stopped]", end="")
        except UserError:
            self.conversation.take_back()
            raise
        print(flush=True)
        self.conversation.answered("".join(said))

    def _show(self, kind: MediaKind) -> Callable[[str], None]:
        def show(path: str) -> None:
            self.conversation.show(_needed(path, f"/{kind} PATH"), kind)
            self._note(f"{len(self.conversation.files)} attached to the next question")

        return show

    def _adapter(self, name: str) -> None:
        if name:
            self.session.choose(name)
        listed = [
            f"{'*' if known == self.session.active else ' '} {known}" for known in (*self.session.adapters, "off")
        ]
        self._note("\n".join(listed))

    def _reset(self, _: str) -> None:
        self.conversation.reset()
        self._note("forgotten")

    def _note(self, text: str) -> None:
        """Prints a message that is not an answer; to standard error when input is piped."""
        print(text, file=sys.stdout if self.interactive else sys.stderr, flush=True)


def _smaller(prompting: ChatPromptOptions) -> list[str]:
    """What needs less memory, the cheapest first."""
    fewer = [] if prompting.max_slice_nums == 1 else [f"{fewer_slices(prompting.max_slice_nums)} when chat is started"]
    return ["/reset, which clears the conversation, or fewer images", *fewer]


def _needed(value: str, usage: str) -> str:
    if not value:
        raise ArgumentError(f"usage: {usage}")
    return value


def _edit_lines() -> None:
    """Line editing and history with the arrow keys, where Python has readline."""
    try:
        import readline  # noqa: F401  importing it is what does it
    except ImportError:
        return
