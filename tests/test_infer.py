"""infer.py and report.py by value: batches, drafts, validation, outputs, controls, errors."""

import html
import json
import os
import re
import shutil
import subprocess
import sys
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
import report
import train_phase2

ROOT = Path(__file__).parents[1]


def call(script, *arguments):
    arguments = [str(argument) for argument in arguments]
    if script is infer:
        arguments = infer.split_arguments(["workers=0", *arguments])
    return script.main(model.load_config(arguments, script.DEFAULTS))


def lines_of(world, tmp_path, *arguments, name="x"):
    """Transcribe the manifest; lines of the .jsonl by key."""
    call(infer, world.dir, world.manifest, f"out={tmp_path / name}.jsonl", *arguments)
    texts = (tmp_path / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {line["key"]: line for line in map(json.loads, texts)}


@pytest.fixture(scope="module")
def world(tmp_path_factory, whisper_folder, qwen3_folder):
    """A tiny Whisper and Qwen3 with LoRA and CTC head, trained until they hear some of 12 clips."""
    folder = tmp_path_factory.mktemp("infer")
    manifest = make_twins.wav_files(folder / "wavs", n=12)
    data = [f"data.train={manifest}", f"cache.dir={folder / 'c'}", "workers=0"]
    call(precompute, *data, f"encoder.name={whisper_folder}")
    call(train_phase2, *data, f"data.valid={manifest}", f"llm.name={qwen3_folder}",
         "batch_clips=12", f"run.dir={folder / 'run'}", "adaptor.hidden_dim=32",
         "adaptor.num_layers=1", "adaptor.num_heads=4", "adaptor.stack=2", "adaptor.dropout=0",
         "optim.warmup_steps=2",
         "optim.clip=1", "optim.max_steps=160", "optim.lr=1e-2", "loss.ctc_weight=0.3",
         "llm.lora.r=8", "run.save_every=0", "run.valid_every=0", "run.log_every=0")  # fmt: skip
    return SimpleNamespace(
        manifest=manifest, run=folder / "run", dir=f"model.dir={folder / 'run'}",
        wavs=folder / "wavs", encoder=whisper_folder, llm=qwen3_folder,
    )  # fmt: skip


@pytest.fixture(scope="module")
def outcome(world, tmp_path_factory):
    return lines_of(world, tmp_path_factory.mktemp("outcome"))


def texts(lines, field="text"):
    return {key: line[field] for key, line in lines.items()}


def load_listener(world, *arguments):
    cfg = model.load_config([world.dir, *arguments], infer.DEFAULTS)
    return infer.load_listener(cfg, torch.device("cpu"), torch.float32)


# ---- transcripts ------------------------------------------------------------


def test_transcripts_are_those_of_validation(world, outcome):
    final = json.loads((world.run / "metrics.jsonl").read_text().splitlines()[-1])
    assert final["wer"] < 0.9 and len(set(texts(outcome).values())) >= 3  # equality says something
    targets, ctc = texts(outcome, "target").values(), texts(outcome, "ctc_text").values()
    rate = model.error_rate(targets, texts(outcome).values())["rate"]
    assert rate == pytest.approx(final["wer"], abs=1e-5)
    assert model.error_rate(targets, ctc)["rate"] == pytest.approx(final["ctc_wer"], abs=1e-5)


@pytest.mark.parametrize("arguments", [
    ["batch_s=0"], ["batch_s=1.5"], ["workers=2"], ["decode.speculative=false"],
    ["decode.speculative=false", "batch_s=0"], ["decode.repetition_penalty=1.0000001"],
], ids=" ".join)  # fmt: skip
def test_batches_readers_and_drafts_change_nothing(world, outcome, tmp_path, arguments):
    found = lines_of(world, tmp_path, *arguments)
    assert found == outcome and list(found) == list(outcome)  # in the order of the inputs, too


def test_decoding_options_reach_the_decoder(world, outcome, tmp_path):
    options = ["decode.repetition_penalty=5", "decode.no_repeat_ngram_size=1"]
    for text in texts(lines_of(world, tmp_path, *options)).values():
        assert len(set(text.split())) == len(text.split())
    short = texts(lines_of(world, tmp_path, "decode.tokens_per_s=-5", name="y"))
    assert sum(map(len, short.values())) < sum(map(len, texts(outcome).values()))
    ctc = lines_of(world, tmp_path, "decode.readout=ctc", name="z")
    assert texts(ctc) == texts(outcome, "ctc_text")


def test_next_draft_goes_on_behind_the_last_token():
    assert infer.next_draft([5, 9], [7, 9, 1, 2]) == [1, 2]  # the draft had a token too much
    assert infer.next_draft([5, 9], [7, 1, 2]) == [1, 2]  # it had another one
    assert infer.next_draft([1, 2, 3, 4, 8, 1, 2, 3], []) == [4, 8, 1, 2, 3]  # it repeats itself


def test_drafts_take_few_passes(world, outcome, monkeypatch, tmp_path):
    passes, real = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda *a: passes.append(1) or real(*a))
    right = {line["key"]: line["text"] for line in outcome.values()}
    listener = load_listener(world)
    clips = []
    for row in model.read_manifest(world.manifest, tmp_path).to_list():
        feats = listener.encoder.features(model.load_audio(row["source"], 16000), row["key"])
        clips.append(infer.Clip(row, feats.numpy(), 0.0, 1.0))
    cfg = model.load_config([world.dir], infer.DEFAULTS)
    with torch.no_grad():
        infer.encode(clips, listener, torch.device("cpu"))
        infer.build_prompts(clips, listener, cfg)
        for clip in clips:  # as if CTC had heard what the LLM writes
            clip.draft = model.text_to_ids(listener.tokenizer, [right[clip.row["key"]]])[0]
        answers = infer.decode_drafted(listener.llm, clips, listener.stop_id)
    written = [listener.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
    assert written == list(right.values()) and len(passes) < max(map(len, answers))


def test_llm_and_ctc_choose_together(world, outcome, tmp_path):
    by_ctc = texts(lines_of(world, tmp_path, "decode.ctc_weight=1"))
    by_llm = texts(lines_of(world, tmp_path, "decode.ctc_weight=1e-9", name="y"))
    assert by_ctc == texts(outcome, "ctc_text")  # CTC's best path here is its best text
    listener, more = load_listener(world), 0
    for row in model.read_manifest(world.manifest, tmp_path).to_list():
        feats = listener.encoder.features(model.load_audio(row["source"], 16000), row["key"])
        clip = infer.Clip(row, feats.numpy(), 0.0, 1.0)
        with torch.no_grad():
            infer.encode([clip], listener, torch.device("cpu"))
            both = [outcome[row["key"]]["text"], clip.ctc_text]
            ids = model.text_to_ids(listener.tokenizer, both)
            losses = []
            for one in ids:
                prompt = listener.prompt(row)
                inputs = model.splice(listener.llm.get_input_embeddings(), [prompt],
                                      clip.speech[None], torch.tensor([len(clip.speech)]),
                                      [[*one, listener.stop_id]])  # fmt: skip
                losses.append(float(model.transcript_loss(listener.llm, inputs)[0]))
        if abs(losses[0] - losses[1]) > 1e-3:
            assert by_llm[row["key"]] == both[int(losses[1] < losses[0])]
            more += 1
    assert more > 3


def test_wrong_audio_gives_every_clip_what_another_one_says(world, outcome, tmp_path):
    right, targets = texts(outcome), texts(outcome, "target")
    wrong = lines_of(world, tmp_path, "control.wrong_audio=true")
    for key, line in wrong.items():
        assert line["text"] == right[line["speech_of"]]
        assert targets[line["speech_of"]] != line["target"] == targets[key]
    assert sorted(line["speech_of"] for line in wrong.values()) == sorted(right)
    rows = [{"key": str(n), "source": str(n), "target": t} for n, t in enumerate("aabbccddee")]
    for seed in range(5):
        swapped = infer.swap_speech(rows, seed)
        assert all(row["target"] != rows[int(row["speech"])]["target"] for row in swapped)
    same = [*rows[:2], {"key": "x", "source": "x", "target": "A."}, *rows[2:4]]
    with pytest.raises(model.UserError, match="3 of 5 have the same target"):
        infer.swap_speech(same, 0)


def test_prompt_language_and_hotwords_reach_the_prompt(world, tmp_path):
    own = {"prompt": "Own:", "language": "en", "hotwords": "Eve, Joe"}
    listener = load_listener(world)
    said = [listener.tokenizer.decode(listener.prompt(row)[0]) for row in ({}, own)]
    assert "Transcribe the speech:" in said[0] and "Hotwords: [Eve, Joe]\nOwn:" in said[1]
    listener = load_listener(world, "prompt=Write {language}:", "language=English", "hotwords=Ada")
    assert "Hotwords: [Ada]\nWrite English:" in listener.tokenizer.decode(listener.prompt(own)[0])


def test_sensevoice_gives_its_own_ctc_text(sensevoice_folder):
    encoder = model.freeze(model.load_encoder(sensevoice_folder))
    read = infer.sensevoice_ctc(sensevoice_folder, encoder, torch.device("cpu"))
    kept = model.freeze(model.load_encoder(sensevoice_folder, keep_query_frames=True))
    read_kept = infer.sensevoice_ctc(sensevoice_folder, kept, torch.device("cpu"))
    feats = encoder.features(torch.from_numpy(make_twins.spoken(["one", "two"])), "a")
    with torch.no_grad():
        enc, lens = encoder(feats[None], torch.tensor([len(feats)]))
        (text,) = read(enc, lens)
        assert read_kept(*kept(feats[None], torch.tensor([len(feats)]))) == [text]
        _, weights = model.read_funasr(sensevoice_folder)
        scores = enc[0] @ weights["ctc.ctc_lo.weight"].T + weights["ctc.ctc_lo.bias"]
    path = [int(best) for best in scores.argmax(-1)]
    path = [c for n, c in enumerate(path) if c and (n == 0 or c != path[n - 1])]
    import sentencepiece

    model_file = str(next(sensevoice_folder.glob("*.bpe.model")))
    assert text == sentencepiece.SentencePieceProcessor(model_file=model_file).decode(path).strip()
    assert text


# ---- inputs -----------------------------------------------------------------


def test_files_folders_and_manifests_mix_in_the_order_given(world, tmp_path):
    shutil.copytree(world.wavs, tmp_path / "in" / "deep")
    (tmp_path / "in" / "notes.txt").write_text("no audio")
    wav = world.wavs / "utt003.wav"
    rows = infer.list_rows([str(wav), str(tmp_path / "in"), str(world.manifest)], tmp_path / "m")
    keys = [row["key"] for row in rows]
    assert keys[0] == "utt003" and "utt003-2" in keys and "utt003-3" in keys and len(keys) == 25
    assert len(set(keys)) == 25 and rows[-1]["target"]
    (tmp_path / "a=b.wav").write_bytes(wav.read_bytes())
    split = infer.split_arguments(["c.yaml", "x=1", str(tmp_path / "a=b.wav"), "y.wav"])
    assert split == ["c.yaml", "x=1", f"inputs={tmp_path / 'a=b.wav'},y.wav"]
    for inputs, message in ((["absent.wav"], "absent.wav: no such file"), ([], "nothing to trans")):
        with pytest.raises(model.UserError, match=message):
            infer.list_rows(inputs, tmp_path)


def test_recordings_that_cannot_be_used_are_named(world, tmp_path, capsys):
    for name in ("good", "cut"):
        shutil.copy(world.wavs / "utt001.wav", tmp_path / f"{name}.wav")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:-2000])
    (tmp_path / "empty.wav").write_bytes(b"")
    summary = call(infer, world.dir, tmp_path, f"out={tmp_path / 'o' / 'calls.txt'}")
    assert (summary["clips"], summary["dropped"]) == (1, 2)
    rows = (tmp_path / "o" / "calls.dropped.jsonl").read_text().splitlines()
    assert {json.loads(row)["key"] for row in rows} == {"cut", "empty"}
    with pytest.raises(
        model.UserError, match="2 recordings cannot be used, more than max_dropped=1"
    ):
        call(infer, world.dir, tmp_path, "max_dropped=1", "batch_s=0")


