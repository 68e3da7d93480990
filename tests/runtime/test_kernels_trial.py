"""An instruction set that the processor announces is tried in a child process before it is used."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.kernels import needs_kernels

from satchel.runtime.bundle.hash_cache import cache_folder
from satchel.runtime.errors import SatchelError, SatchelWarning
from satchel.runtime.kernels import library, trial

COMPILER = shutil.which("gcc") or shutil.which("clang")
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]

STUB = """
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const char *const NAMES[] = {"fast", "middle", "slow", "plain"};

const char *satchel_announced_instruction_set(size_t i) { return i < 4 ? NAMES[i] : NULL; }
const char *satchel_choose_instruction_set(const char *name) { return name; }
void satchel_drain_helpers(void) {}

/* Notes each trial in the file TRIALS; "fast" is not there, and "middle" multiplies wrongly. */
bool satchel_try_instruction_set(const char *name)
{
    FILE *trials = fopen(getenv("TRIALS"), "a");
    fprintf(trials, "%s\\n", name);
    fclose(trials);
    if (strcmp(name, "fast") == 0)
        __asm__ volatile(ILLEGAL);
    return strcmp(name, "slow") == 0;
}
"""
FAKES = """
#include "trial.c"

#include "scratch.c"

const Instructions *instructions;

static int change;

static const char *write(const LinearParams *params, const LinearCall *call, const Parallel *parallel)
{
    (void)parallel;
    for (int64_t i = 0; i < call->rows * half_outputs(params); i++)
        call->y[i] = call->x[i % params->row.inputs];
    return NULL;
}

static const char *write_wrong(const LinearParams *params, const LinearCall *call, const Parallel *parallel)
{
    if (call->rows > 1 && params->bits == 4)
        change = 1;
    write(params, call, parallel);
    ((uint8_t *)call->y)[call->rows * half_outputs(params) * 4 - 4] ^= change;
    return NULL;
}

static const char *stop(const LinearParams *params, const LinearCall *call, const Parallel *parallel) { return "no"; }

/* Each thread's products are wrong in the end if another one multiplied meanwhile. */
static const char *mix(const LinearParams *params, const LinearCall *call, const Parallel *parallel)
{
    static volatile pthread_t running;
    running = pthread_self();
    for (volatile int i = 0; i < 100000; i++)
        ;
    write(params, call, parallel);
    ((uint8_t *)call->y)[0] ^= running != pthread_self();
    return NULL;
}

static const char *check(const AttentionCall *call, size_t *scratch)
{
    *scratch = 64;
    return NULL;
}

static const char *copy(const AttentionCall *call, void *scratch, const Parallel *parallel)
{
    memcpy(call->out, call->query, call->tokens * call->heads * call->head_dim * sizeof(float));
    return NULL;
}

static const char *copy_nearly(const AttentionCall *call, void *scratch, const Parallel *parallel)
{
    copy(call, scratch, parallel);
    call->out[call->tokens * call->heads * call->head_dim - 1] += 0.00005f;
    return NULL;
}

static const char *copy_wrong(const AttentionCall *call, void *scratch, const Parallel *parallel)
{
    copy(call, scratch, parallel);
    call->out[call->tokens * call->heads * call->head_dim - 1] = NAN;
    return NULL;
}

#define SET(set_name, set_linear, set_attention) \
    {.name = set_name, .linear = set_linear, .attention_check = check, .attention = set_attention}
static const Instructions SETS[] = {
    SET("plain", write, copy), SET("right", write, copy_nearly), SET("wrong", write_wrong, copy),
    SET("stops", stop, copy), SET("mixes", mix, copy), SET("attends wrongly", write, copy_wrong)};

const char *choose_instruction_set(const char *name)
{
    for (int i = 0; i < 6; i++)
        if (strcmp(name, SETS[i].name) == 0)
            return instructions = &SETS[i], name;
    return NULL;
}

bool satchel_try_instruction_set(const char *name) { return try_instruction_set(name); }
"""

needs_compiler = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs Linux and a C compiler")


@pytest.fixture
def trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library of four instruction sets, of which two do not work, in satchel's place; notes of its trials."""
    source, noted = tmp_path / "stub.c", tmp_path / "trials"
    source.write_text(STUB)
    illegal = "ud2" if os.uname().machine == "x86_64" else "udf #0"
    made = tmp_path / f"{library.NAME}{SUFFIX}"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", f'-DILLEGAL="{illegal}"', source, "-o", made], check=True)
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    monkeypatch.setenv("TRIALS", str(noted))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(library.SWITCH, raising=False)
    return noted


