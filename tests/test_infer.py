"""infer.py and report.py by value: batches, drafts, validation, outputs, controls, errors."""

import html
import json
import os
import re
import resource
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
from processes import run_processes

import infer
import model
import precompute
import report
import train_phase2

ROOT = Path(__file__).parents[1]


def configure(script, *arguments):
    arguments = [str(argument) for argument in arguments]
    if script is infer:
        arguments = infer.split_arguments(["workers=0", *arguments])
    return model.load_config(arguments, script.DEFAULTS)


def call(script, *arguments):
    return script.main(configure(script, *arguments))


def read(path):
    return [json.loads(line) for line in open(path, encoding="utf-8")]


def lines_of(world, tmp_path, *arguments, name="x"):
    """Transcribe the manifest; lines of the .jsonl by key."""
    call(infer, world.dir, world.manifest, f"out={tmp_path / name}.jsonl", *arguments)
    return {line["key"]: line for line in read(tmp_path / f"{name}.jsonl")}


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
                                      clip.speech[0][None], torch.tensor([len(clip.speech[0])]),
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
        assert all(row["target"] != row["spoken"]["target"] for row in swapped)
        assert sorted(row["spoken"]["key"] for row in swapped) == [row["key"] for row in rows]
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


def test_a_folder_gives_all_its_audio_and_counts_the_rest(tmp_path, capsys):
    audio = ["A.WAV", "b.Opus", "c.m4a", "deep/d.mp4", os.fsdecode(b"\xe9t\xe9.amr")]
    for name in [*audio, "._A.wav", ".git/e.wav", "__MACOSX/._b.wav", "f.docx", "g.docx", "README"]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    rows = infer.list_rows([str(tmp_path)], "")
    assert {row["source"] for row in rows} == {str(tmp_path / name) for name in audio}
    assert {row["key"] for row in rows} == {"A", "b", "c", "d", r"\xe9t\xe9"}
    assert capsys.readouterr().out == f"{tmp_path}: 3 files not looked at: .docx, README\n"
    for name in ("1/a.wav", "2/a.wav", "3/a-2.wav", "4/a.wav"):
        (tmp_path / "same" / name).parent.mkdir(parents=True)
        (tmp_path / "same" / name).touch()
    rows = infer.list_rows([str(tmp_path / "same")], "")
    assert [row["key"] for row in rows] == ["a", "a-2", "a-2-2", "a-3"]


def test_any_name_of_a_file_will_do(world, outcome, tmp_path):
    names = [os.fsdecode(b"\xe9t\xe9.wav"), "Smith, [John] ${x}.wav"]
    for name in names:
        shutil.copy(world.wavs / "utt001.wav", tmp_path / name)
    bad = tmp_path / os.fsdecode(b"\xff.wav")
    bad.touch()
    call(infer, world.dir, *(tmp_path / name for name in names), bad, f"out={tmp_path / 'x.srt'}")
    lines, (dropped,) = read(tmp_path / "x.jsonl"), read(tmp_path / "x.dropped.jsonl")
    assert [line["key"] for line in lines] == [r"\xe9t\xe9", "Smith, [John] ${x}"]
    assert {line["text"] for line in lines} == {outcome["utt001"]["text"]}
    assert dropped["key"] == r"\xff" and r"\xff.wav: " in dropped["reason"]
    keys = ["a/b", "a_b", "k" * 300, "客" * 100]
    names = infer.srt_names("x" * 60, keys)
    assert len(set(names)) == 4 and names[0] == "x" * 60 + ".a_b.srt"
    assert max(len(f"{name}.tmp1234567".encode()) for name in names) <= 255


def recordings(world, outcome):
    """Three clips whose texts differ: their texts and waves."""
    keys = {line["text"]: key for key, line in outcome.items() if line["text"]}
    waves = [soundfile.read(world.wavs / f"{key}.wav", dtype="float32")[0] for key in keys.values()]
    return list(keys)[:3], waves[:3]


