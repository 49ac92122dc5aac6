"""The SANM encoder against funasr's and transformers' classes, and the wrappers around it and around Whisper."""

import itertools
import shutil

import make_twins
import pytest
import sentencepiece
import torch
import torch.nn.functional as F
from make_twins import randomise, spoken
from torch import nn

import model
from bench import transformers_names

SMALL = {"output_size": 32, "attention_heads": 4, "linear_units": 64, "num_blocks": 3, "tp_blocks": 2}


def small_encoder(seed=0, **kwargs):
    torch.manual_seed(seed)
    return randomise(model.SenseVoiceEncoder(560, **(SMALL | kwargs))).eval()


def padded_batch(lens, width=560):
    return torch.randn(len(lens), max(lens), width), torch.tensor(lens)


# ---- the same numbers as the two public implementations, at the released 70 blocks ---------------------------------


@pytest.fixture(scope="module")
def full_encoder():
    torch.manual_seed(0)
    return randomise(model.SenseVoiceEncoder()).eval()


@pytest.fixture(scope="module")
def full_output(full_encoder):
    """(feats, lens, enc) of a padded batch through all 70 blocks, computed once."""
    torch.manual_seed(1)
    feats, lens = padded_batch([24, 13, 1])
    with torch.no_grad():
        return feats, lens, full_encoder(feats, lens)[0]


def assert_same_rows(enc, expected, lens, atol):
    for row, n in enumerate(lens):
        torch.testing.assert_close(enc[row, :n], expected[row, :n], atol=atol, rtol=0)


def test_released_sizes(full_encoder):
    assert sum(p.numel() for p in full_encoder.parameters()) == 221_136_992
    assert len(full_encoder.state_dict()) == 914


@torch.no_grad()
def test_equals_funasr_at_70_blocks(full_encoder, full_output):
    from funasr.models.sense_voice.model import SenseVoiceEncoderSmall

    with torch.device("meta"):  # the random start would be thrown away
        theirs = SenseVoiceEncoderSmall(560, output_size=512, num_blocks=50, tp_blocks=20).eval()
    theirs.load_state_dict(full_encoder.state_dict(), strict=True, assign=True)
    feats, lens, enc = full_output
    expected, expected_lens = theirs(feats.clone(), lens)  # funasr scales its input in place
    assert expected_lens.tolist() == lens.tolist()
    assert_same_rows(enc, expected, lens, atol=1e-4)


@torch.no_grad()
def test_equals_transformers_at_70_blocks(full_encoder, full_output):
    from transformers.models.fun_asr_nano.modeling_fun_asr_nano import FunAsrNanoEncoder, FunAsrNanoEncoderConfig

    positions = FunAsrNanoEncoder(FunAsrNanoEncoderConfig(num_hidden_layers=2, num_timestamp_prediction_layers=1))
    with torch.device("meta"):
        theirs = FunAsrNanoEncoder(FunAsrNanoEncoderConfig()).eval()
    theirs.load_state_dict(transformers_names(full_encoder.state_dict(), num_blocks=50), strict=True, assign=True)
    theirs.position_embeddings = positions.position_embeddings  # not in the state dict
    feats, lens, enc = full_output
    expected = theirs(feats, model.length_mask(lens, feats.shape[1]).long()).last_hidden_state
    assert_same_rows(enc, expected, lens, atol=1e-4)


@torch.no_grad()
def test_padded_batch_equals_single_at_70_blocks(full_encoder, full_output):
    feats, lens, enc = full_output
    single, _ = full_encoder(feats[1:2, :13], lens[1:2])
    torch.testing.assert_close(enc[1, :13], single[0], atol=2e-5, rtol=0)


# ---- SenseVoiceEncoder, one property each ---------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_values_in_the_padding_change_nothing(value):
    encoder, (feats, lens) = small_encoder(), padded_batch([9, 4])
    enc, _ = encoder(feats, lens)
    feats[1, 4:] = value
    dirty, _ = encoder(feats, lens)
    assert torch.equal(dirty[0], enc[0]) and torch.equal(dirty[1, :4], enc[1, :4])


