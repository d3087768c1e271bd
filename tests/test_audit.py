"""The audit of answers: its numbers against plain formulas in float64, every bad input one sentence, exit codes, the command as a whole."""
import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import papermill
import pytest
import torch

from cmim_repro import audit
from cmim_repro.__main__ import COMMANDS, main
from cmim_repro.audits.answers import read_answers
from cmim_repro.audits.measures import ALPHAS, calibration_error, image_shares, interval
from cmim_repro.audits.report import to_html
from cmim_repro.experiments.execution import read_plan
from cmim_repro.experiments.store import Store

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(7)
PROBS, LABELS = RNG.dirichlet([.6]*4, 60), np.arange(60) % 3 # the fourth class has no image


def powered(q, alpha): return q**alpha/(q**alpha).sum(-1, keepdims=True)


def plain_cmi(q, labels, alpha):
    "Equation 15 in NumPy."
    total, q = 0., powered(q, alpha)
    for y in np.unique(labels):
        own = q[labels == y]
        total += (own*np.log(own/own.mean(0))).sum()
    return total/len(q)


def test_the_curve_is_the_plain_formula_in_float64():
    found = audit(PROBS, LABELS)
    curve = found.curves['all'].set_index('alpha')
    for alpha in ALPHAS: np.testing.assert_allclose(curve.loc[alpha, 'CMI'], plain_cmi(PROBS, LABELS, alpha), rtol=1e-10)
    assert found.summary['largest CMI'] == curve['CMI'].max() and curve['CMI'].idxmax() == found.summary['at alpha']
    np.testing.assert_allclose(found.summary['CMI given the predicted class'], plain_cmi(PROBS, PROBS.argmax(1), 1), rtol=1e-10)


def test_quality_is_the_plain_formula_in_float64():
    s = audit(PROBS, LABELS).summary
    top, right = PROBS.max(1), PROBS.argmax(1) == LABELS
    bins = np.minimum((top*15).astype(int), 14)
    gaps = [abs(top[bins == b].sum() - right[bins == b].sum()) for b in range(15)]
    wanted = {'accuracy': right.mean(), 'confidence': top.mean(), 'calibration error': sum(gaps)/60, 'entropy': -(PROBS*np.log(PROBS)).sum(1).mean(),
              'loss': -np.log(PROBS[np.arange(60), LABELS]).mean(), 'images': 60, 'classes': 4}
    for name, value in wanted.items(): np.testing.assert_allclose(s[name], value, rtol=1e-9, err_msg=name)
    assert calibration_error(torch.tensor([1.]), torch.tensor([True])) == 0


def test_classes_are_those_that_occur_with_their_own_cmi():
    frame = audit(PROBS, LABELS, class_names='abcd').classes.set_index('class')
    assert sorted(frame.index) == ['a', 'b', 'c'] and frame['CMI(1)'].is_monotonic_decreasing
    for y, name in enumerate('abc'):
        own = PROBS[LABELS == y]
        np.testing.assert_allclose(frame.loc[name, 'CMI(1)'], plain_cmi(own, np.zeros(20), 1), rtol=1e-10)
        mean = own.mean(0).copy()
        mean[y] = -1
        assert frame.loc[name, 'confused with'] == 'abcd'[mean.argmax()] and np.isclose(frame.loc[name, 'share'], mean.max())
        assert frame.loc[name, 'low'] < frame.loc[name, 'high']


