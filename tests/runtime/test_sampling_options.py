"""Sampling options: what is refused and how, and the same options from flags, JSON and generation_config.json."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from satchel.runtime.errors import PromptError, SatchelWarning
from satchel.runtime.generation.generation_config import stored_options
from satchel.runtime.generation.sampling.options import (
    SamplingOptions,
    add_flags,
    from_mapping,
    given_in,
)
from satchel.runtime.generation.sampling.table import OPTIONS

INF, NAN = math.inf, math.nan

WRONG = [
    *[("temperature", value, "must be finite, 0 or more") for value in (-0.1, INF, -INF, NAN)],
    *[("top_k", value, "must be 0 or more") for value in (-1, -(10**400))],
    *[("top_p", value, "must be above 0 and at most 1") for value in (0, -0.5, 1.5, INF, NAN)],
    *[("min_p", value, "must be at least 0 and at most 1") for value in (-0.1, 1.1, NAN)],
    *[("typical_p", value, "must be above 0 and at most 1") for value in (0.0, 1.01, NAN)],
    *[("repetition_penalty", value, "must be finite and above 0") for value in (0, -1.0, INF, NAN, 10**400)],
    *[("presence_penalty", value, "must be at least -2 and at most 2") for value in (-2.1, 2.1, INF, NAN)],
    *[("frequency_penalty", value, "must be at least -2 and at most 2") for value in (-3, 3, -INF, NAN)],
    ("no_repeat_ngram_size", -1, "must be 0 or more"),
    ("min_new_tokens", -1, "must be 0 or more"),
    ("seed", -1, "must be 0 or more"),
]

# The outermost values that are allowed.
ALLOWED: list[tuple[str, Any]] = [
    ("temperature", 0),
    ("temperature", np.float32(1.5)),
    ("top_k", 10**400),
    ("top_p", 1),
    ("top_p", 1e-9),
    ("min_p", 1.0),
    ("typical_p", 1),
    ("repetition_penalty", 0.01),
    ("presence_penalty", -2),
    ("frequency_penalty", 2),
    ("no_repeat_ngram_size", np.int64(3)),
    ("min_new_tokens", 0),
    ("seed", 0),
    ("seed", 2**70),
    ("seed", None),
    ("logit_bias", {0: -INF, 9: 1e300}),
]

GIVEN: dict[str, Any] = {
    "temperature": 0.7,
    "top_k": 40,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.95,
    "top_h": 0.4,
    "epsilon_cutoff": 0.001,
    "eta_cutoff": 0.002,
    "repetition_penalty": 1.1,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.25,
    "no_repeat_ngram_size": 3,
    "logit_bias": {5: -INF, 7: 1.5},
    "min_new_tokens": 2,
    "min_length": 4,
    "suppress_tokens": (5, 6),
    "begin_suppress_tokens": (7,),
    "bad_words_ids": ((8,), (9, 10)),
    "sequence_bias": (((3, 4), -1.5),),
    "forced_bos_token_id": 1,
    "forced_eos_token_id": (2,),
    "exponential_decay_length_penalty": (3, 1.25),
    "renormalize_logits": True,
    "remove_invalid_values": False,
    "seed": 11,
}


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return parser.parse_args(arguments)


def flag(field: str) -> str:
    return "--" + field.replace("_", "-")


def options(field: str, value: object) -> SamplingOptions:
    """Options that draw, so that nothing contradicts, with one other field."""
    values: dict[str, Any] = {"temperature": 1.0, field: value}
    return SamplingOptions(**values)


def test_the_table_has_every_field_and_no_other() -> None:
    assert [option.field for option in OPTIONS] == [field.name for field in dataclasses.fields(SamplingOptions)]


def test_the_defaults_are_greedy_change_nothing_and_are_accepted() -> None:
    defaults = SamplingOptions()
    assert defaults.greedy
    assert not any(defaults.differs(option.field) for option in OPTIONS)
    defaults.check(max_new_tokens=0, vocabulary=1)


def test_options_cannot_be_changed_not_even_through_their_bias() -> None:
    bias = {3: 1.0}
    made = SamplingOptions(logit_bias=bias)
    bias[3] = 2.0
    assert made.logit_bias == {3: 1.0}
    with pytest.raises(TypeError):
        made.logit_bias[3] = 2.0  # type: ignore[index]
    assert made == SamplingOptions(logit_bias={3: 1.0}) != SamplingOptions(logit_bias={3: 2.0})
    assert hash(made) == hash(SamplingOptions(logit_bias={3: 1.0}))


@pytest.mark.parametrize(("field", "value", "rule"), WRONG)
def test_a_value_out_of_range_is_refused_by_flag_and_by_key(field: str, value: float, rule: str) -> None:
    shown = str(value)[:57]
    with pytest.raises(PromptError, match=f"^{flag(field)} {re.escape(shown)}.*: {rule}$"):
        options(field, value).check()
    with pytest.raises(PromptError, match=f"^line 7: {field} {re.escape(shown)}.*: {rule}$"):
        options(field, value).check(where="line 7")
    with pytest.raises(PromptError, match=f"^line 7: {field} {re.escape(shown)}.*: {rule}$"):
        from_mapping({field: value}, "line 7")


@pytest.mark.parametrize(("field", "value"), ALLOWED)
def test_the_outermost_allowed_values_are_accepted(field: str, value: Any) -> None:
    options(field, value).check(max_new_tokens=5, vocabulary=10)


@pytest.mark.parametrize(
    "option", [option for option in OPTIONS if option.kind in (int, float, dict)], ids=lambda option: option.field
)
def test_what_is_no_number_is_refused(option: Any) -> None:
    for value in (True, "1", None, [1]):
        wrong = {5: value} if option.kind is dict else value
        if not (option.field == "seed" and value is None):
            with pytest.raises(PromptError, match=f"^{option.flag} .*: must be a (whole )?number$"):
                options(option.field, wrong).check()
        wrong_json: object = {"5": value} if option.kind is dict else value
        with pytest.raises(PromptError, match=f"^line 7: {option.field} .*: must be a (whole )?number$"):
            from_mapping({option.field: wrong_json}, "line 7")


@pytest.mark.parametrize("field", ["top_k", "no_repeat_ngram_size", "min_new_tokens", "seed"])
def test_a_count_is_a_whole_number(field: str) -> None:
    with pytest.raises(PromptError, match=f"^{flag(field)} 2.0: must be a whole number$"):
        options(field, 2.0).check()
    with pytest.raises(PromptError, match=f"^row 1: {field} 2.0: must be a whole number$"):
        from_mapping({field: 2.0}, "row 1")


@pytest.mark.parametrize(
    ("field", "value"), [("top_k", 40), ("top_p", 0.9), ("min_p", 0.1), ("typical_p", 0.9), ("seed", 0)]
)
def test_what_shapes_the_draw_contradicts_a_temperature_of_0(field: str, value: Any) -> None:
    wrong = SamplingOptions(**{field: value})
    with pytest.raises(PromptError, match=f"^{flag(field)} {value}: .*temperature 0.* {flag(field)}$"):
        wrong.check()
    with pytest.raises(PromptError, match=f"^line 2: {field} {value}: .*temperature 0.* {field}$"):
        wrong.check(where="line 2")
    dataclasses.replace(wrong, temperature=0.1).check()


def test_more_new_tokens_at_least_than_at_most_contradict() -> None:
    wrong = SamplingOptions(min_new_tokens=6)
    wrong.check()
    wrong.check(max_new_tokens=6)
    with pytest.raises(PromptError, match=r"^--min-new-tokens 6: is more than --max-new-tokens 5"):
        wrong.check(max_new_tokens=5)
    with pytest.raises(PromptError, match=r"^line 3: min_new_tokens 6: is more than max_new_tokens 5: lower"):
        wrong.check(max_new_tokens=5, where="line 3")


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        ({10: 1.0}, "--logit-bias 10=1.0: outside the vocabulary: use ids from 0 to 9"),
        ({-1: 1.0}, "--logit-bias -1=1.0: a token id must be a whole number, 0 or more"),
        ({"5": 1.0}, "--logit-bias '5'=1.0: a token id must be a whole number, 0 or more"),
        ({True: 1.0}, "--logit-bias True=1.0: a token id must be a whole number, 0 or more"),
        ({5: INF}, "--logit-bias 5=inf: must be a finite number, or -inf for never"),
        ({5: NAN}, "--logit-bias 5=nan: must be a finite number, or -inf for never"),
        ({5: 10**400}, f"--logit-bias 5=1{'0' * 56}...: must be a finite number, or -inf for never"),
    ],
)
def test_a_wrong_bias_is_refused(bias: Any, message: str) -> None:
    with pytest.raises(PromptError) as error:
        SamplingOptions(logit_bias=bias).check(vocabulary=10)
    assert str(error.value) == message


def test_flags_give_what_was_given_and_nothing_else() -> None:
    assert given_in(parse()) == {}
    assert given_in(parse("--top-p", "0.9", "--temperature", "0")) == {"top_p": 0.9, "temperature": 0.0}
    switches = ["--renormalize-logits", "--no-remove-invalid-values"]
    values = {name: value for name, value in GIVEN.items() if not isinstance(value, bool | dict)}
    arguments = [*switches, *(f"{flag(name)}={json.dumps(value)}" for name, value in values.items())]
    found = given_in(parse(*arguments, "--logit-bias", "5=-inf", "--logit-bias", "7=1.5"))
    assert found == GIVEN
    assert [type(value) for value in found.values()] == [type(GIVEN[name]) for name in found]


def test_json_gives_the_same_as_flags() -> None:
    row = json.loads(json.dumps(GIVEN))
    assert from_mapping(row, "line 1") == GIVEN
    assert from_mapping({}, "line 1") == {}
    whole = from_mapping({"temperature": 1, "logit_bias": {"3": 2}}, "line 1")
    assert whole == {"temperature": 1.0, "logit_bias": {3: 2.0}}
    assert type(whole["temperature"]) is type(whole["logit_bias"][3]) is float


@pytest.mark.parametrize("wrong", ["5", "x=1", "5=", "=1", "5=x", "5:1"])
def test_a_bias_flag_of_another_form_is_refused(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse("--logit-bias", wrong)
    assert f"argument --logit-bias: '{wrong}' must be ID=BIAS, such as 50256=-inf" in capsys.readouterr().err


def test_two_biases_of_one_token_contradict() -> None:
    assert given_in(parse("--logit-bias", "5=1", "--logit-bias", "5=1.0")) == {"logit_bias": {5: 1.0}}
    with pytest.raises(PromptError, match=r"^--logit-bias 5: the token has different biases: remove one$"):
        given_in(parse("--logit-bias", "5=1", "--logit-bias", "5=2"))
    assert SamplingOptions(**given_in(parse("--logit-bias", "5=nan"))).logit_bias.keys() == {5}


@pytest.mark.parametrize("key", ["x", "-1", "1.0", "", "05", " 5", "\u0665", "\u00b2", "9" * 5000])
def test_a_key_that_is_no_token_id_is_refused(key: str) -> None:
    with pytest.raises(PromptError, match=r"^line 4: logit_bias '.*: must be a token id, such as '50256'$"):
        from_mapping({"logit_bias": {key: 1}}, "line 4")


def test_json_of_another_shape_is_refused() -> None:
    with pytest.raises(PromptError, match=r"^line 4: unknown key 'top-p': the sampling options are temperature, "):
        from_mapping({"top-p": 0.9}, "line 4")
    with pytest.raises(PromptError, match=r"^line 4: logit_bias \[\]: must be an object of token ids and numbers$"):
        from_mapping({"logit_bias": []}, "line 4")
    with pytest.raises(PromptError, match=r"^line 4: logit_bias 5=inf: must be a finite number, or -inf for never$"):
        from_mapping({"logit_bias": {"5": INF}}, "line 4")
    with pytest.raises(PromptError, match=r"^line 4: top_k of thousands of digits: must be 0 or more$"):
        from_mapping({"top_k": -(10**9000)}, "line 4")


def stored(document: dict[str, Any]) -> SamplingOptions:
    return SamplingOptions(**stored_options(document, {}))


def test_a_checkpoint_that_samples_gets_the_defaults_of_transformers() -> None:
    assert stored({"do_sample": True}) == SamplingOptions(temperature=1.0, top_k=50)
    asked = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1, "typical_p": 0.9}
    expected = {key: value for key, value in asked.items() if key != "do_sample"}
    penalties = {"repetition_penalty": 1.05, "no_repeat_ngram_size": 3}
    found = stored(asked | penalties | {"eos_token_id": [1, 2], "max_length": 20})
    assert found == SamplingOptions(**expected, repetition_penalty=1.05, no_repeat_ngram_size=3)
    found.check()
    assert stored({"do_sample": True, "top_k": 0}).top_k == 0
    assert stored({"do_sample": True, "top_k": None, "top_p": None}).top_k == 50


@pytest.mark.parametrize("do_sample", [{}, {"do_sample": False}, {"do_sample": None}])
def test_a_checkpoint_that_does_not_sample_is_greedy_with_its_penalties(do_sample: dict[str, Any]) -> None:
    ignored = {"temperature": 0.0, "top_p": 7, "top_k": 50}
    found = stored(do_sample | ignored | {"repetition_penalty": 1.2, "no_repeat_ngram_size": 2})
    assert found == SamplingOptions(repetition_penalty=1.2, no_repeat_ngram_size=2)
    found.check()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("do_sample", 1, "do_sample 1: must be true or false"),
        ("do_sample", "true", "do_sample 'true': must be true or false"),
        ("temperature", 0.0, "temperature 0: must be above 0 if do_sample is true"),
        ("temperature", -1, "temperature -1: must be finite, 0 or more"),
        ("top_p", 1.5, "top_p 1.5: must be above 0 and at most 1"),
        ("top_k", 20.0, "top_k 20.0: must be a whole number"),
        ("min_p", "0.1", "min_p '0.1': must be a number"),
        ("repetition_penalty", 0, "repetition_penalty 0: must be finite and above 0"),
        ("no_repeat_ngram_size", -1, "no_repeat_ngram_size -1: must be 0 or more"),
    ],
)
def test_a_generation_config_out_of_range_is_named_and_left_out(key: str, value: object, message: str) -> None:
    with pytest.warns(SatchelWarning) as warned:
        found = stored({"do_sample": True, key: value})
    assert [str(each.message).startswith(f"generation_config.json: {message}: give --") for each in warned] == [True]
    assert found == stored({} if key == "do_sample" else {"do_sample": True})


def test_asking_for_greedy_turns_off_what_a_checkpoint_draws_with() -> None:
    base = stored({"do_sample": True, "top_p": 0.9, "repetition_penalty": 1.1})
    assert base.updated({}) == base
    assert base.updated({"top_k": 5}) == dataclasses.replace(base, top_k=5)
    greedy = base.updated({"temperature": 0.0})
    assert greedy == SamplingOptions(repetition_penalty=1.1)
    greedy.check()
    with pytest.raises(PromptError, match=r"^--top-p 0.5: has no effect at temperature 0"):
        base.updated({"temperature": 0.0, "top_p": 0.5}).check()


def test_importing_the_options_loads_no_numpy() -> None:
    code = "import sys, satchel.runtime.generation.sampling.options; print('numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"
