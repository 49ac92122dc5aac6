"""Reading audio, and the two front ends against the implementations they stand in for."""

import json
import math
import tracemalloc

import numpy as np
import pytest
import soundfile
import torch
from make_twins import spoken, wav_files, write_cmvn
from transformers import WhisperFeatureExtractor

import model


def sine(hz, rate, seconds=1.0, level=0.5):
    return level * np.sin(2 * math.pi * hz * np.arange(round(seconds * rate)) / rate)


def level_at(wave, hz, rate=16000):
    """Amplitude of the `hz` component, edges left out, where a resampling filter fades."""
    wave = np.asarray(wave, dtype=np.float64)[rate // 10 : -rate // 10]
    phase = np.exp(-2j * math.pi * hz * np.arange(len(wave)) / rate)
    return 2 * abs((wave * phase * np.hanning(len(wave))).sum() / np.hanning(len(wave)).sum())


def noise(samples, seed=0, level=0.1):
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def funasr_features(wave, cmvn_file=None):
    from funasr.frontends.wav_frontend import WavFrontend

    front_end = WavFrontend(cmvn_file=cmvn_file, lfr_m=7, lfr_n=6, dither=0.0)
    feats, lens = front_end(wave[None], torch.tensor([len(wave)]))
    assert feats.shape[1] == int(lens[0])
    return feats[0]


# ---- load_audio -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 22050, 32000, 44100, 48000])
def test_a_sine_keeps_its_frequency_and_level_at_every_rate(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(1000, rate), rate, subtype="FLOAT")
    wave = model.load_audio(tmp_path / "a.wav", 16000)
    assert wave.dtype == torch.float32 and wave.dim() == 1
    assert abs(len(wave) - 16000) <= 1
    assert level_at(wave, 1000) == pytest.approx(0.5, abs=1e-3)
    rest = np.asarray(wave)[1600:-1600] - sine(1000, 16000)[1600 : len(wave) - 1600]
    assert np.abs(rest).max() < 1e-3, "something else than the sine came out"


def test_upsampling_telephone_speech_leaves_no_image_above_4_khz(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(3000, 8000), 8000, subtype="FLOAT")
    wave = model.load_audio(tmp_path / "a.wav", 16000)
    assert level_at(wave, 3000) == pytest.approx(0.5, abs=1e-3)
    assert level_at(wave, 5000) < 0.5 * 10 ** (-90 / 20)


def test_downsampling_removes_what_the_new_rate_cannot_carry(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(11000, 48000) + sine(500, 48000), 48000, subtype="FLOAT")
    wave = model.load_audio(tmp_path / "a.wav", 16000)
    assert level_at(wave, 500) == pytest.approx(0.5, abs=1e-3)
    assert level_at(wave, 5000) < 1e-4  # 11 kHz would fold to 5 kHz


def test_stereo_is_averaged(tmp_path):
    left, right = sine(1000, 16000), sine(3000, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    wave = model.load_audio(tmp_path / "a.wav", 16000)
    torch.testing.assert_close(wave, torch.from_numpy((left + right) / 2).float(), atol=1e-7, rtol=0)


@pytest.mark.parametrize("ending, atol", [("wav", 1e-4), ("flac", 1e-4), ("ogg", 0.05), ("mp3", 0.05), ("aiff", 1e-4)])
def test_containers_give_the_same_samples(tmp_path, ending, atol):
    soundfile.write(tmp_path / f"a.{ending}", sine(1000, 16000), 16000)
    wave = model.load_audio(tmp_path / f"a.{ending}", 16000)
    assert level_at(wave, 1000) == pytest.approx(0.5, abs=atol)


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "PCM_U8", "ULAW", "ALAW", "FLOAT", "DOUBLE"])
def test_sample_formats_come_out_at_the_same_level(tmp_path, subtype):
    soundfile.write(tmp_path / "a.wav", sine(1000, 8000), 8000, subtype=subtype)
    assert level_at(model.load_audio(tmp_path / "a.wav", 16000), 1000) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("subtype", ["ULAW", "ALAW", "PCM_U8", "PCM_24"])
