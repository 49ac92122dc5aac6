"""The scripts on real weights and real telephone speech, on two CPU cores and without a GPU.

    python demo/run.py adaptor        # make demo: precompute, phase 1, phase 2, infer; 20 minutes
    python demo/run.py telephone      # make demo-telephone: finetune_encoder.py
    python demo/run.py steermoe       # make demo-steermoe: train_steermoe.py
    python demo/run.py salm           # make demo-salm: train_salm.py
    python demo/run.py duplex         # make demo-duplex: train_duplex.py
    python demo/run.py adaptor seed=1 run=runs/demo/seed1     # another seed of both trainings
    python demo/run.py adaptor quick=true                     # checks that it runs, learns little

Every stage is a command that you could type; what has finished before is not run again.
Output  home/results.json, home/plots/*.png, home/transcripts.html; run/*
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)
import numpy as np  # noqa: E402
import soundfile  # noqa: E402

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import model  # noqa: E402  (needs the path above)

DEFAULTS = """
home: runs/demo          # what demo/assets.py makes; with quick=true runs/demo/quick
run: ""                  # this run's folder; empty: home/run
speech: ""               # manifest.jsonl of your own in place of Debian's prompts
seed: 0
quick: false
"""


# ---- stages -----------------------------------------------------------------


def run_stage(cfg, name, script, arguments, done):
    """Run a script unless it has finished before; run/seconds.json keeps what each stage took."""
    record = Path(cfg.run) / "seconds.json"
    seconds = json.loads(record.read_text()) if record.is_file() else {}
    if name in seconds and Path(done).exists():
        print(f"== {name}: {done} is there already")
        return
    print(f"== {name}: python {script}", *arguments, flush=True)
    # glibc would give large blocks back to the system at every free, and take them again
    keep = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    keep |= {"OMP_WAIT_POLICY": "PASSIVE"}  # threads that spin would starve beside another job
    started = time.time()
    command = [sys.executable, ROOT / script, *map(str, arguments)]
    if subprocess.run(command, env=os.environ | keep).returncode:
        raise model.UserError(
            f"{script} failed; mend what it says and start again: the rest is kept"
        )
    seconds[name] = round(time.time() - started, 1)
    model.save(record, seconds)


def prepare(cfg, what):
    """Folders, weights and speech; overrides that put the demo's configurations elsewhere."""
    cfg.home = f"{cfg.home}/quick" if cfg.quick else cfg.home
    cfg.run = cfg.run or f"{cfg.home}/{what}"
    made_with = {"speech": cfg.speech, "seed": cfg.seed, "quick": cfg.quick}
    mark = Path(cfg.run) / "made_with.json"
    mark.parent.mkdir(parents=True, exist_ok=True)
    if mark.is_file() and json.loads(mark.read_text()) != made_with:
        raise model.UserError(f"{cfg.run}: was made with {mark.read_text()}; give another run=")
    model.save(mark, made_with)
    data = [f"out={cfg.home}", f"speech={cfg.speech}", *(["synthetic=60"] if cfg.quick else [])]
    run_stage(cfg, "data", "demo/assets.py", data, f"{cfg.home}/data/train_synthetic.jsonl")


def config_of(cfg, name):
    """demo/configs/NAME.yaml with this demo's folder in place of runs/demo."""
    text = (ROOT / "demo/configs" / f"{name}.yaml").read_text(encoding="utf-8")
    path = Path(cfg.run) / f"{name}.yaml"
    parts = text.split("runs/demo/salm/")  # what this run has written itself
    parts = [part.replace("runs/demo/", f"{cfg.home}/") for part in parts]
    model.save(path, f"{cfg.run}/".join(parts))
    return str(path)


def transcribe(cfg, name, folder, inputs, *arguments):
    """infer.py over manifests. Output: lines of its .jsonl."""
    out = Path(cfg.run) / f"{name}.jsonl"
    arguments = [config_of(cfg, "infer"), f"model.dir={folder}", f"out={out}", *arguments, inputs]
    run_stage(cfg, f"infer {name}", "infer.py", arguments, out)
    return read_rows(out)


def rate(lines, kind="text"):
    """WER, its standard error (1000 resamplings of clips), and WER by the field's normaliser."""
    from transformers.models.whisper.english_normalizer import EnglishTextNormalizer

    pairs, rng = [(line["target"], line[kind]) for line in lines], random.Random(0)
    each = [model.error_rate([target], [text]) for target, text in pairs]
    found = []
    for _ in range(1000):
        part = rng.choices(each, k=len(each))
        found.append(sum(x["errors"] for x in part) / max(1, sum(x["units"] for x in part)))
    field = model.error_rate(*zip(*pairs, strict=True), EnglishTextNormalizer({}))["rate"]
    total = sum(x["errors"] for x in each) / sum(x["units"] for x in each)
    return {"wer": total, "se": float(np.std(found)), "wer_field": field}


