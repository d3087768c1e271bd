"""What the README shows is what the committed results hold, and the commands it names exist."""
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from cmim_repro.defenses.ce import digit_network, digit_split
from cmim_repro.report.results import verdicts
from cmim_repro.report.statistics import t_interval

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT/'README.md').read_text()


NOTEBOOK = '\n'.join(''.join(cell['source']) for cell in json.loads((ROOT/'nbs'/'run_table1.ipynb').read_text())['cells'] if cell['cell_type'] == 'markdown')
SHOWN = [(text, name) for text in (README, NOTEBOOK) for name in re.findall(r'<!-- (\S+\.md) -->', text)]


@pytest.mark.parametrize('text, name', SHOWN, ids=[name for _, name in SHOWN])
def test_tables_are_the_committed_ones(text, name):
    "Word by word: prose is wrapped at another width here and there."
    shown = text.split(f'<!-- {name} -->')[1].split('<!-- end -->')[0]
    assert shown.split() == (ROOT/name).read_text().split()


def test_numbers_of_the_prose_are_those_of_the_files():
    cmi = pd.read_csv(ROOT/'data'/'results'/'mini'/'cmi.csv').set_index(['defense', 'alpha'])['mean']
    for defense in ('cmim', 'ce'): assert ' / '.join(f'{cmi[defense, alpha]:.3f}' for alpha in (.25, .5, 1.)) in README
    seeds = pd.read_csv(ROOT/'data'/'results'/'mini'/'verdicts.csv').set_index('defense')['seeds to decide']
    assert f"from {seeds['ls']} (LS) and {seeds['ce']} (CE) to {seeds['cmim']} (CMIM) and thousands" in README and seeds.min() == seeds['ls'] and seeds.max() > 1000


def test_the_committed_verdicts_follow_from_the_committed_runs():
    folder = ROOT/'data'/'results'/'mini'
    runs = pd.read_csv(folder/'table1_runs.csv').fillna({'choice': '', 'student': ''})
    pd.testing.assert_frame_equal(pd.read_csv(folder/'verdicts.csv', dtype=str), verdicts(runs).astype(str))


def test_the_snippet_runs_and_trains():
    "With names that stand for what the reader has: a model, an optimizer, batches."
    images, labels, _, _ = digit_split()
    model = digit_network()
    places = torch.arange(len(images)).split(100)
    given = {'epochs': 3, 'model': model, 'optimizer': torch.optim.SGD(model.parameters(), .2, momentum=.9), 'train_labels': labels,
             'batches': [(images[part], labels[part], part) for part in places], 'labels': labels, 'log_probs': torch.randn(len(labels), 10).log_softmax(1),
             'student_logits': torch.randn(100, 10), 'teacher_log_probs': torch.randn(100, 10).log_softmax(1)}
    [snippet] = re.findall(r'```python\n(.*?)```', README, re.S)
    exec(snippet, given)
    assert (model(images).argmax(1) == labels).double().mean() > .8


def test_there_is_a_table(): assert len(SHOWN) >= 3


def test_make_targets_exist():
    makefile = (ROOT/'Makefile').read_text()
    for target in re.findall(r'`?make ([a-z][a-z0-9-]*)', README): assert re.search(rf'^{target}:', makefile, re.M), target


def test_links_lead_somewhere():
    for target in re.findall(r'\]\(([^)#]+)\)', README): assert (ROOT/target).exists(), target


def test_what_does_not_agree_is_computed_from_the_files_too():
    folder = ROOT/'data'/'results'/'mini'
    cmi = pd.read_csv(folder/'cmi.csv').set_index(['defense', 'alpha'])['mean']
    for defense in ('mad', 'rsp'): assert all(cmi[defense, alpha] < cmi['cmim', alpha] for alpha in (.25, .5, 1.))
    curves = pd.read_csv(folder/'figure1.csv')
    peaks = curves.loc[curves.groupby(['seed', 'class'])['cmi'].idxmax(), 'alpha']
    assert (peaks == 4).all() and len(peaks) == 9 and '0 of 9 maxima' in README
    runs = pd.read_csv(folder/'table1_runs.csv')
    models = runs[runs['column'] == 'model'].drop_duplicates(['defense', 'seed']).pivot(index='seed', columns='defense', values='last')
    low, high = t_interval((models['cmim'] - models['ls']).to_numpy())
    assert f'from {low:.2f} to +{high:.2f} points against LS' in README
    picked = runs[runs['chosen_clean'] & (runs['defense'] == 'ce')].groupby('column')['last'].mean()
    assert f"ends {picked['ls'] - picked['knockoff']:.2f} points below" in ' '.join(README.split())
    assert set(runs.loc[runs['chosen_clean'] & (runs['column'] == 'ls'), 'choice']) == {'epsilon=0.01'}
    gains = pd.read_csv(folder/'table5.csv').query("column == 'gain'").set_index('Model')['mean']
    assert gains['cnn_small'] == pytest.approx(-1.00, abs=.005)
