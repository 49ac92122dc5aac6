"""Prompt, splice, loss and decoding against transformers' own, and scoring against jiwer."""

import copy
import random
from types import SimpleNamespace

import jiwer
import pytest
import torch
import torch.nn.functional as F
from make_twins import qwen3_folder, tiny_tokenizer
from torch import nn

import model

LLAMA = """\
{{- '<s>' -}}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}{{- '[ANSWER]' + message.content + '</s>' -}}
{%- else -%}{{- '[' + message.role + ']' + message.content -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[ANSWER]' -}}{%- endif -%}"""
PROMPT = "Transcribe the speech:"


@pytest.fixture(scope="module")
def llm_and_tokenizer(qwen3_folder):
    return model.load_llm(qwen3_folder)


@pytest.fixture
def llm(llm_and_tokenizer):
    return llm_and_tokenizer[0]


@pytest.fixture
def tokenizer(llm_and_tokenizer):
    return llm_and_tokenizer[1]


@pytest.fixture(scope="module")
def other_tokenizer():
    """Another template: no roles in tokens, a bos in the text, another end of turn."""
    specials = ("<pad>", "<s>", "</s>", "[ANSWER]", "[user]", "[system]")
    return tiny_tokenizer(template=LLAMA, specials=specials, eos="</s>")


@pytest.fixture(params=["chatml", "other"])
def any_tokenizer(request, tokenizer, other_tokenizer):
    return tokenizer if request.param == "chatml" else other_tokenizer


# ---- loading ----------------------------------------------------------------------------------------------------


def test_llm_is_frozen_and_stays_in_eval(llm):
    assert not any(p.requires_grad for p in llm.parameters())
    parent = nn.ModuleList([llm]).train()
    parent[0].model.train()
    assert not any(module.training for module in llm.modules())


def test_embedding_is_that_of_the_llm(qwen3_folder, llm, tokenizer):
    table, same_tokenizer = model.load_embedding(qwen3_folder)
    assert table.dtype == torch.float32 and torch.equal(table, llm.get_input_embeddings().weight)
    assert same_tokenizer.get_vocab() == tokenizer.get_vocab()


