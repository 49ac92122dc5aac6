"""finetune_encoder.py on real weights and real telephone speech, on two CPU cores and without a model hub.

    make demo-telephone             # or: python demo_telephone.py [key=value ...]
    python demo_telephone.py seeds=0,1          # a second seed: twice the time
    python demo_telephone.py quick=true         # a few steps: checks that everything runs, learns little

Whisper tiny.en's encoder with a linear CTC head over characters. All rows start from the same short training of the
head alone and then train for the same number of steps: the head on the frozen encoder, the head with the encoder's top
layers, and the same with SpecAug and a simulated telephone line. Beside it a SANM encoder of 4 blocks, from random
weights, has to learn 20 prompts by heart on the whole path of configs/stage1.yaml.
Input   what demo_data.py leaves in demo/ (`make demo` runs it; it is run here if it has not been).
Output  demo/telephone/results.json, table.md, results.png; a run folder for each row
Table   WER of the CTC read-out on held-out texts of the training speaker (telephone, human), on held-out synthetic
        clips of other texts, and on 11 clips of other speakers; mean over the seeds.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a screen)

import finetune_encoder  # noqa: E402
import model  # noqa: E402

DEFAULTS = {
    "home": "demo",  # folder of demo_data.py
    "run": "",  # where the runs go; empty: home/telephone
    "seeds": [0],
    "start_steps": 120,  # of the head alone, before the rows part
    "steps": 160,  # of each row
    "lr": 5e-4,  # of the encoder's blocks in rows 2 and 3
    "layer_decay": 0.7,
    "freeze_layer_num": 1,  # of the encoder's 4 blocks, the lowest so many stay frozen in rows 2 and 3
    "quick": False,
}
HELD_OUT = 100  # synthetic clips that no row trains on
AUGMENT = ["specaug=SpecAugLFR", "specaug_conf.time_mask_width_range=0,20", "specaug_conf.freq_mask_width_range=0,15",
           "telephone_conf.prob=0.5", "telephone_conf.packet_loss_prob=0.3", "dataset_conf.speed_perturb=0.9,1.0,1.1"]
ROWS = {"head": "head only, encoder frozen", "top": "+ top layers", "augmented": "+ SpecAug, telephone line, speed"}
SETS = {"test": "held-out texts", "synthetic": "synthetic voice", "other": "other speakers, clean"}


def run_stage(name, script, arguments, done):
    """Run a script unless what it makes is there."""
    if Path(done).exists():
        print(f"== {name}: {done} is there already")
        return 0.0
    print(f"== {name}: python {script} {' '.join(arguments)}", flush=True)
    # glibc gives large blocks back to the system at every free; getting them again cost more than the arithmetic
    keep_memory, started = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}, time.time()
    if subprocess.run([sys.executable, script, *arguments], env=os.environ | keep_memory).returncode:
        sys.exit(f"demo-telephone: {script} failed; mend what it says and start again, finished stages are kept")
    return time.time() - started


def write_rows(path, rows):
    lines = [json.dumps({k: row[k] for k in ("key", "target")} | {"source": str(Path(row["source"]).resolve())})
             for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def prepare(cfg):
    """Manifests of the demo's speech; the last HELD_OUT synthetic clips are kept for scoring."""
    home = cfg["home"]
    run_stage("data", "demo_data.py", [f"out={home}"], f"{home}/data/train_synthetic.jsonl")
    synthetic = model.read_manifest(f"{home}/data/train_synthetic.jsonl")
    folder = Path(cfg["run"])
    train = write_rows(folder / "train_synthetic.jsonl", synthetic[:-HELD_OUT])
    sets = {"test": f"{home}/data/test.jsonl", "other": f"{home}/data/other.jsonl",
            "synthetic": write_rows(folder / "held_out_synthetic.jsonl", synthetic[-HELD_OUT:])}
    real = f"{home}/data/train_real.jsonl"
    return [f"audio_encoder={home}/models/whisper-tiny.en", f"train_data_set_list={real},{real},{train}",
            f"valid_data_set_list={home}/data/dev.jsonl"], sets


def train_row(cfg, name, seed, steps, arguments):
    folder = f"{cfg['run']}/{name}-{seed}"
    return folder, run_stage(
        f"{name}, seed {seed}", "finetune_encoder.py",
        ["configs/demo_telephone.yaml", *arguments, f"train_conf.max_steps={steps}", "train_conf.max_epoch=100",
         f"seed={seed}", f"output_dir={folder}"], f"{folder}/results.json")


def score(folder, sets):
    """WER of a run's CTC read-out on every set, with infer.py, as a user would."""
    out = f"{folder}/infer"
    run_stage("infer", "infer.py", ["configs/infer.yaml", f"model.dir={folder}", f"out={out}.json,{out}.jsonl",
                                    "encoder.name=", "llm.name=", "workers=2", *sets.values()], f"{out}.json")
    results = [json.loads(line) for line in Path(f"{out}.jsonl").read_text(encoding="utf-8").splitlines()]
    read = {row["key"]: row for row in results}
    scores = {}
    for name, manifest in sets.items():
        rows = [read[row["key"]] for row in model.read_manifest(manifest) if row["key"] in read]
        scores[name] = model.error_rate([row["target"] for row in rows], [row["text"] for row in rows])["rate"]
    return scores


