"""FunASRNano against funasr's own class on the same weights, its front ends, loading, merging."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import make_twins
import numpy as np
import pytest
import test_finetune
import torch
import yaml
from test_finetune import infer_on, train, weights
from torch.nn.utils.rnn import pad_sequence

import finetune_encoder as ft
import infer
import merge
import model

world, faster = test_finetune.world, test_finetune.faster  # fixtures
REAL = sorted(Path(__file__).parents[1].glob("runs/demo/**/real/*.wav"))[::9][:60]
TEXTS = ["one two please hold", "five", "今天天气很好"]


def load(folder, with_llm=True):
    conf = yaml.safe_load((Path(folder) / "config.yaml").read_text())
    return ft.load_parts(conf, Path(folder) / "model.pt", torch.float32, with_llm)


def funasr_model(folder):
    """funasr's AutoModel, LLM in fp32 and no dither, so that numbers compare."""
    from funasr import AutoModel

    settings = {"llm_conf": {"llm_dtype": "fp32"}, "frontend_conf": {"dither": 0.0}, "ncpu": 1}
    quiet = {"device": "cpu", "disable_update": True, "disable_pbar": True}
    return AutoModel(model=str(folder), **quiet, **settings)


@pytest.fixture(scope="module")
def theirs(official_folder):
    return funasr_model(official_folder)


@pytest.fixture(scope="module")
def ours(official_folder):
    parts = load(official_folder)
    parts.frontend.dither = 0.0
    model.freeze(parts.nano)
    return parts


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    manifest = make_twins.wav_files(tmp_path_factory.mktemp("clips"), n=3)
    return sorted(manifest.parent.glob("*.wav"))


@pytest.fixture(scope="module")
def batch(ours, clips):
    feats = [ours.frontend.features(model.load_audio(path, 16000)) for path in clips]
    return pad_sequence(feats, batch_first=True), torch.tensor([len(x) for x in feats])


def assert_same_rows(found, expected, lens):
    for row, n in enumerate(lens.tolist()):
        torch.testing.assert_close(found[row, :n], expected[row, :n], atol=1e-4, rtol=0)


# ---- the same numbers as funasr ---------------------------------------------


@torch.no_grad()
def test_encoder_adaptor_and_ctc_branch_equal_funasr(theirs, ours, batch):
    (feats, lens), nano = batch, ours.nano
    enc, enc_lens = nano.encode(feats, lens)
    expected, expected_lens = theirs.model.encode(feats.clone(), lens)
    assert_same_rows(enc, expected, lens)
    adapted = theirs.model.audio_adaptor(expected, lens)[0]
    assert_same_rows(nano.audio_adaptor(enc, enc_lens)[0], adapted, lens)
    log_probs = theirs.model.ctc.log_softmax(theirs.model.ctc_decoder(expected, lens)[0])
    assert_same_rows(nano.ctc_log_probs(enc, enc_lens)[0], log_probs, lens)
    assert enc_lens.tolist() == expected_lens.tolist()
    assert nano.ctc.blank == theirs.model.blank_id == ours.ctc_tokenizer.classes


def funasr_batch(theirs, clips):
    """What funasr's dataset makes of clips and TEXTS, right-padded with -1 as its collator does."""
    tokenizer, frontend, rows = theirs.kwargs["tokenizer"], theirs.kwargs["frontend"], []
    for path, text in zip(clips, TEXTS, strict=True):
        chat = theirs.model.generate_chatml(theirs.model.get_prompt([]), str(path))
        chat[2]["content"] = text
        chat = theirs.model.data_template(chat)
        rows.append(theirs.model.data_load_speech(chat, tokenizer, frontend))
    names = ("input_ids", "attention_mask", "labels_ids", "fbank_beg", "fake_token_len")
    settings = {"batch_first": True, "padding_value": -1}
    flat = {n: pad_sequence([row[n].reshape(-1) for row in rows], **settings) for n in names}
    speech = pad_sequence([row["speech"][0] for row in rows], batch_first=True)
    lens = torch.cat([row["speech_lengths"][0] for row in rows]).reshape(-1)
    return flat | {"speech": speech, "speech_lengths": lens}


