"""Execute notebooks from top to bottom, keep what they show, and remember which code showed it.

    python .ci/outputs.py make [NOTEBOOK ...]    execute (all, or those named), clean, note the digest of their code
    python .ci/outputs.py stale                  name the notebooks whose outputs are older than their code

Run notebooks (nbs/run_*.ipynb) are executed in the profile quick, from the store data/runs; all others in smoke.
"""
import argparse
import base64
import csv
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOTED = ROOT/'nbs'/'outputs.csv'
SKIPPED = re.compile(r'^#\|\s*(eval:\s*false|cuda|slow)\b', re.M)


def notebooks():
    "All notebooks of the book, in order."
    found = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard', 'nbs/*.ipynb', 'nbs/**/*.ipynb'],
                           cwd=ROOT, capture_output=True, text=True, check=True, encoding='utf-8').stdout.split('\n')
    return sorted({ROOT/name for name in found if name and (ROOT/name).exists()})


def code_cells(notebook): return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']


def digest(notebook):
    "A digest of the code of a notebook, whatever its outputs and its prose are."
    text = json.dumps([''.join(cell['source']) for cell in code_cells(notebook)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def noted():
    "Notebook to the digest of the code that made its outputs."
    if not NOTED.exists(): return {}
    with open(NOTED, encoding='utf-8', newline='') as file:
        return {row['notebook']: row['code'] for row in csv.DictReader(file)}


def write_noted(digests):
    with open(NOTED, 'w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(('notebook', 'code'))
        writer.writerows(sorted(digests.items()))


def environment(path, folder):
    "The environment that a notebook is executed in."
    own = {'CMIM_PROFILE': 'quick'} if path.name.startswith('run_') else {'CMIM_PROFILE': 'smoke', 'CMIM_STORE': folder}
    return {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT), **own}


def lighter(picture):
    "A PNG in base64 with a palette of 64 colours, where that makes it smaller."
    from PIL import Image
    small = io.BytesIO()
    Image.open(io.BytesIO(base64.b64decode(picture))).convert('RGB').quantize(64).save(small, 'PNG', optimize=True)
    return min(picture.strip(), base64.b64encode(small.getvalue()).decode(), key=len)


def settled(output):
    "An output without random ids of tables, and with pictures that are small."
    def plain(kind, value):
        if kind == 'image/png': return lighter(value)
        return re.sub(r'\bT_[0-9a-f]{5}', 'T_table', value) if isinstance(value, str) else value
    data = {kind: plain(kind, value) for kind, value in output.get('data', {}).items()}
    return {**output, 'data': data} if 'data' in output else output


def execute(path):
    "Execute one notebook in a kernel of its own, in its folder, and keep its outputs; a sentence if it failed."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    notebook = nbformat.read(path, as_version=4)
    run = nbformat.from_dict(notebook)
    run.cells = [cell for cell in notebook.cells if cell.cell_type == 'code' and not SKIPPED.search(cell.source)]
    with tempfile.TemporaryDirectory(prefix='cmim-outputs-') as folder:
        place = {'metadata': {'path': str(path.parent)}}
        client = NotebookClient(run, timeout=3600, kernel_name='python3', resources=place)
        try: client.execute(env=environment(path, folder))
        except CellExecutionError as error: return f'{error.ename}: {(error.evalue or " ").splitlines()[0]}'
    outputs = [output for cell in run.cells for output in cell.outputs]
    told = [o['text'] for o in outputs if o['output_type'] == 'stream' and o['name'] == 'stderr']
    if told: return f'it writes to standard error: {told[0].strip().splitlines()[0]}'
    for cell in code_cells(notebook):
        cell.outputs = [] if SKIPPED.search(cell.source) else [nbformat.from_dict(settled(o)) for o in cell.outputs]
    nbformat.write(notebook, path)
    return ''


def make(paths):
    digests, failed = noted(), []
    for path in paths:
        name = path.relative_to(ROOT).as_posix()
        sentence = execute(path)
        print(f'{name}: {sentence or "executed"}', flush=True)
        if sentence: failed.append(name)
        else: digests[name] = digest(json.loads(path.read_text(encoding='utf-8')))
    subprocess.run([Path(sys.executable).parent/'nbdev_clean'], cwd=ROOT, check=True)
    present = {path.relative_to(ROOT).as_posix() for path in notebooks()}
    write_noted({name: code for name, code in digests.items() if name in present})
    return 1 if failed else 0


def stale():
    known = noted()
    names = {path.relative_to(ROOT).as_posix(): path for path in notebooks()}
    def code(path): return digest(json.loads(path.read_text(encoding='utf-8')))
    old = [name for name, path in names.items() if known.get(name) != code(path)]
    for name in old:
        print(f'{name}: its outputs are older than its code; make outputs NOTEBOOKS={name}', file=sys.stderr)
    return 1 if old else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('make', 'stale'))
    parser.add_argument('notebooks', nargs='*', type=lambda name: Path(name).resolve(), help='paths; none: all')
    args = parser.parse_args()
    return make(args.notebooks or notebooks()) if args.what == 'make' else stale()


if __name__ == '__main__': sys.exit(main())
