"""Write down what is said in recordings, with the folder that a training script wrote.

    python infer.py configs/infer.yaml INPUT ... [key=value ...]
    python infer.py configs/infer.yaml call.wav recordings/ out=calls.srt,calls.jsonl
    python infer.py configs/infer.yaml data_aishell:test out=aishell.jsonl,aishell.json
    python infer.py model.dir=DUPLEX call.wav out=answer.wav,turns.jsonl   # what it says to it
    python report.py aishell.jsonl                            # a page to read and listen
    torchrun --nproc_per_node N infer.py ...                  # shares the recordings out

INPUT   audio and video files, folders (searched at any depth), manifests (as in training);
        ONE+TWO: files that a model of train_salm.py hears together
Needs   model.dir: run.dir of train_phase2.py, train_steermoe.py, train_salm.py, train_duplex.py or
        finetune_encoder.py, Fun-ASR-Nano's own folder, or configs/published with the published
        adaptor beside its config.json
Output  by the endings in `out`; without, transcripts are printed
        .jsonl  a line as soon as a recording is done: key, source, text, duration_s, segments
                (start, end, text, words, channel); ctc_text, encoder_text (SenseVoice's own CTC),
                translation, target. Started again after a kill, the same command goes on behind.
        .txt    key, text, translation, separated by tabs
        .srt    subtitles; of several recordings one file each, NAME.KEY.srt
        .json   error rates, hours, seconds
        .wav    of a duplex model: the agent's audio, of several calls NAME.KEY.wav; its .jsonl has
                turns (role, start, end, text), and latency_ms of each frame with duplex.live
        and NAME.dropped.jsonl: every recording that could not be used, with the reason
Times   of words come from the CTC head; without one, or where the text does not fit it, a segment
        has only its own. Audio of over vad.threshold_s is cut at pauses that silero-vad finds.
Logged  wer (cer for Chinese): lower case, no punctuation; wer_raw as written; wer_field by the
        field's English normaliser. rtf: seconds of computing per second of audio, from the first
        file read to the last line written, without loading models.
Source  prompt, adaptor, CTC and splice are model.py's, as in training. The original release
        penalises repetition (1.2, no 4-gram twice), which breaks phone numbers: off by default.
"""

import functools
import glob
import importlib
import itertools
import json
import math
import os
import re
import sys
import tempfile
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
import torch.distributed as dist
from torch.nn.utils.rnn import pad_sequence
from torchaudio.functional import forced_align, merge_tokens
from tqdm import tqdm

import model

DEFAULTS = """
inputs: []               # what stands on the command line without "="
data:
  channel: mix           # of a recording: mix, 0, 1, or split, each one a speaker
  strip_tags: false      # take tags such as <|zh|> out of targets
model:
  dir: ???
encoder:
  name: ""               # hub name or folder, where it is not what config.json says
llm:
  name: ""
prompt: ""               # "": the clip's own, or that of training
language: ""             # takes the place of {language} in the prompt; "": the clip's own
hotwords: ""             # names that may occur, commas between
decode:
  readout: llm           # llm or ctc: whose transcript is the text
  tokens_per_s: 12.0     # most tokens of an answer per second of audio
  speculative: true      # the LLM checks CTC's draft in one pass: the same text, sooner
  ctc_weight: 0.0        # > 0: the better of LLM's and CTC's by w log p_CTC + (1-w) log p_LLM
  repetition_penalty: 1.0
  no_repeat_ngram_size: 0
translate: ""            # e.g. English: the same LLM, without LoRA, translates each segment
vad:
  threshold_s: 30.0      # longer audio is cut into segments of at most this
  always: false          # cut pauses out of shorter audio, too: a call of mere silence has no text
  gate: false            # no text for a clip in which neither silero-vad nor CTC hears anything
duplex:                  # of a model of train_duplex.py
  tail_s: 3.0            # silence behind a recording, in which it can answer
  live: false            # read at the pace of the clock, frame by frame, and time each
  <<: {temperature: 0.0, top_k: 0}  # of the codes; 0: the likeliest
out: []                  # files by ending, commas between
control:
  wrong_audio: false     # give each clip the speech of another text: errors must rise
batch_s: 120.0           # padded seconds of audio in a batch; 0: one recording at a time
max_dropped: 100         # stop when more recordings than this cannot be used
workers: 2               # processes that read audio, find pauses and make features
seed: 0
device: auto
dtype: auto
"""
AUDIO = (  # endings taken from a folder
    ".3gp", ".aac", ".ac3", ".aif", ".aifc", ".aiff", ".amr", ".ape", ".au", ".avi", ".caf",
    ".flac", ".gsm", ".m4a", ".m4b", ".mka", ".mkv", ".mov", ".mp2", ".mp3", ".mp4", ".oga", ".ogg",
    ".opus", ".rf64", ".snd", ".sph", ".voc", ".w64", ".wav", ".wave", ".webm", ".wma", ".wv",
)  # fmt: skip
UNFINISHED, DROPPED = ".unfinished", ".dropped.jsonl"  # beside the .jsonl
MANIFESTS = (".jsonl", ".json")
HIDDEN = {ord(char): 0xE000 + ord(char) for char in ",[]$"}  # so names pass through load_config
SHOWN = {number: char for char, number in HIDDEN.items()}
ENDINGS = (".jsonl", ".txt", ".srt", ".json", ".wav")
SAME_TEXTS = ("out", "workers", "batch_s", "max_dropped", "device")  # free to change
CUE_S, CUE_CHARS, LINE_CHARS = 7.0, 84, 42  # subtitles: two lines of 42 characters, at most 7 s
HOLD_S = 0.5  # a cue stays so much longer: CTC marks where a word is recognised, not where it ends
UNKNOWN_S = 30.0
UNKNOWN_LOG_PROB = -10.0  # a guess: about what CTC gives a token of which it hears nothing


