"""Tokenizers of single bytes, so that masks can be read, with chat templates as models in circulation have them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from deltatune.data import Dialogue, Dialogues, Turn
from deltatune.data.sequences import UNSCORED, Sequences

CHATML = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

LLAMA2 = """\
{% if messages[0]['role'] == 'system' %}{% set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}\
{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}\
{% for message in rest %}\
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}\
{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + message['content'] + \
' [/INST]' }}{% else %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""

LLAMA3 = """\
{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' \
+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""

MISTRAL = """\
{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + \
' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% else %}\
{{ raise_exception('only user and assistant roles are supported') }}{% endif %}{% endfor %}"""

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '<|user|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'system' %}
{{ '<|system|>\n' + message['content'] + eos_token }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>\n' + message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

_SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


def bytes_tokenizer(
    template: str = "", *, eos: str = "</s>", bos: str = "", frame: str = "", merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token a byte, but for special tokens and what `merges` make one.

    `frame` is what the tokenizer puts around a text, such as "<s> $A".
    """
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE({token: place for place, token in enumerate(alphabet)}, list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(_SPECIAL))
    if frame:
        special = [(token, made.token_to_id(token)) for token in ("<s>", "</s>")]
        made.post_processor = processors.TemplateProcessing(single=frame, special_tokens=special)
    named = {name: token for name, token in (("eos_token", eos), ("bos_token", bos)) if token}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=template or None, **named)


def chat(*said: tuple[str, str]) -> Dialogue:
    """A chat of roles and what they say; all that the assistant says is scored."""
    return Dialogue(tuple(Turn(role, words, scored=role == "assistant") for role, words in said))


def completion(prompt: str, answer: str) -> Dialogue:
    return Dialogue((Turn("text", prompt, scored=False), Turn("text", answer, scored=True)))


def split(*examples: Dialogue) -> Dialogues:
    return Dialogues(list(examples))


def masked(sequences: Sequences, tokenizer: PreTrainedTokenizerFast, place: int = 0) -> str:
    """An example of a decoder as text, what is scored between ⟦ and ⟧."""
    text, inside = "", False
    tokens: list[int] = []
    for token, target in zip(sequences.inputs[place], sequences.targets[place], strict=True):
        assert target in (token, UNSCORED)
        if (target != UNSCORED) != inside:
            text += tokenizer.decode(tokens) + ("⟧" if inside else "⟦")
            tokens, inside = [], not inside
        tokens.append(token)
    return text + tokenizer.decode(tokens) + ("⟧" if inside else "")
