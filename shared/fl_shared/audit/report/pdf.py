"""The page as PDF: whose statement it is and the page's number on each page, and the signed JSON attached."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_shared.audit.report.page import Figure, Lines, Section, Table, clean, running_head, title

if TYPE_CHECKING:
    from fpdf import FPDF

_GREY, _INK, _PALE = (240, 243, 246), (20, 24, 28), (110, 116, 122)
_MARGIN = 18.0  # mm
_DIGEST = 63  # letters; a longer word is a digest, which may be broken anywhere


def render(sections: Sequence[Section], document: dict[str, Any], name: str) -> bytes:
    """Return the PDF; `name` is the attachment's. Needs fpdf2 and matplotlib (the extra `report`)."""
    body = document["body"]
    pdf = _paper(*map(clean, running_head(body)))
    pdf.set_title(running_head(body)[0])
    pdf.set_subject(running_head(body)[1])
    pdf.set_creator("Concordat")
    pdf.add_page()
    pdf.set_font("DejaVu", "B", 20)
    pdf.multi_cell(0, 10, clean(title(body)), align="L", new_x="LMARGIN", new_y="NEXT")
    for section in sections:
        _section(pdf, section)
    _section(
        pdf,
        Section(
            "Electronic signature",
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


def _paper(left: str, right: str) -> FPDF:
    """Return an empty A4 document with `left` and `right` above each page and its number below."""
    import matplotlib as mpl
    from fpdf import FPDF

    class Paper(FPDF):
        """A4 with running head and page numbers."""

        def header(self) -> None:
            """Write the running head."""
            self.set_font("DejaVu", "", 7)
            self.set_text_color(*_PALE)
            self.cell(self.epw * 0.68, 5, left)
            self.cell(self.epw * 0.32, 5, right, align="R", new_x="LMARGIN", new_y="NEXT")
            self.set_draw_color(*_PALE)
            self.line(self.l_margin, self.get_y(), self.w - self.r_margin, self.get_y())
            self.ln(5)
            self.set_text_color(*_INK)

        def footer(self) -> None:
            """Write the page's number."""
            self.set_y(-14)
            self.set_font("DejaVu", "", 7)
            self.set_text_color(*_PALE)
            self.cell(0, 5, f"Page {self.page_no()} of {{nb}}", align="R")
            self.set_text_color(*_INK)

    pdf = Paper(format="A4")
    pdf.set_margins(_MARGIN, 12, _MARGIN)
    pdf.set_auto_page_break(auto=True, margin=20)
    fonts = Path(mpl.get_data_path()) / "fonts" / "ttf"  # the core fonts know no Greek
    pdf.add_font("DejaVu", "", fonts / "DejaVuSans.ttf")
    pdf.add_font("DejaVu", "B", fonts / "DejaVuSans-Bold.ttf")
    return pdf


def _section(pdf: FPDF, section: Section) -> None:
    # A heading stays with what it heads; room to sign is not torn apart.
    needed = 30.0 + max(
        (pdf.epw * 3.6 / 7 if isinstance(block, Figure) else 0.0 for block in section.blocks), default=0
    )
    if any(isinstance(block, Lines) for block in section.blocks):
        needed = 95.0
    if section.title and pdf.will_page_break(needed):
        pdf.add_page()
    pdf.ln(3)
    if section.title:
        pdf.set_font("DejaVu", "B", 11)
        pdf.multi_cell(0, 6, clean(section.title), align="L", new_x="LMARGIN", new_y="NEXT")
        pdf.ln(1)
    for block in section.blocks:
        if isinstance(block, Table):
            _table(pdf, block)
        elif isinstance(block, Figure):
            pdf.image(io.BytesIO(block.png), w=pdf.epw, alt_text=block.alt)
        elif isinstance(block, Lines):
            _lines(pdf, block)
        else:
            _paragraph(pdf, block)


def _paragraph(pdf: FPDF, text: str) -> None:
    from fpdf.enums import WrapMode

    pdf.set_font("DejaVu", "", 8.5)
    wrap = WrapMode.CHAR if any(len(word) > 90 for word in text.split()) else WrapMode.WORD  # a digest has no spaces
    pdf.multi_cell(0, 4.6, clean(text), align="L", new_x="LMARGIN", new_y="NEXT", wrapmode=wrap)
    pdf.ln(1.2)


def _lines(pdf: FPDF, block: Lines) -> None:
    for signer in block.signers:
        pdf.ln(3)
        pdf.set_font("DejaVu", "B", 8.5)
        pdf.cell(0, 5, clean(signer), new_x="LMARGIN", new_y="NEXT")
        pdf.ln(9)
        pdf.set_font("DejaVu", "", 7)
        pdf.set_draw_color(*_INK)
        gap, start, top = 5.0, pdf.l_margin, pdf.get_y()
        width = (pdf.epw - 3 * gap) / 4
        for number, label in enumerate(("Name", "Function", "Date", "Signature")):
            x = start + number * (width + gap)
            pdf.line(x, top, x + width, top)
            pdf.set_xy(x, top + 0.5)
            pdf.cell(width, 4, label)
        pdf.set_xy(start, top + 7)


def _table(pdf: FPDF, table: Table) -> None:
    from fpdf.fonts import FontFace

    pdf.set_font("DejaVu", "", 7)
    head = any(table.head)
    rows = [[clean(cell) for cell in row] for row in table.rows]
    if not rows:
        _paragraph(pdf, "None.")
        return
    widths = tuple(table.widths) or tuple(1.0 for _ in table.head)
    pdf.set_draw_color(190, 196, 202)
    with pdf.table(
        col_widths=widths,
        first_row_as_headings=head,
        headings_style=FontFace(emphasis="BOLD", fill_color=_GREY),
        borders_layout="HORIZONTAL_LINES",
        line_height=3.6,
        padding=(0.7, 1.0),
        text_align="LEFT",
        wrapmode="CHAR"
        if any(len(word) > _DIGEST for row in rows for cell in row for word in cell.split())
        else "WORD",
    ) as drawn:
        if head:
            drawn.row(list(table.head))
        for row in rows:
            drawn.row(row)
    pdf.ln(2)
