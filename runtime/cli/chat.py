"""`satchel chat`: a conversation with a model on a terminal, or line by line from a file or another program."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from satchel.runtime.cli import custom_flags, grammar_flags, provider_flags, ready
from satchel.runtime.cli.chat_turns import read_turns, typed_turns
from satchel.runtime.cli.prompt_lines import TAKEN
from satchel.runtime.errors import PromptError, SatchelError
from satchel.runtime.generation import options as generation_options
from satchel.runtime.util import interrupt
from satchel.runtime.util.progress import progress_bar
from satchel.runtime.util.terminal import printable

if TYPE_CHECKING:
    from satchel.runtime.generation.conversation import Answer, Conversation
    from satchel.runtime.generation.result import Generation
    from satchel.runtime.util.progress import Bar

HELP = """\
/reset [TEXT]   start a new conversation; TEXT is its system prompt
/history        show the conversation
/save FILE      save the conversation with its keys and values
/load FILE      continue a saved conversation
/help           show this list
/exit           quit; so does Ctrl-D
End a line with \\ to continue on the next one. Start a line with // to send a /.
Ctrl-C stops an answer. If it has no text yet, it is dropped together with the question."""


SLIDING = (
    "the context of {} tokens is full: the oldest {} messages are dropped, and older ones from now on as needed "
    "(--max-context raises the limit where the bundle allows it)"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `satchel chat`."""
    parser.description = (
        "Chat with a model in its chat template. With QUESTION, answer that and exit. Without a terminal, each line of "
        "standard input is a turn. Sampling options default to the checkpoint's generation_config.json. When the "
        "context is full, the oldest turns are dropped. /help lists the commands of a chat."
    )
    parser.epilog = 'example:\n  satchel chat out/smollm2-int8 "What is a satchel?" --system "Answer in one sentence."'
    parser.add_argument(
        "bundle",
        metavar="BUNDLE",
        help="made by satchel export or satchel pack; or a checkpoint, which is exported once into the user's cache",
    )
    parser.add_argument("prompt", metavar="QUESTION", nargs="?", help="one question, in quotes: answer it and exit")
    parser.add_argument("-p", "--prompt", metavar="TEXT", dest="prompt_flag", help="the same as QUESTION")
    parser.add_argument("--system", metavar="TEXT", help="the system prompt")
    parser.add_argument("--tools", metavar="FILE", type=Path, help="a JSON list of function schemas for the template")
    parser.add_argument(
        "--template-argument",
        metavar="NAME=JSON",
        action="append",
        default=[],
        help="a further variable of the template, such as enable_thinking=false; may be repeated",
    )
    parser.add_argument(
        "--template",
        metavar="NAME",
        help="one of the bundle's chat templates (default: tool_use with --tools, if there is one; else default)",
    )
    parser.add_argument("--chat-template", metavar="FILE", type=Path, help="a Jinja template in place of the bundle's")
    parser.add_argument("--load-state", metavar="FILE", type=Path, help="continue a saved conversation")
    parser.add_argument(
        "--max-context", metavar="N", type=int, help="maximum positions of the conversation (default: the bundle's)"
    )
    parser.add_argument(
        "--prefix-cache-mib",
        metavar="MIB",
        type=int,
        help="size of the prefix cache, which keeps keys and values between turns (default: that of a full context)",
    )
    provider_flags.add_threads(parser)
    ready.add_flag(parser)
    ready.add_speculation(parser)
    custom_flags.add_flags(parser)
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one line of JSON for each answer, with "error" if a turn failed',
    )
    grammar_flags.add_flags(parser)
    generation_options.add_flags(parser, chat=True)
    provider_flags.add_flags(parser)


def main(args: argparse.Namespace) -> int:
    """Answer one question, or turn after turn until the input ends. Returns 0, or 1 if a turn of a file failed."""
    _check(args)
    conversation = _open(args)
    interactive = args.prompt is None and sys.stdin.isatty() and not args.json
    failed = False
    try:
        if args.load_state is not None:
            conversation.load_state(args.load_state, progress=not args.quiet)
        if args.prompt is not None:
            _answer(conversation, args.prompt, args)
            return 0
        if interactive and not args.quiet:
            print("/help lists the commands, Ctrl-D quits", file=sys.stderr)
        for line in typed_turns() if interactive else read_turns():
            try:
                if line.startswith("/") and line.split(maxsplit=1)[0] == "/exit":
                    break
                _turn(conversation, line, args)
            except SatchelError as error:
                print(f"satchel: error: {error}", file=sys.stderr)
                if args.json:
                    print(json.dumps({"error": str(error)}, ensure_ascii=False), flush=True)
                failed = not interactive
            except KeyboardInterrupt:
                if not interactive:
                    raise
                interrupt.forget()
                print(file=sys.stderr)
    finally:
        conversation.close()
    return 1 if failed else 0


def _check(args: argparse.Namespace) -> None:
    """Settle `args.prompt` and `args.grammar`, and raise PromptError for flags that exclude or require each other."""
    args.grammar = grammar_flags.grammar_in(args)
    if args.prompt_flag is not None:
        if args.prompt is not None:
            raise PromptError("--prompt and QUESTION are both given: remove one")
        args.prompt = args.prompt_flag
    if args.logprobs is not None and not args.json:
        raise PromptError("--logprobs requires --json")
    if args.template is not None and args.chat_template is not None:
        raise PromptError("--template cannot be combined with --chat-template: the file is the only template then")
    if args.system is not None and args.load_state is not None:
        raise PromptError("--system cannot be combined with --load-state: a saved conversation has its own")