def test_an_odd_number_of_bytes_is_no_truncation(tmp_path, subtype):
    """Half of all mu-law telephone files have an odd number of samples; libsndfile remarks on the padding byte."""
    soundfile.write(tmp_path / "a.wav", sine(1000, 16000)[:15999], 16000, subtype=subtype)
    assert len(model.load_audio(tmp_path / "a.wav", 16000)) == 15999


def write_wav(path, samples=None, **kwargs):
    soundfile.write(path, sine(500, 16000) if samples is None else samples, 16000, **kwargs)


def make_missing(path):
    return path.with_name("nothing.wav")


def make_empty(path):
    path.write_bytes(b"")


def make_zero_length(path):
    write_wav(path, np.zeros(0))


def make_nan(path):
    write_wav(path, np.where(np.arange(16000) == 7, np.nan, 0.1), subtype="FLOAT")


def make_infinite(path):
    write_wav(path, np.where(np.arange(16000) == 7, np.inf, 0.1), subtype="FLOAT")


def make_truncated_wav(path):
    write_wav(path)
    path.write_bytes(path.read_bytes()[:20000])


def make_truncated_flac(path):
    path = path.with_suffix(".flac")
    write_wav(path, np.asarray(noise(16000)))
    path.write_bytes(path.read_bytes()[:20000])
    return path


def make_truncated_mulaw(path):
    write_wav(path, sine(500, 16000)[:15999], subtype="ULAW")
    path.write_bytes(path.read_bytes()[:10000])


def make_truncated_mp3(path):
    path = path.with_suffix(".mp3")
    write_wav(path, np.asarray(noise(64000)))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def make_header_only(path):
    write_wav(path)
    path.write_bytes(path.read_bytes()[:44])


def make_text(path):
    path.write_text("this is a text file that someone renamed\n" * 50)


def make_raw(path):
    path = path.with_suffix(".raw")  # headerless samples: soundfile wants to be told rate and format
    path.write_bytes(b"\x00\x01" * 8000)
    return path


def make_folder(path):
    path.mkdir()


BAD_FILES = [
    make_missing, make_empty, make_zero_length, make_nan, make_infinite, make_truncated_wav, make_truncated_flac,
    make_truncated_mulaw, make_truncated_mp3, make_header_only, make_text, make_raw, make_folder,
]  # fmt: skip


@pytest.mark.parametrize("make", BAD_FILES)
def test_unusable_file_is_an_audio_error_that_names_it(tmp_path, make):
    path = tmp_path / "clip.wav"
    path = make(path) or path
    with pytest.raises(model.AudioError) as error:
        model.load_audio(path, 16000)
    assert str(path) in str(error.value)


def test_the_error_says_what_is_wrong(tmp_path):
    for make, words in [(make_missing, "no such file"), (make_empty, "empty"), (make_truncated_wav, "truncated"),
                        (make_zero_length, "no samples"), (make_nan, "NaN")]:  # fmt: skip
        path = tmp_path / f"{make.__name__}.wav"
        with pytest.raises(model.AudioError, match=words):
            model.load_audio(make(path) or path, 16000)


def test_a_wav_from_a_pipe_is_read_although_its_header_has_no_length(tmp_path):
    write_wav(tmp_path / "a.wav", subtype="PCM_16")
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # what ffmpeg and sox write when they cannot seek back
    (tmp_path / "pipe.wav").write_bytes(data)
    assert torch.equal(model.load_audio(tmp_path / "pipe.wav", 16000), model.load_audio(tmp_path / "a.wav", 16000))


# ---- augmentation -----------------------------------------------------------------------------------------------


def test_speed_1_1_is_ten_percent_shorter_and_higher():
    wave = torch.from_numpy(sine(1000, 16000, seconds=2)).float()
    fast = model.change_speed(wave, 1.1, 16000)
    assert len(fast) == pytest.approx(32000 / 1.1, abs=1)
    assert level_at(fast, 1100) == pytest.approx(0.5, abs=1e-3)
    assert model.change_speed(wave, 1.0, 16000) is wave


