"""The whole pipeline on real weights and real telephone speech, on two CPU cores and without a model hub.

    make demo                       # or: python demo.py [key=value ...]
    python demo.py seed=1 run=demo/seed1       # another seed on the same data
    python demo.py quick=true                  # a few minutes: checks that everything runs, learns little
    python demo.py ablation=true               # what phase 1 buys phase 2: InfoNCE, CTC, both, none

Runs demo_data.py, precompute.py, train_phase1.py, train_phase2.py and infer.py with configs/demo_*.yaml, each as a user
would, skips what is already there, and ends with a table.
Output  demo/results.json, demo/transcripts.html, demo/plots/*.png (of another `run`: inside that folder)
Table   WER on held-out texts of Whisper tiny.en's own decoder, of our CTC read-out, and of the LLM; with controls:
        without the CTC draft in the prompt, and without it and with another clip's speech (must be ruined, or the LLM
        does not listen).
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
    "run": "demo/run",  # folder of this run's phase1, phase2 and results
    "speech": "",  # manifest.jsonl of your own speech in place of Debian's prompts
    "seed": 0,
    "quick": False,  # fewer clips and steps
    "ablation": False,
}
QUICK = {"data": ["n_synthetic=120"], "phase1": ["optim.max_steps=60", "run.valid_every=30"],
         "phase2": ["optim.max_steps=4", "run.valid_every=4", "run.valid_decode=8", "optim.warmup_steps=1"]}
ABLATION = {"InfoNCE + CTC": [], "CTC": ["loss.contrastive_weight=0"], "InfoNCE": ["loss.ctc_weight=0"], "none": None}


# ---- stages -----------------------------------------------------------------------------------------------------


def run_stage(cfg, name, script, arguments, done):
    """Run a script unless the file `done` exists; its seconds are kept in run/seconds.json."""
    record = Path(cfg["run"]) / "seconds.json"
    seconds = json.loads(record.read_text()) if record.is_file() else {}
    if Path(done).exists():
        print(f"== {name}: {done} is there already")
        return
    command = [sys.executable, script, *arguments]
    print(f"== {name}: python {script} {' '.join(arguments)}", flush=True)
    started = time.time()
    # glibc gives large blocks back to the system at every free; getting them again cost more than the arithmetic
    keep_memory = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}
    if subprocess.run(command, env=os.environ | keep_memory).returncode:
        sys.exit(f"demo: {script} failed; mend what it says and start again, finished stages are kept")
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(seconds | {name: round(time.time() - started, 1)}, indent=1))


def train_stage(cfg, name, script, arguments):
    """A training run: done when it has written its last step; an interrupted one goes on where it was saved."""
    folder = Path(cfg["run"]) / name
    arguments = [*arguments, f"run.dir={folder}", f"seed={cfg['seed']}", "run.resume=true"]
    run_stage(cfg, name, script, arguments, folder / "finished")
    (folder / "finished").touch()


def run_infer(cfg, name, inputs, *arguments):
    """Transcribe a manifest; returns the summary and the rows."""
    folder = Path(cfg["run"])
    out = folder / name
    run_stage(cfg, f"infer {name}", "infer.py",
              ["configs/demo_infer.yaml", f"model.dir={folder / 'phase2'}", f"out={out}.json,{out}.jsonl,{out}.html",
               *arguments, inputs], f"{out}.html")
    rows = [json.loads(line) for line in Path(f"{out}.jsonl").read_text(encoding="utf-8").splitlines()]
    return json.loads(Path(f"{out}.json").read_text()), rows


def whisper_decoder(cfg, rows):
    """What Whisper's own decoder writes, for comparison: greedy, in batches, 30 s padding as it was trained."""
    from transformers import WhisperForConditionalGeneration, WhisperProcessor

    path = Path(cfg["run"]) / "whisper.json"
    if not path.is_file():
        name = "demo/models/whisper-tiny.en"
        whisper = WhisperForConditionalGeneration.from_pretrained(name).eval()
        processor, texts = WhisperProcessor.from_pretrained(name), []
        for start in range(0, len(rows), 16):
            waves = [model.load_audio(row["source"], 16000).numpy() for row in rows[start : start + 16]]
            feats = processor(waves, sampling_rate=16000, return_tensors="pt").input_features
            with torch.inference_mode():
                ids = whisper.generate(feats, max_new_tokens=100, do_sample=False, num_beams=1)
            texts += [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
        path.write_text(json.dumps(texts))
    return model.error_rate([row["target"] for row in rows], json.loads(path.read_text()))["rate"]


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
    texts = torch.stack([train_phase1.pool_text(u["ids"], table) for u in clips])
    return {k: float(v) for k, v in scores.items()}, (audio @ texts.T).numpy()


def plot_losses(cfg, folder):
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    curves = {"phase1": ("loss", "nce", "ctc", "ctc_er"), "phase2": ("ce", "valid_ce", "er", "ctc_er")}
    for axis, (phase, names) in zip(axes, curves.items()):
        lines = (Path(cfg["run"]) / phase / "metrics.jsonl").read_text().splitlines()
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
    for word, start, end in model.word_times(spans, pieces, seconds):
        bottom.text((start + end) / 2, -0.12, word, ha="center", va="top", clip_on=False)
    bottom.set(ylabel="posterior", ylim=(0, 1.05))
    bottom.set_xlabel("seconds", labelpad=22)
    bottom.legend(fontsize=7, ncol=2, loc="upper right")
    save_plot(figure, folder / "ctc.png")


def save_plot(figure, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---- the demo ---------------------------------------------------------------------------------------------------


def main(cfg):
    quick = QUICK if cfg["quick"] else {}
    Path(cfg["run"]).mkdir(parents=True, exist_ok=True)
    data = [f"speech={cfg['speech']}"] if cfg["speech"] else []
    run_stage(cfg, "data", "demo_data.py", data + quick.get("data", []), "demo/data/train_synthetic.jsonl")
    run_stage(cfg, "precompute", "precompute.py", ["configs/demo_precompute.yaml"], "demo/cache/bad.jsonl")
    train_stage(cfg, "phase1", "train_phase1.py", ["configs/demo_phase1.yaml", *quick.get("phase1", [])])
    train_stage(cfg, "phase2", "train_phase2.py",
                ["configs/demo_phase2.yaml", f"init.dir={Path(cfg['run']) / 'phase1'}", *quick.get("phase2", [])])
    test, other = model.read_manifest("demo/data/test.jsonl"), "demo/data/other.jsonl"
    summary, rows = run_infer(cfg, "test", "demo/data/test.jsonl")
    no_draft, _ = run_infer(cfg, "test_no_draft", "demo/data/test.jsonl", "draft=false",
                            "decode.ctc_weight=0")
    wrong, _ = run_infer(cfg, "test_wrong_audio", "demo/data/test.jsonl", "draft=false", "decode.ctc_weight=0",
                         "control.wrong_audio=true")
    train_part = Path(cfg["run"]) / "train_part.jsonl"
    write_train_part(train_part)
    train, _ = run_infer(cfg, "train", str(train_part))
    phase1 = load_phase1(cfg)
    scores, similarity = retrieval(cfg, "demo/data/test.jsonl", *phase1)
    results = {
        "whisper_wer": whisper_decoder(cfg, test), "ctc_wer": summary["ctc_error_rate"],
        "llm_wer": summary["error_rate"], "llm_wer_train": train["error_rate"],
        "llm_wer_no_draft": no_draft["error_rate"], "llm_wer_wrong_audio": wrong["error_rate"],
        "retrieval_r1": scores["r1_a2t"], "n_test_utterances": len(rows), "n_test_words": summary["n_units"],
        "seed": cfg["seed"], "seconds": json.loads((Path(cfg["run"]) / "seconds.json").read_text()),
    }
    if Path(other).read_text().strip():
        others, _ = run_infer(cfg, "other", other)
        results["other_speakers_llm_wer"] = others["error_rate"]
        results["other_speakers_r1"] = retrieval(cfg, other, *phase1)[0]["r1_a2t"]
    home = Path("demo") if cfg["run"] == DEFAULTS["run"] else Path(cfg["run"])
    (home / "results.json").write_text(json.dumps(results, indent=1))
    page = (Path(cfg["run"]) / "test.html").read_text(encoding="utf-8")
    (home / "transcripts.html").write_text(page.replace('src="../', 'src="') if home == Path("demo") else page)
    longest = max(rows, key=lambda row: row["duration_s"] if row["duration_s"] < 6 else 0)
    plot_losses(cfg, home / "plots")
    plot_similarity(similarity, home / "plots")
    plot_ctc(next(row for row in test if row["key"] == longest["key"]), *phase1[:3], phase1[4], home / "plots")
    print_table(results, home)


def write_train_part(path, count=100):
    """Every n-th real training clip: enough to see whether the training texts are learned."""
    rows = model.read_manifest("demo/data/train_real.jsonl")
    keep = rows[:: max(1, len(rows) // count)][:count]
    lines = [json.dumps({k: row[k] for k in ("key", "target")} | {"source": str(Path(row["source"]).resolve())})
             for row in keep]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def print_table(results, home):
    rows = [("Whisper tiny.en, own decoder", "whisper_wer"), ("CTC read-out (phase 2's adaptor)", "ctc_wer"),
            ("LLM", "llm_wer"), ("LLM, no CTC draft in the prompt", "llm_wer_no_draft"),
            ("LLM, no draft, another clip's speech", "llm_wer_wrong_audio"),
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
    """What phase 1 buys phase 2: equal steps and seed, plain adaptor frames, with LoRA; WER on the held-out clips."""
    table, base = {}, Path(cfg["run"])
    for name, losses in ABLATION.items():
        variant = cfg | {"run": str(base / "ablation" / name.replace(" + ", "_"))}
        start = []
        if losses is not None:
            train_stage(variant, "phase1", "train_phase1.py",
                        ["configs/demo_phase1.yaml", "optim.max_steps=300", *losses])
            start = [f"init.dir={Path(variant['run']) / 'phase1'}"]
        train_stage(variant, "phase2", "train_phase2.py", [
            "configs/demo_phase2.yaml", "llm.speech=frames", "llm.draft=0", "adaptor.train=true", "init.dir=", *start,
            "loss.ctc_weight=0", "optim.lr=1e-3", "optim.max_steps=40", "run.valid_every=40"])
        table[name] = run_infer(variant, "test", "demo/data/test.jsonl", "decode.ctc_weight=0")[0]["error_rate"]
    (base / "ablation.json").write_text(json.dumps(table, indent=1))
    for name, rate in table.items():
        print(f"  phase 1: {name:15} phase 2 WER {100 * rate:6.1f} %")


if __name__ == "__main__":
    settings = train_phase1.load_config(sys.argv[1:], DEFAULTS)
    ablation(settings) if settings["ablation"] else main(settings)