def read_rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def finish(cfg, folder, table, formats, more, **kept):
    """results.json, with what else is `kept`, and the last screen. formats: {column: how its
    numbers are written}."""
    seconds = json.loads(Path(cfg.run, "seconds.json").read_text())
    about = {"seed": cfg.seed, "seconds": seconds} | more
    model.save(Path(folder) / "results.json", about | {"rows": table} | kept)
    print(f"\n{'':44}" + "".join(f"{name:>18}" for name in formats))
    for label, row in table.items():
        print(f"{label:44}" + "".join(f"{f.format(row[k]):>18}" for k, f in formats.items()))
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    print(f"{', '.join(f'{value} {name}' for name, value in more.items())}, seed {cfg.seed}")
    print(f"{sum(seconds.values()) / 60:.1f} minutes (seconds: {parts})")
    print(f"{folder}/results.json", *sorted(map(str, Path(folder).glob("*.html"))), end=" ")
    print(*sorted(map(str, Path(folder).glob("**/plots/*.png"))))


# ---- adaptor: precompute, phase 1, phase 2, infer ---------------------------


def adaptor(cfg):
    print(
        "Whisper tiny.en's encoder, an adaptor and SmolLM2-135M learn to hear telephone prompts:\n"
        "weights and speech (2 minutes, 200 MB), encoder outputs (2), phase 1 (6), phase 2 (2), "
        "transcripts (3).\nAbout 15 minutes on 2 free cores."
    )
    prepare(cfg, "run")
    run, data, quick = Path(cfg.run), f"{cfg.home}/data", cfg.quick
    test, other = f"{data}/test.jsonl", f"{data}/other.jsonl" if not cfg.speech else ""
    arguments = [config_of(cfg, "precompute"), f"data.test={test},{other}"]
    run_stage(cfg, "precompute", "precompute.py", arguments, f"{cfg.home}/cache/dropped.jsonl")
    short = ["optim.max_steps=60", "run.valid_every=30"] if quick else []
    train(cfg, "phase1", "train_phase1.py", short)
    short = ["optim.max_steps=4", "run.valid_clips=8", "optim.warmup_steps=1"] if quick else []
    train(cfg, "phase2", "train_phase2.py", [f"init.dir={run}/phase1", *short])

    phase2, alone = run / "phase2", "decode.ctc_weight=0"
    lines = transcribe(cfg, "test", phase2, test)
    wrong = [alone, "control.wrong_audio=true"]
    model.save(run / "train_part.jsonl", read_rows(f"{data}/train_real.jsonl")[::11][:40])
    table = {
        "Whisper tiny.en, its own decoder": rate(whisper_decoder(cfg, lines)),
        "CTC read-out of the adaptor, no LLM": rate(lines, "ctc_text"),
        "SmolLM2 with LoRA and CTC, together": rate(lines),
        "SmolLM2 alone, without CTC's text": rate(transcribe(cfg, "alone", phase2, test, alone)),
        "  with another clip's speech": rate(transcribe(cfg, "wrong", phase2, test, *wrong)),
        "together, 40 clips of training": rate(
            transcribe(cfg, "train", phase2, run / "train_part.jsonl")
        ),
    }
    if other:
        table["together, 10 clips of other speakers"] = rate(
            transcribe(cfg, "other", phase2, other)
        )
    page = [run / "test.jsonl", f"{cfg.home}/transcripts.html"]
    subprocess.run([sys.executable, ROOT / "report.py", *page], check=True)
    plots = Path(cfg.home) / "plots"
    plots.mkdir(exist_ok=True)
    plot_curves({"phase 1": run / "phase1", "phase 2": phase2}, plots / "curves.png")
    plot_words(
        max(lines, key=lambda x: x["duration_s"] * (x["duration_s"] < 6)), plots / "words.png"
    )
    words = sum(len(model.normalize_text(line["target"]).split()) for line in lines)
    more = {"clips": len(lines), "words": words}
    finish(cfg, cfg.home, table, dict.fromkeys(("wer", "se", "wer_field"), "{:.1%}"), more)


def train(cfg, name, script, arguments):
    """A training run; an interrupted one goes on where it was saved."""
    folder = Path(cfg.run) / name
    own = [f"run.dir={folder}", f"seed={cfg.seed}", "run.resume=true"]
    run_stage(cfg, name, script, [config_of(cfg, name), *own, *arguments], folder / "last.pt")


