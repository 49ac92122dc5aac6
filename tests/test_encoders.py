"""The encoders against funasr's and transformers' own, and what all of them must have in common."""

import contextlib
import functools
import itertools
import pickle
import shutil

import make_twins
import pytest
import torch
import torch.nn.functional as F
from funasr.frontends.wav_frontend import WavFrontend
from funasr.models.sense_voice.model import SenseVoiceEncoderSmall
from make_twins import ENCODER, randomise, spoken
from torch import nn
from transformers import ParakeetFeatureExtractor, ParakeetForCTC
from transformers import WhisperFeatureExtractor as WhisperFeatures
from transformers import WhisperForConditionalGeneration as Whisper

import model

GARBAGE = [float("nan"), float("inf"), 1e30]


def small_encoder(**kwargs):
    return randomise(model.SenseVoiceEncoder(560, **(ENCODER | kwargs))).eval()


def padded_batch(lens, width=560):
    return torch.randn(len(lens), max(lens), width), torch.tensor(lens)


@torch.no_grad()
def test_equals_funasr_at_the_released_70_blocks_in_a_padded_batch():
    encoder = randomise(model.SenseVoiceEncoder()).eval()
    assert sum(p.numel() for p in encoder.parameters()) == 221_136_992
    with torch.device("meta"):  # the random start would be thrown away
        theirs = SenseVoiceEncoderSmall(560, output_size=512, num_blocks=50, tp_blocks=20).eval()
    theirs.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    feats, lens = padded_batch([24, 13, 1])
    before = feats.clone()
    enc, enc_lens = encoder(feats, lens)
    assert torch.equal(feats, before), "the input was modified"
    expected, expected_lens = theirs(feats, lens)
    assert expected_lens.tolist() == enc_lens.tolist() == [24, 13, 1]
    for row, n in enumerate(lens):
        torch.testing.assert_close(enc[row, :n], expected[row, :n], atol=1e-4, rtol=0)


def test_gradients_do_not_depend_on_padding():
    encoder = small_encoder(dropout_rate=0.0, attention_dropout_rate=0.0).train()
    (feats, lens), found = padded_batch([5]), []
    for x in (feats, F.pad(feats, (0, 0, 0, 3), value=float("nan"))):
        encoder.zero_grad()
        encoder(x, lens)[0][:, :5].square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in encoder.parameters()]))
    torch.testing.assert_close(*found, atol=1e-3, rtol=1e-4)
    assert found[0].abs().sum() > 0


@torch.no_grad()
def test_dropout_is_for_training_bf16_within_its_rounding_and_another_width_refused():
    encoder, (feats, lens) = small_encoder(), padded_batch([9, 4])
    enc, _ = encoder(feats, lens)
    assert torch.equal(encoder(feats, lens)[0], enc)
    assert not torch.equal(encoder.train()(feats, lens)[0], enc)
    coarse, _ = encoder.eval().bfloat16()(feats.bfloat16(), lens)
    assert coarse.dtype == torch.bfloat16
    assert (coarse[0].float() - enc[0]).norm() < 0.05 * enc[0].norm()
    with pytest.raises(ValueError, match="560"):
        encoder(torch.zeros(1, 5, 80), torch.tensor([5]))


@pytest.fixture(scope="module", params=["sensevoice", "official", "whisper", "parakeet"])
def wrapper(request):
    folder = request.getfixturevalue(f"{request.param}_folder")
    return model.freeze(model.load_encoder(folder))


def waves(*samples):
    return [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in samples]


@torch.no_grad()
def run(encoder, *clips, padding=0.0):
    feats = [encoder.features(wave, "k") for wave in clips]
    lens = torch.tensor([len(f) for f in feats])
    return encoder(nn.utils.rnn.pad_sequence(feats, True, padding), lens)


@pytest.mark.parametrize("padding", GARBAGE)
def test_padded_batch_equals_single(wrapper, padding):
    clips = waves(16000, 7777, 4001)
    enc, lens = run(wrapper, *clips, padding=padding)
    assert enc.shape[2] == wrapper.width
    travelled = pickle.loads(pickle.dumps(wrapper))  # as to a worker
    for row, clip in enumerate(clips):
        single, (n,) = run(travelled, clip)
        assert n == lens[row]
        torch.testing.assert_close(enc[row, :n], single[0, :n], atol=1e-5, rtol=1e-5)


def test_num_frames_is_the_real_length(wrapper):
    for samples in [400, 401, 559, 560, 1359, 1360, 1519, 1520, *range(5000, 5400, 37), 16000]:
        enc, lens = run(wrapper, torch.randn(samples))
        assert wrapper.num_frames(samples) == lens[0] == enc.shape[1], samples
    assert wrapper.num_frames(160000) * wrapper.frame_ms == pytest.approx(10000, abs=250)
    assert len(wrapper.layers) >= 2 and wrapper.sample_rate == 16000
    with contextlib.nullcontext() if wrapper.frame_ms == 20 else pytest.raises(model.AudioError):
        wrapper.features(torch.zeros(100))


