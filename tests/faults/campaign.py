"""Campaigns of faults with counts: `make faults`. Every fault must be named in a sentence, or change no result.

    python tests/faults/campaign.py --kills 200 --flips 200 --disks 40 --csv tests/faults/table.csv
"""
import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import test_bad_plans
import test_checksums

from cmim_repro.core import Invalid
from cmim_repro.exhibits import table1
from cmim_repro.experiments.execution import execute, main
from cmim_repro.experiments.runs import Plan
from cmim_repro.experiments.store import Store
from cmim_repro.report.exhibit import Exhibit, declared, notebook_of

TEACHER, STUDENT, SETTINGS = test_checksums.TEACHER, test_checksums.STUDENT, test_checksums.SETTINGS
LONGEST = 120 # seconds after which a process hangs
FOUND = ('tries', 'named', 'unchanged', 'lost', 'silent', 'tracebacks', 'hangs')


def outcome(store):
    "Everything that must be the same whatever happened on the way; reading it verifies it."
    found = []
    for run in (TEACHER, STUDENT):
        result = store.result(run)
        found.append({'accuracy': result['accuracy'], 'metrics': store.metrics(run),
                      'weights': {name: value.tolist() for name, value in store.tensors(run, 'weights.safetensors').items()}})
    return found


def forked(work, delay=None, limit=None):
    "The exit status of a process that does the work: 0, 2 for a sentence, 3 for a traceback, None if it hung, -9 if killed."
    child = os.fork()
    if not child:
        if limit is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 3
        try:
            warnings.simplefilter('ignore')
            work()
            code = 0
        except Invalid as error: code = 2 if '\n' not in str(error) else 3
        except BaseException: traceback.print_exc()
        os._exit(code)
    until = time.monotonic() + (LONGEST if delay is None else delay)
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done: return os.waitstatus_to_exitcode(status)
        time.sleep(.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None if delay is None else -signal.SIGKILL


def compute(folder): execute(Plan.of([STUDENT]), Store(folder), SETTINGS)


def tally(counts, status, same=None):
    "Count how a process has ended, and whether the results are the right ones."
    counts['tries'] += 1
    counts['named'] += status == 2
    counts['tracebacks'] += status == 3
    counts['hangs'] += status is None
    if same is not None: counts['unchanged' if same else 'silent'] += 1


def kills(count, folder, wanted, seconds):
    "SIGKILL at random moments, until the run ends; then the results must be what they are without."
    counts, chance = Counter(), random.Random(0)
    while counts['tries'] < count:
        place = folder/'store'
        status = -signal.SIGKILL
        while status == -signal.SIGKILL and counts['tries'] < count:
            status = forked(partial(compute, place), delay=chance.uniform(0, seconds))
            if status == -signal.SIGKILL: tally(counts, status)
        status = forked(partial(compute, place))
        if status == 0 and outcome(Store(place)) == wanted: counts['unchanged'] += 1
        else: counts['lost'] += 1
        shutil.rmtree(place)
    return counts


def disks(count, folder, wanted, largest):
    "No file may become larger than a level: the run ends with a sentence, and later with the right results."
    counts = Counter()
    for i in range(count):
        place = folder/'store'
        tally(counts, forked(partial(compute, place), limit=round(largest*(i + .5)/count)))
        same = forked(partial(compute, place)) == 0 and outcome(Store(place)) == wanted
        counts['unchanged' if same else 'lost'] += 1
        shutil.rmtree(place)
    return counts


def flips(count, folder, wanted, half):
    "A bit of any file is flipped, then whoever needs it computes and reads: a sentence, or the right results."
    counts, chance = Counter(), random.Random(1)
    files = sorted(path.relative_to(half) for path in half.glob('*-*/*') if path.suffix != '.lock')
    for i in range(count):
        place = folder/'store'
        shutil.copytree(half, place)
        path = place/files[i % len(files)]
        test_checksums.flipped(path, chance.randrange(8*path.stat().st_size))

        def look(place=place):
            compute(place)
            if outcome(Store(place)) != wanted: os._exit(4)
        status = forked(look)
        tally(counts, status, None if status in (2, 3, None) else status == 0)
        shutil.rmtree(place)
    return counts


def plans(folder):
    "Plans with a bad field, and files that are none."
    counts = Counter()
    for text in [*map(json.dumps, ([plan] for plan in test_bad_plans.PLANS)), *test_bad_plans.TEXTS]:
        (folder/'plan.json').write_text(text, encoding='utf-8')

        def read():
            with contextlib.redirect_stderr(io.StringIO()) as said: code = main([str(folder/'plan.json'), '--store', str(folder/'plans'), '--device', 'cpu'])
            if code == 2 and said.getvalue().count('\n') == 1: raise Invalid('refused')
        tally(counts, forked(read))
    counts['silent'] = counts['tries'] - counts['named'] - counts['tracebacks'] - counts['hangs']
    return counts


VALUES = ('two', '-1', 'nan', '[1', 'a=b', 'epochs=two', 'per_class=0', 'held_out=1', 'kd.temperature=0', '=3', 'mkd.dimension=1000000000', '1000000')


def parameters(folder):
    "Parameters that make no sense, or little: a sentence, or a plan."
    counts = Counter()
    for name in declared(notebook_of('table1')):
        for value in VALUES:
            if name in ('store', 'figures', 'data_root'): continue # any text is a name
            asked = {'profile': 'smoke', 'store': str(folder/'asked'), 'figures': str(folder/'figures'), 'plan_only': 'True', 'seeds': '1', name: value}

            def read(asked=asked):
                with contextlib.redirect_stdout(io.StringIO()): Exhibit('table1', asked).plan(table1.entries)
            status = forked(read)
            tally(counts, status)
            counts['unchanged'] += status == 0
    return counts


def report(args):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        started = time.monotonic()
        compute(folder/'whole')
        seconds, wanted = time.monotonic() - started, outcome(Store(folder/'whole'))
        largest = max(path.stat().st_size for path in (folder/'whole').glob('*/*'))
        half = Store(folder/'half')
        execute(Plan.of([TEACHER]), half, SETTINGS)
        test_checksums.after_one_epoch(half, STUDENT)
        found = {'kills': kills(args.kills, folder, wanted, seconds), 'levels of a full disk': disks(args.disks, folder, wanted, largest),
                 'flipped bits': flips(args.flips, folder, wanted, folder/'half'), 'bad plans': plans(folder), 'bad parameters': parameters(folder)}
    return pd.DataFrame([[counts[name] for name in FOUND] for counts in found.values()], index=pd.Index(found, name='campaign'), columns=FOUND)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in {'kills': 200, 'flips': 200, 'disks': 40}.items(): parser.add_argument(f'--{name}', type=int, default=count)
    parser.add_argument('--csv', help='also write the table here')
    args = parser.parse_args()
    table = report(args)
    print(table.to_string())
    if args.csv: table.to_csv(args.csv)
    sys.exit(int(table[['lost', 'silent', 'tracebacks', 'hangs']].to_numpy().any()))