def test_a_killed_run_goes_on_behind_what_is_written(world, outcome, tmp_path, monkeypatch):
    real, heard = infer.encode, []

    def die_in_the_third_batch(clips, *rest):
        heard.append([clip.row["key"] for clip in clips])
        if len(heard) == 3:
            raise KeyboardInterrupt
        return real(clips, *rest)

    monkeypatch.setattr(infer, "encode", die_in_the_third_batch)
    with pytest.raises(KeyboardInterrupt):
        lines_of(world, tmp_path, "batch_s=1.5")
    path = tmp_path / "x.jsonl"
    done = [json.loads(line)["key"] for line in path.read_text().splitlines()]
    assert done == sum(heard[:2], []) and len(done) > 1
    path.write_text(path.read_text() + '{"key": "utt')  # as a kill in the middle of a line
    heard = heard[:3]
    assert lines_of(world, tmp_path, "batch_s=1.5") == outcome
    assert not set(sum(heard[3:], [])) & set(done)
    assert not list(tmp_path.glob("*.unfinished"))
    heard = []
    lines_of(world, tmp_path, "batch_s=100")  # of a finished run nothing is taken over
    assert heard


# ---- long audio and times ---------------------------------------------------


def test_long_audio_is_cut_at_pauses_transcribed_and_joined(world, tmp_path, monkeypatch):
    parts = [make_twins.spoken(words) for words in (["one", "two"], ["hold"], ["press", "four"])]
    wave, spans = np.zeros(40 * 16000, np.float32), []
    for second, part in zip((1, 15, 35), parts, strict=True):
        wave[second * 16000 : second * 16000 + len(part)] = part
        spans.append((second * 16000, second * 16000 + len(part)))
        soundfile.write(tmp_path / f"part{second:02d}.wav", part, 16000)
    soundfile.write(tmp_path / "long.flac", wave, 16000)
    monkeypatch.setattr(infer, "speech_spans", lambda wave, rate, max_s: spans)
    call(infer, world.dir, *sorted(tmp_path.glob("part*.wav")), f"out={tmp_path / 'a'}.jsonl")
    call(infer, world.dir, tmp_path / "long.flac", "vad.threshold_s=10", "translate=English",
         f"out={tmp_path / 'x'}.srt", "batch_s=1")  # fmt: skip
    alone = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    line = json.loads((tmp_path / "x.jsonl").read_text())
    times = [(segment["start"], segment["end"]) for segment in line["segments"]]
    assert line["duration_s"] == 40.0 and times == [(a / 16000, b / 16000) for a, b in spans]
    assert [segment["text"] for segment in line["segments"]] == alone
    assert line["text"] == " ".join(filter(None, alone)) and "translation" in line
    for segment in line["segments"]:
        for word in segment["words"]:
            assert segment["start"] <= word["start"] <= word["end"] <= segment["end"]
    starts = re.findall(r"^00:00:(\d\d),\d+ -->", (tmp_path / "x.srt").read_text(), re.MULTILINE)
    assert starts == [
        f"{second:02d}" for second, text in zip((1, 15, 35), alone, strict=True) if text
    ]