def test_llm_loads_in_the_asked_dtype(qwen3_folder):
    llm, _ = model.load_llm(qwen3_folder, dtype=torch.bfloat16)
    assert {p.dtype for p in llm.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_alone_is_trainable_and_fp32_and_changes_nothing_at_first(qwen3_folder, dtype):
    plain, _ = model.load_llm(qwen3_folder, dtype=dtype)
    llm, _ = model.load_llm(qwen3_folder, dtype=dtype, lora_r=4)
    lora = model.lora_parameters(llm)
    assert len(lora) == 2 * 2 * 2  # A and B, of q_proj and v_proj, in two layers
    trainable = {name: p for name, p in llm.named_parameters() if p.requires_grad}
    assert trainable.keys() == lora.keys() and {p.dtype for p in lora.values()} == {torch.float32}
    assert {p.dtype for name, p in llm.named_parameters() if name not in lora} == {dtype}
    ids = torch.arange(5)[None]
    torch.testing.assert_close(llm(ids).logits, plain(ids).logits, atol=0, rtol=0)
    with torch.no_grad():
        for name, parameter in lora.items():
            parameter.add_(0.1 if "lora_B" in name else 0.0)
    assert not torch.equal(llm(ids).logits, plain(ids).logits)
    assert not any(module.training for module in llm.train().modules())


# ---- prompt -----------------------------------------------------------------------------------------------------


def template_text(tokenizer, user, system=None):
    messages = ([{"role": "system", "content": system}] if system is not None else []) + [
        {"role": "user", "content": user}
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)


@pytest.mark.parametrize("system", [None, "", "You are a helpful assistant."])
@pytest.mark.parametrize("draft", [None, "", "press one or press"])
def test_the_two_halves_are_the_template_cut_at_the_audio(any_tokenizer, draft, system):
    before, after = model.build_prompt(any_tokenizer, PROMPT, draft=draft, system=system)
    user = PROMPT if draft is None else f"{PROMPT}\n{draft}"
    assert any_tokenizer.decode(before + after) == template_text(any_tokenizer, user, system)
    assert any_tokenizer.decode(before).endswith(PROMPT)


def test_the_audio_mark_is_never_tokenised(any_tokenizer):
    before, after = model.build_prompt(any_tokenizer, PROMPT, draft="hello", hotwords=["Ann"])
    assert "earshot-audio" not in any_tokenizer.decode(before + after)


def test_thinking_is_off(tokenizer):
    _, after = model.build_prompt(tokenizer, PROMPT)
    assert tokenizer.decode(after) == "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


def test_prompt_and_label_equal_the_templates_whole_turn(tokenizer):
    """What is trained is what the template makes of a finished turn: prompt, answer, end of turn."""
    before, after = model.build_prompt(tokenizer, PROMPT)
    answer = tokenizer("press one", add_special_tokens=False)["input_ids"] + [model.end_of_turn(tokenizer)]
    turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "press one"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert tokenizer.decode(before + after + answer) == text.rstrip("\n")


def test_end_of_turn_is_the_templates(tokenizer, other_tokenizer):
    assert tokenizer.convert_ids_to_tokens(model.end_of_turn(tokenizer)) == "<|im_end|>"
    assert other_tokenizer.convert_ids_to_tokens(model.end_of_turn(other_tokenizer)) == "</s>"


def test_a_template_without_an_end_of_turn_is_refused():
    plain = tiny_tokenizer(template="{%- for m in messages -%}{{- m.content -}}{%- endfor -%}")
    with pytest.raises(ValueError, match="instruct"):
        model.end_of_turn(plain)


def test_language_and_hotwords_enter_the_prompt(tokenizer):
    before, _ = model.build_prompt(tokenizer, "Translate to {language}:", language="English", hotwords=["Ann", "Bo"])
    assert tokenizer.decode(before).endswith("Hotwords: [Ann, Bo]\nTranslate to English:")
    for text in ("Ann, Bo", "Ann，Bo"):  # as a manifest may have them
        assert model.build_prompt(tokenizer, "Translate to English:", hotwords=text)[0] == before
    assert model.build_prompt(tokenizer, "a", hotwords=[""]) == model.build_prompt(tokenizer, "a", hotwords="")
    before, _ = model.build_prompt(tokenizer, "这是一段中文语音，请转录：", hotwords=["张三", "李四"])
    assert tokenizer.decode(before).endswith("热词列表：[张三, 李四]\n这是一段中文语音，请转录：")


def test_latin_transcripts_get_a_leading_space_and_chinese_ones_do_not(tokenizer):
    assert tokenizer.decode(model.text_to_ids(tokenizer, "press one")) == " press one"
    assert tokenizer.decode(model.text_to_ids(tokenizer, "今天")) == "今天"
    assert model.text_to_ids(tokenizer, "") == []
    texts = ["press one", "今天", "", "a b c d e f g h i j", "  two  spaces"]
    tokenizer.backend_tokenizer.enable_truncation(3)  # a released tokenizer.json may bring it
    tokenizer.backend_tokenizer.enable_padding(length=9)
    assert model.text_to_ids(tokenizer, texts) == [model.text_to_ids(tokenizer, text) for text in texts]
    first, second = (model.text_to_ids(tokenizer, text) for text in ("one", "press one"))
    assert second[-len(first) :] == first, "the same word has the same tokens wherever it stands"


# ---- splice -----------------------------------------------------------------------------------------------------

PROMPTS = [([5, 6], [7]), ([8], [9, 10, 11])]
TARGETS = [[20, 21, 2], [22, 2]]
LENS = torch.tensor([3, 1])


@pytest.fixture
def embed():
    torch.manual_seed(0)
    return nn.Embedding(50, 4)


def test_splice_lays_out_before_audio_after_target_pad(embed):
    audio = torch.randn(2, 3, 4)
    spliced = model.splice(embed, PROMPTS, audio, LENS, TARGETS)
    word = {i: embed.weight[i] for i in range(50)}
    rows = [
        [word[5], word[6], *audio[0], word[7], word[20], word[21], word[2]],
        [word[8], audio[1, 0], word[9], word[10], word[11], word[22], word[2], *torch.zeros(2, 4)],
    ]
    assert torch.equal(spliced["inputs_embeds"], torch.stack([torch.stack(row) for row in rows]))
    x = -100
    assert spliced["labels"].tolist() == [[x, x, x, x, x, x, 20, 21, 2], [x, x, x, x, x, 22, 2, x, x]]
    assert spliced["attention_mask"].tolist() == [[1] * 9, [1] * 7 + [0] * 2]
    assert spliced["position_ids"][1, :7].tolist() == list(range(7))


def test_splice_pads_on_the_left_for_generation(embed):
    audio = torch.randn(2, 3, 4)
    spliced = model.splice(embed, PROMPTS, audio, LENS, pad_left=True)
    assert spliced["attention_mask"].tolist() == [[1] * 6, [0, 1, 1, 1, 1, 1]]
    assert spliced["position_ids"][1].tolist() == [0, 0, 1, 2, 3, 4]
    assert torch.equal(spliced["inputs_embeds"][1, 2], audio[1, 0])
    assert (spliced["inputs_embeds"][1, 0] == 0).all() and (spliced["labels"] == -100).all()


@pytest.mark.parametrize("pad_left", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_splice_equals_rows_put_together_one_by_one(embed, seed, pad_left):
    rng = random.Random(seed)
    some = [[rng.randrange(50) for _ in range(rng.randint(0, 6))] for _ in range(12)]
    shared = rng.randint(0, 3)
    prompts = [([1, 2, 3][:shared] + some[n], some[n + 4]) for n in range(4)]
    targets, lens = some[8:], torch.tensor([rng.randint(0, 5) for _ in range(3)] + [5])
    audio = torch.randn(4, 5, 4)
    spliced = model.splice(embed, prompts, audio, lens, targets, pad_left, shared if pad_left else 0)
    for n, ((before, after), target) in enumerate(zip(prompts, targets)):
        row = torch.cat([embed(torch.tensor(before).long()), audio[n, : lens[n]],
                         embed(torch.tensor(after + target).long())])
        real = spliced["attention_mask"][n].bool()
        assert torch.equal(spliced["inputs_embeds"][n][real], row) and not spliced["inputs_embeds"][n][~real].any()
        assert spliced["labels"][n][real].tolist() == [-100] * (len(row) - len(target)) + target
        assert (spliced["labels"][n][~real] == -100).all() and spliced["labels"].device.type == "cpu"
        assert spliced["position_ids"][n][real].tolist() == list(range(len(row)))
        assert real[:shared].all() if pad_left else real[: len(row)].all()


def test_gradients_of_a_splice_reach_real_audio_only(embed):
    embed.requires_grad_(False)
    audio = torch.randn(2, 3, 4, requires_grad=True)
    model.splice(embed, PROMPTS, audio, LENS, TARGETS)["inputs_embeds"].sum().backward()
    assert (audio.grad[0] == 1).all() and audio.grad[1, :, 0].tolist() == [1, 0, 0]


def test_splice_casts_the_audio_to_the_llms_dtype(embed):
    spliced = model.splice(embed.bfloat16(), PROMPTS, torch.randn(2, 3, 4), LENS, TARGETS)
    assert spliced["inputs_embeds"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "prompts, lens, targets",
    [(PROMPTS[:1], LENS, TARGETS), (PROMPTS, LENS, TARGETS[:1]), (PROMPTS, torch.tensor([4, 1]), TARGETS)],
    ids=["a prompt is missing", "a target is missing", "longer than the audio"],
)
def test_splice_refuses_parts_that_do_not_match(embed, prompts, lens, targets):
    with pytest.raises(ValueError):
        model.splice(embed, prompts, torch.randn(2, 3, 4), lens, targets)


# ---- loss -------------------------------------------------------------------------------------------------------


def example_batch(llm, tokenizer, pad_left=False, targets=True, seed=0):
    """Three clips of different lengths, with prompts of different lengths: (prompts, emb, lens, target ids)."""
    torch.manual_seed(seed)
    prompts = [model.build_prompt(tokenizer, PROMPT, draft=draft) for draft in (None, "press one", "please hold on")]
    end = model.end_of_turn(tokenizer)
    answers = [[*model.text_to_ids(tokenizer, text), end] for text in ("press one", "please hold", "four")]
    emb, lens = torch.randn(3, 6, 48) * 0.2, torch.tensor([6, 2, 4])
    return model.splice(llm.get_input_embeddings(), prompts, emb, lens, answers if targets else None, pad_left)


def row(spliced, i):
    """One example of a batch, its padding removed."""
    real = spliced["attention_mask"][i].bool()
    return {k: v[i : i + 1, real] for k, v in spliced.items()} | {"position_ids": torch.arange(int(real.sum()))[None]}


def test_loss_equals_transformers_own(llm, tokenizer):
    spliced = example_batch(llm, tokenizer)
    total, count, right = model.transcript_loss(llm, spliced)
    theirs = llm(**spliced)
    assert int(count) == int((spliced["labels"] != -100).sum())
    assert (total / count).item() == pytest.approx(theirs.loss.item(), abs=1e-5)
    labels, best = spliced["labels"][:, 1:], theirs.logits[:, :-1].argmax(-1)
    assert int(right) == int((best == labels)[labels != -100].sum())


def test_loss_of_a_batch_is_the_sum_of_its_rows(llm, tokenizer):
    spliced = example_batch(llm, tokenizer)
    total, count, _ = model.transcript_loss(llm, spliced)
    singles = [model.transcript_loss(llm, row(spliced, i)) for i in range(3)]
    assert total.item() == pytest.approx(sum(s[0].item() for s in singles), rel=1e-5)
    assert int(count) == sum(int(s[1]) for s in singles)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_shared_prefix_run_once_changes_neither_loss_nor_gradients(tmp_path, lora_r):
    llm, tokenizer = model.load_llm(str(qwen3_folder(tmp_path / "llm")), lora_r=lora_r)
    if lora_r:
        torch.manual_seed(0)
        for weight in model.lora_parameters(llm).values():
            torch.nn.init.normal_(weight, std=0.1)
    prompts = [model.build_prompt(tokenizer, PROMPT, draft) for draft in (None, "a draft", "b")]
    shared = model.shared_prefix(prompts)
    assert shared == len(prompts[0][0]) > 3
    found = []
    for count in (0, shared):
        emb = (torch.randn(3, 6, 48, generator=torch.Generator().manual_seed(1)) * 0.2).requires_grad_()
        targets = [[20, 21, 22, 2], [30, 2], [31, 32, 2]]
        spliced = model.splice(llm.get_input_embeddings(), prompts, emb, torch.tensor([6, 3, 5]), targets)
        total, _, right = model.transcript_loss(llm, spliced, count)
        total.backward()
        grads = [p.grad.clone() for p in (model.lora_parameters(llm).values() if lora_r else [])]
        llm.zero_grad()
        found.append((total.detach(), right, emb.grad, *grads))
    assert len(found[0]) > 4 or not lora_r
    for plain, fast in zip(*found):
        torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_shared_prefix_counts_equal_leading_tokens_only():
    assert model.shared_prefix([([1, 2, 3], [9]), ([1, 2, 4], [9])]) == 2
    assert model.shared_prefix([([1, 2], [9]), ([1, 2, 4], [9])]) == 2
    assert model.shared_prefix([([], [9]), ([1], [9])]) == 0


def test_the_adaptor_learns_through_an_llm_that_does_not(llm, tokenizer):
    adaptor = model.AudioAdaptor(8, 48, 16, num_layers=1, num_heads=2)
    emb, lens = adaptor(torch.randn(1, 5, 8), torch.tensor([5]))
    prompt = model.build_prompt(tokenizer, PROMPT)
    spliced = model.splice(llm.get_input_embeddings(), [prompt], emb, lens, [[20, model.end_of_turn(tokenizer)]])
    model.transcript_loss(llm, spliced)[0].backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adaptor.parameters())
    assert all(p.grad is None for p in llm.parameters())


def test_log_probs_of_several_answers_are_minus_the_loss_of_each(llm, tokenizer):
    prompt, stop = model.build_prompt(tokenizer, PROMPT), model.end_of_turn(tokenizer)
    speech, answers = torch.randn(4, 48) * 0.2, [[20, 21, 22], [30], []]
    scores = model.answer_log_probs(llm, prompt, speech, answers, stop)
    for answer, score in zip(answers, scores):
        spliced = model.splice(llm.get_input_embeddings(), [prompt], speech[None], torch.tensor([4]), [[*answer, stop]])
        assert score.item() == pytest.approx(-model.transcript_loss(llm, spliced)[0].item(), rel=1e-4)


# ---- decoding ---------------------------------------------------------------------------------------------------

NO_STOP = -1
STEPS = 10


@pytest.fixture
def no_loop_cut(monkeypatch):
    """A random LLM soon repeats itself; these tests compare what comes before any cut."""
    monkeypatch.setattr(model, "cut_loop", lambda ids, **_: False)


def transformers_generate(llm, spliced, stop, **kwargs):
    out = llm.generate(
        inputs_embeds=spliced["inputs_embeds"], attention_mask=spliced["attention_mask"], do_sample=False,
        eos_token_id=None if stop == NO_STOP else stop, pad_token_id=0, max_new_tokens=STEPS, **kwargs,
    ).tolist()  # fmt: skip
    return [ids[: ids.index(stop)] if stop in ids else ids for ids in out]


@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_equals_transformers_token_by_token(llm, tokenizer, no_loop_cut, seed):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False, seed=seed)
    answers, _ = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3)
    assert answers == transformers_generate(llm, spliced, NO_STOP)
    assert len({tuple(answer) for answer in answers}) > 1, "the three clips should not read alike"


