"""The whole pipeline on real weights and real telephone speech, on two CPU cores and without a model hub.

    make demo                       # or: python demo.py [key=value ...]
    python demo.py seed=1 run=demo/seed1       # another seed of both trainings, on the same data
    python demo.py quick=true                  # a few minutes: checks that everything runs, learns little
    python demo.py ablation=true               # what phase 1 buys phase 2: InfoNCE, CTC, both, none

Runs demo_data.py, precompute.py, train_phase1.py, train_phase2.py and infer.py with configs/demo_*.yaml, each as a user
would, skips what is already there, and ends with a table.
Output  demo/results.json, demo/transcripts.html, demo/plots/*.png (of another `run`: inside that folder)
Table   WER on held-out texts of Whisper tiny.en's own decoder, of our CTC read-out, and of the LLM, which chooses
        among its own answer and CTC's best ones; with controls: the LLM alone, which hears the speech and sees no CTC
        text, and the same with another clip's speech (must be ruined, or the LLM does not listen).
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)

import model  # noqa: E402
import train_phase1  # noqa: E402

DEFAULTS = {
    "home": "",  # folder of everything that is made; empty: demo, or demo/quick with quick=true
    "run": "",  # folder of this run's phase1, phase2 and results; empty: home/run
    "speech": "",  # manifest.jsonl of your own speech in place of Debian's prompts
    "seed": 0,
    "quick": False,  # fewer clips and steps
    "ablation": False,
}
QUICK = {"data": ["n_piper=60", "n_flite=60"], "phase1": ["optim.max_steps=60", "run.valid_every=30"],
         "phase2": ["optim.max_steps=4", "run.valid_every=4", "run.valid_decode=8", "optim.warmup_steps=1"]}
ABLATION = {"InfoNCE + CTC": [], "CTC": ["loss.contrastive_weight=0"], "InfoNCE": ["loss.ctc_weight=0"], "none": None}


# ---- folders ----------------------------------------------------------------------------------------------------


def config_file(cfg, name):
    """configs/demo_NAME.yaml with the folder of this demo in place of demo/."""
    text = Path(f"configs/demo_{name}.yaml").read_text(encoding="utf-8").replace("demo/", f"{cfg['home']}/")
    path = Path(cfg["home"]) / f"{name}.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def claim(folder, **made_with):
    """Make a folder, or refuse one that other speech, another size or another seed has filled."""
    path = Path(folder) / "made_with.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(made_with), encoding="utf-8")
    elif (found := json.loads(path.read_text(encoding="utf-8"))) != made_with:
        raise ValueError(f"{folder}: was made with {found}, now asked for {made_with}; give another home= or run=, "
                         "or delete it")


# ---- stages -----------------------------------------------------------------------------------------------------


def run_stage(cfg, name, script, arguments, done):
    """Run a script unless it has finished before; run/seconds.json keeps what each stage took."""
    record = Path(cfg["run"]) / "seconds.json"
    seconds = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if name in seconds and Path(done).exists():
        print(f"== {name}: {done} is there already")
        return
    command = [sys.executable, script, *arguments]
    print(f"== {name}: python {script} {' '.join(arguments)}", flush=True)
    # glibc gives large blocks back to the system at every free; getting them again cost more than the arithmetic
    keep_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    started = time.time()
    if subprocess.run(command, env=os.environ | keep_memory).returncode:
        sys.exit(f"demo: {script} failed; mend what it says and start again, finished stages are kept")
    seconds[name] = round(time.time() - started, 1)
    record.write_text(json.dumps(seconds, indent=1), encoding="utf-8")


def train_stage(cfg, name, script, arguments):
    """A training run; an interrupted one goes on where it was saved."""
    folder = Path(cfg["run"]) / name
    arguments = [config_file(cfg, name), *arguments, f"run.dir={folder}", f"seed={cfg['seed']}", "run.resume=true"]
    run_stage(cfg, name, script, arguments, folder / "last.pt")


def run_infer(cfg, name, inputs, *arguments):
    """Transcribe a manifest; returns the summary and the rows."""
    folder = Path(cfg["run"])
    out = folder / name
    run_stage(cfg, f"infer {name}", "infer.py",
              [config_file(cfg, "infer"), f"model.dir={folder / 'phase2'}", f"out={out}.json,{out}.jsonl,{out}.html",
               *arguments, inputs], f"{out}.html")
    rows = [json.loads(line) for line in Path(f"{out}.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads(Path(f"{out}.json").read_text(encoding="utf-8")), rows


def whisper_decoder(cfg, rows):
    """What Whisper's own decoder writes, for comparison: greedy, in batches, 30 s padding as it was trained."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    path, started = Path(cfg["run"]) / "whisper.json", time.time()
    if not path.is_file():
        name = f"{cfg['home']}/models/whisper-tiny.en"
        whisper = WhisperForConditionalGeneration.from_pretrained(name).eval()
        processor, texts = WhisperProcessor.from_pretrained(name), []
        for start in range(0, len(rows), 16):
            waves = [model.load_audio(row["source"], 16000).numpy() for row in rows[start : start + 16]]
            feats = processor(waves, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                ids = whisper.generate(feats, max_new_tokens=100, do_sample=False, num_beams=1)
            texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        path.write_text(json.dumps({"texts": texts, "seconds": round(time.time() - started, 1)}))
    found = json.loads(path.read_text())
    return model.error_rate([row["target"] for row in rows], found["texts"])["rate"], found["seconds"]


# ---- phase 1 and pictures ---------------------------------------------------------------------------------------


def load_phase1(cfg):
    """The adaptor and CTC head that phase 1 wrote, the cache, and its own configuration."""
    folder = Path(cfg["run"]) / "phase1"
    settings = train_phase1.load_config([str(folder / "config.yaml")], train_phase1.DEFAULTS)
    cache = train_phase1.EncoderCache(settings["cache.dir"])
    table, tokenizer = model.load_embedding(settings["llm.name"])
    head = torch.load(folder / "ctc_head.pt", weights_only=True)
    phase = train_phase1.build(settings | {"loss.ctc_weight": 0}, cache, table, [], torch.device("cpu"))
    phase.ctc = model.CTCHead(table.shape[1], embedding=table, token_ids=head["token_ids"])
    phase.ctc.load_state_dict(head)
    model.load_weights(phase.adaptor, folder / "adaptor_cached.pt")
    return phase.eval(), settings, cache, table, tokenizer


def retrieval(cfg, manifest, phase, settings, cache, table, tokenizer):
    """Phase 1 alone on unseen texts: R@1 (audio -> text), CTC error rate and the similarity matrix."""
    clips = train_phase1.read_utterances(manifest, cache, tokenizer, settings["data.normalize"])
    scores, _ = train_phase1.validate(phase, clips, cache, table, tokenizer, settings, torch.device("cpu"),
                                      torch.float32)
    with torch.no_grad():
        audio = torch.cat([phase.pool(*train_phase1.load_frames([u], cache, settings))[2] for u in clips])
    texts = train_phase1.pool_texts([u["ids"] for u in clips], table)
    return {k: float(v) for k, v in scores.items()}, (audio @ texts.T).numpy()


def plot_losses(cfg, folder):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    curves = {"phase1": ("loss", "nce", "ctc", "ctc_er"), "phase2": ("ce", "valid_ce", "er", "ctc_er")}
    for axis, (phase, names) in zip(axes, curves.items()):
        lines = (Path(cfg["run"]) / phase / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        for name in names:
            points = [(row["step"], row[name]) for row in rows if name in row]
            axis.plot(*zip(*points), marker=".", label={"er": "WER on dev", "ctc_er": "CTC WER on dev"}.get(name, name))
        axis.set(title=phase, xlabel="optimizer step", ylabel="nats (losses) / share (WER)", yscale="log")
        axis.legend()
        axis.grid(alpha=0.3)
    save_plot(figure, folder / "losses.png")


def plot_similarity(similarity, folder):
    figure, axis = plt.subplots(figsize=(6, 5.2))
    picture = axis.imshow(similarity, cmap="magma")
    axis.set(title="audio-text similarity of the held-out clips\n(phase 1; bright diagonal: the right text is nearest)",
             xlabel="text", ylabel="clip")
    figure.colorbar(picture, label="cosine")
    save_plot(figure, folder / "similarity.png")


def plot_ctc(row, phase, settings, cache, tokenizer, folder):
    """CTC posteriors over the clip's spectrogram, with the aligned words under it."""
    clip = {"key": row["key"]}
    with torch.no_grad():
        emb, emb_lens = phase.adaptor(*train_phase1.load_frames([clip], cache, settings))
        log_probs = phase.ctc(emb)[0]  # (S, C + 1)
    seconds = cache.frame_ms * settings["adaptor.stack"] / 1000
    wave = model.load_audio(row["source"], 8000).numpy()
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(10, 6), sharex=True)
    top.specgram(wave + 1e-6 * np.random.default_rng(0).standard_normal(len(wave)), NFFT=256, Fs=8000, noverlap=192,
                 cmap="magma")
    top.set(ylabel="Hz", title=f"{row['key']}: {row['target']}")
    times = (np.arange(len(log_probs)) + 0.5) * seconds
    path = model.ctc_greedy(log_probs[None], emb_lens, phase.ctc.blank)[0]
    for label in dict.fromkeys(path):
        name = tokenizer.decode(phase.ctc.tokens([label]))
        bottom.plot(times, log_probs[:, label].exp(), label=name.strip())
    bottom.plot(times, log_probs[:, -1].exp(), color="0.7", linestyle=":", label="blank")
    spans = model.ctc_align(log_probs, path, phase.ctc.blank)
    pieces = [tokenizer.decode(phase.ctc.tokens([span[0]])) for span in spans]
    for n, (word, start, end) in enumerate(model.word_times(spans, pieces, seconds)):  # two lines: none overlap
        bottom.text((start + end) / 2, -0.12 - 0.08 * (n % 2), word, ha="center", va="top", clip_on=False)
    bottom.set(ylabel="posterior", ylim=(0, 1.05))
    bottom.set_xlabel("seconds", labelpad=32)
    bottom.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_plot(figure, folder / "ctc.png")


def save_plot(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the demo ---------------------------------------------------------------------------------------------------


def prepare(cfg):
    """Fill in the folders, get weights and speech, run the encoder over them."""
    quick = QUICK if cfg["quick"] else {}
    cfg["home"] = cfg["home"] or ("demo/quick" if cfg["quick"] else "demo")
    cfg["run"] = cfg["run"] or f"{cfg['home']}/run"
    claim(cfg["home"], speech=cfg["speech"], quick=cfg["quick"])
    claim(cfg["run"], seed=cfg["seed"])
    data = [f"out={cfg['home']}", *([f"speech={cfg['speech']}"] if cfg["speech"] else []), *quick.get("data", [])]
    run_stage(cfg, "data", "demo_data.py", data, f"{cfg['home']}/data/train_synthetic.jsonl")
    others = Path(f"{cfg['home']}/data/other.jsonl").read_text(encoding="utf-8").strip()
    only_test = [] if others else [f"data.test={cfg['home']}/data/test.jsonl"]  # of the user's own speech
    run_stage(cfg, "precompute", "precompute.py", [config_file(cfg, "precompute"), *only_test],
              f"{cfg['home']}/cache/bad.jsonl")
    return quick, f"{cfg['home']}/data/other.jsonl" if others else ""


def main(cfg):
    quick, other = prepare(cfg)
    train_stage(cfg, "phase1", "train_phase1.py", quick.get("phase1", []))
    train_stage(cfg, "phase2", "train_phase2.py", [f"init.dir={cfg['run']}/phase1", *quick.get("phase2", [])])
    manifest = f"{cfg['home']}/data/test.jsonl"
    test, train_part = model.read_manifest(manifest), write_train_part(cfg)
    summary, rows = run_infer(cfg, "test", manifest)
    alone = ["draft=false", "decode.ctc_weight=0"]
    no_draft, _ = run_infer(cfg, "test_no_draft", manifest, *alone)
    wrong, _ = run_infer(cfg, "test_wrong_audio", manifest, *alone, "control.wrong_audio=true")
    train, _ = run_infer(cfg, "train", train_part)
    phase1 = load_phase1(cfg)
    scores, similarity = retrieval(cfg, manifest, *phase1)
    whisper_wer, whisper_seconds = whisper_decoder(cfg, test)
    results = {
        "whisper_wer": whisper_wer, "ctc_wer": summary["ctc_error_rate"],
        "llm_wer": summary["error_rate"], "llm_wer_train": train["error_rate"],
        "llm_wer_no_draft": no_draft["error_rate"], "llm_wer_wrong_audio": wrong["error_rate"],
        "retrieval_r1": scores["r1_a2t"], "n_test_utterances": len(rows), "n_test_words": summary["n_units"],
        "seed": cfg["seed"],
    }
    if other:
        results["other_speakers_llm_wer"] = run_infer(cfg, "other", other)[0]["error_rate"]
        results["other_speakers_r1"] = retrieval(cfg, other, *phase1)[0]["r1_a2t"]
    results["seconds"] = json.loads((Path(cfg["run"]) / "seconds.json").read_text(encoding="utf-8"))
    results["seconds"]["Whisper's decoder"] = whisper_seconds
    # the first run's results stand at the top of the folder; those of another `run` inside it
    home = Path(cfg["home"]) if cfg["run"] == f"{cfg['home']}/run" else Path(cfg["run"])
    (home / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    page = (Path(cfg["run"]) / "test.html").read_text(encoding="utf-8")
    page = page if home == Path(cfg["run"]) else page.replace('src="../', 'src="')
    (home / "transcripts.html").write_text(page, encoding="utf-8")
    longest = max(rows, key=lambda row: row["duration_s"] if row["duration_s"] < 6 else 0)
    plot_losses(cfg, home / "plots")
    plot_similarity(similarity, home / "plots")
    plot_ctc(next(row for row in test if row["key"] == longest["key"]), *phase1[:3], phase1[4], home / "plots")
    print_table(results, home)


def write_train_part(cfg, count=40):
    """Manifest of every n-th real training clip: enough to see whether the training texts are learned."""
    path, rows = Path(cfg["run"]) / "train_part.jsonl", model.read_manifest(f"{cfg['home']}/data/train_real.jsonl")
    keep = rows[:: max(1, len(rows) // count)][:count]
    lines = [json.dumps({k: row[k] for k in ("key", "target")} | {"source": str(Path(row["source"]).resolve())})
             for row in keep]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def print_table(results, home):
    rows = [("Whisper tiny.en, own decoder", "whisper_wer"), ("CTC read-out (phase 2's adaptor)", "ctc_wer"),
            ("LLM", "llm_wer"), ("LLM alone, without any CTC text", "llm_wer_no_draft"),
            ("LLM alone, another clip's speech", "llm_wer_wrong_audio"),
            ("LLM, texts of training", "llm_wer_train"),
            ("LLM, other speakers (11 clips)", "other_speakers_llm_wer")]
    print(f"\n{results['n_test_utterances']} held-out clips, {results['n_test_words']} words, seed {results['seed']}")
    for label, key in rows:
        if key in results:
            print(f"  {label:40} WER {100 * results[key]:6.1f} %")
    print(f"  phase 1, text retrieval                  R@1 {100 * results['retrieval_r1']:6.1f} %")
    print("  seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in results["seconds"].items()))
    print(f"  {home}/results.json  {home}/transcripts.html  {home}/plots/")


def ablation(cfg):
    """What phase 1 buys phase 2: equal steps and seed, plain adaptor frames, with LoRA; WER on the dev texts."""
    prepare(cfg)
    table = {}
    for name, losses in ABLATION.items():
        variant = cfg | {"run": f"{cfg['run']}/ablation/{name.replace(' + ', '_')}"}
        Path(variant["run"]).mkdir(parents=True, exist_ok=True)
        start = "init.dir="
        if losses is not None:
            train_stage(variant, "phase1", "train_phase1.py", ["optim.max_steps=200", *losses])
            start = f"init.dir={variant['run']}/phase1"
        train_stage(variant, "phase2", "train_phase2.py", [
            start, "llm.speech=frames", "llm.draft=0", "adaptor.train=true", "loss.ctc_weight=0", "optim.lr=1e-3",
            "optim.max_steps=24", "run.valid_every=24", "augment.feature_noise=0.4"])
        dev = f"{cfg['home']}/data/dev.jsonl"
        table[name] = run_infer(variant, "dev", dev, "decode.ctc_weight=0")[0]["error_rate"]
    (Path(cfg["run"]) / "ablation.json").write_text(json.dumps(table, indent=1), encoding="utf-8")
    for name, rate in table.items():
        print(f"  phase 1: {name:15} phase 2 WER on dev {100 * rate:6.1f} %")


if __name__ == "__main__":
    train_phase1.run_main(lambda cfg: ablation(cfg) if cfg["ablation"] else main(cfg), DEFAULTS, __doc__)
