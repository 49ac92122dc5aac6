"""SteerMoE on real weights and real telephone speech: steering, linear ablation and stack baseline, on two CPU cores.

    make demo-steermoe              # or: python demo_steermoe.py [key=value ...]
    python demo_steermoe.py seed=1 run=demo/steermoe1

Runs train_steermoe.py with configs/steermoe/demo.yaml, three ways with equal steps, seed, data order and LLM positions:
    steering   after each encoder layer, average of 5 frames, Linear
    linear     the same without steering
    stack      5 frames side by side, Linear-GELU-Linear (SLAM-ASR)
For each: first 16 utterances until they are known by heart (a path from speech to text that works must reach 5 % WER
through decoding), then the training prompts, then the held-out clips. Skips what is already there.
Input   models and speech that demo_data.py got (demo/)
Output  run/results.json, run/losses.png, run/*/plots/*.png (experts, gates over time), and a table
Table   WER on the 16 utterances; train loss (nats per token, last 5 steps); on held-out texts: WER, and token accuracy
        (share of label tokens that the model ranks first, given the right text before them)
"""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import soundfile

import model
from demo import run_stage, save_plot
from train_phase1 import run_main

DEFAULTS = {
    "home": "demo",  # folder that demo_data.py filled
    "run": "demo/steermoe",
    "seed": 0,
    "steps": 0,  # of each training; 0: as configs/steermoe/demo.yaml says
    "overfit_steps": 40,
}
KINDS = {"steering": [], "linear": ["steering=null"], "stack": ["adaptor=stack", "steering=null",
                                                              "pooling_kernel_size=1"]}  # fmt: skip


def write_sixteen(cfg):
    """Manifest of 16 training clips of 0.8 to 2.2 s with different texts of two words or more."""
    path, chosen = Path(cfg["run"]) / "sixteen.jsonl", {}
    for row in model.read_manifest(f"{cfg['home']}/data/train_real.jsonl"):
        text, seconds = model.normalize_text(row["target"]), soundfile.info(row["source"]).duration
        if len(text.split()) >= 2 and 0.8 < seconds < 2.2 and len(chosen) < 16:
            chosen.setdefault(text, {"key": row["key"], "source": str(Path(row["source"]).resolve()),
                                     "target": row["target"]})
    path.write_text("\n".join(json.dumps(row) for row in chosen.values()), encoding="utf-8")
    return path


def run(cfg, stage, folder, done, *arguments):
    """Run train_steermoe.py with the demo's configuration, unless this stage has finished before."""
    run_stage(cfg, stage, "train_steermoe.py", [
        "configs/steermoe/demo.yaml", f"whisper_encoder.model_path={cfg['home']}/models/whisper-tiny.en",
        f"llm_decoder.model_name={cfg['home']}/models/SmolLM2-135M-Instruct", f"training.output_dir={folder}",
        f"seed={cfg['seed']}", *arguments], folder / done)


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def plot_losses(curves, path):
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, rows in curves.items():
        axis.plot([row["step"] for row in rows if "ce" in row], [row["ce"] for row in rows if "ce" in row], label=name)
    axis.set(title="train loss", xlabel="optimizer step", ylabel="nats per token", yscale="log")
    axis.legend()
    axis.grid(alpha=0.3)
    save_plot(figure, path)


def main(cfg):
    folder, home = Path(cfg["run"]), cfg["home"]
    folder.mkdir(parents=True, exist_ok=True)
    if not Path(f"{home}/data/test.jsonl").is_file():
        run_stage(cfg, "data", "demo_data.py", [f"out={home}"], f"{home}/data/test.jsonl")
    sixteen, results, curves = write_sixteen(cfg), {}, {}
    steps = [f"max_steps={cfg['steps']}"] if cfg["steps"] else []
    for name, kind in KINDS.items():
        known, trained = folder / f"{name}_sixteen", folder / name
        run(cfg, known.name, known, "steermoe.pt", *kind, f"parquet_dirs={sixteen}", f"eval_dirs={sixteen}",
            f"max_steps={cfg['overfit_steps']}", "log_steering_analysis=false", "resume=true")
        run(cfg, name, trained, "steermoe.pt", *kind, f"parquet_dirs={home}/data/train_real.jsonl", *steps,
            "resume=true")
        run(cfg, f"{name}_test", trained, "test.json", *kind, "mode=test", f"parquet_dirs={home}/data/test.jsonl")
        scores = json.loads((trained / "test.json").read_text(encoding="utf-8"))
        curves[name] = read_metrics(trained)
        results[name] = {
            "trained_parameters": sum(value.numel() for value in model.read_weights(trained / "steermoe.pt").values()),
            "steps": curves[name][-1]["step"], "wer_16": read_metrics(known)[-1]["wer"],
            "train_ce": curves[name][-1]["ce"], "test_ce": scores["eval_ce"], "test_wer": scores["wer"],
            "test_cer": scores["cer"], "test_token_accuracy": scores["eval_acc"], "n_test": scores["n"]}
    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    (folder / "results.json").write_text(json.dumps({"seed": cfg["seed"], "seconds": seconds} | results, indent=1),
                                         encoding="utf-8")
    plot_losses(curves, folder / "losses.png")
    print(f"\n{'':10} {'trained':>10} {'WER of 16':>10} {'train loss':>11} {'test WER':>9} {'test token acc.':>16}")
    for name, row in results.items():
        print(f"{name:10} {row['trained_parameters']:10,} {100 * row['wer_16']:8.1f} % {row['train_ce']:11.3f} "
              f"{100 * row['test_wer']:7.1f} % {100 * row['test_token_accuracy']:14.1f} %")
    print(f"{row['n_test']} held-out clips, {row['steps']} steps, seed {cfg['seed']}; seconds: "
          + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()))
    for name, row in results.items():
        if row["wer_16"] > 0.05:
            print(f"{name}: 16 utterances were not learned by heart; the path from speech to text is suspect")


if __name__ == "__main__":
    run_main(main, DEFAULTS, __doc__)
