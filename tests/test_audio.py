"""Reading audio and manifests, and the front ends against the implementations they stand in for."""

import io
import json
import math
import os
import struct

import av
import datasets
import numpy as np
import pytest
import soundfile
import torch
import torchaudio
from funasr.frontends.wav_frontend import WavFrontend
from funasr.frontends.wav_frontend import apply_lfr as funasr_apply_lfr
from make_twins import write_cmvn

import model


def sine(hz, rate, seconds=1.0, level=0.5):
    return level * np.sin(2 * math.pi * hz * np.arange(round(seconds * rate)) / rate)


def level_at(wave, hz, rate=16000):
    """Amplitude of the `hz` component, edges left out, where a resampling filter fades."""
    wave = np.asarray(wave, dtype=np.float64)[rate // 10 : -rate // 10]
    phase = np.exp(-2j * math.pi * hz * np.arange(len(wave)) / rate)
    return 2 * abs((wave * phase * np.hanning(len(wave))).sum() / np.hanning(len(wave)).sum())


def encoded(samples, rate=16000, form="WAV", subtype=None, **how):
    file = io.BytesIO()
    soundfile.write(file, samples, rate, subtype, format=form, **how)
    return file.getvalue()


def muxed(form, codec, samples, rate=16000, picture=False):
    """What FFmpeg writes of one channel, a film where there is a picture."""
    file, codecs = io.BytesIO(), ["mpeg4"] * picture + [codec]
    with av.open(file, "w", format=form) as out:
        *films, sound = (out.add_stream(name, rate=rate if name == codec else 5) for name in codecs)
        sound.layout = "mono"
        for film in films:
            film.width = film.height = 16
            film.pix_fmt = "yuv420p"
            for part in (av.VideoFrame(16, 16, "yuv420p"), None):
                out.mux(film.encode(part))
        frame = av.AudioFrame.from_ndarray(np.int16(samples * 32767)[None], "s16", "mono")
        frame.sample_rate = rate
        for part in (frame, None):
            out.mux(sound.encode(part))
    return file.getvalue()


@pytest.fixture(autouse=True)
def say_again():
    model.note.cache_clear()


def noise(samples, seed=0, level=0.1):
    return level * torch.randn(samples, generator=torch.Generator().manual_seed(seed))


def funasr_features(wave, cmvn_file=None, dither=0.0):
    front_end = WavFrontend(cmvn_file=cmvn_file, lfr_m=7, lfr_n=6, dither=dither)
    return front_end(wave[None], torch.tensor([len(wave)]))[0][0]


@pytest.mark.parametrize("rate", [8000, 11025, 16000, 44100, 48000])
def test_a_sine_keeps_its_frequency_and_level_at_every_rate(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", sine(1000, rate), rate, subtype="FLOAT")
    wave = model.load_audio(tmp_path / "a.wav", 16000)
    assert wave.dtype == torch.float32 and wave.dim() == 1 and abs(len(wave) - 16000) <= 1
    assert level_at(wave, 1000) == pytest.approx(0.5, abs=1e-3)
    rest = np.asarray(wave)[1600:-1600] - sine(1000, 16000)[1600 : len(wave) - 1600]
    assert np.abs(rest).max() < 1e-3, "something else than the sine came out"
    fast = model.change_speed(wave, 1.1, 16000)
    assert len(fast) == pytest.approx(16000 / 1.1, abs=1) and model.change_speed(wave, 1, 1) is wave
    assert level_at(fast, 1100) == pytest.approx(0.5, abs=1e-3)


def test_resampling_leaves_no_image_and_no_alias():
    for rate, inside, outside, alias in (
        (8000, 3000, 3800, 4200),  # upsampled telephone speech has no image above 4 kHz
        (48000, 500, 11000, 5000),  # 11 kHz would fold to 5 kHz
    ):
        wave = torch.from_numpy(sine(inside, rate) + sine(outside, rate)).float()
        wave = model.resample(wave, rate, 16000)
        assert level_at(wave, inside) == pytest.approx(0.5, abs=1e-3)
        assert level_at(wave, alias) < 0.5 * 10 ** (-90 / 20)
    with pytest.raises(model.AudioError, match="usual rate"):
        model.resample(wave, 16001, 16000)


@pytest.mark.parametrize(("ending", "subtype", "atol"), [
    ("flac", None, 1e-4), ("ogg", None, 0.05), ("mp3", None, 0.05), ("aiff", None, 1e-4),
    ("wav", "PCM_16", 1e-4), ("wav", "PCM_24", 1e-4), ("wav", "PCM_U8", 0.01),
    ("wav", "ULAW", 0.01), ("wav", "ALAW", 0.01), ("wav", "DOUBLE", 1e-4),
])  # fmt: skip
def test_containers_and_sample_formats_give_the_same_sound(tmp_path, ending, subtype, atol):
    """Of odd length: libsndfile then remarks on a padding byte, which is no truncation."""
    soundfile.write(tmp_path / f"a.{ending}", sine(1000, 16000)[:15999], 16000, subtype)
    wave = model.load_audio(tmp_path / f"a.{ending}", 16000)
    assert level_at(wave, 1000) == pytest.approx(0.5, abs=atol)
    assert len(wave) == 15999 or ending == "mp3" or ending == "ogg" and len(wave) == 15743


def test_sources_other_than_files(tmp_path):
    path, samples = tmp_path / "a.wav", np.round(sine(1000, 8000) * 2**15).astype(np.int16)
    soundfile.write(path, samples, 8000)
    content, expected = path.read_bytes(), model.load_audio(path, 16000)
    arrays = samples, samples / 2**15, samples.tolist(), samples.astype(np.int32) << 16
    sources = [{"array": array, "sampling_rate": 8000, "path": None} for array in arrays]
    sources += [content, {"bytes": content, "path": ""}, {"bytes": None, "path": str(path)}]
    for source in (path, *sources):
        wave = model.load_audio(source, 16000)
        torch.testing.assert_close(wave, expected, atol=1e-6, rtol=0)
        assert model.audio_seconds(source) == 1.0


def cut(path, at, samples=None, **how):
    """A file whose writer was killed: its first `at` bytes."""
    soundfile.write(path, sine(500, 16000) if samples is None else samples, 16000, **how)
    path.write_bytes(path.read_bytes()[:at])


def with_sample(path, value):
    samples = np.where(np.arange(16000) == 7, value, 0.1)
    soundfile.write(path, samples, 16000, subtype="FLOAT")


@pytest.mark.parametrize(("name", "make", "message"), [
    ("missing.wav", lambda path: None, "No such file"),
    ("folder.wav", lambda path: path.mkdir(), "directory"),
    ("empty.wav", lambda path: path.touch(), "not readable"),
    ("text.wav", lambda path: path.write_text("a text\n" * 50), "not readable"),
    ("headerless.raw", lambda path: path.write_bytes(b"\x00\x01" * 8000), "not readable"),
    ("header.wav", lambda path: cut(path, 44), "truncated|no samples"),
    ("zero.wav", lambda path: soundfile.write(path, np.zeros(0), 16000), "no samples"),
    ("nan.wav", lambda path: with_sample(path, np.nan), "NaN"),
    ("inf.wav", lambda path: with_sample(path, np.inf), "infinite"),
    ("cut.wav", lambda path: cut(path, 20000), "truncated, 9978 samples"),
    ("cut_mulaw.wav", lambda path: cut(path, 10000, subtype="ULAW"), "truncated"),
    ("cut.aiff", lambda path: cut(path, 20000), "truncated"),
    ("cut.flac", lambda path: cut(path, 20000, np.asarray(noise(16000))), "."),
    ("cut.mp3", lambda path: cut(path, 9000, np.asarray(noise(64000))), "."),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_an_audio_error(tmp_path, name, make, message):
    path = tmp_path / name
    make(path)
    with pytest.raises(model.AudioError, match=message):
        model.load_audio(path, 16000)
    if path.is_file():
        with pytest.raises(model.AudioError, match=message):
            model.load_audio(path.read_bytes(), 16000)


OGG = {"form": "OGG", "subtype": "VORBIS"}
OPUS = {"form": "OGG", "subtype": "OPUS"}


@pytest.mark.parametrize("make", [
    *[lambda x, form=form, kind=kind: encoded(x, 8000, form, kind) for form, kind in (
        ("WAV", "GSM610"), ("WAV", "G721_32"), ("AU", "G723_40"), ("WAV", "NMS_ADPCM_32"),
        ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("AIFF", "GSM610"), ("CAF", "ALAC_16"))],
    *[lambda x, form=form, codec=codec: muxed(form, codec, x, 8000) for form, codec in (
        ("ipod", "aac"), ("adts", "aac"), ("amr", "libopencore_amrnb"), ("webm", "libopus"),
        ("3gp", "libopencore_amrnb"), ("wav", "pcm_alaw"), ("wav", "adpcm_ms"))],
    *[lambda x, form=form: muxed(form, "aac", x, 8000, True) for form in ("mp4", "matroska")],
])  # fmt: skip
def test_what_phones_browsers_and_films_hold_is_read(make, capsys):
    source = make(sine(1000, 8000, 2.0))
    wave = model.load_audio(source, 16000)
    assert len(wave) / 16000 == pytest.approx(2.0, abs=0.2)
    assert level_at(wave[3200:28800], 1000) == pytest.approx(0.5, abs=0.06)
    assert model.audio_seconds(source) == pytest.approx(len(wave) / 16000, abs=1e-4)
    part = model.load_audio(source, 16000, 0.5, 1.5)
    by_ffmpeg = "costs the decoding" in capsys.readouterr().err
    assert by_ffmpeg is not source.startswith(model.PCM_MARKS)
    torch.testing.assert_close(part[800:-800], wave[8800:23200], atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [{"form": "MP3"}, OGG, OPUS])
def test_joined_files_are_read_whole_and_half_ones_refused(kind):
    one, two = encoded(sine(1000, 16000, 2.0), **kind), encoded(sine(3000, 16000), **kind)
    wave = model.load_audio(one + two, 16000)
    assert len(wave) / 16000 == pytest.approx(3.0, abs=0.2)
    assert level_at(wave[:28000], 1000) == pytest.approx(0.5, abs=0.05)
    assert level_at(wave[35000:], 3000) == pytest.approx(0.5, abs=0.05)
    long = encoded(np.asarray(noise(64000)), **kind)
    with pytest.raises(model.AudioError, match="truncated, "):
        model.load_audio(long[: len(long) // 2], 16000)


def test_a_stated_length_is_held_against_what_is_there_but_no_guess_is():
    tagged = b"ID3\4\0\0\0\0\x20\0" + bytes(4096) + encoded(np.asarray(noise(64000)), form="MP3")
    for whole in (muxed("webm", "libopus", sine(1000, 16000, 3.0)), tagged,
                  encoded(sine(1000, 8000, 3.0), 8000, subtype="GSM610")):  # fmt: skip
        with pytest.raises(model.AudioError, match="truncated, "):
            model.load_audio(whole[: len(whole) // 2], 16000)
    quiet_then_loud = np.concatenate([np.zeros(160000), np.asarray(noise(160000, level=0.3))])
    for samples in (quiet_then_loud, quiet_then_loud[::-1]):  # FFmpeg guesses 45 and 12 s
        mp3 = encoded(samples, form="MP3", bitrate_mode="VARIABLE")
        for mark in (b"Xing", b"Info"):
            mp3 = mp3.replace(mark, bytes(4))
        assert model.audio_seconds(mp3) == pytest.approx(20.0, abs=0.2)


def test_lengths_that_a_header_has_not_or_has_wrong(tmp_path):
    samples = sine(1000, 16000)
    wav, flac = bytearray(encoded(samples)), bytearray(encoded(samples, form="FLAC"))
    at, right = wav.find(b"data") + 4, model.load_audio(bytes(wav), 16000)
    flac[21:26] = flac[21] & 0xF0, 0, 0, 0, 0  # FLAC into a pipe
    sources = [flac, wav + b"LIST" + struct.pack("<I", 4000) + b"INFO" + bytes(range(256)) * 16]
    for size in (0, 0xFFFFFFFF):  # a recorder that was killed; ffmpeg and sox into a pipe
        sources.append(bytearray(wav))
        sources[-1][4:8] = sources[-1][at : at + 4] = struct.pack("<I", size)
    for source in map(bytes, sources):
        torch.testing.assert_close(model.load_audio(source, 16000), right, atol=1e-4, rtol=0)
        assert model.audio_seconds(source) == 1.0
    wav[at : at + 4] = struct.pack("<I", 10000)
    with pytest.raises(model.AudioError, match="goes on behind the 5000 samples of its header"):
        model.audio_seconds(bytes(wav))
    (tmp_path / "a.wav").write_bytes(bytes(flac))
    (tmp_path / "list.mp3").write_text("ffconcat version 1.0\nfile a.wav\n")  # opens no other file
    for nothing in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}, "a\0b",
                    tmp_path / "list.mp3"):  # fmt: skip
        with pytest.raises(model.AudioError, match="not readable as audio"):
            model.load_audio(nothing, 16000)


def test_samples_in_the_range_of_integers_are_refused_with_their_scale():
    for scale in (2**15, 2**31):
        with pytest.raises(model.AudioError, match=f"scale of integers: divide by {scale}"):
            model.load_audio(encoded(sine(1000, 16000) * scale, subtype="FLOAT"), 16000)
    loud = model.load_audio(encoded(sine(1000, 16000) * 4, subtype="FLOAT"), 16000)
    assert level_at(loud, 1000) == pytest.approx(2.0, abs=1e-3)


def test_channels(tmp_path, capsys):
    left, right = sine(1000, 16000), sine(3000, 16000)
    call, anti, mono = (np.stack(sides, 1) for sides in ((left, right), (left, -left), (left,)))

    def read(samples, channel):
        return model.load_audio(encoded(samples), 16000, channel=channel)

    for channel, wanted in (
        ("mix", (left + right) / 2), ("0", left), ("1", right), ("B", right),
        ("split", np.stack([left, right])),
    ):  # fmt: skip
        wanted = torch.from_numpy(wanted).float()
        torch.testing.assert_close(read(call, channel), wanted, atol=1e-4, rtol=0)
    assert torch.equal(read(mono, "B"), read(mono, "mix")), "a side that is a file of its own"
    for channel in ("1", "-1"):
        with pytest.raises(model.AudioError, match=f"has 1 channels, none of number {channel}"):
            read(mono, channel)
    for _ in range(2):
        torch.testing.assert_close(read(anti, "mix"), read(anti, "0"))
    assert capsys.readouterr().err.count("its two channels cancel each other, the first") == 1
    soundfile.write(tmp_path / "a.wav", call, 16000)
    row = {"key": "a", "source": str(tmp_path / "a.wav"), "start": 0.25, "end": 0.75}
    part = model.load_clip(row | {"channel": "1"}, 16000)
    torch.testing.assert_close(part, read(call, "1")[4000:12000])
    with pytest.raises(model.AudioError, match="0.75 s read, 0.95 s expected: .*ends before its"):
        model.load_clip(row | {"end": 1.2}, 16000)
    model.load_clip({"key": "a", "source": row["source"], "seconds": 1.05}, 16000)
    assert not capsys.readouterr().err
    model.load_clip({"key": "a", "source": row["source"], "duration": 1.25}, 16000)
    assert "a: 1.00 s read, 1.25 s expected" in capsys.readouterr().err


def test_a_long_recording_is_resampled_in_pieces_to_the_same():
    for rate in (8000, 44100):
        wave = noise(125 * rate + 77)
        how = 64, 0.9475937167399596, "sinc_interp_kaiser", 14.769656459379492
        whole = torchaudio.functional.resample(wave, rate, 16000, *how)
        torch.testing.assert_close(model.resample(wave, rate, 16000), whole, atol=1e-6, rtol=0)


def test_features_equal_funasr(tmp_path):
    write_cmvn(tmp_path / "am.mvn")
    cmvn = model.load_cmvn(tmp_path / "am.mvn")
    for samples in (400, 559, 560, 1360, 1519, 1680, 3333, 16000, 48123):
        wave = noise(samples)
        ours, theirs = model.wav_frontend(wave, dither=0.0), funasr_features(wave)
        assert ours.shape == (math.ceil(model.fbank_frames(samples) / 6), 560)
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
        ours = model.wav_frontend(wave, dither=0.0, cmvn=cmvn)
        theirs = funasr_features(wave, str(tmp_path / "am.mvn"))
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)
    for frames in range(1, 60):
        feats = torch.randn(frames, 80)
        assert torch.equal(model.apply_lfr(feats), funasr_apply_lfr(feats, 7, 6)), frames
    (tmp_path / "am.mvn").write_text("<Nnet>\n<AddShift> 2 2\n<LearnRateCoef> 0 [ 1 2 ]\n</Nnet>")
    for path in (tmp_path / "am.mvn", tmp_path / "nothing"):
        with pytest.raises(model.UserError, match=f"{path.name}: expected a Kaldi nnet"):
            model.load_cmvn(path)


@pytest.mark.parametrize("rate", [8000, 16000])
def test_kaldi_fbank_is_torchaudios_with_dither_of_the_key_alone(rate):
    wave, found = noise(2 * rate), []
    for key in ("a", "a", "b"):
        torch.rand(5)  # other use of the global generator changes nothing
        state = torch.get_rng_state()
        found.append(model.kaldi_fbank(wave, rate, key))
        assert torch.equal(torch.get_rng_state(), state), "the global generator was used"
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    plain = torchaudio.compliance.kaldi.fbank(
        wave[None] * 32768, num_mel_bins=80, dither=0.0, energy_floor=0.0, window_type="hamming",
        sample_frequency=rate,
    )  # fmt: skip
    torch.testing.assert_close(model.kaldi_fbank(wave, rate, "a", 0.0), plain, atol=1e-4, rtol=0)
    assert 0 < (found[0] - plain).abs().mean() < 0.05
    with pytest.raises(model.AudioError, match="shorter than one 25 ms window"):
        model.kaldi_fbank(wave[: rate // 40 - 1], rate)


def test_dither_has_funasrs_distribution():
    """On digital silence nothing else is left: the mean and spread of each mel bin."""
    silence = torch.zeros(16000 * 20)
    ours, theirs = model.wav_frontend(silence, key="a"), funasr_features(silence, dither=1.0)
    assert ours.mean().item() == pytest.approx(4.43, abs=0.1)  # -15.9 without dither
    torch.testing.assert_close(ours.mean(0), theirs.mean(0), atol=0.35, rtol=0)
    assert ours.std(0).mean().item() == pytest.approx(theirs.std(0).mean().item(), rel=0.03)


def read(spec, tmp_path, **how):
    return model.read_manifest(spec, tmp_path / "kept", **how).to_list()


def entry(key="a", **extra):
    return json.dumps({"key": key, "source": "a.wav", "target": "hi"} | extra, ensure_ascii=False)


SYSTEM, SPEECH, ANSWER = (
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "语音转写：<|startofspeech|>!/data/BAC009.wav<|endofspeech|>"},
    {"role": "assistant", "content": "今天天气"},
)


def lines(tmp_path, *texts, before=""):
    text = before + "".join(text + "\n" for text in texts)
    (tmp_path / "m.jsonl").write_text(text, encoding="utf-8")
    return tmp_path / "m.jsonl"


def test_what_lines_may_hold(tmp_path):
    named = entry(source="/data/a.wav", language="zh", prompt="P:", hotwords=["Ann", "Bo"], n=5)
    more = [entry("b", target="one\u2028two"), "", entry("c", target="a\x85b", hotwords="Cy")]
    one, two, three = read(lines(tmp_path, named, *more, before="\ufeff"), tmp_path)
    assert (one["key"], one["source"], one["language"]) == ("a", "/data/a.wav", "zh")
    assert (one["prompt"], one["hotwords"], one["question"]) == ("P:", "Ann, Bo", None)
    assert (two["target"], three["target"], three["hotwords"]) == ("one\u2028two", "a\x85b", "Cy")
    assert three["where"] == "m.jsonl:4" and two["source"] == str(tmp_path / "a.wav")
    assert one.keys() == {*model.FIELDS, *model.NUMBERS}
    (row,) = read(lines(tmp_path, entry(language=5, prompt={"a": 1}, channel=1)), tmp_path)
    assert (row["language"], row["prompt"]) == ("5", "{'a': 1}")  # as text, as the hotwords
    assert row["channel"] == "1"
    nemo = {"audio_filepath": "a.wav", "duration": 1.5, "text": "x"}
    (tmp_path / "m.json").write_text(f"{json.dumps(nemo)}\n{json.dumps(nemo | {'offset': 2})}\n")
    rows = read(tmp_path / "m.json", tmp_path)
    found = [(row["key"], row["start"], row["end"], row["duration"]) for row in rows]
    assert found == [("a-1", None, None, 1.5), ("a-2", 2.0, 3.5, 1.5)]


def test_a_chat_row_gives_prompt_and_hotwords_and_says_what_is_not_used(tmp_path, capsys):
    def user(text):
        return SPEECH | {"content": f"{text}<|startofspeech|>!a.wav<|endofspeech|>"}

    header = "请结合上下文信息。\n\n\n**上下文信息：**\n\n\n热词列表：[报价单, 发票]\n"
    other, ask = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "And?"}
    chats = [
        [SYSTEM, SPEECH, ANSWER], [SYSTEM, user(f"{header}语音转写成英文："), ANSWER],
        [other, user("热词列表：[报价单]\n语音转写："), ANSWER, ask, ANSWER], [user(""), ANSWER],
        [SYSTEM, SPEECH, ANSWER, SPEECH, ANSWER], [SYSTEM, ask, ANSWER],
    ]  # fmt: skip
    path = lines(tmp_path, *[json.dumps({"messages": turns, "n": 4}) for turns in chats])
    for _ in range(2):  # the second time it is kept
        model.note.cache_clear()
        rows = read(path, tmp_path)
        said = capsys.readouterr().err
        for text in (
            "2 rows, m.jsonl:5 for one: left out, not one recording and its answer",
            "1 rows, m.jsonl:3 for one: a turn of the system is not used",
            "m.jsonl:3 for one: a turn of the user is not used", "a turn of the assistant is not",
        ):  # fmt: skip
            assert text in said
    names = ("key", "source", "target", "prompt", "hotwords")
    a, b = str(tmp_path / "a.wav"), "/data/BAC009.wav"
    assert [tuple(row[name] for name in names) for row in rows] == [
        ("BAC009-1", b, "今天天气", "语音转写：", None),
        ("a-2", a, "今天天气", "语音转写成英文：", "报价单, 发票"),
        ("a-3", a, "今天天气", "语音转写：", "报价单"), ("a-4", a, "今天天气", None, None),
    ]  # fmt: skip


def test_tags_in_targets_are_counted_and_stripped_only_where_that_is_asked(tmp_path, capsys):
    tagged = entry("b", target="<|zh|><|NEUTRAL|><|withitn|>今天")
    path = lines(tmp_path, entry("a"), tagged)
    assert [row["target"] for row in read(path, tmp_path)] == ["hi", json.loads(tagged)["target"]]
    assert "m.jsonl: 1 targets hold tags such as <|zh|>, which stay" in capsys.readouterr().err
    rows = read(path, tmp_path, strip_tags=True)
    assert [row["target"] for row in rows] == ["hi", "今天"] and rows[1]["key"] == "b"
    assert "1 targets hold tags such as <|zh|>, which are taken out" in capsys.readouterr().err


def test_durations_are_found_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "a.wav", sine(500, 16000), 16000)
    (tmp_path / "b.mp3").write_bytes(encoded(sine(500, 16000, 2.0), form="MP3"))
    parts = entry("e", start=0.25), entry("f", start=1, end=3), entry("d", duration=7)
    path = lines(tmp_path, entry(), entry("b", source="b.mp3"), entry("c", source="c.wav"), *parts)
    read_mp3, calls = model.read_ffmpeg, []
    monkeypatch.setattr(model, "read_ffmpeg", lambda file: calls.append(1) or read_mp3(file))

    def seconds():
        rows = model.with_seconds(model.read_manifest(path, tmp_path / "kept"), tmp_path / "kept")
        assert rows["reason"][2] == "not readable as audio (No such file or directory)"
        return [round(value, 1) for value in rows["seconds"]]

    assert seconds() == seconds() == [1.0, 2.0, 0.0, 0.8, 2.0, 7.0] and len(calls) == 1
    soundfile.write(tmp_path / "a.wav", sine(500, 16000, 3.0), 16000)
    assert seconds() == [3.0, 2.0, 0.0, 2.8, 2.0, 7.0]


@pytest.mark.parametrize(("texts", "message"), [
    ([entry(), '{"key": "b", "source"'], "m.jsonl:2: not a clip"),
    ([entry(), "", json.dumps({"key": "b", "source": "b"})], "m.jsonl:3: .*'target' is missing"),
    ([json.dumps({"key": "b", "target": "x"})], "m.jsonl:1: .*'source'"),
    ([json.dumps({"source": "b.wav", "target": "x"})], "m.jsonl:1: .*'key'"),
    ([entry(target=5)], "m.jsonl:1: .*'target'"), (["[1, 2]"], "m.jsonl:1"), (["5"], "m.jsonl:1"),
    ([entry("a"), entry("b"), entry("a")], "m.jsonl:3: key 'a' stands at m.jsonl:1 too"),
    ([entry()[:-1] + ', "target": "yes"}'], "m.jsonl:1: .*given twice"),
    ([json.dumps({"messages": [SPEECH]})], "m.jsonl: holds no clips; 1 rows, .* left out"),
    ([json.dumps({"messages": "hi"})], "m.jsonl:1"), (["", ""], "m.jsonl: holds no clips"),
    ([entry(start=3, end=2)], "m.jsonl:1: no part of a recording goes from 3.0 to 2.0 s"),
    ([entry(end=float("nan"))], "m.jsonl:1: no part"), ([entry(channel="x")], "m.jsonl:1: not a"),
    ([entry(duration="long")], "m.jsonl:1: not a clip"),
    ([entry(target="x")[:-2] + '\\ud83d"}'], "m.jsonl:1: not a clip .*surrogates"),
    ([json.dumps({"audio_filepath": "a.wav"})], "m.jsonl:1: not a clip .*'text'"),
])  # fmt: skip
def test_a_broken_manifest_names_file_and_line(tmp_path, texts, message):
    with pytest.raises(model.UserError, match=message):
        read(lines(tmp_path, *texts), tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(entry(target="naïve").encode("latin-1"))
    for spec in (tmp_path / "latin.jsonl", tmp_path / "nothing.jsonl", "hf:nothing"):
        with pytest.raises(model.UserError, match=str(spec)):
            read(spec, tmp_path)


def kaldi(folder, **files):
    """A folder with these files, `scp` for wav.scp, lines parted by "; "."""
    for name, text in files.items():
        path = folder / {"scp": "wav.scp"}.get(name, name)
        path.write_text(text.replace("; ", "\n") + "\n", encoding="utf-8")
    return folder


def test_kaldi_folder_joins_its_tables(tmp_path, capsys):
    kaldi(tmp_path, scp="b\twavs/b.wav ; a /data/a.wav")
    fields = ("key", "source", "target", "start", "end", "channel")

    def found(spec=tmp_path):
        return [tuple(row[name] for name in fields) for row in read(spec, tmp_path)]

    b, whole = str(tmp_path / "wavs/b.wav"), (None, None, None)
    assert found() == [("b", b, None, *whole), ("a", "/data/a.wav", None, *whole)]
    kaldi(tmp_path, text="a hello  there; b; c nothing; d nothing")
    rows = [("b", b, "", *whole), ("a", "/data/a.wav", "hello  there", *whole)]  # b: nobody speaks
    assert found() == found(tmp_path / "wav.scp") == rows
    assert "2 lines of `text` have no recording, c for one" in capsys.readouterr().err
    kaldi(tmp_path, segments="b-1 b 0.00 0.90; b-2 b 0.9 -1; a-1 a 5 6.5",
          reco2file_and_channel="b call B; a call 1", text="b-1 one two; a-1 three")  # fmt: skip
    assert found() == [("b-1", b, "one two", 0.0, 0.9, "B"), ("b-2", b, None, 0.9, None, "B"),
                       ("a-1", "/data/a.wav", "three", 5.0, 6.5, "A")]  # fmt: skip


@pytest.mark.parametrize(("files", "message"), [
    ({"scp": "c c.wav |"}, "wav.scp:1: a plain path expected, no pipe and no archive"),
    ({"scp": "a a.wav; c /x/raw.ark:1234"}, "wav.scp:2: a plain path"), ({"scp": "a"}, "wav.scp:1"),
    ({"scp": "a a.wav; a b.wav"}, "wav.scp:2: a stands at wav.scp:1 too"),
    ({"text": "a one; b x; a two"}, "text:3: a stands at text:1 too"),
    ({"segments": "s a 0 1; s a 1 2"}, "segments:2: s stands at segments:1 too"),
    ({"segments": "s a 0 1; t x 0 1"}, "segments:2: no segment .*'x'"),
    ({"segments": "s a 0"}, "segments:1: no seg"), ({"segments": "s a 0 x"}, "segments:1: no seg"),
    ({"segments": "s a 2 1"}, "segments:1: no part of a recording goes from 2.0 to 1.0 s"),
    ({"reco2file_and_channel": "a a C"}, "channel:1: no .*side"), ({"scp": ""}, "holds no clips"),
])  # fmt: skip
def test_kaldis_tables_are_refused_by_line(tmp_path, files, message):
    with pytest.raises(model.UserError, match=message):
        read(kaldi(tmp_path, **{"scp": "a a.wav", **files}), tmp_path)


def test_kaldis_segments_are_the_parts_of_the_recording(tmp_path):
    left, right = np.repeat([0.1, 0.2], 8000), np.repeat([0.3, 0.4], 8000)
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], 1), 8000)
    kaldi(tmp_path, scp="x call.wav", segments="s x 0 1; t x 1 2; u x 1.5 9", text="s a; t b",
          reco2file_and_channel="x x B")  # fmt: skip
    one, two, three = read(tmp_path, tmp_path)
    for row, value, text in ((one, 0.3, "a"), (two, 0.4, "b")):
        wave = model.load_clip(row, 8000)
        torch.testing.assert_close(wave, torch.full((8000,), value), atol=1e-4, rtol=0)
        assert model.clip_seconds(row) == 1.0 and row["target"] == text
    with pytest.raises(model.AudioError, match="0.50 s read, 7.50 s expected: the recording ends"):
        model.load_clip(three, 8000)


def test_aishell_folder_joins_words_and_sees_a_new_transcript(tmp_path):
    text = tmp_path / "transcript" / "aishell_transcript_v0.8.txt"
    for key, part in (("0122", "train"), ("0123", "train"), ("0124", "test")):
        path = tmp_path / "wav" / part / "S0002" / f"BAC009S0002W{key}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(model.UserError, match="transcript_v0.8.txt: .*No such file"):
        read(f"{tmp_path}:train", tmp_path)
    text.parent.mkdir()
    text.write_text("BAC009S0002W0122 而 对 楼市\nBAC009S0002W0124 一线 城市\n", encoding="utf-8")
    one, two = read(f"{tmp_path}:train", tmp_path)
    assert (one["key"], one["target"], one["language"]) == ("BAC009S0002W0122", "而对楼市", "zh")
    assert two["target"] is None and two["source"].endswith("wav/train/S0002/BAC009S0002W0123.wav")
    assert [row["target"] for row in read(f"{tmp_path}:test", tmp_path)] == ["一线城市"]
    text.write_text("BAC009S0002W0124 二线\n", encoding="utf-8")
    assert [row["target"] for row in read(f"{tmp_path}:test", tmp_path)] == ["二线"]


def test_a_manifest_is_read_once_and_again_when_its_file_changes(tmp_path):
    path = lines(tmp_path, entry("a"))
    stat = path.stat()
    read(path, tmp_path)

    def keys(text, later):
        path.write_text(text + "\n")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + later))
        return [row["key"] for row in read(path, tmp_path)]

    assert keys(entry("b"), 0) == ["a"]  # size and time as before: not read
    assert keys(entry("b"), 1) == ["b"]
    assert keys(entry("b") + "\n" + entry("c"), 1) == ["b", "c"]


