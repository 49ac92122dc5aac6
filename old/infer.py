"""Stage 3: write down what is said in audio files, with the folder that train_phase2.py wrote.

    python infer.py configs/infer.yaml [key=value ...] INPUT ...
    python infer.py configs/infer.yaml call.wav recordings/ out=calls.srt,calls.jsonl translate=English
    python infer.py configs/infer.yaml data_aishell:test out=aishell.html,aishell.json

INPUT   audio files, folders (searched for audio at any depth), manifests (.jsonl, Kaldi folder, data_aishell:test).
Needs   model.dir: config.json, adaptor_phase2_final.pt and, where they were trained, ctc_head.pt and lora.pt; or
        adaptor.file: a published state dict alone, described by encoder.*, llm.* and adaptor.*; or
        model.dir: a run folder of finetune_encoder.py, a folder that its `merge` wrote, or Fun-ASR-Nano's own
Output  one file for each ending in `out`; without `out` the transcripts are printed
        .txt    key, transcript and translation, separated by tabs
        .jsonl  key, source, text, duration_s, segments (start, end, text, times, words); with translate: translation;
                with a target: target and errors; with a CTC head: ctc_text (and encoder_ctc_text of SenseVoice)
        .srt    subtitles; of several clips one file each, out.KEY.srt
        .html   page to read and listen: every clip with its errors coloured and a player, worst first
        .json   the summary: error rates, hours, seconds, rtf
        and bad.jsonl beside the first of them: every clip that could not be used, with the reason
Times   a segment's "times" is "ctc" where words were aligned with the CTC head, "segment" where the text does not fit
        the head (or there is none) and only the segment's own start and end are known.
Long    audio of more than vad.threshold_s is cut at pauses found by silero-vad, and the texts are joined.

Logged  error rate: WER, or CER for Chinese; raw, as written (normalised: lower case, no punctuation), of the LLM and of
        the CTC read-outs. rtf: seconds of computing per second of audio, from the first file read to the last text,
        without loading the models and without translating; audio_s_per_s is its inverse.
Source  prompt, splice, decoding and CTC are the functions that train_phase2.py validates with. The original penalises
        repetition (1.2, no 4-gram twice), which breaks phone numbers; here both are off and runaway loops are cut.
"""

import contextlib
import difflib
import functools
import html
import itertools
import json
import math
import os
import re
import resource
import sys
import textwrap
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import soundfile
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from rapidfuzz.distance import Levenshtein
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import model

DEFAULTS = {
    "inputs": [],  # what stands on the command line without "="
    "model.dir": "",  # folder of train_phase2.py, train_steermoe.py or finetune_encoder.py, or Fun-ASR-Nano's
    "adaptor.file": "",  # instead: a state dict without config.json, such as the published adaptor_phase2_final.pt
    "encoder.name": "",  # hub name or folder; "": as config.json says
    "encoder.language": "auto",  # this and the next two: with adaptor.file only, config.json knows them
    "encoder.text_norm": "woitn",
    "encoder.pad_to_30s": False,
    "llm.name": "",  # hub name or folder; "": as config.json says
    "llm.system": None,  # with adaptor.file only, like all of adaptor.* below; None: the chat template's own
    "adaptor.hidden_dim": 2048,
    "adaptor.num_layers": 4,
    "adaptor.num_heads": 8,
    "adaptor.stack": 1,
    "adaptor.pre_norm": False,
    "adaptor.keep_query_frames": False,
    "prompt": "",  # "": the row's own, or the one of training (adaptor.file: of the original release)
    "language": "",  # takes the place of {language} in the prompt; "": the row's own
    "hotwords": [],  # names that may occur
    "draft": ["auto"],  # CTC 1-best in the prompt: auto (as trained), true, false; a list, since YAML's true is no str
    "decode.readout": "llm",  # llm or ctc: whose transcript is the text
    "decode.max_new_tokens": 0,  # per segment; 0: by its duration
    "decode.repetition_penalty": 1.0,
    "decode.no_repeat_ngram_size": 0,
    "decode.speculative": True,  # the LLM checks the CTC 1-best in one pass: in fp32 the same text, sooner
    "decode.ctc_weight": 0.0,  # > 0: choose among the LLM's answer and the CTC beam by w log p_CTC + (1-w) log p_LLM
    "decode.beam": 8,  # of that CTC beam
    "translate": "",  # e.g. English: the same LLM, without LoRA, translates each segment's transcript
    "vad.threshold_s": 30.0,  # longer audio is cut into segments of at most this
    "out": [],  # files by ending, separated by commas
    "score": True,  # where a row has a target that is not empty
    "ctc": True,  # also give and score the CTC read-out, and SenseVoice's own
    "control.wrong_audio": False,  # give each clip the speech of another text: if errors stay low, nobody listens
    "data.batch_s": 120.0,  # padded seconds of audio per batch; 0: one clip at a time
    "data.max_bad": 100,  # stop when more clips than this cannot be used
    "workers": 2,  # processes that read audio, find pauses and compute features
    "compile": False,  # on a GPU, for passes over CTC's drafts: torch.compile of the LLM's layers; for hours of audio
    "seed": 0,
    "device": "auto",  # auto, cpu, cuda
    "dtype": "auto",  # auto: bf16 on a GPU, fp32 on a CPU
}
PUBLISHED_PROMPT = "这是一段中文语音，请转录："  # of the original release, for adaptor.file
AUDIO = {".wav", ".flac", ".ogg", ".opus", ".mp3", ".aif", ".aiff", ".au", ".sph", ".w64", ".gsm"}  # libsndfile
ENDINGS = (".txt", ".jsonl", ".srt", ".html", ".json")
CUE_S, CUE_CHARS, LINE_CHARS = 7.0, 84, 42  # subtitles: two lines of 42 characters, at most 7 s (usual guidelines)
UNKNOWN_LOG_PROB = -10.0  # a guess: about what CTC gives to a token of which it hears nothing
ENCODER_PASS = {"cpu": 64, "cuda": 12000}  # a pass costs as much as so many feature frames more (guesses)
CPU_CLASSES = 2**14  # CTC scores of fewer classes go to the CPU at once
UNFINISHED = 16  # clips that the LLM is still writing when the next batch is read
HOLD_S = 0.5  # a cue stays this much longer: CTC marks where a word is recognised, often before it is over
EDITS = ("substitutions", "deletions", "insertions")
KINDS = {"text": "", "ctc_text": "ctc_", "encoder_ctc_text": "encoder_ctc_"}  # transcript -> prefix of its scores