@dataclass
class Clip:
    """One piece of a recording on its way through encode, build_prompts, decode and align."""

    row: dict
    feats: np.ndarray  # (T, F); a tensor would take a file handle on its way from the worker
    start: float
    end: float
    channel: int | None = None  # with data.channel=split
    voiced: bool = True  # as silero-vad hears it; with vad.gate
    more: tuple = ()  # feats of further recordings, heard together with this one
    speech: list | None = None  # of each recording (K, D), what the LLM reads
    log_probs: torch.Tensor | None = None  # (S, C + 1) of the CTC head
    path: list | None = None  # CTC's best classes
    ctc_text: str | None = None
    encoder_text: str | None = None
    prompt: list = ()  # token ids, model.AUDIO in the place of each recording
    cap: int = 0
    draft: tuple = ()  # CTC's guess at the answer, in tokens
    text: str = ""
    words: tuple = ()
    translation: str | None = None


@dataclass
class Recording:
    row: dict
    clips: list
    seconds: float
    reason: str = ""  # why it is left out


# ---- what is to be heard ----------------------------------------------------

open_manifest = functools.cache(model.read_manifest)  # rows that wait for their turn hold no audio


def list_rows(inputs, cache_dir, strip_tags=False):
    """Inputs -> rows of manifests, or such as they would have, with a key that no other has."""
    rows, seen = [], {}
    for name in inputs:
        path, folder = Path(name), name.rpartition(":")[0]
        tables = ("wav.scp", "**/*.parquet", "**/dataset_info.json") if path.is_dir() else ()
        parts = name.split("+")
        if len(parts) > 1 and not path.exists() and all(map(os.path.isfile, parts)):
            key = "+".join(escaped(Path(part).stem) for part in parts)
            rows.append({"source": name, "key": key, "parts": parts, "recordings": len(parts)})
        elif path.is_file() and path.suffix not in MANIFESTS and path.name != "wav.scp":
            rows.append({"source": name, "key": escaped(path.stem)})
        elif path.is_dir() and not any(next(path.glob(table), None) for table in tables):
            rows += list_folder(path)
        elif path.exists() or re.match("hf:.", name) or folder and Path(folder).is_dir():
            given = {"spec": name, "cache_dir": str(cache_dir), "strip_tags": strip_tags}
            texts = open_manifest(**given).select_columns([*model.FIELDS, *model.NUMBERS])
            rows += [row | {"place": (given, n)} for n, row in enumerate(texts.to_list())]
        else:
            raise model.UserError(f"{name}: no such file, folder or manifest")
    for row in rows:
        key = row["key"]
        while key in seen:
            seen[row["key"]] += 1
            key = f"{row['key']}-{seen[row['key']]}"
        seen[key], row["key"] = 1, key
    if not rows:
        raise model.UserError("nothing to transcribe: give audio files, folders or manifests")
    return rows


def list_folder(folder):
    """Rows of the audio in a folder, at any depth; what else lies there is counted."""
    rows, others = [], Counter()
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder).parts
        if not path.is_file() or any(part.startswith((".", "__MACOSX")) for part in inner):
            continue
        if path.suffix.lower() in AUDIO:
            rows.append({"source": str(path), "key": escaped(path.stem)})
        else:
            others[escaped(path.suffix or path.name)] += 1
    if others and os.environ.get("RANK", "0") == "0":
        endings = ", ".join(sorted(others)[:20])
        print(f"{escaped(folder)}: {others.total()} files not looked at: {endings}")
    return rows