def test_identity_names_weights_and_settings(request, tmp_path):
    nano, whisper, parakeet, sensevoice = (request.getfixturevalue(f"{name}_folder") for name in
        ("official", "whisper", "parakeet", "sensevoice"))  # fmt: skip
    copy = shutil.copytree(sensevoice, tmp_path / "copy")
    weights = torch.load(copy / "model.pt", weights_only=True)
    weights["embed.weight"] += 1  # of the query frames
    torch.save(weights, copy / "model.pt")
    other = make_twins.sensevoice_folder(tmp_path / "other", seed=1)
    settings = [(folder, {}) for folder in (sensevoice, nano, whisper, parakeet, copy, other)]
    settings += [(sensevoice, {"language": "zh"}), (sensevoice, {"text_norm": "withitn"}),
                 (sensevoice, {"keep_query_frames": True}), (whisper, {"pad_to_30s": True})]
    found = [model.load_encoder(folder, **how).identity | {"name": ""} for folder, how in settings]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert model.load_encoder(sensevoice).identity | {"name": ""} == found[0]


def test_unknown_models_and_settings_are_refused_with_advice(sensevoice_folder, tmp_path):
    copy, other = shutil.copytree(sensevoice_folder, tmp_path / "copy"), tmp_path / "other"
    weights = torch.load(copy / "model.pt", weights_only=True)
    del weights["encoder.tp_norm.weight"]
    torch.save(weights, copy / "model.pt")
    other.mkdir()
    (other / "config.json").write_text('{"model_type": "wav2vec2"}')
    for name, how, message in (
        (str(tmp_path / "nothing"), {}, "no such folder"), ("./nothing", {}, "no such folder"),
        ("nothing", {}, "no such folder"), (tmp_path, {}, "neither config.yaml"),
        (other, {}, "wav2vec2"), (copy, {}, "model.pt: does not fit .*tp_norm.weight"),
        (sensevoice_folder, {"language": "de"}, "'de'.*auto, zh, en, yue, ja, ko"),
        (sensevoice_folder, {"text_norm": "itn"}, "'itn'.*withitn, woitn"),
    ):  # fmt: skip
        with pytest.raises(model.UserError, match=message):
            model.load_encoder(name, **how)


def funasr_encoder(weights, prefix):
    encoder = SenseVoiceEncoderSmall(560, **ENCODER).eval()
    own = {k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)}
    encoder.load_state_dict(own)
    return encoder


def without_dither(encoder):
    encoder.features = lambda wave, key: model.wav_frontend(wave, key, 0.0, encoder.cmvn)
    return encoder


