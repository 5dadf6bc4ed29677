#!/usr/bin/env python3
"""Writes templates.json: chat templates in the style of well-known families and what Jinja in Python makes of them.

Needs jinja2 (made with 3.1.6). The environment is the one transformers uses for chat templates.
"""

import datetime
import json
import pathlib

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

NOW = datetime.datetime(2024, 2, 29, 15, 4, 5)
NOW_UNIX = 1709219045


class Generation(Extension):
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def raise_exception(message):
    raise jinja2.exceptions.TemplateError(message)


def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


ENV = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)
ENV.filters["tojson"] = tojson
ENV.globals["raise_exception"] = raise_exception
ENV.globals["strftime_now"] = lambda form: NOW.strftime(form)

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\\nAnswer briefly.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{% generation %}
{{ message['content'] + '<|im_end|>' }}
{% endgeneration %}
{%- else %}
{{ message['content'] | trim + '<|im_end|>' }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\\n' }}
{% endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%d %b %Y") %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You may call these functions:\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("One tool call at a time, please!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", ' }}
        {{- '"parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}" }}
        {%- for arg_name, arg_val in tool_call.arguments | items %}
            {{- arg_name + '="' + arg_val | string + '"' }}
            {%- if not loop.last %}
                {{- ", " }}
            {%- endif %}
        {%- endfor %}
        {{- "<|eot_id|>" }}
    {%- elif message.role == "tool" or message.role == "ipython" %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace(index=0) %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or message.role == "tool_results") %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("After the optional system message, conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"].strip() + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, not " + message["role"] + "!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- else -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{{ '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
"""

QWEN = """{%- macro header(role) %}{{ '<|im_start|>' + role + '\\n' }}{% endmacro %}
{%- if tools %}
    {{- header('system') }}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- if message.role == 'user' %}
        {%- set ns.last = messages|length - 1 - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content %}
        {%- if content and '</think>' in content %}
            {%- if loop.index0 < ns.last %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {{- header('assistant') }}
        {{- content if content else '' }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' ~ (call.function.arguments | tojson) ~ '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role.startswith('tool') %}
        {%- if loop.first or loop.previtem.role != 'tool' %}{{- header('user') }}{% endif %}
        {{- '<tool_response>' + message['content'] + '</tool_response>' }}
        {%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- header(message.role) + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- header('assistant') }}{% endif %}
"""

PRINTS = """{{ none }} {{ true }} {{ false }} {{ missing }} {{ 3 }} {{ 2.5 }} {{ 1e300 }} {{ 0.00001 }} {{ 7.0 }}
{{ messages[0].extra }}
{{ messages[0].extra | tojson }}
{{ messages[0].extra | tojson(indent=2) }}
{{ messages[0].extra | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}
{{ {'b': 1, 'a': [], 'c': {}} | tojson(indent=1) }}
{{ strftime_now("%A %a %-d %d %B %b %Y %y %H:%M:%S %I %p %j %m %e %F %T %%") }}
  {# a comment #}
  {% set words = ['x', 'y'] %}
  {{ words | join('-') }} {{ 'a b'.title() }} {{ 'ab'.upper() }} {{ {'k': 1}.get('z', 'none') }} {{ bos_token }}|{{ pad_token }}|
"""

U = {"role": "user", "content": "  What is 1 < 2 & 'so'?\n"}
A = {"role": "assistant", "content": "Yes: \"true\" — naïve 🚲 東京"}
S = {"role": "system", "content": " Be kind. "}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in <city> & around, 'now' — °C",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer", "minimum": 1, "default": 1.0},
                "alpha": {"enum": [None, True, 1e-7, 1e22, -0.5, 12345678901]},
            },
            "required": ["city"],
        },
    },
}
ARGUMENTS = {"city": "Zürich", "days": 2, "exact": True, "none": None}


def call(arguments):
    return {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        ],
    }


RESULT = {"role": "tool", "tool_call_id": "c1", "content": "{\"t\": 21}"}
EXTRA = {
    "role": "user",
    "content": "x",
    "extra": {
        "quote": "it's",
        "both": "'\"\\",
        "line": "a\nb\tc\u0001\u007f",
        "list": [None, True, False, 0, -1, 1.5, 1e16, 123456789012345680.0, 0.0001, 0.00001234],
        "nested": {"empty": {}, "none": [], "snow": "☃ 🚲"},
        "html": "<a href='x'>&</a>",
    },
}


def parts(*texts):
    return {"role": "user", "content": [{"type": "text", "text": t} for t in texts]}


# (name, template, messages, tools, add_generation_prompt, messages as Python is to see them where they differ)
CASES = [
    ("chatml", CHATML, [U], None, True, None),
    ("chatml with a system message", CHATML, [S, U, A, U], None, True, None),
    ("chatml without generation prompt", CHATML, [U, A], None, False, None),
    ("chatml joins text parts", CHATML, [parts("one ", "two")], None, True,
     [{"role": "user", "content": "one \ntwo"}]),
    ("llama 3", LLAMA3, [U], None, True, None),
    ("llama 3 with tools", LLAMA3, [S, U, call(ARGUMENTS), RESULT], [TOOL], True, None),
    ("llama 3 reads arguments given as text", LLAMA3, [S, U, call(json.dumps(ARGUMENTS)), RESULT],
     [TOOL, TOOL], True, [S, U, call(ARGUMENTS), RESULT]),
    ("llama 3 refuses two calls", LLAMA3,
     [U, {"role": "assistant", "tool_calls": call({})["tool_calls"] * 2}], None, True, None),
    ("mistral", MISTRAL, [U, A, U], None, True, None),
    ("mistral with a system message", MISTRAL, [S, U], None, True, None),
    ("mistral refuses a bad order", MISTRAL, [U, U], None, True, None),
    ("mistral refuses an unknown role", MISTRAL, [U, {"role": "critic", "content": "hm"}, U], None,
     True, None),
    ("gemma", GEMMA, [U, A, U], None, True, None),
    ("gemma reads parts", GEMMA, [parts(" one ", " two ")], None, True, None),
    ("gemma refuses a system message", GEMMA, [S, U], None, True, None),
    ("qwen", QWEN, [S, U], None, True, None),
    ("qwen with tools and thoughts", QWEN,
     [S, U, {"role": "assistant", "content": "<think>hm</think>\n\nSo."}, U, call(ARGUMENTS), RESULT,
      RESULT], [TOOL], True, None),
    ("what Python prints", PRINTS, [EXTRA], None, True, None),
]


def main():
    cases = []
    for name, template, messages, tools, prompt, seen in CASES:
        case = {
            "name": name,
            "template": template,
            "messages": messages,
            "tools": tools,
            "add_generation_prompt": prompt,
        }
        try:
            case["text"] = ENV.from_string(template).render(
                messages=seen or messages, tools=tools, documents=None,
                add_generation_prompt=prompt, bos_token="<s>", eos_token="</s>",
            )
        except jinja2.exceptions.TemplateError as e:
            case["refusal"] = str(e)
        cases.append(case)
    path = pathlib.Path(__file__).with_name("templates.json")
    golden = {"now_unix": NOW_UNIX, "bos_token": "<s>", "eos_token": "</s>", "cases": cases}
    path.write_text(json.dumps(golden, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
