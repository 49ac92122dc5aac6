"""infer.py by value: batches against single clips and against validation, every output file, controls, errors."""

import html
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import make_twins
import numpy as np
import pytest
import soundfile
import torch

import infer
import model
import precompute
import train_phase2

ROOT = Path(__file__).parents[1]
ADAPTOR = ["adaptor.hidden_dim=32", "adaptor.num_layers=1", "adaptor.num_heads=4", "adaptor.stack=2"]


def call(script, *arguments):
    arguments = [str(argument) for argument in arguments]
    if script is infer:
        arguments = infer.split_arguments(["workers=0", *arguments])
    return script.main(script.load_config(arguments, script.DEFAULTS))


def texts(outcome, field="text"):
    return {result["key"]: result[field] for result in outcome["results"]}


def trained(folder, encoder, llm, *arguments):
    """12 clips, their cache, and a short phase 2 on them."""
    manifest = make_twins.wav_files(folder / "wavs", n=12)
    data = [f"data.train={manifest}", f"cache.dir={folder / 'c'}"]
    call(precompute, *data, f"encoder.name={encoder}", "workers=0")
    call(train_phase2, *data, f"data.valid={manifest}", f"llm.name={llm}", f"run.dir={folder / 'run'}", *ADAPTOR,
         "adaptor.dropout=0", "optim.warmup_steps=2", "optim.clip=1", "run.save_every=1000", "run.valid_every=1000",
         "run.valid_decode=12", "batch_clips=12", *arguments)
    return SimpleNamespace(folder=folder, manifest=manifest, run=folder / "run", dir=f"model.dir={folder / 'run'}",
                           wavs=folder / "wavs", encoder=encoder, llm=llm)


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    """A tiny Whisper and Qwen3 with LoRA, CTC head and drafts, trained until they hear most of 12 clips."""
    return trained(tmp_path_factory.mktemp("infer"), whisper_folder, qwen3_folder, "optim.max_steps=160",
                   "optim.lr=1e-2", "llm.draft=0.5", "loss.ctc_weight=0.3", "llm.lora.r=8")


@pytest.fixture(scope="module")
def outcome(world):
    return call(infer, world.dir, world.manifest)


# ---- transcripts ------------------------------------------------------------------------------------------------


def test_transcripts_are_those_of_validation(world, outcome):
    rows = [json.loads(line) for line in (world.run / "metrics.jsonl").read_text().splitlines()]
    final = next(row for row in reversed(rows) if "er" in row)
    assert final["er"] < 0.9 and len(set(texts(outcome).values())) >= 3  # it learned, so that equality says something
    assert outcome["error_rate"] == pytest.approx(final["er"], abs=1e-5)
    assert outcome["ctc_error_rate"] == pytest.approx(final["ctc_er"], abs=1e-5)


def test_a_batch_equals_single_clips_and_the_order_is_that_of_the_inputs(world, outcome, monkeypatch):
    monkeypatch.setattr(infer, "UNFINISHED", 0)
    alone = call(infer, world.dir, world.manifest, "data.batch_s=0.1")
    assert alone["results"] == outcome["results"]
    assert list(texts(outcome)) == [row["key"] for row in model.read_manifest(world.manifest)]


@pytest.mark.parametrize("spare", [0, 10**9])
@pytest.mark.parametrize("few", [0, 3, 100])
def test_how_clips_share_passes_changes_nothing(world, outcome, monkeypatch, spare, few):
    monkeypatch.setattr(model, "PASS_COSTS", {"cpu": spare})
    monkeypatch.setattr(infer, "UNFINISHED", few)
    assert call(infer, world.dir, world.manifest, "data.batch_s=1.5")["results"] == outcome["results"]


def test_speculative_decoding_changes_no_text(world, outcome):
    assert call(infer, world.dir, world.manifest, "decode.speculative=false")["results"] == outcome["results"]


@pytest.mark.parametrize("batch_s", [0, 1.5, 120])
@pytest.mark.parametrize("options", [(), ("decode.ctc_weight=0.3",), ("decode.speculative=false",)])
def test_a_gpus_way_gives_the_same_results(world, outcome, monkeypatch, batch_s, options):
    """Whole passes without a cache, two under way at a time; one clip through Graphs."""
    expected = call(infer, world.dir, world.manifest, *options) if options else outcome
    drafted, real = [], model.decode_drafted
    monkeypatch.setattr(infer, "is_gpu", lambda device: True)
    monkeypatch.setattr(model, "decode_drafted", lambda *rest: drafted.append(rest) or real(*rest))
    got = call(infer, world.dir, world.manifest, f"data.batch_s={batch_s}", *options)
    assert texts(got) == texts(expected) and texts(got, "ctc_text") == texts(expected, "ctc_text")
    for result, other in zip(got["results"], expected["results"]):
        words, others = ([word["word"] for s in r["segments"] for word in s.get("words", [])] for r in (result, other))
        assert words == others
    assert len(drafted) == ("decode.speculative=false" not in options)


