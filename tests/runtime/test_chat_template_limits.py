"""Templates that attack end with one line within the limits, the next rendering works, and no process stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.chat_templates import TURNS

from satchel.runtime.errors import PromptError
from satchel.runtime.generation.templates import render_process
from satchel.runtime.generation.templates.chat_template import ChatTemplate
from satchel.runtime.generation.templates.limits import OUTPUT_BYTES
from satchel.runtime.generation.templates.render_process import TemplateProcess

SLOW, BIG, MEMORY = "took longer than 2 s: ", "gives more than 1 MB of text: ", "needs more than 512 MiB of memory: "
FORBIDDEN = "does what the sandbox forbids at line 1: "
FOREVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(x=[0]) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"
NESTING = "{% set ns = namespace(x=[]) %}{% for i in range(9999) %}{% set ns.x = [ns.x] %}{% endfor %}"

ATTACKS = {
    "huge range": ("{% for i in range(10**12) %}{% endfor %}", "fails at line 1: OverflowError: Range too big"),
    "nested loops": (FOREVER, SLOW),
    "many words": ("{{ lipsum(n=10**6) }}", SLOW),
    "scan for tags": ("{{ (messages[0].role ~ '<!-- <' * 10**6) | striptags }}" * 9, f"({SLOW}|{BIG})"),
    "wrapping": ("{{ (messages[0].content * 10**7) | wordwrap(2) | urlize | length }}", f"({SLOW}|{MEMORY})"),
    "long string": ("{{ 'a' * 10**9 }}", MEMORY),
    "long format": ("{{ '{:>999999999}'.format(1) }}", MEMORY),
    "growing list": (DOUBLING, MEMORY),
    "output just above": (f"{{{{ 'a' * {OUTPUT_BYTES} }}}}b", BIG),
    "output of wide characters": (f"{{{{ '\U0001f642' * {OUTPUT_BYTES // 4} }}}}b", BIG),
    "output in small pieces": ("{% for i in range(99999) %}{{ i }} and more{% endfor %}", BIG),
    "macro of itself": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "fails at line 1: RecursionError"),
    "nested list": (NESTING + "{{ ns.x | tojson }}", "fails at line 1: RecursionError"),
    "classes": ("{{ ''.__class__.__mro__ }}", FORBIDDEN + "access to '__class__' of a str"),
    "printed class": ("{{ messages.__class__ }}", FORBIDDEN + "access to '__class__' of a list"),
    "change of the messages": ("{{ messages.append(1) }}", FORBIDDEN + "access to 'append' of a list"),
    "globals": ("{{ cycler.__init__.__globals__ }}", FORBIDDEN + "access to '__init__'"),
    "format": ("{{ '{0.__class__}'.format(1) }}", FORBIDDEN + "access to '__class__' of a int"),
    "format by a filter": ("{{ ('{0.__class__}' | attr('format'))(1) }}", FORBIDDEN),
    "format map": ("{{ '{a.__class__}'.format_map({'a': 1}) }}", FORBIDDEN),
    "attribute by a filter": ("{{ [1] | map(attribute='__class__') | list }}", FORBIDDEN),
    "item": ("{{ ''['__class__'] }}", FORBIDDEN),
    "namespace": ("{% set ns = namespace(__class__=1) %}", FORBIDDEN + "a namespace with the name '__class__'"),
    "namespace later": ("{% set ns = namespace() %}{% set ns.__call__ = 1 %}", FORBIDDEN),
    "file through a codec": ("{{ 'a'.encode('idna') }}", "fails at line 1: OSError"),
}  # fmt: skip

COMPILED = {
    "power at compile time": ("{{ 10 ** (10 ** 10) }}", SLOW),
    "wrapping at compile time": ("{{ ('x ' * 10**7) | wordwrap(2) | urlize | length }}", f"({SLOW}|{MEMORY})"),
    "nested brackets": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "cannot be read: RecursionError"),
    "nested blocks": ("{% for a in messages %}" * 25 + "{% endfor %}" * 25, "cannot be read: SyntaxError"),
}


def ended(pid: int, seconds: float = 10.0) -> bool:
    """Whether a process is gone, or becomes so in time; one that waits for its parent to take note is gone, too."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


def pid_of(template: ChatTemplate) -> int:
    template.start()
    assert "default" in template._processes
    return template._processes["default"]._child.pid


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)


SAME_LIMITS = ("many words", "scan for tags", "wrapping", "growing list")
"""Attacks that run into the limits of others, after seconds."""


@pytest.mark.parametrize(
    "attack", [pytest.param(name, marks=pytest.mark.slow if name in SAME_LIMITS else ()) for name in ATTACKS]
)
def test_an_attack_ends_with_one_line_and_the_template_renders_again(attack: str) -> None:
    source, message = ATTACKS[attack]
    with ChatTemplate("{% if messages[0].content == 'attack' %}" + source + "{% else %}well{% endif %}") as template:
        template.start()
        with pytest.raises(PromptError, match=f"^the chat template {message}") as caught:
            template.render([{"role": "user", "content": "attack"}])
        assert "\n" not in str(caught.value)
        assert template.render(TURNS) == "well"


@pytest.mark.parametrize("attack", COMPILED)
def test_an_attack_on_the_compiler_ends_with_one_line(attack: str) -> None:
    source, message = COMPILED[attack]
    with ChatTemplate(source) as template, ChatTemplate("well") as other:
        with pytest.raises(PromptError, match=f"^the chat template {message}") as caught:
            template.render(TURNS)
        assert "\n" not in str(caught.value)
        assert other.render(TURNS) == "well"


def test_a_text_of_just_the_allowed_size_is_rendered_whole() -> None:
    with ChatTemplate(f"{{{{ '\x01' * {OUTPUT_BYTES} }}}}") as template:
        assert template.render(TURNS) == "\x01" * OUTPUT_BYTES


