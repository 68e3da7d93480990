"""Draws docs/benchmarks.svg, the chart in the README, from the first table of docs/benchmarks.md.

python docs/draw_benchmarks.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

DOCS = Path(__file__).resolve().parent
SOURCE, CHART = DOCS / "benchmarks.md", DOCS / "benchmarks.svg"
GROUPS = {
    "8 bits": ("satchel int8", "OpenVINO GenAI Q8_0", "llama.cpp Q8_0", "onnxruntime-genai int8"),
    "4 bits": ("satchel int4", "OpenVINO GenAI Q4_0", "llama.cpp Q4_0", "onnxruntime-genai int4"),
}
COLORS = {"satchel": "#d9480f", "OpenVINO": "#74909e", "llama.cpp": "#94acb8", "onnxruntime-genai": "#b9c9d1"}


def speeds(document: str) -> dict[str, tuple[float, float]]:
    """Prefill and decode speed of each engine in tokens per second, from the table that has these columns."""
    lines = document.splitlines()
    header = next(i for i, line in enumerate(lines) if line.startswith("| engine |"))
    columns = [cell.strip() for cell in lines[header].strip("|").split("|")]
    prefill, decode = (columns.index(f"{phase}, tokens/s") for phase in ("prefill", "decode"))
    found = {}
    for line in lines[header + 2 :]:
        if not line.startswith("|"):
            break
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found[cells[0]] = (float(cells[prefill].replace(",", "")), float(cells[decode].replace(",", "")))
    return found


def draw(measured: dict[str, tuple[float, float]], chart: Path) -> None:
    """Write the bar chart of `measured` (tokens per second) as SVG. The same numbers give the same file."""
    mpl.use("svg")
    from matplotlib import pyplot

    mpl.rcParams.update({"svg.hashsalt": "satchel", "svg.fonttype": "none", "font.size": 9})
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for axis, phase, title in zip(axes, (0, 1), ("prefill, 512 tokens", "decode, 128 tokens"), strict=True):
        labels, values, places, place = [], [], [], 0.0
        for group in GROUPS.values():
            for engine in group:
                labels.append(engine)
                values.append(measured[engine][phase])
                places.append(place)
                place -= 1
            place -= 0.6
        colors = [next(color for name, color in COLORS.items() if label.startswith(name)) for label in labels]
        bars = axis.barh(places, values, color=colors, height=0.8)
        axis.bar_label(bars, labels=[f"{value:,.0f}" for value in values], padding=3)
        axis.set_yticks(places, labels if phase == 0 else [""] * len(labels))
        axis.set_title(f"{title} (tokens/s, higher is better)", fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(x=0.12)
    figure.savefig(chart, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    draw(speeds(SOURCE.read_text(encoding="utf-8")), CHART)
    print(f"wrote {CHART}")