@pytest.mark.parametrize("gpu", [False, True])
def test_clips_that_are_written_leave_the_memory(world, monkeypatch, gpu):
    held, speeches, real = [], [], infer.ask

    def ask(*rest):
        for clips in real(*rest):
            speeches.extend(weakref.ref(clip.speech) for clip in clips)
            yield clips
            del clips
            held.append(sum(speech() is not None for speech in speeches))

    monkeypatch.setattr(infer, "ask", ask)
    monkeypatch.setattr(infer, "UNFINISHED", 0)
    monkeypatch.setattr(infer, "is_gpu", lambda device: gpu)
    call(infer, world.dir, world.manifest, "data.batch_s=0.1")
    assert len(speeches) >= 12 and max(held) <= (6 if gpu else 2)  # two passes under way, what is waiting, the next one


def test_readers_hand_over_a_few_short_clips_at_a_time(world, tmp_path, monkeypatch):
    sizes, real = [], torch.utils.data.DataLoader

    class Loader(real):
        def __init__(self, *rest, batch_sampler, **more):
            sizes.append([len(part) for part in batch_sampler])
            super().__init__(*rest, batch_sampler=batch_sampler, **more)

    monkeypatch.setattr(torch.utils.data, "DataLoader", Loader)
    for seconds in (25, 9, 31, 61, 40):
        soundfile.write(tmp_path / f"{seconds}.wav", np.zeros(16000 * seconds, np.float32), 16000)
    for n in range(10):
        soundfile.write(tmp_path / f"s{n}.wav", np.zeros(16000, np.float32), 16000)
    for options in ((), ("data.batch_s=0",)):
        got = call(infer, world.dir, tmp_path, "decode.readout=ctc", "vad.threshold_s=100", "data.max_bad=20", *options)
        assert got["n_clips"] + got["n_bad"] == 15
    assert sizes == [[1, 1, 2, 8, 3], [1] * 15]  # 61 | 40 | 31 25 | 9 1 1 1 1 1 1 1 | 1 1 1


def test_features_are_fp32_under_autocast(world):
    rows = [row | {"speech": row["source"]} for row in model.read_manifest(world.manifest)]
    recordings = infer.Recordings(rows, model.load_encoder(world.encoder), 30.0)
    expected, _, reason = recordings[0]
    with torch.autocast("cpu", torch.bfloat16):
        found, _, _ = recordings[0]
    assert not reason and found[0][0].dtype == np.float32 and np.array_equal(found[0][0], expected[0][0])


def test_worker_processes_change_nothing(world, outcome):
    assert call(infer, world.dir, world.manifest, "workers=2")["results"] == outcome["results"]


def test_scores_are_those_of_error_rate(world, outcome):
    targets = [row["target"] for row in model.read_manifest(world.manifest)]
    for kind, prefix in (("text", ""), ("ctc_text", "ctc_")):
        expected = model.error_rate(targets, list(texts(outcome, kind).values()))
        assert outcome[f"{prefix}error_rate"] == expected["rate"]
        assert [outcome[prefix + name] for name in infer.EDITS] == [expected[name] for name in infer.EDITS]
    assert outcome["n_units"] == sum(len(target.split()) for target in targets)
    errors = [result["errors"]["errors"] for result in outcome["results"]]
    assert sum(errors) == sum(outcome[name] for name in infer.EDITS)
    unscored = call(infer, world.dir, world.manifest, "score=false", "ctc=false")
    assert unscored["error_rate"] is None and "ctc_text" not in unscored["results"][0]
    assert texts(unscored) == texts(outcome)


def test_decoding_options_reach_the_decoder(world, outcome):
    one_token = call(infer, world.dir, world.manifest, "decode.max_new_tokens=1")
    assert all(len(one.split()) <= 1 for one in texts(one_token).values())
    penalised = call(infer, world.dir, world.manifest, "decode.repetition_penalty=5", "decode.no_repeat_ngram_size=1")
    assert all(len(set(text.split())) == len(text.split()) for text in texts(penalised).values())


