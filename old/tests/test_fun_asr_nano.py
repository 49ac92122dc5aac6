"""FunASRNano against funasr's own class on the same weights, its front ends, its prompt, and its strict loading."""

import json
import shutil
from pathlib import Path

import make_twins
import pytest
import torch
import yaml
from make_twins import spoken

import model

REAL = sorted((Path(__file__).parents[1] / "demo" / "speech" / "real").glob("*.wav"))[::9][:60]


def edit_yaml(path, **sections):
    config = yaml.safe_load(path.read_text(encoding="utf-8")) | sections
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


@pytest.fixture
def copied(official_folder, tmp_path):
    return Path(shutil.copytree(official_folder, tmp_path / "nano"))


# ---- the same numbers as funasr -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(official_folder):
    """funasr's AutoModel on the twin, LLM in fp32 and no dither, so that numbers can be compared."""
    from funasr import AutoModel

    loaded = AutoModel(model=str(official_folder), device="cpu", disable_update=True, disable_pbar=True,
                       llm_conf={"llm_dtype": "fp32"}, frontend_conf={"dither": 0.0}, ncpu=1)  # fmt: skip
    return loaded


@pytest.fixture(scope="module")
def ours(official_folder):
    nano, frontend, tokenizer, ctc_tokenizer = model.load_nano(official_folder)
    frontend.dither = 0.0
    return nano, frontend, tokenizer, ctc_tokenizer


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    import soundfile

    folder, paths = tmp_path_factory.mktemp("clips"), []
    for n, words in enumerate((["one", "two", "please", "hold"], ["five"], ["press", "three"])):
        soundfile.write(folder / f"{n}.wav", spoken(words, seed=n), 16000)
        paths.append(folder / f"{n}.wav")
    return paths


@pytest.fixture(scope="module")
def batch(ours, clips):
    feats = [ours[1].features(model.load_audio(path, 16000)) for path in clips]
    lens = torch.tensor([len(f) for f in feats])
    return torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), lens


def assert_same_rows(found, expected, lens):
    for row, n in enumerate(lens.tolist()):
        torch.testing.assert_close(found[row, :n], expected[row, :n], atol=1e-4, rtol=0)


@torch.no_grad()
def test_encoder_adaptor_and_ctc_branch_equal_funasr(theirs, ours, batch):
    feats, lens = batch
    enc, enc_lens = ours[0].encode(feats, lens)
    expected, expected_lens = theirs.model.encode(feats.clone(), lens)
    assert_same_rows(enc, expected, lens)
    assert_same_rows(ours[0].audio_adaptor(enc, enc_lens)[0], theirs.model.audio_adaptor(expected, lens)[0], lens)
    log_probs, _ = ours[0].ctc_log_probs(enc, enc_lens)
    assert_same_rows(log_probs, theirs.model.ctc.log_softmax(theirs.model.ctc_decoder(expected, lens)[0]), lens)
    assert enc_lens.tolist() == expected_lens.tolist() and ours[0].ctc.blank == theirs.model.blank_id


def funasr_batch(theirs, clips, texts):
    """What funasr's dataset makes of clips and texts, right-padded with -1 as its collator does."""
    tokenizer, frontend, rows = theirs.kwargs["tokenizer"], theirs.kwargs["frontend"], []
    for path, text in zip(clips, texts):
        chat = theirs.model.generate_chatml(theirs.model.get_prompt([]), str(path))
        chat[2]["content"] = text
        rows.append(theirs.model.data_load_speech(theirs.model.data_template(chat), tokenizer, frontend))

    def pad(values, value=-1):
        return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=value)

    flat = {name: pad([row[name].reshape(-1) for row in rows])
            for name in ("input_ids", "attention_mask", "labels_ids", "fbank_beg", "fake_token_len")}  # fmt: skip
    return flat | {"speech": pad([row["speech"][0] for row in rows], 0.0),
                   "speech_lengths": torch.cat([row["speech_lengths"][0] for row in rows]).reshape(-1)}  # fmt: skip