def test_telephone_channel_keeps_the_band_and_drops_the_rest(rng):
    tones = sum(sine(hz, 16000, seconds=2, level=0.1) for hz in (60, 1000, 6000))
    wave = torch.from_numpy(tones).float()
    line = model.telephone_channel(wave, 16000, rng)
    assert line.shape == wave.shape
    in_band = level_at(line, 1000)
    assert level_at(line, 60) < in_band / 10 and level_at(line, 6000) < in_band / 100
    peaks = [model.telephone_channel(wave, 16000, rng).abs().max().item() for _ in range(30)]
    assert 10 ** (-32 / 20) < min(peaks) < 0.15 and 0.3 < max(peaks) < 1.2, "levels spread over 0 to -30 dBFS"


def test_telephone_channel_repeats_with_the_generator():
    wave = noise(8000)
    lines = [model.telephone_channel(wave, 16000, torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert torch.equal(lines[0], lines[1]) and not torch.equal(lines[0], lines[2])


# ---- Kaldi front end --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [400, 559, 560, 719, 1200, 1360, 1519, 1680, 3333, 16000, 48123])
def test_features_equal_funasr(samples):
    wave = noise(samples)
    ours = model.wav_frontend(wave, dither=0.0)
    assert ours.shape == (model.lfr_frames(model.fbank_frames(samples)), 560)
    torch.testing.assert_close(ours, funasr_features(wave), atol=1e-3, rtol=0)


def test_features_with_cmvn_equal_funasr(tmp_path):
    write_cmvn(tmp_path / "am.mvn")
    wave = torch.from_numpy(spoken(["please", "press", "one"]))
    ours = model.wav_frontend(wave, dither=0.0, cmvn=model.load_cmvn(tmp_path / "am.mvn"))
    torch.testing.assert_close(ours, funasr_features(wave, str(tmp_path / "am.mvn")), atol=1e-3, rtol=0)


def test_stacking_equals_funasr_for_every_length():
    from funasr.frontends.wav_frontend import apply_lfr

    for frames in range(1, 60):
        feats = torch.randn(frames, 80)
        assert torch.equal(model.apply_lfr(feats), apply_lfr(feats, 7, 6)), frames


def test_a_cmvn_file_without_both_vectors_is_refused(tmp_path):
    (tmp_path / "am.mvn").write_text("<Nnet>\n<AddShift> 560 560\n<LearnRateCoef> 0 [ 1 2 ]\n</Nnet>\n")
    with pytest.raises(ValueError, match="am.mvn"):
        model.load_cmvn(tmp_path / "am.mvn")


def test_a_clip_shorter_than_a_window_is_an_audio_error_with_its_key():
    with pytest.raises(model.AudioError, match="utt7"):
        model.wav_frontend(noise(399), key="utt7")


@pytest.mark.parametrize("rate", [8000, 16000])
def test_kaldi_fbank_is_torchaudios_with_the_clips_own_dither(rate):
    import torchaudio

    wave, generator = noise(2 * rate), model.dither_generator("a")
    with torch.random.fork_rng():
        torch.manual_seed(generator.initial_seed())  # torchaudio dithers with the global generator
        expected = torchaudio.compliance.kaldi.fbank(
            wave[None] * 32768, num_mel_bins=80, dither=1.0, energy_floor=0.0, window_type="hamming",
            sample_frequency=rate)
    torch.testing.assert_close(model.kaldi_fbank(wave, rate, "a"), expected, atol=1e-4, rtol=0)


def test_dither_depends_on_the_key_only():
    wave = noise(8000)
    first = model.wav_frontend(wave, key="a")
    torch.rand(5)  # other use of the global generator changes nothing
    assert torch.equal(model.wav_frontend(wave, key="a"), first)
    assert not torch.equal(model.wav_frontend(wave, key="b"), first)


def test_dither_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    model.wav_frontend(noise(8000), key="a")
    assert torch.equal(torch.rand(4), expected)


def test_dither_has_funasrs_distribution():
    """On digital silence nothing but the dither is left: same mean and spread of every mel bin as in FunASR."""
    from funasr.frontends.wav_frontend import WavFrontend

    silence = torch.zeros(16000 * 20)
    ours = model.wav_frontend(silence, key="a")
    theirs = WavFrontend(lfr_m=7, lfr_n=6, dither=1.0)(silence[None], torch.tensor([len(silence)]))[0][0]
    assert ours.mean().item() == pytest.approx(4.43, abs=0.1)  # measured in the study; -15.9 without dither
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.03)
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.35, rtol=0)
    assert ours.std(0).mean().item() == pytest.approx(theirs.std(0).mean().item(), rel=0.03)


