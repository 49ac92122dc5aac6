"""train_duplex.py as its users meet it: channels, codecs, both models, metrics, runs, infer.py."""

import copy
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import make_twins
import numpy as np
import pytest
import soundfile
import torch
from processes import run_processes

import infer
import model
import report
import train_duplex as td

CPU = torch.device("cpu")
PAGES = {"duplex": 5, "duplex_speech_decoder": 4}  # the page's examples: what of each cannot run
DECODER = """model.speech_decoder.d_model=32 model.speech_decoder.n_layers=2
    model.speech_decoder.n_heads=2 model.speech_decoder.d_ff=64 model.speech_decoder.dropout=0"""
PAD, BOS, EOS = 0, 1, 2


def config(*settings):
    """`settings` hold key=value pairs with spaces between."""
    arguments = " ".join(map(str, settings)).split()
    return model.load_config(arguments, td.DEFAULTS, **td.SPELLING)


def dialogue(folder, key, rate=8000, start=0.4, answer=("one", "two"), more=()):
    """Two wavs and a row: the user says a word, the agent answers with the same tones."""
    words = [str(word) for word in answer]
    user = make_twins.spoken(words[:1], rate)
    agent = make_twins.spoken(words, rate)
    size = round(rate * (start + 0.4 + (len(user) + len(agent)) / rate + 0.3))
    channels = np.zeros((2, size), np.float32)
    first = round(start * rate)
    channels[0, first : first + len(user)] = user
    begin = first + len(user) + round(0.1 * rate)
    channels[1, begin : begin + len(agent)] = agent
    turns = [{"role": "user", "start": start, "end": start + len(user) / rate, "text": words[0]},
             {"role": "agent", "start": begin / rate, "end": (begin + len(agent)) / rate,
              "text": " ".join(words)}, *more]  # fmt: skip
    for name, wave in zip(("user", "agent"), channels, strict=True):
        soundfile.write(folder / f"{key}-{name}.wav", wave, rate)
    soundfile.write(folder / f"{key}.wav", channels.T, rate)
    return {"key": key, "user_audio": f"{key}-user.wav", "agent_audio": f"{key}-agent.wav",
            "turns": turns}  # fmt: skip


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory, qwen3_folder):
    """Four dialogues, twins of Mimi and Nemotron, settings of a small run."""
    folder = tmp_path_factory.mktemp("duplex")
    mimi = make_twins.mimi_folder(folder / "mimi")
    words = [("one", "two"), ("two", "one", "three"), ("three",), ("hold", "one")]
    rows = [dialogue(folder, f"d{n}", answer=said) for n, said in enumerate(words)]
    path = write(folder / "dialogues.jsonl", rows)
    run = f"""model.pretrained_llm={qwen3_folder} model.pretrained_asr=scratch
        model.pretrained_audio_codec={mimi} model.num_codebooks=3 model.text_bos=<|im_start|>
        model.text_eos=<|im_end|> model.text_pad=<|endoftext|> data.source_sample_rate=8000
        model.perception.modality_adapter._target_=IdentityConnector
        model.perception.encoder.channels=[16,16,16] model.perception.encoder.hidden=24
        data.train_ds.manifest_filepath={path} data.train_ds.batch_size=2 trainer.accelerator=cpu
        data.validation_ds.datasets.same.manifest_filepath={path} data.train_ds.num_workers=0
        data.validation_ds.num_workers=0 trainer.max_steps=4 trainer.val_check_interval=2
        trainer.log_every_n_steps=1 model.optimizer.lr=2e-3 model.user_ctc_weight=0.5
        model.code_noise=0.1 save_every=2 trainer.precision=32-true"""
    return SimpleNamespace(folder=folder, path=path, run=run, rows=rows, mimi=mimi)


def build(world, *settings):
    """Duplex in eval mode, its configuration, and all dialogues of its training set."""
    cfg = config(world.run, *settings)
    torch.manual_seed(0)
    parts = td.load_parts(cfg, torch.float32, CPU)
    rows = td.read_dialogues(cfg.data.train_ds, cfg, parts, world.folder / "manifests")
    tokens = sorted({i for turns in rows["user_ids"] for ids in turns for i in ids})
    duplex = td.build(cfg, parts, tokens, CPU).eval()
    return duplex, cfg, rows


def parts_of(duplex):
    names = {name: getattr(duplex, name) for name in ("codec", "tokenizer", "special")}
    return SimpleNamespace(encoder=duplex.perception.encoder, **names)


def batch_of(duplex, rows, places):
    return td.Dialogues(rows, duplex)[0, 0, [places]]


def trained(folder):
    return torch.load(folder / "last.pt", weights_only=True)["trained"]


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# ---- channels ---------------------------------------------------------------