def test_segments_nemo_and_parquet_are_heard(world, outcome, tmp_path):
    import datasets

    said, waves = recordings(world, outcome)
    (tmp_path / "kaldi").mkdir()
    soundfile.write(tmp_path / "kaldi" / "all.wav", np.concatenate(waves), 16000)
    ends = np.cumsum([len(wave) / 16000 for wave in waves]).round(4).tolist()
    spans = list(zip("abc", [0.0, *ends], ends, strict=False))
    for name, text in (
        ("wav.scp", "call all.wav\n"),
        ("segments", "".join(f"{key} call {start} {end}\n" for key, start, end in spans)),
        ("text", "a one\nb two\n"),
    ):  # fmt: skip
        (tmp_path / "kaldi" / name).write_text(text)
    rows = [
        {"audio_filepath": "kaldi/all.wav", "offset": start, "duration": end - start, "text": key}
        for key, start, end in spans
    ]
    (tmp_path / "nemo.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "table").mkdir()
    audio = []
    for n, wave in enumerate(waves):
        soundfile.write(tmp_path / "table" / "one.wav", wave, 16000)
        audio.append({"bytes": (tmp_path / "table" / "one.wav").read_bytes(), "path": f"{n}.wav"})
    table = datasets.Dataset.from_dict({"audio": audio, "text": ["one", "two", "three"]})
    table.to_parquet(tmp_path / "table" / "x.parquet")
    for name in ("kaldi", "kaldi/wav.scp", "nemo.json", "table"):
        call(infer, world.dir, tmp_path / name, f"out={tmp_path / 'x.jsonl'}", "workers=2")
        lines = read(tmp_path / "x.jsonl")
        assert [line["text"] for line in lines] == said
        starts = [start for _, start, _ in spans[1:]] * (name != "table")
        assert [line["offset_s"] for line in lines if "offset_s" in line] == starts


def test_channels_are_speakers_in_turn_or_one_is_heard(world, outcome, tmp_path, monkeypatch):
    said, waves = recordings(world, outcome)
    wave, spans = np.zeros((7 * 16000, 2), np.float32), []
    for second, channel, part in zip((0.5, 2.5, 5), (0, 1, 0), waves, strict=True):
        first = round(second * 16000)
        wave[first : first + len(part), channel] = part
        spans.append((first, first + len(part)))
    soundfile.write(tmp_path / "call.wav", wave, 16000)
    sound = lambda wave, *_: [(a, b) for a, b in spans if wave[a:b].abs().max()]  # noqa: E731
    monkeypatch.setattr(infer, "speech_spans", sound)
    call(infer, world.dir, tmp_path / "call.wav", f"out={tmp_path / 'x.srt'}", "data.channel=split")
    (line,) = read(tmp_path / "x.jsonl")
    turns = [(part["start"], part["channel"], part["text"]) for part in line["segments"]]
    assert turns == list(zip((0.5, 2.5, 5.0), (0, 1, 0), said, strict=True))
    assert line["text"] == " ".join(said)
    cues = (tmp_path / "x.srt").read_text().strip().split("\n\n")
    expected = [f"Speaker {channel + 1}: {text}" for _, channel, text in turns]
    assert [" ".join(cue.splitlines()[2:]) for cue in cues] == expected
    page = report.make_page([line], tmp_path)
    assert page.count("<audio") == 1
    assert re.findall(r'<button data-at="([\d.]+)">0:0(\d)</button> (.*)</p>', page) == [
        (f"{start:.3f}", str(int(start)), text)
        for (start, _, _), text in zip(turns, expected, strict=True)
    ]
    size = max(map(len, waves))
    pair = np.stack([np.pad(part, (0, size - len(part))) for part in waves[1:]], 1)
    soundfile.write(tmp_path / "pair.wav", pair, 16000)
    for n in (0, 1):
        soundfile.write(tmp_path / f"mono{n}.wav", pair[:, n], 16000)
    rows = [{"key": f"{n}", "source": "pair.wav", "target": "", "channel": n} for n in (0, 1)]
    model.save(tmp_path / "m.jsonl", rows)
    inputs = tmp_path / "m.jsonl", tmp_path / "mono0.wav", tmp_path / "mono1.wav"
    call(infer, world.dir, *inputs, f"out={tmp_path / 'y.jsonl'}", "data.channel=split")
    one, other, *alone = [line["text"] for line in read(tmp_path / "y.jsonl")]
    assert [one, other] == alone and one != other  # a row's own channel comes first
    for n in (0, 1):
        out = f"out={tmp_path / 'z.txt'}"
        call(infer, world.dir, tmp_path / "pair.wav", out, f"data.channel={n}")
        assert (tmp_path / "z.txt").read_text() == f"pair\t{alone[n]}\n"


def test_recordings_that_cannot_be_used_are_named(world, tmp_path):
    for name in ("good", "cut"):
        shutil.copy(world.wavs / "utt001.wav", tmp_path / f"{name}.wav")
    (tmp_path / "cut.wav").write_bytes((tmp_path / "cut.wav").read_bytes()[:-2000])
    (tmp_path / "empty.wav").write_bytes(b"")
    out = f"out={tmp_path / 'o' / 'calls.txt'}"
    with pytest.raises(model.UserError, match="2 recordings cannot be .* more than max_dropped=1"):
        call(infer, world.dir, tmp_path, "max_dropped=1", "batch_s=0", out)
    assert len(read(tmp_path / "o" / "calls.jsonl")) <= 1
    summary = call(infer, world.dir, tmp_path, out)  # goes on
    assert (summary["clips"], summary["dropped"]) == (1, 2)
    with pytest.raises(SystemExit) as stop:  # beside it, and with nothing to show
        call(infer, world.dir, tmp_path / "empty.wav", f"out={tmp_path / 'o' / 'other.jsonl'}")
    assert stop.value.code == 1
    for name, keys in (("calls", {"cut", "empty"}), ("other", {"empty"})):
        assert {row["key"] for row in read(tmp_path / "o" / f"{name}.dropped.jsonl")} == keys


# ---- long jobs --------------------------------------------------------------


@pytest.mark.parametrize(("out", "message"), [
    ("m.jsonl", "is one of the inputs"), ("link.jsonl", "is one of the inputs"),
    ("n.json", "is one of the inputs"), ("odd.txt", "is one of the inputs"),
    ("folder.json", "or a folder"), ("m.jsonl/x.txt", "cannot be written .Not a dir|File exists"),
    ("other.txt", "other.jsonl would be replaced"), ("x.doc", "ends in none of .jsonl, .txt, .srt"),
    ("n" * 240 + ".txt", "File name too long"),
])  # fmt: skip
def test_outputs_are_tried_before_models_load(world, tmp_path, monkeypatch, out, message):
    shutil.copy(world.wavs / "utt001.wav", tmp_path / "odd.txt")
    row = {"key": "a", "source": "odd.txt", "target": "one"}
    for name in ("m.jsonl", "other.jsonl"):
        model.save(tmp_path / name, [row])
    (tmp_path / "n.json").write_text('{"audio_filepath": "odd.txt", "text": "one"}\n')
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "m.jsonl")
    (tmp_path / "folder.json").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr(infer, "load_listener", None)
    with pytest.raises(model.UserError, match=message):
        call(infer, world.dir, tmp_path / "m.jsonl", tmp_path / "n.json", f"out={tmp_path / out}")
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def in_the_third_batch(monkeypatch, act):
    """`act()` before the third batch is heard; the keys of each batch, as they come."""
    real, heard = infer.encode, []

    def encode(clips, *rest):
        heard.append([clip.row["key"] for clip in clips])
        if len(heard) == 3:
            act()
        return real(clips, *rest)

    monkeypatch.setattr(infer, "encode", encode)
    return heard