# ---- Whisper front end ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_to_30s", [False, True])
def test_whisper_features_equal_transformers(whisper_folder, pad_to_30s):
    encoder = model.load_encoder(whisper_folder, pad_to_30s=pad_to_30s)
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_folder)
    for samples in (1600, 16000, 33333):
        wave = noise(samples, seed=samples)
        ours = encoder.features(wave)
        same = wave if pad_to_30s else torch.nn.functional.pad(wave, (0, 3200))
        padding = "max_length" if pad_to_30s else "do_not_pad"
        theirs = extractor(same.numpy(), sampling_rate=16000, padding=padding, return_tensors="pt").input_features[0].T
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_whisper_refuses_more_than_30_s_and_names_the_clip(whisper_folder):
    encoder = model.load_encoder(whisper_folder)
    with pytest.raises(model.AudioError, match="utt9"):
        encoder.features(torch.zeros(480001), key="utt9")


# ---- manifests --------------------------------------------------------------------------------------------------


def test_jsonl_paths_start_at_the_manifests_folder(tmp_path):
    rows = model.read_manifest(wav_files(tmp_path, n=3))
    assert [row["key"] for row in rows] == ["utt000", "utt001", "utt002"]
    assert rows[1]["where"] == "manifest.jsonl:2"
    assert all(len(model.load_audio(row["source"], 16000)) > 0 for row in rows)


def write_lines(tmp_path, *lines):
    path = tmp_path / "m.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def entry(key="a", **extra):
    return json.dumps({"key": key, "source": "a.wav", "target": "hello"} | extra, ensure_ascii=False)


def test_absolute_paths_and_extra_fields_stay(tmp_path):
    line = entry(source="/data/a.wav", language="zh", prompt="Transcribe:", hotwords=["Ann"])
    (row,) = model.read_manifest(write_lines(tmp_path, line))
    assert row["source"] == "/data/a.wav"
    assert (row["language"], row["prompt"], row["hotwords"]) == ("zh", "Transcribe:", ["Ann"])


def test_a_line_break_of_unicode_inside_a_transcript_does_not_end_the_line(tmp_path):
    rows = model.read_manifest(write_lines(tmp_path, entry("a", target="one\u2028two"), entry("b", target="a\x85b")))
    assert [row["target"] for row in rows] == ["one\u2028two", "a\x85b"]


def test_a_byte_order_mark_is_not_part_of_the_first_line(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + entry().encode())
    assert model.read_manifest(path)[0]["key"] == "a"


@pytest.mark.parametrize(
    "lines, message",
    [
        ([entry(), '{"key": "b", "source"'], "m.jsonl:2: broken JSON"),
        ([entry(), "", json.dumps({"key": "b", "source": "b.wav"})], "m.jsonl:3: .*'target'"),
        ([json.dumps({"key": "b", "target": "x"})], "m.jsonl:1: .*'source'"),
        ([json.dumps({"source": "b.wav", "target": "x"})], "m.jsonl:1: .*'key'"),
        ([entry(target=5)], "m.jsonl:1: .*'target'"),
        (["[1, 2]"], "m.jsonl:1"),
        ([entry("a"), entry("b"), entry("a")], "m.jsonl:3: key 'a' .*m.jsonl:1"),
        (["", ""], "holds no utterances"),
    ],
)
def test_a_broken_manifest_names_file_and_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        model.read_manifest(write_lines(tmp_path, *lines))


def test_bytes_that_are_not_utf8_name_the_file(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_bytes(entry(target="naïve").encode("latin-1"))
    with pytest.raises(ValueError, match="m.jsonl"):
        model.read_manifest(path)


def test_a_missing_manifest_says_what_is_accepted(tmp_path):
    with pytest.raises(ValueError, match="jsonl.*Kaldi.*data_aishell"):
        model.read_manifest(tmp_path / "nothing.jsonl")


def test_funasr_chat_lines_are_read(tmp_path):
    turns = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "语音转写：<|startofspeech|>!/data/BAC009.wav<|endofspeech|>"},
        {"role": "assistant", "content": "今天天气"},
    ]
    path = write_lines(tmp_path, json.dumps({"messages": turns, "speech_length": 10, "text_length": 4}))
    (row,) = model.read_manifest(path)
    assert (row["source"], row["target"]) == ("/data/BAC009.wav", "今天天气")
    assert "BAC009" in row["key"]