@pytest.mark.filterwarnings("ignore:Passing .* with `inputs_embeds`")  # it says what we want: new tokens only
@pytest.mark.parametrize(
    "kwargs",
    [{"repetition_penalty": 1.2}, {"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 2},
     {"repetition_penalty": 1.5, "no_repeat_ngram_size": 3}],
)  # fmt: skip
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_repetition_options_equal_transformers(llm, tokenizer, no_loop_cut, kwargs, seed):
    """Row by row: transformers 5.23 exempts as many new tokens from the penalty as a row has padding on its left."""
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False, seed=seed)
    answers, _ = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3, **kwargs)
    assert answers == [transformers_generate(llm, row(spliced, i), NO_STOP, **kwargs)[0] for i in range(3)]
    assert answers != model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3)[0], "the option should change something"


def test_greedy_stops_each_row_at_its_own_stop_token(llm, tokenizer, no_loop_cut):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False)
    free, _ = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3)
    stop = free[1][2]
    answers, _ = model.greedy_decode(llm, spliced, stop, [STEPS] * 3)
    assert answers == [ids[: ids.index(stop)] if stop in ids else ids for ids in free]
    assert answers == transformers_generate(llm, spliced, stop)
    assert len({len(answer) for answer in answers}) > 1, "no row ended before another"


