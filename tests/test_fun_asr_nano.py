"""FunASRNano against funasr's own class on the same weights, its front ends, strict loading."""

import shutil
from pathlib import Path

import make_twins
import pytest
import soundfile
import torch
import yaml
from torch.nn.utils.rnn import pad_sequence

import finetune_encoder as ft
import model

REAL = sorted(Path(__file__).parents[1].glob("runs/demo/**/real/*.wav"))[::9][:60]


def load(folder, with_llm=True, **sections):
    conf = yaml.safe_load((Path(folder) / "config.yaml").read_text()) | sections
    return ft.load_parts(conf, Path(folder) / "model.pt", torch.float32, with_llm)


@pytest.fixture
def copied(official_folder, tmp_path):
    return Path(shutil.copytree(official_folder, tmp_path / "nano"))


# ---- the same numbers as funasr ---------------------------------------------


@pytest.fixture(scope="module")
def theirs(official_folder):
    """funasr's AutoModel on the twin, LLM in fp32 and no dither, so that numbers compare."""
    from funasr import AutoModel

    settings = {"llm_conf": {"llm_dtype": "fp32"}, "frontend_conf": {"dither": 0.0}, "ncpu": 1}
    quiet = {"device": "cpu", "disable_update": True, "disable_pbar": True}
    return AutoModel(model=str(official_folder), **quiet, **settings)


@pytest.fixture(scope="module")
def ours(official_folder):
    parts = load(official_folder)
    parts.frontend.dither = 0.0
    model.freeze(parts.nano)
    return parts


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder, paths = tmp_path_factory.mktemp("clips"), []
    for n, words in enumerate((["one", "two", "please", "hold"], ["five"], ["press", "three"])):
        paths.append(folder / f"{n}.wav")
        soundfile.write(paths[-1], make_twins.spoken(words, seed=n), 16000)
    return paths


@pytest.fixture(scope="module")
def batch(ours, clips):
    feats = [ours.frontend.features(model.load_audio(path, 16000)) for path in clips]
    return pad_sequence(feats, batch_first=True), torch.tensor([len(x) for x in feats])


def assert_same_rows(found, expected, lens):
    for row, n in enumerate(lens.tolist()):
        torch.testing.assert_close(found[row, :n], expected[row, :n], atol=1e-4, rtol=0)


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


def funasr_batch(theirs, clips, texts):
    """What funasr's dataset makes of clips and texts, right-padded with -1 as its collator does."""
    tokenizer, frontend, rows = theirs.kwargs["tokenizer"], theirs.kwargs["frontend"], []
    for path, text in zip(clips, texts, strict=True):
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
    texts, seen, nano = ["one two please hold", "five", "今天天气很好"], {}, ours.nano
    hook = theirs.model.llm.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    loss, _, _ = theirs.model.forward(**funasr_batch(theirs, clips, texts))
    hook.remove()
    targets = [f"{text}<|im_end|>" for text in texts]
    targets = ours.tokenizer(targets, add_special_tokens=False)["input_ids"]
    prompts, embed = [ft.nano_prompt(ours.tokenizer)] * 3, nano.llm.get_input_embeddings()
    spliced = model.splice(embed, prompts, *nano.listen(*nano.encode(*batch)), targets)
    assert torch.equal(spliced.mask, seen["attention_mask"].long())
    assert_same_rows(spliced.embeds, seen["inputs_embeds"], spliced.mask.sum(1))
    total, tokens, _ = model.transcript_loss(nano.llm, spliced)
    torch.testing.assert_close(total / tokens, loss[0], atol=1e-4, rtol=0)


@torch.no_grad()
def test_greedy_text_of_llm_and_ctc_equals_funasr(theirs, ours, clips, monkeypatch):
    monkeypatch.setattr(model, "cut_loop", lambda *a, **k: False)  # random weights repeat
    nano, tokenizer = ours.nano, ours.tokenizer
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    asked = {"max_length": 20, "language": "中文", "hotwords": ["张三", "李四"]}
    for path in clips:
        expected = theirs.generate(input=[str(path)], **asked)[0]
        feats = ours.frontend.features(model.load_audio(path, 16000))[None]
        heard = nano.hear(*nano.encode(feats, torch.tensor([feats.shape[1]])))
        prompts, embed = (
            [ft.nano_prompt(tokenizer, "张三,李四", "中文")],
            nano.llm.model.embed_tokens,
        )
        speech = heard.speech, heard.speech_lens
        spliced = model.splice(embed, prompts, *speech, pad_left=True)
        answer = model.greedy_decode(nano.llm, spliced, stop, [20])[0]
        text = tokenizer.decode(answer, skip_special_tokens=True).replace("/sil", " ")
        assert " ".join(text.split()) == " ".join(expected["text"].split())
        assert ours.ctc_tokenizer.decode(heard.paths[0]) == expected["ctc_text"]


def test_ctc_tokenizer_equals_funasr(theirs, ours):
    for text in ("please press one", "don't  hold, thank you 123!", "今天天气很好 WiFi 吧"):
        classes = ours.ctc_tokenizer.encode(text)
        assert classes == theirs.model.ctc_tokenizer.encode(text)
        assert ours.ctc_tokenizer.decode(classes) == text