def test_a_funasr_chat_line_without_audio_names_its_line(tmp_path):
    path = write_lines(tmp_path, entry(), json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    with pytest.raises(ValueError, match="m.jsonl:2"):
        model.read_manifest(path)


def test_kaldi_folder_joins_wav_scp_and_text(tmp_path):
    (tmp_path / "wav.scp").write_text("b wavs/b.wav \na /data/a.wav\n")
    (tmp_path / "text").write_text("a hello  there\nb\n")
    rows = model.read_manifest(tmp_path)
    assert [(r["key"], r["source"], r["target"]) for r in rows] == [
        ("b", str(tmp_path / "wavs/b.wav"), ""),
        ("a", "/data/a.wav", "hello  there"),
    ]


@pytest.mark.parametrize(
    "scp, text, message",
    [("a a.wav\n", None, "text is not there"), ("a a.wav\n", "b x\n", "a has no line"),
     ("a sph2pipe a.sph |\n", "a x\n", "wav.scp:1"), ("a\n", "a x\n", "wav.scp:1")],
)  # fmt: skip
def test_a_broken_kaldi_folder_says_where(tmp_path, scp, text, message):
    (tmp_path / "wav.scp").write_text(scp)
    if text is not None:
        (tmp_path / "text").write_text(text)
    with pytest.raises(ValueError) as error:
        model.read_manifest(tmp_path)
    assert message in str(error.value)


def test_aishell_folder_joins_words_and_names_clips_without_text(tmp_path, capsys):
    (tmp_path / "transcript").mkdir()
    text = "BAC009S0002W0122 而 对 楼市 成交\nBAC009S0002W0124 一线 城市\n"
    (tmp_path / "transcript" / "aishell_transcript_v0.8.txt").write_text(text, encoding="utf-8")
    for key, part in [("0122", "train"), ("0123", "train"), ("0124", "test")]:
        folder = tmp_path / "wav" / part / "S0002"
        folder.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / f"BAC009S0002W{key}.wav", np.zeros(800), 16000)
    (row,) = model.read_manifest(f"{tmp_path}:train")
    assert (row["key"], row["target"], row["language"]) == ("BAC009S0002W0122", "而对楼市成交", "zh")
    assert "1 of 2" in capsys.readouterr().out
    assert [r["target"] for r in model.read_manifest(f"{tmp_path}:test")] == ["一线城市"]


# ---- utterances of a training run -------------------------------------------------------------------------------


def test_utterances_come_back_as_they_went_in():
    rows = [{"key": "a", "target": "你好 \u2028\\\"", "ids": [3, 1], "frames": 7, "seconds": 0.42, "hotwords": ["x"]},
            {"key": "b", "target": "yes", "ids": [70000], "frames": 12, "seconds": 0.1 + 0.2, "language": "en"},
            {"key": "c", "target": "no", "ids": [1, 2], "frames": 2, "seconds": 1.0}]
    utterances = model.Utterances()
    for row in rows:
        utterances.append(row)
    assert list(utterances) == rows and len(utterances) == 3
    assert utterances[-1] == rows[2] and utterances[:2] == rows[:2] and utterances[2:9] == rows[2:]
    with pytest.raises(IndexError):
        utterances[3]
    assert list(utterances.frames) == [7, 12, 2] and list(utterances.num_ids) == [2, 1, 2]
    assert utterances.token_counts()[[0, 1, 2, 3, 70000]].tolist() == [0, 2, 1, 1, 1]
    assert len(utterances.token_counts()) == 70001 and utterances.token_counts().sum() == 5
    assert sum(utterances.seconds) == pytest.approx(1.72)


def test_a_hundred_thousand_utterances_take_little_memory():
    tracemalloc.start()
    utterances = model.Utterances()
    for number in range(100_000):
        utterances.append({"key": f"BAC009S{number:09d}", "target": "一二三四五六七八九十一二三四五", "frames": 83,
                           "ids": list(range(20000, 20015)), "seconds": 5.0})
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 240 * len(utterances)