def escaped(name):
    r"""A file's name as text: what is not UTF-8 in it as \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def spoken(row, with_audio=False):
    """The row whose recording is heard; with_audio: as the manifest has it."""
    row = row.get("spoken", row)
    if with_audio and "place" in row:
        manifest, number = row["place"]
        return open_manifest(**manifest)[number]
    return row


def identity(row):
    """What a line of .jsonl names its recording by."""
    return {"key": row["key"], "source": escaped(row.get("source") or row["where"])}


def swap_speech(rows, seed):
    """Control: every row gets the speech of one with another target, in an order by `seed`."""
    targets = [model.normalize_text(row.get("target") or "") for row in rows]
    order = sorted(range(len(rows)), key=lambda n: (model.hash_text([seed, targets[n]]), n))
    shift = max(Counter(targets).values())
    if 2 * shift > len(rows):
        raise model.UserError(f"control.wrong_audio: {shift} of {len(rows)} have the same target")
    other = dict(zip(order, order[shift:] + order[:shift], strict=True))
    return [row | {"spoken": rows[other[n]]} for n, row in enumerate(rows)]


class Recordings(torch.utils.data.Dataset):
    """Number of a row -> Recording: read, cut at pauses where it is long, features."""

    def __init__(self, rows, encoder, threshold_s, channel="mix", always=False, gate=False):
        self.rows, self.encoder, self.channel = rows, encoder, channel
        self.threshold_s, self.always, self.gate = threshold_s, always, gate

    def __getitem__(self, number):
        row, rate = self.rows[number], self.encoder.sample_rate
        try:
            if "parts" in row:
                waves = [model.load_audio(part, rate) for part in row["parts"]]
                first, *more = [self.encoder.features(wave).numpy() for wave in waves]
                seconds = sum(map(len, waves)) / rate
                return Recording(row, [Clip(row, first, 0.0, seconds, more=more)], seconds)
            wave = model.load_clip(spoken(row, True), rate, self.channel)  # (N,), or (channels, N)
            wave, pieces = wave if wave.dim() == 2 else wave[None], []
            split = len(wave) > 1
            for channel, part in enumerate(wave):
                spans = [(0, len(part))]
                if split or self.always or len(part) > self.threshold_s * rate:
                    spans = speech_spans(part, rate, self.threshold_s, 1.0 if split else math.inf)
                pieces += [(first, end, channel if split else None) for first, end in spans]
            clips = []
            for n, (first, end, channel) in enumerate(sorted(pieces)):  # the speakers' turns
                key = row["key"] if len(pieces) == 1 else f"{row['key']}#{n}"
                part = wave[channel or 0, first:end]
                feats = self.encoder.features(part, key).numpy()
                voiced = not self.gate or bool(speech_spans(part, rate, self.threshold_s))
                clips.append(Clip(row, feats, first / rate, end / rate, channel, voiced))
            return Recording(row, clips, wave.shape[1] / rate)
        except model.AudioError as error:
            return Recording(row, [], 0.0, f"{identity(spoken(row))['source']}: {error}")


def speech_spans(wave, rate, max_s, pause_s=math.inf):
    """model.hear_speech, neighbours joined up to max_s, but over no pause of pause_s."""
    spans, limit = [], int(max_s * rate)
    for start, stop in model.hear_speech(wave, rate, max_s):
        parts = -(-(stop - start) // limit)  # over 1: nobody paused for so long
        edges = np.linspace(start, stop, parts + 1).astype(int).tolist()
        for first, end in itertools.pairwise(edges):
            if spans and end - spans[-1][0] <= limit and first - spans[-1][1] < pause_s * rate:
                spans[-1] = (spans[-1][0], end)
            elif end - first >= 0.1 * rate:
                spans.append((first, end))
    return spans


def header_seconds(row):
    """Duration by the header; a guess where that says none, which only batches depend on."""
    try:
        return model.clip_seconds(spoken(row, True), decode=False) or UNKNOWN_S
    except model.AudioError:  # its own turn to be read will say what is wrong
        return UNKNOWN_S


def cut_batches(lengths, batch_s):
    """Numbers of recordings, longest first, in batches of at most batch_s padded seconds."""
    batches = []
    for number in sorted(range(len(lengths)), key=lambda n: (-lengths[n], n)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_s:
            batches[-1].append(number)
        else:
            batches.append([number])
    return batches


# ---- models -----------------------------------------------------------------


def read_config(folder):
    """config.json of a model's folder; Fun-ASR-Nano's own has none."""
    if (folder / "model.pt").is_file():
        return {"script": "finetune_encoder"}
    if not (folder / "config.json").is_file():
        raise model.UserError(f"model.dir={folder}: no model there; give a training's run.dir")
    with model.loading(folder):
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def load_listener(cfg, device, dtype):
    """All that hears and writes: a namespace, which other scripts' load_listener give alike.

    encoder (features, sample_rate); hear(feats, lens) -> model.Heard, the encoder's own CTC texts
    or None; prompt(row) -> ids before and after the speech; llm (or None), tokenizer, stop_id;
    read_ctc(classes) -> text (None without CTC), spell(text) -> [(class, its text)] or None where
    CTC cannot, blank; position_s, seconds of a CTC position; about: what was loaded.
    """
    folder, config = Path(cfg.model.dir), read_config(Path(cfg.model.dir))
    hub = config.get("model_type") == "fun_asr_nano"  # transformers' folder of it
    script = "finetune_encoder" if hub else config.get("script")
    if script == "train_phase2" and config.get("format") == model.FORMAT:
        return load_adaptor_listener(folder, config, cfg, device, dtype)
    if script not in ("train_steermoe", "train_salm", "finetune_encoder"):  # they bring their own
        raise model.UserError(f"{folder}: made by an earlier layout, or not for infer.py")
    if not Path(__file__).with_name(f"{script}.py").is_file():
        raise model.UserError(f"{folder}: needs {script}.py beside infer.py")
    return importlib.import_module(script).load_listener(folder, cfg, device, dtype)


def load_adaptor_listener(folder, config, cfg, device, dtype):
    """The listener of train_phase2.py: encoder, adaptor, CTC head (or None), LLM with its LoRA."""
    name, settings = cfg.encoder.name or config["encoder"]["name"], config["settings"]
    names = {"encoder_name": name, "llm_name": cfg.llm.name}
    encoder, adaptor, ctc, llm, tokenizer = model.load_phase2(
        folder, config, dtype, device, **names
    )
    for part in filter(None, (encoder, adaptor, ctc)):
        model.freeze(part)
    own_ctc = sensevoice_ctc(name, encoder, device)

    def hear(feats, lens):
        enc, lens = encoder(feats, lens)
        heard = model.hear(adaptor, ctc, enc.float(), lens, settings["speech"])
        return heard, own_ctc and own_ctc(enc, lens)

    def prompt(row):
        text = cfg.prompt or row.get("prompt") or settings["prompt"]
        rest = cfg.language or row.get("language"), cfg.hotwords or row.get("hotwords")
        return model.build_prompt(tokenizer, text, *rest, settings["system"])

    def spell(text):
        ids = model.text_to_ids(tokenizer, [text])[0]
        classes = ctc.classes(ids)
        known = len(classes) == len(ids)
        return [*zip(classes, token_texts(ids, tokenizer), strict=True)] if known else None

    return SimpleNamespace(
        encoder=encoder, hear=hear, prompt=prompt, llm=llm, tokenizer=tokenizer, ctc=ctc,
        stop_id=model.end_of_turn(tokenizer), spell=spell, blank=ctc and ctc.blank,
        read_ctc=ctc and (lambda path: tokenizer.decode(ctc.tokens(path)).strip()),
        position_s=encoder.frame_ms * adaptor.stack / 1000,
        about=f"encoder {name}, LLM {llm.identity['name']}",
    )  # fmt: skip


def sensevoice_ctc(name, encoder, device):
    """SenseVoiceSmall's own CTC read-out: enc (B, T, W), lens -> texts. None for other encoders."""
    folder = model.find_model(name)
    pieces = sorted(folder.glob("*.bpe.model"))
    if not pieces or getattr(encoder, "cmvn", None) is None:
        return None
    import sentencepiece

    reader = sentencepiece.SentencePieceProcessor(model_file=str(pieces[0]))
    _, weights = model.read_funasr(folder)
    head = [weights[f"ctc.ctc_lo.{name}"].float().to(device) for name in ("weight", "bias")]
    skip = 4 * encoder.keep_query_frames  # they predict language, emotion, event and text norm

    def read(enc, lens):
        best = torch.nn.functional.linear(enc[:, skip:].float(), *head).argmax(-1)
        return [reader.decode(path).strip() for path in model.ctc_paths(best, lens - skip, 0)]

    return read


