"""How far a long piece of work is: a bar on a terminal, a line every half minute in a log file."""
import contextlib
import sys
import time

import click

INTERVAL = 30.0                # seconds between two lines


@contextlib.contextmanager
def progress(length, label, unit="bytes"):
    """Yields advance(count), which is told what has been done since the last call, of `length` in all."""
    if sys.stderr.isatty():
        with click.progressbar(length=length, label=label, file=sys.stderr) as bar:
            yield bar.update
        return
    scale, unit = (1e6, "MB") if unit == "bytes" else (1, unit)
    started = told = time.monotonic()
    done = 0

    def advance(count):
        nonlocal told, done
        done += count
        now = time.monotonic()
        if now - told >= INTERVAL and done:
            told = now
            left = (now - started) * (length - done) / done / 60
            click.echo(f"{label}: {done / scale:,.0f} of {length / scale:,.0f} {unit}, {left:,.0f} minutes left", err=True)

    yield advance
