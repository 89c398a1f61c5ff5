"""The parts that every section of the results page is made of."""

from __future__ import annotations

from depass_fast.evaluate.tables import markdown


def table(header: list[str], rows: list[list[str]], left: int = 3) -> str:
    """A Markdown table, the first ``left`` columns left-aligned."""
    return markdown(header, rows, left)


def heading(title: str, env: dict) -> str:
    """The title of a section and the place of the measurement."""
    place = ", ".join(f"{key} {env[key]}" for key in env if key not in ("device", "threads", "date"))
    threads = f", {env['threads']} threads" if "threads" in env else ""
    return f"## {title}: {env['device']}{threads} ({env['date']})\n\n{place}."


def percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def duration(seconds: float) -> str:
    """Three digits, in seconds or milliseconds."""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