def test_silero_hears_no_speech_in_noise_and_leaves_the_threads_alone(monkeypatch):
    noise = torch.randn(16000 * 3, generator=torch.Generator().manual_seed(0)) * 0.1
    threads = torch.get_num_threads()
    assert infer.speech_spans(noise, 16000, 2.0) == [] and torch.get_num_threads() == threads
    found = [(0, 10), (12, 20), (25, 60), (61, 65), (200, 290), (300, 310)]  # in s
    silero = sys.modules["silero_vad"]
    spans = [{"start": first * 16000, "end": end * 16000} for first, end in found]
    monkeypatch.setattr(silero, "get_speech_timestamps", lambda *rest, **more: spans)
    joined = [(a / 16000, b / 16000) for a, b in infer.speech_spans(noise, 16000, 30.0)]
    assert joined == [
        (0, 20),
        (25, 42.5),
        (42.5, 65),
        (200, 230),
        (230, 260),
        (260, 290),
        (300, 310),
    ]


def aligned(tokenizer, said, text, positions=40):
    """align() with a head that knows the tokens of `said`, and scores that say them in turn."""
    (ids,) = model.text_to_ids(tokenizer, [said])
    head = model.CTCHead(torch.randn(400, 4), sorted(set(ids)))
    log_probs = torch.full((positions, head.blank + 1), -9.0)
    log_probs[:, head.blank] = -1.0
    for n, c in enumerate(head.classes(ids)):
        log_probs[3 * n + 2, c] = -0.1

    def spell(text):
        (ids,) = model.text_to_ids(tokenizer, [text])
        known = len(head.classes(ids)) == len(ids)
        return (
            list(zip(head.classes(ids), infer.token_texts(ids, tokenizer), strict=True))
            if known
            else None
        )

    clip = infer.Clip({}, None, 1.0, 9.0, log_probs=log_probs, text=text)
    infer.align([clip], SimpleNamespace(spell=spell, blank=head.blank, position_s=0.1))
    return list(clip.words)