def test_greedy_of_a_batch_equals_single_rows(llm, tokenizer):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False)
    answers, scores = model.greedy_decode(llm, spliced, 402, [STEPS] * 3)
    for i in range(3):
        (answer,), (score,) = model.greedy_decode(llm, row(spliced, i), 402, [STEPS])
        assert answer == answers[i] and score == pytest.approx(scores[i], abs=1e-3)


def test_each_row_has_its_own_cap(llm, tokenizer, no_loop_cut):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False)
    free, _ = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3)
    capped, _ = model.greedy_decode(llm, spliced, NO_STOP, [3, STEPS, 1])
    assert capped == [free[0][:3], free[1], free[2][:1]]


def plain_and_drafted(llm, spliced, make_draft, stop=NO_STOP, caps=(STEPS,) * 3):
    """Answers and scores without drafts and with make_draft(answer), and the number of passes with them."""
    plain, scores = model.greedy_decode(llm, spliced, stop, caps)
    passes, real = [], llm.model.forward
    llm.model.forward = lambda *args, **kwargs: (passes.append(1), real(*args, **kwargs))[1]
    try:
        drafted, drafted_scores = model.greedy_decode(llm, spliced, stop, caps, drafts=[make_draft(a) for a in plain])
    finally:
        del llm.model.forward
    assert drafted == plain
    assert drafted_scores == pytest.approx(scores, abs=1e-3)
    return len(passes)


DRAFTS = {
    "right": lambda answer: answer,
    "right and too long": lambda answer: answer + [5, 6, 7],
    "one replaced": lambda answer: [*answer[:3], 7, *answer[4:]],
    "one too much": lambda answer: [*answer[:3], 7, *answer[3:]],
    "one missing": lambda answer: [*answer[:3], *answer[4:]],
    "cut short": lambda answer: answer[:2],
    "wrong from the start": lambda answer: [7, 9, 11, 13],
    "only in one row": lambda answer, seen=[]: (seen.append(1), answer if len(seen) == 2 else [])[1],  # noqa: B006
    "empty": lambda answer: [],
}  # fmt: skip


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_drafts_change_no_answer(llm, tokenizer, no_loop_cut, name, seed):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False, seed=seed)
    passes = plain_and_drafted(llm, spliced, DRAFTS[name], caps=(STEPS, 4, STEPS))
    if name.startswith("right"):
        assert passes <= 2
    elif name.startswith("one "):
        assert passes < STEPS - 2, "what follows a wrong token should be offered again"


