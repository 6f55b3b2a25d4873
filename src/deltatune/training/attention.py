"""Which attention implementation a run uses."""

import torch
from transformers import PreTrainedModel

from deltatune import kernels
from deltatune.models import short_attention
from deltatune.models.fingerprint import is_outline
from deltatune.training.modes import evaluating
from deltatune.training.precision import alike

_SHORT, _LONG = 256, 2048


def most_tokens() -> int:
    """Tokens up to which our attention beats the fused kernel on a CPU (benchmarks/step.py)."""
    return _LONG if kernels.wide() else _SHORT


def choose_attention(model: PreTrainedModel, longest: int) -> None:
    """Sets the implementation that is fastest for examples of at most `longest` tokens on the model's device.

    For short ones on a CPU that is our own, where it gives what the architecture's own plain attention gives.
    """
    if longest > most_tokens() or not (model.device.type == "cpu" or is_outline(model)):
        return
    if is_outline(model):  # it has no numbers to try it with
        model.set_attn_implementation(short_attention.NAME)
        return
    model.set_attn_implementation("eager")
    expected = _outputs(model)
    model.set_attn_implementation(short_attention.NAME)
    try:
        same = alike(_outputs(model), expected, "fp32" if expected.dtype == torch.float32 else "bf16")
    except NotImplementedError:
        same = False
    if not same:
        model.set_attn_implementation("eager")


def _outputs(model: PreTrainedModel) -> torch.Tensor:
    """The states of two short texts, one of them padded. Both have one end token, which some classify by.

    Not the logits: those of a fresh head are little more than rounding.
    """
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    words = [id for id in range(min(64, config.vocab_size)) if id not in (*ends, config.pad_token_id)][:5]
    end, pad = words[0] if ends[0] is None else ends[0], config.pad_token_id or 0
    ids = torch.tensor([[*words, end], [*words[:3], end, pad, pad]])
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with evaluating(model), torch.autocast("cpu", torch.bfloat16, enabled=model.dtype == torch.bfloat16):
        given = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, **decoder)
    states: torch.Tensor = (given.get("hidden_states") or given["decoder_hidden_states"])[-1]
    return states[:, :4]