def test_a_killed_run_goes_on_behind_what_is_written(world, outcome, tmp_path, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    heard, path = in_the_third_batch(monkeypatch, interrupt), tmp_path / "x.jsonl"
    with pytest.raises(KeyboardInterrupt):
        lines_of(world, tmp_path, "batch_s=1.5")
    done = [line["key"] for line in read(path)]
    assert done == sum(heard[:2], []) and len(done) > 1
    cut = '{"key": "utt今'.encode()[:-1]  # as a kill in the middle of a line, and of a character
    path.write_bytes(path.read_bytes() + cut)
    with pytest.raises(model.UserError, match="x.jsonl: unfinished, with other settings"):
        lines_of(world, tmp_path, "decode.tokens_per_s=3")
    assert lines_of(world, tmp_path, "batch_s=1.4") == outcome
    assert not set(sum(heard[3:], [])) & set(done)
    assert not list(tmp_path.glob("*.unfinished"))
    heard.clear()
    with pytest.raises(KeyboardInterrupt):  # of a finished run nothing is taken over
        lines_of(world, tmp_path, "batch_s=1.5")
    assert len(heard) == 3


def test_a_full_disk_keeps_the_lines_before(world, outcome, tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    path, right = tmp_path / "x.jsonl", {}

    def fill():
        right["lines"] = path.read_bytes()
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(right["lines"]) + 50, limits[1]))

    in_the_third_batch(monkeypatch, fill)
    try:
        with pytest.raises(model.UserError, match="x.jsonl: File too large; the lines before are"):
            lines_of(world, tmp_path, "batch_s=1.5")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(right["lines"]) > 500 and path.read_bytes().startswith(right["lines"])
    assert len(path.read_bytes()) == len(right["lines"]) + 50  # the next one is cut
    assert lines_of(world, tmp_path, "batch_s=1.5") == outcome