@pytest.mark.parametrize("form", ["parquet", "save_to_disk"])
def test_data_sets_come_under_our_names_with_audio_that_can_be_read(tmp_path, form):
    file = io.BytesIO()
    soundfile.write(file, sine(1000, 16000), 16000, format="WAV")
    sound = {"bytes": file.getvalue(), "path": None}
    table = datasets.Dataset.from_dict({"speech": [sound, sound], "text": ["one", "two"]})
    table = table.cast_column("speech", datasets.Audio())
    if form == "parquet":
        for part in range(2):
            table.select([part]).to_parquet(tmp_path / "set" / "train" / f"{part}.parquet")
    else:
        table.save_to_disk(tmp_path / "set")
    rows = model.read_manifest(tmp_path / "set", tmp_path / "kept", ("speech", "text", "question"))
    assert rows["target"][:] == ["one", "two"] and len(set(rows["key"])) == 2
    wave = model.load_audio(rows[1]["audio"], 16000)
    assert len(wave) == 16000 and level_at(wave, 1000) == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(model.UserError, match="set: no column 'audio' in speech, text"):
        read(tmp_path / "set", tmp_path)
    table.add_column("n", [1, 2]).save_to_disk(tmp_path / "numbers")
    for names, wanted in ((("n", "text"), "no audio"), (("speech", "n"), "no text")):
        with pytest.raises(model.UserError, match=f"column 'n' holds .*int64.*, {wanted}"):
            model.read_manifest(tmp_path / "numbers", tmp_path, (*names, "question"))