# ---- configuration (the same lines in every script; tests/test_copies.py) ---------------------------------------


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML loader that refuses a key given twice; PyYAML itself silently keeps the last."""

    def construct_mapping(self, node, deep=False):
        seen = []
        for key_node, _ in node.value:
            key, mark = self.construct_object(key_node, deep=True), key_node.start_mark
            if key in seen:
                raise ValueError(f"{mark.name}:{mark.line + 1}: key {key!r} is given twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


def load_config(arguments, defaults):
    """[config.yaml] key=value ... -> flat dict with every key of `defaults`; ValueError names file and nearest key."""
    given = []  # (where, key, value), later ones win
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals:
            # text stays as typed, required keys are text too: YAML minds colons and reads 007 as 7
            text = isinstance(defaults.get(key.strip()), str | type(...)) or not value
            given.append((f"argument {argument}", key.strip(), value if text else yaml.safe_load(value)))
            continue
        if not Path(argument).is_file():
            raise ValueError(f"{argument}: no such config file")
        with open(argument, encoding="utf-8") as file:
            tree = yaml.load(file, UniqueKeyLoader) or {}
        if not isinstance(tree, dict):
            raise ValueError(f"{argument}: expected `section:` or `key: value` lines")
        stack = [("", tree)]
        while stack:  # sections flatten into dotted keys
            prefix, section = stack.pop()
            for name, value in section.items():
                dotted = f"{prefix}{name}"
                if isinstance(value, dict):
                    stack.append((f"{dotted}.", value))
                elif any((where, key) == (argument, dotted) for where, key, _ in given):
                    raise ValueError(f"{argument}: key {dotted!r} is given twice")  # in a section, and spelt with dots
                else:
                    given.append((argument, dotted, value))
    config = dict(defaults)
    for where, key, value in given:
        if key not in defaults:
            nearest = difflib.get_close_matches(key, defaults, 1, 0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {nearest!r}? (--help lists all)")
        config[key] = convert(value, defaults[key], f"{where}: {key}")
    missing = [key for key, value in config.items() if value is ...]
    if missing:
        raise ValueError(f"required key not given: {', '.join(missing)}")
    return config


def convert(value, default, where):
    """Bring a YAML value to the type of its default: PyYAML reads 1e-4 as a string and `no` as False."""
    if value is None and (default is None or default == ""):
        return default
    if value is None:
        raise ValueError(f"{where}: has no value")
    if isinstance(default, list):
        items = value if isinstance(value, list) else [part.strip() for part in str(value).split(",")]
        return [convert(item, default[0], where) for item in items] if default else items
    kind = str if default is ... or default is None else type(default)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    try:
        if kind is bool or isinstance(value, (bool, list, dict)) or kind is int and float(value) % 1:
            raise ValueError
        return kind(value)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r} ({type(value).__name__})") from None


def run_main(main, defaults, doc):
    """Command line of a script: --help, one-line errors for what the user can mend, exit status 2."""
    if any(argument in ("-h", "--help") for argument in sys.argv[1:]):
        width = max(len(key) for key in defaults)
        lines = (f"  {key:{width}}  {'(required)' if value is ... else value!r}" for key, value in defaults.items())
        print(doc.strip(), "\n\nKeys and defaults:", *lines, sep="\n")
        return
    try:
        main(load_config(sys.argv[1:], defaults))
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def pick_device(cfg):
    """Device, dtype of the frozen weights; sets TF32 for the whole process; under torchrun joins the process group."""
    kind = cfg["device"]
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    if kind.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device: expected auto, cpu or cuda, got {kind!r}")
    if kind.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("device=cuda, but torch sees no GPU here; use device=cpu, or check the driver with nvidia-smi")
    if "RANK" in os.environ and not dist.is_initialized():
        backend = "nccl" if kind.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=12))  # one rank may have all the work left
    if kind == "cuda":
        kind = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(kind)
    names = {"fp32": torch.float32, "bf16": torch.bfloat16}
    names["auto"] = torch.bfloat16 if kind.startswith("cuda") else torch.float32
    if cfg["dtype"] not in names:
        raise ValueError(f"dtype: expected one of {', '.join(names)}, got {cfg['dtype']!r}")
    model.allow_tf32(names[cfg["dtype"]] == torch.bfloat16)  # for what is fp32 beside bf16: CTC, InfoNCE's cosines
    return torch.device(kind), names[cfg["dtype"]]


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def write_atomic(path, write):
    """Call `write(file)` on a temporary file, fsync, then rename: a kill or a full disk leaves the old file whole.

    No reader looks at a temporary file. What kill -9 leaves of one goes when the same file is next written, which the
    same command does.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        for left_over in path.parent.glob(f".{path.name}.*.tmp"):
            left_over.unlink(missing_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # torch.save makes a RuntimeError of a disk that fills up
            reason = getattr(error, "strerror", None) or f"{error}; is the disk full?"
            raise OSError(f"{path}: could not be written ({reason}); what was there before is whole") from error
        raise


def autocast(device, dtype):
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype != torch.float32)


# ---- what is to be heard ----------------------------------------------------------------------------------------


def split_arguments(arguments):
    """Command line -> arguments for load_config: YAML files, key=value, and the rest as inputs=[...].

    An existing file is an input even if its name has "=" in it.
    """
    configs, inputs = [], []
    for argument in arguments:
        is_config = argument.endswith((".yaml", ".yml")) or "=" in argument and not Path(argument).exists()
        (configs if is_config or argument.startswith("-") else inputs).append(argument)
    return [*configs, *([f"inputs={json.dumps(inputs, ensure_ascii=False)}"] if inputs else [])]


def unique(name, seen):
    """`name`, or name-2, name-3 ... if it was given out before."""
    candidate, number = name, 1
    while candidate in seen:
        number += 1
        candidate = f"{name}-{number}"
    seen.add(candidate)
    return candidate


def list_rows(inputs):
    """Inputs -> rows with key, source and whatever a manifest says; a missing input is the user's slip: ValueError."""
    rows, seen = [], set()
    for name in map(str, inputs):
        path, (folder, colon, _) = Path(name), name.rpartition(":")
        part_of_aishell = colon and not path.exists() and Path(folder).is_dir()
        if path.suffix == ".jsonl" or (path / "wav.scp").is_file() or part_of_aishell:
            found = model.read_manifest(name)
        elif path.is_dir():
            files = sorted(p for p in path.rglob("*") if p.suffix.lower() in AUDIO and p.is_file())
            if not files:
                raise ValueError(f"{name}: no audio in this folder (looked for {', '.join(sorted(AUDIO))})")
            found = [{"key": file.stem, "source": str(file)} for file in files]
        elif path.is_file():
            found = [{"key": path.stem, "source": name}]
        else:
            raise ValueError(f"{name}: no such file, folder or manifest")
        rows += [row | {"key": unique(row["key"], seen), "speech": row["source"]} for row in found]
    if not rows:
        raise ValueError("nothing to transcribe: give audio files, folders or manifests behind the configuration")
    return rows


