"""Small chat templates of our own that use the constructs of the published ones, and chats for
them. `TEXT_ARGUMENTS` are those that concatenate the arguments of a call, as text."""

from __future__ import annotations

from typing import Any

HARMONY = """\
{%- macro typescript(spec) -%}
{%- if spec.type == "array" -%}{{ typescript(spec['items']) + "[]" }}
{%- elif spec.enum is defined -%}{{ '"' + spec.enum|join('" | "') + '"' }}
{%- elif spec.type is defined and spec.type is iterable and spec.type is not string -%}
{{ spec.type | join(" | ") }}
{%- elif spec.type == "object" -%}
{{- "{\\n" }}{%- for name, inner in spec.properties.items() -%}
{{- name }}{%- if name not in (spec.required or []) %}?{% endif %}{{- ": " + typescript(inner) }}
{%- if not loop.last %}{{- ",\\n" }}{% endif %}{%- endfor -%}{{- "}" }}
{%- else -%}{{ spec.type or "any" }}{%- endif -%}
{%- endmacro -%}
{%- set identity = model_identity if model_identity is defined else "You are a helper." -%}
{{- "<|start|>system<|message|>" + identity + "\\nCurrent date: " + strftime_now("%Y-%m-%d") }}
{{- "\\nReasoning: " + (reasoning_effort if reasoning_effort is defined else "medium") }}
{{- "<|end|>" }}
{%- if messages[0].role in ("developer", "system") %}
{%- set instructions, rest = messages[0].content, messages[1:] %}
{%- else %}{%- set instructions, rest = "", messages %}{%- endif %}
{%- if instructions or tools %}
{{- "<|start|>developer<|message|># Instructions\\n\\n" + instructions }}
{%- if tools %}{{- "\\n\\n# Tools\\nnamespace functions {\\n" }}
{%- for tool in tools %}{%- set tool = tool.function %}
{{- "// " + tool.description + "\\ntype " + tool.name + " = (_: " }}
{{- typescript(tool.parameters) + ") => any;\\n" }}
{%- endfor %}{{- "}" }}{%- endif %}{{- "<|end|>" }}
{%- endif %}
{%- set last = namespace(name=none) %}
{%- for message in rest -%}
{%- if message.role == "assistant" -%}
{%- if "<|channel|>" in (message.content or "") %}
{{- raise_exception("pass reasoning apart from the content") }}{%- endif %}
{%- if message.tool_calls %}
{%- if message.thinking %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
{%- endif %}
{%- set call = message.tool_calls[0].function or message.tool_calls[0] %}
{{- "<|start|>assistant to=functions." + call.name + "<|channel|>commentary json<|message|>" }}
{{- call.arguments|tojson + "<|call|>" }}{%- set last.name = call.name %}
{%- elif loop.last and not add_generation_prompt %}
{%- if message.thinking %}
{{- "<|start|>assistant<|channel|>analysis<|message|>" + message.thinking + "<|end|>" }}
{%- endif %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|return|>" }}
{%- else %}
{{- "<|start|>assistant<|channel|>final<|message|>" + message.content + "<|end|>" }}
{%- endif %}
{%- elif message.role == "tool" -%}
{%- if last.name is none %}{{- raise_exception("a result without a call") }}{%- endif %}
{{- "<|start|>functions." + last.name + " to=assistant<|channel|>commentary<|message|>" }}
{{- message.content|tojson + "<|end|>" }}
{%- else -%}
{{- "<|start|>" + message.role + "<|message|>" + message.content + "<|end|>" }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}{{- "<|start|>assistant" }}{% endif %}"""

