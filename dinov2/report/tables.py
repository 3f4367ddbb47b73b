"""Tables of texts as HTML; all texts are escaped here."""

import re
from collections.abc import Mapping, Sequence
from html import escape

ABSENT = "\N{EN DASH}"
WIDE = 4  # columns that can fit on a phone


def table(headings: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "", numbers: int = 0) -> str:
    """A table; the first cell of a row is its heading, the last `numbers` columns are aligned right."""
    left = len(headings) - numbers

    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        aligned = ' class="number"' if column >= left else ""
        return f"<{tag}{scope}{aligned}>{breakable(text)}</{tag}>"

    head = [cell("th", text, column, ' scope="col"') if text else "<td></td>" for column, text in enumerate(headings)]
    body = [
        [cell("th", row[0], 0, ' scope="row"'), *(cell("td", text, column) for column, text in enumerate(row[1:], 1))]
        for row in rows
    ]
    return _table(caption, head, body)


def comparison(headings: Sequence[str], columns: Sequence[Mapping[str, str]], caption: str) -> str:
    """A column for each heading, a row for each name in any of them; rows that differ stand out."""
    head = ["<td></td>", *(f'<th scope="col">{escape(heading)}</th>' for heading in headings)]
    body = []
    for name in dict.fromkeys(name for column in columns for name in column):
        texts = [column.get(name, ABSENT) for column in columns]
        kind = ' class="other"' if len(set(texts)) > 1 else ""
        body.append(
            [f'<th scope="row">{breakable(name)}</th>', *(f"<td{kind}>{breakable(text)}</td>" for text in texts)]
        )
    return _table(caption, head, body)


def _table(caption: str, head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    label = f"<caption>{escape(caption)}</caption>" if caption else ""
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in body)
    note, kind = "", ""
    if len(head) > WIDE:
        note, kind = '<p class="wide">Goes on to the right: push the table sideways.</p>', ' class="many"'
    return (
        f'{note}<div class="scroll" tabindex="0"><table{kind}>{label}<thead><tr>{"".join(head)}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def breakable(text: str) -> str:
    """Escaped text that may go on in the next line after these signs: long keys and datasets must, on a phone."""
    return re.sub(r"([._:](?=[^\W\d]))", r"\1<wbr>", escape(text))
