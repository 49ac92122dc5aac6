"""Telephone dialogues in two channels for train_duplex.py: Flite asks, Asterisk's prompts answer.

    python demo/dialogues.py out=runs/demo [train=1100] [seed=0]     # after demo/assets.py

Output  out/dialogues/*.wav   the user at 16 kHz, the agent at 8 kHz
        out/dialogues/{train,strings,voice}.jsonl: dialogues; strings: digit strings that training
        never says; voice: such strings, in a voice that it has never heard
        out/models/codec2/libcodec2.so.1.0 (Debian, LGPL-2.1); out/models/speech_embedding (Google,
        see LICENCE); out/models/words: a small Llama with random weights, a tokenizer of the words
The user says digits, often with a word around them, or one of a few phrases; the agent answers
0.32 to 0.4 s later with real recordings (one woman's, CC-BY-SA-3.0): "you entered" and the digits,
or a prompt that belongs to the phrase. Some of its turns are interrupted; it then stops in 0.5 s.
"""

import functools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import soundfile
import torch
import torchaudio
import transformers
from tqdm import tqdm

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import assets  # noqa: E402  (needs the path above)

import model  # noqa: E402

DEFAULTS = """
out: runs/demo
train: 1100              # dialogues to learn from
test: 60                 # in each of the two sets held out
spoken: 2400             # different utterances of the user
seed: 0
"""
RATE, FRAME, USER_RATE = 8000, 640, 16000  # of the agent; samples of 80 ms; of the user
VOICES, UNSEEN = ("slt", "rms", "awb"), "kal16"
PHRASES = {  # what the user says: the prompt that answers
    "hello": "privacy-prompt", "thank you": "queue-thankyou", "goodbye": "vm-goodbye",
    "cancel that": "cancelled", "call someone": "pls-hold-while-try",
    "find the person": "followme_pls-hold-while-try", "wait a moment": "one-moment-please",
    "say it again": "please-try-again",
}  # fmt: skip
AROUND = ("{}", "{}", "extension {}", "option {}", "{} please", "it is {}", "dial {}")
HELD_OUT = 0.15  # of the strings of two and of three digits
ANSWER, STOP = 4, 5  # frames: the answer behind the user's end, silence behind a barge-in


LICENCE = """Google's speech_embedding, as the package openwakeword 0.4.0 carries it. Its README
gives Apache-2.0 for this model, and CC BY-NC-SA 4.0 for all models of the package, because of the
data of its wake words; of those none is used."""


def is_held_out(digits):
    return len(digits) > 1 and random.Random(f"string-{digits}").random() < HELD_OUT


def draw_digits(rng, held_out):
    while True:
        digits = "".join(rng.choices("0123456789", k=rng.choice((1, 2, 3, 3))))
        if is_held_out(digits) == held_out:
            return digits


def draw_request(rng, held_out):
    """What the user says, and the prompts that answer."""
    if rng.random() < 0.2:
        phrase = rng.choice([*PHRASES])
        return phrase, [PHRASES[phrase]]
    digits = draw_digits(rng, held_out)
    words = " ".join(assets.DIGITS[int(digit)] for digit in digits)
    return rng.choice(AROUND).format(words), ["you-entered", *(f"digits_{d}" for d in digits)]


def trimmed(wave):
    loud = np.flatnonzero(np.abs(wave) > 0.02 * np.abs(wave).max())
    return wave[max(0, loud[0] - 160) : loud[-1] + 160]


def speak(folder, usr, job, rng):
    """One utterance of Flite's: (N,) at 16 kHz, at a pace and pitch drawn for it."""
    number, text, voice = job
    path, library = folder / f"{number}.wav", next(usr.glob("lib/*/libflite.so.1")).parent
    command = [usr / "bin/flite", "-voice", voice, "-t", text, "-o", path]
    pitch = rng.uniform(0.85, 1.2)  # by playing faster: the voice's colour changes, too
    command += ["--setf", f"duration_stretch={pitch * rng.uniform(0.8, 1.25):.2f}"]
    subprocess.run(command, check=True, env=os.environ | {"LD_LIBRARY_PATH": str(library)})
    samples, rate = soundfile.read(path, dtype="float32")
    path.unlink()
    wave = model.resample(torch.from_numpy(samples), round(rate * pitch / 100) * 100, USER_RATE)
    for low, high in ((200, 1000), (1000, 3500)):  # another room, another telephone
        hz, db = math.exp(rng.uniform(math.log(low), math.log(high))), rng.uniform(-6, 6)
        wave = torchaudio.functional.equalizer_biquad(wave, USER_RATE, hz, db, 0.7)
    return trimmed(wave.numpy())