@pytest.mark.parametrize(("turns", "wanted"), [
    ([(3, 6, [7, 8])], [0, 0, 1, 7, 8, 0, 2, 0, 0, 0]),
    ([(3, 6, [7, 8, 9, 10, 11])], [0, 0, 1, 7, 8, 9, 2, 0, 0, 0]),  # cut to its turn, EOS kept
    ([(3, 12, [7, 8])], [0, 0, 1, 7, 8, 0, 0, 0, 0, 0]),  # unfinished: no EOS
    ([(2, 5, [7, 8, 9]), (6, 9, [5])], [0, 1, 7, 8, 2, 1, 5, 0, 0, 2]),  # EOS before the next BOS
])  # fmt: skip
def test_the_text_channel(turns, wanted):
    assert td.text_channel(turns, 10, PAD, BOS, EOS) == wanted


def test_turns_that_overlap_are_named():
    with pytest.raises(ValueError, match="overlap"):
        td.text_channel([(2, 8, [7]), (3, 9, [7])], 10, PAD, BOS, EOS)


def test_labels_stand_where_they_should(world):
    duplex, _, rows = build(world)
    batch, (pad, bos, eos), codec = batch_of(duplex, rows, [0]), duplex.special, duplex.codec
    agent = world.rows[0]["turns"][1]
    first, end = int(agent["start"] / 0.08 + 1e-6), math.ceil(agent["end"] / 0.08 - 1e-6)
    text = batch.text[0].tolist()
    assert text.index(bos) == first - 1 and text.index(eos) == end
    words = duplex.tokenizer.decode(text[first : first + 8]).split("<|")[0]
    assert words.strip().startswith("one")
    assert text[:first - 1] == [pad] * (first - 1)
    codes = batch.codes[0]
    assert codes[first - 1].tolist() == [codec.bos] * 3 and codes[end].tolist() == [codec.eos] * 3
    wave = model.load_audio(str(world.folder / "d0-agent.wav"), 24000)
    plain = codec.encode(torch.nn.functional.pad(wave, (0, len(codes) * 1920 - len(wave))))
    others = [t for t in range(len(codes)) if t not in (first - 1, end)]
    assert torch.equal(codes[others], plain[others])  # no frame of speech is overwritten
    shifted = duplex.shifted(batch.codes)[0]
    assert shifted[0].tolist() == [codec.delay] * 3 and torch.equal(shifted[1:], codes[:-1])


def test_an_agent_who_begins_at_once_is_shifted_with_the_user(world):
    duplex, cfg, _ = build(world)
    row = copy.deepcopy(world.rows[0])
    row["turns"][1] |= {"start": 0.0, "end": 0.9}
    row["turns"][0] |= {"start": 1.0, "end": 1.3}
    for side in ("user", "agent"):
        row[side] = {"source": str(world.folder / row[f"{side}_audio"]), "channel": "mix"}
    found = td.to_channels(row, "x", cfg, parts_of(duplex))
    assert found["lead"] == 2 and found["text"][1] == duplex.special[1]  # a label: x_0 is none
    user = [turn for turn in json.loads(found["turns"]) if turn["role"] == "user"]
    assert user[0]["start"] == pytest.approx(1.16)


@pytest.mark.parametrize(("extra", "frames"), [(-1, 20), (0, 20), (1, 21)])
def test_frames_of_a_dialogue(world, tmp_path, extra, frames):
    duplex, cfg, _ = build(world)
    soundfile.write(tmp_path / "a.wav", np.zeros(20 * 1920 + extra, np.float32), 24000)
    soundfile.write(tmp_path / "b.wav", np.zeros(20 * 640 - 5, np.float32), 8000)
    user, agent = ({"source": str(tmp_path / f"{n}.wav"), "channel": "mix"} for n in "ba")
    row = {"key": "k", "user": user, "agent": agent, "turns": []}
    found = td.to_channels(row, "x", cfg, parts_of(duplex))
    assert not found["reason"] and found["frames"] == len(found["text"]) == frames
    assert len(found["codes"]) == 2 * 3 * frames  # int16
    feats = td.Dialogues([found], duplex).features(0, found)
    assert int(duplex.perception.encoder.out_lens(torch.tensor([len(feats)]))) == frames


def test_two_channels_of_a_file_are_the_same_dialogue(world, tmp_path):
    duplex, cfg, rows = build(world)
    row = {"id": "d0", "audio": str(world.folder / "d0.wav"), "turns": world.rows[0]["turns"]}
    item = {"manifest_filepath": str(write(tmp_path / "two.jsonl", [row]))}
    (where, found), = td.list_dialogues(item, tmp_path)
    found = td.to_channels(found, where, cfg, parts_of(duplex))
    both = td.Dialogues([rows[0], found], duplex)[0, 0, [[0, 1]]]
    assert torch.equal(both.codes[0], both.codes[1]) and torch.equal(both.text[0], both.text[1])
    assert torch.allclose(both.feats[0], both.feats[1], atol=1e-6) and both.feats[0].std() > 0.1


