"""Campaigns of faults with counts: `make faults`. Every fault must be named in a sentence, or change no result.

    python tests/faults/campaign.py --kills 200 --flips 200 --disks 40 --plans 150 --parameters 150 --inputs 100 --csv tests/faults/table.csv

Each try has one end. Named: one sentence. Unchanged: the results are, bit for bit, what they are without the fault, at
once or after one more start. Lost: there are none after one more start. Silent: they differ and nobody said so, or what
makes no sense was accepted. A process hangs if it takes more than two minutes. Two campaigns run at a time.
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
import bad_input
import test_bad_plans
import test_checksums

from cmim_repro.core import Invalid
from cmim_repro.exhibits import table1
from cmim_repro.experiments.execution import execute, main
from cmim_repro.experiments.runs import Plan
from cmim_repro.experiments.store import Store
from cmim_repro.report.exhibit import Exhibit

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
    _, status = os.waitpid(child, 0) # it may have ended before
    return None if delay is None else os.waitstatus_to_exitcode(status)


def compute(folder): execute(Plan.of([STUDENT]), Store(folder), SETTINGS)


def outcome_of(status):
    "How a process that has met with a fault has ended, where its results do not matter."
    return {2: 'named', 3: 'tracebacks', None: 'hangs'}.get(status)


def recovered(place, wanted):
    "What comes of a store when its run is started once more and left alone."
    status = forked(partial(compute, place))
    if status != 0: return 'hangs' if status is None else 'lost'
    try: return 'unchanged' if outcome(Store(place)) == wanted else 'silent'
    except Invalid: return 'lost'


def kills(count, folder, wanted, seconds):
    "SIGKILL at random moments, until the run ends; then the results must be what they are without: that counts for each."
    counts, chance, place = Counter(), random.Random(0), folder/'store'
    while counts['tries'] < count:
        here, status = 0, -signal.SIGKILL
        while status == -signal.SIGKILL and counts['tries'] + here < count:
            status = forked(partial(compute, place), delay=chance.uniform(0, seconds))
            here += status == -signal.SIGKILL
        wrong = outcome_of(status) # of a start after a kill; after a sentence there is one more
        counts.update({'tries': here, wrong if wrong in ('tracebacks', 'hangs') else recovered(place, wanted): here})
        shutil.rmtree(place, ignore_errors=True)
    return counts


def disks(count, folder, wanted, largest):
    "No file may become larger than a level: the run ends with a sentence, and later with the right results."
    counts, place = Counter(), folder/'store'
    for i in range(count):
        found = outcome_of(forked(partial(compute, place), limit=round(largest*(i + .5)/count)))
        end = found if found in ('tracebacks', 'hangs') else recovered(place, wanted)
        counts.update(['tries', found if found and end == 'unchanged' else end])
        shutil.rmtree(place)
    return counts


def flips(count, folder, wanted, half):
    "A bit of any file is flipped, then whoever needs it computes and reads: a sentence, or the right results."
    counts, chance, place = Counter(), random.Random(1), folder/'store'
    files = sorted(path.relative_to(half) for path in half.glob('*-*/*') if path.stat().st_size)
    for i in range(count):
        shutil.copytree(half, place)
        path = place/files[i % len(files)]
        test_checksums.flipped(path, chance.randrange(8*path.stat().st_size))

        def look():
            compute(place)
            if outcome(Store(place)) != wanted: os._exit(4)
        status = forked(look)
        counts.update(['tries', outcome_of(status) or {0: 'unchanged', 4: 'silent'}.get(status, 'lost')])
        shutil.rmtree(place)
    return counts


def spread(items, count):
    "So many of the items, evenly."
    return [items[i*len(items)//count] for i in range(count)] if count < len(items) else items


def refusals(calls):
    "Calls that must end with a sentence: whatever ends otherwise is silent, a traceback or hangs."
    counts = Counter()
    for what, call in calls:
        end = outcome_of(forked(call)) or 'silent'
        if end != 'named': print(f'{what}: {end}', flush=True)
        counts.update(['tries', end])
    return counts


def plans(count, folder):
    "Plans with a bad field, and files that are none."
    def read(text):
        (folder/'plan.json').write_text(text, encoding='utf-8')
        with contextlib.redirect_stderr(io.StringIO()) as said: code = main([str(folder/'plan.json'), '--store', str(folder/'plans'), '--device', 'cpu'])
        if code == 2: raise Invalid(said.getvalue().rstrip('\n'))
    texts = [*map(json.dumps, ([plan] for plan in test_bad_plans.PLANS)), *test_bad_plans.TEXTS]
    return refusals([(f'plan {text[:200]}', partial(read, text)) for text in spread(texts, count)])


NO_NUMBER = ('two', 'nan', '[1', 'a=b', '1e999', '--', 'None of them', '0x10')
NO_NAME = ('nonsense', '-1', 'kd:heat', '=3', '[1', 'a:b:c', ':', 'kd=2')
NO_CHANGE = ('epochs=two', 'per_class=0', 'held_out=1', 'kd.temperature=0', '=3', 'epochs', 'mkd.dimension=1000000000', 'classes=1', 'colour=red', 'cmim.weight=~', 'lr=nan')
BAD = {'profile': NO_NAME, 'data_sets': NO_NAME, 'defenses': NO_NAME, 'null_arms': NO_NAME, 'attacks': NO_NAME, 'networks': NO_NAME, 'variant': NO_NAME, 'selection': NO_NAME,
       'protocol': NO_NAME, 'executor': NO_NAME, 'device': NO_NAME, 'seeds': (*NO_NUMBER, '-1', '1000000', '[1,1]', '1.5'), 'epochs': (*NO_NUMBER, '-1', '1.5'),
       'workers': (*NO_NUMBER, '-2', '.5'), 'margin': (*NO_NUMBER, 'inf'), 'allow_unverified': (*NO_NUMBER, '2', '-1'), 'plan_only': (*NO_NUMBER, '2', '-1'),
       'renew': (*NO_NUMBER, '2', '-1'), 'overrides': NO_CHANGE, 'run_settings': ('threads=-1', 'threads=two', 'compile=maybe', 'colour=red', '=3', 'threads', 'lanes=0', 'tf32=2'),
       'tuned': NO_NAME}


def parameters(count, folder):
    "Parameters that make no sense, each with the names of what it is for."
    def read(name, value):
        asked = {'profile': 'smoke', 'store': str(folder/'asked'), 'figures': str(folder/'figures'), 'plan_only': 'True', 'seeds': '1', name: value}
        with contextlib.redirect_stdout(io.StringIO()): Exhibit('table1', asked).plan(table1.entries)
    pairs = [(name, value) for name, values in BAD.items() for value in values]
    return refusals([(f'-p {name} {value!r}', partial(read, *pair)) for pair in spread(pairs, count) for name, value in [pair]])


def arrays_and_files(count, folder):
    "Arrays that cannot be measured, and files that cannot be read."
    return refusals(spread([*bad_input.arrays(), *bad_input.files(folder)], count))


def campaigns(args, folder):
    "Name to a function of the folder that a campaign may use, those that take longest first."
    compute(folder/'whole')
    started = time.monotonic()
    forked(partial(compute, folder/'timed')) # everything is imported: as long as those that will be killed
    seconds, wanted = time.monotonic() - started, outcome(Store(folder/'whole'))
    largest = max(path.stat().st_size for path in (folder/'whole').glob('*/*'))
    half = Store(folder/'half')
    execute(Plan.of([TEACHER]), half, SETTINGS)
    test_checksums.after_one_epoch(half, STUDENT)
    return {'kills': lambda place: kills(args.kills, place, wanted, seconds), 'flipped bits': lambda place: flips(args.flips, place, wanted, folder/'half'),
            'levels of a full disk': lambda place: disks(args.disks, place, wanted, largest), 'bad plans': lambda place: plans(args.plans, place),
            'bad parameters': lambda place: parameters(args.parameters, place), 'bad arrays and files': lambda place: arrays_and_files(args.inputs, place)}


def side_by_side(found, folder, limit=2):
    "What the campaigns count, by so many processes at a time; how long each took is printed."
    waiting, running, counts = list(found), {}, {}
    while waiting or running:
        while waiting and len(running) < limit:
            name = waiting.pop(0)
            place = folder/name.replace(' ', '-')
            place.mkdir()
            process = os.fork()
            if not process: # a process of its own, because the campaigns fork too
                try:
                    started, result = time.monotonic(), found[name](place)
                    (place/'counts.json').write_text(json.dumps(result), encoding='utf-8')
                    print(f'{name}: {time.monotonic() - started:.0f} s', flush=True)
                except BaseException: traceback.print_exc()
                os._exit(0)
            running[process] = name
        process, _ = os.wait()
        name = running.pop(process)
        counts[name] = Counter(json.loads((folder/name.replace(' ', '-')/'counts.json').read_text(encoding='utf-8')))
    return {name: counts[name] for name in found}


def report(args):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        found = side_by_side({name: run for name, run in campaigns(args, folder).items() if not args.only or name in args.only}, folder)
    return pd.DataFrame([[counts[name] for name in FOUND] for counts in found.values()], index=pd.Index(found, name='campaign'), columns=FOUND)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, count in {'kills': 200, 'flips': 200, 'disks': 40, 'plans': 150, 'parameters': 150, 'inputs': 100}.items(): parser.add_argument(f'--{name}', type=int, default=count)
    parser.add_argument('--only', nargs='*', help='names of campaigns')
    parser.add_argument('--csv', help='also write the table here')
    args = parser.parse_args()
    table = report(args)
    print(table.to_string())
    if args.csv: table.to_csv(args.csv)
    sys.exit(int(table[['lost', 'silent', 'tracebacks', 'hangs']].to_numpy().any()))
