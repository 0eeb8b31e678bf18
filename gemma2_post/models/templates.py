"""Gemma 2's chat format as templates: one renders conversations for training, the other one is saved with models."""

from gemma2_post.stage import digests

TRAINING_TEMPLATE = (
    "{{- bos_token -}}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<start_of_turn>user\\n' + message['content'] | trim + '<end_of_turn>\\n' -}}"
    "{%- else -%}"
    "{{- '<start_of_turn>model\\n' -}}"
    "{%- set said = message['content'] | trim + '<end_of_turn>' + (eos_token if loop.last else '') -%}"
    "{%- if message['trained'] -%}"
    "{%- generation -%}{{- said -}}{%- endgeneration -%}"
    "{%- else -%}{{- said -}}{%- endif -%}"
    "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
)
"""Renders a conversation for training, without a system message: data has it folded into the first user turn.

`<eos>` directly follows the last `<end_of_turn>`, as in the Gemma 2 report (arXiv 2408.00118, section 4 and table 4).
The generation block marks what the loss covers: in each trained turn of the model its words, its `<end_of_turn>`, and
the final `<eos>`.
"""

INFERENCE_TEMPLATE = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% if messages | length == 1 %}{{ raise_exception('A user turn must follow the system message') }}{% endif %}"
    "{% set system = messages[0]['content'] + '\\n\\n' %}"
    "{% set turns = messages[1:] %}"
    "{% else %}"
    "{% set system = '' %}"
    "{% set turns = messages %}"
    "{% endif %}"
    "{% for message in turns %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) or message['role'] == 'system' %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = message['role'] %}{% endif %}"
    "{% if loop.first and system %}{% set content = system + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\\n' + content | trim + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
"""Renders a conversation, or a prompt, for inference; it is saved with every model.

Without a system message, it renders what Google's template does. A system message, at which Google's raises, is folded
into the first user turn as in training (`data.turns.fold_system`). It uses only what Gemma 3's template uses, too,
which other engines' implementations of Jinja are tested with.
"""

_GOOGLE_DIGEST = "ecd6ae513fe103f0"
"""Hash of Google's template, which version 0.1.0 saved."""


def template_digest(template: str) -> str:
    """Hash of the format that a template renders; ours counts as Google's, which models of version 0.1.0 have.

    The two agree on all that a model is trained on or scores: nothing there has a system message.
    """
    return _GOOGLE_DIGEST if template == INFERENCE_TEMPLATE else digests.of_text(template)
