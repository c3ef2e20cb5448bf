"""Run train.py again and again, killing it with SIGKILL after a random time, until it has finished.

    python tests/kill_harness.py SEED KILLS OUT [options of train.py]

Python and torch are loaded once; each life is a fork, so that 25 kills take seconds and not minutes. Only a
kill that hit a living process counts. On a fast machine a few lives would do all steps; so none may go further than its
share of the first 80%, and as many kills as were asked for come true. Wants --steps and --log-every 1 in the options.
"""
import os
import random
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch  # noqa: E402

torch.set_num_threads(1)  # no thread pool before the forks

import train  # noqa: E402


def life(arguments):
    child = os.fork()
    if child == 0:
        try:
            train.main(arguments)
        except SystemExit as stop:
            os._exit(stop.code or 0)
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
    return child


def steps_logged(out):
    try:
        with open(os.path.join(out, "metrics.jsonl"), "rb") as file:
            return file.read().count(b'"loss"')
    except FileNotFoundError:
        return 0


def let_live(out, seconds, share, delay):
    """Return after so many seconds, or soon after a step that this life has made, if that is `share` or a later one."""
    end, before, moved = time.monotonic() + seconds, steps_logged(out), False
    while time.monotonic() < end:
        steps = steps_logged(out)
        moved = moved or steps != before  # until the new process cuts the log, it is that of the one before
        if moved and steps >= share:
            return time.sleep(delay)
        time.sleep(0.005)


def main(seed, kills, out, *options):
    rng, killed, lives = random.Random(int(seed)), 0, 0
    share = 0.8 * int(options[options.index("--steps") + 1]) / int(kills)
    while True:
        resume = os.path.exists(os.path.join(out, "run.json"))
        child, lives = life(["--out", out, *options, *(["--resume"] if resume else [])]), lives + 1
        if killed < int(kills):
            let_live(out, rng.uniform(0.1, 1.2), share * (killed + 1), rng.uniform(0, 0.02))
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
                killed += 1
                continue
            break
        status = os.waitpid(child, 0)[1]
        if status:
            sys.exit(f"life {lives} ended with status {status}")
        break
    print(f"{lives} lives, {killed} kills")


main(*sys.argv[1:])