def _turn(conversation: Conversation, line: str, args: argparse.Namespace) -> None:
    if line.startswith("/") and not line.startswith("//"):
        _command(conversation, line, progress=not args.quiet)
    else:
        _answer(conversation, line.removeprefix("/") if line.startswith("//") else line, args)


def _open(args: argparse.Namespace) -> Conversation:
    from satchel.runtime.generation.conversation import Conversation, checkpoint_options
    from satchel.runtime.generation.templates.chat_template import ChatTemplate, special_tokens

    given = generation_options.given_in(args)
    tools, arguments = _tools(args.tools), _template_arguments(args.template_argument)
    template = None if args.chat_template is None else _read(args.chat_template, "--chat-template")
    generator = ready.open_generator(args, args.prefix_cache_mib)
    if template is not None:
        special = special_tokens(generator.engine.bundle, generator.tokenizer)
        generator.template = ChatTemplate(template, special)
    options = checkpoint_options(generator, given)
    options.check_all(generator.engine.vocabulary)
    return Conversation(
        generator, system=args.system, tools=tools, arguments=arguments, options=options, template=args.template
    )


def _answer(conversation: Conversation, text: str, args: argparse.Namespace) -> None:
    """Ask, and print the answer as it comes."""
    answer = conversation.ask(text, progress=lambda count: bar.update(count))  # called while pieces are taken
    if answer.dropped_messages and not conversation.dropped_messages and not args.quiet:
        print(SLIDING.format(conversation.generator.max_context, answer.dropped_messages), file=sys.stderr)
    with progress_bar(answer.prompt_tokens, "reading", " tokens", shown=not args.quiet) as bar:
        if args.json:
            print(_as_json(answer.result(), conversation), flush=True)
            return
        result = _print_pieces(answer, bar, interruptible=args.prompt is None and sys.stdin.isatty())
    if not args.quiet:
        print(_figures(result), file=sys.stderr)
        if result.finish_reason == "loop":
            print("the answer repeated itself and was ended: --max-repeats 0 lets it go on", file=sys.stderr)


def _as_json(result: Generation, conversation: Conversation) -> str:
    from satchel.runtime.cli.generation_json import single_json

    return json.dumps(single_json(result, conversation.generator.need_tokenizer()), ensure_ascii=False)


def _print_pieces(answer: Answer, bar: Bar, interruptible: bool) -> Generation:
    """Print an answer. If it is interruptible, Ctrl-C ends it, and its text so far stays."""
    try:
        with answer:
            for piece in answer:
                bar.close()
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interruptible:
            raise
        interrupt.forget()
        bar.close()
        print("".join(answer), end=" ...")  # with what was held back
    finally:
        print(flush=True)
    return answer.result()


def _figures(result: Generation) -> str:
    reused = f" ({result.reused_tokens} cached)" if result.reused_tokens else ""
    return (
        f"[prompt {result.prompt_tokens} tokens{reused}, new {result.new_tokens} at {result.decode_speed:.1f} tokens/s "
        f"({result.finish_reason})]"
    )


def _command(conversation: Conversation, line: str, progress: bool) -> None:
    """Run a command: a line that starts with a slash. Raises SatchelError."""
    name, *words = line.split(maxsplit=1)
    rest = words[0].strip() if words else ""
    if name == "/help":
        print(HELP, file=sys.stderr)
    elif name == "/reset":
        conversation.reset(rest or None)
        print("conversation reset", file=sys.stderr)
    elif name == "/history":
        for message in conversation.messages:
            print(f"{printable(str(message['role']))}: {message.get('content')}", file=sys.stderr)
    elif name in ("/save", "/load") and not rest:
        raise PromptError(f"{name} requires a file, such as {name} talk.safetensors")
    elif name == "/save":
        count = conversation.save_state(rest, option=name, progress=progress)
        print(f"{rest}: {count} tokens saved", file=sys.stderr)
    elif name == "/load":
        conversation.load_state(rest, progress=progress)
        print(f"{rest}: {len(conversation.messages)} messages loaded", file=sys.stderr)
    else:
        raise PromptError(f"{printable(name)}: unknown command: /help lists them, // sends a /")


def _tools(path: Path | None) -> list[dict[str, Any]] | None:
    if path is None:
        return None
    try:
        tools = json.loads(_read(path, "--tools"))
    except (ValueError, RecursionError) as error:
        raise PromptError(f"--tools {path}: not valid JSON ({error}): correct it") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise PromptError(f"--tools {path}: must hold a list of objects: put the schemas in [ ]")
    return tools


def _template_arguments(pairs: list[str]) -> dict[str, Any]:
    arguments = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        try:
            arguments[name] = json.loads(value)
        except (ValueError, RecursionError):
            equals = ""
        if name in TAKEN:
            raise PromptError(f"--template-argument {pair}: {name} is a reserved name: use the flags of satchel chat")
        if not equals or not name.isidentifier():
            raise PromptError(f"--template-argument {pair}: must be NAME=JSON, such as enable_thinking=false")
    return arguments


def _read(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PromptError(f"{option} {path}: cannot be read ({error.strerror}): choose another file") from None
    except UnicodeDecodeError:
        raise PromptError(f"{option} {path}: not UTF-8 text: convert it to UTF-8") from None