def test_ctc_and_llm_choose_together(world, outcome):
    """With all weight on CTC the text is CTC's best of the candidates; with next to none it is the LLM's."""
    cfg = infer.load_config([world.dir], infer.DEFAULTS)
    listener = infer.load_listener(cfg, torch.device("cpu"), torch.float32)
    ctc, tokenizer, answers = listener.ctc, listener.tokenizer, texts(outcome)
    by_ctc = texts(call(infer, world.dir, world.manifest, "decode.ctc_weight=1", "decode.beam=4"))
    by_llm = texts(call(infer, world.dir, world.manifest, "decode.ctc_weight=1e-9", "decode.beam=4"))
    for row in model.read_manifest(world.manifest):
        feats = listener.encoder.features(model.load_audio(row["source"], 16000), row["key"])
        with torch.no_grad():
            enc, lens = listener.encoder(feats[None], torch.tensor([len(feats)]))
            speech, _, log_probs, positions = model.speech_for_llm(listener.adaptor, ctc, enc, lens, "frames")
        found = [ctc.tokens(labels) for labels, _ in model.ctc_beam_search(log_probs[0], ctc.blank, 4)]
        found.append(model.text_to_ids(tokenizer, answers[row["key"]]))

        def by_sound(ids, log_probs=log_probs[0]):
            classes = ctc.classes(ids)  # of tokens that CTC has; the others have a fixed score
            unknown = infer.UNKNOWN_LOG_PROB * (len(ids) - len(classes))
            return model.ctc_log_prob(log_probs, classes, ctc.blank) + unknown

        best = max(found, key=by_sound)
        assert by_ctc[row["key"]] == tokenizer.decode(best).strip()
        draft = tokenizer.decode(ctc.tokens(model.ctc_greedy(log_probs, positions, ctc.blank)[0])).strip()
        prompt = infer.make_prompt({}, draft, listener, cfg)
        scores = model.answer_log_probs(listener.llm, prompt, speech[0], found, listener.stop_id)
        assert by_llm[row["key"]] == tokenizer.decode(found[int(scores.argmax())]).strip()
    assert len({tuple(by_ctc.values()), tuple(by_llm.values())}) == 2


def test_wrong_audio_gives_every_clip_what_another_one_says(world, outcome):
    wrong = call(infer, world.dir, world.manifest, "control.wrong_audio=true")
    right, targets = texts(outcome), texts(outcome, "target")
    for result in wrong["results"]:
        assert result["text"] == right[result["speech_of"]]
        assert targets[result["speech_of"]] != result["target"] == targets[result["key"]]
    assert sorted(result["speech_of"] for result in wrong["results"]) == sorted(right)
    assert wrong["error_rate"] > outcome["error_rate"]


def test_wrong_audio_needs_different_targets():
    rows = [{"key": str(n), "source": str(n), "target": target} for n, target in enumerate("aabbccddee")]
    for seed in range(5):
        assert all(row["target"] != rows[int(row["speech"])]["target"] for row in infer.swap_speech(rows, seed))
    with pytest.raises(ValueError, match="3 of 5 clips have the same target"):
        infer.swap_speech([*rows[:2], {"key": "x", "source": "x", "target": "A."}, *rows[2:4]], 0)


def recorded_prompts(monkeypatch):
    """All arguments that build_prompt is called with."""
    calls, real = [], model.build_prompt

    def build_prompt(tokenizer, prompt, draft=None, language=None, hotwords=(), system=None):
        calls.append({"prompt": prompt, "draft": draft, "language": language, "hotwords": hotwords})
        return real(tokenizer, prompt, draft, language, hotwords, system)

    monkeypatch.setattr(model, "build_prompt", build_prompt)
    return calls


def test_the_draft_is_the_ctc_read_out_as_trained_or_as_asked(world, outcome, monkeypatch):
    calls = recorded_prompts(monkeypatch)
    call(infer, world.dir, world.manifest, "data.batch_s=0.1")
    assert sorted(c["draft"] for c in calls[1:]) == sorted(texts(outcome, "ctc_text").values())
    assert {c["prompt"] for c in calls} == {"Transcribe the speech:"}
    calls.clear()
    without = call(infer, world.dir, world.manifest, "draft=false")
    assert [c["draft"] for c in calls] == [None] * 13
    assert texts(without, "ctc_text") == texts(outcome, "ctc_text")
    with pytest.raises(ValueError, match="draft: expected auto, true or false, got 'maybe'"):
        call(infer, world.dir, world.manifest, "draft=maybe")


