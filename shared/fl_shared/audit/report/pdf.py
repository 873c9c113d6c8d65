"""The page as PDF, with the signed JSON attached."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_shared.audit.report.page import Figure, Section, Table, clean

if TYPE_CHECKING:
    from fpdf import FPDF

_GREY = (243, 243, 243)


def render(title: str, subtitle: str, sections: Sequence[Section], document: dict[str, Any], name: str) -> bytes:
    """Return the PDF; `name` is the attachment's. Needs fpdf2 and matplotlib (the extra `report`)."""
    import matplotlib as mpl
    from fpdf import FPDF

    pdf = FPDF(format="A4")
    pdf.set_title(title)
    pdf.set_creator("Concordat")
    pdf.set_auto_page_break(auto=True, margin=15)
    fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"  # the core fonts know no Greek
    pdf.add_font("DejaVu", "", fonts / "DejaVuSans.ttf")
    pdf.add_font("DejaVu", "B", fonts / "DejaVuSans-Bold.ttf")
    pdf.add_page()
    pdf.set_font("DejaVu", "B", 16)
    pdf.multi_cell(0, 8, clean(title), new_x="LMARGIN", new_y="NEXT")
    _paragraph(pdf, subtitle)
    for section in sections:
        _section(pdf, section)
    _section(
        pdf,
        Section(
            "Signature",
            [
                f"Ed25519 by key {document['key']}",
                document["signature"],
                f"The signed document is attached as {name}; check it with: fl-audit statement --check {name}",
                "The file of signatures beside this PDF covers the PDF itself.",
            ],
        ),
    )
    signed = json.dumps(document, ensure_ascii=False, sort_keys=True, indent=1).encode()
    pdf.embed_file(bytes=signed, basename=name, mime_type="application/json", desc="the signed statement")
    return bytes(pdf.output())


def _section(pdf: FPDF, section: Section) -> None:
    drawing = any(isinstance(block, Figure) for block in section.blocks)
    if pdf.will_page_break(16 + pdf.epw * 3.6 / 7 if drawing else 24):  # a heading stays with what it heads
        pdf.add_page()
    pdf.ln(4)
    pdf.set_font("DejaVu", "B", 11)
    pdf.multi_cell(0, 6, clean(section.title), new_x="LMARGIN", new_y="NEXT")
    pdf.ln(1)
    for block in section.blocks:
        if isinstance(block, Table):
            _table(pdf, block)
        elif isinstance(block, Figure):
            pdf.image(io.BytesIO(block.png), w=pdf.epw, alt_text=block.alt)
        else:
            _paragraph(pdf, block)


def _paragraph(pdf: FPDF, text: str) -> None:
    from fpdf.enums import WrapMode

    pdf.set_font("DejaVu", "", 9)
    wrap = WrapMode.CHAR if any(len(word) > 90 for word in text.split()) else WrapMode.WORD  # a digest has no spaces
    pdf.multi_cell(0, 4.6, clean(text), align="L", new_x="LMARGIN", new_y="NEXT", wrapmode=wrap)
    pdf.ln(1.2)


def _table(pdf: FPDF, table: Table) -> None:
    from fpdf.fonts import FontFace

    pdf.set_font("DejaVu", "", 6.5)
    head = any(table.head)
    rows = [[clean(cell) for cell in row] for row in table.rows]
    if not rows:
        _paragraph(pdf, "None.")
        return
    widths = tuple(table.widths) or tuple(1.0 for _ in table.head)
    with pdf.table(
        col_widths=widths,
        first_row_as_headings=head,
        headings_style=FontFace(emphasis="BOLD", fill_color=_GREY),
        line_height=3.4,
        text_align="LEFT",
        wrapmode="CHAR" if any(len(word) > 24 for row in rows for cell in row for word in cell.split()) else "WORD",
    ) as drawn:
        if head:
            drawn.row(list(table.head))
        for row in rows:
            drawn.row(row)
    pdf.ln(1.5)