def test_what_remains_is_the_plain_formula_in_float64():
    left = audit(PROBS, LABELS).remaining
    rounded = PROBS.round(1)
    keep = (rounded == np.take_along_axis(rounded, PROBS.argmax(1)[:, None], 1)).sum(1) == 1 # no ties, which need a decision
    assert keep.sum() > 30
    found = audit(PROBS[keep], LABELS[keep]).remaining
    q = rounded[keep]/rounded[keep].sum(1, keepdims=True)
    np.testing.assert_allclose(found.loc['rounded to 1 digit', 'L1'], np.abs(q - PROBS[keep]).sum(1).mean(), rtol=1e-9)
    with np.errstate(all='ignore'): expected = sum(np.nansum(own*np.log(own/own.mean(0))) for own in (q[LABELS[keep] == y] for y in range(3)))/len(q)
    np.testing.assert_allclose(found.loc['rounded to 1 digit', 'CMI(1)'], expected, rtol=1e-9)
    assert np.isclose(left.loc['as answered', 'told apart'], np.log(20)) # no two alike in a class of twenty
    z = np.log(PROBS)
    z = powered(np.exp((z - z.mean(1, keepdims=True))/(z.std(1, keepdims=True) + 1e-7)), 1/2)
    np.testing.assert_allclose(left.loc['standardised', 'CMI(1)'], plain_cmi(z, LABELS, 1), rtol=1e-6)
    means = np.stack([PROBS[PROBS.argmax(1) == y].mean(0) for y in range(4)])[PROBS.argmax(1)]
    np.testing.assert_allclose(left.loc['centroid of the predicted class', 'L1'], np.abs(means - PROBS).sum(1).mean(), rtol=1e-9)


def test_the_size_of_blocks_changes_nothing(monkeypatch):
    from cmim_repro.audits import measures
    rows, labels = torch.tensor(PROBS).log(), torch.tensor(LABELS)
    whole = image_shares(rows, labels, ALPHAS)
    monkeypatch.setattr('cmim_repro.theory.cmi.BLOCK', 13)
    monkeypatch.setattr(measures, 'KEPT', 0)
    for small, large in zip(image_shares(rows, labels, ALPHAS), whole, strict=True): torch.testing.assert_close(small, large, equal_nan=True)


def test_one_image_of_a_class_has_no_interval():
    low, high = interval(torch.zeros(1, 2))
    assert low.isnan().all() and high.isnan().all()
    assert np.isnan(audit(PROBS[:4], [0, 0, 0, 1]).classes.set_index('class').loc['1', 'low'])


def test_exact_zeros_and_labels_alone_are_measured(tmp_path):
    found = audit(np.eye(3)[LABELS], LABELS)
    assert 'The answers are the label alone.' in to_html(found) and '<iframe' in to_html(found) # where no classes are confused
    assert '<iframe' not in to_html(audit(np.eye(5)[[3, 4, 3, 4]], [3, 4, 3, 4])) # nor has one of three an image
    assert found.summary['CMI'] == 0 and found.summary['accuracy'] == 1 and found.remaining.loc['label alone', 'L1'] == 0
    wrong = audit(np.eye(3)[(LABELS + 1) % 3], LABELS)
    np.savez(tmp_path/'a.npz', probs=np.eye(3)[(LABELS + 1) % 3], labels=LABELS)
    assert wrong.summary['loss'] == np.inf and main(['audit', str(tmp_path/'a.npz'), '--out', str(tmp_path)]) == 0
    assert json.loads((tmp_path/'audit.json').read_text())['summary']['loss'] is None


def frame_text(columns): return '\n'.join([','.join(columns), *(','.join(map(str, row)) for row in zip(*columns.values(), strict=True))])


def npz(**arrays): return lambda path: np.savez(path, **arrays)