def test_a_role_in_neither_list_and_a_missing_file_are_named(world, tmp_path):
    row = world.rows[0] | {"turns": [{"role": "boss", "start": 0, "end": 1, "text": "one"}]}
    path = write(tmp_path / "x.jsonl", [row])
    with pytest.raises(model.UserError, match="x.jsonl:1: role 'boss' is in neither of"):
        build(world, f"data.train_ds.manifest_filepath={path}")
    rows = [row | {"turns": world.rows[0]["turns"]}]
    with pytest.raises(model.UserError, match="1 dialogues cannot be used; .*No such file"):
        path = write(tmp_path / "y.jsonl", rows)
        td.main(config(world.run, f"data.train_ds.manifest_filepath={path}",
                       f"exp_manager.explicit_log_dir={tmp_path / 'run'}"))  # fmt: skip
    with pytest.raises(model.UserError, match="z.jsonl:1: not a dialogue"):
        path = write(tmp_path / "z.jsonl", [{"key": "a", "turns": []}])
        build(world, f"data.train_ds.manifest_filepath={path}")


# ---- codecs -----------------------------------------------------------------


def test_mimi_gives_whole_frames_of_many_codes(world):
    codec = td.Mimi(str(world.mimi), 3)
    wave = torch.randn(50 * 1920) * torch.linspace(0, 1, 50 * 1920)
    codes = codec.encode(wave)
    assert codes.shape == (50, 3) and codec.decode(codes).shape == wave.shape
    assert len({(k, int(c)) for k in range(3) for c in codes[:, k]}) > 50
    later = wave.clone()
    later[30 * 1920 :] = 0
    assert torch.equal(codec.encode(later)[:30], codes[:30])


def test_codec2_packs_what_it_unpacks():
    codec = td.Codec2.__new__(td.Codec2)
    frames = np.random.default_rng(0).integers(0, 256, (500, 6)).astype(np.uint8)
    frames[:, 5] &= 0xFE  # the spare bit carries nothing
    codes = codec.unpack(frames)
    assert np.array_equal(codec.pack(codes), frames)
    for bit, place, code in ((20, 0, 256), (28, 0, 1), (29, 1, 256), (46, 2, 1), (2, 3, 128),
                             (9, 3, 1), (12, 4, 128), (0, 5, 8), (11, 5, 1)):  # fmt: skip
        alone = np.packbits(np.eye(48, dtype=np.uint8)[bit : bit + 1], axis=1)
        assert codec.unpack(alone)[0].tolist() == [code * (n == place) for n in range(6)]
    assert (codes[:, 3:5] < 256).all() and (codes[:, 5] < 16).all() and len(np.unique(codes)) > 400


def test_the_embedding_hears_each_window_alone(tmp_path):
    encoder = model.SpeechEmbedding(make_twins.embedding_folder(tmp_path / "e"), 8, 1, 0.0)
    mels = encoder.mels(0.1 * torch.randn(encoder.before + 6 * 1280))
    whole = encoder.embed(mels)
    assert whole.shape == (6, 96) and whole.std() > 1e-3
    for t in range(6):
        assert torch.allclose(encoder.embed(mels[8 * t : 8 * t + 76])[0], whole[t], atol=1e-4)


def test_features_of_a_frozen_encoder_are_made_once(world, tmp_path):
    asr = make_twins.embedding_folder(tmp_path / "asr")
    settings = f"model.pretrained_asr={asr} data.source_sample_rate=16000"
    duplex, _, rows = build(world, settings)
    batch = batch_of(duplex, rows, [0, 1])
    found = td.Dialogues(rows, duplex, swapped={0: 0, 1: 1})[0, 0, [[0, 1]]]  # from the audio
    assert torch.equal(batch.feats, found.feats) and batch.feats.shape[2] == 96


def test_a_codec2_that_is_not_there_is_asked_for(world):
    with pytest.raises(model.UserError, match="install Debian's libcodec2-1.0"):
        td.Codec2(str(world.folder / "no-codec2.so"))


# ---- models -----------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", DECODER])
def test_teacher_forced_logits_equal_those_of_steps(world, kind):
    duplex, _, rows = build(world, kind)
    batch = batch_of(duplex, rows, [0, 1])
    codes = batch.codes
    with torch.no_grad():
        speech, _, _ = duplex.perception(batch.feats, batch.lens)
        heard = duplex.shifted(codes)
        inputs = duplex.inputs(speech, batch.text, heard)
        hidden = model.hidden_states(duplex.llm, inputs)
        text, audio = duplex.llm.lm_head(hidden), duplex.audio_logits(hidden, heard)
        state, seen = duplex.begin(2), []
        duplex.audio_logits, plain = keep(seen, duplex.audio_logits), duplex.audio_logits
        for t in range(speech.shape[1]):
            state.text, state.codes = batch.text[:, t], heard[:, t]
            said, _ = duplex.step(speech[:, t], state)
            assert torch.equal(said, text[:, t].argmax(-1))
        duplex.audio_logits = plain
    assert torch.allclose(torch.cat(seen, 1), audio, atol=1e-4)
    assert audio.std() > 0.01