def swap_speech(rows, seed):
    """Control: give every row the speech of another one with a different target, in an order that `seed` decides."""
    targets = [model.normalize_text(row.get("target", "")) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (model.hash_text([seed, targets[i]]), i))  # equal ones side by side
    shift = max(targets.count(target) for target in set(targets))
    if 2 * shift > len(rows):
        raise ValueError(f"control.wrong_audio: {shift} of {len(rows)} clips have the same target (or none), so they "
                         "cannot all get the speech of a different one")
    swapped = list(rows)
    for place, index in enumerate(order):
        other = rows[order[(place + shift) % len(order)]]
        swapped[index] = rows[index] | {"speech": other["source"], "speech_of": other["key"]}
    return swapped


class Recordings(torch.utils.data.Dataset):
    """row -> (pieces, seconds, reason): audio is read, cut and made features of in worker processes.

    pieces  list of (features (T, F), start_s, end_s), more than one only for long audio. The features are arrays: each
            tensor from a worker holds a file descriptor, and an hour has more pieces than a process may have open.
    """

    def __init__(self, rows, encoder, threshold_s):
        self.rows, self.encoder, self.threshold_s = rows, encoder, threshold_s

    def __len__(self):
        return len(self.rows)

    @torch.autocast("cpu", enabled=False)  # its reader may be under autocast; features are fp32 everywhere
    def __getitem__(self, index):
        row, rate = self.rows[index], self.encoder.sample_rate
        try:
            wave = model.load_audio(row["speech"], rate)
            if len(wave) <= self.threshold_s * rate:
                return [(self.encoder.features(wave, row["key"]).numpy(), 0.0, len(wave) / rate)], len(wave) / rate, ""
            limit = int(self.threshold_s * rate)
            spans = cut_segments(speech_spans(wave, rate, self.threshold_s), limit)
            named = [(f"{row['key']}#{n}", *span) for n, span in enumerate(spans) if span[1] - span[0] >= 0.1 * rate]
            pieces = [(self.encoder.features(wave[first:end], name).numpy(), first / rate, end / rate)
                      for name, first, end in named]
            return pieces, len(wave) / rate, ""
        except model.AudioError as error:
            return [], 0.0, str(error)


def speech_spans(wave, rate, max_s):
    """Where silero-vad hears speech: [(first, end)] in samples. Its weights lie in its package: no download."""
    threads = torch.get_num_threads()
    from silero_vad import get_speech_timestamps, load_silero_vad

    torch.set_num_threads(threads)  # importing silero_vad sets it to 1 for the whole process
    spans = get_speech_timestamps(wave, load_silero_vad(), sampling_rate=rate, max_speech_duration_s=max_s)
    return [(span["start"], span["end"]) for span in spans]