def test_drafts_change_no_answer_that_stops_or_loops(llm, tokenizer):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False)
    free, _ = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3)
    for stop in {free[0][1], free[1][2], free[2][-1]}:
        for make_draft in (lambda answer, stop=stop: [*answer, stop, 5, 6], lambda answer: [*answer, *answer]):
            plain_and_drafted(llm, spliced, make_draft, stop, (60, 3, 60))


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("name", DRAFTS)
def test_whole_passes_over_drafts_give_the_same_answers(llm, tokenizer, no_loop_cut, monkeypatch, name, alone):
    """decode_drafted against greedy_decode of each clip alone; batches of other sizes, prompts of other lengths."""
    embed, batches, expected = llm.get_input_embeddings(), [], {}
    for seed, (words, lens) in enumerate(((("one", None, "press two"), [7, 2, 5]), ((None,), [11]),
                                          (("a b c d", "two"), [1, 3]))):
        prompts = [model.build_prompt(tokenizer, PROMPT, draft) for draft in words]
        speech = torch.randn(len(lens), max(lens), 48, generator=torch.Generator().manual_seed(seed)) * 0.2
        batches.append([])
        for n, (prompt, length) in enumerate(zip(prompts, lens)):
            clip = SimpleNamespace(prompt=prompt, speech=speech[n, :length], cap=STEPS - n)
            spliced = model.splice(embed, [prompt], clip.speech[None], torch.tensor([length]), pad_left=True)
            (answer,), (score,) = model.greedy_decode(llm, spliced, NO_STOP, [clip.cap])
            clip.guess = list(DRAFTS[name](answer))
            expected[id(clip)] = answer, pytest.approx(score, abs=1e-3)
            batches[-1].append(clip)
    passes, real = [], llm.model.forward
    monkeypatch.setattr(llm.model, "forward", lambda **inputs: (
        passes.append(tuple(inputs["inputs_embeds"].shape[:2])), real(**inputs))[1])
    graphs = model.Graphs(lambda embeds: model.hidden_states(llm, embeds)) if alone else None
    if alone:
        batches = [[clip] for batch in batches for clip in batch]
    found = list(model.decode_drafted(llm, iter(batches), NO_STOP, graphs))
    assert {id(clip): (answer, score) for clip, answer, score in found} == expected and len(found) == 6
    assert all(rows <= 3 for rows, _ in passes) and not any(alone and length % 32 for _, length in passes)
    if name == "right":  # the clip of the second batch waits for the third, and only two rows of its length fit in
        assert [rows for rows, _ in passes] == ([1] * 6 if alone else [3, 2, 1])


def test_whole_passes_stop_where_the_llm_does(llm, tokenizer, no_loop_cut):
    prompt, speech = model.build_prompt(tokenizer, PROMPT), torch.randn(4, 48) * 0.2
    spliced = model.splice(llm.get_input_embeddings(), [prompt], speech[None], torch.tensor([4]), pad_left=True)
    (free,), _ = model.greedy_decode(llm, spliced, NO_STOP, [STEPS])
    for stop in {free[0], free[3], free[-1]}:
        (answer,), (score,) = model.greedy_decode(llm, spliced, stop, [STEPS])
        for guess in (answer, free, [*free, 5], [7]):
            clip = SimpleNamespace(prompt=prompt, speech=speech, cap=STEPS, guess=list(guess))
            assert list(model.decode_drafted(llm, [[clip]], stop)) == [(clip, answer, pytest.approx(score, abs=1e-3))]


def test_rows_without_a_mask_are_read_as_with_one(llm, tokenizer, monkeypatch):
    """No mask reaches attention, also while a CUDA graph is recorded (transformers then takes rows for packed)."""
    from transformers import LlamaConfig, LlamaForCausalLM, masking_utils

    torch.manual_seed(0)
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=450, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2)).eval()
    spliced = example_batch(llm, tokenizer)
    real, embeds = spliced["attention_mask"].bool(), spliced["inputs_embeds"]
    expected = [one.model(**{k: v for k, v in spliced.items() if k != "labels"}).last_hidden_state[real]
                for one in (llm, llama)]
    masks, attend = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *rest, attn_mask=None, **more: (
        masks.append(attn_mask), attend(*rest, attn_mask, **more))[1])
    for recorded in (False, True):
        monkeypatch.setattr(masking_utils, "is_tracing", lambda *_, recorded=recorded: recorded)
        for one, plain in zip((llm, llama), expected):
            torch.testing.assert_close(model.hidden_states(one, embeds)[real], plain, rtol=1e-4, atol=1e-4)
    assert masks == [None] * 8  # of two layers