def another_process() -> None:
    """What a process finds is not known to the next one, but for what is in the cache."""
    library._is_right.cache_clear()


@needs_compiler
def test_the_next_set_is_used_and_said_why_in_one_line_each(trials: Path) -> None:
    with pytest.warns(SatchelWarning) as caught:
        assert library.instruction_set() == "slow"
    assert [("fast" in str(each.message), "middle" in str(each.message)) for each in caught] == [
        (True, False),
        (False, True),
    ]
    assert library.instruction_set() == "slow"  # and nothing is said again
    assert library.instruction_sets() == ("slow", "plain")
    assert trials.read_text().split() == ["fast", "middle", "slow"]


@needs_compiler
def test_the_answer_is_remembered_for_the_same_library_and_processor(
    trials: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for features in (("one",), ("one",), ("other",)):
        monkeypatch.setattr(trial, "processor_features", lambda features=features: features)
        another_process()
        with pytest.warns(SatchelWarning):
            library.instruction_set()
        found.append(len(trials.read_text().split()))
    os.utime(library._built() or "", (1, 1))
    another_process()
    with pytest.warns(SatchelWarning):
        library.instruction_set()
    assert [*found, len(trials.read_text().split())] == [3, 3, 6, 9]


@needs_compiler
@pytest.mark.parametrize("content", ["", "[1]", "{", None])
def test_a_damaged_cache_is_made_again(trials: Path, content: str | None) -> None:
    for _ in range(2):
        another_process()
        with pytest.warns(SatchelWarning):
            assert library.instruction_set() == "slow"
        kept = cache_folder() / "hashes.json"
        answers = json.loads(kept.read_text())
        assert sorted(answer for _, answer in answers.values()) == ["ended", "right", "wrong"]
        damaged = json.dumps({key: [identity, "?"] for key, (identity, _) in answers.items()})
        kept.write_text(damaged if content is None else content)
    assert len(trials.read_text().split()) == 6


@needs_compiler
def test_without_a_cache_each_process_tries(trials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        another_process()
        with pytest.warns(SatchelWarning):
            assert library.instruction_set() == "slow"
    assert len(trials.read_text().split()) == 6


@needs_compiler
@pytest.mark.parametrize("name", ["fast", "middle"])
@pytest.mark.usefixtures("trials")
def test_a_named_set_that_does_not_work_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(library.SWITCH, name)
    with pytest.warns(SatchelWarning), pytest.raises(SatchelError, match=f"{name}.*off, slow, plain"):
        library.instruction_set()


@needs_compiler
@pytest.mark.parametrize("program", ["", "/nowhere/python3", "/bin/true"])
def test_where_no_child_can_be_started_the_processor_is_believed(
    trials: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    monkeypatch.setattr(sys, "executable", program)
    assert library.instruction_set() == "fast"
    assert not trials.exists()
    assert not cache_folder().exists()


@needs_compiler
def test_one_wrong_bit_of_one_case_or_of_two_threads_is_found(tmp_path: Path) -> None:
    source, made = tmp_path / "fakes.c", tmp_path / "fakes.so"
    source.write_text(FAKES)
    kernels = Path(__file__).parents[2] / "runtime" / "kernels"
    subprocess.run([str(COMPILER), "-shared", "-fPIC", f"-I{kernels}", source, "-o", made], check=True)
    bad = ("wrong", "stops", "mixes", "attends wrongly", "missing")
    assert {name: trial._run_child(made, name) for name in ("right", *bad)} == {
        "right": trial.RIGHT, **dict.fromkeys(bad, trial.WRONG)
    }  # fmt: skip


@needs_kernels
def test_the_library_itself_is_right_and_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = library.library()
    assert path is not None
    for name in library.instruction_sets():
        begun = time.perf_counter()
        assert trial._run_child(path, name) == trial.RIGHT
        assert time.perf_counter() - begun < 10
    assert trial._run_child(path, "avx9") == trial.WRONG