def cut_segments(spans, limit):
    """Join spans with the pauses between them as long as they fit into `limit` samples; cut what is longer."""
    segments = []
    for first, end in spans:
        parts = -(-(end - first) // limit)  # 1, unless someone speaks without a pause for longer than the limit
        edges = [first + (end - first) * n // parts for n in range(parts + 1)]
        for start, stop in zip(edges, edges[1:]):
            if segments and stop - segments[-1][0] <= limit:
                segments[-1] = (segments[-1][0], stop)
            else:
                segments.append((start, stop))
    return segments


def header_seconds(path):
    try:
        return soundfile.info(path).duration
    except (RuntimeError, OSError, TypeError):  # the clip's own turn to be read will say what is wrong with it
        return 0.0


def read_batches(rows, encoder, cfg, clips, bad):
    """Longest clips first, in batches of at most data.batch_s padded seconds; stops when there are too many bad ones.

    Output  lists of (row index, segment number, features (T, F), start_s, end_s); fills `clips` {index: duration,
            empty segments} and `bad` on the way.
    """
    lengths = [header_seconds(row["speech"]) for row in rows]
    order, messages = sorted(range(len(rows)), key=lambda i: (-lengths[i], i)), []
    for index in order:  # a message from a worker takes its time, however little is in it: up to 8 clips or 60 s
        last = messages[-1] if messages and cfg["data.batch_s"] else []
        if last and len(last) < 8 and sum(lengths[i] for i in [*last, index]) < 60:
            last.append(index)
        else:
            messages.append([index])
    loader = torch.utils.data.DataLoader(
        Recordings(rows, encoder, cfg["vad.threshold_s"]), batch_sampler=messages, collate_fn=list,
        num_workers=cfg["workers"], multiprocessing_context="fork" if cfg["workers"] else None,
    )
    batch, longest, items = [], 0.0, itertools.chain.from_iterable(loader)
    for index, (pieces, seconds, reason) in tqdm(zip(order, items), total=len(rows), unit="clip", disable=None):
        if reason:
            bad.append({"key": rows[index]["key"], "source": rows[index]["speech"], "reason": reason})
            if len(bad) > cfg["data.max_bad"]:
                return
            continue
        clips[index] = {"duration_s": seconds, "segments": [None] * len(pieces)}
        for number, (feats, start, end) in enumerate(pieces):
            padded = encoder.num_frames(round((end - start) * encoder.sample_rate)) * encoder.frame_ms / 1000
            longest = max(longest, padded)
            if batch and longest * (len(batch) + 1) > cfg["data.batch_s"]:
                yield batch
                batch, longest = [], padded
            batch.append((index, number, torch.from_numpy(feats), start, end))
    if batch:
        yield batch


# ---- model ------------------------------------------------------------------------------------------------------


def read_settings(cfg):
    """What was trained, and where its weights lie: config.json of train_phase2.py, or cfg itself for adaptor.file."""
    if cfg["adaptor.file"]:
        if missing := [key for key in ("encoder.name", "llm.name") if not cfg[key]]:
            raise ValueError(f"adaptor.file comes without config.json, so give {' and '.join(missing)} too")
        settings = {key: value for key, value in cfg.items() if key.split(".")[0] in ("encoder", "llm", "adaptor")}
        settings |= {"llm.prompt": PUBLISHED_PROMPT, "encoder.query_frames": cfg["adaptor.keep_query_frames"]}
        return settings, Path(cfg["adaptor.file"])
    folder = Path(cfg["model.dir"])
    if not cfg["model.dir"] or not (folder / "config.json").is_file():
        raise ValueError(f"model.dir={cfg['model.dir']}: no config.json there; give run.dir of a train_phase2.py that "
                         "has validated at least once, or adaptor.file for a state dict without config.json")
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    named = {key: cfg[key] for key in ("encoder.name", "llm.name") if cfg[key]}
    return settings | named, folder / settings.get("weights", "adaptor_phase2_final.pt")


def check_identity(found, settings, part):
    """The encoder or LLM that was loaded must be the one of training: other weights give noise without an error."""
    differing = [f"{part}.{key} {value!r} (trained with {settings[f'{part}.{key}']!r})" for key, value in found.items()
                 if key != "name" and settings.get(f"{part}.{key}", value) != value]
    if differing:
        raise ValueError(f"{found['name']} is not the {part} of training: {', '.join(differing)}; give {part}.name")


def is_nano(folder):
    """A Fun-ASR-Nano folder (released or merged) or a run folder of finetune_encoder.py."""
    return bool(str(folder)) and ((Path(folder) / "trained.pt").is_file() or (Path(folder) / "model.pt").is_file())


def load_nano_listener(cfg, device, dtype):
    """The same for Fun-ASR-Nano; only its LLM is bf16 on a GPU, as in FunASR, and what is fp32 is not TF32."""
    model.allow_tf32(False)
    if cfg["decode.ctc_weight"] > 0:
        raise ValueError("decode.ctc_weight is for models of train_phase2.py: here the CTC head has another vocabulary "
                         "than the LLM")
    name = cfg["encoder.name"]  # a run's base that was moved; a hub name is that of another model's encoder
    nano, frontend, tokenizer, ctc_tokenizer = model.load_nano(
        cfg["model.dir"], dtype, cfg["decode.readout"] != "ctc", name if name and Path(name).exists() else "")
    nano = nano.to(device)
    if nano.llm is None:
        cfg["decode.readout"] = "ctc"
    if cfg["decode.readout"] == "ctc" and nano.ctc is None or cfg["translate"] and nano.llm is None:
        lacks = "CTC branch to read" if nano.ctc is None else "LLM to translate"
        raise ValueError(f"{cfg['model.dir']}: has no {lacks}")
    stack = nano.ctc_decoder.stack if nano.ctc_decoder is not None else 1
    return SimpleNamespace(
        encoder=frontend, nano=nano, ctc=nano.ctc, llm=nano.llm, tokenizer=tokenizer, ctc_tokenizer=ctc_tokenizer,
        read_ctc=lambda path: ctc_tokenizer.decode(path).strip(), draft=False, device=device, dtype=torch.float32,
        replays=None, stop_id=tokenizer and tokenizer.convert_tokens_to_ids("<|im_end|>"),
        position_s=stack * frontend.frame_ms / 1000,
        settings={"encoder.name": cfg["model.dir"], "llm.name": "its own" if nano.llm is not None else "none"},
    )


def load_listener(cfg, device, dtype):
    """Encoder, adaptor, CTC head (or None), LLM with its LoRA, tokenizer, and how they were used in training."""
    if cfg["decode.readout"] not in ("llm", "ctc"):
        raise ValueError(f"decode.readout: expected llm or ctc, got {cfg['decode.readout']!r}")
    if not cfg["adaptor.file"] and is_nano(cfg["model.dir"]):
        return load_nano_listener(cfg, device, dtype)
    settings, adaptor_file = read_settings(cfg)
    get, folder = settings.get, adaptor_file.parent
    encoder = model.load_encoder(
        settings["encoder.name"], get("encoder.language", "auto"), get("encoder.text_norm", "woitn"),
        get("encoder.query_frames", False), get("encoder.pad_to_30s", False)).to(device)
    check_identity(encoder.identity, settings, "encoder")
    encoder = model.store_bf16(encoder) if dtype == torch.bfloat16 else encoder
    lora_r = get("llm.lora.r", 0)
    llm, tokenizer = model.load_llm(settings["llm.name"], dtype, device, lora_r, get("llm.lora.alpha"),
                                    get("llm.lora.targets", ()))
    check_identity(llm.identity, settings, "llm")
    if lora_r:
        lora, own = model.read_weights(folder / "lora.pt"), model.lora_parameters(llm)
        if lora.keys() != own.keys() or any(lora[name].shape != own[name].shape for name in own):
            raise ValueError(f"{folder / 'lora.pt'}: does not fit {settings['llm.name']} with llm.lora.r={lora_r}")
        for name, parameter in own.items():
            parameter.data.copy_(lora[name])
    table = llm.get_input_embeddings().weight
    if "steering.num_experts" in settings:  # of train_steermoe.py: from here on the encoder itself is steered
        adaptor = model.SteerMoE(encoder, table.shape[1], settings)
        model.load_steermoe(adaptor, model.read_weights(adaptor_file), adaptor_file)
        encoder.ctc_tokenizer = None  # SenseVoice's own CTC head cannot read steered frames
    else:
        adaptor = model.AudioAdaptor(
            encoder.width, table.shape[1], settings["adaptor.hidden_dim"], settings["adaptor.num_layers"],
            settings["adaptor.num_heads"], 0.0, settings["adaptor.stack"], settings["adaptor.pre_norm"])
        model.load_weights(adaptor, adaptor_file)
        adaptor = model.store_bf16(adaptor) if dtype == torch.bfloat16 else adaptor
    ctc, draft = None, read_draft(cfg, get("llm.draft", 0))
    needs_ctc = draft or get("llm.speech") == "ctc"
    if needs_ctc or not cfg["adaptor.file"] and (folder / "ctc_head.pt").is_file():
        head = model.read_weights(folder / "ctc_head.pt")
        ctc = model.CTCHead(table.shape[1], embedding=table, token_ids=head.get("token_ids", []))
        model.load_weights(ctc, folder / "ctc_head.pt")
        ctc = model.freeze(ctc).to(device)
    if cfg["decode.readout"] == "ctc" and ctc is None:
        raise ValueError(f"decode.readout=ctc: {folder} has no ctc_head.pt")
    return SimpleNamespace(
        encoder=encoder, adaptor=model.freeze(adaptor).to(device), ctc=ctc, llm=llm, tokenizer=tokenizer, draft=draft,
        nano=None, replays=None, read_ctc=lambda path: tokenizer.decode(ctc.tokens(path)).strip(),
        stop_id=model.end_of_turn(tokenizer), settings=settings, device=device, dtype=dtype,
        position_s=encoder.frame_ms * settings["adaptor.stack"] / 1000,
    )


def read_draft(cfg, trained_share):
    """Whether the CTC 1-best goes into the prompt."""
    draft = str(cfg["draft"][0]).lower()
    if draft not in ("auto", "true", "false"):
        raise ValueError(f"draft: expected auto, true or false, got {cfg['draft'][0]!r}")
    return draft == "true" or draft == "auto" and trained_share > 0


# ---- transcribing -----------------------------------------------------------------------------------------------


def is_gpu(device):
    """On its own, so that tests and bench.py can take a GPU's way on a CPU."""
    return device.type == "cuda"


def make_prompt(row, draft, listener, cfg):
    """The prompt of training with what the user or the row says in its place."""
    hotwords = cfg["hotwords"] or row.get("hotwords") or ()
    if listener.nano is not None:
        return model.nano_prompt(listener.tokenizer, cfg["language"], hotwords)
    return model.build_prompt(
        listener.tokenizer, cfg["prompt"] or row.get("prompt") or listener.settings.get("llm.prompt", ""), draft,
        cfg["language"] or row.get("language"), hotwords, listener.settings.get("llm.system"))


def listen(listener, feats, lens):
    """Encoder outputs and lens, speech for the LLM and lens (None without an LLM), CTC scores (or None) and lens."""
    if listener.nano is None:
        enc, enc_lens = listener.encoder(feats, lens)  # (B, T', W)
        heard = model.speech_for_llm(listener.adaptor, listener.ctc, enc.float(), enc_lens,
                                     listener.settings.get("llm.speech", "frames"))
        return enc, enc_lens, *heard
    nano = listener.nano
    enc, enc_lens = nano.encode(feats, lens)
    speech = nano.listen(enc, enc_lens) if nano.llm is not None else (None, None)
    return enc, enc_lens, *speech, *(nano.ctc_log_probs(enc, enc_lens) if nano.ctc is not None else (None, enc_lens))


def known_prefix(listener, ids):
    """Keys and values of what stands before the audio: mostly the same for all clips, so they are computed once."""
    if getattr(listener, "prefix", (None,))[0] != ids:
        listener.prefix = ids, model.read_prefix(listener.llm, ids)
    return listener.prefix[1]


@torch.no_grad()
def transcribe(batches, rows, listener, cfg):
    """Batches of read_batches -> list of (row index, segment number, segment), in the order in which they were done.

    A segment has start, end, text, times, words, and the CTC read-outs.
    """
    done = []
    # one clip at a time leaves a GPU waiting for the CPU, unless it gets everything at once; neither Fun-ASR-Nano's
    # adaptor nor CTC-compressed speech can be recorded, since their sizes depend on values
    fixed = listener.nano is None and isinstance(listener.adaptor, model.AudioAdaptor) and (
        listener.settings.get("llm.speech", "frames") == "frames")
    if is_gpu(listener.device) and not cfg["data.batch_s"] and fixed and listener.replays is None:
        listener.replays = (  # kept, for recording takes its time
            model.Graphs(functools.partial(listen, listener)),
            model.Graphs(lambda embeds: model.hidden_states(listener.llm, embeds)))
    with autocast(listener.device, listener.dtype):
        heard = hear(batches, listener, cfg)
        if cfg["decode.readout"] == "ctc":
            written = ((clip, clip.draft) for clips in heard for clip in clips)
        else:
            written = write(ask(heard, rows, listener, cfg), listener, cfg)
        for clip, text in written:
            done.append((clip.index, clip.number, make_segment(clip, text, listener, cfg)))
    return done


def runs_of_like_length(lengths, pass_cost):
    """Indices in batches, longest first: padding costs at most what a further pass would."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[first:end] for first, end in model.cut_runs([lengths[i] for i in order], pass_cost)]


def hear(batches, listener, cfg):
    """Encoder, adaptor and CTC: batches of read_batches -> lists of what was heard, longest first.

    Each is a namespace: index, number, start, end, speech (K, D) on the device or None, log_probs (S, V + 1) on the CPU
    (from CPU_CLASSES on, on the device), path and its text `draft` (None without a CTC head), encoder_text (what
    SenseVoice's own CTC reads, or None).
    A batch is begun before the one before it is given out: a GPU then has something to do while that one is written,
    and nobody waits for it here.
    """
    begun = []
    for batch in itertools.chain(batches, [[]]):
        lengths, count = [len(feats) for _, _, feats, _, _ in batch], len(begun)
        for run in runs_of_like_length(lengths, ENCODER_PASS[listener.device.type]):
            begun.append(begin_run(run, batch, listener, cfg))
        if count:  # each run's scores can leave the memory as soon as it is read
            yield [clip for _ in range(count) for clip in end_run(begun.pop(0), listener)]


def begin_run(run, batch, listener, cfg):
    """Start encoder, adaptor and CTC for the pieces batch[n], n in run.

    Output: a namespace for end_run; what the CPU needs of the results is on its way there.
    """
    device, features = listener.device, [batch[n][2] for n in run]
    feats, lens = pad_sequence(features, batch_first=True), torch.tensor(list(map(len, features)))  # (B, T, F)
    if cfg["data.batch_s"] or listener.replays is None:
        found = listen(listener, model.upload(feats, device), lens)
    else:
        grid = 10 if isinstance(listener.encoder, model.KaldiEncoder) else 60  # frames, 0.6 s: to lengths that recur
        feats = F.pad(feats, (0, 0, 0, -feats.shape[1] % grid))
        found = listener.replays[0](model.upload(feats, device), model.upload(lens, device))
        found = [x if x is None else x.clone() for x in found]  # the next clip's will lie in the same place
    enc, enc_lens, speech, speech_lens, log_probs, emb_lens = found
    begun = SimpleNamespace(pieces=[batch[n] for n in run], speech=speech, log_probs=None, best=None, own_best=None)
    begun.lens = [model.download(x) for x in (enc_lens, emb_lens, emb_lens if speech is None else speech_lens)]
    if listener.ctc is not None:
        begun.best = model.download(log_probs.argmax(-1))
        # to be aligned on the CPU, without waiting for the LLM; Fun-ASR-Nano's 60,000 classes are too many for that
        begun.log_probs = model.download(log_probs) if log_probs.shape[-1] < CPU_CLASSES else lambda: log_probs
    if cfg["ctc"] and getattr(listener.encoder, "ctc_tokenizer", None) is not None:
        begun.own_best = model.download(listener.encoder.ctc_best(enc))
    return begun


def end_run(begun, listener):
    """What was heard: see hear."""
    (enc_lens, emb_lens, speech_lens), ctc = (lens() for lens in begun.lens), listener.ctc
    count = len(begun.pieces)
    texts = [None] * count if begun.own_best is None else listener.encoder.ctc_read(begun.own_best(), enc_lens)
    paths = [None] * count if ctc is None else model.ctc_paths(begun.best(), emb_lens, ctc.blank)
    log_probs = None if ctc is None else begun.log_probs()
    for slot, (index, number, _, start, end) in enumerate(begun.pieces):
        yield SimpleNamespace(  # copies: a view would keep the whole run in memory
            index=index, number=number, start=start, end=end, path=paths[slot], encoder_text=texts[slot],
            speech=None if begun.speech is None else begun.speech[slot, : int(speech_lens[slot])].clone(),
            log_probs=None if ctc is None else log_probs[slot, : int(emb_lens[slot])].clone(),
            draft=None if ctc is None else listener.read_ctc(paths[slot]))


def ask(batches, rows, listener, cfg):
    """Batches of hear, with all that the LLM needs: prompt, cap of its tokens, guess."""
    for clips in batches:
        for clip in clips:
            clip.prompt = make_prompt(rows[clip.index], clip.draft if listener.draft else None, listener, cfg)
            # where speech is CTC's, its head is trained and its count can be trusted
            count = len(clip.path) if listener.settings.get("llm.speech") == "ctc" else None
            clip.cap = cfg["decode.max_new_tokens"] or model.token_cap(clip.end - clip.start, count)
            guessing = clip.draft is not None and cfg["decode.speculative"]
            clip.guess = model.text_to_ids(listener.tokenizer, clip.draft) if guessing else None
        yield clips
        del clips, clip  # what is finished can leave the memory before more is heard


def write(batches, listener, cfg):
    """Batches of ask -> (clip, text) as the LLM finishes them. Clips that are not done go on with the next batch."""
    few = UNFINISHED if cfg["data.batch_s"] else 0
    repetition = cfg["decode.repetition_penalty"], cfg["decode.no_repeat_ngram_size"]
    guessing = listener.ctc is not None and cfg["decode.speculative"] and repetition == (1.0, 0)
    if guessing and is_gpu(listener.device):
        read = listener.replays[1] if listener.replays else functools.partial(model.hidden_states, listener.llm)
        answers = model.decode_drafted(listener.llm, batches, listener.stop_id, None if cfg["data.batch_s"] else read)
    else:
        asked = {}  # number of decode_stream -> clip, until it is finished
        stream = model.decode_stream(
            listener.llm, spliced(batches, listener, asked), listener.stop_id, *repetition, few)
        answers = ((asked.pop(number), ids, score) for number, ids, score in stream)
    for clip, answer, _ in answers:
        if cfg["decode.ctc_weight"] > 0 and listener.ctc is not None:
            answer = choose(answer, clip.log_probs, clip.prompt, clip.speech, listener, cfg)
        yield clip, listener.tokenizer.decode(answer, skip_special_tokens=True).strip()


def spliced(batches, listener, asked):
    """Batches of ask -> those of model.decode_stream; `asked` gets each clip under its number there."""
    embed, numbers = listener.llm.get_input_embeddings(), itertools.count()
    for clips in batches:
        shared = model.shared_prefix([clip.prompt for clip in clips])
        prefix = known_prefix(listener, clips[0].prompt[0][:shared])
        lengths = [sum(map(len, (*clip.prompt, clip.speech, clip.guess or ()))) - shared for clip in clips]
        for run in runs_of_like_length(lengths, model.PASS_COSTS[listener.device.type]):
            part = [clips[n] for n in run]
            asked.update((next(numbers), clip) for clip in part)
            prompts, speeches = [clip.prompt for clip in part], [clip.speech for clip in part]
            yield (
                model.splice(embed, prompts, pad_sequence(speeches, True), torch.tensor(list(map(len, speeches))),
                             pad_left=True, shared=shared),
                [clip.cap for clip in part], [clip.guess for clip in part], prefix)
        del clips, part, speeches  # what is finished can leave the memory before more is heard


def make_segment(clip, text, listener, cfg):
    """Text, times and CTC read-outs of one piece of a clip."""
    segment = {"start": round(clip.start, 3), "end": round(clip.end, 3), "text": text, "times": "segment"}
    words = align(clip.log_probs, text, listener) if listener.ctc is not None else []
    if words:
        segment["times"], segment["words"] = "ctc", [
            {"word": word, "start": round(min(clip.start + first, clip.end), 3),
             "end": round(min(clip.start + last, clip.end), 3)} for word, first, last in words]
    if cfg["ctc"] and listener.ctc is not None:
        segment["ctc_text"] = clip.draft
    if clip.encoder_text is not None:
        segment["encoder_ctc_text"] = clip.encoder_text
    return segment


def choose(answer, log_probs, prompt, speech, listener, cfg):
    """The best of the LLM's answer and the CTC beam, by CTC and LLM together.

    Each knows what the other does not: CTC what sounds alike, the LLM what is a sentence. A token that the CTC head
    lacks (a word that training never had) counts UNKNOWN_LOG_PROB in place of its CTC score.
    """
    ctc = listener.ctc
    beam = [ctc.tokens(labels) for labels, _ in model.ctc_beam_search(log_probs.cpu(), ctc.blank, cfg["decode.beam"])]
    candidates = [answer, *(ids for ids in beam if ids != answer)]
    by_llm = model.answer_log_probs(listener.llm, prompt, speech, candidates, listener.stop_id).tolist()
    weight, scores = cfg["decode.ctc_weight"], []
    for ids, llm_score in zip(candidates, by_llm):
        labels = ctc.classes(ids)
        ctc_score = model.ctc_log_prob(log_probs, labels, ctc.blank) + UNKNOWN_LOG_PROB * (len(ids) - len(labels))
        scores.append(weight * ctc_score + (1 - weight) * llm_score)
    return candidates[max(range(len(scores)), key=scores.__getitem__)]


def align(log_probs, text, listener):
    """Word times of `text` by CTC: [(word, start_s, end_s)]; [] where the CTC head cannot place the text.

    It cannot if a token is not in the head's vocabulary, or if there are more tokens than positions.
    """
    if listener.nano is not None:
        ids = classes = listener.ctc_tokenizer.encode(text)
        decode = listener.ctc_tokenizer.decode
        if decode(classes) != text:  # characters or words that training never had
            return []
    else:
        ids, decode = model.text_to_ids(listener.tokenizer, text), listener.tokenizer.decode
        classes = listener.ctc.classes(ids)
    if not ids or len(classes) < len(ids) or model.ctc_min_frames(classes) > len(log_probs):
        return []
    spans = model.ctc_align(log_probs, classes, listener.ctc.blank)
    pieces, known = [], ""
    for count in range(1, len(ids) + 1):  # a rare character is several tokens: its text stands at the last of them
        so_far = decode(ids[:count]).rstrip("\ufffd")
        pieces.append(so_far[len(known) :])
        known = so_far
    words = model.word_times(spans, pieces, listener.position_s)
    return words if "".join(word for word, _, _ in words) == "".join(text.split()) else []


@contextlib.contextmanager
def without_lora(llm):
    """The LLM as it was released: LoRA was trained to transcribe, not to translate."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in llm.modules() if isinstance(part, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def translate(segments, language, listener, batch_size=16):
    """Put `translation` into every segment: chat turn `Translate to LANGUAGE: TEXT`, thinking off, greedy."""
    waiting = sorted((s for s in segments if s["text"]), key=lambda s: -len(s["text"]))
    for segment in segments:
        segment["translation"] = ""
    with without_lora(listener.llm), autocast(listener.device, listener.dtype):
        for start in tqdm(range(0, len(waiting), batch_size), unit="batch", desc="translating", disable=None):
            batch = waiting[start : start + batch_size]
            prompts = [model.build_prompt(listener.tokenizer, f"Translate to {language}: {s['text']}") for s in batch]
            nothing = torch.zeros(len(batch), 1, listener.llm.config.hidden_size, device=listener.device)
            spliced = model.splice(listener.llm.get_input_embeddings(), prompts, nothing,
                                   torch.zeros(len(batch), dtype=torch.long), pad_left=True)
            caps = [16 + 4 * len(model.text_to_ids(listener.tokenizer, s["text"])) for s in batch]
            answers, _ = model.greedy_decode(listener.llm, spliced, listener.stop_id, caps)
            for segment, answer in zip(batch, answers):
                segment["translation"] = listener.tokenizer.decode(answer, skip_special_tokens=True).strip()


# ---- results ----------------------------------------------------------------------------------------------------


def join_texts(texts):
    """Texts of neighbouring segments in one line: a space between, but none between two Chinese characters."""
    joined = ""
    for text in filter(None, texts):
        gap = " " if joined and not (model.is_cjk(joined[-1]) and model.is_cjk(text[0])) else ""
        joined += gap + text
    return joined


def make_result(row, clip, cfg):
    """One line of .jsonl; what a segment has beside its text moves up, joined."""
    result = {"key": row["key"], "source": row["source"], "duration_s": round(clip["duration_s"], 3)}
    if "speech_of" in row:
        result["speech_of"] = row["speech_of"]
    result["text"] = join_texts(segment["text"] for segment in clip["segments"])
    for name in ("translation", "ctc_text", "encoder_ctc_text"):
        if any(name in segment for segment in clip["segments"]):
            result[name] = join_texts(segment.pop(name, "") for segment in clip["segments"])
    if cfg["score"] and row.get("target", "").strip():
        counts = model.error_rate([row["target"]], [result["text"]])
        result |= {"target": row["target"], "errors": {k: v for k, v in counts.items() if k != "rate"}}
    return result | {"segments": clip["segments"]}


def summarise(results, bad, seconds, device):
    """Counts, error rates of every kind of transcript, speed. A rate is None where nothing could be scored."""
    audio_s = sum(result["duration_s"] for result in results)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of this process; Linux counts in KiB
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else memory
    summary = {"n_clips": len(results), "n_bad": len(bad), "hours": audio_s / 3600, "seconds": round(seconds, 3),
               "rtf": seconds / audio_s if audio_s else None, "audio_s_per_s": audio_s / seconds,
               "peak_memory_gib": memory / 2**30}
    scored = [result for result in results if "target" in result]
    for kind, prefix in KINDS.items():
        if kind != "text" and not any(kind in result for result in scored):
            continue
        pairs = [r["target"] for r in scored], [r.get(kind, "") for r in scored]
        raw, counts = model.error_rate(*pairs, normalize=False), model.error_rate(*pairs)
        for name, rate in (("error_rate", counts["rate"]), ("error_rate_raw", raw["rate"])):
            summary[prefix + name] = rate if scored and math.isfinite(rate) else None
        summary |= {f"{prefix}{name}": counts[name] for name in EDITS}
        summary["n_units"], summary["n_scored"] = counts["units"], len(scored)
    return summary


def print_summary(summary, readout="llm"):
    rtf = "" if summary["rtf"] is None else f"RTF {summary['rtf']:.4f}, "
    print(f"{summary['n_clips']} clips, {summary['hours']:.3f} h, {summary['n_bad']} left out | "
          f"{summary['seconds']:.1f} s, {rtf}{summary['audio_s_per_s']:.1f} audio s per s, "
          f"peak memory {summary['peak_memory_gib']:.2f} GiB")
    names = {"text": readout.upper(), "ctc_text": "CTC read-out", "encoder_ctc_text": "the encoder's own CTC"}
    for kind, prefix in KINDS.items():
        if summary.get(f"{prefix}error_rate") is not None:
            counts = ", ".join(f"{summary[prefix + name]} {name}" for name in EDITS)
            print(f"{names[kind]}: error rate {100 * summary[f'{prefix}error_rate_raw']:.2f} % raw "
                  f"({100 * summary[f'{prefix}error_rate']:.2f} % normalised): {counts} "
                  f"in {summary['n_units']} units of {summary['n_scored']} clips")


def text_lines(results):
    for result in results:
        fields = [result["key"], result["text"], *([result["translation"]] if "translation" in result else [])]
        yield "\t".join(" ".join(field.split()) for field in fields)


# ---- subtitles --------------------------------------------------------------------------------------------------


def cues(result):
    """Subtitles of one clip: [(start_s, end_s, text)], by words where their times are known, else by segments."""
    found = []
    for segment in result["segments"]:
        text, at, cue = segment["text"], 0, None  # cue: [start_s, end_s, first character, last character]
        for word in segment.get("words", []):
            first = text.index(word["word"], at)
            at = first + len(word["word"])
            if cue and (word["end"] - cue[0] > CUE_S or at - cue[2] > CUE_CHARS):
                found.append((cue[0], cue[1], text[cue[2] : cue[3]]))
                cue = None
            cue = [cue[0] if cue else word["start"], word["end"], cue[2] if cue else first, at]
        if cue:
            found.append((cue[0], cue[1], text[cue[2] :]))
        elif text:
            found.append((segment["start"], segment["end"], text))
    nexts = [start for start, _, _ in found[1:]] + [result["duration_s"]]
    return [(start, max(end, min(end + HOLD_S, limit)), text) for (start, end, text), limit in zip(found, nexts)]


def srt_time(seconds):
    total_ms = round(seconds * 1000)
    return f"{total_ms // 3600000:02d}:{total_ms // 60000 % 60:02d}:{total_ms // 1000 % 60:02d},{total_ms % 1000:03d}"


def srt_text(result):
    blocks = (f"{n}\n{srt_time(start)} --> {srt_time(end)}\n" + "\n".join(textwrap.wrap(text, LINE_CHARS)) + "\n"
              for n, (start, end, text) in enumerate(cues(result), start=1))
    return "\n".join(blocks)


# ---- page -------------------------------------------------------------------------------------------------------

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>earshot: transcripts</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 56rem; padding: 0 .8rem 3rem; color: #1b1f24 }
article { border-top: 1px solid #d0d7de; padding: .7rem 0 } audio { width: 100%; height: 2.2rem; margin-top: .3rem }
p { margin: .15rem 0; overflow-wrap: anywhere } h2 { font-size: 1rem; margin: 0 } small, .name { color: #59636e }
.name { display: inline-block; min-width: 6.5rem } del { background: #ffd7d5; text-decoration: none }
ins { background: #ccf2d5; text-decoration: none } table { border-collapse: collapse }
td, th { padding: .1rem .9rem .1rem 0; text-align: left } input[type=search] { font-size: 1rem; width: 60% }
</style></head><body>
<h1>Transcripts</h1>
@SUMMARY@
<p><input type="search" id="find" placeholder="find text or key"> <label><input type="checkbox" id="wrong"> errors only
</label></p>
<p><small>Worst first. Reference: <del>missed or replaced</del>; LLM: <ins>wrong or added</ins>.</small></p>
@CLIPS@
<script>
const find = document.getElementById("find"), wrong = document.getElementById("wrong");
function filter() {
  for (const clip of document.querySelectorAll("article"))
    clip.hidden = wrong.checked && clip.dataset.errors === "0" ||
      !clip.textContent.toLowerCase().includes(find.value.toLowerCase());
}
find.oninput = wrong.onchange = filter;
</script></body></html>
"""


def mark_errors(reference, hypothesis):
    """Both texts as HTML, in the units that are scored, with what differs marked: (reference, hypothesis)."""
    reference, hypothesis = model.normalize_text(reference), model.normalize_text(hypothesis)
    language = "zh" if any(map(model.is_cjk, reference)) else "en"  # as model.error_rate decides
    said, heard = model.score_units(reference, language), model.score_units(hypothesis, language)
    lines, gap = ([], []), "" if language == "zh" else " "
    for step in Levenshtein.opcodes(said, heard):
        parts = (said[step.src_start : step.src_end], "del"), (heard[step.dest_start : step.dest_end], "ins")
        for line, (units, tag) in zip(lines, parts):
            text = html.escape(gap.join(units))
            if text:
                line.append(text if step.tag == "equal" else f"<{tag}>{text}</{tag}>")
    return tuple(gap.join(line) for line in lines)


def article(result, speech, folder):
    """One clip of the page."""
    errors = result.get("errors", {"errors": 0, "units": 0})
    count = f" · {errors['errors']} errors in {errors['units']}" if "errors" in result else ""
    count += f" · speech of {result['speech_of']}" if "speech_of" in result else ""
    lines = [("LLM", html.escape(result["text"]))]
    if "target" in result:
        lines = list(zip(("reference", "LLM"), mark_errors(result["target"], result["text"])))
    names = {"ctc_text": "CTC", "encoder_ctc_text": "encoder's CTC", "translation": "translation"}
    lines += [(name, html.escape(result[key])) for key, name in names.items() if key in result]
    source = html.escape(quote(os.path.relpath(speech, folder)))
    body = "\n".join(f'<p><span class="name">{name}</span> {text}</p>' for name, text in lines)
    return (f'<article data-errors="{errors["errors"]}"><h2>{html.escape(result["key"])} '
            f'<small>{result["duration_s"]:.1f} s{html.escape(count)}</small></h2>\n{body}\n'
            f'<audio controls preload="none" src="{source}"></audio></article>')


def html_page(results, speeches, summary, folder):
    """Self-contained page; only the players refer to files, by paths relative to the page's folder."""
    table = "<tr><th></th><th>error rate</th><th>substituted</th><th>deleted</th><th>inserted</th></tr>"
    for prefix, name in zip(KINDS.values(), ("LLM", "CTC", "encoder's CTC")):
        if summary.get(f"{prefix}error_rate") is not None:
            counts = "".join(f"<td>{summary[prefix + edit]}</td>" for edit in EDITS)
            table += f"<tr><td>{name}</td><td>{100 * summary[f'{prefix}error_rate']:.2f} %</td>{counts}</tr>"
    rtf = "" if summary["rtf"] is None else f", RTF {summary['rtf']:.3f}"
    about = (f"<p>{summary['n_clips']} clips, {3600 * summary['hours']:.0f} s of audio, {summary['n_bad']} left out"
             f"{rtf}; {summary['n_units']} words (Chinese: characters) scored in {summary['n_scored']} clips</p>")
    worst = sorted(range(len(results)), key=lambda i: -badness(results[i]))
    clips = "\n".join(article(results[i], speeches[i], folder) for i in worst)
    return PAGE.replace("@SUMMARY@", f"{about}\n<table>{table}</table>").replace("@CLIPS@", clips)


def badness(result):
    """Error rate of one clip, for sorting; clips that are not scored come last."""
    return result["errors"]["errors"] / max(1, result["errors"]["units"]) if "errors" in result else -1.0


# ---- the run ----------------------------------------------------------------------------------------------------


def write_outputs(outputs, results, speeches, summary, several):
    """Write each file of `out` by its ending, whole or not at all."""
    def write(path, text):
        write_atomic(path, lambda file: file.write(text.encode()))

    seen = set()
    for path in outputs:
        if path.suffix == ".txt":
            write(path, "".join(f"{line}\n" for line in text_lines(results)))
        elif path.suffix == ".jsonl":
            write(path, "".join(json.dumps(result, ensure_ascii=False) + "\n" for result in results))
        elif path.suffix == ".json":
            write(path, json.dumps(summary, indent=1) + "\n")
        elif path.suffix == ".html":
            write(path, html_page(results, speeches, summary, path.parent))
        else:
            for result in results:
                name = re.sub(r"[^\w.-]", "_", result["key"])  # keys of manifests may hold slashes
                name = unique(f"{path.stem}.{name}", seen) if several else path.stem
                write(path.with_name(f"{name}.srt"), srt_text(result))


def main(cfg):
    device, dtype = pick_device(cfg)
    torch.manual_seed(cfg["seed"])
    outputs = [Path(str(name)) for name in cfg["out"] if str(name)]
    if wrong := [path for path in outputs if path.suffix not in ENDINGS]:
        raise ValueError(f"out: {wrong[0]} ends in none of {', '.join(ENDINGS)}; the ending decides what is written")
    rows = list_rows(cfg["inputs"])
    if cfg["control.wrong_audio"]:
        rows = swap_speech(rows, cfg["seed"])
    listener = load_listener(cfg, device, dtype)
    for path in outputs:
        path.parent.mkdir(parents=True, exist_ok=True)
    if listener.llm is not None and cfg["compile"]:
        model.compile_layers(listener.llm.model.layers, device)
    if listener.llm is not None:
        before, after = make_prompt({}, "DRAFT" if listener.draft else None, listener, cfg)
        print(f"prompt: {listener.tokenizer.decode(before)!r} SPEECH {listener.tokenizer.decode(after)!r}")
    print(f"{len(rows)} clips | encoder {listener.settings['encoder.name']}, LLM {listener.settings['llm.name']}, "
          f"device {device}, {dtype}, torch {torch.__version__}, seed {cfg['seed']}", flush=True)
    started, clips, bad = time.time(), {}, []
    batches = read_batches(rows, listener.encoder, cfg, clips, bad)
    for index, number, segment in transcribe(batches, rows, listener, cfg):
        clips[index]["segments"][number] = segment
    seconds = time.time() - started
    if outputs:
        lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in bad]
        write_atomic(outputs[0].parent / "bad.jsonl", lambda file: file.writelines(lines))
    for row in bad[:5] if outputs else bad:
        print(f"left out: {row['key']}: {row['reason']}")
    if len(bad) > cfg["data.max_bad"]:
        raise ValueError(f"{len(bad)} clips cannot be used, more than data.max_bad={cfg['data.max_bad']}; "
                         f"the last is {bad[-1]['key']}: {bad[-1]['reason']}")
    if cfg["translate"]:
        translate([segment for clip in clips.values() for segment in clip["segments"]], cfg["translate"], listener)
    kept = sorted(clips)  # the order of the inputs
    results = [make_result(rows[index], clips[index], cfg) for index in kept]
    summary = summarise(results, bad, seconds, device)
    write_outputs(outputs, results, [rows[index]["speech"] for index in kept], summary, len(rows) > 1)
    if not outputs:
        print("\n".join(text_lines(results)))
    print_summary(summary, cfg["decode.readout"])
    return summary | {"results": results}


if __name__ == "__main__":
    sys.argv[1:] = split_arguments(sys.argv[1:])
    run_main(main, DEFAULTS, __doc__)
