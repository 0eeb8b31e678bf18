"""The Modelfile from which `ollama create` makes a model."""

_MODELFILE = '''\
FROM ./{file_name}
TEMPLATE """<start_of_turn>user
{{{{ if .System }}}}{{{{ .System }}}}

{{{{ end }}}}{{{{ .Prompt }}}}<end_of_turn>
<start_of_turn>model
{{{{ .Response }}}}<end_of_turn>
"""
PARAMETER stop <end_of_turn>
PARAMETER stop <eos>
PARAMETER num_ctx {num_positions}
LICENSE """Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms"""
'''
"""Ollama renders TEMPLATE once for each turn and puts `<bos>` before the first. A system message belongs to the turn
that it comes before, as in training. Ollama cuts off the last turn after `.Response`."""


def modelfile(file_name: str, num_positions: int) -> str:
    """The Modelfile's text.

    Args:
        file_name: Name of the GGUF file beside it.
        num_positions: Tokens that the model can read.
    """
    return _MODELFILE.format(file_name=file_name, num_positions=num_positions)