def keep(seen, function):
    def called(*arguments):
        seen.append(function(*arguments))
        return seen[-1]

    return called


@pytest.mark.parametrize("kind", ["", DECODER])
@pytest.mark.parametrize("ears", ["scratch", "nemotron", "conformer", "embedding"])
def test_nothing_before_a_frame_hears_it(world, tmp_path, kind, ears):
    settings = ""
    if ears == "nemotron":
        settings = f"model.pretrained_asr={make_twins.nemotron_folder(tmp_path / 'asr')} "
        settings += "data.source_sample_rate=16000"
    if ears == "embedding":
        settings = f"model.pretrained_asr={make_twins.embedding_folder(tmp_path / 'asr')} "
        settings += "data.source_sample_rate=16000"
    if ears == "conformer":
        settings = """model.perception.modality_adapter._target_=ConformerEncoder
            model.perception.modality_adapter.d_model=16 model.perception.modality_adapter.n_heads=2
            model.perception.modality_adapter.att_context_size=[4,0]"""
    duplex, _, _ = build(world, kind, settings)
    encoder = duplex.perception.encoder
    frame = round(0.08 * encoder.sample_rate)
    wave = 0.1 * torch.randn(20 * frame)
    other = wave.clone()
    other[12 * frame + encoder.lookahead :] = 0.1 * torch.randn(8 * frame - encoder.lookahead)
    with torch.no_grad():
        feats = torch.stack([encoder.features(x) for x in (wave, other)])
        lens = torch.tensor([feats.shape[1]] * 2)
        speech, enc, lens = duplex.perception(feats, lens)
        assert lens.tolist() == [20, 20]
        text = torch.zeros(2, 20).long()
        codes = torch.zeros(2, 20, 3).long()
        hidden = model.hidden_states(duplex.llm, duplex.inputs(speech, text, codes))
        logits = duplex.audio_logits(hidden, codes)
        whole = 12  # step 12 is the first that hears what differs
        for found in (enc, speech, hidden, logits):
            assert (found[0, :whole] - found[1, :whole]).abs().max() == 0
            assert (found[0, whole:] - found[1, whole:]).abs().amax(-1).min() > 0
        state, parts = None, []
        padded = torch.nn.functional.pad(wave, (0, encoder.lookahead))
        ends = [encoder.lookahead + n * frame for n in (1, 2, 5, 6, 20)]
        for first, end in zip([0, *ends], ends, strict=False):
            part, state = duplex.perception.stream(padded[first:end], state)
            parts.append(part)
    assert torch.allclose(torch.cat(parts, 1)[0], speech[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["", DECODER])
def test_a_batchs_loss_is_the_sum_of_its_singles(world, kind):
    duplex, _, rows = build(world, kind)
    with torch.no_grad():
        both = duplex(*feats_and(batch_of(duplex, rows, [1, 2])))
        singles = [duplex(*feats_and(batch_of(duplex, rows, [n]))) for n in (1, 2)]
    assert rows["frames"][1] != rows["frames"][2]
    for name, value in both.items():
        assert float(value) == pytest.approx(sum(float(s[name]) for s in singles), rel=1e-4), name
    assert float(both["n_text"]) > 0 and float(both["n_speaking"]) > 0 and float(both["ctc"]) > 0


def feats_and(batch):
    return batch.feats, batch


def test_the_loss_is_that_of_its_formula(world):
    duplex, _, rows = build(world, "model.token_loss_weight.pad=0.25 model.token_loss_weight.eos=3")
    batch = batch_of(duplex, rows, [0])
    with torch.no_grad():
        sums = duplex(batch.feats, batch)
        speech, enc, _ = duplex.perception(batch.feats, batch.lens)
        heard = duplex.shifted(batch.codes)
        hidden = model.hidden_states(duplex.llm, duplex.inputs(speech, batch.text, heard))
        logs = duplex.llm.lm_head(hidden).log_softmax(-1)[0]
        audio = duplex.audio_logits(hidden, heard).log_softmax(-1)[0]
    text, total, sound = batch.text[0].tolist(), 0.0, 0.0
    weights = dict(zip(duplex.special, (0.25, 1.0, 3.0), strict=True))
    for t in range(len(text) - 1):
        total -= weights.get(text[t + 1], 1.0) * float(logs[t, text[t + 1]])
        sound -= sum(float(audio[t, k, batch.codes[0, t, k]]) for k in range(3)) / 3
    assert float(sums["text"]) == pytest.approx(total, rel=1e-4)
    assert float(sums["audio"]) == pytest.approx(sound, rel=1e-4)
    scores, blank = duplex.ctc(enc).log_softmax(-1)[0], len(duplex.ctc_tokens)
    (first, end, ids), = batch.user[0]
    inside = torch.nn.functional.ctc_loss(
        scores[first:end, None], torch.tensor([ids]), [end - first], [len(ids)], blank,
        reduction="sum")  # fmt: skip
    wanted = inside - scores[:first, blank].sum() - scores[end:, blank].sum()
    assert float(sums["ctc"]) == pytest.approx(float(wanted), rel=1e-4)


def test_text_of_the_speech_decoder_does_not_depend_on_codes(world):
    for kind, depends in ((DECODER, False), ("", True)):
        duplex, _, rows = build(world, kind)
        batch = batch_of(duplex, rows, [0])
        with torch.no_grad():
            one = duplex(batch.feats, batch)
            batch.codes = torch.randint(128, batch.codes.shape)
            two = duplex(batch.feats, batch)
        assert (float(one["text"]) != float(two["text"])) == depends
        assert float(one["audio"]) != float(two["audio"])


def test_detach_input_keeps_audio_from_the_llm(world):
    for detach in ("true", "false"):
        settings = DECODER, f"model.speech_decoder.detach_input={detach}"
        duplex, _, rows = build(world, *settings)
        batch = batch_of(duplex, rows, [0])
        duplex(batch.feats, batch)["audio"].backward()
        grads = [p.grad for p in duplex.llm.model.layers.parameters()]
        reached = any(g is not None and g.abs().sum() > 0 for g in grads)
        assert reached == (detach == "false")


def test_codes_are_drawn_from_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 2.9, -1.0]]).repeat(2000, 1)
    assert td.sample(logits, 0.0, 3).unique().tolist() == [1]
    drawn = td.sample(logits, 1.0, 2)
    assert drawn.unique().tolist() == [1, 2]
    assert float((drawn == 1).float().mean()) == pytest.approx(1 / (1 + math.exp(-0.1)), abs=0.04)
    assert td.sample(logits, 1.0, 0).unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", ["", DECODER])