def test_prompt_language_and_hotwords_reach_the_prompt(world, monkeypatch, tmp_path):
    calls, wav = recorded_prompts(monkeypatch), world.wavs / "utt000.wav"
    call(infer, world.dir, wav, "prompt=Write {language}:", "language=English", "hotwords=Ada, Bob")
    assert calls[-1] | {"draft": None} == {"prompt": "Write {language}:", "draft": None, "language": "English",
                                           "hotwords": ["Ada", "Bob"]}
    row = {"key": "a", "source": str(wav), "target": "", "prompt": "Own:", "language": "en", "hotwords": "Eve, Joe"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    scored = call(infer, world.dir, tmp_path / "m.jsonl")
    assert calls[-1]["prompt"] == "Own:" and calls[-1]["hotwords"] == "Eve, Joe" and calls[-1]["language"] == "en"
    assert scored["error_rate"] is None  # an empty target is no reference


def test_sensevoice_gives_its_own_ctc_text(tmp_path_factory, sensevoice_folder, qwen3_folder):
    other = trained(tmp_path_factory.mktemp("sense"), sensevoice_folder, qwen3_folder, "optim.max_steps=2")
    got = call(infer, other.dir, other.manifest)
    encoder = model.load_encoder(sensevoice_folder)
    row = model.read_manifest(other.manifest)[0]
    feats = encoder.features(model.load_audio(row["source"], 16000), row["key"])
    enc, lens = encoder(feats[None], torch.tensor([len(feats)]))
    expected = encoder.ctc_read(encoder.ctc_best(enc), lens)[0]
    assert got["results"][0]["encoder_ctc_text"] == expected
    assert got["encoder_ctc_error_rate"] > 0 and "ctc_error_rate" not in got
    assert got["results"][0]["segments"][0]["times"] == "segment"  # no CTC head of ours was trained


# ---- inputs -----------------------------------------------------------------------------------------------------


def test_files_folders_and_manifests_mix_in_the_order_given(world, tmp_path, outcome):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    for name in ("deep/er/b.wav", "deep/a.WAV", "a=b.wav"):
        shutil.copy(world.wavs / "utt003.wav", tmp_path / name)
    (tmp_path / "deep" / "note.txt").write_text("no audio")
    got = call(infer, world.dir, tmp_path / "a=b.wav", world.manifest, tmp_path / "deep", tmp_path / "deep" / "a.WAV")
    assert [r["key"] for r in got["results"]] == ["a=b", *texts(outcome), "a", "b", "a-2"]
    assert {texts(got)[key] for key in ("a=b", "a", "b", "a-2")} == {texts(outcome)["utt003"]}
    assert "target" not in got["results"][0] and got["n_scored"] == 12 and got["n_clips"] == 16


def test_kaldi_folders_are_inputs(world, tmp_path, outcome):
    (tmp_path / "wav.scp").write_text(f"k1 {world.wavs / 'utt001.wav'}\n")
    (tmp_path / "text").write_text("k1 one\n")
    assert texts(call(infer, world.dir, tmp_path)) == {"k1": texts(outcome)["utt001"]}


def test_arguments_are_told_from_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("x=1.wav").touch()
    got = infer.split_arguments(["c.yaml", "seed=3", "x=1.wav", "data:test", "ü \"q\".wav", "--help"])
    assert got[:3] == ["c.yaml", "seed=3", "--help"]
    assert infer.load_config(got[1:2] + got[3:], infer.DEFAULTS)["inputs"] == ["x=1.wav", "data:test", "ü \"q\".wav"]
    assert infer.split_arguments(["seed=3"]) == ["seed=3"]


@pytest.mark.parametrize(("argument", "message"), [
    ("absent.wav", "absent.wav: no such file, folder or manifest"),
    ("absent.jsonl", "absent.jsonl: no such manifest"),
    (".", r"\.: no audio in this folder"),
    ("seed=1", "nothing to transcribe: give audio files"),
    ("out=x.docx", "out: x.docx ends in none of .txt, .jsonl"),
])
def test_a_wrong_input_is_named_before_any_model_is_loaded(tmp_path, monkeypatch, argument, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(infer, "model.dir=nowhere", argument)


def bad_folder(folder, world):
    """Two good clips and five bad ones."""
    folder.mkdir()
    shutil.copy(world.wavs / "utt001.wav", folder / "good.wav")
    soundfile.write(folder / "stereo.wav", np.stack([make_twins.spoken(["one"], 44100)] * 2, 1), 44100)
    (folder / "empty.wav").write_bytes(b"")
    soundfile.write(folder / "nothing.wav", np.zeros(0, np.float32), 16000)
    (folder / "text.wav").write_text("not audio")
    soundfile.write(folder / "nan.wav", np.full(16000, np.nan, np.float32), 16000, subtype="FLOAT")
    (folder / "cut.wav").write_bytes((folder / "stereo.wav").read_bytes()[:30000])
    return folder


BAD = {"empty": "the file is empty", "nothing": "holds no samples", "nan": "holds NaN or infinite samples",
       "cut": "truncated", "absent": "no such file", "text": "not readable as audio", "raw": "not readable as audio"}


def test_bad_clips_are_counted_and_named_and_do_not_end_the_run(world, tmp_path, capsys):
    folder = bad_folder(tmp_path / "in", world)
    (folder / "raw.raw").write_bytes(b"\x00\x01" * 8000)
    more = [json.dumps({"key": n.split(".")[0], "source": n, "target": ""}) for n in ("absent.wav", "raw.raw")]
    (tmp_path / "in" / "m.jsonl").write_text("\n".join(more))
    got = call(infer, world.dir, folder, folder / "m.jsonl", f"out={tmp_path / 'o' / 'x.txt'}")
    rows = [json.loads(line) for line in (tmp_path / "o" / "bad.jsonl").read_text().splitlines()]
    assert {row["key"] for row in rows} == BAD.keys()
    assert all(BAD[row["key"]] in row["reason"] and Path(row["source"]).parent == folder for row in rows)
    assert list(texts(got)) == ["good", "stereo"] and got["n_bad"] == 7
    assert "2 clips, 0.000 h, 7 left out" in capsys.readouterr().out
    only_bad = call(infer, world.dir, folder / "text.wav", "data.max_bad=1")
    assert only_bad["n_clips"] == 0 and only_bad["rtf"] is None
    assert "left out: text: " in capsys.readouterr().out


def test_past_max_bad_the_run_stops(world, tmp_path):
    folder = bad_folder(tmp_path / "in", world)
    with pytest.raises(ValueError, match="2 clips cannot be used, more than data.max_bad=1; the last is"):
        call(infer, world.dir, folder, "data.max_bad=1", f"out={tmp_path / 'x.txt'}")
    assert len((tmp_path / "bad.jsonl").read_text().splitlines()) == 2


# ---- long audio -------------------------------------------------------------------------------------------------


def test_segments_join_neighbours_and_cut_what_is_too_long():
    assert infer.cut_segments([(0, 10), (12, 20), (25, 60), (61, 65), (200, 290), (300, 310)], 30) == [
        (0, 20), (25, 42), (42, 65), (200, 230), (230, 260), (260, 290), (300, 310)]
    assert infer.cut_segments([], 30) == []
    assert all(end - first <= 30 for first, end in infer.cut_segments([(0, 1000), (1001, 1002)], 30))


def test_long_audio_is_cut_at_pauses_transcribed_and_joined(world, tmp_path, monkeypatch):
    parts = [make_twins.spoken(words) for words in (["one", "two"], ["hold"], ["please", "press", "four"])]
    wave, spans = np.zeros(40 * 16000, np.float32), []
    for second, part in zip((1, 15, 35), parts):
        wave[second * 16000 : second * 16000 + len(part)] = part
        spans.append((second * 16000, second * 16000 + len(part)))
        soundfile.write(tmp_path / f"part{second:02d}.wav", part, 16000)
    soundfile.write(tmp_path / "long.flac", wave, 16000)
    monkeypatch.setattr(infer, "speech_spans", lambda wave, rate, max_s: spans)
    alone = call(infer, world.dir, *sorted(tmp_path.glob("part*.wav")))
    got = call(infer, world.dir, tmp_path / "long.flac", "vad.threshold_s=10", f"out={tmp_path / 'x.srt'}",
               "translate=English")["results"][0]
    assert got["duration_s"] == 40.0
    assert [(s["start"], s["end"]) for s in got["segments"]] == [(first / 16000, end / 16000) for first, end in spans]
    assert [s["text"] for s in got["segments"]] == list(texts(alone).values())
    assert got["text"] == " ".join(texts(alone).values()) and "translation" in got
    for segment in got["segments"]:
        for word in segment.get("words", []):
            assert segment["start"] <= word["start"] <= word["end"] <= segment["end"]
    starts = re.findall(r"^00:00:(\d\d),\d+ -->", (tmp_path / "x.srt").read_text(), re.MULTILINE)
    assert starts == ["01", "15", "35"]


def test_a_recording_may_have_more_pieces_than_a_process_may_open_files(world, tmp_path, monkeypatch):
    soundfile.write(tmp_path / "long.wav", np.zeros(60 * 16000, np.float32), 16000)
    spans = [(first, first + 3200) for first in range(0, 60 * 16000, 4800)]
    monkeypatch.setattr(infer, "speech_spans", lambda wave, rate, max_s: spans)
    encoder, cfg = model.load_encoder(world.encoder), infer.load_config(["vad.threshold_s=0.2"], infer.DEFAULTS)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, limit[1]))
    try:
        rows = [{"key": str(n), "speech": str(tmp_path / "long.wav"), "source": "long.wav"} for n in range(3)]
        batches = list(infer.read_batches(rows, encoder, cfg, {}, []))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert sum(map(len, batches)) == 3 * len(spans) == 600