def token_texts(ids, tokenizer):
    """Text of each token; a rare character is several tokens, its text stands at the last."""
    texts, known = [], ""
    for count in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:count]).rstrip("\ufffd")
        texts.append(so_far[len(known) :])
        known = so_far
    return texts


# ---- the walk of a batch: encode, build_prompts, decode, align --------------


def encode(clips, listener, device):
    """Encoder, adaptor and CTC: fills speech, log_probs, path, ctc_text and encoder_text."""
    each = [torch.from_numpy(feats) for clip in clips for feats in (clip.feats, *clip.more)]
    lens, feats = torch.tensor([len(x) for x in each]), pad_sequence(each, batch_first=True)
    heard, own = listener.hear(feats.to(device), lens)  # of (B, T, F)
    places = iter(range(len(each)))
    for n, clip in enumerate(clips):  # where CTC is read there are no further recordings
        if heard.speech is not None:
            own_places = [next(places) for _ in (clip.feats, *clip.more)]
            clip.speech = [heard.speech[k, : heard.speech_lens[k]] for k in own_places]
        if heard.paths is not None:
            clip.log_probs = heard.log_probs[n, : heard.lens[n]]
            clip.path, clip.ctc_text = heard.paths[n], listener.read_ctc(heard.paths[n])
        clip.encoder_text = own[n] if own else None


def build_prompts(clips, listener, cfg):
    """What the LLM needs beside the speech: prompt, most tokens of the answer, CTC's draft."""
    if listener.llm is None or cfg.decode.readout == "ctc":
        return
    for clip in clips:
        clip.prompt = prompt_ids(listener, clip.row)
        # where the speech is CTC's, its head is trained and its count can be trusted
        ctc = getattr(listener, "ctc", None)  # over the LLM's tokens
        counted = ctc is not None and len(clip.speech[0]) == max(1, len(clip.path))
        tokens = len(clip.path) if counted else None
        clip.cap = model.token_cap(clip.end - clip.start, cfg.decode.tokens_per_s, tokens)
        if clip.ctc_text and cfg.decode.speculative:
            clip.draft = model.text_to_ids(listener.tokenizer, [clip.ctc_text])[0]


def prompt_ids(listener, row):
    """Token ids of a row's prompt, model.AUDIO in the place of each recording."""
    prompt = listener.prompt(row)
    return [*prompt[0], model.AUDIO, *prompt[1]] if isinstance(prompt, tuple) else prompt


def decode(clips, listener, cfg):
    """The text of each clip: the LLM's greedy answer, CTC's, or the best of several."""
    clips = [clip for clip in clips if clip.voiced or clip.path]  # the others' text stays ""
    if not clips:
        return
    if listener.llm is None or cfg.decode.readout == "ctc":
        for clip in clips:
            clip.text = clip.ctc_text
        return
    llm, tokenizer, options = listener.llm, listener.tokenizer, cfg.decode
    if options.repetition_penalty != 1.0 or options.no_repeat_ngram_size:
        inputs, stop_id = spliced(llm, clips, pad_left=True), listener.stop_id
        ids = llm.generate(
            inputs_embeds=inputs.embeds, attention_mask=inputs.mask, do_sample=False,
            max_new_tokens=max(clip.cap for clip in clips), eos_token_id=stop_id,
            pad_token_id=stop_id, repetition_penalty=options.repetition_penalty,
            no_repeat_ngram_size=options.no_repeat_ngram_size,
        )  # fmt: skip
        answers = [[*itertools.takewhile(lambda x: x != stop_id, row)] for row in ids.tolist()]
    elif any(clip.draft for clip in clips):
        answers = decode_drafted(llm, clips, listener.stop_id)
    else:
        inputs, caps = spliced(llm, clips, pad_left=True), [clip.cap for clip in clips]
        answers = model.greedy_decode(llm, inputs, listener.stop_id, caps)
    for clip, answer in zip(clips, answers, strict=True):
        if options.ctc_weight and clip.log_probs is not None:
            answer = choose(answer, clip, listener, options.ctc_weight)
        clip.text = tokenizer.decode(answer, skip_special_tokens=True).strip()


def spliced(llm, clips, targets=None, pad_left=False):
    each = [speech for clip in clips for speech in clip.speech]
    lens, speech = torch.tensor([len(x) for x in each]), pad_sequence(each, batch_first=True)
    targets, embed = targets or [[] for _ in clips], llm.get_input_embeddings()
    pairs = [(clip.prompt, target) for clip, target in zip(clips, targets, strict=True)]
    rows = [[*prompt, *target] for prompt, target in pairs]
    labels = [[*[model.IGNORE] * len(prompt), *target] for prompt, target in pairs]
    return model.splice_rows(embed, rows, speech, lens, labels, pad_left)


