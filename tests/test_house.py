"""What holds for the whole repository: configurations, --help, README, safety, size."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import model

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted({path.stem for path in ROOT.glob("*.py")} - {"model", "report", "merge"})
OF_CONFIG = {
    "precompute": "precompute", "phase1": "train_phase1", "phase2": "train_phase2",
    "infer": "infer", "stage1": "finetune_encoder", "telephone": "finetune_encoder",
    "telephone_8k": "finetune_encoder", "telephone_8k_from_hub": "finetune_encoder",
    "steermoe": "train_steermoe", "salm": "train_salm",
    "salm_requests": "train_salm", "telephone_llm": "finetune_encoder",
    "duplex": "train_duplex", "duplex_speech_decoder": "train_duplex",
    "duplex_ears": "train_duplex",
}  # fmt: skip
BUDGETS = {  # lines; tests/ and demo/ of all their files
    "model.py": 2540, "precompute.py": 300, "train_phase1.py": 455, "train_phase2.py": 480,
    "infer.py": 970, "report.py": 210, "finetune_encoder.py": 1710, "train_steermoe.py": 840,
    "train_salm.py": 1170, "merge.py": 315, "train_duplex.py": 1490, "bench": 550, "demo": 1500,
    "tests": 7700,
    "README.md": 260,
}  # fmt: skip


def python_files():
    tracked = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / name for name in tracked.stdout.split()] or sorted(ROOT.rglob("[!.]*.py"))


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")) + sorted(
    ROOT.glob("demo/configs/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))  # fmt: skip
def test_every_configuration_is_taken(path):
    steered = path.parent.name == "steermoe"
    script = __import__("train_steermoe" if steered else OF_CONFIG[path.stem])
    spelling = getattr(script, "SPELLING", {})
    cfg = model.load_config([str(path)], script.DEFAULTS, **spelling)
    assert cfg != model.load_config([], re.sub(r"\?\?\?", "x", script.DEFAULTS), **spelling)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_runs_beside_model_alone_and_explains_itself(script, tmp_path):
    for name in (script, "model"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    found = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=tmp_path,
                           capture_output=True, text=True)  # fmt: skip
    assert found.returncode == 0, found.stderr
    doc = __import__(script)
    assert doc.__doc__.strip() in found.stdout and doc.DEFAULTS.strip() in found.stdout


def test_the_readme_names_only_what_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.search(r"\.PHONY: (.*)", (ROOT / "Makefile").read_text())[1].split()
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= set(targets)
    for path in re.findall(r"(?:configs|docs|demo|bench)/[\w./-]+\.(?:yaml|json|md|py)", text):
        assert (ROOT / path).is_file(), path
    commands = re.findall(r"python ((?:demo/|bench/|docs/)?\w+\.py)((?: [^`\n#]*)?)", text)
    assert len(commands) > 8
    for script, arguments in commands:
        assert (ROOT / script).is_file(), script
        module = __import__(Path(script).stem) if "/" not in script else None
        defaults = model.OmegaConf.create(getattr(module, "DEFAULTS", {}))
        known = model.flatten(model.OmegaConf.to_container(defaults))
        for key in re.findall(r"(?:^| )([a-z_.0-9]+)=", arguments) if known else ():
            assert key in known, f"{script} {arguments}: {key}"
        shlex.split(arguments)


def test_the_demos_rates_are_those_of_infer():
    from demo import run

    lines = [{"target": "five six", "text": "5 six"}, {"target": "seven", "text": "seven"}] * 20
    found = run.rate(lines)
    assert found["wer"] == pytest.approx(1 / 3) and found["wer_field"] == 0
    assert found["se"] == pytest.approx(0.035, abs=0.01)  # of 40 clips


def test_nothing_unsafe_is_loaded():
    for path in python_files():
        text = path.read_text(encoding="utf-8")
        if path.name != Path(__file__).name:
            for word in ("trust_remote_code=True", "weights_only=False", "except: pass"):
                assert word not in text, path


def test_size_is_a_feature():
    for name, most in BUDGETS.items():
        path = ROOT / name
        files = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        lines = sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files)
        assert lines <= most, f"{name}: {lines} lines, at most {most}"
    words = re.findall(r"\S*\w\S*", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(words) <= 1600, f"README.md: {len(words)} words"  # without the lines of its tables