def test_silero_hears_no_speech_in_silence_and_leaves_the_threads_alone(world, tmp_path):
    generator = np.random.default_rng(0)
    wave = np.concatenate([np.zeros(16000), generator.normal(0, 0.1, 16000), np.zeros(16000)]).astype(np.float32)
    soundfile.write(tmp_path / "noise.wav", wave, 16000)
    threads = torch.get_num_threads()
    got = call(infer, world.dir, tmp_path / "noise.wav", "vad.threshold_s=2")
    assert torch.get_num_threads() == threads
    assert got["results"][0]["text"] == "" and got["results"][0]["segments"] == [] and got["n_bad"] == 0


def test_texts_join_with_a_space_except_between_chinese():
    assert infer.join_texts(["one", "", "two"]) == "one two"
    assert infer.join_texts(["今天", "天气", "ok"]) == "今天天气 ok"


# ---- times ------------------------------------------------------------------------------------------------------


def aligned(tokenizer, words, text, positions=40):
    """align() with a head that knows the tokens of `words`, on log-probabilities that say them one after the other."""
    ids = model.text_to_ids(tokenizer, words)
    head = model.CTCHead(4, embedding=torch.randn(400, 4), token_ids=sorted(set(ids)))
    log_probs = torch.full((positions, head.blank + 1), -9.0)
    log_probs[:, head.blank] = -1.0
    for n, c in enumerate(head.classes(ids)):
        log_probs[3 * n + 2, c] = -0.1
    listener = SimpleNamespace(tokenizer=tokenizer, ctc=head, position_s=0.1, nano=None)
    return infer.align(log_probs, text, listener)


