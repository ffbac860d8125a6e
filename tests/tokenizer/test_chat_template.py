"""Chat templates against transformers' apply_chat_template, byte for byte."""

from __future__ import annotations

import json

import pytest
import transformers

from llmserve.errors import CheckpointError, InvalidRequestError
from llmserve.tokenizer import ChatTemplate, Tokenizer
from tests.tokenizer_files import BOS_ID, CHATML, write_tokenizer

# Three styles, written for these tests after what well-known models do.
LLAMA3 = """\
{{- bos_token }}
{%- if tools is not none %}
    {%- set system = namespace(text='Tools:\\n') %}
    {%- for tool in tools %}
        {%- set system.text = system.text ~ (tool | tojson(indent=4)) ~ '\\n\\n' %}
    {%- endfor %}
    {{- '<|im_start|>ipython\\n' + system.text }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|im_start|>' + message['role'] + '\\n\\n' + message['content'] | trim }}
        {{- '<|im_end|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls | length == 1 %}
            {{- raise_exception('This model only supports single tool-calls at once!') }}
        {%- endif %}
        {%- set call = message.tool_calls[0].function %}
        {{- '<|im_start|>assistant\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}
        {{- '}<|im_end|>' }}
    {%- else %}
        {{- '<|im_start|>ipython\\n\\n' }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n\\n' }}
{%- endif %}
"""
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.last and system_message is defined %}
            {{- ' [INST] ' + system_message + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'] + ' [/INST]' }}
        {%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token}}
    {%- else %}
        {{- raise_exception('Only user and assistant roles are supported!') }}
    {%- endif %}
{%- endfor %}
"""
# Everything that templates may use beyond plain Jinja, and the whitespace rules.
FEATURES = """\
{# a comment #}
  {% for message in messages %}
    {% if message.role == 'skip' %}{% continue %}{% endif %}
    {% if message.role == 'end' %}{% break %}{% endif %}
{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
{% else %}
[{{ message.role }}] {{ message.content }} {{ message.reasoning_content }}|{{ message.thinking }}
{% endif %}
  {% endfor %}
{{ {'ä': '<&>', 'b': [1, 2.5, none, true]} | tojson }}
{{ {'b': 1, 'a': 'ü'} | tojson(sort_keys=true, ensure_ascii=true, separators=(',', ':')) }}
{{ dict(a=1) }} {{ dict.fromkeys(['x'], 2) }} {{ range(3) | list }} {{ missing is defined }}
{{ tools }} {{ documents }} {{ custom | default('none given') }} {{ bos_token }} {{ eos_token }}
{{ strftime_now('%Y-%m-%d') }}
{%- if add_generation_prompt %} go{% endif %}

"""
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "features": FEATURES}

PLAIN = [
    {"role": "system", "content": "Be brief. <b>&amp; 'quoted'\n"},
    {"role": "user", "content": "  Wie heißt du? 日本 😀  "},
    {"role": "assistant", "content": "Llama."},
    {"role": "user", "content": "{{ 7 * 7 }} {% raw %}"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": 'Wetter für eine Stadt, "heute" <jetzt>',
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
TOOL_CHAT = [
    {"role": "user", "content": "Weather in Köln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": {"city": "Köln", "n": 1}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": {"temp": 21.5}},
]
DOCUMENTS = [{"title": "t", "text": "x"}]
REASONING = [
    {"role": "user", "content": "u", "reasoning": "because"},
    {"role": "skip", "content": "not shown"},
    {"role": "assistant", "content": "a", "reasoning_content": "so"},
    {"role": "end", "content": "nor this"},
    {"role": "user", "content": "or this"},
]
SINCE_5 = pytest.mark.skipif(
    transformers.__version__.startswith("4."),
    reason="transformers 4 passes messages on as they are",
)


def both(tmp_path, chat_template, **files):
    directory = write_tokenizer(tmp_path, chat_template=chat_template, **files)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    return Tokenizer.from_directory(directory), reference


CASES = [
    *((name, PLAIN, {}) for name in ("chatml", "llama3", "features")),
    *((name, PLAIN, {"add_generation_prompt": True}) for name in ("chatml", "llama3", "features")),
    ("mistral", PLAIN, {}),
    ("mistral", PLAIN[1:], {}),
    ("llama3", TOOL_CHAT, {"tools": TOOLS, "add_generation_prompt": True}),
    ("features", PLAIN, {"tools": TOOLS, "documents": DOCUMENTS, "custom": {"k": "v"}}),
    ("features", PLAIN, {"bos_token": "<other>"}),
    # transformers drops null fields and renames reasoning keys only since version 5.
    pytest.param("features", REASONING, {}, marks=SINCE_5),
    pytest.param("features", [{"role": "user", "content": None, "name": None}], {}, marks=SINCE_5),
    ("chatml", PLAIN[:3], {"continue_final_message": True}),
    ("mistral", PLAIN[1:3], {"continue_final_message": True}),
    ("llama3", [{"role": "assistant", "content": " open \n"}], {"continue_final_message": True}),
    ("chatml", [{"role": "assistant", "content": "open \n"}], {"continue_final_message": True}),
]


@pytest.mark.parametrize(("name", "messages", "arguments"), CASES)
def test_the_prompt_is_the_one_that_transformers_writes(tmp_path, name, messages, arguments):
    tokenizer, reference = both(tmp_path, TEMPLATES[name])
    expected = reference.apply_chat_template(messages, tokenize=False, **arguments)
    expected_ids = reference.apply_chat_template(messages, return_dict=False, **arguments)

    known = ("tools", "documents", "continue_final_message")
    named = {key: value for key, value in arguments.items() if key in known}
    named["add_generation_prompt"] = arguments.get("add_generation_prompt", False)
    more = {key: value for key, value in arguments.items() if key not in named}
    before = json.dumps(messages)
    assert tokenizer.render_chat(messages, **named, template_kwargs=more) == expected
    assert tokenizer.apply_chat_template(messages, **named, template_kwargs=more) == expected_ids
    assert json.dumps(messages) == before


def test_continuing_content_parts(tmp_path):
    template = (
        "{% for m in messages %}{{ m.role }}:{% for p in m.content %}{{ p.text }}{% endfor %};"
        "{% endfor %}"
    )
    tokenizer, reference = both(tmp_path, template)
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    messages = [{"role": "assistant", "content": parts}]
    expected = reference.apply_chat_template(messages, tokenize=False, continue_final_message=True)
    rendered = tokenizer.render_chat(
        messages, add_generation_prompt=False, continue_final_message=True
    )
    assert rendered == expected == "assistant:one two"


@pytest.mark.parametrize(
    "bos",
    [
        "<|bos|>",
        {"__type": "AddedToken", "content": "<|bos|>", "lstrip": False, "special": True},
    ],
)
def test_special_tokens_may_be_strings_or_objects(tmp_path, bos):
    directory = write_tokenizer(tmp_path, chat_template=LLAMA3, bos_token=bos, add_bos=True)
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(directory)
    tokenizer = Tokenizer.from_directory(directory)
    expected = reference.apply_chat_template(PLAIN, tokenize=False)
    assert tokenizer.render_chat(PLAIN, add_generation_prompt=False) == expected
    assert expected.startswith("<|bos|><|im_start|>")


def test_a_template_with_bos_gets_no_second_one(tmp_path):
    tokenizer = Tokenizer.from_directory(
        write_tokenizer(tmp_path, chat_template=LLAMA3, add_bos=True)
    )
    ids = tokenizer.apply_chat_template(PLAIN)
    assert ids.count(BOS_ID) == 1
    assert ids[0] == BOS_ID
    assert tokenizer.encode("hello")[0] == BOS_ID


def test_of_named_templates_default_is_taken_and_tool_use_with_tools(tmp_path):
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "with {{ tools | length }} tools"},
    ]
    tokenizer, reference = both(tmp_path, named)
    for tools, expected in [(None, "plain"), (TOOLS, "with 1 tools")]:
        assert reference.apply_chat_template(PLAIN, tools=tools, tokenize=False) == expected
        assert tokenizer.render_chat(PLAIN, tools=tools) == expected


def test_the_jinja_file_wins_over_the_configuration(tmp_path):
    write_tokenizer(tmp_path, chat_template="from the configuration")
    (tmp_path / "chat_template.jinja").write_text("from the file {{ '\u00e9' }}", encoding="utf-8")
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with tools", encoding="utf-8")
    reference = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer = Tokenizer.from_directory(tmp_path)
    for tools in (None, TOOLS):
        expected = reference.apply_chat_template(PLAIN, tools=tools, tokenize=False)
        assert tokenizer.render_chat(PLAIN, tools=tools) == expected
    assert tokenizer.render_chat(PLAIN) == "from the file é"


@pytest.mark.parametrize(
    ("source", "messages", "says"),
    [
        (MISTRAL, [{"role": "assistant", "content": "x"}], "roles must alternate"),
        ("{{ messages[0].content.missing.deeper }}", PLAIN, "has no attribute"),
        ("{{ messages[0].content + 1 }}", PLAIN, "TypeError"),
        ("{{ 1 / 0 }}", PLAIN, "ZeroDivisionError"),
        ("{{ messages.__class__.__mro__ }}", PLAIN, "sandbox"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", PLAIN, "sandbox"),
        ("{{ messages.append(1) }}", PLAIN, "sandbox"),
        ("{% set ns = namespace(__x__=1) %}", PLAIN, "underscore"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", PLAIN, "underscore"),
        ("{% for i in range(999999999) %}{% endfor %}", PLAIN, "too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", PLAIN, "RecursionError"),
    ],
)
def test_what_a_template_raises_is_an_error_of_the_request(source, messages, says):
    with pytest.raises(InvalidRequestError, match=says) as info:
        ChatTemplate(source).render(messages)
    assert info.value.param == "messages"


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"messages": []}, "messages"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {
                "messages": [{"role": "assistant"}],
                "continue_final_message": True,
                "add_generation_prompt": False,
            },
            "continue_final_message",
        ),
        ({"template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, param):
    with pytest.raises(InvalidRequestError) as info:
        ChatTemplate(CHATML).render(**{"messages": PLAIN, **arguments})
    assert info.value.param == param


def test_continuing_a_message_that_the_template_drops_is_refused():
    with pytest.raises(InvalidRequestError, match="leaves the final message out"):
        ChatTemplate("always this").render(
            PLAIN, add_generation_prompt=False, continue_final_message=True
        )


def test_a_model_without_template_says_so(tmp_path):
    tokenizer = Tokenizer.from_directory(write_tokenizer(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequestError, match="no chat template"):
        tokenizer.apply_chat_template(PLAIN)


def test_a_template_with_a_syntax_error_is_named_at_load(tmp_path):
    directory = write_tokenizer(tmp_path, chat_template="{% for %}")
    with pytest.raises(CheckpointError, match=r"chat template has an error in line 1"):
        Tokenizer.from_directory(directory)