@torch.no_grad()
@pytest.mark.parametrize(("language", "row", "text_norm", "norm_row"), [
    ("auto", 0, "woitn", 15), ("zh", 3, "withitn", 14), ("en", 4, "woitn", 15),
])  # fmt: skip
def test_sensevoice_equals_funasrs_parts(sensevoice_folder, language, row, text_norm, norm_row):
    """Front end, four query frames and encoder, put together as FunASR does."""
    clips = [torch.from_numpy(spoken(["press", "one", "please"])), *waves(9000)]
    weights = torch.load(sensevoice_folder / "model.pt", weights_only=True)
    theirs = funasr_encoder(weights, "encoder.")
    cmvn = str(sensevoice_folder / "am.mvn")
    front_end = WavFrontend(cmvn_file=cmvn, lfr_m=7, lfr_n=6, dither=0.0)
    queries = weights["embed.weight"][[row, 1, 2, norm_row]]
    load = functools.partial(model.load_encoder, sensevoice_folder, language, text_norm)
    kept, plain = (without_dither(load(keep_query_frames=keep)) for keep in (True, False))
    (all_enc, all_lens), (enc, lens) = run(kept, *clips), run(plain, *clips)
    for n, clip in enumerate(clips):
        feats, feats_lens = front_end(clip[None], torch.tensor([len(clip)]))
        expected = theirs(torch.cat([queries[None], feats], dim=1), feats_lens + 4)[0][0]
        assert all_lens[n] == kept.num_frames(len(clip)) == len(expected) == lens[n] + 4
        torch.testing.assert_close(all_enc[n, : all_lens[n]], expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(enc[n, : lens[n]], expected[4:], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("kind", "file", "torn"), [
    ("qwen3", "model.safetensors", "/model.safetensors: torn .*; download it again"),
    ("whisper", "model.safetensors", "/model.safetensors: torn .*; download it again"),
    ("official", "model.pt", "/model.pt: not a plain state dict"),
    ("sensevoice", "am.mvn", "/am.mvn: expected a Kaldi nnet"),
    ("parakeet", "config.json", ": not whole, download it again, or of another kind"),
    ("whisper", "preprocessor_config.json", ": not whole, download it again, or of another kind"),
])  # fmt: skip
def test_a_folder_that_is_not_whole_is_one_line(request, tmp_path, kind, file, torn):
    load = model.load_llm if kind == "qwen3" else model.load_encoder
    folder = shutil.copytree(request.getfixturevalue(f"{kind}_folder"), tmp_path / "model")
    whole = (folder / file).read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n"
    for content, message in (
        (pointer, f"/{file}: a git-lfs pointer in place of the file; run git lfs pull"),
        (whole[: len(whole) // 2], torn),
    ):
        (folder / file).write_bytes(content)
        with pytest.raises(model.UserError, match=f"^{folder}{message}") as caught:
            load(folder)
        assert "\n" not in str(caught.value)


@torch.no_grad()
def test_nano_has_no_queries_no_cmvn_and_loads_bf16_as_fp32(official_folder):
    encoder, (clip,) = without_dither(model.load_encoder(official_folder)), waves(16000)
    theirs = funasr_encoder(torch.load(official_folder / "model.pt"), "audio_encoder.")
    feats = model.wav_frontend(clip, dither=0.0)
    expected, _ = theirs(feats[None], torch.tensor([len(feats)]))
    torch.testing.assert_close(run(encoder, clip)[0], expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_whisper_at_30_s_equals_transformers(whisper_folder):
    clips, net = waves(16000, 48000), Whisper.from_pretrained(whisper_folder).eval().model.encoder
    extract = WhisperFeatures.from_pretrained(whisper_folder)
    inputs = extract([c.numpy() for c in clips], sampling_rate=16000, return_tensors="pt")
    enc, lens = run(model.load_encoder(whisper_folder, pad_to_30s=True), *clips)
    assert lens.tolist() == [1500, 1500]
    expected = net(inputs.input_features).last_hidden_state
    torch.testing.assert_close(enc, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_whisper_at_clip_length_is_the_same_network_on_fewer_frames(whisper_folder):
    """transformers refuses other lengths, so its own layers are applied by hand to one clip."""
    net = Whisper.from_pretrained(whisper_folder).eval().model.encoder
    encoder, (clip,) = model.load_encoder(whisper_folder), waves(16000)
    feats, extract = encoder.features(clip), WhisperFeatures.from_pretrained(whisper_folder)
    padded = F.pad(clip, (0, 3200)).numpy()  # 1 s and 0.2 s of silence behind it
    theirs = extract(padded, sampling_rate=16000, padding="do_not_pad", return_tensors="pt")
    torch.testing.assert_close(feats, theirs.input_features[0].T, atol=1e-3, rtol=0)
    x = F.gelu(net.conv2(F.gelu(net.conv1(feats.T[None])))).transpose(1, 2)
    x = x + net.embed_positions.weight[: x.shape[1]]
    for layer in net.layers:
        x = layer(x, None)
    torch.testing.assert_close(run(encoder, clip)[0], net.layer_norm(x), atol=1e-5, rtol=0)
    bf16 = encoder.bfloat16()(feats[None].bfloat16(), torch.tensor([120]))[0]
    assert bf16.dtype == torch.bfloat16 and bf16.isfinite().all()
    with pytest.raises(model.AudioError, match="longer than Whisper's 30 s"):
        encoder.features(torch.zeros(480001))
    for samples in (476640, 476960, 478000, 479999, 480000):
        frames = encoder.out_lens(len(encoder.features(torch.zeros(samples))))
        assert encoder.num_frames(samples) == frames <= 1500, samples


@torch.no_grad()
def test_parakeet_equals_transformers(parakeet_folder):
    clips, net = waves(16000, 7777), ParakeetForCTC.from_pretrained(parakeet_folder).eval()
    extract = ParakeetFeatureExtractor.from_pretrained(parakeet_folder)
    enc, lens = run(model.load_encoder(parakeet_folder), *clips)
    for n, clip in enumerate(clips):
        inputs = extract(clip.numpy(), sampling_rate=16000, return_tensors="pt")
        expected = net.encoder(**inputs).last_hidden_state[0]
        torch.testing.assert_close(enc[n, : lens[n]], expected[: lens[n]], atol=1e-4, rtol=0)
    encoder = model.load_encoder(parakeet_folder).train()
    for _ in range(5):  # no layer is left out at random, or DDP would wait for it
        encoder.zero_grad(set_to_none=True)
        with torch.enable_grad():
            encoder(torch.randn(1, 20, 80), torch.tensor([20]))[0].sum().backward()
        assert all(p.grad is not None for layer in encoder.layers for p in layer.parameters())