def test_words_are_placed_where_ctc_hears_them():
    tokenizer = make_twins.tiny_tokenizer()
    words = aligned(tokenizer, "one two three", "one two three")
    assert [word["word"] for word in words] == ["one", "two", "three"]
    assert words[0]["start"] == pytest.approx(1.2) and words[1]["start"] >= words[0]["end"]
    assert aligned(tokenizer, "one two", "one hold") == []  # a token that the head does not have
    assert aligned(tokenizer, "one two", "one two " * 30) == []  # more tokens than positions
    assert aligned(tokenizer, "one", "") == []
    chinese = aligned(tokenizer, "今天鑫气", "今天鑫气")  # 鑫 is several tokens
    assert [word["word"] for word in chinese] == ["今", "天", "鑫", "气"]


def test_cues_are_short_and_hold_the_whole_text():
    names = [f"word{n:02d}" for n in range(40)]
    words = [{"word": w, "start": 0.5 * n, "end": 0.5 * n + 0.3} for n, w in enumerate(names)]
    segments = [{"start": 0.0, "end": 20.0, "text": " ".join(names), "words": words},
                {"start": 20.0, "end": 29.0, "text": "untimed", "words": []}]  # fmt: skip
    got = infer.cues({"segments": segments, "duration_s": 29.0})
    assert " ".join(text for _, _, text in got) == " ".join(names) + " untimed"
    assert all(len(text) <= 84 and end - start <= 7.5 for start, end, text in got[:-1])
    assert all(a[1] <= b[0] for a, b in zip(got, got[1:], strict=False)) and got[-1][:2] == (20, 29)
    late = {"start": 3661.5, "end": 3662, "text": "x", "words": []}
    assert "01:01:01,500 --> " in infer.srt_text({"segments": [late], "duration_s": 4000.0})