@torch.no_grad()
def test_spliced_llm_input_and_loss_equal_funasr(theirs, ours, batch, clips):
    seen, nano = {}, ours.nano
    hook = theirs.model.llm.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    loss, _, _ = theirs.model.forward(**funasr_batch(theirs, clips))
    hook.remove()
    targets = [f"{text}<|im_end|>" for text in TEXTS]
    targets = ours.tokenizer(targets, add_special_tokens=False)["input_ids"]
    prompts, embed = [ft.nano_prompt(ours.tokenizer)] * 3, nano.llm.get_input_embeddings()
    spliced = model.splice(embed, prompts, *nano.listen(*nano.encode(*batch)), targets)
    assert torch.equal(spliced.mask, seen["attention_mask"].long())
    assert_same_rows(spliced.embeds, seen["inputs_embeds"], spliced.mask.sum(1))
    total, tokens, _ = model.transcript_loss(nano.llm, spliced)
    torch.testing.assert_close(total / tokens, loss[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_text_and_ctc_classes_equal_funasr(theirs, ours, clips, monkeypatch):
    monkeypatch.setattr(model, "cut_loop", lambda *a, **k: False)  # random weights repeat
    nano, tokenizer, coder = ours.nano, ours.tokenizer, ours.ctc_tokenizer
    stop, embed = tokenizer.convert_tokens_to_ids("<|im_end|>"), nano.llm.get_input_embeddings()
    prompts = [ft.nano_prompt(tokenizer, "张三,李四", "中文")]
    asked = {"max_length": 20, "language": "中文", "hotwords": ["张三", "李四"]}
    for path in clips:
        expected = theirs.generate(input=[str(path)], **asked)[0]
        feats = ours.frontend.features(model.load_audio(path, 16000))[None]
        heard = nano.hear(*nano.encode(feats, torch.tensor([feats.shape[1]])))
        spliced = model.splice(embed, prompts, heard.speech, heard.speech_lens, pad_left=True)
        answer = model.greedy_decode(nano.llm, spliced, stop, [20])[0]
        text = tokenizer.decode(answer, skip_special_tokens=True).replace("/sil", " ")
        assert " ".join(text.split()) == " ".join(expected["text"].split())
        assert coder.decode(heard.paths[0]) == expected["ctc_text"]
    for text in ("please press one", "don't  hold, thank you 123!", "今天天气很好 WiFi 吧"):
        assert coder.encode(text) == theirs.model.ctc_tokenizer.encode(text)
        assert coder.decode(coder.encode(text)) == text


def test_llm_positions_is_funasrs_formula():
    for n in range(1, 2001):
        expected = 1 + (n - 3 + 2) // 2
        expected = 1 + (expected - 3 + 2) // 2
        assert ft.llm_positions(n) == (expected - 1) // 2 + 1
    assert ft.llm_positions(167) == 21  # 10 s


@torch.no_grad()
def test_padding_changes_nothing(ours, batch):
    (feats, lens), nano = batch, ours.nano
    row, count = int(lens.argmin()), ft.llm_positions(int(lens.min()))
    feats = feats.masked_fill(~model.length_mask(lens, feats.shape[1])[..., None], float("nan"))
    enc, enc_lens = nano.encode(feats, lens)
    enc = enc.masked_fill(~model.length_mask(lens, enc.shape[1])[..., None], float("nan"))
    single = nano.encode(feats[row : row + 1, : lens[row]], lens[row : row + 1])
    speech, expected = nano.listen(enc, enc_lens)[0][row, :count], nano.listen(*single)[0][0]
    torch.testing.assert_close(speech, expected, atol=1e-5, rtol=0)
    scores = nano.ctc_log_probs(enc, enc_lens)[0][row, : lens[row]]
    torch.testing.assert_close(scores, nano.ctc_log_probs(*single)[0][0], atol=1e-4, rtol=0)


def test_released_sizes():
    from transformers import (
        FunAsrNanoConfig,
        FunAsrNanoForConditionalGeneration,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    with torch.device("meta"):
        theirs = FunAsrNanoForConditionalGeneration(FunAsrNanoConfig()).state_dict()
        conf = Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )  # fmt: skip
        cfg = model.load_config(["output_dir=x"], ft.DEFAULTS)
        encoder = model.SenseVoiceEncoder(**cfg.audio_encoder_conf)
        adaptor = ft.FunASRTransformer(**cfg.audio_adaptor_conf)
        decoder = ft.FunASRTransformer(**cfg.ctc_decoder_conf)
        ctc = ft.CTCOutput(decoder.width, 60514, **cfg.ctc_conf)
        nano = ft.FunASRNano(encoder, adaptor, Qwen3ForCausalLM(conf), decoder, ctc)
    assert sum(p.numel() for p in nano.parameters()) == 868_857_667
    names = list(nano.state_dict())
    assert len(names) == 1347 and sum(not name.startswith(ft.CTC) for name in names) == 1261
    found = {}
    for name, value in nano.state_dict().items():
        if not name.startswith(ft.CTC):
            pieces = ft.hf_names(name, cfg.audio_encoder_conf)
            found |= zip(pieces, value.chunk(len(pieces)), strict=True)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in theirs.items()}


# ---- front ends -------------------------------------------------------------


def telephone_noise(seconds=3.0):
    """Noise from 200 to 3600 Hz at 8 kHz with speech's loudness, its level moving by 30 dB."""
    spectrum = torch.fft.rfft(torch.randn(int(8000 * seconds)))
    hz = torch.linspace(0, 4000, len(spectrum))
    wave = torch.fft.irfft(spectrum * ((hz > 200) & (hz < 3600)), n=int(8000 * seconds))
    return 0.1 * wave * 10 ** (-1.5 * torch.rand(int(seconds * 10)).repeat_interleave(800))


def upsampled(wave, dither=0.0):
    return model.kaldi_fbank(model.resample(wave, 8000, 16000), 16000, "up", dither)


def test_native_8_khz_has_the_features_of_the_upsampled_path():
    """On up to 60 of the demo's prompts where it has fetched them, on noise in any case."""
    low, high = 1127 * torch.log(1 + torch.tensor([20.0, 8000.0]) / 700)
    centres = 700 * (torch.exp((low + (high - low) * torch.arange(1, 81) / 81) / 1127) - 1)
    speech = (centres >= 100) & (centres <= 3400)
    for waves in ([telephone_noise()], [model.load_audio(path, 8000) for path in REAL]):
        found = [(ft.telephone_fbank(x, dither=0.0) - upsampled(x)).abs() for x in waves]
        assert not found or torch.cat(found)[:, speech].mean() < 0.05
    wave = torch.zeros(8000 * 20)  # above 4 kHz the dither has the level it has after upsampling
    ours, expected = ft.telephone_fbank(wave, dither=1.0), upsampled(wave, dither=1.0)
    torch.testing.assert_close(ours.mean(0), expected.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(ours.std(0)[5:], expected.std(0)[5:], atol=0.25, rtol=0)


def test_native_axis_is_funasrs_front_end_at_8_khz():
    from funasr.frontends.wav_frontend import WavFrontend

    wave, sizes = telephone_noise(), {"n_mels": 80, "lfr_m": 7, "lfr_n": 6}
    theirs = WavFrontend(fs=8000, window="hamming", dither=0.0, **sizes)
    expected, _ = theirs(wave[None], torch.tensor([len(wave)]))
    found = ft.NanoFrontend(8000, "native", dither=0.0).features(wave)
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=0)


def test_dither_depends_on_the_key_alone_and_short_clips_are_named():
    frontend, wave = ft.NanoFrontend(8000, "pretrained"), telephone_noise(0.5)
    state, first = torch.get_rng_state(), frontend.features(wave, "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, frontend.features(wave, "a"))
    assert not torch.equal(first, frontend.features(wave, "b"))
    with pytest.raises(model.AudioError, match="0.013 s is shorter than one 25 ms window"):
        frontend.features(torch.zeros(100), "a")


# ---- loading, and back to funasr --------------------------------------------


def test_a_copy_without_ctc_and_a_model_without_llm_load(official_folder, tmp_path):
    parts = load(make_twins.official_folder(tmp_path / "hf", with_ctc=False, tiktoken=False))
    assert parts.nano.ctc is None and parts.ctc_tokenizer is None and parts.tokenizer is not None
    parts = load(official_folder, with_llm=False)
    assert parts.nano.llm is None and parts.tokenizer is None and parts.ctc_tokenizer is not None


def shorten(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize(("change", "message"), [
    (lambda w, _: w.pop("audio_encoder.after_norm.bias"), "Missing.*encoder.after_norm.bias"),
    (lambda w, _: w.pop("ctc.ctc_lo.bias"), "Missing.*ctc.ctc_lo.bias"),
    (lambda w, _: w.update({"audio_encoder.extra": torch.zeros(1)}), "Unexpected.*extra"),
    (lambda w, _: w.update({"audio_encoder.tp_norm.bias": torch.zeros(7)}), "size mismatch"),
    (lambda w, _: [w.pop(name) for name in list(w) if name.startswith("llm.")], "Missing.*llm"),
    (lambda _, folder: shorten(folder / "multilingual.tiktoken"), "mismatch for ctc.ctc_lo"),
    (lambda _, folder: (folder / "multilingual.tiktoken").unlink(), "tiktoken: no such file"),
    (lambda _, folder: shutil.rmtree(folder / "Qwen3-0.6B"), "no config.json of the LLM"),
], ids=["encoder", "ctc", "unknown", "size", "llm", "short", "tokenizer", "folder"])  # fmt: skip
def test_a_folder_that_does_not_fit_is_refused(official_folder, tmp_path, change, message):
    folder = Path(shutil.copytree(official_folder, tmp_path / "nano"))
    tensors = dict(weights(folder, "model"))
    change(tensors, folder)
    torch.save(tensors, folder / "model.pt")
    with pytest.raises(model.UserError, match=message):
        load(folder)


def test_merge_folds_lora_and_all_hear_the_same(world, official_folder, tmp_path, capsys):
    released, merged = official_folder / "model.pt", tmp_path / "m"
    extra = "llm=Qwen3-0.6b llm_conf.use_lora=true optim_conf.lr=1e-2 train_conf.max_steps=3"
    run = train(world, tmp_path / "r", f"{extra} frontend_conf.fs=16000")
    clip = world["folder"] / "wide" / "utt001.wav"
    merge.main([str(run), str(released), "-o", str(merged)])
    base, new, trained = weights(official_folder, "model"), weights(merged, "model"), weights(run)
    assert base.keys() == new.keys()
    differ = {name for name in base if not torch.equal(base[name].float(), new[name].float())}
    assert {name.split(".")[0] for name in differ} == {"audio_encoder", "llm"}
    assert all(torch.equal(new[name], trained[name]) for name in trained if "lora" not in name)
    target = "llm.model.layers.1.self_attn.v_proj"
    low, high = (trained[f"{target}.lora_{n}.default.weight"].double() for n in "AB")
    wanted = base[f"{target}.weight"].double() + 32 / 16 * high @ low
    assert new[f"{target}.weight"].dtype == torch.bfloat16
    torch.testing.assert_close(new[f"{target}.weight"].double(), wanted, atol=0.01, rtol=0)
    one, two = (infer_on(path, tmp_path, clip, "decode.readout=ctc")[0] for path in (run, merged))
    assert one["text"] == two["text"] != "" and one["segments"] == two["segments"]
    (read,) = infer_on(merged, tmp_path, clip, "hotwords=张三,李四", "decode.tokens_per_s=3")
    assert read["ctc_text"] == one["text"] and "text" in read
    capsys.readouterr()
    theirs = funasr_model(merged)
    assert "miss key" not in capsys.readouterr().out
    for name, value in theirs.model.state_dict().items():
        assert torch.equal(value.float(), new[name].float()), name
    assert isinstance(theirs.generate(input=[str(clip)], max_length=8)[0]["ctc_text"], str)
    other = make_twins.official_folder(tmp_path / "other", seed=1) / "model.pt"
    for arguments, message in (
        ((run, other, tmp_path / "n"), "was trained on"),
        ((run, released, merged), "is not empty"),
        ((merged, released, merged), "no finished run"),
    ):
        with pytest.raises(model.UserError, match=message):
            merge.merge(*arguments)


def test_merge_keeps_tied_embeddings_tied(world, official_folder, tmp_path):
    extra = "llm_conf.freeze=false llm=Qwen3-0.6b train_conf.max_steps=1"
    run = train(world, tmp_path / "run", extra)
    merge.merge(run, official_folder / "model.pt", tmp_path / "new")
    table, new = weights(run)["llm.model.embed_tokens.weight"], weights(tmp_path / "new", "model")
    assert torch.equal(new["llm.model.embed_tokens.weight"], table)
    assert torch.equal(new["llm.lm_head.weight"], table)  # both names are the new ones


# ---- transformers' layout ---------------------------------------------------


@pytest.fixture(scope="module")
def hub(world, official_folder, tmp_path_factory):
    """A run, exported for transformers: our parts of the run, theirs of the export."""
    from transformers import AutoProcessor, FunAsrNanoForConditionalGeneration

    folder = tmp_path_factory.mktemp("hub")
    extra = "llm=Qwen3-0.6b optim_conf.lr=1e-2 train_conf.max_steps=3 frontend_conf.fs=16000"
    extra += " audio_adaptor_conf.freeze=false ctc_decoder_conf.freeze=false"
    run, out = train(world, folder / "run", extra), folder / "export"
    merge.main([str(run), str(official_folder), "-o", str(out), "--to", "hf"])
    ours = ft.load_parts(ft.read_run(run)["conf"], run, torch.float32, True)
    ours.frontend.dither = 0.0
    model.freeze(ours.nano)
    load = FunAsrNanoForConditionalGeneration.from_pretrained
    net, told = load(out, attn_implementation="sdpa", output_loading_info=True)
    assert not any(told.values()) and net.dtype == torch.float32
    rest = {"run": run, "out": out, "ours": ours, "net": net.eval()}
    return ft.SimpleNamespace(processor=AutoProcessor.from_pretrained(out), **rest)


def our_logits(ours, feats, low_rate):
    nano, embed = ours.nano, ours.nano.llm.get_input_embeddings()
    speech = nano.audio_adaptor(*nano.encode(feats[None], torch.tensor([len(feats)])))
    if low_rate:
        speech = nano.listen(*nano.encode(feats[None], torch.tensor([len(feats)])))
    spliced = model.splice(embed, [ft.nano_prompt(ours.tokenizer)], *speech, [[1, 2, 3]])
    return nano.llm(inputs_embeds=spliced.embeds).logits


@torch.no_grad()
def test_transformers_has_our_logits_on_the_same_features_and_positions(hub, clips):
    net, token = hub.net, hub.net.config.audio_token_id
    for path in clips:
        feats = hub.ours.frontend.features(model.load_audio(path, 16000))
        mask = torch.ones(1, len(feats), dtype=torch.long)
        before, after = ft.nano_prompt(hub.ours.tokenizer)
        ids = torch.tensor([[*before, *[token] * len(feats), *after, 1, 2, 3]])
        inputs = {"input_features": feats[None], "input_features_mask": mask}
        found = net(input_ids=ids, **inputs).logits  # all T positions, by their own code alone
        torch.testing.assert_close(found, our_logits(hub.ours, feats, False), atol=2e-4, rtol=0)
        embeds = net.get_input_embeddings()(ids)
        embeds[0, len(before) : len(before) + len(feats)] = net.get_audio_features(
            **inputs
        ).pooler_output
        kept = ft.llm_positions(len(feats))
        places = [*range(len(before) + kept), *range(len(before) + len(feats), ids.shape[1])]
        assert 0 < kept < len(feats)
        found = net(inputs_embeds=embeds[:, places]).logits
        torch.testing.assert_close(found, our_logits(hub.ours, feats, True), atol=2e-4, rtol=0)
        assert (found[0, -1] - our_logits(hub.ours, feats, False)[0, -1]).abs().max() > 0.01


@torch.no_grad()
def test_padding_changes_nothing_in_transformers_where_attention_is_named(hub, clips):
    feats = [hub.ours.frontend.features(model.load_audio(path, 16000)) for path in clips]
    lens = torch.tensor([len(x) for x in feats])
    batch, mask = pad_sequence(feats, batch_first=True), model.length_mask(lens, int(lens.max()))
    found = hub.net.get_audio_features(batch, mask.long()).pooler_output.split(lens.tolist())
    for theirs, one in zip(found, feats, strict=True):
        speech = hub.ours.nano.encode(one[None], torch.tensor([len(one)]))
        expected = hub.ours.nano.audio_adaptor(*speech)[0][0]
        torch.testing.assert_close(theirs, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_what_plain_transformers_hears_otherwise(hub, clips):
    """All T positions, no factor 32768, no dither; the factor moves only the floor."""
    wave = model.load_audio(clips[0], 16000)
    inputs = hub.processor.apply_transcription_request(wave.numpy())
    feats = hub.ours.frontend.features(wave)
    assert (inputs["input_ids"] == hub.net.config.audio_token_id).sum() == len(feats)
    plain, lens = inputs["input_features"][0], torch.tensor([len(feats)])
    again = hub.processor.apply_transcription_request(wave.numpy())["input_features"][0]
    assert torch.equal(plain, again)  # nothing random
    offset, floor = 2 * np.log(32768), np.log(torch.finfo(torch.float32).eps)
    expected = (feats - offset).clamp(min=floor)
    torch.testing.assert_close(plain, expected, atol=2e-3, rtol=0)
    moved = hub.ours.nano.encode(feats[None] - offset, lens)[0]
    enc = hub.ours.nano.encode(feats[None], lens)[0]
    torch.testing.assert_close(moved, enc, atol=1e-3, rtol=0)  # the first norm takes it out
    faint = hub.processor.apply_transcription_request(wave.numpy() * 1e-3)["input_features"][0]
    assert (faint <= floor + 1e-3).float().mean() > 0.1  # a call's pauses are lost
    assert (hub.ours.frontend.features(wave * 1e-3) > floor + 1).all()


@pytest.mark.parametrize(("asked", "theirs"), [
    ({}, {}), ({"hotwords": "张三,李四"}, {"keywords": ["张三", "李四"]}),
    ({"language": "中文"}, {"language": "zh"}),
    ({"hotwords": "one", "language": "英文"}, {"keywords": "one", "language": "English"}),
])  # fmt: skip
def test_the_chat_template_writes_our_prompt(hub, clips, asked, theirs):
    wave = model.load_audio(clips[1], 16000)
    inputs = hub.processor.apply_transcription_request(wave.numpy(), **theirs)
    before, after = ft.nano_prompt(hub.ours.tokenizer, **asked)
    count = inputs["input_features"].shape[1]
    audio = [hub.net.config.audio_token_id] * count
    assert inputs["input_ids"][0].tolist() == [*before, *audio, *after]


def our_answer(ours, wave):
    nano, tokenizer = ours.nano, ours.tokenizer
    stop, embed = tokenizer.convert_tokens_to_ids("<|im_end|>"), nano.llm.get_input_embeddings()
    feats = ours.frontend.features(wave)[None]
    speech = nano.listen(*nano.encode(feats, torch.tensor([feats.shape[1]])))
    spliced = model.splice(embed, [ft.nano_prompt(tokenizer)], *speech, pad_left=True)
    most = [model.token_cap(len(wave) / 16000)]
    answer = model.greedy_decode(nano.llm, spliced, stop, most)[0]
    return tokenizer.decode(answer, skip_special_tokens=True).strip()


@torch.no_grad()
def test_the_cards_example_gives_our_answer(hub, clips, monkeypatch):
    monkeypatch.setattr(model, "cut_loop", lambda *a, **k: False)  # random weights repeat
    (code,) = re.findall(r"```python\n(.*?)```", (hub.out / "README.md").read_text(), re.DOTALL)
    for path in clips:
        wave, said = model.load_audio(path, 16000), io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(code.replace("THIS_FOLDER", str(hub.out)).replace("call.wav", str(path)), {})
        assert said.getvalue().strip() == our_answer(hub.ours, wave) != ""
        faint = 1e-4 * wave  # without the factor all of it would lie under the floor
        found = merge.transcribe(hub.net, hub.processor, faint, 16000)
        assert found == our_answer(hub.ours, faint) != ""
        plain = merge.transcribe(hub.net, hub.processor, wave, 16000, plain=True)
        inputs = hub.processor.apply_transcription_request(wave.numpy())
        most = model.token_cap(len(wave) / 16000)
        expected = hub.net.generate(**inputs, max_new_tokens=most, do_sample=False)
        expected = expected[0, inputs["input_ids"].shape[1] :]
        assert plain == hub.processor.decode(expected, skip_special_tokens=True).strip()


def test_names_are_mapped_there_and_back_and_a_run_goes_on(hub, world, official_folder, tmp_path):
    conf = ft.read_run(hub.run)["conf"]
    base = dict(ft.read_base(official_folder / "model.pt", conf))
    merge.write_hf(base, conf, official_folder / "model.pt", tmp_path)
    back = ft.read_base(tmp_path / "model.safetensors", conf)
    assert model.hash_tensors(back) == model.hash_tensors(base)  # so either may be given to merge
    clip = world["folder"] / "wide" / "utt001.wav"
    one, two = (infer_on(f, tmp_path / "..", clip, "decode.tokens_per_s=3")[0]
                for f in (official_folder, tmp_path))  # fmt: skip
    assert one["text"] == two["text"] and one["ctc_text"] == two["ctc_text"] != ""
    short = "train_conf.max_steps=1 frontend_conf.fs=16000"
    run = train(world, tmp_path / "run", f"{short} init_param={tmp_path}")
    merge.merge(run, tmp_path, tmp_path / "new", "hf")
    new = ft.read_base(tmp_path / "new" / "model.safetensors", conf)
    changed = {name for name in new if not torch.equal(new[name].float(), base[name].float())}
    assert {name.split(".")[0] for name in changed} == {"audio_encoder"}
    assert all(torch.equal(new[name], value) for name, value in weights(run).items())
    with pytest.raises(model.UserError, match="only a model.pt becomes funasr's layout; add"):
        merge.merge(run, tmp_path, tmp_path / "other")


def test_transformers_folder_without_ctc_and_of_another_kind(hub, world, tmp_path, capsys):
    folder = Path(shutil.copytree(hub.out, tmp_path / "hf"))
    (folder / "ctc.safetensors").unlink()
    (folder / "config.yaml").unlink()
    extra = f"train_conf.max_steps=1 frontend_conf.fs=16000 init_param={folder}"
    run = train(world, tmp_path / "a", f"{extra} ctc_decoder_conf.freeze=false")
    assert f"{folder}/model.safetensors: has no CTC branch (M" in (said := capsys.readouterr().out)
    assert "a new one trains" in said and "ctc.ctc_lo.weight" in weights(run)
    train(world, tmp_path / "b", f"{extra} ctc_weight=0 llm=Qwen3-0.6b")
    assert "has no CTC branch (ModelScope's model.pt has), none trains" in capsys.readouterr().out
    with pytest.raises(model.UserError, match="has no audio_.*_conf has other sizes"):
        train(world, tmp_path / "c", f"{extra} audio_encoder_conf.num_blocks=4")
    cfg = model.load_config(["model.dir=x"], infer.DEFAULTS)
    with pytest.raises(model.UserError, match="has no audio_encoder.enc"):  # of 70 blocks
        ft.load_listener(folder, cfg, torch.device("cpu"), torch.float32)


def test_the_model_card(hub, world, official_folder, tmp_path):
    text, run = (hub.out / "README.md").read_text(encoding="utf-8"), ft.read_run(hub.run)
    front = yaml.safe_load(text.split("---")[1])
    assert front["library_name"] == "transformers" and front["base_model"] == official_folder.name
    assert run["base_hash"] in text and (hub.run / "table.md").read_text().strip() in text
    seconds = sum(map(model.audio_seconds, world["calls"].parent.glob("utt*.wav")))
    assert run["hours"] == {"telephone": pytest.approx(seconds / 3600)}
    assert f"{seconds / 3600:.3g} hours of telephone" in text
    assert "- `optim_conf.lr`: 0.01\n" in text and "data_split_num" not in text
    assert "frontend_conf.fs" not in text and "`audio_encoder_conf.freeze`: False" in text
    rows = [json.loads(line) for line in open(run["conf"]["valid_data_set_list"][0])]
    folder = Path(run["conf"]["valid_data_set_list"][0]).parent
    waves = [model.load_audio(folder / row["source"], 16000) for row in rows]
    for plain in (False, True):
        texts = [merge.transcribe(hub.net, hub.processor, x, 16000, plain=plain) for x in waves]
        rate = model.error_rate([row["target"] for row in rows], texts)["rate"]
        assert f"{rate:.1%}" in text
    run["conf"]["frontend_conf"] |= {"fs": 8000, "mel_axis": "pretrained"}
    run["conf"]["valid_data_set_list"] = [str(tmp_path / "gone.jsonl")]
    far = merge.card(run, hub.run, hub.out, "hf")
    assert "Upsample to 16 kHz" in far and "rate was not measured: no validation clips" in far
    plain = merge.card(run, hub.run, hub.out, "funasr")
    assert "AutoModel" in plain and "Upsample to 16 kHz" in plain
    for words in (text, far, plain, *(path.read_text() for path in hub.out.glob("*.json"))):
        assert str(tmp_path.parent) not in words  # no path of this machine
    for arguments in ([], ["run", "base", "-o", "out", "--to", "onnx"]):
        with pytest.raises(SystemExit, match="expected merge RUN_DIR MODEL.pt -o FOLDER"):
            merge.main(arguments)
