"""A conversation: each turn feeds its own tokens, what was said stays as it was, and what fails changes nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.chat_bundle import CONTEXT, END, START, write_chat_bundle
from support.tiny_bundle import write_bundle

from satchel.runtime.errors import BundleError, PromptError, SatchelError
from satchel.runtime.execution.cpu import CpuState
from satchel.runtime.execution.state import State
from satchel.runtime.generation.conversation import Conversation, checkpoint_options
from satchel.runtime.generation.generator import Generator
from satchel.runtime.generation.options import CHAT_DEFAULTS, GenerationOptions
from satchel.runtime.generation.result import Generation
from satchel.runtime.generation.session_file import SavedState, write_state
from satchel.runtime.generation.templates.chat_template import ChatTemplate

SHORT = GenerationOptions(max_new_tokens=12)
SYSTEM = "be brief"
HELLO = "hello"
NEW_TURN = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def generator(chatty: Path, plain: Generator) -> Generator:
    """A generator that has seen nothing yet; its template is that of `plain`, whose process runs already."""
    generator = Generator.open(chatty, threads=1)
    generator.template = plain.template
    return generator


@pytest.fixture
def talk(generator: Generator) -> Conversation:
    return Conversation(generator, system=SYSTEM, options=SHORT)


def say(talk: Conversation, *questions: str) -> list[Generation]:
    return [talk.ask(question).result() for question in questions]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str = SYSTEM) -> dict[str, str]:
    return {"role": "system", "content": text}


def encoded(talk: Conversation, text: str) -> list[int]:
    return talk.generator.tokenizer.encode_rendered(text)


def test_an_answer_continues_what_the_template_makes_of_the_messages(talk: Conversation, plain: Generator) -> None:
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>assistant\n"
    ids = encoded(talk, text)
    expected = plain.generate(ids, 12)
    answer = talk.ask(HELLO)
    assert answer.prompt_tokens == len(ids)
    pieces = list(answer)
    assert "".join(pieces) == expected.text == answer.result().text
    assert len(pieces) > 3
    assert answer.result().token_ids == expected.token_ids
    assert talk.messages == [system(), user(HELLO), assistant(expected.text)]


def test_a_turn_feeds_its_own_tokens_only(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    fed: list[int] = []
    prefill = CpuState.prefill
    monkeypatch.setattr(CpuState, "prefill", lambda self, ids: fed.append(len(ids)) or prefill(self, ids))
    before = 0
    for question in (HELLO, "the cat", "and the dog"):
        result = say(talk, question)[0]
        own = result.prompt_tokens - before
        if before:
            assert own == len(encoded(talk, NEW_TURN.format(question)))
        assert result.finish_reason == "length"
        assert result.reused_tokens == max(0, before - 1)  # the last token of an answer was chosen, and not fed
        assert fed.pop() == own + bool(before)
        before = result.prompt_tokens + result.new_tokens
    assert fed == []


def test_an_answer_that_ended_by_itself_is_known_whole(tmp_path: Path, plain: Generator) -> None:
    answer = Conversation(plain, options=SHORT).ask(HELLO).result()
    end = answer.token_ids[5]
    assert end not in answer.token_ids[:5]
    ending = Generator.open(write_chat_bundle(tmp_path / "ending", eos_token_ids=(end,)), threads=1)
    ending.template = plain.template
    talk = Conversation(ending, options=SHORT)
    first, second = say(talk, HELLO, "the cat")
    assert (first.finish_reason, first.new_tokens) == ("stop", 5)
    assert second.reused_tokens == first.prompt_tokens + 5


def test_the_ids_of_an_answer_stay_those_that_the_model_wrote(talk: Conversation, plain: Generator) -> None:
    first, second = say(talk, HELLO, "the cat")
    ids = [*talk._ids[: first.prompt_tokens], *first.token_ids, *encoded(talk, NEW_TURN.format("the cat"))]
    assert talk._ids.tolist() == [*ids, *second.token_ids]
    assert second.token_ids == plain.generate(ids, 12).token_ids
    whole = plain.encode_chat(talk.messages[:-1]).tolist()
    assert whole != ids  # encoding the whole anew splits the answer otherwise


@pytest.mark.parametrize("name", ["trims", "shouts", "forget"])
def test_what_the_template_changes_is_encoded_anew(generator: Generator, plain: Generator, name: str) -> None:
    """A template that trims takes away the space with which an answer begins; one that forgets, what came before; one
    that shouts keeps the length of all.
    """
    arguments = {name: True}
    options = replace(SHORT, logit_bias={encode_one(generator, " the"): 1e4}, no_repeat_ngram_size=1)
    talk = Conversation(generator, arguments=arguments, options=options)
    first = say(talk, HELLO)[0]
    assert first.text.startswith(" the")
    second = say(talk, "the cat")[0]
    ids = plain.encode_chat([user(HELLO), assistant(first.text), user("the cat")], arguments=arguments)
    fields = {field: getattr(options, field) for field in options.__dataclass_fields__}
    expected = plain.generate(ids, **fields)
    assert (second.prompt_tokens, second.token_ids) == (len(ids), expected.token_ids)
    assert 0 < second.reused_tokens < first.prompt_tokens + first.new_tokens - 1
    assert talk._ids.tolist() == [*ids, *second.token_ids]


def encode_one(generator: Generator, text: str) -> int:
    (token,) = generator.tokenizer.encode_rendered(text)
    return token


def test_text_that_could_join_with_what_came_before_is_encoded_with_it(tmp_path: Path, plain: Generator) -> None:
    bare = "{% for message in messages %}{{ message.content }}{% endfor %}"
    generator = Generator.open(write_chat_bundle(tmp_path / "bare", template=bare), threads=1)
    talk = Conversation(generator, options=replace(SHORT, max_new_tokens=1, logit_bias={encode_one(plain, "t"): 1e6}))
    first, second = say(talk, "the ca", " and")
    talk.close()
    assert (first.text, first.new_tokens) == ("t", 1)
    assert second.prompt_tokens == len(plain.tokenizer.encode_rendered("the cat and"))
    assert talk._ids.tolist()[:-1] == plain.tokenizer.encode_rendered("the cat and")


def test_tools_and_arguments_reach_the_template(generator: Generator, plain: Generator) -> None:
    tools = [{"type": "function", "function": {"name": "clock"}}]
    talk = Conversation(generator, tools=tools, arguments={"mood": "merry "}, options=SHORT)
    result = say(talk, HELLO)[0]
    text = (
        '<|im_start|>tools\n[{"type": "function", "function": {"name": "clock"}}]<|im_end|>\n'
        f"<|im_start|>user\n{HELLO}<|im_end|>\n<|im_start|>merry assistant\n"
    )
    ids = plain.tokenizer.encode_rendered(text)
    assert talk._ids.tolist()[: len(ids)] == ids
    assert result.prompt_tokens == len(ids)
    assert plain.encode_chat([user(HELLO)], tools=tools, arguments={"mood": "merry "}).tolist() == ids
    assert ids.count(START) == ids.count(END) + 1 == 3


def test_messages_of_any_role_can_be_asked(talk: Conversation) -> None:
    say(talk, HELLO)
    call, tool = {"role": "assistant", "content": "clock()"}, {"role": "tool", "content": "noon"}
    talk.ask([call, tool]).result()
    talk.ask(tool).result()
    assert [message["role"] for message in talk.messages] == [
        "system", "user", "assistant", "assistant", "tool", "assistant", "tool", "assistant",
    ]  # fmt: skip
    tool["content"] = "changed"
    assert talk.messages[4]["content"] == "noon"


def test_reset_forgets_all_but_the_system_prompt(talk: Conversation) -> None:
    first = say(talk, HELLO)[0]
    talk.reset()
    assert talk.messages == [system()]
    again = say(talk, HELLO)[0]
    assert (again.text, again.reused_tokens) == (first.text, first.prompt_tokens - 2)
    talk.reset("be long")
    assert talk.messages == [system("be long")]
    talk.reset("")
    assert talk.messages == [system("")]
    bare = Conversation(talk.generator, options=SHORT)
    bare.reset()
    assert bare.messages == []


def refusing(talk: Conversation, question: Any, message: str) -> None:
    """Ask what is refused, and check that nothing has changed."""
    before = talk.messages, talk._ids.tolist(), talk._text
    kept = talk.generator.prefix_cache.positions
    with pytest.raises(PromptError, match=message):
        talk.ask(question)
    assert (talk.messages, talk._ids.tolist(), talk._text) == before
    assert talk.generator.prefix_cache.positions == kept


def test_a_refused_question_leaves_everything_as_it_was(talk: Conversation, generator: Generator) -> None:
    twin = Conversation(generator, system=SYSTEM, options=SHORT)
    for asked in (0, 1):
        refusing(talk, "forbidden", "the chat template refuses these messages: no such talk")
        refusing(talk, {"role": "user"}, r"messages\[0\].content: must be a text")
        refusing(talk, [user("a"), "b"], r"messages\[1\]: must be an object")
        refusing(talk, [], "messages: must be a list with at least one message")
        refusing(talk, "a\ud800", "the text is not valid UTF-8")
        refusing(talk, "x" * 2000, rf"the question has \d+ tokens but the context holds {CONTEXT}: ")
        talk.options = replace(SHORT, top_k=3)
        refusing(talk, HELLO, "--top-k 3: has no effect at temperature 0")
        talk.options = SHORT
        if not asked:
            assert say(talk, HELLO)[0].token_ids == say(twin, HELLO)[0].token_ids
    assert say(talk, "the cat")[0].token_ids == say(twin, "the cat")[0].token_ids


def test_an_answer_that_is_left_early_is_kept(talk: Conversation, plain: Generator) -> None:
    with talk.ask(HELLO) as answer:
        text = next(answer) + next(answer)
    result = answer.result()
    assert (result.finish_reason, result.text) == ("closed", text)
    assert talk.messages == [system(), user(HELLO), assistant(text)]
    second = say(talk, "the cat")[0]
    assert second.reused_tokens == result.prompt_tokens + result.new_tokens - 1
    ids = [*talk._ids[: result.prompt_tokens], *result.token_ids, *encoded(talk, NEW_TURN.format("the cat"))]
    assert second.token_ids == plain.generate(ids, 12).token_ids


def test_an_answer_that_is_left_before_its_first_text_is_not(talk: Conversation) -> None:
    say(talk, HELLO)
    before = list(talk.messages), talk._ids.tolist()
    for leave in (lambda: talk.ask("the cat").close(), lambda: talk.ask("the cat").__exit__(None, None, None)):
        leave()
        assert (talk.messages, talk._ids.tolist()) == before
    with talk.ask("the cat"):
        pass
    assert (talk.messages, talk._ids.tolist()) == before


def test_an_empty_answer_that_the_model_gave_is_kept(talk: Conversation) -> None:
    talk.options = replace(SHORT, logit_bias={END: 1e6})
    first = say(talk, HELLO)[0]
    assert (first.text, first.finish_reason) == ("", "stop")
    assert talk.messages[-1] == assistant("")
    assert say(talk, "the cat")[0].reused_tokens == first.prompt_tokens


def test_an_answer_that_fails_is_not_kept(talk: Conversation, monkeypatch: pytest.MonkeyPatch) -> None:
    say(talk, HELLO)
    before = list(talk.messages), talk._ids.tolist(), talk._text
    decode, steps = CpuState.decode, []

    def spoiled(state: State, token: int) -> None:
        decode(state, token)
        steps.append(1)
        if len(steps) == 4:
            state.logits[:] = np.nan

    monkeypatch.setattr(CpuState, "decode", spoiled)
    answer = talk.ask("the cat")
    with answer, pytest.raises(BundleError, match="the logits of step 4 are not finite"):
        list(answer)
    answer.close()
    assert list(answer) == []
    assert answer.result().finish_reason == "error"
    monkeypatch.undo()
    assert (talk.messages, talk._ids.tolist(), talk._text) == before
    retry = say(talk, "the cat")[0]
    assert retry.reused_tokens == len(before[1]) - 1


def test_a_callback_that_fails_counts_as_a_failure(talk: Conversation) -> None:
    def callback(piece: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        talk.ask(HELLO, callback=callback).result()
    assert talk.messages == [system()]
    heard: list[str] = []
    result = talk.ask(HELLO, callback=lambda piece: heard.append(piece) or len(heard) == 2).result()
    assert (result.finish_reason, "".join(heard)) == ("callback", result.text)
    assert talk.messages[-1] == assistant(result.text)


@pytest.mark.parametrize("after", [0, 3])
def test_an_interrupt_keeps_what_there_is(talk: Conversation, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    say(talk, HELLO)
    before = list(talk.messages)
    name = "decode" if after else "prefill"
    run, steps = getattr(CpuState, name), []

    def interrupted(*arguments: Any) -> None:
        run(*arguments)
        steps.append(1)
        if len(steps) > after:
            raise KeyboardInterrupt

    monkeypatch.setattr(CpuState, name, interrupted)
    with pytest.raises(KeyboardInterrupt), talk.ask("the cat") as answer:
        list(answer)
    monkeypatch.undo()
    result = answer.result()
    assert result.finish_reason == "closed"
    if not after:
        assert talk.messages == before
        assert say(talk, "the cat")[0].reused_tokens == result.prompt_tokens - 2  # what was fed is kept
        return
    assert talk.messages == [*before, user("the cat"), assistant(result.text)]
    assert result.new_tokens == 4
    assert say(talk, "and")[0].reused_tokens == result.prompt_tokens + 4


def test_an_open_answer_ends_when_the_conversation_goes_on(talk: Conversation, tmp_path: Path) -> None:
    answer = talk.ask(HELLO)
    text = next(answer)
    second = talk.ask("the cat").result()
    assert talk.messages == [system(), user(HELLO), assistant(text), user("the cat"), assistant(second.text)]
    assert list(answer) == []
    answer.close()
    assert len(talk.messages) == 5
    answer = talk.ask("and")
    next(answer)
    assert talk.save_state(tmp_path / "talk.state") > second.prompt_tokens
    assert len(talk.messages) == 7
    answer = talk.ask("and")
    next(answer)
    talk.reset()
    answer.close()
    assert talk.messages == [system()]
    answer = talk.ask("and")
    next(answer)
    talk.load_state(tmp_path / "talk.state")
    answer.close()
    assert len(talk.messages) == 7
    answer = talk.ask("and")
    text = next(answer)
    talk.close()
    assert talk.messages[-1] == assistant(text)
    assert list(answer) == []


def test_a_stop_string_is_not_in_what_follows(talk: Conversation, plain: Generator) -> None:
    whole = plain.generate(plain.encode_chat([system(), user(HELLO)]), 12).text
    stop = whole[5:8]
    talk.options = replace(SHORT, stop=(stop,))
    first = say(talk, HELLO)[0]
    assert (first.finish_reason, first.text) == ("stop", whole[: whole.index(stop)])
    second = say(talk, "the cat")[0]
    ids = plain.encode_chat([system(), user(HELLO), assistant(first.text), user("the cat")])
    assert second.prompt_tokens == len(ids)
    assert second.token_ids == plain.generate(ids, 12, stop=(stop,)).token_ids


def test_a_full_context_drops_the_oldest_turns_and_keeps_the_system_prompt(
    talk: Conversation, plain: Generator
) -> None:
    talk.options = GenerationOptions(max_new_tokens=CONTEXT)
    first = say(talk, HELLO)[0]
    assert (first.finish_reason, first.prompt_tokens + first.new_tokens) == ("length", CONTEXT + 1)
    answer = talk.ask("the cat")
    assert (answer.dropped_messages, talk.dropped_messages) == (2, 0)
    result = answer.result()
    expected = plain.encode_chat([system(), user("the cat")])
    assert result.prompt_tokens == len(expected)
    assert result.token_ids == plain.generate(expected, CONTEXT).token_ids
    assert talk.messages == [system(), user("the cat"), assistant(result.text)]
    assert talk.dropped_messages == 2
    talk.reset()
    assert talk.dropped_messages == 0


def test_as_many_whole_turns_are_dropped_as_leave_half_of_the_context(talk: Conversation) -> None:
    """A turn is all that follows a question, such as tool calls; the last turn stays, and there is room to answer."""
    turns: list[list[dict[str, str]]] = []
    while not talk.dropped_messages:
        number = len(turns)
        new = [user(f"question {number}")]
        if number % 2:
            new += [assistant("clock()"), {"role": "tool", "content": "noon"}]
        answer = talk.ask(new)
        before = talk.messages[1:]
        result = answer.result()
        turns.append([*new, assistant(result.text)])
        if talk.dropped_messages:
            kept = talk.messages[1:]
            assert kept == [*chain(*turns)][answer.dropped_messages :]
            assert kept[0] in (turn[0] for turn in turns)
            lengths = [len(talk.generator.encode_chat([system(), *before[start:], *new])) for start in (0, 2)]
            assert lengths[0] + talk.options.max_new_tokens > CONTEXT
            assert result.prompt_tokens <= CONTEXT // 2
            one_more = [*chain(*turns)][answer.dropped_messages - len(turns[0]) : -1]
            assert len(talk.generator.encode_chat([system(), *one_more])) > CONTEXT // 2 - 20
        else:
            assert result.prompt_tokens + talk.options.max_new_tokens <= CONTEXT + 1
    assert len(turns) > 4
    after = say(talk, "again")[0]
    assert after.reused_tokens > CONTEXT // 4  # what was kept has been fed, and is cached


def test_what_is_left_unanswered_drops_nothing(talk: Conversation) -> None:
    talk.options = GenerationOptions(max_new_tokens=CONTEXT)
    say(talk, HELLO)
    before = list(talk.messages)
    talk.ask("the cat").close()
    assert (talk.messages, talk.dropped_messages) == (before, 0)


def test_a_question_may_fill_the_context_exactly(talk: Conversation) -> None:
    room = CONTEXT - talk.ask("q").prompt_tokens
    refusing(talk, "q" * (room + 2), f"has {CONTEXT + 1} tokens")
    result = say(talk, "q" * (room + 1))[0]
    assert (result.prompt_tokens, result.new_tokens, result.finish_reason) == (CONTEXT, 1, "length")


def test_a_saved_conversation_goes_on_elsewhere(
    chatty: Path, tmp_path: Path, talk: Conversation, plain: Generator
) -> None:
    path = tmp_path / "talk.state"
    first = say(talk, HELLO, "the cat")[-1]
    known = first.prompt_tokens + first.new_tokens
    assert talk.save_state(path) == known - 1
    expected = say(talk, "and the dog", "again")
    elsewhere = Generator.open(chatty, threads=1)
    elsewhere.template = plain.template
    other = Conversation(elsewhere, system="another", options=SHORT)
    say(other, "something else")
    other.load_state(str(path))
    assert other.messages == talk.messages[:5]
    found = say(other, "and the dog", "again")
    assert [result.token_ids for result in found] == [result.token_ids for result in expected]
    assert found[0].reused_tokens == known - 1
    assert other.messages == talk.messages


def test_there_is_nothing_to_save_without_an_answer(talk: Conversation, tmp_path: Path, plain: Generator) -> None:
    with pytest.raises(PromptError, match="there is nothing to save yet: ask something first"):
        talk.save_state(tmp_path / "talk.state")
    forgetful = Conversation(plain, options=SHORT)
    say(forgetful, HELLO)
    with pytest.raises(PromptError, match="raise --prefix-cache-mib"):
        forgetful.save_state(tmp_path / "talk.state")
    say(talk, HELLO)
    with pytest.raises(SatchelError, match=r"/save .*nowhere.talk: there is no folder"):
        talk.save_state(tmp_path / "nowhere" / "talk", option="/save")
    assert list(tmp_path.iterdir()) == []


Change = Callable[[SavedState], SavedState]


def details(**changes: object) -> Change:
    return lambda state: replace(state, details={**state.details, **changes})


WRONG: list[tuple[Change, str]] = [
    (lambda state: replace(state, messages=(), details={}), "does not hold a conversation"),
    (lambda state: replace(state, messages=()), "does not hold a conversation"),
    (details(text=3), "does not hold a conversation"),
    (details(token_ids="abc"), "does not hold a conversation"),
    (details(token_ids=[]), r"its conversation is wrong \(the prompt has no tokens"),
    (details(token_ids=[[1], [1, 2]]), r"its conversation is wrong \(token ids must be whole numbers"),
    (details(token_ids=[5, True]), r"its conversation is wrong \(token ids must be whole numbers"),
    (details(token_ids=[5, 2**70]), r"its conversation is wrong \(token id 1180591620717411303424 is outside"),
    (details(token_ids=[5, -1]), r"its conversation is wrong \(token id -1 is outside the vocabulary"),
    (lambda state: replace(state, messages=({},)), r"its conversation is wrong \(messages\[0\].role: must be a text"),
]


@pytest.mark.parametrize(("change", "message"), WRONG)
def test_a_state_without_a_conversation_is_refused_and_this_one_stays(
    talk: Conversation, tmp_path: Path, change: Change, message: str
) -> None:
    path = tmp_path / "talk.state"
    say(talk, HELLO)
    talk.save_state(path)
    engine = talk.generator.engine
    saved = talk.generator.load_state(path)
    write_state(path, engine.bundle.fingerprint, change(saved))
    talk.reset("another")
    first = say(talk, "the cat")[0]
    before = list(talk.messages), talk._ids.tolist()
    kept = [prefix.ids.tolist() for prefix in talk.generator.prefix_cache._prefixes]
    with pytest.raises(PromptError, match=rf"^{path}: {message}") as failure:
        talk.load_state(path)
    assert "\n" not in str(failure.value)
    assert (talk.messages, talk._ids.tolist()) == before
    assert [prefix.ids.tolist() for prefix in talk.generator.prefix_cache._prefixes] == kept
    assert say(talk, "and")[0].reused_tokens == first.prompt_tokens + first.new_tokens - 1


def test_a_bundle_without_a_template_or_a_tokenizer_cannot_talk(tmp_path: Path) -> None:
    silent = Generator.open(write_chat_bundle(tmp_path / "silent", template=None), threads=1)
    with pytest.raises(BundleError, match="has no chat template"):
        Conversation(silent)
    bare = Generator.open(write_bundle(tmp_path / "bare", tokenizer_kind=None), threads=1)
    bare.template = ChatTemplate("{{ messages }}")
    with pytest.raises(PromptError, match="this bundle has no tokenizer"):
        Conversation(bare)
    silent.template = ChatTemplate("{% if %}")
    with pytest.raises(PromptError, match="the chat template cannot be read"):
        Conversation(silent)


def test_conversations_that_share_a_generator_do_not_meet(generator: Generator, plain: Generator) -> None:
    def talks(owner: Generator, seed: int) -> list[tuple[int, ...]]:
        talk = Conversation(owner, system=f"you are {seed}", options=replace(SHORT, temperature=1.0, seed=seed))
        return [result.token_ids for result in say(talk, HELLO, "the cat", "and")]

    alone = [talks(plain, seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: talks(generator, seed), range(4)))
    assert together == alone


def test_threads_that_share_a_generator_share_one_template(chatty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Generator.open(chatty, threads=1)
    begin, opened = threading.Barrier(4), []
    original = ChatTemplate.open

    def slow(*arguments: Any) -> ChatTemplate:
        opened.append(1)
        threading.Event().wait(0.05)
        return original(*arguments)

    monkeypatch.setattr(ChatTemplate, "open", slow)

    def template() -> ChatTemplate:
        begin.wait()
        return shared.template

    with ThreadPoolExecutor(4) as pool:
        found = [future.result() for future in [pool.submit(template) for _ in range(4)]]
    assert len(opened) == 1
    assert len({id(one) for one in found}) == 1


def options_of(folder: Path, config: Any, given: dict[str, Any] | None = None) -> GenerationOptions:
    return checkpoint_options(Generator.open(write_chat_bundle(folder, generation_config=config), threads=1), given)


def test_options_start_from_the_checkpoint_and_what_is_given_counts_more(tmp_path: Path) -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2, "max_length": 20}
    sampling = {"temperature": 0.6, "top_k": 50, "top_p": 0.9}
    assert options_of(tmp_path / "a", config) == GenerationOptions(**CHAT_DEFAULTS, **sampling)
    given = {"temperature": 0.2, "top_k": 7, "seed": 3, "max_new_tokens": 5, "stop": ("x",), "logprobs": 2}
    assert options_of(tmp_path / "b", config, given) == GenerationOptions(**{**CHAT_DEFAULTS, **sampling, **given})
    assert options_of(tmp_path / "c", config, {"temperature": 0}) == GenerationOptions(**CHAT_DEFAULTS)
    assert options_of(tmp_path / "d", None) == GenerationOptions(**CHAT_DEFAULTS)
    given = {"max_repeats": 0, "max_new_tokens": 9}
    assert options_of(tmp_path / "e", {}, given) == GenerationOptions(max_new_tokens=9)


def test_a_conversation_without_options_takes_the_checkpoints(tmp_path: Path, plain: Generator) -> None:
    config = {"do_sample": False, "repetition_penalty": 1.7}
    generator = Generator.open(write_chat_bundle(tmp_path / "own", generation_config=config), threads=1)
    generator.template = plain.template
    result = say(Conversation(generator), HELLO)[0]
    ids = plain.encode_chat([user(HELLO)])
    assert result.token_ids == plain.generate(ids, CONTEXT, repetition_penalty=1.7).token_ids


@pytest.mark.parametrize("config", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_a_generation_config_that_is_none_is_refused(tmp_path: Path, config: bytes) -> None:
    with pytest.raises(BundleError, match=r"generation_config.json: "):
        options_of(tmp_path / "wrong", config)
