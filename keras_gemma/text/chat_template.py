"""Chat template of exported models: Gemma's turns, in Jinja.

Renders the same text as the published templates for all messages of text that they accept. A system
message, which those of Gemma 1 and 2 refuse, is added to the first user turn, as in Gemma 3's.
"""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set turns = messages %}"
    "{% set preface = '' %}"
    "{% if messages and messages[0]['role'] == 'system' %}"
    "{% if messages[0]['content'] is string %}"
    "{% set preface = messages[0]['content'] + '\\n\\n' %}"
    "{% else %}"
    "{% set preface = messages[0]['content'] | map(attribute='text') | join + '\\n\\n' %}"
    "{% endif %}"
    "{% set turns = messages[1:] %}"
    "{% endif %}"
    "{% for turn in turns %}"
    "{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate: user, assistant, user, ...') }}"
    "{% endif %}"
    "{% set role = 'model' if turn['role'] == 'assistant' else turn['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' }}"
    "{{ preface if loop.first else '' }}"
    "{% if turn['content'] is string %}"
    "{{ turn['content'] | trim }}"
    "{% else %}"
    "{% for part in turn['content'] %}{{ part['text'] | trim }}{% endfor %}"
    "{% endif %}"
    "{{ '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Template of `messages` (`role`, `content`), `bos_token` and `add_generation_prompt`."""
