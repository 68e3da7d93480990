"""A conversation from Python: python samples/conversation.py BUNDLE "First question" "Second question" ..."""

from __future__ import annotations

import sys

from satchel.runtime import Conversation, Generator


def main(bundle: str, questions: list[str]) -> None:
    """Ask the questions one after another; print each answer as it comes, and how many tokens were prefilled for it."""
    talk = Conversation(Generator.open(bundle, threads=2), system="You answer in one short sentence.")
    for question in questions:
        print(f"> {question}")
        with talk.ask(question) as answer:
            for piece in answer:
                print(piece, end="", flush=True)
            result = answer.result()
        print(f"\n({result.prompt_tokens - result.reused_tokens} of {result.prompt_tokens} prompt tokens fed)")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit('usage: python samples/conversation.py BUNDLE "QUESTION" ...')
    main(sys.argv[1], sys.argv[2:])
