"""What verifying checksums takes, beside the training whose results it verifies.

    python tests/faults/verification.py --profile quick --store data/runs

Every file of every finished run of Table 1 is read and verified, and read again without: the difference is set beside
the seconds that the runs' training took.
"""
import argparse
import sys
import time

from cmim_repro.experiments.store import Store
from cmim_repro.report.plan import planned


def seconds(work):
    "What a piece of work takes, the shorter of two times."
    times = []
    for _ in range(2):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def main():
    "Print the seconds and their share."
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument('--profile', default='quick')
    parser.add_argument('--store', default=None)
    args = parser.parse_args()
    store = Store(args.store)
    runs = [run for run in planned('table1', profile=args.profile).runs if store.result(run)]
    if not runs: sys.exit(f'Nothing of Table 1 is finished in {store.root}.')
    trained = sum(store.result(run)['seconds'] for run in runs)
    files = [path for run in runs for path in store.folder(run).iterdir() if path.is_file()]
    verified = seconds(lambda: [store.damage(run) for run in runs])
    read = seconds(lambda: [path.read_bytes() for path in files])
    print(f'{len(runs)} runs, {sum(path.stat().st_size for path in files)/1e6:.0f} MB: '
          f'training {trained:.0f} s, reading {read:.2f} s, reading and verifying {verified:.2f} s, '
          f'{100*(verified - read)/trained:.2f} % of training')


if __name__ == '__main__': main()