def test_messages_of_many_megabytes_arrive() -> None:
    with ChatTemplate("{{ messages[0].content | length }}") as template:
        assert template.render([{"role": "user", "content": "a" * 5_000_000}]) == "5000000"


def test_a_child_that_was_slow_big_or_killed_is_replaced_and_leaves_no_zombie() -> None:
    attacks = {"slow": FOREVER, "memory": DOUBLING, "size": f"{{{{ 'ab' * {OUTPUT_BYTES} }}}}"}
    cases = "".join(f"{{% if messages[0].content == '{name}' %}}{attacks[name]}{{% endif %}}" for name in attacks)
    children = []
    with ChatTemplate(cases + "well") as template:
        for name in attacks:
            children.append(pid_of(template))
            with pytest.raises(PromptError):
                template.render([{"role": "user", "content": name}])
            assert not Path(f"/proc/{children[-1]}").exists()
        children.append(pid_of(template))
        os.kill(children[-1], signal.SIGKILL)
        assert ended(children[-1])
        assert template.render(TURNS) == "well"
        children.append(pid_of(template))
    assert len(set(children)) == 5
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_a_child_that_dies_while_it_renders_is_an_error() -> None:
    with ChatTemplate(FOREVER) as template:
        killer = threading.Timer(0.3, os.kill, (pid_of(template), signal.SIGKILL))
        killer.start()
        with pytest.raises(PromptError, match=r"ended the process that renders it \(signal 9\): .*--chat-template"):
            template.render(TURNS)
        killer.join()


def test_an_interrupted_rendering_does_not_answer_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with ChatTemplate("{{ messages[0].content }}") as template:
        first = pid_of(template)
        with monkeypatch.context() as patch:
            patch.setattr(TemplateProcess, "_receive", interrupted)
            with pytest.raises(KeyboardInterrupt):
                template.render([{"role": "user", "content": "one"}])
        assert template.render([{"role": "user", "content": "two"}]) == "two"
        assert ended(first)


def test_threads_share_a_template_and_each_gets_its_own_text() -> None:
    contents = [f"text {number}" for number in range(200)]
    with ChatTemplate("{{ messages[0].content }}") as template, ThreadPoolExecutor(4) as pool:
        rendered = pool.map(lambda content: template.render([{"role": "user", "content": content}]), contents)
        assert list(rendered) == contents


def test_a_process_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_process, "_WORKER", "satchel.runtime.generation.templates.nothing")
    with pytest.raises(
        PromptError, match=r"does not start: find out why with `.* -m satchel\.runtime\.generation\.templates\.nothing`"
    ):
        ChatTemplate("").render(TURNS)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(PromptError, match=r"no process can be started to render .* \(No such file or directory\)"):
        ChatTemplate("").render(TURNS)


def test_the_child_takes_no_module_from_the_current_folder_and_gets_no_secrets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jinja2.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setenv("SOME_TOKEN", "secret")
    with ChatTemplate("fine") as template:
        assert template.render(TURNS) == "fine"
        assert b"secret" not in Path(f"/proc/{pid_of(template)}/environ").read_bytes()


def test_the_child_ends_with_the_program_that_uses_it() -> None:
    for last_line in ("", "os._exit(0)", "os.kill(os.getpid(), signal.SIGKILL)"):
        code = f"""
import os, signal
from satchel.runtime.generation.templates.chat_template import ChatTemplate
template = ChatTemplate("x")
template.start()
print(template._processes["default"]._child.pid, flush=True)
{last_line}
"""
        done = run_python(code)
        assert done.stderr == ""
        assert ended(int(done.stdout))


def test_a_fork_renders_with_a_child_of_its_own() -> None:
    code = """
import os
from satchel.runtime.generation.templates.chat_template import ChatTemplate
template = ChatTemplate("{{ messages[0].content }}")
def render(text):
    return template.render([{"role": "user", "content": text}])
render("before")
first = template._processes["default"]._child.pid
forked = os.fork()
if not forked:
    os._exit(0 if render("there") == "there" and template._processes["default"]._child.pid != first else 1)
assert os.waitpid(forked, 0)[1] == 0
assert render("here") == "here" and template._processes["default"]._child.pid == first
"""
    done = run_python(code)
    assert (done.returncode, done.stderr) == (0, "")


def test_what_prints_in_the_child_does_not_mix_with_its_replies() -> None:
    code = """
import os
from jinja2.filters import FILTERS
from satchel.runtime.generation.templates import render_worker
FILTERS["noisy"] = lambda text: (print("noise"), os.write(1, b"noise"), text)[2]
render_worker.main()
"""
    requests = [{"template": "{{ messages | noisy }}"}, {"variables": {"messages": "hello"}}]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == [{"ready": True}] * 2 + [{"text": "hello"}]


def test_a_child_without_a_parent_to_stop_it_runs_out_of_processor_time() -> None:
    code = "from satchel.runtime.generation.templates import render_worker as w; w._CPU_SECONDS = 0; w.main()"
    requests = [{"template": FOREVER}, {"variables": {}}]
    lines = "".join(json.dumps(request) + "\n" for request in requests)
    done = subprocess.run([sys.executable, "-c", code], input=lines, capture_output=True, text=True, timeout=30)
    assert done.returncode == -signal.SIGXCPU


def test_the_child_loads_little() -> None:
    worker = "satchel.runtime.generation.templates.render_worker"
    code = f"import sys, {worker}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = set(run_python(code).stdout.split())
    assert "jinja2" in loaded
    assert loaded.isdisjoint(["numpy", "onnxruntime", "tokenizers", "sentencepiece", "subprocess"])