def test_words_are_placed_where_ctc_hears_them():
    tokenizer = make_twins.tiny_tokenizer()
    words = aligned(tokenizer, "one two three", "one two three")
    assert [word for word, _, _ in words] == ["one", "two", "three"]
    assert words[0][1] == pytest.approx(0.2) and words[1][1] >= words[0][2] and words[2][1] >= words[1][2]
    assert aligned(tokenizer, "one two", "one hold") == []  # a token that the head does not have
    assert aligned(tokenizer, "one two", "one two " * 30) == []  # more tokens than positions
    assert aligned(tokenizer, "one", "") == []


def test_a_character_of_several_tokens_is_one_word():
    tokenizer = make_twins.tiny_tokenizer()
    assert len(model.text_to_ids(tokenizer, "鑫")) > 1
    assert [word for word, _, _ in aligned(tokenizer, "今天鑫气", "今天鑫气")] == ["今", "天", "鑫", "气"]


def test_rows_say_where_their_times_come_from(outcome, world):
    segments = [segment for result in outcome["results"] for segment in result["segments"]]
    assert {segment["times"] for segment in segments} >= {"ctc"}
    for segment in segments:
        assert (segment["times"] == "ctc") == ("words" in segment)
        if "words" in segment:
            assert " ".join(word["word"] for word in segment["words"]) == " ".join(segment["text"].split())


def test_cues_are_short_and_hold_the_whole_text():
    words = [f"word{n:02d}" for n in range(40)]
    timed = [{"word": word, "start": 0.5 * n, "end": 0.5 * n + 0.3} for n, word in enumerate(words)]
    segments = [{"start": 0.0, "end": 20.0, "text": " ".join(words), "words": timed},
                {"start": 20.0, "end": 29.0, "text": "untimed", "times": "segment"}]
    got = infer.cues({"segments": segments, "duration_s": 29.0})
    assert " ".join(text for _, _, text in got) == " ".join(words) + " untimed"
    assert all(len(text) <= 84 and end - start <= 7.5 for start, end, text in got[:-1])
    assert all(a[1] <= b[0] for a, b in zip(got, got[1:])) and got[-1][:2] == (20.0, 29.0)
    assert infer.srt_time(3661.5) == "01:01:01,500"


# ---- output files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(world, tmp_path_factory):
    """All kinds of files from one run, of a manifest whose keys and paths need escaping."""
    folder = tmp_path_factory.mktemp("written")
    (folder / "in").mkdir()
    rows = [row for row in model.read_manifest(world.manifest)][:5]
    for row in rows:
        shutil.copy(row["source"], folder / "in" / f"{row['key']} & #1.wav")
    lines = [{"key": f"{row['key']}/<b>", "source": f"{row['key']} & #1.wav", "target": row["target"]} for row in rows]
    (folder / "in" / "m.jsonl").write_text("\n".join(map(json.dumps, lines)))
    out = folder / "out" / "x"
    got = call(infer, world.dir, folder / "in" / "m.jsonl", f"out={','.join(f'{out}{end}' for end in infer.ENDINGS)}")
    return SimpleNamespace(out=out, results=got["results"], summary=got, rows=rows)