def test_norms_by_torchs_kernel_are_transformers_own(llm):
    fused = copy.deepcopy(llm)  # of load_llm
    plain = copy.deepcopy(llm)
    norms = [part for part in plain.modules() if part.__dict__.pop("forward", None)]
    assert len(norms) == 4 * 2 + 1 and {type(norm).__name__ for norm in norms} == {"Qwen3RMSNorm"}
    for norm in norms:
        torch.nn.init.normal_(norm.weight)
    fused.load_state_dict(plain.state_dict())  # a deep copy has weights of its own
    ids = torch.arange(12)[None]
    torch.testing.assert_close(fused(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(fused(ids).logits, llm(ids).logits, atol=1e-2)


def test_compiled_layers_are_compiled_once_and_cached_passes_leave_them_alone(llm, tokenizer, monkeypatch):
    compiled, real = copy.deepcopy(llm), nn.Module.compile
    model.compile_layers(compiled.model.layers, torch.device("cpu"))
    assert all(layer._compiled_call_impl is None for layer in compiled.model.layers)  # on a GPU only
    monkeypatch.setattr(nn.Module, "compile", lambda part, **how: real(part, backend="eager", **how))
    model.compile_layers(compiled.model.layers, torch.device("cuda"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for seed in range(3):  # of other lengths
        spliced = example_batch(llm, tokenizer, seed=seed)
        embeds = F.pad(spliced["inputs_embeds"], (0, 0, 0, seed)).requires_grad_()
        expected = model.hidden_states(llm, embeds)
        torch.testing.assert_close(model.hidden_states(compiled, embeds), expected, rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            behind = model.hidden_states(compiled, embeds, 3)
        torch.testing.assert_close(behind, expected[:, 3:], rtol=1e-4, atol=1e-4)
        spliced = example_batch(llm, tokenizer, True, False)
        found, plain = (model.greedy_decode(one, spliced, NO_STOP, [5] * 3) for one in (compiled, llm))
        assert found[0] == plain[0] and found[1] == pytest.approx(plain[1], abs=1e-3)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1  # for two layers, three lengths
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("transformed", [False, True])
def test_torchs_own_layers_are_compiled_too(monkeypatch, transformed):
    """A call of a module of torch.nn is never compiled, its forward is."""
    torch.manual_seed(0)
    plain, real = model.AudioAdaptor(8, 48, 32, num_layers=3 * transformed, num_heads=4), torch.compile
    compiled = copy.deepcopy(plain)
    monkeypatch.setattr(torch, "compile", lambda function, **how: real(function, backend="eager", **how))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.compile_layers(compiled.layers(), torch.device("cuda"))
    for length in (5, 9, 7):
        enc, lens = torch.randn(2, length, 8), torch.tensor([length, 3])
        torch.manual_seed(1)  # of the dropout
        expected, _ = plain.eval()(enc, lens)
        found, _ = compiled.eval()(enc, lens)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 1 <= graphs <= 2 if transformed else graphs == 0  # the first layer's input is a view, which counts apart


def count_passes(llm, monkeypatch):
    """List that grows by the number of rows with every pass of the LLM."""
    passes, real = [], llm.model.forward

    def forward(*args, **inputs):
        passes.append(len(inputs["attention_mask"]))
        return real(*args, **inputs)

    monkeypatch.setattr(llm.model, "forward", forward)
    return passes


@pytest.mark.parametrize("drafted", [False, True])
@pytest.mark.parametrize("prefixed", [False, True])
@pytest.mark.parametrize("few", [0, 1, 2, 100])
def test_rows_that_go_on_with_the_next_batch_keep_their_answers(
        llm, tokenizer, no_loop_cut, monkeypatch, drafted, prefixed, few):
    """Batches of other widths and other prompts; each row's answer and score are those of its row alone."""
    embed, batches, expected = llm.get_input_embeddings(), [], []
    for seed, (words, lens) in enumerate(((("one", None, "press two"), [7, 2, 5]), ((None,), [11]),
                                          (("a b c d", "two"), [1, 3]))):
        prompts = [model.build_prompt(tokenizer, PROMPT + "!" * seed, draft) for draft in words]
        speech = torch.randn(len(lens), max(lens), 48, generator=torch.Generator().manual_seed(seed)) * 0.2
        shared = model.shared_prefix(prompts) if prefixed else 0
        spliced = model.splice(embed, prompts, speech, torch.tensor(lens), pad_left=True, shared=shared)
        caps = [STEPS - n * (seed + 1) for n in range(len(lens))]
        for n, cap in enumerate(caps):
            answer, score = model.greedy_decode(llm, row(spliced, n), NO_STOP, [cap])
            expected.append((len(expected), answer[0], pytest.approx(score[0], abs=1e-3)))
        drafts = [answer[: 2 + n] + [7] for n, (_, answer, _) in enumerate(expected[-len(lens) :])] if drafted else None
        prefix = model.read_prefix(llm, prompts[0][0][:shared]) if prefixed else None
        batches.append((spliced, caps, drafts, prefix))
    passes = count_passes(llm, monkeypatch)
    found = list(model.decode_stream(llm, iter(batches), NO_STOP, few=few))
    assert sorted(found) == expected
    if not drafted:  # how soon a row ends then depends on its draft
        assert max(passes) == {0: 3, 1: 3, 2: 4, 100: 6}[few]
        assert len(passes) == {0: 30, 1: 21, 2: 20, 100: 12}[few]


def test_the_cache_does_not_grow_with_the_number_of_batches(llm, tokenizer, no_loop_cut, monkeypatch):
    """Something is unfinished at all times, so the cache never empties: it must lose what nobody needs any more."""
    widths, real = [], llm.model.forward

    def forward(*args, **inputs):
        widths.append(inputs["attention_mask"].shape[1])
        return real(*args, **inputs)

    batches = [(example_batch(llm, tokenizer, True, False, seed), [STEPS, 3, 7], None, None) for seed in range(12)]
    expected = [answer for batch in batches for answer in model.greedy_decode(llm, batch[0], NO_STOP, batch[1])[0]]
    monkeypatch.setattr(llm.model, "forward", forward)
    found = sorted(model.decode_stream(llm, batches, NO_STOP, few=2))
    assert [answer for _, answer, _ in found] == expected
    assert max(widths) <= batches[0][0]["attention_mask"].shape[1] + 2 * STEPS


def test_rows_of_a_sliding_window_are_not_joined(tokenizer, no_loop_cut, monkeypatch):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    llm = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=450, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.2, use_sliding_window=True, sliding_window=64,
        max_window_layers=1)).eval()
    batches = [(example_batch(llm, tokenizer, True, False, seed), [STEPS, 3, 7], None, None) for seed in (0, 1)]
    expected = [a for batch in batches for a in model.greedy_decode(llm, batch[0], NO_STOP, batch[1])[0]]
    passes = count_passes(llm, monkeypatch)
    found = sorted(model.decode_stream(llm, batches, NO_STOP, few=100))
    assert [answer for _, answer, _ in found] == expected and max(passes) == 3


def test_what_is_guessed_next():
    draft = [1, 2, 3, 4, 5, 6, 7, 8]
    assert model.next_guess([1], [1, 2, 3]) == [2, 3]  # right, but not all was offered
    assert model.next_guess([1, 9], draft[1:]) == draft[2:]  # another token in its place
    assert model.next_guess([1, 3], draft[1:]) == draft[3:]  # one left out
    assert model.next_guess([1, 6, 7], draft[1:]) == [8]  # many left out
    assert model.next_guess([1, 2, 3, 4, 9, 1, 2], []) == [3, 4, 9, 1, 2]  # as it was before
    assert model.next_guess([5, 1, 2, 6, 1, 2, 7, 1, 2], []) == [7, 1, 2]  # the last time counts
    assert model.next_guess([1, 2, *range(10, 40), 1, 2], [], longest=3) == [10, 11, 12]
    assert model.next_guess([1, 2, 3, 4, 1, 2], [9, 3, 5]) == [3, 5]  # two equal tokens do not outweigh a draft
    assert model.next_guess([1, 2, 3, 4, 1, 2, 3], [9, 4, 5]) == [4, 1, 2, 3]  # three do
    assert model.next_guess([4], []) == []


@pytest.mark.parametrize("seed", range(6))
def test_runs_have_the_least_cost(seed):
    rng = random.Random(seed)
    lengths, spare = sorted((rng.randint(1, 30) for _ in range(9)), reverse=True), rng.choice([0, 5, 20, 1000])

    def cost(cuts):
        return sum(spare + lengths[first] * (end - first) for first, end in zip([0, *cuts], [*cuts, 9]))

    best = min(cost([n for n in range(1, 9) if bits >> n & 1]) for bits in range(0, 512, 2))
    runs = model.cut_runs(lengths, spare)
    assert [first for first, _ in runs] == [0, *(end for _, end in runs[:-1])] and runs[-1][1] == 9
    assert cost([first for first, _ in runs[1:]]) == best
    assert model.cut_runs([], spare) == []


def test_drafts_are_ignored_where_repetition_is_penalised(llm, tokenizer, no_loop_cut):
    spliced, options = example_batch(llm, tokenizer, pad_left=True, targets=False), {"repetition_penalty": 1.5}
    plain = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3, **options)
    assert model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3, **options, drafts=[[5, 6]] * 3) == plain


def test_scores_are_log_probabilities_of_the_answer(llm, tokenizer, no_loop_cut):
    spliced = row(example_batch(llm, tokenizer, pad_left=True, targets=False), 0)
    (answer,), (score,) = model.greedy_decode(llm, spliced, NO_STOP, [5])
    words = llm.get_input_embeddings()(torch.tensor([answer]))
    logits = llm(inputs_embeds=torch.cat([spliced["inputs_embeds"], words], 1)).logits[0, -6:-1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()
    assert score == pytest.approx(expected.item(), abs=1e-3)


@pytest.mark.parametrize("hotwords", [[(), (), ()], [("Ann",), (), ("Bo", "Cy")]], ids=["one prompt", "three prompts"])
@pytest.mark.parametrize("drafted", [False, True])
def test_a_prompts_beginning_that_is_read_once_changes_no_answer(llm, tokenizer, no_loop_cut, hotwords, drafted):
    prompts = [model.build_prompt(tokenizer, PROMPT, draft, hotwords=words)
               for draft, words in zip(("one", None, "press two or three"), hotwords)]
    shared = model.shared_prefix(prompts)
    assert shared > 2 and (shared == len(prompts[1][0])) == (hotwords == [(), (), ()])
    speech, lens = torch.randn(3, 7, 48, generator=torch.Generator().manual_seed(4)) * 0.2, torch.tensor([7, 2, 5])
    embed = llm.get_input_embeddings()
    plain = model.splice(embed, prompts, speech, lens, pad_left=True)
    spliced = model.splice(embed, prompts, speech, lens, pad_left=True, shared=shared)
    assert spliced["attention_mask"][:, :shared].all() and not plain["attention_mask"][:, :shared].all()
    prefix = model.read_prefix(llm, prompts[0][0][:shared])
    expected, scores = model.greedy_decode(llm, plain, NO_STOP, [STEPS] * 3)
    drafts = [answer[: 2 + n] + [7] for n, answer in enumerate(expected)] if drafted else None
    for _ in range(2):  # the prefix is not used up
        answers, found = model.greedy_decode(llm, spliced, NO_STOP, [STEPS] * 3, drafts=drafts, prefix=prefix)
        assert answers == expected and found == pytest.approx(scores, abs=1e-3)
    assert len({tuple(answer) for answer in answers}) > 1


def test_decoding_does_not_change_its_input(llm, tokenizer):
    spliced = example_batch(llm, tokenizer, pad_left=True, targets=False)
    before = {k: v.clone() for k, v in spliced.items()}
    model.greedy_decode(llm, spliced, NO_STOP, [4, 2, 3])
    assert all(torch.equal(spliced[k], before[k]) for k in before)


def test_a_runaway_loop_ends_its_row(tokenizer):
    class Parrot(nn.Module):
        """Layers of an LLM that says 1 2 3 1 2 3 ... whatever it hears."""

        said = 0

        def forward(self, **_):
            self.said += 1
            return SimpleNamespace(last_hidden_state=torch.full((1, 1), 1 + (self.said - 1) % 3))

    parrot = SimpleNamespace(config=None, model=Parrot(), lm_head=lambda hidden: F.one_hot(hidden, 10).float() * 50)
    embeds = torch.zeros(1, 2, 4)
    spliced = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, 2), "position_ids": torch.arange(2)[None]}
    (answer,), _ = model.greedy_decode(parrot, spliced, 9, [200])
    assert answer == [1, 2, 3] and parrot.model.said < 50