def test_two_dialogues_by_heart_are_said_by_heart(world, kind):
    duplex, _, rows = build(world, kind, "model.code_noise=0")
    batch = batch_of(duplex, rows, [0, 1])
    optimizer = torch.optim.AdamW([p for p in duplex.parameters() if p.requires_grad], 3e-3)
    duplex.train()
    for _ in range(150):
        sums = duplex(batch.feats, batch)
        (3 * sums["text"] + 4 * sums["audio"]).div(batch.counts()[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    duplex.eval()
    speech, _, _ = duplex.perception(batch.feats, batch.lens)
    text, codes = duplex.run_free(speech)
    for n, frames in enumerate(batch.frames.tolist()):
        assert torch.equal(text[n, :frames], batch.text[n, :frames])
        assert torch.equal(codes[n, : frames - 1], batch.codes[n, : frames - 1])
        wanted = duplex.turns(batch.text[n].tolist())
        assert wanted == duplex.turns(text[n, :frames].tolist())
        assert [turn["text"] for turn in wanted] == [world.rows[n]["turns"][1]["text"]]


# ---- metrics ----------------------------------------------------------------


def test_turns_are_judged_one_by_one():
    users = [{"role": "user", "start": 0.5, "end": 1.0, "text": "one"},
             {"role": "user", "start": 3.0, "end": 3.5, "text": "two"}]  # fmt: skip
    line = {
        "turns": users, "reason": "",
        "heard": "",
        "wanted": [{"start": 1.32, "end": 3.4, "text": "you entered one"},
                   {"start": 3.84, "end": 5.0, "text": "you entered two"}],
        "found": [{"start": 1.4, "end": 3.48, "text": "you entered one"},
                  {"start": 3.6, "end": 5.0, "text": "you entered five", "heard": "You entered 5."},
                  {"start": 6.0, "end": 6.2, "text": "one"}],
    }  # fmt: skip
    turns, extra = td.judge_turns(line)
    assert extra == 1 and [turn["interrupted"] for turn in turns] == [True, False]
    assert [turn["latency"] for turn in turns] == [pytest.approx(0.4), pytest.approx(0.1)]
    assert turns[0]["stop_s"] == pytest.approx(0.48) and turns[1]["stop_s"] is None
    missed = {"turns": users[:1], "wanted": line["wanted"][:1], "found": [], "reason": ""}
    missed["heard"] = ""
    scores = td.dialogue_scores([line, missed])
    assert scores["val_txt_wer"] == pytest.approx(4 / 9) and scores["val_spurious"] == 100 / 3
    assert scores["val_exact"] == pytest.approx(1 / 3)
    assert scores["val_answered"] == pytest.approx(2 / 3)
    assert scores["val_stopped"] == 1.0 and scores["val_stop_s"] == pytest.approx(0.48)
    # the missed turn is heard as silence; "5" is "five", where "two" was wanted
    assert scores["val_asr_wer"] == pytest.approx(4 / 6)
    assert scores["val_latency_s"] == pytest.approx(0.25)


def test_an_answer_too_soon_and_a_late_stop_do_not_count():
    users = [{"role": "user", "start": 0.5, "end": 2.0, "text": "one"},
             {"role": "user", "start": 4.0, "end": 4.5, "text": "two"}]  # fmt: skip
    wanted = [{"start": 2.32, "end": 4.4, "text": "you"}]
    found = [{"start": 1.8, "end": 5.2, "text": "you"}]
    line = {"turns": users, "wanted": wanted, "found": found, "reason": ""}
    scores = td.dialogue_scores([line])
    assert scores["val_answered"] == 0 and scores["val_stopped"] == 0
    assert scores["val_latency_s"] == pytest.approx(-0.2)


# ---- configuration ----------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_examples_end_in_refusals_that_can_be_mended(name, world, tmp_path, capsys):
    page = tmp_path / "page.yaml"
    page.write_text(PAGE + (PAGE_DECODER if "decoder" in name else PAGE_SCORER))
    with pytest.raises(model.UserError) as caught:
        td.check(config(page), print, True)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"{PAGES[name]} settings") and len(lines) == 2 * PAGES[name] + 1
    for part in ("streaming_80ms", "NeMo's codecs", "22050", "data.train_ds"):
        assert sum(part in line for line in lines[1::2]) == 1, part
    mends = " ".join(lines[2::2]).replace("FILE", str(world.path))
    cfg = config(page, *mends.split(), "trainer.accelerator=cpu")
    td.check(cfg, print, True)
    said = capsys.readouterr().out
    assert "note: trainer.replace_sampler_ddp=False changes nothing" in said
    assert bool(cfg.model.speech_decoder) == ("decoder" in name)
    assert cfg.data.target_sample_rate == 24000 and cfg.model.audio_loss_weight == 4
    if "decoder" in name:
        assert cfg.model.speech_decoder.n_heads == 16 and cfg.model.speech_decoder.d_ff == 4096
        assert cfg.model.speech_decoder.layernorm_epsilon == 1e-5


PAGE = """
model:
  pretrained_llm: TinyLlama/TinyLlama_v1.1
  pretrained_audio_codec: path/to/audio_codec.nemo
  pretrained_asr: stt_en_fastconformer_hybrid_large_streaming_80ms
  audio_loss_weight: 4
  text_loss_weight: 3
  perception:
    # ...
trainer: {devices: 1, accelerator: auto, precision: bf16-true, replace_sampler_ddp: false,
          max_epochs: null, max_steps: 100000}
exp_manager: {name: "${name}", exp_dir: null, create_tensorboard_logger: false,
              checkpoint_callback_params: {monitor: val_loss, filename: "{step}", mode: min}}
data:
  frame_length: 0.08
  source_sample_rate: 16000
  target_sample_rate: 22050
  input_roles: ["user", "User"]
  output_roles: ["agent", "Assistant"]
  train_ds: ...
"""
PAGE_SCORER = "model.scoring_asr: stt_en_fastconformer_transducer_large\n"
PAGE_DECODER = """
model.speech_decoder:
  target: nemo.collections.speechlm2.modules.speech_generation.TransformerARSpeechDecoder
  d_model: 1024
  n_layers: 12
  n_heads: 16
  d_kv: 64
  d_ff: 4096
  max_seq_len: 2048
  dropout: 0.1
  layernorm_epsilon: 1e-5
  activation_function: "gelu_new"
  init_method_std: 0.02
  use_cache: True
"""


def test_upstreams_names_of_the_decoder_are_known():
    text = "model.pretrained_llm=x model.pretrained_asr=y model.speech_decoder.sa_n_heads=4"
    cfg = config(text, "model.speech_decoder.d_ffn=9", "model.speech_decoder.p_dropout=0.5")
    assert (cfg.model.speech_decoder.n_heads, cfg.model.speech_decoder.d_ff) == (4, 9)
    assert config(text, "model.speech_decoder=null").model.speech_decoder is None
    assert config("model.pretrained_llm=x model.pretrained_asr=y").model.speech_decoder is None


@pytest.mark.parametrize(("setting", "message"), [
    ("model.perception.modality_adapter.att_context_size=[70,1]", r"att_context_size=\[70,0\]"),
    ("model.perception.modality_adapter.conv_context_size=null", "conv_context_size=causal"),
    ("model.perception.preprocessor.normalize=per_feature", "normalize=NA"),
    ("data.target_sample_rate=22050", "data.target_sample_rate=24000"),
    ("model.pretrained_audio_codec=x.nemo", "pretrained_audio_codec=kyutai/mimi"),
    ("model.speech_decoder.kernel_size=3", "speech_decoder.kernel_size: only 1"),
    ("model.speech_decoder.d_kv=5", "d_kv: has to be d_model / n_heads"),
    ("model.text_loss_weight=0", "go together"),
    ("model.text_pad=<|im_end|>", "three different tokens"),
    ("model.text_bos=nothing", "model.text_bos"),
    ("data.source_sample_rate=8005", "source_sample_rate"),
    ("exp_manager.checkpoint_callback_params.monitor=val_bleu", "expected one of val_loss"),
    ("model.freeze_params=^perception\\.adapter", "matches nothing; nearest"),
])  # fmt: skip
def test_what_cannot_run_is_refused(world, tmp_path, setting, message):
    settings = world.run, setting, f"exp_manager.explicit_log_dir={tmp_path}/run"
    settings = " ".join(settings).replace("modality_adapter._target_=IdentityConnector",
                                          "modality_adapter.d_model=16")  # fmt: skip
    with pytest.raises(model.UserError, match=message):
        td.main(config(settings))


def test_an_encoder_that_hears_the_future_is_refused(world, whisper_folder):
    setting = f"model.pretrained_asr={whisper_folder} data.source_sample_rate=16000"
    with pytest.raises(model.UserError, match="hears the future(.|\n)*pretrained_asr=nvidia/nem"):
        td.main(config(world.run, setting), check_only=True)


# ---- runs -------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["", f"{DECODER} model.speech_decoder.dropout=0.1"])
def test_a_run_resumes_to_the_bit(world, tmp_path, kind, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    td.main(config(world.run, kind, f"exp_manager.explicit_log_dir={whole}"))
    rest = world.run, kind, f"exp_manager.explicit_log_dir={parts}"
    with monkeypatch.context() as patch:
        step, calls = td.train_step, []
        patch.setattr(td, "train_step", lambda *x: calls.append(x) or (
            step(*x) if len(calls) < 4 else pytest.exit("killed")))  # fmt: skip
        with pytest.raises(pytest.exit.Exception):
            td.main(config(*rest))
    assert not same(trained(whole), trained(parts))
    td.main(config(*rest))
    assert same(trained(whole), trained(parts))
    scores = [row for row in map(json.loads, open(whole / "metrics.jsonl")) if "val_loss" in row]
    assert {"val_ce_pad", "val_ce_speaking", "val_txt_wer_same", "val_user_wer"} <= {*scores[-1]}
    assert json.loads((whole / "control.json").read_text())["val_loss"] > 0
    assert (whole / "step=4.pt").is_file() or (whole / "step=2.pt").is_file()
    with pytest.raises(model.UserError, match="no run of train_duplex"):
        td.read_run(world.folder)


@pytest.mark.parametrize("name", ["duplex", "duplex_speech_decoder"])
def test_the_shipped_configurations_train(world, tmp_path, name):
    page = Path(__file__).parents[1] / f"configs/{name}.yaml"
    asr, data = make_twins.nemotron_folder(tmp_path / "asr"), world.path
    own = "model.speech_decoder.n_layers=1 model.speech_decoder.d_kv=16"
    small = f"""model.pretrained_asr={asr} data.source_sample_rate=16000 model.scoring_asr=
        model.perception.modality_adapter.d_model=16 model.perception.modality_adapter.n_heads=2
        model.perception.modality_adapter._target_=ConformerEncoder trainer.max_steps=2
        ~data.validation_ds.datasets
        data.validation_ds.datasets.dev.manifest_filepath={data} data.train_ds.batch_duration=8
        exp_manager.explicit_log_dir={tmp_path}/run {f"{DECODER} {own}" * ("decoder" in name)}"""
    td.main(config(page, world.run, small))
    saved = trained(tmp_path / "run")
    assert any(n.startswith("speech_decoder.") for n in saved) == ("decoder" in name)
    assert {"perception.encoder.net.layers.0.norm_conv.weight", "ctc.weight"} <= {*saved}


def test_two_processes_equal_one(world, tmp_path):
    rest = world.run, "trainer.max_steps=2 ~data.validation_ds.datasets model.code_noise=0"
    one, two = tmp_path / "one", tmp_path / "two"
    td.main(config(*rest, "trainer.accumulate_grad_batches=2",
                   f"exp_manager.explicit_log_dir={one}"))  # fmt: skip
    cfg = config(*rest, f"exp_manager.explicit_log_dir={two}")
    run_processes(td.main, cfg)
    first, second = trained(one), trained(two)
    assert first.keys() == second.keys()
    start = build(world)[0].state_dict()
    for name in first:
        assert torch.allclose(first[name], second[name], atol=2e-4), name
    assert any(not torch.allclose(first[name], start[name], atol=1e-3) for name in first)


def test_names_of_sets_hold_underscores_and_a_score_may_be_missing(world, tmp_path):
    folder, data = tmp_path / "run", "data.validation_ds.datasets.val_set_0.manifest_filepath"
    td.main(config(world.run, f"{data}={world.path} exp_manager.explicit_log_dir={folder}",
                   "exp_manager.checkpoint_callback_params.monitor=val_latency_s",
                   "trainer.max_steps=-1 trainer.max_epochs=1"))  # fmt: skip
    rows = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    last = [row for row in rows if "val_loss" in row][-1]
    mean = (last["val_loss_val_set_0"] + last["val_loss_same"]) / 2
    assert last["val_loss"] == pytest.approx(mean)
    assert (folder / "last.pt").is_file() and len(trained(folder)) > 5
    rates = [row["lr"] for row in rows if "lr" in row]
    assert len(rates) == 2 and rates[1] > 1e-4  # max_steps=-1 is no end of the schedule


def test_an_llm_can_begin_from_random_weights(world):
    cfg = config(world.run, "model.pretrained_weights=false")
    own = td.load_parts(cfg, torch.float32, CPU).llm.state_dict()
    given = td.load_parts(config(world.run), torch.float32, CPU).llm.state_dict()
    changed = [name for name in own if not torch.equal(own[name], given[name])]
    assert {"model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"} <= {*changed}


def test_ctc_trains_alone_and_another_run_goes_on(world, tmp_path):
    ears = tmp_path / "ears"
    td.main(config(world.run, "model.text_loss_weight=0 model.audio_loss_weight=0",
                   f"exp_manager.explicit_log_dir={ears}"))  # fmt: skip
    weights = trained(ears)
    assert all(name.startswith(("perception.", "ctc.", "audio_")) for name in weights)
    duplex, *_ = build(world, f"model.init_from={ears} {DECODER}")
    own = duplex.state_dict()
    assert torch.equal(own["ctc.weight"], weights["ctc.weight"])
    assert torch.equal(own["perception.encoder.net.gru.weight_hh_l0"],
                       weights["perception.encoder.net.gru.weight_hh_l0"])  # fmt: skip


def test_lora_trains_beside_a_frozen_llm(world, tmp_path):
    run = tmp_path / "run"
    settings = world.run, "model.lora.r=2 model.freeze_params=[^llm\\..+,^audio_codec\\..+$]"
    td.main(config(*settings, f"exp_manager.explicit_log_dir={run}"))
    names = trained(run)
    assert any("lora_B" in name for name in names)
    assert not any(name.startswith("llm.") and "lora_" not in name for name in names)
    duplex = td.load_run(run, model.load_config([f"model.dir={run}"], infer.DEFAULTS), CPU,
                         torch.float32)  # fmt: skip
    own = duplex.state_dict()
    saved = model.read_weights(run / "duplex.pt")
    assert all(torch.equal(own[name], value) for name, value in saved.items())


@pytest.fixture(scope="module")
def run_folder(world):
    """A run that knows two dialogues by heart."""
    folder = world.folder / "heart"
    td.main(config(world.run, "trainer.max_steps=300 data.train_ds.batch_size=4",
                   "model.optimizer.lr=4e-3 model.code_noise=0 save_every=1000",
                   "~data.validation_ds.datasets",
                   f"exp_manager.explicit_log_dir={folder}"))  # fmt: skip
    return folder


def answers(run_folder, out, *settings):
    arguments = [str(x) for x in (f"model.dir={run_folder}", f"out={out}/a.wav,{out}/t.jsonl",
                                  "device=cpu", *settings)]  # fmt: skip
    infer.main(model.load_config(infer.split_arguments(arguments), infer.DEFAULTS))
    return [json.loads(line) for line in open(out / "t.jsonl", encoding="utf-8")]


def test_infer_answers_a_call(world, run_folder, tmp_path):
    line, = answers(run_folder, tmp_path, world.folder / "d0-user.wav", "duplex.tail_s=1")
    wave, rate = soundfile.read(tmp_path / "a.wav")
    seconds = soundfile.info(world.folder / "d0-user.wav").duration
    assert rate == 24000 and len(wave) / rate == pytest.approx(seconds + 1, abs=0.081)
    agent = [turn for turn in line["turns"] if turn["role"] == "agent"]
    assert line["text"] == world.rows[0]["turns"][1]["text"] == agent[0]["text"]
    assert agent[0]["start"] == pytest.approx(world.rows[0]["turns"][1]["start"], abs=0.09)
    page = report.make_page([line], tmp_path)
    assert page.count("<audio") == 2 and "<svg" in page and line["text"] in page
    first, second = answers(run_folder, tmp_path, world.folder / "d0-user.wav",
                            world.folder / "d1-user.wav")  # fmt: skip
    assert Path(first["agent_audio"]).is_file() and first["agent_audio"] != second["agent_audio"]
    with pytest.raises(model.UserError, match="writes .wav and .jsonl"):
        answers(run_folder, tmp_path, world.folder / "d0-user.wav", f"out={tmp_path}/a.srt")


def test_a_live_call_has_the_same_answer_and_its_latency(world, run_folder, tmp_path):
    said, = answers(run_folder, tmp_path, world.folder / "d1-user.wav", "duplex.tail_s=0.5")
    live, = answers(run_folder, tmp_path, world.folder / "d1-user.wav", "duplex.tail_s=0.5",
                    "duplex.live=true")  # fmt: skip
    assert live["text"] == said["text"] and live["latency_ms"]["median"] > 0
    agent = [[turn for turn in line["turns"] if turn["role"] == "agent"] for line in (said, live)]
    assert agent[0] == agent[1]
    shutil.rmtree(tmp_path)