def test_txt_and_jsonl_hold_the_results(written):
    lines = Path(f"{written.out}.txt").read_text(encoding="utf-8").splitlines()
    assert lines == [f"{r['key']}\t{' '.join(r['text'].split())}" for r in written.results]
    rows = [json.loads(line) for line in Path(f"{written.out}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == written.results
    for row, given in zip(rows, written.rows):
        assert {"key", "source", "text", "duration_s", "segments", "target", "errors", "ctc_text"} == set(row)
        assert row["duration_s"] == pytest.approx(soundfile.info(given["source"]).duration, abs=1e-3)
        assert row["segments"][0]["start"] == 0.0 and row["segments"][0]["end"] == row["duration_s"]


def test_json_holds_the_summary(written):
    summary = json.loads(Path(f"{written.out}.json").read_text())
    assert summary == {name: value for name, value in written.summary.items() if name != "results"}
    assert summary["rtf"] * summary["hours"] * 3600 == pytest.approx(summary["seconds"], abs=6e-4)  # written to 1 ms
    assert {"n_clips", "n_units", "error_rate", "ctc_error_rate", "hours", "seconds", "rtf"} <= set(summary)


def test_srt_is_one_file_a_clip_with_numbered_cues_in_time(written):
    for result in written.results:
        name = result["key"].replace("/<b>", "__b_")
        blocks = Path(f"{written.out}.{name}.srt").read_text(encoding="utf-8").strip().split("\n\n")
        assert [block.splitlines()[0] for block in blocks] == [str(n + 1) for n in range(len(blocks))]
        assert " ".join(" ".join(b.splitlines()[2:]) for b in blocks).split() == result["text"].split()
        for block in blocks:
            times = re.fullmatch(r"00:00:(\d\d),(\d{3}) --> 00:00:(\d\d),(\d{3})", block.splitlines()[1])
            start, end = float(f"{times[1]}.{times[2]}"), float(f"{times[3]}.{times[4]}")
            assert 0 <= start < end <= result["duration_s"] + 1e-3


def test_html_is_escaped_plays_the_clips_and_has_the_worst_first(written):
    page = Path(f"{written.out}.html").read_text(encoding="utf-8")
    articles = re.findall(r'<article data-errors="(\d+)">(.*?)</article>', page, re.DOTALL)
    assert len(articles) == 5 and "<b>" not in page and "http" not in page
    badness = []
    for errors, body in articles:
        key = html.unescape(re.search(r"<h2>(\S+) ", body)[1])
        result = next(r for r in written.results if r["key"] == key)
        assert int(errors) == result["errors"]["errors"]
        badness.append(int(errors) / result["errors"]["units"])
        source = html.unescape(re.search(r'<audio controls preload="none" src="([^"]*)">', body)[1])
        assert source == f"../in/{key.split('/')[0]}%20%26%20%231.wav"
        assert html.escape(result["ctc_text"]) in body
    assert badness == sorted(badness, reverse=True)
    assert f"{100 * written.summary['error_rate']:.2f} %" in page and 'name="viewport"' in page


@pytest.mark.parametrize(("reference", "hypothesis", "expected"), [
    ("Press <one> now!", "press two now please",
     ("press <del>one</del> now", "press <ins>two</ins> now <ins>please</ins>")),
    ("今天天气", "今天气很", ("今天<del>天</del>气", "今天气<ins>很</ins>")),
    ("a b", "", ("<del>a b</del>", "")),
    ("rock & roll's", "rock roll's", ("rock roll&#x27;s", "rock roll&#x27;s")),
])
def test_differences_are_marked(reference, hypothesis, expected):
    got = infer.mark_errors(reference, hypothesis)
    counts = model.error_rate([reference], [hypothesis])
    if "今" in reference:  # which of two equal characters is missing is open; the number of marks is not
        assert re.sub("<.*?>", "", got[0]) == reference and re.sub("<.*?>", "", got[1]) == hypothesis
    else:
        assert got == expected
    marked = [len(re.findall("<del>", got[0])), len(re.findall("<ins>", got[1]))]
    assert (counts["errors"] == 0) == (marked == [0, 0])


# ---- translation ------------------------------------------------------------------------------------------------


def test_translation_is_the_llms_own_without_lora(world, outcome, monkeypatch):
    from peft.tuners.tuners_utils import BaseTunerLayer

    real, switched = model.decode_stream, []

    def decode_stream(llm, *rest):
        switched.append({part.disable_adapters for part in llm.modules() if isinstance(part, BaseTunerLayer)})
        return real(llm, *rest)

    prefixes, read = [], model.read_prefix
    monkeypatch.setattr(model, "decode_stream", decode_stream)
    monkeypatch.setattr(model, "read_prefix", lambda llm, ids: prefixes.append(list(ids)) or read(llm, ids))
    got = call(infer, world.dir, world.manifest, "translate=English")
    assert len([ids for ids in prefixes if ids]) == 1  # what stands before the audio, once for all
    assert switched == [{False}, {True}]  # one batch transcribed with LoRA, one translated without
    assert texts(got) == texts(outcome)
    llm, tokenizer = model.load_llm(world.llm)
    for result in got["results"][:4]:
        turn = [{"role": "user", "content": f"Translate to English: {result['text']}"}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        answer = []
        for _ in range(16 + 4 * len(model.text_to_ids(tokenizer, result["text"]))):
            token = int(llm(torch.cat([ids, torch.tensor([answer], dtype=torch.long)], 1)).logits[0, -1].argmax())
            if token == model.end_of_turn(tokenizer):
                break
            answer.append(token)
            if model.cut_loop(answer):
                break
        assert result["translation"] == tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_lora_is_back_on_after_an_error(world):
    llm = infer.load_listener(infer.load_config([world.dir], infer.DEFAULTS), torch.device("cpu"), torch.float32).llm
    x = {"input_ids": torch.tensor([[1, 2, 3]])}
    before = llm(**x).logits
    with pytest.raises(KeyError), infer.without_lora(llm):
        assert not torch.equal(llm(**x).logits, before)
        raise KeyError
    assert torch.equal(llm(**x).logits, before)


# ---- weights ----------------------------------------------------------------------------------------------------


def test_a_published_state_dict_loads_without_config_json(world, tmp_path, monkeypatch):
    shutil.copy(world.run / "adaptor_phase2_final.pt", tmp_path / "published.pt")
    named = [f"encoder.name={world.encoder}", f"llm.name={world.llm}"]
    got = call(infer, f"adaptor.file={tmp_path / 'published.pt'}", *ADAPTOR, *named, world.wavs / "utt000.wav")
    assert got["n_clips"] == 1 and "ctc_text" not in got["results"][0]
    with monkeypatch.context() as patch:
        graphs, real = [], model.Graphs
        patch.setattr(infer, "is_gpu", lambda device: True)
        patch.setattr(model, "Graphs", lambda function: graphs.append(real(function)) or graphs[-1])
        same = call(infer, f"adaptor.file={tmp_path / 'published.pt'}", *ADAPTOR, *named, world.wavs / "utt000.wav",
                    "data.batch_s=0")
        assert texts(same) == texts(got) and len(graphs) == 2
    with pytest.raises(ValueError, match="without config.json, so give encoder.name and llm.name too"):
        call(infer, f"adaptor.file={tmp_path / 'published.pt'}", world.manifest)
    with pytest.raises(ValueError, match="(?s)does not fit the configured AudioAdaptor.*input_proj.weight"):
        call(infer, f"adaptor.file={tmp_path / 'published.pt'}", *named, "adaptor.hidden_dim=64", world.manifest)
    with pytest.raises(ValueError, match="ctc_head.pt: no such file"):
        call(infer, f"adaptor.file={tmp_path / 'published.pt'}", *ADAPTOR, *named, "draft=true", world.manifest)


def test_models_can_lie_elsewhere_but_must_be_the_same(world, tmp_path, outcome):
    shutil.copytree(world.encoder, tmp_path / "moved")
    got = call(infer, world.dir, world.manifest, f"encoder.name={tmp_path / 'moved'}")
    assert texts(got) == texts(outcome)
    make_twins.whisper_folder(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="other is not the encoder of training: encoder.weights '.*' .trained with"):
        call(infer, world.dir, world.manifest, f"encoder.name={tmp_path / 'other'}")
    make_twins.qwen3_folder(tmp_path / "llm", seed=5)
    with pytest.raises(ValueError, match="llm is not the llm of training: llm.weights"):
        call(infer, world.dir, world.manifest, f"llm.name={tmp_path / 'llm'}")


def test_a_missing_folder_is_named(world):
    with pytest.raises(ValueError, match="model.dir=/no/where: no config.json there; give run.dir of a train"):
        call(infer, "model.dir=/no/where", world.manifest)
    with pytest.raises(ValueError, match="model.dir=: no config.json there"):
        call(infer, world.manifest)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["adaptor_phase2_final.pt", "ctc_head.pt", "lora.pt"])
def test_damaged_weights_are_refused_by_name(world, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.run, tmp_path / "run")
    good = torch.load(tmp_path / "run" / name, weights_only=True)
    torch.save(Malicious(), tmp_path / "run" / name)
    with pytest.raises(ValueError, match=f"{name}: not a plain state dict"):
        call(infer, "model.dir=run", world.manifest)
    assert not (tmp_path / "pwned").exists()
    smaller = {key: value[:1] if value.dim() else value for key, value in list(good.items())[1:]}
    torch.save(smaller, tmp_path / "run" / name)
    with pytest.raises(ValueError, match=f"{name}: does not fit"):
        call(infer, "model.dir=run", world.manifest)
    (tmp_path / "run" / name).unlink()
    with pytest.raises(ValueError, match=f"{name}: no such file"):
        call(infer, "model.dir=run", world.manifest)


# ---- command line -----------------------------------------------------------------------------------------------


def test_the_command_prints_transcripts_and_rates_in_one_go(world, outcome):
    command = [sys.executable, ROOT / "infer.py", ROOT / "configs" / "demo_infer.yaml", world.dir]
    run = subprocess.run([*command, "decode.ctc_weight=0", world.manifest], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for key, text in texts(outcome).items():
        assert f"{key}\t{' '.join(text.split())}\n" in run.stdout
    assert f"({100 * outcome['error_rate']:.2f} % normalised)" in run.stdout and "RTF" in run.stdout
    wrong = subprocess.run([*command, "absent.wav"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == "error: absent.wav: no such file, folder or manifest\n"