def decode_drafted(llm, clips, stop_id):
    """model.greedy_decode's answers, in a few whole passes over drafts.

    A pass reads prompt, speech, the answer so far and the draft behind it, as in training; the
    answer grows by what is verified, the draft's longest agreeing part, and one token more.
    """
    drafts, answers = [list(clip.draft) for clip in clips], [[] for _ in clips]
    going = list(range(len(clips)))
    while going:
        part = [clips[n] for n in going]
        inputs = spliced(llm, part, [answers[n] + drafts[n] for n in going])
        hidden = model.hidden_states(llm, inputs.embeds)  # (B, L, D)
        ends = inputs.mask.sum(1).tolist()
        offered = [len(drafts[n]) for n in going]
        rows = [
            hidden[row, end - 1 - count : end]  # the last known position, and the draft's
            for row, (end, count) in enumerate(zip(ends, offered, strict=True))
        ]
        tokens = llm.lm_head(torch.cat(rows)).float().argmax(-1).tolist()
        still = []
        for n, count in zip(going, offered, strict=True):
            own, tokens = tokens[: count + 1], tokens[count + 1 :]
            for verified, token in enumerate(own):
                if not model.add_token(answers[n], token, stop_id, clips[n].cap):
                    break
                if verified == count or drafts[n][verified] != token:
                    drafts[n] = next_draft(answers[n], drafts[n][verified:])
                    still.append(n)
                    break
        going = still
    return answers


def next_draft(answer, rest):
    """What may follow the answer. `rest`: the draft from the place of the answer's last token on.

    If that token comes soon in the rest, it goes on behind it; where the answer has been here
    before, it may repeat itself; else the draft had another token in this place.
    """
    if answer[-1] in rest[:4]:
        return rest[rest.index(answer[-1]) + 1 :]
    for n in range(len(answer) - 4, -1, -1):
        if answer[n : n + 3] == answer[-3:]:
            return answer[n + 3 :][:16]
    return rest[1:]


def choose(answer, clip, listener, weight):
    """The better of the LLM's answer and CTC's, by w log p_CTC + (1-w) log p_LLM.

    CTC knows what sounds alike, the LLM what is a sentence. A token that CTC's head lacks counts
    UNKNOWN_LOG_PROB. A beam of 8 answers of CTC in place of one changed nothing on the demo.
    """
    ctc, log_probs = listener.ctc, clip.log_probs.cpu()

    def cost(ids):
        inputs = spliced(listener.llm, [clip], [[*ids, listener.stop_id]])
        llm_loss = float(model.transcript_loss(listener.llm, inputs)[0])
        labels, frames = ctc.classes(ids), torch.tensor([len(log_probs)])
        loss, impossible = model.ctc_loss(log_probs[None], frames, [labels], ctc.blank)
        if impossible:
            loss = math.inf if labels else -log_probs[:, ctc.blank].sum()
        ctc_loss = float(loss) - UNKNOWN_LOG_PROB * (len(ids) - len(labels))
        return weight * ctc_loss + (1 - weight) * llm_loss

    return min(answer, ctc.tokens(clip.path), key=cost)


def align(clips, listener):
    """Word times of each text by CTC, where its head has all tokens and positions enough."""
    for clip in clips:
        spelt = listener.spell(clip.text) if clip.log_probs is not None and clip.text else None
        if not spelt or model.ctc_min_frames([c for c, _ in spelt]) > len(clip.log_probs):
            continue
        labels, texts = zip(*spelt, strict=True)
        classes = sorted({listener.blank, *labels})  # few of many: the others stay on the GPU
        place = {label: n for n, label in enumerate(classes)}
        scores, blank = clip.log_probs[:, classes].float().cpu()[None], place[listener.blank]
        target = torch.tensor([[place[label] for label in labels]], dtype=torch.int32)
        path, scores = forced_align(scores, target, blank=blank)  # (1, S)
        words = []
        for span, text in zip(merge_tokens(path[0], scores[0], blank=blank), texts, strict=True):
            times = [clip.start + n * listener.position_s for n in (span.start, span.end)]
            start, end = (round(min(time_s, clip.end), 3) for time_s in times)
            if not words or text[:1].isspace() or model.is_cjk(text.strip()):
                words.append({"word": text.strip(), "start": start, "end": end})
            else:
                words[-1] |= {"word": words[-1]["word"] + text.strip(), "end": end}
        words = [word for word in words if word["word"]]
        if "".join(word["word"] for word in words) == "".join(clip.text.split()):
            clip.words = words


def translate(clips, language, listener):
    """`Translate to LANGUAGE: TEXT` as a chat turn, thinking off, by the LLM without its LoRA."""
    for clip in clips:
        clip.translation = ""
    clips = [clip for clip in clips if clip.text]
    if not clips:
        return
    llm, tokenizer = listener.llm, listener.tokenizer
    prompts = [model.build_prompt(tokenizer, f"Translate to {language}: {c.text}") for c in clips]
    nothing = torch.zeros(len(clips), 1, llm.config.hidden_size, device=llm.device)
    lens, embed = torch.zeros(len(clips), dtype=torch.long), llm.get_input_embeddings()
    inputs = model.splice(embed, prompts, nothing, lens, pad_left=True)
    caps = [16 + 4 * len(ids) for ids in model.text_to_ids(tokenizer, [c.text for c in clips])]
    peft = getattr(llm, "peft", None)
    with peft.disable_adapter() if peft is not None else torch.no_grad():
        answers = model.greedy_decode(llm, inputs, listener.stop_id, caps)
    for clip, answer in zip(clips, answers, strict=True):
        clip.translation = tokenizer.decode(answer, skip_special_tokens=True).strip()


# ---- results ----------------------------------------------------------------


def join_texts(texts):
    """Texts of neighbouring segments: a space between, but none between two Chinese characters."""
    joined = ""
    for text in filter(None, texts):
        gap = "" if not joined or model.is_cjk(joined[-1]) and model.is_cjk(text) else " "
        joined += gap + text
    return joined


