"""Results that are kept: a store in one file draws the committed tables again, and weights are found by name."""
import json
import shutil
from pathlib import Path

import pandas as pd
import papermill
import pytest
import torch

from cmim_repro.experiments.runs import run_from_dict
from cmim_repro.experiments.store import PACK, Store, packed_files
from cmim_repro.lab.models.core import model
from cmim_repro.lab.models.kept import read_weights
from cmim_repro.report.exhibit import Exhibit

ROOT = Path(__file__).resolve().parents[1]
KEPT = ROOT/'data'/'results'
PACKS = sorted(KEPT.glob(f'**/store/{PACK}'))
TABLES = ['table1.csv', 'table1_runs.csv', 'verdicts.csv', 'models.csv']


def redrawn(name, kept, folder):
    "The folder of an exhibit that a notebook draws from the runs in a folder of results, without the data."
    (folder/'store').mkdir()
    shutil.copy(KEPT/kept/'store'/PACK, folder/'store')
    given = {'profile': kept.partition('/')[0], 'store': str(folder/'store'), 'figures': str(folder/'figures'), 'data_root': str(folder/'nowhere')}
    papermill.execute_notebook(ROOT/'nbs'/f'run_{name}.ipynb', folder/'out.ipynb', given, progress_bar=False, cwd=folder)
    assert {path.name for path in (folder/'store').iterdir()} <= {PACK, 'locks'} # nothing was computed
    return folder/'figures'


@pytest.fixture(scope='module', params=['mini', 'quick'])
def drawn(request, tmp_path_factory):
    "Table 1 from the kept runs of a profile: the folder, and that of what is committed."
    return redrawn('table1', request.param, tmp_path_factory.mktemp('kept')), KEPT/request.param


def test_kept_runs_draw_the_committed_table_again(drawn):
    again, committed = drawn
    assert [name for name in TABLES if (again/name).read_bytes() != (committed/name).read_bytes()] == []


def test_kept_answers_draw_the_committed_pictures_again(drawn):
    again, committed = drawn
    for name, close in {'cmi.csv': 1e-4, 'weights.csv': 100/448}.items(): # answers have 11 bits, so the two largest of an image may be equal
        pd.testing.assert_frame_equal(*(pd.read_csv(folder/name) for folder in drawn), rtol=1e-3, atol=close)
    pictures = {path.name for path in committed.glob('*_cnn_medium.png')}
    assert len(pictures) == 2 and all((again/name).stat().st_size > 100_000 for name in pictures)


OTHERS = { # folder and exhibit to its files that are the same to the byte, and pictures
    ('quick', 'beyond1'): (['beyond1_gains.csv', 'beyond1_over_null.csv'], ['beyond1_picture.png']),
    ('quick/30_to_33', 'table1'): (TABLES[:3], []),
    ('mini', 'table8'): (['table8.csv', 'table8_tests.csv'], []),
    ('mini', 'figure3'): ([], ['figure3.png']),
}
SAME_KIND = { # and what takes long
    ('quick', 'beyond2'): (['beyond2_ranks.csv'], ['beyond2_picture.png']),
    **{(name, 'table1'): (TABLES[:3], []) for name in ('quick/40_to_43', 'quick/tuned', 'mini/half', 'mini/twice', 'mini/bf16')},
}


@pytest.mark.parametrize(('kept', 'name'), [*OTHERS, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SAME_KIND)])
def test_kept_runs_draw_other_exhibits_again(kept, name, tmp_path):
    figures, (same, pictures) = redrawn(name, kept, tmp_path), {**OTHERS, **SAME_KIND}[kept, name]
    assert [n for n in same if (figures/n).read_bytes() != (KEPT/kept/n).read_bytes()] == []
    assert all((figures/n).stat().st_size > 50_000 and (KEPT/kept/n).exists() for n in pictures)
    if name == 'table1' and (KEPT/kept/'weights.csv').exists():
        pd.testing.assert_frame_equal(*(pd.read_csv(folder/'weights.csv') for folder in (figures, KEPT/kept)), rtol=1e-3)
        assert not list(figures.glob('*.png')) # for which answers to the test images are needed


def test_every_folder_of_runs_is_tried():
    "All but `short`, which an earlier form of the code has made."
    folders = {str(path.parent.relative_to(KEPT)) for path in KEPT.glob('**/table1_runs.csv')} - {'short'}
    assert folders == {str(path.parents[1].relative_to(KEPT)) for path in PACKS} == {kept for kept, _ in (*OTHERS, *SAME_KIND)}


def test_what_a_store_lacks_is_said(tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=r'holds 12 of the 36 runs of table5; the others need the data'):
        redrawn('table5', 'mini', tmp_path)


def asked(profile, **given):
    return Exhibit('table1', {'profile': profile, 'store': str(KEPT/'mini'/'store'), **given}).chosen


def test_what_is_not_given_is_as_it_was_packed(monkeypatch):
    monkeypatch.delenv('CMIM_PROFILE', raising=False)
    packed = Store(KEPT/'mini'/'store').asked('table1')
    assert asked('mini') == asked('') == packed and packed['tuned'] == 'kd, dkd, dist'
    assert asked('mini', defenses='ce', seeds='[0, 1]') == {**packed, 'defenses': 'ce', 'seeds': '[0, 1]'}
    assert asked('smoke') == {'profile': 'smoke'} # another profile is another thing


@pytest.mark.parametrize('folder', [path.parents[1] for path in PACKS], ids=lambda path: str(path.relative_to(KEPT)))
def test_every_kept_run_is_described_and_finished(folder):
    files = packed_files(folder/'store')
    names = {name.partition('/')[0] for name in files if '/' in name}
    assert len(names) >= 39
    for name in names:
        run = run_from_dict({key: value for key, value in json.loads(files[f'{name}/run.json']).items() if key != 'id'})
        assert run.name == name and ({f'{name}/result.json', f'{name}/diverged.json'} & files.keys())


def kept_weights(): return [f"{p.parents[1].name}/{'/'.join(p.stem.rsplit('-', 1)).replace(',', ':')}" for p in KEPT.glob('*/weights/*.safetensors')]


@pytest.mark.parametrize('name', kept_weights())
def test_kept_weights_are_those_of_a_committed_run(name):
    about, tensors = read_weights(name)
    profile, defense, seed = name.split('/')
    runs = pd.read_csv(KEPT/profile/'table1_runs.csv').query("column == 'model' and defense == @defense and seed == @seed", local_dict={'defense': defense, 'seed': int(seed)})
    assert set(runs['run']) == {about['run']}
    network = model(about['model'], weights=name).eval()
    images = torch.rand(2, *about['options']['image_shape'])
    assert network(images).shape == (2, about['options']['num_classes']) and len(tensors) == len(network.state_dict())
