"""Command line of the evaluation.

    python -m eval run --model DIR --data DIR --tasks ner,nli,qa,sts,retrieval,neutrality --seeds 3 --out report.json
    python -m eval compare BASELINE.json CANDIDATE.json
    python -m eval ablate --config FILE.json --out DIR        # MLM, + adversary, + distillation, all: trained and compared
    python -m eval show report.json                       # Markdown
    python -m eval report RUN report.json --out page.html     # training curves and scores on one page
    python -m eval download --out DOWNLOADS                   # public data sets
    python -m eval prepare DOWNLOADS DIR                      # ... as `run` reads them
"""
import os
import re
from pathlib import Path

import click

from eval import tasks

NAMES = (*tasks.TASKS, "neutrality")


class Commands(click.Group):
    """Bad input is one line and exit code 2."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except BrokenPipeError:                          # `| head` has read enough; click ends quietly
            raise
        except (ValueError, OSError) as error:
            told = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
            failure = click.ClickException(told)
            failure.exit_code = 2
            raise failure from None


class Duration(click.ParamType):
    """90s, 30m, 2h -> seconds."""
    name = "duration"

    def convert(self, value, param, ctx):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", value)
        if not match or not float(match[1]):
            self.fail(f"{value!r} is no duration; write 90s, 30m or 2h", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def task_list(ctx, param, value):
    if value is None:
        return None
    names = [name.strip() for name in value.split(",") if name.strip()]
    unknown = [name for name in names if name not in NAMES]
    if unknown or not names:
        raise click.BadParameter(f"no task {', '.join(unknown) or '(none given)'}; there are {', '.join(NAMES)}")
    return list(dict.fromkeys(names))


def new_file(ctx, param, value):
    """Before anything is computed: can a file of that name be written? Folders of it that are not there are made."""
    parent = next(p for p in Path(value).absolute().parents if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise click.BadParameter(f"{value}: {parent} is not a folder that can be written to")
    return value


def words(ctx, param, value):
    """a,b -> ["a", "b"]."""
    return [word.strip() for word in value.split(",") if word.strip()]


def rate_list(ctx, param, value):
    try:
        rates = tuple(float(rate) for rate in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is no list of numbers; write 5e-5,1e-4") from None
    if not all(0 < rate < 1 for rate in rates):
        raise click.BadParameter(f"{value}: learning rates are above 0 and below 1")
    return rates


@click.group(cls=Commands, context_settings=dict(help_option_names=["-h", "--help"], show_default=True))
def main():
    """Is this encoder good, and is it better than that one?"""


@main.command("run")
@click.option("--model", required=True, type=click.Path(file_okay=False), help="A model folder.")
@click.option("--data", required=True, type=click.Path(exists=True, file_okay=False), help="DIR/<task>/<data set>.")
@click.option("--tasks", "names", callback=task_list, show_default="all that DATA has", help=f"Of {', '.join(NAMES)}.")
@click.option("--out", required=True, type=click.Path(dir_okay=False), callback=new_file, help="The report, JSON.")
@click.option("--prefix", default="", help="Before each sentence of STS and retrieval; e5 models want 'query: '.")
@click.option("--seeds", default=3, type=click.IntRange(1), help="Fine-tuning runs a task.")
@click.option("--limit", type=click.IntRange(2), help="At most so many examples of each split.")
@click.option("--budget", type=Duration(), help="Wall time, as 30m: batches, steps, learning rates and seeds are cut to fit.")
@click.option("--rates", default="5e-5,1e-4,2e-4", callback=rate_list,
              help="Learning rates to try; the best on the source language's dev set is used.")
@click.option("--jobs", type=click.IntRange(1), help="Trainings at the same time, on a CPU. [default: about as many as cores]")
@click.option("--to-the-end", is_flag=True, help="Plan by the budget, but end no run early where it takes longer.")
@click.option("--first-seed", default=0, type=click.IntRange(0), help="The seeds are this one and those after it.")
@click.option("--like", type=click.Path(exists=True, dir_okay=False),
              help="A report: do as many steps, learning rates and seeds as it did.")
@click.option("--train-on", default="source", type=click.Choice(["source", "target", "all"]),
              help="Fine-tune on the source language (the others are zero-shot), on each language by itself, or on all.")
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), help="Of matrix products.")
@click.option("--device", default="cpu", type=click.Choice(["cpu", "cuda"]))
def run_command(model, data, names, out, like, **options):
    """Fine-tune and score a model on every language of every task."""
    from eval import report, run
    from launch import keep_freed_memory
    if options["device"] == "cpu":
        keep_freed_memory()
    names = names or (tasks.present(data) + ["neutrality"] * ("retrieval" in tasks.present(data)))
    run.run(model, data, names, out, like=like and report.load(like), say=click.echo, **options)
    click.echo(f"written: {out}")


@main.command("compare")
@click.argument("baseline", type=click.Path(exists=True, dir_okay=False))
@click.argument("candidate", type=click.Path(exists=True, dir_okay=False))
def compare_command(baseline, candidate):
    """Is CANDIDATE better than BASELINE? Two reports of `run`; Markdown on standard output."""
    from eval import report
    for line in report.compare(report.load(baseline), report.load(candidate)):
        click.echo(line)


@main.command("ablate")
@click.option("--config", "path", type=click.Path(exists=True, dir_okay=False),
              help="JSON of train.py options, with data, eval_data and teacher. [default: the atlas]")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="A folder; the same one goes on after a stop.")
@click.option("--tasks", "names", callback=task_list, show_default="all that the data have", help=f"Of {', '.join(tasks.TASKS)}.")
@click.option("--seeds", default=3, type=click.IntRange(1), help="Pretraining runs a rung, each fine-tuned once a task.")
@click.option("--budget", type=Duration(), help="Wall time, as 8h: steps, seeds and tests are cut to fit. [atlas: 15m]")
@click.option("--limit", type=click.IntRange(2), help="At most so many examples of each split.")
def ablate_command(path, out, **options):
    """MLM; + adversary; + distillation; all: pretrain and evaluate the four on one budget."""
    from eval import ablate
    if "neutrality" in (options["names"] or ()):
        raise click.BadParameter("neutrality is no task with a score to compare; leave it out", param_hint="--tasks")
    click.echo(ablate.ablate(ablate.read_config(path) if path else {}, out, say=click.echo, **options))
    click.echo(f"written: {out}/ablation.md")


@main.command("show")
@click.argument("path", metavar="REPORT", type=click.Path(exists=True, dir_okay=False))
def show_command(path):
    """The scores of a report, as Markdown."""
    from eval import report
    for line in report.table(report.load(path)):
        click.echo(line)


@main.command("report")
@click.argument("sources", metavar="RUN...", nargs=-1, required=True, type=click.Path(exists=True))
@click.option("--out", default="report.html", type=click.Path(dir_okay=False), callback=new_file,
              help="The page.")
def report_command(sources, out):
    """One HTML page of run folders of train.py and reports of `run`; it loads nothing from elsewhere."""
    from eval import page
    page.write(sources, out)
    click.echo(f"written: {out}")


@main.command("download")
@click.option("--out", required=True, type=click.Path(file_okay=False), help="Folder to download to.")
@click.option("--tasks", "wanted", default="", show_default="all", callback=words, help="Of these only, as ner,nli,qa,sts,retrieval.")
@click.option("--sets", "names", default="", show_default="all", callback=words, help="These only, as xnli,xquad.")
@click.option("--languages", default="", show_default="all", callback=words,
              help="Of sets with a file a language: these, and English.")
@click.option("--contact", help="E-mail or page by which the servers' operators can reach you.")
@click.option("--base-url", help="A mirror that has each file below its host's name.")
@click.option("--dry-run", is_flag=True, help="Print what would be downloaded and its size.")
def download_command(out, **options):
    """Download public data sets; run again to continue."""
    from eval import download
    download.download(out, **options)


@main.command("prepare")
@click.argument("src", type=click.Path(exists=True, file_okay=False))
@click.argument("dst", type=click.Path(file_okay=False))
@click.option("--sets", "names", default="", show_default="all", callback=words, help="These only, as xnli,xquad.")
@click.option("--languages", default="", show_default="all", callback=words, help="These, and English, only.")
@click.option("--train-on", default="source", type=click.Choice(["source", "all"]),
              help="Take the training data of English, or of all languages.")
def prepare_command(src, dst, **options):
    """Lay downloads (SRC) out as `run` reads them (DST); or tell of data that are so already in DST/tasks.json."""
    from eval import prepare
    prepare.prepare(src, dst, say=click.echo, **options)


if __name__ == "__main__":
    main()
