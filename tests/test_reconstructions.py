"""Our reconstructions of methods that nobody published are marked wherever their numbers stand."""
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from cmim_repro.experiments.store import Store
from cmim_repro.report.exhibit import Exhibit, declared, notebook_of
from cmim_repro.report.page import exhibits
from cmim_repro.report.paper import MARKED

ROOT = Path(__file__).resolve().parents[1]
NAMES = sorted(exhibits(ROOT/'nbs'))
PLAIN = re.compile(r'\b(SNT|SCM)\b(?!†|\\u2020|\$\^?\\dagger)') # as it is, in JSON, in LaTeX


def invented(store, entries):
    "A finished result, with outputs, for every entry."
    for e in entries:
        store.start(e.run)
        outputs = torch.randn(40, 10, generator=torch.Generator().manual_seed(e.seed)).log_softmax(1)
        kept = {f'{split}{end}': value for split in ('train', 'test', 'held_out') for end, value in (('', outputs), ('_labels', torch.arange(40) % 10))}
        store.save_tensors(e.run, 'log_probs.safetensors', kept)
        level = .5 + .01*e.seed
        store.finish(e.run, {'accuracy': level, 'best_accuracy': level, 'held_out_accuracy': level, 'seconds': 1., 'device_name': 'none',
                             'torch': '0', 'revision': 'none', 'data': {'verified': True}})


@pytest.mark.parametrize('name', NAMES)
def test_every_exhibit_marks_a_reconstruction(name, tmp_path, monkeypatch):
    "In each format and beside each picture; a CSV has the plain name and says it in a column, or in the note beside."
    asked = {key: value for key, value in {'defenses': 'cmim, snt', 'attacks': 'kd, scm'}.items() if key in declared(notebook_of(name))}
    exhibit = Exhibit(name, {'profile': 'smoke', 'store': str(tmp_path/'store'), 'figures': str(tmp_path/'out'), **asked})
    module = import_module(f'cmim_repro.exhibits.{name}')
    exhibit.plan(module.entries, getattr(module, 'state', None))
    ours = {e.defense for e in exhibit.entries} | {e.column for e in exhibit.entries}
    if not {'snt', 'scm'} & ours: pytest.skip('nothing to mark')
    invented(Store(tmp_path/'store'), exhibit.entries)
    seen = []
    monkeypatch.setattr('cmim_repro.report.exhibit.display', seen.append)
    exhibit.show(module.draw)
    exhibit.provenance()
    shown = '\n'.join(item.data for item in seen if hasattr(item, 'data'))
    assert MARKED in shown and not PLAIN.search(shown)
    written = {path.suffix: path.read_text() for path in (tmp_path/'out').iterdir() if path.suffix in ('.md', '.html', '.txt', '.tex', '.svg')}
    assert written and not any(map(PLAIN.search, written.values()))
    notes = [text.replace(r'$\dagger$', '†') for suffix, text in written.items() if suffix != '.svg']
    assert all('A reconstruction of ours' in text for text in notes if '†' in text)
    for path in (tmp_path/'out').glob('*.csv'):
        if not path.with_suffix('.provenance.txt').exists() and re.search(r'\b(snt|scm)\b', text := path.read_text()):
            assert 'reconstruction' in text.splitlines()[0]


def test_the_committed_tables_mark_it():
    shown = [*(ROOT/'data'/'results'/'short').glob('*.md'), ROOT/'README.md']
    told = [line for path in shown for line in path.read_text().splitlines() if line.startswith('|') and PLAIN.search(line) and 'nbs/' not in line]
    assert not told and sum('†' in path.read_text() for path in shown) >= 4
    text = (ROOT/'README.md').read_text()
    assert '| SNT† |' in text and 'A reconstruction of ours' in ' '.join(text.split())
