"""Draw docs/figures/vllm-blocks.svg: block tables before and after a prompt is pruned."""

from __future__ import annotations

from pathlib import Path

BLOCK, WIDE, HIGH, LEFT = 4, 15, 20, 190
TEXT, VISION, FREE, NEW = "#b9c4d0", "#2f6fb0", "none", "#e0b050"
LAYERS = (("attentive, rate .7", 1), ("balanced, rate .4", 2), ("indifferent, rate .1", 4))
PROMPT = "t" * 4 + "v" * 20 + "t" * 3  # 27 tokens in 7 blocks; the last block has one free slot


def slots(cells: str, top: int, label: str) -> list[str]:
    """SVG of one row of token slots, with gaps between blocks."""
    fill = {"t": TEXT, "v": VISION, ".": FREE, "n": NEW}
    out = [f'<text x="{LEFT - 10}" y="{top + 14}" text-anchor="end">{label}</text>']
    for place, kind in enumerate(cells):
        x = LEFT + place * WIDE + place // BLOCK * 6
        dash = ' stroke-dasharray="2 2" stroke="#9aa5b1"' if kind == "." else ""
        out.append(
            f'<rect x="{x}" y="{top}" width="{WIDE - 2}" height="{HIGH}" rx="2" '
            f'fill="{fill[kind]}"{dash}/>'
        )
    return out


def note(x: int, y: int, text: str) -> str:
    """SVG of a line of text."""
    return f'<text x="{x}" y="{y}" fill="#5b6875">{text}</text>'


def main() -> None:
    lines = [note(LEFT, 18, "Every layer stores the whole prompt in 7 blocks of 4 slots.")]
    lines += slots(PROMPT, 28, "all layers")
    lines.append(
        note(LEFT, 82, "Then each layer moves the tokens that it keeps to the last slots.")
    )
    for row, (label, dead) in enumerate(LAYERS):
        kept = len(PROMPT) - dead * BLOCK
        cells = "." * (dead * BLOCK) + "t" * 4 + "v" * (kept - 7) + "t" * 3 + "n"
        lines += slots(cells, 94 + row * 30, label)
    bottom = 94 + 30 * len(LAYERS) + 12
    for x, kind, text in (
        (LEFT, TEXT, "text"),
        (LEFT + 90, VISION, "vision"),
        (LEFT + 190, NEW, "the next token, in its original slot"),
    ):
        lines.append(
            f'<rect x="{x}" y="{bottom - 11}" width="13" height="13" rx="2" fill="{kind}"/>'
        )
        lines.append(note(x + 20, bottom, text))
    lines.append(
        note(LEFT, bottom + 24, "The dashed blocks are freed, and other requests can use them.")
    )
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 680 240" '
        'font-family="sans-serif" font-size="13" fill="#2a3440" role="img" '
        'aria-label="Block tables of three layers before and after pruning">\n'
        '<rect width="680" height="240" fill="#ffffff"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )
    (Path(__file__).parent / "figures" / "vllm-blocks.svg").write_text(svg)


if __name__ == "__main__":
    main()
