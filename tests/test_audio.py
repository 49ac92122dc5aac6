"""Reading audio and manifests, and the front ends against the implementations they stand in for."""

import io
import json
import math
import os

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
    assert len(wave) == 15999 or ending == "mp3"


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


def test_stereo_from_a_pipe_is_averaged_and_no_audio_is_an_error(tmp_path):
    left, right = sine(1000, 16000), sine(3000, 16000)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], axis=1), 16000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    data[4:8] = data[40:44] = b"\xff\xff\xff\xff"  # ffmpeg and sox cannot know the length there
    mean = torch.from_numpy((left + right) / 2).float()
    torch.testing.assert_close(model.load_audio(bytes(data), 16000), mean, atol=1e-4, rtol=0)
    for nothing in (None, {"bytes": None, "path": None}, {"bytes": b"", "path": None}):
        with pytest.raises(model.AudioError):
            model.load_audio(nothing, 16000)


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
    {"role": "system", "content": "You are helpful."},
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
    assert one.keys() == set(model.FIELDS)
    chat = json.dumps({"messages": [SYSTEM, SPEECH, ANSWER], "text_length": 4})
    row, chat = read(lines(tmp_path, entry(language=5, prompt={"a": 1}), chat), tmp_path)
    assert (row["language"], row["prompt"]) == ("5", "{'a': 1}")  # as text, as the hotwords
    assert (chat["key"], chat["source"]) == ("BAC009-2", "/data/BAC009.wav")
    assert chat["target"] == "今天天气"


@pytest.mark.parametrize(("texts", "message"), [
    ([entry(), '{"key": "b", "source"'], "m.jsonl:2: not a clip"),
    ([entry(), "", json.dumps({"key": "b", "source": "b"})], "m.jsonl:3: .*'target' is missing"),
    ([json.dumps({"key": "b", "target": "x"})], "m.jsonl:1: .*'source'"),
    ([json.dumps({"source": "b.wav", "target": "x"})], "m.jsonl:1: .*'key'"),
    ([entry(target=5)], "m.jsonl:1: .*'target'"), (["[1, 2]"], "m.jsonl:1"), (["5"], "m.jsonl:1"),
    ([entry("a"), entry("b"), entry("a")], "m.jsonl:3: key 'a' stands at m.jsonl:1 too"),
    ([entry()[:-1] + ', "target": "yes"}'], "m.jsonl:1: .*given twice"),
    ([json.dumps({"messages": [{"role": "user", "content": "hi"}]})], "m.jsonl:1: .*0 clips"),
    ([json.dumps({"messages": [SPEECH, SPEECH, ANSWER]})], "m.jsonl:1: .*2 clips"),
    ([json.dumps({"messages": [SPEECH, ANSWER, ANSWER]})], "m.jsonl:1: .*2 answers"),
    ([json.dumps({"messages": "hi"})], "m.jsonl:1"), (["", ""], "m.jsonl: holds no clips"),
])  # fmt: skip
def test_a_broken_manifest_names_file_and_line(tmp_path, texts, message):
    with pytest.raises(model.UserError, match=message):
        read(lines(tmp_path, *texts), tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(entry(target="naïve").encode("latin-1"))
    for spec in (tmp_path / "latin.jsonl", tmp_path / "nothing.jsonl", "hf:nothing"):
        with pytest.raises(model.UserError, match=str(spec)):
            read(spec, tmp_path)


def test_kaldi_folder_joins_wav_scp_and_text(tmp_path):
    (tmp_path / "wav.scp").write_text("b\twavs/b.wav \na /data/a.wav\n")
    (tmp_path / "text").write_text("a hello  there\nb\n")
    found = [(row["key"], row["source"], row["target"]) for row in read(tmp_path, tmp_path)]
    b = str(tmp_path / "wavs/b.wav")
    assert found == [("b", b, ""), ("a", "/data/a.wav", "hello  there")]
    for scp in ("c c.wav\n", "a sph2pipe a.sph |\n", "a\n"):
        (tmp_path / "wav.scp").write_text(scp)
        with pytest.raises(model.UserError, match="wav.scp:1: . needs a plain path"):
            read(tmp_path, tmp_path)
    (tmp_path / "text").unlink()
    with pytest.raises(model.UserError, match="text: .*No such file"):
        read(tmp_path, tmp_path)


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
    assert two["target"] == "" and two["source"].endswith("wav/train/S0002/BAC009S0002W0123.wav")
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