def test_lines_are_joined_in_the_order_of_the_inputs(tmp_path):
    rows = [{"key": key, "source": f"{key}.wav"} for key in "abcd"]
    lines = [row | {"text": "今\u2028天"} for row in rows]
    gone = {"key": "e", "source": "e.wav", "text": "its file is no input any more"}
    model.save(tmp_path / "x.jsonl", [lines[2], gone])
    for name, found in (("x.unfinished1", [lines[3], lines[2]]), ("x.unfinished12", [lines[0]])):
        model.append(tmp_path / name, found)
    others = "x.unfinished", "y.unfinished1", "x.unfinished1.jsonl", "x.part1.jsonl"
    for name in others:
        (tmp_path / name).touch()
    expected = [lines[0], lines[2], lines[3]]
    assert infer.join_parts(tmp_path / "x.jsonl", rows) == expected == read(tmp_path / "x.jsonl")
    assert {path.name for path in tmp_path.iterdir()} == {"x.jsonl", *others}


def test_two_processes_write_what_one_does(world, tmp_path, monkeypatch, capfd):
    (tmp_path / "one").mkdir()
    shutil.copy(world.manifest, world.wavs / "more.jsonl")
    bad = {"key": "bad", "source": "manifest.jsonl", "target": "x"}
    model.append(world.wavs / "more.jsonl", [bad])
    given = world.dir, world.wavs / "more.jsonl", "batch_s=1.5"

    def out(name):
        return "out=" + ",".join(f"{tmp_path / name}/x{ending}" for ending in infer.ENDINGS)

    def files(name):
        found = {path.name: path.read_text() for path in (tmp_path / name).iterdir()}
        return found | {"x.json": json.loads(found["x.json"])["scores"]}

    def die(path, rows):
        real(path, rows)
        if path.suffix == ".unfinished1":
            os._exit(9)

    call(infer, *given, out("one"))
    cfg, real = configure(infer, *given, out("two")), model.append
    with monkeypatch.context() as patch:
        patch.setattr(model, "append", die)
        with pytest.raises(AssertionError):
            run_processes(infer.main, cfg)
    parts = [read(tmp_path / "two" / name) for name in ("x.jsonl", "x.unfinished1")]
    done = {line["key"] for part in parts for line in part}
    assert len(done) == sum(map(len, parts)) and parts[1] and len(done) < 12  # each has its own
    capfd.readouterr()
    run_processes(infer.main, cfg)
    assert f"13 recordings, {len(done)} of them done before" in capfd.readouterr().out
    assert files("two") == files("one")


# ---- long audio and times ---------------------------------------------------


def test_long_audio_is_cut_at_pauses_transcribed_and_joined(world, tmp_path, monkeypatch):
    parts = [make_twins.spoken(words) for words in (["one", "two"], ["hold"], ["press", "four"])]
    wave, spans = np.zeros(40 * 16000, np.float32), []
    for second, part in zip((1, 15, 35), parts, strict=True):
        wave[second * 16000 : second * 16000 + len(part)] = part
        spans.append((second * 16000, second * 16000 + len(part)))
        soundfile.write(tmp_path / f"part{second:02d}.wav", part, 16000)
    soundfile.write(tmp_path / "long.flac", wave, 16000)
    monkeypatch.setattr(infer, "speech_spans", lambda *_: spans)
    call(infer, world.dir, *sorted(tmp_path.glob("part*.wav")), f"out={tmp_path / 'a'}.jsonl")
    call(infer, world.dir, tmp_path / "long.flac", "vad.threshold_s=10", "translate=English",
         f"out={tmp_path / 'x'}.srt", "batch_s=1")  # fmt: skip
    alone, (line,) = [x["text"] for x in read(tmp_path / "a.jsonl")], read(tmp_path / "x.jsonl")
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


def test_where_nobody_speaks_there_is_no_text(world, outcome, tmp_path, monkeypatch):
    monkeypatch.setattr(infer, "speech_spans", lambda *rest: [])
    found = lines_of(world, tmp_path, "vad.always=true")
    assert all(line["text"] == "" and line["segments"] == [] for line in found.values())
    gated = lines_of(world, tmp_path, "vad.gate=true", name="y")
    assert texts(gated) == texts(outcome)  # CTC hears something in all of them
    real = infer.encode

    def deaf(clips, *rest):
        real(clips, *rest)
        for clip in clips[:1]:
            clip.path = []

    monkeypatch.setattr(infer, "encode", deaf)
    silent = lines_of(world, tmp_path, "vad.gate=true", "batch_s=0", name="z")
    assert all(line["text"] == "" and line["segments"] for line in silent.values())


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
    lines = read(f"{out}.jsonl")
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
    command = [sys.executable, ROOT / "infer.py", world.dir, "workers=0", world.manifest]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for key, text in texts(outcome).items():
        assert f"{key}\t{' '.join(text.split())}\n" in run.stdout
    assert "text: wer " in run.stdout and "RTF" in run.stdout
