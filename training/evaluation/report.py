"""The picture report: one HTML file that needs nothing else."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from icexport.conditions.base import Condition
from icexport.host.files import write_whole
from icexport.host.pictures import to_image
from icexport.host.pixels import to_pixels
from training.evaluation.generate import Item, open_picture, picture_path
from training.evaluation.metrics import metrics_of, read

SHOWN = 4
"""Pictures in each of the rows best, median and worst."""

SIDE = 256
"""Longer side of an embedded picture, in pixels; smaller ones stay as they are."""

SET_TITLES = {"control": "with control", "no_control": "control off", "chance": "other map"}

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8889; --bar: #3b82c4; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p.note, td.note, figcaption { color: color-mix(in srgb, currentColor 65%, transparent); }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
td small { color: color-mix(in srgb, currentColor 60%, transparent); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(WIDTHpx, 1fr)); gap: 1rem; }
.card { border: 1px solid var(--line); border-radius: 8px; padding: .7rem; }
.card header { display: flex; justify-content: space-between; gap: .5rem; font-size: .9rem; }
.card header span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.card header b { font-variant-numeric: tabular-nums; }
.strip { display: flex; gap: .4rem; margin-top: .5rem; }
figure { margin: 0; flex: 1 1 0; } figcaption { font-size: .75rem; }
img { width: 100%; display: block; border-radius: 3px; background: #888; } img.small { image-rendering: pixelated; }
"""