def test_token_cap_leaves_room_for_fast_speech():
    assert all(model.token_cap(seconds) >= 10 * seconds + 4 for seconds in (0.1, 1, 5, 30))
    assert model.token_cap(30) < 500


@pytest.mark.parametrize("period", [1, 2, 3, 8])
def test_cut_loop_leaves_one_copy(period):
    loop, ids, cut = list(range(100, 100 + period)), [1, 2, 3], False
    while not cut and len(ids) < 300:
        ids.append(loop[(len(ids) - 3) % period])
        cut = model.cut_loop(ids)
    assert cut and ids == [1, 2, 3, *loop]


@pytest.mark.parametrize("ids", [[], [7], [7, 7, 7], [1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 4] * 2, list(range(60))])
def test_cut_loop_leaves_ordinary_repeats_alone(ids):
    before = list(ids)
    assert not model.cut_loop(ids) and ids == before


def test_a_phone_number_of_equal_digits_is_no_loop():
    """ "zero zero zero zero" is four equal tokens, and a telephone recogniser must be able to write it."""
    for ids in ([5, 6, 7, 7, 7, 7], [7, 7, 7, 7, 7, 7]):
        assert not model.cut_loop(list(ids))


# ---- text and scoring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, language, expected",
    [
        ("Hello, World!", None, "hello world"),
        ("  Don't   stop -- now. ", "en", "don't stop now"),
        ("it’s “fine”", "en", "it's fine"),
        ("'quoted' words'", "en", "quoted words"),
        ("twenty-one", "en", "twenty one"),
        ("ＡＢＣ　１２３", None, "abc 123"),
        ("line\nbreak\tand\u00a0space", None, "line break and space"),
        ("5 dollars", "en", "5 dollars"),
        ("naïve CAFÉ", "en", "naïve café"),
        ("cafe\u0301", "en", "café"),
        ("हिन्दी में", None, "हिन्दी में"),
        ("今天 天气，很好。", "zh", "今天天气很好"),
        ("今天 天气，很好。", None, "今天天气很好"),
        ("我 love 你", None, "我love你"),
        ("안녕 하세요", "ko", "안녕 하세요"),
        ("", None, ""),
        ("?!'", None, ""),
    ],
)
def test_normalize_text(text, language, expected):
    assert model.normalize_text(text) == expected
    assert model.normalize_text(expected) == expected, "normalising twice changes nothing"