RIGHT = {'probs': PROBS, 'labels': LABELS}
COLUMNS = {'a': [.5, .2], 'b': [.5, .8], 'label': [0, 1]}
BAD = { # name: file, what writes it, more arguments, what the sentence says
    'missing': ('a.npz', None, [], 'is missing; name a file of answers'),
    'a folder': ('a.npz', lambda path: path.mkdir(), [], 'is missing; name a file'),
    'an unknown ending': ('a.doc', lambda path: path.write_text('x'), [], "Unknown ending of a.doc '.doc'; accepted: .npz"),
    'damaged': ('a.npz', lambda path: path.write_bytes(b'PK nothing'), [], 'cannot be read as .npz'),
    'damaged npy': ('a.npy', lambda path: path.write_bytes(b'x'*100), [], 'cannot be read as .npy'),
    'damaged safetensors': ('a.safetensors', lambda path: path.write_bytes(b'x'*100), [], 'cannot be read as .safetensors'),
    'objects': ('a.npz', npz(probs=np.array([{}], dtype=object)), [], 'cannot be read as .npz (Object arrays cannot be loaded'),
    'no arrays': ('a.npz', npz(), [], 'holds nothing; the answers must be called one of log_probs'),
    'no answers': ('a.npz', npz(labels=LABELS), [], 'holds labels; the answers must be called one of'),
    'no labels': ('a.npz', npz(probs=PROBS), [], 'holds no labels; call them labels there, or name a file'),
    'npy without labels': ('a.npy', lambda path: np.save(path, PROBS), [], 'holds no labels'),
    'few labels': ('a.npz', npz(probs=PROBS, labels=LABELS[:9]), [], 'has 60 answers and 9 labels'),
    'labels from 1': ('a.npz', npz(probs=PROBS, labels=LABELS + 1 + (LABELS == 2)), [], 'they seem to count from 1: subtract 1'),
    'labels to ignore': ('a.npz', npz(probs=PROBS, labels=np.where(LABELS, LABELS, -100)), [], '-100 marks rows to be ignored'),
    'labels with fractions': ('a.npz', npz(probs=PROBS, labels=LABELS + .5), [], 'labels of a.npz hold 0.5; they must be whole numbers'),
    'one-hot labels': ('a.npz', npz(probs=PROBS, labels=np.eye(4)[LABELS]), [], 'have shape (60, 4); they must be class indices'),
    'a vector': ('a.npz', npz(probs=PROBS[:, 0], labels=LABELS), [], 'answers of a.npz have shape (60,)'),
    'one class': ('a.npz', npz(logits=PROBS[:, :1], labels=0*LABELS), [], 'have shape (60, 1); it must be (B, C)'),
    'whole numbers': ('a.npz', npz(answers=np.eye(4, dtype=int)[LABELS], labels=LABELS), [], 'must be floating-point numbers'),
    'NaN': ('a.npz', npz(probs=np.where(np.arange(60)[:, None] == 5, np.nan, PROBS), labels=LABELS), [], 'row 5 holds NaN or infinity'),
    'infinity': ('a.npz', npz(logits=np.where(np.arange(60)[:, None] == 6, np.inf, PROBS), labels=LABELS), [], 'row 6 holds NaN or infinity'),
    'per cents': ('a.npz', npz(answers=100*PROBS, labels=LABELS), [], 'seems to hold per cents: each row sums to about 100; divide by 100'),
    'a damaged row': ('a.npz', npz(probs=PROBS*np.where(np.arange(60) == 7, 2, 1)[:, None], labels=LABELS), [], '1 of 60 rows are none: row 7 sums to 2'),
    'a softmax too many': ('a.npz', npz(logits=PROBS, labels=LABELS), [], 'names its answers logits, but they look like probabilities'),
    'logits called probabilities': ('a.npz', npz(probs=PROBS*9 - 3, labels=LABELS), [], 'names its answers probabilities, but they look like logits'),
    'few names': ('a.npz', npz(**RIGHT, class_names=list('abc')), [], 'There are 3 class names for 4 classes'),
    'a short split': ('a.npz', npz(**RIGHT, split=['train']), [], 'The split of a.npz has shape (1,)'),
    'a column of text': ('a.csv', lambda path: path.write_text(frame_text({**COLUMNS, 'colour': 'xy'})), [], "column 'colour' of"),
    'an unknown name': ('a.csv', lambda path: path.write_text(frame_text({**COLUMNS, 'label': 'ac'})), [], "Unknown class in the labels of a.csv 'c'; accepted: a, b"),
    'no rows': ('a.csv', lambda path: path.write_text('a,b,label\n'), [], 'has no rows'),
    'an empty file': ('a.csv', lambda path: path.write_text(''), [], 'cannot be read as .csv'),
    'a missing file of labels': ('a.npz', npz(**RIGHT), ['--labels', 'none.npy'], 'none.npy is missing'),
    'an unknown kind': ('a.npz', npz(**RIGHT), ['--kind', 'odds'], "Unknown kind of answers 'odds'"),
    'no draws': ('a.npz', npz(**RIGHT), ['--draws', '0'], 'draws is 0; it must be a whole number from 20'),
    'draws in words': ('a.npz', npz(**RIGHT), ['--draws', 'many'], 'invalid int value'),
    'an unknown verdict': ('a.npz', npz(**RIGHT), ['--fail-on', 'stolen'], "Unknown verdict 'stolen'; accepted: distillable"),
    'an unknown measure': ('a.npz', npz(**RIGHT), ['--fail-on', 'leak > 1'], "Unknown measure 'leak'"),
    'an unknown option': ('a.npz', npz(**RIGHT), ['--colour', 'red'], 'Unrecognized arguments: --colour red'),
    'no place to write': ('a.npz', npz(**RIGHT), ['--out', '/proc/nothing'], 'cannot be written'),
}


