"""`llmalign chat`."""

import argparse
import sys
from collections.abc import Callable
from typing import Any

from llmalign.errors import UserError

CHAT_HELP = """\
RUN is a run's folder, a checkpoint, an adapter (put beside its base), a Hub name or embedded:tiny. Every line is a
turn; the answer is written as it is drawn. /reset, /undo, /system TEXT, /save FILE, /quit; Ctrl-C stops an answer. The
oldest turns are dropped, and that is said, once the context is full. A model without a chat template continues each
line as plain text. Lines may come through a pipe: answers go to standard output, all else to standard error.

  llmalign chat runs/rpo
  echo "What should I cook?" | llmalign chat embedded:tiny --temperature 0
"""


def add(commands: Any, layout: dict[str, Any]) -> None:
    """Add the parser to the command line's grammar; `layout` holds what all parsers share."""
    command = commands.add_parser("chat", help="talk to a model", description=CHAT_HELP, **layout)
    command.add_argument("model", metavar="RUN")
    command.add_argument("--base", metavar="MODEL", help="what an adapter is put on (what it names)")
    command.add_argument("--revision", metavar="NAME", help="of a Hub name")
    command.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")
    command.add_argument("--dtype", metavar="DTYPE", help="of the weights (bfloat16 on a GPU with it, else float32)")
    command.add_argument("--system", metavar="TEXT", help="the system prompt")
    command.add_argument("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (0.7)")
    command.add_argument("--top_p", type=float, default=0.95, metavar="P", help="share of the likeliest tokens (0.95)")
    command.add_argument("--max_new_tokens", type=int, default=512, metavar="N", help="of an answer (512)")
    command.add_argument("--seed", type=int, metavar="N", help="draw the same answers again (differs each time)")
    command.set_defaults(run=_chat)


def _chat(options: argparse.Namespace, rest: list[str]) -> int:
    if rest:
        raise UserError(f"chat does not know {' '.join(rest)}.")
    from llmalign.chat import HELP, Chat, Drawing
    from llmalign.inference import load_for_inference, model_name

    sampling = Drawing(options.temperature, options.top_p, options.max_new_tokens, options.seed)
    model, tokenizer = load_for_inference(
        options.model, base=options.base, revision=options.revision, dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )  # fmt: skip
    chat = Chat(model, tokenizer, sampling, name=model_name(options.model), system=options.system)
    typed = sys.stdin.isatty()
    if typed:
        print(f"{model_name(options.model)}: {HELP}.", file=sys.stderr)
    chat.run(_typed() if typed else _piped)
    return 0


def _typed() -> Callable[[], str]:
    import readline  # noqa: F401  # which gives input() its editing and its history

    def read() -> str:
        try:
            return input("> ")
        except EOFError:
            print(file=sys.stderr)  # so that the shell goes on in a line of its own
            raise

    return read


def _piped() -> str:
    try:
        line = sys.stdin.readline()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text: {error}.") from error
    if not line:
        raise EOFError
    return line