def overfit(cfg, home):
    """20 prompts by heart: SANM from random weights, 8 kHz, SpecAug, CTC over words. Output: WER on the same 20."""
    rows = [row for row in model.read_manifest(f"{home}/data/train_real.jsonl") if 2 <= len(row["target"].split()) <= 4]
    twenty = write_rows(Path(cfg["run"]) / "twenty.jsonl", rows[:20])
    folder = f"{cfg['run']}/overfit"
    run_stage("20 prompts by heart", "finetune_encoder.py", [
        "configs/stage1.yaml", "init_param=scratch", "llm=none", "llm_weight=0", "ctc_decoder=none",
        "ctc_decoder_conf.freeze=false", "dataset_conf.ctc_tokenizer=word", "audio_encoder_conf.num_blocks=3",
        "audio_encoder_conf.tp_blocks=1", "audio_encoder_conf.output_size=128", "audio_encoder_conf.linear_units=512",
        f"train_data_set_list={','.join([twenty] * 50)}", f"valid_data_set_list={twenty}", "clean_data_set_list=",
        "clean_valid_data_set_list=", "data_mix=0", "optim_conf.lr=1e-3", "scheduler_conf.warmup_steps=50",
        "dataset_conf.num_workers=2", f"train_conf.max_steps={40 if cfg['quick'] else 900}", "train_conf.max_epoch=9",
        "train_conf.log_interval=20", f"output_dir={folder}"], f"{folder}/results.json")
    return json.loads(Path(f"{folder}/results.json").read_text(encoding="utf-8"))["after"]["telephone_ctc_er"]


def main(cfg):
    cfg["run"] = cfg["run"] or f"{cfg['home']}/{'quick/' if cfg['quick'] else ''}telephone"
    if cfg["quick"]:
        cfg |= {"start_steps": 4, "steps": 4}
    started, (arguments, sets) = time.time(), prepare(cfg)
    scores, seconds = {name: [] for name in ROWS}, {}
    for seed in cfg["seeds"]:
        start, seconds[f"start-{seed}"] = train_row(cfg, "start", seed, cfg["start_steps"], arguments)
        common = [*arguments, f"init_run={start}"]
        top = [*common, "audio_encoder_conf.freeze=false", f"optim_conf.lr={cfg['lr']}",
               f"optim_conf.layer_decay={cfg['layer_decay']}",
               f"audio_encoder_conf.freeze_layer_num={cfg['freeze_layer_num']}"]
        for name, row in {"head": common, "top": top, "augmented": [*top, *AUGMENT]}.items():
            folder, seconds[f"{name}-{seed}"] = train_row(cfg, name, seed, cfg["steps"], row)
            scores[name].append(score(folder, sets))
    memory = overfit(cfg, cfg["home"])
    results = {"rows": scores, "overfit_wer": memory, "seeds": cfg["seeds"], "seconds": seconds,
               "seconds_total": time.time() - started}
    results |= {key: cfg[key] for key in ("start_steps", "steps", "lr", "layer_decay", "freeze_layer_num")}
    means = {name: {s: statistics.mean(seed[s] for seed in rows) for s in SETS} for name, rows in scores.items()}
    tuned = min(("top", "augmented"), key=lambda name: means[name]["test"])
    results["relative_gain"] = 1 - means[tuned]["test"] / max(1e-9, means["head"]["test"])
    results["other_loss_points"] = 100 * (means[tuned]["other"] - means["head"]["other"])
    folder = Path(cfg["run"])
    (folder / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    table = [f"| | {' | '.join(SETS.values())} |", f"|---|{'---|' * len(SETS)}"]
    table += [f"| {label} | " + " | ".join(f"{100 * means[name][s]:.1f} %" for s in SETS) + " |"
              for name, label in ROWS.items()]
    (folder / "table.md").write_text("\n".join(table) + "\n", encoding="utf-8")
    plot(means, folder / "results.png")
    print("\n".join(table))
    print(f"best fine-tuned row ({tuned}) against the frozen encoder: {100 * results['relative_gain']:+.1f} % relative "
          f"WER on held-out texts, {results['other_loss_points']:+.1f} points on other speakers; 20 prompts by heart: "
          f"{100 * memory:.1f} % WER; {results['seconds_total']:.0f} s, seeds {cfg['seeds']}")
    print(f"{folder}/results.json  {folder}/table.md  {folder}/results.png")


def plot(means, path):
    figure, axis = plt.subplots(figsize=(8, 4))
    for n, (name, label) in enumerate(ROWS.items()):
        places = [s + 0.27 * (n - 1) for s in range(len(SETS))]
        bars = axis.bar(places, [100 * means[name][s] for s in SETS], width=0.25, label=label)
        axis.bar_label(bars, fmt="%.1f", fontsize=8)
    axis.set(ylabel="WER, %", title="Whisper tiny.en's encoder with a CTC head")
    axis.set_xticks(range(len(SETS)), SETS.values())
    axis.legend(fontsize=8, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.1))  # below: beside no bar
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    finetune_encoder.run_main(main, DEFAULTS, __doc__)
