"""Writing: what a language model says does not depend on what stands beside its prompt, and leaves no trace on it."""

import warnings
from itertools import pairwise

import pytest
import torch
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

import deltatune
from deltatune import LoRA, Prefix, Prompt, UserError
from deltatune.data.dialogues import Dialogue, Dialogues, Turn
from deltatune.training.generation import Decoding, generate, generate_tokens, prompts_before_answers, stream
from deltatune.training.precision import prepare
from tiny import VOCABULARY, tiny_language_model, tiny_model, tokenizer

WRITERS = ("gpt2", "llama", "t5", "bart")


def prompts_of(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(4, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


PROMPTS = prompts_of(9, 2, 5, 1, 9)
SHORT = Decoding(max_new_tokens=6)


def writer(architecture: str, **options):
    """A tiny language model; an untied one says more than the same word over and over."""
    return tiny_language_model(architecture, tied=False, **options), tokenizer(architecture)


def by_hand(model, prompt: list[int], new: int, ends: set[int]) -> list[int]:
    """The greedy text after a prompt, a whole forward pass for every token."""
    both, said = model.config.is_encoder_decoder, []
    for _ in range(new):
        if both:
            start = torch.tensor([[model.config.decoder_start_token_id, *said]])
            logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=start).logits
        else:
            logits = model(input_ids=torch.tensor([prompt + said])).logits
        token = int(logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
    return said


@pytest.mark.parametrize("architecture", WRITERS)
@torch.no_grad()
def test_a_text_is_the_same_in_a_batch_as_by_hand(architecture):
    model, words = writer(architecture)
    batched = generate_tokens(model, words, PROMPTS, SHORT)
    assert batched == [by_hand(model, prompt, 6, {2}) for prompt in PROMPTS]
    assert batched == [generate_tokens(model, words, [prompt], SHORT)[0] for prompt in PROMPTS]
    assert len({tuple(ids) for ids in batched}) > 2, "the prompts say different things"
    assert generate(model, words, PROMPTS, SHORT) == [words.decode(ids, skip_special_tokens=True) for ids in batched]


METHODS = {
    "lora": LoRA(rank=4),
    "prompt": Prompt(3),
    "prefix": Prefix(3),
}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "t5"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_an_adapted_model_writes_the_same_alone_and_in_a_batch(method, architecture):
    model, words = writer(architecture)
    plain = generate_tokens(model, words, PROMPTS, SHORT)
    adapted = deltatune.attach(model, METHODS[method])
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    batched = generate_tokens(adapted, words, PROMPTS, SHORT)
    assert batched == [by_hand(adapted, prompt, 6, {2}) for prompt in PROMPTS]
    assert batched != plain
    if method == "lora":
        deltatune.merge(adapted)
        assert generate_tokens(adapted, words, PROMPTS, SHORT) == batched


@torch.no_grad()
def test_a_quantised_model_writes_what_its_weights_say():
    model, words = writer("llama")
    deltatune.quantise(model, "nf4")
    batched = generate_tokens(model, words, PROMPTS, SHORT)
    assert batched == [by_hand(model, prompt, 6, {2}) for prompt in PROMPTS]


def test_in_bf16_it_writes_too():
    model, words = writer("llama")
    deltatune.attach(model, LoRA(rank=4))
    prepare(model, "bf16")
    assert len(generate(model, words, PROMPTS, Decoding(max_new_tokens=4), "bf16")) == len(PROMPTS)


@torch.no_grad()
def test_beams_find_a_text_that_is_at_least_as_probable():
    def log_probability(ids):
        logits = model(input_ids=torch.tensor([[*prompt, *ids, 2]])).logits[0].log_softmax(1)
        return sum(logits[len(prompt) - 1 + place, id].item() for place, id in enumerate([*ids, 2][:6]))

    model, words = writer("gpt2")
    gains = []
    for prompt in PROMPTS:
        [greedy] = generate_tokens(model, words, [prompt], Decoding(max_new_tokens=6))
        [searched] = generate_tokens(
            model, words, [prompt], Decoding(max_new_tokens=6, beams=VOCABULARY, length_penalty=0)
        )
        gains.append(log_probability(searched) - log_probability(greedy))
    assert min(gains) > -1e-4
    assert max(gains) > 0.01


def test_what_is_drawn_depends_on_the_seed_alone():
    model, words = writer("gpt2")
    draws = [
        generate(model, words, PROMPTS, Decoding(max_new_tokens=6, temperature=1.5, seed=seed)) for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]
    before = torch.random.get_rng_state()
    generate(model, words, PROMPTS, Decoding(max_new_tokens=2, temperature=1.5))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_from_the_most_probable_token_alone_the_greedy_text_is_drawn():
    model, words = writer("gpt2")
    greedy = generate(model, words, PROMPTS, SHORT)
    assert generate(model, words, PROMPTS, Decoding(max_new_tokens=6, temperature=2, top_k=1)) == greedy
    assert generate(model, words, PROMPTS, Decoding(max_new_tokens=6, temperature=2, top_p=1e-6)) == greedy


def test_no_run_of_words_is_written_twice_where_that_is_asked():
    model, words = writer("gpt2")
    [usual], [told] = (
        generate_tokens(model, words, PROMPTS[:1], Decoding(max_new_tokens=24, no_repeat_ngram=size)) for size in (0, 2)
    )
    runs = [list(pairwise(ids)) for ids in (usual, told)]
    assert len(set(runs[0])) < len(runs[0])
    assert len(set(runs[1])) == len(runs[1]) > 1


def test_the_model_is_left_as_it_was():
    model, words = writer("gpt2")
    model.train()
    model.transformer.h[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    own = model.generation_config
    own.update(max_new_tokens=3, temperature=0.1, top_k=5, do_sample=True)
    before = own.to_dict()
    generate(model, words, PROMPTS, SHORT)
    assert model.generation_config is own
    assert own.to_dict() == before
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_the_output_layer_gets_the_last_tokens_in_one_piece():
    """Of a slice of all tokens PyTorch makes a product with one copy of the weight for each text: gigabytes."""
    model, words = writer("llama")
    whole = []
    handle = model.lm_head.register_forward_hook(lambda _, args, __: whole.append(args[0].is_contiguous()))
    generate(model, words, prompts_of(5, 5, 5), SHORT)
    handle.remove()
    assert whole
    assert all(whole)
    assert not model.lm_head._forward_pre_hooks


def test_the_models_own_settings_of_writing_do_not_act():
    model, words = writer("gpt2")
    usual = generate(model, words, PROMPTS, SHORT)
    ends = {"eos_token_id": 2, "pad_token_id": 0}
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=9.0, num_beams=3, max_length=4, min_new_tokens=9, repetition_penalty=5.0, **ends
    )
    assert generate(model, words, PROMPTS, SHORT) == usual


def test_a_text_ends_at_each_end_token_and_at_the_end_of_a_turn():
    model, words = writer("gpt2")
    [said] = generate_tokens(model, words, PROMPTS[1:2], Decoding(max_new_tokens=8))
    assert len(set(said[:3])) == 3
    model.generation_config.eos_token_id = [2, said[2]]
    [cut] = generate_tokens(model, words, PROMPTS[1:2], Decoding(max_new_tokens=8))
    assert cut == said[:2]
    model.generation_config.eos_token_id = 2
    word = words.convert_ids_to_tokens(said[1])
    words.add_special_tokens({"additional_special_tokens": [word]})
    words.chat_template = "{% for message in messages %}{{ message.content }} " + word + " {% endfor %}"
    [turn] = generate_tokens(model, words, PROMPTS[1:2], Decoding(max_new_tokens=8))
    assert turn == said[:1]
    words.chat_template = "{{ raise_exception('no chat') }}"
    assert generate_tokens(model, words, PROMPTS[1:2], Decoding(max_new_tokens=8)) == [said]


def test_batches_hold_what_was_asked_and_progress_is_told():
    model, words = writer("gpt2")
    told, sizes = [], []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(kwargs["input_ids"].shape), with_kwargs=True)
    decoding = Decoding(max_new_tokens=3, batch_tokens=24, beams=2)
    generate(model, words, PROMPTS, decoding, progress=lambda *counts: told.append(counts))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1] == (len(PROMPTS), len(PROMPTS))
    prefills = [shape for shape in sizes if shape[1] > 1 or shape[0] == 2]
    assert all(rows * (length + 3) <= 24 for rows, length in prefills)
    assert max(rows for rows, _ in prefills) > 2