def test_english_words_inside_chinese_keep_the_space_between_them():
    assert model.normalize_text("请 打开 hello world 页面") == "请打开hello world页面"


def random_sentences(words, seed, count=60):
    generator = random.Random(seed)
    return [" ".join(generator.choices(words, k=generator.randint(1, 12))) for _ in range(count)]


def test_word_error_rate_equals_jiwers():
    references, hypotheses = (random_sentences(["one", "two", "three", "four"], seed) for seed in (1, 2))
    theirs = jiwer.process_words(references, hypotheses)
    ours = model.error_rate(references, hypotheses)
    assert ours["rate"] == pytest.approx(theirs.wer)
    assert ours["errors"] == theirs.substitutions + theirs.deletions + theirs.insertions
    assert ours["units"] == sum(len(reference.split()) for reference in references)


def test_character_error_rate_equals_jiwers():
    references, hypotheses = (random_sentences("今天气很好", seed) for seed in (1, 2))
    joined = [[text.replace(" ", "") for text in side] for side in (references, hypotheses)]
    expected = jiwer.cer(*joined)
    assert model.error_rate(references, hypotheses)["rate"] == pytest.approx(expected)
    assert model.error_rate(*joined, language="zh")["rate"] == pytest.approx(expected)


def distance(a, b):
    """Levenshtein distance, the textbook table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        last, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (x != y))
    return row[-1]


def test_errors_equal_a_table_of_distances_and_split_by_kind():
    references, hypotheses = (random_sentences(["a", "b", "c"], seed, count=200) for seed in (3, 4))
    result = model.error_rate(references, hypotheses)
    pairs = [(r.split(), h.split()) for r, h in zip(references, hypotheses)]
    assert result["errors"] == sum(distance(r, h) for r, h in pairs)
    assert result["errors"] == sum(result[kind] for kind in ("substitutions", "deletions", "insertions"))
    assert result["insertions"] - result["deletions"] == sum(len(h) - len(r) for r, h in pairs)


@pytest.mark.parametrize(
    "references, hypotheses, expected",
    [
        (["a b c"], ["a b c"], (0.0, 0, 0, 0, 3)),
        (["a b c"], [""], (1.0, 0, 3, 0, 3)),
        (["a"], ["a x y z"], (3.0, 0, 0, 3, 1)),
        (["a b", ""], ["a b", "x"], (0.5, 0, 0, 1, 2)),
        (["a b c d"], ["a x c"], (0.5, 1, 1, 0, 4)),
        ([""], [""], (0.0, 0, 0, 0, 0)),
        ([""], ["x"], (float("inf"), 0, 0, 1, 0)),
        ([], [], (0.0, 0, 0, 0, 0)),
    ],
)
def test_error_rate_by_hand(references, hypotheses, expected):
    result = model.error_rate(references, hypotheses)
    assert tuple(result[k] for k in ("rate", "substitutions", "deletions", "insertions", "units")) == expected


def test_the_reference_decides_between_words_and_characters():
    assert model.error_rate(["今天"], ["jin tian"])["units"] == 2
    assert model.error_rate(["two words"], ["今天很好"])["units"] == 2
    assert model.error_rate(["今天 ok"], ["今天 ok"])["units"] == 4
    assert model.error_rate(["안녕하세요"], ["안녕"], language="ko")["deletions"] == 3


def test_scoring_ignores_case_and_punctuation_unless_told_not_to():
    assert model.error_rate(["Hello, you!"], ["hello you"])["rate"] == 0.0
    assert model.error_rate(["Hello, you!"], ["hello you"], normalize=False)["rate"] == 1.0


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="2 references but 1"):
        model.error_rate(["a", "b"], ["a"])