def test_llm_positions_is_funasrs_formula():
    for n in range(1, 2001):
        expected = 1 + (n - 3 + 2) // 2
        expected = 1 + (expected - 3 + 2) // 2
        assert ft.llm_positions(n) == (expected - 1) // 2 + 1
    assert ft.llm_positions(167) == 21  # 10 s


@torch.no_grad()
def test_padding_changes_nothing(ours, batch):
    (feats, lens), nano = batch, ours.nano
    feats = feats.masked_fill(~model.length_mask(lens, feats.shape[1])[..., None], float("nan"))
    enc, enc_lens = nano.encode(feats, lens)
    enc = enc.masked_fill(~model.length_mask(lens, enc.shape[1])[..., None], float("nan"))
    single = nano.encode(feats[1:2, : int(lens[1])], lens[1:2])
    count = ft.llm_positions(int(lens[1]))
    speech, expected = nano.listen(enc, enc_lens)[0][1, :count], nano.listen(*single)[0][0]
    torch.testing.assert_close(speech, expected, atol=1e-5, rtol=0)
    scores = nano.ctc_log_probs(enc, enc_lens)[0][1, : lens[1]]
    torch.testing.assert_close(scores, nano.ctc_log_probs(*single)[0][0], atol=1e-4, rtol=0)


def test_released_sizes():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with torch.device("meta"):
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


def test_above_4_khz_the_dither_has_the_level_it_has_after_upsampling():
    wave = torch.zeros(8000 * 20)
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


# ---- loading ----------------------------------------------------------------


def test_a_copy_without_ctc_and_a_model_without_llm_load(official_folder, tmp_path):
    parts = load(make_twins.official_folder(tmp_path / "hf", with_ctc=False, tiktoken=False))
    assert parts.nano.ctc is None and parts.ctc_tokenizer is None and parts.tokenizer is not None
    parts = load(official_folder, with_llm=False)
    assert parts.nano.llm is None and parts.tokenizer is None and parts.ctc_tokenizer is not None


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("audio_encoder.after_norm.bias"), "Missing.*audio_encoder.after_norm.bias"),
    (lambda w: w.pop("ctc.ctc_lo.bias"), "Missing.*ctc.ctc_lo.bias"),
    (lambda w: w.update({"audio_encoder.extra": torch.zeros(1)}), "Unexpected.*extra"),
    (lambda w: w.update({"audio_encoder.tp_norm.bias": torch.zeros(7)}), "size mismatch"),
    (lambda w: [w.pop(name) for name in list(w) if name.startswith("llm.")], "Missing.*llm"),
], ids=["encoder", "ctc", "unknown", "size", "llm"])  # fmt: skip
def test_a_model_pt_that_does_not_fit_is_refused(copied, change, message):
    weights = torch.load(copied / "model.pt", weights_only=True)
    change(weights)
    torch.save(weights, copied / "model.pt")
    with pytest.raises(model.UserError, match=f"model.pt: does not fit.*{message}"):
        load(copied)


def test_a_missing_or_foreign_tokenizer_or_llm_is_refused(copied):
    path = copied / "multilingual.tiktoken"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(model.UserError, match="size mismatch for ctc.ctc_lo"):
        load(copied)
    path.unlink()
    with pytest.raises(model.UserError, match="multilingual.tiktoken: no such file"):
        load(copied)
    shutil.rmtree(copied / "Qwen3-0.6B")
    with pytest.raises(model.UserError, match="no config.json of the LLM"):
        load(copied)


def test_a_merged_run_loads_in_funasr_with_no_missing_key(official_folder, tmp_path, capsys):
    from funasr import AutoModel

    wav = make_twins.wav_files(tmp_path / "wavs", n=2, rate=8000)
    arguments = [f"init_param={official_folder}", f"train_data_set_list={wav}", "llm=none"]
    arguments += [f"valid_data_set_list={wav}", f"output_dir={tmp_path / 'run'}"]
    conf = yaml.safe_load((official_folder / "config.yaml").read_text())
    for part in ("audio_encoder_conf", "audio_adaptor_conf", "ctc_decoder_conf"):
        arguments += [f"{part}.{key}={value}" for key, value in conf[part].items()]
    arguments += ["audio_encoder_conf.freeze=false", "detach_ctc_decoder=false"]
    arguments += ["train_conf.max_steps=1", "dataset_conf.num_workers=0", "optim_conf.lr=1e-2"]
    ft.main(model.load_config(arguments, ft.DEFAULTS))
    ft.merge(tmp_path / "run", official_folder / "model.pt", tmp_path / "merged")
    capsys.readouterr()
    quiet = {"device": "cpu", "disable_update": True, "disable_pbar": True, "ncpu": 1}
    theirs = AutoModel(model=str(tmp_path / "merged"), **quiet, llm_conf={"llm_dtype": "fp32"})
    assert "miss key" not in capsys.readouterr().out
    trained = model.read_weights(tmp_path / "run" / "trained.pt")
    base = model.read_weights(official_folder / "model.pt")
    for name, value in theirs.model.state_dict().items():
        expected = trained.get(name, base[name]).float()
        torch.testing.assert_close(value.float(), expected, atol=0, rtol=0, msg=name)
    name = "audio_encoder.tp_norm.bias"
    assert not torch.equal(trained[name], base[name].float())
    read = theirs.generate(input=[str(tmp_path / "wavs" / "utt000.wav")], max_length=8)
    assert isinstance(read[0]["ctc_text"], str)