def write_report(
    path: Path,
    result: Mapping[str, Any],
    condition: Condition,
    items: Sequence[Item],
    folders: Mapping[str, Path],
    device: str = "cpu",
) -> None:
    """Write the report; it appears complete or not at all.

    Args:
        path: path of the HTML file.
        result: what ``evaluation.json`` holds.
        condition: reads the shown pictures once more.
        items: the conditions.
        folders: folder of each set of pictures, ``control`` and perhaps ``no_control``.
        device: device where they are read.
    """
    title = f"{condition.name}: {result['settings'].get('model') or next(iter(result['settings'].values()))}"
    name, metric = next(iter(metrics_of(condition).items()))
    found = {item.id: item for item in items}
    cards = {
        place: "".join(_card(found[row["id"]], row, name, condition, folders, device) for row in rows)
        for place, rows in select(result["pictures"], name, metric.higher_is_better).items()
    }
    sections = "".join(
        f"<h2>{place.capitalize()} by {escape(metric.title)}</h2><div class='cards'>{card}</div>"
        for place, card in cards.items()
        if card
    )
    width = 130 * (2 + len(folders))
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{escape(title)}</title><style>{STYLE.replace("WIDTH", str(width))}</style></head><body>
<h1>{escape(title)}</h1>
<p class="note">{escape(_summary(result))}</p>
<h2>Control fidelity</h2>{_metrics(result["metrics"])}
<p class="note">Mean over pictures and 95 % bootstrap interval over conditions; the arrow points to better.
"Other map" is the same picture against the control map of another condition: what chance gives.</p>
<h2>Image statistics</h2>{_statistics(result["image_statistics"])}
<p class="note">Lower is better. Fr&eacute;chet distances shrink with the number of pictures: compare equal numbers on
equal data only.</p>
{sections}
<h2>Settings</h2>{_table(("", ""), _settings(result))}
</body></html>
"""
    write_whole(path, page)


def select(
    rows: Sequence[Mapping[str, Any]], name: str, higher_is_better: bool, count: int = SHOWN
) -> dict[str, list[Mapping[str, Any]]]:
    """Return the best, the middle and the worst pictures by one metric, none of them twice.

    Args:
        rows: ``result["pictures"]``.
        name: name of the metric.
        higher_is_better: whether more is better.
        count: number of pictures for each place; fewer if there are not enough.
    """
    ranked = sorted(rows, key=lambda row: row["control"][name], reverse=higher_is_better)
    count = min(count, max(1, len(ranked) // 3))
    start = (len(ranked) - count) // 2
    best, worst = ranked[:count], ranked[max(count, len(ranked) - count) :]
    middle = [row for row in ranked[start : start + count] if row not in best and row not in worst]
    return {"best": best, "median": middle, "worst": worst}


def _card(
    item: Item, row: Mapping[str, Any], name: str, condition: Condition, folders: Mapping[str, Path], device: str
) -> str:
    """Return one picture beside its control map and what is read from it."""
    picture = open_picture(picture_path(folders["control"], item.id, row["group"]))
    reading = to_image(read(condition, to_pixels(picture).to(device)).maps[0].cpu())
    pictures = {"control map": open_picture(item.control), "picture": picture, "reading": reading}
    if "no_control" in folders:
        off = row["no_control"][name]
        pictures[f"control off: {off:.3g}"] = open_picture(picture_path(folders["no_control"], item.id, row["group"]))
    figures = "".join(
        f"<figure>{_embed(image)}<figcaption>{escape(label)}</figcaption></figure>"
        for label, image in pictures.items()
    )
    caption = escape(row["caption"] or item.id)
    score = f"{row['control'][name]:.3g}"
    return (
        f"<div class='card'><header><span title='{caption}'>{caption}</span><b>{score}</b></header>"
        f"<div class='strip'>{figures}</div></div>"
    )


def _embed(image: Image.Image) -> str:
    image.thumbnail((SIDE, SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    small = " class='small'" if max(image.size) <= SIDE // 2 else ""
    return f"<img{small} alt='' src='data:image/png;base64,{data}'>"


def _metrics(metrics: Mapping[str, Mapping[str, Any]]) -> str:
    sets = [name for name in SET_TITLES if any(name in row for row in metrics.values())]
    differences = any("control_minus_no_control" in row for row in metrics.values())
    head = ["metric", "unit", *(SET_TITLES[name] for name in sets), *["control gives"] * differences]
    columns = [*sets, *["control_minus_no_control"] * differences]
    rows = []
    for row in metrics.values():
        arrow = "\N{UPWARDS ARROW}" if row["higher_is_better"] else "\N{DOWNWARDS ARROW}"
        title = f"{escape(row['title'])} {arrow}" + (" <small>published protocol</small>" if row["legacy"] else "")
        if row["control"] is None:
            note = f"<td class='note' colspan='{len(columns)}'>not computed: {escape(row['reason'])}</td>"
        else:
            note = "".join(f"<td class='number'>{_number(row.get(name))}</td>" for name in columns)
        rows.append(f"<tr><td>{title}</td><td>{escape(row['unit'])}</td>{note}</tr>")
    return _page_table(head, rows)


def _statistics(statistics: Mapping[str, Mapping[str, Any]]) -> str:
    sets = [name for name in SET_TITLES if any(name in row for row in statistics.values())]
    rows = []
    for row in statistics.values():
        if "reason" in row:
            cells = f"<td class='note' colspan='{2 + len(sets)}'>not computed: {escape(row['reason'])}</td>"
            rows.append(f"<tr><td>{escape(row['title'])}</td>{cells}</tr>")
            continue
        for key, title in (("frechet", row["title"]), ("kernel", row["kernel_title"])):
            values = [*(row[name][key] for name in sets), row["between_real_halves"][key]]
            cells = "".join(f"<td class='number'>{value:.4g}</td>" for value in values)
            rows.append(f"<tr><td>{escape(title)}</td><td class='number'>{row['pictures']}</td>{cells}</tr>")
    return _page_table(["distance", "pictures", *(SET_TITLES[name] for name in sets), "halves of the real set"], rows)


def _settings(result: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in {**result["settings"], **result["extractor"], **result["versions"]}.items():
        yield name.replace("_", " "), str(value)


def _summary(result: Mapping[str, Any]) -> str:
    data = result["data"]
    text = f"{data['pictures']} pictures of {data['conditions']} held-out conditions from {data['source']}."
    if data["broken_pictures"]:
        text += f" {data['broken_pictures']} broken pictures were left out."
    if data["blank_control_maps"]:
        text += f" {len(data['blank_control_maps'])} control maps are blank."
    return text


def _number(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    if value["low"] is None:
        return f"{value['mean']:.4g}"
    return f"{value['mean']:.4g} <small>{value['low']:.4g} to {value['high']:.4g}</small>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return _page_table(head, [f"<tr>{row}</tr>" for row in cells])


def _page_table(head: Sequence[str], rows: Sequence[str]) -> str:
    titles = "".join(f"<th>{escape(title)}</th>" for title in head)
    return f"<table><tr>{titles}</tr>{''.join(rows)}</table>"