def test_input_is_not_modified():
    encoder, (feats, lens) = small_encoder(), padded_batch([9, 4])
    before = feats.clone()
    encoder(feats, lens)
    assert torch.equal(feats, before) and lens.tolist() == [9, 4]


def test_features_of_another_width_are_refused():
    with pytest.raises(ValueError, match="560"):
        small_encoder()(torch.zeros(1, 5, 80), torch.tensor([5]))


@torch.no_grad()
def test_positions_make_order_matter():
    """Without the sinusoids and the memory, attention could not tell a clip from its reverse."""
    encoder, (feats, lens) = small_encoder(), padded_batch([6])
    assert not torch.allclose(encoder(feats, lens)[0], encoder(feats.flip(1), lens)[0].flip(1), atol=1e-2)


@torch.no_grad()
def test_bf16_is_within_its_rounding():
    encoder, (feats, lens) = small_encoder(), padded_batch([9, 4])
    exact, _ = encoder(feats, lens)
    coarse, _ = encoder.bfloat16()(feats.bfloat16(), lens)
    assert coarse.dtype == torch.bfloat16
    error = (coarse.float() - exact)[0].norm() / exact[0].norm()
    assert error < 0.05


def gradients(encoder, feats, lens):
    encoder.zero_grad()
    torch.manual_seed(5)  # the same dropout
    encoder(feats, lens)[0].square().sum().backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters()}


def test_gradient_checkpointing_gives_the_same_gradients():
    encoder, (feats, lens) = small_encoder().train(), padded_batch([9, 9])
    plain = gradients(encoder, feats, lens)
    encoder.gradient_checkpointing = True
    again = gradients(encoder, feats, lens)
    for name, grad in plain.items():
        torch.testing.assert_close(again[name], grad, msg=name)