QWEN3 = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n<tools>" }}
    {%- for tool in tools %}{{- "\\n" }}{{- tool | tojson }}{%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last_query=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string
        and not(message.content.startswith('<tool_response>')
        and message.content.endswith('</tool_response>')) %}
        {%- set ns.searching = false %}{%- set ns.last_query = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "user" or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}
            {%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>' + message.role + '\\n' }}
        {%- if loop.index0 > ns.last_query and (loop.last or reasoning) %}
            {{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}{%- set tool_call = tool_call.function %}{%- endif %}
            {{- '\\n<tool_call>\\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}{{- tool_call.arguments }}
            {%- else %}{{- tool_call.arguments | tojson }}{%- endif %}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

QWEN3_CODER = """\
{%- macro extra_keys(fields, handled) %}
    {%- if fields is mapping %}
        {%- for key in fields if key not in handled %}
            {%- if fields[key] is mapping or (fields[key] is sequence
                and fields[key] is not string) %}
                {{- '\\n<' ~ key ~ '>' ~ (fields[key] | tojson | safe) ~ '</' ~ key ~ '>' }}
            {%- else %}{{- '\\n<' ~ key ~ '>' ~ (fields[key] | string) ~ '</' ~ key ~ '>' }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}
{%- if messages[0]["role"] == "system" %}
    {%- set system, chat = messages[0]["content"], messages[1:] %}
{%- else %}{%- set chat = messages %}{%- endif %}
{%- if not tools is defined %}{%- set tools = [] %}{%- endif %}
{%- if system is defined %}{{- "<|im_start|>system\\n" + system }}
{%- elif tools is iterable and tools | length > 0 %}{{- "<|im_start|>system\\nYou code." }}
{%- endif %}
{%- if tools is iterable and tools | length > 0 %}
    {{- "\\n<tools>" }}
    {%- for tool in tools %}
        {%- if tool.function is defined %}{%- set tool = tool.function %}{%- endif %}
        {{- "\\n<function>\\n<name>" ~ tool.name ~ "</name>" }}
        {%- for name, fields in tool.parameters.properties|items %}
            {{- '\\n<parameter><name>' ~ name ~ '</name>' }}
            {%- if fields.type is defined %}{{- '<type>' ~ (fields.type | string) ~ '</type>' }}
            {%- endif %}{{- extra_keys(fields, ['name', 'type', 'description']) }}
            {{- '</parameter>' }}
        {%- endfor %}
        {{- extra_keys(tool.parameters, ['type', 'properties']) ~ "\\n</function>" }}
    {%- endfor %}
    {{- "\\n</tools>" }}
{%- endif %}
{%- if system is defined or (tools is iterable and tools | length > 0) %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in chat %}
    {%- if message.role == "assistant" and message.tool_calls is defined
        and message.tool_calls is iterable and message.tool_calls | length > 0 %}
        {{- '<|im_start|>assistant' }}
        {%- if message.content is defined and message.content is string
            and message.content | trim | length > 0 %}
            {{- '\\n' + message.content | trim + '\\n' }}
        {%- endif %}
        {%- for tool_call in message.tool_calls %}
            {%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\\n<tool_call>\\n<function=' + tool_call.name + '>\\n' }}
            {%- if tool_call.arguments is defined %}
                {%- for name, value in tool_call.arguments|items %}
                    {{- '<parameter=' + name + '>\\n' }}
                    {%- set value = value | tojson | safe if value is mapping or (value is
                        sequence and value is not string) else value | string %}
                    {{- value ~ '\\n</parameter>\\n' }}
                {%- endfor %}
            {%- endif %}
            {{- '</function>\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif message.role in ("user", "system", "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
    {%- elif message.role == "tool" %}
        {%- if loop.previtem and loop.previtem.role != "tool" %}{{- '<|im_start|>user\\n' }}
        {%- endif %}
        {{- '<tool_response>\\n' ~ message.content ~ '\\n</tool_response>\\n' }}
        {%- if loop.last or loop.nextitem.role != "tool" %}{{- '<|im_end|>\\n' }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

GLM = """\
[gMASK]<sop>
{%- if tools -%}
<|system|>
# Tools
{% for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- macro visible(content) -%}
    {%- if content is string -%}{{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}{{- item.text }}
            {%- elif item is string -%}{{- item }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}{{- content }}{%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{% set ns.last_user = loop.index0 -%}{%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible(m.content) }}
{{- '/nothink' if (enable_thinking is defined and not enable_thinking
    and not visible(m.content).endswith("/nothink")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning, content = '', visible(m.content) %}
{%- if m.reasoning_content is string %}{%- set reasoning = m.reasoning_content %}
{%- elif '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{%- if loop.index0 > ns.last_user and reasoning -%}{{ '\\n<think>' + reasoning.strip() + '</think>'}}
{%- else -%}{{ '\\n<think></think>' }}{%- endif -%}
{%- if content.strip() -%}{{ '\\n' + content.strip() }}{%- endif -%}
{% if m.tool_calls %}
{% for tc in m.tool_calls %}
{%- if tc.function %}{%- set tc = tc.function %}{%- endif %}
{{ '\\n<tool_call>' + tc.name }}
{% set _args = tc.arguments %}
{% for k, v in _args.items() %}
<arg_key>{{ k }}</arg_key>
<arg_value>{{ v | tojson(ensure_ascii=False) if v is not string else v }}</arg_value>
{% endfor %}
</tool_call>{% endfor %}
{% endif %}
{%- elif m.role == 'tool' -%}
{%- if m.content is string -%}
{%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}{{- '<|observation|>' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- else -%}
<|observation|>{% for tr in m.content %}

<tool_response>
{{ tr.output if tr.output is defined else tr.text }}
</tool_response>{% endfor -%}
{% endif -%}
{%- elif m.role == 'system' -%}
<|system|>
{{ visible(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}"""

DEEPSEEK_V3 = """\
{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}
{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, system='') %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{% set ns.system = ns.system + message['content'] %}{%- endif %}{%- endfor %}
{{- bos_token }}{{- ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}
{{- '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['content'] is none %}{%- set ns.is_tool = false -%}
{{- raise_exception('null is no content') }}{%- endif %}
{%- if message['role'] == 'assistant' and message['tool_calls'] is defined %}
{%- set ns.is_tool = false %}{%- set ns.is_first = false -%}
{%- for tool in message['tool_calls'] %}
{%- if not ns.is_first %}
{{- '<|Assistant|><|calls|><|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n' }}
{{- '```json\\n' + tool['function']['arguments'] + '\\n```<|call_end|>' }}{%- set ns.is_first = true -%}
{%- else %}
{{- '\\n<|call|>' + tool['type'] + '<|sep|>' + tool['function']['name'] + '\\n```json\\n' }}
{{- tool['function']['arguments'] + '\\n```<|call_end|>' }}
{%- endif %}{%- endfor %}{{- '<|calls_end|>' }}
{%- elif message['role'] == 'assistant' %}
{%- if ns.is_tool %}{{- '<|outputs_end|>' + message['content'] + '<|end|>' }}
{%- set ns.is_tool = false -%}
{%- else %}{%- set content = message['content'] %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}
{{- '<|Assistant|>' + content + '<|end|>' }}{%- endif %}
{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.is_tool = true -%}
{%- if ns.is_output_first %}{{- '<|outputs|>' }}{%- set ns.is_output_first = false %}{%- endif %}
{{- '<|output|>' + message['content'] + '<|output_end|>' }}{%- endif %}
{%- endfor -%}
{% if ns.is_tool %}{{- '<|outputs_end|>' }}{% endif %}
{% if add_generation_prompt and not ns.is_tool %}{{- '<|Assistant|>' }}{% endif %}"""

DEEPSEEK_V31 = """\
{% if not thinking is defined %}{% set thinking = false %}{% endif %}
{%- set ns = namespace(system='', is_first_system=true, last_user=false, is_tool=false) %}
{%- for message in messages %}{%- if message['role'] == 'system' %}
{%- set ns.system = ns.system + ('' if ns.is_first_system else '\\n\\n') + message['content'] %}
{%- set ns.is_first_system = false %}{%- endif %}{%- endfor %}
{%- if tools is defined and tools is not none %}{%- set listed = namespace(text='## Tools\\n') %}
{%- for tool in tools %}{%- set listed.text = listed.text + '\\n### ' + tool.function.name
    + '\\n' + (tool.function.parameters | tojson) + '\\n' %}{%- endfor %}
{%- set ns.system = ns.system + '\\n\\n' + listed.text %}{%- endif %}
{{- bos_token }}{{- ns.system }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}{%- set ns.is_tool, ns.last_user = false, true -%}
{{- '<|User|>' + message['content'] }}{%- endif %}
{%- if message['role'] == 'assistant' and message['tool_calls'] is defined
    and message['tool_calls'] is not none %}
{%- if ns.last_user %}{{- '<|Assistant|></think>' }}{%- endif %}
{%- set ns.last_user, ns.is_tool = false, false %}
{{- message['content'] or '' }}{{- '<|calls|>' }}
{%- for tool in message['tool_calls'] %}
{{- '<|call|>' + tool['function']['name'] + '<|sep|>' + tool['function']['arguments'] }}
{{- '<|call_end|>' }}{%- endfor %}{{- '<|calls_end|><|end|>' }}
{%- elif message['role'] == 'assistant' %}
{%- if ns.last_user %}{{- '<|Assistant|>' }}
{%- if message['prefix'] is defined and message['prefix'] and thinking %}{{- '<think>' }}
{%- else %}{{- '</think>' }}{%- endif %}{%- endif %}{%- set ns.last_user = false %}
{%- set content = message['content'] -%}
{%- if '</think>' in content %}{%- set content = content.split('</think>', 1)[1] -%}{%- endif %}
{{- content + '<|end|>' }}{%- endif %}
{%- if message['role'] == 'tool' %}{%- set ns.last_user, ns.is_tool = false, true -%}
{{- '<|output|>' + message['content'] + '<|output_end|>' }}{%- endif %}
{%- endfor -%}
{%- if add_generation_prompt and ns.last_user and not ns.is_tool %}
{{- '<|Assistant|>' + ('<think>' if thinking else '</think>') }}{%- endif %}"""

DEEPSEEK_V32 = """\
{%- macro dsml(call) -%}
{{- '<|DSML|invoke name="' + call.name + '">\\n' }}
{%- for key, value in call.arguments.items() %}
{{- '<|DSML|parameter name="' ~ key ~ '" string="' ~ ('true' if value is string else 'false') ~ '">' }}
{{- value if value is string else value | tojson(ensure_ascii=false, separators=(',', ':')) }}
{{- '</|DSML|parameter>\\n' }}{%- endfor -%}
{{- '</|DSML|invoke>\\n' }}
{%- endmacro -%}
{{- bos_token }}
{%- for message in messages %}
{%- if message.role in ['system', 'developer'] %}{{- message.content }}
{%- if loop.first and tools %}{%- for tool in tools %}
{{- '\\n' + (tool.function | tojson(sort_keys=true)) }}{%- endfor %}{%- endif %}
{%- elif message.role == 'user' %}
{{- '<|User|>' + message.content + '<|Assistant|>' + ('<think>' if thinking else '</think>') }}
{%- elif message.role == 'assistant' %}
{%- if thinking and message.reasoning_content %}{{- message.reasoning_content + '</think>' }}
{%- endif %}{{- message.content or '' }}
{%- if message.tool_calls %}{{- '\\n\\n<|DSML|calls>\\n' }}
{%- for call in message.tool_calls %}{{- dsml(call.function) }}{%- endfor %}
{{- '</|DSML|calls>' }}{%- endif %}{{- eos_token }}
{%- elif message.role == 'tool' %}{{- '\\n<output>' + message.content + '</output>\\n' }}
{%- endif %}{%- endfor %}"""

MIXTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set rest = messages[1:] %}
{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system is defined %}
            {{- ' [INST] ' + system + '\\n\\n' + message['content'] + ' [/INST]' }}
        {%- else %}{{- ' [INST] ' + message['content'] + ' [/INST]' }}{%- endif %}
    {%- elif message['role'] == 'assistant' %}
        {{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('Only user and assistant roles are supported') }}{%- endif %}
{%- endfor %}"""

MISTRAL_TOOLS = """\
{{- bos_token }}
{%- set users = messages | selectattr("role", "equalto", "user") | list %}
{%- for message in messages %}
    {%- if message.role == "user" %}
        {%- if tools is not none and (message == users[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}{%- set tool = tool.function %}
                {{- '{"type": "function", "function": {' }}
                {%- for key, val in tool.items() if key != "return" %}
                    {%- if val is string %}{{- '"' + key + '": "' + val + '"' }}
                    {%- else %}{{- '"' + key + '": ' + val|tojson }}{%- endif %}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}{{- "}}" }}{%- if not loop.last %}{{- ", " }}{%- endif %}
            {%- endfor %}{{- "][/AVAILABLE_TOOLS]" }}
        {%- endif %}{{- "[INST] " + message.content + "[/INST]" }}
    {%- elif message.tool_calls is defined and message.tool_calls is not none %}
        {{- "[TOOL_CALLS] [" }}
        {%- for call in message.tool_calls %}
            {%- set out = call.function|tojson %}{{- out[:-1] }}
            {%- if not call.id is defined or call.id|length != 9 %}
                {{- raise_exception("Tool call IDs should be alphanumeric of length 9!") }}
            {%- endif %}{{- ', "id": "' + call.id + '"}' }}
            {%- if not loop.last %}{{- ", " }}{%- else %}{{- "]" + eos_token }}{%- endif %}
        {%- endfor %}
    {%- elif message.role == "assistant" %}{{- " " + message.content|trim + eos_token }}
    {%- elif message.role == "tool" %}
        {%- set content = message.content.content if message.content.content is defined
            else message.content %}
        {{- '[TOOL_RESULTS] {"content": ' + content|string + ', "call_id": "' }}
        {{- message.tool_call_id + '"}[/TOOL_RESULTS]' }}
    {%- else %}{{- raise_exception("Only user, assistant and tool roles are supported") }}
    {%- endif %}
{%- endfor %}"""

OLMOE = """\
{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>\\n' + message['content'] + '\\n' }}
{% elif message['role'] == 'user' %}
{{ '<|user|>\\n' + message['content'] + '\\n' }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\\n'  + message['content'] + eos_token + ('' if loop.last else '\\n') }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>\\n' }}
{% endif %}
{% endfor %}"""

LLAMA = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if not tools is defined %}{%- set tools = none %}{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content']|trim %}{%- set messages = messages[1:] %}
{%- else %}{%- set system = "" %}{%- endif %}
{{- "<|head|>system<|/head|>\\n\\nToday Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {%- for t in tools %}{{- t | tojson(indent=4) }}{{- "\\n\\n" }}{%- endfor %}
{%- endif %}
{{- system + "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|/head|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|head|>assistant<|/head|>\\n\\n{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}{{- "}<|eot|>" }}
    {%- else %}
        {{- "<|head|>ipython<|/head|>\\n\\n" }}
        {%- if message.content is mapping or (message.content is iterable
            and message.content is not string) %}{{- message.content | tojson }}
        {%- else %}{{- message.content }}{%- endif %}{{- "<|eot|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|head|>assistant<|/head|>\\n\\n' }}{%- endif %}"""

GENERATION = """\
{% for message in messages %}
{% if message.role == 'system' and not loop.first %}{% continue %}{% endif %}
{{ '<|' + message.role + '|>' }}
{% if message.role == 'assistant' %}
{% generation %}{% set inner = message.content %}{{ inner + eos_token }}{% endgeneration %}
{% else %}
{% if message.content is string %}{{ message.content }}
{% else %}{% for part in message.content %}{{ part.text }}{% if part.cache %}[cached]{% endif %}
{% endfor %}{% endif %}
{% endif %}
{% if message.content == 'stop' %}{% break %}{% endif %}
{% endfor %}
{{ inner is defined }}{% if documents %}{% for doc in documents %}{{ doc.title }}{% endfor %}{% endif %}
{% if documents is none and tools is none %}none{% endif %}
{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""

EVERYTHING = """\
{{ messages | tojson }}
{{ messages | tojson(ensure_ascii=true, indent=2, sort_keys=true, separators=(',', ': ')) }}
{{ messages | tojson(ensure_ascii=false, separators=(',', ':')) }}
{{ [bos_token, eos_token, pad_token is defined, unk_token is defined, tools, documents] }}
{{ add_generation_prompt }}{{ dict(a=1) | items | list }}{{ "%s<>&'" | format("x") }}"""

TEMPLATES: dict[str, str] = {
    "harmony": HARMONY,
    "qwen3": QWEN3,
    "qwen3_coder": QWEN3_CODER,
    "glm": GLM,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v31": DEEPSEEK_V31,
    "deepseek_v32": DEEPSEEK_V32,
    "mixtral": MIXTRAL,
    "mistral_tools": MISTRAL_TOOLS,
    "olmoe": OLMOE,
    "llama": LLAMA,
    "generation": GENERATION,
    "everything": EVERYTHING,
}
TEXT_ARGUMENTS = {"deepseek_v3", "deepseek_v31"}

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "find_star",
            "description": "Finds a star <by> name & place.",
            "parameters": {
                "type": "object",
                "properties": {
                    "name": {"type": "string", "description": "Der Name, z. B. \u2605"},
                    "kind": {"type": "string", "enum": ["giant", "dwarf"]},
                    "places": {"type": "array", "items": {"type": "number"}},
                    "limit": {"type": ["integer", "null"]},
                },
                "required": ["name"],
            },
        },
    }
]


def user(content: Any = "Wo ist der Stern? \u2605 <b>&'\"") -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any = " You are a starfish. ") -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: Any = "It is here.\n", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def call(arguments: str, name: str = "find_star", number: int = 1) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"id": f"call0000{number}", "type": "function", "function": function}


def result(content: Any = '{"at": [1, 2.5]}', number: int = 1) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": f"call0000{number}", "content": content}


def text_parts(*texts: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": text} for text in texts]


ONE_CALL = [
    user(),
    assistant("", tool_calls=[call('{"name": "\u2605", "places": [1, 2.5], "limit": null}')]),
    result(),
]
TWO_CALLS = [
    system(),
    user(),
    assistant(
        "Let me see.",
        tool_calls=[call('{"name": "a"}'), call('{"name": "b", "deep": {"x": [true]}}', number=2)],
    ),
    result("one"),
    result("two", number=2),
    assistant("Both."),
    user("Again"),
]
REASONED = [
    user(),
    assistant("Old.", reasoning_content="\nold thoughts\n"),
    user("More"),
    assistant("New.", reasoning_content="new thoughts"),
]