def make_line(recording):
    """One recording's line of .jsonl."""
    row, clips = recording.row, recording.clips
    line, heard = identity(row), spoken(row)
    if heard is not row:
        line |= {"speech": identity(heard)["source"], "speech_of": heard["key"]}
    if heard.get("start"):
        line["offset_s"] = heard["start"]  # where in the file it begins
    line["duration_s"] = round(recording.seconds, 3)
    line["text"] = join_texts(clip.text for clip in clips)
    for name in ("ctc_text", "encoder_text", "translation"):
        if any(getattr(clip, name) is not None for clip in clips):
            line[name] = join_texts(getattr(clip, name) for clip in clips)
    if (row.get("target") or "").strip():
        line["target"] = row["target"]
    line["segments"] = [
        {"start": round(c.start, 3), "end": round(c.end, 3), "text": c.text, "words": list(c.words)}
        | ({} if c.channel is None else {"channel": c.channel})
        for c in clips
    ]
    return line


def score(lines):
    """Error rates of every kind of transcript, over recordings with a target."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    scored, scores = [line for line in lines if "target" in line], {}
    targets = [line["target"] for line in scored]
    for kind in ("text", "ctc_text", "encoder_text"):
        texts = [line[kind] for line in scored if kind in line]
        if texts and len(texts) == len(scored):
            counts = model.error_rate(targets, texts)
            name, raw = counts.pop("name"), model.error_rate(targets, texts, str)
            rates = {name: counts.pop("rate"), f"{name}_raw": raw["rate"]}
            if name == "wer":  # it folds numbers: "one two three" is 123; no map of spellings
                field = model.error_rate(targets, texts, EnglishTextNormalizer({}))
                rates["wer_field"] = field["rate"]
            scores[kind] = rates | counts | {"clips": len(scored)}
    return scores


def cues(line):
    """Subtitles of a recording [(start_s, end_s, text)]: by words, else by segments."""
    found = []
    for segment in line["segments"]:
        text, at, parts = segment["text"], 0, []  # start_s, end_s, first and last character
        speaker = f"Speaker {segment['channel'] + 1}: " if "channel" in segment else ""
        for word in segment["words"]:
            first = text.index(word["word"], at)
            at, long = first + len(word["word"]), CUE_CHARS - len(speaker)
            if not parts or word["end"] - parts[-1][0] > CUE_S or at - parts[-1][2] > long:
                parts.append([word["start"], word["end"], first, at])
            parts[-1][1::2] = word["end"], at
        parts = parts or [[segment["start"], segment["end"], 0, 0]] * bool(text)
        found += [(start, end, speaker + text[a : b or None]) for start, end, a, b in parts]
    found.sort(key=lambda cue: cue[0])  # two may speak at once
    limits = [start for start, _, _ in found[1:]] + [line["duration_s"]]
    held = zip(found, limits, strict=True)
    return [(start, max(end, min(end + HOLD_S, limit)), text) for (start, end, text), limit in held]


def srt_text(line):
    def clock(seconds):
        ms = round(seconds * 1000)
        return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02},{ms % 1000:03}"

    blocks = []
    for number, (start, end, text) in enumerate(cues(line), start=1):
        lines = "\n".join(textwrap.wrap(text, LINE_CHARS))
        blocks.append(f"{number}\n{clock(start)} --> {clock(end)}\n{lines}\n")
    return "\n".join(blocks)


def srt_names(stem, keys):
    """NAME.KEY.srt of each key, of at most 255 bytes with what model.save adds for a while."""
    names, room = {}, 235 - len(stem.encode())
    for key in keys:
        name = re.sub(r"[^\w.-]", "_", key)  # keys of manifests may hold slashes
        if len(name.encode()) > room or f"{stem}.{name}.srt" in names:
            name = name.encode()[: max(0, room - 17)].decode(errors="ignore")
            name = f"{name}-{model.hash_text(key)}"
        names[f"{stem}.{name}.srt"] = key
    return list(names)


def check_outputs(outputs, jsonl, mark, wanted, rows, inputs):
    """UserError for an output that cannot be written, or would take the place of other things."""
    sources = (spoken(row).get("source") or "" for row in rows)
    read = set(map(os.path.realpath, [*inputs, *sources]))
    try:
        for path in [*outputs, jsonl, jsonl.with_suffix(DROPPED)]:
            if path.suffix not in ENDINGS:
                raise model.UserError(f"out: {path} ends in none of {', '.join(ENDINGS)}")
            if os.path.realpath(path) in read or path.is_dir():
                raise model.UserError(f"out: {path} is one of the inputs, or a folder")
            path.parent.mkdir(parents=True, exist_ok=True)
            probe = Path(f"{path}.tmp{os.getpid()}")  # as model.save will name it
            probe.touch()
            probe.unlink()
        known = mark.read_text() if mark.is_file() else ""
        first = jsonl.open("rb").readline() if jsonl.is_file() and not known else b""
    except OSError as error:
        raise model.UserError(f"out: {path} cannot be written ({error.strerror})") from error
    if first and not re.search(rb'"(segments|turns)": ', first):
        raise model.UserError(f"out: {jsonl} would be replaced, and is not infer.py's")
    if known not in ("", wanted):
        why = "unfinished, with other settings or weights"
        raise model.UserError(f"{jsonl}: {why}: give those, or another out, or delete {mark}")
    for path in {*outputs, jsonl}:
        for left in path.parent.glob(f"{glob.escape(path.stem)}.*.tmp[0-9]*"):  # of a killed run
            left.unlink(missing_ok=True)


def join_parts(jsonl, rows, fresh=False):
    """Lines of all processes, in the order of the inputs, as the .jsonl then has them."""
    pattern = re.escape(jsonl.stem + UNFINISHED) + r"\d+"
    parts = [path for path in jsonl.parent.iterdir() if re.fullmatch(pattern, path.name)]
    found = {}
    for path in filter(Path.is_file, [] if fresh else [jsonl, *parts]):
        for text in path.read_bytes().split(b"\n")[:-1]:  # a kill leaves the last one cut
            line = json.loads(text)
            found[line["key"], line["source"]] = line
    names = (tuple(identity(row).values()) for row in rows)
    lines = [found[name] for name in names if name in found]
    model.save(jsonl, lines)
    for part in parts:
        part.unlink()
    return lines


# ---- the run ----------------------------------------------------------------


@torch.no_grad()
def main(cfg):
    model.one_of(("llm", "ctc"), cfg, "decode.readout")
    model.one_of(("mix", "0", "1", "split"), cfg, "data.channel")
    model.at_least(0, cfg, "workers", "max_dropped", "batch_s", "decode.ctc_weight")
    # no process waits for another but at the ends
    device, dtype, rank, world = model.start(cfg.device, cfg.dtype, timedelta(days=7))
    scratch = tempfile.TemporaryDirectory()
    inputs = [name.translate(SHOWN) for name in cfg.inputs]
    rows = list_rows(inputs, scratch.name, cfg.data.strip_tags)
    rows = swap_speech(rows, cfg.seed) if cfg.control.wrong_audio else rows
    outputs = [Path(name) for name in cfg.out]
    if read_config(Path(cfg.model.dir)).get("script") == "train_duplex":
        return answer_calls(rows, outputs, inputs, cfg, device, dtype)
    if world > 1 and not outputs:
        raise model.UserError("several processes need an output: give out=NAME.jsonl")
    first = sorted(outputs, key=lambda path: path.suffix != ".jsonl") or [Path(scratch.name, "out")]
    jsonl, mark = first[0].with_suffix(".jsonl"), first[0].with_suffix(UNFINISHED)
    files = [p for p in Path(cfg.model.dir).glob("*.*") if p.suffix in (".pt", ".safetensors")]
    weights = [(p.name, p.stat().st_mtime_ns) for p in sorted(files)]
    settings = [(key, str(value)) for key, value in cfg.items() if key not in SAME_TEXTS]
    about = model.hash_text([settings, weights])  # what the texts depend on
    if rank == 0:
        check_outputs(outputs, jsonl, mark, about, rows, inputs)
    listener = load_listener(cfg, device, dtype)
    if any("parts" in row for row in rows) and not hasattr(listener, "several"):
        raise model.UserError("ONE+TWO: needs a model of train_salm.py")
    if cfg.decode.readout == "ctc" and listener.read_ctc is None:
        raise model.UserError("decode.readout=ctc: this model has no CTC head")
    if cfg.decode.ctc_weight and getattr(listener, "ctc", None) is None:
        raise model.UserError("decode.ctc_weight: this model has no CTC head over the LLM's tokens")
    done = [set()]
    if rank == 0:
        lines = join_parts(jsonl, rows, fresh=not mark.is_file())
        model.save(mark, about)
        done = [{line["key"] for line in lines}]
        if listener.llm is not None:
            ids = prompt_ids(listener, rows[0])
            parts = [list(part) for _, part in itertools.groupby(ids, model.AUDIO.__eq__)]
            parts = [repr(listener.tokenizer.decode(part)) for part in parts if part[0] >= 0]
            print("prompt:", " SPEECH ".join(parts))
        print(
            f"{len(rows)} recordings, {len(lines)} of them done before | {listener.about} | "
            f"{device} {dtype} x {world}, torch {torch.__version__}", flush=True,
        )  # fmt: skip
    if world > 1:
        dist.broadcast_object_list(done)
    started = time.time()
    amp = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    waiting = [row for row in rows if row["key"] not in done[0]]
    dropped = transcribe(waiting, jsonl, listener, cfg, device, amp, rank, world)
    if world > 1:
        found = [None] * world
        dist.all_gather_object(found, dropped)
        dropped = sum(found, [])
    if rank == 0:
        return finish(cfg, outputs, jsonl, rows, done[0], dropped, time.time() - started)


def answer_calls(rows, outputs, inputs, cfg, device, dtype):
    """What a duplex model says to each recording: audio and turns."""
    script = importlib.import_module("train_duplex")
    if cfg.data.channel == "split" or dist.is_initialized():
        raise model.UserError("a duplex model hears one channel, in one process: data.channel=0")
    if wrong := [path for path in outputs if path.suffix not in (".wav", ".jsonl")]:
        raise model.UserError(f"out: {wrong[0]}: a duplex model writes .wav and .jsonl")
    waves = [path for path in outputs if path.suffix == ".wav"]
    tables = [path for path in outputs if path.suffix == ".jsonl"]
    first = [*tables, *waves, Path("out")][0].with_suffix(".jsonl")
    check_outputs(outputs, first, first.with_suffix(UNFINISHED), "", rows, inputs)
    duplex, lines, dropped = script.load_run(Path(cfg.model.dir), cfg, device, dtype), [], []
    names = [Path(name).stem for name in srt_names("", [identity(row)["key"] for row in rows])]
    print(f"{len(rows)} recordings | duplex {cfg.model.dir} | {device} {dtype}")
    for row, name in zip(map(spoken, rows), names, strict=True):
        try:
            line, wave = script.answer(duplex, row, cfg, device, dtype)
        except model.AudioError as error:
            dropped.append({"key": row["key"], "reason": str(error)})
            continue
        sound = wave, duplex.codec.sample_rate
        for path in waves:
            path = path if len(rows) == 1 else path.with_name(f"{path.stem}{name}.wav")
            model.save_atomic(
                path, lambda file, own=sound: soundfile.write(file, *own, format="WAV")
            )
            line["agent_audio"] = str(path)
        for turn in line["turns"]:
            span = f"{turn['start']:7.2f} {turn['end']:7.2f}"
            print(f"{row['key']}  {span}  {turn['role']:6}{turn['text']}")
        if "latency_ms" in line:
            said = "{median} in the median, {p95} for 95 of 100, {worst} at worst"
            print(f"ms for a frame of 80: {said.format(**line['latency_ms'])}")
        lines.append(line)
    for path in tables:
        model.save(path, lines)
    if outputs:
        model.save(first.with_suffix(DROPPED), dropped)
    for row in dropped:
        print(f"left out: {row['key']}: {row['reason']}")
    if not lines:
        sys.exit(1)


def transcribe(rows, jsonl, listener, cfg, device, amp, rank, world):
    """Append a line for each recording of this process's share, as soon as it is done.

    Output: key, source and reason of each recording that is left out.
    """
    lengths = [header_seconds(row) for row in rows]
    batches = cut_batches(lengths, cfg.batch_s)[rank::world]
    loader = torch.utils.data.DataLoader(
        Recordings(rows, listener.encoder, channel=cfg.data.channel, **cfg.vad),
        batch_sampler=batches, collate_fn=list, num_workers=cfg.workers,
        multiprocessing_context="fork" if cfg.workers else None,
    )  # fmt: skip
    own = jsonl.with_suffix(f"{UNFINISHED}{rank}") if rank else jsonl  # joined at the end
    hours = [sum(lengths[n] for n in batch) / 3600 for batch in batches]
    count, dropped = 0, []
    form = "{l_bar}{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=sum(hours), bar_format=form, disable=True if rank else None)
    for items, batch_hours in zip(loader, hours, strict=False):
        dropped += [identity(item.row) | {"reason": item.reason} for item in items if item.reason]
        clips = [clip for item in items for clip in item.clips]
        seconds = [clip.end - clip.start for clip in clips]
        for places in cut_batches(seconds, cfg.batch_s):  # a long recording has many pieces
            batch = [clips[n] for n in places]
            with amp:
                encode(batch, listener, device)
                build_prompts(batch, listener, cfg)
                decode(batch, listener, cfg)
                align(batch, listener)
                if cfg.translate:
                    translate(batch, cfg.translate, listener)
            for clip in batch:
                clip.feats = clip.speech = clip.log_probs = None  # what is done leaves the memory
        model.append(own, [make_line(item) for item in items if not item.reason])
        count += len(items)
        bar.set_postfix_str(f"{count} of {sum(map(len, batches))} recordings", refresh=False)
        bar.update(batch_hours)
        if len(dropped) > cfg.max_dropped:
            break
    bar.close()
    return dropped


def finish(cfg, outputs, jsonl, rows, done, dropped, elapsed_s):
    """Write the outputs, say what came out. Output: the summary, as in .json."""
    if outputs:
        model.save(jsonl.with_suffix(DROPPED), dropped)
    for row in dropped[:5]:
        print(f"left out: {row['reason']}")
    if len(dropped) > cfg.max_dropped:
        many = f"{len(dropped)} recordings cannot be used"
        raise model.UserError(f"{many}, more than max_dropped={cfg.max_dropped}")
    lines = join_parts(jsonl, rows)
    heard_s = sum(line["duration_s"] for line in lines if line["key"] not in done)
    summary = {
        "clips": len(lines), "dropped": len(dropped), "elapsed_s": round(elapsed_s, 3),
        "hours": sum(line["duration_s"] for line in lines) / 3600,
        "rtf": elapsed_s / heard_s if heard_s else None, "scores": score(lines),
    }  # fmt: skip
    fields = [[line["key"], line["text"], line.get("translation")] for line in lines]
    table = ["\t".join(" ".join(x.split()) for x in row if x is not None) for row in fields]
    texts = {".jsonl": lines, ".json": summary, ".txt": "".join(f"{row}\n" for row in table)}
    for path in {jsonl, *outputs}:
        if path.suffix in texts:
            model.save(path, texts[path.suffix])
            continue
        names = srt_names(path.stem, [line["key"] for line in lines])
        for line, name in zip(lines, names if len(lines) > 1 else [path.name], strict=False):
            model.save(path.with_name(name), srt_text(line))
    jsonl.with_suffix(UNFINISHED).unlink()
    if not outputs:
        print("\n".join(table))
    said = f"{len(lines)} recordings, {summary['hours']:.3f} h, {len(dropped)} left out"
    print(f"{said} | {elapsed_s:.1f} s, RTF {summary['rtf'] or 0:.4f}")
    for kind, found in summary["scores"].items():
        rates = {name: rate for name, rate in found.items() if name[:3] in ("wer", "cer")}
        rates = ", ".join(f"{name} {100 * rate:.2f} %" for name, rate in rates.items())
        edits = ", ".join(f"{found[k]} {k}" for k in ("substitutions", "deletions", "insertions"))
        print(f"{kind}: {rates}; {edits} in {found['units']} units of {found['clips']} clips")
    if not lines:
        sys.exit(1)
    return summary


def split_arguments(arguments):
    """YAML files and key=value for load_config; the rest, and files with "=" in it, are inputs."""
    configs, inputs = [], []
    for argument in arguments:
        is_key = argument.startswith("-") or "=" in argument and not os.path.exists(argument)
        (configs if is_key or argument.endswith((".yaml", ".yml")) else inputs).append(argument)
    hidden = ",".join(name.translate(HIDDEN) for name in inputs)
    return [*configs, *([f"inputs={hidden}"] if inputs else [])]


if __name__ == "__main__":
    sys.argv[1:] = split_arguments(sys.argv[1:])
    model.run_main(main, DEFAULTS, __doc__, "batch_s")