@torch.no_grad()
def test_near_the_last_position_less_is_written_and_no_other_text_is_cut_for_it():
    model, words = writer("gpt2")
    long, short = prompts_of(62, 60)
    both = generate_tokens(model, words, [long, short], Decoding(max_new_tokens=9))
    assert both == [by_hand(model, long, 2, {2}), by_hand(model, short, 4, {2})]
    with pytest.raises(UserError, match="prompt 2 has 64 tokens and this model has positions for 64"):
        generate(model, words, [long, *prompts_of(64)])
    deltatune.attach(model, Prompt(3))
    with pytest.raises(UserError, match="positions for 61"):
        generate(model, words, [long])


@pytest.mark.parametrize("architecture", ["gpt2", "bart"])
def test_a_prompt_is_cut_so_that_there_is_room_to_answer(architecture):
    model, words = writer(architecture)
    document = " ".join(["film", "story", "plot", "cast"] * 20)
    turns = (Turn("text", f"{document} ", scored=False), Turn("text", "good", scored=True))
    for limit in (10, 64, 500):
        [asked] = prompts_before_answers(model, words, Dialogues([Dialogue(turns)]), limit, SHORT)
        assert len(asked) == min(limit, 64 - 6 if architecture == "gpt2" else 64)
        generate(model, words, [asked], SHORT)


def test_an_empty_prompt_begins_with_the_beginning_token():
    model, words = writer("gpt2")
    assert generate_tokens(model, words, [[], [5, 6]], SHORT)[0] == generate_tokens(model, words, [[1]], SHORT)[0]
    assert generate(model, words, []) == []


@pytest.mark.parametrize("architecture", ["gpt2", "t5"])
def test_a_streamed_text_comes_in_pieces_and_is_the_whole_one(architecture):
    model, words = writer(architecture)
    [whole] = generate(model, words, PROMPTS[:1], SHORT)
    pieces = []
    assert stream(model, words, PROMPTS[0], pieces.append, SHORT) == whole
    assert "".join(pieces) == whole
    assert len(pieces) > 2
    with pytest.raises(UserError, match="beams"):
        stream(model, words, PROMPTS[0], pieces.append, Decoding(beams=2))


def test_transformers_says_nothing(caplog):
    model, words = writer("gpt2")
    logger = transformers_logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for settings in ({}, {"beams": 2}, {"temperature": 1, "top_k": 3}):
                generate(model, words, [*PROMPTS, [5, 2]], Decoding(max_new_tokens=2, **settings))
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_p": 0.9}, "nothing is drawn"),
        ({"top_k": 5}, "nothing is drawn"),
        ({"beams": 2, "temperature": 1}, "beams"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        Decoding(**settings)


def test_a_classifier_is_told_that_it_cannot_write():
    with pytest.raises(UserError, match="BertForSequenceClassification cannot write"):
        generate(tiny_model("bert"), tokenizer("bert"), PROMPTS)
