"""A picture of what a configuration does to one clip: the simulated line, SpecAug's masks.

python docs/show_line.py clip.wav configs/stage1.yaml [key=value ...]      # -> clip.line.png
"""

import random
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import finetune_encoder as ft  # noqa: E402  (needs the path above)
import model  # noqa: E402


def main(clip, cfg):
    frontend, rng = ft.NanoFrontend(**cfg.frontend_conf), random.Random(cfg.seed)
    wave = model.load_audio(clip, 8000)
    line = ft.simulate_telephone(wave, cfg.telephone_conf, rng)
    pictures = {}
    for title, signal in (("as it is, 0-4 kHz", wave), ("through the simulated line", line)):
        signal = model.resample(signal, 8000, frontend.sample_rate)
        pictures[title] = frontend.features(signal, title)  # (T, 560)
    masking = ft.Clips([], frontend, cfg, 0).masking
    if masking is not None:
        generator = torch.Generator().manual_seed(cfg.seed)
        pictures["masked by SpecAugLFR"] = masking(pictures[title], generator)
    figure = Figure(figsize=(9, 2.6 * len(pictures)), layout="constrained")
    top = max(float(feats.max()) for feats in pictures.values())
    axes = figure.subplots(len(pictures), 1, sharex=True)
    for axis, (title, feats) in zip(axes, pictures.items(), strict=True):
        middle = feats[:, 3 * 80 : 4 * 80].T  # of the 7 stacked frames
        axis.imshow(
            middle, origin="lower", aspect="auto", cmap="magma", vmin=0, vmax=top,
            extent=(0, 0.06 * len(feats), 0, 80),
        )  # fmt: skip
        axis.set(title=title, ylabel="mel bin")
    axes[-1].set_xlabel("seconds")
    path = Path(f"{Path(clip).stem}.line.png")
    figure.savefig(path)
    print(path)


if __name__ == "__main__":
    main(sys.argv[1], model.load_config([*sys.argv[2:], "output_dir=unused"], ft.DEFAULTS))
