"""A page to read and listen: every recording of a .jsonl of infer.py, the worst first.

    python report.py calls.jsonl [page.html]

Each recording has a player, its texts, and, where it has a target, the words (Chinese: characters)
that differ, marked in both; of a call whose channels were heard apart, the speakers' turns, with
times that lead there; of one that a duplex model answered, both sides, which play together, and a
drawing of who speaks when. The page is one file; only its players refer to others, by paths
relative to its folder.
"""

import html
import json
import os
import sys
from pathlib import Path
from urllib.parse import quote

import jiwer

import model

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>earshot: transcripts</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 56rem; color: #1b1f24;
  padding: 0 .8rem 3rem }
article { border-top: 1px solid #d0d7de; padding: .7rem 0 }
audio { width: 100%; height: 2.2rem; margin-top: .3rem } h2 { font-size: 1rem; margin: 0 }
p { margin: .15rem 0; overflow-wrap: anywhere } small, .name { color: #59636e }
.name { display: inline-block; min-width: 8rem } del, ins { text-decoration: none }
del { background: #ffd7d5 } ins { background: #ccf2d5 }
button { font: inherit; color: #0550ae; background: none; border: 0; padding: 0; cursor: pointer }
td, th { padding: .1rem .9rem .1rem 0; text-align: left } input[type=search] { width: 60% }
</style></head><body>
<h1>Transcripts</h1>
@SUMMARY@
<p><input type="search" id="find" placeholder="find text or key">
<label><input type="checkbox" id="wrong"> errors only</label></p>
<p><small>Worst first. <del>missed or replaced</del> <ins>wrong or added</ins></small></p>
@CLIPS@
<script>
const find = document.getElementById("find"), wrong = document.getElementById("wrong");
function filter() {
  for (const clip of document.querySelectorAll("article"))
    clip.hidden = wrong.checked && clip.dataset.errors === "0" ||
      !clip.textContent.toLowerCase().includes(find.value.toLowerCase());
}
find.oninput = wrong.onchange = filter;
document.onclick = event => {
  if (!event.target.dataset.at) return;
  for (const audio of event.target.closest("article").querySelectorAll("audio")) {
    audio.currentTime = event.target.dataset.at;
    audio.play();
  }
};
for (const sides of document.querySelectorAll(".sides")) {
  const [one, other] = sides.querySelectorAll("audio");
  for (const [audio, twin] of other ? [[one, other], [other, one]] : [])
    audio.onplay = () => {
      if (twin.paused) { twin.currentTime = audio.currentTime; twin.play(); }
    };
}
</script></body></html>
"""
KINDS = {"text": "text", "ctc_text": "CTC", "encoder_text": "encoder's CTC"}


def mark_errors(reference, hypothesis):
    """Both texts as HTML, in the units that are scored, with what differs marked."""
    texts = [model.normalize_text(text) for text in (reference, hypothesis)]
    cjk = any(map(model.is_cjk, texts[0]))  # as model.error_rate decides
    said, heard = (model.score_units(text, cjk) for text in texts)
    lines, gap = ([], []), "" if cjk else " "
    found = jiwer.process_words([" ".join(said)], [" ".join(heard)])
    for step in found.alignments[0]:
        one = said[step.ref_start_idx : step.ref_end_idx]
        other = heard[step.hyp_start_idx : step.hyp_end_idx]
        for line, units, tag in zip(lines, (one, other), ("del", "ins"), strict=True):
            text = html.escape(gap.join(units))
            if text:
                line.append(text if step.type == "equal" else f"<{tag}>{text}</{tag}>")
    return [gap.join(line) for line in lines]


def turns(line):
    """HTML of what each speaker says and when, of a call whose channels were heard apart."""
    rows = []
    for part in (part for part in line["segments"] if "channel" in part and part["text"]):
        at = part["start"] + line.get("offset_s", 0.0)
        clock = f'<button data-at="{at:.3f}">{int(at) // 60}:{int(at) % 60:02}</button>'
        rows.append(f"<p>{clock} Speaker {part['channel'] + 1}: {html.escape(part['text'])}</p>\n")
    return "".join(rows)


def drawing(turns, seconds):
    """SVG of who speaks when: the user's turns above, the agent's below, seconds underneath."""
    scale, parts = 900 / max(seconds, 1.0), []
    for turn in turns:
        x, width = turn["start"] * scale, max(2.0, (turn["end"] - turn["start"]) * scale)
        y, colour = (4, "#9ec5fe") if turn["role"] == "user" else (34, "#a3cfbb")
        text = html.escape(turn["text"])
        parts.append(
            f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="26" rx="4" fill="{colour}">'
            f'<title>{text}</title></rect><svg x="{x:.1f}" y="{y}" width="{width:.1f}" height="26">'
            f'<text x="5" y="17" font-size="12">{text}</text></svg>'
        )
    step = max(1, round(seconds / 15))
    for second in range(0, int(seconds) + 1, step):
        parts.append(f'<text x="{second * scale:.1f}" y="76" font-size="11">{second} s</text>')
    return f'<svg viewBox="0 0 920 80" width="100%">{"".join(parts)}</svg>'


def dialogue(line, folder):
    """One call that a duplex model answered: both sides, and their turns."""
    rows, sources = "", [line["source"], line.get("agent_audio")]
    for turn in line["turns"]:
        clock = f'<button data-at="{turn["start"]:.2f}">{turn["start"]:.2f} s</button>'
        rows += f"<p>{clock} {turn['role']}: {html.escape(turn['text'])}</p>\n"
    sides = [quote(os.path.relpath(source, folder)) for source in filter(None, sources)]
    players = "".join(
        f'<p>{name}<audio controls preload="none" src="{html.escape(source)}"></audio></p>\n'
        for name, source in zip(("user", "agent"), sides, strict=False)
    )
    end = max([line["duration_s"], *(turn["end"] for turn in line["turns"])])
    return 0.0, (
        f'<article class="sides" data-errors="0"><h2>{html.escape(line["key"])} '
        f"<small>{line['duration_s']:.1f} s</small></h2>\n{drawing(line['turns'], end)}\n"
        f"{players}{rows}</article>"
    )


def article(line, folder):
    """One recording. Output: its errors per unit (-1: not scored), HTML."""
    if "turns" in line:
        return dialogue(line, folder)
    texts = {label: html.escape(line[kind]) for kind, label in KINDS.items() if kind in line}
    if "translation" in line:
        texts["translation"] = html.escape(line["translation"])
    errors, note, rate = 0, "", -1.0
    if "target" in line:
        counts = model.error_rate([line["target"]], [line["text"]])
        errors, rate = counts["errors"], counts["errors"] / max(1, counts["units"])
        note = f" · {errors} errors in {counts['units']}"
        target, text = mark_errors(line["target"], line["text"])
        texts = {"reference": target} | texts | {"text": text}
    if "speech_of" in line:
        note += f" · speech of {html.escape(line['speech_of'])}"
    rows = "\n".join(f'<p><span class="name">{k}</span> {v}</p>' for k, v in texts.items())
    source = html.escape(quote(os.path.relpath(line.get("speech", line["source"]), folder)))
    source += f"#t={line['offset_s']}" if "offset_s" in line else ""
    return rate, (
        f'<article data-errors="{errors}"><h2>{html.escape(line["key"])} '
        f"<small>{line['duration_s']:.1f} s{note}</small></h2>\n{rows}\n"
        f'<audio controls preload="none" src="{source}"></audio>\n{turns(line)}</article>'
    )


def make_page(lines, folder):
    """HTML of the lines of a .jsonl; folder: where the page will lie."""
    scored, table = [line for line in lines if "target" in line], ""
    for kind, label in KINDS.items():
        if scored and all(kind in line for line in scored):
            pairs = [line["target"] for line in scored], [line[kind] for line in scored]
            found = model.error_rate(*pairs)
            edits = (found[name] for name in ("substitutions", "deletions", "insertions", "units"))
            cells = "".join(f"<td>{number}</td>" for number in edits)
            table += f"<tr><td>{label}</td><td>{100 * found['rate']:.2f} %</td>{cells}</tr>"
    names = ("", "error rate", "substituted", "deleted", "inserted", "of")
    head = "<tr>" + "".join(f"<th>{name}</th>" for name in names) + "</tr>"
    hours = sum(line["duration_s"] for line in lines) / 3600
    summary = f"<p>{len(lines)} recordings, {hours:.2f} h, {len(scored)} of them scored</p>"
    summary += f"<table>{head}{table}</table>" if table else ""
    articles = sorted((article(line, folder) for line in lines), key=lambda pair: -pair[0])
    clips = "\n".join(text for _, text in articles)
    return PAGE.replace("@SUMMARY@", summary).replace("@CLIPS@", clips)


def main(arguments):
    if not 1 <= len(arguments) <= 2 or arguments[0].startswith("-"):
        print(__doc__.strip())
        return
    source, page = Path(arguments[0]), Path(arguments[-1]).with_suffix(".html")
    try:
        lines = [json.loads(text) for text in open(source, encoding="utf-8")]
        model.save(page, make_page(lines, page.parent))
    except (OSError, ValueError, KeyError, model.UserError) as error:
        sys.exit(f"error: {source}: {error!r}; expected the .jsonl that infer.py writes")
    print(page)


if __name__ == "__main__":
    main(sys.argv[1:])