@torch.no_grad()
def test_spliced_llm_input_and_loss_equal_funasr(theirs, ours, batch, clips):
    texts, seen = ["one two please hold", "five", "今天天气很好"], {}
    hook = theirs.model.llm.register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    loss, _, _ = theirs.model.forward(**funasr_batch(theirs, clips, texts))
    hook.remove()
    nano, _, tokenizer, _ = ours
    speech, speech_lens = nano.listen(*nano.encode(*batch))
    targets = [tokenizer(f"{text}<|im_end|>", add_special_tokens=False)["input_ids"] for text in texts]
    spliced = model.splice(nano.llm.get_input_embeddings(), [model.nano_prompt(tokenizer)] * 3, speech, speech_lens,
                           targets)  # fmt: skip
    assert torch.equal(spliced["attention_mask"], seen["attention_mask"].long())
    assert_same_rows(spliced["inputs_embeds"], seen["inputs_embeds"], spliced["attention_mask"].sum(1))
    total, tokens, _ = model.transcript_loss(nano.llm, spliced)
    torch.testing.assert_close(total / tokens, loss[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_text_of_llm_and_ctc_equals_funasr(theirs, ours, clips, monkeypatch):
    monkeypatch.setattr(model, "cut_loop", lambda *a, **k: False)  # random weights do little else than repeat
    nano, frontend, tokenizer, ctc_tokenizer = ours
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for path in clips:
        expected = theirs.generate(input=[str(path)], max_length=20, language="中文", hotwords=["张三", "李四"])[0]
        feats = frontend.features(model.load_audio(path, 16000))[None]
        enc, lens = nano.encode(feats, torch.tensor([feats.shape[1]]))
        prompt = model.nano_prompt(tokenizer, "中文", ["张三", "李四"])
        spliced = model.splice(nano.llm.get_input_embeddings(), [prompt], *nano.listen(enc, lens), pad_left=True)
        answers, _ = model.greedy_decode(nano.llm, spliced, stop, [20])
        text = " ".join(tokenizer.decode(answers[0], skip_special_tokens=True).replace("/sil", " ").split())
        assert text == " ".join(expected["text"].split())
        log_probs, _ = nano.ctc_log_probs(enc, lens)
        assert ctc_tokenizer.decode(model.ctc_greedy(log_probs, lens, nano.ctc.blank)[0]) == expected["ctc_text"]


def test_ctc_tokenizer_equals_funasr(theirs, ours):
    for text in ("please press one", "don't  hold, thank you 123!", "今天天气很好 WiFi 吧"):
        classes = ours[3].encode(text)
        assert classes == theirs.model.ctc_tokenizer.encode(text)
        assert ours[3].decode(classes) == theirs.model.ctc_tokenizer.decode(classes) == text
    assert ours[3].classes == ours[0].ctc.blank


@pytest.mark.parametrize("frames", [range(1, 2001)])
def test_llm_positions_is_funasrs_formula(frames):
    for n in frames:
        expected = 1 + (n - 3 + 2) // 2
        expected = 1 + (expected - 3 + 2) // 2
        assert model.llm_positions(n) == (expected - 1) // 2 + 1
    assert model.llm_positions(torch.arange(1, 2001)).tolist() == [model.llm_positions(n) for n in frames]
    assert model.llm_positions(167) == 21  # 10 s


@torch.no_grad()
def test_padding_changes_nothing(ours, batch):
    feats, lens = batch
    feats = feats.masked_fill(~model.length_mask(lens, feats.shape[1])[..., None], float("nan"))
    nano = ours[0]
    enc, enc_lens = nano.encode(feats, lens)
    enc = enc.masked_fill(~model.length_mask(lens, enc.shape[1])[..., None], float("nan"))
    single, single_lens = nano.encode(feats[1:2, : int(lens[1])], lens[1:2])
    torch.testing.assert_close(nano.listen(enc, enc_lens)[0][1, : model.llm_positions(int(lens[1]))],
                               nano.listen(single, single_lens)[0][0], atol=1e-5, rtol=0)
    torch.testing.assert_close(nano.ctc_log_probs(enc, enc_lens)[0][1, : lens[1]],
                               nano.ctc_log_probs(single, single_lens)[0][0], atol=1e-4, rtol=0)


def test_released_sizes():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
        conf = Qwen3Config(vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
                           num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
        nano = model.FunASRNano(
            model.SenseVoiceEncoder(), model.FunASRTransformer(), Qwen3ForCausalLM(conf),
            model.FunASRTransformer(llm_dim=512, n_layer=5), model.CTCOutput(512, 60515))  # fmt: skip
    assert sum(p.numel() for p in nano.parameters()) == 868_857_667
    names = list(nano.state_dict())
    assert len(names) == 1347 and sum(not n.startswith(model.CTC_PREFIXES) for n in names) == 1261


# ---- front ends --------------------------------------------------------------------------------------------------


def telephone_noise(seconds=3.0):
    """Noise between 200 and 3600 Hz at 8 kHz with speech's loudness, its level moving by 30 dB."""
    spectrum = torch.fft.rfft(torch.randn(int(8000 * seconds)))
    hz = torch.linspace(0, 4000, len(spectrum))
    wave = torch.fft.irfft(spectrum * ((hz > 200) & (hz < 3600)), n=int(8000 * seconds))
    return 0.1 * wave * 10 ** (-1.5 * torch.rand(int(seconds * 10)).repeat_interleave(800)[: len(wave)])


def mel_bins_of_speech():
    """Indices of the mel bins centred between 100 Hz and 3.4 kHz."""
    low, high = 1127 * torch.log(1 + torch.tensor([20.0, 8000.0]) / 700)
    centres = 700 * (torch.exp((low + (high - low) * torch.arange(1, 81) / 81) / 1127) - 1)
    return (centres >= 100) & (centres <= 3400)


def upsampled_fbank(wave, dither=0.0):
    import torchaudio

    return torchaudio.compliance.kaldi.fbank(
        model.resample(wave, 8000, 16000)[None] * 32768, num_mel_bins=80, frame_length=25, frame_shift=10,
        dither=dither, energy_floor=0.0, window_type="hamming", sample_frequency=16000, snip_edges=True)  # fmt: skip


def test_native_8_khz_has_the_features_of_the_upsampled_path():
    wave = telephone_noise()
    difference = (model.telephone_fbank(wave, dither=0.0) - upsampled_fbank(wave)).abs().mean(0)
    assert difference[mel_bins_of_speech()].mean() < 0.05


def test_native_8_khz_has_the_features_of_the_upsampled_path_on_real_telephone_speech():
    """On up to 60 of the demo's prompts; on noise in telephone speech's band where `make demo` has not fetched them."""
    differences = []
    for wave in [model.load_audio(path, 8000) for path in REAL] or [telephone_noise()]:
        differences.append((model.telephone_fbank(wave, dither=0.0) - upsampled_fbank(wave)).abs())
    mean = torch.cat(differences).mean(0)
    print(f"{len(REAL)} prompts: {float(mean[mel_bins_of_speech()].mean()):.3f} nats in the speech band; by bin:",
          [round(float(x), 3) for x in mean])
    assert mean[mel_bins_of_speech()].mean() < 0.05


def test_above_4_khz_the_dither_has_the_level_it_has_after_upsampling():
    wave = torch.zeros(8000 * 20)
    ours, upsampled = model.telephone_fbank(wave, dither=1.0), upsampled_fbank(wave, dither=1.0)
    torch.testing.assert_close(ours.mean(0), upsampled.mean(0), atol=0.25, rtol=0)
    torch.testing.assert_close(ours.std(0)[5:], upsampled.std(0)[5:], atol=0.25, rtol=0)


def test_native_axis_is_funasrs_front_end_at_8_khz():
    from funasr.frontends.wav_frontend import WavFrontend

    wave = telephone_noise()
    theirs = WavFrontend(fs=8000, window="hamming", n_mels=80, lfr_m=7, lfr_n=6, dither=0.0)
    expected, _ = theirs(wave[None], torch.tensor([len(wave)]))
    found = model.NanoFrontend(8000, "native", dither=0.0).features(wave)
    torch.testing.assert_close(found, expected[0], atol=1e-4, rtol=0)
    assert len(found) == model.NanoFrontend(8000).num_frames(len(wave))


def test_dither_depends_on_the_key_alone():
    frontend, wave = model.NanoFrontend(8000), telephone_noise(0.5)
    state = torch.get_rng_state()
    first = frontend.features(wave, "a")
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, frontend.features(wave, "a")) and not torch.equal(first, frontend.features(wave, "b"))


def test_a_clip_of_less_than_a_window_and_a_wrong_rate_are_named():
    with pytest.raises(model.AudioError, match="a: 0.013 s is shorter than one 25 ms window"):
        model.NanoFrontend(8000).features(torch.zeros(100), "a")
    with pytest.raises(ValueError, match="fs is 8000 or 16000"):
        model.NanoFrontend(11025)


# ---- loading -----------------------------------------------------------------------------------------------------


def rewrite(folder, change):
    weights = torch.load(folder / "model.pt", weights_only=True)
    change(weights)
    torch.save(weights, folder / "model.pt")


def test_the_copy_without_ctc_loads_and_has_no_ctc_branch(tmp_path):
    folder = make_twins.official_folder(tmp_path / "hf", with_ctc=False, tiktoken=False)
    nano, _, _, ctc_tokenizer = model.load_nano(folder)
    assert nano.ctc is None and nano.ctc_decoder is None and ctc_tokenizer is None


def test_the_llm_can_be_left_out(official_folder):
    nano, _, tokenizer, ctc_tokenizer = model.load_nano(official_folder, with_llm=False)
    assert nano.llm is None and nano.audio_adaptor is None and tokenizer is None and ctc_tokenizer is not None


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("audio_encoder.after_norm.bias"), "1 of .* missing: audio_encoder.after_norm.bias"),
    (lambda w: w.pop("ctc.ctc_lo.bias"), "missing: ctc.ctc_lo.bias"),
    (lambda w: w.update({"audio_encoder.extra": torch.zeros(1)}), "unknown: audio_encoder.extra"),
    (lambda w: w.update({"audio_encoder.tp_norm.bias": torch.zeros(7)}),
     r"of another size: audio_encoder.tp_norm.bias is \(7,\), expected \(32,\)"),
])  # fmt: skip
def test_a_model_pt_that_does_not_fit_is_refused(copied, change, message):
    rewrite(copied, change)
    with pytest.raises(ValueError, match=message):
        model.load_nano(copied)


