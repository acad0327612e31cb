"""The rows of xlformer.bench as text, for people."""

from __future__ import annotations

from xlformer.tables import aligned, binary_size


def render(rows: list[dict]) -> str:
    """A line for each row; columns in which no row has anything are left out."""
    columns = {name: [_cell(name, row) for row in rows] for name in _CELLS}
    columns = {name: cells for name, cells in columns.items() if set(cells) != {""}}
    names = [row["name"] for row in rows]
    lines = aligned([("", *columns), *zip(names, *columns.values(), strict=True)])
    for number, row in enumerate(rows, start=1):
        if row.get("out_of_memory"):
            lines[number] += f"  out of memory: {row['out_of_memory']}"
    return "\n".join([*lines, *_notes(rows)])


def _cell(name: str, row: dict) -> str:
    return "" if row.get("out_of_memory") else _CELLS[name](row)


def _share(value) -> str:
    return "-" if value is None else f"{value:.1%}"


def _billions(value) -> str:
    return "-" if value is None else f"{value / 1e9:,.3g}"


def _megabytes(value) -> str:
    return "-" if value is None else f"{value / 1e6:,.1f}"


def _published(row, key: str, text) -> str:
    return text(row, row["published"]) if row.get("published", {}).get(key) else ""


_CELLS = {
    "tokens/s": lambda row: f"{row['tokens_per_second']:,.0f}",
    "published": lambda row: _published(
        row, "tokens_per_second", lambda _, p: f"{p['tokens_per_second']:,.0f}"
    ),
    "ratio": lambda row: _published(
        row,
        "tokens_per_second",
        lambda row, p: f"{row['tokens_per_second'] / p['tokens_per_second']:.2f}",
    ),
    "ms": lambda row: f"{row['ms']:.2f}",
    "published ms": lambda row: _published(row, "ms", lambda _, p: f"{p['ms']:.2f}"),
    "spread": lambda row: f"{row['spread']:.1%}",
    "GFLOP": lambda row: _billions(row["flops"]),
    "GFLOP/s": lambda row: _billions(row["flops_per_second"]),
    "MFU": lambda row: _share(row["mfu"]),
    "of matmul": lambda row: _share(row["of_matrix_products"]),
    "memory": lambda row: "-" if row["memory"] is None else binary_size(row["memory"]),
    "MB by XLA": lambda row: _megabytes(row["bytes_accessed"]),
    "compile s": lambda row: f"{row['compile_seconds']:.1f}",
    "host ms": lambda row: f"{row['host_ms']:.2f}",
    "parameters": lambda row: f"{row['parameters']:,}" if "parameters" in row else "",
}


def _notes(rows) -> list[str]:
    """What a reader could take for something else."""
    found = ["MB by XLA: of a loop (layers) one round, of a kernel its operands once"]
    said = {}
    for row in rows:
        if row.get("published"):
            said.setdefault(row["published"]["device"], []).append(row["name"])
    for device, cases in said.items():
        few = f" ({'; '.join(cases)})" if len(said) > 1 else ""
        found.append(f"published: {device}{few}; compare on the same device only")
    return found
