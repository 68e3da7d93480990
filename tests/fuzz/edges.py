"""Values at the edge of something, from which mutants are made."""

from __future__ import annotations

TEXTS = (
    "", " ", ".", "..", "../outside/secret", "/etc/passwd", "weights.bin", "manifest.json", "signature.json",
    "prefill.onnx", "tokenizer.json", "a/b", "C:\\x", "\x00", "\x1b[2J", "\ud800", 'x' * 5000, '\'"<&>', "int8",
    "float32", "null", "猫", "%s%n",
)  # fmt: skip

NUMBERS = (
    0, 1, -1, 2, 7, 63, 64, 255, 256, 399, 400, 401, 65535, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32,
    (1 << 63) - 1, 1 << 63, 1 << 64, 10 ** 30, -(1 << 63), 0.5, -0.0, 1e+308, 1e-320,
)  # fmt: skip

TEMPLATE_PARTS = (
    "{{ messages }}", "{% for m in messages %}", "{% endfor %}", "{{ ''.__class__.__mro__ }}", "{% if true %}",
    "{% endif %}", "{{ range(1000000000) | list }}", "{{ 'a' * 1000000000 }}", "{{ messages[0].content }}",
    "{% include 'x' %}", "{{ 1/0 }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ raise_exception('no') }}", "{% set x = namespace() %}", "{{", "%}",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/x') }}", "{% generation %}", "{% raw %}",
    "{{ 9 ** 9 ** 9 }}", "{{ self._TemplateReference__context }}", "{{ lipsum.__globals__ }}", "\x00", "\x1b[2J",
    "{% for i in range(99999999) %}x", "{{ strftime_now('%Y' * 1000) }}", "{{ messages | tojson(indent=10**9) }}",
    "{{ 'x' | center(10**10) }}", "{# ",
)  # fmt: skip

LOCATIONS = (
    "/etc/passwd", "../outside/secret", "outside/secret", "manifest.json", "tokenizer.json", "prefill.onnx",
    "./weights.bin", "weights.bin/", "", "*/_ORT_MEM_ADDR_/*", "weights.bin\x00", "nowhere", "../bundle/weights.bin",
)  # fmt: skip