def test_a_configuration_of_another_depth_is_refused(copied):
    config = yaml.safe_load((copied / "config.yaml").read_text())
    edit_yaml(copied / "config.yaml", audio_encoder_conf=config["audio_encoder_conf"] | {"num_blocks": 2})
    with pytest.raises(ValueError, match="unknown: audio_encoder.encoders.1"):
        model.load_nano(copied)


def test_tokenizers_are_checked(copied):
    lines = (copied / "multilingual.tiktoken").read_text().splitlines(keepends=True)
    (copied / "multilingual.tiktoken").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="tokenizer of another vocabulary"):
        model.load_nano(copied)
    (copied / "multilingual.tiktoken").unlink()
    with pytest.raises(ValueError, match="multilingual.tiktoken: no such file; it comes with the model's folder"):
        model.load_nano(copied)


def test_an_llm_tokenizer_of_another_vocabulary_is_refused(copied):
    path = copied / "Qwen3-0.6B" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 5}))
    with pytest.raises(ValueError, match="tokenizer is of another vocabulary"):
        model.load_nano(copied)
    shutil.rmtree(copied / "Qwen3-0.6B")
    with pytest.raises(ValueError, match="no config.json of the LLM there; llm_conf.init_param_path"):
        model.load_nano(copied)


def test_a_torn_model_pt_is_refused(copied):
    (copied / "model.pt").write_bytes((copied / "model.pt").read_bytes()[:5000])
    with pytest.raises(ValueError, match="not a plain state dict"):
        model.load_nano(copied)


def test_unfreeze_undoes_freeze(whisper_folder):
    encoder = model.unfreeze(model.load_encoder(str(whisper_folder)))
    assert encoder.training and encoder.net.layers[0].training and all(p.requires_grad for p in encoder.parameters())
    assert not encoder.eval().net.layers[0].training