@pytest.mark.parametrize('what', BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(what, tmp_path, capsys, monkeypatch):
    name, write, more, says = BAD[what]
    monkeypatch.chdir(tmp_path)
    if write: write(tmp_path/name)
    assert main(['audit', name, '--out', 'report', *more]) == 2
    printed = capsys.readouterr()
    assert says in printed.err and printed.err.startswith('error: ') and printed.err.count('\n') == 1 and printed.out == ''
    assert not (tmp_path/'report').exists()


def test_parquet_needs_pyarrow_and_says_so(tmp_path, capsys, monkeypatch):
    (tmp_path/'a.parquet').write_bytes(b'PAR1')
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    assert main(['audit', str(tmp_path/'a.parquet'), '--out', str(tmp_path)]) == 2
    assert "cannot be read without pyarrow: pip install 'cmim_repro[parquet]'" in capsys.readouterr().err


def test_parquet_with_a_column_for_each_class_or_one_of_lists(tmp_path):
    pytest.importorskip('pyarrow')
    import pandas as pd
    pd.DataFrame(PROBS, columns=list('abcd')).assign(label=LABELS).to_parquet(tmp_path/'wide.parquet')
    pd.DataFrame({'probs': list(PROBS), 'label': LABELS}).to_parquet(tmp_path/'lists.parquet')
    for name in ('wide', 'lists'):
        found = read_answers(tmp_path/f'{name}.parquet')
        assert found.kind == 'probabilities' and np.allclose(found.log_probs.exp(), PROBS) and found.labels.tolist() == LABELS.tolist()


def test_exit_code_1_is_for_what_was_named(tmp_path, capsys):
    np.savez(tmp_path/'a.npz', **RIGHT)
    asked = ['audit', str(tmp_path/'a.npz'), '--out', str(tmp_path), '--draws', '20', '--fail-on']
    for conditions, code in {'': 0, 'distillable': 0, 'distillable, undecided': 1, 'accuracy < 0.99': 1, 'CMI>9,accuracy<0': 0}.items():
        assert main([*asked, conditions]) == code, conditions
    assert 'failed: The verdict is undecided.' in capsys.readouterr().err


def test_the_command_as_a_whole(tmp_path):
    "As the README prints it."
    [command] = re.findall(r'^ +python (-m cmim_repro audit .*?) +#', (ROOT/'README.md').read_text(), re.M)
    np.savez(tmp_path/'answers.npz', **RIGHT)
    done = subprocess.run([sys.executable, *command.split()], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == '' and 'answers.npz was read as probabilities.' in done.stdout
    assert sorted(path.name for path in (tmp_path/'report').iterdir()) == ['audit.html', 'audit.json']
    page = (tmp_path/'report'/'audit.html').read_text()
    assert page.count('<iframe') == 1 and 'No student was trained' in page


def test_the_notebook_takes_the_readers_answers(tmp_path):
    np.savez(tmp_path/'a.npz', **RIGHT)
    given = {'answers': str(tmp_path/'a.npz'), 'out': str(tmp_path/'report'), 'draws': 20, 'fail_on': 'undecided'}
    with pytest.raises(papermill.PapermillExecutionError, match='The verdict is undecided'):
        papermill.execute_notebook(ROOT/'nbs'/'run_audit.ipynb', tmp_path/'out.ipynb', given, progress_bar=False)
    assert json.loads((tmp_path/'report'/'audit.json').read_text())['summary']['images'] == 60 # written before it stops


def test_the_list_of_commands_needs_no_torch_and_every_command_has_help():
    code = 'import sys; from cmim_repro.__main__ import main; main(["--help"]); assert "torch" not in sys.modules'
    listed = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert listed.returncode == 0 and all(f'  {name} ' in listed.stdout for name in COMMANDS), listed.stderr
    for name in COMMANDS:
        with pytest.raises(SystemExit) as ended: main([name, '--help'])
        assert ended.value.code == 0


@pytest.mark.parametrize('place', [*dict.fromkeys(place for place, _ in COMMANDS.values()), 'report.book', 'experiments.then_and_now'])
@pytest.mark.parametrize('words', [['--volume', '11'], ['-x'], ['a', 'b', 'c', '--profile']])
def test_what_no_command_takes_is_one_sentence(place, words, capsys):
    assert import_module(f'cmim_repro.{place}').main(words) == 2
    said = capsys.readouterr()
    assert said.err.startswith('error: ') and said.err.count('\n') == 1 and not said.out


def test_a_door_that_draws_nothing_loads_nothing_that_draws():
    names = 'attack, defense, objective, release, model, dataset, cmi_curve, CMIMLoss'
    code = f'import sys; from cmim_repro import {names}; print(*sys.modules)'
    loaded = set(subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout.split())
    assert 'torch' in loaded and not loaded & {'pandas', 'matplotlib', 'seaborn', 'plotly', 'sklearn', 'scipy', 'torchvision', 'IPython', 'papermill'}
    import cmim_repro
    assert set(cmim_repro.__all__) <= set(dir(cmim_repro)) and all(getattr(cmim_repro, name) for name in cmim_repro.__all__)
    with pytest.raises(AttributeError, match="module 'cmim_repro' has no attribute 'steal'"): cmim_repro.steal # noqa: B018


def test_a_plan_written_by_one_command_is_computed_by_another(tmp_path, capsys):
    asked = ['-p', 'attacks', 'kd', '-p', 'defenses', 'st', '-p', 'null_arms', 'none', '-p', 'seeds', '1', '-p', 'overrides', 'epochs=1, epsilons=0.1']
    assert main(['plan', 'table1', '--profile', 'smoke', *asked, '--out', str(tmp_path/'PLAN.json')]) == 0
    runs = read_plan(tmp_path/'PLAN.json').runs
    assert f'{len(runs)} runs: ' in capsys.readouterr().out
    assert main(['compute', str(tmp_path/'PLAN.json'), '--store', str(tmp_path/'store')]) == 0
    assert all(Store(tmp_path/'store').result(run) for run in runs)
    for wrong in (['table99'], ['table1', '--profile', 'huge'], ['table1', '-p', 'colour', 'red'], ['table1', '--out', '/proc/none/PLAN.json']):
        assert main(['plan', *wrong]) == 2 and capsys.readouterr().err.count('\n') == 1