def test_texts_join_with_a_space_except_between_chinese():
    assert infer.join_texts(["one", "", "two"]) == "one two"
    assert infer.join_texts(["今天", "天气", "ok"]) == "今天天气 ok"


# ---- outputs ----------------------------------------------------------------


def test_every_output_is_made_of_the_same_lines(world, tmp_path):
    (tmp_path / "in").mkdir()
    rows = model.read_manifest(world.manifest, tmp_path).to_list()[:5]
    for row in rows:
        shutil.copy(row["source"], tmp_path / "in" / f"{row['key']} & #1.wav")
    lines = [
        {"key": f"{r['key']}/<b>", "source": f"{r['key']} & #1.wav", "target": r["target"]}
        for r in rows
    ]
    model.save(tmp_path / "in" / "m.jsonl", lines)
    out = tmp_path / "out" / "x"
    names = ",".join(f"{out}{end}" for end in infer.ENDINGS)
    summary = call(infer, world.dir, tmp_path / "in" / "m.jsonl", f"out={names}")
    lines = [json.loads(line) for line in Path(f"{out}.jsonl").read_text().splitlines()]
    assert Path(f"{out}.txt").read_text().splitlines() == [
        f"{x['key']}\t{x['text']}" for x in lines
    ]
    assert json.loads(Path(f"{out}.json").read_text()) == summary
    assert summary["rtf"] * summary["hours"] * 3600 == pytest.approx(summary["elapsed_s"], abs=6e-4)
    for line, row in zip(lines, rows, strict=True):
        assert line["duration_s"] == pytest.approx(soundfile.info(row["source"]).duration, abs=1e-3)
        srt = Path(f"{out}.{line['key'].replace('/<b>', '__b_')}.srt").read_text().strip()
        blocks = srt.split("\n\n") if srt else []
        assert (
            " ".join(" ".join(b.splitlines()[2:]) for b in blocks).split() == line["text"].split()
        )
    targets = [line["target"] for line in lines]
    for kind in ("text", "ctc_text"):
        expected = model.error_rate(targets, [line[kind] for line in lines])
        found = summary["scores"][kind]
        assert found["wer"] == expected["rate"] and found["deletions"] == expected["deletions"]
    with pytest.raises(model.UserError, match="x.doc ends in none of .jsonl, .txt, .srt, .json"):
        call(infer, world.dir, world.manifest, "out=x.doc")

    page = report.make_page(lines, tmp_path / "out")
    articles = re.findall(r'<article data-errors="(\d+)">(.*?)</article>', page, re.DOTALL)
    assert len(articles) == 5 and "<b>" not in page and "http" not in page
    rates = []
    for errors, body in articles:
        key = html.unescape(re.search(r"<h2>(\S+) ", body)[1])
        line = next(line for line in lines if line["key"] == key)
        counts = model.error_rate([line["target"]], [line["text"]])
        assert int(errors) == counts["errors"]
        rates.append(counts["rate"])
        source = html.unescape(re.search(r'<audio controls preload="none" src="([^"]*)">', body)[1])
        assert source == f"../in/{key.split('/')[0]}%20%26%20%231.wav"
        assert html.escape(line["ctc_text"]) in body
    assert rates == sorted(rates, reverse=True)
    assert f"{100 * summary['scores']['text']['wer']:.2f} %" in page