def test_gradients_do_not_depend_on_padding():
    encoder, (feats, lens) = small_encoder(dropout_rate=0.0, attention_dropout_rate=0.0).train(), padded_batch([5])

    def grads(x):
        encoder.zero_grad()
        encoder(x, lens)[0][:, :5].square().sum().backward()
        return torch.cat([p.grad.flatten() for p in encoder.parameters()])

    padded = F.pad(feats, (0, 0, 0, 3), value=float("nan"))
    torch.testing.assert_close(grads(padded), grads(feats), atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_torch_compile_gives_the_same_output():
    torch.manual_seed(0)
    encoder = randomise(model.SenseVoiceEncoder(16, 8, 2, 16, num_blocks=1, tp_blocks=0, kernel_size=3)).eval()
    feats, lens = padded_batch([6, 4], width=16)
    expected, _ = encoder(feats, lens)
    compiled, _ = torch.compile(encoder, fullgraph=True)(feats, lens)
    assert_same_rows(compiled, expected, lens, atol=1e-5)


def test_dropout_is_active_in_training_only():
    encoder, (feats, lens) = small_encoder(), padded_batch([9])
    assert torch.equal(encoder(feats, lens)[0], encoder(feats, lens)[0])
    encoder.train()
    assert not torch.equal(encoder(feats, lens)[0], encoder(feats, lens)[0])


# ---- wrappers: what all three have in common --------------------------------------------------------------------

WRAPPERS = ["sensevoice_folder", "nano_folder", "whisper_folder"]


@pytest.fixture(params=WRAPPERS)
def wrapper(request):
    return model.load_encoder(request.getfixturevalue(request.param))


def waves(*samples):
    return [0.1 * torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in samples]


@torch.no_grad()
def run(encoder, *clips, key="k"):
    feats = [encoder.features(wave, key) for wave in clips]
    lens = torch.tensor([len(f) for f in feats])
    return encoder(nn.utils.rnn.pad_sequence(feats, True, float("nan")), lens)


def test_padded_batch_equals_single(wrapper):
    clips = waves(16000, 7777, 4001)
    enc, lens = run(wrapper, *clips)
    assert enc.shape[2] == wrapper.width
    for row, clip in enumerate(clips):
        single, (n,) = run(wrapper, clip)
        assert n == lens[row]
        torch.testing.assert_close(enc[row, :n], single[0, :n], atol=1e-5, rtol=1e-5)


def test_num_frames_is_the_real_length(wrapper):
    for samples in [400, 401, 559, 560, 1359, 1360, 1519, 1520, *range(5000, 5400, 37), 16000]:
        enc, lens = run(wrapper, torch.zeros(samples))
        assert wrapper.num_frames(samples) == lens[0] == enc.shape[1], samples


def test_frames_lie_frame_ms_apart(wrapper):
    assert wrapper.sample_rate == 16000
    assert wrapper.num_frames(160000) * wrapper.frame_ms == pytest.approx(10000, abs=250)


def test_frozen_encoder_has_no_gradients_and_stays_in_eval(wrapper):
    parent = nn.ModuleDict({"encoder": wrapper, "adaptor": nn.Linear(1, 1)})
    for _ in range(2):
        parent.train()
        assert parent["adaptor"].training
        assert not any(module.training for module in wrapper.modules())
        wrapper.train()
    assert not any(p.requires_grad for p in wrapper.parameters())


def test_identity_names_weights_and_settings(sensevoice_folder, nano_folder, whisper_folder, tmp_path):
    settings = [
        (sensevoice_folder, {}), (sensevoice_folder, {"language": "zh"}), (sensevoice_folder, {"text_norm": "withitn"}),
        (sensevoice_folder, {"keep_query_frames": True}), (nano_folder, {}), (whisper_folder, {}),
        (whisper_folder, {"pad_to_30s": True}), (make_twins.sensevoice_folder(tmp_path, seed=1), {}),
    ]  # fmt: skip

    def identity(folder, kwargs):
        return {k: v for k, v in model.load_encoder(folder, **kwargs).identity.items() if k != "name"}

    found = [identity(*setting) for setting in settings]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert identity(*settings[0]) == found[0]


def test_identity_names_the_query_embeddings(sensevoice_folder, tmp_path):
    folder = shutil.copytree(sensevoice_folder, tmp_path / "copy")
    weights = torch.load(folder / "model.pt", weights_only=True)
    weights["embed.weight"] += 1  # the encoder's output changes with them
    torch.save(weights, folder / "model.pt")
    plain, other = (model.load_encoder(f).identity | {"name": ""} for f in (sensevoice_folder, folder))
    assert plain != other


def test_unknown_models_are_refused_with_advice(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        model.load_encoder(str(tmp_path / "nothing"))
    with pytest.raises(ValueError, match="neither config.yaml"):
        model.load_encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "wav2vec2"}')
    with pytest.raises(ValueError, match="wav2vec2"):
        model.load_encoder(tmp_path)


# ---- SenseVoiceSmall and Fun-ASR-Nano ---------------------------------------------------------------------------


def sensevoice_by_hand(folder, clips, language, text_norm):
    """SenseVoiceSmall put together from funasr's own parts: front end, embed, encoder, CTC layer."""
    from funasr.frontends.wav_frontend import WavFrontend
    from funasr.models.sense_voice.model import SenseVoiceEncoderSmall

    weights = torch.load(folder / "model.pt", weights_only=True)
    encoder = SenseVoiceEncoderSmall(560, **SMALL).eval()
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")})
    front_end = WavFrontend(cmvn_file=str(folder / "am.mvn"), lfr_m=7, lfr_n=6, dither=0.0)
    enc = []
    for clip in clips:
        feats, lens = front_end(clip[None], torch.tensor([len(clip)]))
        queries = weights["embed.weight"][[language, 1, 2, text_norm]]
        enc.append(encoder(torch.cat([queries[None], feats], dim=1), lens + 4)[0][0])
    logits = [F.linear(x[4:], weights["ctc.ctc_lo.weight"], weights["ctc.ctc_lo.bias"]) for x in enc]
    return enc, logits


@pytest.fixture
def no_dither(monkeypatch):
    plain = model.wav_frontend
    monkeypatch.setattr(model, "wav_frontend", lambda wave, key="", cmvn=None: plain(wave, key, 0.0, cmvn))


@torch.no_grad()
@pytest.mark.parametrize(
    "language, row, text_norm, norm_row", [("auto", 0, "woitn", 15), ("zh", 3, "withitn", 14), ("en", 4, "woitn", 15)]
)
def test_sensevoice_equals_funasrs_parts(sensevoice_folder, no_dither, language, row, text_norm, norm_row):
    clips = [torch.from_numpy(spoken(["press", "one", "please"])), *waves(9000)]
    expected, _ = sensevoice_by_hand(sensevoice_folder, clips, row, norm_row)
    kept, kept_lens = run(model.load_encoder(sensevoice_folder, language, text_norm, keep_query_frames=True), *clips)
    enc, lens = run(model.load_encoder(sensevoice_folder, language, text_norm), *clips)
    for i, reference in enumerate(expected):
        torch.testing.assert_close(kept[i, : kept_lens[i]], reference, atol=1e-4, rtol=0)
        torch.testing.assert_close(enc[i, : lens[i]], reference[4:], atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("keep_query_frames", [False, True])
def test_ctc_text_equals_a_greedy_search_by_hand(sensevoice_folder, no_dither, keep_query_frames):
    clips = waves(16000, 30000)
    _, logits = sensevoice_by_hand(sensevoice_folder, clips, 0, 15)
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(sensevoice_folder / "chn_jpn_yue_eng_ko_spectok.bpe.model")
    )
    expected = []
    for scores in logits:
        merged = [label for label, _ in itertools.groupby(scores.argmax(-1).tolist())]
        expected.append(pieces.decode([label for label in merged if label != 0]).strip())
    encoder = model.load_encoder(sensevoice_folder, keep_query_frames=keep_query_frames)
    enc, lens = run(encoder, *clips)
    texts = encoder.ctc_read(encoder.ctc_best(enc), lens)
    assert texts == expected and all(texts)


def test_sensevoice_names_the_languages_it_knows(sensevoice_folder):
    with pytest.raises(ValueError, match="'de'.*auto, zh, en, yue, ja, ko"):
        model.load_encoder(sensevoice_folder, language="de")
    with pytest.raises(ValueError, match="'itn'.*withitn, woitn"):
        model.load_encoder(sensevoice_folder, text_norm="itn")


def test_num_frames_counts_kept_query_frames(sensevoice_folder):
    encoder = model.load_encoder(sensevoice_folder, keep_query_frames=True)
    enc, lens = run(encoder, torch.zeros(16000))
    assert encoder.num_frames(16000) == lens[0] == enc.shape[1] == 17 + 4


@torch.no_grad()
def test_nano_has_no_queries_no_cmvn_and_loads_bf16_as_fp32(nano_folder, no_dither):
    from funasr.models.sense_voice.model import SenseVoiceEncoderSmall

    encoder = model.load_encoder(nano_folder)
    assert all(p.dtype == torch.float32 for p in encoder.parameters())
    weights = torch.load(nano_folder / "model.pt", weights_only=True)
    theirs = SenseVoiceEncoderSmall(560, **SMALL).eval()
    prefix = "audio_encoder."
    theirs.load_state_dict({k.removeprefix(prefix): v.float() for k, v in weights.items() if k.startswith(prefix)})
    (clip,) = waves(16000)
    feats = model.wav_frontend(clip)
    expected, _ = theirs(feats[None].clone(), torch.tensor([len(feats)]))
    torch.testing.assert_close(run(encoder, clip)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["sensevoice", "whisper", "adaptor"])
def test_matrices_kept_in_bf16_change_no_bit_under_autocast(sensevoice_folder, whisper_folder, no_dither, kind):
    if kind == "adaptor":
        net = model.freeze(model.AudioAdaptor(8, 48, 32, num_layers=2, num_heads=4))
        inputs = torch.randn(2, 9, 8), torch.tensor([9, 4])
    else:
        net = model.load_encoder(sensevoice_folder if kind == "sensevoice" else whisper_folder)
        feats = [net.features(torch.randn(samples) * 0.1) for samples in (16000, 9000)]
        inputs = torch.nn.utils.rnn.pad_sequence(feats, True), torch.tensor(list(map(len, feats)))
    found = []
    for stored in (False, True):
        if stored:
            assert model.store_bf16(net) is net
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found.append(net(*inputs)[0])
    assert torch.equal(*found) and found[0].float().std() > 0
    dtypes = {p.dtype for p in net.parameters()}
    assert dtypes == {torch.bfloat16, torch.float32} and not any(p.requires_grad for p in net.parameters())


def test_only_sensevoice_has_a_ctc_text(nano_folder):
    encoder = model.load_encoder(nano_folder)
    with pytest.raises(ValueError, match="SenseVoiceSmall"):
        encoder.ctc_best(run(encoder, torch.zeros(16000))[0])


def test_a_missing_encoder_tensor_stops_loading(sensevoice_folder, tmp_path):
    folder = shutil.copytree(sensevoice_folder, tmp_path / "copy")
    weights = torch.load(folder / "model.pt", weights_only=True)
    del weights["encoder.tp_norm.weight"]
    torch.save(weights, folder / "model.pt")
    with pytest.raises(RuntimeError, match="tp_norm.weight"):
        model.load_encoder(folder)


# ---- Whisper ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_whisper_at_30_s_equals_transformers(whisper_folder):
    from transformers import WhisperFeatureExtractor, WhisperForConditionalGeneration

    clips = waves(16000, 48000)
    theirs = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval().model.encoder
    extractor = WhisperFeatureExtractor.from_pretrained(whisper_folder)
    inputs = extractor([clip.numpy() for clip in clips], sampling_rate=16000, return_tensors="pt").input_features
    expected = theirs(inputs).last_hidden_state
    enc, lens = run(model.load_encoder(whisper_folder, pad_to_30s=True), *clips)
    assert lens.tolist() == [1500, 1500]
    torch.testing.assert_close(enc, expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_whisper_at_clip_length_is_the_same_network_on_fewer_frames(whisper_folder):
    """transformers refuses other lengths than 30 s, so its own layers are applied by hand to one unpadded clip."""
    from transformers import WhisperForConditionalGeneration

    net = WhisperForConditionalGeneration.from_pretrained(whisper_folder).eval().model.encoder
    encoder, (clip,) = model.load_encoder(whisper_folder), waves(16000)
    x = F.gelu(net.conv2(F.gelu(net.conv1(encoder.features(clip).T[None])))).transpose(1, 2)
    x = x + net.embed_positions.weight[: x.shape[1]]
    for layer in net.layers:
        x = layer(x, None)
    torch.testing.assert_close(run(encoder, clip)[0], net.layer_norm(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("samples", [476640, 476800, 476960, 478000, 479999, 480000])
def test_whisper_near_30_s_has_no_more_frames_than_positions(whisper_folder, samples):
    encoder = model.load_encoder(whisper_folder)
    _, lens = run(encoder, torch.zeros(samples))
    assert encoder.num_frames(samples) == lens[0] <= 1500


def test_whisper_bf16_stays_bf16(whisper_folder):
    encoder = model.load_encoder(whisper_folder).bfloat16()
    feats = torch.randn(2, 20, 80).bfloat16()
    enc, lens = encoder(feats, torch.tensor([20, 11]))
    assert enc.dtype == torch.bfloat16 and enc.isfinite().all() and lens.tolist() == [10, 6]