def place(channel, wave, first):
    end = first + len(wave)
    channel.resize(max(len(channel), end), refcheck=False)
    channel[first:end] += wave


def mix(requests, spoken, prompts, texts, rng):
    """A dialogue: the user's and the agent's channel, and turns."""
    user, agent, turns = np.zeros(0, np.float32), np.zeros(0, np.float32), []
    at = rng.randrange(2, 8) * FRAME + rng.randrange(FRAME)
    level, numbers = rng.uniform(0.2, 0.7), np.random.default_rng(rng.getrandbits(63))
    for n, (text, names) in enumerate(requests):
        wave = spoken[text]
        place(user, wave * (level * rng.uniform(0.8, 1.2) / np.abs(wave).max()), 2 * at)
        end = at + len(wave) // 2
        turns.append({"role": "user", "start": at / RATE, "end": end / RATE, "text": text})
        first = (-(-end // FRAME) + ANSWER) * FRAME
        sound = np.concatenate([prompts[name] for name in names])
        stop = first + len(sound)
        at = stop + rng.randrange(4, 14) * FRAME + rng.randrange(FRAME)
        if n + 1 < len(requests) and len(sound) > 16 * FRAME and rng.random() < 0.45:
            at = first + rng.randrange(6 * FRAME, len(sound) - 8 * FRAME)  # the user breaks in
            stop = (-(-at // FRAME) + STOP) * FRAME
            sound = sound[: stop - first].copy()
            sound[-160:] *= np.linspace(1, 0, 160, dtype=np.float32)
        place(agent, sound, first)
        said = " ".join(texts[name] for name in names)
        turns.append({"role": "agent", "start": first / RATE, "end": stop / RATE, "text": said})
    size = (max(len(user) // 2, len(agent)) // FRAME + 8) * FRAME
    user, agent = np.pad(user, (0, 2 * size - len(user))), np.pad(agent, (0, size - len(agent)))
    noise = numbers.standard_normal(2 * size).astype(np.float32) * 10 ** rng.uniform(-4, -2.2)
    return (user + noise).clip(-1, 1), agent, turns


def make_dialogues(work, out, cfg):
    rng, folder = random.Random(cfg.seed), work / "dialogues"
    folder.mkdir()
    usr = assets.fetch_debian(work, "flite", "libflite1")
    real = {row["key"]: row for row in assets.read_rows(out / "speech/real/manifest.jsonl")}
    names = [*PHRASES.values(), "you-entered", *(f"digits_{d}" for d in range(10))]
    prompts, texts = {}, {}
    for name in names:
        wave = trimmed(model.load_audio(real[name]["source"], RATE).numpy())
        prompts[name] = np.pad(wave, (0, -len(wave) % FRAME)) * 0.9 / np.abs(wave).max()
        texts[name] = model.normalize_text(real[name]["target"])
    jobs = [(draw_request(rng, False), rng.choice(VOICES)) for _ in range(cfg.spoken)]
    sets = {"train": jobs}
    for name, voices in (("strings", VOICES), ("voice", (UNSEEN,))):
        sets[name] = [(draw_request(rng, True), rng.choice(voices)) for _ in range(3 * cfg.test)]
    for name, jobs in sets.items():
        numbered = [(number, text, voice) for number, ((text, _), voice) in enumerate(jobs)]
        draws = [random.Random(f"{cfg.seed}{name}{number}") for number in range(len(jobs))]
        with ThreadPoolExecutor(2) as pool:
            waves = pool.map(functools.partial(speak, folder, usr), numbered, draws)
            waves = list(tqdm(waves, total=len(jobs), unit="utterance", disable=None))
        pool, rows = [(*request, w) for (request, _), w in zip(jobs, waves, strict=True)], []
        for n in range(cfg.train if name == "train" else cfg.test):
            chosen = (
                rng.sample(pool, rng.randint(2, 3))
                if name == "train"
                else pool[3 * n :][: rng.randint(2, 3)]
            )
            spoken = {text: wave for text, _, wave in chosen}
            requests = [(text, answer) for text, answer, _ in chosen]
            user, agent, turns = mix(requests, spoken, prompts, texts, rng)
            key = f"{name}-{n:04d}"
            for side, wave, rate in (("user", user, USER_RATE), ("agent", agent, RATE)):
                soundfile.write(folder / f"{key}-{side}.wav", wave, rate)
            rows.append({"key": key, "user_audio": f"{key}-user.wav",
                         "agent_audio": f"{key}-agent.wav", "turns": turns})  # fmt: skip
        model.save(folder / f"{name}.jsonl", rows)


def make_codec2(work):
    usr = assets.fetch_debian(work, "libcodec2-1.0")
    (work / "codec2").mkdir()
    shutil.copy(next(usr.glob("lib/*/libcodec2.so.1.0")), work / "codec2/libcodec2.so.1.0")


def read_onnx(path):
    """{name: array} of the initializers of an ONNX file: protobuf, read by hand."""

    def fields(data):
        at = 0
        while at < len(data):
            key, at = varint(data, at)
            if key & 7 == 2:
                size, at = varint(data, at)
                yield key >> 3, data[at : at + size]
                at += size
            elif key & 7 == 0:
                value, at = varint(data, at)
                yield key >> 3, value
            else:
                at += {1: 8, 5: 4}[key & 7]

    def varint(data, at):
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value, at

    found = {}
    graph = next(value for number, value in fields(path.read_bytes()) if number == 7)
    for tensor in (list(fields(value)) for number, value in fields(graph) if number == 5):
        shape = [value for number, value in tensor if number == 1]
        raw = next((value for number, value in tensor if number == 9), b"")
        name = next(value for number, value in tensor if number == 8).decode()
        if len(raw) == 4 * math.prod(shape):
            found[name] = np.frombuffer(raw, np.float32).reshape(shape)
    return found


def make_embedding(work):
    """Google's speech_embedding out of openWakeWord's wheel, for model.SpeechEmbedding."""
    print(LICENCE)
    assets.fetch_wheel("openwakeword==0.4.0", work)
    source, folder = work / "openwakeword/resources/models", work / "speech_embedding"
    folder.mkdir()
    mel, net = (
        read_onnx(source / f"{name}.onnx") for name in ("melspectrogram", "embedding_model")
    )
    weights = {"window": mel["0.stft.conv_real.weight"][0, 0], "bank": mel["1.melW"]}
    kernels = [(name, value) for name, value in net.items() if value.ndim == 4 and value.size > 1]
    numbers = {name: int(re.search(r"conv2d(?:_(\d+))?", name)[1] or 0) for name, _ in kernels}
    for name, value in sorted(kernels, key=lambda pair: numbers[pair[0]]):
        bias = net.get(name.replace("weights_fused", "bias_fused"), value)  # two have none
        bias = bias if bias.ndim == 1 else np.zeros(len(value), np.float32)
        weights |= {f"{numbers[name]}.weight": value, f"{numbers[name]}.bias": bias}
    names = ("ReadVariableOp", "ReadVariableOp_1", "FusedBatchNormV3/ReadVariableOp",
             "FusedBatchNormV3/ReadVariableOp_1")  # fmt: skip
    for ours, theirs in zip(("weight", "bias", "running_mean", "running_var"), names, strict=True):
        weights[f"norm.{ours}"] = net[f"model/batch_normalization/{theirs}:0"]
    weights = {name: torch.from_numpy(value.copy()) for name, value in weights.items()}
    weights["norm.num_batches_tracked"] = torch.tensor(0)
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    model.save(folder / "speech_embedding.json", {"licence": LICENCE})


def make_words(work, out):
    """A Llama of 3 million random weights, and a tokenizer of whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    rows = [json.loads(line) for line in open(out / "dialogues/train.jsonl", encoding="utf-8")]
    words = sorted({word for row in rows for t in row["turns"] for word in t["text"].split()})
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    vocab = {word: n for n, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = zip(("pad_token", "bos_token", "eos_token", "unk_token"), special, strict=True)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(names))
    fast.save_pretrained(work / "words")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=256, intermediate_size=768, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(work / "words")


def main(cfg):
    out = Path(cfg.out)
    assets.make(out / "dialogues", make_dialogues, out, cfg)
    assets.make(out / "models/codec2", make_codec2)
    assets.make(out / "models/words", make_words, out)
    assets.make(out / "models/speech_embedding", make_embedding)


if __name__ == "__main__":
    model.run_main(main, DEFAULTS, __doc__)
