"""Chat templates in the styles that checkpoints have, and conversations to render with them."""

from __future__ import annotations

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}

CHATML = """\
{%- if messages[0].role != 'system' -%}
<|im_start|>system
Be brief.<|im_end|>
{% endif -%}
{% for message in messages %}
{{ '<|im_start|>' ~ message['role'] }}
{{ message.content | trim }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}
    {% set rest = messages[1:] %}
    {% set system = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' %}
{% else %}
    {% set rest = messages %}
    {% set system = '' %}
{% endif %}
{% for message in rest %}
    {% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{ raise_exception('user and assistant must take turns') }}
    {% endif %}
    {% if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'].strip() + ' [/INST]' -}}
    {% else %}
        {{- ' ' + message['content'].strip() + ' ' + eos_token -}}
    {% endif %}
{% endfor %}
"""

LLAMA3 = """\
{{- bos_token }}
{%- set ns = namespace(system='', tools=tools or []) %}
{%- if messages[0].role == 'system' %}
    {%- set ns.system = messages[0].content %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{{- 'Today Date: ' + (date_string if date_string is defined else strftime_now('%d %b %Y')) + '\\n\\n' }}
{%- for tool in ns.tools %}{{ tool | tojson(indent=4) + '\\n\\n' }}{% endfor %}
{{- ns.system + '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n' }}
    {%- if message.tool_calls %}
        {%- set call = message.tool_calls[0].function %}
        {{- {'name': call.name, 'parameters': call.arguments} | tojson }}
    {%- elif message.content is string %}
        {{- message.content | trim }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

GENERATION = """\
{% for message in messages %}
{{ message.role }}:
{%- if message.role == 'assistant' %}
{% generation %}
{% set words = message.content.split() %}
 {{ words | join(' ') }}{{ eos_token }}
{% endgeneration %}
{% else %} {{ message.content }}
{% endif %}
{% endfor %}
"""

LOOPS = """\
{%- macro shown(value) %}{{ value | tojson(sort_keys=true, separators=(',', ':')) }}{% endmacro %}
{%- for message in messages %}
{%- if message.role == 'system' %}{% continue %}{% endif %}
{%- if loop.index > 3 %}{% break %}{% endif %}
[{{ loop.index0 }}/{{ loop.length }}] {{ shown(message) }} {{ message.content | tojson(ensure_ascii=true) }}
{%- endfor %}
{{ dict(a=1, b='<&>') | tojson }}{{ documents | length if documents else none }}{{ missing }}{{ unk_token }}
"""

TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "generation": GENERATION, "loops": LOOPS}

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": 'The weather in a <place> & its "surroundings"; grüße',
            "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
        },
    }
]

TURNS = [
    {"role": "user", "content": "  What is <b>2 + 2</b> & why?\n"},
    {"role": "assistant", "content": "It is 4.\n\nMore: 二たす二"},
    {"role": "user", "content": "Merci \U0001f642 </s>"},
]
CONVERSATIONS = {
    "one": TURNS[:1],
    "system": [{"role": "system", "content": "You are a {{ parrot }}."}, *TURNS],
    "turns": TURNS,
}
CALLS = [
    {
        "role": "user",
        "content": [{"type": "text", "text": "Rain?"}, {"type": "image"}, {"type": "text", "text": " Now."}],
    },
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {"place": "Zürich"}}}],
    },
    {"role": "tool", "content": "wet"},
]