def test_the_fields_normaliser_folds_numbers_and_contractions():
    line = {"target": "One two three, it's colour.", "text": "123 it is colour"}
    scores = infer.score([line])["text"]
    assert scores["wer_field"] == 0 and scores["wer"] == pytest.approx(4 / 5)
    chinese = infer.score([{"target": "今天 天气", "text": "今天天气"}])["text"]
    assert chinese["cer"] == 0 and "wer_field" not in chinese
    assert infer.score([{"text": "x"}]) == {}


@pytest.mark.parametrize(("reference", "hypothesis", "expected"), [
    ("Press <one> now!", "press two now please",
     ["press <del>one</del> now", "press <ins>two</ins> now <ins>please</ins>"]),
    ("a b", "", ["<del>a b</del>", ""]),
    ("今天气", "今天气很", ["今天气", "今天气<ins>很</ins>"]),
    ("rock & roll's", "rock roll's", ["rock roll&#x27;s", "rock roll&#x27;s"]),
])  # fmt: skip
def test_differences_are_marked(reference, hypothesis, expected):
    assert report.mark_errors(reference, hypothesis) == expected


def test_translation_is_the_llms_own_without_lora(world, outcome, tmp_path):
    found = lines_of(world, tmp_path, "translate=English")
    assert texts(found) == texts(outcome)
    llm, tokenizer = model.load_llm(world.llm)
    for line in list(found.values())[:4]:
        prompt = model.build_prompt(tokenizer, f"Translate to English: {line['text']}")
        ids, answer = torch.tensor([sum(map(list, prompt), [])]), []
        cap, stop = (
            16 + 4 * len(model.text_to_ids(tokenizer, [line["text"]])[0]),
            model.end_of_turn(tokenizer),
        )
        token = -1
        while token == -1 or model.add_token(answer, token, stop, cap):
            said = torch.tensor([answer], dtype=torch.long)
            token = int(llm(torch.cat([ids, said], 1)).logits[0, -1].argmax())
        assert line["translation"] == tokenizer.decode(answer, skip_special_tokens=True).strip()