def whisper_decoder(cfg, lines):
    """What Whisper's own decoder writes: greedy, in batches, 30 s padding as it was trained."""
    path = Path(cfg.run) / "whisper.jsonl"
    if not path.is_file():
        import torch
        from transformers import WhisperForConditionalGeneration, WhisperProcessor

        name, found = f"{cfg.home}/models/whisper-tiny.en", []
        whisper = WhisperForConditionalGeneration.from_pretrained(name).eval()
        processor = WhisperProcessor.from_pretrained(name)
        for start in range(0, len(lines), 16):
            batch = lines[start : start + 16]
            waves = [model.load_audio(line["source"], 16000).numpy() for line in batch]
            feats = processor(waves, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                ids = whisper.generate(feats, max_new_tokens=100, do_sample=False, num_beams=1)
            texts = processor.batch_decode(ids, skip_special_tokens=True)
            found += [line | {"text": text} for line, text in zip(batch, texts, strict=True)]
        model.save(path, found)
    return read_rows(path)


# ---- telephone: finetune_encoder.py -----------------------------------------

AUGMENT = ["specaug=SpecAugLFR", "telephone_conf.prob=0.5", "telephone_conf.packet_loss_prob=0.3",
           "telephone_conf.silence_share=0.1", "dataset_conf.speed_perturb=0.9,1,1.1"]  # fmt: skip
SILENT, SHOWN = (f"{name}, words a minute, LLM" for name in (
    "silence", "silence with hotwords shown"))  # fmt: skip
FOUND, MADE_UP = "said hotwords found, among {} others, share", (
    "hotwords written that nobody said, {} others")  # fmt: skip


def telephone(cfg):
    print(
        "Telephone speech: what make demo made learns silence and hotwords through SmolLM2; then "
        "Whisper tiny.en's\nencoder with a CTC head over characters learns to hear calls, without "
        "and with augmentation.\nAbout 15 minutes on 2 free cores after make demo."
    )
    prepare(cfg, "telephone")
    base = Path(cfg.home, "run/phase2")
    if not (base / "config.json").is_file():
        raise model.UserError(f"{base}: not there; run make demo first, it trains this model")
    through_llm = silence_and_hotwords(cfg, base)
    run, data = Path(cfg.run), f"{cfg.home}/data"
    synthetic = read_rows(f"{data}/train_synthetic.jsonl")
    model.save(run / "train_synthetic.jsonl", synthetic[:-100])
    model.save(run / "held_out.jsonl", synthetic[-100:])
    sets = {"held-out texts": f"{data}/test.jsonl", "synthetic": run / "held_out.jsonl"}
    sets |= {} if cfg.speech else {"other speakers": f"{data}/other.jsonl"}
    real = f"{data}/train_real.jsonl"
    common = [f"train_data_set_list={real},{real},{run}/train_synthetic.jsonl", f"seed={cfg.seed}"]
    rows = {"top": ("CTC: the head and three upper blocks", []),
            "augmented": ("and SpecAug, line, speed, silence", AUGMENT)}  # fmt: skip
    table = {}
    for name, (label, arguments) in rows.items():
        folder, table[label] = finetune(cfg, name, 200, [*common, *arguments]), {}
        for column, manifest in sets.items():
            stage = f"{name} {column}".replace(" ", "_")
            lines = transcribe(cfg, stage, folder, manifest, "decode.ctc_weight=0")
            table[label][column] = rate(lines)["wer"]
        told = json.loads(Path(folder, "results.json").read_text())["details"]["after"]
        table[label]["words/min silence"] = told["silence, words a minute, CTC"]
    print_wanted(through_llm)
    more = {f"clips of {name}": len(read_rows(manifest)) for name, manifest in sets.items()}
    formats = dict.fromkeys(sets, "{:.1%}") | {"words/min silence": "{:.1f}"}
    finish(cfg, run, table, formats, more, through_llm=through_llm)


def finetune(cfg, name, steps, arguments, config="telephone"):
    folder = f"{cfg.run}/{name}"
    steps = 4 if cfg.quick else steps
    own = [f"output_dir={folder}", f"train_conf.max_steps={steps}"]
    arguments = [config_of(cfg, config), *arguments, *own]
    run_stage(cfg, name, "finetune_encoder.py", arguments, f"{folder}/results.json")
    return folder


def with_hotwords(rows, share, seed):
    """A word of 4 letters or more of the transcript as hotword, in a share of the rows."""
    rng = random.Random(seed)
    for row in rows:
        words = [w for w in model.normalize_text(row["target"]).split() if len(w) >= 4]
        if words and rng.random() < share:
            row["hotwords"] = rng.choice(words)
    return rows


def silence_and_hotwords(cfg, base):
    """phase 2's model before and after a training on silence and distractors:
    {label: (before, after, wanted, whether it is met)}."""
    run, data = Path(cfg.run), f"{cfg.home}/data"
    synthetic = read_rows(f"{data}/train_synthetic.jsonl")[:500]
    rows = with_hotwords(read_rows(f"{data}/train_real.jsonl") + synthetic, 0.5, cfg.seed)
    model.save(run / "llm_train.jsonl", rows)
    test = with_hotwords(read_rows(f"{data}/test.jsonl"), 0.4, 0)
    model.save(run / "llm_test.jsonl", test)
    lists = [f"train_data_set_list={run}/llm_train.jsonl", f"init_param={base}",
             f"valid_data_set_list={run}/llm_test.jsonl", f"seed={cfg.seed}"]  # fmt: skip
    folder = finetune(cfg, "llm", 50, lists, "telephone_llm")
    told = json.loads(Path(folder, "results.json").read_text())["details"]
    before, after = told["before"], told["after"]
    found = {}
    for label, key, most, wanted in (
        ("WER, held-out texts, LLM", "telephone, LLM", lambda x: x + 0.01, "+ 1 point"),
        ("WER, held-out texts, CTC", "telephone, CTC", lambda x: x + 0.01, "+ 1 point"),
        ("words a minute of silence", SILENT, None, ""),
        ("the same with hotwords shown", SHOWN, lambda x: 1.0, "1 at most"),
        *((f"hotword recall, {n} distractors", FOUND.format(n), None, "") for n in (0, 10, 100)),
        *((f"false insertions, {n}", MADE_UP.format(n), None, "") for n in (0, 10)),
        ("false insertions, 100", MADE_UP.format(100), lambda x: x / 2, "half at most"),
    ):
        pair = [x["rate"] if isinstance(x, dict) else x for x in (before[key], after[key])]
        found[label] = (*pair, wanted, most is None or pair[1] <= most(pair[0]))
    for label in (label for label in found if "recall" in label):
        old, new, *_ = found[label]
        found[label] = old, new, "- 3 points", new >= old - 0.03
    if not cfg.speech:
        runs = ("before", base), ("after", folder)
        rest = f"{data}/other.jsonl", "decode.ctc_weight=0"
        pair = [rate(transcribe(cfg, f"other_{name}", path, *rest))["wer"] for name, path in runs]
        found["WER, other speakers, LLM"] = *pair, "+ 1 point", pair[1] <= pair[0] + 0.01
    return found | gate(cfg, base, folder)


def gate(cfg, base, folder):
    """Words a minute of infer.py, hotwords shown, in recordings of silence; without and with
    vad.gate."""
    import finetune_encoder

    run, rng, rows, found = Path(cfg.run), random.Random(cfg.seed), [], {}
    (run / "silence").mkdir(exist_ok=True)
    for n in range(40):
        path, seconds = run / f"silence/{n:02}.wav", math.exp(rng.uniform(-1.6, 3.0))
        wave = finetune_encoder.make_silence(seconds, rng)
        soundfile.write(path, wave.clamp(-1, 1).numpy(), 8000)
        rows.append({"key": f"silence-{n}", "source": str(path.resolve()), "target": ""})
    model.save(run / "silence.jsonl", rows)
    words = sorted({w for row in read_rows(run / "llm_test.jsonl")
                    for w in [row.get("hotwords")] if w})[::3][:10]  # fmt: skip
    rest = run / "silence.jsonl", "decode.ctc_weight=0", f"hotwords={', '.join(words)}"
    for gated in (False, True):
        pair = []
        for name, path in (("before", base), ("after", folder)):
            stage = f"silence_{name}{'_gate' * gated}"
            lines = transcribe(cfg, stage, path, *rest, f"vad.gate={str(gated).lower()}")
            said = sum(len(model.normalize_text(line["text"]).split()) for line in lines)
            pair.append(said / sum(line["duration_s"] for line in lines) * 60)
        label = f"infer.py, words a minute, {'vad.gate' if gated else 'no gate'}"
        found[label] = *pair, "", True
    return found


def print_wanted(found):
    """Before and after, and whether what is wanted is met."""
    print(f"\n{'through SmolLM2':44}{'before':>10}{'after':>10}   wanted")
    for label, (*pair, wanted, met) in found.items():
        form = "{:.1%}" if "WER" in label or "recall" in label else "{:.3g}"
        verdict = f"{wanted}: {'met' if met else 'missed'}" if wanted else ""
        print(f"{label:44}" + "".join(f"{form.format(x):>10}" for x in pair) + f"   {verdict}")


# ---- steermoe: train_steermoe.py --------------------------------------------


def steermoe(cfg):
    print(
        "Frozen Whisper tiny.en and frozen SmolLM2-135M, joined by steering, by one Linear, and by "
        "stacked frames:\n16 clips by heart, then the training prompts, then held-out clips. About "
        "12 minutes on 2 free cores after make demo."
    )
    prepare(cfg, "steermoe")
    run, data, sixteen = Path(cfg.run), f"{cfg.home}/data", {}
    for row in read_rows(f"{data}/train_real.jsonl"):
        text = model.normalize_text(row["target"])
        if " " in text and 0.8 < model.audio_seconds(row["source"]) < 2.2 and len(sixteen) < 16:
            sixteen.setdefault(text, row)
    model.save(run / "sixteen.jsonl", sixteen.values())
    by_heart = [f"parquet_dirs={run}/sixteen.jsonl", f"eval_dirs={run}/sixteen.jsonl",
                "max_steps=40", "log_steering_analysis=false"]  # fmt: skip
    kinds = {"steering": [], "linear": ["steering=null"]}
    kinds["stack"] = ["steering=null", "adaptor=stack", "pooling_kernel_size=1"]
    table = {}
    for name, kind in kinds.items():
        known = bridge(cfg, f"{name}_sixteen", name + "_sixteen", "steermoe.pt", kind, by_heart)
        own = [f"parquet_dirs={data}/train_real.jsonl"]
        trained = bridge(cfg, name, name, "steermoe.pt", kind, own)
        own = ["mode=test", f"parquet_dirs={data}/test.jsonl"]
        bridge(cfg, f"{name} test", name, "test.json", kind, own)
        scores = json.loads((trained / "test.json").read_text())
        numbers = sum(w.numel() for w in model.read_weights(trained / "steermoe.pt").values())
        table[name] = {
            "trained": numbers, "WER of 16": last(known, "wer"), "train loss": last(trained, "ce"),
            "loss": scores["eval_ce"], "WER": scores["wer"], "token accuracy": scores["eval_acc"],
        }  # fmt: skip
    formats = {"trained": "{:,}", "WER of 16": "{:.1%}", "train loss": "{:.2f}", "loss": "{:.2f}"}
    formats |= {"WER": "{:.1%}", "token accuracy": "{:.1%}"}
    finish(cfg, run, table, formats, {"held-out clips": scores["clips"]})


def last(folder, name):
    """The latest value under a name in a run's metrics."""
    return [row[name] for row in read_rows(folder / "metrics.jsonl") if name in row][-1]


def bridge(cfg, stage, folder, done, *arguments):
    folder = Path(cfg.run) / folder
    own = [f"training.output_dir={folder}", f"seed={cfg.seed}", "resume=true"]
    own += ["max_steps=4"] if cfg.quick else []
    arguments = [config_of(cfg, "steermoe"), *(x for part in arguments for x in part), *own]
    run_stage(cfg, stage, "train_steermoe.py", arguments, folder / done)
    return folder


# ---- salm: train_salm.py ----------------------------------------------------

TASKS = {  # what stands before, between and behind two recordings; how many to train on
    "both": ("Transcribe both. First:", "Second:", "", 400),
    "second": ("Transcribe only the second. First:", "Second:", "", 700),
    "says": ("First:", "Second:", 'Which one says "{quote}"?', 2200),
}


def ask(task, pair, number):
    """A conversation about two clips, in NeMo's form."""
    texts = [model.normalize_text(clip["target"]) for clip in pair]
    answers = {"both": f"first {texts[0]} second {texts[1]}", "second": texts[1]}
    answers["says"] = ("first", "second")[number % 2]
    words = [part.format(quote=texts[number % 2]) for part in TASKS[task][:3]]
    heard = [{"type": "audio", "value": clip["source"]} for clip in pair]
    before, between, after = ({"type": "text", "value": text} for text in words)
    turns = [before, heard[0], between, heard[1], *[after][: bool(words[2])]]
    turns = [{"from": "User"} | turn for turn in turns]
    turns.append({"from": "Assistant", "type": "text", "value": answers[task]})
    return {"id": f"{task}-{number}", "conversations": turns}


def write_conversations(cfg, run, data):
    """Pairs of training clips for all tasks, and single ones; pairs of the test's clips."""
    rng, real = random.Random(cfg.seed), read_rows(f"{data}/train_real.jsonl")
    rows = [*real * 3, *read_rows(f"{data}/train_synthetic.jsonl")]
    rows = [row | {"target": model.normalize_text(row["target"])} for row in rows]
    short = [row for row in rows if 0 < len(row["target"].split()) <= 8]
    train = [ask(task, rng.sample(short, 2), n) for task in TASKS for n in range(TASKS[task][3])]
    model.save(run / "train.jsonl", train)
    model.save(run / "single.jsonl", {row["key"]: row for row in rng.sample(rows, 500)}.values())
    asked = {row["key"]: row for row in rng.sample(short, 400)}
    model.save(run / "requests.jsonl", asked.values())
    test = read_rows(f"{data}/test.jsonl")
    rng.shuffle(test)
    turned = [*zip(test, test[1:] + test[:1], strict=True)]
    pairs = {"both": turned[::2], "second": turned}  # every clip once
    pairs["says"] = [rng.sample(test, 2) for _ in range(100)]
    for task, own in pairs.items():
        model.save(run / f"{task}.jsonl", [ask(task, pair, n) for n, pair in enumerate(own)])


def salm(cfg):
    print(
        "SmolLM2 hears one or two recordings in a chat: transcribes one, both, only the second, "
        "says which one\nsays something; then it learns to answer spoken requests as it answers "
        "written ones. About 15 minutes on\n2 free cores after make demo."
    )
    prepare(cfg, "salm")
    run, data = Path(cfg.run), f"{cfg.home}/data"
    if not Path(cfg.home, "run/phase2/config.json").is_file():
        raise model.UserError(f"{cfg.home}/run/phase2: not there; run make demo first")
    if not (run / "says.jsonl").is_file():
        write_conversations(cfg, run, data)
    lines, wrong, table = {}, {}, {}
    for name in ("tasks", "requests"):
        folder, own = run / name, [config_of(cfg, "salm")]
        if name == "requests":
            own += ["~data.validation_ds.datasets", config_of(cfg, "salm_requests")]
        own += [f"exp_manager.explicit_log_dir={folder}", f"data.train_ds.seed={cfg.seed}"]
        own += ["trainer.max_steps=2", "data.validation_ds.decode_clips=4"] if cfg.quick else []
        run_stage(cfg, name, "train_salm.py", own, folder / "control.json")
    for found, name in ((lines, "valid"), (wrong, "control")):
        for line in read_rows(run / f"tasks/{name}.jsonl"):
            line |= {k: without_given(line[k]) for k in ("target", "text") if line["set"] == "both"}
            found.setdefault(line["set"], []).append(line)
    names = {"one": "transcribe one", "both": "transcribe both, in order"}
    names["second"] = "transcribe only the second"
    for key, label in names.items():
        table[label] = rate(lines[key]) | {"wrong audio": rate(wrong[key])["wer"]}
        table[label] = {"result": table[label].pop("wer")} | table[label]
    right = [[x["target"] == x["text"] for x in found["says"]] for found in (lines, wrong)]
    share, ruined = map(np.mean, right)
    table["which of the two says it (chance 50 %)"] = {
        "result": share, "se": (share * (1 - share) / len(right[0])) ** 0.5, "wrong audio": ruined
    }  # fmt: skip
    scores = [row for row in read_rows(run / "requests/metrics.jsonl") if "val_kl" in row]
    scores = {"before": scores[0], "after": scores[-1]}
    scores["wrong audio"] = json.loads((run / "requests/control.json").read_text())
    told = {name: {k: row[f"val_{k}"] for k in ("acc", "kl")} for name, row in scores.items()}
    told["goals"] = goals(cfg, table, told)
    formats = dict.fromkeys(("result", "se", "wrong audio"), "{:.1%}")
    finish(cfg, run, table, formats, {"test clips": len(lines["one"])} | {"requests": told})


def without_given(text):
    """An answer to `both` without the words that the question gives."""
    return re.sub(r"^first |(?<= )second ", "", text, count=2)


def goals(cfg, table, told):
    """What was wanted, and whether it was met."""
    known = json.loads(Path(cfg.home, "results.json").read_text())["rows"]
    phase2 = known["SmolLM2 alone, without CTC's text"]["wer"]
    one, both, second, says = (row["result"] for row in table.values())
    before, after, wrong = told["before"], told["after"], told["wrong audio"]
    found = {
        f"one: at most phase 2 + 2 points ({phase2 + 0.02:.1%})": one <= phase2 + 0.02,
        "both: at most one + 8 points": both <= one + 0.08, "second: at most 35 %": second <= 0.35,
        "says: at least 80 %": says >= 0.8,
        "wrong audio over 100 %": min(r["wrong audio"] for r in [*table.values()][:3]) > 1,
        "requests: 5 points more of the tokens": after["acc"] >= before["acc"] + 0.05,
        "requests: less KL": after["kl"] < before["kl"],
        "requests: ruined by wrong audio":
            wrong["acc"] < after["acc"] - 0.05 and wrong["kl"] > 1.5 * after["kl"],
    }  # fmt: skip
    return show_goals(found)


# ---- duplex: train_duplex.py ------------------------------------------------

DECODER = ["d_model=256", "n_layers=3", "n_heads=4", "d_ff=768", "max_seq_len=512", "dropout=0"]
FIGURES = {  # score of train_duplex.py: what the table says
    "txt_wer": "text WER", "exact": "turns with every word right", "answered": "answered in time",
    "latency_s": "median latency, s (0.32 taught)", "stopped": "stopped after barge-in",
    "stop_s": "median stop, s (0.40 taught)", "spurious": "spurious starts per 100 turns",
    "asr_wer": "ASR-WER of the agent's audio", "user_wer": "CTC of the user's words, WER",
}  # fmt: skip


def duplex(cfg):
    print(
        "A small Llama from random weights listens to users (Flite) and answers in recorded "
        "telephone prompts:\ndialogues (3 minutes), CTC on the user's words (1), then both models. "
        "It composes prompts that it learns nearly\nby heart; it does not synthesise speech. About "
        "15 minutes on 2 free cores after make demo."
    )
    prepare(cfg, "duplex")
    few = ["train=40", "test=6", "spoken=60"] if cfg.quick else []
    done = f"{cfg.home}/models/speech_embedding"
    run_stage(cfg, "dialogues", "demo/dialogues.py", [f"out={cfg.home}", *few], done)
    ears = converse(cfg, "ears", [config_of(cfg, "duplex_ears")])
    rest = [f"model.init_from={ears}"]
    talks = converse(cfg, "talks", rest)
    rest = [f"model.init_from={talks}", "model.scoring_asr="]  # its LLM has to do without codes
    rest += ["trainer.max_steps=200", "trainer.val_check_interval=200"]
    rest += [f"model.speech_decoder.{setting}" for setting in DECODER]
    decoder = converse(cfg, "decoder", rest)
    scores = [row for row in read_rows(talks / "metrics.jsonl") if "val_loss" in row][-1]
    other = [row for row in read_rows(decoder / "metrics.jsonl") if "val_loss" in row][-1]
    swapped = json.loads((talks / "control.json").read_text())
    columns = {"strings": (scores, "strings"), "unseen voice": (scores, "voice"),
               "SpeechDecoder": (other, "strings"), "wrong user": (swapped, "strings")}  # fmt: skip
    table = {}
    for key, label in FIGURES.items():
        own = {name: row.get(f"val_{key}_{part}") for name, (row, part) in columns.items()}
        table[label] = {name: math.nan if value is None else value for name, value in own.items()}
    page(cfg, talks)
    formats = dict.fromkeys(columns, "{:.3f}")
    more = {"dialogues to learn from": len(read_rows(f"{cfg.home}/dialogues/train.jsonl"))}
    finish(cfg, Path(cfg.run), table, formats, more, goals=duplex_goals(table))


def converse(cfg, name, arguments):
    """A run of train_duplex.py. Output: its folder."""
    folder = Path(cfg.run) / name
    own = [f"exp_manager.explicit_log_dir={folder}", f"data.train_ds.seed={cfg.seed}"]
    own += ["trainer.max_steps=4", "trainer.val_check_interval=4"] if cfg.quick else []
    arguments = [config_of(cfg, "duplex"), *arguments, *own]
    run_stage(cfg, name, "train_duplex.py", arguments, folder / "control.json")
    return folder


def page(cfg, folder):
    """Three calls of the test answered by infer.py, one of them live, as a page."""
    run, calls = Path(cfg.run), Path(cfg.home) / "dialogues"
    users = [calls / f"strings-{n:04}-user.wav" for n in range(3)]
    arguments = [f"model.dir={folder}", f"out={run}/answer.wav,{run}/turns.jsonl", *users]
    run_stage(cfg, "infer", "infer.py", arguments, run / "turns.jsonl")
    live = [f"model.dir={folder}", f"out={run}/live.jsonl", "duplex.live=true", users[0]]
    run_stage(cfg, "live", "infer.py", live, run / "live.jsonl")
    subprocess.run([sys.executable, ROOT / "report.py", run / "turns.jsonl"], check=True)
    (run / "plots").mkdir(exist_ok=True)
    plot_turns(read_rows(run / "turns.jsonl"), run / "plots/duplex.png")
    latency = read_rows(run / "live.jsonl")[0]["latency_ms"]
    print(f"live: {latency['median']} ms a frame of 80 in the median, {latency['worst']} at worst")


def duplex_goals(table):
    """What was wanted, and whether it was met."""
    strings, voice, decoder, wrong = (
        {label: row[name] for label, row in table.items()}
        for name in ("strings", "unseen voice", "SpeechDecoder", "wrong user")
    )
    words, every, answered, _, stopped, _, spurious, heard, _ = FIGURES.values()
    return show_goals({
        "text WER of held-out strings: at most 8 %": strings[words] <= 0.08,
        "turns with every word right: at least 75 %": strings[every] >= 0.75,
        "text WER of the unseen voice: at most 20 %": voice[words] <= 0.20,
        "answered in time: at least 97 %": strings[answered] >= 0.97,
        "stopped after barge-in: at least 95 %": strings[stopped] >= 0.95,
        "spurious starts per 100 turns: at most 3": strings[spurious] <= 3,
        "ASR-WER of the agent's audio: at most 15 %": strings[heard] <= 0.15,
        "SpeechDecoder: text WER within 3 points": decoder[words] <= strings[words] + 0.03,
        "another user: text WER over 60 %": wrong[words] > 0.6,
    })  # fmt: skip


def show_goals(goals):
    for goal, met in goals.items():
        print(f"{'met   ' if met else 'MISSED'} {goal}")
    return {goal: bool(met) for goal, met in goals.items()}


# ---- pictures ---------------------------------------------------------------


def plot_curves(runs, path):
    """Losses and error rates over the steps of some runs."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5.5 * len(runs), 4), layout="constrained")
    for axis, (title, folder) in zip(np.atleast_1d(axes), runs.items(), strict=True):
        rows = read_rows(folder / "metrics.jsonl")
        for name in ("loss", "nce", "ctc", "ce", "valid_ce", "ctc_wer", "wer"):
            points = [(row["step"], row[name]) for row in rows if row.get(name)]
            if points:
                axis.plot(*zip(*points, strict=True), marker=".", label=name)
        axis.set(title=title, xlabel="optimizer step", ylabel="nats, or share", yscale="log")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_turns(lines, path):
    """Both channels of calls: who speaks when, and what."""
    figure, axes = plt.subplots(len(lines), 1, figsize=(11, 2.1 * len(lines)), layout="constrained")
    for axis, line in zip(np.atleast_1d(axes), lines, strict=True):
        sides = {
            "user": (line["source"], 1, "#0d6efd"),
            "agent": (line["agent_audio"], -1, "#198754"),
        }
        for role, (source, height, colour) in sides.items():
            wave = model.load_audio(source, 8000).numpy()
            time_s = np.arange(len(wave))[::8] / 8000
            axis.plot(time_s, height + wave[::8] / max(0.1, np.abs(wave).max()) / 2, colour, lw=0.4)
            for n, turn in enumerate(turn for turn in line["turns"] if turn["role"] == role):
                axis.axvspan(turn["start"], turn["end"], *sorted((0.5, 0.5 + height / 2)),
                             color=colour, alpha=0.12)  # fmt: skip
                place = turn["start"], height * (1.8 - 0.25 * (n % 2)) - 0.1
                axis.text(*place, turn["text"], fontsize=8)
        axis.set(ylim=(-2, 2.1), yticks=[1, -1], yticklabels=["user", "agent"], title=line["key"])
    axis.set(xlabel="seconds")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_words(line, path):
    """Spectrogram of a clip with the words where CTC has placed them."""
    wave = model.load_audio(line["source"], 8000).numpy()
    figure, axis = plt.subplots(figsize=(10, 3.5), layout="constrained")
    noise = 1e-6 * np.random.default_rng(0).standard_normal(len(wave))  # silence has no logarithm
    axis.specgram(wave + noise, NFFT=256, Fs=8000, noverlap=192, cmap="magma")
    words = [word for segment in line["segments"] for word in segment["words"]]
    for number, word in enumerate(words):
        axis.axvspan(word["start"], word["end"], ymax=0.06, color="white", alpha=0.6)
        middle = (word["start"] + word["end"]) / 2
        axis.text(
            middle, 300 + 200 * (number % 2), word["word"], color="white", ha="center", fontsize=9
        )
    axis.set(xlabel="seconds", ylabel="Hz", title=f"{line['key']}: {line['target']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


DEMOS = {"adaptor": adaptor, "telephone": telephone, "steermoe": steermoe, "salm": salm,
         "duplex": duplex}  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in DEMOS:
        demo = DEMOS[sys.argv.pop(1)]
    elif not {"-h", "--help"} & set(sys.argv[1:]):
        sys.exit(f"error: demo/run.py {' | '.join(DEMOS)}")
    else:
        demo = adaptor
    model.run_main(demo, DEFAULTS, __doc__)