# ---- models -----------------------------------------------------------------


def test_models_can_lie_elsewhere_but_must_be_the_same(world, tmp_path, outcome):
    shutil.copytree(world.encoder, tmp_path / "moved")
    found = lines_of(world, tmp_path, f"encoder.name={tmp_path / 'moved'}")
    assert texts(found) == texts(outcome)
    encoder = make_twins.whisper_folder(tmp_path / "other", seed=5)
    with pytest.raises(model.UserError, match="another encoder: weights was"):
        load_listener(world, f"encoder.name={encoder}")
    llm = make_twins.qwen3_folder(tmp_path / "llm", seed=5)
    with pytest.raises(model.UserError, match="another llm: weights was"):
        load_listener(world, f"llm.name={llm}")
    config = json.loads((world.run / "config.json").read_text())
    for key, change, message in (
        ("format", 2, "earlier layout"), ("script", "train_phase1", "not for infer"),
    ):  # fmt: skip
        shutil.copytree(world.run, tmp_path / key)
        model.save(tmp_path / key / "config.json", config | {key: change})
        with pytest.raises(model.UserError, match=message):
            load_listener(SimpleNamespace(dir=f"model.dir={tmp_path / key}"))
    with pytest.raises(model.UserError, match="model.dir=/no/where: no model there"):
        load_listener(SimpleNamespace(dir="model.dir=/no/where"))


def test_the_published_adaptor_needs_a_config_beside_it_only(world, tmp_path):
    config = json.loads((ROOT / "configs" / "published" / "config.json").read_text())
    assert config["encoder"]["query_frames"] is True and config["format"] == model.FORMAT
    published = model.AudioAdaptor(512, 2560, **config["adaptor"])
    assert sum(p.numel() for p in published.parameters()) == 207_734_272
    small = json.loads((world.run / "config.json").read_text())
    config |= {"encoder": {"name": str(world.encoder)}, "llm": {"name": str(world.llm)}}
    model.save(tmp_path / "config.json", config | {"adaptor": small["adaptor"]})
    shutil.copy(world.run / "adaptor_phase2_final.pt", tmp_path)
    summary = call(infer, f"model.dir={tmp_path}", world.wavs / "utt000.wav")
    assert summary["clips"] == 1


class Malicious:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("name", ["adaptor_phase2_final.pt", "ctc_head.pt"])
def test_damaged_weights_are_refused_by_name(world, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(world.run, tmp_path / "run")
    good, run = (
        torch.load(tmp_path / "run" / name, weights_only=True),
        SimpleNamespace(dir="model.dir=run"),
    )
    torch.save(Malicious(), tmp_path / "run" / name)
    with pytest.raises(model.UserError, match=f"{name}: not a plain state dict"):
        load_listener(run)
    assert not (tmp_path / "pwned").exists()
    smaller = {key: value[:1] if value.dim() else value for key, value in list(good.items())[1:]}
    torch.save(smaller, tmp_path / "run" / name)
    with pytest.raises(model.UserError, match=f"{name}: does not fit"):
        load_listener(run)


def test_the_command_prints_transcripts_and_rates(world, outcome):
    command = [sys.executable, ROOT / "infer.py", world.dir, "workers=0"]
    run = subprocess.run([*command, world.manifest], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for key, text in texts(outcome).items():
        assert f"{key}\t{' '.join(text.split())}\n" in run.stdout
    assert "text: wer " in run.stdout and "RTF" in run.stdout
    wrong = subprocess.run([*command, "absent.wav"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == "error: absent.wav: no such file, folder or manifest\n"
